"""The key index: which keys the sealed files hold, with what was asked and answered for as long as repeats may come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from bandits.durable import sync
from bandits.events import digest
from bandits.log.files import log_files, number_of, reading
from bandits.log.port import Entry, Kind, check_of

SCHEMA = """
CREATE TABLE keys (
    key BLOB PRIMARY KEY, content BLOB NOT NULL, answer BLOB NOT NULL, file INTEGER NOT NULL, row INTEGER NOT NULL,
    at_ns INTEGER NOT NULL, checksum BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX remembered ON keys (at_ns) WHERE content != x'' AND key < x'65';
CREATE TABLE files (file INTEGER PRIMARY KEY) STRICT;
PRAGMA user_version = 1;
"""

CHUNK = 2000
"""Keys that are indexed in one transaction, so that nobody waits long for the disk."""


ENTRY = "SELECT kind, key, content, record, answer, checksum FROM entries WHERE key"
"""The beginning of a statement whose rows `checked` takes."""


class Asked(NamedTuple):
    """What was asked under a key, and what was answered; both empty where that is forgotten or damaged."""

    content: bytes
    answer: bytes


FORGOTTEN = Asked(b"", b"")


class Known(NamedTuple):
    """What the index holds of a key."""

    asked: Asked
    file: int
    row: int


def checked(kind: int, key: bytes, content: bytes, record: bytes, answer: bytes, checksum: bytes) -> Asked:
    """What an entry says, unless it is damaged."""
    try:
        good = check_of(Entry(Kind(kind), key, content, record, answer)) == checksum
    except (ValueError, TypeError):
        good = False
    return Asked(content, answer) if good else FORGOTTEN


def open_keys(folder: Path) -> apsw.Connection:
    """A connection to the index of a log, made where there is none."""
    connection = apsw.Connection(str(folder / "keys.sqlite"))
    connection.set_busy_timeout(10_000)
    for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "PRAGMA secure_delete = ON"):
        connection.execute(statement)
    connection.execute("BEGIN IMMEDIATE")
    if connection.pragma("user_version") == 0:
        connection.execute(SCHEMA)
    connection.execute("COMMIT")
    sync(folder)
    return connection


def is_indexed(keys: apsw.Connection, file: int) -> bool:
    """Whether all keys of a sealed file are in the index."""
    return keys.execute("SELECT 1 FROM files WHERE file = ?", (file,)).get is not None


def unindexed(keys: apsw.Connection, folder: Path) -> list[Path]:
    """Files before the newest whose keys are not all in the index."""
    return [path for path in log_files(folder)[:-1] if not is_indexed(keys, number_of(path))]


def look_up(keys: apsw.Connection, wanted: Sequence[bytes]) -> dict[bytes, Known]:
    """What the index holds of some keys."""
    marks = ",".join("?" * len(wanted))
    found = keys.execute(f"SELECT key, content, answer, file, row, checksum FROM keys WHERE key IN ({marks})", tuple(wanted))  # noqa: S608
    return {
        key: Known(Asked(content, answer) if _sum(key, content, answer) == checksum else FORGOTTEN, file, row)
        for key, content, answer, file, row, checksum in found
    }


def _sum(*parts: bytes) -> bytes:
    """Checksum of what the index holds of a key."""
    return digest(b"".join(len(part).to_bytes(4, "little") + part for part in parts))


def index(keys: apsw.Connection, path: Path, clock: Callable[[], int], wanted: Callable[[], bool] = lambda: True) -> None:
    """Put the keys of a sealed file into the index. Safe to run twice, and by several processes; stops where no longer `wanted`."""
    file = number_of(path)
    if is_indexed(keys, file):
        return
    with closing(reading(path)) as sealed:
        sealed_at, after = clock(), 0
        while wanted():
            rows: list[Any] = sealed.execute(
                "SELECT row, kind, key, content, record, answer, checksum FROM entries WHERE row > ? ORDER BY row LIMIT ?",
                (after, CHUNK),
            ).fetchall()
            after, ended = rows[-1][0] if rows else after, not rows
            known = [(row, parts[1], checked(*parts)) for row, *parts in rows if isinstance(parts[1], bytes)]
            rows = [(key, *asked, file, row, sealed_at, _sum(key, *asked)) for row, key, asked in known]
            keys.execute("BEGIN IMMEDIATE")
            try:
                keys.executemany("INSERT OR IGNORE INTO keys VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
                if ended:
                    keys.execute("INSERT OR IGNORE INTO files VALUES (?)", (file,))
                keys.execute("COMMIT")
            except apsw.Error:
                if keys.in_transaction:
                    keys.execute("ROLLBACK")
                raise
            if ended:
                break


def forget(keys: apsw.Connection, before_ns: int) -> int:
    """Drop what decisions were asked and answered before a time; their keys stay known. How many there were."""
    dropped = 0
    while True:
        keys.execute(
            "UPDATE keys SET content = x'', answer = x'' WHERE key IN "
            "(SELECT key FROM keys WHERE at_ns < ? AND content != x'' AND key < x'65' LIMIT ?)",  # 64: decisions
            (before_ns, CHUNK),
        )
        if (changed := keys.changes()) == 0:
            return dropped
        dropped += changed
