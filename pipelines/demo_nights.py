"""The demo's second half: the real log's week as seven nights, one of them killed on purpose, and gone on with."""

from __future__ import annotations

import datetime as dt
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.importers.events import Naming
from pipelines.importers.exposures import Exposures
from pipelines.imports import import_log
from pipelines.nightly.lake import open_lake
from pipelines.nightly.mart import Mart, read_mart
from pipelines.nightly.run import STEPS, Run, nightly
from pipelines.nightly.settings import DAY_NS, Settings, read_settings
from pipelines.nightly.views import PointView, Record, point_views

ITEMS = tuple(str(item) for item in range(80))
CONTEXT = ("position", *(f"user_feature_{i}" for i in range(4)))
FIRST, DAYS = dt.date(2019, 11, 24), 7
KILLED_ON = 4
"""The night, counted from 1, whose process is killed..."""

KILLED_AFTER = "join"
"""... as soon as this step is committed."""

SETTINGS = """\
tenant = "demo"
decision_points = ["items.toml"]

[lake]
buckets = 1

[train]
learners = ["DR"]
days = 7
least_rows = 200

[evaluate]
windows = [7]

[join]
lookback_days = 7
cutoff_hours = 1.0
"""


@dataclass(frozen=True, slots=True)
class Week:
    """What the nights did."""

    marts: tuple[Mart, ...]
    killed: Run
    """The night that was killed, as it went on."""
    killed_on: int
    """Its number, from 1."""


def run_week(folder: Path, step: Callable[[str], object], *, nights: int = DAYS, killed_on: int = KILLED_ON) -> Week:
    """Nights in a folder that is made anew, a day's events arriving before each. `step` is told what is being worked on."""
    step("Sorting the week's events into days")
    shutil.rmtree(folder, ignore_errors=True)
    settings = prepare(folder)
    days = [FIRST + dt.timedelta(days=number) for number in range(nights)]
    marts, killed = [], None
    for number, day in enumerate(days, 1):
        arrive(folder, day)
        if number == killed_on:
            step(f"Night {number} of {nights}: killing it after {KILLED_AFTER}")
            kill_after(day, settings)
        step(f"Night {number} of {nights}")
        run = nightly(day, settings)
        killed = run if number == killed_on else killed
        marts.append(read_mart(folder / "reports", settings.tenant, Path(run.report).name))
    assert killed is not None, "one of the nights was killed"
    return Week(tuple(marts), killed, killed_on)


def prepare(folder: Path) -> Settings:
    """Settings and decision point of the Open Bandit sample, and its events imported."""
    folder.mkdir(parents=True)
    sample = resources.files("pipelines") / "data" / "open_bandit" / "random_all.parquet"
    with resources.as_file(sample) as path:
        import_log(
            path, folder / "week", Naming("items", "demo", "click", None, CONTEXT), kind="exposures",
            exposures=lambda: Exposures(
                action="item_id", reward="click", time="timestamp", split=dict.fromkeys(ITEMS, 1 / len(ITEMS)), context=CONTEXT
            ),
        )  # fmt: skip
    log = pq.read_table(folder / "week" / "log.parquet", columns=list(CONTEXT[1:]))
    features = [f'  {{type = "category", name = "{name}", levels = {sorted(set(log[name].to_pylist()))}}},' for name in CONTEXT[1:]]
    (folder / "items.toml").write_text(
        f'name = "items"\nexploration_floor = 0.1\n[actions]\ncatalogue = {list(ITEMS)}\n'
        '[[rewards]]\nname = "click"\nlow = 0.0\nhigh = 1.0\nwindow_seconds = 3600.0\n'
        '[features]\ncontext = [\n  {type = "number", name = "position", centre = 2.0},\n' + "\n".join(features) + "\n]\n"
    )
    (folder / "propel.toml").write_text(SETTINGS)
    return read_settings(folder / "propel.toml")


def arrive(folder: Path, day: dt.date) -> None:
    """Put a day's events into the inbox."""
    number = (day - dt.date(1970, 1, 1)).days
    target = folder / "inbox" / day.isoformat()
    target.mkdir(parents=True)
    for name, time_of in (("decisions", "decided_at_ns"), ("rewards", "observed_at_ns")):
        table = pq.read_table(folder / "week" / f"{name}.parquet")
        of_day = np.asarray(table[time_of].to_numpy()) // DAY_NS == number
        pq.write_table(table.filter(pa.array(of_day)), target / f"{name}.parquet")


def kill_after(day: dt.date, settings: Settings) -> None:
    """Start a night in a process of its own, and kill it once a step is committed."""
    lake = open_lake(settings)
    command = [
        sys.executable,
        "-P",
        "-m",
        "propel",
        "nightly",
        "--date",
        day.isoformat(),
        "--config",
        str(settings.folder / "propel.toml"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 - our own command
    table = {"join": "rows", "certify": "certificates"}[KILLED_AFTER]
    while process.poll() is None and not lake.snapshot().find(table, days=[day.isoformat()]):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def lines(week: Week) -> list[str]:
    """The week in plain text: a line per night, and what the killed one still had to do."""
    text = ["  night       decisions  certificate  logging policy    best by DR less logging"]
    for mart in week.marts:
        view = point_views(mart)[0]
        point = view.point
        text.append(f"  {mart.manifest.date}  {point['decisions']:9,}  {point['verdict']:11}  {_values(view)}")
    done = [one.step for one in week.killed.steps if one.step in STEPS and not one.partitions]
    left = [one.step for one in week.killed.steps if one.step in STEPS and one.partitions]
    return [
        *text,
        "  ±: half of the 95 % interval.",
        f"  Night {week.killed_on} was killed (SIGKILL) once {KILLED_AFTER} was committed. Run again, it had",
        f"  nothing new to do for {', '.join(['ingest', *done])},",
        f"  and did {', '.join(left)}, report.",
    ]


def _values(view: PointView) -> str:
    """The logging policy's value, and what the candidate with the highest one is worth more, by the estimator that chooses."""
    known = {row["policy"]: row for row in view.headline if row["estimator"] == view.estimator and row["value"] is not None}
    logging = known.pop("logging", None)
    own = "no data" if logging is None else _give_or_take(logging)
    if not known:
        return f"{own:16}  none may be shown"
    best = max(known.values(), key=lambda row: row["value"])
    delta = next((row for row in view.differences if row["policy"] == best["policy"] and row["value"] is not None), None)
    return f"{own:16}  {best['policy'].split('-20')[0]}" + (f" {_give_or_take(delta, '+')}" if delta else " withheld")


def _give_or_take(row: Record, sign: str = "") -> str:
    return f"{row['value']:{sign}.4f} ± {(row['high'] - row['low']) / 2:.4f}"
