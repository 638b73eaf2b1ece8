"""Logs and policies from files: Parquet or CSV with a column map, and the bundled sample of the Open Bandit Dataset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from ope.accumulate import Target
from ope.data import DataError, FloatArray
from pipelines.frame import ColumnMap, Log, is_vector, numbers, require_columns, shown, to_log, vectors

OPEN_BANDIT = ColumnMap(action="item_id", reward="click", propensity="propensity_score")
"""Columns of the Open Bandit Dataset, in the publisher's names."""


def read_log(path: Path, columns: ColumnMap, *, also: Sequence[str] = (), k: int | None = None) -> Log:
    """A validated log from a Parquet or CSV file. `also`: further columns to keep, such as a policy's."""
    frame = read_frame(path, [*columns.named().values(), *columns.context, *also])
    return to_log(frame, columns, str(path), k=k)


def open_bandit(policy: Literal["random", "bts"]) -> Log:
    """The bundled sample, 10,000 rows: "random", the uniform policy, or "bts", Bernoulli Thompson sampling.

    The context is the position and the four hashed user features. Thompson sampling's propensities were estimated by the
    publisher, so verdicts on that log are at most `caution`.
    """
    folder = resources.files("pipelines") / "data" / "open_bandit"
    with resources.as_file(folder / f"{policy}_all.parquet") as path:
        frame = pl.read_parquet(path)
    frame = frame.with_columns(pl.col("position").cast(pl.String))
    context = ("position", *(f"user_feature_{i}" for i in range(4)))
    columns = ColumnMap(OPEN_BANDIT.action, OPEN_BANDIT.reward, OPEN_BANDIT.propensity, context=context)
    return to_log(frame, columns, f"open_bandit/{policy}_all.parquet", estimated=policy == "bts")


def read_policy(spec: str, log: Log, k: int | None = None) -> Target:
    """A policy on the rows of a log: `uniform`, `logging`, a column of the log, or a Parquet file with row and p_0..p_{k-1}.

    A column holds a list of k probabilities per row, or one: that of the logged action. `k` is the number of actions for
    `uniform` where the log does not say it; by default the highest index seen plus one.
    """
    if spec == "logging":
        return "logging"
    if spec == "uniform":
        return _uniform(log, k)
    if spec in log.frame.columns:
        try:
            column = log.frame[spec]
            return vectors(spec, column) if is_vector(column) else numbers(spec, column)
        except DataError as error:
            raise error.located(log.source, {}) from None
    if Path(spec).exists():
        return _policy_file(Path(spec), log.data.n)
    raise DataError(
        spec, "neither a column of the log nor a file", f"uniform, logging, a file, or one of {shown(log.frame.columns)}",
        "Name the policy by one of these.", source=log.source,
    )  # fmt: skip


def read_frame(path: Path, wanted: Sequence[str] | None = None) -> pl.DataFrame:
    """The wanted columns (all of them for None) of a Parquet or CSV file. Raises DataError where it cannot be read."""
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
        return lazy.select(list(dict.fromkeys(wanted or there))).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(
            "", f"a file that cannot be read ({first})", f"a complete {kind} file", "Write or copy it again.", source=source
        ) from None


def _uniform(log: Log, k: int | None) -> FloatArray:
    data = log.data
    if data.eligible is not None:
        return np.asarray(data.eligible / data.eligible.sum(axis=1, keepdims=True))
    if data.propensities is not None:
        k = data.propensities.shape[1]
    seen = int(data.action.max()) + 1
    return np.full((data.n, max(seen, k or 0)), 1 / max(seen, k or 0))


def _policy_file(path: Path, n: int) -> FloatArray:
    source = str(path)
    frame = read_frame(path)
    require_columns(frame.columns, ("row",), source)
    numbered = sorted((int(match[1]), name) for name in frame.columns if (match := re.fullmatch(r"p_(\d+)", name)))
    if [number for number, _ in numbered] != list(range(len(numbered))) or not numbered:
        raise DataError(
            "p_0", f"columns {shown(frame.columns)}", "p_0, p_1, ... up to p_{k-1}, none left out",
            "Write one probability column per action.", source=source,
        )  # fmt: skip
    try:
        rows = numbers("row", frame["row"])
        if sorted(rows.tolist()) != list(range(n)):
            raise DataError(
                "row", f"{len(rows)} rows", f"each of 0..{n - 1} once: the rows of the log", "Number the log's rows from 0."
            )
        matrix = np.stack([numbers(name, frame[name]) for _, name in numbered], axis=1)
    except DataError as error:
        raise error.located(source, {}) from None
    return matrix[np.argsort(rows)]
