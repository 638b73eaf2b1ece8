"""Checks of a log know that rows of one user are not independent, and that rows may stand for others that were not kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ope import LoggedData
from ope.accumulate import check_log
from ope.simulate import sample_actions

USERS, VISITS, K = 400, 10, 3
P = np.array([0.5, 0.3, 0.2])


def sticky(seed: int) -> LoggedData:
    """Users who keep the action that was drawn for them once, as tools that split traffic by user do."""
    rng = np.random.default_rng(seed)
    drawn = sample_actions(np.tile(P, (USERS, 1)), rng)
    action, user = np.repeat(drawn, VISITS), np.repeat(np.arange(USERS), VISITS)
    reward = (rng.random(len(action)) < 0.3).astype(float)
    return LoggedData(action, reward, P[action], propensities=np.tile(P, (len(action), 1)), cluster=user)


def thinned(seed: int) -> LoggedData:
    """Rows kept more often where there was a reward, and where the action was rare: each stands for 1 / its chance."""
    rng = np.random.default_rng(seed)
    vectors = rng.dirichlet(5 * P, 20_000)
    action = sample_actions(vectors, rng)
    reward = (rng.random(len(action)) < 0.1 * (1 + action)).astype(float)
    chance = np.where(reward > 0, 1.0, 0.1) * np.array([0.5, 0.8, 1.0])[action]
    kept = rng.random(len(action)) < chance
    rows = np.arange(len(action))
    return LoggedData(
        action[kept], reward[kept], vectors[rows, action][kept], propensities=vectors[kept], sample_weight=1 / chance[kept]
    )


@pytest.mark.parametrize("log", [sticky, thinned])
def test_a_sound_log_is_seldom_doubted(log):
    """|z| > 2.58 and p < 0.01 happen to 1 % of sound logs: to more than 5 of 100 with a chance below 0.001 (binomial)."""
    checks = [check_log(log(seed), K) for seed in range(100)]
    assert sum(abs(one.inverse_z) > 2.58 for one in checks) <= 5
    assert sum(one.calibration_p < 0.01 for one in checks) <= 5
    spread = np.std([one.inverse_z for one in checks])
    assert 0.75 < spread < 1.25  # a z is a z: its spread is known to 7 % from 100 of them


@pytest.mark.parametrize("log", [sticky, thinned])
def test_without_clusters_or_weights_the_same_log_would_be_refused(log):
    """Two thirds of the logs of users' kept actions, and all thinned ones: the checks must be told."""
    told = [replace(log(seed), cluster=None, sample_weight=None) for seed in range(20)]
    checks = [check_log(data, K) for data in told]
    assert sum(one.calibration_p < 0.001 or abs(one.inverse_z) > 4 for one in checks) >= 10


@pytest.mark.parametrize("log", [sticky, thinned])
def test_wrong_propensities_are_noticed_all_the_same(log):
    """Logged as if the first action were drawn in .7 of the cases where it was .5, in vector and propensity alike."""
    data = log(0)
    wrong = data.propensities * np.array([1.4, 0.6, 0.6])
    wrong /= wrong.sum(axis=1, keepdims=True)
    told = replace(data, propensities=wrong, propensity=wrong[np.arange(data.n), data.action])
    found = check_log(told, K)
    assert found.calibration_p < 1e-6
    assert found.inverse_z > 3  # 1/p has a heavy tail where weights thin the rows: less power than the test of all actions


def independent(seed: int) -> LoggedData:
    rng = np.random.default_rng(seed)
    vectors = rng.dirichlet(5 * P, 5000)
    action = sample_actions(vectors, rng)
    return LoggedData(action, rng.normal(size=5000), vectors[np.arange(5000), action], propensities=vectors)


def test_clusters_of_one_row_change_nothing():
    data = independent(1)
    one, other = check_log(data, K), check_log(replace(data, cluster=np.random.default_rng(0).permutation(data.n)), K)
    assert other.inverse_z == pytest.approx(one.inverse_z, rel=1e-9)
    assert other.calibration_p == pytest.approx(one.calibration_p, rel=1e-9)


def test_equal_weights_change_hardly_anything():
    """The spread then comes from residuals and not from the vectors: the same to the sampling error of a variance, 2 %."""
    data = independent(2)
    one, other = check_log(data, K), check_log(replace(data, sample_weight=np.full(data.n, 2.0)), K)
    assert other.inverse_z == pytest.approx(one.inverse_z, rel=1e-9)
    assert other.inverse_mean == pytest.approx(one.inverse_mean, rel=1e-12)
    assert other.calibration_p == pytest.approx(one.calibration_p, rel=0.1)
