"""Intervals: equivariance, formulas by hand, and a bootstrap that resamples whole estimators."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from ope import Bootstrap, DataError, EmpiricalBernstein, LoggedData, evaluate
from ope.moments import ClusterSums, counted

from .logs import Case, random_case

SHIFTED = ["DM", "SNIPS", "beta-IPS", "DR", "SNDR", "Switch-DR(2)", "DRos(2)"]
SCALED = ["IPS", "cIPS(2)", "Delta"]


def reports(case: Case, names, **options):
    return evaluate(case.data, case.target, case.q, baseline=case.baseline, estimators=names, **options)


def affine(case: Case, a: float, c: float) -> Case:
    return replace(case, data=replace(case.data, reward=a * case.data.reward + c), q=a * case.q + c)


def half_width(estimate) -> float:
    return (estimate.high - estimate.low) / 2


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_normal_interval_is_a_quantile_of_standard_errors(level):
    for one in reports(random_case(300, 3, 1), SHIFTED + SCALED, level=level).values():
        z = norm.ppf((1 + level) / 2)
        assert (one.low, one.high) == pytest.approx((one.value - z * one.stderr, one.value + z * one.stderr), rel=1e-10)


@pytest.mark.parametrize("interval", ["normal", "bootstrap"])
@pytest.mark.parametrize("a", [0.01, 3.0, -2.0])
def test_ends_follow_the_units_of_the_reward(interval, a):
    case, c = random_case(300, 3, 2), 5.0
    before = reports(case, SHIFTED + SCALED, interval=interval)
    moved = reports(affine(case, a, c), SHIFTED, interval=interval)
    scaled = reports(affine(case, a, 0.0), SCALED, interval=interval)
    for after, shift in ((moved, c), (scaled, 0.0)):
        for name, one in after.items():
            ends = sorted((a * before[name].low + shift, a * before[name].high + shift))
            assert (one.low, one.high) == pytest.approx(ends, rel=1e-9, abs=1e-10), name


def test_interval_of_a_difference_does_not_see_a_constant():
    case = random_case(300, 3, 3)
    before, after = (reports(each, ["Delta"])["Delta"] for each in (case, affine(case, 1.0, 100.0)))
    assert (after.low, after.high) == pytest.approx((before.low, before.high), abs=1e-9)


# Empirical Bernstein


def bounded(n: int, seed: int) -> Case:
    case = random_case(n, 3, seed)
    reward = (case.data.reward > 0).astype(float)
    return replace(case, data=replace(case.data, reward=reward), q=np.clip(case.q, 0, 1))


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize(("name", "width"), [("IPS", 40.0), ("cIPS(2)", 2.0), ("DM", 1.0), ("DR", 81.0), ("Switch-DR(2)", 5.0)])
def test_empirical_bernstein_half_width_is_its_formula(name, width, level):
    case, n, a = bounded(250, 4), 250, 1 - level
    one = reports(case, [name], level=level, interval=EmpiricalBernstein(weight_bound=40.0, reward_range=(0.0, 1.0)))[name]
    variance = n * one.stderr**2
    expected = math.sqrt(2 * variance * math.log(4 / a) / n) + 7 * width * math.log(4 / a) / (3 * (n - 1))
    assert half_width(one) == pytest.approx(expected, rel=1e-12)
    assert (one.low + one.high) / 2 == pytest.approx(one.value, rel=1e-12)


def test_empirical_bernstein_of_ips_uses_the_sample_variance_of_weighted_rewards():
    case, n = bounded(250, 5), 250
    y = case.target[np.arange(n), case.data.action] / case.data.propensity * case.data.reward
    one = reports(case, ["IPS"], interval=EmpiricalBernstein(weight_bound=40.0, reward_range=(0.0, 1.0)))["IPS"]
    log_term = math.log(4 / 0.05)
    expected = math.sqrt(2 * y.var(ddof=1) * log_term / n) + 7 * 40 * log_term / (3 * (n - 1))
    assert half_width(one) == pytest.approx(expected, rel=1e-12)


def test_empirical_bernstein_of_shrunk_weights_uses_the_peak_of_the_shrinkage():
    case, n = bounded(250, 6), 250
    one = reports(case, ["DRos(9)"], interval=EmpiricalBernstein(weight_bound=40.0, reward_range=(0.0, 1.0)))["DRos(9)"]
    log_term, width = math.log(4 / 0.05), 1 + 2 * 1.5  # rows lie within [0 - 1.5, 1 + 1.5]
    expected = math.sqrt(2 * log_term) * one.stderr + 7 * width * log_term / (3 * (n - 1))
    assert half_width(one) == pytest.approx(expected, rel=1e-12)


def test_empirical_bernstein_rejects_what_breaks_its_promise():
    case = bounded(250, 7)
    narrow = EmpiricalBernstein(weight_bound=1.01, reward_range=(0.0, 1.0))
    with pytest.raises(DataError, match="Raise weight_bound"):
        reports(case, ["IPS"], interval=narrow)
    with pytest.raises(DataError, match="Widen reward_range"):
        reports(affine(case, 2.0, 0.0), ["IPS"], interval=EmpiricalBernstein(40.0, (0.0, 1.0)))
    with pytest.raises(ValueError, match="not the plain mean"):
        reports(case, ["SNIPS"], interval=EmpiricalBernstein(40.0, (0.0, 1.0)))


# Bootstrap


def test_bootstrap_with_one_seed_gives_one_answer():
    case = random_case(6000, 3, 8)
    ends = [
        [(one.low, one.high) for one in reports(case, SHIFTED + SCALED, interval=Bootstrap(1000, seed)).values()]
        for seed in (1, 1, 2)
    ]
    assert ends[0] == ends[1]
    assert ends[0] != ends[2]


def plain_bootstrap(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means (resamples, d) of columns (n, d) resampled row by row."""
    n, rng = len(columns), np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) @ columns / n


