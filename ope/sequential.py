"""Off-policy estimators of a policy's value per trajectory, each three short functions of the same arrays.

A trajectory is a row: its weights and rewards become term columns, and the mean of the columns a value, as in `ope.estimators`.
A new one is a class here, a line in `SEQUENTIAL` and a number by hand in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ope.accumulate import Accumulated, WeightMean
from ope.data import FloatArray, InputError, checked_finite, folds_of_units
from ope.diagnostics import LogChecks, Thresholds, WeightTally, judge
from ope.estimate import Estimate
from ope.estimators import DR, IPS, SNIPS, Needs, Rows, Smooth, mean_gradient, mean_value
from ope.evaluation import Report
from ope.intervals import Normal
from ope.moments import ClusterSums, Moments, counted
from ope.primitives import weights
from ope.selection import Fold, Selection, select_sums
from ope.stack import Stack, parts_of
from ope.trajectories import Trajectories, checked_steps, shaped_steps

DEFAULT_THRESHOLDS = Thresholds()

LARGEST_WEIGHT = math.exp(20.0)
"""What `ope.primitives.weights` bounds a product of ratios by."""

MEND = "Mend the reward model, or drop what it cannot value."


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Everything that any estimator may look at. Made once per log and target by `steps_of`.

    Rewards and models are discounted to the first step, and 0 where no step counts.
    """

    reward: FloatArray
    """(N, T) discount^t·r_t"""
    weight: FloatArray
    """(N, T) w_t = Π_{u<=t} π/μ, which stays as it was after the last step: what has ended goes on, without rewards."""
    q: FloatArray
    """(N, T) discount^t·q(s_t, a_t), the model's value of the rest; empty without a model of steps."""
    v: FloatArray
    """(N, T) discount^t·v(s_t), the mean of q over the target's actions; empty without a model of steps."""
    whole: Rows
    """(N,) each trajectory as one decision: its return, its last weight, and models (N,) of the whole return if given."""


class TrajectoryEstimator(Protocol):
    """A smooth function of means of columns, one row per trajectory."""

    name: ClassVar[str]
    needs: ClassVar[Needs]
    stepwise: ClassVar[bool]
    """True if every step has a weight of its own. Models, where needed, are then of steps (N, T), else of trajectories (N,)."""

    def terms(self, steps: Steps) -> FloatArray:
        """Columns (N, d)."""
        ...

    def value(self, mean: FloatArray) -> FloatArray:
        """Means (..., d) -> values (...): one estimate, or a thousand resamples at once."""
        ...

    def gradient(self, mean: FloatArray) -> FloatArray:
        """Gradient (d,) of the value at one mean (d,)."""
        ...


def _name(self: Any) -> str:
    return str(self.name)


@dataclass(frozen=True)
class TrajectoryIS:
    """Σ w_T·G / N: IPS of whole trajectories. Unbiased; the weight is a product of T ratios, and so is its spread."""

    name: ClassVar[str] = "TrajectoryIS"
    needs: ClassVar[Needs] = Needs()
    stepwise: ClassVar[bool] = False
    value, gradient, __str__ = mean_value, mean_gradient, _name

    def terms(self, steps: Steps) -> FloatArray:
        """Column (w_T·G) of the return G."""
        return IPS().terms(steps.whole)


@dataclass(frozen=True)
class PDIS:
    """Σ Σ_t discount^t·w_t·r_t / N: a reward is weighed by the steps that led to it alone. Unbiased. Precup et al. 2000.

    Where only the last step earns a reward it is TrajectoryIS.
    """

    name: ClassVar[str] = "PDIS"
    needs: ClassVar[Needs] = Needs()
    stepwise: ClassVar[bool] = True
    value, gradient, __str__ = mean_value, mean_gradient, _name

    def terms(self, steps: Steps) -> FloatArray:
        """Column (Σ_t discount^t·w_t·r_t)."""
        return (steps.weight * steps.reward).sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class WIS:
    """Σ w_T·G / Σ w_T: SNIPS of whole trajectories. Bias O(1/N), and within the range of the returns. Precup et al. 2000."""

    name: ClassVar[str] = "WIS"
    needs: ClassVar[Needs] = Needs()
    stepwise: ClassVar[bool] = False
    __str__ = _name

    def terms(self, steps: Steps) -> FloatArray:
        """Columns (w_T·G, w_T)."""
        return SNIPS().terms(steps.whole)

    def value(self, mean: FloatArray) -> FloatArray:
        """Ratio of the means (..., 2) -> (...)."""
        return SNIPS().value(mean)

    def gradient(self, mean: FloatArray) -> FloatArray:
        """Its gradient (2,)."""
        return SNIPS().gradient(mean)


