"""Ingest: a set of records, each exactly once, whatever was delivered how often, in which order, in how many pieces."""

from __future__ import annotations

import datetime as dt
import os
import random
from pathlib import Path
from typing import Any

import pytest

from bandits.sampling import TOTAL
from ope.data import InputError
from pipelines.nightly.ingest import ingest
from pipelines.nightly.join import join
from pipelines.nightly.lake import Lake
from pipelines.nightly.settings import Night, Settings
from pipelines.nightly.sources import inbox
from tests.nightly.deliveries import deliver, lake_of, take
from tests.nightly.events import DAY, POINT, decision, folder, records, reward, settings, shown

NIGHT = dt.date.fromisoformat(DAY)
NOTHING_ASIDE = {"rejected": 0, "foreign": 0, "quarantined": 0}


def rows_of(config: Settings, lake: Lake, date: dt.date = NIGHT) -> dict[str, dict[str, Any]]:
    """Joined rows by decision id, after the join of a night."""
    snapshot = lake.commit(join(Night.of(date, config), config, lake, lake.snapshot()))
    return {row["decision_id"]: row for row in records(lake, snapshot.find("rows"))}


def test_every_record_once_by_tenant_and_id(tmp_path: Path) -> None:
    config = settings(tmp_path)
    folder(tmp_path / "inbox" / "one", [decision("d0"), decision("d1", at=5)], [reward("d0", at=3)])
    folder(tmp_path / "inbox" / "two", [decision("d1", at=5), decision("d2", at=9)], [reward("d0", at=3), reward("d2", at=10)])
    lake, _ = lake_of(config)
    found = take(config, lake)
    assert found.counts == {"decisions": 3, "repeated": 1, "rewards": 2, "orphan_rewards": 0} | NOTHING_ASIDE
    held = records(lake, lake.snapshot().find("decisions"))
    assert sorted(row["decision_id"] for row in held) == ["d0", "d1", "d2"]
    delivered = records(lake, lake.snapshot().find("deliveries"))
    assert [(row["source"], row["delivered"], row["repeated"]) for row in delivered] == [("one", 2, 0), ("two", 2, 1)]


def test_a_second_ingest_does_nothing(tmp_path: Path) -> None:
    config = settings(tmp_path)
    folder(tmp_path / "inbox" / "one", [decision("d0")], [reward("d0")])
    lake, _ = lake_of(config)
    take(config, lake)
    before = lake.snapshot()
    assert take(config, lake).entries == []
    assert lake.snapshot() == before


def test_one_hash_over_any_order_split_and_repeat(tmp_path: Path) -> None:
    """I11: repeats, late rewards, rewards before their decisions, conflicts and orphans; any delivery, the same lake."""
    trials = 100 if "PROPEL_KILLS" in os.environ else 6  # `make faults` asks for more
    assert len({deliver(tmp_path / f"{trial}", random.Random(trial)) for trial in range(trials)}) == 1


def test_an_exact_repeat_is_nothing_and_another_value_a_conflict(tmp_path: Path) -> None:
    """I9 as outcomes: no-op, conflict by the declared rule, left out of learning and counted."""
    config = settings(tmp_path)
    folder(tmp_path / "inbox" / "one", [decision("d0"), decision("d1")], [reward("d0", 1.0, at=5), reward("d1", 1.0, at=5)])
    folder(tmp_path / "inbox" / "two", rewards=[reward("d0", 1.0, at=5), reward("d1", 2.0, at=6)])
    lake, _ = lake_of(config)
    take(config, lake)
    rows = rows_of(config, lake, NIGHT + dt.timedelta(days=1))
    assert (rows["d0"]["value.reward"], rows["d0"]["state.reward"], rows["d0"]["conflicts.reward"]) == (1.0, "observed", 0)
    assert (rows["d1"]["value.reward"], rows["d1"]["state.reward"], rows["d1"]["conflicts.reward"]) == (None, "conflict", 1)


