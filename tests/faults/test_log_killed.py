"""T1, T4 and T5 of a decision log: SIGKILL at any storage call, a disk that no longer confirms writes, and one that is full."""

from __future__ import annotations

import itertools
import os
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bandits.log.files import log_files, reading, writing
from bandits.log.port import Entry, LogUnavailableError, Outcome, decision_key
from bandits.log.segments import find, gaps, records, segment
from bandits.log.sqlite import SqliteLog
from tests.faults import harm
from tests.faults.log_writer import FAILED, Writers, entry_of, group_names, read_ledger, writers

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")

FULL = "PROPEL_KILLS" in os.environ
POINTS = max(200, int(os.environ["PROPEL_KILLS"])) if FULL else 8
"""Kills, about; `make faults` asks for more of them."""

GROUPS = 40
ROTATE = 100_000
"""Bytes of a file: pages of 8 KiB make that a dozen groups, so that three files are sealed, indexed and followed."""

SHARES = [
    ("pwrite64", "-", 0.3),
    ("fdatasync", "-", 0.25),
    ("fsync", "-", 0.05),
    ("ftruncate", "-", 0.1),
    ("unlink", "-", 0.05),
    ("rename", "-", 0.05),
    ("pwrite64", "keys.sqlite-wal", 0.15),
    ("fdatasync", "keys.sqlite-wal", 0.05),
    ("pwrite64", "log-00000002.head", 0.05),
]
"""Calls, the file that they are counted on, and which share of the kills is at each."""

serving = pytest.fixture(scope="module")(writers)


def audit(folder: Path, ledger: dict[str, bytes]) -> Counter[str]:
    """Acknowledged entries that are lost, keys that are twice, groups that are partial, files that are damaged. All must be 0."""
    found: Counter[str] = Counter()
    stored: Counter[bytes] = Counter()
    answers: dict[bytes, bytes] = {}
    for path in log_files(folder):
        with closing(reading(path)) as connection:
            found["damaged"] += connection.pragma("integrity_check") != "ok"
        rows = list(records(path))
        found["gaps"] += len(gaps(path)) + ([one.row for one in rows] != list(range(1, len(rows) + 1)))
        found["sealed"] += segment(path).sealed
        stored.update(one.key for one in rows)
        answers |= {one.key: one.answer for one in rows}
    found["lost"] = sum(answers.get(decision_key("shop", name)) != answer for name, answer in ledger.items())
    found["twice"] = sum(count - 1 for count in stored.values())
    for number in range(GROUPS):
        there = [decision_key("shop", name) in stored for name in group_names("w", number)]
        found["partial"] += any(there) and not all(there)
    return found


def goes_on(folder: Path, ledger: dict[str, bytes]) -> tuple[float, int]:
    """Seconds until a log that is opened again has taken an entry, and wrong answers to repeats."""
    started = time.monotonic()
    log = SqliteLog(folder, rotate_bytes=ROTATE, reserve=1)
    assert log.append([entry_of("after")])[0].state == "stored"
    ready = time.monotonic() - started
    repeats = log.append([entry_of(name) for name in ledger]) if ledger else []
    wrong = sum(outcome != Outcome("repeated", answer) for outcome, answer in zip(repeats, ledger.values(), strict=True))
    wrong += sum(log.append([entry_of(name, said="else")])[0] != Outcome("conflict", b"") for name in list(ledger)[-3:])
    log.close()
    return ready, wrong


def counted(serving: Writers, folder: Path) -> dict[tuple[str, str], int]:
    """Calls of an undisturbed run, of the thread that makes most of them."""
    calls = {}
    for path in {path for _, path, _ in SHARES}:
        status, found, _ = serving.run(folder / path, GROUPS, ROTATE, "count", path if path == "-" else str(folder / path / path))
        assert status == 0
        assert len(read_ledger((folder / path).with_suffix(".ledger"))) == sum(len(group_names("w", n)) for n in range(GROUPS))
        calls |= {(call, path): n for call, n in found.items()}
    return calls


