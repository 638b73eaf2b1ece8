"""Reading a log, sealed files and the one being written alike: every record checked, every gap told."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import apsw

from bandits.log.files import check_version, file_after, log_files, number_of, read_head, reading
from bandits.log.keys import Known, look_up
from bandits.log.port import KINDS, Kind, Stored, whole_of
from ope.data import InputError

COLUMNS = "kind, key, content, record, answer, checksum"

UNLIKE = (ValueError, TypeError, KeyError, struct.error)
"""What it raises to check something that is not even of an entry's types and ranges."""

PIECE = 64
"""Entries that are read at once: few enough for the processor's cache."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What is known of one file."""

    path: Path
    log_id: str
    began_ns: int
    sealed: bool
    last_row: int
    """The last row that must be there: that it was sealed with, or that was noted when it was committed."""


class DamagedError(InputError):
    """A file of a log holds something else than was written."""


def segment(path: Path) -> Segment:
    """What is known of a file. Raises DamagedError where it cannot be read."""
    try:
        with _opened(path) as connection:
            check_version(path, connection)
            found: list[Any] = connection.execute("SELECT id, began_ns, sealed, rows FROM log").fetchall()
            last: Any = connection.execute("SELECT max(row) FROM entries").get
    except (apsw.Error, UnicodeDecodeError) as error:
        raise DamagedError(f"{path}: found {error}; expected a file of a log: restore it from a backup") from None
    except InputError as error:
        raise DamagedError(str(error)) from None
    if len(found) != 1 or [type(part) for part in found[0]] != [str, int, int, int] or type(last) not in (int, type(None)):
        raise DamagedError(f"{path}: found {len(found)} descriptions; expected a whole one: restore it from a backup")
    ((log_id, began, sealed, rows),) = found
    return Segment(path, log_id, began, bool(sealed), max(rows, last or 0, read_head(path)))


def records(path: Path, after: int = 0, until: int = 2**62, kind: Kind | None = None) -> Iterator[Stored]:
    """Entries of a file after a row and up to another, in order; those whose checksum differs are left out, and are a gap.

    `kind`: those alone. Raises DamagedError where the file cannot be read on.
    """
    log_id = segment(path).log_id
    for some in _pieces(path, after, until, kind):
        yield from filter(None, (_checked(log_id, *one) for one in some))


def numbered(path: Path, after: int, until: int) -> Iterator[tuple[int, int, bytes]]:
    """Row, kind and record of what `records` tells, and nothing else, at two thirds of the cost."""
    for some in _pieces(path, after, until, None):
        try:
            yield from [
                (row, kind, record)
                for row, kind, key, content, record, answer, checksum in some
                if blake2b(whole_of(kind, key, content, record, answer), digest_size=16).digest() == checksum
            ]
        except UNLIKE:
            yield from ((one.row, one.kind, one.record) for one in filter(None, (_checked("", *row) for row in some)))


def _pieces(path: Path, after: int, until: int, kind: Kind | None) -> Iterator[list[Any]]:
    """Entries as they stand, some at a time. Raises DamagedError where the file cannot be read on, or is not in order."""
    only = "" if kind is None else f"AND kind = {int(kind)} "
    with _damage_told(path), _opened(path) as connection:
        rows = connection.execute(
            f"SELECT row, {COLUMNS} FROM entries WHERE row > ? AND row <= ? {only}ORDER BY row",  # noqa: S608
            (after, until),
        )
        while True:
            some = list[Any]()
            try:
                for one in islice(rows, PIECE):
                    if one[0] <= after:
                        raise DamagedError(
                            f"{path}: found row {one[0]} after {after}; expected them in order: restore it from a backup"
                        )
                    after = one[0]
                    some.append(one)
            finally:  # what was read before the file could not be read on counts
                if some:
                    yield some
            if not some:
                return


def decisions(path: Path, after: int = 0) -> Iterator[tuple[int, bytes]]:
    """Rows and records of a file's decisions, in order, as they stand: unlike those of `records` they may be damaged.

    Raises DamagedError where the file cannot be read on.
    """
    with _damage_told(path), _opened(path) as connection:
        yield from connection.execute(
            "SELECT row, record FROM entries WHERE row > ? AND kind = ? ORDER BY row", (after, int(Kind.DECISION))
        )


def gaps(path: Path) -> list[tuple[int, int]]:
    """First and last rows of what must have been there and cannot be read, damaged records among it."""
    last = read_head(path)
    present, missing = 0, []
    try:
        last = max(last, segment(path).last_row)
        for one in records(path):
            if one.row > present + 1:
                missing.append((present + 1, one.row - 1))
            present = one.row
    except DamagedError:
        last = max(last, present + 1)
    return missing + ([(present + 1, last)] if last > present else [])


def find(folder: Path, key: bytes) -> Stored | None:
    """The entry of a key: in the newest file, in one that is not indexed yet, or where the index says. None where it is not."""
    indexed, known = _index_says(folder, key)
    if known is not None:
        path = file_after(None, folder).with_name(f"log-{known.file:08d}.sqlite")
        found = _entry(path, "row = ?", known.row) if path.exists() else None
        return _of(found, key)
    for path in reversed(log_files(folder)):
        if number_of(path) not in indexed and (found := _of(_entry(path, "key = ?", key), key)) is not None:
            return found
    return None


def _of(found: Stored | None, key: bytes) -> Stored | None:
    """An entry that was found, if it is that of the key: an index may be damaged."""
    return found if found is not None and found.key == key else None


def _index_says(folder: Path, key: bytes) -> tuple[set[int], Known | None]:
    path = folder / "keys.sqlite"
    if not path.exists():
        return set(), None
    with _damage_told(path), _opened(path) as keys:
        return {file for (file,) in keys.execute("SELECT file FROM files")}, look_up(keys, [key]).get(key)


def _entry(path: Path, where: str, value: int | bytes) -> Stored | None:
    with _damage_told(path), _opened(path) as connection:
        if not check_version(path, connection):
            return None  # made, and not begun yet
        log_id = connection.execute("SELECT id FROM log").get
        if not isinstance(log_id, str):
            raise DamagedError(f"{path}: found no description; expected one: restore it from a backup")
        for found in connection.execute(f"SELECT row, {COLUMNS} FROM entries WHERE {where}", (value,)):  # noqa: S608
            return _checked(log_id, *found)
    return None


def _checked(
    log_id: str, row: int, kind: int, key: bytes, content: bytes, record: bytes, answer: bytes, checksum: bytes
) -> Stored | None:
    """An entry, where its checksum is that of its parts."""
    try:
        if blake2b(whole_of(kind, key, content, record, answer), digest_size=16).digest() != checksum:
            return None
        return Stored(log_id, row, KINDS[kind], key, content, record, answer)
    except UNLIKE:
        return None


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (apsw.Error, UnicodeDecodeError) as error:
        raise DamagedError(f"{path}: found {error}; expected a file of a log: restore it from a backup") from None


def _opened(path: Path) -> closing[apsw.Connection]:
    return closing(reading(path))
