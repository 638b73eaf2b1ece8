"""Gymnasium's environments, several side by side: what really followed, ends and cuts as two flags, nothing restarts alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ope.data import InputError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

SEEDS = 2**31
"""Seeds of episodes are drawn below this."""


class GymEnv:
    """`count` environments of one name. Actions in [-1, 1] reach the ends of a Box; choices are one-hot.

    Raises InputError where Gymnasium is missing, and for other spaces: observations must be Boxes of one dimension.
    """

    def __init__(self, name: str, count: int = 1, **settings: Any) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise InputError(f"{name}: found no gymnasium; expected it: pip install 'propel[rl]'") from error
        self.name, self.settings = name, settings
        self.envs = [self._made() for _ in range(count)]
        obs, action = self.envs[0].observation_space, self.envs[0].action_space
        if not isinstance(obs, gymnasium.spaces.Box) or len(obs.shape) != 1:
            raise InputError(f"{name}: found observations {obs}; expected a Box of one dimension")
        self.discrete = isinstance(action, gymnasium.spaces.Discrete)
        self.obs_size = int(obs.shape[0])
        if isinstance(action, gymnasium.spaces.Discrete):
            self.action_size, self.first = int(action.n), int(action.start)
        elif isinstance(action, gymnasium.spaces.Box) and len(action.shape) == 1 and action.is_bounded():
            self.action_size, self.low, self.high = int(action.shape[0]), action.low, action.high
        else:
            raise InputError(f"{name}: found actions {action}; expected Discrete, or a bounded Box of one dimension")
        self.obs = np.zeros((count, self.obs_size))
        self.over = np.zeros((2, count), dtype=np.bool_)

    def _made(self) -> Any:
        import gymnasium

        try:
            return gymnasium.make(self.name, **self.settings)
        except (gymnasium.error.Error, ModuleNotFoundError) as error:
            raise InputError(f"{self.name}: found {error}; expected an environment of Gymnasium that is installed") from None

    def reset(self, count: int, rng: Generator) -> Floats:
        """So many fresh episodes, each with a seed of its own. Returns observations."""
        self.envs = [*self.envs[:count], *(self._made() for _ in range(count - len(self.envs)))]
        self.obs, self.over = np.zeros((count, self.obs_size)), np.zeros((2, count), dtype=np.bool_)
        return self.restart(np.ones(count, dtype=np.bool_), rng)

    def restart(self, which: Flags, rng: Generator) -> Floats:
        """Fresh episodes where True. Returns the observations of all."""
        for place in np.flatnonzero(which):
            self.obs[place], _ = self.envs[place].reset(seed=int(rng.integers(SEEDS)))
        self.over = self.over & ~which
        return self.obs.copy()

    def step(self, action: Floats) -> tuple[Floats, Floats, Flags, Flags]:
        """Actions (n, A) -> what follows (n, S), rewards (n,), terminated (n,), truncated (n,).

        An episode that is over stays where it is, ended or cut as it was, and earns nothing until it is restarted.
        """
        reward, (terminated, truncated) = np.zeros(len(action)), self.over.copy()
        for place in np.flatnonzero(~self.over.any(axis=0)):
            found = self.envs[place].step(self._native(action[place]))
            self.obs[place], reward[place], terminated[place], truncated[place], _ = found
        self.over = np.stack((terminated, truncated))
        return self.obs.copy(), reward, terminated, truncated

    def _native(self, action: Floats) -> Any:
        """As the environment takes it."""
        if self.discrete:
            return self.first + int(action.argmax())
        share = (np.clip(action, -1, 1) + 1) / 2
        return (self.low + share * (self.high - self.low)).astype(self.low.dtype)
