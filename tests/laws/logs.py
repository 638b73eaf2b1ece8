"""Logs that the law tests share: the four rows of the reference table, and random ones of any shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ope import LoggedData
from ope.accumulate import Candidate, rows_of
from ope.estimators import Rows


@dataclass(frozen=True)
class Case:
    """A log with everything that any estimator may ask for."""

    data: LoggedData
    target: np.ndarray
    q: np.ndarray
    baseline: np.ndarray

    def take(self, rows: Any) -> Case:
        return Case(self.data.take(rows), self.target[rows], self.q[rows], self.baseline[rows])

    def rows(self) -> Rows:
        return rows_of(self.data, Candidate("target", self.target, (), self.q), self.baseline, slice(0, self.data.n))


def two_actions(chosen: list[float]) -> np.ndarray:
    """Probabilities (n, 2) from those of action 0."""
    first = np.array(chosen)
    return np.stack((first, 1 - first), axis=1)


def tiny() -> Case:
    """The reference log: n = 4, two actions, action 0 logged in every row."""
    data = LoggedData(action=np.zeros(4, dtype=int), reward=np.array([1.0, 0, 1, 1]), propensity=np.array([0.5, 0.25, 0.5, 0.8]))
    q = np.array([[0.6, 0.35], [0.3, 0.55], [0.7, 0.45], [0.9, 0.29 / 0.6]])  # .483333 as printed: v = .65 exactly
    return Case(data, two_actions([0.8, 0.6, 0.2, 0.4]), q, two_actions([0.5, 0.25, 0.5, 0.8]))


def random_case(n: int, k: int, seed: int, *, shift: float = 0.0, **columns: Any) -> Case:
    """Rewards of standard deviation about 1 around `shift`; a model that is near but wrong; weights below about 30."""
    rng = np.random.default_rng(seed)
    propensities, target, baseline = (
        0.9 * rng.dirichlet(np.full(k, concentration), n) + 0.1 / k for concentration in (2.0, 1.0, 1.5)
    )
    action = (rng.random((n, 1)) > np.cumsum(propensities[:, :-1], axis=1)).sum(axis=1)
    means = rng.normal(size=(n, k))
    reward = shift + 0.6 * means[np.arange(n), action] + 0.8 * rng.normal(size=n)
    q = shift + 0.6 * means + 0.3 * rng.normal(size=(n, k)) + 0.2
    data = LoggedData(
        action=action, reward=reward, propensity=propensities[np.arange(n), action], propensities=propensities, **columns
    )
    return Case(data, target, q, baseline)
