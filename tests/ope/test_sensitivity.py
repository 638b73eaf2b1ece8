"""Bounds under wrong propensities: exact against linear programming, and they hold the truth when the error is as they assume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from ope import DataError, InputError, LoggedData, evaluate
from ope.sensitivity import value_bounds
from ope.simulate import World, softmax

seeds = st.integers(0, 2**32 - 1)


def case(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Target probabilities, propensities, rewards with ties, sample weights."""
    rng = np.random.default_rng(seed)
    target = rng.random(n) * (rng.random(n) < 0.8)
    target[0] = 0.5
    return target, rng.uniform(0.02, 1.0, n), np.round(rng.normal(size=n), 1), rng.uniform(0.5, 3.0, n)


def by_linear_programming(target, propensity, reward, gamma, sample_weight) -> tuple[float, float]:
    """Charnes & Cooper 1962: with t = 1 / Σ W the ratio is linear in v = t W, with t·least <= v <= t·most and Σ v = 1."""
    mass, odds, n = target * sample_weight, 1 / propensity - 1, len(reward)
    least, most = mass * (1 + odds / gamma), mass * (1 + odds * gamma)
    above = np.concatenate((np.eye(n), -most[:, None]), axis=1)
    below = np.concatenate((-np.eye(n), least[:, None]), axis=1)
    ends = []
    for sign in (1, -1):
        found = linprog(
            np.append(sign * reward, 0.0),
            A_ub=np.concatenate((above, below)),
            b_ub=np.zeros(2 * n),
            A_eq=np.append(np.ones(n), 0.0)[None],
            b_eq=[1.0],
            method="highs",
        )
        assert found.success
        ends.append(sign * found.fun)
    return ends[0], ends[1]


@given(seeds, st.integers(1, 300))
def test_right_propensities_give_snips(seed, n):
    target, propensity, reward, weight = case(seed, n)
    w = target * weight / propensity
    expected = (w * reward).sum() / w.sum()
    assert value_bounds(target, propensity, reward, 1.0, weight) == pytest.approx((expected, expected), rel=1e-12, abs=1e-12)


def test_right_propensities_give_the_snips_that_evaluate_reports():
    rng = np.random.default_rng(5)
    world = World.random(3, 4, 1)
    context = world.contexts(500, rng)
    data, target = world.log(context, softmax(context @ world.coefficient), rng), np.full((500, 4), 0.25)
    snips = evaluate(data, target)["SNIPS"].value
    assert value_bounds(target[:, 0], data.propensity, data.reward, 1) == pytest.approx((snips, snips), rel=1e-12)


@given(seeds, st.integers(1, 12), st.floats(1.0, 20.0))
def test_bounds_are_the_optima_of_the_linear_program(seed, n, gamma):
    target, propensity, reward, weight = case(seed, n)
    expected = by_linear_programming(target, propensity, reward, gamma, weight)
    assert value_bounds(target, propensity, reward, gamma, weight) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(seeds, st.integers(2, 100), st.floats(1.0, 10.0), st.floats(1.0, 10.0))
def test_a_larger_factor_never_narrows_the_bounds(seed, n, one, other):
    target, propensity, reward, weight = case(seed, n)
    inner, outer = (value_bounds(target, propensity, reward, gamma, weight) for gamma in sorted((one, other)))
    assert outer[0] <= inner[0] + 1e-12
    assert inner[1] <= outer[1] + 1e-12
    counts = target > 0
    assert reward[counts].min() <= outer[0] <= outer[1] <= reward[counts].max()


@given(seeds, st.integers(1, 100), st.floats(1.0, 10.0))
def test_snips_with_any_propensities_within_the_factor_lies_inside(seed, n, gamma):
    target, propensity, reward, weight = case(seed, n)
    factor = gamma ** np.random.default_rng(seed).uniform(-1, 1, n)
    w = target * weight * (1 + (1 / propensity - 1) * factor)
    low, high = value_bounds(target, propensity, reward, gamma, weight)
    assert low - 1e-12 <= (w * reward).sum() / w.sum() <= high + 1e-12


