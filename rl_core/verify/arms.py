"""Arms of experiments: one run of a method from a seed, kept by what it depends on, so that a killed verification goes on.

An arm's key is a digest of method, settings, seed and of the source of every module that its numbers come from. Methods share arms.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rl_core.config import method_from, to_table
from rl_core.families.token import TokenMethod
from rl_core.models.lm import LM
from rl_core.tasks.addition import Addition, Fillers
from rl_core.trainers.token import Schedule, Task, Trainer, imitate, run

TASKS: Mapping[str, Task] = {"addition": Addition(), "fillers": Fillers()}

Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Arm:
    """A method on a task, with a schedule whose seed is the arm's."""

    method: TokenMethod
    task: str
    schedule: Schedule

    @property
    def name(self) -> str:
        """What progress calls it."""
        return f"{type(self.method).__name__} on {self.task}, seed {self.schedule.seed}"

    def table(self) -> dict[str, Any]:
        """All that tells it from others."""
        method = {"method": type(self.method).__name__} | to_table(self.method)
        return {"method": method, "task": self.task, "schedule": asdict(self.schedule)}

    def key(self) -> str:
        """Digest of that and of the code."""
        return _digest({**self.table(), "code": code_of(__name__, type(self.method).__module__)})


@dataclass(frozen=True)
class Margin:
    """What an experiment must show, and what it showed."""

    name: str
    required: str
    measured: str
    passed: bool


class Arms:
    """Runs arms, as many at once as there are cores, one thread each; finished ones are read from a folder."""

    def __init__(self, folder: Path, tell: Callable[[str], object] = lambda text: None) -> None:
        self.folder, self.tell = folder, tell

    def run(self, arms: Iterable[Arm]) -> list[Rows]:
        """Metrics of every step of each arm, in their order."""
        wanted = list(arms)
        missing = {arm.key(): arm for arm in wanted if not self._path(arm).exists()}
        if missing:
            context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
            with ProcessPoolExecutor(min(len(missing), os.cpu_count() or 1), mp_context=context) as pool:
                tasks = sorted({arm.task for arm in missing.values() if not start_path(arm.task, self.folder).exists()})
                for task in tasks:
                    self.tell(f"imitation for {task}")
                list(pool.map(_begin, tasks, [str(self.folder)] * len(tasks)))
                waiting = {pool.submit(_finish, json.dumps(arm.table()), str(self.folder)): arm for arm in missing.values()}
                for done, future in enumerate(as_completed(waiting), 1):
                    future.result()
                    self.tell(f"{waiting[future].name} ({done} of {len(missing)})")
        return [json.loads(self._path(arm).read_text()) for arm in wanted]

    def _path(self, arm: Arm) -> Path:
        return self.folder / f"{arm.key()}.json"


def _begin(task: str, folder: str) -> None:
    """Make a task's start in a process of its own."""
    torch.set_num_threads(1)
    start(task, Path(folder))


def _finish(table: str, folder: str) -> None:
    """Run an arm in a process of its own, and keep it."""
    torch.set_num_threads(1)
    told = json.loads(table)
    arm = Arm(method_from(told["method"]), told["task"], Schedule(**told["schedule"]))
    path = Path(folder) / f"{arm.key()}.json"
    rows = run(Trainer(arm.method, TASKS[arm.task], arm.schedule, start(arm.task, Path(folder))))
    _keep(path, json.dumps(rows).encode())


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
    part = path.with_suffix(f".{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), part)
    part.replace(path)
    return model


def start_path(task: str, folder: Path) -> Path:
    """Where it is kept."""
    return folder / f"start-{_digest([task, code_of(__name__)])}.pt"


def mean(values: Sequence[float]) -> float:
    """Of an arm's seeds."""
    return sum(values) / len(values)


def passed_at(rows: Rows, step: int) -> float:
    """pass@1 after a step."""
    return next(row["pass_at_1"] for row in rows if row["step"] == step)


@cache
def code_of(*modules: str) -> str:
    """Digest of the source of modules and of all of this project's that they import, directly or not."""
    found: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        spec = None if name in found else find_spec(name)
        if spec is None or spec.origin is None:
            continue
        found[name] = Path(spec.origin).read_bytes()
        waiting += _imported(found[name])
    return _digest({name: hashlib.sha256(found[name]).hexdigest() for name in sorted(found)})


def _imported(source: bytes) -> Iterator[str]:
    """Modules of this project that a module imports; the registry's list of methods is not what a number comes from."""
    for node in ast.walk(ast.parse(source)):
        name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if name.split(".")[0] in ("ope", "rl_core") and name != "rl_core.registry":
            yield name


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
