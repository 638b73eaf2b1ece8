"""Regression oracles: scikit-learn estimators that predict the expected reward, and maps that calibrate what they predict.

All honour `sample_weight`: weight m is m repeats of a row. Weights reach every step of a pipeline through `ope.nuisance.fit_model`.
"""

# ruff: noqa: N803  # X is scikit-learn's own name for it
from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from bandits.scorers import LARGEST_LOGIT, Calibration, log_odds
from ope.data import FloatArray, InputError, checked_finite

_LIGHTGBM_OBJECTIVES = {"squared": "regression", "logistic": "cross_entropy"}
# LightGBM counts rows, not weights, for its limits per leaf and per bin: a row of weight m must not fall below what m rows meet
_TRAINING = {"deterministic": True, "force_row_wise": True, "verbosity": -1, "feature_pre_filter": False,
             "min_data_in_leaf": 0, "min_data_in_bin": 1, "min_data_per_group": 1, "cat_smooth": 1.0}  # fmt: skip
_FEWEST_ROWS = {"platt": 30, "isotonic": 2000}


class BoostedTrees(RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Gradient-boosted trees by LightGBM (Ke et al. 2017). All that is learned is `model_text_`, LightGBM's own text format.

    objective: "squared" predicts the mean; "logistic" a probability, by cross-entropy, for targets in [0, 1].
    min_leaf: total weight that each leaf must hold, for "logistic" the weight times p(1 - p) in units of the base rate's;
    never more than a twentieth of the whole, so that a small log still gets a model.
    categorical: columns that hold category codes 0, 1, ... NaN is a missing value, with a branch of its own where the
    training column had some; elsewhere it is read as 0. threads: for training; prediction uses one.
    Weight m is m repeats up to LightGBM's float32 gradients, whose rounding decides between equally good splits; but it
    counts rows, not weights, where it bins a column of more than 255 distinct values and where it leaves out rare categories.
    """

    model_text_: str

    def __init__(
        self, objective: Literal["squared", "logistic"] = "squared", trees: int = 60, leaves: int = 31,
        learning_rate: float = 0.1, min_leaf: float = 200, categorical: tuple[int, ...] = (), seed: int = 0, threads: int = 1,
    ):  # fmt: skip
        self.objective, self.trees, self.leaves, self.learning_rate = objective, trees, leaves, learning_rate
        self.min_leaf, self.categorical, self.seed, self.threads = min_leaf, categorical, seed, threads

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> BoostedTrees:
        """Learn from features (n, d), targets (n,), weights (n,) >= 0. Raises InputError for wrong settings and targets."""
        lightgbm = lightgbm_module()
        features, target = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_all_finite="allow-nan")
        self._check(target)
        features, target, weight = _weighted(features, target, sample_weight)
        parameters = self._parameters(target, weight)
        rows = lightgbm.Dataset(features, target, weight=weight, categorical_feature=list(self.categorical), params=parameters)
        booster = lightgbm.train(parameters, rows, num_boost_round=self.trees)
        self.model_text_ = booster.model_to_string()
        self._booster = lightgbm.Booster(model_str=self.model_text_)  # so that predictions come from the text alone
        return self

    def predict(self, X: ArrayLike) -> FloatArray:
        """Expected targets (n,) of features (n, d), each row's to the bit whatever rows come with it."""
        check_is_fitted(self)
        features = validate_data(self, X, reset=False, dtype=np.float64, ensure_all_finite="allow-nan")
        predicted: FloatArray = self._booster.predict(features, num_threads=1)
        return predicted

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _check(self, y: FloatArray) -> None:
        if self.objective not in _LIGHTGBM_OBJECTIVES:
            raise InputError(f"found objective {self.objective!r}; expected one of {', '.join(_LIGHTGBM_OBJECTIVES)}")
        for name, least in {"trees": 1, "leaves": 2}.items():
            if getattr(self, name) < least:
                raise InputError(f"BoostedTrees({name}={getattr(self, name)}): expected at least {least}")
        outside = [column for column in self.categorical if not 0 <= column < self.n_features_in_]
        if outside:
            raise InputError(f"found categorical columns {outside}; expected indices in 0..{self.n_features_in_ - 1}")
        if self.objective == "logistic":
            _check_range(y, 0.0, 1.0, 'Use objective="squared" for other rewards')

    def _parameters(self, y: FloatArray, weight: FloatArray) -> dict[str, Any]:
        least = min(self.min_leaf, float(weight.sum()) / 20) * (1 - 1e-5)  # rounding must not refuse a leaf of just that weight
        if self.objective == "logistic":
            base = float(np.average(y, weights=weight))
            least *= base * (1 - base)
        return {
            **_TRAINING,
            "objective": _LIGHTGBM_OBJECTIVES[self.objective],
            "num_leaves": self.leaves,
            "learning_rate": self.learning_rate,
            "min_sum_hessian_in_leaf": max(least, 1e-12),
            "num_threads": self.threads,
            "seed": self.seed,
        }


class Probability(RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Logistic regression that predicts the expected reward: low + (high - low) expit(x'coef_ + intercept_).

    Minimises Σ w (cross-entropy) + |coef|² / (2c), the fractional logit of Papke & Wooldridge 1996: for rewards of 0 and 1
    it is logistic regression, and the prediction is the probability of 1. reward_range: (low, high), beyond which no reward
    is accepted; None takes the least and the greatest reward seen.
    """

    coef_: FloatArray
    intercept_: float
    reward_range_: tuple[float, float]

    def __init__(self, c: float = 1.0, reward_range: tuple[float, float] | None = None):
        self.c = c
        self.reward_range = reward_range

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Probability:
        """Learn from features (n, d), rewards (n,) and weights (n,) of at least 0. Raises InputError for rewards out of range."""
        features, target = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        features, target, weight = _weighted(features, target, sample_weight)
        low, high = (float(target.min()), float(target.max())) if self.reward_range is None else self.reward_range
        _check_range(target, low, high, "Set `reward_range` to the range of the rewards")
        share = (target - low) / (high - low) if high > low else np.zeros(len(target))
        self.reward_range_ = (low, high)
        self.coef_, self.intercept_ = _fractional_logit(features, share, weight, self.c)
        return self

    def predict(self, X: ArrayLike) -> FloatArray:
        """Expected rewards (n,) of features (n, d)."""
        check_is_fitted(self)
        features = validate_data(self, X, reset=False, dtype=np.float64)
        low, high = self.reward_range_
        predicted: FloatArray = low + (high - low) * expit(features @ self.coef_ + self.intercept_)
        return predicted


def ridge(alpha: float = 1.0) -> Any:
    """Ridge regression with penalty `alpha` on scaled features."""
    return make_pipeline(StandardScaler(), Ridge(alpha=alpha))


def logistic(c: float = 1.0) -> Any:
    """Probability of reward 1, by logistic regression with inverse penalty `c` on scaled features; rewards in [0, 1]."""
    return make_pipeline(StandardScaler(), Probability(c=c, reward_range=(0.0, 1.0)))


def fit_calibration(
    predicted: ArrayLike,
    reward: ArrayLike,
    method: Literal["isotonic", "platt"] = "isotonic",
    sample_weight: ArrayLike | None = None,
) -> Calibration:
    """The map from predictions (n,) to mean rewards, learned on rows (n,) that the predictions were not fitted to.

    "isotonic": the least-squares monotone map of any rewards (Zadrozny & Elkan 2002), from 2000 rows on. "platt": a straight
    line of log-odds with Platt's (1999) smoothed targets, for predictions and rewards in [0, 1], from 30 rows on.
    Raises InputError for fewer rows, and for predictions that do not rank the rewards.
    """
    values, target, weight = _checked_pairs(predicted, reward, sample_weight)
    if method not in _FEWEST_ROWS:
        raise InputError(f"found method {method!r}; expected one of {', '.join(_FEWEST_ROWS)}")
    if len(values) < _FEWEST_ROWS[method]:
        remedy = 'Use method="platt"' if method == "isotonic" and len(values) >= _FEWEST_ROWS["platt"] else "Collect more rows"
        raise InputError(f"found {len(values)} rows; expected at least {_FEWEST_ROWS[method]} for {method} calibration. {remedy}")
    if method == "platt":
        return _platt(values, target, weight)
    fitted = IsotonicRegression().fit(values, target, sample_weight=weight)
    return Calibration(fitted.X_thresholds_, fitted.y_thresholds_)


def expected_calibration_error(predicted: ArrayLike, reward: ArrayLike, bins: int = 10) -> float:
    """Σ_b (n_b / n) |mean reward - mean prediction| over bins of equal count, equal predictions sharing one. Naeini et al. 2015.

    Bins of equal width would put all predictions of a rare reward into one. With noise it is above 0 for a perfect model
    too, by about sqrt(2 bins p (1 - p) / (π n)).
    """
    values, target, _ = _checked_pairs(predicted, reward, None)
    if bins < 1 or len(values) == 0:
        raise InputError(f"found {bins} bins and {len(values)} rows; expected at least one of each")
    edges = np.quantile(values, np.arange(1, bins) / bins)
    gap = np.bincount(np.searchsorted(edges, values, side="right"), target - values)
    return float(np.abs(gap).sum() / len(values))


def lightgbm_module() -> Any:
    """The library, loaded when first needed. Raises InputError that says how to install what is missing."""
    try:
        return import_module("lightgbm")
    except ModuleNotFoundError as error:
        if error.name != "lightgbm":
            raise
        how = "Run `pip install -e '.[bandits]'` in a clone of Propel"
        raise InputError(f"found no module lightgbm, which BoostedTrees needs. {how}") from error
    except OSError as error:
        if "libgomp" not in str(error):
            raise
        raise InputError(f"lightgbm cannot load: found {error}; expected libgomp.so.1. Run `apt-get install libgomp1`") from error


def _weighted(features: FloatArray, target: FloatArray, sample_weight: ArrayLike | None) -> tuple[FloatArray, ...]:
    """Rows that stand for something, and their weights (n,). Raises InputError where none does."""
    if sample_weight is None:
        return features, target, np.ones(len(target))
    weight = _check_sample_weight(sample_weight, features, dtype=np.float64, ensure_non_negative=True)
    kept = weight > 0
    if not kept.any():
        raise InputError("sample_weight: found 0 for every row; expected some rows to count")
    return features[kept], target[kept], weight[kept]


def _check_range(y: FloatArray, low: float, high: float, remedy: str) -> None:
    if y.min() < low or y.max() > high:
        raise InputError(f"found rewards from {y.min():.6g} to {y.max():.6g}; expected them in [{low:g}, {high:g}]. {remedy}")


def _fractional_logit(features: FloatArray, share: FloatArray, weight: FloatArray, c: float) -> tuple[FloatArray, float]:
    """Coefficients (d,) and intercept for shares (n,) in [0, 1]: each row is share of a 1 and the rest of a 0."""
    if share.min() == share.max() and share[0] in (0.0, 1.0):  # certain for every row, which only infinite log-odds predict
        return np.zeros(features.shape[1]), float(logit(share[0]))
    ones, zeros = share > 0, share < 1
    label = np.repeat((1, 0), (ones.sum(), zeros.sum()))
    each = np.concatenate(((weight * share)[ones], (weight * (1 - share))[zeros]))
    model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-8, max_iter=200)
    model.fit(np.concatenate((features[ones], features[zeros])), label, sample_weight=each)
    return model.coef_[0], float(model.intercept_[0])


def _platt(predicted: FloatArray, reward: FloatArray, weight: FloatArray) -> Calibration:
    _check_range(reward, 0.0, 1.0, "Use isotonic calibration for other rewards")
    wins, losses = float(weight @ reward), float(weight @ (1 - reward))
    target = reward * (wins + 1) / (wins + 2) + (1 - reward) / (losses + 2)
    x = log_odds(predicted)
    if x.min() == x.max():
        raise InputError(f"found the one prediction {predicted[0]:.6g} in all rows; expected several to tell apart")
    (slope,), intercept = _fractional_logit(x[:, None], target, weight, np.inf)
    if slope < 0:
        raise InputError(f"found rewards that fall as predictions rise (slope {slope:.3g}); expected a rise. Mend the model")
    knots = np.array((-LARGEST_LOGIT, LARGEST_LOGIT))
    return Calibration(knots, intercept + slope * knots, log_odds=True)


def _checked_pairs(predicted: ArrayLike, reward: ArrayLike, weight: ArrayLike | None) -> tuple[FloatArray, ...]:
    values = checked_finite("predicted", predicted, (None,), "One prediction per row.")
    target = checked_finite("reward", reward, (len(values),), "Leave out rows whose reward is not known yet.")
    weights = np.ones(len(values)) if weight is None else checked_finite("sample_weight", weight, (len(values),), "One per row.")
    if np.any(weights < 0):
        raise InputError(f"sample_weight: found {weights.min():.6g}; expected weights of at least 0")
    kept = weights > 0
    return values[kept], target[kept], weights[kept]
