"""The steps train, evaluate and select on simulated truth: what they find, what they leave out, and that they repeat."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from bandits.artifact import build, read_verified
from bandits.registry import Registry
from pipelines.nightly.evaluate import evaluate
from pipelines.nightly.folds import LEARN, fold_of, thinned
from pipelines.nightly.lake import Snapshot
from pipelines.nightly.rows import read_rows
from pipelines.nightly.select import select
from pipelines.nightly.settings import Night
from pipelines.nightly.train import train
from pipelines.nightly.window import Window
from tests.nightly.joined_worlds import (
    DATE,
    SALES,
    certificate,
    logging_policy,
    records,
    run,
    settings,
    simulate,
    true_value,
    write_lake,
)

TODAY, YESTERDAY = "2026-11-22", "2026-11-21"
LEARNERS = ("IPS", "DR")
STEPS = (train, evaluate, select)
UNUSED = {"train": {"learners": ("IPS",), "least_rows": 1, "share": 0.01}}
"""Next to nothing is learned: for tests that look at the logging policy alone."""


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


def by(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def one(rows, **wanted):
    (found,) = by(rows, **wanted)
    return found


def window_of(made, lake) -> Window:
    return Window.of(Night.of(DATE, made), made, lake, lake.snapshot(), made.points[0])


# Folds


@pytest.mark.parametrize("unit", [np.arange(200_000), np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 200_000)])
def test_folds_have_their_shares_in_every_bucket(unit):
    fold = fold_of(unit, 0.5)
    assert fold.dtype == np.int8
    for bucket in range(4):
        share = np.bincount(fold[unit % 4 == bucket], minlength=3) / (unit % 4 == bucket).sum()
        assert share == pytest.approx([0.5, 0.25, 0.25], abs=5 * 0.5 / math.sqrt(50_000)), "five standard errors"
    assert np.bincount(fold_of(unit, 0.8)) / 200_000 == pytest.approx([0.8, 0.1, 0.1], abs=5 * 0.4 / math.sqrt(200_000))
    assert thinned(unit, 0.3)[fold == LEARN].mean() == pytest.approx(0.3, abs=5 * 0.46 / math.sqrt(100_000))
    assert thinned(unit, 1.0).all()


def test_a_unit_is_in_one_fold_whatever_its_rows():
    unit = np.random.default_rng(2).integers(0, 50, 1000)
    assert len(set(zip(unit.tolist(), fold_of(unit, 0.5).tolist(), strict=True))) == 50


# A night


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    folder = tmp_path_factory.mktemp("night")
    land = np.random.default_rng(3).choice(["n", "s", None], 9000, p=[0.5, 0.3, 0.2]).tolist()
    log = simulate(9000, units=2500, sales=True, **{"s.land": land})
    made = settings(
        folder, rewards=SALES, train={"learners": LEARNERS}, evaluate={"windows": (1, 2), "segments": ("land",), "tolerance": 0.02}
    )
    lake = write_lake(folder / "lake", log)
    run(STEPS, made, lake)
    return made, lake, log


def test_candidates_say_what_they_learned_from(night):
    made, lake, log = night
    found = records(lake, "candidates")
    learning = fold_of(log.unit, 0.5) == LEARN
    assert [row["learner"] for row in found] == ["DR", "IPS", "uniform"]
    assert {(row["rows"], row["units"]) for row in found} == {(int(learning.sum()), len(np.unique(log.unit[learning])))}
    assert {(row["floor"], row["from"], row["to"], row["reason"]) for row in found} == {(0.1, "2026-10-26", TODAY, None)}
    registry = Registry(made.path("registry"))
    for row in found:
        assert row["policy"] == f"{registry.manifest(row['digest']).name}@{row['digest'][:32]}"
        assert row["policy"].startswith(f"{row['learner'].lower()}-{TODAY}@")


def _worth(made, candidate) -> float:
    registry = Registry(made.path("registry"))
    files = read_verified(registry.path(candidate["digest"]), registry.public_key(), candidate["digest"])
    return true_value(build(files).propensities)


def test_estimates_hold_the_truth(night):
    made, lake, _ = night
    estimates = records(lake, "estimates")
    assert len(estimates) == 4 * 4 * 2 * 3 * 2 * 2, "policies, estimators, metrics, segments, folds, windows"
    for row in records(lake, "candidates"):
        truth = _worth(made, row)
        for estimator in ("IPS", "SNIPS", "DR"):
            for fold in "AB":
                found = one(
                    estimates, policy=row["policy"], estimator=estimator, metric="click", segment="all", fold=fold, window=2
                )
                assert abs(found["value"] - truth) < 4 * found["stderr"], (row["learner"], estimator, fold)
                assert (found["verdict"], found["reasons"], found["certified"]) == ("trust", [], True)
                assert abs(found["weight_z"]) < 4
                assert found["ess"] > 500
                assert found["unsupported"] == 0


def test_logging_policy_is_worth_what_it_earned(night):
    _, lake, log = night
    for fold, name in enumerate("AB", 1):
        rows = (fold_of(log.unit, 0.5) == fold) & (log.day == TODAY)
        found = one(
            records(lake, "estimates"), policy="logging", estimator="IPS", metric="sales", segment="all", fold=name, window=1
        )
        assert found["n"] == rows.sum()
        assert found["clusters"] == len(np.unique(log.unit[rows]))
        assert found["value"] == pytest.approx(log.value["sales"][rows].mean(), rel=1e-12)


def test_values_follow_from_the_moments(night):
    _, lake, _ = night
    for row in by(records(lake, "estimates"), metric="sales"):
        mean, d = np.array(row["moments_mean"]), len(row["moments_mean"])
        value = mean[0] / mean[1] if row["estimator"] == "SNIPS" else mean[0] / mean[-1]
        assert row["value"] == pytest.approx(value, rel=1e-12)
        assert mean[-1] * row["moments_n"] == pytest.approx(row["n"], rel=1e-12), "the last column counts rows"
        assert row["moments_n"] == row["clusters"]
        assert len(row["moments_cross"]) == d * d
        gradient = np.append(np.array([1.0] if d == 2 else [1.0, -value]) / mean[1 if d == 3 else -1], 0.0)
        if d == 2:
            gradient[-1] = -value / mean[-1]
        spread = gradient @ np.array(row["moments_cross"]).reshape(d, d) @ gradient
        assert row["stderr"] == pytest.approx(math.sqrt(spread / (row["moments_n"] * (row["moments_n"] - 1))), rel=1e-6)


def test_days_add_only_where_no_unit_returns(night):
    _, lake, _ = night
    assert {(row["window"], row["additive"]) for row in by(records(lake, "estimates"), segment="all")} == {(1, True), (2, False)}


def test_differences_are_paired_and_have_the_right_sign(night):
    made, lake, _ = night
    estimates, differences = records(lake, "estimates"), records(lake, "differences")
    assert {row["policy"] for row in differences} == {row["policy"] for row in estimates} - {"logging"}
    baseline = true_value(lambda batch: logging_policy(batch.context[:, :3]))
    for row in records(lake, "candidates"):
        place = {"estimator": "DR", "metric": "click", "segment": "all", "fold": "B", "window": 2}
        found = one(differences, policy=row["policy"], **place)
        truth = _worth(made, row) - baseline
        assert abs(found["value"] - truth) < 4 * found["stderr"]
        assert found["low"] < found["value"] < found["high"]
        assert (found["p_worse"] < 1e-4) == (row["learner"] != "uniform"), "learned ones are better, uniform is worse"
        assert found["p_below_c"] < found["p_worse"] or found["p_worse"] == 1
        apart = [one(estimates, policy=policy, **place)["stderr"] for policy in (row["policy"], "logging")]
        assert found["stderr"] < 0.95 * math.hypot(*apart), "values on the same rows rise and fall together"


def test_segments_are_the_rows_of_each_value(night):
    _, lake, log = night
    land = np.array(log.columns["s.land"], dtype=object)
    rows = (fold_of(log.unit, 0.5) == 2) & (land == "s")
    found = one(
        records(lake, "estimates"), policy="logging", estimator="SNIPS", metric="click", segment="land=s", fold="B", window=2
    )
    assert (found["n"], found["value"]) == (rows.sum(), pytest.approx(log.value["click"][rows].mean(), rel=1e-12))
    assert {row["segment"] for row in records(lake, "estimates")} == {"all", "land=n", "land=s"}


def test_evaluation_says_what_it_stands_on(night):
    _, lake, log = night
    (found,) = records(lake, "evaluations")
    used = fold_of(log.unit, 0.5) != LEARN
    assert (found["rows"], found["rows_certified"], found["rows_used"]) == (9000, 9000, used.sum())
    assert found["units"] == len(np.unique(log.unit[used]))
    assert (found["from"], found["to"], found["baseline"], found["sql"]) == (YESTERDAY, TODAY, "logging", "pipelines/sql/join.sql")
    assert json.loads(found["parameters"])["evaluate"]["tolerance"] == 0.02


def test_portfolio_is_chosen_on_a_and_valued_on_b(night):
    _, lake, _ = night
    portfolio, policies = records(lake, "portfolio"), records(lake, "portfolio_policies")
    assert [(row["k"], row["graded"], row["certified"], row["fold"]) for row in portfolio] == [
        (k, "not graded here", True, "B") for k in (2, 3)
    ]
    place = {"estimator": "DR", "metric": "click", "segment": "all", "window": 2}
    assert {row["certified"] for row in policies} == {True}
    for row in policies:
        on = {fold: one(records(lake, "estimates"), policy=row["policy"], fold=fold, **place) for fold in "AB"}
        against = one(records(lake, "differences"), policy=row["policy"], fold="B", **place)
        assert row["selected_on"] == pytest.approx(on["A"]["value"], rel=1e-12)
        assert row["value"] == pytest.approx(on["B"]["value"], rel=1e-12)
        for name, kept in (("difference", "value"), ("p_worse", "p_worse"), ("p_below_c", "p_below_c")):
            assert row[name] == pytest.approx(against[kept], rel=1e-6), name
    ranked = sorted(by(policies, k=2), key=lambda row: row["rank"])
    assert [row["selected_on"] for row in ranked] == sorted((row["selected_on"] for row in ranked), reverse=True)
    assert [row["decision"] for row in ranked] == ["test", "test", "skip"]
    assert one(policies, k=3, rank=3)["reason"].startswith("Among the best, but worth less than the logging policy")


def test_a_twin_is_left_out_and_named(night):
    made, lake, _ = night
    wide = replace(made, file=_changed(made.file, "select", duplicate=0.2, sizes=(2,)))
    entries = {entry.table: entry for entry in select(Night.of(DATE, wide), wide, lake, lake.snapshot(), quiet)}
    found = lake.read(entries["portfolio_policies"]).to_pylist()
    assert len(found) == 3
    (twin,) = [row for row in found if row["duplicate_of"]]
    (best,) = [row for row in found if row["rank"] == 1]
    assert (twin["duplicate_of"], twin["decision"], twin["rank"]) == (best["policy"], "skip", None)
    assert 0 < twin["tv"] < 0.2
    assert "one of them is enough" in twin["reason"]


def test_steps_that_are_done_do_nothing(night):
    made, lake, _ = night
    before = lake.snapshot()
    for step in STEPS:
        assert step(Night.of(DATE, made), made, lake, before, quiet) == []
    other = replace(made, file=_changed(made.file, "evaluate", tolerance=0.5))
    assert len(evaluate(Night.of(DATE, other), other, lake, before, quiet)) == 4
    assert train(Night.of(DATE, other), other, lake, before, quiet) == []


def test_steps_that_were_lost_write_the_same_bytes(night):
    made, lake, _ = night
    before, registry = lake.snapshot(), Registry(made.path("registry"))
    known = registry.listed()
    lost = Snapshot(before.id, tuple(entry for entry in before.entries if entry.table in ("rows", "certificates")))
    for step in STEPS:
        for entry in step(Night.of(DATE, made), made, lake, lost, quiet):
            (old,) = before.find(entry.table)
            assert (entry.sha256, entry.key) == (old.sha256, old.key)
        lost = before
    assert registry.listed() == known, "equal artifacts are one"


def _changed(file, table, **values):
    return msgspec.structs.replace(file, **{table: msgspec.structs.replace(getattr(file, table), **values)})


# Buckets


# What is left out, and what is said


def test_rows_without_a_passed_certificate_are_left_out_or_labelled(tmp_path):
    log = simulate(4000, seed=6, days=3)
    given = [certificate(TODAY), certificate(YESTERDAY, "fail")]  # none at all for the first day
    lake = write_lake(tmp_path / "lake", log, certificates=given)
    made = settings(
        tmp_path, train=UNUSED["train"], evaluate={"windows": (3,), "estimators": ("IPS",)}, select={"estimator": "IPS"}
    )
    run([evaluate], made, lake)
    used = fold_of(log.unit, 0.01) != LEARN
    (evaluation,) = records(lake, "evaluations")
    assert (evaluation["rows"], evaluation["rows_certified"]) == (4000, (log.day == TODAY).sum())
    assert evaluation["rows_used"] == (used & (log.day == TODAY)).sum()
    assert {row["verdict"] for row in records(lake, "estimates")} == {"trust"}
    both = replace(made, file=_changed(made.file, "evaluate", uncertified="include"))
    run([evaluate], both, lake)
    assert records(lake, "evaluations")[0]["rows_used"] == used.sum()
    for row in records(lake, "estimates"):
        assert (row["verdict"], row["certified"]) == ("caution", False)
        assert row["reasons"] == ["Rows of days and policies without a passed certificate are in."]
        assert row["value"] is not None


def test_nothing_mature_is_an_evaluation_without_estimates(tmp_path):
    log = simulate(300)
    log = replace(log, value={"click": np.full(300, np.nan)}, columns={"state.click": ["pending"] * 300})
    lake, made = write_lake(tmp_path / "lake", log), settings(tmp_path)
    run(STEPS, made, lake)
    (candidate,) = records(lake, "candidates")
    assert candidate["reason"] == "0 rows to learn from; expected at least 500 (train.least_rows): nothing else was learned."
    (evaluation,) = records(lake, "evaluations")
    assert (evaluation["rows"], evaluation["rows_used"], evaluation["units"]) == (300, 0, 0)
    assert not [row for table in ("estimates", "differences", "portfolio", "portfolio_policies") for row in records(lake, table)]
    assert {entry.table for entry in lake.snapshot().entries} >= {"estimates", "portfolio", "portfolio_policies"}


def test_a_lake_without_rows_is_no_error(tmp_path):
    made = settings(tmp_path)
    lake = write_lake(tmp_path / "lake", simulate(1), certificates=[])
    lake.commit([], drop=lambda entry: True)
    run([evaluate, select], made, lake)
    assert [row["rows"] for row in records(lake, "evaluations")] == [0]


def test_a_refused_estimate_has_no_value(tmp_path):
    log = simulate(3000, seed=7)
    action = np.where(np.random.default_rng(8).random(3000) < 0.3, 0, log.action)  # a default action, logged as if it were drawn
    lake = write_lake(tmp_path / "lake", replace(log, action=action))
    made = settings(tmp_path, train={"learners": ("IPS",), "least_rows": 2000, "share": 0.2})
    run(STEPS, made, lake)
    estimates = records(lake, "estimates")
    assert {row["policy"].split("-")[0] for row in estimates} == {"logging", "uniform"}
    for row in (*estimates, *records(lake, "differences")):
        assert row["verdict"] == "refused"
        assert (row["value"], row["stderr"], row["low"], row["high"]) == (None,) * 4
        assert any("Actions were not drawn from the logged vectors" in reason for reason in row["reasons"])
    assert all(row["p_worse"] is None and row["p_below_c"] is None for row in records(lake, "differences"))
    notes = json.loads(records(lake, "evaluations")[0]["parameters"])["notes"]
    assert [note.split(":")[0] for note in notes] == ["DM, DR of click left out"]


def test_learners_that_cannot_learn_say_why(tmp_path):
    log = simulate(1500, seed=9)
    log = replace(log, value={"click": log.value["click"] - 0.5})
    made = settings(tmp_path, train={"learners": ("LS-LIN", "oracle-greedy (logistic)")})
    lake = write_lake(tmp_path / "lake", log)
    run([train], made, lake)
    found = {row["learner"]: row for row in records(lake, "candidates")}
    assert found["LS-LIN"]["reason"] == "Rewards from -0.5 to 0.5; it learns from rewards within [0, inf]."
    assert found["oracle-greedy (logistic)"]["reason"].endswith("within [0, 1].")
    assert found["LS-LIN"]["digest"] is None
    assert found["uniform"]["digest"] is not None


def test_without_vectors_the_logging_policy_has_no_model_estimates(tmp_path):
    log = simulate(3000, seed=10, vector=np.arange(3000) % 10 > 0)
    log = replace(log, shares=np.where(log.columns["vector"][:, None], log.shares, 0))
    known = simulate(3000, seed=10)
    log.columns["propensity"] = known.shares[np.arange(3000), log.action] / 2**31
    lake, made = write_lake(tmp_path / "lake", log), settings(tmp_path, train={"learners": ("IPS",)}, evaluate={"windows": (2,)})
    run([train, evaluate], made, lake)
    estimates = records(lake, "estimates")
    assert {row["estimator"] for row in by(estimates, policy="logging")} == {"IPS", "SNIPS"}
    assert {row["estimator"] for row in estimates if row["policy"] != "logging"} == {"DM", "DR", "IPS", "SNIPS"}
    assert {row["unsupported"] for row in estimates} == {0.0}, "where vectors are known, every action had a share"
    assert all(row["verdict"] != "refused" for row in estimates)


# Which rows


@pytest.mark.parametrize("independent", [[True, True], [True, False], [True, None], []])
def test_rows_are_left_out_by_what_was_shown_only_while_that_says_nothing_about_the_action(tmp_path, independent):
    shown = np.random.default_rng(11).choice(["as_sampled", "other", "none"], 400)
    log = simulate(400, seed=11, shown=shown.tolist())
    given = [certificate(day, not_shown_independent=flag) for day, flag in zip((TODAY, YESTERDAY), independent, strict=False)]
    made = settings(tmp_path, more='shown = "exclude"', evaluate={"uncertified": "include"})
    usable = _usable(window_of(made, write_lake(tmp_path / "lake", log, buckets=1, certificates=given)))
    assert usable == (int((shown == "as_sampled").sum()) if independent == [True, True] else 400)


def test_only_sampled_rows_with_a_value_are_used(tmp_path):
    n = 600
    rng = np.random.default_rng(12)
    kind = rng.choice(["sampled", "fallback", "override", "shadow"], n)
    state = rng.choice(["pending", "observed", "default", "conflict", "unknown"], n)
    log = simulate(n, seed=12, kind=kind.tolist(), **{"state.click": state.tolist()})
    made = settings(tmp_path)
    usable = _usable(window_of(made, write_lake(tmp_path / "lake", log, buckets=2)))
    assert usable == ((kind == "sampled") & np.isin(state, ["observed", "default"])).sum()


def _usable(window: Window) -> int:
    parts = [window.usable(read_rows(window.lake, bucket, window.point, k=window.k)) for bucket in window.buckets()]
    return sum(int(part.by_reward["click"].sum()) for part in parts)


def test_many_rows_to_learn_from_are_thinned_by_whole_units(tmp_path):
    log = simulate(6000, seed=13, units=1500)
    lake = write_lake(tmp_path / "lake", log)
    logs = {most: window_of(settings(tmp_path, train={"most_rows": most}), lake).learn_log("click") for most in (600, 100_000)}
    whole, some = logs[100_000], logs[600]
    assert whole.n == (fold_of(log.unit, 0.5) == LEARN).sum()
    assert some.n == pytest.approx(600, abs=5 * math.sqrt(600 * 5)), "units of four rows or so, drawn one by one"
    sizes = [dict(zip(*np.unique(data.cluster, return_counts=True), strict=True)) for data in (some, whole)]
    assert sizes[0].items() <= sizes[1].items()
