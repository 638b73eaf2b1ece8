"""The value of a softmax-linear policy on a log, with its gradient, as sums over rows. What `learners` maximises.

A pass over the rows gives their terms t, and the sum of their gradients, each times a slope of its own. An objective says what
the slopes are: the weights themselves for the mean, and for the lower bound what the first pass's terms make of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from bandits.scorers import Linear
from ope.data import BoolArray, FloatArray, IntArray, LoggedData

CHUNK = 2**10
"""Rows worked on at a time: their scores and gradients stay in the cache."""

SMALL = 100_000
"""Larger logs look for their start on a tenth of their rows."""

TRIED = 10_000
"""Rows of each ridge regression, at most about, whose leave-one-out errors choose its penalty."""

GAIN = 0.3
"""On such a log ascent ends with a step that gains less than this many standard errors of the value: the rest is its noise."""

SCALES = (0.0, 1.0, 4.0, 16.0, 64.0)
"""Multiples of the regression's weights to start from: uniform to almost greedy."""

PENALTIES = np.array((1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5))
"""Of the regression, in rows of standardised features."""


Objective: TypeAlias = Callable[[FloatArray, FloatArray, IntArray | None], tuple[float, FloatArray]]
"""(terms (n,), weights (n,) summing to 1, clusters (n,)) -> the value to maximise and its derivative by each term (n,)."""


def mean_value(terms: FloatArray, weight: FloatArray, cluster: IntArray | None) -> tuple[float, FloatArray]:
    """The weighted mean, whose derivatives are the weights."""
    return float(weight @ terms), weight


