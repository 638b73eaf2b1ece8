"""Compaction: sealed files of the log are deleted once the lake holds every record of them. What repeats are answered by stays.

A note of what goes is durable before anything is deleted: a file that is missing was compacted, or is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from bandits.durable import sync
from bandits.log.files import COMPACTED, head_file, log_files, number_of, wal_bytes
from bandits.log.keys import is_indexed, open_keys
from bandits.log.segments import Segment, gaps, records, segment
from ope.data import BoolArray, InputError, IntArray
from pipelines.log.held import held_rows
from pipelines.nightly.lake import Lake, alone, open_lake, replace_durably
from pipelines.nightly.settings import DAY_NS, Settings


class Compacted(msgspec.Struct, frozen=True):
    """A file of the log that the lake holds."""

    file: int
    log_id: str
    rows: int
    at_ns: int
    snapshots: dict[str, str]
    """By tenant: the lake's list that held its records."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """What was deleted, and why the rest was not."""

    deleted: tuple[Compacted, ...]
    bytes: int
    kept: Mapping[str, str]
    """Reason by the name of a file."""


def compact(
    settings: Settings,
    *,
    older_than_days: float = 7.0,
    clock: Callable[[], int] = time.time_ns,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Compaction:
    """Delete the sealed files that began long enough ago and whose every record the lakes of their tenants hold.

    Raises BusyError while a night is running, LakeError where a partition is not what was listed, InputError where the note does
    not belong to this log: nothing is then deleted.
    """
    folder, before = settings.log, clock() - int(older_than_days * DAY_NS)
    with ExitStack() as locks:
        locks.enter_context(alone(open_lake(settings)))
        finish(folder)
        files = log_files(folder)
        kept: dict[str, str] = {path.name: "it is written to" for path in files[-1:]}
        old, indexed = [], _indexed(folder, files[:-1])
        for path in files[:-1]:
            found = segment(path)
            if why := _not_yet(found, indexed[path], before):
                kept[path.name] = why
            else:
                old.append(found)
        held = _Held(settings, locks, {one.log_id: one.last_row for one in old})
        gone: list[Compacted] = []
        size = 0
        for done, one in enumerate(old, 1):
            if why := held.lacks(one):
                kept[one.path.name] = why
            else:
                gone.append(Compacted(number_of(one.path), one.log_id, one.last_row, clock(), held.snapshots))
                size += one.path.stat().st_size
            progress(done, len(old))
        if gone:
            note(folder, gone)
            finish(folder)
    return Compaction(tuple(gone), size, kept)


def noted(folder: Path) -> dict[int, Compacted]:
    """What was compacted, by the number of its file. Raises InputError for a note that cannot be read."""
    path = folder / COMPACTED
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
        return {one.file: one for one in (msgspec.json.decode(line, type=Compacted) for line in lines)}
    except msgspec.MsgspecError as error:
        raise InputError(f"{path}: found {error}; expected a line of JSON for each file: restore it from a backup") from None


def note(folder: Path, gone: Sequence[Compacted]) -> None:
    """Say, durably, that files are to go."""
    every = noted(folder) | {one.file: one for one in gone}
    replace_durably(folder / COMPACTED, b"".join(msgspec.json.encode(every[file]) + b"\n" for file in sorted(every)))


def finish(folder: Path) -> None:
    """Delete what was noted, and what is left beside files that are gone.

    Raises InputError for a file that has the number of one that was noted and is another, as where a log was begun anew.
    """
    for file, one in noted(folder).items():
        path = folder / f"log-{file:08d}.sqlite"
        if path.exists() and (found := segment(path).log_id) != one.log_id:
            raise InputError(
                f"{path}: found the log {found}; {COMPACTED} says that {one.log_id} had this number and was deleted: move that "
                "note away where the log was begun anew"
            )
        for each in (path, Path(f"{path}-wal"), Path(f"{path}-shm"), head_file(path)):
            each.unlink(missing_ok=True)
    sync(folder)


def _indexed(folder: Path, files: Sequence[Path]) -> dict[Path, bool]:
    """Whether the keys of each file are all in the index."""
    if not files:
        return {}
    with closing(open_keys(folder)) as keys:
        return {path: is_indexed(keys, number_of(path)) for path in files}


def _not_yet(found: Segment, indexed: bool, before_ns: int) -> str:
    """Why a file is not looked at now."""
    if not found.sealed:
        return "it is not sealed"
    if not indexed:
        return "its keys are not in the index yet; a running service puts them there"
    if wal_bytes(found.path):
        return "its write-ahead log is not copied into it yet; a running service does that"
    if found.began_ns > before_ns:
        return "it is not old enough"
    return ""


def of_tenant(settings: Settings, tenant: str) -> Settings:
    """The same settings for another tenant, whose lake lies beside."""
    return Settings(msgspec.structs.replace(settings.file, tenant=tenant), settings.points, settings.folder)


class _Held:
    """Which records the lakes of the tenants hold, each lake read once, and locked: no night of theirs reads the log meanwhile."""

    def __init__(self, settings: Settings, locks: ExitStack, last: Mapping[str, int]) -> None:
        self.settings, self.locks, self.last = settings, locks, last
        self.snapshots: dict[str, str] = {}
        self._held: dict[str, dict[str, BoolArray]] = {}

    def lacks(self, one: Segment) -> str:
        """Why a file is needed still; "" where it is not."""
        if missing := gaps(one.path):
            ends = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in missing[:3])
            return f"records are missing or damaged ({ends}): restore it from a backup first"
        for tenant, rows in _rows_by_tenant(one.path).items():
            held = self._of(tenant).get(one.log_id)
            lacking = rows if held is None else rows[~held[rows]]
            if len(lacking):
                return f"the lake of tenant {tenant!r} lacks {len(lacking):,} of its records, the first of them row {lacking[0]}"
        return ""

    def _of(self, tenant: str) -> dict[str, BoolArray]:
        if tenant not in self._held:
            lake: Lake = open_lake(of_tenant(self.settings, tenant))
            if tenant != self.settings.tenant and lake.folder.exists():
                self.locks.enter_context(alone(lake))
            snapshot = lake.snapshot()
            self.snapshots[tenant] = snapshot.id
            self._held[tenant] = held_rows(lake, snapshot, self.last)
        return self._held[tenant]


def _rows_by_tenant(path: Path) -> dict[str, IntArray]:
    found: dict[bytes, list[int]] = {}
    for one in records(path):
        found.setdefault(one.key.split(b"\0", 2)[1], []).append(one.row)
    return {tenant.decode(): np.array(rows) for tenant, rows in found.items()}
