"""Data frames to validated arrays: columns are named, checked and converted here, and nowhere else."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ope.data import LARGEST, BoolArray, DataError, FloatArray, IntArray, LoggedData

MAX_ACTIONS = 1_000_000
"""An index beyond this is an identifier."""

METADATA = b"propel"
"""Key of a Parquet file's own remarks on its columns: a JSON object of `ColumnMap` fields and `propensity_estimated`."""

MISSING = "(missing)"
"""Level of a category that is not there."""

MAX_LEVELS = 1000
"""A text column with more levels than this is an identifier, not a feature."""


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Which column of a file holds what. Fields are those of `LoggedData`; None means the file does not have it."""

    action: str = "action"
    reward: str = "reward"
    propensity: str = "propensity"
    propensities: str | None = None
    """A list of k probabilities per row: the logging policy's whole vector."""
    eligible: str | None = None
    """A list of the eligible actions per row."""
    sample_weight: str | None = None
    cluster: str | None = None
    context: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    """Text actions in the order of vectors' entries."""
    by_eligible: bool = False
    """True if the entries of `propensities` are those of the row's eligible actions, in that order, not of all actions."""
    propensity_estimated: bool = False
    """True if propensities were estimated afterwards rather than logged."""

    def with_remarks(self, remarks: Mapping[str, Any]) -> ColumnMap:
        """What was not said, as the file itself says it (under `METADATA`)."""
        open_fields = {field.name for field in fields(self) if getattr(self, field.name) == field.default}
        told: dict[str, Any] = {
            name: tuple(said) if isinstance(said, list) else said for name, said in remarks.items() if said is not None
        }
        return replace(self, **{name: said for name, said in told.items() if name in open_fields})

    def named(self) -> dict[str, str]:
        """Field -> column, for the single columns that were named."""
        names = ("action", "reward", "propensity", "propensities", "eligible", "sample_weight", "cluster")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, slots=True, eq=False)
class Log:
    """A validated log, with what its file knew beside the arrays."""

    data: LoggedData
    frame: pl.DataFrame
    source: str
    labels: tuple[str, ...] | None
    """Action labels in index order, where the file named its actions by text."""
    ordered: bool
    """True where indices or given labels fix what the j-th entry of a vector means."""
    k: int
    """Number of actions that the whole log shows, or that was given."""

    @property
    def width(self) -> int:
        """Number of actions: of vectors or sets where there are any, else what the whole log shows."""
        vectors = (self.data.propensities, self.data.eligible)
        return next((int(array.shape[1]) for array in vectors if array is not None), self.k)


@dataclass(frozen=True, slots=True)
class Shape:
    """What only all rows of a log together say."""

    k: int
    """Number of actions: given, or that of labels, or the highest index (taken or eligible) plus one."""
    labels: tuple[str, ...] | None
    ordered: bool
    levels: Mapping[str, tuple[str, ...]]
    """Texts of each context column that holds no numbers."""


def shape_of(frame: pl.LazyFrame, columns: ColumnMap, k: int | None) -> Shape:
    """Read what all rows together say. Raises DataError for a context column of too many texts, or of numbers and a few texts."""
    schema = frame.collect_schema()
    kind, labels = schema[columns.action], columns.labels or None
    highest = len(labels or ()) - 1
    if labels is None and not kind.is_numeric() and not kind.is_nested():
        texts = pl.col(columns.action).cast(pl.String).drop_nulls().unique()
        labels = tuple(frame.select(texts).collect(engine="streaming").to_series().sort().to_list())
        highest = len(labels) - 1
    elif kind.is_numeric() and labels is None:
        largest = frame.select(pl.col(columns.action).max()).collect(engine="streaming").item() or 0
        highest = int(largest) if math.isfinite(largest) else 0  # what is no action is refused where its row is known
        lists = None if columns.eligible is None else schema[columns.eligible]
        if isinstance(lists, pl.List) and lists.inner.is_integer():
            eligible = frame.select(pl.col(columns.eligible or "").list.max().max()).collect(engine="streaming").item()
            highest = max(highest, int(eligible or 0))
    levels = {name: _levels(frame, name) for name in columns.context if not schema[name].is_numeric()}
    return Shape(max(k or 0, highest + 1), labels, labels is None or bool(columns.labels), levels)


