"""Arms of the control families: a method on a data set of the analytic pendulum, its policy's return at the end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from rl_core.config import to_table
from rl_core.envs.pendulum import Pendulum, dataset, score
from rl_core.families.offline import OfflineMethod
from rl_core.methods.prdc import PRDC
from rl_core.methods.td3 import TD3, Twin
from rl_core.methods.td3_bc import TD3BC
from rl_core.trainers.checkpoints import Rows
from rl_core.trainers.offline import Act, OfflineSchedule, OfflineTrainer, returns, run
from rl_core.verify.arms import Arms, code_of, digest
from rl_core.verify.margins import Experiment, Margin, at_least, at_most

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
        trainer = OfflineTrainer(self.method, dataset(self.data, self.schedule.seed), self.schedule)
        return run(trainer, partial(evaluated, seed=self.schedule.seed))


def evaluated(act: Act, *, seed: int = 0) -> dict[str, float]:
    """Mean return of a policy on the pendulum, and its score, over episodes that no data set has."""
    mean = float(returns(act, Pendulum(), EPISODES, np.random.default_rng(10_000 + seed)).mean())
    return {"return": mean, "score": score(mean)}


TWIN = Twin(discount=0.98, actor_rate=1e-3, critic_rate=1e-3)
"""TD3's settings on the pendulum."""

SMALL = OfflineSchedule(steps=6000, batch=128, width=64, reward_scale=0.1, eval_every=6000)
"""Schedule of the pages' suite: two hidden layers of 64, 6,000 steps on batches of 128."""


def ends(
    arms: Arms, methods: Mapping[str, OfflineMethod], sets: Sequence[str], pairs: Sequence[int]
) -> dict[tuple[str, str], float]:
    """Median over pairs of the mean return at the end, by method and data set."""
    wanted = [(name, data, pair) for name in methods for data in sets for pair in pairs]
    rows = arms.run([OfflineArm(methods[name], data, replace(SMALL, seed=pair)) for name, data, pair in wanted])
    found: dict[tuple[str, str], list[float]] = {}
    for (name, data, _), one in zip(wanted, rows, strict=True):
        found.setdefault((name, data), []).append(one[-1]["return"])
    return {key: statistics.median(values) for key, values in found.items()}


def _prdc(arms: Arms, pairs: Sequence[int]) -> list[Margin]:
    methods: dict[str, OfflineMethod] = {"PRDC": PRDC(twin=TWIN), "TD3BC": TD3BC(twin=TWIN), "TD3": TD3(TWIN)}
    found = ends(arms, methods, ("pend-exp10", "pend-mix10"), pairs)
    return [
        at_least("PRDC on pend-exp10: median return", found["PRDC", "pend-exp10"], -300),
        at_least("PRDC on pend-mix10: median return", found["PRDC", "pend-mix10"], -300),
        at_most("TD3+BC on pend-mix10: median return", found["TD3BC", "pend-mix10"], -800),
        at_most("TD3 on pend-exp10: median return", found["TD3", "pend-exp10"], -500),
    ]


CONTROL: Mapping[str, Experiment] = {
    "PRDC": Experiment("the analytic pendulum, narrow and wide data, beside TD3+BC and TD3", 7, _prdc),
}
