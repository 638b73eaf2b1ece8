"""Which k candidates are worth an A/B test, and how well an estimator chooses them.

SharpeRatio@k grades *estimators* where true values are known: simulators, past A/B tests. Tonight's shortlist has no true
values; it is described by what they could be, given the joint uncertainty of the estimates. Kiyohara et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ope.accumulate import Accumulated, Candidate, Target, accumulate, as_target
from ope.data import FloatArray, InputError, IntArray, LoggedData, assign_folds
from ope.diagnostics import Diagnostics, LogChecks, Thresholds, judge
from ope.estimators import IPS, Estimator, Smooth, estimator
from ope.evaluation import check_candidate
from ope.primitives.divergences import total_variation
from ope.stack import Stack

Tie = Literal["first", "last"]


@dataclass(frozen=True, slots=True)
class Portfolio:
    """The k candidates with the highest estimates, described by their *true* values."""

    k: int
    candidates: tuple[int, ...]
    """Indices, the highest estimate first."""
    best: float
    worst: float
    mean: float
    std: float | None
    violation: float
    """Share of the k whose true value is below the safety threshold."""
    sharpe_ratio: float | None
    """(max(best, baseline) - baseline) / std; None for k = 1, whose spread is not defined."""


@dataclass(frozen=True, slots=True)
class Shortlist:
    """k candidates chosen on one fold, described by the posterior of their values on the other."""

    k: int
    candidates: tuple[str, ...]
    """Labels, the highest estimate first."""
    gain: float
    """E[max(best@k - baseline, 0)]"""
    std: float
    """E[std@k], divisor k - 1."""
    p_any_harm: float
    """P(at least one of the k is worth less than the threshold)."""
    violation: float
    """Expected share of the k that is worth less than the threshold."""


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """What `select_sums` needs of one fold: an estimate of each candidate, and last of the baseline, on the same rows."""

    stack: Stack
    weights: tuple[Diagnostics, ...]
    """In the order of the estimates."""
    checks: LogChecks

    @classmethod
    def of(cls, sums: Accumulated) -> Fold:
        """Of a pass over the fold's rows, with one estimator for each candidate."""
        return cls(sums.stack, tuple(sums.diagnostics()), sums.checks)


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Candidates ranked on fold A and valued on fold B, which knew nothing of the choice."""

    estimator: str
    ranking: tuple[str, ...]
    """Labels by their value on fold A, near-duplicates and refused estimates left out."""
    duplicates: Mapping[str, tuple[str, float]]
    """What was left out: label -> (the better ranked twin, total variation between them)."""
    blocked: Mapping[str, tuple[str, ...]]
    """What fold A cannot choose by, going by its weights alone: label -> reasons."""
    doubtful: Mapping[str, tuple[str, ...]]
    """What was chosen but is refused on fold B: its share in the shortlists' numbers should not be believed. Label -> reasons."""
    selected_on: FloatArray
    """Values on fold A in the order of `ranking`: optimistic, since they chose it."""
    values: FloatArray
    """Values on fold B in the order of `ranking`."""
    covariance: FloatArray
    """Joint covariance of (values, baseline) on fold B, the baseline last."""
    baseline: float
    """Value of the baseline on fold B."""
    shortlists: tuple[Shortlist, ...]
    knee: int
    """The k after which another candidate adds less gain than the average one did."""


