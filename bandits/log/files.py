"""Files of a log: one SQLite database after another, the newest written to, the others sealed. Names, schema, connections."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import apsw

from bandits.durable import sync
from ope.data import InputError

SCHEMA = """
CREATE TABLE entries (
    row INTEGER PRIMARY KEY, kind INTEGER NOT NULL, key BLOB NOT NULL UNIQUE, content BLOB NOT NULL, record BLOB NOT NULL,
    answer BLOB NOT NULL, checksum BLOB NOT NULL
) STRICT;
CREATE TABLE log (id TEXT PRIMARY KEY, began_ns INTEGER NOT NULL, sealed INTEGER NOT NULL, rows INTEGER NOT NULL) STRICT;
PRAGMA user_version = 2;
"""

LEAST_SQLITE = (3, 51, 3)
"""Before it, a write-ahead log that was reset while another connection checkpointed could lose a commit."""

VERSION = 2
"""Of what a file holds, and of what its checksums are of."""

COMPACTED = "compacted.jsonl"
"""Beside the files: a line of JSON for each that was deleted, since a lake holds all of it."""

PAGE = 8192
"""Bytes of a page."""

Connect = Callable[[Path], apsw.Connection]


def check_sqlite() -> None:
    """Raise InputError for a SQLite that may corrupt a log."""
    found = tuple(int(part) for part in apsw.sqlite_lib_version().split("."))
    if found < LEAST_SQLITE:
        raise InputError(f"found SQLite {apsw.sqlite_lib_version()}; expected 3.51.3 or later: install a newer apsw")


def log_files(folder: Path) -> list[Path]:
    """Files of a log, oldest first."""
    return sorted(folder.glob("log-*.sqlite"))


def file_after(path: Path | None, folder: Path) -> Path:
    """Name of the file that follows another, or of the first."""
    number = 1 if path is None else number_of(path) + 1
    return folder / f"log-{number:08d}.sqlite"


def number_of(path: Path) -> int:
    """A file's place in the order."""
    return int(path.stem.removeprefix("log-"))


def head_file(path: Path) -> Path:
    """Where a file's last committed row is noted, so that a tail that vanished is missed."""
    return path.with_suffix(".head")


def read_head(path: Path) -> int:
    """The last row that was surely committed, as far as is noted."""
    try:
        return int.from_bytes(head_file(path).read_bytes()[:8], "little")
    except OSError:
        return 0


def writing(path: Path, *, new: bool = False) -> apsw.Connection:
    """A connection that writes: durable at every commit, checkpoints only when told to, deleted bytes overwritten.

    Unless it is to be `new`, the file must be there: one that was compacted must not come back, empty.
    """
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if new else 0))
    connection.set_busy_timeout(10_000)
    for statement in (
        f"PRAGMA page_size = {PAGE}",
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        "PRAGMA wal_autocheckpoint = 0",
        "PRAGMA secure_delete = ON",
        "PRAGMA cache_size = -16384",
    ):
        try:
            connection.execute(statement)
        except BaseException:
            connection.close()
            raise
    return connection


def reading(path: Path) -> apsw.Connection:
    """A connection that only reads."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(10_000)
    return connection


def check_version(path: Path, connection: apsw.Connection) -> int:
    """Version of a file; 0 where it was made and not begun yet. Raises InputError for one that another version wrote."""
    if (version := int(connection.pragma("user_version"))) not in (0, VERSION):
        raise InputError(f"{path}: found version {version}; expected {VERSION}: use the propel that wrote it, or a backup")
    return version


def begin(path: Path, clock: Callable[[], int], connect: Connect = writing) -> apsw.Connection:
    """A connection to a file that is there afterwards, whoever made it. Several processes may begin it at once.

    Raises InputError for a file that another version wrote.
    """
    if not path.exists():
        _make(path, clock)
    connection = connect(path)
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not check_version(path, connection):
            connection.execute(SCHEMA)
            name = f"{path.stem}-{secrets.token_hex(6)}"  # another one where a folder was lost and made anew
            connection.execute("INSERT INTO log VALUES (?, ?, 0, 0)", (name, clock()))
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    sync(path.parent)
    return connection


def _make(path: Path, clock: Callable[[], int]) -> None:
    """A new file, which has its name once it is whole: readers never see a beginning of one."""
    new = path.with_suffix(".new")
    for left in path.parent.glob(f"{new.name}*"):
        left.unlink()
    with closing(writing(new, new=True)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(SCHEMA)
        name = f"{path.stem}-{secrets.token_hex(6)}"
        connection.execute("INSERT INTO log VALUES (?, ?, 0, 0)", (name, clock()))
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # closing would not say that there is no room for it
    sync(new)
    new.rename(path)
    sync(path.parent)


def bytes_of(path: Path) -> int:
    """Size of a file and of its write-ahead log."""
    return path.stat().st_size + wal_bytes(path)


def wal_bytes(path: Path) -> int:
    """Size of a file's write-ahead log."""
    try:
        return Path(f"{path}-wal").stat().st_size
    except FileNotFoundError:
        return 0
