"""The last step of the night: its tables become the reports mart, and a page that is one file.

The page is made of the mart alone, so that `propel report` draws it again at any time.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from bandits.decision_point import DecisionPoint
from bandits.registry import Registry
from ope.selection import Shortlist
from pipelines import charts, tables
from pipelines.nightly import summary
from pipelines.nightly.alarms import Day, Facts, alarms, most_common
from pipelines.nightly.intake import intake_alarms
from pipelines.nightly.lake import Lake, Snapshot
from pipelines.nightly.mart import CHOICE_FOLD, HEADLINE_FOLD, SHOWN, WHOLE, Mart, Meta, read_mart, write_mart
from pipelines.nightly.rows import within
from pipelines.nightly.settings import Night, Settings
from pipelines.nightly.tables import TABLES
from pipelines.nightly.views import (
    UNCERTIFIED,
    PointView,
    chance,
    cut,
    duration,
    label,
    point_views,
    printed,
    reasons,
    share,
    worse,
)
from pipelines.report import TEMPLATES, write_whole

PAGE = "report.html"

OF_DAYS = ("certificates", "calibration", "maturity", "support")
OF_NIGHT = ("candidates", "evaluations", "estimates", "differences", "portfolio", "portfolio_policies")

MOST_OTHERS = 400
"""Rows of the page's long table; the mart has them all."""

Record = dict[str, Any]

_OF_ROW = re.compile(r"^row \d+, ")


def report(night: Night, settings: Settings, lake: Lake, snapshot: Snapshot) -> Path:
    """Collect a night's tables into the mart and draw its page; the mart's folder. Safe to run twice.

    Raises InputError (LakeError) where a partition was altered, or where the disk does not take the tables.
    """
    days, date = night.days(settings.file.join.lookback_days), night.date.isoformat()
    found = {name: _collected(lake, snapshot, name, settings, days) for name in OF_DAYS}
    found |= {name: _collected(lake, snapshot, name, settings, [date]) for name in OF_NIGHT}
    points, open_alarms = [], list(intake_alarms(settings, lake, snapshot, days, found["certificates"].to_pylist()))
    for point in settings.points:
        decided = _decided(lake, snapshot, point.name, date, night.between)
        rows = _rows(lake, snapshot, point.name, days, night.between)
        facts = _facts(point, found, rows, days, frozenset(decided), _unreadable(lake, snapshot, point.name, date))
        points.append(_point_record(settings, point, facts, found, decided))
        open_alarms += alarms(facts)
    found["decision_points"] = TABLES["decision_points"].of(points)
    found["alarms"] = TABLES["alarms"].of(open_alarms)
    found["revisions"] = TABLES["revisions"].of(_revisions(settings, snapshot, days))
    came = [*snapshot.find("rows"), *snapshot.find("unreadable")]
    through = [entry.day for entry in came if entry.rows and entry.day <= date]
    meta = Meta(
        date=date, data_through=max(through, default=None), built_at=dt.datetime.now(dt.UTC).isoformat(timespec="microseconds"),
        code=version("propel"), lake_snapshot=snapshot.id,
    )  # fmt: skip
    folder = write_mart(settings.path(settings.file.reports.folder), settings.tenant, found, meta)
    render(read_mart(folder.parent.parent, settings.tenant, folder.name))
    return folder


def render(mart: Mart) -> list[str]:
    """Write report.html beside a mart's tables, whole or not at all; the summary in plain text."""
    write_whole(mart.folder / PAGE, page(mart))
    return summary.lines(mart)


def page(mart: Mart) -> str:
    """The page of a mart: inline charts, no scripts, nothing that is loaded."""
    made, views = mart.manifest, point_views(mart)
    late = None
    if made.data_through is not None:
        late = (dt.date.fromisoformat(made.date) - dt.date.fromisoformat(made.data_through)).days
    return TEMPLATES.get_template("night.html.j2").render(
        mart=made, late=late, built=dt.datetime.fromisoformat(made.built_at).strftime("%Y-%m-%d %H:%M"),
        views=list(zip(views, _charts(views), strict=True)), revisions=mart.records("revisions"),
        alarms=mart.records("alarms"), printed=printed, reasons=reasons, cut=cut, label=label, chance=chance,
        worse=worse, share=share, duration=duration, uncertified=UNCERTIFIED, number=tables.number,
        most=MOST_OTHERS, shapes=SHAPES, choice_fold=CHOICE_FOLD, headline_fold=HEADLINE_FOLD,
    )  # fmt: skip


