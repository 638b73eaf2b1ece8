"""Intervals hold the truth as often as they say, over a thousand logs; and three ways of getting it wrong show."""

from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
import pytest

from ope import Bootstrap, ClusterSums, EmpiricalBernstein, LoggedData, Moments, evaluate
from ope.accumulate import Candidate, accumulate
from ope.estimators import IPS, SNIPS
from ope.intervals import normal_quantile, t_quantile
from ope.moments import counted, per_row_gradient
from ope.primitives import terms
from tests.once import once

from .worlds import FiniteWorld, covered

WORLD = FiniteWorld.random(40, 5, 1)
LOGS = 1000
CONSISTENT = ("IPS", "SNIPS", "beta-IPS", "DR", "SNDR")
BIASED = ("DM", "cIPS(2)", "Switch-DR(2)", "DRos(2)")
NAMES = (*CONSISTENT, *BIASED, "Delta")


def exact(name: str) -> float:
    """What the estimator of this name tends to, as a sum over contexts and actions."""
    w = WORLD.weight
    expectations = {
        "DM": lambda: WORLD.expectation_of_dr(0 * w),
        "cIPS(2)": lambda: WORLD.expectation_of_ips(np.minimum(w, 2)),
        "Switch-DR(2)": lambda: WORLD.expectation_of_dr(w * (w <= 2)),
        "DRos(2)": lambda: WORLD.expectation_of_dr(2 * w / (w * w + 2)),
        "Delta": lambda: WORLD.value(WORLD.target) - WORLD.value(WORLD.baseline),
    }
    return expectations[name]() if name in expectations else WORLD.value(WORLD.target)


@pytest.fixture(scope="module")
def intervals(tmp_path_factory):
    return once(tmp_path_factory, "coverage", all_intervals)


def all_intervals():
    """name -> (low, value, high), each (1000,), through the public call on logs of 5,000 rows."""
    rng, found = np.random.default_rng(2), np.empty((LOGS, len(NAMES), 3))
    for log in found:
        data, context = WORLD.log(5000, rng)
        report = evaluate(data, WORLD.target[context], WORLD.model[context], baseline=WORLD.baseline[context], estimators=NAMES)
        log[:] = [(one.low, one.value, one.high) for one in report.values()]
    return {name: found[:, i].T for i, name in enumerate(NAMES)}


def test_weights_of_the_world_reach_but_never_exceed_ten():
    assert 5 < WORLD.weight.max() <= 10
    assert WORLD.logging.sum(axis=1) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_normal_interval_covers_what_its_estimator_estimates(intervals, name):
    low, _, high = intervals[name]
    assert 0.93 <= covered(low, high, exact(name)) <= 0.97


@pytest.mark.parametrize("name", BIASED)
def test_biased_estimators_do_not_cover_the_value_of_the_policy(intervals, name):
    low, _, high = intervals[name]
    assert covered(low, high, exact("IPS")) < 0.5, "their intervals are for their own expectation, as their notes say"


@pytest.mark.parametrize("name", NAMES)
def test_misses_are_even_and_stderr_is_the_spread_of_the_values(intervals, name):
    low, value, high = intervals[name]
    above, below = np.mean(low > exact(name)), np.mean(high < exact(name))
    assert max(above, below) < 0.045, "each tail is 2.5 %, and 4.5 % is four standard errors of it"
    stderr = (high - low) / (2 * normal_quantile(0.95))
    assert stderr.mean() == pytest.approx(value.std(ddof=1), rel=4 / np.sqrt(2 * LOGS)), "four standard errors of a spread"


def test_exact_variances_of_ips_and_dr_are_the_reported_ones(intervals):
    for name, model in (("IPS", 0 * WORLD.q), ("DR", WORLD.model)):
        w, p, q = WORLD.weight, WORLD.logging, WORLD.q
        noise = (p * w**2 * q * (1 - q)).sum(axis=1).mean()
        gap = w * (q - model)
        within = ((p * gap**2).sum(axis=1) - (p * gap).sum(axis=1) ** 2).mean()
        between = (WORLD.target * q).sum(axis=1).var()
        low, _, high = intervals[name]
        reported = ((high - low) / (2 * normal_quantile(0.95))) ** 2 * 5000
        assert reported.mean() == pytest.approx(noise + within + between, rel=0.01), name


