"""Arms of the control families: a method on a data set of the analytic pendulum, its policy's return at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rl_core.config import to_table
from rl_core.envs.pendulum import Pendulum, dataset, score
from rl_core.families.offline import OfflineMethod
from rl_core.trainers.offline import OfflineSchedule, OfflineTrainer, returns
from rl_core.verify.arms import Rows, code_of, digest

EPISODES = 100
"""Of an evaluation, all at once."""


@dataclass(frozen=True)
class OfflineArm:
    """A method on a data set, drawn by the seed that the schedule has as well: a pair of data and training."""

    method: OfflineMethod
    data: str
    schedule: OfflineSchedule

    @property
    def name(self) -> str:
        """What progress calls it."""
        return f"{type(self.method).__name__} on {self.data}, pair {self.schedule.seed}"

    def lacks(self, folder: Path) -> str:
        """Nothing: data are made in a second."""
        return ""

    def key(self) -> str:
        """Digest of all that tells it from others, and of the code."""
        method = {"method": type(self.method).__name__} | to_table(self.method)
        code = code_of(__name__, type(self.method).__module__)
        return digest({"method": method, "data": self.data, "schedule": asdict(self.schedule), "code": code})

    def begin(self, folder: Path) -> None:
        """Nothing to make."""

    def run(self, folder: Path) -> Rows:
        """A row at every evaluation, the last at the end: mean return and its score."""
        schedule = self.schedule
        trainer, rows = OfflineTrainer(self.method, dataset(self.data, schedule.seed), schedule), Rows()
        while trainer.step < schedule.steps:
            trainer.advance(min(schedule.eval_every, schedule.steps - trainer.step))
            mean = float(returns(trainer.act, Pendulum(), EPISODES, np.random.default_rng(10_000 + schedule.seed)).mean())
            rows.append(trainer.metrics() | {"return": mean, "score": score(mean)})
        return rows
