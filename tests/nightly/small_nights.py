"""A feed of a few hundred decisions a day, and settings that make its nights quick."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from pipelines.nightly.lake import Lake
from pipelines.nightly.mart import read_mart
from pipelines.nightly.run import nightly
from pipelines.nightly.settings import Settings, read_settings
from pipelines.nightly.simulated import POINT, simulate_day

FIRST, SECOND = dt.date(2026, 11, 21), dt.date(2026, 11, 22)

SETTINGS = """
tenant = "feed"
decision_points = ["ads.toml"]
[lake]
buckets = 2
[train]
learners = ["IPS"]
least_rows = 100
days = 2
[evaluate]
windows = [2]
[join]
lookback_days = 2
cutoff_hours = 1.0
"""


def feed(folder: Path, n: int = 600, *, settings: str = SETTINGS) -> Settings:
    """Settings and decision point of the feed, and the first day's events in the inbox."""
    folder.mkdir(parents=True)
    (folder / "ads.toml").write_text(POINT)
    (folder / "propel.toml").write_text(settings)
    simulate_day(FIRST, n).write(folder / "inbox" / "first")
    return read_settings(folder / "propel.toml")


def before_the_second(folder: Path) -> Path:
    """The first night done, and the second day's events in the inbox."""
    nightly(FIRST, feed(folder))
    simulate_day(SECOND, 600).write(folder / "inbox" / "second")
    return folder


def state(folder: Path) -> dict[str, object]:
    """Everything that must come out the same: listed partitions, their revisions, the tables of the report."""
    lake = Lake(folder / "lake" / "feed")
    entries = {entry.place: (entry.sha256, entry.revision, entry.key) for entry in lake.snapshot().entries}
    return {"entries": entries, "mart": read_mart(folder / "reports", "feed").manifest.snapshot_id}


def check_readable(folder: Path) -> None:
    """The lake's list and every partition on it, and the current report, are whole."""
    lake = Lake(folder / "lake" / "feed")
    for entry in lake.snapshot().entries:
        lake.checked(entry)
    read_mart(folder / "reports", "feed")
