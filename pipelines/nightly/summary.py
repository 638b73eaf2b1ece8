"""A night in plain text, for a terminal and for cron's mail, and as JSON. No markup: names are printed as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec

from pipelines.nightly.mart import Mart
from pipelines.nightly.views import UNCERTIFIED, PointView, Record, chance, cut, label, point_views, printed, worse
from pipelines.tables import number

MOST_POLICIES, MOST_REASONS, MOST_ALARMS = 5, 2, 3
"""Lines of a block; what is left out is counted."""


def lines(mart: Mart) -> list[str]:
    """The summary: a line about the night, then a block of at most 17 lines for each decision point."""
    made = mart.manifest
    through = f"data through {made.data_through} UTC" if made.data_through else "no data"
    text = [f"Night of {made.date}, tenant {made.tenant}: {through}. Reports: {made.snapshot_id}."]
    for view in point_views(mart):
        text += ["", *_block(view)]
    text += [f"{_severity(row)} {row['rule']}: {row['text']} {row['evidence']}" for row in _elsewhere(mart)]
    return [cut(line, 240) for line in text]


def needs_attention(mart: Mart) -> bool:
    """Whether somebody should look today: an alarm, not only a caution, is open."""
    return any(row["severity"] == "alarm" for row in mart.records("alarms"))


def to_json(mart: Mart) -> dict[str, Any]:
    """The summary's numbers, and those behind them, ready for JSON: what is refused or not finite is None."""
    made = msgspec.to_builtins(mart.manifest)
    found: dict[str, Any] = {name: made[name] for name in made if name != "tables"}
    found["needs_attention"] = needs_attention(mart)
    found["decision_points"] = [
        view.point
        | {
            "estimator": view.estimator, "window_days": view.window, "level": view.level, "certificates": view.certificates,
            "candidates": view.candidates, "estimates": view.headline, "differences": view.differences,
            "portfolio": view.portfolio, "shortlist": view.shortlist,
        }
        for view in point_views(mart)
    ]  # fmt: skip
    for name in ("alarms", "revisions"):
        found[name] = mart.records(name)
    finite: dict[str, Any] = _finite(found)
    return finite


def _block(view: PointView) -> Iterator[str]:
    point = view.point
    policy = f"{point['step']}: {label(point['live_policy'])}" if point["step"] else "no policy"
    yield f"{cut(point['dp'])}: {point['decisions'] or 0:,} decisions, {policy}"
    share = "nothing to certify" if point["certified"] is None else f"{point['certified']:.0%} of the last 7 days' rows certified"
    yield f"  certificate: {point['verdict']}; {share}"
    doubted = [row for row in view.certificates if row["verdict"] != "pass"]
    said = [f"    {label(row['policy'], 40)}: {reason}" for row in doubted for reason in row["reasons"] or ()]
    yield from _first(said, MOST_REASONS)
    yield from _values(view)
    yield from _portfolio(view)
    yield from _first([f"  {_severity(row)} {row['rule']}: {row['evidence']}" for row in view.alarms], MOST_ALARMS)
    yield f"  next: {point['next_action']}"


def _values(view: PointView) -> Iterator[str]:
    rows = view.valued
    if not rows:
        yield "  no estimate"
        return
    kinds = ", ".join(sorted({row["interval_kind"] for row in rows if row["interval_kind"]})) or "no"
    yield (
        f"  {cut(view.point['reward'], 40)} per decision, {view.estimator}, {view.window} days, "
        f"units that neither taught nor chose ({100 * view.level:g} % {kinds} interval):"
    )
    yield from _first([f"    {_value(view, row)}" for row in rows], MOST_POLICIES)


def _value(view: PointView, row: Record) -> str:
    value, interval = printed(row)
    doubt = _doubt(row)
    if not interval:
        return f"{label(row['policy'], 40)}: {row['verdict']}{doubt}: {' '.join(row['reasons'] or ())}"
    text = f"{label(row['policy'], 40)}: {value} ({interval})"
    if (change := view.difference(row["policy"])) is not None:
        by, ends = printed(change, signed=True)
        p = worse(change)
        text += f"; difference {by} ({ends})" if ends else f"; difference {change['verdict']}"
        text += f", P(worse) {p}" if ends and p != "-" else ""
    return f"{text}; {row['n']:,} rows, {row['clusters']:,} units, ESS {row['ess']:,.0f}; {row['verdict']}{doubt}"


def _portfolio(view: PointView) -> Iterator[str]:
    knee = view.knee
    if knee is None:
        whys = [f"{label(row['policy'], 40)}: {row['reason']}" for row in view.shortlist if row["reason"]]
        if whys:
            yield f"  portfolio (not graded here): none. {' '.join(whys[:MOST_REASONS])}"
        return
    names = ", ".join(
        label(row["policy"], 40) + ("" if row["decision"] == "test" else f" ({row['decision']})") for row in view.best
    )
    doubt = _doubt(knee)
    what = (
        "numbers withheld, since one of them is refused"
        if knee["gain"] is None
        else f"expected gain {number(knee['gain'])}, spread {number(knee['std'])}, P(any harm) {chance(knee['p_any_harm'])}"
    )
    yield f"  portfolio, k = {knee['k']} ({knee['graded'] or 'not graded here'}): {what}{doubt}: {names}"


def _doubt(row: Record) -> str:
    return "" if row["certified"] else f" [{UNCERTIFIED}]"


def _first(text: list[str], most: int) -> list[str]:
    return text if len(text) <= most else [*text[:most], f"    and {len(text) - most} more"]


def _severity(row: Record) -> str:
    return "ALARM" if row["severity"] == "alarm" else "caution"


def _elsewhere(mart: Mart) -> list[Record]:
    """Alarms of no decision point of the settings."""
    known = {row["dp"] for row in mart.records("decision_points")}
    return [row for row in mart.records("alarms") if row["dp"] not in known]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
