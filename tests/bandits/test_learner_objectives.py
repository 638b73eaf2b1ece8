"""What learners climb is what `ope` estimates, and what must not change a policy does not."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import Ridge

from bandits import learners, softmax_linear
from bandits.batch import DecisionBatch
from bandits.forms import to_bytes, to_form
from bandits.learners import (
    DR,
    IPS,
    LEARNERS,
    POEM,
    BanditNet,
    LSLin,
    OracleGreedy,
    OracleSoftmax,
    Pessimistic,
    label,
)
from bandits.oracles import BoostedTrees
from bandits.policy import Policy
from bandits.reward_models import cross_fitted, fit_scorer, logged_features
from bandits.scorers import joint_features
from bandits.softmax_linear import PENALTIES, mean_value
from ope import LoggedData, evaluate
from ope.data import InputError, assign_folds
from ope.simulate import softmax
from tests.bandits.learner_logs import every_learner, masked_log, ragged_log, requests, simulated

D = 4


@pytest.fixture
def climbed(monkeypatch) -> list[tuple[Any, ...]]:
    """(problem, objective, penalty, θ) of every maximisation, in order; the last is that of the policy returned.

    Learners divide rewards by their spread; here all is put back into the rewards' own unit.
    """
    seen: list[tuple[Any, ...]] = []
    spreads: list[float] = []
    spread_of = learners._spread

    def spread_spy(data):
        spreads.append(spread_of(data))
        return spreads[-1]

    def spy(problem, objective, l2, direction, *, iterations):
        theta = softmax_linear.maximise(problem, objective, l2, direction, iterations=iterations)
        unit = spreads[-1]
        q = None if problem.q is None else problem.q * unit
        seen.append((replace(problem, payoff=problem.payoff * unit, q=q), objective, l2 * unit, theta))
        return theta

    monkeypatch.setattr(learners, "_spread", spread_spy)
    monkeypatch.setattr(learners, "maximise", spy)
    return seen


@pytest.mark.parametrize("extras", ["", "weighted", "eligible"])
@pytest.mark.parametrize("learner", [IPS(), POEM(penalties=(0.0,)), DR(), Pessimistic()], ids=label)
def test_what_was_climbed_is_what_ope_estimates(learner, extras, climbed):
    """The fitted policy's IPS, clipped IPS or DR value on its own log, to 1e-10."""
    data = masked_log() if extras == "eligible" else simulated()
    data = replace(data, sample_weight=np.linspace(0.5, 2, data.n)) if extras == "weighted" else data
    target = learner.fit(data, k=4, seed=2).propensities(DecisionBatch.of_log(data, 4))
    problem, objective, _, theta = climbed[-1]
    terms = problem.terms(theta)[0]
    q = cross_fitted(None, data, 4, 3, 2) if isinstance(learner, DR | Pessimistic) else None
    name = {"IPS": "IPS", "POEM": "cIPS(20)"}.get(learner.name, "DR")
    estimate = evaluate(data, target, q, estimators=(name,))[name]
    assert problem.weight @ terms == pytest.approx(estimate.value, abs=1e-10)
    if isinstance(learner, Pessimistic) and extras != "weighted":  # its standard error divides by n, the estimate's by n - 1
        bound = estimate.value - learner.z * estimate.stderr * np.sqrt((data.n - 1) / data.n)
        assert objective(terms, problem.weight, problem.cluster)[0] == pytest.approx(bound, abs=1e-10)


def test_poem_climbs_the_mean_less_its_penalty_times_the_standard_error(climbed):
    data = simulated()
    target = POEM(clip=3.0, penalties=(1.5,)).fit(data, k=4).propensities(DecisionBatch.of_log(data, 4))
    problem, objective, _, theta = climbed[-1]
    terms = problem.terms(theta)[0]
    estimate = evaluate(data, target, estimators=("cIPS(3)",))["cIPS(3)"]
    bound = estimate.value - 1.5 * estimate.stderr * np.sqrt((data.n - 1) / data.n)
    assert objective(terms, problem.weight, problem.cluster)[0] == pytest.approx(bound, abs=1e-10)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_banditnet_climbs_rewards_less_a_share_of_their_range(share, climbed):
    data = simulated()
    data = replace(data, reward=2 + 3 * data.reward)  # 2 or 5
    target = BanditNet(shifts=(share,)).fit(data, k=4).propensities(DecisionBatch.of_log(data, 4))
    problem, objective, _, theta = climbed[-1]
    expected = evaluate(replace(data, reward=data.reward - 2 - 3 * share), target, estimators=("IPS",))["IPS"].value
    assert objective is mean_value
    assert problem.weight @ problem.terms(theta)[0] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("smoothing", [None, 0.5])
