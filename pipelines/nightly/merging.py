"""Records of one partition as a set: sorted, each once. Pure functions; the same set, the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.nightly.sources import NUMBERED

REWARD_KEY = ("decision_id", "name", "event_id")


def distinct_decisions(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Different decisions, by id, and the rows that repeat one of an earlier source.

    `source` tells which delivery a row came with; the rest, but for the record's number in its log, is its content. Of equal ones
    that with the first number stays. Different contents of one id all stay.
    """
    table = table.take(pc.sort_indices(table["decision_id"].combine_chunks()))
    again = _adjacent(table["decision_id"])
    if not again.any():
        return table, table.slice(0, 0)
    rows = np.flatnonzero(again)
    some = table.take(pa.array(rows))
    content = some.select([name for name in some.column_names if name not in ("source", *NUMBERED)])
    copies = pl.DataFrame(
        {
            "row": rows,
            "decision_id": some["decision_id"].to_numpy(),
            "content": _frame(content).hash_rows(seed=0),
            **{name: pl.from_arrow(some[name]) for name in ("source", *NUMBERED)},
        }
    )
    which = ["decision_id", "content"]
    later = copies.sort([*which, "source"]).filter(~pl.struct(which).is_first_distinct())["row"].to_numpy()
    first = copies.sort([*which, *NUMBERED, "source"], nulls_last=True).unique(which, keep="first", maintain_order=True)
    kept = np.ones(table.num_rows, dtype=np.bool_)
    kept[rows] = False
    kept[first["row"].to_numpy()] = True
    return _in_order(table.filter(pa.array(kept))), table.take(pa.array(later))


def distinct_rewards(table: pa.Table) -> pa.Table:
    """Different observations by decision, name, time and event id, each with its place among the values of its event id.

    `event` numbers the event ids of the table, each of its decision and name. One value that was reported twice is one observation,
    as of the first time.
    """
    when = ["observed_at_ns", "received_at_ns"]
    frame = _frame(table).with_columns(pl.col("value") + 0.0)  # -0.0 is 0.0
    frame = frame.sort([*REWARD_KEY, "value", *when, *NUMBERED], nulls_last=True)
    frame = frame.filter(pl.struct([*REWARD_KEY, "value"]).is_first_distinct()).sort([*REWARD_KEY, *when, "value"])
    version = pl.lit(0, pl.Int32)
    if frame.select(pl.struct(REWARD_KEY).is_duplicated().any()).item():
        version = pl.int_range(pl.len(), dtype=pl.Int32).over(REWARD_KEY)
    new = pl.any_horizontal([pl.col(name) != pl.col(name).shift() for name in REWARD_KEY]).fill_null(True)
    event = new.cum_sum().cast(pl.Int32) - 1
    frame = frame.with_columns(version.alias("version"), event.alias("event"))
    return _table(frame.sort(["attributed_id", "name", *when, "event_id", "decision_id", "value"]))


def distinct_shown(table: pa.Table) -> pa.Table:
    """Different reports of what was shown, by decision and time."""
    what = ["attributed_id", "observed_at_ns", "received_at_ns", "action"]
    frame = _frame(table).sort([*what, *NUMBERED], nulls_last=True)
    return _table(frame.filter(pl.struct(what).is_first_distinct()))


def counts_by(table: pa.Table, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """(values of the columns, number of rows) of every combination that is there."""
    found = table.group_by(list(names)).aggregate([([], "count_all")])
    return [tuple(row[name] for name in (*names, "count_all")) for row in found.to_pylist()]


def runs(numbers: NDArray[Any]) -> list[tuple[int, int]]:
    """(first, last) of every run of consecutive numbers, in any order and perhaps repeated."""
    ordered = np.unique(numbers)
    if not len(ordered):
        return []
    breaks = np.flatnonzero(np.diff(ordered) > 1)
    firsts, lasts = np.concatenate(([0], breaks + 1)), np.concatenate((breaks, [len(ordered) - 1]))
    return [(int(ordered[first]), int(ordered[last])) for first, last in zip(firsts, lasts, strict=True)]


def united(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals of whole numbers, those that touch made one."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(intervals):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _adjacent(ids: pa.ChunkedArray) -> NDArray[np.bool_]:
    """True for every row (n,) whose neighbour in the order has the same id."""
    column = ids.combine_chunks()
    same = np.asarray(pc.equal(column.slice(1), column.slice(0, max(len(column) - 1, 0))).to_numpy(zero_copy_only=False))
    return np.concatenate((same, [False]))[: len(column)] | np.concatenate(([False], same))[: len(column)]


def _in_order(table: pa.Table) -> pa.Table:
    """Decisions by id, several contents of one id by their text: an order that no delivery has a say in."""
    rows = np.flatnonzero(_adjacent(table["decision_id"]))
    if not len(rows):
        return table
    records = table.drop_columns(["source"]).take(pa.array(rows)).to_pylist()
    texts = [(record["decision_id"], json.dumps(record, default=bytes.hex, sort_keys=True)) for record in records]
    order = np.arange(table.num_rows)
    order[rows] = rows[sorted(range(len(rows)), key=texts.__getitem__)]
    return table.take(pa.array(order))


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame), "a table is a frame"
    return frame


def _table(frame: pl.DataFrame) -> pa.Table:
    """A frame with Arrow's plain types."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    kinds = [pa.string() if pa.types.is_large_string(kind) else kind for kind in table.schema.types]
    return table.cast(pa.schema(dict(zip(table.column_names, kinds, strict=True))))
