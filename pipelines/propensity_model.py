"""A classifier of logged actions whose probabilities can be divided by: calibrated on rows that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ope.data import FloatArray, InputError, IntArray
from ope.nuisance import Split, fit_model

FOLDS = 3
"""Parts of the log, each predicted by a model of the others; and parts of those others on which the model is calibrated."""


def propensity_model(rows: int) -> CalibratedPool:
    """The default for a log of `rows` rows: logistic regression, for smooth policies, with boosted trees, for rules.

    Mean log(p / estimate) of logged actions, at 4,000 rows and four actions, of a softmax policy and of a rule with ε = 0.2: this
    0.004 and 0.004; the trees with temperature scaling 0.049 and 0.023, with sigmoid scaling 0.081 and 0.029; the regression 0.003
    and 0.27.
    """
    trees = HistGradientBoostingClassifier(
        max_iter=50 if rows <= 20_000 else 100, max_leaf_nodes=8, l2_regularization=10.0, early_stopping=False, random_state=0
    )
    return CalibratedPool([make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), trees])


class CalibratedPool(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Several classifiers as one whose probabilities are calibrated: p = (1 - ε) softmax(Σ_j b_j log p_j) + ε / k.

    b_j >= 0 and 0 <= ε <= 1 maximise the likelihood of rows that the classifiers were not fitted on; then all are fitted on every
    row. With one classifier and ε = 0 this is temperature scaling (Guo et al. 2017); several pool their logarithms (Genest &
    Zidek 1986); ε is the floor that an ε-greedy policy has. No probability is 0 unless a classifier says so and ε is 0.
    """

    def __init__(self, estimators: Sequence[Any], folds: int = FOLDS, seed: int = 0):
        self.estimators, self.folds, self.seed = estimators, folds, seed

    def fit(self, features: FloatArray, y: IntArray, sample_weight: FloatArray | None = None, groups: Any = None) -> CalibratedPool:
        """Fit on features (n, d) and classes (n,); rows of one group are not used to calibrate each other's model."""
        self.classes_, code = np.unique(y, return_inverse=True)
        logs = np.empty((len(self.estimators), len(y), len(self.classes_)))
        for train, test in folds_of(code, groups, self.folds, self.seed):
            for j, one in enumerate(self.estimators):
                weight = None if sample_weight is None else sample_weight[train]
                logs[j, test] = self._logs(fit_model(one, features[train], y[train], weight), features[test])
        self.powers_, self.floor_ = _pooled(logs, code, np.ones(len(y)) if sample_weight is None else sample_weight)
        self.fitted_ = [fit_model(one, features, y, sample_weight) for one in self.estimators]
        return self

    def predict_proba(self, features: FloatArray) -> FloatArray:
        """Probabilities (n, k) of `classes_`."""
        pooled = np.exp(
            log_softmax(sum(b * self._logs(one, features) for b, one in zip(self.powers_, self.fitted_, strict=True)), axis=1)
        )
        return np.asarray((1 - self.floor_) * pooled + self.floor_ / len(self.classes_))

    def predict(self, features: FloatArray) -> NDArray[Any]:
        """The likeliest class of each row (n,)."""
        return np.asarray(self.classes_[self.predict_proba(features).argmax(axis=1)])

    def _logs(self, fitted: Any, features: FloatArray) -> FloatArray:
        probability = np.zeros((len(features), len(self.classes_)))
        probability[:, np.searchsorted(self.classes_, fitted.classes_)] = fitted.predict_proba(features)
        return np.log(np.maximum(probability, 1e-12))


def _pooled(logs: FloatArray, code: IntArray, weight: FloatArray) -> tuple[FloatArray, float]:
    """Powers (m,) and floor of the likeliest pool of log-probabilities (m, n, k) for classes (n,), rows weighted (n,)."""
    models, n, k = logs.shape
    rows, share = np.arange(n), weight / weight.sum()
    taken = logs[:, rows, code]

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        powers, floor = parameters[:-1], parameters[-1]
        pooled = np.exp(log_softmax(np.tensordot(powers, logs, 1), axis=1))
        own = pooled[rows, code]
        mixed = (1 - floor) * own + floor / k
        slope = (1 - floor) * own * (taken - (pooled * logs).sum(axis=2)) / mixed
        gradient = np.append(-(slope @ share), -(((1 / k - own) / mixed) @ share))
        return -float(np.log(mixed) @ share), gradient

    start, bounds = np.append(np.full(models, 1 / models), 0.01), [(0.0, 5.0)] * models + [(0.0, 1.0)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return found[:-1], float(found[-1])


def folds_of(action: IntArray, cluster: NDArray[Any] | None, folds: int, seed: int) -> list[Split]:
    """Random (train, test) rows: every action spread evenly over the folds, or, with clusters (n,), every cluster whole.

    Raises InputError where there are fewer clusters than folds, or fewer than two folds.
    """
    if folds < 2:
        raise InputError(f"found folds={folds}; expected at least 2: no row may be predicted by a model that saw it")
    if cluster is None:
        return list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(action, action))
    if len(np.unique(cluster)) < folds:
        raise InputError(
            f"found {len(np.unique(cluster))} clusters; expected at least {folds}, one for each fold: log more of them"
        )
    return list(GroupKFold(folds, shuffle=True, random_state=seed).split(action, groups=cluster))
