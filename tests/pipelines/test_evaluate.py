"""A log that comes in parts gives the numbers of a log that is whole in memory: sums add, whatever is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ope import Bootstrap, DataError, EmpiricalBernstein, Normal, Report, evaluate
from ope.data import assign_folds
from ope.moments import ClusterSums
from ope.nuisance import cross_fit_reward
from ope.simulate import World, sample_actions, softmax
from pipelines import evaluate as module
from pipelines import log_file, policies
from pipelines.evaluate import bounds_of_file, evaluate_file
from pipelines.frame import ColumnMap, to_log
from pipelines.propensities import bounds_table

N, K = 3000, 4
WORLD = World.random(d=2, k=K, seed=3)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 137 rows: 22 of them, the last one shorter."""
    monkeypatch.setattr(log_file, "PART_ROWS", 137)
    monkeypatch.setattr(policies, "PART_ROWS", 100)  # the policy's file does not come in the log's parts


@dataclass(frozen=True)
class Case:
    frame: pl.DataFrame
    logging: np.ndarray
    target: np.ndarray


@pytest.fixture(scope="module")
def case() -> Case:
    rng = np.random.default_rng(5)
    context = WORLD.contexts(N, rng)
    logging, target = softmax(context @ WORLD.coefficient), softmax(2 * context @ WORLD.coefficient)
    action, rows = sample_actions(logging, rng), np.arange(N)
    user = rng.integers(0, 400, N)
    frame = pl.DataFrame(
        {
            "action": action,
            "reward": (rng.random(N) < WORLD.q(context)[rows, action]).astype(int),
            "propensity": logging[rows, action],
            "logged": logging.tolist(),
            "set": [list(range(K))] * N,
            "x": context[:, 0],
            "device": np.where(context[:, 1] > 0, "phone", np.where(context[:, 0] > 0, "tablet", "desktop")),
            "user": user,
            "card": [f"card {u}" for u in user],
            "kept": rng.choice([1.0, 2.0, 5.0], N),
            "policy": target.tolist(),
            "scalar": target[rows, action],
            "name": np.array(["a", "b", "c", "d"])[action],
        }
    )
    return Case(frame, logging, target)


def same(found: Report, expected: Report) -> None:
    """Every number to 1e-10, every verdict and every word alike."""
    assert list(found) == list(expected)
    for name in expected:
        one, other = found[name], expected[name]
        for field in ("value", "stderr", "low", "high", "ess"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-10, abs=1e-12), (name, field)
        assert (one.verdict, one.reasons, one.notes, one.n) == (other.verdict, other.reasons, other.notes, other.n)
    assert found.weights.tail_index == pytest.approx(expected.weights.tail_index, rel=1e-10)
    assert found.log.inverse_z == pytest.approx(expected.log.inverse_z, rel=1e-9, abs=1e-9, nan_ok=True)
    np.testing.assert_allclose(found.log.calibration_p, expected.log.calibration_p, rtol=1e-8)


def in_memory(case: Case, columns: ColumnMap, target: Any, **options: Any) -> Report:
    design, seed = options.pop("design", "additive"), options.pop("seed", 0)
    data = to_log(case.frame, columns, "here").data
    q = cross_fit_reward(data, K, design=design, seed=seed) if columns.context else None
    return evaluate(data, target(case) if callable(target) else target, q, **options)


VECTOR, SCALAR = (lambda case: case.target), (lambda case: case.frame["scalar"].to_numpy())


