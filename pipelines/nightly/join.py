"""Join: decisions with what became of them, one row each, as of the night's cut-off. A function of the sets in the lake.

A partition is written anew where its decisions, its rewards, what was shown, the decision point or the moment of the cut-off say
something new of it; once every reward of a day is mature, later nights find nothing to do there, unless something arrives late.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bandits.decision_point import DecisionPoint, RewardRule
from pipelines.nightly.bodies import features_of
from pipelines.nightly.contract import action_positions, flat_shares
from pipelines.nightly.lake import Entry, Lake, Snapshot, key_of
from pipelines.nightly.rows import COUNTS
from pipelines.nightly.settings import DAY_NS, Night, Settings, day_start_ns

VERSION = 2

TEXT = pa.string()
UNREADABLE = pa.schema({"decision_id": TEXT, "reason": TEXT})

KEPT = ("decision_id", "decided_at_ns", "policy", "kind", "propensity", "pass_probability")
"""Columns of a decision that stay as they are."""

NEEDED = (*KEPT, "unit_hash", "actions", "shares", "chosen", "body")

OBSERVED = ("attributed_id", "name", "observed_at_ns", "value", "event", "version")
"""Columns of an observation that say what it is worth."""

Progress = Callable[[int, int], object]


def join(
    night: Night, settings: Settings, lake: Lake, snapshot: Snapshot, progress: Progress = lambda done, total: None
) -> list[Entry]:
    """Joined rows of every partition of the night's days that something new can be said of."""
    twice = lake.frame(snapshot.find("conflicts"))
    conflicting = set() if twice is None else set(twice["decision_id"])
    days = night.days(settings.file.join.lookback_days)
    partitions = [entry for point in settings.points for entry in snapshot.find("decisions", point.name, days)]
    held = {entry.place: entry for entry in snapshot.entries}
    written: list[Entry] = []
    with duckdb.connect(config={"threads": 1}) as database, ThreadPoolExecutor(2) as threads:
        tasks = [threads.submit(_joined_anew, entry, held, night, settings, lake, conflicting, database) for entry in partitions]
        for done, task in enumerate(tasks):
            written += task.result()
            progress(done + 1, len(tasks))
    return written


def _joined_anew(
    entry: Entry,
    held: Mapping[tuple[str, str, str, int], Entry],
    night: Night,
    settings: Settings,
    lake: Lake,
    conflicting: Set[str],
    database: duckdb.DuckDBPyConnection,
) -> list[Entry]:
    """The rows of one partition of decisions, where something new can be said of them."""
    point = settings.point(entry.point)
    assert point is not None, "partitions of the settings' decision points were asked for"
    place = (entry.point, entry.day, entry.bucket)
    rewards, shown, old = (held.get((table, *place)) for table in ("rewards", "shown", "rows"))
    # an older night takes nothing back
    cutoff = max(_cutoff(night, point, entry.day), 0 if old is None else old.cutoff_ns)
    among = sorted(conflicting) if conflicting and entry.low <= max(conflicting) and min(conflicting) <= entry.high else []
    segments = settings.file.evaluate.segments
    inputs = [one.sha256 if one is not None else "" for one in (entry, rewards, shown)]
    key = key_of("join", VERSION, inputs, cutoff, msgspec.json.encode(point).decode(), segments, among)
    if old is not None and old.key == key:
        return []
    observed, seen = (
        None if one is None else lake.read(one, names) for one, names in ((rewards, OBSERVED), (shown, ("decision_id", "action")))
    )
    with database.cursor() as cursor:  # what is registered there is seen there alone
        rows, unreadable = joined(
            lake.read(entry, list(NEEDED)), observed, seen, point, cutoff, segments=segments, conflicting=among, database=cursor
        )
    written = [_write(lake, "rows", rows, place, key, cutoff)]
    if unreadable or ("unreadable", *place) in held:
        named = pa.Table.from_pylist([{"decision_id": i, "reason": why} for i, why in unreadable], schema=UNREADABLE)
        written.append(_write(lake, "unreadable", named, place, key))
    return written


