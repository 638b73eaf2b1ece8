"""A day of a right logger, and of some that are wrong each in its own way, of ad-load's shape: 5 actions, 16 features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ope.data import BoolArray, FloatArray, IntArray
from ope.draws import Draws
from ope.simulate import sample_actions, softmax

ACTIONS, FEATURES, FLOOR, CAP = 5, 16, 0.02, 0.8

NAMES, COLUMNS = tuple("abcde"), tuple(f"x{i}" for i in range(FEATURES))

Day = tuple[IntArray, FloatArray, FloatArray, BoolArray]
"""Action, the vector logged, context, and which rows arrived."""


def policy(context: FloatArray) -> FloatArray:
    """A softmax of some features, one action preferred, with a floor."""
    coefficient = np.random.default_rng(0).normal(size=(FEATURES, ACTIONS)) * (np.arange(FEATURES) < 4)[:, None]
    scores = 1.2 * context @ coefficient + np.array([0.8, 0.0, -0.3, 0.0, -0.5])
    return (1 - FLOOR) * softmax(scores) + FLOOR / ACTIONS


def right(n: int, rng: np.random.Generator) -> Day:
    """What was drawn from is what is logged."""
    context = rng.normal(size=(n, FEATURES))
    vectors = policy(context)
    return sample_actions(vectors, rng), vectors, context, np.ones(n, dtype=bool)


def before_the_cap(n: int, rng: np.random.Generator) -> Day:
    """The sampler caps probabilities and shares the rest out to the others; the log has those before the cap."""
    _, vectors, context, arrived = right(n, rng)
    high = vectors > CAP
    left = np.where(high, 0.0, vectors)
    capped = np.where(high, CAP, left * ((1 - CAP * high.sum(axis=1)) / left.sum(axis=1))[:, None])
    return sample_actions(np.where(high.any(axis=1, keepdims=True), capped, vectors), rng), vectors, context, arrived


def fallback_as_sampled(n: int, rng: np.random.Generator) -> Day:
    """On 3 % of the rows the default action is taken, whatever the vector says that is logged."""
    action, vectors, context, arrived = right(n, rng)
    return np.where(rng.random(n) < 0.03, 0, action), vectors, context, arrived


def greedy_fallback(n: int, rng: np.random.Generator, share: float = 0.03) -> Day:
    """On 3 % of the rows the most probable action of the row's own vector is taken, and logged as sampled."""
    action, vectors, context, arrived = right(n, rng)
    return np.where(rng.random(n) < share, vectors.argmax(axis=1), action), vectors, context, arrived


def rows_lost(n: int, rng: np.random.Generator) -> Day:
    """5 % of the rows never arrive: as many as it takes of those with action d where x0 is high."""
    action, vectors, context, arrived = right(n, rng)
    suspects = np.flatnonzero(action == 3)
    highest = suspects[np.argsort(-context[suspects, 0])]
    arrived[highest[: n // 20]] = False
    return action, vectors, context, arrived


def rows_lost_evenly(n: int, rng: np.random.Generator) -> Day:
    """5 % of the rows never arrive, of every action nearly as many as are expected: only along x5 does it show."""
    action, vectors, context, arrived = right(n, rng)
    sign = np.where(action % 2 == 0, 1, -1) * np.sign(context[:, 5])
    arrived[rng.random(n) < np.where(sign > 0, 0.1, 0.0)] = False
    return action, vectors, context, arrived


WRONG: dict[str, Callable[[int, np.random.Generator], Day]] = {
    "before the cap": before_the_cap, "fallback as sampled": fallback_as_sampled, "rows lost": rows_lost,
}  # fmt: skip


def draws(day: Day) -> Draws:
    """What arrived of a day."""
    action, vectors, context, arrived = day
    return Draws.of(action[arrived], vectors[arrived], context=context[arrived])
