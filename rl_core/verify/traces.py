"""Off-policy values of small random processes, and values of a process whose recording is cut: what traces and their flags are for.

Truths of the first are exact; that of the second is a mean over episodes so long that the rest weighs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

from ope.primitives.returns import vtrace
from ope.primitives.weights import ratio
from ope.sequential import PDIS, PDWIS, SequentialDR, TrajectoryEstimator, TrajectoryIS, steps_of
from ope.trajectories import Trajectories
from rl_core.envs.pendulum import Pendulum, uniform
from rl_core.families.offline import Draw
from rl_core.families.online import CreditedRows
from rl_core.fqe import FQE
from rl_core.methods.trpo import TRPO
from rl_core.models.distributions import Distribution
from rl_core.trainers.offline import recorded
from rl_core.trainers.online import OnlineSchedule, OnlineTrainer
from rl_core.verify.margins import Margin, at_most

Floats = NDArray[np.float64]

STATES, CHOICES, DISCOUNT, HORIZON, NOISE = 10, 3, 0.95, 10, 0.3
"""Size of a process, and the deviation of the noise on its rewards."""

WORLDS, REPEATS, TRAJECTORIES = 10, 40, 2000
"""Processes, logs of each, and trajectories of a log."""

SHRUNK, NET_SHRUNK = 0.9, 0.8
"""What is left of the model's values in the doubly robust estimate, and of the value function in the trace."""


@dataclass(frozen=True)
class World:
    """A process of `HORIZON` steps with uniform starts, who logs it and whose value is asked for."""

    transition: Floats
    """(S, A, S)."""
    reward: Floats
    """(S, A) means."""
    behavior: Floats
    """(S, A)."""
    target: Floats
    """(S, A)."""

    @classmethod
    def of(cls, seed: int) -> World:
        """Transitions Dirichlet(0.3), rewards uniform, behavior Dirichlet(2); half the target is that, half Dirichlet(0.5)."""
        rng = np.random.default_rng(seed)
        transition, reward = rng.dirichlet(np.full(STATES, 0.3), (STATES, CHOICES)), rng.uniform(size=(STATES, CHOICES))
        behavior = rng.dirichlet(np.full(CHOICES, 2.0), STATES)
        return cls(transition, reward, behavior, 0.5 * behavior + 0.5 * rng.dirichlet(np.full(CHOICES, 0.5), STATES))

    def model(self) -> tuple[Floats, Floats]:
        """Exact values of the target by step: q (T, S, A), and v (T + 1, S), which is 0 at the end."""
        q, v = np.zeros((HORIZON, STATES, CHOICES)), np.zeros((HORIZON + 1, STATES))
        for t in reversed(range(HORIZON)):
            q[t] = self.reward + DISCOUNT * self.transition @ v[t + 1]
            v[t] = (self.target * q[t]).sum(axis=1)
        return q, v

    def drawn(self, count: int, rng: Generator) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        """States (N, T + 1), choices (N, T) of the behavior, and rewards (N, T)."""
        state = np.zeros((count, HORIZON + 1), dtype=np.int64)
        choice = np.zeros((count, HORIZON), dtype=np.int64)
        state[:, 0] = rng.integers(STATES, size=count)
        for t in range(HORIZON):
            choice[:, t] = _one_of(self.behavior[state[:, t]], rng)
            state[:, t + 1] = _one_of(self.transition[state[:, t], choice[:, t]], rng)
        return state, choice, self.reward[state[:, :-1], choice] + NOISE * rng.normal(size=choice.shape)


def _one_of(chances: Floats, rng: Generator) -> NDArray[np.int64]:
    """(n, k) -> (n,) by the inverse of the running sum of the chances."""
    return np.asarray((chances.cumsum(axis=1)[:, :-1] <= rng.random((len(chances), 1))).sum(axis=1))


ESTIMATORS: Mapping[str, tuple[TrajectoryEstimator, float]] = {
    "IS": (TrajectoryIS(), 1.0),
    "PDIS": (PDIS(), 1.0),
    "weighted PDIS": (PDWIS(), 1.0),
    "PDDR": (SequentialDR(), 1.0),
    "PDDR, model shrunk": (SequentialDR(), SHRUNK),
}
"""Estimators, and what is left of the exact model that they are given."""


