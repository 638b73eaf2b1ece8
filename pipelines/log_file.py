"""A log in a file, read part by part: memory does not grow with the number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ope.data import DataError
from pipelines.frame import ColumnMap, Log, Shape, check_columns, shape_of, to_log
from pipelines.importers.files import read_frame, remarks, unreadable

T = TypeVar("T")

PART_ROWS = 2**18
"""Rows that are read together."""


@dataclass(frozen=True)
class LogFile:
    """A Parquet log, or a CSV one, which is read whole and handed out in parts."""

    path: Path
    columns: ColumnMap
    """With the file's own remarks."""
    also: tuple[str, ...]
    """Further columns, such as a policy's."""
    names: tuple[str, ...]
    """Of all columns of the file."""
    n: int
    shape: Shape
    given: int | None
    """Number of actions that was asked for."""
    whole: pl.DataFrame | None
    """A CSV file's rows."""

    @property
    def source(self) -> str:
        """Name for messages."""
        return str(self.path)

    @cached_property
    def schema(self) -> pl.Schema:
        """Types of the columns."""
        return pl.read_parquet_schema(self.path) if self.whole is None else self.whole.schema  # type: ignore[return-value]

    def parts(self) -> Iterator[tuple[int, Log]]:
        """(first row, rows) of the file, one part after the other, the next being read while one is worked on.

        Raises DataError, its row counted over the whole file.
        """
        return ahead(self._parts())

    def column(self, name: str) -> Iterator[pl.Series]:
        """One column, part by part."""
        for frame in self._frames([name]):
            yield frame[name]

    def _parts(self) -> Iterator[tuple[int, Log]]:
        first = 0
        wanted = list(dict.fromkeys([*self.columns.named().values(), *self.columns.context, *self.also]))
        for frame in self._frames(wanted):
            try:
                log = to_log(frame, self.columns, self.source, k=self.given, shape=self.shape)
            except DataError as error:
                raise error.shifted(first) from None
            yield first, log
            first += frame.height

    def _frames(self, names: Sequence[str]) -> Iterator[pl.DataFrame]:
        if self.whole is not None:
            yield from (self.whole.select(names).slice(start, PART_ROWS) for start in range(0, self.n, PART_ROWS))
            return
        try:
            with pq.ParquetFile(self.path, pre_buffer=False) as file:  # else all that was read stays in memory
                for batch in file.iter_batches(batch_size=PART_ROWS, columns=list(names)):
                    frame = pl.from_arrow(batch)
                    assert isinstance(frame, pl.DataFrame), "a record batch is a frame"
                    yield frame.select(names)
        except (pa.ArrowInvalid, OSError) as error:
            raise unreadable(self.path, error) from None


def open_log(path: Path, columns: ColumnMap, *, also: Sequence[str] = (), k: int | None = None) -> LogFile:
    """A log whose columns are there. `also`: further columns to read where the file has them.

    Raises DataError where the file cannot be read, has no rows, or lacks a column; rows are checked when they are read.
    """
    columns = columns.with_remarks(remarks(path))
    wanted = [*columns.named().values(), *columns.context]
    whole = None if path.suffix.lower() == ".parquet" and path.is_file() else read_frame(path, wanted, also)
    try:
        frame = pl.scan_parquet(path) if whole is None else whole.lazy()
        names = frame.collect_schema().names()
        check_columns(names, columns, str(path))
        n = pq.read_metadata(path).num_rows if whole is None else whole.height
        if n == 0:
            raise DataError("", "an empty log", "at least one row", "Check the filter or the date that wrote it.", source=str(path))
        shape = shape_of(frame, columns, k)
    except (pl.exceptions.PolarsError, pa.ArrowInvalid, OSError) as error:
        raise unreadable(path, error) from None
    except DataError as error:
        raise error.located(str(path), columns.named()) from None
    return LogFile(path, columns, tuple(name for name in also if name in names), tuple(names), n, shape, k, whole)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next one made in a second thread while one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
