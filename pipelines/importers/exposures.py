"""Exposure tables, as feature-flag and experiment tools write them: one row per exposure, with a map of their columns."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from bandits.events import digest
from ope.data import InputError
from pipelines.frame import require_columns
from pipelines.importers.events import FaultError, Problem, Row, body_of, in_range, is_id, nanoseconds

NOTHING = b"{}"
"""Features of an action without any."""


@dataclass(frozen=True)
class Exposures:
    """Which column of a table holds what. None: the table does not have it."""

    action: str = "action"
    """The variation that was served."""
    reward: str | None = None
    propensity: str | None = None
    """Probability of the action served."""
    split: Mapping[str, float] = field(default_factory=dict)
    """Action -> probability, where every row was drawn with the same ones: the tool's traffic split."""
    actions: tuple[str, ...] = ()
    """All actions there are. Default: those of the split, else those that the table shows."""
    decision_id: str | None = None
    unit: str | None = None
    time: str | None = None
    policy: str | None = None
    pass_probability: str | None = None
    context: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.split) == (self.propensity is not None):
            found = "both a split and a column of propensities" if self.split else "no propensities"
            raise InputError(
                f"found {found}; expected either the column that holds them (--propensity), or the split that the tool "
                "drew with (--split control=0.5,treatment=0.5). Where neither is known, `propel propensities` estimates them: "
                "they are never filled in"
            )
        if self.split and (min(self.split.values()) <= 0 or abs(sum(self.split.values()) - 1) > 1e-6):
            percent = abs(sum(self.split.values()) - 100) < 1e-6
            hint = ": divide the percentages by 100" if percent else ""
            raise InputError(f"found a split of {dict(self.split)}; expected positive shares that sum to 1{hint}")

    def named(self) -> list[str]:
        """The columns that are needed."""
        single = (
            self.action,
            self.reward,
            self.propensity,
            self.decision_id,
            self.unit,
            self.time,
            self.policy,
            self.pass_probability,
        )
        return [name for name in (*single, *self.context) if name is not None]


def read_exposures(path: Path, columns: Exposures) -> Iterator[Row | Problem]:
    """Decisions and problems of a CSV (gzip or not) or Parquet table, row by row.

    Raises InputError, before the first row, where a column is missing or the file cannot be read.
    """
    actions = tuple(columns.actions or columns.split or distinct(path, columns.action))
    for line, record in records(path, columns.named()):
        try:
            yield _row(line, cells(record), columns, actions, path.name)
        except FaultError as fault:
            yield Problem(line, fault.kind, str(fault))
        except InputError as error:
            yield Problem(line, "json", str(error))


def records(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | FaultError]]:
    """(line, column -> value, or what is wrong with it) of the rows of a table.

    Lines of CSV are those of the file, rows of Parquet count from 1. An empty field of CSV is None. What follows a place where a
    file ends or breaks is one fault.
    Raises DataError where a wanted column is missing, InputError where nothing can be read.
    """
    if path.suffix.lower() == ".parquet":
        yield from _parquet_records(path, wanted)
        return
    there = header(path)
    require_columns(there, wanted, str(path))
    places = [(name, there.index(name)) for name in dict.fromkeys(wanted)]
    with _text_of(path) as text:
        reader = csv.reader(text, strict=True)
        next(reader)
        while True:
            start = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield start, FaultError("csv", f"found {error}; expected a row of a CSV table")
            except (EOFError, zlib.error, OSError) as error:
                yield start, FaultError("truncated", f"found a file that ends or breaks here ({error})")
                return
            else:
                if len(fields) == len(there):
                    yield start, {name: fields[place] or None for name, place in places}
                elif fields:
                    yield start, FaultError("csv", f"found {len(fields)} fields; expected {len(there)}, as in the header")


def cells(record: dict[str, Any] | FaultError) -> dict[str, Any]:
    """Cells of a row of `records`. Raises FaultError where it has none."""
    if isinstance(record, FaultError):
        raise record
    return record


def _text_of(path: Path) -> TextIO:
    """A CSV file as text. Bytes that are no UTF-8 become what no id or feature can hold: only rows with them are lost."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _parquet_records(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(path)
        require_columns(file.schema_arrow.names, wanted, str(path))
        line = 0
        for batch in file.iter_batches(columns=list(dict.fromkeys(wanted))):
            for record in _readable(batch).to_pylist():
                line += 1
                yield line, record
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: found {str(error).splitlines()[0]}; expected a complete Parquet file") from None


def _readable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Times to the microsecond: Python's own have no nanoseconds."""
    kinds = [
        field.with_type(pa.timestamp("us", field.type.tz)) if pa.types.is_timestamp(field.type) else field for field in batch.schema
    ]
    return batch.cast(pa.schema(kinds), safe=False)