def to_log(frame: pl.DataFrame, columns: ColumnMap, source: str, *, k: int | None = None, shape: Shape | None = None) -> Log:
    """Validate a frame's columns into a log. Integer actions are indices; text actions are numbered in sorted order.

    `shape`: what all rows say, where the frame holds only some of them.
    Raises DataError naming the file, its column, the first offending row, what was expected and what to do.
    """
    named = columns.named()
    check_columns(frame.columns, columns, source)
    if frame.height == 0:
        raise DataError("", "an empty log", "at least one row", "Check the filter or the date that wrote it.", source=source)
    try:
        shape = shape_of(frame.lazy(), columns, k) if shape is None else shape
        labels = shape.labels
        action, _ = action_indices(frame[columns.action], labels or ())
        if k is not None and k <= int(action.max()):
            row = int(np.argmax(action >= k))
            raise DataError("action", f"action {int(action[row])}", f"an index below --actions {k}", "Raise --actions.", row=row)
        arrays: dict[str, Any] = {"action": action}
        for name in ("reward", "propensity", "sample_weight"):
            if name in named:
                arrays[name] = numbers(name, frame[named[name]])
        if "eligible" in named:
            arrays["eligible"] = eligible_sets(frame[named["eligible"]], labels, shape.k)
            if columns.by_eligible and "propensities" in named:
                arrays["propensities"] = _scattered(frame, named, labels, arrays["eligible"].shape[1])
        if "propensities" in named and "propensities" not in arrays:
            arrays["propensities"] = action_vectors("propensities", frame[named["propensities"]], labels, shape.ordered)
        if "cluster" in named:
            arrays["cluster"] = units(frame[named["cluster"]])
        if columns.context:
            arrays["context"] = design_matrix(frame, columns.context, shape.levels)
        data = LoggedData(**arrays, propensity_estimated=columns.propensity_estimated)
        return Log(data, frame, source, labels, shape.ordered, shape.k)
    except DataError as error:
        raise error.located(source, named) from None


def check_columns(there: Sequence[str], columns: ColumnMap, source: str) -> None:
    """Raise DataError where a named column is not there, or the context holds what happened."""
    if columns.propensity not in there and columns.action in there:
        raise DataError(
            columns.propensity, "no such column", f"the probability of each action taken, in one of {shown(there)}",
            "Name it with --propensity. Where it was never logged, `propel propensities` estimates it; never fill in a number.",
            source=source,
        )  # fmt: skip
    require_columns(there, [*columns.named().values(), *columns.context], source)
    _reject_leaks(columns, source)


def units(column: pl.Series) -> NDArray[Any]:
    """A column of units (n,): numbers as they are, texts as 64-bit hashes, which sort and compare in a fraction of the time."""
    _reject_missing("cluster", column)
    _reject_nested("cluster", column)
    return (column if column.dtype.is_numeric() else column.cast(pl.String).hash(seed=0)).to_numpy()


def _reject_leaks(columns: ColumnMap, source: str) -> None:
    """Raise DataError for a context that holds what happened, or one column twice."""
    taken = {column: name for name, column in columns.named().items() if name != "cluster"}
    for place, name in enumerate(columns.context):
        if name in taken:
            remedy = "A policy decides before these are known: leave it out of the context."
            raise DataError(
                name, f"the {taken[name]} column in the context", "columns known before the decision", remedy, source=source
            )
        if name in columns.context[:place]:
            raise DataError(name, "the same column twice in the context", "each column once", "Name it once.", source=source)


