"""Cross-fitted models never see the row, nor the cluster, that they predict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

from ope import LoggedData
from ope.data import assign_folds
from ope.nuisance import cross_fit_propensity, cross_fit_reward

from .logs import random_case

DESIGNS = ["additive", "per_action"]


def log(n: int = 300, k: int = 3, seed: int = 1, **columns) -> LoggedData:
    return random_case(n, k, seed, context=np.random.default_rng(seed).normal(size=(n, 2)), **columns).data


def with_change(data: LoggedData, rows) -> LoggedData:
    reward = data.reward.copy()
    reward[rows] += 50.0
    return replace(data, reward=reward)


@pytest.mark.parametrize("design", DESIGNS)
def test_reward_of_a_row_does_not_reach_its_own_prediction(design):
    data = log()
    fold = assign_folds(data, 3, 0)
    before = cross_fit_reward(data, 3, Ridge(), design=design)
    after = cross_fit_reward(with_change(data, [17]), 3, Ridge(), design=design)
    unmoved = np.all(before == after, axis=1)
    assert unmoved[fold == fold[17]].all()
    assert not unmoved[fold != fold[17]].any(), "the other folds do learn from it"


@pytest.mark.parametrize("design", DESIGNS)
def test_rewards_of_a_cluster_do_not_reach_its_own_predictions(design):
    data = log(cluster=np.random.default_rng(2).integers(0, 40, 300))
    rows = np.flatnonzero(data.cluster == 5)
    before, after = (cross_fit_reward(each, 3, Ridge(), design=design) for each in (data, with_change(data, rows[:1])))
    assert np.array_equal(before[rows], after[rows])
    assert not np.array_equal(before, after)


def test_additive_predictions_are_the_least_squares_of_the_other_folds():
    data = log()
    fold, q = assign_folds(data, 3, 0), cross_fit_reward(data, 3, LinearRegression(), design="additive")
    for held_out in range(3):
        train, test = fold != held_out, fold == held_out
        design = np.concatenate((data.context, np.eye(3)[data.action]), axis=1)[train]
        beta = np.linalg.lstsq(design, data.reward[train], rcond=None)[0]
        expected = (data.context[test] @ beta[:2])[:, None] + beta[2:]
        assert q[test] == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_per_action_predictions_are_the_least_squares_of_each_action():
    data = log()
    fold, q = assign_folds(data, 3, 0), cross_fit_reward(data, 3, LinearRegression(), design="per_action")
    for held_out in range(3):
        for action in range(3):
            train, test = (fold != held_out) & (data.action == action), fold == held_out
            design = np.column_stack((data.context, np.ones(300)))
            beta = np.linalg.lstsq(design[train], data.reward[train], rcond=None)[0]
            assert q[test, action] == pytest.approx(design[test] @ beta, rel=1e-8, abs=1e-10)


def test_action_never_taken_gets_the_mean_of_the_other_folds():
    data = log()
    fold, q = assign_folds(data, 3, 0), cross_fit_reward(data, 4, Ridge(), design="per_action")
    for held_out in range(3):
        assert q[fold == held_out, 3] == pytest.approx(data.reward[fold != held_out].mean(), rel=1e-12)


@pytest.mark.parametrize("design", DESIGNS)
def test_sample_weights_are_copies_for_the_model(design):
    """With every row of a fold copied as often as its weight says, least squares is the same."""
    times = np.random.default_rng(3).integers(1, 4, 300)
    data = log(cluster=np.arange(300))
    copies = data.take(np.repeat(np.arange(300), times))
    weighted = cross_fit_reward(replace(data, sample_weight=times.astype(float)), 3, LinearRegression(), design=design)
    repeated = cross_fit_reward(copies, 3, LinearRegression(), design=design)
    assert repeated == pytest.approx(np.repeat(weighted, times, axis=0), rel=1e-8, abs=1e-10)


def test_estimated_propensities_are_probabilities_that_never_saw_their_row():
    data = log()
    p = cross_fit_propensity(data, 4, LogisticRegression())
    assert p.sum(axis=1) == pytest.approx(1, abs=1e-12)
    assert np.all(p[:, 3] == 0), "an action that no fold saw"
    fold = assign_folds(data, 3, 0)
    other = data.action.copy()
    other[17] = (other[17] + 1) % 3
    after = cross_fit_propensity(replace(data, action=other, propensities=None), 4, LogisticRegression())
    assert np.array_equal(p[fold == fold[17]], after[fold == fold[17]])
    assert not np.array_equal(p, after)
