"""Reward and propensity models, fitted on other rows than they predict: a model that saw a row's reward would explain its noise.

Models are scikit-learn estimators, cloned for every fold and never mutated. Cross-fitting: Chernozhukov et al. 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter

from ope.data import BoolArray, FloatArray, InputError, IntArray, LoggedData, assign_folds, checked_width

Design: TypeAlias = Literal["additive", "per_action"]

Fitted: TypeAlias = Callable[[FloatArray], FloatArray]
"""Features (m, d) -> predictions (m,)."""

Predict: TypeAlias = Callable[[LoggedData, Any], FloatArray]
"""A log and some of its rows (m,) -> predictions (m, k)."""

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
    most: int | None = None,
    progress: Callable[[], object] | None = None,
) -> FloatArray:
    """Predicted reward of every action in every row (n, k), each row by models that saw neither it nor its cluster.

    `splits`: other (train, test) rows than `folds` random ones; the test rows together must be every row once.
    `most`: fit on about that many rows of the log, drawn at random, where it has more.

    "additive" fits one model on context and action (one-hot, or `action_features` where the log has them), "per_action"
    one on the context for each action, or the mean reward where an action was never taken. `model`: any scikit-learn
    regressor, or classifier of the reward's values; by default `default_reward_model`. `progress` is called per split.
    """
    checked_width("q", data.action, k)
    drawn = None if most is None or data.n <= most else rows_to_fit(np.random.default_rng((seed, 2)), data.n, most / data.n)
    q = np.empty((data.n, k))
    for train, test in cross_splits(data, folds, seed) if splits is None else splits:
        q[test] = fit_rewards(data, k, train if drawn is None else train[drawn[train]], model, design=design)(data, test)
        if progress is not None:
            progress()
    return q


def rows_to_fit(rng: np.random.Generator, n: int, share: float) -> BoolArray:
    """Which of n rows models are fitted on, each with probability `share`. Parts of a log, one after the other, draw alike."""
    return rng.random(n) < share


def fit_rewards(data: LoggedData, k: int, train: IntArray, model: Any = None, *, design: Design = "additive") -> Predict:
    """The model of `cross_fit_reward`, fitted on the rows `train`: predicts rows of any log with the same columns (m, k)."""
    if design not in ("additive", "per_action"):
        raise InputError(f"found design {design!r}; expected 'additive' or 'per_action'")
    if design == "per_action":
        return _fit_per_action(data, k, default_reward_model() if model is None else model, train)
    features = _features(data, k, train, data.action[train])
    fitted = fit_reward(default_reward_model() if model is None else model, features, data.reward[train], _weights(data, train))
    if model is None and data.action_features is None:
        return partial(_predict_linear, fitted, k)
    return partial(_predict_additive, fitted, k)


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


def _predict_linear(fitted: Fitted, k: int, data: LoggedData, rows: Any) -> FloatArray:
    """`_predict_additive` of a linear model: what an action adds is the same in every context, so k + 1 rows tell it."""
    context = _context(data, rows)
    nothing = fitted(np.concatenate((context, np.zeros((len(context), k))), axis=1))
    actions = fitted(np.concatenate((np.zeros((k + 1, context.shape[1])), np.eye(k + 1, k)), axis=1))
    return nothing[:, None] + (actions[:-1] - actions[-1])[None]


def _predict_additive(fitted: Fitted, k: int, data: LoggedData, rows: Any) -> FloatArray:
    return np.stack([fitted(_features(data, k, rows, np.full(len(rows), action))) for action in range(k)], axis=1)


def _fit_per_action(data: LoggedData, k: int, model: Any, train: IntArray) -> Predict:
    overall = float(np.average(data.reward[train], weights=_weights(data, train)))
    by_action: list[Fitted] = []
    for action in range(k):
        rows = train[data.action[train] == action]
        if len(rows) == 0:
            by_action.append(lambda features: np.full(len(features), overall))
        else:
            by_action.append(fit_reward(model, _context(data, rows), data.reward[rows], _weights(data, rows)))
    return lambda other, rows: np.stack([fitted(_context(other, rows)) for fitted in by_action], axis=1)


def fit_reward(model: Any, features: FloatArray, reward: FloatArray, weight: FloatArray | None) -> Fitted:
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