def lower_bound(z: float) -> Objective:
    """mean - z·stderr, where rows of one cluster count as one: stderr² = Σ_c (Σ_{i in c} w_i (t_i - mean))²."""

    def value(terms: FloatArray, weight: FloatArray, cluster: IntArray | None) -> tuple[float, FloatArray]:
        mean = float(weight @ terms)
        deviation = weight * (terms - mean)
        if cluster is not None:
            deviation = np.bincount(cluster, deviation).astype(np.float64, copy=False)
        stderr = float(np.sqrt(deviation @ deviation))
        if stderr == 0:
            return mean, weight
        each = deviation if cluster is None else deviation[cluster]
        return mean - z * stderr, weight * (1 - z / stderr * (each - weight @ each))

    return value


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A log, ready for learning: t = Σ_a π(a|x) q(x, a) + min(π(a_i|x)/p, clip)·e, with e = reward - q, or any payoff."""

    x: FloatArray
    """(n, d + 1) standardised context and a column of ones where actions are known by name, else (n, 0)"""
    action_features: FloatArray
    """(n, k, p) standardised; p may be 0"""
    eligible: BoolArray | None
    action: IntArray
    propensity: FloatArray
    payoff: FloatArray
    """e (n,)"""
    q: FloatArray | None
    weight: FloatArray
    """(n,) summing to 1"""
    total: float
    """Rows that all of these stand for: the sum of sample weights."""
    k: int
    clip: float = np.inf
    cluster: IntArray | None = None
    """(n,) numbered from 0"""

    @property
    def size(self) -> int:
        """Number of weights θ: (d + 1)·k of the context, or p of the action features."""
        return int(self.x.shape[1] * self.k + self.action_features.shape[2])

    def take(self, rows: slice) -> Problem:
        """The problem on some rows, their weights summing to 1 again."""
        weight = self.weight[rows]
        return Problem(
            self.x[rows], self.action_features[rows], None if self.eligible is None else self.eligible[rows], self.action[rows],
            self.propensity[rows], self.payoff[rows], None if self.q is None else self.q[rows], weight / weight.sum(),
            self.total * float(weight.sum()), self.k, self.clip, None if self.cluster is None else self.cluster[rows],
        )  # fmt: skip

    def terms(self, theta: FloatArray, slope: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
        """One pass over the rows: terms t (n,), and the gradient Σ slope_i ∂t_i (size,), 0 without slopes."""
        terms, gradient = np.empty(len(self.action)), np.zeros(self.size)
        for start in range(0, len(terms), CHUNK):
            part = slice(start, start + CHUNK)
            policy = self.policy(theta, part)
            rows, action = np.arange(policy.shape[1]), self.action[part]
            ratio = policy[action, rows] / self.propensity[part]
            kept = np.minimum(ratio, self.clip) * self.payoff[part]
            predicted = 0.0 if self.q is None else np.einsum("kn,kn->n", policy, self.q[part].T)
            terms[part] = kept + predicted
            if slope is not None:
                pull = np.where(ratio < self.clip, ratio, 0.0) * self.payoff[part]  # π·∂t/∂π of the logged action
                step = policy * ((0.0 if self.q is None else self.q[part].T) - (predicted + pull))
                step[action, rows] += pull
                gradient += self._pull_back(step * slope[part], part)
        return terms, gradient

    def stderr(self, theta: FloatArray) -> float:
        """Standard error of the mean of t."""
        terms = self.terms(theta)[0]
        return float(self.weight @ terms) - lower_bound(1.0)(terms, self.weight, self.cluster)[0]

    def policy(self, theta: FloatArray, part: slice) -> FloatArray:
        """π(·|x) of some rows, actions first (k, m): a sum over few actions is fast down columns and slow along rows."""
        if self.action_features.shape[2]:
            scores = np.ascontiguousarray((self.action_features[part] @ theta).T)
        else:
            scores = theta.reshape(-1, self.k).T @ self.x[part].T
        if self.eligible is not None:
            scores[~self.eligible[part].T] = -np.inf
        scores -= scores.max(axis=0)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=0)
        return scores

    def _pull_back(self, step: FloatArray, part: slice) -> FloatArray:
        """Gradient by θ from that by the scores of some rows (k, m)."""
        if self.action_features.shape[2]:
            return np.asarray(np.einsum("nkp,kn->p", self.action_features[part], step))
        return (self.x[part].T @ step.T).ravel()


def maximise(problem: Problem, objective: Objective, l2: float, direction: FloatArray, *, iterations: int) -> FloatArray:
    """Weights θ that maximise objective - l2/2·|θ|², by L-BFGS from the best multiple of `direction`, in at most `iterations`."""
    loss = _loss(problem, objective, l2)
    scout = loss if len(problem.action) <= SMALL else _loss(problem.take(slice(None, None, 10)), objective, l2)
    with threadpool_limits(1, "blas"):  # chunks are too small to share between threads
        start = min((scale * direction for scale in SCALES), key=lambda theta: scout(theta)[0])
        settings = {"maxiter": iterations} | ({} if scout is loss else {"ftol": GAIN * problem.stderr(start)})
        return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options=settings).x)


def regression_direction(problem: Problem, reward: FloatArray) -> FloatArray:
    """Where to start: a ridge regression of the reward (n,), less its mean, on the logged actions' features, as weights θ.

    One penalty for all actions, of the smallest leave-one-out error. Its best action is a good policy where the model is about
    right; what is maximised afterwards does not depend on it.
    """
    weight, centred = problem.weight * problem.total, reward - problem.weight @ reward
    with threadpool_limits(1, "blas"):
        if problem.action_features.shape[2]:
            fits = [_ridge(problem.action_features[np.arange(len(reward)), problem.action], centred, weight)]
        else:
            members = [np.flatnonzero(problem.action == action) for action in range(problem.k)]
            fits = [_ridge(problem.x[rows], centred[rows], weight[rows]) for rows in members]
    best = int(np.argmin(sum(error for _, error in fits)))
    return np.stack([weights[best] for weights, _ in fits], axis=-1).ravel()


def _ridge(features: FloatArray, target: FloatArray, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Weights (penalties, d) and leave-one-out squared error (penalties,) of ridge regressions, by one eigendecomposition."""
    weighted = features * weight[:, None]
    values, vectors = np.linalg.eigh(weighted.T @ features)
    inverse = 1 / (np.clip(values, 0.0, None)[None] + PENALTIES[:, None])  # (penalties, d)
    coefficients = inverse * (vectors.T @ (weighted.T @ target))
    stride = 1 + len(target) // TRIED
    some = slice(None, None, stride)
    rotated, mass = features[some] @ vectors, weight[some]
    leverage = mass[:, None] * ((rotated * rotated) @ inverse.T)  # (rows, penalties), of a row on its own prediction
    residual = (target[some, None] - rotated @ coefficients.T) / np.clip(1 - leverage, 1e-9, None)
    return coefficients @ vectors.T, stride * (mass @ (residual * residual))


