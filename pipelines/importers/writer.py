"""Decisions from any source to Parquet files: one set of checks, one layout, nothing visible before all of it is there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bandits.events import SCHEMA_VERSION, digest
from bandits.sampling import TOTAL, quantise_rows
from ope.data import LARGEST, BoolArray, InputError
from pipelines.frame import METADATA
from pipelines.importers.events import ENCODER, ImportReport, Naming, Outcome, Problem, Row

BATCH = 5_000
"""Decisions that are checked and written together."""

SUM_TOLERANCE = 1e-5
"""How far from one the probabilities of a decision may sum: float32 printed with six digits passes, a forgotten action does not."""

CONTEXT_SAMPLE, MAX_CONTEXT_COLUMNS = 1000, 50
"""Context columns are those of the first decisions, and no more than anyone would read."""

FOREIGN_EPOCH = -1
"""Seed epoch of decisions that were drawn elsewhere: they do not replay."""

Names: TypeAlias = tuple[str, ...]
"""Of nested objects, outermost first."""

TEXT = pa.string()
NAMED = pa.dictionary(pa.int32(), TEXT)
DECISIONS = pa.schema(
    {
        "schema_version": pa.int16(),
        "tenant": NAMED,
        "decision_point": NAMED,
        "decision_id": TEXT,
        "decided_at_ns": pa.int64(),
        "unit": TEXT,
        "session": TEXT,
        "parent": TEXT,
        "policy": NAMED,
        "experiment": NAMED,
        "arm": NAMED,
        "seed_epoch": pa.int64(),
        "kind": NAMED,
        "actions": pa.list_(TEXT),
        "excluded": pa.list_(pa.struct({"action": TEXT, "reason": TEXT})),
        "shares": pa.binary(),
        "propensity": pa.float64(),
        "chosen": pa.int32(),
        "pass_probability": pa.float64(),
        "body": pa.binary(),
        "body_hash": pa.binary(16),
        "request_hash": pa.binary(16),
    }
)
"""Columns of decisions.parquet: the fields of `bandits.events.Decision`."""

REWARDS = pa.schema(
    {
        "schema_version": pa.int16(),
        "tenant": NAMED,
        "decision_id": TEXT,
        "name": NAMED,
        "event_id": TEXT,
        "observed_at_ns": pa.int64(),
        "received_at_ns": pa.int64(),
        "value": pa.float64(),
    }
)
"""Columns of rewards.parquet: the fields of `bandits.events.Reward`."""


class EventWriter:
    """Checks rows and writes decisions.parquet, rewards.parquet, log.parquet and report.json into a folder that must be new.

    A context manager: the folder appears, whole, when the block ends well, and not at all when it does not.
    Raises InputError where the folder exists and is not empty.
    """

    def __init__(self, folder: Path, naming: Naming, report: ImportReport, *, estimated: bool = False):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"found {folder} already there, and not empty; expected a new folder: name another one")
        self.folder, self.part = folder, folder.with_name(folder.name + ".part")
        self.naming, self.report, self.estimated = naming, report, estimated
        self._pending: list[Row] = []
        self._outcomes: list[tuple[str, str, int, float]] = []
        self._seen: set[int] = set()
        self._observed: list[str] = []
        self._labels: dict[str, None] = {}
        self._columns: dict[Names, bool] | None = None
        self._lacks = dict.fromkeys(("vectors", "units", "times"), 0)
        self._misfits, self._sessions = 0, False

    def __enter__(self) -> EventWriter:
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        self._decisions = _parquet(self.part / "decisions.parquet", DECISIONS)
        self._rewards = _parquet(self.part / "rewards.parquet", REWARDS)
        self._log: pq.ParquetWriter | None = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
            self._summarise()
        self._decisions.close()
        self._rewards.close()
        if self._log is not None:
            self._log.add_key_value_metadata({METADATA: json.dumps(self._log_columns())})
            self._log.close()
        if kind is not None or not self.report.decisions + self.report.observations:
            shutil.rmtree(self.part)
            return
        self.report.files = sorted([*(path.name for path in self.part.iterdir()), "report.json"])
        (self.part / "report.json").write_text(json.dumps(self.report.to_record(), indent=2) + "\n")
        for path in (*self.part.iterdir(), self.part):
            _sync(path)
        if self.folder.exists():
            self.folder.rmdir()
        self.part.rename(self.folder)
        _sync(self.folder.absolute().parent)

    def add(self, item: Row | Outcome | Problem) -> None:
        """Take what a line of the source held."""
        if isinstance(item, Row):
            self._pending.append(item)
            if len(self._pending) >= BATCH:
                self._flush()
        elif isinstance(item, Problem):
            self.report.add_problem(item)
        else:
            self._outcomes.append((item.decision_id, f"line {item.line}", item.observed_at_ns or 0, item.value))
            self._observed.append(item.decision_id)
            self.report.observations += 1

    def _flush(self) -> None:
        rows, shares, propensities = self._checked(self._pending)
        self._pending = []
        if rows:
            self._write_decisions(rows, shares, propensities)
        outcomes = [(row.decision_id, "", row.decided_at_ns or 0, row.reward) for row in rows if row.reward is not None]
        self._write_rewards([*outcomes, *self._outcomes])
        self._outcomes = []

    def _checked(self, rows: Sequence[Row]) -> tuple[list[Row], list[bytes], list[float]]:
        """Rows that can be decisions, their shares, and the propensity of each: that of its share where there is one."""
        good = []
        for row in rows:
            fault = self._fault(row)
            if fault is None:
                good.append(row)
            else:
                self.report.add_problem(Problem(row.line, *fault))
        shares, propensities = [b""] * len(good), [row.propensity for row in good]
        by_width: dict[int, list[int]] = {}
        for place, row in enumerate(good):
            if row.vector is not None:
                by_width.setdefault(len(row.vector), []).append(place)
        bad: set[int] = set()
        for places in by_width.values():
            bad |= self._quantised(good, places, shares, propensities)
        kept = [place for place in range(len(good)) if place not in bad and self._is_new(good[place])]
        if len(kept) == len(good):
            return good, shares, propensities
        return [good[place] for place in kept], [shares[place] for place in kept], [propensities[place] for place in kept]

    def _is_new(self, row: Row) -> bool:
        key = hash(row.decision_id)
        if key in self._seen:
            self.report.add_problem(
                Problem(row.line, "duplicate", f"found decision {row.decision_id!r} again; the first one is kept")
            )
            return False
        self._seen.add(key)
        return True

    def _fault(self, row: Row) -> tuple[str, str] | None:
        """Kind and message of what is wrong with a row by itself."""
        for text in (row.decision_id, row.unit, row.session, row.policy):
            if text is not None and not (0 < len(text) <= 128 and text.isprintable()):
                return "id", f"found {text!r:.140}; expected 1 to 128 printable characters"
        for action in row.actions:
            if action not in self._labels:
                if not (0 < len(action) <= 128 and action.isprintable()):
                    return "id", f"found action {action!r:.140}; expected 1 to 128 printable characters"
                self._labels[action] = None
        if len(set(row.actions)) != len(row.actions):
            return "action", "found an action twice; expected distinct ones"
        if not 0 <= row.chosen < len(row.actions):
            return "action", f"found action number {row.chosen} of {len(row.actions)}; expected one of the set"
        if not 0 < row.propensity <= 1 + SUM_TOLERANCE:
            return "propensity", f"found propensity {row.propensity} of the action taken; expected a number in (0, 1]"
        if not 0 < row.pass_probability <= 1:
            return "pdrop", f"found probability {row.pass_probability} of being kept; expected a number in (0, 1]"
        if row.reward is not None and not abs(row.reward) < LARGEST:
            return "reward", f"found reward {row.reward}; expected a finite number below {LARGEST:g} in size"
        return None

    def _quantised(self, rows: list[Row], places: list[int], shares: list[bytes], propensities: list[float]) -> set[int]:
        """Fill in shares and propensities of rows whose vectors are equally long; the places of those that are no distributions."""
        vectors = np.array([rows[place].vector for place in places], dtype=np.float64)
        with np.errstate(invalid="ignore"):
            total = vectors.sum(axis=1)
            good: BoolArray = (vectors >= 0).all(axis=1) & (np.abs(total - 1) <= SUM_TOLERANCE)
        for index in np.flatnonzero(~good).tolist():
            found = f"found probabilities {_shown(rows[places[index]].vector or ())}, which sum to {total[index]:.6g}"
            self.report.add_problem(
                Problem(rows[places[index]].line, "probabilities", f"{found}; expected none negative, and a sum of one")
            )
        bad = {places[index] for index in np.flatnonzero(~good).tolist()}
        sound = [place for place in places if place not in bad]
        if not sound:
            return bad
        vectors, total = vectors[good], total[good]
        integers = quantise_rows(vectors / total[:, None], np.ones(vectors.shape, dtype=np.bool_), explore=False)
        taken = integers[np.arange(len(sound)), [rows[place].chosen for place in sound]] / TOTAL
        self.report.largest_change = max(self.report.largest_change, float(np.abs(integers / TOTAL - vectors).max()))
        stated = np.array([propensities[place] for place in sound])
        agrees = (np.abs(taken - stated) <= SUM_TOLERANCE * stated + 1 / TOTAL) & (taken > 0)
        packed, width = integers.astype("<u4").tobytes(), 4 * integers.shape[1]
        for order, (place, propensity, agreed) in enumerate(zip(sound, taken.tolist(), agrees.tolist(), strict=True)):
            if not agreed:
                message = f"found propensity {propensities[place]:.6g} of the action taken beside {propensity:.6g} in the vector"
                self.report.add_problem(
                    Problem(rows[place].line, "propensity", f"{message}; expected the same number, above 2^-31")
                )
                bad.add(place)
            propensities[place] = propensity
            shares[place] = packed[order * width : (order + 1) * width]
        return bad

    def _write_decisions(self, rows: Sequence[Row], shares: Sequence[bytes], propensities: Sequence[float]) -> None:
        naming, n, encode = self.naming, len(rows), ENCODER.encode
        middle = b',"decision_point":' + encode(naming.decision_point) + b',"parent":null,"session":'
        units = [row.unit or row.session or row.decision_id for row in rows]
        columns: dict[str, Any] = {
            "schema_version": pa.repeat(SCHEMA_VERSION, n).cast(pa.int16()),
            "tenant": _constant(naming.tenant, n),
            "decision_point": _constant(naming.decision_point, n),
            "decision_id": [row.decision_id for row in rows],
            "decided_at_ns": [row.decided_at_ns or 0 for row in rows],
            "unit": units,
            "session": [row.session for row in rows],
            "parent": pa.nulls(n, TEXT),
            "policy": pa.array([row.policy for row in rows]).dictionary_encode(),
            "experiment": pa.nulls(n, NAMED),
            "arm": pa.nulls(n, NAMED),
            "seed_epoch": pa.repeat(FOREIGN_EPOCH, n).cast(pa.int64()),
            "kind": pa.array([row.kind for row in rows]).dictionary_encode(),
            "actions": [row.actions for row in rows],
            "excluded": [[{"action": action, "reason": reason} for action, reason in row.excluded] for row in rows],
            "shares": shares,
            "propensity": propensities,
            "chosen": [row.chosen for row in rows],
            "pass_probability": [row.pass_probability for row in rows],
            "body": [row.body for row in rows],
            "body_hash": [digest(row.body) for row in rows],
            "request_hash": [
                digest(row.body[:-1] + middle + encode(row.session) + b',"unit":' + encode(unit) + b"}")
                for row, unit in zip(rows, units, strict=True)
            ],
        }
        table = _table(columns, DECISIONS)
        self._decisions.write_table(table)
        self.report.decisions += n
        self.report.kinds.update(row.kind for row in rows)
        self._lacks["vectors"] += sum(row.vector is None for row in rows)
        self._lacks["units"] += sum(row.unit is None for row in rows)
        self._sessions = self._sessions or any(row.session is not None for row in rows)
        self._lacks["times"] += sum(row.decided_at_ns is None for row in rows)
        learnable = [row.kind == "sampled" and row.reward is not None for row in rows]
        if any(learnable):
            self._write_log([row for row, kept in zip(rows, learnable, strict=True) if kept], table.filter(pa.array(learnable)))

    def _write_rewards(self, outcomes: Sequence[tuple[str, str, int, float]]) -> None:
        n = len(outcomes)
        if not n:
            return
        times = [time for _, _, time, _ in outcomes]
        columns = {
            "schema_version": pa.repeat(SCHEMA_VERSION, n).cast(pa.int16()),
            "tenant": _constant(self.naming.tenant, n),
            "decision_id": [id_ for id_, _, _, _ in outcomes],
            "name": _constant(self.naming.reward, n),
            "event_id": [event for _, event, _, _ in outcomes],
            "observed_at_ns": times,
            "received_at_ns": times,
            "value": [value for _, _, _, value in outcomes],
        }
        self._rewards.write_table(_table(columns, REWARDS))
        self.report.rewards += n

    def _write_log(self, rows: Sequence[Row], decisions: pa.Table) -> None:
        """One row per decision of a kind that may be learned from, and whose reward is known."""
        if self._columns is None:
            self._columns = self._chosen_columns(rows)
        columns: dict[str, Any] = {
            "decision_id": decisions["decision_id"],
            "decided_at": pa.array([row.decided_at_ns for row in rows], pa.timestamp("ns", "UTC")),
            "unit": decisions["unit"],
            "policy": decisions["policy"],
            "action": pa.array([row.actions[row.chosen] for row in rows]),
            "eligible": decisions["actions"],
            "reward": pa.array([row.reward for row in rows], pa.float64()),
            "propensity": decisions["propensity"],
            "propensities": _vectors(decisions["shares"]),
            "sample_weight": pa.array([1 / row.pass_probability for row in rows], pa.float64()),
        }
        values: dict[Names, list[Any]] = {(): [row.context for row in rows]}
        for path, number in self._columns.items():
            name = ".".join(path)
            columns[f"context.{name}" if name in columns else name] = self._context_column(at(path, values), number)
        table = pa.table(columns)
        if self._log is None:
            self._log = _parquet(self.part / "log.parquet", table.schema)
        self._log.write_table(table)
        self.report.rows += len(rows)

    def _chosen_columns(self, rows: Sequence[Row]) -> dict[Names, bool]:
        """Path of each context column, and whether it holds numbers."""
        if self.naming.context is not None:
            paths = [tuple(name.split(".")) for name in self.naming.context]
        else:
            found = dict.fromkeys(path for row in rows[:CONTEXT_SAMPLE] for path, _ in scalars(row.context))
            paths = list(found)[:MAX_CONTEXT_COLUMNS]
            if len(found) > len(paths):
                self.report.notes.append(f"{len(found) - len(paths)} further context keys are in the events, not in log.parquet.")
        self.report.context = [".".join(path) for path in paths]
        values: dict[Names, list[Any]] = {(): [row.context for row in rows]}
        return {path: all(value is None or _number(value) for value in at(path, values)) for path in paths}

    def _context_column(self, values: Sequence[Any], number: bool) -> pa.Array:
        if not number:
            return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values], TEXT)
        fitting = [value if _number(value) else None for value in values]
        self._misfits += sum(value is not None and kept is None for value, kept in zip(values, fitting, strict=True))
        return pa.array(fitting, pa.float64())

    def _log_columns(self) -> dict[str, Any]:
        """What `propel ope` reads from the file itself: labels, and which column is what."""
        known: dict[str, Any] = {"labels": list(self._labels), "eligible": "eligible", "sample_weight": "sample_weight"}
        if not self._lacks["vectors"]:
            known |= {"propensities": "propensities", "by_eligible": True}
        if self._sessions or not self._lacks["units"]:
            known["cluster"] = "unit"
        if self.estimated:
            known["propensity_estimated"] = True
        return known

    def _summarise(self) -> None:
        report, total = self.report, self.report.decisions
        report.actions = len(self._labels)
        report.late = sum(hash(id_) in self._seen for id_ in self._observed)
        says = {
            "vectors": "whole vectors of probabilities: only that of the action taken is known",
            "units": "units: each event stands for itself, so intervals are too narrow where users come back",
            "times": "times: events carry 0 nanoseconds",
        }
        for name, count in self._lacks.items():
            if count and total:
                report.missing[name] = f"{'All' if count == total else f'{count:,} of {total:,}'} decisions lack {says[name]}."
        if self._misfits:
            report.notes.append(
                f"{self._misfits:,} context values were no numbers in a column of numbers: left empty in log.parquet."
            )


def scalars(value: Any, path: Names = ()) -> Iterator[tuple[Names, Any]]:
    """(path, value) of every number, text and boolean of a context. Objects in lists lie at the list's own path.

    Names that begin with an underscore are remarks, not features, as in VW.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            if not name.startswith("_"):
                yield from scalars(item, (*path, name))
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                yield from scalars(item, path)
    elif value is not None:
        yield path, value


