"""Logs with known truth, for tests, examples and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ope.data import FloatArray, IntArray, LoggedData


def softmax(scores: FloatArray) -> FloatArray:
    """Probabilities proportional to exp(scores), over the last axis."""
    weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(weight / weight.sum(axis=-1, keepdims=True))


def sample_actions(propensities: FloatArray, rng: np.random.Generator) -> IntArray:
    """One action per row of probabilities (n, k) -> (n,)."""
    edges = np.cumsum(propensities[:, :-1], axis=1)
    return np.asarray((rng.random((len(propensities), 1)) > edges).sum(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """Contexts from N(0, I_d); action a earns 1 with probability sigmoid(x·B_a + b_a), else 0."""

    coefficient: FloatArray
    """B (d, k)"""
    bias: FloatArray
    """b (k,)"""

    @classmethod
    def random(cls, d: int, k: int, seed: int, *, bias: float = 0.0, bias_spread: float = 0.0) -> World:
        """Standard normal coefficients; biases from N(bias, bias_spread²)."""
        rng = np.random.default_rng(seed)
        return cls(rng.normal(size=(d, k)), bias + bias_spread * rng.normal(size=k))

    def contexts(self, n: int, rng: np.random.Generator) -> FloatArray:
        """Contexts (n, d)."""
        return rng.normal(size=(n, len(self.coefficient)))

    def q(self, context: FloatArray) -> FloatArray:
        """True expected reward of every action: (n, d) -> (n, k)."""
        return np.asarray(1 / (1 + np.exp(-(context @ self.coefficient + self.bias))))

    def log(
        self, context: FloatArray, propensities: FloatArray, rng: np.random.Generator, *, cluster: NDArray[Any] | None = None
    ) -> LoggedData:
        """What a policy with these probabilities (n, k) would have logged in these contexts (n, d)."""
        rows, action = np.arange(len(context)), sample_actions(propensities, rng)
        reward = rng.random(len(context)) < self.q(context)[rows, action]
        return LoggedData(
            action=action, reward=reward.astype(np.float64), propensity=propensities[rows, action], context=context, cluster=cluster
        )

    def value(self, policy: Callable[[FloatArray], FloatArray], *, n: int = 200_000, seed: int = 0) -> float:
        """True value of a policy, a function from contexts (n, d) to probabilities (n, k), on `n` fresh contexts."""
        context = self.contexts(n, np.random.default_rng(seed))
        return float((policy(context) * self.q(context)).sum(axis=1).mean())
