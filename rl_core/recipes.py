"""Data sets made by our own training, where public ones cannot be had: the analytic pendulum, and Gymnasium's HalfCheetah-v5.

Every row says who acted: -1 uniform actions, -2 the expert, -3 the mixed policy, else how many steps a policy had learned for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ope.data import InputError
from rl_core.buffers import UNKNOWN
from rl_core.envs.gym import GymEnv
from rl_core.envs.pendulum import Mixed, Pendulum, expert, score, uniform
from rl_core.exploration import log_density
from rl_core.families.offline import Transitions, joined
from rl_core.methods.td3 import TD3, Twin
from rl_core.trainers.offline import Act, Environment, OfflineSchedule, recorded, returns
from rl_core.trainers.online import UNIFORM, ReplaySchedule, ReplayTrainer

Progress = Callable[[int, int], object]
"""Told how much is done, and of how much."""

EXPERT, MIXED = -2.0, -3.0
"""Ids of policies that never learned."""

EVALUATION = 10_000
"""Added to a seed for episodes that evaluate: no data set has them."""


@dataclass(frozen=True)
class Training:
    """A run of TD3 that collects its own data."""

    discount: float
    width: int
    warmup: int
    """Uniform steps before it learns."""
    steps: int
    """Of the environment, those included; one step of learning for each of the others."""
    reward_scale: float = 1.0
    noise: float = 0.1
    batch: int = 128
    rate: float = 1e-3

    def trainer(self, env: Environment, seed: int) -> ReplayTrainer:
        """Before its first step of learning."""
        twin = Twin(discount=self.discount, actor_rate=self.rate, critic_rate=self.rate)
        learning = OfflineSchedule(
            steps=self.steps, batch=self.batch, width=self.width, normalize=False, reward_scale=self.reward_scale, seed=seed
        )
        return ReplayTrainer(
            TD3(twin, exploration=self.noise), env, ReplaySchedule(learning, warmup=self.warmup, capacity=self.steps)
        )

    def run(self, env: Environment, seed: int, progress: Progress) -> ReplayTrainer:
        """To its end."""
        trainer = self.trainer(env, seed)
        while trainer.taken < self.steps:
            progress(trainer.taken, self.steps)
            trainer.advance(min(200, self.steps - trainer.taken))
        return trainer

    def replay(self, trainer: ReplayTrainer) -> Transitions:
        """All that a run collected, in its order, rewards as they were earned."""
        found = trainer.learner.buffer.all()
        return replace(found, reward=found.reward / self.reward_scale, row=None)


PENDULUM = Training(discount=0.98, width=64, warmup=1000, steps=10_000, reward_scale=0.1)
HALFCHEETAH = Training(discount=0.99, width=128, warmup=10_000, steps=100_000)
"""The recipes of the page offline_common."""


def make(
    env: str, quality: str, seed: int = 0, progress: Progress = lambda done, total: None
) -> tuple[Transitions, dict[str, Any]]:
    """A data set, and what made it: seed, ids of policies, returns of its episodes and of the policy that was learned.

    Raises InputError for what no recipe makes, and says why.
    """
    if env not in RECIPES:
        raise InputError(f"environment: found {env!r}; expected {' or '.join(RECIPES)}")
    recipes = RECIPES[env]
    quality = {"medium-replay": "replay"}.get(quality, quality)
    if quality not in recipes:
        why = f": {REFUSED[env]}" if quality in NAMES else ""
        raise InputError(f"{quality} of {env}: found no recipe; expected one of {', '.join(recipes)}{why}")
    data, told = recipes[quality](seed, progress)
    ends = ((data.terminated > 0) | (data.truncated > 0)).double()
    found = float(data.reward.double().sum() / ends.sum().clamp(min=1))
    scores = {"score": score(found)} if env == "pendulum" else {}
    return data, {"env": env, "quality": quality, "seed": seed, "rows": len(data), "return": found, **scores, **told}


def labelled(data: Transitions, policy: float, logp: Tensor | None = None) -> Transitions:
    """With who acted, and with which log density (n,) where there is one."""
    unknown = torch.full_like(data.reward, UNKNOWN)
    return replace(data, policy=torch.full_like(data.reward, policy), logp_behavior=unknown if logp is None else logp)


def uniform_rows(env: Environment, episodes: int, rng: np.random.Generator) -> Transitions:
    """Whole episodes of uniform actions, whose density is known."""
    size = env.action_size
    data = recorded(lambda obs, chance: chance.uniform(-1, 1, (len(obs), size)), env, episodes, rng)
    return labelled(data, UNIFORM, torch.full_like(data.reward, -size * math.log(2)))


def _pendulum(
    parts: tuple[str, ...], episodes: tuple[int, ...], seed: int, progress: Progress
) -> tuple[Transitions, dict[str, Any]]:
    """Those of `rl_core.envs.pendulum.SETS`, to the bit, with who acted."""
    rng, rows = np.random.default_rng(seed), list[Transitions]()
    for who, count in zip(parts, episodes, strict=True):
        if who == "uniform":
            data = recorded(uniform, Pendulum(), count, rng)
            rows.append(labelled(data, UNIFORM, torch.full_like(data.reward, -math.log(2))))
        else:
            act, policy = (expert, EXPERT) if who == "expert" else (Mixed(0.6), MIXED)
            rows.append(labelled(recorded(act, Pendulum(), count, rng), policy))
        progress(sum(episodes[: len(rows)]), sum(episodes))
    return joined(rows), {}


def _pendulum_replay(seed: int, progress: Progress) -> tuple[Transitions, dict[str, Any]]:
    trainer = PENDULUM.run(Pendulum(), seed, progress)
    told = _judged(trainer, Pendulum(), 100, seed)
    return PENDULUM.replay(trainer), told | {"final_score": score(told["final_return"])}


def cheetah() -> GymEnv:
    """HalfCheetah-v5. Raises InputError where MuJoCo is missing."""
    if find_spec("mujoco") is None:
        raise InputError("halfcheetah: found no mujoco; expected it: pip install -e '.[mujoco]' in a clone of Propel")
    return GymEnv("HalfCheetah-v5")


CHUNK, CHUNKS = 10, 10
"""Episodes side by side, and how often."""


def _cheetah_random(seed: int, progress: Progress) -> tuple[Transitions, dict[str, Any]]:
    env, rng, rows = cheetah(), np.random.default_rng(seed), list[Transitions]()
    for done in range(CHUNKS):
        progress(done, CHUNKS)
        rows.append(uniform_rows(env, CHUNK, rng))
    return joined(rows), {}


def _cheetah_medium(seed: int, progress: Progress) -> tuple[Transitions, dict[str, Any]]:
    """By the last policy of the run, with the noise that it explored with: what has no spread supports nothing beside it."""
    recipe, env = HALFCHEETAH, cheetah()
    trainer = recipe.run(env, seed, progress)
    told, rng = _judged(trainer, env, CHUNK, seed), np.random.default_rng(seed)
    rows = list[Transitions]()
    for _ in range(CHUNKS):
        data = recorded(partial(_noisy, trainer.act, recipe.noise), env, CHUNK, rng)
        mean = torch.as_tensor(trainer.act(data.obs.numpy()), dtype=torch.float32)
        rows.append(labelled(data, float(trainer.learner.step), log_density(mean, data.action, recipe.noise)))
    return joined(rows), told


def _noisy(act: Act, noise: float, obs: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    mean = act(obs)
    return np.asarray(np.clip(mean + noise * rng.standard_normal(mean.shape), -1, 1))


def _cheetah_replay(seed: int, progress: Progress) -> tuple[Transitions, dict[str, Any]]:
    env = cheetah()
    trainer = HALFCHEETAH.run(env, seed, progress)
    return HALFCHEETAH.replay(trainer), _judged(trainer, env, CHUNK, seed)


def _judged(trainer: ReplayTrainer, env: Environment, episodes: int, seed: int) -> dict[str, Any]:
    """Returns of the policy that a run ends with, without noise."""
    found = returns(trainer.act, env, episodes, np.random.default_rng(EVALUATION + seed))
    return {
        "final_return": float(found.mean()), "final_spread": float(found.std(ddof=1)),
        "evaluation_seed": EVALUATION + seed, "learned_for": trainer.learner.step,
    }  # fmt: skip


Recipe = Callable[[int, Progress], tuple[Transitions, dict[str, Any]]]

RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "pendulum": {
        "random": partial(_pendulum, ("uniform",), (100,)),
        "medium": partial(_pendulum, ("mixed",), (100,)),
        "replay": _pendulum_replay,
        "expert": partial(_pendulum, ("expert",), (10,)),
        "mix": partial(_pendulum, ("expert", "uniform"), (10, 90)),
    },
    "halfcheetah": {"random": _cheetah_random, "medium": _cheetah_medium, "replay": _cheetah_replay},
}

NAMES = ("random", "medium", "medium-replay", "replay", "medium-expert", "expert", "mix", "full-replay")
"""Qualities that data sets are known by."""

REFUSED: Mapping[str, str] = {
    "pendulum": "the expert is in closed form, and what mixes it with others is mix",
    "halfcheetah": "100,000 steps of TD3 end at the level called medium; an expert needs millions",
}
"""Why others have no recipe."""
