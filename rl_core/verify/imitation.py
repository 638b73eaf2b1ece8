"""Arms of the imitation family: a method on a few rows of the analytic pendulum's expert, its policies' scores at every evaluation.

A killed run goes on at its last evaluation: an arm keeps its checkpoint beside its numbers until they are whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ope.data import InputError
from rl_core.config import to_table
from rl_core.envs.pendulum import Pendulum, expert
from rl_core.families.imitation import ImitationMethod
from rl_core.families.offline import OfflineMethod, Transitions
from rl_core.methods.ailboost import AILBoost
from rl_core.methods.bc import BC
from rl_core.methods.dac import DAC
from rl_core.methods.sac import SAC
from rl_core.trainers.checkpoints import Rows
from rl_core.trainers.control import Course, Policies, imitation, offline
from rl_core.trainers.imitation import ImitationSchedule
from rl_core.trainers.offline import OfflineSchedule, recorded
from rl_core.verify.arms import Arms, code_of, digest
from rl_core.verify.control import EPISODES, evaluated, resumed
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
    evaluations: int = 6

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
        rest = {
            "trajectories": self.trajectories,
            "every": self.every,
            "evaluations": self.evaluations,
            "code": code_of(__name__, type(self.method).__module__),
        }
        return digest({"method": method, "schedule": asdict(self.schedule), **rest})

    def begin(self, folder: Path) -> None:
        """Nothing to make."""

    def run(self, folder: Path) -> Rows:
        """A row at every evaluation, the last at the end: `score` of what the method returns, `last` of its last policy."""
        made = self.made()

        def judge(policies: Policies) -> dict[str, float]:
            found, last = (evaluated(one, seed=self.schedule.seed) for one in (policies(EPISODES), made.trainer.act))
            return {**found, "last": last["score"]}

        return resumed(made, judge, folder / f"run-{self.key()}")

    def made(self) -> Course:
        """Against a judge in the environment, or on the rows alone."""
        data, schedule = demonstrations(self.trajectories, self.every, self.schedule.seed), self.schedule
        if isinstance(self.method, ImitationMethod):
            return imitation(self.method, Pendulum(), data, schedule, evaluations=self.evaluations, told={})
        settings = {name: getattr(schedule, name) for name in ("batch", "width", "layers", "seed")}
        return offline(self.method, data, OfflineSchedule(steps=CLONING, **settings), told={})


CLONING = 6000
"""Steps of behaviour cloning."""

FAST = SAC(discount=0.98, actor_rate=1e-3, critic_rate=1e-3, temperature_rate=1e-3)
"""SAC's settings on the pendulum."""

ROUND = {"steps": 250, "samples": 200, "rolls": 1}
"""Of a plan: rounds short enough for 120 in 30,000 steps. Of 30 the first, whose judge knew nothing, would still have weight 0.23.
"""

SMALL = ImitationSchedule(steps=30_000, seed_steps=1000, batch=128, width=64)
"""Schedule of the page: two hidden layers of 64, 30,000 steps on batches of 128."""


def on_pendulum(method: Any) -> Any:
    """A method of the family with the settings that all have there."""
    return replace(method, sac=FAST, judge_rate=1e-3, plan=replace(method.plan, **ROUND))


METHODS: Mapping[str, ImitationMethod | OfflineMethod] = {
    "AILBoost": on_pendulum(AILBoost()),
    "DAC": on_pendulum(DAC()),
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