def at(path: Names, known: dict[Names, list[Any]]) -> list[Any]:
    """What lies at a path of `scalars` in each of many values. `known`: those of shorter paths, at least (); filled as needed."""
    if path not in known:
        name = path[-1]
        known[path] = [
            value.get(name) if value.__class__ is dict else _in_list(value, name) if value.__class__ is list else None
            for value in at(path[:-1], known)
        ]
    return known[path]


def _in_list(values: Sequence[Any], name: str) -> Any:
    for value in values:
        if value.__class__ is dict and name in value:
            return value[name]
    return None


def _number(value: Any) -> bool:
    return value.__class__ is float or value.__class__ is int


def _shown(vector: Sequence[float]) -> str:
    return f"[{', '.join(f'{p:g}' for p in vector[:8])}{', ...' if len(vector) > 8 else ''}]"


def _vectors(shares: pa.ChunkedArray) -> pa.Array:
    """Probabilities of each row's shares; null where they are unknown."""
    column = shares.combine_chunks()
    _, ends, data = column.buffers()
    offsets = np.frombuffer(ends, dtype=np.int32)[column.offset : column.offset + len(column) + 1] // 4
    flat = np.frombuffer(data or b"", dtype="<u4")[: offsets[-1]] / TOTAL
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=pa.array(np.diff(offsets) == 0))


def _parquet(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer; what hardly ever repeats is not looked up in dictionaries."""
    unique = ("decision_id", "body", "body_hash", "request_hash", "shares")
    repeated = [name for name in schema.names if name not in unique]
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=repeated, write_statistics=repeated)


def _constant(text: str, n: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.repeat(0, n).cast(pa.int32()), pa.array([text]))


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    arrays = [
        columns[name].cast(kind) if isinstance(columns[name], pa.Array) else pa.array(columns[name], kind)
        for name, kind in zip(schema.names, schema.types, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