SHAPES = {
    "pass": "●", "trust": "●", "warn": "▲", "caution": "▲", "fail": "✕", "refused": "✕", "alarm": "✕", "missing": "✕",
    "no rows": "○",
}  # fmt: skip
"""What stands beside a word, so that nobody needs colour."""


CHARTS = ("forest", "maturity", "portfolio")


def _charts(views: Sequence[PointView]) -> list[dict[str, str]]:
    """SVG of each decision point's charts by name; no text where there is nothing to draw."""
    svgs = charts.drawn({f"{i} {name}": spec for i, view in enumerate(views) for name, spec in _specs(view).items()})
    return [{name: svgs.get(f"{i} {name}", "") for name in CHARTS} for i in range(len(views))]


def _specs(view: PointView) -> dict[str, charts.Spec]:
    """What there is to draw."""
    drawn: dict[str, charts.Spec] = {}
    rows = [row for row in view.headline if row["fold"] == HEADLINE_FOLD]
    if any(row["verdict"] in SHOWN for row in rows):
        base = next((row["value"] for row in view.valued if row["policy"] in view.baselines), None)
        drawn["forest"] = charts.night_forest(_marks(rows), f"{cut(view.point['reward'], 40)} per decision", base)
    if view.maturity:
        drawn["maturity"] = charts.maturity(view.maturity)
    described = [row for row in view.portfolio if row["gain"] is not None]
    if len(described) > 1:
        shortlists = [Shortlist(row["k"], (), row["gain"], row["std"], row["p_any_harm"], row["violation"]) for row in described]
        drawn["portfolio"] = charts.portfolio(shortlists, next((row["k"] for row in described if row["knee"]), 0))
    return drawn


def _marks(rows: Sequence[Record]) -> list[Record]:
    """Rows of the forest: names short and still distinct, anything but a number that may be shown is a word."""
    short: dict[str, str] = {}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        name = label(policy, 30)
        short[policy] = name if name not in short.values() else f"{name} ({len(short) + 1})"
    return [
        {name: row[name] for name in ("estimator", "value", "low", "high")}
        | {
            "policy": short[row["policy"]], "certified": bool(row["certified"]),
            "verdict": row["verdict"] if row["verdict"] in SHOWN else "refused",
        }
        for row in rows
    ]  # fmt: skip


def _collected(lake: Lake, snapshot: Snapshot, table: str, settings: Settings, days: Sequence[str]) -> pa.Table:
    """Rows that the settings' decision points have in a table on some days; none where nobody wrote any."""
    found = [lake.read(entry) for point in settings.points for entry in snapshot.find(table, point.name, days)]
    return pa.concat_tables([TABLES[table].schema.empty_table(), *found], promote_options="default")


def _decided(lake: Lake, snapshot: Snapshot, dp: str, date: str, between: tuple[int, int] | None) -> Counter[str]:
    """Rows that each policy decided on the date, or in the stretch of time."""
    found: Counter[str] = Counter()
    for entry in snapshot.find("rows", dp, [date]):
        found.update(within(lake.read(entry, ["policy", "decided_at_ns"]), between)["policy"].to_pylist())
    return found


def _rows(lake: Lake, snapshot: Snapshot, dp: str, days: Sequence[str], between: tuple[int, int] | None) -> Counter[str]:
    """Rows by day, or those in the stretch of time."""
    found: Counter[str] = Counter()
    for entry in snapshot.find("rows", dp, days):
        found[entry.day] += entry.rows if between is None else within(lake.read(entry, ["decided_at_ns"]), between).num_rows
    return found


def _unreadable(lake: Lake, snapshot: Snapshot, dp: str, date: str) -> Counter[str]:
    """Decisions of the date that cannot be read, by what is wrong with them, whichever their row."""
    found: Counter[str] = Counter()
    for entry in snapshot.find("unreadable", dp, [date]):
        found.update(_OF_ROW.sub("", reason).rstrip(".") for reason in lake.read(entry, ["reason"])["reason"].to_pylist())
    return found


def _facts(
    point: DecisionPoint,
    found: Mapping[str, pa.Table],
    rows: Mapping[str, int],
    days: Sequence[str],
    decided: frozenset[str],
    unreadable: Counter[str],
) -> Facts:
    certificates: dict[str, list[Record]] = {}
    for one in _mine(found["certificates"], point.name):
        certificates.setdefault(one["day"], []).append(one)
    return Facts(
        dp=point.name,
        days=tuple(
            Day(day, rows[day], decided if day == days[-1] else frozenset(), tuple(certificates.get(day, ()))) for day in days
        ),
        window_seconds=point.rewards[0].window_seconds,
        estimates=tuple(_headlines(found, point)),
        unreadable=unreadable,
    )