def off_policy_of(seed: int, repeats: int = REPEATS) -> dict[str, float]:
    """Of one process: the root mean squared error of every estimator over the logs, and of the traces over all of them: how many
    standard errors the one without bounds is off (`z`), and how far the one with bounds of 1 (`bias`).
    """
    world, rng = World.of(seed), np.random.default_rng(1_000_003 * (seed + 1))
    q, v = world.model()
    truth = float(v[0].mean())
    state, choice, reward = world.drawn(repeats * TRAJECTORIES, rng)
    now, when = state[:, :-1], np.arange(HORIZON)
    behavior, target = (np.log(policy[now, choice]) for policy in (world.behavior, world.target))
    data = Trajectories(behavior, reward, np.ones(reward.shape, dtype=np.bool_), discount=DISCOUNT)
    found: dict[str, float] = {}
    for name, (estimator, left) in ESTIMATORS.items():
        terms = estimator.terms(steps_of(data, target, left * q[when, now, choice], left * v[when, now]))
        values = estimator.value(terms.reshape(repeats, TRAJECTORIES, -1).mean(axis=1))
        found[name] = float(np.sqrt(((values - truth) ** 2).mean()))
    ended = np.broadcast_to(when == HORIZON - 1, reward.shape)
    value, following = NET_SHRUNK * v[when, now], NET_SHRUNK * v[when + 1, state[:, 1:]]
    for name, bound in (("z", math.inf), ("bias", 1.0)):
        rho = ratio(target, behavior)
        first = vtrace(rho, reward, value, following, ended, np.zeros_like(ended), DISCOUNT, bound, bound)[:, 0]
        off = float(first.mean()) - truth
        found[name] = off if name == "bias" else off / float(first.std(ddof=1) / len(first) ** 0.5)
    return found


def off_policy_margins(found: Sequence[Mapping[str, float]]) -> list[Margin]:
    """The page's, of one or more processes; its own medians, in `ESTIMATORS`' order: 0.402, 0.171, 0.058, 0.0485 and 0.0488."""
    error = {name: float(np.median([one[name] for one in found])) for name in ESTIMATORS}
    told = ", ".join(f"{value:.4f} ({name})" for name, value in error.items())
    return [
        at_most("PDIS: median error, of trajectory IS's", error["PDIS"] / error["IS"], 0.6),
        at_most("PDDR: median error, of PDIS's", error["PDDR"] / error["PDIS"], 0.5),
        at_most("PDDR with a model 10 % too low: median error, of PDDR's", error["PDDR, model shrunk"] / error["PDDR"], 1.25),
        at_most("V-trace without bounds: standard errors that it is off, the most", max(abs(one["z"]) for one in found), 4.0),
        at_most("V-trace with bounds of 1: bias, the nearest to 0", max(one["bias"] for one in found), -0.2),
        Margin("median errors", "are told", told, passed=True),
    ]


def off_policy(first: int = 0, worlds: int = WORLDS, repeats: int = REPEATS) -> list[Margin]:
    """The page's check: processes of seeds from `first` on, logs of 2,000 trajectories each."""
    return off_policy_margins([off_policy_of(first + seed, repeats) for seed in range(worlds)])


CUT, LONG, FOREVER, STARTS = 100, 1000, 0.99, 2000
"""Steps after which the recording is cut, steps of the truth's episodes, discount, and starts that are valued."""

SCALE = 0.01
"""Of rewards while values are learned: they are then some units, which few steps reach."""


@dataclass
class Ending(Pendulum):
    """A pendulum that takes the cut of its recording for an end of the process: the mistake that is looked for."""

    def step(self, action: Floats) -> tuple[Floats, Floats, NDArray[np.bool_], NDArray[np.bool_]]:
        """Actions (n, 1) -> what follows (n, 3), rewards (n,), terminated (n,), truncated (n,)."""
        obs, reward, over, cut = super().step(action)
        return obs, reward, cut, over