def require_columns(there: Sequence[str], wanted: Sequence[str], source: str) -> None:
    """Raise DataError for the first wanted column that is not there, with the closest that is."""
    for name in wanted:
        if name not in there:
            closest = difflib.get_close_matches(name, there, 1, 0.5)
            hint = f"Did you mean {closest[0]!r}?" if closest else "Name the column that holds it."
            if len(there) == 1 and any(separator in there[0] for separator in ";\t|"):
                hint = "The file seems to be separated by something else than commas: convert it."
            raise DataError(name, "no such column", f"one of {shown(there)}", hint, source=source)


def shown(names: Sequence[str], most: int = 12) -> str:
    """Names in a sentence, the tail cut off."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def numbers(name: str, column: pl.Series) -> FloatArray:
    """A column of numbers (n,). Raises DataError at the first missing value or the first that is not a number."""
    _reject_missing(name, column)
    _reject_nested(name, column)
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.String)):
        raise DataError(name, f"{column.dtype} values", "numbers", "Convert the column, or map another one.")
    values = column.cast(pl.Float64, strict=False)
    if values.null_count():
        row = int(values.is_null().arg_max() or 0)
        raise DataError(name, f"{column[row]!r}", "a number", "Clean the column, or map another one.", row=row)
    return values.to_numpy()


def vectors(name: str, column: pl.Series) -> FloatArray:
    """A column of lists, or of text that holds JSON lists, as (n, k). Raises DataError where lengths differ."""
    _reject_missing(name, column)
    lists = _lists(name, column, pl.Float64)
    lengths = lists.list.len()
    if lengths.n_unique() > 1:
        row = int((lengths != lengths[0]).arg_max() or 0)
        raise DataError(
            name, f"{lengths[row]} entries", f"{lengths[0]} in every row, as in row 0", "Write one entry per action.", row=row
        )
    flat = lists.explode(empty_as_null=True)
    entries = flat.cast(pl.Float64, strict=False)
    if entries.null_count() or int(lengths[0]) == 0:
        row = int(entries.is_null().arg_max() or 0) // max(int(lengths[0]), 1)
        raise DataError(name, f"{column[row]!s}", "a list of numbers, one per action", "Fill every entry.", row=row)
    return entries.to_numpy().reshape(len(column), -1)


def action_vectors(name: str, column: pl.Series, labels: tuple[str, ...] | None, ordered: bool) -> FloatArray:
    """`vectors` over the actions of a log (n, k). Raises DataError where nothing says which entry is which action's."""
    matrix = vectors(name, column)
    if not ordered:
        raise DataError(
            name, f"vectors of {matrix.shape[1]} beside actions that are texts", "the order of the actions",
            f"Give it: --labels {','.join(labels or ())}, if that is the order of the entries.",
        )  # fmt: skip
    if labels is not None and matrix.shape[1] != len(labels):
        raise DataError(
            name, f"vectors of {matrix.shape[1]}", f"{len(labels)} entries, one per label", "Name every action in --labels."
        )
    return matrix


def is_vector(column: pl.Series) -> bool:
    """True if a policy column holds a list of probabilities per row rather than one."""
    return isinstance(column.dtype, pl.List | pl.Array) or (column.dtype == pl.String and _starts_a_list(column))


def design_matrix(frame: pl.DataFrame, names: Sequence[str], levels: Mapping[str, tuple[str, ...]] | None = None) -> FloatArray:
    """Columns as features (n, d): numbers as they are, text, booleans and categories one column per level.

    `levels`: those of the whole log, where the frame holds only some of its rows.
    """
    blocks: list[FloatArray] = []
    for name in names:
        column = frame[name]
        if not column.dtype.is_numeric():
            known = _levels(frame.lazy(), name) if levels is None else levels[name]
            texts = column.cast(pl.String).fill_null(MISSING)
            blocks.append((texts.to_numpy()[:, None] == np.array(known, dtype=object)[None, :]).astype(np.float64))
            continue
        values = numbers(name, column)
        if not (np.abs(values) < LARGEST).all():
            row = int(np.argmin(np.abs(values) < LARGEST))
            expected = f"a finite number below {LARGEST:g} in size"
            raise DataError(name, f"{values[row]}", expected, "Fill or drop it before evaluating.", row=row)
        blocks.append(values[:, None])
    return np.concatenate(blocks, axis=1)


