"""Arms of the control families: a method on data of the analytic pendulum or of a file, its policy's return at every evaluation."""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rl_core.config import to_table
from rl_core.data import read
from rl_core.envs.gym import GymEnv
from rl_core.envs.pendulum import EXPERT, RANDOM, SETS, Pendulum, dataset
from rl_core.families.offline import OfflineMethod, Transitions, WithExploration
from rl_core.methods.td3 import Twin
from rl_core.trainers.checkpoints import Rows
from rl_core.trainers.control import Course, Judge, Policies, fresh, offline, replayed
from rl_core.trainers.offline import Act, Environment, OfflineSchedule, returns
from rl_core.trainers.online import OnlineSchedule, ReplaySchedule
from rl_core.verify.arms import code_of, digest

EPISODES, GYM_EPISODES = 100, 10
"""Of an evaluation, all at once: of the pendulum, and of Gymnasium's environments, which cost more."""

FRESH, COUNT = 2048, 16
"""Steps of a fresh batch, and episodes side by side."""

PENDULUM = "pendulum"
"""The environment that is not Gymnasium's."""


@dataclass(frozen=True)
class OfflineArm:
    """A method on a data set. Those of the pendulum are drawn by the schedule's seed: a pair of data and training."""

    method: OfflineMethod
    data: str
    """Name of a set of the pendulum, or a file."""
    schedule: OfflineSchedule
    env: str = PENDULUM
    """In which policies are judged."""
    references: tuple[float, float] = (RANDOM, EXPERT)
    """Returns of score 0 and of score 100."""
    evaluations: int = 1

    @property
    def name(self) -> str:
        """What progress calls it."""
        return f"{type(self.method).__name__} on {self.data}, {'pair' if self.data in SETS else 'seed'} {self.schedule.seed}"

    def lacks(self, folder: Path) -> str:
        """Nothing: data are made in a second."""
        return ""

    def key(self) -> str:
        """Digest of all that tells it from others, of the code, and of the file."""
        method = {"method": type(self.method).__name__} | to_table(self.method)
        code = code_of(__name__, type(self.method).__module__)
        data = self.data if self.data in SETS else content_of(self.data)
        rest = {"env": self.env, "references": self.references, "evaluations": self.evaluations}
        return digest({"method": method, "data": data, "schedule": asdict(self.schedule), "code": code, **rest})

    def begin(self, folder: Path) -> None:
        """Nothing to make."""

    def run(self, folder: Path) -> Rows:
        """A row at every evaluation, the last at the end: mean return and its score."""
        data = transitions(self.data, self.schedule.seed)
        made = offline(self.method, data, self.schedule, evaluations=self.evaluations, told={})
        judge = partial(judged, seed=self.schedule.seed, env=self.env, references=self.references)
        return resumed(made, judge, folder / f"run-{self.key()}")


@dataclass(frozen=True)
class OnlineArm:
    """A method that collects for itself, in an environment: 2,048 fresh steps a batch from 16 episodes side by side, or replay."""

    method: Any
    env: str
    steps: int
    seed: int
    width: int = 64
    batch: int = 128
    reward_scale: float = 1.0
    references: tuple[float, float] = (RANDOM, EXPERT)
    evaluations: int = 8

    @property
    def name(self) -> str:
        """What progress calls it."""
        return f"{type(self.method).__name__} in {self.env}, seed {self.seed}"

    def lacks(self, folder: Path) -> str:
        """Nothing."""
        return ""

    def key(self) -> str:
        """Digest of all that tells it from others, and of the code."""
        method = {"method": type(self.method).__name__} | to_table(self.method)
        rest = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "method"}
        return digest({"method": method, **rest, "code": code_of(__name__, type(self.method).__module__)})

    def begin(self, folder: Path) -> None:
        """Nothing to make."""

    def run(self, folder: Path) -> Rows:
        """A row at every evaluation."""
        shared: dict[str, Any] = {"width": self.width, "reward_scale": self.reward_scale, "seed": self.seed}
        collects = isinstance(self.method, WithExploration)
        if collects:
            warmup = min(1000, self.steps // 2)
            learning = OfflineSchedule(steps=self.steps - warmup, batch=self.batch, normalize=False, **shared)
            schedule = ReplaySchedule(learning, warmup=warmup)
            made = replayed(self.method, environment(self.env), schedule, evaluations=self.evaluations, told={})
        else:
            batches = OnlineSchedule(steps=self.steps, count=COUNT, horizon=FRESH // COUNT, normalize=True, **shared)
            made = fresh(self.method, environment(self.env), batches, evaluations=self.evaluations, told={})
        judge = partial(judged, seed=self.seed, env=self.env, references=self.references)
        return [{**row, "step": row["taken"]} for row in resumed(made, judge, folder / f"run-{self.key()}")]


def resumed(made: Course, judge: Judge, folder: Path) -> Rows:
    """Rows of a whole run, which goes on where it was killed; what that needs is gone with its end."""
    rows = made.run(judge, folder)
    shutil.rmtree(folder)
    return rows


def transitions(data: str, seed: int) -> Transitions:
    """A set of the pendulum by its name, or what a file holds."""
    return dataset(data, seed) if data in SETS else read(data)


def environment(name: str) -> Environment:
    """The analytic pendulum, or one of Gymnasium's. Raises InputError."""
    return Pendulum() if name == PENDULUM else GymEnv(name)


def evaluated(
    act: Act,
    *,
    seed: int = 0,
    env: str = PENDULUM,
    references: tuple[float, float] = (RANDOM, EXPERT),
    episodes: int | None = None,
) -> dict[str, float]:
    """Mean return of a policy, its standard error, and its score, over episodes that no data set has."""
    count = episodes or episodes_of(env)
    found = returns(act, environment(env), count, np.random.default_rng(10_000 + seed))
    mean, low, high = float(found.mean()), *references
    error = float(found.std(ddof=1)) / count**0.5 if count > 1 else math.nan
    return {"return": mean, "stderr": error, "score": 100 * (mean - low) / (high - low)}


def judged(
    policies: Policies, *, seed: int = 0, env: str = PENDULUM, references: tuple[float, float] = (RANDOM, EXPERT)
) -> dict[str, float]:
    """The same of what a run has learned so far."""
    return evaluated(policies(episodes_of(env)), seed=seed, env=env, references=references)


def episodes_of(env: str) -> int:
    """How many an evaluation has."""
    return EPISODES if env == PENDULUM else GYM_EPISODES


@cache
def content_of(path: str) -> str:
    """Digest of a file, or of those in a folder."""
    files = [Path(path)] if Path(path).is_file() else sorted(one for one in Path(path).rglob("*") if one.is_file())
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()


def on_pendulum(method: Any) -> Any:
    """A method with the settings that the pages' suite gives to all: discount 0.98, Adam 1e-3."""
    given: dict[str, Any] = {"discount": TWIN.discount, "twin": TWIN}
    changes = {one.name: given[one.name] for one in fields(method) if one.name in given}
    rates = {one.name: TWIN.critic_rate for one in fields(method) if one.name == "rate" or one.name.endswith("_rate")}
    return replace(method, **changes, **rates)


TWIN = Twin(discount=0.98, actor_rate=1e-3, critic_rate=1e-3)
"""TD3's settings on the pendulum."""

SMALL = OfflineSchedule(steps=6000, batch=128, width=64, reward_scale=0.1)
"""Schedule of the pages' suite: two hidden layers of 64, 6,000 steps on batches of 128."""
