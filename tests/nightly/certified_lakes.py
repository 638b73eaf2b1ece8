"""Lakes whose days a logger of `loggers` wrote, with the raw decisions that each row came from."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from bandits.decision_point import DecisionPoint, parse_decision_point
from bandits.sampling import TOTAL, Salt, choose_rows, quantise_rows
from pipelines.nightly.certify import certify
from pipelines.nightly.lake import Entry, Lake
from pipelines.nightly.rows import COUNTS
from pipelines.nightly.settings import DAY_NS, File, Night, Settings, day_start_ns
from tests.nightly.loggers import COLUMNS, FLOOR, NAMES, right

DATE = dt.date(2026, 11, 22)
SALT = Salt(3, b"0123456789abcdef")
WINDOW = 3600.0

POINT = parse_decision_point(
    f'name = "ads"\nexploration_floor = {FLOOR}\n[actions]\ncatalogue = {list(NAMES)}\n'
    f'[[rewards]]\nname = "click"\nlow = 0.0\nhigh = 1.0\nwindow_seconds = {WINDOW}\n'
    + "".join(f'[[features.context]]\ntype = "number"\nname = "{name}"\n' for name in COLUMNS)
)


@dataclass
class World:
    """A lake of one decision point, and what the night knows of it."""

    folder: Path
    point: DecisionPoint = POINT
    certificate: dict[str, Any] = field(default_factory=dict)
    lookback: int = 1

    @property
    def lake(self) -> Lake:
        return Lake(self.folder / "lake")

    @property
    def settings(self) -> Settings:
        tables = {
            "certificate": self.certificate, "join": {"lookback_days": self.lookback, "cutoff_hours": 2},
            "train": {"days": self.lookback}, "evaluate": {"windows": (1,)},
        }  # fmt: skip
        file = msgspec.convert({"tenant": "shop", "decision_points": ["ads.toml"], **tables}, File)
        return Settings(file, (self.point,), self.folder)

    def write(self, *tables: tuple[str, pa.Table, dict[str, Any]]) -> list[Entry]:
        entries = [self.lake.write(name, rows, **place) for name, rows, place in tables]
        self.lake.commit(entries)
        return entries

    def day(self, rows: pa.Table, back: int = 0, buckets: int = 1) -> None:
        """Write a day of joined rows, spread over buckets."""
        where = np.arange(rows.num_rows) % buckets
        self.write(*(("rows", rows.filter(pa.array(where == b)), place(back) | {"bucket": b}) for b in range(buckets)))

    def certify(self, date: dt.date = DATE) -> list[Entry]:
        """One night's certificates, listed."""
        settings, lake = self.settings, self.lake
        entries = certify(Night.of(date, settings), settings, lake, lake.snapshot(), lambda done, total: None)
        lake.commit(entries)
        return entries

    def table(self, name: str, back: int = 0) -> list[dict[str, Any]]:
        """Rows of a table on a day."""
        lake = self.lake
        day = place(back)["day"]
        return [row for entry in lake.snapshot().find(name, "ads", [day]) for row in lake.read(entry).to_pylist()]

    def certificate_of(self, back: int = 0) -> dict[str, Any]:
        """The only certificate of a day."""
        (record,) = self.table("certificates", back)
        return record


def place(back: int = 0) -> dict[str, Any]:
    return {"point": "ads", "day": (DATE - dt.timedelta(days=back)).isoformat()}


def logged(n: int, *, seed: int = 1, back: int = 0, joined: float = 0.9, day: Any = None, **columns: Any) -> pa.Table:
    """Joined rows of a right logger's day, or of `day`; a share `joined` has a reward. `columns`: others than usual."""
    rng = np.random.default_rng(seed)
    action, vectors, context, arrived = right(n, rng) if day is None else day
    shares = quantise_rows(vectors, np.ones(vectors.shape, dtype=bool))
    observed = rng.random(n) < joined
    start = day_start_ns(DATE) - back * DAY_NS
    table = {
        "decision_id": [f"d{back:02d}{i:07d}" for i in range(n)], "decided_at_ns": start + np.arange(n) * (DAY_NS // n),
        "policy": ["live@1"] * n, "kind": ["sampled"] * n, "pass_probability": np.ones(n), "unit": np.arange(n),
        "action": action.astype(np.int32), "propensity": shares[np.arange(n), action] / TOTAL, "vector": np.ones(n, dtype=bool),
        **{f"share.{j}": shares[:, j] for j in range(shares.shape[1])},
        **{f"x.{name}": context[:, i] for i, name in enumerate(COLUMNS)},
        "shown": ["unknown"] * n, "value.click": observed.astype(float), "state.click": np.where(observed, "observed", "default"),
        "delay.click": pa.array(np.where(observed, WINDOW * 1e9 * rng.random(n), np.nan), pa.float64()),
        **{f"{what}.click": observed * 1 if what == "events" else np.zeros(n, np.int64) for what in COUNTS},
    }  # fmt: skip
    return pa.table(table | columns).filter(pa.array(arrived))


def raw_decisions(n: int, *, epoch: int = SALT.epoch, seed: int = 1, first_row: int = 1) -> pa.Table:
    """Raw decisions of the night's day, drawn by the salt and numbered by one log."""
    shares = quantise_rows(right(n, np.random.default_rng(seed))[1], np.ones((n, len(NAMES)), dtype=bool))
    ids = [f"d00{i:07d}" for i in range(n)]
    u = np.array([SALT.uniform("shop", id_) for id_ in ids])
    return pa.table({
        "tenant": ["shop"] * n, "decision_id": ids, "policy": ["live@1"] * n, "kind": ["sampled"] * n,
        "seed_epoch": np.full(n, epoch), "actions": [list(NAMES)] * n, "shares": [row.astype("<u4").tobytes() for row in shares],
        "chosen": choose_rows(shares, u).astype(np.int32), "log_id": ["log-a"] * n, "log_row": first_row + np.arange(n),
    })  # fmt: skip
