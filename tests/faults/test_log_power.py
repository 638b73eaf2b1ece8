"""T3: a power cut forgets, tears and reorders what was written and not synced; what was acknowledged stays.

The file system under SQLite keeps, beside each real file, what a disk would surely hold: what was there at the last sync. At a cut,
drawn by a seed, each write since then is kept, lost, or kept for some of its sectors, in any order. Locking is exclusive: a file
system in Python has no shared memory.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from bandits.log.files import head_file, log_files, reading
from bandits.log.port import Outcome, decision_key
from bandits.log.segments import gaps, records
from bandits.log.sqlite import SqliteLog
from tests.faults.log_writer import entry_of, group_names

FULL = "PROPEL_KILLS" in os.environ
SEEDS = max(500, int(os.environ["PROPEL_KILLS"])) if FULL else 25
GROUPS = 14
ROTATE = 120_000
"""Bytes of a file: two to three files in a run."""

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""

Change = tuple[int, bytes | None]
"""Where, and what was written; None: the file was cut there."""

numbers = itertools.count()


class Disk(apsw.VFS):
    """Files as SQLite sees them, and as they would stand after a cut. `calls` counts what changes or syncs them."""

    def __init__(self) -> None:
        self.name = f"power-{next(numbers)}"
        super().__init__(self.name, "")
        self.durable: dict[str, bytes] = {}
        self.pending: dict[str, list[Change]] = {}
        self.deleted: set[str] = set()
        self.calls = 0
        self.at_call: Callable[[], None] = lambda: None

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return File(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        self.called()
        super().xDelete(filename, syncdir)
        self.durable.pop(filename, None)  # SQLite deletes a log that it has copied and synced: as a file it counts no more
        self.pending.pop(filename, None)

    def called(self) -> None:
        """Something is about to change."""
        self.calls += 1
        self.at_call()

    def after_cut(self, name: str, draw: random.Random) -> bytes:
        """What a file might hold after a cut now."""
        image = bytearray(self.durable.get(name, b""))
        kept = [change for change in self.pending.get(name, []) if draw.random() < 0.5]
        draw.shuffle(kept)
        for offset, data in kept:
            if data is None:
                del image[offset:]
                continue
            image.extend(bytes(max(0, offset + len(data) - len(image))))
            torn = draw.random() < 0.3
            for start in range(0, len(data), SECTOR):
                if not (torn and draw.random() < 0.5):
                    part = data[start : start + SECTOR]
                    image[offset + start : offset + start + len(part)] = part
        return bytes(image)


class File(apsw.VFSFile):
    """A real file, whose changes since the last sync are remembered."""

    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self.disk, self.name = disk, name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        if (real := Path(self.name)).exists():  # made and synced without this file system
            disk.durable.setdefault(self.name, real.read_bytes())
        super().__init__("", name, flags)
        disk.pending.setdefault(self.name, [])

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self.disk.called()
        super().xWrite(data, offset)
        self.disk.pending[self.name].append((offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self.disk.called()
        super().xTruncate(newsize)
        self.disk.pending[self.name].append((newsize, None))

    def xSync(self, flags: int) -> None:  # noqa: N802
        """The real disk is not asked: this is the one that counts."""
        self.disk.called()
        self.disk.durable[self.name] = Path(self.name).read_bytes()
        self.disk.pending[self.name].clear()


def connect_to(disk: Disk, synchronous: str) -> Callable[[Path], apsw.Connection]:
    """As a log connects, over another file system and alone."""

    def connect(path: Path) -> apsw.Connection:
        connection = apsw.Connection(str(path), vfs=disk.name)
        connection.set_busy_timeout(10_000)
        for statement in (
            "PRAGMA locking_mode = EXCLUSIVE",
            "PRAGMA page_size = 8192",
            "PRAGMA journal_mode = WAL",
            f"PRAGMA synchronous = {synchronous}",
            "PRAGMA wal_autocheckpoint = 0",
            "PRAGMA secure_delete = ON",
            "PRAGMA cache_size = -16384",
        ):
            connection.execute(statement)
        return connection

    return connect


class Cut:
    """What was acknowledged before a cut, and the folder as it stands after it. The key index is lost altogether."""

    def __init__(self, disk: Disk, source: Path, target: Path, draw: random.Random, at: int) -> None:
        self.disk, self.source, self.target, self.draw, self.at = disk, source, target, draw, at
        self.told: dict[str, bytes] = {}
        self.acknowledged: dict[str, bytes] | None = None

    def __call__(self) -> None:
        """Cut the power, if it is time: in the thread that acknowledges, so that nothing is told meanwhile."""
        if self.disk.calls != self.at:
            return
        self.acknowledged = dict(self.told)
        self.target.mkdir()
        for name in [*self.disk.pending]:
            image = self.disk.after_cut(name, self.draw)
            if image or name in self.disk.durable:
                (self.target / Path(name).name).write_bytes(image)
        for head in self.source.glob("log-*.head"):
            if (database := self.target / head.with_suffix(".sqlite").name).exists() and self.draw.random() < 0.5:
                head_file(database).write_bytes(head.read_bytes())


def run(folder: Path, seed: int, synchronous: str, at: int) -> tuple[Cut, int]:
    """A run of a log whose power is cut at a call, and the calls that it made."""
    disk = Disk()
    cut = Cut(disk, folder / "before", folder / "after", random.Random(seed), at)
    disk.at_call = cut
    log = SqliteLog(cut.source, rotate_bytes=ROTATE, reserve=1, connect=connect_to(disk, synchronous))
    for number in range(GROUPS):
        names = group_names("w", number)
        for name, outcome in zip(names, log.append([entry_of(name, size=4000) for name in names]), strict=True):
            cut.told[name] = outcome.answer
    log.close()
    disk.unregister()
    return cut, disk.calls


def audit(cut: Cut) -> tuple[int, int]:
    """Acknowledged entries that a log opened after the cut does not repeat, and files or groups that are damaged."""
    assert cut.acknowledged is not None
    log = SqliteLog(cut.target, rotate_bytes=ROTATE, reserve=1)
    names = list(cut.acknowledged)
    answers = log.append([entry_of(name, size=4000) for name in names])
    lost = sum(outcome != Outcome("repeated", cut.acknowledged[name]) for name, outcome in zip(names, answers, strict=True))
    assert log.append([entry_of("after")])[0].state == "stored"
    log.close()
    damaged, stored = 0, list[bytes]()
    for path in log_files(cut.target):
        with reading(path) as connection:
            damaged += connection.pragma("integrity_check") != "ok"
            rows = connection.execute("SELECT count(*) FROM entries").get
        connection.close()
        found = [one.key for one in records(path)]
        damaged += len(found) != rows
        damaged += len(gaps(path))
        stored += found
    damaged += len(stored) - len(set(stored))
    for number in range(GROUPS):
        there = [decision_key("shop", name) in stored for name in group_names("w", number)]
        damaged += any(there) and not all(there)
    return lost, damaged


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Calls of an undisturbed run, about."""
    return run(tmp_path_factory.mktemp("counted"), 0, "FULL", -1)[1]


