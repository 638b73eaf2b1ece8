"""Data frames to validated arrays: columns are named, checked and converted here, and nowhere else."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import polars as pl

from ope.data import LARGEST, BoolArray, DataError, FloatArray, IntArray, LoggedData

MAX_ACTIONS = 1_000_000
"""An index beyond this is an identifier."""

METADATA = b"propel"
"""Key of a Parquet file's own remarks on its columns: a JSON object of `ColumnMap` fields and `propensity_estimated`."""

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

    def width(self, k: int | None = None) -> int:
        """Number of actions: of vectors, sets or labels where there are any, else `k` or the highest index plus one."""
        for array in (self.data.propensities, self.data.eligible):
            if array is not None:
                return int(array.shape[1])
        return max(k or 0, len(self.labels or ()), int(self.data.action.max()) + 1)


def to_log(frame: pl.DataFrame, columns: ColumnMap, source: str, *, k: int | None = None) -> Log:
    """Validate a frame's columns into a log. Integer actions are indices; text actions are numbered in sorted order.

    Raises DataError naming the file, its column, the first offending row, what was expected and what to do.
    """
    named = columns.named()
    require_columns(frame.columns, [*named.values(), *columns.context], source)
    if frame.height == 0:
        raise DataError("", "an empty log", "at least one row", "Check the filter or the date that wrote it.", source=source)
    _reject_leaks(columns, source)
    try:
        action, labels = action_indices(frame[columns.action], columns.labels)
        ordered = labels is None or bool(columns.labels)
        if k is not None and k <= int(action.max()):
            row = int(np.argmax(action >= k))
            raise DataError("action", f"action {int(action[row])}", f"an index below --actions {k}", "Raise --actions.", row=row)
        arrays: dict[str, Any] = {"action": action}
        for name in ("reward", "propensity", "sample_weight"):
            if name in named:
                arrays[name] = numbers(name, frame[named[name]])
        if "eligible" in named:
            least = max(k or 0, len(columns.labels), int(action.max()) + 1)
            arrays["eligible"] = eligible_sets(frame[named["eligible"]], labels, least)
            if columns.by_eligible and "propensities" in named:
                arrays["propensities"] = _scattered(frame, named, labels, arrays["eligible"].shape[1])
        if "propensities" in named and "propensities" not in arrays:
            arrays["propensities"] = action_vectors("propensities", frame[named["propensities"]], labels, ordered)
        if "cluster" in named:
            _reject_missing("cluster", frame[named["cluster"]])
            _reject_nested("cluster", frame[named["cluster"]])
            arrays["cluster"] = frame[named["cluster"]].to_numpy()
        if columns.context:
            arrays["context"] = design_matrix(frame, columns.context)
        return Log(LoggedData(**arrays, propensity_estimated=columns.propensity_estimated), frame, source, labels, ordered)
    except DataError as error:
        raise error.located(source, named) from None


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


def design_matrix(frame: pl.DataFrame, names: Sequence[str]) -> FloatArray:
    """Columns as features (n, d): numbers as they are, text, booleans and categories one column per level."""
    blocks: list[FloatArray] = []
    for name in names:
        column = frame[name]
        if column.dtype.is_numeric():
            values = numbers(name, column)
            if not (np.abs(values) < LARGEST).all():
                row = int(np.argmin(np.abs(values) < LARGEST))
                raise DataError(
                    name,
                    f"{values[row]}",
                    f"a finite number below {LARGEST:g} in size",
                    "Fill or drop it before evaluating.",
                    row=row,
                )
            blocks.append(values[:, None])
            continue
        _reject_nested(name, column)
        _reject_stray_text(name, column)
        levels = column.cast(pl.String).fill_null("(missing)")
        known = levels.unique().sort()
        if len(known) > MAX_LEVELS:
            raise DataError(
                name, f"{len(known):,} different texts", f"at most {MAX_LEVELS:,}", "Leave identifiers out of the context."
            )
        blocks.append((levels.to_numpy()[:, None] == known.to_numpy()[None, :]).astype(np.float64))
    return np.concatenate(blocks, axis=1)


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


def _reject_stray_text(name: str, column: pl.Series) -> None:
    """Raise DataError where a text column is one of numbers but for a few cells: a typo must not turn it into categories."""
    if column.dtype != pl.String:
        return
    stray = column.is_not_null() & column.cast(pl.Float64, strict=False).is_null()
    if 0 < int(stray.sum()) < len(column) / 2:
        row = int(stray.arg_max() or 0)
        raise DataError(name, f"{column[row]!r} among numbers", "numbers, or texts", "Clean the cell, or leave it empty.", row=row)


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
