"""The decision log on SQLite: files that follow each other, processes that share them, and what is told of losses."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from bandits.log.files import bytes_of, head_file, log_files, read_head, writing
from bandits.log.keys import CHUNK, FORGOTTEN, forget, index, is_indexed, look_up, open_keys, unindexed
from bandits.log.port import LogFailedError, LogUnavailableError, Outcome, beside, decision_key
from bandits.log.segments import DamagedError, find, gaps, records, segment
from bandits.log.sqlite import COPIED_WAL, DAY_NS, LONG_WAL, MOST_WAL, SqliteLog
from ope.data import InputError
from tests.faults.log_writer import entry_of, group_names, read_ledger
from tests.log.test_contract import BEGIN, wait_until


def rotate(log: SqliteLog, name: str) -> None:
    """Seal the newest file; the one after it begins with an entry of that name."""
    before, log.rotate_bytes = log.rotate_bytes, 0
    assert log.append([entry_of(name)])[0].state == "stored"
    log.rotate_bytes = before


def all_indexed(folder: Path) -> None:
    """Wait until the keys of all sealed files are in the index."""
    keys = open_keys(folder)
    wait_until(lambda: not unindexed(keys, folder))
    keys.close()


def all_keys(folder: Path) -> list[bytes]:
    return [one.key for path in log_files(folder) for one in records(path)]


def whole(folder: Path) -> None:
    """Each key once; rows of each file from 1 on, without gaps."""
    keys = all_keys(folder)
    assert len(keys) == len(set(keys))
    for path in log_files(folder):
        rows = [one.row for one in records(path)]
        assert rows == list(range(1, len(rows) + 1))
        assert gaps(path) == []


def test_files_are_sealed_by_size(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened(rotate_bytes=200_000)
    for number in range(60):
        log.append([entry_of(f"{number}", size=10_000)])
    files = log_files(folder)
    assert [segment(path).sealed for path in files] == [True] * (len(files) - 1) + [False]
    assert 4 <= len(files) <= 15  # 600 kB of records; what the write-ahead log holds twice counts too
    assert all(path.stat().st_size <= 200_000 + 50_000 for path in files)  # looked at before each group
    assert len({segment(path).log_id for path in files}) == len(files)
    whole(folder)


def test_files_are_sealed_by_age(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    now = [BEGIN]
    log = opened(clock=lambda: now[0], rotate_seconds=60)
    for number in range(6):
        log.append([entry_of(f"{number}")])
        now[0] += 25 * 10**9
    assert [len(list(records(path))) for path in log_files(folder)] == [3, 3]
    now[0] += 10**15
    log.close()
    assert len(log_files(folder)) == 2  # time alone makes no files
    assert [segment(path).began_ns for path in log_files(folder)] == [BEGIN, BEGIN + 75 * 10**9]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_repeats_and_conflicts_reach_across_files(
    folder: Path, opened: Callable[..., SqliteLog], restart: bool, indexed: bool
) -> None:
    log = opened()
    first, kept = entry_of("a", answer=bytes(range(256))), entry_of("a", said="kept", kept=True)
    log.append([first, kept])
    if not indexed:  # the index cannot be written to: the keeper leaves it
        hold = open_keys(folder)
        hold.execute("BEGIN IMMEDIATE")
    rotate(log, "next")
    if indexed:
        all_indexed(folder)
    if restart:
        if not indexed:
            hold.execute("ROLLBACK")
            hold.execute("DELETE FROM files")  # as if it had ended before
            hold.execute("DELETE FROM keys")
        log.close()
        log = opened()
    for group in ([first], [first, entry_of("b")], [entry_of("c"), entry_of("a", answer=b"x"), entry_of("d")]):
        assert Outcome("repeated", first.answer) in log.append(group)
    assert log.append([entry_of("a", said="else")]) == [Outcome("conflict", b"")]
    assert log.append([kept, entry_of("a", said="also", kept=True)]) == [Outcome("conflict", b"")] * 2
    assert Counter(all_keys(folder))[beside(kept).key] == 1
    found = log.find(first.key)
    assert found is not None
    assert found[1:] == (1, *first[:5])
    if not indexed and not restart:
        hold.execute("ROLLBACK")
    if not indexed:
        hold.close()
    whole(folder)


def test_the_index_forgets_answers_after_the_window_and_still_knows_the_keys(
    folder: Path, opened: Callable[..., SqliteLog]
) -> None:
    now = [BEGIN]
    log = opened(clock=lambda: now[0], rotate_seconds=1e9)
    log.append([entry_of(f"{number}") for number in range(CHUNK + 10)])
    rotate(log, "second")
    all_indexed(folder)
    now[0] += 5 * DAY_NS
    rotate(log, "third")
    all_indexed(folder)
    keys = open_keys(folder)
    assert forget(keys, now[0] - log.window_ns) == 0
    now[0] += 3 * DAY_NS
    assert forget(keys, now[0] - log.window_ns) == CHUNK + 10
    key, late = decision_key("shop", "7"), decision_key("shop", "second")
    assert look_up(keys, [key])[key][:2] == (FORGOTTEN, 1)
    assert look_up(keys, [late])[late].asked.answer != b""  # sealed later
    keys.close()
    assert log.append([entry_of("7")]) == [Outcome("expired", b"")]
    assert log.append([entry_of("second")])[0].state == "repeated"
    found = find(folder, key)
    assert found is not None
    assert found.row == 8
    (folder / "log-00000001.sqlite").unlink()  # retention
    assert find(folder, key) is None
    assert log.append([entry_of("7")]) == [Outcome("expired", b"")]


def test_the_index_is_left_whole_when_its_disk_is_full(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened()
    log.append([entry_of(f"{number}") for number in range(CHUNK + 10)])
    log.close()
    shutil.copy(log_files(folder)[0], folder / "log-00000009.sqlite")
    keys = open_keys(folder)
    room = keys.pragma("page_count")
    keys.pragma("max_page_count", room)
    with pytest.raises(apsw.FullError):
        index(keys, folder / "log-00000009.sqlite", time.time_ns)
    assert not keys.in_transaction  # whoever else indexes need not wait
    assert not is_indexed(keys, 9)
    keys.pragma("max_page_count", 1 << 30)
    index(keys, folder / "log-00000009.sqlite", time.time_ns)
    assert is_indexed(keys, 9)
    assert keys.execute("SELECT count(*) FROM keys").get == CHUNK + 10
    keys.close()


def test_two_processes_share_a_folder(folder: Path, tmp_path: Path, opened: Callable[..., SqliteLog]) -> None:
    folder.mkdir()
    groups, shared = 60, 100
    command = [sys.executable, "-m", "tests.faults.log_writer", "append", str(folder)]
    ledgers = [tmp_path / "one", tmp_path / "two"]
    writers = [
        subprocess.Popen([*command, str(ledger), ledger.name, str(groups), "150000", str(shared)], stderr=subprocess.PIPE)
        for ledger in ledgers
    ]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said
    one, two = (read_ledger(ledger) for ledger in ledgers)
    both = {f"shared-{number}" for number in range(shared)}
    assert one.keys() & two.keys() == both
    assert {name: one[name] for name in both} == {name: two[name] for name in both}  # byte-identical answers
    assert len(log_files(folder)) >= 4
    whole(folder)
    expected = both | {name for who in ("one", "two") for number in range(groups) for name in group_names(who, number)}
    assert sorted(all_keys(folder)) == sorted(decision_key("shop", name) for name in expected)
    told = one | two
    log = opened()
    assert log.append([entry_of(name) for name in told]) == [Outcome("repeated", answer) for answer in told.values()]
    assert [one.state for one in log.append([entry_of(name, said="else") for name in told])] == ["conflict"] * len(told)


def test_several_may_begin_a_folder_at_once(folder: Path) -> None:
    for trial in range(10):
        together, failures = threading.Barrier(4), list[Exception]()

        def begin(number: int, trial: int = trial, together: threading.Barrier = together) -> None:
            together.wait()
            try:
                log = SqliteLog(folder / f"{trial}", reserve=1)
                log.append([entry_of(f"{number}"), entry_of("both")])
                log.close()
            except Exception as error:
                failures.append(error)  # noqa: B023

        threads = [threading.Thread(target=begin, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(all_keys(folder / f"{trial}")) == 5
        whole(folder / f"{trial}")


def test_a_process_goes_on_from_files_that_another_sealed(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    one, two = opened(), opened()
    one.append([entry_of("a")])
    for number in range(3):
        rotate(one, f"{number}")
    assert [outcome.state for outcome in two.append([entry_of("a"), entry_of("1"), entry_of("b")])] == [
        "repeated",
        "repeated",
        "stored",
    ]
    assert [one.key for one in records(log_files(folder)[-1])] == [decision_key("shop", "2"), decision_key("shop", "b")]
    whole(folder)


def test_a_writer_that_ended_between_sealing_and_the_next_file_is_gone_on_from(
    folder: Path, opened: Callable[..., SqliteLog]
) -> None:
    log = opened()
    log.append([entry_of("a")])
    log.close()
    connection = writing(log_files(folder)[0])
    connection.execute("UPDATE log SET sealed = 1, rows = 1")
    connection.close()
    log = opened()
    assert [one.state for one in log.append([entry_of("a"), entry_of("b")])] == ["repeated", "stored"]
    assert [segment(path).sealed for path in log_files(folder)] == [True, False]
    whole(folder)


def test_a_file_that_was_made_and_not_begun_is_gone_on_from(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened()
    entry = entry_of("a")
    log.append([entry])
    log.close()
    (folder / "log-00000002.sqlite").touch()
    found = find(folder, entry.key)  # a reader that comes at that moment
    assert found is not None
    assert found[1:] == (1, *entry[:5])
    log = opened()
    assert [one.state for one in log.append([entry, entry_of("b")])] == ["repeated", "stored"]


def test_sealed_and_live_files_are_read_alike(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened()
    log.append([entry_of(f"{number}") for number in range(5)])
    rotate(log, "5")
    log.append([entry_of("6")])
    sealed, live = log_files(folder)
    assert [one.row for one in records(sealed)] == [1, 2, 3, 4, 5]
    assert [one.row for one in records(live)] == [1, 2]
    assert [one.row for one in records(sealed, after=3)] == [4, 5]
    assert (segment(sealed).last_row, segment(live).last_row) == (5, 2)


def test_a_row_that_was_deleted_is_a_gap(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    """T32 for one file: the audit can fail."""
    log = opened()
    log.append([entry_of(f"{number}") for number in range(20)])
    log.close()
    (path,) = log_files(folder)
    connection = writing(path)
    connection.execute("DELETE FROM entries WHERE row IN (1, 7, 8, 20)")
    connection.execute("UPDATE entries SET record = x'00' WHERE row = 15")
    connection.close()
    assert gaps(path) == [(1, 1), (7, 8), (15, 15), (20, 20)]
    assert len(list(records(path))) == 15


def test_a_tail_that_vanished_is_a_gap_and_stays_one(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened()
    log.append([entry_of(f"{number}") for number in range(10)])
    log.close()
    log = opened()
    log.append([entry_of(f"late {number}") for number in range(5)])
    (path,) = log_files(folder)
    assert read_head(path) == 15
    lost = folder.with_name("copy") / path.name
    lost.parent.mkdir()
    for name in (path, head_file(path)):  # without the write-ahead log
        shutil.copy(name, lost.parent)
    assert gaps(lost) == [(11, 15)]
    again = SqliteLog(lost.parent, reserve=1)
    assert again.append([entry_of("after")])[0].state == "stored"
    again.close()
    assert gaps(lost) == [(11, 15)]  # rows that were given are not given again
    assert len(all_keys(lost.parent)) == 11


def test_what_is_noted_of_a_file_never_goes_back_nor_ahead(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    one, two = opened(), opened()
    one.append([entry_of("a")])
    two.append([entry_of(f"{number}") for number in range(9)])
    one.append([entry_of("a")])  # a repeat stores nothing
    assert read_head(log_files(folder)[0]) == 10
    one.rotate_bytes = 0
    assert one.append([entry_of("a")])[0].state == "repeated"
    assert len(log_files(folder)) == 2
    assert gaps(log_files(folder)[1]) == []  # nothing was stored in it


def test_an_altered_answer_is_never_given(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    for where in ("live", "sealed", "indexed"):
        log = opened()
        entry = entry_of(where)
        log.append([entry])
        log.close()
        path = log_files(folder)[-1]
        connection = writing(path)
        connection.execute("UPDATE entries SET answer = x'00' WHERE key = ?", (entry.key,))
        connection.close()
        log = opened()
        if where != "live":
            rotate(log, f"after {where}")
        if where == "indexed":
            all_indexed(folder)
        try:
            (outcome,) = log.append([entry])
        except (LogFailedError, LogUnavailableError):
            continue
        finally:
            log.close()
        assert outcome.answer != b"\0", where


def test_a_sealed_file_that_is_damaged_does_not_stop_new_entries(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened()
    log.append([entry_of(f"{number}") for number in range(200)])
    rotate(log, "second")
    log.close()
    sealed = log_files(folder)[0]
    content = bytearray(sealed.read_bytes())
    content[8192:] = bytes(len(content) - 8192)
    sealed.write_bytes(content)
    for path in folder.glob("keys.sqlite*"):
        path.unlink()
    log = opened()
    assert log.append([entry_of("new", said="x")._replace(fresh=True)])[0].state == "stored"
    assert log.append([entry_of("second")])[0].state == "repeated"


def test_the_write_ahead_log_does_not_grow_without_bound(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened()
    most = 0
    for number in range(60):
        log.append([entry_of(f"{number}-{at}", size=50_000) for at in range(30)])
        most = max(most, Path(f"{log_files(folder)[0]}-wal").stat().st_size)
    assert COPIED_WAL < most < 1.5 * LONG_WAL  # of 90 MB
    log.close()
    assert bytes_of(log_files(folder)[0]) < 120 << 20
    whole(folder)


def test_the_write_ahead_log_is_bounded_when_it_is_never_quiet(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened()
    numbers, left = itertools.count(), threading.Semaphore(0)
    room, most = threading.Semaphore(8), 0
    groups = 170  # of 1 MB: the queue is never empty before the end

    def told(outcome: Outcome | Exception) -> None:
        room.release()
        left.release()

    for _ in range(groups):
        room.acquire()
        entries = [entry_of(f"{next(numbers)}", size=62_500) for _ in range(16)]
        log.submit_all([(entry, told if at == 0 else lambda outcome: None) for at, entry in enumerate(entries)])
        wal = Path(f"{log_files(folder)[0]}-wal")
        most = max(most, wal.stat().st_size if wal.exists() else 0)
    for _ in range(groups):
        left.acquire()
    print(f"write-ahead log at most {most >> 20} MiB of {groups} MB written without a pause")  # noqa: T201
    assert most < 1.5 * MOST_WAL


def test_nothing_is_copied_before_there_is_enough(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    checkpoints: list[str] = []

    def connect(path: Path) -> apsw.Connection:
        connection = writing(path)
        connection.set_profile(lambda statement, _: checkpoints.append(statement) if "checkpoint" in statement else None)
        return connection

    log = opened(connect=connect)
    log.append([entry_of(f"{number}", size=10_000) for number in range(500)])  # 5 MB at once
    wait_until(lambda: len(checkpoints) == 2)  # the first when it was opened
    for number in range(50):
        log.append([entry_of(f"later {number}")])
    assert len(checkpoints) == 2  # 50 small entries are no 4 MiB
    wait_until(lambda: len(checkpoints) == 3)  # what is left over, once it is quiet


def test_a_reader_in_the_middle_of_a_file_does_not_hold_up_the_next(folder: Path, opened: Callable[..., SqliteLog]) -> None:
    log = opened()
    log.append([entry_of(f"{number}") for number in range(50)])
    reader = records(log_files(folder)[0])
    next(reader)
    started = time.monotonic()
    rotate(log, "next")
    assert time.monotonic() - started < 2.0
    assert len(list(reader)) == 49


def test_what_is_no_log_is_said(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    (folder / "log-00000001.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(InputError, match="found file is not a database; expected a log"):
        SqliteLog(folder, reserve=1)
    with pytest.raises(DamagedError):
        segment(folder / "log-00000001.sqlite")
    (folder / "log-00000001.sqlite").unlink()
    connection = apsw.Connection(str(folder / "log-00000001.sqlite"))
    connection.pragma("user_version", 3)
    connection.close()
    with pytest.raises(InputError, match="found version 3; expected 2: use the propel that wrote it"):
        SqliteLog(folder, reserve=1)
