"""What a log does off the way of whoever waits: it forgets slow moments, tends sealed files, and goes on when nobody writes."""

from __future__ import annotations

import fcntl
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import apsw

from bandits.log.files import log_files, wal_bytes, writing
from bandits.log.keys import is_indexed, open_keys
from bandits.log.older import Older
from bandits.log.segments import gaps, records, segment
from bandits.log.sqlite import SqliteLog
from tests.faults.log_writer import entry_of
from tests.log.test_contract import wait_until
from tests.log.test_sqlite import all_indexed, rotate


def test_a_slow_moment_does_not_keep_later_entries_away(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    """Requests are refused by the expected wait, and only a commit measures it anew: what was measured once must not stay."""
    log = opened()
    wait_until(lambda: log.expected_wait < 0.002)  # a fresh log expects little, too
    with (folder / "writer.lock").open("a") as turns:
        fcntl.flock(turns, fcntl.LOCK_EX)
        writer = threading.Thread(target=log.append, args=([entry_of("slow")],))
        writer.start()
        time.sleep(1.5)
        fcntl.flock(turns, fcntl.LOCK_UN)
        writer.join()
    assert log.expected_wait > 0.05  # a tenth of 1.5 s
    wait_until(lambda: log.expected_wait < 0.005, 2.0)


def test_a_sealed_file_is_whole_without_what_lies_beside_it(folder: Path, tmp_path: Path, opened: Callable[..., SqliteLog]) -> None:
    """Also where it is sealed while its write-ahead log is being copied."""
    slow = threading.Event()

    def connect(path: Path) -> apsw.Connection:
        if threading.current_thread().name == "log copier":
            slow.wait(1.0)
        return writing(path)

    log = opened(connect=connect)
    log.append([entry_of(f"{number}", size=20_000) for number in range(400)])  # 8 MB: the copier begins
    log.append([entry_of("more")])
    rotate(log, "next")
    slow.set()
    first = log_files(folder)[0]
    wait_until(lambda: wal_bytes(first) == 0, 30.0)  # the keeper comes back after a while where it met a copier
    copy = tmp_path / "copy.sqlite"
    shutil.copy(first, copy)
    assert segment(copy).sealed
    assert len(list(records(copy))) == segment(copy).last_row == 401
    assert gaps(copy) == []


def test_what_a_killed_process_left_beside_a_sealed_file_is_taken_in(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened()
    log.append([entry_of("a")])
    rotate(log, "next")
    first = log_files(folder)[0]
    all_indexed(folder)
    wait_until(lambda: wal_bytes(first) == 0, 30.0)  # the keeper comes back after a while where it met a copier
    log.close()
    left = writing(first)
    left.execute("UPDATE log SET began_ns = began_ns + 1")
    assert wal_bytes(first) > 0
    opened()
    wait_until(lambda: wal_bytes(first) == 0, 30.0)  # the keeper comes back after a while where it met a copier
    left.close()


def test_a_file_is_sealed_by_age_where_nobody_writes(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    now = time.time_ns()
    log = opened(clock=lambda: now, rotate_seconds=60.0)
    log.append([entry_of("a")])
    now += 61 * 10**9
    wait_until(lambda: len(log_files(folder)) == 2)
    assert segment(log_files(folder)[0]).sealed
    now += 61 * 10**9
    time.sleep(1.2)  # one look at it
    assert len(log_files(folder)) == 2  # an empty file is not sealed
    assert log.append([entry_of("a")])[0].state == "repeated"


def test_a_sealed_file_that_is_gone_is_gone(folder: Path) -> None:
    """Also before its keys were indexed: whoever deleted it knew what for, and nobody is refused because of it."""
    folder.mkdir()
    older = Older(folder)
    older.add(folder / "log-00000001.sqlite")
    assert older.find([b"key"]) == {}
    assert older.paths == []
    older.close()


def test_a_damaged_file_does_not_end_the_tending_of_others(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened()
    log.append([entry_of(f"{number}") for number in range(50)])
    rotate(log, "second")
    log.close()
    first = log_files(folder)[0]
    content = bytearray(first.read_bytes())
    for at in range(8192, len(content)):
        content[at] ^= 0xA5
    first.write_bytes(content)
    for path in folder.glob("keys.sqlite*"):
        path.unlink()
    log = opened()
    rotate(log, "third")
    keys = open_keys(folder)
    wait_until(lambda: is_indexed(keys, 2))
    assert not is_indexed(keys, 1)
    keys.close()
