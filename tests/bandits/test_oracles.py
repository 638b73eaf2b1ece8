"""Oracles keep scikit-learn's contract, weights are repeats, and calibrated predictions are what happens."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from bandits import oracles
from bandits.oracles import BoostedTrees, Calibration, Probability, fit_calibration, logistic, ridge
from bandits.oracles import expected_calibration_error as calibration_error
from ope.data import InputError
from ope.nuisance import fit_model

NEEDS_OTHER_PACKAGES = {"check_sample_weights_pandas_series", "check_regressor_data_not_an_array", "check_array_api_input"}


def nonlinear(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (n, 3), noisy rewards in {0, 1} and their true means."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, (n, 3))
    mean = expit(3 * np.sin(3 * X[:, 0]) * X[:, 1] - 1)
    return X, (rng.uniform(size=n) < mean).astype(float), mean


class SquashedTrees(BoostedTrees):
    """Logistic trees under the checks' arbitrary targets, which are first mapped into [0, 1]."""

    def __init__(self, objective="logistic", trees=10):
        super().__init__(objective=objective, trees=trees)

    def fit(self, X, y, sample_weight=None):
        if y is not None and np.asarray(y).dtype.kind in "iufO":
            y = np.asarray(y, dtype=float)
            y = np.where(np.isfinite(y), expit(y), y)
        return super().fit(X, y, sample_weight)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True
        return tags


@pytest.mark.parametrize("model", [BoostedTrees(), Probability(), SquashedTrees()], ids=lambda model: type(model).__name__)
def test_scikit_learn_contract(model):
    checks = check_estimator(model, on_skip=None)
    assert {check["status"] for check in checks} <= {"passed", "skipped"}
    assert {check["check_name"] for check in checks if check["status"] == "skipped"} <= NEEDS_OTHER_PACKAGES
    assert "check_sample_weight_equivalence_on_dense_data" in {
        check["check_name"] for check in checks if check["status"] == "passed"
    }


@pytest.mark.parametrize(
    ("model", "tolerance"),
    [
        (BoostedTrees(min_leaf=20), 1e-7),  # float32 gradients
        (BoostedTrees("logistic", min_leaf=20), 1e-7),
        (ridge(), 1e-8),
        (logistic(), 1e-8),
        (Probability(), 1e-8),
    ],
    ids=["trees", "logistic trees", "ridge", "logistic", "probability"],
)
@pytest.mark.parametrize("seed", range(5))
def test_weight_is_repeats_of_a_row(model, tolerance, seed):
    X, _, mean = nonlinear(600, seed)
    X = np.round(X, 1)  # fewer distinct values than bins
    rng = np.random.default_rng(seed + 100)
    y, times = np.clip(mean + 0.2 * rng.normal(size=600), 0, 1), rng.integers(0, 4, 600)
    weighted, repeated = fit_model(model, X, y, times), fit_model(model, np.repeat(X, times, axis=0), np.repeat(y, times))
    seen = X[times > 0]  # between values that were seen, equally good thresholds may lie apart
    assert weighted.predict(seen) == pytest.approx(repeated.predict(seen), abs=tolerance)
    assert np.abs(weighted.predict(X) - fit_model(model, X, y).predict(X)).max() > 0.01, "the weights do matter"


def test_trees_learn_what_lines_cannot():
    X, _, mean = nonlinear(4000, 3)
    y = mean + 0.1 * np.random.default_rng(4).normal(size=len(mean))
    fresh, _, truth = nonlinear(2000, 5)
    assert BoostedTrees(min_leaf=20).fit(X, y).score(fresh, truth) > 0.95
    assert BoostedTrees().fit(X, y).score(fresh, truth) > 0.8, "with default settings too"
    assert ridge().fit(X, y).score(fresh, truth) < 0.5


def test_small_data_still_fit_something():
    X = np.arange(40.0)[:, None]
    y = (X[:, 0] >= 20).astype(float)
    assert BoostedTrees().fit(X, y).score(X, y) > 0.9


@pytest.mark.parametrize("model", [BoostedTrees("logistic"), logistic()], ids=["trees", "linear"])
def test_probabilities_stay_inside_and_match_the_base_rate(model):
    X, y, mean = nonlinear(5000, 6)
    predicted = clone(model).fit(X, y).predict(X)
    assert np.all((predicted > 0) & (predicted < 1))
    assert abs(predicted.mean() - y.mean()) < 4 * np.sqrt(y.var() / len(y))
    assert np.abs(predicted - mean).mean() < np.abs(y.mean() - mean).mean()


def test_logistic_is_logistic_regression_for_rewards_of_zero_and_one():
    X, y, _ = nonlinear(500, 7)
    usual = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, tol=1e-10, solver="newton-cholesky")).fit(X, y)
    assert logistic(0.3).fit(X, y).predict(X) == pytest.approx(usual.predict_proba(X)[:, 1], abs=1e-9)


