"""One pass over a log: candidate policies become per-row arrays, those become term columns, and only sums are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from threadpoolctl import threadpool_limits

from ope.data import (
    DataError,
    FloatArray,
    InputError,
    LoggedData,
    checked_distribution,
    checked_propensity,
    checked_width,
)
from ope.diagnostics import Diagnostics, LogChecks, LogTally, WeightTally
from ope.estimators import Estimator, Needs, Rows, Transforming, mean_gradient, mean_value
from ope.moments import ClusterSums, Moments, counted, per_row, per_row_gradient, sum_by_code
from ope.primitives import terms, weights
from ope.stack import Stack, parts_of

Target: TypeAlias = FloatArray | Literal["logging"]
"""A policy on a log: (n, k) probabilities; (n,) those of the logged actions; or "logging", the policy that was logged."""

MIN_BLOCKS = 4096
"""Rows (or clusters) are resampled in this many random blocks, or one by one if there are no more."""

CLUSTERED_ROWS = 2**18
"""Rows that are summed by cluster together."""

CHUNK_BYTES = 2**20
"""Size of a chunk of (rows, k) probabilities: it stays in the processor's cache, and memory does not grow with the log."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A policy to value, on the rows of one log. `q` (n, k): what a reward model, fitted on other rows, predicts."""

    label: str
    target: Target
    estimators: tuple[Estimator, ...]
    q: FloatArray | None = None


@dataclass(frozen=True)
class WeightMean:
    """Σw / n, which is 1 in expectation if propensities are right: the check that rides along with every estimate."""

    name: ClassVar[str] = "mean weight"
    needs: ClassVar[Needs] = Needs()
    consistent: ClassVar[bool] = False
    value, gradient = mean_value, mean_gradient

    def terms(self, rows: Rows) -> FloatArray:
        """Column (w)."""
        return terms.dm(rows.weight)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Consecutive rows of a log, with the candidates' probabilities on them. The whole log is one part, or many."""

    data: LoggedData
    candidates: tuple[Candidate, ...]
    """The same ones, in the same order, in every part."""
    baseline: Target | None = None
    closed: bool = False
    """No cluster of the parts so far goes on in a later one: sums that wait in memory can be squared and let go."""


class Grouping(Protocol):
    """Where sums of clusters wait until all of a cluster's rows have come. They are added by key before anything is squared."""

    def add(self, sums: ClusterSums) -> None:
        """Take sums over some rows; further rows of the same clusters may follow."""
        ...

    def groups(self) -> Iterator[ClusterSums]:
        """Sums over all rows taken, in groups that no cluster spans."""
        ...


class InMemory:
    """One group of all clusters."""

    def __init__(self) -> None:
        self._parts: list[ClusterSums] = []

    def add(self, sums: ClusterSums) -> None:
        """Take sums over some rows."""
        self._parts.append(sums)

    def groups(self) -> Iterator[ClusterSums]:
        """Sums over all rows taken."""
        yield ClusterSums.of(
            np.concatenate([part.total for part in self._parts]), np.concatenate([part.cluster for part in self._parts])
        )


@dataclass(frozen=True, slots=True, eq=False)
class Accumulated:
    """Sums of one pass: a stack of every (candidate, estimator), and what diagnostics need."""

    stack: Stack
    """Parts in the order of candidates, then estimators; labelled `candidate`, or `candidate: estimator` if several."""
    weight_means: Stack
    """One `WeightMean` per candidate, on the same moments."""
    weights: tuple[WeightTally, ...]
    """Of the importance weights of each candidate."""
    checks: LogChecks
    """Of the log itself."""

    def diagnostics(self) -> list[Diagnostics]:
        """Diagnostics of every candidate's weights."""
        means, stderrs = self.weight_means.values(), self.weight_means.stderrs()
        return [
            tally.diagnostics(float(mean), float(stderr)) for tally, mean, stderr in zip(self.weights, means, stderrs, strict=True)
        ]


