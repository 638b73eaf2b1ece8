"""What a log says about the weights that an estimate stands on, and one verdict with reasons.

Thresholds are those of the field's practice, gathered in `Thresholds`; each reason quotes what was found and what is expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc

from ope.data import FloatArray, IntArray, LoggedData
from ope.estimate import Level
from ope.estimators import Transforming

TAIL_SHARE = 0.05
"""Share of the positive weights whose tail index is looked at."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where trust ends. Weight-mean and calibration limits are in standard errors."""

    ess: float = 200.0
    ess_share: float = 0.01
    max_share: float = 0.05
    tail_index: float = 2.0
    refused_ess: float = 500.0
    """With a tail index below the limit, fewer effective rows than this are refused..."""
    refused_max_share: float = 0.02
    """... and so is one row with more of the weight than this. Otherwise it is caution: bounded weights read low too."""
    z: float = 4.0
    clusters: int = 40
    """Fewer know their own spread badly."""
    refused_clusters: int = 5
    given_up: float = 0.2
    """Share of the weight that clipping, switching or shrinking may give up."""
    agreement: float = 1e-6
    """Largest difference between the logged vector and the logged propensity of the action."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Checks of the importance weights of one target (or baseline) on one log."""

    n: int
    ess: float
    """Kish's effective sample size of the weights, times the sample weights where there are any."""
    weight_mean: float
    """Expected: 1."""
    weight_z: float
    """(mean - 1) in standard errors, clusters respected; 0 where the weights do not vary, NaN where nothing tells."""
    constant: bool
    """True where all weights are equal."""
    max_share: float
    """Share of all weight that the heaviest row carries."""
    reward_low: float
    """Smallest reward among rows of positive weight; with `reward_high`, NaN where there is none."""
    reward_high: float
    tail_index: float
    """Hill's estimate; below 2 the variance looks infinite. Infinity where equal weights or too few rows show no tail."""


@dataclass(frozen=True, slots=True)
class LogChecks:
    """Checks of the log itself, whatever the target. NaN: not computable from what was logged."""

    n: int
    inverse_mean: float
    """Mean of 1/p. Expected: the mean number of eligible actions."""
    eligible_mean: float
    inverse_z: float
    calibration_p: float
    """p-value of the chi-square test of action counts against the logged vectors; with clusters, an upper bound of it."""
    vector_gap: float
    """A/A: largest |w - 1| when the logged vectors are evaluated as the target."""
    estimated: bool
    clusters: int | None = None
    """Number of clusters, where rows have any."""
    reward_mean: float = math.nan
    """Plain mean of the logged rewards."""


def hill_tail_index(weight: FloatArray, share: float = TAIL_SHARE) -> float:
    """Hill's tail index of the largest `share` of the positive weights (n,): the smaller, the heavier. Hill 1975.

    Infinity where these weights are equal, or where fewer than ten of them leave nothing to estimate from.
    """
    positive = weight[weight > 0]
    tail = int(len(positive) * share)
    return _hill(np.partition(positive, len(positive) - tail - 1)[len(positive) - tail - 1 :]) if tail >= 10 else math.inf


def _hill(top: FloatArray) -> float:
    """Hill's estimate from the largest weights, the smallest of them first."""
    tail = len(top) - 1
    excess = float(np.log(top[1:] / top[0]).sum())
    return tail / excess if excess > 1e-9 * tail else math.inf