def test_a_fractional_reward_is_that_much_of_a_success():
    X, _, mean = nonlinear(300, 8)
    both = np.concatenate((np.ones(300), np.zeros(300)))
    split = Probability().fit(np.vstack((X, X)), both, sample_weight=np.concatenate((mean, 1 - mean)))
    whole = Probability(reward_range=(0, 1)).fit(X, mean)
    assert whole.predict(X) == pytest.approx(split.predict(X), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_rewards_are_predicted_as_they_are(value):
    X, y = np.random.default_rng(9).normal(size=(50, 2)), np.full(50, value)
    assert np.array_equal(logistic().fit(X, y).predict(X), y)
    assert np.array_equal(Probability().fit(X, y + 2).predict(X), y + 2)
    assert BoostedTrees("logistic").fit(X, y).predict(X) == pytest.approx(y, abs=1e-9)
    assert BoostedTrees().fit(X, y).predict(X) == pytest.approx(y, abs=1e-9)


@pytest.mark.parametrize("objective", ["squared", "logistic"])
def test_the_text_is_the_whole_model(objective):
    X, y, _ = nonlinear(2000, 10)
    model = BoostedTrees(objective, min_leaf=20, trees=20).fit(X, y)
    predicted = model.predict(X)
    rebuilt = import_module("lightgbm").Booster(model_str=model.model_text_)
    assert np.array_equal(rebuilt.predict(X, num_threads=1), predicted)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(X), predicted)
    assert clone(model).fit(X, y).model_text_ == model.model_text_
    assert np.array_equal(np.concatenate([model.predict(X[i : i + 1]) for i in range(200)]), predicted[:200])


def test_threads_change_no_tree():
    X, y, _ = nonlinear(2000, 11)
    one, two = (BoostedTrees(min_leaf=20, trees=3, threads=threads).fit(X, y).predict(X) for threads in (1, 2))
    assert np.array_equal(one, two)


def test_categories_have_no_order():
    rng = np.random.default_rng(12)
    codes = rng.integers(0, 8, 4000)
    y = np.array([0, 9, 0, 9, 9, 0, 0, 9.0])[codes] + rng.normal(size=4000)
    model = BoostedTrees(categorical=(0,), trees=1, leaves=2, learning_rate=1.0).fit(codes[:, None].astype(float), y)
    assert len(np.unique(model.predict(np.arange(8.0)[:, None]))) == 2
    assert model.score(codes[:, None].astype(float), y) > 0.9, "one split tells odd groups apart"


def test_missing_values_have_their_own_branch():
    X, _, mean = nonlinear(2000, 13)
    X[::3, 0] = np.nan
    y = np.where(np.isnan(X[:, 0]), 5.0, mean)
    assert BoostedTrees().fit(X, y).predict(X[::3]).min() > 4.5


def test_importing_oracles_loads_no_lightgbm():
    code = "import sys, bandits.oracles; print('lightgbm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError("libgomp.so.1: cannot open shared object file"), r"found libgomp.so.1: cannot open.*apt-get install libgomp1"),
        (ModuleNotFoundError("No module named 'lightgbm'", name="lightgbm"), r"pip install -e '\.\[bandits\]'"),
    ],
)
def test_missing_libraries_are_named_with_their_remedy(monkeypatch, fault, message):
    def importer(name):
        raise fault

    monkeypatch.setattr(oracles, "import_module", importer)
    with pytest.raises(InputError, match=message):
        BoostedTrees().fit([[0.0], [1.0]], [0.0, 1.0])


@pytest.mark.parametrize("fault", [OSError("disk on fire"), ModuleNotFoundError("No module named 'x'", name="x")])
def test_other_faults_of_the_import_pass_through(monkeypatch, fault):
    def importer(name):
        raise fault

    monkeypatch.setattr(oracles, "import_module", importer)
    with pytest.raises(type(fault), match=str(fault)):
        BoostedTrees().fit([[0.0], [1.0]], [0.0, 1.0])


