"""A run of any trainer of control, from a file of settings to rows of evaluations: from a log, from replay, from fresh batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ope.data import InputError
from rl_core.config import changed, from_table, method_from
from rl_core.families.offline import Transitions, WithExploration
from rl_core.models.mlp import Sizes
from rl_core.registry import family_of, named
from rl_core.scaling import Scaling
from rl_core.settings import read_tables
from rl_core.trainers.checkpoints import Rows, append_metrics, identity, load_checkpoint, read_checkpoint, write_checkpoint
from rl_core.trainers.imitation import ImitationSchedule, ImitationTrainer
from rl_core.trainers.offline import Act, Environment, OfflineSchedule, OfflineTrainer
from rl_core.trainers.online import OnlineSchedule, OnlineTrainer, ReplaySchedule, ReplayTrainer


@dataclass(frozen=True)
class Course:
    """A trainer, how far it is, and what a stretch of it is."""

    trainer: Any
    done: Callable[[], int]
    stretch: Callable[[int], object]
    """Go on for at most so many steps."""
    metrics: Callable[[], Mapping[str, float]]
    total: int
    every: int
    """Steps between two evaluations."""
    about: Mapping[str, Any]
    """What run it is."""

    def run(
        self,
        judge: Callable[[Act], Mapping[str, float]],
        folder: Path | None = None,
        progress: Callable[[Mapping[str, float]], object] = lambda metrics: None,
    ) -> Rows:
        """Steps to the end, from where the folder says it was; a row at every evaluation. A run that was killed goes on there."""
        state, rows = read_checkpoint(folder, self.about, self.total)
        if state is not None:
            self.trainer.restore(state)
        while self.done() < self.total:
            until = min((self.done() // self.every + 1) * self.every, self.total)
            while self.done() < until:
                self.stretch(until - self.done())
            rows.append({**self.metrics(), "step": self.done(), **judge(self.trainer.act)})
            append_metrics(folder, rows[-1])
            progress(rows[-1])
            if folder is not None:
                write_checkpoint(folder, self.trainer.state(), rows, self.about, self.total)
        return rows


def course(
    name: str, settings: Path | None, *, data: Transitions | None, env: Environment, steps: int | None, seed: int | None,
    evaluations: int = 10, told: Mapping[str, Any],
) -> Course:  # fmt: skip
    """The run that a command line asks for. `data`: a log, which offline methods need; `told`: names of data and environment.

    Raises InputError for settings that no method or schedule has, and for an offline method without data.
    """
    tables = read_tables(settings)
    made = named(name)
    made = changed(made, tables.get("method", {}))
    said = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    schedule, collection = tables.get("schedule", {}) | said, tables.get("collection", {})
    return course_of(made, schedule, collection, data=data, env=env, evaluations=evaluations, told=told)


def course_of(
    made: Any, schedule: Mapping[str, Any], collection: Mapping[str, Any], *, data: Transitions | None, env: Environment,
    evaluations: int = 10, told: Mapping[str, Any],
) -> Course:  # fmt: skip
    """A method's run by the trainer of its family, from tables of schedule and, for replay, of collection. Raises InputError."""
    family = family_of(type(made))
    online = family == "online"
    if data is not None and data.sizes != (env.obs_size, env.action_size):
        raise InputError(f"--data: found sizes {data.sizes}; expected {(env.obs_size, env.action_size)}, as the environment has")
    if collection and (family != "online" or not isinstance(made, WithExploration)):
        raise InputError(
            f"[collection]: found {', '.join(collection)}; expected none: {type(made).__name__} does not learn from replay"
        )
    if family == "imitation":
        if data is None:
            raise InputError("--data: found none; expected what the expert did: a set such as pend-exp10, or a file of transitions")
        copied = from_table(ImitationSchedule, schedule)
        judged = ImitationTrainer(made, env, data, copied)
        return _course(made, copied, judged, lambda: judged.step, judged.advance, judged.metrics, copied.steps, evaluations, told)
    if online and not isinstance(made, WithExploration):
        fresh_schedule = from_table(OnlineSchedule, schedule)
        fresh = OnlineTrainer(made, env, fresh_schedule)
        rows = dict[str, float]()
        return _course(
            made, fresh_schedule, fresh, lambda: fresh.taken, lambda most: rows.update(fresh.advance()), lambda: dict(rows),
            fresh_schedule.steps, evaluations, told,
        )  # fmt: skip
    learning = from_table(OfflineSchedule, {"normalize": not online, **schedule})
    if online:
        collected = replace(from_table(ReplaySchedule, collection), learning=learning)
        replay = ReplayTrainer(made, env, collected, data=data)
        each = collected.count * collected.ratio
        about = {name: value for name, value in asdict(collected).items() if name != "learning"}

        def collect(most: int) -> None:
            replay.advance(max(int(most / each), 1))

        return _course(
            made, learning, replay, lambda: replay.learner.step, collect, replay.metrics, learning.steps, evaluations,
            {**told, "collection": about},
        )  # fmt: skip
    if data is None:
        raise InputError(
            f"--data: found none; expected a set of the pendulum, or a file of transitions, which {type(made).__name__} learns from"
        )
    offline = OfflineTrainer(made, data, learning)
    return _course(
        made, learning, offline, lambda: offline.step, offline.advance, offline.metrics, learning.steps, evaluations, told
    )


def _course(
    method: Any, schedule: Any, trainer: Any, done: Callable[[], int], stretch: Callable[[int], object],
    metrics: Callable[[], Mapping[str, float]], total: int, evaluations: int, told: Mapping[str, Any],
) -> Course:  # fmt: skip
    about = identity(method, schedule, **told)
    return Course(trainer, done, stretch, metrics, total, max(total // evaluations, 1), about)


def load_policy(folder: Path | str) -> Act:
    """What a run of `propel rl train` learned: observations (n, S) -> actions (n, A), scaled as it was. Without its data.

    Raises InputError for a folder without a checkpoint, or of a run that did not learn control from a log or from replay.
    """
    kept = load_checkpoint(Path(folder))
    state = kept["trainer"].get("learner", kept["trainer"])
    if "sizes" not in state:
        raise InputError(f"{folder}: found a run of {kept['about']['method']['name']}; expected one from a log or from replay")
    settings = dict(kept["about"]["method"])
    networks = method_from({"method": settings.pop("name"), **settings}).networks(Sizes(**state["sizes"]))
    actor, scaling = networks["actor"], Scaling(**state["scaling"])
    actor.load_state_dict({name.removeprefix("actor."): one for name, one in state["nets"].items() if name.startswith("actor.")})

    @torch.no_grad()
    def act(obs: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(actor(scaling.apply(torch.as_tensor(obs, dtype=torch.float32))).double().numpy())

    return act
