"""From a log to a scorer: the reward regressed on context and action by any oracle.

`None` is this house's ridge regression, its penalty chosen by leave-one-out error. `BoostedTrees` see all actions as one matrix.
Any other scikit-learn regressor, or classifier of the reward's values, sees the context, one clone for each named action, or
the action features, one for all actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from scipy.special import expit
from sklearn.base import clone

from bandits.batch import DecisionBatch
from bandits.oracles import BoostedTrees, fit_calibration
from bandits.scorers import Calibrated, Linear, Scorer, Trees, log_odds
from bandits.softmax_linear import problem_of, regression_direction
from ope.data import FloatArray, InputError, IntArray, LoggedData, assign_folds
from ope.nuisance import fit_reward

Predict = Callable[[FloatArray], FloatArray]

Link = Literal["identity", "logistic"]

LINKS: tuple[Link, ...] = ("identity", "logistic")

PROBED = 1000
"""Rows, at most, on which a model must be a straight line to be carried as one."""


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """Models as they are, one for each named action or one for all. Such a policy decides here, but has no form to carry."""

    models: tuple[Predict, ...]
    kind: ClassVar[str] = "fitted"

    def scores(self, batch: DecisionBatch) -> FloatArray:
        """Scores (n, k). Raises InputError where the batch has another number of actions than there are models."""
        n, k = batch.eligible.shape
        if batch.action_features.shape[2]:
            return self.models[0](batch.action_features.reshape(n * k, -1)).reshape(n, k)
        if len(self.models) != k:
            raise InputError(f"found {k} actions; expected {len(self.models)}, those that models were fitted for")
        return np.stack([model(batch.context) for model in self.models], axis=1)


def fit_scorer(
    oracle: Any,
    data: LoggedData,
    k: int,
    *,
    calibration: Literal["isotonic", "platt"] | None = None,
    folds: int = 3,
    seed: int = 0,
) -> Scorer:
    """Predicted rewards of k actions. With `calibration`, mapped to mean rewards by predictions for rows that no model had seen.

    Models that are linear, as they are or through the logistic function, come back as `Linear` arrays, whatever made them.
    """
    if oracle is None:
        scorer: Scorer = _ridge(data, k)
    else:
        scorer = _trees(oracle, data, k) if isinstance(oracle, BoostedTrees) else _any(oracle, data, k)
    if calibration is None:
        return scorer
    logged = cross_fitted(oracle, data, k, folds, seed)[np.arange(data.n), data.action]
    return Calibrated(scorer, fit_calibration(logged, data.reward, calibration, data.sample_weight))


def cross_fitted(oracle: Any, data: LoggedData, k: int, folds: int, seed: int) -> FloatArray:
    """Predicted reward of every action (n, k), each row by models that saw neither it nor its cluster."""
    fold = assign_folds(data, folds, seed)
    batch, q = DecisionBatch.of_log(data, k), np.empty((data.n, k))
    for held_out in range(folds):
        train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        rows = DecisionBatch(batch.context[test], batch.action_features[test], batch.eligible[test], batch.full)
        q[test] = fit_scorer(oracle, data.take(train), k).scores(rows)
    return q


def logged_features(batch: DecisionBatch, data: LoggedData) -> FloatArray:
    """What trees see of the logged actions: (action index, context, action features) (n, 1 + d + p)."""
    taken = batch.action_features[np.arange(data.n), data.action]
    return np.concatenate((data.action[:, None].astype(np.float64), batch.context, taken), axis=1)


def _ridge(data: LoggedData, k: int) -> Linear:
    problem, scorer = problem_of(data, k, data.reward)
    linear = scorer(regression_direction(problem, data.reward))
    return replace(linear, bias=linear.bias + np.average(data.reward, weights=data.sample_weight))


def _trees(oracle: BoostedTrees, data: LoggedData, k: int) -> Trees:
    """A named action's index is a category; a position in a request's own set is a number like any other."""
    logged = logged_features(DecisionBatch.of_log(data, k), data)
    named = {0} if data.action_features is None else set()
    tuned = clone(oracle).set_params(categorical=tuple(sorted(named | set(oracle.categorical))))
    fitted: Any = tuned.fit(logged, data.reward, sample_weight=data.sample_weight)
    return Trees(fitted.model_text_)


def _any(oracle: Any, data: LoggedData, k: int) -> Linear | Fitted:
    if not hasattr(oracle, "fit"):
        raise InputError(f"found a {type(oracle).__name__}; expected a scikit-learn estimator, or None for ridge regression")
    featured = data.action_features is not None
    if data.action_features is not None:
        seen = data.action_features[np.arange(data.n), data.action]
        members: list[IntArray] = [np.arange(data.n)]
    else:
        seen = np.empty((data.n, 0)) if data.context is None else data.context
        members = [np.flatnonzero(data.action == action) for action in range(k)]
    overall = float(np.average(data.reward, weights=data.sample_weight))
    models = [_model(oracle, data, seen, rows, overall) for rows in members]
    for link in LINKS:
        lines = _lines(models, seen, members, link)
        if lines is not None:
            bias, weights = lines
            if featured:
                return Linear(bias, np.empty((0, 0)), weights[0], link)
            return Linear(bias, weights.T, np.empty(0), link)
    return Fitted(tuple(models))


def _model(oracle: Any, data: LoggedData, seen: FloatArray, rows: Any, overall: float) -> Predict:
    if len(rows) == 0:  # an action that was never taken is as good as the average
        return lambda features: np.full(len(features), overall)
    return fit_reward(oracle, seen[rows], data.reward[rows], None if data.sample_weight is None else data.sample_weight[rows])


def _lines(
    models: Sequence[Predict], seen: FloatArray, members: Sequence[IntArray], link: Link
) -> tuple[FloatArray, FloatArray] | None:
    """Intercepts (m,) and slopes (m, d) of models that are straight lines (of log-odds) wherever the log has been, else None.

    A line is known from its values at the centre of the rows that a model was fitted on, and a little away from it along each
    feature; near there log-odds are far from where float64 cannot tell a probability from 1.
    """
    rows, d = seen[:: 1 + len(seen) // PROBED], seen.shape[1]
    bias, weights = np.empty(len(models)), np.empty((len(models), d))
    for index, (model, own) in enumerate(zip(models, members, strict=True)):
        near = seen[own] if len(own) else seen
        centre, spread = near.mean(axis=0), np.where(near.std(axis=0) > 0, near.std(axis=0), 1.0)
        probes, value = np.concatenate((centre[None], centre + np.diag(spread))), model(rows)
        known = model(probes)
        if link == "logistic":
            if not all(((each >= 0) & (each <= 1)).all() for each in (value, known)):
                return None
            known = log_odds(known)
        slope = (known[1:] - known[0]) / spread
        line = known[0] + (rows - centre) @ slope
        if link == "logistic":
            line = expit(line)
        if np.abs(line - value).max() > 1e-7 * (1e-2 + np.ptp(value)):
            return None
        bias[index], weights[index] = known[0] - centre @ slope, slope
    return bias, weights