class WeightTally:
    """What diagnostics need of the importance weights of one candidate, summed over the parts of a log of `n` rows.

    Of single weights only the largest are kept: as many as a tail index could need, and no more than 5 % of the rows.
    """

    def __init__(self, n: int, transforming: Sequence[Transforming] = ()):
        self.n, self.rows = n, 0
        self.total = self.squares = 0.0
        self.smallest, self.largest, self.largest_row = math.inf, -math.inf, 0
        self.reward_low, self.reward_high = math.inf, -math.inf
        self.positive = 0
        self.unscaled, self.unscaled_largest = 0.0, 0.0
        self._transforming = tuple(transforming)
        self._used = np.zeros(len(self._transforming))
        self._room = int(n * TAIL_SHARE) + 1
        self._top: list[FloatArray] = []
        self._kept, self._threshold = 0, 0.0

    def add(self, weight: FloatArray, reward: FloatArray, sample_weight: FloatArray | None = None) -> None:
        """Take the weights and rewards (m,) of further rows, and how many rows each of them stands for."""
        largest = float(weight.max())
        if largest > self.unscaled_largest:
            self.unscaled_largest, self.largest_row = largest, self.rows + int(weight.argmax())
        if self._transforming:
            self.unscaled += float(weight.sum())
            self._used += [float(one.transformed(weight).sum()) for one in self._transforming]
        if sample_weight is not None:
            weight = weight * sample_weight
            largest = float(weight.max())
        smallest = float(weight.min())
        self.rows += len(weight)
        self.total += float(weight.sum())
        self.squares += float(np.vdot(weight, weight))
        self.smallest, self.largest = min(self.smallest, smallest), max(self.largest, largest)
        if smallest > 0:
            self.positive += len(weight)
            self.reward_low, self.reward_high = (
                min(self.reward_low, float(reward.min())),
                max(self.reward_high, float(reward.max())),
            )
        else:
            counts = weight > 0
            self.positive += int(counts.sum())
            self.reward_low = min(self.reward_low, float(reward.min(where=counts, initial=np.inf)))
            self.reward_high = max(self.reward_high, float(reward.max(where=counts, initial=-np.inf)))
        if largest > self._threshold:
            self._keep(weight[weight > self._threshold])

    def _keep(self, candidates: FloatArray) -> None:
        self._top.append(candidates)
        self._kept += len(candidates)
        if self._kept > 2 * self._room:
            top = self._largest(self._room)
            self._top, self._kept, self._threshold = [top], len(top), float(top[0])

    def _largest(self, count: int) -> FloatArray:
        """The largest weights, the smallest of them first."""
        everything = np.concatenate(self._top)
        return np.partition(everything, len(everything) - count)[len(everything) - count :]

    def given_up(self, one: Transforming) -> float:
        """Share of the weight that an estimator of this tally does not use."""
        used = float(self._used[self._transforming.index(one)])
        return 1 - used / self.unscaled if self.unscaled > 0 else 0.0

    def diagnostics(self, mean: float, stderr: float) -> Diagnostics:
        """Diagnostics, given the (weighted) mean of the weights and its standard error."""
        constant = self.largest - self.smallest <= 1e-12 * max(abs(mean), 1.0)
        tail = int(self.positive * TAIL_SHARE)
        some = self.total > 0
        return Diagnostics(
            n=self.rows,
            ess=self.total**2 / self.squares if some else 0.0,
            weight_mean=mean,
            weight_z=0.0 if constant else (mean - 1) / stderr if stderr > 0 else math.nan,
            constant=constant,
            max_share=self.largest / self.total if some else 1.0,
            reward_low=self.reward_low if some else math.nan,
            reward_high=self.reward_high if some else math.nan,
            tail_index=_hill(self._largest(tail + 1)) if tail >= 10 else math.inf,
        )