def test_a_value_outside_its_range_is_refused_and_never_clipped(tmp_path: Path) -> None:
    """I14: not finite is rejected with a reason; out of range does not count, and is counted."""
    config = settings(tmp_path)
    events = [reward("d0", float("nan")), reward("d1", 10.5), reward("d2", 10.0)]
    folder(tmp_path / "inbox" / "one", [decision("d0"), decision("d1"), decision("d2")], events)
    lake, _ = lake_of(config)
    take(config, lake)
    rejected = records(lake, lake.snapshot().find("rejected"))
    assert [(row["decision_id"], row["reason"]) for row in rejected] == [("d0", "value: expected a finite number")]
    rows = rows_of(config, lake)
    assert [rows[id_]["value.reward"] for id_ in ("d0", "d1", "d2")] == [0.0, 0.0, 10.0]
    assert [rows[id_]["refused.reward"] for id_ in ("d0", "d1", "d2")] == [0, 1, 0]


def test_an_orphan_waits_and_is_joined_when_its_decision_comes(tmp_path: Path) -> None:
    """I10: stored, never dropped, tried again at every ingest."""
    config = settings(tmp_path)
    lake, _ = lake_of(config)
    folder(tmp_path / "inbox" / "one", [decision("d0")], [reward("d9", 3.0, at=50)], [shown("d9", "a", at=51)])
    assert take(config, lake).counts["orphan_rewards"] == 1
    folder(tmp_path / "inbox" / "two", [decision("d9", at=40)])
    assert take(config, lake).counts["orphan_rewards"] == 0
    row = rows_of(config, lake)["d9"]
    assert (row["value.reward"], row["shown"]) == (3.0, "as_sampled")
    assert records(lake, lake.snapshot().find("orphan_rewards")) == []


def test_a_late_reward_reopens_its_partition_and_the_old_snapshot_stays(tmp_path: Path) -> None:
    """I13: a later snapshot has the reward; the former one still lists, and holds, what it did."""
    config = settings(tmp_path)
    lake, _ = lake_of(config)
    folder(tmp_path / "inbox" / "one", [decision("d0"), decision("d1")])
    take(config, lake)
    assert rows_of(config, lake)["d0"]["value.reward"] == 0.0
    before = lake.snapshot()
    folder(tmp_path / "inbox" / "two", rewards=[reward("d0", 2.0, at=60)])
    take(config, lake)
    assert rows_of(config, lake)["d0"]["value.reward"] == 2.0
    again = Lake(lake.folder)
    assert {row["decision_id"]: row["value.reward"] for row in records(again, again.snapshot(before.id).find("rows"))}["d0"] == 0.0
    assert max(entry.revision for entry in lake.snapshot().find("rows")) == 2


def test_unknown_is_null_until_mature_with_the_cut_off_of_the_night(tmp_path: Path) -> None:
    """I12: the last hour of a day is not mature at midnight, and is after the next night."""
    config = settings(tmp_path)
    lake, _ = lake_of(config)
    folder(tmp_path / "inbox" / "one", [decision("early", at=100), decision("late", at=86_000)], [reward("late", 4.0, at=86_010)])
    take(config, lake)
    first = rows_of(config, lake)
    assert (first["early"]["value.reward"], first["early"]["state.reward"]) == (0.0, "default")
    assert (first["late"]["value.reward"], first["late"]["state.reward"]) == (None, "pending")
    assert rows_of(config, lake, NIGHT + dt.timedelta(days=1))["late"]["value.reward"] == 4.0


def test_a_broken_record_of_another_tenant_is_theirs(tmp_path: Path) -> None:
    config = settings(tmp_path)
    lake, _ = lake_of(config)
    folder(tmp_path / "inbox" / "one", [decision("d0"), decision("d1", tenant="other") | {"actions": ["a", None]}])
    counts = take(config, lake).counts
    assert (counts["decisions"], counts["rejected"], counts["foreign"]) == (1, 0, 1)


