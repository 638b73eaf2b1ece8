"""A run of any trainer of control, from a file of settings to rows of evaluations: from a log, from replay, from fresh batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ope.data import InputError
from rl_core.config import changed, from_table, method_from
from rl_core.families.imitation import ImitationMethod
from rl_core.families.offline import OfflineMethod, Transitions, WithExploration
from rl_core.families.online import OnlineMethod
from rl_core.models.mlp import Sizes
from rl_core.models.policies import ChoicePolicy, NormalPolicy
from rl_core.registry import family_of, named
from rl_core.scaling import Scaling
from rl_core.settings import read_tables
from rl_core.trainers.captured import Captured
from rl_core.trainers.checkpoints import Rows, alone, append_metrics, identity, load_checkpoint, read_checkpoint, write_checkpoint
from rl_core.trainers.imitation import ImitationSchedule, ImitationTrainer, mixture_of
from rl_core.trainers.offline import Act, Environment, OfflineSchedule, OfflineTrainer
from rl_core.trainers.online import OnlineSchedule, OnlineTrainer, ReplaySchedule, ReplayTrainer, Running

Policies = Callable[[int], Act]
"""What was learned so far, for so many episodes side by side: of a mixture each has a learner of its own."""

Judge = Callable[[Policies], Mapping[str, float]]

EVALUATIONS = 10
"""Of a run, where nothing else is said."""

PIECE, KEPT = 1000, 120.0
"""Steps after which progress is told, and seconds after which a run is kept: a killed one loses no more."""

MIXED = 30_000
"""Added to a seed for the learners that episodes of an evaluation have."""


@dataclass(frozen=True)
class Course:
    """A trainer, how far it is, and what a stretch of it is."""

    trainer: Any
    done: Callable[[], int]
    stretch: Callable[[int], object]
    """Go on for at most so many steps."""
    metrics: Callable[[], Mapping[str, float]]
    policies: Policies
    total: int
    evaluations: int
    about: Mapping[str, Any]
    """What run it is."""

    def run(
        self,
        judge: Judge,
        folder: Path | None = None,
        progress: Callable[[Mapping[str, float]], object] = lambda metrics: None,
    ) -> Rows:
        """Steps to the end, from where the folder says it was; a row at every evaluation.

        A run that was killed goes on at its last evaluation, or a few minutes before where it was, to the bit. `progress` is told
        of steps, too, between evaluations.

        Raises InputError for a folder that another run writes to, and where a policy's return is not a finite number.
        """
        with alone(folder):
            state, rows = read_checkpoint(folder, self.about, self.total)
            if state is not None:
                self.trainer.restore(state)
            every = max(self.total // self.evaluations, 1)
            while self.done() < self.total:
                self._until(min((self.done() // every + 1) * every, self.total), folder, rows, progress)
                rows.append({**self.metrics(), "step": self.done(), **judge(self.policies)})
                self._refuse_diverged(rows[-1].get("return", 0.0))
                append_metrics(folder, rows[-1])
                progress(rows[-1])
                self._keep(folder, rows)
        return rows

    def _refuse_diverged(self, earned: float) -> None:
        """Raises InputError where a return or a weight is not a number: choices of broken weights still earn something."""
        holder = self.trainer if hasattr(self.trainer, "nets") else self.trainer.learner
        nets: nn.Module = holder.nets
        if not math.isfinite(earned) or not all(bool(weight.isfinite().all()) for weight in nets.parameters()):
            raise InputError(
                f"step {self.done()}: found a return of {earned}, or weights, that are no numbers; expected numbers: the run has "
                "diverged. Try smaller learning rates or another reward_scale"
            )

    def _until(self, step: int, folder: Path | None, rows: Rows, progress: Callable[[Mapping[str, float]], object]) -> None:
        """Go on to a step, kept every few minutes."""
        kept = time.monotonic()
        while self.done() < step:
            self.stretch(min(step - self.done(), PIECE))
            progress({"step": self.done()})
            if self.done() < step and time.monotonic() - kept > KEPT:  # at the step itself its row comes first
                self._keep(folder, rows)
                kept = time.monotonic()

    def _keep(self, folder: Path | None, rows: Rows) -> None:
        if folder is not None:
            write_checkpoint(folder, self.trainer.state(), rows, self.about, self.total)


def course(
    name: str, settings: Path | None, *, data: Transitions | None, env: Environment, steps: int | None, seed: int | None,
    evaluations: int = EVALUATIONS, told: Mapping[str, Any], device: str = "cpu",
) -> Course:  # fmt: skip
    """The run that a command line asks for. `data`: a log, which offline methods need; `told`: names of data and environment.

    Raises InputError for settings that no method or schedule has, and for an offline method without data.
    """
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise InputError(
            f"--device: found {device}, and {torch.cuda.device_count()} GPUs; expected cpu, or cuda where there is one"
        )
    tables = read_tables(settings)
    made = changed(named(name), tables.get("method", {}))
    said = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    schedule = tables.get("schedule", {}) | said
    return course_of(
        made, schedule, tables.get("collection"), data=data, env=env, evaluations=evaluations, told=told, device=device
    )


def course_of(
    made: Any, schedule: Mapping[str, Any], collection: Mapping[str, Any] | None, *, data: Transitions | None, env: Environment,
    evaluations: int = EVALUATIONS, told: Mapping[str, Any], device: str = "cpu",
) -> Course:  # fmt: skip
    """A method's run by the trainer of its family, from tables of schedule and of collection; None: it does not collect.

    An offline method that explores goes online where there is a table of collection: on the data first, then on what it does
    itself. Raises InputError.
    """
    family, name, collects = family_of(type(made)), type(made).__name__, isinstance(made, WithExploration)
    if data is not None and data.sizes != (env.obs_size, env.action_size):
        raise InputError(f"--data: found sizes {data.sizes}; expected {(env.obs_size, env.action_size)}, as the environment has")
    if collection is not None and not (collects and family in ("online", "offline")):
        raise InputError(f"[collection]: found {', '.join(collection)}; expected none: {name} does not learn from replay")
    if family == "imitation":
        if data is None:
            raise InputError("--data: found none; expected what the expert did: a set such as pend-exp10, or a file of transitions")
        return imitation(
            made, env, data, from_table(ImitationSchedule, schedule), evaluations=evaluations, told=told, device=device
        )
    if family == "online" and not collects:
        if data is not None:
            raise InputError(f"--data: found some; expected none: {name} learns from what it has just done itself")
        return fresh(made, env, from_table(OnlineSchedule, schedule), evaluations=evaluations, told=told, device=device)
    normalize = family == "offline" and data is not None
    learning = from_table(OfflineSchedule, {"normalize": normalize, **schedule})
    if family == "online" or collection is not None:
        collected = replace(from_table(ReplaySchedule, collection or {}), learning=learning)
        return replayed(made, env, collected, data=data, evaluations=evaluations, told=told, device=device)
    if data is None:
        more = ", or a table [collection] in --settings: it can collect for itself" if collects else ""
        raise InputError(
            f"--data: found none; expected a set of the pendulum, or a file of transitions, which {name} learns from{more}"
        )
    return offline(made, data, learning, evaluations=evaluations, told=told, device=device)


def offline(
    method: OfflineMethod,
    data: Transitions,
    schedule: OfflineSchedule,
    *,
    evaluations: int = 1,
    told: Mapping[str, Any],
    device: str = "cpu",
) -> Course:
    """From a log. Steps are gradient steps."""
    made = OfflineTrainer(method, data, schedule, device=device)
    about = identity(method, schedule, **told)
    advance = captured(made)
    return Course(made, lambda: made.step, advance, made.metrics, lambda n: made.act, schedule.steps, evaluations, about)


def captured(trainer: OfflineTrainer) -> Callable[[int], None]:
    """How a trainer goes on: on a GPU in graphs of many steps, where its method lets it."""
    if trainer.device.type != "cuda":
        return trainer.advance
    try:
        return Captured(trainer).advance
    except InputError:
        return trainer.advance


def replayed(
    method: OfflineMethod, env: Environment, schedule: ReplaySchedule, *, data: Transitions | None = None, evaluations: int = 1,
    told: Mapping[str, Any], device: str = "cpu",
) -> Course:  # fmt: skip
    """From replay. Steps are gradient steps."""
    made = ReplayTrainer(method, env, schedule, data=data, device=device)
    each, total = schedule.count * schedule.ratio, schedule.learning.steps

    def stretch(most: int) -> None:
        until = schedule.offline_steps - made.learner.step
        made.advance(min(until, most) if until > 0 else max(int(most / each), 1))

    collection = {name: value for name, value in asdict(schedule).items() if name != "learning"}
    about = identity(method, schedule.learning, **told, collection=collection)
    return Course(made, lambda: made.learner.step, stretch, made.metrics, lambda n: made.act, total, evaluations, about)


def fresh(
    method: OnlineMethod,
    env: Environment,
    schedule: OnlineSchedule,
    *,
    evaluations: int = 1,
    told: Mapping[str, Any],
    device: str = "cpu",
) -> Course:
    """From fresh batches. Steps are of all environments together."""
    made, row, about = OnlineTrainer(method, env, schedule, device=device), dict[str, float](), identity(method, schedule, **told)
    return Course(
        made, lambda: made.taken, lambda most: row.update(made.advance()), lambda: dict(row), lambda n: made.act, schedule.steps,
        evaluations, about,
    )  # fmt: skip


def imitation(
    method: ImitationMethod, env: Environment, expert: Transitions, schedule: ImitationSchedule, *, evaluations: int = 1,
    told: Mapping[str, Any], device: str = "cpu",
) -> Course:  # fmt: skip
    """From an expert's rows. Steps are of the environment; until a first round has ended the last policy is what was learned."""
    made, about = ImitationTrainer(method, env, expert, schedule, device=device), identity(method, schedule, **told)

    def policies(episodes: int) -> Act:
        return made.returned(episodes, np.random.default_rng(MIXED + schedule.seed)) if made.actors else made.act

    return Course(made, lambda: made.step, made.advance, made.metrics, policies, schedule.steps, evaluations, about)


