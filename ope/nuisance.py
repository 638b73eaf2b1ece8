"""Reward and propensity models, fitted on other rows than they predict: a model that saw a row's reward would explain its noise.

Models are scikit-learn estimators, cloned for every fold and never mutated. Cross-fitting: Chernozhukov et al. 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter

from ope.data import FloatArray, InputError, IntArray, LoggedData, assign_folds, checked_width

Design: TypeAlias = Literal["additive", "per_action"]

Split: TypeAlias = tuple[IntArray, IntArray]
"""Rows to fit on, rows to predict."""


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
    splits: Sequence[Split] | None = None,
    progress: Callable[[], object] | None = None,
) -> FloatArray:
    """Predicted reward of every action in every row (n, k), each row by models that saw neither it nor its cluster.

    `splits`: other (train, test) rows than `folds` random ones; the test rows together must be every row once.

    "additive" fits one model on context and action (one-hot, or `action_features` where the log has them), "per_action"
    one on the context for each action, or the mean reward where an action was never taken. `model`: any scikit-learn
    regressor, or classifier of the reward's values; by default `default_reward_model`. `progress` is called per split.
    """
    predict = _predict_per_action if design == "per_action" else _predict_additive if model is not None else _predict_linear
    if design == "additive" and data.action_features is not None:
        predict = _predict_additive
    model = default_reward_model() if model is None else model
    checked_width("q", data.action, k)
    if design not in ("additive", "per_action"):
        raise InputError(f"found design {design!r}; expected 'additive' or 'per_action'")
    q = np.empty((data.n, k))
    for train, test in cross_splits(data, folds, seed) if splits is None else splits:
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
    for train, test in cross_splits(data, folds, seed):
        fitted = fit_model(model, _context(data, train), data.action[train], _weights(data, train))
        propensities[np.ix_(test, fitted.classes_)] = fitted.predict_proba(_context(data, test))
    return propensities


def cross_splits(data: LoggedData, folds: int, seed: int) -> list[Split]:
    """(train, test) row indices of each fold; clusters stay whole."""
    fold = assign_folds(data, folds, seed)
    return [(np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)) for held_out in range(folds)]


def _predict_linear(data: LoggedData, k: int, model: Any, train: Any, test: Any) -> FloatArray:
    """`_predict_additive` of a linear model: what an action adds is the same in every context, so k + 1 rows tell it."""
    fitted = fit_reward(model, _features(data, k, train, data.action[train]), data.reward[train], _weights(data, train))
    context = _context(data, test)
    nothing = fitted(np.concatenate((context, np.zeros((len(test), k))), axis=1))
    actions = fitted(np.concatenate((np.zeros((k + 1, context.shape[1])), np.eye(k + 1, k)), axis=1))
    return nothing[:, None] + (actions[:-1] - actions[-1])[None]


def _predict_additive(data: LoggedData, k: int, model: Any, train: Any, test: Any) -> FloatArray:
    fitted = fit_reward(model, _features(data, k, train, data.action[train]), data.reward[train], _weights(data, train))
    return np.stack([fitted(_features(data, k, test, np.full(len(test), action))) for action in range(k)], axis=1)


def _predict_per_action(data: LoggedData, k: int, model: Any, train: Any, test: Any) -> FloatArray:
    q = np.empty((len(test), k))
    overall = np.average(data.reward[train], weights=_weights(data, train))
    for action in range(k):
        rows = train[data.action[train] == action]
        if len(rows) == 0:
            q[:, action] = overall
        else:
            q[:, action] = fit_reward(model, _context(data, rows), data.reward[rows], _weights(data, rows))(_context(data, test))
    return q


def fit_reward(
    model: Any, features: FloatArray, reward: FloatArray, weight: FloatArray | None
) -> Callable[[FloatArray], FloatArray]:
    """The fitted prediction function; a constant where the rewards are."""
    if reward.min() == reward.max() or features.shape[1] == 0:
        constant = float(np.average(reward, weights=weight))
        return lambda features: np.full(len(features), constant)
    fitted = fit_model(model, features, reward, weight)
    if is_classifier(model):
        return lambda features: fitted.predict_proba(features) @ fitted.classes_
    return lambda features: fitted.predict(features)


def fit_model(model: Any, features: Any, target: Any, weight: Any = None) -> Any:
    """A fitted clone of any scikit-learn model. In a pipeline every step that can takes the weights (n,).

    Raises InputError if there are weights and the last step cannot take them.
    """
    fitted = clone(model)
    if weight is None:
        return fitted.fit(features, target)
    steps = dict(fitted.steps) if hasattr(fitted, "steps") else {"": fitted}
    weighted = [name for name, step in steps.items() if has_fit_parameter(step, "sample_weight")]
    last = list(steps)[-1]
    if last not in weighted:
        raise InputError(f"{type(steps[last]).__name__} takes no sample weights, but this log has them; choose another model")
    return fitted.fit(features, target, **{f"{name}__sample_weight" if name else "sample_weight": weight for name in weighted})


def _context(data: LoggedData, rows: Any) -> FloatArray:
    return np.empty((len(rows), 0)) if data.context is None else data.context[rows]


def _features(data: LoggedData, k: int, rows: Any, action: Any) -> FloatArray:
    if data.action_features is not None:
        return np.concatenate((_context(data, rows), data.action_features[rows, action]), axis=1)
    return np.concatenate((_context(data, rows), np.eye(k)[action]), axis=1)


def _weights(data: LoggedData, rows: Any) -> FloatArray | None:
    return None if data.sample_weight is None else data.sample_weight[rows]
