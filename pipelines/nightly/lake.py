"""The lake: Parquet partitions that are never changed, and a manifest that says which of them are the truth.

A partition's name is its content's digest. A manifest, too, is a file that is never changed, named by its digest; `CURRENT` names
the one that counts, and replacing it is what commits a step. Readers follow the manifest, never a glob.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import quote

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bandits.durable import sync, write_durably
from ope.data import InputError
from pipelines.nightly.settings import Settings

CURRENT = "CURRENT"

ROW_GROUP = 2**17
"""Rows of a row group."""


class LakeError(InputError):
    """Something of the lake is not there as it was written."""


class BusyError(InputError):
    """Another process works on the same lake."""


class Entry(msgspec.Struct, frozen=True, order=True):
    """One partition: where it lies, what it must be, byte for byte, and what it was made from."""

    table: str
    point: str
    """Decision point; "" where a table has none."""
    day: str
    """ISO date, UTC; "" where a table has none."""
    bucket: int
    path: str
    """Relative to the lake's folder."""
    rows: int
    bytes: int
    sha256: str
    low: str = ""
    """Smallest and largest decision id; "" where rows have none."""
    high: str = ""
    key: str = ""
    """Digest of everything that it was made from; a step whose key is already listed has nothing to do."""
    cutoff_ns: int = 0
    """Until when it is known what became of its rows; 0 where that is not asked."""
    revision: int = 1
    """How often a partition of this place was written."""

    @property
    def place(self) -> tuple[str, str, str, int]:
        """What names a partition, whatever its content."""
        return self.table, self.point, self.day, self.bucket


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A list of partitions, named by the digest of the list."""

    id: str
    entries: tuple[Entry, ...]

    def find(self, table: str, point: str | None = None, days: Iterable[str] | None = None) -> list[Entry]:
        """Partitions of a table, of one decision point, of some days; in the order of point, day and bucket."""
        wanted = None if days is None else set(days)
        return [
            entry
            for entry in self.entries
            if entry.table == table and point in (None, entry.point) and (wanted is None or entry.day in wanted)
        ]

    def keys(self, table: str) -> set[str]:
        """What the partitions of a table were made from."""
        return {entry.key for entry in self.entries if entry.table == table}


@dataclass(slots=True)
class Lake:
    """One tenant's partitions. Only one process may write at a time: the night holds a lock."""

    folder: Path
    keep: int = 200
    """Manifests kept when old files are swept."""
    bytes_read: int = 0
    """By this process so far: columns as they are in memory, of partitions and of sources."""
    _verified: set[str] = field(default_factory=set)

    def snapshot(self, id_: str | None = None) -> Snapshot:
        """The current list of partitions, or an older one. Raises LakeError where it is damaged."""
        if id_ is None:
            pointer = self.folder / CURRENT
            if not pointer.exists():
                return Snapshot("", ())
            id_ = pointer.read_text(errors="replace").strip()
        path = self._list(id_)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise LakeError(f"{path}: {error.strerror}; expected the list that {self.folder / CURRENT} names: restore it") from None
        if hashlib.sha256(raw).hexdigest() != id_:
            raise LakeError(f"{path}: found a list whose SHA-256 is not its name; restore it from a copy")
        return Snapshot(id_, tuple(msgspec.json.decode(line, type=Entry) for line in raw.splitlines()))

    def write(
        self,
        table: str,
        rows: pa.Table,
        *,
        point: str = "",
        day: str = "",
        bucket: int = 0,
        key: str = "",
        cutoff_ns: int = 0,
        id_column: str = "",
    ) -> Entry:
        """A partition on the disk, re-read and compared, not yet listed. Equal rows, equal bytes, equal name.

        Raises LakeError where what was read back is not what was written.
        """
        folder = self.folder / table / slug(point) / (day or "all")
        folder.mkdir(parents=True, exist_ok=True)
        rows = rows.combine_chunks()  # pages would otherwise end where pieces do
        low, high = _range(rows, id_column)
        with _scratch(folder) as part:
            # the Arrow schema, if it were stored, would be other bytes for tables that were put together in another way
            with pq.ParquetWriter(
                part, rows.schema, compression="zstd", compression_level=1, use_dictionary=_repeated(rows), store_schema=False
            ) as writer:
                writer.write_table(rows, row_group_size=ROW_GROUP)
            sync(part)
            with pq.ParquetFile(part, pre_buffer=False) as file:
                again = file.read()
            if (
                again.num_rows != rows.num_rows
                or _range(again, id_column) != (low, high)
                or _fingerprint(again) != _fingerprint(rows)
            ):
                raise LakeError(f"{folder}: what was read back is not what was written; check the disk")
            sha256 = file_digest(part)
            path = folder / f"{bucket:04d}-{sha256[:32]}.parquet"
            size = part.stat().st_size
            part.rename(path)
        sync(folder)
        self._verified.add(sha256)
        return Entry(
            table, point, day, bucket, str(path.relative_to(self.folder)), rows.num_rows, size, sha256, low, high, key, cutoff_ns
        )

    def read(self, entry: Entry, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of a partition. Raises LakeError, naming the file, where it is not what was written."""
        with pq.ParquetFile(self.checked(entry), pre_buffer=False) as file:
            table = file.read(columns)
        self.bytes_read += sum(table.column(i).nbytes for i in range(table.num_columns))
        return table

    def columns(self, entry: Entry) -> list[str]:
        """Names of a partition's columns."""
        return list(pq.read_schema(self.checked(entry)).names)

    def frame(self, entries: Sequence[Entry], columns: Sequence[str] | None = None) -> pl.DataFrame | None:
        """Rows of several partitions as one frame; None for no partition."""
        tables = [self.read(entry, columns) for entry in entries]
        found = pl.from_arrow(pa.concat_tables(tables, promote_options="default")) if tables else None
        assert found is None or isinstance(found, pl.DataFrame), "a table is a frame"
        return found

    def checked(self, entry: Entry) -> Path:
        """Path of a partition that is, byte for byte, what was listed. Raises LakeError for any other."""
        path = self.folder / entry.path
        if entry.sha256 in self._verified:
            return path
        try:
            found = file_digest(path) if path.stat().st_size == entry.bytes else ""
        except OSError as error:
            raise LakeError(
                f"{path}: {error.strerror}; the manifest lists it: restore it, or go back to an older snapshot"
            ) from None
        if found != entry.sha256:
            raise LakeError(
                f"{path}: found {path.stat().st_size:,} bytes that are not those listed ({entry.bytes:,} bytes, SHA-256 "
                f"{entry.sha256[:16]}...); the partition was altered: restore it from a copy"
            )
        self._verified.add(entry.sha256)
        return path

    def commit(self, entries: Iterable[Entry], drop: Callable[[Entry], bool] = lambda entry: False) -> Snapshot:
        """List new partitions in place of those of the same places, leave out what is to be dropped, and make that the truth.

        A partition that replaces another one of other content has the next revision. Sweeps files that no kept manifest lists.
        """
        before = self.snapshot()
        held = {entry.place: entry for entry in before.entries if not drop(entry)}
        for entry in entries:
            old = held.get(entry.place)
            same = old is not None and old.sha256 == entry.sha256
            revision = 1 if old is None else old.revision + (not same)
            held[entry.place] = msgspec.structs.replace(entry, revision=revision)
        listed = sorted(held.values(), key=lambda entry: entry.place)
        raw = b"".join(msgspec.json.encode(entry) + b"\n" for entry in listed)
        id_ = hashlib.sha256(raw).hexdigest()
        if id_ == before.id:
            return before
        path = self._list(id_)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(path, raw)
        replace_durably(self.folder / CURRENT, f"{id_}\n".encode())
        return Snapshot(id_, tuple(listed))

    def sweep(self) -> int:
        """Delete manifests beyond those kept, and every file that none of the kept ones lists; the number of files deleted."""
        lists = sorted(self._list("x").parent.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        current = self.snapshot()
        kept = {path.stem for path in lists[-self.keep :]} | {current.id}
        listed = {entry.path for id_ in kept if id_ for entry in self.snapshot(id_).entries}
        gone = [path for path in lists if path.stem not in kept]
        gone += [
            path
            for path in sorted(self.folder.glob("*/*/*/*"))
            if path.is_file() and str(path.relative_to(self.folder)) not in listed
        ]
        for path in gone:
            path.unlink()
        return len(gone)

    def _list(self, id_: str) -> Path:
        return self.folder / "manifests" / f"{id_}.jsonl"


def open_lake(settings: Settings) -> Lake:
    """The lake of the settings' tenant."""
    return Lake(settings.path(settings.file.lake.folder) / slug(settings.tenant), settings.file.lake.snapshots)


@contextmanager
def alone(lake: Lake) -> Iterator[None]:
    """Hold the lake's lock, which the system takes back whatever happens. Raises BusyError where another process holds it."""
    lake.folder.mkdir(parents=True, exist_ok=True)
    with (lake.folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise BusyError(
                f"{lake.folder}: another night is running (process {file.read().strip() or 'unknown'}); wait for it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def slug(name: str) -> str:
    """A name as one folder's name: itself where it is plain, else escaped, and cut with a digest where it is long."""
    plain = quote(name, safe=" @+=,") or "all"
    plain = plain.replace(".", "%2E", 1) if plain.startswith(".") else plain
    return plain if len(plain) <= 100 else f"{plain[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def replace_durably(path: Path, content: bytes) -> None:
    """A file that is, at every moment, the old one or the new one, whole and on the disk."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    write_durably(part, content)
    part.rename(path)
    sync(path.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(*parts: object) -> str:
    """Digest of what something is made from: numbers, texts, structs, lists of them."""
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A new file in a folder, gone again unless it was renamed."""
    with NamedTemporaryFile(prefix=".", suffix=".part", dir=folder, delete=False) as file:
        part = Path(file.name)
    part.chmod(0o644)
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _range(rows: pa.Table, column: str) -> tuple[str, str]:
    if not column or not rows.num_rows:
        return "", ""
    ends = pc.min_max(rows[column]).as_py()
    return ends["min"], ends["max"]


def _fingerprint(rows: pa.Table) -> int:
    """XOR of the hashes of all records."""
    if not rows.num_rows:
        return 0
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame), "a table is a frame"
    return int(np.bitwise_xor.reduce(frame.hash_rows(seed=0).to_numpy()))


def _repeated(rows: pa.Table) -> list[str]:
    """Text columns whose values repeat: worth a dictionary."""
    texts = [name for name, kind in zip(rows.schema.names, rows.schema.types, strict=True) if pa.types.is_string(kind)]
    return [name for name in texts if name not in ("decision_id", "unit", "session", "parent")]