def _loss(problem: Problem, objective: Objective, l2: float) -> Callable[[FloatArray], tuple[float, FloatArray]]:
    def loss(theta: FloatArray) -> tuple[float, FloatArray]:
        if objective is mean_value:  # its slopes are known before the terms: one pass is enough
            terms, gradient = problem.terms(theta, problem.weight)
            value = float(problem.weight @ terms)
        else:
            value, slope = objective(problem.terms(theta)[0], problem.weight, problem.cluster)
            _, gradient = problem.terms(theta, slope)
        return l2 / 2 * float(theta @ theta) - value, l2 * theta - gradient

    return loss


class Scaling(NamedTuple):
    """Mean and spread of features, so that one penalty fits all of them."""

    centre: FloatArray
    scale: FloatArray

    @classmethod
    def of(cls, features: FloatArray, weight: FloatArray) -> Scaling:
        """Of features (m, d) with weights (m,); what does not vary keeps its scale."""
        share = weight / weight.sum()
        centre = share @ features
        spread = np.sqrt(share @ (features - centre) ** 2)
        return cls(centre, np.where(spread > 1e-6 * (1 + np.abs(centre)), spread, 1.0))

    def apply(self, features: FloatArray, out: FloatArray) -> FloatArray:
        """(features - centre) / scale, written into `out`"""
        np.subtract(features, self.centre, out=out)
        return np.divide(out, self.scale, out=out)


def problem_of(
    data: LoggedData, k: int, payoff: FloatArray, q: FloatArray | None = None, clip: float = np.inf
) -> tuple[Problem, Callable[[FloatArray], Linear]]:
    """A log as a problem, and the way back from its weights θ to a scorer on features as they are."""
    weight = np.ones(data.n) if data.sample_weight is None else data.sample_weight
    eligible = None if data.eligible is None or data.eligible.all() else data.eligible
    if data.action_features is None:  # actions are known by name
        context = np.empty((data.n, 0)) if data.context is None else data.context
        scaling = Scaling.of(context, weight)
        x, features = np.ones((data.n, context.shape[1] + 1)), np.empty((data.n, k, 0))
        scaling.apply(context, out=x[:, :-1])
    else:
        p = data.action_features.shape[2]
        present = np.ones((data.n, k)) if eligible is None else eligible  # padding may be anything, and weighs nothing
        scaling = Scaling.of(data.action_features.reshape(-1, p), (weight[:, None] * present).ravel())
        x, features = np.empty((data.n, 0)), scaling.apply(data.action_features, out=np.empty(data.action_features.shape))

    def scorer(theta: FloatArray) -> Linear:
        if data.action_features is not None:
            on_actions = theta / scaling.scale
            return Linear(np.array([-scaling.centre @ on_actions]), np.empty((0, 0)), on_actions)
        weights = theta.reshape(-1, k)
        on_context = weights[:-1] / scaling.scale[:, None]
        return Linear(weights[-1] - scaling.centre @ on_context, on_context, np.empty(0))

    total, cluster = float(weight.sum()), None if data.cluster is None else np.unique(data.cluster, return_inverse=True)[1]
    share = weight / total
    return Problem(x, features, eligible, data.action, data.propensity, payoff, q, share, total, k, clip, cluster), scorer
