"""One pass over a log: candidate policies become per-row arrays, those become term columns, and only sums are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from ope.data import (
    DataError,
    FloatArray,
    InputError,
    IntArray,
    LoggedData,
    checked_distribution,
    checked_propensity,
    checked_width,
)
from ope.estimators import Estimator, Needs, Rows, mean_gradient, mean_value
from ope.moments import Moments, counted, sum_by_code
from ope.primitives import terms, weights
from ope.stack import Stack, parts_of

Target: TypeAlias = FloatArray | Literal["logging"]
"""A policy on a log: (n, k) probabilities; (n,) those of the logged actions; or "logging", the policy that was logged."""

MIN_BLOCKS = 4096
"""Rows of a log without clusters are resampled in this many random blocks, or one by one if there are no more."""

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
class Accumulated:
    """Sums of one pass: a stack of every (candidate, estimator), and each candidate's weights."""

    stack: Stack
    """Parts in the order of candidates, then estimators; labelled `candidate`, or `candidate: estimator` if several."""
    weight_means: Stack
    """One `WeightMean` per candidate, on the same moments."""
    weights: tuple[FloatArray, ...]
    """Importance weights (n,) of each candidate."""


def accumulate(
    data: LoggedData,
    candidates: Sequence[Candidate],
    *,
    baseline: Target | None = None,
    block_seed: int | None = None,
) -> Accumulated:
    """Sum the term columns of every candidate's estimators over the rows of a log.

    Rows of one cluster are summed before anything is squared. With a `block_seed`, sums over the bootstrap's blocks
    are kept as well. Raises DataError for a target that is not a policy on this log.
    """
    code, clusters = _cluster_code(data)
    block = code if block_seed is None or clusters else _random_blocks(data.n, block_seed)
    blocks = clusters or min(data.n, MIN_BLOCKS)
    kept = [np.empty(data.n) for _ in candidates]
    moments, sums = None, np.zeros((0, 0))
    widths: list[int] = []
    for rows in _chunks(data, candidates):
        columns: list[FloatArray] = []
        for candidate, weight in zip(candidates, kept, strict=True):
            arrays = rows_of(data, candidate, baseline, rows)
            weight[rows] = arrays.weight
            columns += [estimator.terms(arrays) for estimator in (*candidate.estimators, WeightMean())]
        widths = [column.shape[1] for column in columns]
        chunk = counted(np.concatenate(columns, axis=1), None if data.sample_weight is None else data.sample_weight[rows])
        if not clusters:
            moments = Moments.of(chunk) if moments is None else moments + Moments.of(chunk)
        if block is not None:
            part = sum_by_code(chunk, block[rows], blocks)
            sums = part if not sums.size else sums + part
    whole = Moments.of(sums) if moments is None else moments
    return _accumulated(candidates, widths, Stack((), whole, sums, clusters > 0), kept)


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


def _cluster_code(data: LoggedData) -> tuple[IntArray | None, int]:
    if data.cluster is None:
        return None, 0
    labels, code = np.unique(data.cluster, return_inverse=True)
    return code, len(labels)


def _random_blocks(n: int, seed: int) -> IntArray:
    """The bootstrap's block of each row (n,) where rows are independent: itself, or one of `MIN_BLOCKS` at random.

    The stream differs from that of the resamples, which start from the same seed.
    """
    return np.arange(n) if n <= MIN_BLOCKS else np.random.default_rng((seed, 1)).integers(0, MIN_BLOCKS, n)


def _chunks(data: LoggedData, candidates: Sequence[Candidate]) -> Iterator[slice]:
    size = max(2**10, CHUNK_BYTES // (8 * (width_of(data, candidates) or 1)))
    for start in range(0, data.n, size):
        yield slice(start, min(start + size, data.n))


def _accumulated(candidates: Sequence[Candidate], widths: list[int], sums: Stack, kept: list[FloatArray]) -> Accumulated:
    """Name the columns of `sums`: estimates in one stack, mean weights in another, both on the same moments."""
    named = [
        (f"{candidate.label}: {estimator}" if len(candidate.estimators) > 1 else candidate.label, estimator)
        for candidate in candidates
        for estimator in (*candidate.estimators, WeightMean())
    ]
    parts = parts_of([(label, estimator, width) for (label, estimator), width in zip(named, widths, strict=True)])
    return Accumulated(
        Stack(
            tuple(part for part in parts if not isinstance(part.estimator, WeightMean)), sums.moments, sums.blocks, sums.clustered
        ),
        Stack(tuple(part for part in parts if isinstance(part.estimator, WeightMean)), sums.moments, sums.blocks, sums.clustered),
        tuple(kept),
    )
