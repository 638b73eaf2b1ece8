"""Events of a simulated feed: how many ads in each fetch, from five loads and sixteen features, with known truth.

What tests, benchmarks and the first night of the documentation are made of. Draws are keyed by the decision's id, as the service's
are, so that every decision replays.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bandits.events import SCHEMA_VERSION, digest
from bandits.sampling import TOTAL, Salt, choose_rows, quantise_rows
from ope.data import FloatArray, IntArray
from ope.simulate import softmax
from pipelines.nightly.settings import DAY_NS, day_start_ns
from pipelines.nightly.sources import NUMBERED, SCHEMAS

LOADS = ("load_0", "load_1", "load_2", "load_3", "load_4")
FEATURES = 16
SALT = Salt(1, b"a salt for simulations only, 32 b")
FLOOR = 0.1
ARRIVING = 0.825
"""Share of decisions whose reward arrives at all; the others are worth 0."""

POINT = f"""
name = "ads"
exploration_floor = {FLOOR}
default_action = "load_0"

[actions]
catalogue = {list(LOADS)}

[[rewards]]
name = "value"
low = 0.0
high = 2.0
window_seconds = 3600.0

[features]
context = [
{chr(10).join(f'  {{type = "number", name = "x{i}"}},' for i in range(FEATURES))}
]
"""
"""The decision point, in TOML."""


@dataclass(frozen=True, slots=True, eq=False)
class Day:
    """One day of n decisions and what came of them."""

    decisions: pa.Table
    rewards: pa.Table
    context: FloatArray
    """(n, 16)"""
    shares: IntArray
    """(n, 5)"""
    action: IntArray
    mean: FloatArray
    """Expected reward of every load (n, 5)."""

    def write(self, folder: Path) -> Path:
        """As a folder of events."""
        folder.mkdir(parents=True)
        pq.write_table(self.decisions, folder / "decisions.parquet")
        pq.write_table(self.rewards, folder / "rewards.parquet")
        return folder


def simulate_day(
    date: dt.date,
    n: int,
    *,
    seed: int = 0,
    per_unit: int = 4,
    tenant: str = "feed",
    temperature: float = 0.5,
    policy: str = "feed@1",
) -> Day:
    """A day of n fetches by about n / per_unit users, whose patience with ads is theirs all day."""
    rng = np.random.default_rng((seed, date.toordinal()))
    unit = np.sort(rng.integers(0, max(n // per_unit, 1), n))
    patience = rng.normal(size=max(n // per_unit, 1))[unit]
    context = np.round(rng.normal(size=(n, FEATURES)), 3)
    context[:, 0] = np.round(patience + 0.3 * rng.normal(size=n), 3)
    mean = expected(context)
    scores = mean + 0.3 * context[:, 1:2] * np.linspace(-1, 1, len(LOADS))
    vectors = (1 - FLOOR) * softmax(scores / temperature) + FLOOR / len(LOADS)
    shares = quantise_rows(vectors, np.ones_like(vectors, dtype=np.bool_))
    start = day_start_ns(date)
    decided = start + np.sort(rng.integers(0, DAY_NS - 1, n))
    ids = [f"{date:%y%m%d}-{seed:02d}-{i:08d}" for i in range(n)]
    drawn = np.array([SALT.uniform(tenant, id_) for id_ in ids])
    action = choose_rows(shares, drawn)
    arrives = rng.random(n) < ARRIVING
    value = np.clip(mean[np.arange(n), action] / ARRIVING + 0.3 * rng.uniform(-1, 1, n), 0, 2)
    delay = (rng.exponential(600, n) * 1e9).astype(np.int64) % (3500 * 10**9)
    names = [f"user-{seed}-{one}" for one in range(max(n // per_unit, 1))]
    bodies = [_body(row) for row in context.tolist()]
    hashes = [digest(body) for body in bodies]
    columns = {
        "schema_version": np.full(n, SCHEMA_VERSION), "tenant": [tenant] * n, "decision_point": ["ads"] * n, "decision_id": ids,
        "decided_at_ns": decided, "unit": [names[one] for one in unit], "session": pa.nulls(n), "parent": pa.nulls(n),
        "policy": [policy] * n, "experiment": pa.nulls(n), "arm": pa.nulls(n), "seed_epoch": np.full(n, SALT.epoch),
        "kind": ["sampled"] * n, "actions": [LOADS] * n, "excluded": [()] * n,
        "shares": [row.tobytes() for row in shares.astype("<u4")], "propensity": shares[np.arange(n), action] / TOTAL,
        "chosen": action, "pass_probability": np.ones(n), "body": bodies, "body_hash": hashes, "request_hash": hashes,
    }  # fmt: skip
    later = np.flatnonzero(arrives)
    observed = decided[later] + delay[later]
    rewards = {
        "schema_version": np.full(len(later), SCHEMA_VERSION), "tenant": [tenant] * len(later),
        "decision_id": [ids[i] for i in later], "name": ["value"] * len(later), "event_id": [""] * len(later),
        "observed_at_ns": observed, "received_at_ns": observed + 10**9, "value": value[later],
    }  # fmt: skip
    return Day(_table(columns, "decisions"), _table(rewards, "rewards"), context, shares, action, mean)


def expected(context: FloatArray) -> FloatArray:
    """Expected reward of every load (n, 5): more ads pay, less so for the impatient, whom they drive away."""
    load = np.arange(len(LOADS))
    patience = context[:, :1]
    return np.asarray(0.3 + 0.5 / (1 + np.exp(-(0.6 * load - 0.25 * load**2 + 0.5 * patience * load))))


def _body(row: list[float]) -> bytes:
    """Canonical JSON of a request whose actions have no features."""
    fields = ",".join(f'"x{i}":{value!r}' for i, value in sorted(enumerate(row), key=lambda pair: str(pair[0])))
    return b'{"actions":[' + b",".join([b"{}"] * len(LOADS)) + b'],"context":{' + fields.encode() + b"}}"


def _table(columns: dict[str, object], kind: str) -> pa.Table:
    schema = SCHEMAS[kind]  # type: ignore[index]
    known = [name for name in schema.names if name not in NUMBERED]
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in known})
