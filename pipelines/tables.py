"""Estimates as tables for a terminal. Numbers that were refused are not printed unless forced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ope import Estimate, Report
from ope.selection import Selection
from ope.sensitivity import Bounds

STYLES = {"trust": "green", "caution": "yellow", "refused": "red"}


def print_report(console: Console, title: str, report: Report, *, force: bool = False) -> None:
    """One report as a table, then every reason once."""
    print_reports(console, title, {"": report}, force=force)


def print_reports(
    console: Console, title: str, reports: Mapping[str, Report], *, force: bool = False, reasons_of: Sequence[str] | None = None
) -> None:
    """Reports of several policies in one table, then every reason once, with the policies that it concerns.

    `reasons_of`: the estimators whose reasons are printed, where those of all would be too many to read.
    """
    first = next(iter(reports.values())).estimates[0]
    console.print(f"[bold]{escape(title)}[/]", highlight=False)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("estimator", no_wrap=True)
    for heading in ("value", "stderr", f"{100 * first.level:g} % {first.interval}", "ESS"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for policy, report in reports.items():
        if policy:
            table.add_row(f"[bold]{escape(policy)}[/]")
        for estimate in report.estimates:
            table.add_row(*_cells(estimate, force))
    console.print(table)
    for line in reasons(reports, reasons_of):
        console.print(f"- {escape(line)}", highlight=False)
    for line in notes(reports):
        console.print(f"  {escape(line)}", highlight=False, style="dim")


def print_selection(console: Console, found: Selection) -> None:
    """Shortlists of every size, and what was left out and why."""
    for word, whom in (("blocked", found.blocked), ("doubtful", found.doubtful)):
        for label, why in whom.items():
            console.print(f"  {word}: {escape(label)}: {' '.join(why)}", highlight=False)
    for label, (twin, distance) in found.duplicates.items():
        console.print(f"  left out: {escape(label)} is {escape(twin)} but for {distance:.1%} of what it does", highlight=False)
    for s in found.shortlists:
        mark = "  <- knee" if s.k == found.knee else ""
        console.print(
            f"  k = {s.k}: gain {number(s.gain)}, spread {number(s.std)}, P(any harm) {s.p_any_harm:.0%}: "
            f"{escape(', '.join(s.candidates))}{mark}",
            highlight=False,
        )
    if not found.shortlists:
        console.print("  no shortlist: fewer than two candidates are left", highlight=False)


def print_bounds(console: Console, bounds: Sequence[Bounds]) -> None:
    """Bounds as a table, and what they leave out."""
    table = Table(box=None, pad_edge=False)
    for heading in ("wrong by", "lowest value", "highest value"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in bounds:
        table.add_row(f"{one.gamma:g}", number(one.low), number(one.high))
    console.print(table)
    console.print(
        "Values that are possible if the odds of every propensity are wrong by at most this factor. Sampling error comes on top.",
        style="dim",
    )


def reasons(reports: Mapping[str, Report], of: Sequence[str] | None = None) -> list[str]:
    """Every reason against an estimate (of these estimators), once, with the policies and estimators it concerns."""
    return _once(reports, lambda estimate: estimate.reasons if of is None or estimate.estimator in of else ())


def notes(reports: Mapping[str, Report]) -> list[str]:
    """Every note on how an estimate was made, once, with the policies and estimators it concerns."""
    return _once(reports, lambda estimate: estimate.notes)


def _once(reports: Mapping[str, Report], lines: Callable[[Estimate], Sequence[str]]) -> list[str]:
    found: dict[str, dict[str, list[str]]] = {}
    for policy, report in reports.items():
        for estimate in report.estimates:
            for line in lines(estimate):
                found.setdefault(line, {}).setdefault(policy, []).append(estimate.estimator)
    return [f"{_whom(reports, by_policy)}{line}" for line, by_policy in found.items()]


def number(value: float) -> str:
    """Three significant digits, without an exponent where people can do without."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    magnitude = math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, 2 - magnitude)}f}" if -5 <= magnitude < 9 else f"{value:.3g}"


def _cells(estimate: Estimate, force: bool) -> Iterable[str]:
    shown = force or estimate.verdict != "refused"
    yield estimate.estimator
    yield number(estimate.value) if shown else "-"
    yield f"{estimate.stderr:.2g}" if shown else "-"
    yield f"{number(estimate.low)} to {number(estimate.high)}" if shown else "withheld"
    yield f"{estimate.ess:,.0f}"
    yield f"[{STYLES[estimate.verdict]}]{estimate.verdict}[/]"


def _whom(reports: Mapping[str, Report], by_policy: Mapping[str, list[str]]) -> str:
    """Whom a reason concerns: nothing to add where it is everybody."""
    sets = {tuple(names) for names in by_policy.values()}
    if len(by_policy) == len(reports) and len(sets) == 1:  # the same estimators of every policy
        (names,) = sets
        return "" if len(names) == len(next(iter(reports.values()))) else f"{', '.join(names)}: "
    parts = [
        policy if len(names) == len(reports[policy]) else f"{policy} ({', '.join(names)})" for policy, names in by_policy.items()
    ]
    return f"{'; '.join(parts)}: "
