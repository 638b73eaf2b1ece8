"""One night: ingest, join, certify, train, evaluate, select, report, each committed before the next begins.

A step is `f(night, settings, lake, snapshot) -> partitions`; committing its partitions is the one moment at which anything changes.
So a night that was killed anywhere goes on with the step that was not committed, and a second run finds nothing to do.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ope.data import InputError
from pipelines.compare import learners_named
from pipelines.nightly.certify import certify
from pipelines.nightly.evaluate import evaluate
from pipelines.nightly.ingest import ingest
from pipelines.nightly.join import join
from pipelines.nightly.lake import Entry, Lake, Snapshot, alone, open_lake, replace_durably, slug
from pipelines.nightly.log_source import sources_of
from pipelines.nightly.report import report
from pipelines.nightly.select import select
from pipelines.nightly.settings import Night, Settings
from pipelines.nightly.sources import Source
from pipelines.nightly.train import train

Progress = Callable[[int, int], object]

Step = Callable[[Night, Settings, Lake, Snapshot, Progress], list[Entry]]

STEPS: Mapping[str, Step] = {"join": join, "certify": certify, "train": train, "evaluate": evaluate, "select": select}
"""What follows ingest, in order; the report comes last."""


@dataclass(frozen=True, slots=True)
class Done:
    """What one step did."""

    step: str
    partitions: int
    """Written; 0 where there was nothing to do."""
    rows: int
    bytes_read: int
    bytes_written: int
    seconds: float
    note: str = ""


@dataclass
class Run:
    """What a night did, for whoever looks at it later."""

    tenant: str
    date: str
    propel: str
    started: str
    steps: list[Done] = field(default_factory=list)
    snapshot: str = ""
    """Of the lake, at the end."""
    report: str = ""
    """Folder of the report."""

    def to_record(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A line per step, in plain text."""
        return [
            f"{one.step:9} {one.seconds:7.1f} s  read {one.bytes_read / 1e6:8.1f} MB, wrote {one.bytes_written / 1e6:7.1f} MB"
            + (f", {one.partitions} partitions, {one.rows:,} rows" if one.partitions else ", nothing new" * (one.step != "report"))
            + (f": {one.note}" if one.note else "")
            for one in self.steps
        ]


def nightly(
    date: dt.date | Night,
    settings: Settings,
    *,
    sources: Sequence[Source] | None = None,
    watch: Callable[[str], contextlib.AbstractContextManager[Progress]] = lambda step: contextlib.nullcontext(_quiet),
) -> Run:
    """Run a night, such as that of a date, or what is left of it. `watch` shows each step.

    `sources`: by default the folders in the inbox and the service's log.

    Raises BusyError where another night runs, InputError for input that cannot be read, damaged partitions and a full disk: what
    was committed before stays as it is.
    """
    night = date if isinstance(date, Night) else Night.of(date, settings)
    _check(night, settings)
    lake = open_lake(settings)
    run = Run(settings.tenant, night.date.isoformat(), version("propel"), dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))
    # products are small: more threads only wait for each other, and sums would end in other bits on another machine
    with alone(lake), _room(lake), threadpool_limits(1, "blas"):
        lake.sweep()
        snapshot = lake.snapshot()
        found = sources_of(settings, lake, snapshot) if sources is None else sources
        with _step(run, lake, "ingest", watch) as (advance, done):
            ingested = ingest(settings, lake, snapshot, found, advance)
            snapshot = done(
                ingested.entries,
                ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in ingested.counts.items() if n > 0),
                ingested.dropped,
            )
        for name, step in STEPS.items():
            with _step(run, lake, name, watch) as (advance, done):
                snapshot = done(step(night, settings, lake, snapshot, advance))
        with _step(run, lake, "report", watch) as (_, done):
            run.report = str(report(night, settings, lake, snapshot))
            done([])
        run.snapshot = snapshot.id
        _keep(run, settings)
    return run


def plan(night: Night, settings: Settings) -> list[str]:
    """What a night would do, in sentences, without doing any of it."""
    _check(night, settings)
    lake = open_lake(settings)
    snapshot = lake.snapshot()
    listed = lake.frame(snapshot.find("sources"), ["name"])
    known = set() if listed is None else set(listed["name"])
    waiting = [one.name for one in sources_of(settings, lake, snapshot)]
    fresh = [name for name in waiting if name not in known]
    days = night.days(settings.file.join.lookback_days)
    lines = [f"ingest: {len(fresh)} of {len(waiting)} sources are new" + (f": {', '.join(fresh)}" if fresh else "")]
    for point in settings.points:
        held = snapshot.find("decisions", point.name, days)
        rows = sum(entry.rows for entry in held)
        lines.append(
            f"join, certify: {point.name}: {rows:,} decisions of {len({entry.day for entry in held})} days in the lake so far, "
            f"{days[0]} to {days[-1]}"
        )
        lines.append(
            f"train, evaluate, select: {point.name}: {', '.join(settings.file.train.learners)} by "
            f"{', '.join(settings.file.evaluate.estimators)} over {', '.join(map(str, settings.file.evaluate.windows))} days"
        )
    return [*lines, f"report: {settings.path(settings.file.reports.folder) / slug(settings.tenant)}"]


def _check(night: Night, settings: Settings) -> None:
    """Raise InputError for a night that is not over at its cut-off, when what is still to come would count as not coming."""
    try:
        learners_named(settings.file.train.learners, np.empty(0))
    except InputError as error:
        raise InputError(f"train.learners: {error}") from None
    cutoff = dt.datetime.fromtimestamp(night.cutoff_ns / 10**9, dt.UTC)
    if cutoff > dt.datetime.now(dt.UTC):
        raise InputError(f"found {night.date}, whose night looks at {cutoff:%Y-%m-%d %H:%M} UTC; expected that to be over: wait")


@contextlib.contextmanager
def _step(
    run: Run, lake: Lake, name: str, watch: Callable[[str], contextlib.AbstractContextManager[Progress]]
) -> Iterator[tuple[Progress, Callable[..., Snapshot]]]:
    """Time a step; yields how to show progress, and how to commit what it wrote."""
    started, before = time.monotonic(), lake.bytes_read

    def done(entries: list[Entry], note: str = "", dropped: Set[tuple[str, str, str, int]] = frozenset()) -> Snapshot:
        snapshot = lake.commit(entries, lambda entry: entry.place in dropped) if entries or dropped else lake.snapshot()
        run.steps.append(
            Done(
                name, len(entries), sum(entry.rows for entry in entries), lake.bytes_read - before,
                sum(entry.bytes for entry in entries), round(time.monotonic() - started, 3), note,
            )
        )  # fmt: skip
        return snapshot

    with watch(name) as advance:
        yield advance, done


@contextlib.contextmanager
def _room(lake: Lake) -> Iterator[None]:
    """Say in plain words that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{lake.folder}: the disk is full; what was committed before stays as it is: make room and run the night again"
        ) from None


def _keep(run: Run, settings: Settings) -> None:
    """Keep what the run did beside its lake."""
    folder = open_lake(settings).folder / "runs"
    folder.mkdir(exist_ok=True)
    replace_durably(folder / f"{run.date}.json", json.dumps(run.to_record(), indent=2).encode() + b"\n")


def _quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""
