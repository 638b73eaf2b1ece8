"""Sealed files of the log are deleted once the lake holds all of them, and only then; an audit accounts for every record."""

from __future__ import annotations

import itertools
import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bandits.log.files import COMPACTED, head_file, log_files, writing
from bandits.log.port import Entry
from bandits.log.segments import DamagedError, records
from bandits.log.sqlite import SqliteLog
from pipelines.log.audit import audit
from pipelines.log.compact import compact, finish, note, noted
from pipelines.nightly.lake import BusyError, LakeError, alone, open_lake
from pipelines.nightly.settings import Settings
from propel import app
from tests.nightly.events import decision, reward, settings, shown
from tests.nightly.events import records as rows
from tests.nightly.logged import append, entries
from tests.nightly.test_log_source import take

DECISIONS = [decision(f"d{i:03d}", at=i, unit=f"u{i % 40}", chosen=i % 3) for i in range(90)]
REWARDS = [*(reward(f"d{i:03d}", i / 100, at=i + 30) for i in range(60)), reward("nobody", at=5)]


def three_files(folder: Path) -> Settings:
    """A log of two sealed files and one that is written to."""
    config = settings(folder)
    groups = (
        entries(DECISIONS[:40], REWARDS[:20]), entries(DECISIONS[40:], REWARDS[20:], [shown("d001", "a", at=9)]),
        entries([decision("live", at=200)]),
    )  # fmt: skip
    append(config.log, *groups, apart=True)
    return config


def in_log(config: Settings) -> set[tuple[str, int]]:
    return {(one.log_id, one.row) for path in log_files(config.log) for one in records(path)}


def in_lake(config: Settings) -> list[tuple[str, int]]:
    lake = open_lake(config)
    tables = ("decisions", "rewards", "shown", "orphan_rewards", "orphan_shown", "rejected")
    return [(row["log_id"], row["log_row"]) for name in tables for row in rows(lake, lake.snapshot().find(name))]