@needs_strace
def test_a_killed_writer_loses_nothing_that_it_acknowledged(serving: Writers, tmp_path: Path) -> None:
    calls = counted(serving, tmp_path)
    total: Counter[str] = Counter()
    slowest = 0.0
    for call, path, share in SHARES:
        points = max(1, round(POINTS * share)) if calls[call, path] else 0
        for point in range(points):
            folder = tmp_path / "killed"
            when = 1 + (2 * point + 1) * calls[call, path] // (2 * points)
            on = path if path == "-" else str(folder / path)
            status, _, _ = serving.run(folder, GROUPS, ROTATE, call, on, when)
            assert status in (-9, 0)  # groups form by chance: the last calls may not come about
            ledger = read_ledger(folder.with_suffix(".ledger"))
            found = audit(folder, ledger)
            ready, found["wrong"] = goes_on(folder, ledger)
            after = audit(folder, ledger)
            for what in ("lost", "twice", "partial", "damaged", "gaps", "wrong"):
                assert found[what] == after[what] == 0, (what, call, path, when)
            slowest = max(slowest, ready)
            total.update({"killed": int(status == -9), "acknowledged": len(ledger), "sealed": found["sealed"]})
            shutil.rmtree(folder)
            folder.with_suffix(".ledger").unlink()
    kills, told = total["killed"], total["acknowledged"]
    print(f"T1 log writer: {kills} kills, {told} acknowledged, 0 lost, 0 twice, ready in {slowest:.2f} s")  # noqa: T201
    assert total["killed"] >= 0.9 * POINTS
    assert total["sealed"] > 0
    assert slowest <= 3.0


@needs_strace
def test_a_writer_that_shares_the_folder_with_a_killed_one_goes_on(serving: Writers, tmp_path: Path) -> None:
    points = POINTS // 8
    for point in range(points):
        folder = tmp_path / f"both{point}"
        log = SqliteLog(folder, rotate_bytes=ROTATE, reserve=1)
        stop, own = threading.Event(), dict[str, bytes]()

        def write(log: SqliteLog = log, stop: threading.Event = stop, own: dict[str, bytes] = own) -> None:
            while not stop.is_set():
                name = f"own-{len(own)}"
                (outcome,) = log.append([entry_of(name)])
                assert outcome.state == "stored"
                own[name] = outcome.answer

        thread = threading.Thread(target=write)
        thread.start()
        call, most = (("pwrite64", 300), ("fdatasync", 90))[point % 2]
        status, _, _ = serving.run(folder, GROUPS, ROTATE, call, "-", 20 + (2 * point + 1) * most // (2 * points))
        before = len(own)
        (outcome,) = log.append([entry_of("next")])  # the killed one's turn is free again
        assert outcome.state == "stored"
        stop.set()
        thread.join()
        assert status in (-9, 0)
        assert before > 0
        ledger = read_ledger(folder.with_suffix(".ledger")) | own
        found = audit(folder, ledger)
        log.close()
        ready, found["wrong"] = goes_on(folder, ledger)
        assert not found["lost"] + found["twice"] + found["partial"] + found["damaged"] + found["gaps"] + found["wrong"], found
        assert ready <= 3.0


@needs_strace
@pytest.mark.parametrize("first", range(1, 14) if FULL else [1, 12])  # groups in flight share: 40 make 14 transactions or more
def test_nothing_is_acknowledged_after_the_disk_did_not_confirm(serving: Writers, tmp_path: Path, first: int) -> None:
    folder = tmp_path / "eio"
    SqliteLog(folder, reserve=1).close()  # so that the writer's first is that of a group
    status, _, trace = serving.run(folder, GROUPS, 1 << 30, "eio", when=first)
    acknowledged = read_ledger(folder.with_suffix(".ledger"))
    lines = [line.split(maxsplit=1)[1] for line in trace.splitlines()]
    failed = next(at for at, line in enumerate(lines) if "EIO" in line)
    told = [at for at, line in enumerate(lines) if line.startswith("write(") and "w-" in line]
    assert status == FAILED  # `on_failure` was called once
    assert len(told) == len(acknowledged)
    assert not [at for at in told if at > failed]
    found = audit(folder, acknowledged)
    _, found["wrong"] = goes_on(folder, acknowledged)
    assert not found["lost"] + found["twice"] + found["partial"] + found["damaged"] + found["gaps"] + found["wrong"], found
    print(f"T4 log writer: EIO from fdatasync {first} on, {len(acknowledged)} acknowledged before, 0 after, 0 lost")  # noqa: T201


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    with harm.small_disk(tmp_path / "disk", 16) as folder:
        yield folder


def clean(folder: Path, acknowledged: dict[str, bytes]) -> bool:
    found = audit(folder, acknowledged)
    return not found["lost"] + found["twice"] + found["damaged"] + found["gaps"]


def fill(disk: Path, left: int) -> Path:
    """A file that leaves that many bytes of room."""
    path = disk / "other"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - left))
    return path


