"""What learners climb: gradients by central differences and by autograd of `ope.primitives`, values by `ope`, scaling undone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bandits.batch import DecisionBatch
from bandits.policy import Softmax
from bandits.softmax_linear import CHUNK, Problem, lower_bound, maximise, mean_value, problem_of, regression_direction
from ope import LoggedData, evaluate
from ope.primitives import terms, weights
from ope.simulate import sample_actions, softmax

N, K, D = CHUNK + 200, 3, 4  # more than one chunk
CLIP = 1.5  # about a fifth of the weights below exceed it
FORMS = ["named", "featured"]
MODELS = ["plain", "model"]
EXTRAS = ["", "clip", "eligible", "weighted", "clustered", "clip eligible weighted clustered"]
OBJECTIVES: dict[str, Any] = {"mean": mean_value, "lower": lower_bound(1.645)}


def make_log(form: str, extras: str = "", seed: int = 1) -> LoggedData:
    """Three actions, four features of the context or of every action, rewards around 1, a random logging policy."""
    rng = np.random.default_rng(seed)
    eligible = None
    if "eligible" in extras:
        eligible = rng.random((N, K)) < 0.7
        eligible[np.arange(N), rng.integers(0, K, N)] = True
    p = softmax(np.where(True if eligible is None else eligible, rng.normal(size=(N, K)), -np.inf))
    action = sample_actions(p, rng)
    shape = (N, D) if form == "named" else (N, K, D)
    features = 3 + 2 * rng.normal(size=shape)
    mean = features[..., 0] if form == "named" else features[np.arange(N), action, 0]
    return LoggedData(
        action=action,
        reward=1 + 0.3 * mean * (action - 1) + rng.normal(size=N),
        propensity=p[np.arange(N), action],
        eligible=eligible,
        context=features if form == "named" else None,
        action_features=features if form == "featured" else None,
        sample_weight=rng.uniform(0.5, 3, N) if "weighted" in extras else None,
        cluster=rng.integers(100, 500, N) if "clustered" in extras else None,
    )


def model_of(data: LoggedData) -> np.ndarray:
    """A reward model that is near but wrong."""
    return 1 + np.random.default_rng(9).normal(size=(data.n, K)) * 0.5


def problem_and_model(data: LoggedData, model: str, clip: float, payoff: np.ndarray | None = None) -> tuple[Problem, Any]:
    """The problem, and q where it has one."""
    reward = data.reward if payoff is None else payoff
    q = model_of(data) if model == "model" else None
    residual = reward if q is None else reward - q[np.arange(data.n), data.action]
    return problem_of(data, K, residual, q, clip)[0], q


def some_theta(problem: Problem, seed: int = 2) -> np.ndarray:
    return 0.5 * np.random.default_rng(seed).normal(size=problem.size)


def value_and_gradient(problem: Problem, objective: Any, theta: np.ndarray) -> tuple[float, np.ndarray]:
    """The objective of the terms, and a second pass with the slopes that it gives."""
    value, slope = objective(problem.terms(theta)[0], problem.weight, problem.cluster)
    return value, problem.terms(theta, slope)[1]


def by_differences(problem: Problem, objective: Any, theta: np.ndarray, step: float = 1e-5) -> np.ndarray:
    moves = step * np.eye(len(theta))
    return np.array(
        [
            (value_and_gradient(problem, objective, theta + move)[0] - value_and_gradient(problem, objective, theta - move)[0])
            / (2 * step)
            for move in moves
        ]
    )


def by_autograd(
    data: LoggedData, theta: np.ndarray, reward: np.ndarray, q: np.ndarray | None, clip: float, z: float
) -> tuple[float, np.ndarray]:
    """The same objective from the log itself, written with ope.primitives on torch tensors."""
    share = np.ones(data.n) if data.sample_weight is None else data.sample_weight
    flat = data.context if data.action_features is None else data.action_features.reshape(-1, D)
    each = np.repeat(share, len(flat) // data.n)
    if data.eligible is not None and data.action_features is not None:
        each = each * data.eligible.ravel()  # padding weighs nothing
    centre = np.average(flat, axis=0, weights=each)
    standard = (flat - centre) / np.sqrt(np.average((flat - centre) ** 2, axis=0, weights=each))
    t = torch.tensor(theta, requires_grad=True)
    if data.action_features is None:
        scores = torch.tensor(np.column_stack((standard, np.ones(data.n)))) @ t.reshape(D + 1, K)
    else:
        scores = torch.tensor(standard.reshape(data.n, K, D)) @ t
    if data.eligible is not None:
        scores = scores.masked_fill(~torch.tensor(data.eligible), -torch.inf)
    policy = torch.softmax(scores, dim=1)
    rows, action = torch.arange(data.n), torch.tensor(data.action)
    weight = weights.clip(weights.importance(policy[rows, action], torch.tensor(data.propensity)), high=clip)
    if q is None:
        column = terms.ips(weight, torch.tensor(reward))[:, 0]
    else:
        model = torch.tensor(q)
        column = terms.dr(weight, torch.tensor(reward), model[rows, action], (policy * model).sum(1))[:, 0]
    part = torch.tensor(share / share.sum())
    mean = part @ column
    unit = np.arange(data.n) if data.cluster is None else data.cluster
    each = torch.zeros(unit.max() + 1, dtype=torch.float64).index_add(0, torch.tensor(unit), part * (column - mean))
    value = mean - z * torch.sqrt(each @ each)
    return value.item(), torch.autograd.grad(value, t)[0].numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_is_that_of_central_differences_and_of_autograd(form, model, extras, objective):
    data = make_log(form, extras)
    clip = CLIP if "clip" in extras else np.inf
    problem, q = problem_and_model(data, model, clip)
    theta = some_theta(problem)
    value, gradient = value_and_gradient(problem, OBJECTIVES[objective], theta)
    size = np.abs(gradient).max()
    assert size > 0.01, "the check is not of a flat spot"
    assert by_differences(problem, OBJECTIVES[objective], theta) == pytest.approx(gradient, rel=0, abs=1e-5 * size)
    expected = by_autograd(data, theta, data.reward, q, clip, 0.0 if objective == "mean" else 1.645)
    assert value == pytest.approx(expected[0], rel=1e-9)
    assert gradient == pytest.approx(expected[1], rel=0, abs=1e-9 * size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("penalty", [0.1, 3.0])
def test_gradient_of_poem(form, penalty):
    """The mean of clipped terms less `penalty` standard errors of it."""
    data = make_log(form)
    problem, _ = problem_and_model(data, "plain", CLIP)
    theta, objective = some_theta(problem), lower_bound(penalty)
    value, gradient = value_and_gradient(problem, objective, theta)
    w = problem.policy(theta, slice(None)).T[np.arange(N), data.action] / data.propensity
    assert (w > CLIP).mean() > 0.1, "the bound binds"
    column = np.minimum(w, CLIP) * data.reward
    assert value == pytest.approx(column.mean() - penalty * column.std() / np.sqrt(N), rel=1e-12)
    expected = by_autograd(data, theta, data.reward, None, CLIP, penalty)
    assert gradient == pytest.approx(expected[1], rel=0, abs=1e-9 * np.abs(gradient).max())
    assert by_differences(problem, objective, theta) == pytest.approx(gradient, rel=0, abs=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", [-2.0, 0.7, 4.0])
def test_gradient_of_banditnet(form, shift):
    """Rewards less λ: some of them, or all of them, negative."""
    data = make_log(form)
    problem, _ = problem_and_model(data, "plain", np.inf, data.reward - shift)
    theta = some_theta(problem)
    value, gradient = value_and_gradient(problem, mean_value, theta)
    expected = by_autograd(data, theta, data.reward - shift, None, np.inf, 0.0)
    assert value == pytest.approx(expected[0], rel=1e-9)
    assert gradient == pytest.approx(expected[1], rel=0, abs=1e-9 * np.abs(gradient).max())
    assert by_differences(problem, mean_value, theta) == pytest.approx(gradient, rel=0, abs=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [0.03, 1.0])
def test_gradient_of_linear_log_smoothing(form, strength):
    """Σ π log(1 + l r/p) / l / n, a payoff in which π stands outside the logarithm."""
    data = make_log(form)
    data = replace(data, reward=np.abs(data.reward))
    payoff = data.propensity * terms.log_smoothing(1 / data.propensity, data.reward, strength)[:, 0]
    problem, _ = problem_and_model(data, "plain", np.inf, payoff)
    theta = some_theta(problem)
    value, gradient = value_and_gradient(problem, mean_value, theta)
    policy = problem.policy(theta, slice(None)).T[np.arange(N), data.action]
    smoothed = np.log1p(strength * data.reward / data.propensity) / strength
    assert value == pytest.approx((policy * smoothed).mean(), rel=1e-12)
    assert value <= (policy / data.propensity * data.reward).mean(), "never above IPS for rewards of at least 0"
    expected = by_autograd(data, theta, payoff, None, np.inf, 0.0)
    assert gradient == pytest.approx(expected[1], rel=0, abs=1e-9 * np.abs(gradient).max())
    assert by_differences(problem, mean_value, theta) == pytest.approx(gradient, rel=0, abs=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extras", ["", "eligible", "weighted", "eligible weighted"])
def test_value_is_the_estimate_of_ope(form, extras):
    """IPS, clipped IPS and DR of the policy, as `ope.evaluate` gives them on the same log."""
    data = make_log(form, extras)
    for model, clip, name in (("plain", np.inf, "IPS"), ("plain", 10.0, "cIPS(10)"), ("model", np.inf, "DR")):
        problem, q = problem_and_model(data, model, clip)
        theta = 3 * some_theta(problem)
        target = problem.policy(theta, slice(None)).T
        estimate = evaluate(data, target, q, estimators=(name,))[name].value
        assert problem.weight @ problem.terms(theta)[0] == pytest.approx(estimate, abs=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extras", ["", "clustered"])
def test_standard_error_is_the_estimate_of_ope(form, extras):
    """With clusters, too; ope divides by the units less one."""
    data = make_log(form, extras)
    problem, q = problem_and_model(data, "model", np.inf)
    theta = some_theta(problem)
    estimate = evaluate(data, problem.policy(theta, slice(None)).T, q, estimators=("DR",))["DR"]
    units = N if data.cluster is None else len(np.unique(data.cluster))
    assert problem.stderr(theta) == pytest.approx(estimate.stderr * np.sqrt((units - 1) / units), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_slopes_change_no_term(form):
    problem, _ = problem_and_model(make_log(form, "clip eligible weighted"), "model", CLIP)
    theta = some_theta(problem)
    plain, pulled = problem.terms(theta), problem.terms(theta, problem.weight)
    assert np.array_equal(plain[0], pulled[0])
    assert not plain[1].any()
    assert pulled[1].all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_weight_is_repeats_of_a_row_for_every_sum(form, model):
    """Standardisation included: it uses the same weights."""
    data, times = make_log(form), np.random.default_rng(3).integers(1, 4, N)
    index = np.repeat(np.arange(N), times)
    weighted, repeated = replace(data, sample_weight=times.astype(float)), data.take(index)
    q = model_of(data) if model == "model" else None
    one, _ = problem_of(weighted, K, data.reward, q, CLIP)
    many, _ = problem_of(repeated, K, data.reward[index], None if q is None else q[index], CLIP)
    theta = some_theta(one)
    found = []
    for problem in (one, many):
        terms, gradient = problem.terms(theta, problem.weight)
        found.append([problem.weight @ terms, problem.weight @ terms**2, *gradient])
    assert found[0] == pytest.approx(found[1], rel=1e-10, abs=1e-12)
    assert one.total == many.total == times.sum()


@pytest.mark.parametrize("form", FORMS)
def test_parts_add_up_to_the_whole(form):
    problem, _ = problem_and_model(make_log(form, "eligible weighted"), "model", CLIP)
    theta = some_theta(problem)
    terms, gradient = problem.terms(theta, problem.weight)
    parts = [problem.take(rows) for rows in (slice(0, 300), slice(300, None))]
    assert sum(part.total for part in parts) == pytest.approx(problem.total, rel=1e-12)
    found = [part.terms(theta, part.weight) for part in parts]
    assert np.concatenate([each for each, _ in found]) == pytest.approx(terms, rel=1e-10)
    mixed = sum(part.total / problem.total * each for part, (_, each) in zip(parts, found, strict=True))
    assert mixed == pytest.approx(gradient, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extras", ["", "eligible weighted"])
def test_scorer_on_raw_features_is_the_policy_on_standardised_ones(form, extras):
    """With features far from 0, tiny ones, and two that never vary."""
    data = make_log(form, extras)
    name = "context" if form == "named" else "action_features"
    wide = np.concatenate((getattr(data, name), np.full((*getattr(data, name).shape[:-1], 2), (7.0, 0.0))), axis=-1)
    wide = wide * np.array([1, 1e-4, 100, 1, 1, 1]) + np.array([0, 0, 5000, -30, 0, 0])
    data = replace(data, **{name: wide})
    problem, scorer = problem_of(data, K, data.reward)
    theta = some_theta(problem)
    standard = problem.policy(theta, slice(None)).T
    raw = Softmax(scorer(theta)).propensities(DecisionBatch.of_log(data, K))
    assert raw == pytest.approx(standard, rel=0, abs=1e-10)
    assert standard.max(axis=1).std() > 0.05, "the policy does depend on the features"


@pytest.mark.parametrize("form", FORMS)
def test_features_in_other_units_make_the_same_problem(form):
    data = make_log(form, "weighted")
    name = "context" if form == "named" else "action_features"
    other = replace(data, **{name: getattr(data, name) * np.array([1e-3, 10, 1, 4]) + np.array([0, 5, -2, 1])})
    one, two = (problem_of(each, K, data.reward)[0] for each in (data, other))
    theta = some_theta(one)
    assert two.policy(theta, slice(None)) == pytest.approx(one.policy(theta, slice(None)), rel=0, abs=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_maximum_is_no_lower_than_any_start_and_nearly_flat(form, objective):
    """60 iterations are enough for a problem of this size."""
    data, l2 = make_log(form), 1e-3
    problem, _ = problem_and_model(data, "model", np.inf)
    direction = regression_direction(problem, data.reward)

    def reached(theta: np.ndarray) -> float:
        return value_and_gradient(problem, OBJECTIVES[objective], theta)[0] - l2 / 2 * float(theta @ theta)

    theta = maximise(problem, OBJECTIVES[objective], l2, direction, iterations=60)
    assert all(reached(theta) > reached(scale * direction) for scale in (0.0, 1.0, 4.0, 16.0, 64.0))
    slope = value_and_gradient(problem, OBJECTIVES[objective], theta)[1] - l2 * theta
    start = value_and_gradient(problem, OBJECTIVES[objective], 0 * theta)[1]
    assert np.abs(slope).max() < 0.01 * np.abs(start).max(), "a hundredth of the slope at the uniform policy"


@pytest.mark.parametrize("cluster", [None, np.arange(50) // 2], ids=["rows", "pairs"])
def test_lower_bound_is_the_mean_less_standard_errors(cluster):
    column, weight = np.random.default_rng(4).normal(1, 2, 50), np.full(50, 1 / 50)
    value, slope = lower_bound(2.0)(column, weight, cluster)
    units = column if cluster is None else column.reshape(25, 2).mean(axis=1)
    assert value == pytest.approx(column.mean() - 2 * units.std() / np.sqrt(len(units)), rel=1e-12)
    step = 1e-5
    for row, found in enumerate(slope):
        move = step * np.eye(50)[row]
        high, low = (lower_bound(2.0)(column + sign * move, weight, cluster)[0] for sign in (1, -1))
        assert (high - low) / (2 * step) == pytest.approx(found, rel=1e-6, abs=1e-9)


def test_repeats_in_one_cluster_do_not_raise_the_lower_bound():
    """A hundred rows said thrice by one user each are a hundred rows."""
    column, weight = np.random.default_rng(4).normal(1, 2, 100), np.full(100, 1 / 100)
    once = lower_bound(2.0)(column, weight, None)[0]
    thrice = lower_bound(2.0)(np.tile(column, 3), np.tile(weight, 3) / 3, np.tile(np.arange(100), 3))[0]
    assert thrice == pytest.approx(once, rel=1e-12)


def test_lower_bound_of_what_does_not_vary_is_the_mean():
    value, slope = lower_bound(3.0)(np.full(4, 0.5), np.full(4, 0.25), None)
    assert value == 0.5
    assert np.array_equal(slope, np.full(4, 0.25))
