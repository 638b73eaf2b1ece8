"""A world in which the better action is a matter of the sign of x1·x2, and logs of it with whole vectors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bandits.batch import DecisionBatch
from bandits.policy import Policy
from ope.data import FloatArray, LoggedData
from ope.simulate import World, softmax

BEST = 0.8
"""What the best policy earns; any constant one, and so uniform actions: 0.5."""

LINEAR = 0.575
"""What the best half plane earns: x1 + x2 > √2·Φ⁻¹(¾), 0.5 + 0.3·2·∫(4u - 3)du from ¾ to 1."""


class Crossed(World):
    """Action 0 earns 1 with probability 0.8 where x1·x2 > 0, else 0.2; action 1 the other way round. N(0, 1) contexts."""

    def q(self, context: FloatArray) -> FloatArray:
        same = context[:, 0] * context[:, 1] > 0
        return np.stack((np.where(same, 0.8, 0.2), np.where(same, 0.2, 0.8)), axis=1)


WORLD = Crossed(np.zeros((2, 2)), np.zeros(2))


def logged(n: int, seed: int) -> LoggedData:
    """By a softmax of straight lines, with a floor of a tenth each."""
    rng = np.random.default_rng(seed)
    context = WORLD.contexts(n, rng)
    vectors = 0.8 * softmax(context @ np.array([[0.8, -0.2], [0.0, 0.5]]) + np.array([0.4, 0.0])) + 0.1
    return replace(WORLD.log(context, vectors, rng), propensities=vectors)


def batch_of(context: FloatArray) -> DecisionBatch:
    return DecisionBatch.of(context, np.ones((len(context), 2), dtype=bool))


def true_value(policy: Policy) -> float:
    """On 100,000 fresh contexts: a standard error of at most 0.001."""
    return WORLD.value(lambda context: policy.propensities(batch_of(context)), n=100_000, seed=9)