def test_log_smoothing_climbs_its_linear_form(smoothing, climbed):
    """Σ π log(1 + l r/p) / l / n less |θ|²/(2 l n), l = 1/sqrt(n) by default."""
    data = simulated()
    target = LSLin(smoothing).fit(data, k=4).propensities(DecisionBatch.of_log(data, 4))
    strength = 1 / np.sqrt(data.n) if smoothing is None else smoothing
    chosen = target[np.arange(data.n), data.action]
    problem, _, l2, theta = climbed[-1]
    expected = (chosen * np.log1p(strength * data.reward / data.propensity) / strength).mean()
    assert problem.weight @ problem.terms(theta)[0] == pytest.approx(expected, abs=1e-10)
    assert l2 == pytest.approx(1 / (strength * data.n), rel=1e-12)


@pytest.mark.parametrize("learner", [IPS(l2=3.0), BanditNet(l2=3.0), POEM(l2=3.0), DR(l2=3.0), Pessimistic(l2=3.0)], ids=label)
def test_penalty_is_in_units_of_the_spread_of_rewards_over_rows(learner, climbed):
    data = simulated()
    learner.fit(data, k=4)
    assert climbed[-1][2] == pytest.approx(3.0 * data.reward.std() / data.n, rel=1e-12)


@pytest.mark.parametrize("kind", [BanditNet, POEM])
def test_setting_is_the_one_of_the_highest_held_out_snips(kind, monkeypatch):
    """Fitted afresh with each setting alone, the one chosen is the one whose value was highest."""
    values: list[float] = []

    def spy(data, *args, **kwargs):
        report = evaluate(data, *args, **kwargs)
        values.append(report["SNIPS"].value)
        return report

    monkeypatch.setattr(learners, "evaluate", spy)
    data, settings = simulated(seed=3), kind.__dataclass_fields__["shifts" if kind is BanditNet else "penalties"].default
    policy = kind().fit(data, k=4, seed=1)
    best = settings[int(np.argmax(values[: len(settings)]))]
    alone = kind((best,)) if kind is BanditNet else kind(penalties=(best,))
    assert to_bytes(to_form(policy)) == to_bytes(to_form(alone.fit(data, k=4, seed=1)))


def standardised(features: np.ndarray, weight: np.ndarray) -> np.ndarray:
    centre = np.average(features, axis=0, weights=weight)
    return (features - centre) / np.sqrt(np.average((features - centre) ** 2, axis=0, weights=weight))


def ridge_fits(penalty: float, designs: list[np.ndarray], targets: list[np.ndarray], shares: list[np.ndarray]) -> list[np.ndarray]:
    """Coefficients by scikit-learn, one regression for each design."""
    ridge = Ridge(alpha=penalty, fit_intercept=False, solver="cholesky")
    return [clone(ridge).fit(X, y, sample_weight=w).coef_ for X, y, w in zip(designs, targets, shares, strict=True)]


