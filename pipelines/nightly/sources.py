"""Where events come from: the port that ingest reads, and folders of Parquet files behind it. `log_source` reads the log."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ope.data import InputError
from pipelines.importers.layout import DECISIONS as IMPORTED_DECISIONS
from pipelines.importers.layout import REWARDS as IMPORTED_REWARDS
from pipelines.nightly.lake import file_digest

Kind = Literal["decisions", "rewards", "shown", "quarantined"]

BATCH = 2**17
"""Records that are read and checked together."""

NUMBERED = {"log_id": pa.string(), "log_row": pa.int64()}
"""Where a source numbers its records: a log, and the record's number in it."""


def _plain(schema: pa.Schema) -> pa.Schema:
    kinds = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in schema.types]
    return pa.schema({**dict(zip(schema.names, kinds, strict=True)), **NUMBERED})


SCHEMAS: dict[Kind, pa.Schema] = {
    "decisions": _plain(IMPORTED_DECISIONS),
    "rewards": _plain(IMPORTED_REWARDS),
    "quarantined": _plain(IMPORTED_REWARDS),
    "shown": pa.schema(
        {
            "schema_version": pa.int16(),
            "tenant": pa.string(),
            "decision_id": pa.string(),
            "action": pa.string(),
            "observed_at_ns": pa.int64(),
            "received_at_ns": pa.int64(),
            **NUMBERED,
        }
    ),
}
"""Columns of each kind of record: the fields of `bandits.events`, and the number of the record in its log.

Quarantined are rewards that came with the token of another decision: kept, never joined.
"""


class Source(Protocol):
    """Events in whatever order, perhaps for the second time."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def identity(self) -> str:
        """Digest of all that it holds: a source that was read once is not read again."""
        ...

    def stamp(self) -> str:
        """Quick to know, and another one where the content changed, such as sizes and times: then the identity is asked for."""
        ...

    def batches(self) -> Iterator[tuple[Kind, pa.Table]]:
        """Records, some of one kind at a time, with the columns of `SCHEMAS`. Raises InputError where it cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class EventFolder:
    """decisions.parquet, rewards.parquet, shown.parquet, or some of them: what `propel import` writes."""

    path: Path

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.path.name

    def identity(self) -> str:
        """Digest of the names and contents of the files."""
        parts = [(path.name, file_digest(path)) for path in (self._file(kind) for kind in SCHEMAS) if path.is_file()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def stamp(self) -> str:
        """Sizes and times of the files."""
        found = [(kind, path.stat()) for kind in SCHEMAS if (path := self._file(kind)).is_file()]
        return " ".join(f"{kind}:{status.st_size}:{status.st_mtime_ns}" for kind, status in found)

    def batches(self) -> Iterator[tuple[Kind, pa.Table]]:
        """Records of one file after the other."""
        for kind, schema in SCHEMAS.items():
            path = self._file(kind)
            if not path.is_file():
                continue
            try:
                with pq.ParquetFile(path, pre_buffer=False) as file:
                    for batch in file.iter_batches(batch_size=BATCH):
                        yield kind, _as_schema(pa.Table.from_batches([batch]), schema, path)
            except pa.ArrowException as error:
                raise InputError(
                    f"{path}: found {str(error).splitlines()[0]}; expected a complete Parquet file: write it again"
                ) from None

    def _file(self, kind: Kind) -> Path:
        return self.path / f"{kind}.parquet"


def inbox(folder: Path) -> list[EventFolder]:
    """Folders of events in an inbox, by name; those whose names begin with a dot are still being written."""
    if not folder.is_dir():
        return []
    found = [EventFolder(path) for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return [one for one in found if any((one.path / f"{kind}.parquet").is_file() for kind in SCHEMAS)]


def _as_schema(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    """The columns of a schema, log numbers null where the file has none. Raises InputError for one that lacks or cannot be cast."""
    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        if name not in table.column_names:
            if name not in NUMBERED:
                raise InputError(f"{path}: found no column {name}; expected {', '.join(schema.names)}")
            columns.append(pa.nulls(table.num_rows, kind))
            continue
        try:
            columns.append(table[name].cast(kind))
        except pa.ArrowException:
            raise InputError(f"{path}: column {name}: found {table[name].type}; expected {kind}") from None
    return pa.Table.from_arrays(columns, schema=schema)