def _headlines(found: Mapping[str, pa.Table], point: DecisionPoint) -> list[Record]:
    """Estimates of the candidates: of the first reward, over all rows of the longest window, on the fold that values."""
    baseline = {row["evaluation_id"]: row["baseline"] for row in _mine(found["evaluations"], point.name)}
    rows = [
        row
        for row in found["estimates"].to_pylist()
        if row["evaluation_id"] in baseline and row["policy"] != baseline[row["evaluation_id"]]
        and (row["metric"], row["segment"], row["fold"]) == (point.rewards[0].name, WHOLE, HEADLINE_FOLD)
    ]  # fmt: skip
    return [row for row in rows if row["window"] == max(one["window"] for one in rows)]


def _point_record(
    settings: Settings, point: DecisionPoint, facts: Facts, found: Mapping[str, pa.Table], decided: Counter[str]
) -> Record:
    rule, rows = point.rewards[0], sum(day.rows for day in facts.recent)
    live = _live(settings, point.name)
    logged = min(decided, key=lambda policy: (-decided[policy], policy), default=None)
    return {
        "dp": point.name, "live_policy": live or logged, "step": "live" if live else "logged" if logged else None,
        "reward": rule.name, "version": rule.version, "window_seconds": rule.window_seconds, "unit": "unit",
        "direction": "higher", "decisions": facts.today.rows,
        "certified": sum(day.certified for day in facts.recent) / rows if rows else None, "verdict": facts.today.verdict,
        "next_action": _next_action(facts, found),
    }  # fmt: skip


def _live(settings: Settings, dp: str) -> str | None:
    """name@digest of what the registry serves; None where there is no registry yet, or nothing was promoted."""
    folder = settings.path(settings.file.registry.folder)
    if not (folder / "control.sqlite").exists():  # opening a registry would make one
        return None
    registry = Registry(folder)
    digest = registry.pointer(dp).digest
    return None if digest is None else f"{registry.manifest(digest).name}@{digest[:32]}"


def _next_action(facts: Facts, found: Mapping[str, pa.Table]) -> str:
    """The first thing that stands in the way, or what tonight's numbers are good for."""
    if facts.unreadable and not facts.today.rows:
        return f"Mend the features of the decision point: {most_common(facts.unreadable)[0]}."
    if facts.today.verdict in ("fail", "missing", "no rows"):
        return {
            "fail": "Find out why the certificate failed; until then, by default, these rows are left out.",
            "missing": "Run the night again: rows have no certificate.",
            "no rows": "Find out why no decision arrived.",
        }[facts.today.verdict]
    if not facts.estimates:
        whys = [f"{row['learner']}: {row['reason']}" for row in _mine(found["candidates"], facts.dp) if row["reason"]]
        return f"Wait for more mature rows; nothing was valued yet. {whys[0] if whys else ''}".rstrip()
    if not any(row["verdict"] in SHOWN for row in facts.estimates):
        return "Explore more, or learn policies closer to the one that logs: no candidate can be valued on this log."
    ids = {row["evaluation_id"] for row in _mine(found["evaluations"], facts.dp)}
    knees = {(row["evaluation_id"], row["k"]) for row in found["portfolio"].to_pylist() if row["knee"]}
    names = [
        row["policy"]
        for row in sorted(found["portfolio_policies"].to_pylist(), key=lambda row: row["rank"] or 0)
        if row["evaluation_id"] in ids and (row["evaluation_id"], row["k"]) in knees and row["decision"] == "test"
    ]
    return f"Consider an A/B test of {', '.join(map(label, names))}." if names else "No candidate is worth an A/B test tonight."


def _revisions(settings: Settings, snapshot: Snapshot, days: Sequence[str]) -> list[Record]:
    """Days whose joined rows were written again, and why."""
    found = []
    for point in settings.points:
        for day in days:
            written = {name: snapshot.find(name, point.name, [day]) for name in ("rows", "rewards", "decisions")}
            revision = {name: max((entry.revision for entry in entries), default=1) for name, entries in written.items()}
            if revision["rows"] > 1:
                came = [name for name in ("decisions", "rewards") if revision[name] > 1]
                found.append({
                    "dp": point.name, "day": day, "revision": revision["rows"], "snapshot": snapshot.id,
                    "rows": sum(entry.rows for entry in written["rows"]),
                    "reason": f"{' and '.join(came).capitalize()} arrived after the rows were first written." if came
                    else "Rewards matured, or settings changed, after the rows were first written.",
                })  # fmt: skip
    return found


def _mine(table: pa.Table, dp: str) -> list[Record]:
    return [row for row in table.to_pylist() if row["dp"] == dp]
