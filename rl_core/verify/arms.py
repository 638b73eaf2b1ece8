"""Arms of experiments: one run of a method from a seed, kept by what it depends on, so that a killed verification goes on.

An arm's key is a digest of method, settings, seed and of the source of every module that its numbers come from. Methods share arms.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from ope.data import InputError
from rl_core.trainers.checkpoints import Rows


class Arm(Protocol):
    """A run that can be made in a process of its own: a frozen dataclass."""

    @property
    def name(self) -> str:
        """What progress calls it."""
        ...

    def lacks(self, folder: Path) -> str:
        """What it shares with other arms and the folder does not have yet; "" for nothing."""
        ...

    def key(self) -> str:
        """Digest of all that its numbers depend on, code included."""
        ...

    def begin(self, folder: Path) -> None:
        """Make what it lacks."""
        ...

    def run(self, folder: Path) -> Rows:
        """Metrics by step."""
        ...


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
            count = min(len(missing), os.cpu_count() or 1)
            with ProcessPoolExecutor(count, mp_context=context, initializer=_follow, initargs=(os.getpid(),)) as pool:
                shared = {lack: arm for arm in missing.values() if (lack := arm.lacks(self.folder))}
                for name in shared:
                    self.tell(name)
                list(pool.map(_begin, shared.values(), [self.folder] * len(shared)))
                waiting = {pool.submit(_finish, arm, self.folder / f"{key}.json", self.folder): arm for key, arm in missing.items()}
                for done, future in enumerate(as_completed(waiting), 1):
                    future.result()
                    self.tell(f"{waiting[future].name} ({done} of {len(missing)})")
        return [json.loads(self._path(arm).read_text()) for arm in wanted]

    def _path(self, arm: Arm) -> Path:
        return self.folder / f"{arm.key()}.json"


def _follow(parent: int) -> None:
    """End with the process that asked: one that was killed ends nobody by itself."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(arm: Arm, folder: Path) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    arm.begin(folder)


def _finish(arm: Arm, path: Path, folder: Path) -> None:
    """Run an arm in a process of its own, and keep it under the key that it had when it was asked for."""
    torch.set_num_threads(1)
    try:
        rows = arm.run(folder)
    except InputError as error:
        raise InputError(f"{arm.name}: {error}") from None
    keep(path, json.dumps(rows).encode())


def keep(path: Path, content: bytes) -> None:
    """A file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


@cache
def code_of(*modules: str) -> str:
    """Digest of the source of modules and of all of this project's that they import, directly or not."""
    found: dict[str, bytes] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        spec = None if name in found else _spec(name)
        if spec is None or spec.origin is None:
            continue
        found[name] = Path(spec.origin).read_bytes()
        waiting += _imported(found[name])
    return digest({name: hashlib.sha256(found[name]).hexdigest() for name in sorted(found)})


def _spec(name: str) -> ModuleSpec | None:
    """Of a module; None of what a module holds."""
    try:
        return find_spec(name)
    except ModuleNotFoundError:
        return None


def _imported(source: bytes) -> Iterator[str]:
    """Modules of this project that a module imports; the registry's list of methods is not what a number comes from."""
    for node in ast.walk(ast.parse(source)):
        name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and name.split(".")[0] in ("ope", "rl_core") and name != "rl_core.registry":
            yield name
            yield from (f"{name}.{one.name}" for one in node.names)  # which may be modules, too


def digest(content: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