def joined(
    decisions: pa.Table,
    rewards: pa.Table | None,
    shown: pa.Table | None,
    point: DecisionPoint,
    cutoff_ns: int,
    *,
    segments: Sequence[str] = (),
    conflicting: Sequence[str] = (),
    database: duckdb.DuckDBPyConnection,
) -> tuple[pa.Table, list[tuple[str, str]]]:
    """Rows in the layout of `pipelines.nightly.rows`, and (decision id, reason) of decisions whose features cannot be read.

    `decisions`, `rewards`, `shown`: as ingest sorts them; those `conflicting` are left out. `database` runs the SQL.
    """
    if conflicting:
        decisions = decisions.filter(pc.invert(pc.is_in(decisions["decision_id"], pa.array(conflicting))))
    columns, unreadable = features_of(decisions, point, segments)
    if unreadable:
        good = np.ones(decisions.num_rows, dtype=np.bool_)
        good[list(unreadable)] = False
        names = decisions["decision_id"].take(pa.array(list(unreadable))).to_pylist()
        decisions = decisions.filter(pa.array(good))
        columns, _ = features_of(decisions, point, segments)
        rows = _joined(database, decisions, rewards, shown, point, cutoff_ns, columns)
        return rows, list(zip(names, unreadable.values(), strict=True))
    return _joined(database, decisions, rewards, shown, point, cutoff_ns, columns), []


def _joined(
    database: duckdb.DuckDBPyConnection,
    decisions: pa.Table,
    rewards: pa.Table | None,
    shown: pa.Table | None,
    point: DecisionPoint,
    cutoff_ns: int,
    features: dict[str, Any],
) -> pa.Table:
    columns: dict[str, Any] = {name: decisions[name] for name in KEPT}
    columns["unit"] = decisions["unit_hash"]
    columns |= _actions(decisions, point) | features
    n = decisions.num_rows
    for name, table in relations(decisions, rewards, shown).items():
        database.register(name, table)
    columns["shown"] = _shown(database, n) if shown is not None else pa.repeat("unknown", n)
    for rule in point.rewards:
        columns |= outcome(database, rule, cutoff_ns)
    return pa.table(columns)


def relations(decisions: pa.Table, rewards: pa.Table | None, shown: pa.Table | None = None) -> dict[str, pa.Table]:
    """What join.sql reads, and shown.sql where something was shown."""
    known = {"decision_id": decisions["decision_id"], "decided_at_ns": decisions["decided_at_ns"]}
    tables = {
        "decisions": pa.table({"row": np.arange(decisions.num_rows), **known}),
        "rewards": _observations(rewards),
    }
    if shown is not None:
        tables["decisions"] = tables["decisions"].append_column("action", _taken(decisions))
        tables["shown"] = _placed(shown, ("decision_id", "action"))
    return tables


def _taken(decisions: pa.Table) -> pa.Array:
    """Id of the action taken."""
    actions = decisions["actions"].combine_chunks()
    first = actions.offsets.to_numpy()[:-1]
    return actions.values.take(pa.array(first + decisions["chosen"].to_numpy()))


def _observations(rewards: pa.Table | None) -> pa.Table:
    if rewards is None:
        kinds = (TEXT, TEXT, pa.int64(), pa.float64(), pa.int32(), pa.int32(), pa.int64(), pa.bool_())
        return pa.schema(dict(zip((*OBSERVED, "place", "alone"), kinds, strict=True))).empty_table()
    table = _placed(rewards, OBSERVED).combine_chunks()
    first, second = table.slice(0, max(table.num_rows - 1, 0)), table.slice(1)  # sorted by decision and name
    same = pc.and_(pc.equal(first["attributed_id"], second["attributed_id"]), pc.equal(first["name"], second["name"]))
    same = np.asarray(same.to_numpy(), dtype=np.bool_)
    together = np.zeros(table.num_rows + 1, dtype=np.bool_)
    together[1:-1] = same
    return table.append_column("alone", pa.array(~(together[1:] | together[:-1])))


