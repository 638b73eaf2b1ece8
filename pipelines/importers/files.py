"""Logs and policies from Parquet or CSV files, with a map of their columns."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ope.accumulate import Target
from ope.data import DataError, FloatArray
from pipelines.frame import METADATA, ColumnMap, Log, action_vectors, is_vector, numbers, require_columns, shown, to_log

MAX_CELLS = 2_000_000_000
"""Largest matrix of probabilities that is made up: 16 GB."""


def read_log(path: Path, columns: ColumnMap, *, also: Sequence[str] = (), k: int | None = None) -> Log:
    """A validated log from a Parquet or CSV file. `also`: further columns to keep where there are any, such as a policy's.

    What the map leaves open is taken from the file's own remarks, such as those that `propel import` writes.
    """
    columns = columns.with_remarks(remarks(path))
    return to_log(read_frame(path, [*columns.named().values(), *columns.context], also), columns, str(path), k=k)


def read_policy(spec: str, log: Log, k: int | None = None, there: Sequence[str] = ()) -> Target:
    """A policy on the rows of a log: `uniform`, `logging`, a column of the log, or a Parquet file with row and p_0..p_{k-1}.

    A column holds a list of k probabilities per row, or one: that of the logged action. `k` is the number of actions for
    `uniform` where the log does not say it; by default the highest index seen plus one. `there`: columns to suggest.
    """
    if spec == "logging":
        return "logging"
    if spec == "uniform":
        return _uniform(log, k)
    if spec in log.frame.columns:
        try:
            column = log.frame[spec]
            return action_vectors(spec, column, log.labels, log.ordered) if is_vector(column) else numbers(spec, column)
        except DataError as error:
            raise error.located(log.source, {}) from None
    if Path(spec).exists():
        return _policy_file(Path(spec), log)
    known = ["uniform", "logging", *there]
    closest = difflib.get_close_matches(spec, known, 1, 0.5)
    raise DataError(
        "", f"policy {spec!r}, neither a file nor a column of the log", f"uniform, logging, a file, or one of {shown(there)}",
        f"Did you mean {closest[0]!r}?" if closest else "Check the name, or the path.", source=log.source,
    )  # fmt: skip


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
        lazy: pl.LazyFrame = pl.scan_parquet(path) if kind == ".parquet" else pl.scan_csv(path, infer_schema_length=None)
        there = lazy.collect_schema().names()
        require_columns(there, wanted or (), source)
        return lazy.select(list(dict.fromkeys([*(wanted or there), *(name for name in also if name in there)]))).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(
            "", f"a file that cannot be read ({first})", f"a complete {kind} file", "Write or copy it again.", source=source
        ) from None


def remarks(path: Path) -> dict[str, Any]:
    """What a Parquet file says of its own columns: `ColumnMap` fields. Empty where it says nothing, or cannot be read."""
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return {}
    try:
        said = pq.read_metadata(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return {}  # read_frame tells what is wrong with it
    found = json.loads(said.get(METADATA, b"{}"))
    return found if isinstance(found, dict) else {}


def column_names(path: Path) -> list[str]:
    """Names of the columns of a Parquet or CSV file that `read_frame` has read."""
    lazy = pl.scan_parquet(path) if path.suffix.lower() == ".parquet" else pl.scan_csv(path)
    return lazy.collect_schema().names()


def _uniform(log: Log, k: int | None) -> FloatArray:
    data = log.data
    if data.eligible is not None:
        return np.asarray(data.eligible / data.eligible.sum(axis=1, keepdims=True))
    width = log.width(k)
    if data.n * width > MAX_CELLS:
        raise DataError(
            "action", f"{data.n:,} rows of {width:,} actions", f"at most {MAX_CELLS:,} probabilities in memory",
            "Number the actions 0..k-1, or give the policy as one probability per row.", source=log.source,
        )  # fmt: skip
    return np.full((data.n, width), 1 / width)


def _policy_file(path: Path, log: Log) -> FloatArray:
    """Probabilities (n, k) from columns `row` and p_0.., or p_LABEL for each label, put into the log's order of rows."""
    source, n = str(path), log.data.n
    frame = read_frame(path)
    require_columns(frame.columns, ("row",), source)
    names = [name for name in frame.columns if name.startswith("p_")]
    if log.labels is not None and set(names) == {f"p_{label}" for label in log.labels}:
        wanted = [f"p_{label}" for label in log.labels]
    else:
        wanted = [f"p_{index}" for index in range(len(names))]
        if set(names) != set(wanted) or not names or not log.ordered:
            labelled = "" if log.labels is None else f", or p_ and a label: {shown([f'p_{label}' for label in log.labels])}"
            raise DataError(
                "p_0", f"columns {shown(frame.columns)}", f"p_0, p_1, ... up to p_{{k-1}}, none left out{labelled}",
                "Write one probability column per action.", source=source,
            )  # fmt: skip
    try:
        rows = numbers("row", frame["row"])
        if sorted(rows.tolist()) != list(range(n)):
            raise DataError(
                "row", f"{len(rows)} rows", f"each of 0..{n - 1} once: the rows of the log", "Number the log's rows from 0."
            )
        ordered = frame.sort("row")
        return np.stack([numbers(name, ordered[name]) for name in wanted], axis=1)
    except DataError as error:
        raise error.located(source, {}) from None