class LogTally:
    """What checks of a log need, summed over its parts. `k`: the number of actions, or None where nothing says it.

    Sums weigh rows like the sample weights; whether they may be believed depends on clusters, too, and so the excess of 1/p over
    the number of eligible actions comes with a standard error from outside (`accumulate` sums it beside the estimates' columns).
    """

    def __init__(self, k: int | None):
        self.k, self.n = k, 0
        self.estimated = False
        self.weight = self.squares = self.inverse = self.sizes = self.rewards = 0.0
        self.vector_gap = math.nan
        self.difference, self.covariance = np.empty(0), np.empty((0, 0))

    def add(self, data: LoggedData, rows: slice) -> FloatArray:
        """Take some rows of a log; returns the excess (m,) of each, 0 where the number of actions is unknown."""
        inverse, reward = 1 / data.propensity[rows], data.reward[rows]
        weight = None if data.sample_weight is None else data.sample_weight[rows]
        m = len(inverse)
        self.n += m
        self.rewards += float(reward.sum())
        self.estimated = self.estimated or data.propensity_estimated
        self.weight += m if weight is None else float(weight.sum())
        self.squares += m if weight is None else float(np.vdot(weight, weight))
        self.inverse += float(inverse.sum() if weight is None else np.vdot(weight, inverse))
        if data.propensities is not None:
            self._add_vectors(data.action[rows], data.propensity[rows], data.propensities[rows], weight)
        if data.eligible is None:
            self.sizes += (math.nan if self.k is None else self.k) * (m if weight is None else float(weight.sum()))
            return np.zeros(m) if self.k is None else inverse - self.k
        size = data.eligible[rows].sum(axis=1, dtype=np.float64)
        self.sizes += float(size.sum() if weight is None else np.vdot(weight, size))
        return inverse - size

    def _add_vectors(self, action: IntArray, propensity: FloatArray, vectors: FloatArray, weight: FloatArray | None) -> None:
        m, k = vectors.shape
        if not self.difference.size:
            self.difference, self.covariance, self.vector_gap = np.zeros(k), np.zeros((k, k)), 0.0
        gap = float(np.abs(vectors[np.arange(m), action] / propensity - 1).max())
        self.vector_gap = max(self.vector_gap, gap)
        if weight is None:
            expected = vectors.sum(axis=0)
            self.difference += np.bincount(action, minlength=k) - expected
            self.covariance += np.diag(expected) - vectors.T @ vectors
            return
        residual = -vectors * weight[:, None]  # which rows were kept may depend on the action: only residuals tell their spread
        residual[np.arange(m), action] += weight
        self.difference += residual.sum(axis=0)
        self.covariance += residual.T @ residual

    def checks(self, excess: float, stderr: float, clusters: int | None = None, spread: float = 1.0) -> LogChecks:
        """The checks of all rows taken, given the mean excess and its standard error.

        `clusters`: their number, where rows have any; `spread`: by what factor clusters may widen a variance, at most.
        """
        inverse_mean, eligible_mean = self.inverse / self.weight, self.sizes / self.weight
        inverse_z = excess / stderr if stderr > 1e-12 * inverse_mean else 0.0
        if stderr <= 1e-12 * inverse_mean and abs(excess) > 1e-6 * inverse_mean:
            inverse_z = math.copysign(math.inf, excess)  # without sampling error any difference decides
        known = self.difference.size > 0
        return LogChecks(
            n=self.n,
            inverse_mean=inverse_mean,
            eligible_mean=eligible_mean,
            inverse_z=math.nan if math.isnan(eligible_mean) or math.isnan(stderr) else inverse_z,
            calibration_p=_calibration_p(self.difference, self.covariance * spread) if known else math.nan,
            vector_gap=self.vector_gap,
            estimated=self.estimated,
            clusters=clusters,
            reward_mean=self.rewards / self.n,
        )


def calibration(action: IntArray, propensities: FloatArray) -> float:
    """p-value that actions (n,) were drawn from the logged vectors (n, k): chi-square over actions.

    Counts minus their expectation have covariance Σ_i diag(p_i) - p_i p_iᵀ, whose rank is the degrees of freedom.
    """
    expected = propensities.sum(axis=0)
    counts = np.bincount(action, minlength=propensities.shape[1])
    return _calibration_p(counts - expected, np.diag(expected) - propensities.T @ propensities)


def _calibration_p(difference: FloatArray, covariance: FloatArray) -> float:
    eigenvalues, vectors = np.linalg.eigh(covariance)
    kept = eigenvalues > 1e-9 * max(float(eigenvalues.max()), 1.0)
    statistic = float(((vectors.T @ difference)[kept] ** 2 / eigenvalues[kept]).sum())
    return float(chdtrc(int(kept.sum()), statistic)) if kept.any() else 1.0


