"""A small lake with the tables that a night's steps leave behind, for tests of what is made of them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bandits.decision_point import Actions, DecisionPoint, RewardRule
from pipelines.nightly.lake import Lake, Snapshot
from pipelines.nightly.mart import Mart, read_mart
from pipelines.nightly.report import report
from pipelines.nightly.settings import Evaluate, File, Join, Night, Settings, Train
from pipelines.nightly.tables import TABLES

DATE = dt.date(2026, 11, 22)
TODAY = DATE.isoformat()
YESTERDAY = (DATE - dt.timedelta(days=1)).isoformat()
DP, REWARD, LIVE = "ads", "click", "uniform@1"
REFUSED = 0.76543
"""A value that nobody may see."""

Record = dict[str, Any]


def point(name: str = DP, window_days: float = 3) -> DecisionPoint:
    reward = RewardRule(REWARD, 0.0, 1.0, window_days * 86_400)
    return DecisionPoint(name, Actions(("a", "b")), (reward, RewardRule("spend", 0.0, 10.0, 86_400)))


def settings(folder: Path, *points: DecisionPoint) -> Settings:
    names = points or (point(),)
    file = File(
        "shop", tuple(f"{one.name}.toml" for one in names), join=Join(lookback_days=9), train=Train(days=9),
        evaluate=Evaluate(windows=(1, 7)),
    )  # fmt: skip
    return Settings(file, names, folder)


def decided(policy: str = LIVE, rows: int = 100) -> pa.Table:
    """As much of joined rows as the report reads."""
    return pa.table({"decision_id": [f"{i:05d}" for i in range(rows)], "policy": [policy] * rows})


def unreadable(*reasons: str) -> pa.Table:
    """Decisions that the join could not read, one per reason."""
    return pa.table({"decision_id": [f"{i:05d}" for i in range(len(reasons))], "reason": list(reasons)})


def observed(rows: int, name: str = REWARD) -> pa.Table:
    """As much of rewards as the report reads."""
    return pa.table({"decision_id": [f"{i:05d}" for i in range(rows)], "name": [name] * rows})


def certificate(day: str = TODAY, verdict: str = "pass", policy: str = LIVE, **more: Any) -> Record:
    reasons = [] if verdict == "pass" else ["Weights average 1.31."]
    return {"dp": DP, "policy": policy, "day": day, "verdict": verdict, "reasons": reasons, "rows": 100, "mature": 60} | more


def estimate(policy: str, value: float, verdict: str = "trust", **more: Any) -> Record:
    moments = {"moments_n": 900, "moments_mean": [value, 1.0], "moments_cross": [value, 0.0, 0.0, 0.0], "additive": True}
    return moments | {
        "evaluation_id": "e1", "policy": policy, "estimator": "DR", "metric": REWARD, "segment": "all", "fold": "B", "window": 7,
        "n": 1000, "clusters": 900, "value": value, "stderr": 0.01, "low": value - 0.02, "high": value + 0.02,
        "interval_kind": "normal", "anytime": False, "ess": 640.0, "certified": True, "verdict": verdict,
        "reasons": [] if verdict == "trust" else [f"Because it is {verdict}."],
    } | more  # fmt: skip


def difference(policy: str, value: float, verdict: str = "trust", **more: Any) -> Record:
    kept = estimate(policy, value, verdict, **more)
    return {name: kept[name] for name in kept if name in TABLES["differences"].columns} | {
        "baseline": "logging", "p_worse": 0.0321, "p_below_c": 0.0123,
    }  # fmt: skip


def shortlisted(policy: str, rank: int, value: float, **more: Any) -> Record:
    return {
        "evaluation_id": "e1", "estimator": "DR", "fold": "B", "k": 2, "policy": policy, "rank": rank, "selected_on": value + 0.05,
        "value": value, "difference": value - 0.5, "p_worse": 0.0321, "p_below_c": 0.0123, "tv": 0.4, "decision": "test",
        "certified": True,
    } | more  # fmt: skip


def evaluated() -> dict[str, list[Record]]:
    """Two candidates beside the logging policy: `good` may be shown, `bad` is refused."""
    chosen = [estimate(policy, value + 0.05, fold="A") for policy, value in (("logging", 0.5), ("good", 0.6))]
    return {
        "evaluations": [{
            "evaluation_id": "e1", "dp": DP, "date": TODAY, "from": "2026-11-16", "to": TODAY, "rows": 700, "rows_certified": 600,
            "baseline": "logging", "level": 0.95,
        }],
        "estimates": [
            estimate("logging", 0.5), estimate("good", 0.6), estimate("bad", REFUSED, "refused"),
            estimate("bad", REFUSED, "refused", fold="A"), *chosen,
            estimate("good", 3.1, metric="spend"), estimate("good", 0.62, segment="country = de"), estimate("good", 0.61, window=1),
        ],
        "differences": [difference("good", 0.1), difference("bad", REFUSED - 0.5, "refused")],
        "portfolio": [{
            "evaluation_id": "e1", "estimator": "DR", "fold": "B", "k": 2, "gain": 0.111, "std": 0.0222, "p_any_harm": 0.123,
            "violation": 0.0456, "knee": True, "graded": "not graded here", "certified": True,
        }],
        "portfolio_policies": [shortlisted("good", 1, 0.6), shortlisted("fine", 2, 0.55)],
        "candidates": [{"dp": DP, "policy": "good", "date": TODAY, "learner": "DR", "rows": 5000}],
    }  # fmt: skip


def certified(*verdicts: str) -> dict[str, list[Record]]:
    """Certificates of the last days up to the date, oldest first."""
    days = Night.of(DATE, settings(Path())).days(len(verdicts))
    return {"certificates": [certificate(day, verdict) for day, verdict in zip(days, verdicts, strict=True)]}


def write(lake: Lake, tables: Mapping[str, list[Record]], rows: Mapping[str, pa.Table] | None = None) -> Snapshot:
    """Commit one partition of each table and day, and joined rows by day."""
    entries = []
    for name, records in tables.items():
        for place in sorted({(record.get("dp", DP), record.get("day", TODAY)) for record in records}):
            mine = [one for one in records if (one.get("dp", DP), one.get("day", TODAY)) == place]
            entries.append(lake.write(name, TABLES[name].of(mine), point=place[0], day=place[1]))
    entries += [lake.write("rows", table, point=DP, day=day) for day, table in (rows or {}).items()]
    return lake.commit(entries)


def night(folder: Path, tables: Mapping[str, list[Record]], rows: Mapping[str, pa.Table] | None = None, **options: Any) -> Mart:
    """The mart of a night whose lake holds these tables; by default 100 rows on the date and the day before."""
    lake, chosen = Lake(folder / "lake"), options.get("settings") or settings(folder)
    snapshot = write(lake, tables, {TODAY: decided(), YESTERDAY: decided()} if rows is None else rows)
    return reported(chosen, lake, snapshot)


def reported(chosen: Settings, lake: Lake, snapshot: Snapshot) -> Mart:
    """The mart of what a lake holds."""
    path = report(Night.of(DATE, chosen), chosen, lake, snapshot)
    return read_mart(path.parent.parent, chosen.tenant, path.name)


def but(mart: Mart, **tables: list[Record]) -> Mart:
    """A mart with other rows in some tables; nothing is written or drawn."""
    return replace(mart, tables={**mart.tables, **{name: TABLES[name].of(rows) for name, rows in tables.items()}})


def random_columns(n: int, seed: int) -> np.ndarray:
    """Counted SNIPS columns (n, 3): w r, w, 1."""
    rng = np.random.default_rng(seed)
    weight = rng.gamma(4.0, 0.25, n)
    return np.stack([weight * (rng.random(n) < 0.3), weight, np.ones(n)], axis=1)
