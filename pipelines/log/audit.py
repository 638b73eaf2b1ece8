"""Audit: what the log holds, against its own numbers, against the lake and against what clients say. What is missing is named."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from bandits.log.files import log_files, number_of
from bandits.log.keys import look_up, open_keys
from bandits.log.port import Kind, Stored, decision_key
from bandits.log.segments import DamagedError, Segment, gaps, records, segment
from ope.data import BoolArray, InputError, IntArray
from pipelines.log.compact import Compacted, noted, of_tenant
from pipelines.log.held import TABLES, held_rows, read_until
from pipelines.nightly.lake import Lake, Snapshot, open_lake
from pipelines.nightly.settings import Settings

CHUNK = 500
"""Keys that are looked for together."""

NAMED = 20
"""Gaps of a file, at most, that are named."""

COUNTED = {Kind.DECISION: "decisions", Kind.REWARD: "rewards", Kind.SHOWN: "shown", Kind.QUARANTINED: "quarantined"}


@dataclass(slots=True)
class FileAudit:
    """One file."""

    file: str
    log_id: str
    sealed: bool
    last_row: int
    """The number of the last record that must be there."""
    records: int
    in_lake: int
    """Records that the lake holds."""
    gaps: list[tuple[int, int]]


@dataclass(slots=True)
class Audit:
    """What an audit counted, and what it found amiss."""

    attempts: int | None = None
    """Decisions that clients asked for; None where none told."""
    unlogged: int = 0
    """Those of them that are not in the log: refused, or never received."""
    decisions: int = 0
    rewards: int = 0
    shown: int = 0
    quarantined: int = 0
    compacted: int = 0
    """Records of files that are in the lake alone."""
    missing: int = 0
    """Numbers without a record that can be read."""
    conflicts: int = 0
    """Rewards and reports of what was shown that contradict an earlier one, kept beside it."""
    orphans: int = 0
    """Rewards and reports whose decision is not in the log."""
    files: list[FileAudit] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    """What is wrong, in words."""

    @property
    def appends(self) -> int:
        """Records that the log was given and made durable."""
        return self.decisions + self.rewards + self.shown + self.quarantined + self.compacted


def audit(
    settings: Settings,
    *,
    attempted: Collection[str] | None = None,
    acknowledged: Collection[str] = (),
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Audit:
    """Count every record of the log. `attempted`, `acknowledged`: ids of decisions of the settings' tenant, as clients noted them.

    Raises InputError where a file, the note of what was compacted, or a partition of the lake cannot be read.
    """
    result, folder, lake = Audit(), settings.log, open_lake(settings)
    snapshot, gone, files = lake.snapshot(), noted(folder), list[Segment]()
    for path in log_files(folder):
        try:
            files.append(segment(path))
        except DamagedError as error:
            result.findings.append(str(error))
    until = read_until(lake, snapshot)
    last = {one.log_id: max(one.last_row, until.get(one.log_id, 0)) for one in files}
    last |= {one.log_id: one.rows for one in gone.values()}
    held = held_rows(lake, snapshot, last)
    known = _Decisions(folder)
    for done, one in enumerate(files, 1):
        try:
            _audit_file(one, settings.tenant, held[one.log_id], until.get(one.log_id, 0), known, lake, snapshot, result)
        except DamagedError as error:
            result.missing += sum(end - start + 1 for start, end in gaps(one.path))
            result.findings.append(str(error))
        progress(done, len(files))
    _look_for_lost_files(folder, {number_of(path) for path in log_files(folder)}, gone, until, result)
    _look_into_lakes(settings, gone, held, result)
    result.orphans = known.orphans()
    if attempted is not None:
        _compare(result, known, settings.tenant, {*attempted, *acknowledged}, set(acknowledged))
    return result


def _audit_file(
    file: Segment, tenant: str, inside: BoolArray, until: int, known: _Decisions, lake: Lake, snapshot: Snapshot, result: Audit
) -> None:
    """Count a file up to its last record. `inside`: by row, what the lake holds; `until`: the last row that it was read to."""
    path, mine = file.path, f"\0{tenant}\0".encode()
    present, lost = 0, list[int]()
    for one in records(path, until=file.last_row):
        present += 1
        setattr(result, COUNTED[one.kind], getattr(result, COUNTED[one.kind]) + 1)
        result.conflicts += one.key.endswith(b"\0\0" + one.content)
        known.take(one)
        if one.row <= until and not inside[one.row] and one.key[1:].startswith(mine):
            lost.append(one.row)
    known.settle()
    missing = gaps(path) if present < file.last_row else []
    if until > file.last_row:
        missing.append((file.last_row + 1, until))
    result.files.append(FileAudit(path.name, file.log_id, file.sealed, file.last_row, present, int(inside.sum()), missing))
    result.missing += sum(end - start + 1 for start, end in missing)
    result.findings += [_gap(path, file.log_id, *ends, lake, snapshot) for ends in missing[:NAMED]]
    if len(missing) > NAMED:
        result.findings.append(f"{path.name}: and {len(missing) - NAMED} more gaps")
    if lost:
        result.findings.append(
            f"{path.name}: {len(lost):,} records that were read into the lake are not there, the first of them row {lost[0]}: "
            "restore the lake, or ingest into a new one"
        )


def _gap(path: Path, log_id: str, first: int, last: int, lake: Lake, snapshot: Snapshot) -> str:
    """A gap, between which records it is, and what the lake says was there."""
    what = f"record {first} is" if first == last else f"records {first} to {last} are"
    before = next(iter(records(path, first - 2, first - 1)), None)
    after = next(iter(records(path, last, last + 1)), None)
    beside = [f"{side} {_said(one)}" for side, one in (("after", before), ("before", after)) if one is not None]
    text = f"{path.name} ({log_id}): {what} missing or damaged{', ' if beside else ''}{' and '.join(beside)}"
    ids = _in_lake(lake, snapshot, log_id, first, last)
    return f"{text}; the lake holds {len(ids)} of them: {', '.join(ids[:3])}" if ids else text


def _said(one: Stored) -> str:
    """What a record is of."""
    return f"{one.kind.name.lower()} {' '.join(one.key.decode(errors='replace').split(chr(0))[2:3])}"


def _in_lake(lake: Lake, snapshot: Snapshot, log_id: str, first: int, last: int) -> list[str]:
    """What the lake holds under some numbers, each as the id of its decision."""
    ids = []
    for table in TABLES:
        for entry in snapshot.find(table):
            found = lake.read(entry, ["decision_id", "log_id", "log_row"])
            inside = pc.and_(pc.greater_equal(found["log_row"], first), pc.less_equal(found["log_row"], last))
            some = found.filter(pc.and_kleene(pc.equal(found["log_id"], log_id), inside))
            what = "" if table == "decisions" else f"{table} of "
            ids += [f"{what}{id_}" for id_ in some["decision_id"].to_pylist()]
    return ids


def _look_for_lost_files(
    folder: Path, there: set[int], gone: Mapping[int, Compacted], until: Mapping[str, int], result: Audit
) -> None:
    """Files that are not there are compacted, or lost: their numbers are in the index, in the note, and in what the lake read."""
    read = {int(log_id.split("-")[1]): log_id for log_id in until}
    known = set(range(1, max(there, default=0))) | set(gone) | set(read) | _indexed(folder)
    for file in sorted(known - there):
        if file in gone:
            result.compacted += gone[file].rows
        else:
            result.findings.append(
                f"log-{file:08d}.sqlite: found no such file, and no note that it was compacted: restore it from a backup"
            )
    if not there and not gone and not known:
        raise InputError(f"found no log in {folder}; expected files that `propel serve` wrote: see serve.data")


def _indexed(folder: Path) -> set[int]:
    """Numbers of files whose keys are in the index."""
    if not (folder / "keys.sqlite").exists():
        return set()
    with closing(open_keys(folder)) as keys:
        found: list[Any] = keys.execute("SELECT file FROM files").fetchall()
    return {file for (file,) in found}


def _look_into_lakes(settings: Settings, gone: Mapping[int, Compacted], held: Mapping[str, BoolArray], result: Audit) -> None:
    """Of every file that was compacted, whether the lakes that held its records still do."""
    last = {one.log_id: one.rows for one in gone.values()}
    others = {tenant for one in gone.values() for tenant in one.snapshots} - {settings.tenant}
    every = dict(held)
    for tenant in sorted(others):
        lake = open_lake(of_tenant(settings, tenant))
        for log_id, rows in held_rows(lake, lake.snapshot(), last).items():
            every[log_id] = every[log_id] | rows
    for file, one in sorted(gone.items()):
        lacking = one.rows - int(every[one.log_id][: one.rows + 1].sum())
        if lacking > 0:
            result.findings.append(
                f"log-{file:08d}.sqlite was compacted, and the lake lacks {lacking:,} of its {one.rows:,} records now: "
                "go back to a list of the lake that holds them, or restore it from a copy"
            )


def _compare(result: Audit, known: _Decisions, tenant: str, asked: set[str], acknowledged: set[str]) -> None:
    """Clients' ids against the log's."""
    ids = sorted(asked)
    there = known.has([decision_key(tenant, id_) for id_ in ids])
    result.attempts, result.unlogged = len(ids), int((~there).sum())
    lost = [id_ for id_, logged in zip(ids, there.tolist(), strict=True) if not logged and id_ in acknowledged]
    result.findings += [f"decision {id_}: a client was answered, and the log does not have it" for id_ in lost[:NAMED]]
    if len(lost) > NAMED:
        result.findings.append(f"and {len(lost) - NAMED:,} more decisions that a client was answered")


class _Decisions:
    """Which decisions there are, by hashes of their keys, and whatever names a decision that was not met yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[IntArray] = []
        self._new: list[int] = []
        self._aimed: list[bytes] = []

    def take(self, one: Stored) -> None:
        """Note a record."""
        if one.kind is Kind.DECISION:
            self._new.append(hash(one.key))
        elif one.kind is not Kind.QUARANTINED:
            self._aimed.append(b"\0".join([b"d", *one.key.split(b"\0", 3)[1:3]]))

    def settle(self) -> None:
        """Leave out what named a decision that was met by now."""
        self._parts.append(np.array(self._new, dtype=np.int64))
        self._new = []
        there = self._met(self._aimed)
        self._aimed = [key for key, met in zip(self._aimed, there.tolist(), strict=True) if not met]

    def has(self, keys: Sequence[bytes]) -> BoolArray:
        """Which decisions the log has, or had before their file was compacted."""
        there = self._met(keys)
        index = self.folder / "keys.sqlite"
        if there.all() or not index.exists():
            return there
        left = iter(np.flatnonzero(~there).tolist())
        with closing(open_keys(self.folder)) as connection:
            while places := list(islice(left, CHUNK)):
                found = look_up(connection, [keys[at] for at in places])
                there[places] = [keys[at] in found for at in places]
        return there

    def orphans(self) -> int:
        """Records that name a decision which is nowhere."""
        return int((~self.has(self._aimed)).sum())

    def _met(self, keys: Sequence[bytes]) -> BoolArray:
        hashes = np.array([hash(key) for key in keys], dtype=np.int64)
        there = np.zeros(len(keys), dtype=np.bool_)
        for part in self._parts:
            there |= np.isin(hashes, part)
        return there