@pytest.mark.parametrize(
    ("columns", "policy", "target", "options"),
    [
        (ColumnMap(), "policy", VECTOR, {}),
        (ColumnMap(), "scalar", SCALAR, {"estimators": ("IPS", "SNIPS", "cIPS(2)", "beta-IPS")}),
        (ColumnMap(), "uniform", np.full((N, K), 1 / K), {}),
        (ColumnMap(propensities="logged"), "logging", "logging", {"estimators": ("IPS", "beta-IPS")}),
        (ColumnMap(eligible="set", propensities="logged"), "policy", VECTOR, {"baseline": "logging"}),
        (ColumnMap(cluster="user"), "policy", VECTOR, {"estimators": ("IPS", "SNIPS")}),
        (ColumnMap(cluster="card", sample_weight="kept"), "policy", VECTOR, {"baseline": "logging"}),
        (ColumnMap(sample_weight="kept"), "policy", VECTOR, {}),
        (ColumnMap(context=("x", "device")), "policy", VECTOR, {"baseline": "logging", "seed": 3}),
        (ColumnMap(context=("x",), cluster="user"), "policy", VECTOR, {"estimators": ("DM", "DR", "SNDR", "DRos(5)")}),
        (ColumnMap(context=("x",), cluster="card"), "policy", VECTOR, {"design": "per_action"}),
        (ColumnMap(context=("device",), sample_weight="kept"), "policy", VECTOR, {}),
        (ColumnMap(), "policy", VECTOR, {"interval": Bootstrap(1000, 7)}),
        (ColumnMap(cluster="user"), "policy", VECTOR, {"interval": Bootstrap(1000, 7)}),
        (ColumnMap(), "policy", VECTOR, {"interval": EmpiricalBernstein(99.0, (0.0, 1.0))}),
        (ColumnMap(action="name", labels=("a", "b", "c", "d")), "policy", VECTOR, {"level": 0.9}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_parts_give_the_numbers_of_the_whole(
    case: Case, tmp_path: Path, columns: ColumnMap, policy: str, target: Any, options: dict[str, Any], suffix: str
) -> None:
    path = tmp_path / f"log.{suffix}"
    if suffix == "parquet":
        case.frame.write_parquet(path, row_group_size=500)
    else:
        lists = pl.col(pl.List(pl.Float64), pl.List(pl.Int64))
        as_json = lists.map_elements(lambda row: str(row.to_list()), return_dtype=pl.String)
        case.frame.with_columns(as_json).write_csv(path)
    found = evaluate_file(path, policy, columns, **({"interval": Normal()} | options))
    same(found, in_memory(case, columns, target, **options))


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_a_policy_in_a_file_need_not_come_in_the_order_of_the_log(case: Case, tmp_path: Path, order: str) -> None:
    log, policy = tmp_path / "log.parquet", tmp_path / "policy.parquet"
    case.frame.write_parquet(log)
    table = pl.DataFrame({"row": np.arange(N)} | {f"p_{j}": case.target[:, j] for j in range(K)})
    (table if order == "sorted" else table.sample(fraction=1.0, shuffle=True, seed=1)).write_parquet(policy)
    columns = ColumnMap(context=("x",))
    same(evaluate_file(log, str(policy), columns, interval=Normal()), in_memory(case, columns, VECTOR))


def test_a_model_of_a_long_log_is_fitted_on_rows_drawn_alike_in_parts_and_in_memory(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 900)
    path = tmp_path / "log.parquet"
    case.frame.write_parquet(path)
    columns = ColumnMap(context=("x", "device"))
    found = evaluate_file(path, "policy", columns, interval=Normal(), seed=4)
    data = to_log(case.frame, columns, "here").data
    same(found, evaluate(data, case.target, cross_fit_reward(data, K, seed=4, most=900)))
    whole = evaluate(data, case.target, cross_fit_reward(data, K, seed=4))
    assert found["DM"].value != whole["DM"].value  # fewer rows, another model ...
    assert abs(found["DR"].value - whole["DR"].value) < whole["DR"].stderr / 2  # ... which DR hardly minds


def test_more_clusters_than_blocks_are_resampled_in_blocks_that_do_not_depend_on_parts(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ope.accumulate.MIN_BLOCKS", 100)  # of 400 clusters
    path = tmp_path / "log.parquet"
    case.frame.write_parquet(path)
    columns, bootstrap = ColumnMap(cluster="user"), Bootstrap(2000, 1)
    found = evaluate_file(path, "policy", columns, interval=bootstrap)
    same(found, in_memory(case, columns, VECTOR, interval=bootstrap))
    normal = evaluate_file(path, "policy", columns, interval=Normal())
    width = found["IPS"].high - found["IPS"].low
    assert width == pytest.approx(normal["IPS"].high - normal["IPS"].low, rel=0.15)  # 100 blocks know a width to about 7 %


def spoiled(case: Case, column: str, row: int, value: Any) -> pl.DataFrame:
    values = case.frame[column].to_list()
    values[row] = value
    return case.frame.with_columns(pl.Series(column, values, case.frame.schema[column]))


@pytest.mark.parametrize(
    ("column", "value", "columns"),
    [
        ("propensity", 0.0, ColumnMap()),
        ("reward", None, ColumnMap()),
        ("policy", [0.5, 0.5, 0.5, 0.5], ColumnMap()),
        ("x", None, ColumnMap(context=("x",))),
        ("set", [1], ColumnMap(eligible="set")),
    ],
)
def test_errors_name_the_row_of_the_whole_file(case: Case, tmp_path: Path, column: str, value: Any, columns: ColumnMap) -> None:
    path = tmp_path / "log.parquet"
    row = next(i for i in range(2000, N) if case.frame["action"][i] == 0)
    spoiled(case, column, row, value).write_parquet(path)
    with pytest.raises(DataError) as error:
        evaluate_file(path, "policy", columns, interval=Normal())
    assert error.value.row == row
    assert error.value.source == str(path)


def test_a_vector_that_grows_in_the_middle_is_noticed(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    longer = [row if i < 137 * 4 else [*row, 0.0] for i, row in enumerate(case.frame["policy"].to_list())]
    case.frame.with_columns(policy=pl.Series(longer)).write_parquet(path)
    with pytest.raises(DataError, match=r"row 548 \(counted from 0\): found 5 actions; expected 4, as in earlier rows"):
        evaluate_file(path, "policy", ColumnMap(), interval=Normal())


def test_progress_ends_where_it_should(case: Case, tmp_path: Path) -> None:
    path, told = tmp_path / "log.parquet", []
    case.frame.write_parquet(path)
    evaluate_file(
        path, "policy", ColumnMap(context=("x",)), interval=Normal(), progress=lambda done, total: told.append((done, total))
    )
    assert told == sorted(told)
    assert told[-1] == (2 * N, 2 * N)  # one pass to fit the reward model, one to evaluate


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.uint64, np.float64])
def test_buckets_keep_every_cluster_together(tmp_path: Path, kind: Any) -> None:
    rng = np.random.default_rng(1)
    clusters, totals = rng.integers(0, 200, 5000).astype(kind), rng.normal(size=(5000, 3))
    buckets = module._Buckets(tmp_path)
    for start in range(0, 5000, 700):
        part = slice(start, start + 700)
        buckets.add(ClusterSums.of(totals[part], clusters[part]))
    groups = list(buckets.groups())
    expected = ClusterSums.of(totals, clusters)
    assert len(groups) > 32  # 200 clusters over 64 files: they are spread
    labels = np.concatenate([group.cluster for group in groups])
    assert len(np.unique(labels)) == len(labels) == len(expected.cluster)
    order = np.argsort(labels)
    np.testing.assert_allclose(np.concatenate([group.total for group in groups])[order], expected.total, rtol=1e-12, atol=1e-12)


def test_folds_of_parts_are_those_of_the_whole(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    case.frame.write_parquet(path)
    for columns in (ColumnMap(), ColumnMap(cluster="user"), ColumnMap(cluster="card")):
        log = log_file.open_log(path, columns)
        folds = module._folds(log, 2)
        found = np.concatenate([folds.of(part.data, first) for first, part in log.parts()])
        np.testing.assert_array_equal(found, assign_folds(to_log(case.frame, columns, "here").data, 3, 2))


def test_reading_ahead_hands_errors_on() -> None:
    def items() -> Any:
        yield 1
        raise DataError("x", "this", "that", "Do.")

    taken: Callable[[], Any] = log_file.ahead(items()).__next__
    assert taken() == 1
    with pytest.raises(DataError, match="found this"):
        taken()


def test_one_row_is_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"action": [0], "reward": [1.0], "propensity": [0.5], "user": ["u"]}).write_parquet(path)
    report = evaluate_file(path, "uniform", ColumnMap(cluster="user"), interval=Normal(), k=2)
    assert report.log.n == 1
    assert report.refused


@pytest.mark.parametrize("weight", [None, "kept"])
@pytest.mark.parametrize("reward", ["reward", "x"])
def test_bounds_from_sums_by_reward_are_those_of_the_rows(case: Case, tmp_path: Path, reward: str, weight: str | None) -> None:
    """With rewards 0 and 1 two sums tell everything; with rewards that all differ nothing is saved, and nothing changes."""
    path, columns = tmp_path / "log.parquet", ColumnMap(reward=reward, sample_weight=weight)
    case.frame.write_parquet(path)
    log = to_log(case.frame, columns, "here")
    for policy, target in (
        ("policy", case.target),
        ("scalar", case.frame["scalar"].to_numpy()),
        ("uniform", np.full((N, K), 1 / K)),
    ):
        found, expected = bounds_of_file(path, policy, columns), bounds_table(log, target)
        assert [one.gamma for one in found] == [1.0, 1.5, 2.0, 3.0]
        np.testing.assert_allclose(
            [(one.low, one.high) for one in found], [(one.low, one.high) for one in expected], rtol=1e-10, atol=1e-12
        )
