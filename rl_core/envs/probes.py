"""Five environments whose answers are known, each of which needs one thing more than the last; and one that is only ever cut.

A method that fails one of them has a mistake that the one before would have shown: values, observations, discount, actions, both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

Kind = Literal["constant", "observation", "delay", "action", "both"]

BEST = 0.5
"""The action that is paid most where it does not depend on the observation (±1); where it does, half the observation."""


@dataclass
class Probe:
    """Episodes of one step that earns a reward, in `delay` of two of which the second does; all end by themselves.

    Actions are one number, or with `discrete` a choice of two. Rewards: constant, 1; observation, what is seen, ±1; delay, 1 at the
    second step; action, 1 - (a - ½)²; both, 1 - (a - obs/2)². Choices: 1 for the second in `action`, and in `both` where ±1 is seen
    for the second or the first; else -1.
    """

    kind: Kind
    discrete: bool = False
    obs_size: int = 1
    seen: Floats = field(default_factory=lambda: np.zeros(0))

    @property
    def action_size(self) -> int:
        """One number, or two choices."""
        return 2 if self.discrete else 1

    def reset(self, count: int, rng: Generator) -> Floats:
        """So many fresh episodes. Returns observations (n, 1)."""
        self.seen = np.zeros(count)
        return self.restart(np.ones(count, dtype=np.bool_), rng)

    def restart(self, which: Flags, rng: Generator) -> Floats:
        """Fresh episodes where True. Returns the observations of all."""
        random = self.kind in ("observation", "both")
        fresh = rng.choice([-1.0, 1.0], len(which)) if random else np.zeros(len(which))
        self.seen = np.where(which, fresh, self.seen)
        return self.seen[:, None].copy()

    def step(self, action: Floats) -> tuple[Floats, Floats, Flags, Flags]:
        """Actions (n, A) -> what follows (n, 1), rewards (n,), terminated (n,), truncated (n,)."""
        reward, ended = self.reward(action), np.ones(len(action), dtype=np.bool_)
        if self.kind == "delay":
            ended, self.seen = self.seen > 0.5, np.ones(len(action))
        return self.seen[:, None].copy(), reward, ended, np.zeros(len(action), dtype=np.bool_)

    def reward(self, action: Floats) -> Floats:
        """(n, A) -> (n,)."""
        if self.kind == "constant":
            return np.ones(len(action))
        if self.kind == "observation":
            return self.seen.copy()
        if self.kind == "delay":
            return (self.seen > 0.5).astype(np.float64)
        wanted = self.best(self.seen[:, None])
        if self.discrete:
            return np.asarray(2.0 * (action.argmax(axis=1) == wanted.argmax(axis=1)) - 1.0)
        return np.asarray(1 - ((action - wanted) ** 2)[:, 0])

    def best(self, obs: Floats) -> Floats:
        """(n, 1) -> (n, A) what is paid most, where actions matter."""
        wanted = obs / 2 if self.kind == "both" else np.full(obs.shape, BEST)
        return np.concatenate((wanted < 0, wanted > 0), axis=1).astype(np.float64) if self.discrete else wanted

    def values(self, discount: float) -> tuple[Floats, Floats]:
        """Observations (n, 1), and what the best policy earns from each (n,)."""
        if self.kind == "delay":
            return np.array([[0.0], [1.0]]), np.array([discount, 1.0])
        if self.kind in ("constant", "action"):
            return np.zeros((1, 1)), np.ones(1)
        obs = np.array([[-1.0], [1.0]])
        return obs, obs[:, 0] if self.kind == "observation" else np.ones(2)


KINDS: tuple[Kind, ...] = ("constant", "observation", "delay", "action", "both")
"""In the order in which they are to be solved."""


@dataclass
class Endless:
    """Earns 1 at every step, for ever; the recording is cut after some. With a discount of γ every value is 1 / (1 - γ)."""

    steps: int = 2
    obs_size: int = 1
    action_size: int = 1
    age: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def reset(self, count: int, rng: Generator) -> Floats:
        """So many fresh episodes. Returns observations (n, 1)."""
        self.age = np.zeros(count, dtype=np.int64)
        return np.zeros((count, 1))

    def restart(self, which: Flags, rng: Generator) -> Floats:
        """Fresh episodes where True. Returns the observations of all."""
        self.age = np.where(which, 0, self.age)
        return np.zeros((len(which), 1))

    def step(self, action: Floats) -> tuple[Floats, Floats, Flags, Flags]:
        """Actions (n, 1) -> what follows (n, 1), rewards (n,), terminated (n,), truncated (n,)."""
        self.age = self.age + 1
        nothing = np.zeros((len(action), 1))
        return nothing, np.ones(len(action)), np.zeros(len(action), dtype=np.bool_), self.age >= self.steps