def test_an_older_night_takes_back_nothing_that_a_newer_one_knew(tmp_path: Path) -> None:
    config = settings(tmp_path)
    lake, _ = lake_of(config)
    folder(tmp_path / "inbox" / "one", [decision("late", at=86_000)], [reward("late", 4.0, at=86_010)])
    take(config, lake)
    rows_of(config, lake, NIGHT + dt.timedelta(days=1))
    newer = lake.snapshot()
    assert rows_of(config, lake)["late"]["value.reward"] == 4.0
    assert lake.snapshot() == newer


def test_two_tenants_with_one_id_do_not_meet(tmp_path: Path) -> None:
    ours, theirs = settings(tmp_path / "a"), settings(tmp_path / "a", tenant="other")
    events = [decision("d0"), decision("d0", tenant="other", chosen=1)]
    folder(tmp_path / "a" / "inbox" / "one", events, [reward("d0", 1.0), reward("d0", 7.0, tenant="other")])
    for config, value, action in ((ours, 1.0, 0), (theirs, 7.0, 1)):
        lake, _ = lake_of(config)
        assert take(config, lake).counts["foreign"] == 2
        row = rows_of(config, lake)["d0"]
        assert (row["value.reward"], row["action"]) == (value, action)


@pytest.mark.parametrize("later", [{"day": "2026-11-21"}, {"unit": "somebody else"}, {"chosen": 2}])
def test_one_id_with_two_contents_is_kept_listed_and_never_learned_from(tmp_path: Path, later: dict[str, Any]) -> None:
    config = settings(tmp_path, more="[lake]\nbuckets = 16\n")
    lake, _ = lake_of(config)
    folder(tmp_path / "inbox" / "one", [decision("d0", unit="u"), decision("d1", unit="u")])
    folder(tmp_path / "inbox" / "two", [decision("d0", **({"unit": "u"} | later))])
    for name in ("one", "two"):
        found = ingest(config, lake, lake.snapshot(), [one for one in inbox(tmp_path / "inbox") if one.name == name])
        lake.commit(found.entries)
    assert sum(entry.rows for entry in lake.snapshot().find("decisions")) == 3
    assert {row["decision_id"] for row in records(lake, lake.snapshot().find("conflicts"))} == {"d0"}
    assert set(rows_of(config, lake)) == {"d1"}


def test_rewards_of_a_retry_belong_to_the_first_of_the_chain_where_the_point_says_so(tmp_path: Path) -> None:
    config = settings(tmp_path, point='attribution = "root"\n' + POINT.lstrip())
    lake, _ = lake_of(config)
    folder(tmp_path / "inbox" / "one", [decision("c", parent="b", at=2), decision("a", at=0)], [reward("c", 5.0, at=9)])
    assert take(config, lake).counts["orphan_rewards"] == 1  # b is not there yet: who knows what it retried
    folder(tmp_path / "inbox" / "two", [decision("b", parent="a", at=1)])
    take(config, lake)
    assert {id_: row["value.reward"] for id_, row in rows_of(config, lake).items()} == {"a": 5.0, "b": 0.0, "c": 0.0}


