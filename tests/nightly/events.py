"""Events of tests: a few decisions and what came of them, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bandits.events import canonical, digest
from bandits.sampling import TOTAL
from pipelines.nightly.lake import Entry, Lake, Snapshot
from pipelines.nightly.settings import Settings, day_start_ns, read_settings
from pipelines.nightly.sources import SCHEMAS, EventFolder, Kind

SECOND = 10**9
DAY = "2026-11-22"

POINT = """
name = "point"
exploration_floor = 0.1
[actions]
catalogue = ["a", "b", "c"]
[[rewards]]
name = "reward"
low = 0.0
high = 10.0
window_seconds = 3600.0
"""


def settings(folder: Path, *, point: str = POINT, tenant: str = "tenant", more: str = "") -> Settings:
    """Settings with one decision point, their folder made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "point.toml").write_text(point)
    (folder / "propel.toml").write_text(f'tenant = "{tenant}"\ndecision_points = ["point.toml"]\n{more}')
    return read_settings(folder / "propel.toml")


def start(day: str = DAY) -> int:
    """Nanoseconds at which a day begins."""
    import datetime as dt

    return day_start_ns(dt.date.fromisoformat(day))


def decision(id_: str, *, at: int = 0, day: str = DAY, unit: str | None = None, **changes: Any) -> dict[str, Any]:
    """One decision, `at` seconds after its day began, over three actions with shares of a half and two quarters."""
    body = canonical({"actions": [{}] * 3, "context": changes.pop("context", {})})
    shares = (TOTAL // 2, TOTAL // 4, TOTAL // 4)
    chosen = changes.pop("chosen", 0)
    record = {
        "schema_version": 1, "tenant": "tenant", "decision_point": "point", "decision_id": id_,
        "decided_at_ns": start(day) + at * SECOND, "unit": unit or f"unit of {id_}", "session": None, "parent": None,
        "policy": "policy@1", "experiment": None, "arm": None, "seed_epoch": 1, "kind": "sampled", "actions": ["a", "b", "c"],
        "excluded": [], "shares": b"".join(share.to_bytes(4, "little") for share in shares), "propensity": shares[chosen] / TOTAL,
        "chosen": chosen, "pass_probability": 1.0, "body": body, "body_hash": digest(body), "request_hash": digest(body),
        "log_id": None, "log_row": None,
    }  # fmt: skip
    return record | changes


def reward(id_: str, value: float = 1.0, *, at: int = 0, day: str = DAY, **changes: Any) -> dict[str, Any]:
    """One observation, `at` seconds after a day began."""
    time = start(day) + at * SECOND
    record = {
        "schema_version": 1, "tenant": "tenant", "decision_id": id_, "name": "reward", "event_id": "", "observed_at_ns": time,
        "received_at_ns": time, "value": value, "log_id": None, "log_row": None,
    }  # fmt: skip
    return record | changes


def shown(id_: str, action: str | None, *, at: int = 0, day: str = DAY, **changes: Any) -> dict[str, Any]:
    """One report of what was shown."""
    time = start(day) + at * SECOND
    record = {
        "schema_version": 1, "tenant": "tenant", "decision_id": id_, "action": action, "observed_at_ns": time,
        "received_at_ns": time, "log_id": None, "log_row": None,
    }  # fmt: skip
    return record | changes


def table(kind: Kind, records: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Records as a source hands them on."""
    return pa.Table.from_pylist([dict(record) for record in records], schema=SCHEMAS[kind])


def folder(
    path: Path,
    decisions: Sequence[Mapping[str, Any]] = (),
    rewards: Sequence[Mapping[str, Any]] = (),
    shown: Sequence[Mapping[str, Any]] = (),
) -> EventFolder:
    """A folder of events; kinds without any have no file."""
    path.mkdir(parents=True)
    kinds: dict[Kind, Sequence[Mapping[str, Any]]] = {"decisions": decisions, "rewards": rewards, "shown": shown}
    for kind, records in kinds.items():
        if records:
            pq.write_table(table(kind, records), path / f"{kind}.parquet")
    return EventFolder(path)


def listed(snapshot: Snapshot, *tables: str) -> dict[tuple[str, str, str, int], str]:
    """Digest of every partition of some tables."""
    return {entry.place: entry.sha256 for entry in snapshot.entries if entry.table in tables}


def records(lake: Lake, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Rows of some partitions."""
    return [row for entry in entries for row in lake.read(entry).to_pylist()]
