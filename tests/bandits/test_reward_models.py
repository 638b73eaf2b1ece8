"""Oracles as scorers: linear ones become arrays, others stay in memory; calibration is learned on rows no model had seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import ElasticNet, LinearRegression, LogisticRegression
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from bandits.batch import DecisionBatch
from bandits.forms import from_bytes, from_form, to_bytes, to_form
from bandits.learners import DR, OracleGreedy, OracleSoftmax, Pessimistic, label
from bandits.oracles import BoostedTrees, expected_calibration_error, logistic, ridge
from bandits.policy import Greedy
from bandits.reward_models import Fitted, cross_fitted, fit_scorer
from bandits.scorers import Calibrated, Linear
from ope import LoggedData
from ope.data import InputError
from ope.simulate import World
from tests.bandits.learner_logs import D, is_distribution, logging_policy, ragged_log, requests, simulated

LINEAR = {
    "ridge": ridge(),
    "logistic": logistic(),
    "elastic net": make_pipeline(StandardScaler(), ElasticNet(alpha=0.01)),
    "principal components": make_pipeline(PCA(2), LinearRegression()),
    "classifier": make_pipeline(StandardScaler(), LogisticRegression()),
}
CURVED = {
    "forest": RandomForestRegressor(10, random_state=0),
    "network": MLPRegressor(hidden_layer_sizes=(8,), max_iter=2000, random_state=0),
    "polynomial": make_pipeline(PolynomialFeatures(2), LinearRegression()),
}


def per_action(model, data: LoggedData, context: np.ndarray, k: int = 4) -> np.ndarray:
    """What the model itself predicts, fitted on the rows of each action."""
    columns = []
    for action in range(k):
        rows = data.action == action
        fitted = model.fit(data.context[rows], data.reward[rows])
        columns.append(fitted.predict_proba(context)[:, 1] if hasattr(fitted, "predict_proba") else fitted.predict(context))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("name", LINEAR)
def test_what_predicts_in_straight_lines_is_carried_as_arrays(name):
    data, batch = simulated(), requests()
    scorer = fit_scorer(LINEAR[name], data, 4)
    assert isinstance(scorer, Linear)
    assert scorer.link == ("logistic" if name in ("logistic", "classifier") else "identity")
    assert scorer.scores(batch) == pytest.approx(per_action(LINEAR[name], data, batch.context), rel=0, abs=1e-9)
    policy = Greedy(scorer)
    back = from_form(from_bytes(*to_bytes(to_form(policy))))
    assert np.array_equal(back.propensities(batch), policy.propensities(batch))


@pytest.mark.parametrize("name", CURVED)
def test_what_does_not_decides_in_memory_and_says_so_when_carried(name):
    data, batch = simulated(), requests(300)
    policy = OracleGreedy(CURVED[name]).fit(data, k=4)
    assert isinstance(policy.scorer, Fitted)
    assert policy.scorer.scores(batch) == pytest.approx(per_action(CURVED[name], data, batch.context), rel=0, abs=1e-12)
    with pytest.raises(InputError, match=r"policy\.scorer: found a Fitted, which has no form.* decides in memory only"):
        to_form(policy)


@pytest.mark.parametrize("oracle", [ridge(), RandomForestRegressor(10, random_state=0)], ids=["ridge", "forest"])
def test_action_features_share_one_model(oracle):
    data, _, _ = ragged_log()
    batch = DecisionBatch.of_log(data)
    taken = data.action_features[np.arange(data.n), data.action]
    fitted = oracle.fit(taken, data.reward)
    expected = fitted.predict(data.action_features.reshape(-1, taken.shape[1])).reshape(data.eligible.shape)
    found = fit_scorer(oracle, data, 5).scores(batch)
    assert found[data.eligible] == pytest.approx(expected[data.eligible], rel=0, abs=1e-9)


def test_an_action_never_taken_is_as_good_as_the_average_and_one_that_always_paid_as_good_as_that():
    data = simulated()
    data = replace(data, reward=np.where(data.action == 2, 1.0, data.reward))
    for oracle in (ridge(), logistic(), RandomForestRegressor(5, random_state=0)):
        scores = fit_scorer(oracle, data, 6).scores(requests(20, 6))
        assert scores[:, 2] == pytest.approx(1.0, abs=1e-9)
        assert scores[:, 4:] == pytest.approx(data.reward.mean(), abs=1e-9)


def test_weights_are_repeats_for_a_pipeline():
    data, times = simulated(), np.random.default_rng(3).integers(1, 4, 1000)
    model = make_pipeline(StandardScaler(), LinearRegression())
    weighted = fit_scorer(model, replace(data, sample_weight=times.astype(float)), 4)
    repeated = fit_scorer(model, data.take(np.repeat(np.arange(1000), times)), 4)
    assert weighted.scores(requests()) == pytest.approx(repeated.scores(requests()), rel=0, abs=1e-9)


def test_another_number_of_actions_and_what_is_no_estimator_are_refused():
    scorer = fit_scorer(CURVED["forest"], simulated(), 4)
    with pytest.raises(InputError, match="found 3 actions; expected 4"):
        scorer.scores(requests(5, 3))
    with pytest.raises(InputError, match="found a str; expected a scikit-learn estimator"):
        fit_scorer("ridge", simulated(), 4)


@pytest.mark.parametrize("oracle", [None, ridge(), logistic(), BoostedTrees(trees=5), CURVED["forest"]], ids=str)
@pytest.mark.parametrize("learner", [DR, Pessimistic])
def test_doubly_robust_learners_take_any_oracle(learner, oracle):
    one = learner(oracle=oracle, iterations=5)
    vectors = one.fit(simulated(), k=4).propensities(requests())
    assert is_distribution(vectors, np.ones((2000, 4), dtype=bool))
    assert vectors.max(axis=1).mean() > 0.4, "it learned something: uniform has .25"


def test_labels_name_the_oracle():
    named = [OracleGreedy(), OracleGreedy(ridge()), DR(logistic()), OracleSoftmax(BoostedTrees()), DR(CURVED["forest"])]
    expected = ["oracle-greedy", "oracle-greedy (ridge)", "DR (logistic)", "oracle-softmax (trees)", "DR (RandomForestRegressor)"]
    assert [label(each) for each in named] == expected


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_calibration_mends_an_overconfident_oracle(method):
    """Deep trees on few rows: predictions for a fresh log are too extreme, the calibrated ones are not. Noise alone is .014."""
    world, rng = World.random(D, 4, 1), np.random.default_rng(11)
    context = world.contexts(6000, rng)
    data = world.log(context, logging_policy(world, context), rng)
    fresh = world.contexts(6000, rng)
    fresh = world.log(fresh, logging_policy(world, fresh), rng)
    batch, taken = DecisionBatch.of_log(fresh, 4), (np.arange(6000), fresh.action)
    oracle = BoostedTrees("logistic", trees=200, min_leaf=5, learning_rate=0.3)
    raw, mended = (fit_scorer(oracle, data, 4, calibration=how) for how in (None, method))
    assert isinstance(mended, Calibrated)
    before, after = (expected_calibration_error(each.scores(batch)[taken], fresh.reward) for each in (raw, mended))
    assert before > 0.1
    assert after < before / 3
    policy = OracleSoftmax(oracle, calibration=method).fit(data, k=4)
    back = from_form(from_bytes(*to_bytes(to_form(policy))))
    assert np.array_equal(back.propensities(batch), policy.propensities(batch))


def test_cross_fitted_predictions_do_not_see_their_own_rewards():
    data = simulated(600)
    changed = replace(data, reward=np.where(np.arange(600) == 17, 1 - data.reward, data.reward))
    for oracle in (ridge(), CURVED["forest"]):
        before, after = (cross_fitted(oracle, each, 4, 3, 0) for each in (data, changed))
        assert np.array_equal(before[17], after[17])
        assert not np.array_equal(before, after)
