"""Estimated propensities against simulated truth; logs that no estimate can save are refused; nothing passes as logged."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression

from ope import DataError, InputError, evaluate
from ope.simulate import World, sample_actions, softmax
from pipelines.frame import ColumnMap
from pipelines.importers.files import read_log
from pipelines.propensities import (
    Bounds,
    EstimatedPropensities,
    bounds_table,
    estimate_propensities,
    estimated_log,
    print_propensities,
    write,
)
from pipelines.propensity_model import CalibratedPool, folds_of, propensity_model
from pipelines.tables import print_bounds

WORLD = World.random(3, 3, 4)
CONTEXT = ("x0", "x1", "x2")
COLUMNS = ColumnMap(context=CONTEXT)
FAST = LogisticRegression()


def smooth(context: np.ndarray) -> np.ndarray:
    return softmax(0.7 * context @ WORLD.coefficient)


def greedy(context: np.ndarray) -> np.ndarray:
    """ε = 0.2, about a rule with two cuts."""
    best = np.where(context[:, 0] > 0.3, np.where(context[:, 1] > 0, 0, 1), 2)
    return 0.2 / 3 + 0.8 * np.eye(3)[best]


def decisions(action: np.ndarray, context: np.ndarray, rng: np.random.Generator, **more: object) -> pl.DataFrame:
    q = WORLD.q(context[:, :3])[np.arange(len(action)), np.minimum(action, 2)]
    columns = {f"x{j}": context[:, j] for j in range(context.shape[1])}
    return pl.DataFrame({"action": action, "reward": (rng.random(len(action)) < q).astype(int), **columns, **more})


def simulated(policy, n: int, seed: int) -> tuple[pl.DataFrame, np.ndarray, np.ndarray]:
    """A log without propensities, its contexts, and the truth that it does not hold."""
    rng = np.random.default_rng(seed)
    context = WORLD.contexts(n, rng)
    return decisions(sample_actions(policy(context), rng), context, rng), context, policy(context)


@cache
def example() -> tuple[pl.DataFrame, EstimatedPropensities]:
    frame, _, _ = simulated(smooth, 1500, 0)
    return frame, estimate_propensities(frame, COLUMNS)


@pytest.mark.parametrize("policy", [smooth, greedy])
def test_estimates_are_close_to_the_truth(policy):
    """Logistic regression of 2 x 4 coefficients is off by about sqrt(8 / n) = 4.5 % of a logit here; trees that find cuts and a
    floor are no better. Twice that is allowed for, on average over the logged actions and relative to the truth."""
    frame, _, truth = simulated(policy, 4000, 1)
    found = estimate_propensities(frame, COLUMNS)
    rows, action = np.arange(4000), frame["action"].to_numpy()
    assert found.propensities.sum(axis=1) == pytest.approx(1, abs=1e-9)
    assert np.array_equal(found.propensity, found.propensities[rows, action])
    assert np.abs(found.propensity / truth[rows, action] - 1).mean() < 0.09
    assert max(abs(one.z) for one in found.calibration) < 4
    assert sum(one.count for one in found.calibration) == 3 * 4000
    assert found.calibration_p > 1e-4


def test_ips_and_snips_cover_the_truth():
    """Where the model is right, estimated propensities do not widen the spread of IPS (Hirano, Imbens & Ridder 2003), so that its
    intervals hold the truth at least as often as they say; errors of the model take some of that away. Of 40 intervals at 95 %,
    34 or more hold the truth with probability 0.99."""
    logging, target = (lambda context, scale=scale: softmax(scale * context @ WORLD.coefficient[:, :2]) for scale in (0.7, 1.5))
    fresh = WORLD.contexts(1_000_000, np.random.default_rng(0))
    truth = (target(fresh) * WORLD.q(fresh)[:, :2]).sum(axis=1).mean()
    held = {"IPS": 0, "SNIPS": 0}
    for seed in range(40):
        frame, context, _ = simulated(logging, 900, 100 + seed)
        log = estimated_log(frame, COLUMNS, estimate_propensities(frame, COLUMNS, model=CalibratedPool([FAST])))
        for name, estimate in evaluate(log.data, target(context)).items():
            held[name] += estimate.low <= truth <= estimate.high
            assert estimate.verdict != "trust"
            assert "Propensities were estimated, not logged." in estimate.reasons
    assert min(held.values()) >= 34, held


def test_a_good_estimate_is_caution_and_no_more():
    frame, found = example()
    log = estimated_log(frame, COLUMNS, found)
    assert log.data.propensity_estimated
    report = evaluate(log.data, np.full((1500, 3), 1 / 3))
    assert {estimate.verdict for estimate in report.values()} == {"caution"}


def rule_of_depth_three(x: np.ndarray) -> np.ndarray:
    left = np.where(x[:, 1] > 0, np.where(x[:, 2] > -0.5, 0, 1), np.where(x[:, 0] > 1, 2, 3))
    return np.where(x[:, 0] > 0.3, left, np.where(x[:, 2] > 0.8, np.where(x[:, 1] > 0, 1, 2), np.where(x[:, 1] > -0.7, 3, 0)))


RULES = {
    "threshold": lambda x: (x[:, 0] > 0.4).astype(int),
    "xor": lambda x: ((x[:, 0] > 0) ^ (x[:, 1] > 0)).astype(int),
    "depth three": rule_of_depth_three,
    "greedy": lambda x: (x @ WORLD.coefficient).argmax(axis=1),
}


@pytest.mark.parametrize("rule", RULES)
def test_fixed_rules_are_refused_and_five_percent_of_exploration_is_not(rule):
    rng = np.random.default_rng(3)
    context = WORLD.contexts(1500, rng)
    action = RULES[rule](context)
    with pytest.raises(DataError, match=r"log, column 'action': found a fixed rule: .*No estimator .* log the probability"):
        estimate_propensities(decisions(action, context, rng), COLUMNS)
    explored = np.where(rng.random(1500) < 0.05, rng.integers(0, action.max() + 1, 1500), action)
    found = estimate_propensities(decisions(explored, context, rng), COLUMNS)
    assert found.sure_determinism < 0.99
    assert found.determinism > 0.85


def test_one_action_is_refused():
    rng = np.random.default_rng(0)
    frame = decisions(np.ones(50, dtype=int), WORLD.contexts(50, rng), rng)
    with pytest.raises(DataError, match=r"column 'action': found action '1' in every row; expected a policy that sometimes"):
        estimate_propensities(frame, COLUMNS)


def test_a_uniform_log_is_uniform():
    frame, _, _ = simulated(lambda context: np.full((len(context), 3), 1 / 3), 1500, 2)
    found = estimate_propensities(frame, COLUMNS)
    assert np.abs(found.propensities - 1 / 3).mean() < 0.03, "three shares of 1,500 rows have a standard error of 0.012"
    assert found.determinism == pytest.approx(1 / 3, abs=0.05)


def test_no_row_is_predicted_by_a_model_that_saw_it_or_its_cluster():
    frame, _, _ = simulated(smooth, 600, 5)
    frame = frame.with_columns(user=pl.Series(np.random.default_rng(0).integers(0, 60, 600)))
    columns = replace(COLUMNS, cluster="user")
    model = CalibratedPool([FAST, DummyClassifier()])
    before = estimate_propensities(frame, columns, model=model).propensities
    own = (frame["user"] == 7).to_numpy()
    moved = frame.with_columns(action=pl.when(pl.col("user") == 7).then((pl.col("action") + 1) % 3).otherwise("action"))
    after = estimate_propensities(moved, columns, model=model).propensities
    assert np.array_equal(before[own], after[own])
    assert not np.array_equal(before, after), "the others do learn from it"


@pytest.mark.parametrize("clustered", [False, True])
def test_folds_are_a_partition_that_keeps_clusters_whole(clustered):
    rng = np.random.default_rng(1)
    action, cluster = rng.integers(0, 4, 500), rng.integers(0, 50, 500) if clustered else None
    splits = folds_of(action, cluster, 3, 0)
    assert np.array_equal(np.sort(np.concatenate([test for _, test in splits])), np.arange(500))
    for train, test in splits:
        assert len(np.intersect1d(train, test)) == 0
        if cluster is not None:
            assert len(np.intersect1d(cluster[train], cluster[test])) == 0


def test_calibration_inside_a_fold_keeps_clusters_whole_too():
    """Every user always gets one action, at random, and the context tells users apart: to remember users is no skill."""
    rng = np.random.default_rng(4)
    user = np.repeat(np.arange(150), 10)
    place, action = rng.normal(size=150)[user], rng.integers(0, 2, 150)[user]
    model = propensity_model(1500)
    naive, kept = (model.fit(place[:, None], action, groups=groups).powers_[1] for groups in (None, user))
    assert kept < 0.3 < naive


def test_sample_weights_are_repeated_rows_for_the_pool():
    rng = np.random.default_rng(6)
    context, times = WORLD.contexts(300, rng), rng.integers(1, 4, 300)
    action, rows = sample_actions(smooth(context), rng), np.repeat(np.arange(300), times)
    weighted = CalibratedPool([FAST]).fit(context, action, times.astype(float), groups=np.arange(300))
    repeated = CalibratedPool([FAST]).fit(context[rows], action[rows], groups=rows)
    assert weighted.predict_proba(context) == pytest.approx(repeated.predict_proba(context), abs=1e-3)
    assert np.array_equal(weighted.predict(context), weighted.predict_proba(context).argmax(axis=1))


def test_sample_weights_reach_estimates_and_their_calibration():
    frame, _, _ = simulated(smooth, 900, 8)
    kept = frame.with_columns(weight=pl.when(pl.col("action") == 0).then(4.0).otherwise(1.0))
    plain, weighted = (estimate_propensities(frame_, columns, model=CalibratedPool([FAST])) for frame_, columns in (
        (frame, COLUMNS), (kept, replace(COLUMNS, sample_weight="weight"))))  # fmt: skip
    assert (weighted.propensities[:, 0] > plain.propensities[:, 0]).mean() > 0.99
    assert max(abs(one.z) for one in weighted.calibration) < 4
    assert np.mean([one.observed for one in plain.calibration]) == pytest.approx(1 / 3)


def test_ineligible_actions_get_nothing():
    rng = np.random.default_rng(9)
    context, closed = WORLD.contexts(1200, rng), rng.integers(0, 3, 1200)
    allowed = np.arange(3) != closed[:, None]
    truth = smooth(context) * allowed / (smooth(context) * allowed).sum(axis=1, keepdims=True)
    sets = [np.flatnonzero(row).tolist() for row in allowed]
    frame = decisions(sample_actions(truth, rng), context, rng, open=sets)
    columns = replace(COLUMNS, eligible="open")
    found = estimate_propensities(frame, columns, model=CalibratedPool([FAST]))
    assert np.array_equal(found.propensities > 0, allowed)
    assert estimated_log(frame, columns, found).data.eligible is not None
    alone = frame.with_columns(open=pl.concat_list("action"))
    with pytest.raises(DataError, match="column 'open': found one eligible action in every row"):
        estimate_propensities(alone, columns)
    with pytest.raises(DataError, match="expected an action of the row's eligible set"):
        estimate_propensities(frame.with_columns(action=pl.Series(closed)), columns)


def test_texts_keep_their_order_and_untaken_actions_are_named(tmp_path: Path):
    frame, _, _ = simulated(smooth, 600, 5)
    frame = frame.with_columns(action=pl.col("action").replace_strict([0, 1, 2], ["b", "c", "a"], return_dtype=pl.String))
    sorted_ = estimate_propensities(frame, COLUMNS, model=FAST)
    assert sorted_.labels == ("a", "b", "c")
    given = estimate_propensities(frame, replace(COLUMNS, labels=("b", "c", "z", "a")), model=FAST)
    assert given.untaken == ("z",)
    assert np.all(given.propensities[:, 2] == 0)
    assert given.propensities[:, [3, 0, 1]] == pytest.approx(sorted_.propensities, abs=1e-4)
    assert estimated_log(frame, COLUMNS, sorted_).ordered
    write(tmp_path / "out.parquet", frame, given)
    assert json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[b"propel"])["labels"] == ["b", "c", "z", "a"]
    assert "No row took z" in printed(print_propensities, given)


def test_the_file_says_that_it_holds_estimates(tmp_path: Path):
    frame, found = example()
    path = tmp_path / "estimated.parquet"
    write(path, frame, found, metadata={b"origin": b"a shop"})
    metadata = pq.read_schema(path).metadata
    assert json.loads(metadata[b"propel"]) == {"propensity_estimated": True, "labels": None, "propensities": "propensities"}
    assert metadata[b"origin"] == b"a shop"
    again = pl.read_parquet(path)
    assert again.drop("propensity", "propensities").equals(frame)
    assert np.array_equal(again["propensity"].to_numpy(), found.propensity)
    assert np.array_equal(np.array(again["propensities"].to_list()), found.propensities)
    log = read_log(path, COLUMNS)
    assert log.data.propensity_estimated
    assert np.array_equal(log.data.propensities, found.propensities)
    with pytest.raises(DataError, match="column 'propensity': found a column of this name"):
        write(path, again, found)
    with pytest.raises(DataError, match="found 10 rows; expected the 1,500 that were estimated"):
        write(path, frame.head(10), found)


def test_what_a_file_says_of_other_columns_is_kept(tmp_path: Path):
    frame, found = example()
    says = {"eligible": "open", "by_eligible": True, "propensity": "p", "labels": ["a", "b"]}
    write(tmp_path / "out.parquet", frame, found, metadata={b"propel": json.dumps(says).encode()})
    assert json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[b"propel"]) == {
        "eligible": "open", "propensity_estimated": True, "labels": None, "propensities": "propensities",
    }  # fmt: skip


def test_logged_propensities_are_not_estimated_again():
    frame, found = example()
    for name in ("propensity", "logged"):
        with pytest.raises(DataError, match=f"log, column '{name}': found logged propensities"):
            estimate_propensities(frame.with_columns(pl.Series(name, found.propensity)), replace(COLUMNS, propensity=name))


CHANGES = {
    "no context": ({}, {"context": ()}, "found no columns named; expected the columns that the logging policy looked at"),
    "leak": ({}, {"context": ("x0", "reward")}, "column 'reward': found what happened, in the context"),
    "missing column": ({}, {"context": ("x9",)}, "column 'x9': found no such column"),
    "missing action": ({"action": [None, *[0, 1] * 50]}, {}, "column 'action', row 0 .*: found a missing value"),
    "negative action": ({"action": [-1, *[0, 1] * 50]}, {}, "column 'action', row 0 .*: found -1"),
    "weight": ({"w": [0.0] * 101}, {"sample_weight": "w"}, "column 'w', row 0 .*: found 0.0; expected a positive weight"),
    "cluster": ({"u": [None, *["a"] * 100]}, {"cluster": "u"}, "column 'u', row 0 .*: found a missing value"),
    "rare": ({"action": [2, *[0, 1] * 50]}, {}, "found action '2' in 1 rows; expected at least 10 rows of every action"),
    "few clusters": ({"u": [0, *[0, 1] * 50]}, {"cluster": "u"}, "found action '0' in . clusters; expected at least 10"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_estimated(name):
    columns, mapped, message = CHANGES[name]
    frame = pl.DataFrame({"action": [0, *[0, 1] * 50], "reward": [1.0] * 101, "x0": np.arange(101.0)} | columns)
    with pytest.raises(DataError, match=message):
        estimate_propensities(frame, replace(ColumnMap(context=("x0",)), **mapped))


def test_a_model_that_gives_zeros_is_refused():
    frame, _ = example()
    with pytest.raises(DataError, match=r"found an action that was taken, at an estimated probability of 0"):
        estimate_propensities(frame, COLUMNS, model=DummyClassifier(strategy="most_frequent"))


def test_an_empty_log_and_too_few_parts():
    frame, _ = example()
    with pytest.raises(DataError, match="found an empty log"):
        estimate_propensities(frame.head(0), COLUMNS)
    with pytest.raises(InputError, match="found folds=1; expected at least 2"):
        estimate_propensities(frame, COLUMNS, folds=1)


def test_a_missing_cause_leaves_estimates_calibrated_and_wrong():
    frame, _, truth = simulated(smooth, 2000, 11)
    blind = estimate_propensities(frame, ColumnMap(context=("x0", "x1")), model=CalibratedPool([FAST]))
    sighted = estimate_propensities(frame, COLUMNS, model=CalibratedPool([FAST]))
    off, near = (np.abs(found.propensities - truth).mean() for found in (blind, sighted))
    assert off > 3 * near
    assert max(abs(one.z) for one in blind.calibration) < 4, "no number tells, which is why the report says so"


def test_what_is_printed():
    text = printed(print_propensities, example()[1])
    assert "no verdict is better than caution" in text
    assert "none was dropped or clipped" in text
    off = replace(example()[1], calibration=(replace(example()[1].calibration[0], z=-9.0),), calibration_p=1e-9)
    assert "1 of 1 tenths are more than 4 standard errors off" in printed(print_propensities, off)
    assert "every evaluation is refused" in printed(print_propensities, off)


def test_bounds_of_policies():
    frame, found = example()
    log = estimated_log(frame, COLUMNS, found)
    target = np.full((1500, 3), 1 / 3)
    bounds = bounds_table(log, target)
    assert [one.gamma for one in bounds] == [1, 1.5, 2, 3]
    snips = evaluate(log.data, target)["SNIPS"].value
    assert (bounds[0].low, bounds[0].high) == pytest.approx((snips, snips), rel=1e-12)
    assert all(a.low > b.low and a.high < b.high for a, b in pairwise(bounds))
    assert bounds_table(log, target[:, 0]) == bounds
    mean = frame["reward"].mean()
    assert [(one.low, one.high) for one in bounds_table(log, "logging", (1, 3))] == [pytest.approx((mean, mean), rel=1e-12)] * 2
    with pytest.raises(DataError, match=r"target, row 0|'target', row 0"):
        bounds_table(log, 2 * target)
    assert "1.5 0.250 0.750" in " ".join(printed(print_bounds, (Bounds(1.5, 0.25, 0.75),)).split())


def printed(show, *arguments) -> str:
    stream = io.StringIO()
    show(Console(file=stream, width=200), *arguments)
    return stream.getvalue()