def _placed(table: pa.Table, names: Sequence[str]) -> pa.Table:
    return table.select(list(names)).append_column("place", pa.array(np.arange(table.num_rows)))


def _shown(database: duckdb.DuckDBPyConnection, n: int) -> pa.Array:
    found = database.sql(_sql("shown")).to_arrow_table()
    words = np.full(n, "unknown", dtype=object)
    words[found["row"].to_numpy()] = found["shown"].to_numpy(zero_copy_only=False)
    return pa.array(words, TEXT)


def outcome(database: duckdb.DuckDBPyConnection, rule: RewardRule, cutoff_ns: int) -> dict[str, pa.Array]:
    """Columns of one reward, by decision."""
    found = database.sql(_sql("join"), params=parameters(rule, cutoff_ns)).to_arrow_table()
    row = np.asarray(found["row"].to_numpy())
    if (row[1:] < row[:-1]).any():  # engines may join in any order, and mostly keep it
        found = found.take(pa.array(np.argsort(row)))
    kinds = {"value": pa.float64(), "state": TEXT, "delay": pa.int64(), **dict.fromkeys(COUNTS, pa.int32())}
    return {f"{name}.{rule.name}": found[name].cast(kind) for name, kind in kinds.items()}


def parameters(rule: RewardRule, cutoff_ns: int) -> dict[str, Any]:
    """What join.sql is told of a reward's rule."""
    return {
        "name": rule.name, "least": rule.least, "low": rule.low, "high": rule.high, "reversible": rule.reversible,
        "window_ns": _ns(rule.window_seconds), "tolerance_ns": _ns(rule.clock_tolerance_seconds), "aggregation": rule.aggregation,
        "conflict": rule.conflict, "fallback": rule.at_maturity, "cutoff_ns": cutoff_ns,
    }  # fmt: skip


def _actions(decisions: pa.Table, point: DecisionPoint) -> dict[str, Any]:
    """The action taken, and the share of every action: columns of the catalogue, or of the longest set."""
    n, catalogue = decisions.num_rows, point.actions.catalogue
    row, place, position = action_positions(decisions, catalogue)
    k = len(catalogue) or int(position.max(initial=0)) + 1
    shares, eligible = np.zeros((k, n), dtype=np.uint32), np.zeros((k, n), dtype=np.bool_)
    eligible[position, row] = True
    flat, size = flat_shares(decisions)
    known = size > 0
    shares[position[known[row]], row[known[row]]] = flat
    taken = np.zeros(n, dtype=np.int32)
    chosen = place == np.asarray(decisions["chosen"].to_numpy())[row]
    taken[row[chosen]] = position[chosen]
    columns = {f"share.{j}": pa.array(shares[j], mask=~eligible[j]) for j in range(k)}
    return {"action": pa.array(taken), "vector": pa.array(known), **columns}


def _cutoff(night: Night, point: DecisionPoint, day: str) -> int:
    """When a night looks at a day: its cut-off, or the moment from which on nothing of that day can mature any more."""
    end = day_start_ns(dt.date.fromisoformat(day)) + DAY_NS
    return min(night.cutoff_ns, end + max(_ns(rule.window_seconds) for rule in point.rewards))


def _ns(seconds: float) -> int:
    return int(seconds * 10**9)


def _write(lake: Lake, table: str, rows: pa.Table, place: tuple[str, str, int], key: str, cutoff_ns: int = 0) -> Entry:
    point, day, bucket = place
    return lake.write(table, rows, point=point, day=day, bucket=bucket, key=key, cutoff_ns=cutoff_ns, id_column="decision_id")


def _sql(name: str) -> str:
    return (resources.files("pipelines") / "sql" / f"{name}.sql").read_text()