X4, Y4 = np.arange(4.0)[:, None], np.array([0.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: BoostedTrees("huber").fit(X4, Y4), "found objective 'huber'; expected one of squared, logistic"),
        (lambda: BoostedTrees("logistic").fit(X4, Y4 * 2), r"found rewards from 0 to 2; expected them in \[0, 1\]. Use objective"),
        (lambda: BoostedTrees(trees=0).fit(X4, Y4), r"BoostedTrees\(trees=0\): expected at least 1"),
        (lambda: BoostedTrees(categorical=(1,)).fit(X4, Y4), r"found categorical columns \[1\]; expected indices in 0..0"),
        (lambda: BoostedTrees().fit(X4, Y4, np.zeros(4)), "found 0 for every row|zero"),
        (lambda: logistic().fit(X4, Y4 - 1), r"found rewards from -1 to 0; expected them in \[0, 1\]"),
        (
            lambda: fit_model(make_pipeline(StandardScaler(), KNeighborsRegressor(1)), X4, Y4, np.ones(4)),
            "takes no sample weights",
        ),
    ],
)
def test_errors_of_oracles(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def distorted(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident predictions, and rewards: the true log-odds are 0.4 times those predicted, less 1."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0, 2, n)
    return expit(odds), (rng.uniform(size=n) < expit(0.4 * odds - 1)).astype(float)


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_calibration_mends_a_distorted_probability(method):
    mend = fit_calibration(*distorted(30_000, 14), method)
    predicted, reward = distorted(100_000, 15)
    assert calibration_error(predicted, reward) > 0.15
    assert calibration_error(mend(predicted), reward) < 0.01
    assert np.all(np.diff(mend(np.linspace(0, 1, 1001))) >= 0)


def test_a_platt_map_is_exact_between_its_two_knots():
    mend = fit_calibration(*distorted(5000, 16), "platt")
    p = np.array([1e-9, 0.001, 0.3, 0.5, 0.999])
    slope = np.diff(mend.y) / np.diff(mend.x)
    assert mend(p) == pytest.approx(expit(slope * logit(p) + mend.y.mean()), rel=1e-12)
    assert 0 < mend(0.0) < mend(1e-9) < mend(1.0) <= 1
    assert mend(np.full((2, 3), 0.5)).shape == (2, 3)


def test_platt_smoothing_on_paper():
    # 20 losses at odds -1 and 20 wins at +1: targets 1/22 and 21/22 are met exactly by a line through ±log 21
    mend = fit_calibration(np.repeat(expit([-1.0, 1.0]), 20), np.repeat([0.0, 1.0], 20), "platt")
    assert mend(expit(np.array([-1.0, 1.0]))) == pytest.approx([1 / 22, 21 / 22], rel=1e-6)


def test_isotonic_map_takes_any_rewards():
    x = np.linspace(-3, 3, 2000)
    mend = fit_calibration(x, 10 * x**3)
    assert mend([-4.0, 1.0, 4.0]) == pytest.approx([-270, 10, 270], abs=0.1)


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_calibration_weight_is_repeats(method):
    predicted, reward = distorted(5000, 17)
    times = np.random.default_rng(18).integers(0, 3, 5000)
    weighted = fit_calibration(predicted, reward, method, times)
    repeated = fit_calibration(np.repeat(predicted, times), np.repeat(reward, times), method)
    grid = np.linspace(predicted.min(), predicted.max(), 50)
    assert weighted(grid) == pytest.approx(repeated(grid), abs=1e-8)


def test_calibration_error_on_paper():
    # two bins: predictions .1, .1 with rewards 0, 1 (gap .4) and .8, .8 with 1, 1 (gap .2), half of the rows each
    assert calibration_error([0.1, 0.8, 0.1, 0.8], [0, 1, 1, 1], bins=2) == pytest.approx(0.3)
    assert calibration_error([0.5] * 4, [0, 1, 0, 1]) == pytest.approx(0.0), "equal predictions share a bin"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: fit_calibration(*distorted(500, 19)), 'found 500 rows; expected at least 2000 for isotonic.*Use method="platt"'),
        (lambda: fit_calibration(*distorted(20, 19)), "found 20 rows.*Collect more rows"),
        (lambda: fit_calibration(*distorted(20, 19), "platt"), "expected at least 30 for platt calibration. Collect more rows"),
        (lambda: fit_calibration(*distorted(50, 19), "beta"), "found method 'beta'; expected one of platt, isotonic"),
        (lambda: fit_calibration(np.full(50, 0.3), np.ones(50), "platt"), "found the one prediction 0.3 in all rows"),
        (lambda: fit_calibration(np.linspace(0, 1, 50), np.linspace(1, 0, 50), "platt"), "rewards that fall as predictions rise"),
        (lambda: fit_calibration(np.linspace(0, 2, 50), np.linspace(0, 1, 50), "platt"), r"found predictions outside \[0, 1\]"),
        (lambda: fit_calibration(np.linspace(0, 1, 50), np.linspace(0, 2, 50), "platt"), r"found rewards from 0 to 2"),
        (lambda: fit_calibration([0.5], [np.nan]), "column 'reward', row 0: found nan"),
        (lambda: fit_calibration([0.5], [1.0], "platt", [-1.0]), "sample_weight: found -1"),
        (lambda: fit_calibration(*distorted(50, 19), "platt", np.zeros(50)), "found 0 rows; expected at least 30"),
        (lambda: calibration_error([0.5], [1.0], bins=0), "found 0 bins and 1 rows"),
        (lambda: Calibration(np.array([1.0, 0.0]), np.array([0.0, 1.0])), "x increasing and y non-decreasing"),
    ],
)
def test_errors_of_calibration(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()
