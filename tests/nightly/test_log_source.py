"""The night reads the service's log: sealed files and the one that is written to, each record once, beside whoever writes."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from bandits.log.files import log_files, writing
from bandits.log.segments import DamagedError, gaps
from bandits.log.segments import records as stored
from pipelines.nightly.ingest import Ingested, ingest
from pipelines.nightly.lake import Lake, open_lake
from pipelines.nightly.log_source import log_ranges, sources_of
from pipelines.nightly.settings import Settings
from tests.nightly.events import POINT, decision, folder, listed, records, reward, settings, shown
from tests.nightly.logged import append, entries

DECISIONS = [decision(f"d{i:03d}", at=i, unit=f"u{i % 40}", chosen=i % 3) for i in range(300)]
REWARDS = [reward(f"d{i:03d}", i / 100, at=i + 30) for i in range(250)]
SHOWN = [shown(f"d{i:03d}", "abc"[i % 3], at=i + 1) for i in range(60)]
TABLES = ("decisions", "rewards", "shown", "orphan_rewards", "orphan_shown", "conflicts")


def take(config: Settings) -> tuple[Lake, Ingested]:
    """Ingest all there is, and commit."""
    lake = open_lake(config)
    found = ingest(config, lake, lake.snapshot(), sources_of(config, lake, lake.snapshot()))
    lake.commit(found.entries, lambda entry: entry.place in found.dropped)
    return lake, found


def numbers(lake: Lake, *tables: str) -> list[tuple[str, int]]:
    """Log and number of every record of some tables."""
    return sorted((row["log_id"], row["log_row"]) for name in tables for row in records(lake, lake.snapshot().find(name)))


def without_numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in ("log_id", "log_row")} for row in rows]


def test_the_log_gives_what_a_folder_of_the_same_events_gives(tmp_path: Path) -> None:
    logged, delivered = settings(tmp_path / "logged"), settings(tmp_path / "delivered")
    append(logged.log, entries(DECISIONS, REWARDS, SHOWN))
    folder(delivered.folder / "inbox" / "all", DECISIONS, REWARDS, SHOWN)
    (ours, found), (theirs, expected) = take(logged), take(delivered)
    assert found.counts == expected.counts
    for name in ("decisions", "rewards", "shown"):
        held = records(ours, ours.snapshot().find(name))
        assert without_numbers(held) == without_numbers(records(theirs, theirs.snapshot().find(name)))
        assert held
    assert [row for _, row in numbers(ours, "decisions", "rewards", "shown")] == list(range(1, 611))


def test_any_cutting_of_the_log_into_ingests_and_files_gives_one_lake(tmp_path: Path) -> None:
    """Pieces of the events, some in sealed files, some in the one that is written to, each ingested as soon as it is there."""
    found = []
    for seed in range(4):
        rng, config = random.Random(seed), settings(tmp_path / f"{seed}")
        every = list(entries(DECISIONS, REWARDS, SHOWN))
        cuts = sorted(rng.sample(range(1, len(every)), 3))
        for start, end in zip([0, *cuts], [*cuts, len(every)], strict=True):
            half = rng.randint(start, end)
            pieces = [iter(piece) for piece in (every[start:half], every[half:end]) if piece]
            append(config.log, *pieces, apart=bool(seed % 2))
            lake, _ = take(config)
        assert (len(log_files(config.log)) > 4) == bool(seed % 2)
        held = {name: without_numbers(records(lake, lake.snapshot().find(name))) for name in TABLES}
        delivered = records(lake, lake.snapshot().find("deliveries"))
        assert (sum(row["delivered"] for row in delivered), sum(row["repeated"] for row in delivered)) == (300, 0)
        found.append(held)
    assert all(one == found[0] for one in found)


def test_an_ingest_without_anything_new_reads_nothing(tmp_path: Path) -> None:
    config = settings(tmp_path)
    append(config.log, entries(DECISIONS[:10]))
    lake, _ = take(config)
    before = listed(lake.snapshot(), *TABLES)
    lake, found = take(config)
    assert found.entries == []
    assert listed(lake.snapshot(), *TABLES) == before


def test_contradictions_other_tenants_and_wrong_tokens_are_kept_apart(tmp_path: Path) -> None:
    config = settings(tmp_path)
    contradiction = [reward("d000", 0.0, at=30), reward("d000", 5.0, at=31)]
    append(
        config.log,
        entries([*DECISIONS[:3], decision("theirs", tenant="other")], contradiction, quarantined=[reward("d001", 9.0, at=40)]),
    )
    lake, found = take(config)
    assert (found.counts["foreign"], found.counts["quarantined"], found.counts["rewards"]) == (1, 1, 2)
    assert [row["value"] for row in records(lake, lake.snapshot().find("rewards"))] == [0.0, 5.0]
    (aside,) = records(lake, lake.snapshot().find("rejected"))
    assert (aside["kind"], aside["decision_id"], aside["log_row"]) == ("quarantined", "d001", 6)
    assert '"value":9.0' in aside["record"]
    other = settings(tmp_path, tenant="other")
    lake, found = take(other)
    assert [row["decision_id"] for row in records(lake, lake.snapshot().find("decisions"))] == ["theirs"]


def test_a_rejected_record_is_read_again_once_the_settings_know_it(tmp_path: Path) -> None:
    config = settings(tmp_path)
    append(config.log, entries([*DECISIONS[:2], decision("new", actions=["a", "b", "z"])]))
    _, found = take(config)
    assert (found.counts["decisions"], found.counts["rejected"]) == (2, 1)
    mended = settings(tmp_path, point=POINT.replace('["a", "b", "c"]', '["a", "b", "c", "z"]'))
    lake, found = take(mended)
    assert (found.counts["decisions"], found.counts["rejected"]) == (1, 0)
    assert len(records(lake, lake.snapshot().find("decisions"))) == 3
    assert records(lake, lake.snapshot().find("rejected")) == []


def test_a_damaged_record_is_left_out_and_is_a_missing_number(tmp_path: Path) -> None:
    config = settings(tmp_path)
    append(config.log, entries(DECISIONS[:20]))
    (path,) = log_files(config.log)
    with closing(writing(path)) as connection:
        connection.execute("UPDATE entries SET record = cast(replace(record, 'policy@1', 'policy@2') AS BLOB) WHERE row = 8")
    lake, found = take(config)
    assert found.counts["decisions"] == 19
    sequence = records(lake, lake.snapshot().find("sequence"))
    assert [(row["first"], row["last"]) for row in sequence] == [(1, 7), (9, 20)]


def test_a_record_that_was_put_back_is_read_once(tmp_path: Path) -> None:
    config = settings(tmp_path)
    append(config.log, entries(DECISIONS[:20]))
    (path,) = log_files(config.log)
    with closing(writing(path)) as connection:
        connection.execute("CREATE TABLE saved AS SELECT * FROM entries WHERE row IN (8, 9, 12)")
        connection.execute("DELETE FROM entries WHERE row IN (8, 9, 12)")
    assert take(config)[1].counts["decisions"] == 17
    assert take(config)[1].counts["decisions"] == 0
    with closing(writing(path)) as connection:
        connection.execute("INSERT INTO entries SELECT * FROM saved WHERE row <> 8")
    assert take(config)[1].counts["decisions"] == 2
    lake, found = take(config)
    assert found.counts["decisions"] == 0
    assert [(row["first"], row["last"]) for row in records(lake, lake.snapshot().find("sequence"))] == [(1, 7), (9, 20)]
    with closing(writing(path)) as connection:
        connection.execute("INSERT INTO entries SELECT * FROM saved WHERE row = 8")
    append(config.log, entries([decision("later")]))
    lake, found = take(config)
    assert found.counts["decisions"] == 2
    assert sorted(row["log_row"] for row in records(lake, lake.snapshot().find("decisions"))) == list(range(1, 22))


@pytest.mark.parametrize(
    "change", ["kind = 130", "kind = -1", "kind = 5000000000", "record = X'7B'", "checksum = X''", "key = X'64'"]
)
def test_no_altered_record_stops_the_others(change: str, tmp_path: Path) -> None:
    config = settings(tmp_path)
    append(config.log, entries(DECISIONS[:20]))
    (path,) = log_files(config.log)
    with closing(writing(path)) as connection:
        connection.execute(f"UPDATE entries SET {change} WHERE row = 8")
    assert gaps(path) == [(8, 8)]
    assert [one.row for one in stored(path)] == [*range(1, 8), *range(9, 21)]
    assert take(config)[1].counts["decisions"] == 19


def test_the_end_of_a_sealed_file_that_is_gone_is_a_gap(tmp_path: Path) -> None:
    config = settings(tmp_path)
    append(config.log, entries(DECISIONS[:20]))
    (path,) = log_files(config.log)
    with closing(writing(path)) as connection:
        connection.execute("UPDATE log SET sealed = 1, rows = 20")
        connection.execute("DELETE FROM entries WHERE row > 15")
    assert [(one.first, one.last) for one in log_ranges(config.log, [], {})] == [(1, 20)]


def test_a_log_of_another_version_is_said_to_be_one(tmp_path: Path) -> None:
    config = settings(tmp_path)
    append(config.log, entries(DECISIONS[:20]))
    (path,) = log_files(config.log)
    with closing(writing(path)) as connection:
        connection.pragma("user_version", 1)
    with pytest.raises(DamagedError, match="found version 1; expected 2: use the propel that wrote it"):
        log_ranges(config.log, [], {})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    config = settings(tmp_path)
    append(config.log, entries(DECISIONS))
    (path,) = log_files(config.log)
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(DamagedError, match=r"log-00000001.sqlite: found .*; expected a file of a log: restore it"):
        log_ranges(config.log, [], {})


def test_numbers_beyond_the_last_record_are_not_read_yet(tmp_path: Path) -> None:
    """A tail that was lost with the power gives its numbers away again: what gets them must be read."""
    config = settings(tmp_path)
    append(config.log, entries(DECISIONS[:20]))
    (path,) = log_files(config.log)
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute("DELETE FROM entries WHERE row > 15")
    (one,) = log_ranges(config.log, [], {})
    assert (one.first, one.last) == (1, 15)