def test_what_the_lake_holds_goes_and_the_rest_stays(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    every = in_log(config)
    assert len(every) == 90 + 61 + 1 + 1
    found = compact(config, older_than_days=0)
    assert not found.deleted
    assert found.kept["log-00000001.sqlite"] == "the lake of tenant 'tenant' lacks 60 of its records, the first of them row 1"
    take(config)
    found = compact(config, older_than_days=0)
    assert [(one.file, one.rows) for one in found.deleted] == [(1, 60), (2, 92)]
    assert found.kept == {"log-00000003.sqlite": "it is written to"}
    assert [path.name for path in log_files(config.log)] == ["log-00000003.sqlite"]
    assert not list(config.log.glob("log-0000000[12]*"))
    held = in_lake(config)
    assert len(held) == len(set(held))
    assert set(held) | in_log(config) == every
    assert list(noted(config.log)) == [1, 2]


def test_a_repeated_decision_is_answered_as_before_compaction(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    take(config)
    compact(config, older_than_days=0)
    log = SqliteLog(config.log, reserve=1)
    (again,) = entries(DECISIONS[7:8])
    outcome, other = log.append([again._replace(fresh=False), again._replace(fresh=False, content=b"another")])
    log.close()
    assert (outcome.state, outcome.answer, other.state) == ("repeated", b"answer", "conflict")


def test_recent_files_stay(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    take(config)
    assert set(compact(config).kept.values()) == {"it is written to", "it is not old enough"}


def test_records_of_other_tenants_must_be_in_their_lakes(tmp_path: Path) -> None:
    config = settings(tmp_path)
    append(config.log, entries([*DECISIONS[:3], decision("theirs", tenant="other")]), entries(DECISIONS[3:4]), apart=True)
    take(config)
    expected = "the lake of tenant 'other' lacks 1 of its records, the first of them row 4"
    assert compact(config, older_than_days=0).kept["log-00000001.sqlite"] == expected
    take(settings(tmp_path, tenant="other"))
    (gone,) = compact(config, older_than_days=0).deleted
    assert set(gone.snapshots) == {"tenant", "other"}


def test_damaged_files_and_damaged_lakes_delete_nothing(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    take(config)
    lake = open_lake(config)
    entry = lake.snapshot().find("rewards")[0]
    path = lake.folder / entry.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LakeError, match="the partition was altered"):
        compact(config, older_than_days=0)
    assert len(log_files(config.log)) == 3
    path.write_bytes(whole)
    with closing(writing(log_files(config.log)[0])) as connection:
        connection.execute("DELETE FROM entries WHERE row = 12")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    found = compact(config, older_than_days=0)
    assert found.kept["log-00000001.sqlite"] == "records are missing or damaged (12): restore it from a backup first"
    assert [one.file for one in found.deleted] == [2]


def test_nothing_is_compacted_while_a_night_runs(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    with alone(open_lake(config)), pytest.raises(BusyError, match="another night is running"):
        compact(config, older_than_days=0)


def test_what_was_noted_is_deleted_by_the_next_compaction(tmp_path: Path) -> None:
    """As where it was killed after the note."""
    config = three_files(tmp_path)
    take(config)
    saved = tmp_path / "saved"
    shutil.copytree(config.log, saved)
    gone = compact(config, older_than_days=0).deleted
    note(saved, gone)
    finish(saved)
    assert [path.name for path in log_files(saved)] == ["log-00000003.sqlite"]


def test_a_note_of_another_log_deletes_nothing(tmp_path: Path) -> None:
    """As where a log's files were lost, and a new one was begun beside the note of the old."""
    config, other = three_files(tmp_path / "one"), three_files(tmp_path / "other")
    take(config)
    take(other)
    note(other.log, compact(config, older_than_days=0).deleted)
    with pytest.raises(ValueError, match=r"log-00000001.sqlite: found the log .*; compacted.jsonl says that .* was deleted"):
        compact(other, older_than_days=0)
    assert len(log_files(other.log)) == 3


def test_an_audit_counts_and_finds_all_accounted_for(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    take(config)
    found = audit(config)
    assert (found.decisions, found.rewards, found.shown, found.conflicts, found.orphans) == (91, 61, 1, 0, 1)
    assert (found.appends, found.missing, found.findings) == (153, 0, [])
    assert [(one.records, one.in_lake, one.sealed) for one in found.files] == [(60, 60, True), (92, 92, True), (1, 1, False)]
    compact(config, older_than_days=0)
    found = audit(config)
    assert (found.appends, found.compacted, found.findings) == (153, 152, [])


def test_an_audit_names_what_is_missing(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    take(config)
    first, second = log_files(config.log)[:2]
    with closing(writing(first)) as connection:
        connection.execute("DELETE FROM entries WHERE row = 12")
    found = audit(config)
    log_id = next(iter(records(first))).log_id
    assert found.missing == 1
    assert found.findings == [
        f"log-00000001.sqlite ({log_id}): record 12 is missing or damaged, after decision d010 and before decision d012; "
        "the lake holds 1 of them: d011"
    ]
    second.unlink()
    assert audit(config).findings[1] == (
        "log-00000002.sqlite: found no such file, and no note that it was compacted: restore it from a backup"
    )


def test_an_audit_misses_files_that_only_the_index_or_the_lake_know(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    take(config)
    for path in log_files(config.log):
        path.unlink()
    names = [f"log-0000000{file}.sqlite: found no such file" for file in (1, 2, 3)]
    assert [one[: len(names[0])] for one in audit(config).findings] == names
    shutil.rmtree(config.log)
    assert [one[: len(names[0])] for one in audit(config).findings] == names


def test_an_audit_misses_the_end_of_a_file_that_the_lake_has_read(tmp_path: Path) -> None:
    """Also where the note of the last record is lost with it; and the next ingest does not take new records for those."""
    config = settings(tmp_path)
    append(config.log, entries(DECISIONS[:20]))
    take(config)
    (path,) = log_files(config.log)
    with closing(writing(path)) as connection:
        connection.execute("DELETE FROM entries WHERE row > 15")
    head_file(path).unlink()
    found = audit(config)
    assert (found.missing, [one.gaps for one in found.files]) == (5, [[(16, 20)]])
    assert "records 16 to 20 are missing or damaged, after decision d014; the lake holds 5 of them" in found.findings[0]
    with pytest.raises(DamagedError, match="found 15 as its last record; expected 20, which was read"):
        take(config)


def test_an_audit_misses_what_was_compacted_and_is_in_no_lake(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    lake, _ = take(config)
    compact(config, older_than_days=0)
    lake.commit([], lambda entry: entry.table == "rewards" and entry.bucket == 0)
    assert "log-00000001.sqlite was compacted, and the lake lacks" in audit(config).findings[0]
    shutil.rmtree(lake.folder)
    assert audit(config).findings == [
        f"log-0000000{file}.sqlite was compacted, and the lake lacks {rows} of its {rows} records now: "
        "go back to a list of the lake that holds them, or restore it from a copy"
        for file, rows in ((1, 60), (2, 92))
    ]


def test_an_audit_goes_on_past_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    log_files(config.log)[0].write_bytes(b"no database" * 1000)
    found = audit(config)
    assert (found.decisions, len(found.files)) == (51, 2)
    assert "log-00000001.sqlite: found" in found.findings[0]


def test_a_decision_that_a_client_was_answered_once_counts_as_answered(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("".join(f'{{"decision_id": "lost", "acknowledged": {said}}}\n' for said in ("true", "false")))
    status, said = run(config, "audit", "--ledger", str(ledger))
    assert (status, "decision lost: a client was answered, and the log does not have it" in said) == (3, True)


def test_an_audit_compares_with_what_clients_noted(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    ids = [one["decision_id"] for one in DECISIONS]
    found = audit(config, attempted=[*ids, "refused", "lost"], acknowledged=[*ids, "lost"])
    assert (found.attempts, found.unlogged) == (92, 2)
    assert found.findings == ["decision lost: a client was answered, and the log does not have it"]


def test_a_lake_that_lost_what_was_read_into_it_is_found(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    lake, _ = take(config)
    lake.commit([], lambda entry: entry.table == "rewards" and entry.bucket == 0)
    lost = audit(config).findings
    assert lost
    assert all(": records" not in one and "were read into the lake are not there" in one for one in lost)


def test_conflicts_are_counted(tmp_path: Path) -> None:
    config = settings(tmp_path)
    append(config.log, entries(DECISIONS[:1], [reward("d000", 0.0), reward("d000", 1.0)]))
    assert audit(config).conflicts == 1


def run(config: Settings, *arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["log", *arguments, "--config", str(config.folder / "propel.toml")])
    return found.exit_code, found.output


def test_the_commands_say_what_the_functions_find(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    assert run(config, "verify") == (
        0, "".join(f"log-0000000{n}.sqlite: {rows} records, all there\n" for n, rows in ((1, 60), (2, 92), (3, 1)))
    )  # fmt: skip
    take(config)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text('{"decision_id": "d001", "acknowledged": true}\n{"decision_id": "never", "acknowledged": false}\n')
    status, said = run(config, "audit", "--ledger", str(ledger))
    assert status == 0
    assert said.startswith("2 attempts; 153 records: 91 decisions, 61 rewards, 1 shown, 0 quarantined, 0 compacted; 0 missing, 1 ")
    assert said.endswith("all is accounted for\n")
    status, said = run(config, "compact", "--older-than", "0", "--json")
    assert (status, [one["file"] for one in json.loads(said)["deleted"]]) == (0, [1, 2])
    with closing(writing(log_files(config.log)[0])) as connection:
        connection.execute("UPDATE entries SET answer = x'00'")
    status, said = run(config, "verify", "--json")
    assert (status, json.loads(said)["files"][0]["gaps"]) == (3, [[1, 1]])
    assert run(config, "audit")[0] == 3
    ledger.write_text("no JSON")
    status, said = run(config, "audit", "--ledger", str(ledger))
    assert status == 2
    assert "expected lines of JSON with decision_id and acknowledged" in said


def test_without_a_log_the_commands_say_where_they_looked(tmp_path: Path) -> None:
    config = settings(tmp_path)
    for command in ("verify", "replay", "audit", "compact"):
        status, said = run(config, command)
        assert (status, "expected files that `propel serve` wrote: see serve.data" in said.replace("\n", " ")) == (2, True)


def test_an_unreadable_note_is_named(tmp_path: Path) -> None:
    config = three_files(tmp_path)
    (config.log / COMPACTED).write_text("?\n")
    with pytest.raises(ValueError, match=r"compacted.jsonl: found .*; expected a line of JSON for each file"):
        audit(config)


def test_the_bench_can_fail() -> None:
    """Entries of tests differ from one another: an audit of one would miss nothing otherwise."""
    made: list[Entry] = list(entries(DECISIONS, REWARDS))
    assert all(one.key != other.key for one, other in itertools.combinations(made, 2))