def append_until_full(log: SqliteLog, acknowledged: dict[str, bytes], numbers: Iterator[int], size: int = 3_000) -> float:
    """Append until the log says that the disk is full. Seconds that this took it to say."""
    while True:
        group: list[Entry] = [entry_of(f"{next(numbers)}", size=size) for _ in range(3)]
        started = time.monotonic()
        try:
            outcomes = log.append(group)
        except LogUnavailableError as error:
            assert "the disk is full" in str(error)  # noqa: PT017
            return time.monotonic() - started
        acknowledged |= {entry.key.decode().rsplit("\0")[-1]: one.answer for entry, one in zip(group, outcomes, strict=True)}


def repeats(log: SqliteLog, acknowledged: dict[str, bytes], size: int = 3_000) -> bool:
    expected = [Outcome("repeated", answer) for answer in acknowledged.values()]
    return log.append([entry_of(name, size=size) for name in acknowledged]) == expected


@pytest.mark.parametrize("rotate_bytes", [1 << 30, 500_000])
def test_a_full_disk_is_told_and_gone_on_from(disk: Path, rotate_bytes: int) -> None:
    folder, acknowledged, numbers = disk / "log", dict[str, bytes](), itertools.count()
    log = SqliteLog(folder, rotate_bytes=rotate_bytes)
    reserve = folder / "reserve"
    assert reserve.stat().st_size == 16 * 2**20 // 20  # small disks keep a twentieth
    slowest = 0.0
    for left in (700_000, 300_000, 0, 150_000, 40_000):  # the disk fills in the middle of a group, of a checkpoint, of a new file
        other = fill(disk, left)
        slowest = max(slowest, append_until_full(log, acknowledged, numbers))
        assert not reserve.exists()
        assert shutil.disk_usage(disk).free >= 16 * 2**20 // 40  # whoever runs it can write
        with pytest.raises(LogUnavailableError, match="it goes on by itself once there is"):
            log.append([entry_of("refused")])
        for path in log_files(folder):
            assert gaps(path) == []
        other.unlink()
        started = time.monotonic()
        assert repeats(log, acknowledged)
        assert log.append([entry_of(f"after {left}")])[0].state == "stored"
        assert time.monotonic() - started <= 2.0
        assert reserve.exists()
    assert find(folder, decision_key("shop", "refused")) is None
    log.close()
    log = SqliteLog(folder)
    assert repeats(log, acknowledged)
    log.close()
    assert clean(folder, acknowledged)
    print(f"T5 log: 5 times full, {len(acknowledged)} acknowledged, 0 lost, told within {1000 * slowest:.0f} ms")  # noqa: T201
    assert slowest <= 0.1


def next_file(folder: Path, disk: Path, left: int, sealed: bool) -> str:
    """What is wrong where so many bytes are left when the next file begins; nothing, if all is well."""
    log = SqliteLog(folder, reserve=1)
    acknowledged = {f"{number}": entry_of(f"{number}").answer for number in range(9)}
    log.append([entry_of(name, answer=answer) for name, answer in acknowledged.items()])
    if sealed:  # by another process
        with writing(log_files(folder)[0]) as other:
            other.execute("UPDATE log SET sealed = 1, rows = 9")
        other.close()
    else:
        log.rotate_bytes = 0
    filling = fill(disk, left)
    told: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
    log.submit(entry_of("next"), told.put)
    try:
        outcome = told.get(timeout=2.0)
    except queue.Empty:
        filling.unlink()
        return "nobody tells"  # and its end cannot be waited for
    filling.unlink()
    log.rotate_bytes = 1 << 30
    try:
        if not isinstance(outcome, (Outcome, LogUnavailableError)):
            return f"told {outcome}"
        if not repeats(log, acknowledged, 300):
            return "acknowledged entries are not repeated"
        expected = "repeated" if isinstance(outcome, Outcome) else "stored"
        if (found := log.append([entry_of("next")])[0].state) != expected:
            return f"{found} after {outcome}"
    finally:
        log.close()
    return "" if clean(folder, acknowledged) else "not clean"


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.filterwarnings("default::pytest.PytestUnhandledThreadExceptionWarning")  # it is told below, with the bytes left
def test_a_disk_that_is_full_when_the_next_file_begins(disk: Path, sealed: bool) -> None:
    wrong = {}
    for left in range(0, 140_000, 4_096):  # from no page to enough for a new file, its write-ahead log and its index
        folder = disk / f"log{left}"
        if found := next_file(folder, disk, left, sealed):
            wrong[left] = found
        shutil.rmtree(folder)
    assert wrong == {}