def accumulate(
    data: LoggedData,
    candidates: Sequence[Candidate],
    *,
    baseline: Target | None = None,
    block_seed: int | None = None,
) -> Accumulated:
    """`accumulate_parts` of a log that is one part."""
    return accumulate_parts([Part(data, tuple(candidates), baseline)], data.n, block_seed=block_seed)


def accumulate_parts(
    parts: Iterable[Part], n: int, *, block_seed: int | None = None, grouping: Grouping | None = None
) -> Accumulated:
    """An `Accumulator` over the parts of a log of `n` rows, one part after the other. Raises what that raises."""
    with threadpool_limits(1, "blas"):  # products of a chunk are too small to share: a second thread only waits, at full speed
        sums = Accumulator(n, block_seed=block_seed, grouping=grouping)
        for part in parts:
            sums.add(part)
        return sums.result()


class Accumulator:
    """Sums of the term columns of every candidate's estimators over a log of `n` rows that comes part by part.

    Rows of one cluster are summed before anything is squared, in a `grouping` (default: in memory). With a `block_seed`,
    sums over the bootstrap's blocks are kept as well. Several of them can be fed in one pass over the data; products are
    small, so callers keep BLAS to one thread (`threadpoolctl.threadpool_limits(1, "blas")`).
    """

    def __init__(self, n: int, *, block_seed: int | None = None, grouping: Grouping | None = None):
        self._n, self._rows, self._block_seed = n, 0, block_seed
        self._lets_go = grouping is None and block_seed is None
        self._grouping: Grouping = InMemory() if grouping is None else grouping
        self._blocks = None if block_seed is None else _RandomBlocks(n, block_seed)
        self._moments: Moments | None = None
        self._named: list[tuple[str, Estimator]] = []
        self._widths: list[int] = []
        self._tallies: list[WeightTally] = []
        self._log = LogTally(None)
        self._clustered, self._open = False, False

    def add(self, part: Part) -> None:
        """Take the next rows. Raises DataError, its row counted over the whole log, for a target that is not a policy on it."""
        self._begin(part, width_of(part.data, part.candidates, part.baseline))
        self._clustered = part.data.cluster is not None
        try:
            for rows, columns, widths in _columns(part, self._tallies, self._log):
                self._widths = widths
                if part.data.cluster is not None:
                    self._grouping.add(ClusterSums.of(columns, part.data.cluster[rows]))
                    self._open = True
                    continue
                self._add(Moments.of(columns))
                if self._blocks is not None:
                    self._blocks.add(columns)
        except DataError as error:
            raise error.shifted(self._rows) from None
        self._rows += part.data.n
        if part.closed and self._lets_go and self._open:
            self._close()

    def result(self) -> Accumulated:
        """The sums of all rows taken. Raises InputError where these are not `n` rows."""
        if self._rows != self._n or not self._rows:
            raise InputError(f"found parts of {self._rows:,} rows in all; expected {self._n:,}")
        if self._open:
            self._close()
        moments, blocks = self._moments, np.zeros((0, 0)) if self._blocks is None else self._blocks.sums
        assert moments is not None, "rows without moments"
        clusters, spread = (moments.n, _spread(moments) / self._log.squares) if self._clustered else (None, 1.0)
        checks = self._log.checks(*_last_column(moments), clusters, spread)
        parts = parts_of([(label, one, width) for (label, one), width in zip(self._named, self._widths, strict=True)])
        means = Stack(tuple(p for p in parts if isinstance(p.estimator, WeightMean)), moments, blocks, self._clustered)
        stack = replace(means, parts=tuple(p for p in parts if not isinstance(p.estimator, WeightMean)))
        return Accumulated(stack, means, tuple(self._tallies), checks)

    def _begin(self, part: Part, width: int | None) -> None:
        if not self._tallies:
            self._named = _names(part.candidates)
            self._tallies = [
                WeightTally(self._n, [one for one in each.estimators if isinstance(one, Transforming)]) for each in part.candidates
            ]
            self._log = LogTally(width)
        elif width != self._log.k:
            raise DataError(
                "target", f"{width} actions", f"{self._log.k}, as in earlier rows", "Use one set of actions.", row=self._rows
            )

    def _add(self, moments: Moments) -> None:
        self._moments = moments if self._moments is None else self._moments + moments

    def _close(self) -> None:
        """Square the sums of the clusters that wait, and sum them over the bootstrap's blocks if it is asked for."""
        kept = []
        for group in self._grouping.groups():
            self._add(group.moments())
            if self._block_seed is not None:
                kept.append(group)
        if self._lets_go:
            self._grouping = InMemory()
        if self._block_seed is not None:
            every = ClusterSums.of(np.concatenate([one.total for one in kept]), np.concatenate([one.cluster for one in kept]))
            self._blocks = _RandomBlocks(len(every.total), self._block_seed)
            self._blocks.add(every.total)
        self._open = False


