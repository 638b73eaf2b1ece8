"""The step: what a day's partitions become, what its raw events say, what is named, and that a second run has nothing to do."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from bandits.registry import Registry
from bandits.salts import read_salts
from ope.data import InputError
from pipelines.nightly.certify import passed, verify_certificate
from pipelines.nightly.rows import Entry
from pipelines.nightly.tables import TABLES
from tests.nightly.certified_lakes import DATE, NAMES, POINT, SALT, WINDOW, World, logged, place, raw_decisions
from tests.nightly.loggers import rows_lost


def record(world: World, **more: Any) -> dict[str, Any]:
    world.certify()
    return world.certificate_of()


def salted(folder) -> World:
    (folder / "salts.toml").write_text(f'{SALT.epoch} = "{SALT.key.hex()}"\n')
    return World(folder, certificate={"salts": "salts.toml", "replayed": 200})


def test_a_right_day_passes_and_its_tables_add_up(tmp_path):
    world = World(tmp_path)
    world.day(logged(4_000), buckets=3)
    found = record(world)
    assert (found["verdict"], found["reasons"]) == ("pass", [])
    assert (found["rows"], found["sampled"], found["shadow"], found["vectors"]) == (4_000, 4_000, 0, 1.0)
    assert found["weight_mean"] == pytest.approx(1, abs=0.1)
    assert abs(found["weight_z"]) < 3
    assert found["gaps"] is None
    assert found["join_low"] is None
    support = {row["action"]: row for row in world.table("support")}
    assert set(support) == set(NAMES)
    assert sum(row["taken"] for row in support.values()) == 4_000
    assert sum(row["expected"] for row in support.values()) == pytest.approx(4_000)
    assert min(row["p_min"] for row in support.values()) == found["p_min"] >= 0.004 - 2 / 2**31
    bins = [row for row in world.table("calibration") if ":" not in row["bin"]]
    assert sum(row["rows"] * row["expected"] for row in bins) == pytest.approx(4_000)
    assert sum(row["rows"] * row["observed"] for row in bins) == pytest.approx(4_000)


def test_buckets_change_nothing(tmp_path):
    found = []
    for buckets in (1, 4):
        world = World(tmp_path / str(buckets))
        world.day(logged(3_000, day=rows_lost(3_000, np.random.default_rng(2))), buckets=buckets)
        found.append(record(world))
    for name, kind in TABLES["certificates"].columns.items():
        if kind == pa.float64() and found[0][name] is not None:
            assert found[1][name] == pytest.approx(found[0][name], rel=1e-9), name
    assert found[0]["verdict"] == found[1]["verdict"] == "fail"


def test_a_second_run_has_nothing_to_do_and_a_first_one_elsewhere_writes_the_same(tmp_path):
    world = World(tmp_path / "a", lookback=2)
    for back in (1, 0):
        world.day(logged(500, back=back), back)
    first = world.certify()
    assert [entry.table for entry in first] == ["certificates", "calibration", "maturity", "support"] * 2
    assert world.certify() == []
    world.day(logged(500, seed=9), 0)
    again = world.certify()
    assert {entry.day for entry in again} == {DATE.isoformat()}
    other = World(tmp_path / "b", lookback=2)
    Registry(tmp_path / "b" / "registry")
    for name in ("signing.key", "control.sqlite"):
        (tmp_path / "b" / "registry" / name).write_bytes((tmp_path / "a" / "registry" / name).read_bytes())
    for back, seed in ((1, 1), (0, 9)):
        other.day(logged(500, back=back, seed=seed), back)
    assert digests(other.certify()) >= digests(again)


def digests(entries: list[Entry]) -> set[str]:
    return {entry.sha256 for entry in entries}


def test_a_certificate_is_signed(tmp_path):
    world = World(tmp_path)
    world.day(logged(300))
    found = record(world)
    key = Registry(tmp_path / "registry").public_key()
    assert verify_certificate(found, key)
    assert verify_certificate(found | {"tenant": "shop"}, key)
    assert not verify_certificate(found | {"rows": 301}, key)
    assert not verify_certificate(found | {"verdict": "warn"}, key)
    assert not verify_certificate(found | {"signature": None}, key)
    assert not verify_certificate(found, Registry(tmp_path / "another").public_key())


def test_verdicts_by_policy_and_day(tmp_path):
    world = World(tmp_path, lookback=2)
    world.day(logged(6_000, back=1), 1)
    mixed = logged(6_000, day=rows_lost(6_000, np.random.default_rng(1)))
    policies = ["good@1"] * 10 + ["live@1"] * (mixed.num_rows - 10)
    world.day(mixed.set_column(mixed.schema.get_field_index("policy"), "policy", pa.array(policies)))
    world.certify()
    lake = world.lake
    verdicts = passed(lake, lake.snapshot(), "ads", [place(back)["day"] for back in (0, 1)])
    assert verdicts == {
        ("live@1", place(1)["day"]): "pass", ("live@1", place()["day"]): "fail", ("good@1", place()["day"]): "pass",
    }  # fmt: skip


def test_replay_catches_one_altered_choice(tmp_path):
    world = salted(tmp_path)
    raw = raw_decisions(150)
    world.day(logged(150))
    world.write(("decisions", raw, place()))
    good = record(world)
    assert (good["replay_checked"], good["replay_wrong"], good["verdict"]) == (150, 0, "pass")
    chosen = raw["chosen"].to_pylist()
    chosen[70] = (chosen[70] + 1) % len(NAMES)
    world.write(
        ("decisions", raw.set_column(raw.schema.get_field_index("chosen"), "chosen", pa.array(chosen, pa.int32())), place())
    )
    bad = record(world)
    assert (bad["replay_checked"], bad["replay_wrong"], bad["verdict"]) == (150, 1, "fail")
    assert bad["reasons"][0].startswith("1 of 150 decisions drawn again")


def test_a_sample_is_replayed_the_same_whatever_the_buckets_and_only_with_a_salt(tmp_path):
    world = salted(tmp_path)
    raw = raw_decisions(500)
    world.day(logged(500))
    halves = [raw.filter(pa.array(np.arange(500) % 2 == b)) for b in range(2)]
    world.write(*(("decisions", half, place() | {"bucket": b}) for b, half in enumerate(halves)))
    assert record(world)["replay_checked"] == 200
    world.write(*(("decisions", half, place() | {"bucket": b}) for b, half in enumerate([raw_decisions(500, epoch=9), raw[:0]])))
    unknown = record(world)
    assert (unknown["replay_checked"], unknown["verdict"]) == (0, "pass")


@pytest.mark.parametrize("text", ['1 = "xy"', '1 = "00"', 'one = "00112233445566778899aabbccddeeff"', "["])
def test_salts_that_are_none_are_refused_without_printing_them(tmp_path, text):
    path = tmp_path / "salts.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"salts\.toml: found"):
        read_salts(path)
    with pytest.raises(InputError, match="expected the salts"):
        read_salts(tmp_path / "none.toml")


def sequence(*runs: tuple[int, int]) -> tuple[str, pa.Table, dict[str, Any]]:
    first, last = zip(*runs, strict=True)
    return "sequence", pa.table({"log_id": ["log-a"] * len(runs), "first": first, "last": last}), {}


def test_gaps_are_counted_and_named(tmp_path):
    """Numbers 101 to 400 with 150 to 156 missing; a hole after the day's last number is another day's."""
    world = World(tmp_path)
    raw = raw_decisions(300, first_row=101)
    world.day(logged(300))
    numbers = raw["log_row"].to_numpy()
    there = raw.filter(pa.array((numbers < 150) | (numbers > 156)))
    world.write(("decisions", there, place()), sequence((1, 149), (157, 400), (405, 900)))
    found = record(world)
    assert (found["numbered"], found["gaps"], found["verdict"]) == (293, 7, "fail")
    assert found["reasons"][0].startswith("7 of 300 record numbers between the first and the last of the day are missing")
    world.write(("decisions", raw, place()), sequence((1, 400), (405, 900)))
    assert (record(world)["gaps"], world.certificate_of()["verdict"]) == (0, "pass")


def test_a_longer_log_alone_makes_no_new_certificate(tmp_path):
    world = World(tmp_path)
    world.day(logged(300))
    world.write(("decisions", raw_decisions(300), place()), sequence((1, 300)))
    world.certify()
    world.write(sequence((1, 5_000)))
    assert world.certify() == []


def test_deliveries_and_conflicts(tmp_path):
    world = World(tmp_path, certificate={"conflicts": 0.01})
    world.day(logged(300))
    delivered = pa.table({"source": ["a", "b"], "policy": ["live@1"] * 2, "delivered": [300, 10], "repeated": [0, 7]})
    ids = pa.table({"decision_id": ["x", "x", "y"], "point": ["ads"] * 3, "day": [place()["day"]] * 3, "policy": ["live@1"] * 3})
    world.write(("deliveries", delivered, place()), ("conflicts", ids, {}))
    found = record(world)
    assert (found["delivered"], found["repeated"], found["conflicts"], found["verdict"]) == (310, 7, 2, "warn")
    assert found["reasons"] == [
        "7 of 310 decisions were delivered again; expected at most 2%. They count once; see why a source repeats itself."
    ]
    world.certificate["conflicts"] = 0.001
    failed = record(world)
    assert failed["verdict"] == "fail"
    assert failed["reasons"][0].startswith("2 of 302 decisions came with several contents under one id")


def history(world: World, days: int, n: int = 400, **columns: Any) -> None:
    """Right days before the last, nine in ten of whose rows have a reward."""
    for back in range(days, 0, -1):
        world.day(logged(n, seed=back, back=back, **columns), back)


def test_a_drop_of_the_join_rate_is_named(tmp_path):
    world = World(tmp_path, lookback=10)
    history(world, 9)
    world.day(logged(4_000, seed=99, joined=0.71))
    found = record(world)
    assert found["verdict"] == "fail"
    low, high = round(100 * found["join_low"]), round(100 * found["join_high"])
    assert found["reasons"] == [
        f"Join rate 71%, usual {low}% to {high}%: rewards are missing, not zero. See whether the reward stream stopped or lost ids."
    ]
    assert 0.71 < found["join_low"] < 0.88 < 0.92 < found["join_high"]
    assert [world.certificate_of(back)["verdict"] for back in range(1, 10)] == ["pass"] * 9
    assert world.certificate_of(3)["join_low"] is None


def test_a_day_that_fell_is_not_usual_the_next_day(tmp_path):
    world = World(tmp_path, lookback=12)
    for back in range(11, -1, -1):
        world.day(logged(2_000, seed=back, back=back, joined=0.5 if back < 2 else 0.9), back)
    world.certify()
    assert [world.certificate_of(back)["verdict"] for back in (2, 1, 0)] == ["pass", "fail", "fail"]
    assert world.certificate_of(0)["join_low"] == pytest.approx(world.certificate_of(1)["join_low"], abs=0.005)


def test_join_rates_of_nights_before_are_remembered(tmp_path):
    world = World(tmp_path, lookback=9)
    history(world, 8)
    world.certify(DATE - (DATE - DATE.replace(day=21)))
    late = World(tmp_path, lookback=1)
    late.day(logged(2_000, seed=99, joined=0.5))
    late.certify()
    assert late.certificate_of()["verdict"] == "fail"


def test_a_new_policy_of_another_rate_is_a_warning(tmp_path):
    world = World(tmp_path, lookback=10)
    history(world, 9)
    world.day(logged(4_000, seed=99, joined=0.71, policy=["new@2"] * 4_000))
    found = record(world)
    assert found["verdict"] == "warn"
    assert "this policy, which has no past of its own" in found["reasons"][0]


def test_floors_vectors_and_kinds(tmp_path):
    floored = msgspec.structs.replace(POINT, exploration_floor=0.05)
    world = World(tmp_path / "a", point=floored)
    world.day(logged(2_000))
    found = record(world)
    assert found["below_floor"] > 100
    assert found["floor"] == pytest.approx(0.01)
    assert "rows have a propensity below the exploration floor, the smallest 0.004" in found["reasons"][0]
    world = World(tmp_path / "b")
    world.day(logged(2_000, vector=np.arange(2_000) < 500))
    found = record(world)
    assert (found["verdict"], found["vectors"]) == ("warn", 0.25)
    assert found["reasons"][0].startswith("75% of the rows have no vector of propensities")
    world = World(tmp_path / "c")
    kinds = ["fallback"] * 30 + ["override"] * 20 + ["shadow"] * 10
    world.day(logged(60, kind=kinds))
    found = record(world)
    assert (found["verdict"], found["fallback"], found["override"], found["shadow"]) == ("warn", 30, 20, 10)
    assert found["reasons"] == ["No row was sampled: nothing can be learned or valued from this day, and nothing was tested."]


def test_an_action_outside_its_set_fails(tmp_path):
    world = World(tmp_path)
    rows = logged(500)
    first = int(rows["action"][0].as_py())
    share = rows[f"share.{first}"].to_pylist()
    share[0] = None
    world.day(rows.set_column(rows.schema.get_field_index(f"share.{first}"), f"share.{first}", pa.array(share)))
    found = record(world)
    assert (found["outside"], found["verdict"]) == (1, "fail")


def test_what_was_not_shown_because_of_the_action_is_a_warning(tmp_path):
    world = World(tmp_path)
    rows = logged(6_000)
    hidden = (rows["action"].to_numpy() == 1) & (np.arange(6_000) % 3 == 0)
    world.day(rows.set_column(rows.schema.get_field_index("shown"), "shown", pa.array(np.where(hidden, "none", "as_sampled"))))
    found = record(world)
    assert (found["verdict"], found["shown_known"], found["not_shown_independent"]) == ("warn", 6_000, False)
    assert found["not_shown"] == pytest.approx(hidden.mean())
    assert found["reasons"][0].startswith("Whether an action is shown depends on the action")


def test_maturity_counts_what_is_old_enough(tmp_path):
    """Delays are uniform over the window, for nine rows in ten; rows of the window's last part are too young for later ages."""
    world = World(tmp_path)
    start = logged(10)["decided_at_ns"][0].as_py()
    cutoff = start + 86_400 * 10**9 + 2 * 3600 * 10**9
    age = np.where(np.arange(8_000) < 4_000, 2.0, 0.3) * WINDOW * 1e9
    rows = logged(8_000, decided_at_ns=(cutoff - age).astype(np.int64))
    world.day(rows)
    world.certify()
    found = {row["age_seconds"] / WINDOW: row for row in world.table("maturity")}
    assert [found[age]["rows"] for age in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)] == [8_000] * 3 + [4_000] * 3
    for age, row in found.items():
        assert row["labelled"] == pytest.approx(0.9 * age, abs=4 * np.sqrt(0.25 / row["rows"]))


def test_rewards_that_are_not_mature_are_not_missing(tmp_path):
    world = World(tmp_path)
    state = np.where(np.arange(1_000) < 400, "pending", "observed")
    world.day(logged(1_000, **{"state.click": state, "late.click": np.arange(1_000) % 2}))
    found = record(world)
    assert (found["mature"], found["joined"], found["join_rate"], found["late"]) == (600, 600, 1.0, 500)
