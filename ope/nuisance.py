"""Reward and propensity models, fitted on other rows than they predict: a model that saw a row's reward would explain its noise.

Models are scikit-learn estimators, cloned for every fold and never mutated. Cross-fitting: Chernozhukov et al. 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter

from ope.data import FloatArray, InputError, LoggedData, assign_folds

Design = Literal["additive", "per_action"]


def default_reward_model() -> Any:
    """Ridge on scaled features, its penalty chosen by leave-one-out error: where rewards are rare it predicts their mean."""
    return make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(0, 7, 15)))


def cross_fit_reward(
    data: LoggedData,
    k: int,
    model: Any = None,
    *,
    design: Design = "additive",
    folds: int = 3,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> FloatArray:
    """Predicted reward of every action in every row (n, k), each row by models that saw neither it nor its cluster.

    "additive" fits one model on context and action (one-hot, or `action_features` where the log has them), "per_action"
    one on the context for each action, or the mean reward where an action was never taken. `model`: any scikit-learn
    regressor, or classifier of the reward's values; by default `default_reward_model`. `progress` is called per fold.
    """
    model = default_reward_model() if model is None else model
    predict = _predict_additive if design == "additive" else _predict_per_action
    if design not in ("additive", "per_action"):
        raise InputError(f"found design {design!r}; expected 'additive' or 'per_action'")
    q = np.empty((data.n, k))
    for train, test in _splits(data, folds, seed):
        q[test] = predict(data, k, model, train, test)
        if progress is not None:
            progress()
    return q


def cross_fit_propensity(data: LoggedData, k: int, model: Any = None, *, folds: int = 3, seed: int = 0) -> FloatArray:
    """Estimated propensities of every action in every row (n, k), by a classifier of the action on the context.

    Estimates stand in for what should have been logged: build the LoggedData with `propensity_estimated=True`, and every
    verdict is at most `caution`. Actions that a training fold never saw get probability 0.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)) if model is None else model
    propensities = np.zeros((data.n, k))
    for train, test in _splits(data, folds, seed):
        fitted = _fit(model, _context(data, train), data.action[train], _weights(data, train))
        propensities[np.ix_(test, fitted.classes_)] = fitted.predict_proba(_context(data, test))
    return propensities


def _splits(data: LoggedData, folds: int, seed: int) -> Iterator[tuple[Any, Any]]:
    fold = assign_folds(data, folds, seed)
    for held_out in range(folds):
        yield np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)


def _predict_additive(data: LoggedData, k: int, model: Any, train: Any, test: Any) -> FloatArray:
    fitted = _fit_reward(model, _features(data, k, train, data.action[train]), data.reward[train], _weights(data, train))
    return np.stack([fitted(_features(data, k, test, np.full(len(test), action))) for action in range(k)], axis=1)


def _predict_per_action(data: LoggedData, k: int, model: Any, train: Any, test: Any) -> FloatArray:
    q = np.empty((len(test), k))
    overall = np.average(data.reward[train], weights=_weights(data, train))
    for action in range(k):
        rows = train[data.action[train] == action]
        if len(rows) == 0:
            q[:, action] = overall
        else:
            q[:, action] = _fit_reward(model, _context(data, rows), data.reward[rows], _weights(data, rows))(_context(data, test))
    return q


def _fit_reward(
    model: Any, features: FloatArray, reward: FloatArray, weight: FloatArray | None
) -> Callable[[FloatArray], FloatArray]:
    """The fitted prediction function; a constant where the rewards are."""
    if reward.min() == reward.max() or features.shape[1] == 0:
        constant = float(np.average(reward, weights=weight))
        return lambda features: np.full(len(features), constant)
    fitted = _fit(model, features, reward, weight)
    if is_classifier(model):
        return lambda features: fitted.predict_proba(features) @ fitted.classes_
    return lambda features: fitted.predict(features)


def _fit(model: Any, features: FloatArray, target: Any, weight: FloatArray | None) -> Any:
    fitted = clone(model)
    if weight is None:
        return fitted.fit(features, target)
    if hasattr(fitted, "steps"):
        return fitted.fit(features, target, **{f"{fitted.steps[-1][0]}__sample_weight": weight})
    if not has_fit_parameter(fitted, "sample_weight"):
        raise InputError(f"{type(fitted).__name__} takes no sample weights, but this log has them; choose another model")
    return fitted.fit(features, target, sample_weight=weight)


def _context(data: LoggedData, rows: Any) -> FloatArray:
    return np.empty((len(rows), 0)) if data.context is None else data.context[rows]


def _features(data: LoggedData, k: int, rows: Any, action: Any) -> FloatArray:
    if data.action_features is not None:
        return np.concatenate((_context(data, rows), data.action_features[rows, action]), axis=1)
    return np.concatenate((_context(data, rows), np.eye(k)[action]), axis=1)


def _weights(data: LoggedData, rows: Any) -> FloatArray | None:
    return None if data.sample_weight is None else data.sample_weight[rows]
