"""The value of a softmax-linear policy on a log, with its gradient, as sums over rows. What `learners` maximises.

One pass sums per-row terms t, their squares, and their gradients; every objective is a smooth function of these sums, so one
pass serves the plain mean and the lower bound alike.
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


class Sums(NamedTuple):
    """Weighted means over rows of t, t², ∂t and t·∂t."""

    mean: float
    square: float
    gradient: FloatArray
    square_gradient: FloatArray


Objective: TypeAlias = Callable[[float, float], tuple[float, float, float]]
"""(mean t, mean t²) -> the value to maximise and its derivatives by either."""


def mean_value(mean: float, square: float) -> tuple[float, float, float]:
    """The mean itself."""
    return mean, 1.0, 0.0


def lower_bound(z: float, n: float) -> Objective:
    """mean - z·stderr, the spread taken from the same sums; `n` effective rows."""

    def value(mean: float, square: float) -> tuple[float, float, float]:
        variance = (square - mean * mean) / n
        if variance <= 0:
            return mean, 1.0, 0.0
        stderr = variance**0.5
        return mean - z * stderr, 1.0 + z * mean / (n * stderr), -z / (2 * n * stderr)

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
            self.total * float(weight.sum()), self.k, self.clip,
        )  # fmt: skip

    def sums(self, theta: FloatArray, *, squares: bool) -> Sums:
        """One pass over the rows. Without `squares` the terms of the lower bound are left at 0."""
        mean = square = 0.0
        gradient, square_gradient = np.zeros(self.size), np.zeros(self.size)
        for start in range(0, len(self.action), CHUNK):
            part = slice(start, start + CHUNK)
            policy = self.policy(theta, part)
            rows, action, weight = np.arange(policy.shape[1]), self.action[part], self.weight[part]
            ratio = policy[action, rows] / self.propensity[part]
            terms = np.minimum(ratio, self.clip) * self.payoff[part]
            pull = np.where(ratio < self.clip, ratio, 0.0) * self.payoff[part]  # π·∂t/∂π of the logged action
            if self.q is None:
                step = policy * -pull
            else:
                q = self.q[part].T
                v = np.einsum("kn,kn->n", policy, q)
                terms = terms + v
                step = policy * (q - (v + pull))
            step[action, rows] += pull
            mean += float(weight @ terms)
            gradient += self._pull_back(step * weight, part)
            if squares:
                square += float(weight @ (terms * terms))
                square_gradient += self._pull_back(step * (weight * terms), part)
        return Sums(mean, square, gradient, square_gradient)

    def stderr(self, theta: FloatArray) -> float:
        """Standard error of the value, rows taken as independent."""
        sums = self.sums(theta, squares=True)
        return float(np.sqrt(max(sums.square - sums.mean**2, 0.0) / self.total))

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
        sums = problem.sums(theta, squares=objective is not mean_value)
        value, by_mean, by_square = objective(sums.mean, sums.square)
        gradient = by_mean * sums.gradient + 2 * by_square * sums.square_gradient
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

    total = float(weight.sum())
    return Problem(x, features, eligible, data.action, data.propensity, payoff, q, weight / total, total, k, clip), scorer
