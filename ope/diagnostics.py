"""What a log says about the weights that an estimate stands on, and one verdict with reasons.

Thresholds are those of the field's practice, gathered in `Thresholds`; each reason quotes what was found and what is expected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc

from ope.data import FloatArray, IntArray, LoggedData
from ope.estimate import Level
from ope.primitives import weights


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
    """p-value of the chi-square test of action counts against the logged vectors."""
    vector_gap: float
    """A/A: largest |w - 1| when the logged vectors are evaluated as the target."""
    estimated: bool
    clusters: int | None = None
    """Number of clusters, where rows have any."""


def hill_tail_index(weight: FloatArray, share: float = 0.05) -> float:
    """Hill's tail index of the largest `share` of the positive weights (n,): the smaller, the heavier. Hill 1975.

    Infinity where these weights are equal, or where fewer than ten of them leave nothing to estimate from.
    """
    positive = weight[weight > 0]
    tail = int(len(positive) * share)
    if tail < 10:
        return math.inf
    top = np.partition(positive, len(positive) - tail - 1)[len(positive) - tail - 1 :]
    excess = float(np.log(top[1:] / top[0]).sum())
    return tail / excess if excess > 1e-9 * tail else math.inf


def weight_diagnostics(weight: FloatArray, reward: FloatArray, mean: float, stderr: float) -> Diagnostics:
    """Diagnostics of weights (n,), already times sample weights, given their (weighted) mean and its standard error."""
    total, counts = float(weight.sum()), weight > 0
    constant = float(weight.max() - weight.min()) <= 1e-12 * max(abs(mean), 1.0)
    return Diagnostics(
        n=len(weight),
        ess=float(weights.effective_sample_size(weight)),
        weight_mean=mean,
        weight_z=0.0 if constant else (mean - 1) / stderr if stderr > 0 else math.nan,
        constant=constant,
        max_share=float(weight.max()) / total if total > 0 else 1.0,
        reward_low=float(reward.min(where=counts, initial=np.inf)) if total > 0 else math.nan,
        reward_high=float(reward.max(where=counts, initial=-np.inf)) if total > 0 else math.nan,
        tail_index=hill_tail_index(weight),
    )


def check_log(data: LoggedData, k: int | None) -> LogChecks:
    """Checks of a log with `k` actions, or with an unknown number of them."""
    if data.eligible is not None:
        sizes: FloatArray | float = data.eligible.sum(axis=1, dtype=np.float64)
    else:
        sizes = math.nan if k is None else float(k)
    excess = 1 / data.propensity - sizes
    stderr = float(excess.std(ddof=1) / math.sqrt(data.n)) if data.n > 1 else math.nan
    inverse_mean, eligible_mean = float(np.mean(1 / data.propensity)), float(np.mean(sizes))
    inverse_z = (inverse_mean - eligible_mean) / stderr if stderr > 1e-12 * inverse_mean else 0.0
    if stderr <= 1e-12 * inverse_mean and abs(inverse_mean - eligible_mean) > 1e-6 * inverse_mean:
        inverse_z = math.copysign(math.inf, inverse_mean - eligible_mean)  # without sampling error any difference decides
    calibration_p = vector_gap = math.nan
    if data.propensities is not None:
        calibration_p = calibration(data.action, data.propensities)
        vector_gap = float(np.abs(data.propensities[np.arange(data.n), data.action] / data.propensity - 1).max())
    return LogChecks(
        n=data.n,
        inverse_mean=inverse_mean,
        eligible_mean=eligible_mean,
        inverse_z=inverse_z,
        calibration_p=calibration_p,
        vector_gap=vector_gap,
        estimated=data.propensity_estimated,
        clusters=None if data.cluster is None else len(np.unique(data.cluster)),
    )


def calibration(action: IntArray, propensities: FloatArray) -> float:
    """p-value that actions (n,) were drawn from the logged vectors (n, k): chi-square over actions.

    Counts minus their expectation have covariance Σ_i diag(p_i) - p_i p_iᵀ, whose rank is the degrees of freedom.
    """
    k = propensities.shape[1]
    difference = np.bincount(action, minlength=k) - propensities.sum(axis=0)
    covariance = np.diag(propensities.sum(axis=0)) - propensities.T @ propensities
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