@dataclass(frozen=True)
class PDWIS:
    """Σ_t (Σ discount^t·w_t·r_t / Σ w_t): every step divided by its own weights. Bias O(1/N). CWPDIS of Thomas 2015.

    Its 2·T columns need a covariance of (2·T)² numbers.
    """

    name: ClassVar[str] = "PDWIS"
    needs: ClassVar[Needs] = Needs()
    stepwise: ClassVar[bool] = True
    __str__ = _name

    def terms(self, steps: Steps) -> FloatArray:
        """Columns (discount^t·w_t·r_t for every t, w_t for every t)."""
        return np.concatenate((steps.weight * steps.reward, steps.weight), axis=1)

    def value(self, mean: FloatArray) -> FloatArray:
        """Sum of T ratios of means (..., 2·T) -> (...)."""
        weighted, weight = np.split(mean, 2, axis=-1)
        return (weighted / weight).sum(axis=-1)

    def gradient(self, mean: FloatArray) -> FloatArray:
        """Its gradient (2·T,)."""
        weighted, weight = np.split(mean, 2)
        return np.concatenate((1.0 / weight, -weighted / weight**2))


@dataclass(frozen=True)
class SequentialDR:
    """Σ Σ_t discount^t·(w_{t-1}·v_t + w_t·(r_t - q_t)) / N: a model corrected at every step. Jiang & Li 2016, eq. 10, summed.

    Unbiased whatever the model, as long as v is the mean of q over the target's actions; q = v = 0 is PDIS. For language models
    a step is a token; `TrajectoryDR` takes the whole response for one decision.
    """

    name: ClassVar[str] = "SequentialDR"
    needs: ClassVar[Needs] = Needs(q=True)
    stepwise: ClassVar[bool] = True
    value, gradient, __str__ = mean_value, mean_gradient, _name

    def terms(self, steps: Steps) -> FloatArray:
        """Column (Σ_t discount^t·(w_{t-1}·v_t + w_t·(r_t - q_t))), w_{-1} = 1."""
        before = np.concatenate((np.ones_like(steps.weight[:, :1]), steps.weight[:, :-1]), axis=1)
        return (before * steps.v + steps.weight * (steps.reward - steps.q)).sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class TrajectoryDR:
    """Σ (v + w_T·(G - q)) / N: DR where the whole response is one action of a bandit. Dudik et al. 2011, eq. 2.

    q (N,) predicts the return of what was sampled, v (N,) is its mean over what the target would sample from the same start.
    """

    name: ClassVar[str] = "TrajectoryDR"
    needs: ClassVar[Needs] = Needs(q=True)
    stepwise: ClassVar[bool] = False
    value, gradient, __str__ = mean_value, mean_gradient, _name

    def terms(self, steps: Steps) -> FloatArray:
        """Column (v + w_T·(G - q))."""
        return DR().terms(steps.whole)


SEQUENTIAL: tuple[TrajectoryEstimator, ...] = (TrajectoryIS(), PDIS(), WIS(), PDWIS(), SequentialDR(), TrajectoryDR())
"""One of each."""


def trajectory_estimator(name: str) -> TrajectoryEstimator:
    """An estimator from its printed name, in any case. Raises InputError that lists the names."""
    for one in SEQUENTIAL:
        if str(one).lower() == name.lower():
            return one
    raise InputError(f"unknown estimator {name!r} of trajectories; expected one of {', '.join(str(one) for one in SEQUENTIAL)}")


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Values of m candidates, and of the policy that sampled, on the same trajectories.

    Where true values are known, `selection.top_k(values, true, baseline, k)` and `selection.sharpe_ratio_at_k` grade the estimator.
    Where they are not, `select_trajectories` describes tonight's shortlist.
    """

    labels: tuple[str, ...]
    fold: Fold
    """An estimate of each candidate and last the plain mean of the returns, with their weights' diagnostics."""
    distances: FloatArray
    """Mean of |w_T - w_T'| / 2, an estimate of the total variation between two candidates (m, m)."""

    @property
    def values(self) -> FloatArray:
        """Values of the candidates (m,)."""
        return self.fold.stack.values()[:-1]

    @property
    def baseline(self) -> float:
        """Mean return of the trajectories as they were sampled."""
        return float(self.fold.stack.values()[-1])

    @property
    def covariance(self) -> FloatArray:
        """Joint covariance of (values, baseline) by the delta method (m + 1, m + 1), the baseline last."""
        return self.fold.stack.covariance()


