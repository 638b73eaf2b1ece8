"""Methods that learn control from transitions, beside each other: scores of several seeds and data sets, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ope.data import InputError
from pipelines.charts import Spec, learning
from rl_core.aggregate import interquartile_mean, stratified_interval
from rl_core.envs.pendulum import EXPERT, RANDOM, SETS
from rl_core.scores import REFERENCES
from rl_core.trainers.checkpoints import Rows
from rl_core.trainers.offline import OfflineSchedule
from rl_core.verify import imitation
from rl_core.verify.arms import Arms
from rl_core.verify.control import PENDULUM, OfflineArm, OnlineArm, environment, on_pendulum, transitions
from rl_core.verify.imitation import SMALL, ImitationArm

COSTS: dict[str, str] = {"step": "gradient steps", "cpu_seconds": "CPU seconds"}

EVALUATIONS = 8
"""Of a run."""

PAIR = "pend-exp10,pend-mix10"
"""Narrow expert data and a wide mixture: each naive method passes only one."""


@dataclass(frozen=True)
class Asked:
    """Which runs: every method on all data, seed by seed."""

    methods: Mapping[str, Any]
    data: Sequence[str]
    seeds: int
    steps: int
    width: int
    batch: int
    env: str | None = None
    """Of files."""
    references: tuple[float, float] | None = None
    """Returns of score 0 and of score 100 there."""

    def arms(self, method: Any, data: str) -> list[OfflineArm]:
        """One a seed. On the pendulum all methods have the suite's discount, rates and scale of rewards; elsewhere their own."""
        env = PENDULUM if data in SETS or self.env is None else self.env
        given = (RANDOM, EXPERT) if data in SETS or self.references is None else self.references
        scale = 0.1 if env == PENDULUM else 1.0
        chosen = on_pendulum(method) if env == PENDULUM else method
        return [
            OfflineArm(chosen, data, OfflineSchedule(
                steps=self.steps, batch=self.batch, width=self.width, reward_scale=scale, seed=seed
            ), env, given, EVALUATIONS)
            for seed in range(self.seeds)
        ]  # fmt: skip

    def check(self) -> None:
        """Raises InputError for data that are not there, or not of the environment; before anything is trained."""
        if self.env is not None and all(one in SETS for one in self.data):
            raise InputError(f"--env: found {self.env} and sets of the pendulum alone; expected none, or a file of transitions")
        if not self.data:
            raise InputError(f"--task: found no data; expected some of {', '.join(SETS)}, or a file of transitions and --env")
        for one in self.data:
            if one in SETS:
                continue
            if not Path(one).exists():
                raise InputError(f"--task: found {one!r}; expected some of {', '.join(SETS)}, or a file of transitions and --env")
            if self.env is None:
                raise InputError(
                    f"--env: found none; expected where policies from {one} are judged: pendulum, or a name of Gymnasium's"
                )
            if self.env != PENDULUM and self.references is None:
                raise InputError(
                    f"--references: found none; expected returns of score 0 and 100 in {self.env}, such as a random policy's and "
                    "the best known: --references halfcheetah are D4RL's, for the physics of its time"
                )
            found, env = transitions(one, 0).sizes, environment(self.env)
            if found != (env.obs_size, env.action_size):
                raise InputError(f"{one}: found sizes {found}; expected {(env.obs_size, env.action_size)}, as {self.env} has")


@dataclass(frozen=True)
class AskedOnline:
    """Which runs of methods that collect for themselves: every method in every environment, seed by seed."""

    methods: Mapping[str, Any]
    data: Sequence[str]
    """Environments."""
    seeds: int
    steps: int
    """Of the environment."""
    width: int
    batch: int
    references: tuple[float, float] | None = None

    def arms(self, method: Any, data: str) -> list[OnlineArm]:
        """One a seed; the pendulum has settings of its own."""
        home = data == PENDULUM
        given = (RANDOM, EXPERT) if home or self.references is None else self.references
        chosen, scale = (on_pendulum(method), 0.1) if home else (method, 1.0)
        return [
            OnlineArm(chosen, data, self.steps, seed, self.width, self.batch, scale, given, EVALUATIONS)
            for seed in range(self.seeds)
        ]

    def check(self) -> None:
        """Raises InputError for environments that are not there, or have no scores."""
        for one in self.data:
            environment(one)
            if one != PENDULUM and self.references is None:
                raise InputError(f"--references: found none; expected returns of score 0 and 100 in {one}")


