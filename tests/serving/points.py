"""Decision points of tests, and policies promoted there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bandits.batch import DecisionBatch
from bandits.decision_point import DecisionPoint, parse_decision_point
from bandits.policy import Floor, Policy, Softmax
from bandits.registry import Registry
from bandits.scorers import Linear
from serving.setup import POINT

REWARD = '\n[[rewards]]\nname = "paid"\nlow = 0.0\nhigh = 1.0\nwindow_seconds = 60.0\n'

SETS = (
    'name = "sets"\nexploration_floor = 0.1\n[actions]\nper_request = true\nmost = 50\n'
    + REWARD
    + "[features]\ncontext = ["
    + ", ".join(f'{{type = "number", name = "x{i}"}}' for i in range(10))
    + "]\naction = ["
    + ", ".join(f'{{type = "number", name = "a{i}"}}' for i in range(4))
    + "]\n"
)
"""Actions come with each request: 4 numbers of each, 10 of the context."""

ROUTES = (
    'name = "routes"\nexploration_floor = 0.2\n[actions]\ncatalogue = ["a", "b", "c", "d"]\n'
    + REWARD
    + '[features]\ncontext = [{type = "number", name = "amount"}]\n'
    + 'action = [{type = "number", name = "price"}, {type = "category", name = "speed", levels = ["slow", "fast"]}]\n'
)
"""A catalogue whose actions have features."""

PLAIN = (
    'name = "plain"\n[actions]\ncatalogue = ["a", "b"]\n' + REWARD + '[features]\ncontext = [{type = "number", name = "amount"}]\n'
)
"""A catalogue whose actions have no features; one number of the context, which may not be missing."""

AD_LOAD = parse_decision_point(POINT)
SETS_POINT = parse_decision_point(SETS)
PLAIN_POINT = parse_decision_point(PLAIN)
ROUTES_POINT = parse_decision_point(ROUTES)


def linear(point: DecisionPoint, seed: int = 0) -> Floor:
    """A softmax of random linear scores, on the point's floor."""
    rng = np.random.default_rng(seed)
    k, d = len(point.actions.catalogue), len(point.features.context_columns)
    context = rng.normal(size=(d, k)) if k else np.empty((0, 0))
    scorer = Linear(rng.normal(size=k or 1), context, rng.normal(size=len(point.features.action_columns)))
    return Floor(Softmax(scorer), point.exploration_floor)


def golden(point: DecisionPoint, rows: int = 8, seed: int = 0) -> DecisionBatch:
    """Random arrays of the point's shape: what an artifact is tried with."""
    rng = np.random.default_rng(seed)
    k = len(point.actions.catalogue) or 5
    features = rng.normal(size=(rows, k, len(point.features.action_columns)))
    return DecisionBatch.of(rng.normal(size=(rows, len(point.features.context_columns))), np.ones((rows, k), dtype=bool), features)


def promote(folder: Path, point: DecisionPoint, policy: Policy | None = None) -> str:
    """Register a policy, by default a linear one, and serve it; its reference."""
    registry = Registry(folder)
    digest = registry.register(policy or linear(point), point, name="linear", golden=golden(point))
    registry.promote(digest, who="tests", why="first")
    return registry.load(digest).reference


def set_request(rng: np.random.Generator, actions: int = 20, **more: Any) -> dict[str, Any]:
    """A request of the decision point `sets`."""
    offered = [{"id": f"item-{i}", "features": {f"a{j}": float(rng.normal()) for j in range(4)}} for i in range(actions)]
    return {"context": {f"x{i}": float(rng.normal()) for i in range(10)}, "actions": offered} | more


def route_request(*actions: str, amount: float = 1.5, **more: Any) -> dict[str, Any]:
    """A request of the decision point `routes`, over some of its actions, in that order."""
    speeds = {"a": "slow", "b": "fast", "c": "slow", "d": "fast"}
    offered = [{"id": one, "features": {"price": float(ord(one) - 96), "speed": speeds[one]}} for one in actions]
    return {"context": {"amount": amount}, "actions": offered} | more
