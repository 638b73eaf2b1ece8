"""Logs that learners learn from in the tests, and the list of all learners."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bandits.batch import DecisionBatch
from bandits.learners import (
    LEARNERS,
    label,
)
from ope import LoggedData
from ope.simulate import World, sample_actions, softmax

D = 4
every_learner = pytest.mark.parametrize("learner", LEARNERS, ids=label)


def logging_policy(world: World, context: np.ndarray) -> np.ndarray:
    """Softmax of half of the true scores: better than uniform, and every action is taken."""
    return softmax(0.5 * (context @ world.coefficient + world.bias))


def simulated(n: int = 1000, k: int = 4, seed: int = 1, **columns: Any) -> LoggedData:
    world, rng = World.random(D, k, seed), np.random.default_rng(seed + 100)
    context = world.contexts(n, rng)
    return replace(world.log(context, logging_policy(world, context), rng), **columns)


def requests(n: int = 2000, k: int = 4, seed: int = 5) -> DecisionBatch:
    return DecisionBatch.of(np.random.default_rng(seed).normal(size=(n, D)), np.ones((n, k), dtype=bool))


def masks(n: int, k: int, seed: int) -> np.ndarray:
    """Each action eligible three times in four, at least one in every row."""
    rng = np.random.default_rng(seed)
    eligible = rng.random((n, k)) < 0.75
    eligible[np.arange(n), rng.integers(0, k, n)] = True
    return eligible


def masked_log(n: int = 1000, k: int = 4, seed: int = 1) -> LoggedData:
    """Named actions, some of which could not have been taken."""
    world, rng, eligible = World.random(D, k, seed), np.random.default_rng(seed + 200), masks(n, k, seed)
    context = world.contexts(n, rng)
    p = np.where(eligible, logging_policy(world, context), 0.0)
    return replace(world.log(context, p / p.sum(axis=1, keepdims=True), rng), eligible=eligible)


TASTE = np.array([1.0, -1.0, 0.5])


def ragged_log(n: int = 1500, k: int = 5, seed: int = 1) -> tuple[LoggedData, np.ndarray, np.ndarray]:
    """Actions that have features instead of names, one to five a row; the logging policy's vectors; true expected rewards."""
    rng = np.random.default_rng(seed + 300)
    eligible = np.arange(k) < rng.integers(1, k + 1, n)[:, None]
    features = np.where(eligible[..., None], rng.normal(size=(n, k, 3)), 0.0)
    p = softmax(np.where(eligible, 0.5 * features @ TASTE, -np.inf))
    q = 1 / (1 + np.exp(-features @ TASTE))
    action, rows = sample_actions(p, rng), np.arange(n)
    reward = (rng.random(n) < q[rows, action]).astype(float)
    data = LoggedData(action=action, reward=reward, propensity=p[rows, action], eligible=eligible, action_features=features)
    return data, p, q


def is_distribution(vectors: np.ndarray, eligible: np.ndarray) -> bool:
    return bool((vectors >= 0).all() and np.abs(vectors.sum(axis=1) - 1).max() < 1e-12 and not vectors[~eligible].any())