@pytest.mark.parametrize("direction", ["random", "worst"])
def test_bounds_hold_the_truth_where_odds_are_wrong_by_the_factor(direction):
    """At the worst error the truth is an end of the bounds, which half of all samples would miss: hence a larger factor."""
    world, gamma, held = World.random(3, 4, 2), 2.0, 0
    truth = world.value(lambda context: softmax(-context @ world.coefficient), n=1_000_000)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        context = world.contexts(20_000, rng)
        data = world.log(context, 0.2 / 4 + 0.8 * softmax(context @ world.coefficient), rng)
        target = softmax(-context @ world.coefficient)[np.arange(data.n), data.action]
        signs = rng.choice([-1, 1], data.n) if direction == "random" else np.where(data.reward == 1, 1, -1)
        wrong = 1 / (1 + (1 / data.propensity - 1) * gamma**signs)
        low, high = value_bounds(target, wrong, data.reward, 1.1 * gamma)
        held += low <= truth <= high
        assert direction == "random" or value_bounds(target, wrong, data.reward, 1.0)[0] != pytest.approx(truth, abs=0.02)
    assert held >= 38


@given(seeds, st.floats(1.0, 1e6), st.sampled_from([0.0, -3.0, 0.1, 1e9 + 0.1]))
def test_equal_rewards_are_the_only_value(seed, gamma, reward):
    target, propensity, _, weight = case(seed, 20)
    assert value_bounds(target, propensity, np.full(20, reward), gamma, weight) == (reward, reward)


def test_rows_that_the_target_never_takes_do_not_count():
    assert value_bounds([0.0, 0.5, 0.5], [0.5, 0.5, 0.5], [100.0, 1.0, 2.0], 1e9) == pytest.approx((1.0, 2.0), abs=1e-6)


def test_certain_actions_leave_no_doubt():
    low, high = value_bounds([1.0, 1.0], [1.0, 1.0], [0.0, 1.0], 50.0)
    assert (low, high) == (0.5, 0.5)


def test_large_rewards_keep_their_digits():
    target, propensity, reward, weight = case(3, 200)
    low, high = value_bounds(target, propensity, reward, 2.0, weight)
    assert value_bounds(target, propensity, reward + 2.0**30, 2.0, weight) == pytest.approx((low + 2**30, high + 2**30), abs=1e-6)


@given(seeds, st.floats(1.0, 10.0))
def test_sample_weights_are_repeated_rows(seed, gamma):
    target, propensity, reward, _ = case(seed, 30)
    times = np.random.default_rng(seed).integers(1, 4, 30)
    repeated = value_bounds(*(np.repeat(values, times) for values in (target, propensity, reward)), gamma)
    assert value_bounds(target, propensity, reward, gamma, times) == pytest.approx(repeated, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("gamma", [0.5, 0.0, -1.0, np.nan, np.inf])
def test_a_factor_below_one_is_none(gamma):
    with pytest.raises(InputError, match=r"found gamma=.*; expected a finite factor of at least 1"):
        value_bounds([0.5], [0.5], [1.0], gamma)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": [1.0, np.nan]}, r"'reward', row 1: found nan"),
        ({"reward": []}, r"'reward': found an empty log"),
        ({"propensity": [0.5, np.nan]}, r"'propensity', row 1: found nan; expected a probability in \(0, 1\]"),
        ({"propensity": [0.0, 0.5]}, r"'propensity', row 0: found 0.0; expected a probability in \(0, 1\]"),
        ({"propensity": [0.5]}, r"'propensity': found shape \(1,\); expected shape \(2,\)"),
        ({"weight_target": [0.5, 1.5]}, r"'weight_target', row 1: found 1.5; expected a probability in \[0, 1\]"),
        ({"weight_target": [[0.5], [0.5]]}, r"'weight_target': found shape \(2, 1\); expected shape \(2,\)"),
        ({"sample_weight": [1.0, 0.0]}, r"'sample_weight', row 1: found 0.0; expected a positive weight"),
        ({"sample_weight": [1.0]}, r"'sample_weight': found shape \(1,\)"),
    ],
)
def test_arrays_that_no_log_has(change, message):
    arrays = {"weight_target": [0.5, 0.5], "propensity": [0.5, 0.5], "reward": [0.0, 1.0], "sample_weight": [1.0, 1.0]} | change
    with pytest.raises(DataError, match=message):
        value_bounds(gamma=2.0, **arrays)


def test_no_overlap_bounds_nothing():
    with pytest.raises(InputError, match="never takes an action that was logged"):
        value_bounds([0.0, 0.0], [0.5, 0.5], [0.0, 1.0], 2.0)


def test_bounds_of_a_log():
    data = LoggedData(action=[0, 1], reward=[0.0, 1.0], propensity=[0.5, 0.5])
    assert value_bounds([0.5, 0.5], data.propensity, data.reward, 3.0) == pytest.approx((0.25, 0.75))  # 4/3 against 4