@dataclass(frozen=True)
class AskedImitation:
    """Which runs of methods that imitate: every method on 80 rows of the pendulum's expert, seed by seed."""

    methods: Mapping[str, Any]
    seeds: int
    steps: int
    """Of the environment."""
    width: int
    batch: int
    data: Sequence[str] = (PENDULUM,)

    def arms(self, method: Any, data: str) -> list[ImitationArm]:
        """One a seed."""
        schedule = replace(SMALL, steps=self.steps, width=self.width, batch=self.batch)
        chosen = imitation.on_pendulum(method)
        return [ImitationArm(chosen, replace(schedule, seed=seed), evaluations=EVALUATIONS) for seed in range(self.seeds)]

    def check(self) -> None:
        """Nothing: the expert is in closed form."""


def referenced(text: str | None) -> tuple[float, float] | None:
    """`LOW,HIGH`, or D4RL's by the name of its environment. Raises InputError."""
    if text is None or text in REFERENCES:
        return None if text is None else REFERENCES[text]
    try:
        low, high = (float(one) for one in text.split(","))
    except ValueError:
        low = high = 0.0
    if not -math.inf < low < high < math.inf:
        raise InputError(
            f"--references: found {text!r}; expected two returns, the lower first, such as -1207,-153, or "
            f"D4RL's of {', '.join(REFERENCES)}"
        )
    return low, high


def compared(
    asked: Asked | AskedOnline | AskedImitation, folder: Path, tell: Callable[[str], object]
) -> tuple[list[dict[str, Any]], Spec]:
    """A row per method and data set, one over all data where there are several; and the picture of learning."""
    asked.check()
    arms = {(name, data): asked.arms(method, data) for name, method in asked.methods.items() for data in asked.data}
    found = iter(Arms(folder, tell).run([arm for some in arms.values() for arm in some]))
    runs = {key: [next(found) for _ in some] for key, some in arms.items()}
    table, points = list[dict[str, Any]](), list[dict[str, Any]]()
    measures = {f"score_{place}": data for place, data in enumerate(asked.data)}
    for name in asked.methods:
        for measure, data in measures.items():
            table.append(ends(name, data, [runs[name, data]]))
            points += averaged(name, measure, runs[name, data])
        if len(asked.data) > 1:
            table.append(ends(name, "all", [runs[name, data] for data in asked.data]))
    titles = {measure: f"score, {Path(data).name}" for measure, data in measures.items()}
    steps = "gradient steps" if isinstance(asked, Asked) else "environment steps"
    return table, learning(points, titles, COSTS | {"step": steps})


def ends(name: str, data: str, tasks: Sequence[Sequence[Rows]]) -> dict[str, Any]:
    """Where a method's runs (tasks, seeds) end: the interquartile mean of scores, its interval, and each seed's mean over tasks."""
    last = [[run[-1] for run in runs] for runs in tasks]
    scores = np.array([[row["score"] for row in rows] for rows in last]).T
    low, high = interval(scores)
    seeds = {f"seed_{seed}": float(one) for seed, one in enumerate(scores.mean(axis=1))}
    mean = {key: float(np.mean([row[key] for rows in last for row in rows])) for key in ("return", "cpu_seconds")}
    return {
        "method": name, "data": data, "iqm": interquartile_mean(scores), "low": low, "high": high, "return": mean["return"],
        "steps": int(last[0][0]["step"]), "cpu_seconds": mean["cpu_seconds"], **seeds,
    }  # fmt: skip


def interval(scores: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Of the interquartile mean of scores (seeds, tasks); none of one seed."""
    return stratified_interval(scores) if len(scores) > 1 else (None, None)


def averaged(name: str, measure: str, runs: Sequence[Rows]) -> list[dict[str, Any]]:
    """Points of a line: the interquartile mean over seeds at every evaluation, with its interval."""
    points = []
    for rows in zip(*runs, strict=True):
        scores = np.array([[row["score"]] for row in rows])
        value, (low, high) = interquartile_mean(scores), interval(scores)
        costs = {cost: float(np.mean([row[cost] for row in rows])) for cost in COSTS}
        band = {f"{measure}_low": value if low is None else low, f"{measure}_high": value if high is None else high}
        points.append({"method": name, **costs, measure: value, **band})
    return points
