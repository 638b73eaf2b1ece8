"""Evaluate a policy on a log in a file: what `propel ope` runs. The log comes in parts, and only sums are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ope import DataError, Report
from ope.accumulate import Part
from ope.data import FloatArray, IntArray, LoggedData, folds_of_units
from ope.estimators import estimator
from ope.evaluation import Choice, choose, evaluate_parts, part_of
from ope.intervals import Interval
from ope.moments import ClusterSums
from ope.sensitivity import GAMMAS, Bounds, value_bounds
from pipelines.frame import ColumnMap, units
from pipelines.log_file import LogFile, open_log
from pipelines.policies import Policy, is_column, open_policy

if TYPE_CHECKING:
    from ope.nuisance import Design, Predict

FOLDS = 3
"""Folds of the cross-fitted reward model."""

MOST_ROWS = 1_000_000
"""About as many rows of a log, drawn at random, are enough to fit a reward model on."""

BUCKETS = 64
"""Files that cluster sums of a log are spread over, by cluster, until all of its rows have been read."""

Progress = Callable[[int, int], object]
"""Told the rows done, and how many there are to do."""


def evaluate_file(
    path: Path,
    policy: str,
    columns: ColumnMap,
    *,
    baseline: str | None = None,
    estimators: Sequence[str] | None = None,
    interval: Interval,
    level: float = 0.95,
    k: int | None = None,
    design: Design = "additive",
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Read a log part by part, ask the policies, fit a reward model where there is a context, and evaluate.

    Raises DataError, naming file, column and row, or InputError for estimators whose needs are not met.
    """
    chosen = None if estimators is None else [estimator(name) for name in estimators]
    also = [spec for spec in (policy, baseline) if spec is not None and is_column(spec)]
    log = open_log(path, columns, also=also, k=k)
    target = open_policy(policy, log)
    against = None if baseline is None else open_policy(baseline, log)
    modelled = bool(log.columns.context) and target.vectors and (chosen is None or any(one.needs.q for one in chosen))
    choice = choose(chosen, modelled, against is not None, interval, level)
    passes = 2 if modelled else 1
    model = _fit(log, design, seed, lambda rows: progress(rows, passes * log.n)) if modelled else None
    done = log.n if modelled else 0
    parts = _evaluated(log, choice, target, against, model, lambda rows: progress(done + rows, passes * log.n))
    with TemporaryDirectory(prefix="propel-") as folder:
        try:
            return evaluate_parts(parts, log.n, choice, level=level, grouping=_Buckets(Path(folder)))
        except DataError as error:
            raise _located(error, log, policy, baseline) from None


def bounds_of_file(
    path: Path, policy: str, columns: ColumnMap, *, gammas: Sequence[float] = GAMMAS, k: int | None = None
) -> tuple[Bounds, ...]:
    """Between which ends a policy's value lies if propensities are wrong by at most each factor in their odds.

    Reads the log once more, and keeps two sums per different reward. Raises what `evaluate_file` does, and InputError for a factor
    below 1.
    """
    log = open_log(path, columns, also=[policy] if is_column(policy) else [], k=k)
    target = open_policy(policy, log)
    sums = np.empty((0, 3))
    for _, part in log.parts():
        data, pi = part.data, target.on(part)
        taken = data.propensity if isinstance(pi, str) else pi if pi.ndim == 1 else pi[np.arange(data.n), data.action]
        weight = taken if data.sample_weight is None else taken * data.sample_weight
        sums = _by_reward(np.concatenate((sums, np.stack((data.reward, weight, weight / data.propensity), axis=1))))
    reward, weight, inverse = sums[sums[:, 1] > 0].T
    # with weights π s and chances p' = Σ π s / Σ (π s / p), a row per reward has the bounds of all rows with that reward
    return tuple(Bounds(gamma, *value_bounds(np.ones(len(reward)), weight / inverse, reward, gamma, weight)) for gamma in gammas)


def _by_reward(rows: FloatArray) -> FloatArray:
    """Rows (n, 3) of a reward and two numbers, with the numbers of equal rewards added up."""
    values, code = np.unique(rows[:, 0], return_inverse=True)
    return np.column_stack((values, *(np.bincount(code, weights=column) for column in rows[:, 1:].T)))


def _evaluated(
    log: LogFile,
    choice: Choice,
    target: Policy,
    baseline: Policy | None,
    model: _RewardModel | None,
    progress: Callable[[int], object],
) -> Iterator[Part]:
    """Parts of the log with what policies and reward model say of them."""
    for first, part in log.parts():
        data = part.data
        pi, rho = target.on(part), None if baseline is None else baseline.on(part)
        try:
            q = None if model is None else model.predict(data, first)
            yield part_of(data, choice, pi, q, rho)
        except DataError as error:
            raise error.shifted(first) from None
        progress(first + data.n)


