"""Arms of the imitation family: a method on a few rows of the analytic pendulum's expert, its policies' scores at every evaluation.

A killed run goes on at its last evaluation: an arm keeps its checkpoint beside its numbers until they are whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ope.data import InputError
from rl_core.config import to_table
from rl_core.envs.pendulum import Pendulum, expert, score
from rl_core.families.imitation import ImitationMethod, Plan
from rl_core.families.offline import OfflineMethod, Transitions
from rl_core.methods.ailboost import AILBoost
from rl_core.methods.bc import BC
from rl_core.methods.dac import DAC
from rl_core.methods.sac import SAC
from rl_core.trainers.checkpoints import Rows
from rl_core.trainers.imitation import ImitationSchedule, ImitationTrainer
from rl_core.trainers.offline import Act, OfflineSchedule, OfflineTrainer, recorded, returns, run
from rl_core.verify.arms import Arms, code_of, digest
from rl_core.verify.margins import Margin, at_least, mean


def thinned(rows: Transitions, every: int, rng: np.random.Generator) -> Transitions:
    """One row in `every` of each episode, from a first one that is drawn. Raises InputError for an episode shorter than that."""
    ends = ((rows.terminated > 0) | (rows.truncated > 0)).nonzero()[:, 0].tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    if any(end + 1 - start < every for start, end in zip(starts, ends, strict=True)):
        raise InputError(f"every: found {every}; expected at most the length of the shortest episode")
    parts = [torch.arange(start + int(rng.integers(every)), end + 1, every) for start, end in zip(starts, ends, strict=True)]
    return rows.rows(torch.cat(parts))


def demonstrations(trajectories: int, every: int, seed: int) -> Transitions:
    """Rows of the pendulum's expert, of which a learner sees nothing but observations and actions."""
    rng = np.random.default_rng(20_000 + seed)
    return thinned(recorded(expert, Pendulum(), trajectories, rng), every, rng)


@dataclass(frozen=True)
class ImitationArm:
    """A method of the family, or one that clones, on the same rows of an expert: those of the schedule's seed."""

    method: ImitationMethod | OfflineMethod
    schedule: ImitationSchedule
    trajectories: int = 4
    every: int = 10
    """Rows of a trajectory of which one is kept."""

    @property
    def name(self) -> str:
        """What progress calls it."""
        return f"{type(self.method).__name__} on {self.trajectories} trajectories, seed {self.schedule.seed}"

    def lacks(self, folder: Path) -> str:
        """Nothing: the expert is in closed form."""
        return ""

    def key(self) -> str:
        """Digest of all that tells it from others, and of the code."""
        method = {"method": type(self.method).__name__} | to_table(self.method)
        rest = {"trajectories": self.trajectories, "every": self.every, "code": code_of(__name__, type(self.method).__module__)}
        return digest({"method": method, "schedule": asdict(self.schedule), **rest})

    def begin(self, folder: Path) -> None:
        """Nothing to make."""

    def run(self, folder: Path) -> Rows:
        """A row at every evaluation, the last at the end: `score` of what the method returns, `last` of its last policy."""
        data, kept = demonstrations(self.trajectories, self.every, self.schedule.seed), folder / f"run-{self.key()}"
        trainer = _trainer(self.method, data, self.schedule)
        rows = run(trainer, partial(evaluated, trainer), kept)
        shutil.rmtree(kept)
        return rows


def _trainer(method: ImitationMethod | OfflineMethod, data: Transitions, schedule: ImitationSchedule) -> Any:
    """Against a judge in the environment, or on the rows alone."""
    if isinstance(method, ImitationMethod):
        return ImitationTrainer(method, Pendulum(), data, schedule)
    settings = {name: getattr(schedule, name) for name in ("batch", "width", "layers", "eval_episodes", "seed")}
    learning = OfflineSchedule(steps=CLONING, eval_every=CLONING, **settings)
    return OfflineTrainer(method, data, learning)


def evaluated(trainer: Any, act: Act) -> dict[str, float]:
    """Mean scores over episodes that no learner saw, 100 being the expert's: of what is returned, and of the last policy."""
    seed, episodes = trainer.schedule.seed, trainer.schedule.eval_episodes

    def scored(one: Act) -> float:
        return score(float(returns(one, Pendulum(), episodes, np.random.default_rng(10_000 + seed)).mean()))

    last = scored(act)
    if not isinstance(trainer, ImitationTrainer) or not trainer.actors:
        return {"score": last, "last": last}
    return {"score": scored(trainer.returned(episodes, np.random.default_rng(30_000 + seed))), "last": last}


CLONING = 6000
"""Steps of behaviour cloning."""

FAST = SAC(discount=0.98, actor_rate=1e-3, critic_rate=1e-3, temperature_rate=1e-3)
"""SAC's settings on the pendulum."""

ROUND = Plan(steps=250, judge_steps=100, samples=200, rolls=1, learners=60)
"""Rounds short enough for 120 of them in 30,000 steps: of 30 the first, whose judge knew nothing, would still have weight 0.23."""

SMALL = ImitationSchedule(steps=30_000, seed_steps=1000, batch=128, width=64, eval_every=5000, eval_episodes=100)
"""Schedule of the page: two hidden layers of 64, 30,000 steps on batches of 128."""

METHODS: Mapping[str, ImitationMethod | OfflineMethod] = {
    "AILBoost": AILBoost(sac=FAST, judge_rate=1e-3, plan=ROUND),
    "DAC": DAC(sac=FAST, judge_rate=1e-3, plan=replace(DAC().plan, steps=250)),
    "BC": BC(rate=1e-3),
}

REQUIRED = 80.0
"""Least mean score of AILBoost's mixture over seeds. The rest is told and not required."""


def arms_of(seeds: Sequence[int]) -> dict[str, list[ImitationArm]]:
    """Arms by name and seed."""
    return {name: [ImitationArm(method, replace(SMALL, seed=seed)) for seed in seeds] for name, method in METHODS.items()}


def margins(arms: Arms, seeds: Sequence[int]) -> list[Margin]:
    """What the page requires of the pendulum."""
    rows = arms.run(arms_of(seeds)["AILBoost"])
    return [at_least("AILBoost's mixture, of the expert's 100: mean", mean([one[-1]["score"] for one in rows]), REQUIRED)]