def evaluate_trajectories(
    data: Trajectories,
    logp_target: ArrayLike,
    estimators: Sequence[TrajectoryEstimator] | None = None,
    *,
    q: ArrayLike | None = None,
    v: ArrayLike | None = None,
    level: float = 0.95,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
) -> Report:
    """Estimate what a target would have earned per trajectory, with every estimator asked for, in their order.

    `logp_target` (N, T): the target's log-probabilities of the logged actions; -inf where it never takes one.
    `q`, `v`: a model fitted on other trajectories, of steps (N, T) for SequentialDR or of trajectories (N,) for TrajectoryDR.
    `estimators`: by default those whose needs are met, but PDWIS, whose covariance grows with T². Intervals are normal, or with
    clusters Student's t.

    Raises DataError for arrays that no policy could have written, InputError for an estimator whose needs are not met.
    """
    if not 0 < level < 1:
        raise InputError(f"found level={level}; expected a coverage between 0 and 1, such as 0.95")
    steps = steps_of(data, logp_target, q, v)
    chosen = tuple(one for one in SEQUENTIAL if one != PDWIS() and _met(one, steps)) if estimators is None else tuple(estimators)
    if not chosen:
        raise InputError("no estimator was asked for; expected at least one, such as PDIS()")
    sums = _accumulate(data, [("target", chosen, steps)])
    (weight,), values, stderrs = sums.diagnostics(), sums.stack.values(), sums.stack.stderrs()
    ends = zip(*Normal().ends(sums.stack, level), strict=True)
    verdict, reasons = judge(sums.checks, weight, thresholds)
    estimates = []
    for one, value, stderr, (low, high) in zip(chosen, values, stderrs, ends, strict=True):
        grave = () if math.isfinite(low) else ("It has no finite interval: too few trajectories overlap with the policy.",)
        estimates.append(
            Estimate(
                str(one), float(value), float(stderr), float(low), float(high), level, Normal.name, data.n, weight.ess,
                "refused" if grave else verdict, (*reasons, *grave), _notes(one, steps, sums.checks),
            )
        )  # fmt: skip
    return Report(tuple(estimates), weight, sums.checks)


def compare_trajectories(
    data: Trajectories,
    targets: Mapping[str, ArrayLike],
    estimator: TrajectoryEstimator,
    *,
    q: Mapping[str, ArrayLike] | None = None,
    v: Mapping[str, ArrayLike] | None = None,
) -> Comparison:
    """Value every candidate, {label: its log-probabilities (N, T)}, by one estimator, with their joint covariance.

    `q`, `v`: models of each candidate, {label: (N, T) or (N,)}. The last estimate is what the policy that sampled earned, a plain
    mean whatever the estimator. Raises as `evaluate_trajectories` does.
    """
    if not targets:
        raise InputError("found no candidate; expected at least one, {label: log-probabilities (N, T)}")
    every = [steps_of(data, logp, None if q is None else q.get(label), None if v is None else v.get(label))
             for label, logp in targets.items()]  # fmt: skip
    found = np.zeros((len(every), len(every)))
    for i, j in combinations(range(len(every)), 2):
        found[i, j] = found[j, i] = np.abs(every[i].whole.weight - every[j].whole.weight).mean() / 2
    candidates = [(label, (estimator,), steps) for label, steps in zip(targets, every, strict=True)]
    sums = _accumulate(data, [*candidates, ("baseline", (TrajectoryIS(),), steps_of(data, data.logp_behavior))])
    return Comparison(tuple(targets), Fold.of(sums), found)


def select_trajectories(
    data: Trajectories,
    targets: Mapping[str, ArrayLike],
    estimator: TrajectoryEstimator | None = None,
    *,
    sizes: Sequence[int] = (2, 3, 4, 5),
    seed: int = 0,
) -> Selection:
    """The shortlist of candidates {label: log-probabilities (N, T)} worth paying for: chosen on one half, valued on the other.

    Clusters stay whole. `estimator`: by default WIS, since whole trajectories have weights far from one. Raises InputError for less
    than two candidates or clusters, and as `compare_trajectories` does.
    """
    if len(targets) < 2:
        raise InputError(f"found {len(targets)} candidate(s); expected at least two to choose from")
    kind, logps = estimator or WIS(), {label: np.asarray(logp) for label, logp in targets.items()}
    labels = np.arange(data.n) if data.cluster is None else data.cluster
    unit = np.unique(labels, return_inverse=True)[1]
    fold = folds_of_units(int(unit.max()) + 1, 2, seed, "trajectories" if data.cluster is None else "clusters")[unit]
    a, b = (
        compare_trajectories(data.take(fold == half), {label: logp[fold == half] for label, logp in logps.items()}, kind)
        for half in (0, 1)
    )
    return select_sums(a.labels, a.fold, b.fold, a.distances, by=kind, sizes=sizes, seed=seed)