@dataclass(frozen=True, slots=True, eq=False)
class _RewardModel:
    """One model per fold, each fitted on rows of the other folds."""

    models: tuple[Predict, ...]
    folds: _Folds

    def predict(self, data: LoggedData, first: int) -> FloatArray:
        """Rewards of all actions (n, k) in the rows from `first` on, each by the model that saw neither the row nor its cluster."""
        fold = self.folds.of(data, first)
        rows = [np.flatnonzero(fold == index) for index in range(len(self.models))]
        predicted = [model(data, some) for model, some in zip(self.models, rows, strict=True)]
        q = np.empty((data.n, predicted[0].shape[1]))
        for some, values in zip(rows, predicted, strict=True):
            q[some] = values
        return q


@dataclass(frozen=True, slots=True, eq=False)
class _Folds:
    """Folds of `ope.data.assign_folds`, for a log that is never whole in memory."""

    fold: IntArray
    """Of each row, or of each cluster of `units`."""
    units: NDArray[np.generic] | None
    """All clusters, sorted."""

    def of(self, data: LoggedData, first: int) -> IntArray:
        """Fold of each row of a part that begins at row `first`."""
        if self.units is None or data.cluster is None:
            return self.fold[first : first + data.n]
        return self.fold[np.searchsorted(self.units, data.cluster)]


def _folds(log: LogFile, seed: int) -> _Folds:
    if log.columns.cluster is None:
        return _Folds(folds_of_units(log.n, FOLDS, seed, "rows").astype(np.int8), None)
    known = np.unique(np.concatenate([np.unique(units(part)) for part in log.column(log.columns.cluster)]))
    return _Folds(folds_of_units(len(known), FOLDS, seed, "clusters").astype(np.int8), known)


def _fit(log: LogFile, design: Design, seed: int, progress: Callable[[int], object]) -> _RewardModel:
    """Models of every fold, fitted on no more than about `MOST_ROWS` rows in all."""
    from ope.nuisance import fit_rewards, rows_to_fit  # loads scikit-learn, a second that evaluation without a model need not wait

    folds, rng = _folds(log, seed), np.random.default_rng((seed, 2))
    kept: list[LoggedData] = []
    fold: list[IntArray] = []
    k = 0
    for first, part in log.parts():
        data, k = part.data, part.width
        rows = slice(0, data.n) if log.n <= MOST_ROWS else np.flatnonzero(rows_to_fit(rng, data.n, MOST_ROWS / log.n))
        kept.append(data.take(rows))
        fold.append(folds.of(data, first)[rows])
        progress(first + data.n)
    sample, where = _joined(kept), np.concatenate(fold)
    models = tuple(fit_rewards(sample, k, np.flatnonzero(where != index), design=design) for index in range(FOLDS))
    return _RewardModel(models, folds)


def _joined(parts: Sequence[LoggedData]) -> LoggedData:
    """One log of what a reward model looks at."""

    def joined(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    action, reward, propensity = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("action", "reward", "propensity")
    )
    return LoggedData(action, reward, propensity, context=joined("context"), sample_weight=joined("sample_weight"))


class _Buckets:
    """Sums of clusters in files: all of a cluster's in the same one, so that one bucket at a time is added up in memory."""

    def __init__(self, folder: Path):
        self._folder, self._width = folder, 0
        self._kind = np.dtype(np.int64)

    def add(self, sums: ClusterSums) -> None:
        """Append the sums to their clusters' files."""
        self._width, self._kind = sums.total.shape[1], sums.cluster.dtype
        bucket = _bucket(sums.cluster)
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(BUCKETS + 1))
        clusters, totals = sums.cluster[order], sums.total[order]
        for index, (start, end) in enumerate(pairwise(ends)):
            with self._path(index, "clusters").open("ab") as file:
                file.write(clusters[start:end].tobytes())
            with self._path(index, "totals").open("ab") as file:
                file.write(totals[start:end].tobytes())

    def groups(self) -> Iterator[ClusterSums]:
        """Sums over all rows, bucket by bucket."""
        for index in range(BUCKETS):
            clusters = np.fromfile(self._path(index, "clusters"), dtype=self._kind)
            totals = np.fromfile(self._path(index, "totals"))
            if len(clusters):
                yield ClusterSums.of(totals.reshape(-1, self._width), clusters)

    def _path(self, index: int, what: str) -> Path:
        return self._folder / f"{index}.{what}"


def _bucket(clusters: NDArray[np.generic]) -> NDArray[np.int8]:
    """Bucket of each cluster (n,): the top bits of its value's bytes times a large odd number. Knuth 1998, section 6.4."""
    whole = clusters if clusters.dtype.itemsize == 8 else clusters.astype(np.float64)
    mixed = whole.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(64 - 6)).astype(np.int8)


def _located(error: DataError, log: LogFile, policy: str, baseline: str | None) -> DataError:
    """Say which file and column an array came from."""
    if error.source is not None:
        return error
    specs = {"target": policy, "baseline": baseline or ""}
    spec = specs.get(error.column, "")
    if spec and Path(spec).is_file():
        return error.located(spec, {error.column: "p_0, p_1, ..."})
    return error.located(log.source, {**log.columns.named(), **specs})
