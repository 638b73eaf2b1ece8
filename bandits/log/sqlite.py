"""The decision log on SQLite: one committer thread, one transaction and one fsync for all that arrived meanwhile.

While a group is being made durable the next one forms, so that an idle log answers after one fsync and a loaded one after two at
most. Several processes write one file by turns. A file is sealed by its size or age and takes no entry any more; the keys of
sealed files go into an index, off the way of whoever waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import apsw

from bandits.log.copier import Copier
from bandits.log.files import (
    PAGE,
    Connect,
    begin,
    bytes_of,
    check_sqlite,
    file_after,
    head_file,
    log_files,
    read_head,
    writing,
)
from bandits.log.keeper import Keeper
from bandits.log.keys import ENTRY, FORGOTTEN, Asked, checked
from bandits.log.older import Older
from bandits.log.port import Done, Entry, LogFailedError, LogUnavailableError, Outcome, Stored, beside, check_of
from bandits.log.room import RESERVE, Room, means_full
from bandits.log.segments import find
from ope.data import InputError

Result: TypeAlias = tuple[Done, Outcome | Exception]

T = TypeVar("T")

MOST = 512
"""Entries in one transaction, about: a batch is not cut."""

LARGEST = 128
"""Rows of one statement: a statement is a transaction of its own, and hands Python's lock over once."""

COPIED_WAL = 4 << 20
"""Bytes of write-ahead log from which on it is copied into the file, beside the transactions that follow."""

LONG_WAL = 32 << 20
"""Bytes of write-ahead log from which on it is begun anew as soon as all of it is copied; before, that waits for a quiet moment."""

FORGETS = 0.25
"""Seconds after which an idle log believes half of what it measured."""

MOST_WAL = 64 << 20
"""Bytes not copied yet at which transactions wait."""

DAY_NS = 86_400 * 10**9


