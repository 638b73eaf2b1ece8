"""What a run leaves in its folder: checkpoints that are whole or not there, and a line per row of metrics."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from bandits.durable import sync
from ope.data import InputError
from rl_core.config import to_table

Rows = list[dict[str, float]]

CHECKPOINT, METRICS, LOCK = "checkpoint.pt", "metrics.jsonl", "lock"


def identity(method: Any, schedule: Any, **others: Any) -> dict[str, Any]:
    """What a run is, whatever its length: method, schedule but for the steps, and whatever else it is told of."""
    rest = {name: value for name, value in asdict(schedule).items() if name != "steps"}
    return {"method": {"name": type(method).__name__} | to_table(method), "schedule": rest} | others


def read_checkpoint(folder: Path | None, about: Mapping[str, Any], steps: int) -> tuple[dict[str, Any] | None, Rows]:
    """A trainer's state and its rows so far; none where the folder has no checkpoint.

    Raises InputError where the folder is of another run, naming what differs, or of one that was to go further than `steps`.
    """
    if folder is None or not (folder / CHECKPOINT).exists():
        return None, []
    kept = load_checkpoint(folder)
    if differs := sorted(_differences(kept["about"], about)):
        raise InputError(f"{folder}: found a run of another {', '.join(differs)}; expected the same to go on, or a new folder")
    if kept["asked"] > steps:
        raise InputError(f"{folder}: found a run of {kept['asked']} steps; expected at least as many, not {steps}")
    write_metrics(folder, kept["rows"])  # rows of steps after it will come again
    return kept["trainer"], kept["rows"]


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """All of it: `trainer`, `rows`, `about`, `asked`. Raises InputError where there is none."""
    if not (folder / CHECKPOINT).exists():
        raise InputError(f"{folder / CHECKPOINT}: found none; expected that of a run: propel rl train METHOD --out {folder}")
    try:
        kept: dict[str, Any] = torch.load(folder / CHECKPOINT, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, UnpicklingError, OSError, ValueError, LookupError) as error:
        raise InputError(
            f"{folder / CHECKPOINT}: found a damaged file ({error}); expected a whole checkpoint: train anew"
        ) from None
    if not isinstance(kept, dict) or not {"trainer", "rows", "about", "asked"} <= set(kept):
        raise InputError(f"{folder / CHECKPOINT}: found something else; expected the checkpoint of a run")
    return kept


@contextmanager
def alone(folder: Path | None) -> Iterator[None]:
    """Nobody else writes to the folder meanwhile. Raises InputError where somebody does."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: found a run that is still going on there; expected nobody, or another folder") from None
        yield


def write_checkpoint(
    folder: Path, state: Mapping[str, Any], rows: Sequence[dict[str, float]], about: Mapping[str, Any], asked: int
) -> None:
    """State, rows, what run it is, and how many steps were asked for."""
    save(folder / CHECKPOINT, {"trainer": state, "rows": list(rows), "about": dict(about), "asked": asked})


def append_metrics(folder: Path | None, row: Mapping[str, float]) -> None:
    """A line, at once: somebody may be watching."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")


def save(path: Path, content: Any) -> None:
    """Whole or not at all, and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(content, part)
    sync(part)
    part.replace(path)
    sync(path.parent)


def write_metrics(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """All lines, in the place of those that were there."""
    part = (folder / METRICS).with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(folder / METRICS)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> set[str]:
    """Dotted names of what is not the same; of records of other kinds, their names alone."""
    if any(one.get(name) != other.get(name) for name in ("name", "kind")):
        return {where.removesuffix(".") or "name"}
    found = set()
    for name in one.keys() | other.keys():
        a, b = one.get(name), other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= _differences(a, b, f"{where}{name}.")
        elif a != b:
            found.add(f"{where}{name}")
    return found
