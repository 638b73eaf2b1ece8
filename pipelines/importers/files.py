"""Logs in Parquet or CSV files, with a map of their columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ope.data import DataError
from pipelines.frame import METADATA, ColumnMap, Log, require_columns, to_log


def read_log(path: Path, columns: ColumnMap, *, also: Sequence[str] = (), k: int | None = None) -> Log:
    """A validated log from a Parquet or CSV file. `also`: further columns to keep where there are any, such as a policy's.

    What the map leaves open is taken from the file's own remarks, such as those that `propel import` writes.
    """
    columns = columns.with_remarks(remarks(path))
    return to_log(read_frame(path, [*columns.named().values(), *columns.context], also), columns, str(path), k=k)


def read_frame(path: Path, wanted: Sequence[str] | None = None, also: Sequence[str] = ()) -> pl.DataFrame:
    """The wanted columns (all of them for None) of a Parquet or CSV file, and those of `also` that it has.

    Raises DataError where it cannot be read.
    """
    source = str(path)
    kind = path.suffix.lower()
    if kind not in (".parquet", ".csv"):
        raise DataError("", f"a file named {path.name}", "a name that ends in .parquet or .csv", "Convert it first.", source=source)
    if not path.is_file():
        raise DataError("", "no such file", "a Parquet or CSV file", "Check the path.", source=source)
    try:
        lazy = pl.scan_parquet(path) if kind == ".parquet" else pl.scan_csv(path, infer_schema_length=None)
        there = lazy.collect_schema().names()
        require_columns(there, wanted or (), source)
        return lazy.select(list(dict.fromkeys([*(wanted or there), *(name for name in also if name in there)]))).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> DataError:
    """The error for a file that its library cannot read."""
    first = str(error).splitlines()[0]
    expected = f"a complete {path.suffix.lower()} file"
    return DataError("", f"a file that cannot be read ({first})", expected, "Write or copy it again.", source=str(path))


def remarks(path: Path) -> dict[str, Any]:
    """What a Parquet file says of its own columns: `ColumnMap` fields. Empty where it says nothing, or cannot be read."""
    found = json.loads(file_metadata(path).get(METADATA, b"{}"))
    return found if isinstance(found, dict) else {}


def file_metadata(path: Path) -> dict[bytes, bytes]:
    """Key-value pairs of a Parquet file; none where it cannot be read, which reading its rows then tells."""
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return {}
    try:
        return pq.read_metadata(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return {}