def steps_of(data: Trajectories, logp_target: ArrayLike, q: ArrayLike | None = None, v: ArrayLike | None = None) -> Steps:
    """The arrays of one target: the only place where weights are made. q and v are both (N, T), both (N,), or neither given.

    Log-ratios and their running sums are bounded at ±20; after a step that the target never takes, weights are exactly 0.
    Raises DataError for another shape and for what is not finite where a step counts, InputError for q without v.
    """
    never = shaped_steps("logp_target", logp_target, data.mask) == -np.inf
    remedy = "Give the target's log-probability of the logged action, -inf where it never takes it."
    logp = checked_steps("logp_target", logp_target, data.mask & ~never, remedy)
    possible = np.logical_and.accumulate(~(never & data.mask), axis=1)
    weight = np.where(possible, weights.per_decision(weights.log_ratio(logp, data.logp_behavior)), 0.0)
    discounts = data.discount ** np.arange(data.mask.shape[1])
    reward, none = discounts * data.reward, np.empty(0)
    if q is None or v is None:
        if q is not v:
            raise InputError("found one of q and v; expected both, (N, T) or (N,), or neither. v is the target's mean of q")
        of_steps = of_whole = (none, none)
    elif np.ndim(q) == 2:
        q_t, v_t = (checked_steps(name, model, data.mask, MEND) for name, model in (("q", q), ("v", v)))
        of_steps, of_whole = (discounts * q_t, discounts * v_t), (none, none)
    else:
        of_steps = (none, none)
        of_whole = checked_finite("q", q, (data.n,), MEND), checked_finite("v", v, (data.n,), MEND)
    return Steps(reward, weight, *of_steps, Rows(reward.sum(axis=1), weight[:, -1], *of_whole, weight_change=none))


def _met(one: TrajectoryEstimator, steps: Steps) -> bool:
    return not one.needs.q or (steps.v if one.stepwise else steps.whole.v).size > 0


def _accumulate(data: Trajectories, candidates: Sequence[tuple[str, Sequence[TrajectoryEstimator], Steps]]) -> Accumulated:
    """Sums of the columns of every candidate's estimators and mean weight, clusters first. Raises InputError for unmet needs."""
    named: list[tuple[str, Smooth]] = []
    blocks, tallies = [], []
    for label, estimators, steps in candidates:
        for one in estimators:
            if not _met(one, steps):
                shape = "(N, T), one entry per step" if one.stepwise else "(N,), one entry per trajectory"
                raise InputError(f"{one} needs a model; expected q and v of shape {shape}. Pass both, or ask only for {_free()}")
            named.append((label, one))
            blocks.append(one.terms(steps))
        named.append((label, WeightMean()))
        blocks.append(WeightMean().terms(steps.whole))
        tallies.append(WeightTally(data.n))
        tallies[-1].add(steps.whole.weight, steps.whole.reward)
    columns, clustered = counted(*blocks), data.cluster is not None
    moments = Moments.of(columns) if data.cluster is None else ClusterSums.of(columns, data.cluster).moments()
    parts = parts_of([(label, one, block.shape[1]) for (label, one), block in zip(named, blocks, strict=True)])
    stack, means = (
        Stack(tuple(part for part in parts if isinstance(part.estimator, WeightMean) == mean), moments, np.zeros((0, 0)), clustered)
        for mean in (False, True)
    )
    unknown = math.nan  # a log of trajectories does not hold the other actions' probabilities
    earned = float(candidates[0][2].whole.reward.mean())
    checks = LogChecks(
        data.n, unknown, unknown, unknown, unknown, unknown, False, moments.n if clustered else None, reward_mean=earned
    )
    return Accumulated(stack, means, tuple(tallies), checks)


def _notes(one: TrajectoryEstimator, steps: Steps, checks: LogChecks) -> tuple[str, ...]:
    notes = []
    if one.stepwise:
        notes.append("ESS and verdict are of the weights of whole trajectories; those of early steps vary less.")
    reached = int((steps.weight > 0.999 * LARGEST_WEIGHT).any(axis=1).sum())
    if reached:
        notes.append(f"{reached:,} trajectories reach the bound exp(20) on weights: what lies beyond it is lost.")
    if checks.clusters is not None:
        notes.append(f"{checks.clusters:,} clusters.")
    return tuple(notes)


def _free() -> str:
    return ", ".join(str(one) for one in SEQUENTIAL if not one.needs.q)
