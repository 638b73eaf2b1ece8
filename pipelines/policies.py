"""Policies on the rows of a log: by a word, in a column, or in a file of probabilities."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import polars as pl

from ope.accumulate import Target
from ope.data import DataError, FloatArray
from pipelines.frame import Log, action_vectors, is_vector, numbers, require_columns, shown
from pipelines.importers.files import unreadable
from pipelines.log_file import PART_ROWS, LogFile

MEMORY = "400MB"
"""Of DuckDB, while it puts a policy's file into the log's order of rows; what does not fit goes to disk."""


@dataclass(frozen=True)
class Policy:
    """A policy that can be asked for its probabilities on one part of a log after the other."""

    on: Callable[[Log], Target]
    """Probabilities on the rows that follow those asked for before."""
    vectors: bool
    """True if they are whole vectors."""


def open_policy(spec: str, log: LogFile) -> Policy:
    """A policy from `uniform`, `logging`, the name of a column, or of a Parquet file with `row` and p_0..p_{k-1}.

    A column holds a list of k probabilities per row, or one: that of the logged action.
    Raises DataError for a name that is none of these.
    """
    if spec == "logging":
        return Policy(lambda part: "logging", log.columns.propensities is not None)
    if spec == "uniform":
        return Policy(_uniform, True)
    if spec in log.names:
        return _column(spec, log)
    if Path(spec).exists():
        return Policy(_PolicyFile(Path(spec), log).on, True)
    known = ["uniform", "logging", *log.names]
    closest = difflib.get_close_matches(spec, known, 1, 0.5)
    raise DataError(
        "", f"policy {spec!r}, neither a file nor a column of the log", f"uniform, logging, a file, or one of {shown(log.names)}",
        f"Did you mean {closest[0]!r}?" if closest else "Check the name, or the path.", source=log.source,
    )  # fmt: skip


def is_column(spec: str) -> bool:
    """True where a policy can only be a column of the log."""
    return spec not in ("uniform", "logging") and not Path(spec).is_file()


def _uniform(part: Log) -> FloatArray:
    data = part.data
    if data.eligible is not None:
        return np.asarray(data.eligible / data.eligible.sum(axis=1, keepdims=True))
    return np.full((data.n, part.width), 1 / part.width)


def _column(name: str, log: LogFile) -> Policy:
    kind = log.schema[name]
    vectors = is_vector(pl.Series(name, [], kind)) or (kind == pl.String and is_vector(next(log.column(name))))

    def on(part: Log) -> Target:
        try:
            column = part.frame[name]
            return action_vectors(name, column, part.labels, part.ordered) if vectors else numbers(name, column)
        except DataError as error:
            raise error.located(log.source, {}) from None

    return Policy(on, vectors)


class _PolicyFile:
    """Columns `row` and p_0.., or p_LABEL for each label, put into the log's order of rows by DuckDB, on disk if need be."""

    def __init__(self, path: Path, log: LogFile):
        self.source, self.n, self.first = str(path), log.n, 0
        if path.suffix.lower() not in (".parquet", ".csv"):
            raise DataError(
                "", f"a file named {path.name}", "a name that ends in .parquet or .csv", "Convert it.", source=str(path)
            )
        self._database = duckdb.connect(config={"memory_limit": MEMORY, "threads": 2})
        try:
            table = (
                self._database.read_parquet(str(path)) if path.suffix.lower() == ".parquet" else self._database.read_csv(str(path))
            )
            require_columns(table.columns, ("row",), self.source)
            self.wanted = self._probability_columns(table.columns, log)
            chosen = ", ".join('"' + name.replace('"', '""') + '"' for name in ("row", *self.wanted))
            self._check_count(int(table.aggregate("count(*)").fetchall()[0][0]))
            self._batches = iter(table.project(chosen).order('"row"').to_arrow_reader(PART_ROWS))
        except duckdb.Error as error:
            raise unreadable(path, error) from None
        self._waiting = pl.DataFrame()

    def on(self, part: Log) -> FloatArray:
        """Probabilities (rows of the part, k)."""
        rows = part.data.n
        while self._waiting.height < rows:
            batch = pl.from_arrow(next(self._batches))
            assert isinstance(batch, pl.DataFrame), "a record batch is a frame"
            self._waiting = pl.concat((self._waiting, batch)) if self._waiting.height else batch
        frame, self._waiting = self._waiting[:rows], self._waiting[rows:]
        try:
            found = numbers("row", frame["row"])
            expected = np.arange(self.first, self.first + rows)
            if not np.array_equal(found, expected):
                place = int(np.argmax(found != expected))
                raise DataError(
                    "row", f"{found[place]:g} where {expected[place]} comes next",
                    f"each of 0..{self.n - 1} once: the rows of the log", "Number the log's rows from 0.",
                )  # fmt: skip
            return np.stack([numbers(name, frame[name]) for name in self.wanted], axis=1)
        except DataError as error:
            raise error.shifted(self.first).located(self.source, {}) from None
        finally:
            self.first += rows

    def _check_count(self, rows: int) -> None:
        if rows != self.n:
            raise DataError(
                "row", f"{rows} rows", f"each of 0..{self.n - 1} once: the rows of the log", "Number the log's rows from 0.",
                source=self.source,
            )  # fmt: skip

    def _probability_columns(self, there: Sequence[str], log: LogFile) -> list[str]:
        names, labels = [name for name in there if name.startswith("p_")], log.shape.labels
        if labels is not None and set(names) == {f"p_{label}" for label in labels}:
            return [f"p_{label}" for label in labels]
        wanted = [f"p_{index}" for index in range(len(names))]
        if set(names) != set(wanted) or not names or not log.shape.ordered:
            labelled = "" if labels is None else f", or p_ and a label: {shown([f'p_{label}' for label in labels])}"
            raise DataError(
                "p_0", f"columns {shown(there)}", f"p_0, p_1, ... up to p_{{k-1}}, none left out{labelled}",
                "Write one probability column per action.", source=self.source,
            )  # fmt: skip
        return wanted
