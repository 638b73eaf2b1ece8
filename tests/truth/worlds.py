"""A world of finitely many contexts, in which every expectation is a finite sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ope import LoggedData
from ope.simulate import sample_actions, softmax


@dataclass(frozen=True)
class FiniteWorld:
    """Equally likely contexts; every array (contexts, actions)."""

    q: np.ndarray
    """True probability of a reward of 1."""
    logging: np.ndarray
    target: np.ndarray
    baseline: np.ndarray
    model: np.ndarray
    """A reward model, given and wrong."""

    @classmethod
    def random(cls, contexts: int, k: int, seed: int) -> FiniteWorld:
        """Every action is logged with at least probability .1, so that no weight exceeds 10."""
        rng = np.random.default_rng(seed)
        score = rng.normal(size=(contexts, k))
        q = 1 / (1 + np.exp(-score))
        logging = 0.1 + (1 - 0.1 * k) * softmax(-score)
        model = np.clip(q + 0.25 * rng.normal(size=(contexts, k)) + 0.1, 0, 1)
        return cls(q, logging, softmax(3 * score), softmax(score), model)

    @property
    def weight(self) -> np.ndarray:
        return self.target / self.logging

    def value(self, policy: np.ndarray) -> float:
        """Σ_a π(a|x) q(x, a), averaged over contexts."""
        return float((policy * self.q).sum(axis=1).mean())

    def expectation_of_dr(self, weight: np.ndarray) -> float:
        """Exact E[Σ_a π q̂ + f (r - q̂)] for transformed weights f; zeros are the model alone."""
        return float((self.target * self.model + self.logging * weight * (self.q - self.model)).sum(axis=1).mean())

    def expectation_of_ips(self, weight: np.ndarray) -> float:
        """Exact E[f r] for transformed weights f."""
        return float((self.logging * weight * self.q).sum(axis=1).mean())

    def log(self, n: int, rng: np.random.Generator) -> tuple[LoggedData, np.ndarray]:
        """A log of n rows, and the context of each."""
        context = rng.integers(0, len(self.q), n)
        action = sample_actions(self.logging[context], rng)
        reward = (rng.random(n) < self.q[context, action]).astype(float)
        return LoggedData(action=action, reward=reward, propensity=self.logging[context, action]), context


def covered(low: np.ndarray, high: np.ndarray, truth: float) -> float:
    """Share of intervals that hold the truth."""
    return float(np.mean((low <= truth) & (truth <= high)))
