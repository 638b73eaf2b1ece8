"""The decision log on SQLite: one committer thread, one transaction and one fsync for all that arrived meanwhile.

While a group is being made durable the next one forms, so that an idle log answers after one fsync and a loaded one after two at
most. Several processes write one file by turns. A file is sealed by its size or age and never written again; the keys of sealed
files go into an index, off the way of whoever waits.
"""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import apsw

from bandits.log.files import (
    Connect,
    begin,
    bytes_of,
    check_sqlite,
    file_after,
    head_file,
    log_files,
    reading,
    wal_bytes,
    writing,
)
from bandits.log.keys import forget, index, look_up, open_keys, unindexed
from bandits.log.port import Done, Entry, LogFailedError, LogUnavailableError, Outcome, Stored, beside, check_of
from bandits.log.segments import find
from ope.data import InputError

Result: TypeAlias = tuple[Done, Outcome | Exception]

MOST = 512
"""Entries in one transaction, about: a batch is not cut."""

PACE = 0.002
"""Seconds from the start of one transaction to that of the next, at least. Each costs as much CPU as several entries: on a quick
disk a loaded log would spend most of its time on small ones. An idle log does not wait."""

CHUNKS = (64, 16, 4, 1)
"""Rows of one statement: each statement hands Python's lock over once."""

INSERT = {
    size: f"INSERT INTO entries (kind, key, content, record, answer, checksum) VALUES {','.join(['(?,?,?,?,?,?)'] * size)} "  # noqa: S608
    "ON CONFLICT (key) DO NOTHING"
    for size in CHUNKS
}

MOST_WAL = 64 << 20
"""Bytes of write-ahead log at which a checkpoint no longer waits for a quiet moment."""

QUIET_WAL = 4 << 20
"""Bytes of write-ahead log from which on a quiet moment is used."""

RESERVE = 64 << 20
"""Bytes kept on the disk, so that whoever runs the service can still write when it is full."""

DAY_NS = 86_400 * 10**9


def tell(results: list[Result]) -> None:
    """Tell each what became of its entry."""
    for done, outcome in results:
        done(outcome)