def test_numbers_of_a_source_become_intervals(tmp_path: Path) -> None:
    config = settings(tmp_path)
    lake, _ = lake_of(config)
    numbered = [decision(f"d{i}", log_id="log", log_row=i) for i in (1, 2, 3, 6)]
    folder(tmp_path / "inbox" / "one", numbered, [reward("d1", log_id="log", log_row=4)])
    take(config, lake)
    folder(tmp_path / "inbox" / "two", rewards=[reward("d2", log_id="log", log_row=7), reward("d2", log_id="log", log_row=1)])
    take(config, lake)
    intervals = [(row["first"], row["last"]) for row in records(lake, lake.snapshot().find("sequence"))]
    assert intervals == [(1, 4), (6, 7)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"propensity": 0.3}, "propensity: expected the share of the action taken"),
        ({"propensity": 0.0}, "propensity: expected a probability above 0, at most 1"),
        ({"chosen": 3, "propensity": 0.5}, "chosen: expected an index into the actions"),
        ({"actions": ["a", "b", "z"]}, "actions: expected those of the catalogue of point"),
        ({"actions": ["a", "b", "b"]}, "actions: expected distinct ones"),
        ({"actions": []}, "actions: expected at least one eligible action"),
        ({"shares": b"123"}, "shares: expected four bytes per action, or none"),
        ({"shares": b"\0" * 12}, f"shares: expected them to sum to {TOTAL}"),
        ({"body": b"{}"}, "body: found another one than was hashed when the decision was made"),
        ({"decision_id": ""}, "decision_id: expected 1 to 128 printable characters"),
        ({"unit": "a\u202eb"}, "unit: expected 1 to 128 printable characters"),
        ({"actions": ["a", "b", None]}, "actions: expected texts"),
        ({"schema_version": 2}, "schema_version: expected 1 to 1, those that this version reads"),
        ({"schema_version": None}, "schema_version: expected 1 to 1, those that this version reads"),
        ({"kind": "guessed"}, "kind: expected one of sampled, fallback, override, shadow"),
        ({"decided_at_ns": -1}, "decided_at_ns: expected nanoseconds since 1970"),
        ({"decision_point": "elsewhere"}, "decision_point: not one of the settings"),
    ],
)
def test_what_breaks_the_contract_is_rejected_with_its_reason(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    config = settings(tmp_path)
    lake, _ = lake_of(config)
    folder(tmp_path / "inbox" / "one", [decision("good"), decision("bad") | changes])
    take(config, lake)
    assert [(row["row"], row["reason"]) for row in records(lake, lake.snapshot().find("rejected"))] == [(1, reason)]
    assert [row["decision_id"] for row in records(lake, lake.snapshot().find("decisions"))] == ["good"]


def test_a_source_that_is_no_parquet_file_is_named_and_nothing_is_listed(tmp_path: Path) -> None:
    config = settings(tmp_path)
    lake, _ = lake_of(config)
    folder(tmp_path / "inbox" / "one", [decision("d0")])
    (tmp_path / "inbox" / "one" / "rewards.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"rewards\.parquet: found .*; expected a complete Parquet file"):
        take(config, lake)
    assert lake.snapshot().entries == ()


def test_a_lake_keeps_its_number_of_buckets(tmp_path: Path) -> None:
    config = settings(tmp_path)
    lake, _ = lake_of(config)
    folder(tmp_path / "inbox" / "one", [decision("d0")])
    take(config, lake)
    with pytest.raises(InputError, match=r"lake\.buckets: found 8; expected 4"):
        take(settings(tmp_path, more="[lake]\nbuckets = 8\n"), lake)


def test_rejected_records_come_back_once_the_settings_are_mended(tmp_path: Path) -> None:
    config = settings(tmp_path, point=POINT.replace('"b", "c"', '"b"'))
    lake, _ = lake_of(config)
    events = [decision("d0") | {"actions": ["a", "b"], "shares": 2 * (TOTAL // 2).to_bytes(4, "little")}, decision("d1")]
    folder(tmp_path / "inbox" / "one", events, [reward("d1", 3.0, at=9)])
    counts = take(config, lake).counts
    assert (counts["decisions"], counts["rejected"], counts["orphan_rewards"]) == (1, 1, 1)
    assert take(config, lake).entries == []
    config = settings(tmp_path)
    counts = take(config, lake).counts
    assert (counts["decisions"], counts["rejected"], counts["orphan_rewards"]) == (1, 0, 0)
    assert records(lake, lake.snapshot().find("rejected")) == []
    delivered = records(lake, lake.snapshot().find("deliveries"))
    assert (sum(row["delivered"] for row in delivered), sum(row["repeated"] for row in delivered)) == (2, 0)
    assert rows_of(config, lake)["d1"]["value.reward"] == 3.0
    assert take(config, lake).entries == []


def test_a_folder_that_was_only_touched_is_not_read_again(tmp_path: Path) -> None:
    config = settings(tmp_path)
    lake, _ = lake_of(config)
    source = folder(tmp_path / "inbox" / "one", [decision("d0")])
    take(config, lake)
    (source.path / "decisions.parquet").touch()
    assert take(config, lake).entries == []