def test_sums_of_two_halves_cover_as_the_whole_log_does():
    rng, found = np.random.default_rng(3), []
    for _ in range(LOGS):
        data, context = WORLD.log(5000, rng)
        rows = [slice(0, 1700), slice(1700, 5000)]
        halves = [
            accumulate(data.take(part), [Candidate("target", WORLD.target[context[part]], (IPS(), SNIPS()))]).stack for part in rows
        ]
        whole = halves[1] + halves[0]
        half = normal_quantile(0.95) * whole.stderrs()
        found.append((whole.values() - half, whole.values() + half))
    low, high = np.moveaxis(np.array(found), 1, 0)
    for column in (0, 1):
        assert 0.93 <= covered(low[:, column], high[:, column], exact("IPS")) <= 0.97


def test_empirical_bernstein_covers_small_logs():
    rng, found = np.random.default_rng(4), []
    kind = EmpiricalBernstein(weight_bound=10.0, reward_range=(0.0, 1.0))
    for _ in range(LOGS):
        data, context = WORLD.log(500, rng)
        report = evaluate(data, WORLD.target[context], estimators=["IPS", "cIPS(2)"], interval=kind)
        found.append([(one.low, one.high) for one in report.values()])
    ends = np.array(found)
    for column, name in enumerate(("IPS", "cIPS(2)")):
        low, high = ends[:, column].T
        assert covered(low, high, exact(name)) >= 0.95
        assert (high - low).mean() / 2 < 0.7, "an interval wider than every reward would cover by saying nothing"


# Users who return

USERS, DAYS, P_RETURN = 300, 5, 0.7
SUMMED = (IPS(), SNIPS())


def returning_users(rng: np.random.Generator) -> tuple[LoggedData, np.ndarray, np.ndarray]:
    """Rows of users with strong effects of their own: (log, target, day). A user returns on most days, with 1 to 5 rows."""
    visits = (rng.random((USERS, DAYS)) < P_RETURN) * rng.integers(1, 6, (USERS, DAYS))
    user, day = (np.repeat(index.ravel(), visits.ravel()) for index in np.indices((USERS, DAYS)))
    effect, n = 2.5 * rng.normal(size=USERS), len(user)
    action = (rng.random(n) < 0.5).astype(int)
    reward = 10 + action + effect[user] + 0.5 * rng.normal(size=n)
    target = np.tile([0.45, 0.55], (n, 1))
    return LoggedData(action=action, reward=reward, propensity=np.full(n, 0.5), cluster=user), target, day


USER_TRUTH = 10.55  # 10 + P(action 1) + the users' mean effect, 0


def columns_of(data: LoggedData, target: np.ndarray) -> np.ndarray:
    weight = target[np.arange(data.n), data.action] / data.propensity
    return counted(np.concatenate((terms.ips(weight, data.reward), terms.snips(weight, data.reward)), axis=1))


def ends_of(moments: Moments) -> list[tuple[float, float]]:
    """Intervals of IPS and SNIPS from moments of sums of (wr, wr, w, count)."""
    mean, ends = moments.mean, []
    for one, part in zip(SUMMED, (slice(0, 1), slice(1, 3)), strict=True):
        rows, gradient = mean[part] / mean[-1], np.zeros(3)
        gradient[part] = one.gradient(rows)
        half = t_quantile(0.95, moments.n) * moments.stderr(per_row_gradient(gradient, mean))
        ends.append((float(one.value(rows)) - half, float(one.value(rows)) + half))
    return ends


def without_count(total: np.ndarray) -> list[tuple[float, float]]:
    """The same for IPS, with the number of rows of a user taken for a constant."""
    moments, rows = Moments.of(total[:, :1]), total[:, -1].mean()
    value, half = moments.mean[0] / rows, t_quantile(0.95, moments.n) * moments.stderr(np.ones(1)) / rows
    return [(value - half, value + half)]