def _levels(frame: pl.LazyFrame, name: str) -> tuple[str, ...]:
    """The texts of a column, sorted. Raises DataError where they are too many, or numbers but for a few cells: those are typos."""
    kind = frame.collect_schema()[name]
    if kind.is_nested():
        raise DataError(name, f"{kind} values", "one number or text per row", "Unnest the column, or map another one.")
    column = pl.col(name)
    if kind == pl.String:
        stray = column.is_not_null() & column.cast(pl.Float64, strict=False).is_null()
        found = frame.select(stray.sum().alias("stray"), pl.len().alias("n")).collect(engine="streaming")
        if 0 < found["stray"][0] < found["n"][0] / 2:
            row, text = frame.select(column).with_row_index("row").filter(stray).head(1).collect().row(0)
            raise DataError(
                name, f"{text!r} among numbers", "numbers, or texts", "Clean the cell, or leave it empty.", row=int(row)
            )
    texts = frame.select(column.cast(pl.String).fill_null(MISSING).unique()).collect(engine="streaming").to_series().sort()
    if len(texts) > MAX_LEVELS:
        raise DataError(name, f"{len(texts):,} different texts", f"at most {MAX_LEVELS:,}", "Leave identifiers out of the context.")
    return tuple(texts.to_list())


def action_indices(column: pl.Series, given: tuple[str, ...]) -> tuple[IntArray, tuple[str, ...] | None]:
    """Indices (n,), and the labels behind them where actions are texts: those given, else those seen, sorted."""
    _reject_missing("action", column)
    _reject_nested("action", column)
    if column.dtype.is_integer() and not given:
        action = column.cast(pl.Int64).to_numpy()
        if int(action.max(initial=0)) >= MAX_ACTIONS:
            row = int(np.argmax(action >= MAX_ACTIONS))
            raise DataError("action", f"{action[row]}", f"an index below {MAX_ACTIONS:,}", "Number the actions 0..k-1.", row=row)
        return action, None
    if column.dtype.is_float() and not given:
        values = column.to_numpy()
        whole = (np.abs(values) < MAX_ACTIONS) & (values == np.floor(values))
        if not whole.all():
            row = int(np.argmin(whole))
            raise DataError(
                "action", f"{values[row]}", "an action index or label", "Map the actions to 0..k-1 or to text.", row=row
            )
        return values.astype(np.int64), None
    labels = column.cast(pl.String)
    known = given or tuple(labels.unique().sort().to_list())
    index = labels.replace_strict(list(known), list(range(len(known))), default=None, return_dtype=pl.Int64)
    if index.null_count():
        row = int(index.is_null().arg_max() or 0)
        raise DataError(
            "action", f"{labels[row]!r}", f"one of the labels {shown(known)}", "Name every action in --labels.", row=row
        )
    return index.to_numpy(), known


def eligible_sets(column: pl.Series, labels: tuple[str, ...] | None, k: int) -> BoolArray:
    """A column of lists of actions as sets (n, at least k). Raises DataError at the first that is no action."""
    owner, member, width = _members(column, labels, k)
    eligible = np.zeros((len(column), width), dtype=np.bool_)
    eligible[owner, member] = True
    return eligible