class SqliteLog:
    """A log in a folder, shared by the processes that open it.

    `deliver` is called from the committer with the results of a group; by default it tells each in turn. `on_failure` is called
    once when the disk did not confirm a write: the process must then end, for nothing more is acknowledged.
    Raises InputError for a folder or a file that cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        clock: Callable[[], int] = time.time_ns,
        rotate_bytes: int = 256 << 20,
        rotate_seconds: float = 3600.0,
        retry_days: float = 7.0,
        reserve: int = RESERVE,
        deliver: Callable[[list[Result]], object] = tell,
        on_failure: Callable[[LogFailedError], object] = lambda error: None,
        connect: Connect = writing,
    ) -> None:
        check_sqlite()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.clock = folder, clock
        self.rotate_bytes, self.rotate_ns = rotate_bytes, int(rotate_seconds * 10**9)
        self.window_ns, self.reserve = int(retry_days * DAY_NS), reserve
        self.deliver, self.on_failure, self.connect = deliver, on_failure, connect
        self.failed: LogFailedError | None = None
        self.full = False
        self._added = rotate_bytes  # bytes since its size was looked at
        self.groups = 0
        """Transactions so far."""
        self.last_group = 0
        """Entries of the last one."""
        self._queue: queue.SimpleQueue[list[tuple[Entry, Done]] | None] = queue.SimpleQueue()
        self._sent, self._settled = [0, 0], [0, 0]  # entries and bytes; one thread writes each, so that no lock is needed
        self._began = 0.0  # when the last transaction did
        self._seconds = 0.01  # of a commit, smoothed
        self._turns = (folder / "writer.lock").open("a")
        self._earlier: dict[Path, apsw.Connection] = {}
        self._indexed: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._to_index: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._closing = False
        try:
            self._keys = open_keys(folder)
            self._earlier = {path: reading(path) for path in unindexed(self._keys, folder)}
            files = log_files(folder)
            self._open(files[-1] if files else file_after(None, folder))
            self._keep_reserve()
        except apsw.Error as error:
            raise InputError(
                f"{folder}: found {error}; expected a log that can be written: see to its disk and permissions"
            ) from None
        for path in self._earlier:
            self._to_index.put(path)
        self._committer = threading.Thread(target=self._run, name="log committer", daemon=True)
        self._keeper = threading.Thread(target=self._keep_keys, name="log keeper", daemon=True)
        self._committer.start()
        self._keeper.start()

    def submit(self, entry: Entry, done: Done) -> None:
        """Queue an entry; `done` is told once it is durable, or refused."""
        self.submit_all([(entry, done)])

    def submit_all(self, entries: list[tuple[Entry, Done]]) -> None:
        """Queue entries that share a transaction. From one thread at a time."""
        self._sent[0] += len(entries)
        self._sent[1] += sum(entry.size for entry, _ in entries)
        self._queue.put(entries)

    def append(self, entries: Sequence[Entry]) -> list[Outcome]:
        """Store entries and wait until they are durable. Raises LogUnavailableError or LogFailedError."""
        results: queue.SimpleQueue[tuple[int, Outcome | Exception]] = queue.SimpleQueue()
        self.submit_all([(entry, lambda told, at=at: results.put((at, told))) for at, entry in enumerate(entries)])  # type: ignore[misc]
        found: dict[int, Outcome] = {}
        for _ in entries:
            at, told = results.get()
            if isinstance(told, Exception):
                raise told
            found[at] = told
        return [found[at] for at in range(len(entries))]

    def find(self, key: bytes) -> Stored | None:
        """The entry of a key, wherever it stands; None where it is not, or its file is gone."""
        return find(self.folder, key)

    @property
    def waiting(self) -> tuple[int, int]:
        """Entries, and bytes, that were submitted and not settled."""
        return self._sent[0] - self._settled[0], self._sent[1] - self._settled[1]

    @property
    def expected_wait(self) -> float:
        """Seconds that an entry submitted now would wait: the commit under way, and those of the groups before it."""
        waiting = self._sent[0] - self._settled[0]
        return self._seconds * (1 + (waiting > 0) + waiting // MOST)

    def close(self) -> None:
        """Settle what was submitted, write the file out, and end."""
        if self._closing:
            return
        self._closing = True
        self._queue.put(None)
        self._to_index.put(None)
        self._committer.join()
        self._keeper.join()
        for connection in (self._live, self._keys, *self._earlier.values()):
            connection.close()
        os.close(self._head)
        self._turns.close()

    # The committer's thread

    def _run(self) -> None:
        ending = False
        while not ending:
            try:
                taken = self._queue.get(timeout=1.0)
            except queue.Empty:
                self._checkpoint(QUIET_WAL)
                continue
            if (early := self._began + PACE - time.monotonic()) > 0:
                time.sleep(early)
            self._began = time.monotonic()
            group: list[tuple[Entry, Done]] = []
            while taken is not None:
                group += taken
                if len(group) >= MOST:
                    break
                try:
                    taken = self._queue.get_nowait()
                except queue.Empty:
                    break
            ending = taken is None
            if group:
                self._settle(group)
            if self._queue.empty():
                self._checkpoint(QUIET_WAL)
        self._checkpoint(0)

    def _settle(self, group: list[tuple[Entry, Done]]) -> None:
        started = time.monotonic()
        outcomes: Sequence[Outcome | Exception]
        try:
            outcomes = self._commit([entry for entry, _ in group])
        except (LogUnavailableError, LogFailedError) as error:
            outcomes = [error] * len(group)
        self._seconds += 0.1 * (time.monotonic() - started - self._seconds)
        self.groups, self.last_group = self.groups + 1, len(group)
        size = sum(entry.size for entry, _ in group)
        self._added += size
        self._settled[0] += len(group)
        self._settled[1] += size
        self.deliver([(done, outcome) for (_, done), outcome in zip(group, outcomes, strict=True)])

    def _commit(self, entries: list[Entry]) -> list[Outcome]:
        """Store entries in one durable transaction. Raises LogUnavailableError or LogFailedError."""
        if self.failed is not None:
            raise self.failed
        self._check_room()
        while not self._indexed.empty():
            if (old := self._earlier.pop(self._indexed.get(), None)) is not None:
                old.close()
        try:
            with self._turn():
                self._start()
                outcomes = self._stored(entries)
                row: Any = self._live.execute("SELECT max(row) FROM entries").get
                self._live.execute("COMMIT")
        except apsw.FullError as error:
            self._roll_back()
            raise self._filled(str(error)) from None
        except apsw.BusyError as error:
            self._roll_back()
            raise LogUnavailableError(f"{self._path}: found {error}; expected a turn to write: end what holds it") from None
        except Exception as error:  # whatever it was: what is stored is not known, and the thread must not end in silence
            self._roll_back()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._filled(str(error)) from None
            raise self._gave_up(error) from None
        if row:
            os.pwrite(self._head, row.to_bytes(8, "little"), 0)
        return outcomes

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the writers' lock, which the system hands on at once: SQLite's own would be asked for again and again."""
        fcntl.flock(self._turns, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._turns, fcntl.LOCK_UN)

    def _start(self) -> None:
        """Begin a transaction on a file that is not sealed; seal one that is large or old enough."""
        while True:
            self._live.execute("BEGIN IMMEDIATE")
            ((sealed, began, last),) = self._live.execute("SELECT sealed, began_ns, (SELECT max(row) FROM entries) FROM log")
            if not sealed:
                due = self.clock() - began > self.rotate_ns or self._is_large()
                if not (due and last):
                    return
                self._live.execute("UPDATE log SET sealed = 1, rows = ?", (last,))
            self._live.execute("COMMIT")
            self._advance()

    def _is_large(self) -> bool:
        """Whether the file has its size; it is looked at each time that a sixteenth of that was added here."""
        if self._added < self.rotate_bytes // 16:
            return False
        self._added = 0
        return bytes_of(self._path) > self.rotate_bytes

    def _advance(self) -> None:
        """Go on to the file after a sealed one."""
        sealed = self._path
        self._live.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._live.close()
        os.close(self._head)
        self._earlier[sealed] = reading(sealed)
        self._open(file_after(sealed, self.folder))
        self._to_index.put(sealed)

    def _open(self, path: Path) -> None:
        self._path, self._live, self._added = path, begin(path, self.clock, self.connect), self.rotate_bytes
        self._head = os.open(head_file(path), os.O_RDWR | os.O_CREAT, 0o644)

    def _stored(self, entries: list[Entry]) -> list[Outcome]:
        """What becomes of entries, in the transaction that was begun."""
        older = self._in_older_files([entry.key for entry in entries if not entry.fresh])
        before = self._live.total_changes()
        if not older:
            rows = [(entry[0], entry[1], entry[2], entry[3], entry[4], check_of(entry)) for entry in entries]
            at = 0
            for size in CHUNKS:
                while len(rows) - at >= size:
                    self._live.execute(INSERT[size], [value for row in rows[at : at + size] for value in row])
                    at += size
            if self._live.total_changes() - before == len(rows):
                return [Outcome("stored", entry.answer) for entry in entries]
            self._live.execute("ROLLBACK")  # some are known: find out which
            self._live.execute("BEGIN IMMEDIATE")
        return [self._stored_one(entry, older) for entry in entries]

    def _stored_one(self, entry: Entry, older: dict[bytes, tuple[bytes, bytes]]) -> Outcome:
        known = older.get(entry.key)
        if known is None:
            if self._insert(entry):
                return Outcome("stored", entry.answer)
            known = self._live.execute("SELECT content, answer FROM entries WHERE key = ?", (entry.key,)).get
        if known[0] == b"":
            return Outcome("expired", b"")
        if known[0] == entry.content:
            return Outcome("repeated", known[1])
        if entry.kept:
            self._insert(beside(entry))
        return Outcome("conflict", b"")

    def _insert(self, entry: Entry) -> bool:
        self._live.execute(INSERT[1], (*entry[:5], check_of(entry)))
        return bool(self._live.changes())

    def _in_older_files(self, wanted: list[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
        """Content and answer of keys that are in files before this one."""
        found: dict[bytes, tuple[bytes, bytes]] = {}
        for start in range(0, len(wanted), 500):
            some = wanted[start : start + 500]
            found |= {key: (known.content, known.answer) for key, known in look_up(self._keys, some).items()}
            marks = ",".join("?" * len(some))
            for connection in self._earlier.values():
                rows = connection.execute(f"SELECT key, content, answer FROM entries WHERE key IN ({marks})", some)  # noqa: S608
                found |= {key: (content, answer) for key, content, answer in rows}
        return found

    def _checkpoint(self, least: int) -> None:
        """Move the write-ahead log into the file, where it has grown enough; not while anyone waits, unless it is too large."""
        try:
            if self.failed is None and wal_bytes(self._path) > least:
                with self._turn():
                    self._live.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except (apsw.BusyError, apsw.FullError):
            return  # later
        except (apsw.Error, OSError) as error:
            self._gave_up(error)

    def _roll_back(self) -> None:
        if self._live.in_transaction:
            try:
                self._live.execute("ROLLBACK")
            except apsw.Error:
                return  # what follows is not acknowledged either

    # A disk that is full, or does not confirm

    def _check_room(self) -> None:
        """Raise LogUnavailableError while the disk is full; take the reserve again once there is room for it and as much more."""
        if not self.full:
            return
        status = os.statvfs(self.folder)
        if status.f_bavail * status.f_frsize < 2 * self.reserve:
            raise LogUnavailableError(f"{self.folder}: the disk is full; expected room: it goes on by itself once there is some")
        self.full = False
        self._keep_reserve()

    def _filled(self, what: str) -> LogUnavailableError:
        self.full = True
        (self.folder / "reserve").unlink(missing_ok=True)
        return LogUnavailableError(f"{self.folder}: the disk is full ({what}); it goes on by itself once there is room")

    def _keep_reserve(self) -> None:
        """A file that holds room for control data: it is given up when the disk is full. Small disks keep a twentieth."""
        status = os.statvfs(self.folder)
        self.reserve = min(self.reserve, status.f_blocks * status.f_frsize // 20)
        path = self.folder / "reserve"
        try:
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, self.reserve))
        except OSError:
            path.unlink(missing_ok=True)  # no room: what there is goes to the log

    def _gave_up(self, error: Exception) -> LogFailedError:
        if self.failed is None:
            self.failed = LogFailedError(f"{self._path}: found {error}; expected a confirmed write: nothing more is acknowledged")
            self.on_failure(self.failed)
        return self.failed

    # The keeper's thread

    def _keep_keys(self) -> None:
        """Index sealed files, and forget what was answered before the retry window."""
        keys: Any = open_keys(self.folder)
        while True:
            try:
                path = self._to_index.get(timeout=600.0)
            except queue.Empty:
                path = self.folder
            if path is None:
                break
            try:
                if path != self.folder:
                    index(keys, path, self.clock, lambda: not self._closing)
                    if not self._closing:
                        self._indexed.put(path)
                forget(keys, self.clock() - self.window_ns)
            except (apsw.Error, OSError):  # the next start tries again; until then sealed files are looked into themselves
                continue
        keys.close()