def left_out_error(penalty: float, X: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Weighted squared error of each row under a regression fitted without it: the normal equations solved once a row."""
    total = 0.0
    for row in range(len(y)):
        rest = np.arange(len(y)) != row
        weighted = X[rest].T * w[rest]
        coefficient = np.linalg.solve(weighted @ X[rest] + penalty * np.eye(X.shape[1]), weighted @ y[rest])
        total += w[row] * (y[row] - X[row] @ coefficient) ** 2
    return total


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("n", "noise", "seed"), [(60, 0.1, 0), (60, 1.0, 1), (90, 4.0, 2)])
def test_ridge_is_that_of_scikit_learn_with_the_penalty_of_the_least_left_out_error(n, noise, seed, weighted):
    """One for each action, on standardised features and a column of ones, of the reward less its mean, which is added back.

    Standardised once, by all rows. The penalty is one for all actions, by brute force: a regression for every row left out.
    """
    rng = np.random.default_rng(seed)
    context, action = 5 + 3 * rng.normal(size=(n, 2)), rng.integers(0, 3, n)
    reward = 2 + context[:, 0] * (action - 1) + noise * rng.normal(size=n)
    weight = rng.uniform(0.5, 3, n) if weighted else np.ones(n)
    data = LoggedData(
        action=action, reward=reward, propensity=np.full(n, 1 / 3), context=context, sample_weight=weight if weighted else None
    )
    X, centred = np.column_stack((standardised(context, weight), np.ones(n))), reward - np.average(reward, weights=weight)
    members = [action == a for a in range(3)]
    parts = [X[rows] for rows in members], [centred[rows] for rows in members], [weight[rows] for rows in members]
    errors = [sum(left_out_error(penalty, *each) for each in zip(*parts, strict=True)) for penalty in PENALTIES]
    by_penalty = [np.average(reward, weights=weight) + X @ np.column_stack(ridge_fits(penalty, *parts)) for penalty in PENALTIES]
    found = fit_scorer(None, data, 3).scores(DecisionBatch.of_log(data, 3))
    best = int(np.argmin(errors))
    assert found == pytest.approx(by_penalty[best], rel=1e-8, abs=1e-8)
    assert all(np.abs(found - other).max() > 1e-4 for index, other in enumerate(by_penalty) if index != best)


def test_ridge_on_action_features_is_one_regression_for_all_actions():
    """Standardised over all actions of all rows, without a column of ones: actions differ by their features alone."""
    rng = np.random.default_rng(3)
    n, features = 80, 1 + 2 * rng.normal(size=(80, 3, 2))
    action = rng.integers(0, 3, n)
    taken = features[np.arange(n), action]
    reward = 1 + taken[:, 0] - taken[:, 1] + rng.normal(size=n)
    data = LoggedData(action=action, reward=reward, propensity=np.full(n, 1 / 3), action_features=features)
    X = standardised(features.reshape(-1, 2), np.ones(3 * n)).reshape(n, 3, 2)
    logged, centred = X[np.arange(n), action], reward - reward.mean()
    errors = [left_out_error(penalty, logged, centred, np.ones(n)) for penalty in PENALTIES]
    (coefficient,) = ridge_fits(PENALTIES[int(np.argmin(errors))], [logged], [centred], [np.ones(n)])
    found = fit_scorer(None, data, 3).scores(DecisionBatch.of_log(data))
    assert found == pytest.approx(reward.mean() + X @ coefficient, rel=1e-8, abs=1e-8)


def test_cross_fitted_is_the_ridge_of_the_other_folds():
    data = simulated(300)
    q = cross_fitted(None, data, 4, 3, 7)
    fold = learners.assign_folds(data, 3, 7)
    for held_out in range(3):
        test = fold == held_out
        scorer = fit_scorer(None, data.take(fold != held_out), 4)
        assert np.array_equal(q[test], scorer.scores(DecisionBatch.of_log(data.take(test), 4)))


@pytest.mark.parametrize("form", ["named", "featured", "weighted"])
def test_trees_are_those_of_lightgbm_called_bare(form):
    """The same parameters on the same matrix (action index, context, action features): the same predictions, to the bit."""
    data = ragged_log()[0] if form == "featured" else simulated(1500)
    data = replace(data, sample_weight=np.linspace(0.5, 2, 1500)) if form == "weighted" else data
    k = 5 if form == "featured" else 4
    columns = data.context if form != "featured" else data.action_features[np.arange(data.n), data.action]
    matrix = np.column_stack((data.action, columns)).astype(np.float64)
    assert np.array_equal(logged_features(DecisionBatch.of_log(data, k), data), matrix)
    total = data.n if data.sample_weight is None else data.sample_weight.sum()
    parameters = {
        "objective": "regression", "num_leaves": 31, "learning_rate": 0.1, "seed": 0, "num_threads": 1, "verbosity": -1,
        "deterministic": True, "force_row_wise": True, "feature_pre_filter": False, "min_data_in_leaf": 0, "min_data_in_bin": 1,
        "min_data_per_group": 1, "cat_smooth": 1.0,
        "min_sum_hessian_in_leaf": min(200, float(total) / 20) * (1 - 1e-5),
    }  # fmt: skip
    lightgbm = import_module("lightgbm")
    categories = [] if form == "featured" else [0]  # of a named action the index
    rows = lightgbm.Dataset(matrix, data.reward, weight=data.sample_weight, categorical_feature=categories, params=parameters)
    bare = lightgbm.train(parameters, rows, num_boost_round=60)
    policy = OracleGreedy(BoostedTrees()).fit(data, k=k)
    batch = DecisionBatch.of_log(data, k)
    expected = bare.predict(joint_features(batch).reshape(-1, matrix.shape[1])).reshape(data.n, k)
    assert np.array_equal(policy.scorer.scores(batch), expected)
    best = np.where(batch.eligible, expected, -np.inf).argmax(axis=1)
    assert np.array_equal(policy.propensities(batch).argmax(axis=1), best)
    assert len(np.unique(expected)) > 20, "the trees do split"


@pytest.mark.parametrize("oracle", [None, BoostedTrees()], ids=["ridge", "trees"])
def test_oracle_softmax_is_the_scorer_at_a_share_of_the_spread(oracle):
    data, batch = simulated(), requests()
    policy: Policy = OracleSoftmax(oracle, temperature=0.2).fit(data, k=4)
    scores = fit_scorer(oracle, data, 4).scores(batch)
    assert policy.propensities(batch) == pytest.approx(softmax(scores / (0.2 * data.reward.std())), rel=0, abs=1e-12)


def test_labels_are_distinct_and_say_which_oracle():
    names = [label(learner) for learner in LEARNERS]
    assert len(set(names)) == len(LEARNERS)
    assert {"oracle-greedy", "oracle-greedy (trees)", "oracle-softmax", "oracle-softmax (trees)"} < set(names)


@pytest.mark.parametrize("learner", [BanditNet(), POEM(), DR(), Pessimistic()], ids=label)
def test_too_few_clusters_to_hold_any_out(learner):
    with pytest.raises(InputError, match="found 2 clusters; expected at least"):
        learner.fit(simulated(cluster=np.arange(1000) % 2), k=4)


# What may not change a policy


@pytest.mark.parametrize("learner", [IPS(), DR(), OracleGreedy()], ids=label)
def test_padding_may_be_any_number(learner):
    rng = np.random.default_rng(3)
    features, eligible = rng.normal(size=(1000, 5, 3)), rng.random((1000, 5)) < 0.7
    eligible[:, 0] = True
    vectors = eligible / eligible.sum(axis=1, keepdims=True)
    action = (rng.random((1000, 1)) > np.cumsum(vectors, axis=1)[:, :-1]).sum(axis=1)
    rows = np.arange(1000)
    reward = (rng.random(1000) < 1 / (1 + np.exp(-features[rows, action] @ [1.0, -1.0, 0.5]))).astype(float)
    policies = []
    for padding in (0.0, 1e6):
        padded = np.where(eligible[:, :, None], features, padding)
        data = LoggedData(action, reward, vectors[rows, action], eligible=eligible, action_features=padded)
        policies.append(learner.fit(data).propensities(DecisionBatch.of_log(data)))
    np.testing.assert_allclose(policies[1], policies[0], atol=1e-6)


@pytest.mark.parametrize("learner", [IPS(), BanditNet(), POEM(), DR(), Pessimistic(), OracleGreedy(), OracleSoftmax()], ids=label)
@pytest.mark.parametrize("unit", [1e-4, 100.0])
def test_the_unit_of_rewards_does_not_matter(learner, unit):
    data = simulated()
    batch = DecisionBatch.of_log(data, 4)
    before, after = (learner.fit(d, k=4).propensities(batch) for d in (data, replace(data, reward=unit * data.reward)))
    np.testing.assert_allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("learner", [BanditNet(), POEM()], ids=label)
def test_an_action_that_only_the_held_out_fold_took_is_an_action(learner):
    data = simulated()
    fold = assign_folds(data, learners.HELD_OUT, seed=0)
    action = data.action.copy()
    action[np.flatnonzero(fold == 0)[0]] = 4  # the fifth, in one held-out row
    policy = learner.fit(replace(data, action=action))
    assert policy.propensities(DecisionBatch.of_log(data, 5)).shape == (data.n, 5)


@every_learner
@pytest.mark.parametrize("reward", [0.1, 0.4])
def test_constant_rewards_of_any_size_teach_nothing_and_break_nothing(learner, reward):
    data = simulated()
    vectors = learner.fit(replace(data, reward=np.full(data.n, reward)), k=4).propensities(DecisionBatch.of_log(data, 4))
    np.testing.assert_allclose(vectors.sum(axis=1), 1, atol=1e-12)
