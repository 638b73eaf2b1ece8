"""A pendulum to swing up, by Gymnasium's Pendulum-v1 equations on arrays: many at once, with an expert in closed form.

Observations are (cos θ, sin θ, θ'), actions in [-1, 1] half the torque's bound, episodes of 200 steps are cut and never end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ope.data import InputError
from rl_core.families.offline import Transitions, joined
from rl_core.trainers.offline import recorded

Floats = NDArray[np.float64]

STEPS = 200
"""Of an episode."""

EXPERT, RANDOM = -153.0, -1207.0
"""Mean returns of the expert and of uniform actions, between which scores are counted."""

Act = Callable[[Floats, Generator], Floats]
"""Observations (n, 3) -> actions (n, 1)."""


@dataclass
class Pendulum:
    """n pendulums. Angles are 0 when upright."""

    obs_size: int = 3
    action_size: int = 1
    steps: int = STEPS
    angle: Floats = field(default_factory=lambda: np.zeros(0))
    speed: Floats = field(default_factory=lambda: np.zeros(0))
    age: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def reset(self, count: int, rng: Generator) -> Floats:
        """So many fresh episodes: θ uniform on the circle, θ' in [-1, 1]. Returns observations."""
        self.angle, self.speed = rng.uniform(-np.pi, np.pi, count), rng.uniform(-1, 1, count)
        self.age = np.zeros(count, dtype=np.int64)
        return self.observed()

    def restart(self, which: NDArray[np.bool_], rng: Generator) -> Floats:
        """Fresh episodes where True. Returns the observations of all."""
        count = int(which.sum())
        self.angle[which], self.speed[which] = rng.uniform(-np.pi, np.pi, count), rng.uniform(-1, 1, count)
        self.age[which] = 0
        return self.observed()

    def step(self, action: Floats) -> tuple[Floats, Floats, NDArray[np.bool_], NDArray[np.bool_]]:
        """Actions (n, 1) -> what follows (n, 3), rewards (n,), terminated (n,), truncated (n,)."""
        torque = 2 * np.clip(action[:, 0], -1, 1)
        wrapped = (self.angle + np.pi) % (2 * np.pi) - np.pi
        reward = -(wrapped**2 + 0.1 * self.speed**2 + 0.001 * torque**2)
        self.speed = np.clip(self.speed + 0.05 * (15 * np.sin(self.angle) + 3 * torque), -8, 8)
        self.angle = self.angle + 0.05 * self.speed
        self.age = self.age + 1
        return self.observed(), reward, np.zeros(len(torque), dtype=np.bool_), self.age >= self.steps

    def observed(self) -> Floats:
        """(n, 3)."""
        return np.stack((np.cos(self.angle), np.sin(self.angle), self.speed), axis=1)


def expert(obs: Floats, rng: Generator) -> Floats:
    """Pumps energy until it is enough, then holds. (n, 3) -> (n, 1)."""
    cosine, sine, speed = obs.T
    energy = speed**2 / 6 + 5 * cosine
    pumping = -1.2 * np.sign(speed) * np.clip(energy - 5, -2, 2)
    holding = -(20 * np.arctan2(sine, cosine) + 4 * speed)
    torque = np.where((cosine > 0.85) & (np.abs(speed) < 4), holding, pumping)
    return np.asarray(np.clip(torque, -2, 2)[:, None] / 2)


def uniform(obs: Floats, rng: Generator) -> Floats:
    """Uniform over [-1, 1]."""
    return rng.uniform(-1, 1, (len(obs), 1))


@dataclass(frozen=True)
class Mixed:
    """At every step uniform with a chance, else the expert."""

    share: float

    def __call__(self, obs: Floats, rng: Generator) -> Floats:
        """Observations (n, 3) -> actions (n, 1)."""
        chance = rng.random(len(obs)) < self.share
        return np.where(chance[:, None], uniform(obs, rng), expert(obs, rng))


def score(mean_return: float) -> float:
    """0 for uniform actions, 100 for the expert."""
    return 100 * (mean_return - RANDOM) / (EXPERT - RANDOM)


SETS: Mapping[str, tuple[tuple[Act, int], ...]] = {
    "pend-exp10": ((expert, 10),),
    "pend-mix10": ((expert, 10), (uniform, 90)),
    "pend-eps60": ((Mixed(0.6), 100),),
    "pend-rand": ((uniform, 100),),
}
"""Who acts in each data set, and for how many episodes. What pins a policy to its data passes only the narrow one."""


def dataset(name: str, seed: int) -> Transitions:
    """A data set of whole episodes. Raises InputError for a name that is not one of `SETS`."""
    if name not in SETS:
        raise InputError(f"data set: found {name!r}; expected one of {', '.join(SETS)}")
    rng = np.random.default_rng(seed)
    return joined([recorded(act, Pendulum(), episodes, rng) for act, episodes in SETS[name]])