def judge(
    log: LogChecks,
    weight: Diagnostics,
    limits: Thresholds,
    *,
    policy: str = "target",
    model_only: bool = False,
    given_up: float = 0.0,
) -> tuple[Level, tuple[str, ...]]:
    """One verdict for an estimate that stands on these weights, with every reason against it, the gravest first.

    `given_up`: share of the weight that the estimator does not use.
    """
    refused, caution = _log_reasons(log, limits)
    if weight.n == 1:
        refused.append("One row has no standard error; log more decisions.")
    if weight.ess == 0:
        refused.append(f"No overlap: the {policy} never takes an action that was logged.")
    elif weight.reward_low == weight.reward_high:
        refused.append(
            f"Every reward that the {policy} could have earned is {weight.reward_low:g}: nothing varies, so no interval holds."
        )
    if weight.ess > 0 and abs(weight.weight_z) > limits.z:
        refused.append(
            f"Weights of the {policy} average {weight.weight_mean:.4g} where 1 is expected (z = {weight.weight_z:.1f}): "
            "logged propensities are not what was sampled, or the log cannot support this policy."
        )
    elif weight.constant and abs(weight.weight_mean - 1) > limits.agreement and weight.n > 1:
        refused.append(f"All weights of the {policy} equal {weight.weight_mean:.4g} where 1 is expected.")
    if weight.tail_index < limits.tail_index:
        heavy = f"Weights have tail index {weight.tail_index:.2f}; below {limits.tail_index:g} their variance looks infinite"
        if weight.ess < limits.refused_ess or weight.max_share > limits.refused_max_share:
            refused.append(f"{heavy}, with {weight.ess:,.0f} effective rows and {weight.max_share:.1%} of all weight on one row.")
        else:
            caution.append(f"{heavy}.")
    if 0 < weight.ess < max(limits.ess, limits.ess_share * weight.n):
        caution.append(f"{weight.ess:,.0f} effective rows of {weight.n:,} carry this number.")
    if weight.max_share > limits.max_share and weight.ess > 0:
        caution.append(f"One row carries {weight.max_share:.1%} of all weight.")
    if model_only:
        caution.append("Model only: nothing in this number corrects a wrong reward model.")
    if given_up > limits.given_up:
        caution.append(f"It gives up {given_up:.0%} of all weight: what that stood for is lost, or left to the reward model.")
    level: Level = "refused" if refused else "caution" if caution else "trust"
    return level, (*refused, *caution)


def _log_reasons(log: LogChecks, limits: Thresholds) -> tuple[list[str], list[str]]:
    refused, caution = [], []
    if log.vector_gap > limits.agreement:
        refused.append(
            f"A/A fails: the logged vectors and the logged propensities differ by up to {log.vector_gap:.2g} of the propensity, "
            "so evaluating the logging policy does not return the plain mean."
        )
    if log.calibration_p < math.erfc(limits.z / math.sqrt(2)):
        refused.append(f"Actions were not drawn from the logged vectors (chi-square p = {log.calibration_p:.1g}).")
    if log.inverse_z > limits.z:
        refused.append(
            f"1/propensity averages {log.inverse_mean:.4g} where the number of eligible actions, {log.eligible_mean:.4g}, "
            f"is expected{_z(log.inverse_z)}: logged propensities are too small."
        )
    if log.inverse_z < -limits.z:
        caution.append(
            f"1/propensity averages {log.inverse_mean:.4g} where the number of eligible actions, {log.eligible_mean:.4g}, "
            f"is expected{_z(log.inverse_z)}: some actions are (almost) never sampled, or propensities are too large."
        )
    if log.clusters is not None and log.clusters < limits.clusters:
        many = f"{log.clusters} cluster{'s' if log.clusters != 1 else ''}"
        if log.clusters < limits.refused_clusters:
            refused.append(f"{many}: no interval holds with fewer than {limits.refused_clusters}.")
        else:
            caution.append(f"{many}: with fewer than {limits.clusters} intervals are rough.")
    if log.estimated:
        caution.append("Propensities were estimated, not logged.")
    return refused, caution


def _z(z: float) -> str:
    return f" (z = {z:.1f})" if math.isfinite(z) else ""