def _columns(part: Part, tallies: Sequence[WeightTally], log: LogTally) -> Iterator[tuple[slice, FloatArray, list[int]]]:
    """Counted columns (m, d + 2) of the rows of a part, chunk by chunk, and the widths of the estimators' blocks among them.

    The last column before the count is the excess that `LogTally` checks. Tallies weights and log on the way.
    """
    data = part.data
    for rows in _chunks(part):
        blocks: list[FloatArray] = []
        sample_weight = None if data.sample_weight is None else data.sample_weight[rows]
        for candidate, tally in zip(part.candidates, tallies, strict=True):
            arrays = rows_of(data, candidate, part.baseline, rows)
            tally.add(arrays.weight, arrays.reward, sample_weight)
            blocks += [one.terms(arrays) for one in (*candidate.estimators, WeightMean())]
        excess = log.add(data, rows)[:, None]
        yield rows, counted(*blocks, excess, weight=sample_weight), [block.shape[1] for block in blocks]


def _last_column(moments: Moments) -> tuple[float, float]:
    """Mean over rows of the last column before the count, and its standard error."""
    gradient = np.zeros(len(moments.mean) - 1)
    gradient[-1] = 1.0
    return float(per_row(moments.mean)[-1]), moments.stderr(per_row_gradient(gradient, moments.mean))


def _spread(moments: Moments) -> float:
    """Sum of the squared weights of clusters: over that of rows, by how much a sum over wholly dependent rows varies more."""
    return float(moments.cross[-1, -1] + moments.n * moments.mean[-1] ** 2)


class _RandomBlocks:
    """The bootstrap's blocks of rows (or clusters): each itself, or one of `MIN_BLOCKS` at random where there are more.

    The stream differs from that of the resamples, which start from the same seed.
    """

    def __init__(self, n: int, seed: int):
        self._n, self._rng, self._done = n, np.random.default_rng((seed, 1)), 0
        self.sums = np.zeros((0, 0))

    def add(self, columns: FloatArray) -> None:
        rows = len(columns)
        if self._n <= MIN_BLOCKS:
            block, size = np.arange(self._done, self._done + rows), self._n
        else:
            block, size = self._rng.integers(0, MIN_BLOCKS, rows), MIN_BLOCKS
        self._done += rows
        part = sum_by_code(columns, block, size)
        self.sums = self.sums + part if self.sums.size else part


def check_log(data: LoggedData, k: int | None) -> LogChecks:
    """Checks of a log with `k` actions, or with an unknown number of them."""
    log = LogTally(k)
    excess = log.add(data, slice(0, data.n))
    columns = counted(excess[:, None], weight=data.sample_weight)
    if data.cluster is None:
        return log.checks(*_last_column(Moments.of(columns)))
    moments = ClusterSums.of(columns, data.cluster).moments()
    return log.checks(*_last_column(moments), moments.n, _spread(moments) / log.squares)


