"""`propel nightly` and `propel report`: a date's night from a shell, from cron, or again on paper."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bandits.terminal import bad_input
from pipelines.terminal import AsJsonObject, progress

ATTENTION, BUSY = 3, 4
"""Exit codes: something needs a person; another night is running."""

Config = Annotated[Path, typer.Option(help="Settings file.", envvar="PROPEL_CONFIG")]
Date = Annotated[
    dt.datetime | None, typer.Option("--date", formats=["%Y-%m-%d"], help="Date of the night, UTC. Default: yesterday.")
]


def nightly(
    date: Date = None,
    config: Config = Path("propel.toml"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: AsJsonObject = False,
) -> None:
    """Run the night of a date: ingest, join, certify, train, evaluate, select, report. A killed night goes on where it was.

    Exit codes: 0 good, 2 bad input or a full disk, 3 done but something needs attention, 4 another night is running.
    """
    with bad_input():
        from pipelines.nightly.lake import BusyError
        from pipelines.nightly.mart import read_mart
        from pipelines.nightly.run import nightly as run_nightly
        from pipelines.nightly.run import plan
        from pipelines.nightly.settings import read_settings
        from pipelines.nightly.summary import lines, needs_attention, to_json

        settings = read_settings(config)
        day = _day(date)
        if dry_run:
            steps = plan(day, settings)
            typer.echo(json.dumps({"date": day.isoformat(), "plan": steps}, indent=2) if as_json else "\n".join(steps))
            return
        try:
            run = run_nightly(day, settings, watch=_watched)
        except BusyError as error:
            typer.echo(f"propel: {error}", err=True)
            raise typer.Exit(BUSY) from None
        folder = Path(run.report)
        mart = read_mart(settings.path(settings.file.reports.folder), settings.tenant, folder.name)
    if as_json:
        typer.echo(json.dumps({"run": run.to_record(), "report": to_json(mart)}, indent=2, allow_nan=False))
    else:
        typer.echo("\n".join([*run.lines(), *lines(mart), f"Report: {folder / 'report.html'}"]))
    if needs_attention(mart):
        raise typer.Exit(ATTENTION)


def report(date: Date = None, config: Config = Path("propel.toml"), as_json: AsJsonObject = False) -> None:
    """Show the report of a date again, and draw its page anew.

    Exit codes: 0 good, 2 where there is none, 3 something needs attention.
    """
    with bad_input():
        from pipelines.nightly.mart import read_mart
        from pipelines.nightly.report import PAGE, render
        from pipelines.nightly.settings import read_settings
        from pipelines.nightly.summary import needs_attention, to_json

        settings = read_settings(config)
        mart = read_mart(settings.path(settings.file.reports.folder), settings.tenant, _day(date).isoformat())
        summary = [*render(mart), f"Report: {mart.folder / PAGE}"]
    typer.echo(json.dumps(to_json(mart), indent=2, allow_nan=False) if as_json else "\n".join(summary))
    if needs_attention(mart):
        raise typer.Exit(ATTENTION)


def _day(date: dt.datetime | None) -> dt.date:
    """The date asked for, or yesterday. Raises InputError for one that nanoseconds since 1970 cannot count."""
    from ope.data import InputError

    day = dt.datetime.now(dt.UTC).date() - dt.timedelta(days=1) if date is None else date.date()
    if not 1970 <= day.year <= 2115:
        raise InputError(f"found --date {day}; expected one from 1970 to 2115")
    return day


@contextmanager
def _watched(step: str) -> Iterator[Callable[[int, int], object]]:
    with progress(step.capitalize()) as advance:
        yield advance