def header(path: Path) -> list[str]:
    """Names of a CSV table's columns. Raises InputError where it has no first line that can be read."""
    try:
        with _text_of(path) as text:
            return next(csv.reader(text, strict=True), [])
    except (csv.Error, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: found no header ({error}); expected a CSV table, gzip where the name ends in .gz") from None


def distinct(path: Path, column: str) -> list[str]:
    """Texts of a column that can name an action, sorted."""
    rows = (record for _, record in records(path, [column]) if isinstance(record, dict))
    return sorted(filter(is_id, {str(record[column]) for record in rows if record[column] is not None}))


def _row(line: int, record: Mapping[str, Any], columns: Exposures, actions: tuple[str, ...], source: str) -> Row:
    def of(name: str | None) -> Any:
        return None if name is None else record[name]

    taken = of(columns.action)
    if taken is None or str(taken) not in actions:
        raise FaultError("action", f"found action {taken!r:.140}; expected one of {', '.join(actions[:12])}")
    chosen = actions.index(str(taken))
    propensity = columns.split[str(taken)] if columns.split else number(columns.propensity or "", of(columns.propensity))
    if propensity is None:
        raise FaultError("propensity", f"found no propensity in column {columns.propensity!r}; expected one: it is never filled in")
    context = {name: value(record[name]) for name in columns.context}
    kept = number("pass_probability", of(columns.pass_probability))
    unit, policy, known_id = of(columns.unit), of(columns.policy), of(columns.decision_id)
    return Row(
        line=line,
        decision_id=digest(f"{source}:{line}".encode()).hex() if known_id is None else str(known_id),
        decided_at_ns=time_of(of(columns.time)),
        unit=None if unit is None else str(unit),
        session=None,
        policy="unknown" if policy is None else str(policy),
        actions=actions,
        chosen=chosen,
        propensity=propensity,
        vector=[columns.split[action] for action in actions] if columns.split else None,
        context=context,
        body=body_of(context, [NOTHING] * len(actions)),
        reward=number(columns.reward or "", of(columns.reward)),
        pass_probability=1.0 if kept is None else kept,
    )


TRUTHS = {"true": 1.0, "false": 0.0}
"""How tools write outcomes that happened or not."""

UNITS_PER_SECOND = ((10**17, 10**9), (10**14, 10**6), (10**11, 10**3), (0, 1))
"""Numbers at least as large as the first are times in these parts of a second: 10^11 seconds would be the year 5138."""


def number(name: str, found: Any) -> float | None:
    """A number of a table, None where the cell is empty. Raises FaultError for what is none."""
    if found is None:
        return None
    if isinstance(found, str) and found.lower() in TRUTHS:
        return TRUTHS[found.lower()]
    try:
        return float(found)
    except (TypeError, ValueError):
        raise FaultError("number", f"column {name!r}: found {found!r:.80}; expected a number") from None


def value(found: Any) -> Any:
    """A feature of a table: numbers in CSV are texts."""
    if isinstance(found, str):
        try:
            as_number = float(found)
        except ValueError:
            return found
        return as_number if abs(as_number) < float("inf") else found
    if isinstance(found, Decimal):
        return float(found)
    return str(found) if isinstance(found, date) else found


def time_of(found: Any) -> int | None:
    """Nanoseconds since 1970 of ISO 8601 text, a date, a timestamp, or a number since 1970: of seconds, or of milli-, micro- or
    nanoseconds, which their size tells. Raises FaultError for others."""
    if found is None:
        return None
    if isinstance(found, date):
        return nanoseconds(found.isoformat())
    if isinstance(found, str | int | float | Decimal):
        try:
            time = Decimal(str(found))
            per_second = next(parts for least, parts in UNITS_PER_SECOND if abs(time) >= least)
            return in_range(round(time * 10**9 / per_second), found)
        except InvalidOperation:
            return nanoseconds(str(found))
        except (ValueError, ArithmeticError):  # nan, infinity
            pass
    raise FaultError("time", f"found time {found!r:.80}; expected ISO 8601 text, a timestamp or seconds since 1970")