@pytest.fixture(scope="module")
def user_intervals(tmp_path_factory):
    return once(tmp_path_factory, "coverage-of-users", all_user_intervals)


def all_user_intervals():
    """How summed -> ends (1000, estimators, 2)."""
    rng = np.random.default_rng(5)
    found: dict[str, list] = {"per day": [], "by key": [], "evaluate": [], "no clusters": [], "no count": []}
    for _ in range(LOGS):
        data, target, day = returning_users(rng)
        columns = columns_of(data, target)
        days = [ClusterSums.of(columns[day == one], data.cluster[day == one]) for one in range(DAYS)]
        by_key = reduce(add, days)
        found["per day"].append(ends_of(reduce(add, [sums.moments() for sums in days])))
        found["by key"].append(ends_of(by_key.moments()))
        found["evaluate"].append([(one.low, one.high) for one in evaluate(data, target, estimators=SUMMED).values()])
        found["no clusters"].append(ends_of(Moments.of(columns)))
        found["no count"].append(without_count(by_key.total))
    return {how: np.array(ends) for how, ends in found.items()}


def user_coverage(user_intervals, how: str, column: int) -> float:
    return covered(*user_intervals[how][:, column].T, USER_TRUTH)


@pytest.mark.parametrize("column", [0, 1], ids=["IPS", "SNIPS"])
def test_clusters_added_by_key_cover(user_intervals, column):
    assert 0.93 <= user_coverage(user_intervals, "by key", column) <= 0.97


def test_clusters_of_evaluate_are_those_added_by_key(user_intervals):
    assert user_intervals["evaluate"] == pytest.approx(user_intervals["by key"], rel=1e-10)


@pytest.mark.parametrize("column", [0, 1], ids=["IPS", "SNIPS"])
def test_moments_of_each_day_cover_far_too_little(user_intervals, column):
    assert user_coverage(user_intervals, "per day", column) < 0.8, "a returning user was counted as a new one every day"
    assert user_coverage(user_intervals, "no clusters", column) < user_coverage(user_intervals, "per day", column)


def test_without_the_count_column_intervals_are_far_too_wide(user_intervals):
    assert user_coverage(user_intervals, "no count", 0) >= 0.99
    right, wrong = (np.diff(user_intervals[how][:, 0]).mean() for how in ("by key", "no count"))
    assert wrong > 1.5 * right, "the size of a user's history was taken for noise in the rewards"


# Blocks of rows against rows

ROWS, RESAMPLES, SEEDS = 20_000, 4000, range(10)


def plain_snips_ends(w: np.ndarray, wr: np.ndarray, seed: int) -> np.ndarray:
    """Percentile ends of SNIPS over single rows drawn with replacement."""
    n, rng, found = len(w), np.random.default_rng(seed), np.empty(RESAMPLES)
    columns = np.stack((wr, w), axis=1)
    for i in range(RESAMPLES):
        total = np.bincount(rng.integers(0, n, n, dtype=np.int32), minlength=n) @ columns
        found[i] = total[0] / total[1]
    return np.quantile(found, (0.025, 0.975))


def test_bootstrap_of_blocks_has_the_ends_of_a_bootstrap_of_rows():
    data, context = WORLD.log(ROWS, np.random.default_rng(6))
    target = WORLD.target[context]
    w = target[np.arange(ROWS), data.action] / data.propensity
    rows = np.mean([plain_snips_ends(w, w * data.reward, 1000 + seed) for seed in SEEDS], axis=0)
    reports = [evaluate(data, target, estimators=["SNIPS"], interval=Bootstrap(RESAMPLES, seed))["SNIPS"] for seed in SEEDS]
    blocks = np.mean([(one.low, one.high) for one in reports], axis=0)
    half = (rows[1] - rows[0]) / 2
    assert np.abs(blocks - rows).max() < 0.03 * half, f"blocks {blocks}, rows {rows}"