@lru_cache(maxsize=LARGEST)
def _inserting(rows: int) -> str:
    """Stores rows whose keys are new in a file that is not sealed: this is read in the same transaction, first."""
    row = "(?,?,?,?,?,?)"
    return (
        "INSERT INTO entries (kind, key, content, record, answer, checksum) "  # noqa: S608  # marks alone are put in
        f"SELECT * FROM (VALUES {','.join([row] * rows)}) WHERE (SELECT sealed FROM log) = 0 ON CONFLICT (key) DO NOTHING"
    )


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
        self.window_ns = int(retry_days * DAY_NS)
        self.deliver, self.on_failure, self.connect = deliver, on_failure, connect
        self.failed: LogFailedError | None = None
        self._added = rotate_bytes  # bytes since its size was looked at
        self.groups = 0
        """Transactions so far."""
        self.last_group = 0
        """Entries of the last one."""
        self._queue: queue.SimpleQueue[list[tuple[Entry, Done]] | None] = queue.SimpleQueue()
        self._sent, self._settled = [0, 0], [0, 0]  # entries and bytes; one thread writes each, so that no lock is needed
        self._seconds = 0.01  # of a commit, smoothed
        self._settled_at = time.monotonic()
        self._turns = (folder / "writer.lock").open("a")
        self._last = 0  # the last row that a transaction stored; 0: none
        self._wal = self._copied = 0  # pages of the write-ahead log, and those of them that are in the file, or on the way there
        self._rest = False  # whether only what was written beside the copier is left to be copied
        self._indexed: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._closing = self._ending = False
        self._begin(reserve)
        self._copier = Copier(connect, self._gave_up)
        self._keeper = Keeper(folder, connect, clock, self.window_ns, self._indexed.put)
        self._committer = threading.Thread(target=self._run, name="log committer", daemon=True)
        self._committer.start()

    def _begin(self, reserve: int) -> None:
        """Open what there is, or the first file. Raises InputError where that cannot be done."""
        with contextlib.ExitStack() as opened:
            opened.callback(self._turns.close)
            try:
                with self._turn():  # others may begin the same files, or seal one between the listing and the opening
                    files = log_files(self.folder)
                    self._older = Older(self.folder)
                    opened.callback(self._older.close)
                    self._open(files[-1] if files else file_after(None, self.folder))
                self._room = Room(self.folder, reserve)
            except (apsw.Error, OSError) as error:
                raise InputError(
                    f"{self.folder}: found {error}; expected a log that can be written: see to its disk and permissions"
                ) from None
            opened.pop_all()  # what was opened stays open

    @property
    def full(self) -> bool:
        """Whether the disk was full when it was last written to."""
        return self._room.full

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
        """Seconds that an entry submitted now would wait: the commit under way, and those of the groups before it.

        What was measured is believed less and less while nothing is: a slow commit must not keep the next one away.
        """
        waiting = self._sent[0] - self._settled[0]
        if waiting:
            return self._seconds * (2 + waiting // MOST)
        return self._believed(time.monotonic())

    def _believed(self, now: float) -> float:
        """Seconds of a commit, as far as what was measured is still believed."""
        return self._seconds * 0.5 ** (max(0.0, now - self._settled_at) / FORGETS)

    def close(self) -> None:
        """Settle what was submitted, write the file out, and end."""
        if self._closing:
            return
        self._closing = True
        self._queue.put(None)
        self._committer.join()
        self._keeper.close()
        self._live.close()
        self._older.close()
        os.close(self._head)
        self._turns.close()

    # The committer's thread

    def _run(self) -> None:
        while not self._ending:
            group: list[tuple[Entry, Done]] = []
            self._take(group, wait=1.0)
            if group:
                self._settle(group)
                self._checkpoint(quiet=False)
            elif not self._ending:
                self._tidy()
        self._copier.close()
        self._copy_rest()

    def _take(self, group: list[tuple[Entry, Done]], wait: float = 0.0) -> None:
        """Add what is queued to a group, which takes about `MOST`; `wait`: seconds, for the first."""
        try:
            while len(group) < MOST and not self._ending:
                taken = self._queue.get(timeout=wait) if wait else self._queue.get_nowait()
                wait = 0.0
                if taken is None:
                    self._ending = True
                else:
                    group += taken
        except queue.Empty:
            return

    def _tidy(self) -> None:
        """What is due although nobody writes: room is looked for, an old file is sealed, the write-ahead log begun anew."""
        with contextlib.suppress(LogUnavailableError, LogFailedError):
            self._room.check()
            if self.failed is None and self._is_due():
                self._in_turn(self._seal)
        self._checkpoint(quiet=True)

    def _settle(self, group: list[tuple[Entry, Done]]) -> None:
        started = time.monotonic()
        believed = self._believed(started)
        outcomes: Sequence[Outcome | Exception]
        try:
            outcomes = self._commit(group)
        except (LogUnavailableError, LogFailedError) as error:
            outcomes = [error] * len(group)
        except Exception as error:
            outcomes = [self._gave_up(error)] * len(group)  # nobody waits forever
        self._settled_at = time.monotonic()
        self._seconds = 0.9 * believed + 0.1 * (self._settled_at - started)
        self.groups, self.last_group = self.groups + 1, len(group)
        size = sum(entry.size for entry, _ in group)
        self._added += size
        self._settled[0] += len(group)
        self._settled[1] += size
        self.deliver([(done, outcome) for (_, done), outcome in zip(group, outcomes, strict=True)])

    def _commit(self, group: list[tuple[Entry, Done]]) -> list[Outcome]:
        """Store a group, and what came while another process had its turn, in one durable transaction.

        Raises LogUnavailableError or LogFailedError.
        """
        if self.failed is not None:
            raise self.failed
        self._room.check()
        while not self._indexed.empty():
            self._older.drop(self._indexed.get())
        return self._in_turn(lambda: self._seal_and_store(group))

    def _in_turn(self, do: Callable[[], T]) -> T:
        """Write while nobody else does. Raises LogUnavailableError or LogFailedError."""
        try:
            with self._turn():
                return do()
        except apsw.BusyError as error:
            self._roll_back()
            raise LogUnavailableError(f"{self._path}: found {error}; expected a turn to write: end what holds it") from None
        except (apsw.Error, OSError) as error:
            self._roll_back()
            if means_full(error):
                raise self._room.filled(error) from None
            raise self._gave_up(error) from None

    def _seal_and_store(self, group: list[tuple[Entry, Done]]) -> list[Outcome]:
        if self._is_due():
            self._seal()
        self._take(group)
        self._last = 0
        outcomes = self._stored([entry for entry, _ in group])
        if self._last:
            with contextlib.suppress(OSError):  # a note only: the entries are durable. In this turn: it never goes back
                os.pwrite(self._head, self._last.to_bytes(8, "little"), 0)
        return outcomes

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the writers' lock, which the system hands on at once: SQLite's own would be asked for again and again."""
        fcntl.flock(self._turns, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._turns, fcntl.LOCK_UN)

    def _is_due(self) -> bool:
        """Whether the file is large or old enough to be sealed."""
        return self.clock() - self._born > self.rotate_ns or self._is_large()

    def _seal(self) -> None:
        """Seal the file, unless it is empty, and go on to the next."""
        self._live.execute("BEGIN IMMEDIATE")
        last: Any = self._live.execute("SELECT max(row) FROM entries WHERE (SELECT sealed FROM log) = 0").get
        if last:  # not empty, and nobody else sealed it
            self._live.execute("UPDATE log SET sealed = 1, rows = ?", (last,))
        self._live.execute("COMMIT")
        if last or self._is_sealed():
            self._advance()

    def _is_sealed(self) -> bool:
        return bool(self._live.execute("SELECT sealed FROM log").get)

    def _is_large(self) -> bool:
        """Whether the file has its size; it is looked at each time that a sixteenth of that was added here."""
        if self._added < self.rotate_bytes // 16:
            return False
        self._added = 0
        try:
            return bytes_of(self._path) > self.rotate_bytes
        except FileNotFoundError:
            return True  # another process sealed it, and it was compacted

    def _advance(self) -> None:
        """Go on to the newest file after a sealed one, or to a new one.

        Others sealed those between, which may be compacted already: their names are never given again.
        """
        sealed, live, head = self._path, self._live, self._head
        *between, newest = [path for path in log_files(self.folder) if path > sealed] or [file_after(sealed, self.folder)]
        self._open(newest)  # where it raises, nothing has changed
        os.close(head)
        for path, connection in ((sealed, live), *((path, None) for path in between)):
            self._older.add(path)
            self._keeper.keep(path, connection)

    def _open(self, path: Path) -> None:
        head = os.open(head_file(path), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(head).st_size < 8:
                os.pwrite(head, bytes(8), 0)  # so that there is room for it later
            live = begin(path, self.clock, self.connect)
        except BaseException:
            os.close(head)
            raise
        try:
            # what a killed process wrote may be read and not yet be on the disk: it is before anything is answered by it
            live.execute("PRAGMA wal_checkpoint(PASSIVE)")
            found: list[Any] = live.execute("SELECT sealed, began_ns, (SELECT max(row) FROM entries) FROM log").fetchall()
            ((sealed, self._born, last),) = found
            if not sealed and read_head(path) > (last or 0):  # rows are lost: they must not be given again
                live.execute("UPDATE log SET sealed = 1, rows = ?", (read_head(path),))
        except BaseException as error:
            live.close()
            os.close(head)
            if isinstance(error, ValueError):
                raise InputError(f"{path}: found no description; expected a file of a log: restore it from a backup") from None
            raise
        self._path, self._live, self._head, self._wal, self._copied, self._rest = path, live, head, 0, 0, False
        self._added = self.rotate_bytes

        def committed(connection: apsw.Connection, name: str, pages: int) -> int:
            self._copied = min(self._copied, pages) if pages >= self._wal else 0
            self._wal = pages
            return 0

        live.set_wal_hook(committed)

    def _stored(self, entries: list[Entry]) -> list[Outcome]:
        """Store entries durably; what became of each."""
        wanted = [entry.key for entry in entries if not entry.fresh] + [beside(entry).key for entry in entries if entry.kept]
        while True:
            older = self._older.find(wanted)
            new = [entry for entry in entries if entry.key not in older] if older else entries
            stored = self._insert(new)
            if stored or not new or not self._is_sealed():
                break
            self._advance()  # another process sealed it: all that it holds is older now
        if stored == len(entries):
            return [Outcome("stored", entry.answer) for entry in entries]
        outcomes = self._told_apart(entries, older, self._last - stored if stored else None)
        kept = [beside(entry) for entry, told in zip(entries, outcomes, strict=True) if entry.kept and told.state == "conflict"]
        self._insert([entry for entry in kept if entry.key not in older])
        return outcomes

    def _insert(self, entries: Sequence[Entry]) -> int:
        """Store entries whose keys are new here, durably, unless the file is sealed; how many were."""
        if len(entries) <= LARGEST:
            stored = self._insert_some(entries)
        else:
            self._live.execute("BEGIN IMMEDIATE")
            stored = sum(self._insert_some(entries[start : start + LARGEST]) for start in range(0, len(entries), LARGEST))
            self._live.execute("COMMIT")
        if stored:
            self._last = self._live.last_insert_rowid()
        return stored

    def _insert_some(self, entries: Sequence[Entry]) -> int:
        if not entries:
            return 0
        values = [value for entry in entries for value in (*entry[:5], check_of(entry))]
        before = self._live.total_changes()
        self._live.execute(_inserting(len(entries)), values)
        return self._live.total_changes() - before

    def _told_apart(self, entries: Sequence[Entry], older: Mapping[bytes, Asked], last_before: int | None) -> list[Outcome]:
        """What became of entries some of whose keys were known. `last_before`: the last row before these; None: none was stored."""
        found: dict[bytes, tuple[int, Asked]] = {}
        keys = list({entry.key for entry in entries if entry.key not in older})
        for start in range(0, len(keys), LARGEST):
            some = keys[start : start + LARGEST]
            marks = ",".join("?" * len(some))
            rows: list[Any] = self._live.execute(f"{ENTRY.replace('SELECT', 'SELECT row,', 1)} IN ({marks})", some).fetchall()
            found |= {parts[1]: (row, checked(*parts)) for row, *parts in rows}
        claimed, outcomes = set[bytes](), []
        for entry in entries:
            row, known = (0, older[entry.key]) if entry.key in older else found[entry.key]
            if last_before is not None and row > last_before and entry.key not in claimed:
                claimed.add(entry.key)
                outcomes.append(Outcome("stored", entry.answer))
            elif known == FORGOTTEN:
                outcomes.append(Outcome("expired", b""))
            elif known.content == entry.content:
                outcomes.append(Outcome("repeated", known.answer))
            else:
                outcomes.append(Outcome("conflict", b""))
        return outcomes

    def _checkpoint(self, *, quiet: bool) -> None:
        """Have the write-ahead log copied into the file, so that it may begin anew.

        Where it has grown, the copier copies it beside the transactions that follow. What these wrote meanwhile, `_rest`, is
        little, and is copied here while nobody writes: in a quiet moment, or once the log is long. SQLite then begins it anew.
        """
        grown = (self._wal - self._copied) * PAGE
        if grown > MOST_WAL:
            self._copier.idle.wait()
        if not self._copier.idle.is_set():
            return
        if grown > MOST_WAL or (self._rest and (quiet or self._wal * PAGE > LONG_WAL)):
            self._copy_rest()
        elif grown > COPIED_WAL:
            self._copied, self._rest = self._wal, True
            self._copier.copy(self._path)

    def _copy_rest(self) -> None:
        """Copy while nobody writes."""
        self._rest = False
        try:
            if self.failed is None:
                with self._turn():
                    found: list[Any] = self._live.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                    ((busy, _, copied),) = found
                    self._copied = self._copied if busy else copied
        except apsw.BusyError:
            return  # later
        except (apsw.Error, OSError) as error:
            if not means_full(error):
                self._gave_up(error)

    def _roll_back(self) -> None:
        if self._live.in_transaction:
            try:
                self._live.execute("ROLLBACK")
            except apsw.Error:
                return  # what follows is not acknowledged either

    def _gave_up(self, error: Exception) -> LogFailedError:
        if self.failed is None:
            self.failed = LogFailedError(f"{self._path}: found {error}; expected a confirmed write: nothing more is acknowledged")
            self.on_failure(self.failed)
        return self.failed
