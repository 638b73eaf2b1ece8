"""Lakes of joined rows whose truth is known, as the join would have written them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from bandits.batch import DecisionBatch
from bandits.decision_point import parse_decision_point
from bandits.sampling import TOTAL, quantise_rows
from ope.simulate import World, sample_actions, softmax
from pipelines.nightly.lake import Lake, Snapshot
from pipelines.nightly.rows import COUNTS
from pipelines.nightly.settings import File, Night, Settings
from pipelines.nightly.tables import TABLES

D, K = 3, 3
DATE = dt.date(2026, 11, 22)
FLOOR = 0.1
WORLD = World.random(D, K, 4)

POINT = """
name = "banner"
exploration_floor = 0.1
{more}

[actions]
catalogue = ["a", "b", "c"]

[[rewards]]
name = "click"
low = 0.0
high = 1.0
window_seconds = 60.0
{rewards}
[features]
context = [
  {{type = "number", name = "x0"}}, {{type = "number", name = "x1"}}, {{type = "number", name = "x2"}},
  {{type = "category", name = "land", levels = ["n", "s"], missing = "level"}},
]
"""

SALES = """
[[rewards]]
name = "sales"
low = -100.0
high = 100.0
window_seconds = 60.0
"""


def settings(folder: Path, *, more: str = "", rewards: str = "", **tables: Any) -> Settings:
    """Settings of one decision point. `tables`: by name, such as `evaluate={"windows": (1,)}`."""
    file = msgspec.convert({"tenant": "shop", "decision_points": ["banner.toml"], **tables}, File)
    return Settings(file, (parse_decision_point(POINT.format(more=more, rewards=rewards)),), folder)


@dataclass(frozen=True)
class Log:
    """Decisions of several days. Every array (n,) unless said."""

    day: np.ndarray
    unit: np.ndarray
    context: np.ndarray
    """(n, D)"""
    shares: np.ndarray
    """(n, K) of 2^31"""
    action: np.ndarray
    value: dict[str, np.ndarray]
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns, or others than usual."""

    @property
    def n(self) -> int:
        return len(self.action)


def logging_policy(context: np.ndarray) -> np.ndarray:
    return (1 - FLOOR) * softmax(0.5 * (context @ WORLD.coefficient + WORLD.bias)) + FLOOR / K


def simulate(n: int, *, seed: int = 1, days: int = 2, units: int | None = None, sales: bool = False, **columns: Any) -> Log:
    """A log of the last days up to `DATE`, clicks with the world's probabilities; units come back on any day."""
    rng = np.random.default_rng(seed)
    context = np.round(WORLD.contexts(n, rng), 3)
    shares = quantise_rows(logging_policy(context), np.ones((n, K), dtype=bool))
    action = sample_actions(shares / TOTAL, rng)
    click = (rng.random(n) < WORLD.q(context)[np.arange(n), action]).astype(float)
    hashes = rng.integers(-(2**63), 2**63 - 1, n if units is None else units)
    value = {"click": click} | ({"sales": click * rng.normal(20, 5, n) - 5} if sales else {})
    day = np.array([(DATE - dt.timedelta(days=int(back))).isoformat() for back in rng.integers(0, days, n)])
    return Log(day, rng.choice(hashes, n) if units is not None else hashes, context, shares, action, value, columns)


def true_value(policy: Callable[[DecisionBatch], np.ndarray]) -> float:
    """What a policy earns per decision, on 50,000 fresh contexts: to about 0.001."""

    def vectors(context: np.ndarray) -> np.ndarray:
        land = np.tile([0.0, 0.0, 1.0], (len(context), 1))
        return policy(DecisionBatch.of(np.hstack((context, land)), np.ones((len(context), K), dtype=bool)))

    return WORLD.value(vectors, n=50_000)


def table_of(log: Log) -> pa.Table:
    """Rows in the layout of `pipelines.nightly.rows`."""
    n = log.n
    land = log.columns.get("s.land", [None] * n)
    columns = {
        "decision_id": [f"d{i:07d}" for i in range(n)], "decided_at_ns": np.arange(n), "unit": log.unit, "policy": ["live@1"] * n,
        "kind": ["sampled"] * n, "pass_probability": np.ones(n), "action": log.action.astype(np.int32),
        "propensity": log.shares[np.arange(n), log.action] / TOTAL, "vector": np.ones(n, dtype=bool),
        **{f"share.{j}": log.shares[:, j].astype(np.uint32) for j in range(K)}, **{f"x.x{j}": log.context[:, j] for j in range(D)},
        **{f"x.land = {level}": np.array([float(one == level) for one in land]) for level in "ns"},
        "x.land is missing": np.array([float(one is None) for one in land]),
        "s.land": pa.array(land, pa.string()), "shown": ["unknown"] * n,
    }  # fmt: skip
    for name, value in log.value.items():
        columns |= {
            f"value.{name}": value, f"state.{name}": ["observed"] * n, f"delay.{name}": np.ones(n, dtype=np.int64),
            **{f"{what}.{name}": np.ones(n, dtype=np.int32) for what in COUNTS},
        }  # fmt: skip
    return pa.table(columns | {name: pa.array(column) for name, column in log.columns.items()})


def certificate(day: str, verdict: str = "pass", **more: Any) -> dict[str, Any]:
    return {"dp": "banner", "policy": "live@1", "day": day, "verdict": verdict} | more


def write_lake(folder: Path, log: Log, *, buckets: int = 4, certificates: Sequence[dict[str, Any]] | None = None) -> Lake:
    """A lake of these rows, every day's with a passed certificate unless others are given."""
    lake, rows = Lake(folder), table_of(log)
    entries = []
    bucket = (log.unit.astype(np.uint64) % np.uint64(buckets)).astype(int)
    for day in np.unique(log.day).tolist():
        for number in range(buckets):
            some = rows.filter(pa.array((log.day == day) & (bucket == number)))
            entries.append(lake.write("rows", some, point="banner", day=day, bucket=number, id_column="decision_id"))
    given = [certificate(day) for day in np.unique(log.day).tolist()] if certificates is None else certificates
    for day in {one["day"] for one in given}:
        some = TABLES["certificates"].of([one for one in given if one["day"] == day])
        entries.append(lake.write("certificates", some, point="banner", day=day))
    lake.commit(entries)
    return lake


def run(steps: Sequence[Callable[..., Any]], made: Settings, lake: Lake) -> Snapshot:
    """Steps of the night of `DATE`, each committed."""
    for step in steps:
        lake.commit(step(Night.of(DATE, made), made, lake, lake.snapshot(), lambda done, total: None))
    return lake.snapshot()


def records(lake: Lake, table: str) -> list[dict[str, Any]]:
    """All rows of a table."""
    return [record for entry in lake.snapshot().find(table) for record in lake.read(entry).to_pylist()]