def _members(column: pl.Series, labels: tuple[str, ...] | None, k: int) -> tuple[IntArray, IntArray, int]:
    """Row and index of every eligible action, row by row in the order listed, and the number of actions, at least k."""
    _reject_missing("eligible", column)
    lists = _lists("eligible", column, pl.Int64 if labels is None else pl.String)
    owner, member = np.repeat(np.arange(len(column)), lists.list.len().to_numpy()), lists.explode(empty_as_null=False)
    if member.null_count():
        row = int(owner[int(member.is_null().arg_max() or 0)])
        raise DataError("eligible", "a missing action", "a list of actions", "Leave out what is not eligible.", row=row)
    if labels is not None:
        code = {label: index for index, label in enumerate(labels)}
        unseen = sorted(set(member.to_list()) - set(code))
        if unseen:
            raise DataError(
                "eligible", f"action {unseen[0]!r}, which no row took", "labels that occur as actions",
                "Number the actions 0..k-1, so that their order does not depend on the log.",
            )  # fmt: skip
        index = np.array([code[label] for label in member.to_list()], dtype=np.int64)
    else:
        numbered = member.cast(pl.Int64, strict=False)
        bad = numbered.is_null() | (numbered < 0) | (numbered >= MAX_ACTIONS)
        if bad.any():
            place = int(bad.arg_max() or 0)
            found, row = member[place], int(owner[place])
            raise DataError(
                "eligible", f"action {found!r}", f"indices from 0 to {MAX_ACTIONS - 1:,}", "Number the actions 0..k-1.", row=row
            )
        index = numbered.to_numpy()
    return owner, index, max(k, int(index.max(initial=0)) + 1)


def _scattered(frame: pl.DataFrame, named: Mapping[str, str], labels: tuple[str, ...] | None, width: int) -> FloatArray:
    """Lists with an entry per eligible action as vectors over all actions (n, width), 0 where not eligible."""
    column = frame[named["propensities"]]
    _reject_missing("propensities", column)
    owner, member, _ = _members(frame[named["eligible"]], labels, width)
    lists = _lists("propensities", column, pl.Float64)
    lengths, sizes = lists.list.len().to_numpy(), np.bincount(owner, minlength=len(column))
    if not np.array_equal(lengths, sizes):
        row = int(np.argmax(lengths != sizes))
        raise DataError(
            "propensities", f"{lengths[row]} entries", f"{sizes[row]}, one per eligible action", "Write both in one order.", row=row
        )
    vectors = np.zeros((len(column), width))
    vectors[owner, member] = lists.explode(empty_as_null=False).cast(pl.Float64).to_numpy()
    return vectors


def _lists(name: str, column: pl.Series, inner: Any) -> pl.Series:
    if isinstance(column.dtype, pl.Array):
        return column.arr.to_list()
    if isinstance(column.dtype, pl.List):
        return column
    if column.dtype != pl.String:
        raise DataError(name, f"{column.dtype} values", "a list per row (in CSV: text such as [0.5, 0.5])", "Write lists.")
    parsed = []
    for row, text in enumerate(column.to_list()):
        try:
            parsed.append(list(json.loads(text)))
        except (ValueError, TypeError):
            raise DataError(name, f"{text!r}", "a JSON list such as [0.5, 0.5]", "Write lists, or use Parquet.", row=row) from None
    try:
        return pl.Series(name, parsed, dtype=pl.List(inner), strict=True)
    except (TypeError, pl.exceptions.PolarsError):
        row = next((r for r, items in enumerate(parsed) if not all(_is_entry(item, inner) for item in items)), 0)
        expected = f"a list of {'texts' if inner == pl.String else 'numbers'}"
        raise DataError(name, f"{column[row]}", expected, "Write plain lists.", row=row) from None


def _is_entry(item: Any, inner: Any) -> bool:
    return isinstance(item, str) if inner == pl.String else isinstance(item, int | float) and not isinstance(item, bool)


def _reject_nested(name: str, column: pl.Series) -> None:
    if column.dtype.is_nested():
        raise DataError(name, f"{column.dtype} values", "one number or text per row", "Unnest the column, or map another one.")


def _starts_a_list(column: pl.Series) -> bool:
    first = column.drop_nulls()
    return len(first) > 0 and str(first[0]).lstrip().startswith("[")


def _reject_missing(name: str, column: pl.Series) -> None:
    if column.null_count():
        row = int(column.is_null().arg_max() or 0)
        remedies = {
            "propensity": "Log the propensity of the action that was really served, drop the row or estimate it; never fill in 1.",
            "reward": "Drop rows whose reward is not known yet; unknown is not 0.",
        }
        raise DataError(name, "a missing value", "a value in every row", remedies.get(name, "Fill or drop it first."), row=row)
