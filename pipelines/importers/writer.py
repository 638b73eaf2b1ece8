"""Decisions from any source to Parquet files: one set of checks, one layout, nothing visible before all of it is there."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bandits.durable import sync
from bandits.events import SCHEMA_VERSION, digest
from bandits.sampling import TOTAL
from ope.data import LARGEST, BoolArray, InputError
from pipelines.frame import METADATA
from pipelines.importers.events import ENCODER, ImportReport, Naming, Outcome, Problem, Row, canonical_json, is_id
from pipelines.importers.layout import (
    DECISIONS,
    NAMED,
    REWARDS,
    TEXT,
    constant,
    nearest_shares,
    parquet_writer,
    table_of,
    vectors_of,
)
from pipelines.importers.paths import Names, at, scalars

BATCH, BATCH_BYTES = 5_000, 2**26
"""Decisions, and bytes of their bodies, that are checked and written together."""

SUM_TOLERANCE = 1e-5
"""How far from one the probabilities of a decision may sum: float32 printed with six digits passes, a forgotten action does not."""

CONTEXT_SAMPLE, MAX_CONTEXT_COLUMNS = 1000, 50
"""Context columns are those of the first decisions, and no more than anyone would read."""

FOREIGN_EPOCH = -1
"""Seed epoch of decisions that were drawn elsewhere: they do not replay."""

ID, REWARD = "1 to 128 printable characters", f"a finite number below {LARGEST:g} in size"
"""What is expected of texts that name something, and of rewards."""


class EventWriter:
    """Checks rows and writes decisions.parquet, rewards.parquet, log.parquet and report.json into a folder that must be new.

    A context manager: the folder appears, whole, when the block ends well, and not at all when it does not.
    Raises InputError where the folder exists and is not empty.
    """

    def __init__(self, folder: Path, naming: Naming, report: ImportReport, *, estimated: bool = False):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"found {folder} already there, and not empty; expected a new folder: name another one")
        self.folder = folder.resolve()
        self.naming, self.report, self.estimated = naming, report, estimated
        self._pending: list[Row] = []
        self._bytes = 0
        self._problems: list[Problem] = []
        self._outcomes: list[tuple[str, str, int, float]] = []
        self._seen: set[int] = set()
        self._observed: list[str] = []
        self._actions: set[str] = set()
        self._labels: dict[str, None] = {}
        self._columns: dict[Names, tuple[str, bool]] | None = None
        self._lacks = dict.fromkeys(("vectors", "rewards", "units", "times"), 0)
        self._misfits, self._deferred, self._sessions = 0, 0, False
        self._gaps: dict[str, int] = {}

    def __enter__(self) -> EventWriter:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.part = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent))
        self._decisions = parquet_writer(self.part / "decisions.parquet", DECISIONS)
        self._rewards = parquet_writer(self.part / "rewards.parquet", REWARDS)
        self._log: pq.ParquetWriter | None = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
                self._summarise()
            self._decisions.close()
            self._rewards.close()
            if self._log is not None:
                self._log.add_key_value_metadata({METADATA: json.dumps(self._log_columns())})
                self._log.close()
            if kind is None and self.report.decisions + self.report.observations:
                self._publish()
        finally:
            shutil.rmtree(self.part, ignore_errors=True)

    def _publish(self) -> None:
        """Give the finished folder its name."""
        self.report.files = sorted([*(path.name for path in self.part.iterdir()), "report.json"])
        (self.part / "report.json").write_text(json.dumps(self.report.to_record(), indent=2) + "\n")
        for path in (*self.part.iterdir(), self.part):
            sync(path)
        if self.folder.exists():
            self.folder.rmdir()
        self.part.chmod(0o755)
        self.part.rename(self.folder)
        sync(self.folder.parent)

    def add(self, item: Row | Outcome | Problem) -> None:
        """Take what a line of the source held."""
        if isinstance(item, Row):
            self._pending.append(item)
            self._bytes += len(item.body)
            if len(self._pending) >= BATCH or self._bytes >= BATCH_BYTES:
                self._flush()
            return
        if isinstance(item, Problem):
            self._problems.append(item)
        elif not is_id(item.decision_id):
            self._problems.append(Problem(item.line, "id", f"found {item.decision_id!r:.140}; expected {ID}"))
        elif not abs(item.value) < LARGEST:
            self._problems.append(Problem(item.line, "reward", f"found reward {item.value}; expected {REWARD}"))
        else:
            self._outcomes.append((item.decision_id, f"line {item.line}", item.observed_at_ns or 0, item.value))
            self._observed.append(item.decision_id)
            self.report.observations += 1
        if max(len(self._problems), len(self._outcomes)) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        rows, shares, propensities = self._checked(self._pending)
        for problem in sorted(self._problems, key=lambda problem: problem.line):
            self.report.add_problem(problem)
        self._pending, self._problems, self._bytes = [], [], 0
        if rows:
            self._write_decisions(rows, shares, propensities)
        outcomes = [(row.decision_id, "", row.decided_at_ns or 0, row.reward) for row in rows if row.reward is not None]
        self._write_rewards([*outcomes, *self._outcomes])
        self._outcomes = []

    def _checked(self, rows: Sequence[Row]) -> tuple[list[Row], list[bytes], list[float]]:
        """Rows that can be decisions, their shares, and the propensity of each: that of its share where there is one."""
        good = list(rows)
        if rows and not self._sound(rows):
            faults = [self._fault(row) for row in rows]
            good = [row for row, fault in zip(rows, faults, strict=True) if fault is None]
            self._problems += [Problem(row.line, *fault) for row, fault in zip(rows, faults, strict=True) if fault is not None]
        shares, propensities = [b""] * len(good), [min(row.propensity, 1.0) for row in good]
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
            self._problems.append(
                Problem(row.line, "duplicate", f"found {row.decision_id!r} again; expected each id once: the first is kept")
            )
            return False
        self._seen.add(key)
        return True

    def _sound(self, rows: Sequence[Row]) -> bool:
        """True if `_fault` finds nothing in any row: all checks of many rows at once, which is much faster than row by row."""
        ids = [row.decision_id for row in rows]
        more = {text for row in rows for text in (row.unit, row.session, row.policy) if text is not None}
        sets = {row.actions for row in rows}
        actions: set[str] = set().union(*sets, *([action for action, _ in row.excluded] for row in rows if row.excluded))
        numbers = np.array([(row.propensity, row.pass_probability, row.reward or 0.0) for row in rows])
        return (
            min(map(len, ids)) > 0
            and max(map(len, ids)) <= 128
            and "".join(ids).isprintable()
            and all(map(is_id, more))
            and all(map(is_id, actions - self._actions))
            and all(len(set(one)) == len(one) for one in sets)
            and all(0 <= row.chosen < len(row.actions) for row in rows)
            and bool((numbers[:, :2] > 0).all() and (numbers[:, 0] <= 1 + SUM_TOLERANCE).all() and (numbers[:, 1] <= 1).all())
            and bool((np.abs(numbers[:, 2]) < LARGEST).all())
        )

    def _fault(self, row: Row) -> tuple[str, str] | None:
        """Kind and message of what is wrong with a row by itself."""
        for text in (row.decision_id, row.unit, row.session, row.policy):
            if text is not None and not is_id(text):
                return "id", f"found {text!r:.140}; expected {ID}"
        if not (self._actions.issuperset(row.actions) and not row.excluded):
            for action in (*row.actions, *(action for action, _ in row.excluded)):
                if not is_id(action):
                    return "id", f"found action {action!r:.140}; expected {ID}"
        if len(set(row.actions)) != len(row.actions):
            return "action", "found an action twice; expected distinct ones"
        if not 0 <= row.chosen < len(row.actions):
            return "action", f"found action number {row.chosen} of {len(row.actions)}; expected one of the set"
        if not 0 < row.propensity <= 1 + SUM_TOLERANCE:
            return "propensity", f"found propensity {row.propensity} of the action taken; expected a number in (0, 1]"
        if not 0 < row.pass_probability <= 1:
            return "pdrop", f"found probability {row.pass_probability} of being kept; expected a number in (0, 1]"
        if row.reward is not None and not abs(row.reward) < LARGEST:
            return "reward", f"found reward {row.reward}; expected {REWARD}"
        return None

    def _quantised(self, rows: list[Row], places: list[int], shares: list[bytes], propensities: list[float]) -> set[int]:
        """Fill in shares and propensities of rows whose vectors are equally long; the places of those that are no distributions."""
        vectors = np.array([rows[place].vector for place in places], dtype=np.float64)
        with np.errstate(invalid="ignore"):
            total = vectors.sum(axis=1)
            good: BoolArray = (vectors >= 0).all(axis=1) & (np.abs(total - 1) <= SUM_TOLERANCE)
        for index in np.flatnonzero(~good).tolist():
            found = f"found probabilities {_shown(rows[places[index]].vector or ())}, which sum to {total[index]:.6g}"
            message = f"{found}; expected none negative, and a sum of one"
            self._problems.append(Problem(rows[places[index]].line, "probabilities", message))
        bad = {places[index] for index in np.flatnonzero(~good).tolist()}
        sound = [place for place in places if place not in bad]
        if not sound:
            return bad
        vectors, total = vectors[good], total[good]
        integers = nearest_shares(vectors / total[:, None])
        taken = integers[np.arange(len(sound)), [rows[place].chosen for place in sound]] / TOTAL
        self.report.largest_change = max(self.report.largest_change, float(np.abs(integers / TOTAL - vectors).max()))
        stated = np.array([propensities[place] for place in sound])
        agrees = (np.abs(taken - stated) <= SUM_TOLERANCE * stated + 1 / TOTAL) & (taken > 0)
        packed, width = integers.astype("<u4").tobytes(), 4 * integers.shape[1]
        for order, (place, propensity, agreed) in enumerate(zip(sound, taken.tolist(), agrees.tolist(), strict=True)):
            if not agreed:
                message = f"found propensity {propensities[place]:.6g} of the action taken beside {propensity:.6g} in the vector"
                self._problems.append(Problem(rows[place].line, "propensity", f"{message}; expected the same number, above 2^-31"))
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
            "tenant": constant(naming.tenant, n),
            "decision_point": constant(naming.decision_point, n),
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
        table = table_of(columns, DECISIONS)
        self._decisions.write_table(table)
        self.report.decisions += n
        self.report.kinds.update(row.kind for row in rows)
        self._actions.update(*{row.actions for row in rows})
        self._lacks["rewards"] += sum(row.reward is None for row in rows)
        self._lacks["vectors"] += sum(row.vector is None for row in rows)
        self._lacks["units"] += sum(row.unit is None for row in rows)
        self._sessions = self._sessions or any(row.session is not None for row in rows)
        self._lacks["times"] += sum(row.decided_at_ns is None for row in rows)
        self._deferred += sum(row.deferred for row in rows)
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
            "tenant": constant(self.naming.tenant, n),
            "decision_id": [id_ for id_, _, _, _ in outcomes],
            "name": constant(self.naming.reward, n),
            "event_id": [event for _, event, _, _ in outcomes],
            "observed_at_ns": times,
            "received_at_ns": times,
            "value": [value for _, _, _, value in outcomes],
        }
        self._rewards.write_table(table_of(columns, REWARDS))
        self.report.rewards += n

    def _write_log(self, rows: Sequence[Row], decisions: pa.Table) -> None:
        """One row per decision of a kind that may be learned from, and whose reward is known."""
        for actions in dict.fromkeys([row.actions for row in rows]):
            self._labels.update(dict.fromkeys(actions))
        columns: dict[str, Any] = {
            "decision_id": decisions["decision_id"],
            "decided_at": pa.array([row.decided_at_ns for row in rows], pa.timestamp("ns", "UTC")),
            "unit": decisions["unit"],
            "policy": decisions["policy"],
            "action": pa.array([row.actions[row.chosen] for row in rows]),
            "eligible": decisions["actions"],
            "reward": pa.array([row.reward for row in rows], pa.float64()),
            "propensity": decisions["propensity"],
            "propensities": vectors_of(decisions["shares"]),
            "sample_weight": pa.array([1 / row.pass_probability for row in rows], pa.float64()),
        }
        if self._columns is None:
            self._columns = self._chosen_columns(rows, set(columns))
        values: dict[Names, list[Any]] = {(): [row.context for row in rows]}
        for path, (name, number) in self._columns.items():
            columns[name] = self._context_column(at(path, values), number)
            self._gaps[name] = self._gaps.get(name, 0) + columns[name].null_count
        table = pa.table(columns)
        if self._log is None:
            self._log = parquet_writer(self.part / "log.parquet", table.schema)
        self._log.write_table(table)
        self.report.rows += len(rows)

    def _chosen_columns(self, rows: Sequence[Row], taken: set[str]) -> dict[Names, tuple[str, bool]]:
        """Path of each context column, its name in the log, where none of `taken` may be, and whether it holds numbers."""
        if self.naming.context is not None:
            whole = {name for row in rows for name in row.context}
            paths = [(name,) if name in whole else tuple(name.split(".")) for name in dict.fromkeys(self.naming.context)]
        else:
            found = dict.fromkeys(path for row in rows[:CONTEXT_SAMPLE] for path, _ in scalars(row.context))
            paths = list(found)[:MAX_CONTEXT_COLUMNS]
            if len(found) > len(paths):
                self.report.notes.append(f"{len(found) - len(paths)} further context keys are in the events, not in log.parquet.")
        values: dict[Names, list[Any]] = {(): [row.context for row in rows]}
        columns: dict[Names, tuple[str, bool]] = {}
        for path in paths:
            name = ".".join(path)
            while name in taken:
                name = f"context.{name}"
            taken.add(name)
            there = [value for value in at(path, values) if value is not None]
            columns[path] = name, bool(there) and all(map(_number, there))
        self.report.context = [name for name, _ in columns.values()]
        return columns

    def _context_column(self, values: Sequence[Any], number: bool) -> pa.Array:
        if not number:
            return pa.array([value if value is None or isinstance(value, str) else _text(value) for value in values], TEXT)
        fitting = [float(value) if _number(value) else None for value in values]
        self._misfits += sum(value is not None and kept is None for value, kept in zip(values, fitting, strict=True))
        return pa.array(fitting, pa.float64())

    def _log_columns(self) -> dict[str, Any]:
        """What `propel ope` reads from the file itself: labels, and which column is what."""
        known: dict[str, Any] = {"labels": list(self._labels), "eligible": "eligible", "sample_weight": "sample_weight"}
        if not self._lacks["vectors"]:
            known |= {"propensities": "propensities", "by_eligible": True}
        if self._sessions or self._lacks["units"] < self.report.decisions:
            known["cluster"] = "unit"
        if self.estimated:
            known["propensity_estimated"] = True
        return known

    def _summarise(self) -> None:
        report, total = self.report, self.report.decisions
        report.actions = len(self._actions)
        report.late = sum(hash(id_) in self._seen for id_ in self._observed)
        says = {
            "vectors": "whole vectors of probabilities: only that of the action taken is known",
            "rewards": "rewards: they are in decisions.parquet, not in log.parquet",
            "units": "units: each event stands for itself, so intervals are too narrow where users come back",
            "times": "times: events carry 0 nanoseconds",
        }
        for name, count in self._lacks.items():
            if count and total:
                report.missing[name] = f"{'All' if count == total else f'{count:,} of {total:,}'} decisions lack {says[name]}."
        numbers = {name for name, number in (self._columns or {}).values() if number}
        empty = [name for name, gaps in self._gaps.items() if gaps == report.rows]
        report.usable = [
            name
            for name in report.context
            if name != self.naming.unit and name not in empty and not (name in numbers and self._gaps[name])
        ]
        if empty and self.naming.context is not None:
            report.notes.append(f"No decision has {', '.join(empty)}: check the names in --context.")
        if self.naming.unit is not None and 0 < report.decisions == self._lacks["units"]:
            report.notes.append(f"No decision has the unit {self.naming.unit}: check the name in --unit.")
        if self._deferred:
            report.notes.append(f"{self._deferred:,} decisions say DeferredAction without _skipLearn: imported as sampled.")
        if self._misfits:
            report.notes.append(
                f"{self._misfits:,} context values were no numbers in a column of numbers: left empty in log.parquet."
            )


def _text(value: Any) -> str | None:
    """As JSON; None for what is nested too deeply to be one."""
    try:
        return canonical_json(value).decode()
    except InputError:
        return None


def _number(value: Any) -> bool:
    return value.__class__ is float or value.__class__ is int


def _shown(vector: Sequence[float]) -> str:
    return f"[{', '.join(f'{p:g}' for p in vector[:8])}{', ...' if len(vector) > 8 else ''}]"