def ranking(estimated: ArrayLike, *, tie: Tie = "first") -> IntArray:
    """Indices (m,) by (-estimate, index): the highest first, and among equals the first, or with `tie="last"` the last.

    The tie rule is part of the result, since sorting routines differ. "last" is that of the published figures.
    Raises InputError for estimates that are not finite.
    """
    values = np.asarray(estimated, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise InputError(f"found estimates {values}; expected a flat array of finite numbers")
    if tie not in ("first", "last"):
        raise InputError(f"found tie={tie!r}; expected 'first', 'last', or for sharpe_ratio_at_k 'average'")
    index = np.arange(len(values))
    return np.lexsort((index if tie == "first" else -index, -values))


def top_k(
    estimated: ArrayLike,
    true: ArrayLike,
    baseline: float,
    k: int,
    *,
    threshold: float | None = None,
    ddof: int = 1,
    tie: Tie = "first",
    cap: float = math.inf,
) -> Portfolio:
    """The portfolio of the k highest estimates (m,), described by true values (m,). `threshold` defaults to the baseline.

    `ddof` = 1 is the convention of the published figures, 0 that of the published formula. The baseline's own value never
    enters the spread. Where the spread is 0 the ratio is 0 without gain, else `cap`, above which no ratio is reported.
    """
    values = np.asarray(true, dtype=np.float64)
    order = ranking(estimated, tie=tie)
    if not np.isfinite(values).all() or not math.isfinite(baseline):
        raise InputError(f"found true values {values}, baseline {baseline}; expected finite numbers")
    if not 0 <= ddof < max(k, 2):
        raise InputError(f"found ddof={ddof} for k={k}; expected 0 or 1")
    if len(values) != len(order) or not 1 <= k <= len(order):
        raise InputError(
            f"found {len(order)} estimates, {len(values)} true values, k={k}; expected as many of both, and k among them"
        )
    top = values[order[:k]]
    std = None if k == 1 else 0.0 if top.min() == top.max() else float(top.std(ddof=ddof))  # equal values leave no rounding
    return Portfolio(
        k=k, candidates=tuple(int(i) for i in order[:k]), best=float(top.max()), worst=float(top.min()), mean=float(top.mean()),
        std=std, violation=float(np.mean(top < (baseline if threshold is None else threshold))),
        sharpe_ratio=None if std is None else _ratio(max(float(top.max()) - baseline, 0.0), std, cap),
    )  # fmt: skip


def sharpe_ratio_at_k(
    estimated: ArrayLike,
    true: ArrayLike,
    baseline: float,
    k: int,
    ddof: int = 1,
    *,
    tie: Tie | Literal["average"] = "first",
    cap: float = math.inf,
) -> float | None:
    """(max(best@k, baseline) - baseline) / std@k over the k highest estimates; None for k = 1. See `top_k`.

    `tie="average"` is the mean over every way of breaking ties at the k-th place. Kiyohara et al. 2024, eq. 2.
    """
    if tie != "average":
        return top_k(estimated, true, baseline, k, ddof=ddof, tie=tie, cap=cap).sharpe_ratio
    order, values = ranking(estimated), np.asarray(estimated, dtype=np.float64)
    if k == 1 or not 1 <= k <= len(order):
        return top_k(estimated, true, baseline, k, ddof=ddof, cap=cap).sharpe_ratio
    last = values[order[k - 1]]
    sure, tied = [i for i in order if values[i] > last], [i for i in order if values[i] == last]
    if math.comb(len(tied), k - len(sure)) > 100_000:
        raise InputError(f"found {len(tied)} candidates tied at place {k}; expected few enough to average over every order of them")
    ratios = [
        top_k(np.arange(k), np.asarray(true, dtype=np.float64)[[*sure, *some]], baseline, k, ddof=ddof, cap=cap).sharpe_ratio
        for some in combinations(tied, k - len(sure))
    ]
    return float(np.mean([ratio for ratio in ratios if ratio is not None]))


def regret_at_k(estimated: ArrayLike, true: ArrayLike, k: int, *, tie: Tie = "first") -> float:
    """max J - max of J over the k highest estimates."""
    values = np.asarray(true, dtype=np.float64)
    return float(values.max() - values[ranking(estimated, tie=tie)[:k]].max())


def near_duplicates(
    targets: Mapping[str, FloatArray], order: Iterable[str], *, tolerance: float = 0.01
) -> dict[str, tuple[str, float]]:
    """Candidates whose mean total variation from a better ranked one is below `tolerance`: label -> (twin, distance).

    Twins make the spread of a portfolio, and with it any Sharpe ratio, meaningless; one of them is enough.
    """
    labels = list(targets)
    return _twins(labels, order, mean_distances([targets[label] for label in labels]), tolerance)


def mean_distances(targets: Sequence[FloatArray]) -> FloatArray:
    """Mean total variation (m, m) between m policies (n, k) on the same rows."""
    found = np.zeros((len(targets), len(targets)))
    for i, j in combinations(range(len(targets)), 2):
        found[i, j] = found[j, i] = float(np.mean(total_variation(targets[i], targets[j])))
    return found


def _twins(labels: Sequence[str], order: Iterable[str], distances: FloatArray, tolerance: float) -> dict[str, tuple[str, float]]:
    kept: list[str] = []
    found: dict[str, tuple[str, float]] = {}
    for label in order:
        near = {twin: float(distances[labels.index(label), labels.index(twin)]) for twin in kept}
        twin = min(near, key=near.__getitem__, default=None)
        if twin is not None and near[twin] < tolerance:
            found[label] = (twin, near[twin])
        else:
            kept.append(label)
    return found


def select(
    data: LoggedData,
    targets: Mapping[str, FloatArray],
    *,
    q: FloatArray | None = None,
    by: str | Estimator = "DR",
    baseline: Target = "logging",
    threshold: float | None = None,
    sizes: Sequence[int] = (2, 3, 4, 5),
    tolerance: float = 0.01,
    draws: int = 10_000,
    seed: int = 0,
) -> Selection:
    """Rank policies (n, k) on fold A, and on fold B describe what the best k of them could be worth, for each k.

    `by` is the estimator that ranks and values. Values on B are jointly normal with the covariance of the stacked
    columns; harm is a value below `threshold`, by default below the baseline in the same draw. Folds keep clusters whole.
    A candidate that fold A has too little weight for is blocked; one whose estimate fold B refuses stays, and is named.
    """
    kind = estimator(by)
    if kind.needs.baseline:
        raise InputError(
            f"found by={kind}; expected an estimator of a value: every candidate is compared with the baseline as it is"
        )
    if len(targets) < 2:
        raise InputError(f"found {len(targets)} candidate(s); expected at least two to choose from")
    targets, baseline = {label: np.asarray(target) for label, target in targets.items()}, as_target(baseline)
    for label, target in targets.items():
        if target.ndim != 2:
            raise InputError(f"candidate {label!r}: found shape {target.shape}; expected whole vectors (n, k)")
        check_candidate(data, Candidate(label, target, (kind,), q), baseline)
    rows_a, rows_b = halves(data, seed)
    fold_a, fold_b = (Fold.of(_fold(data, targets, q, kind, baseline, rows)) for rows in (rows_a, rows_b))
    return select_sums(
        list(targets), fold_a, fold_b, mean_distances([target[rows_a] for target in targets.values()]), by=kind,
        threshold=threshold, sizes=sizes, tolerance=tolerance, draws=draws, seed=seed,
    )  # fmt: skip


def select_sums(
    labels: Sequence[str],
    fold_a: Fold,
    fold_b: Fold,
    distances: FloatArray,
    *,
    by: str | Smooth = "DR",
    threshold: float | None = None,
    sizes: Sequence[int] = (2, 3, 4, 5),
    tolerance: float = 0.01,
    draws: int = 10_000,
    seed: int = 0,
) -> Selection:
    """`select` from sums: m candidates in the order of `labels`, and last the baseline, with one estimate each.

    `distances` (m, m): mean total variation between candidates on fold A. Raises InputError for other numbers of estimates.
    """
    m = len(labels)
    if {len(fold_a.stack.parts), len(fold_b.stack.parts)} != {m + 1} or distances.shape != (m, m):
        raise InputError(
            f"found {m} labels, {len(fold_a.stack.parts)} and {len(fold_b.stack.parts)} estimates, distances {distances.shape}; "
            "expected an estimate for each label and the baseline, and a distance for each pair of labels"
        )
    blocked = _blocked(labels, fold_a)
    values_a, values_b = fold_a.stack.values(), fold_b.stack.values()
    ranked = [i for i, label in enumerate(labels) if label not in blocked]
    order = [labels[ranked[i]] for i in ranking(values_a[ranked])]
    twins = _twins(labels, order, distances, tolerance)
    kept = [label for label in order if label not in twins]
    chosen = [*(labels.index(label) for label in kept), m]
    values, covariance = values_b[chosen], fold_b.stack.covariance()[np.ix_(chosen, chosen)]
    possible = np.random.default_rng(seed).multivariate_normal(values, covariance, size=draws, method="eigh")
    shortlists = tuple(_shortlist(kept, possible, k, threshold) for k in sizes if 2 <= k <= len(kept))
    return Selection(
        estimator=str(estimator(by) if isinstance(by, str) else by), ranking=tuple(kept), duplicates=twins, blocked=blocked,
        doubtful=_doubtful(labels, fold_b, kept),
        selected_on=values_a[chosen[:-1]], values=values[:-1],
        covariance=covariance, baseline=float(values[-1]), shortlists=shortlists, knee=_knee(shortlists),
    )  # fmt: skip


def _fold(
    data: LoggedData, targets: Mapping[str, FloatArray], q: FloatArray | None, kind: Estimator, baseline: Target, rows: IntArray
) -> Accumulated:
    part_q = None if q is None else q[rows]
    candidates = [Candidate(label, target[rows], (kind,), part_q) for label, target in targets.items()]
    if isinstance(baseline, str):  # what the logging policy earned is a plain mean, whatever the estimator
        candidates.append(Candidate("baseline", baseline, (IPS(),)))
    else:
        candidates.append(Candidate("baseline", baseline[rows], (kind,), part_q))
    return accumulate(data.take(rows), candidates)


def halves(data: LoggedData, seed: int = 0) -> tuple[IntArray, IntArray]:
    """Rows of folds A and B of `select`: learn on A what B shall judge. Clusters stay whole."""
    fold = assign_folds(data, 2, seed)
    return np.flatnonzero(fold == 0), np.flatnonzero(fold == 1)


def _blocked(labels: Sequence[str], fold: Fold) -> dict[str, tuple[str, ...]]:
    """Candidates with too few effective rows to be chosen by, whatever their rewards."""
    limit = Thresholds().ess
    return {
        label: (f"{weight.ess:,.0f} effective rows of {weight.n:,} on fold A; at least {limit:,.0f} are needed to choose by.",)
        for label, weight in zip(labels, fold.weights, strict=False)
        if weight.ess < limit
    }


def _doubtful(labels: Sequence[str], fold: Fold, kept: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found = {}
    for label, weight in zip(labels, fold.weights, strict=False):
        verdict, reasons = judge(fold.checks, weight, Thresholds(), policy="candidate")
        if label in kept and verdict == "refused":
            found[label] = reasons
    return found


def _shortlist(labels: Sequence[str], possible: FloatArray, k: int, threshold: float | None) -> Shortlist:
    """Expectations over possible values (draws, m + 1), the baseline last."""
    top, baseline = possible[:, :k], possible[:, -1]
    limit = baseline[:, None] if threshold is None else np.full((1, 1), threshold)
    below = top < limit - 1e-9 * np.abs(limit)  # a candidate that is the baseline ties with it, up to rounding
    return Shortlist(
        k=k, candidates=tuple(labels[:k]), gain=float(np.maximum(top.max(axis=1) - baseline, 0.0).mean()),
        std=float(top.std(axis=1, ddof=1).mean()), p_any_harm=float(below.any(axis=1).mean()), violation=float(below.mean()),
    )  # fmt: skip


def _knee(shortlists: Sequence[Shortlist]) -> int:
    """The k furthest above the chord of the gain curve; the smallest k where there is no bend."""
    if not shortlists:
        return 0
    gains, ks = np.array([s.gain for s in shortlists]), np.array([s.k for s in shortlists], dtype=np.float64)
    rise, run = gains[-1] - gains[0], max(ks[-1] - ks[0], 1.0)
    above = gains - (gains[0] + rise * (ks - ks[0]) / run)
    return shortlists[int(np.argmax(above > above.max() - 1e-12))].k


def _ratio(gain: float, std: float, cap: float) -> float:
    if std == 0:
        return 0.0 if gain == 0 else cap
    return min(gain / std, cap)