@dataclass(frozen=True)
class Even:
    """Actions uniform over [-1, 1], wherever."""

    like: Tensor
    """(..., A) whose shape they have."""

    def logp(self, action: Tensor) -> Tensor:
        """(..., A) -> (...,) log density."""
        return -self.entropy()

    def entropy(self) -> Tensor:
        """(...,)."""
        return math.log(2) * torch.ones_like(self.like).sum(dim=-1)

    def kl(self, other: Even) -> Tensor:
        """(...,) 0: there is one of them."""
        return 0 * self.entropy()

    def sample(self, draw: Draw) -> Tensor:
        """(..., A)."""
        return 2 * draw.uniform(*self.like.shape) - 1

    def mode(self) -> Tensor:
        """(..., A) the middle."""
        return torch.zeros_like(self.like)

    def rows(self, which: slice | Tensor) -> Even:
        """Of some rows."""
        return Even(self.like[which])


class Aimless(nn.Module):
    """A policy of one action in [-1, 1] that is uniform everywhere."""

    def forward(self, obs: Tensor) -> Distribution:
        """(..., S) -> actions (..., 1)."""
        return Even(obs[..., :1])


@dataclass(frozen=True)
class Valuing(TRPO):
    """Generalised credit and regression of values, and a policy that never moves."""

    def improve(self, policy: nn.Module, batch: CreditedRows, old: Distribution, progress: float) -> Mapping[str, float]:
        """Nothing."""
        return {}


def truth(starts: int = STARTS, seed: int = 0) -> tuple[Floats, float]:
    """Starts (n, 3) of the pendulum, and the mean of what uniform actions earn from there in 1,000 steps, discounted."""
    env, rng = Pendulum(steps=LONG), np.random.default_rng(10_000 + seed)
    first, value = env.reset(starts, rng), 0.0
    obs = first
    for step in range(LONG):
        obs, reward, _, _ = env.step(uniform(obs, rng))
        value += FOREVER**step * float(reward.mean())
    return first, value


def by_returns(env: Pendulum, starts: Floats, seed: int, steps: int = 81_920) -> float:
    """The mean value of starts (n, 3) by λ-returns of fresh batches and regression: the online trainer's, of uniform actions."""
    method = Valuing(discount=FOREVER)
    schedule = OnlineSchedule(steps=steps, horizon=128, count=16, normalize=True, reward_scale=SCALE, seed=seed)
    trainer = OnlineTrainer(method, env, schedule)
    trainer.policy = Aimless()
    while trainer.taken < steps:
        trainer.advance()
    with torch.no_grad():
        values = trainer.value(trainer.scaling.apply(torch.as_tensor(starts, dtype=torch.float32)))
    return float(values.double().mean()) / SCALE


def by_backups(env: Pendulum, starts: Floats, seed: int, steps: int = 4000) -> float:
    """The mean value of starts (n, 3) by fitted Q evaluation, of 200 episodes that uniform actions recorded."""
    data = recorded(uniform, env, 200, np.random.default_rng(seed))
    settings = FQE(discount=FOREVER, steps=steps, batch=128, tau=0.1, seed=seed)
    fitted = settings.fit(replace(data, reward=SCALE * data.reward), _uniform)
    return float(fitted.values(torch.as_tensor(starts, dtype=torch.float32)).mean()) / SCALE


def _uniform(obs: Tensor, draw: Draw) -> Tensor:
    """(n, 3) -> (n, 1)."""
    return 2 * draw.uniform(len(obs), 1) - 1


LEARNERS = {"online": by_returns, "FQE": by_backups}
"""The two places where flags of ends and cuts matter."""


def cut_margin(name: str, true: float, pairs: Sequence[tuple[float, float]]) -> Margin:
    """Of values by right and by wrong handling of the cut, a pair of every seed: the right one's error must be less than half."""
    right, wrong = np.abs(np.array(pairs) - true).T
    told = f"{(right / wrong).max():.3f} ({right.max():.1f} and {wrong.min():.1f} of {true:.1f})"
    passed = bool((right < 0.5 * wrong).all())
    return Margin(f"{name}: error where a cut ends nothing, of that where it does, the largest", "< 0.5", told, passed)


def truncation(seeds: Sequence[int]) -> list[Margin]:
    """The page's ablation: values of uniform actions on the pendulum, cut after 100 steps, by both learners.

    Seeds 0 to 5: shares of 0.009 to 0.030 online and of 0.013 to 0.036 by FQE.
    """
    starts, true = truth()
    return [
        cut_margin(
            name, true, [(learned(Pendulum(steps=CUT), starts, seed), learned(Ending(steps=CUT), starts, seed)) for seed in seeds]
        )
        for name, learned in LEARNERS.items()
    ]