def as_target(target: Target) -> Target:
    """The target as an array, or "logging". Raises InputError for another word, DataError for another shape."""
    if isinstance(target, str):
        if target != "logging":
            raise InputError(f"found target {target!r}; expected an array of probabilities, or 'logging'")
        return target
    array = np.asarray(target)
    if array.ndim not in (1, 2):
        raise DataError("target", f"shape {array.shape}", "shape (n, k), or (n,)", "Pass probabilities row by row.")
    return array


def rows_of(data: LoggedData, candidate: Candidate, baseline: Target | None, rows: slice) -> Rows:
    """The per-row arrays of one candidate on a part of the log: the only place where weights and model values are made."""
    action, propensity = data.action[rows], data.propensity[rows]
    taken, vector = _probabilities("target", candidate.target, data, rows)
    weight = weights.importance(taken, propensity)
    q_logged = v = weight_change = np.empty(0)
    if candidate.q is not None and vector is not None:
        q = np.asarray(candidate.q[rows], dtype=np.float64)
        q_logged, v = q[np.arange(len(q)), action], np.einsum("nk,nk->n", vector, q)
        if not np.isfinite(v + q_logged).all():
            row = int(np.argmin(np.isfinite(v + q_logged)))
            raise DataError(
                "q", "a prediction that is not finite", "a finite prediction for every action", "Mend the reward model.",
                row=rows.start + row,
            )  # fmt: skip
    if baseline is not None:
        weight_change = weight - weights.importance(_probabilities("baseline", baseline, data, rows)[0], propensity)
    return Rows(data.reward[rows], weight, q_logged, v, weight_change)


def width_of(data: LoggedData, candidates: Sequence[Candidate], baseline: Target | None = None) -> int | None:
    """The number of actions k, where anything says it."""
    vectors = [data.propensities, data.eligible, baseline, *(c.target for c in candidates), *(c.q for c in candidates)]
    return next((int(v.shape[1]) for v in vectors if isinstance(v, np.ndarray) and v.ndim == 2), None)


def checked_shapes(data: LoggedData, candidate: Candidate, baseline: Target | None) -> None:
    """Raise DataError, before any work, where shapes of target, q and baseline do not fit the log."""
    k = width_of(data, [candidate], baseline)
    vectors: dict[str, Any] = {"target": candidate.target, "q": candidate.q, "baseline": baseline}
    for name, array in vectors.items():
        if not isinstance(array, np.ndarray):
            continue
        if name == "q" or array.ndim != 1:
            if array.shape != (data.n, k):
                raise DataError(
                    name, f"shape {array.shape}", f"shape ({data.n}, {k}): one entry per row and action",
                    "Use one row order and one set of actions throughout.",
                )  # fmt: skip
            checked_width(name, data.action, array.shape[1])


def _probabilities(name: str, target: Target, data: LoggedData, rows: slice) -> tuple[FloatArray, FloatArray | None]:
    """Probability of each logged action (rows,) and, where known, the whole vectors (rows, k)."""
    if isinstance(target, str):
        return data.propensity[rows], None if data.propensities is None else data.propensities[rows]
    part = target[rows]
    size = len(data.action[rows])
    if part.ndim == 1:
        return checked_propensity(name, part, size, target=True, first_row=rows.start), None
    vector = checked_distribution(name, part, size, data.eligible, rows)
    return vector[np.arange(size), data.action[rows]], vector


def _chunks(part: Part) -> Iterator[slice]:
    data = part.data
    size = max(2**10, CHUNK_BYTES // (8 * (width_of(data, part.candidates) or 1)))
    if data.cluster is not None:
        size = max(size, CLUSTERED_ROWS)  # few, large sums: most of a cluster's rows may still be ahead
    for start in range(0, data.n, size):
        yield slice(start, min(start + size, data.n))


def _names(candidates: Sequence[Candidate]) -> list[tuple[str, Estimator]]:
    """Labels of the blocks of columns: `candidate`, or `candidate: estimator` where it has several, and its mean weight."""
    return [
        (f"{candidate.label}: {estimator}" if len(candidate.estimators) > 1 else candidate.label, estimator)
        for candidate in candidates
        for estimator in (*candidate.estimators, WeightMean())
    ]