def average_ends(draws: list[np.ndarray]) -> np.ndarray:
    return np.mean([np.quantile(values, (0.025, 0.975)) for values in draws], axis=0)


def quantile_error(spread: float, resamples: int, seeds: int) -> float:
    """Standard error of the difference between two such averages of normal 2.5 % quantiles."""
    one = spread * math.sqrt(0.025 * 0.975 / resamples) / norm.pdf(norm.ppf(0.025))
    return math.sqrt(2 / seeds) * one


def skewed(n: int, seed: int) -> Case:
    """Few rows and heavy weights, so that a frozen denominator or a normal interval would show."""
    case = random_case(n, 3, seed)
    sharp = case.target**3
    return replace(case, target=sharp / sharp.sum(axis=1, keepdims=True), data=replace(case.data, reward=case.data.reward + 2))


def test_small_logs_are_resampled_row_by_row():
    case, resamples, seeds = skewed(250, 9), 4000, range(8)
    rows = case.rows()
    w, wr = rows.weight, rows.weight * rows.reward
    we, columns = rows.weight * (rows.reward - rows.q_logged), {}
    mine = [plain_bootstrap(np.stack((w, wr, we, rows.v), axis=1), resamples, 100 + seed) for seed in seeds]
    columns["IPS"] = [m[:, 1] for m in mine]
    columns["SNIPS"] = [m[:, 1] / m[:, 0] for m in mine]
    columns["SNDR"] = [m[:, 3] + m[:, 2] / m[:, 0] for m in mine]
    theirs = [reports(case, list(columns), interval=Bootstrap(resamples, seed)) for seed in seeds]
    for name, draws in columns.items():
        ends = np.mean([(report[name].low, report[name].high) for report in theirs], axis=0)
        limit = 4 * quantile_error(float(np.std(draws[0])), resamples, len(seeds))
        assert np.abs(ends - average_ends(draws)).max() < limit, f"{name}: {ends} against {average_ends(draws)}"


def test_frozen_denominator_would_have_been_noticed():
    case, resamples, seeds = skewed(250, 9), 4000, range(8)
    rows = case.rows()
    frozen = [
        plain_bootstrap(np.stack((rows.weight * rows.reward,), axis=1), resamples, seed)[:, 0] / rows.weight.mean()
        for seed in seeds
    ]
    whole = [reports(case, ["SNIPS"], interval=Bootstrap(resamples, seed))["SNIPS"] for seed in seeds]
    ends = np.mean([(one.low, one.high) for one in whole], axis=0)
    assert np.abs(ends - average_ends(frozen)).max() > 20 * quantile_error(float(np.std(frozen[0])), resamples, len(seeds))


def test_clusters_are_resampled_whole():
    rng = np.random.default_rng(10)
    user = rng.integers(0, 150, 900)
    case = random_case(900, 3, 10, cluster=user)
    lifted = replace(case, data=replace(case.data, reward=case.data.reward + 5 + 2 * rng.normal(size=150)[user]))
    rows = lifted.rows()
    sums = ClusterSums.of(counted(np.stack((rows.weight, rows.weight * rows.reward), axis=1)), user).total
    resamples, seeds = 4000, range(8)
    mine = [plain_bootstrap(sums, resamples, 200 + seed) for seed in seeds]
    theirs = [reports(lifted, ["IPS", "SNIPS"], interval=Bootstrap(resamples, seed)) for seed in seeds]
    for name, draws in {"IPS": [m[:, 1] / m[:, 2] for m in mine], "SNIPS": [m[:, 1] / m[:, 0] for m in mine]}.items():
        ends = np.mean([(report[name].low, report[name].high) for report in theirs], axis=0)
        assert np.abs(ends - average_ends(draws)).max() < 4 * quantile_error(float(np.std(draws[0])), resamples, len(seeds))


def test_bootstrap_of_equal_rows_has_no_width():
    data = LoggedData(action=np.zeros(50, dtype=int), reward=np.full(50, 2.0), propensity=np.full(50, 0.5))
    one = evaluate(data, np.full(50, 0.5), interval="bootstrap")["SNIPS"]
    assert (one.low, one.high) == pytest.approx((2.0, 2.0), rel=1e-14)