def trials(folder: Path, calls: int, synchronous: str, seeds: int) -> tuple[int, int, int, int]:
    """Cuts, acknowledged entries, those that were lost, and damages, over seeds."""
    cuts = acknowledged = lost = damaged = 0
    for seed in range(seeds):
        at = random.Random(f"cut {seed}").randint(1, calls)
        cut, _ = run(folder / f"{synchronous}-{seed}", seed, synchronous, at)
        if cut.acknowledged is None:
            continue  # the cut was to come after the last call
        less, broken = audit(cut)
        cuts, acknowledged, lost, damaged = cuts + 1, acknowledged + len(cut.acknowledged), lost + less, damaged + broken
    return cuts, acknowledged, lost, damaged


def test_a_power_cut_loses_nothing_that_was_acknowledged(calls: int, tmp_path: Path) -> None:
    cuts, acknowledged, lost, damaged = trials(tmp_path, calls, "FULL", SEEDS)
    print(f"T3 FULL: seeds 0 to {SEEDS - 1}, {cuts} cuts, {acknowledged} acknowledged, {lost} lost, {damaged} damaged")  # noqa: T201
    assert cuts >= 0.9 * SEEDS
    assert acknowledged > 10 * cuts  # of 42 in a run: cuts come at any moment of it
    assert (lost, damaged) == (0, 0)


def test_the_cuts_would_find_a_log_that_acknowledges_too_early(calls: int, tmp_path: Path) -> None:
    cuts, _, lost, _ = trials(tmp_path, calls * 2 // 3, "NORMAL", 8)  # it makes fewer calls: it seldom syncs
    print(f"T3 NORMAL: {cuts} cuts, {lost} acknowledged lost")  # noqa: T201
    assert cuts >= 6
    assert lost > 0
