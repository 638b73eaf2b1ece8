"""Reading a log, sealed files and the one being written alike: every record checked, every gap told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from bandits.log.files import file_after, log_files, number_of, read_head, reading
from bandits.log.keys import Known
from bandits.log.port import Entry, Kind, Stored, check_of
from ope.data import InputError

COLUMNS = "kind, key, content, record, answer, checksum"


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
            found: list[Any] = connection.execute("SELECT id, began_ns, sealed, rows FROM log").fetchall()
            last: Any = connection.execute("SELECT max(row) FROM entries").get
    except (apsw.Error, UnicodeDecodeError) as error:
        raise DamagedError(f"{path}: found {error}; expected a file of a log: restore it from a backup") from None
    if len(found) != 1:
        raise DamagedError(f"{path}: found {len(found)} descriptions; expected one: restore it from a backup")
    ((log_id, began, sealed, rows),) = found
    return Segment(path, log_id, began, bool(sealed), max(rows, last or 0, read_head(path)))


def records(path: Path, after: int = 0) -> Iterator[Stored]:
    """Entries of a file after a row, in order; those whose checksum differs are left out, and are a gap.

    Raises DamagedError where the file cannot be read on.
    """
    described = segment(path)
    try:
        with _opened(path) as connection:
            for row, *parts, checksum in connection.execute(
                f"SELECT row, {COLUMNS} FROM entries WHERE row > ? ORDER BY row",  # noqa: S608
                (after,),
            ):
                found = _checked(described.log_id, row, parts, checksum)
                if found is not None:
                    yield found
    except (apsw.Error, UnicodeDecodeError) as error:
        raise DamagedError(f"{path}: found {error}; expected a file of a log: restore it from a backup") from None


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
        return _entry(path, "row = ?", known.row) if path.exists() else None
    for path in reversed(log_files(folder)):
        if number_of(path) not in indexed and (found := _entry(path, "key = ?", key)) is not None:
            return found
    return None


def _index_says(folder: Path, key: bytes) -> tuple[set[int], Known | None]:
    path = folder / "keys.sqlite"
    if not path.exists():
        return set(), None
    with _opened(path) as keys:
        found: list[Any] = keys.execute("SELECT content, answer, file, row FROM keys WHERE key = ?", (key,)).fetchall()
        return {file for (file,) in keys.execute("SELECT file FROM files")}, Known(*found[0]) if found else None


def _entry(path: Path, where: str, value: int | bytes) -> Stored | None:
    with _opened(path) as connection:
        log_id = connection.execute("SELECT id FROM log").get
        for row, *parts, checksum in connection.execute(f"SELECT row, {COLUMNS} FROM entries WHERE {where}", (value,)):  # noqa: S608
            return _checked(log_id, row, parts, checksum)
    return None


def _checked(log_id: str, row: int, parts: list[int | bytes], checksum: bytes) -> Stored | None:
    """An entry, where its checksum is that of its parts."""
    kind, *blobs = parts
    try:
        entry = Entry(Kind(int(kind)), *blobs)  # type: ignore[arg-type]
        good = check_of(entry) == checksum
    except (ValueError, TypeError):
        return None
    return Stored(log_id, row, *entry[:5]) if good else None


def _opened(path: Path) -> closing[apsw.Connection]:
    return closing(reading(path))
