"""Joined rows: one per decision, with its features, its distribution and what became of each reward. The lake's table `rows`.

Columns are flat, so that any engine reads and sums them; here they become arrays again.

| column | what |
|---|---|
| decision_id, decided_at_ns, policy, kind, pass_probability | of the decision |
| unit | 64-bit hash of the unit: rows of one unit depend on each other, and lie in one bucket |
| action | index into the catalogue; where sets come with requests, into the row's own set |
| propensity | of the action taken |
| vector | whether the whole distribution was logged |
| share.J | share of action J of 2^31; null where it was not eligible; 0 where eligible but not logged |
| x.NAME | context column of that name, as the feature schema encodes it |
| f.J.NAME | feature column of action J |
| s.NAME | value of a segment, as text |
| shown | `as_sampled`, `other`, `none`, or `unknown` where nobody said |
| value.R | reward R: null until it is mature, or where it stays unknown |
| state.R | `pending`, `observed`, `default`, `unknown` (no default), `conflict` (with each other, or of a sum with the range) |
| delay.R | nanoseconds from the decision to the first observation that counts; null without one |
| events.R | observations that count |
| early.R | observations before the decision, but inside the clock tolerance: they count |
| late.R | observations after the window, or too early: they do not count |
| refused.R | observations outside the declared range: they do not count |
| conflicts.R | event ids that came with several values |
| reversed.R | observations that take back an earlier one |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bandits.batch import DecisionBatch
from bandits.decision_point import DecisionPoint
from bandits.sampling import TOTAL
from ope.data import BoolArray, FloatArray, IntArray, LoggedData
from pipelines.nightly.lake import Entry, Lake

STATES = ("pending", "observed", "default", "conflict", "unknown")
SHOWN = ("as_sampled", "other", "none", "unknown")
COUNTS = ("events", "early", "late", "refused", "conflicts", "reversed")


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of one reward of n decisions."""

    value: FloatArray
    """NaN where there is none (yet)."""
    state: IntArray
    """Index into `STATES`."""
    delay: FloatArray
    """Nanoseconds; NaN without an observation."""
    counts: Mapping[str, IntArray]
    """By the names of `COUNTS`."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """n joined decisions of one decision point, sorted by day and decision id."""

    day: NDArray[np.str_]
    decision_id: pa.ChunkedArray
    decided_at_ns: IntArray
    unit: IntArray
    policy: NDArray[np.object_]
    kind: NDArray[np.object_]
    action: IntArray
    propensity: FloatArray
    pass_probability: FloatArray
    vector: BoolArray
    shares: IntArray
    """(n, k) of 2^31; 0 where not eligible or not logged."""
    eligible: BoolArray
    """(n, k)"""
    context: FloatArray
    """(n, d)"""
    action_features: FloatArray
    """(n, k, p)"""
    shown: IntArray
    """Index into `SHOWN`."""
    rewards: Mapping[str, Outcome]
    segments: Mapping[str, NDArray[np.object_]]

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.action)

    @property
    def k(self) -> int:
        """Number of actions of the longest set."""
        return int(self.shares.shape[1])

    def logged(self, reward: str, rows: BoolArray | IntArray) -> LoggedData:
        """Some rows as a log of one reward, whose value they must have. Units are clusters."""
        weight = 1 / self.pass_probability[rows]
        vectors = bool(self.vector[rows].all())
        return LoggedData(
            action=self.action[rows], reward=self.rewards[reward].value[rows], propensity=self.propensity[rows],
            context=self.context[rows] if self.context.shape[1] else None,
            propensities=self.shares[rows] / TOTAL if vectors else None, eligible=self.eligible[rows],
            action_features=self.action_features[rows] if self.action_features.shape[2] else None,
            sample_weight=None if (weight == 1).all() else weight, cluster=self.unit[rows],
        )  # fmt: skip

    def batch(self, rows: BoolArray | IntArray | slice = slice(None)) -> DecisionBatch:
        """Requests of some rows."""
        eligible = self.eligible[rows]
        return DecisionBatch(self.context[rows], self.action_features[rows], eligible, bool(eligible.all()))


def read_rows(
    lake: Lake,
    entries: Sequence[Entry],
    point: DecisionPoint,
    *,
    k: int,
    segments: Sequence[str] = (),
    context: bool = True,
    between: tuple[int, int] | None = None,
) -> Rows:
    """Joined rows of some partitions, in the order given.

    `k`: number of actions; shorter sets are padded. `context`: with features. `between`: only decisions from the first moment on
    and before the second.
    """
    tables = [within(lake.read(entry, _wanted(lake, entry, context)), between) for entry in entries]
    table = pa.concat_tables(tables, promote_options="default")
    day = np.repeat(np.array([entry.day for entry in entries]), [one.num_rows for one in tables])
    names = [f"x.{name}" for name in point.features.context_columns] if context else []
    features = point.features.action_columns if context else []
    shares = [_column(table, f"share.{j}", -1) for j in range(k)]
    eligible = np.stack([share >= 0 for share in shares], axis=1)
    return Rows(
        day=day, decision_id=table["decision_id"], decided_at_ns=_numbers(table, "decided_at_ns"), unit=_numbers(table, "unit"),
        policy=_texts(table, "policy"), kind=_texts(table, "kind"), action=_numbers(table, "action").astype(np.int64),
        propensity=_numbers(table, "propensity"), pass_probability=_numbers(table, "pass_probability"),
        vector=_numbers(table, "vector"), shares=np.maximum(np.stack(shares, axis=1), 0), eligible=eligible,
        context=_stacked([_numbers(table, name) for name in names], table.num_rows),
        action_features=_stacked(
            [_numbers(table, f"f.{j}.{name}") if f"f.{j}.{name}" in table.column_names else np.zeros(table.num_rows)
             for j in range(k) for name in features], table.num_rows,
        ).reshape(table.num_rows, k, len(features)),
        shown=_coded(table, "shown", SHOWN),
        rewards={rule.name: _outcome(table, rule.name) for rule in point.rewards},
        segments={name: _texts(table, f"s.{name}") for name in segments},
    )  # fmt: skip


def width(entries: Sequence[Entry], lake: Lake) -> int:
    """Number of actions of the longest set of some partitions."""
    return max((sum(name.startswith("share.") for name in lake.columns(entry)) for entry in entries), default=0)


def within(table: pa.Table, between: tuple[int, int] | None) -> pa.Table:
    """The rows that were decided on from the first moment on and before the second; all of them for None."""
    if between is None:
        return table
    time = table["decided_at_ns"]
    return table.filter(pc.and_(pc.greater_equal(time, between[0]), pc.less(time, between[1])))


def _wanted(lake: Lake, entry: Entry, context: bool) -> list[str] | None:
    return None if context else [name for name in lake.columns(entry) if not name.startswith(("x.", "f."))]


def _outcome(table: pa.Table, name: str) -> Outcome:
    return Outcome(
        value=_numbers(table, f"value.{name}"), state=_coded(table, f"state.{name}", STATES),
        delay=_numbers(table, f"delay.{name}"),
        counts={what: _numbers(table, f"{what}.{name}") for what in COUNTS},
    )  # fmt: skip


def _numbers(table: pa.Table, name: str) -> NDArray[Any]:
    """A column as an array; null is NaN."""
    return np.asarray(table[name].to_numpy())


def _column(table: pa.Table, name: str, missing: int) -> IntArray:
    """A column of shares with null as `missing`, also where a shorter set has no such column."""
    if name not in table.column_names:
        return np.full(table.num_rows, missing, dtype=np.int64)
    return np.asarray(table[name].cast(pa.int64()).fill_null(missing).to_numpy())


def _texts(table: pa.Table, name: str) -> NDArray[np.object_]:
    """A text column as objects that repeat."""
    column = table[name].combine_chunks().dictionary_encode()
    names = np.array([*column.dictionary.to_pylist(), None], dtype=object)
    return np.asarray(names[column.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)])


def _coded(table: pa.Table, name: str, words: Sequence[str]) -> IntArray:
    """A column of known words as indices."""
    return np.asarray(pc.index_in(table[name], pa.array(words)).to_numpy()).astype(np.int64)


def _stacked(columns: Sequence[NDArray[Any]], n: int) -> FloatArray:
    return np.stack(columns, axis=1).astype(np.float64, copy=False) if columns else np.empty((n, 0))
