"""Arms of the token family: the small language model, on sums of two numbers or on sums after fillers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ope.data import InputError
from rl_core.config import to_table
from rl_core.families.token import TokenMethod
from rl_core.models.lm import LM
from rl_core.tasks.addition import Addition, Fillers
from rl_core.trainers.checkpoints import Rows
from rl_core.trainers.token import Imitable, Schedule, Trainer, imitate, run
from rl_core.verify.arms import code_of, digest, keep

TASKS: Mapping[str, Imitable] = {"addition": Addition(), "fillers": Fillers()}


def task_of(about: Mapping[str, Any]) -> Imitable:
    """The task of a run, from what its checkpoint says that it is. Raises InputError for one that is not among `TASKS`."""
    for task in TASKS.values():
        if type(task).__name__ == about.get("task"):
            return task
    raise InputError(f"found a run of {about.get('task', 'no task')}; expected one of {', '.join(TASKS)}")


@dataclass(frozen=True)
class TokenArm:
    """A method on a task, with a schedule whose seed is the arm's."""

    method: TokenMethod
    task: str
    schedule: Schedule

    @property
    def name(self) -> str:
        """What progress calls it."""
        return f"{type(self.method).__name__} on {self.task}, seed {self.schedule.seed}"

    def lacks(self, folder: Path) -> str:
        """The model that imitated examples."""
        return "" if start_path(self.task, folder).exists() else f"imitation for {self.task}"

    def key(self) -> str:
        """Digest of all that tells it from others, and of the code."""
        method = {"method": type(self.method).__name__} | to_table(self.method)
        code = code_of(__name__, type(self.method).__module__)
        return digest({"method": method, "task": self.task, "schedule": asdict(self.schedule), "code": code})

    def begin(self, folder: Path) -> None:
        """Train the start."""
        start(self.task, folder)

    def run(self, folder: Path) -> Rows:
        """Metrics of every step."""
        return run(Trainer(self.method, TASKS[self.task], self.schedule, start(self.task, folder)))


def start(task: str, folder: Path) -> LM:
    """The model that every arm of a task begins with: trained from nothing on examples, kept like an arm.

    The addition model stops once it answers three sums in ten, as the pages say; that of fillers stops after 500 steps.
    """
    path, model = start_path(task, folder), LM()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    if task == "addition":
        model, _ = imitate(TASKS[task], until=0.30, every=5)
    else:
        model, _ = imitate(TASKS[task], steps=500, batch=96, learning_rate=2e-3)
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    keep(path, content.getvalue())
    return model


def start_path(task: str, folder: Path) -> Path:
    """Where it is kept."""
    return folder / f"start-{digest([task, code_of(__name__)])}.pt"


def passed_at(rows: Rows, step: int) -> float:
    """pass@1 after a step."""
    return next(row["pass_at_1"] for row in rows if row["step"] == step)
