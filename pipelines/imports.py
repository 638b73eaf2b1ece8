"""Logs of other systems to a folder of events: what `propel import` runs."""

from __future__ import annotations

import gzip
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

from rich.console import Console
from rich.markup import escape

from ope.data import InputError
from pipelines.importers.dsjson import BOM, read_dsjson
from pipelines.importers.events import ImportReport, Naming, Outcome, Problem, Row
from pipelines.importers.exposures import Exposures, header, read_exposures
from pipelines.importers.open_bandit import csv_of, read_open_bandit
from pipelines.importers.writer import EventWriter

Format: TypeAlias = Literal["dsjson", "open-bandit", "exposures"]

PEEK = 2**16
"""Bytes of a file that are looked at to find out its format."""

ELIGIBLE_MISSING = {
    "open-bandit": "The eligible sets were not logged: all items of the campaign count as eligible.",
    "exposures": "The eligible sets were not logged: all actions count as eligible in every row.",
}


def import_log(
    source: Path,
    folder: Path,
    naming: Naming,
    *,
    kind: Format | None = None,
    exposures: Callable[[], Exposures] | None = None,
    pass_in_label: bool = False,
    estimated: bool = False,
    progress: Callable[[int], object] | None = None,
) -> ImportReport:
    """Read a source, write what can be used into a new folder, and report what came through, what did not, and what is missing.

    `kind`: by default found out from the source. `estimated`: propensities were estimated, not logged; the log says so, and
    verdicts on it are at most `caution`. No folder appears where nothing could be imported: `report.decisions` is then 0.
    Raises InputError where the source cannot be read at all, or the folder is not new.
    """
    if not source.exists():
        raise InputError(f"{source}: found no such file; expected a log: check the path")
    kind = kind or kind_of(source)
    report = ImportReport(str(source), kind)
    items: Iterator[Row | Outcome | Problem]
    if exposures is not None and kind != "exposures":
        raise InputError(f"{source}: found options of an exposure table for {kind}; expected none: or give --format exposures")
    if kind == "dsjson":
        items = read_dsjson(source, naming, pass_in_label=pass_in_label, progress=progress)
    elif kind == "open-bandit":
        items = read_open_bandit(source)
        estimated = estimated or csv_of(source).parent.parent.name == "bts"  # the publisher estimated them by simulation
    else:
        items = read_exposures(source, Exposures() if exposures is None else exposures())
    if estimated:
        report.missing["propensities"] = "The propensities were estimated, not logged: verdicts on this log are at most caution."
    if kind in ELIGIBLE_MISSING:
        report.missing["eligible sets"] = ELIGIBLE_MISSING[kind]
    with EventWriter(folder, naming, report, estimated=estimated) as writer:
        for item in items:
            report.lines = max(report.lines, item.line)
            writer.add(item)
    return report


def kind_of(source: Path) -> Format:
    """The format of a source, by what is in it. Raises InputError where nothing tells."""
    if source.is_dir():
        csv_of(source)
        return "open-bandit"
    name = source.name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".parquet")):
        there = header(source) if name.endswith(".csv") else []
        return "open-bandit" if {"item_id", "propensity_score", "click"} <= set(there) else "exposures"
    if any(line.lstrip().startswith(b"{") for line in _first_lines(source)):  # the first ones may be broken
        return "dsjson"
    raise InputError(f"{source}: found neither JSON lines, nor a name that ends in .csv or .parquet; expected one: give --format")


def _first_lines(source: Path) -> list[bytes]:
    """What can be read of the beginning of a file, gzip or not."""
    text = b""
    broken = suppress(EOFError, zlib.error, gzip.BadGzipFile)  # where it breaks is told, with the line's number, on import
    with broken, gzip.open(source) if source.suffix == ".gz" else source.open("rb") as stream:
        while len(text) < PEEK and (more := stream.read(1024)):
            text += more
    return text.removeprefix(BOM).splitlines()


def print_import(console: Console, report: ImportReport, folder: Path) -> None:
    """What came through, what did not with its lines, what is missing, and what to do next."""

    def say(text: str, style: str = "") -> None:
        console.print(escape(text), style=style, highlight=False, soft_wrap=True)

    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(report.kinds.items()))
    say(f"{report.source} ({report.format})")
    say(f"{report.decisions:,} decisions{f' ({kinds})' if kinds else ''} of {report.actions:,} actions, {report.rewards:,} rewards")
    for kind, found in sorted(report.problems.items(), key=lambda item: -item[1].count):
        lines = ", ".join([*map(str, found.lines), *(["..."] if found.count > len(found.lines) else [])])
        say(f"- {found.count:,} not imported ({kind}): line{'s' if found.count > 1 else ''} {lines}", "yellow")
        say(f"  {found.first}", "dim")
    if report.observations:
        here = f"of these, {report.late:,} have it in this source"
        say(f"- Rewards that came without their decision: {report.observations:,}; {here}.")
    for sentence in (*report.missing.values(), *report.notes):
        say(f"- {sentence}")
    if not report.files:
        say("Nothing could be imported; no folder was made.", "red")
        return
    say(f"{', '.join(report.files)} in {folder}")
    if report.rows:
        words = ["propel", "ope", "--log", str(folder / "log.parquet"), "--policy", "uniform"]
        context = ["--context", ",".join(report.usable)] if report.usable else []
        say(f"{report.rows:,} rows can be evaluated: {shlex.join([*words, *context])}", "bold")
    else:
        say("No row can be evaluated: that takes a decision that was sampled, and its reward.", "yellow")