def load_policy(folder: Path | str, episodes: int = 1, seed: int = 0) -> Act:
    """What a run of `propel rl train` learned: observations (n, S) -> actions (n, A), scaled as it was. Without its data.

    `episodes`: how many go on side by side; of a mixture each has a learner that is drawn for it. Raises InputError for a folder
    without a checkpoint, or of a run that learned no control.
    """
    try:
        return policy_of(load_checkpoint(Path(folder)), episodes, seed)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def policy_of(kept: Mapping[str, Any], episodes: int = 1, seed: int = 0) -> Act:
    """The same of a checkpoint's content."""
    settings, state = dict(kept["about"]["method"]), kept["trainer"]
    made = method_from({"method": settings.pop("name"), **settings})
    family = family_of(type(made))
    if family == "token":
        raise InputError(f"found a run of {type(made).__name__}; expected one that learned control")
    if "running" in state:
        sizes, scaling = Sizes(**state["sizes"]), Running(**state["running"]).scaling()
        policy = _loaded((ChoicePolicy if state["choices"] else NormalPolicy)(sizes), state["nets"], "policy.")
        return _acting(lambda obs: policy(obs).mode().clamp(-1, 1), scaling)
    learner = state.get("learner", state)
    inner = made.inner if family == "imitation" else made

    def actor(weights: Mapping[str, Any], prefix: str = "") -> nn.Module:
        return _loaded(inner.networks(Sizes(**learner["sizes"]))["actor"], weights, prefix)

    if family == "imitation" and made.returns == "mixture" and state["actors"]:
        return mixture_of([actor(one) for one in state["actors"]], state["weights"], episodes, np.random.default_rng(MIXED + seed))
    return _acting(actor(learner["nets"], "actor."), Scaling(**learner["scaling"]))


def _loaded(module: nn.Module, weights: Mapping[str, Any], prefix: str) -> nn.Module:
    """With those of the weights whose names begin so."""
    module.load_state_dict({name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)})
    return module


def _acting(actor: Callable[[Tensor], Tensor], scaling: Scaling) -> Act:
    """A module as a function of arrays. It raises InputError for observations of another size, which might be spread unseen."""

    @torch.no_grad()
    def act(obs: NDArray[np.float64]) -> NDArray[np.float64]:
        if obs.shape[1:] != scaling.mean.shape:
            raise InputError(f"found observations of {obs.shape[1:]}; expected {tuple(scaling.mean.shape)}, as the policy learned")
        return np.asarray(actor(scaling.apply(torch.as_tensor(obs, dtype=torch.float32))).double().numpy())

    return act
