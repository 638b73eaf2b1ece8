"""`propel nightly` and `propel report`: a date's night from a shell, from cron, or again on paper."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bandits.terminal import bad_input
from pipelines.terminal import AsJsonObject, progress

if TYPE_CHECKING:
    from pipelines.nightly.settings import Night, Settings

ATTENTION, BUSY = 3, 4
"""Exit codes: something needs a person; another night is running."""

Config = Annotated[Path, typer.Option(help="Settings file.", envvar="PROPEL_CONFIG")]
Date = Annotated[
    dt.datetime | None, typer.Option("--date", formats=["%Y-%m-%d"], help="Date of the night, UTC. Default: yesterday.")
]

MOMENTS = ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%dT%H:%M:%S.%fZ"]
Moment = Annotated[
    dt.datetime | None,
    typer.Option("--from", formats=MOMENTS, metavar="TIME", help="Instead of a date: decisions from this moment on, UTC ..."),
]
Until = Annotated[
    dt.datetime | None,
    typer.Option("--to", formats=MOMENTS, metavar="TIME", help="... and before this one, UTC, which is when it looks."),
]


def nightly(
    date: Date = None,
    since: Moment = None,
    until: Until = None,
    config: Config = Path("propel.toml"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: AsJsonObject = False,
) -> None:
    """Run the night of a date: ingest, join, certify, train, evaluate, select, report. A killed night goes on where it was.

    With --from and --to it is a stretch of time instead, which may be shorter than a day.

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
        night = _night(date, since, until, settings)
        if dry_run:
            steps = plan(night, settings)
            typer.echo(json.dumps({"date": night.date.isoformat(), "plan": steps}, indent=2) if as_json else "\n".join(steps))
            return
        try:
            run = run_nightly(night, settings, watch=_watched)
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


def promote(
    date: Date = None,
    report_id: Annotated[
        str | None, typer.Option("--report", help="A report by its id, as its folder is called. Default: the date's newest.")
    ] = None,
    point: Annotated[str | None, typer.Option(help="One decision point. Default: each.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be promoted, and promote nothing.")] = False,
    config: Config = Path("propel.toml"),
    as_json: AsJsonObject = False,
) -> None:
    """Serve a night's winner, if its certificates pass and the lower bound of its difference on fold B is above the tolerance.

    A running service takes it within seconds. Exit codes: 0 all are served, 2 bad input, 3 a guard rail said no somewhere.
    """
    with bad_input():
        from dataclasses import asdict

        from ope.data import InputError
        from pipelines.nightly.mart import read_mart
        from pipelines.nightly.promote import promote as promote_winners
        from pipelines.nightly.settings import read_settings

        settings = read_settings(config)
        if point is not None and settings.point(point) is None:
            names = ", ".join(one.name for one in settings.points)
            raise InputError(f"found --point {point!r}; expected a decision point of the settings: {names}")
        mart = read_mart(settings.path(settings.file.reports.folder), settings.tenant, report_id or _day(date).isoformat())
        found = promote_winners(mart, settings, point=point, dry_run=dry_run)
    if as_json:
        told = [asdict(one) | {"report": mart.manifest.snapshot_id} for one in found]
        typer.echo(json.dumps(told, indent=2, default=str))
    else:
        typer.echo("\n".join(one.line for one in found))
    if not all(one.promoted for one in found):
        raise typer.Exit(ATTENTION)


def _night(date: dt.datetime | None, since: dt.datetime | None, until: dt.datetime | None, settings: Settings) -> Night:
    """The night asked for. Raises InputError for half of a stretch of time, or one beside a date."""
    from ope.data import InputError
    from pipelines.nightly.settings import Night

    if since is None and until is None:
        return Night.of(_day(date), settings)
    if since is None or until is None or date is not None:
        raise InputError("found one of --from and --to without the other, or --date beside them; expected both, or a date alone")
    return Night.cut(since.replace(tzinfo=dt.UTC), until.replace(tzinfo=dt.UTC), settings)


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
