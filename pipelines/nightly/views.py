"""What page, summary and JSON show of a mart: chosen, ordered and printed here, so that all three say the same."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ope.data import InputError
from pipelines.nightly.mart import CHOICE_FOLD, HEADLINE_FOLD, SHOWN, WHOLE, Mart
from pipelines.tables import number

Record = dict[str, Any]

NEEDED = ("value", "low", "high", "interval_kind", "window")
"""Without these a number is not printed."""

_DIGEST = re.compile(r"@([0-9a-f]{8})[0-9a-f]{24,}$")

UNCERTIFIED = "uncertified rows in"


@dataclass(frozen=True, slots=True)
class PointView:
    """What is shown of one decision point."""

    point: Record
    level: float
    estimator: str
    """The one that chose the portfolio, whose numbers are the headline."""
    window: int
    """Days of the longest window."""
    baselines: set[str]
    """Policies that the others are compared with."""
    certificates: list[Record]
    """Of the date."""
    grid: dict[str, dict[str, str]]
    """Verdict by policy and day."""
    days: list[str]
    """Of the grid."""
    headline: list[Record]
    """Estimates of the first reward, all rows, longest window: fold B, then fold A."""
    others: list[Record]
    """On fold B: other rewards, shorter windows, segments."""
    differences: list[Record]
    """To the baseline, as the headline."""
    portfolio: list[Record]
    """By k."""
    shortlist: list[Record]
    """Every candidate as the portfolio at the knee decides about it, with its estimate and its difference."""
    candidates: list[Record]
    """What was learned tonight, or why not."""
    maturity: list[Record]
    """Share labelled by day and age, over all policies."""
    alarms: list[Record]

    @property
    def valued(self) -> list[Record]:
        """Estimates of the headline's estimator on the fold that values."""
        return [row for row in self.headline if row["estimator"] == self.estimator and row["fold"] == HEADLINE_FOLD]

    def difference(self, policy: str) -> Record | None:
        """Of the headline, of one policy."""
        found = (one for one in self.differences if (one["policy"], one["estimator"]) == (policy, self.estimator))
        return next((one for one in found if one["fold"] == HEADLINE_FOLD), None)

    @property
    def knee(self) -> Record | None:
        """The portfolio's row beyond which another policy adds little."""
        return next((row for row in self.portfolio if row["knee"]), None)

    @property
    def best(self) -> list[Record]:
        """The k candidates of that portfolio by rank, also those that no A/B test is suggested for."""
        return [row for row in self.shortlist if self.knee and row["rank"] and row["rank"] <= self.knee["k"]]


def point_views(mart: Mart) -> list[PointView]:
    """A view of each decision point."""
    everything = {name: mart.records(name) for name in mart.tables}
    return [_view(point, everything, mart.manifest.date) for point in everything["decision_points"]]


def _view(point: Record, tables: Mapping[str, list[Record]], date: str) -> PointView:
    dp, reward = point["dp"], point["reward"]
    mine = {name: [row for row in rows if row.get("dp", dp) == dp] for name, rows in tables.items()}
    evaluations = {row["evaluation_id"]: row for row in mine["evaluations"]}
    for name in ("estimates", "differences", "portfolio", "portfolio_policies"):
        mine[name] = [row for row in mine[name] if row["evaluation_id"] in evaluations]
    window = max((row["window"] for row in mine["estimates"]), default=0)
    baselines = {row["baseline"] for row in evaluations.values()}
    ranks = {row["policy"]: row["rank"] for row in mine["portfolio_policies"] if row["rank"] is not None}
    main = (reward, WHOLE, window)

    def place(row: Record) -> tuple[Any, ...]:
        return (
            row["metric"] != reward, row["segment"], -row["window"], row["fold"] != HEADLINE_FOLD, row["policy"] not in baselines,
            ranks.get(row["policy"], math.inf), row["policy"],
        )  # fmt: skip

    estimates, differences = sorted(mine["estimates"], key=place), sorted(mine["differences"], key=place)
    headline = [row for row in estimates if _of(row) == main and row["fold"] in (HEADLINE_FOLD, CHOICE_FOLD)]
    compared = [row for row in differences if _of(row) == main and row["fold"] == HEADLINE_FOLD]
    estimator = next((row["estimator"] for row in mine["portfolio"]), _first([row["estimator"] for row in headline]))
    days = sorted({row["day"] for row in mine["certificates"]})
    return PointView(
        point=point, level=next((row["level"] for row in evaluations.values()), 0.95), estimator=estimator, window=window,
        baselines=baselines,
        certificates=[row for row in mine["certificates"] if row["day"] == date], grid=_grid(mine["certificates"]),
        days=days, headline=headline,
        others=[row for row in estimates if _of(row) != main and row["fold"] == HEADLINE_FOLD], differences=compared,
        portfolio=mine["portfolio"], shortlist=_shortlist(mine, headline, compared), candidates=mine["candidates"],
        maturity=_matured([row for row in mine["maturity"] if row["reward"] == reward]),
        alarms=sorted(mine["alarms"], key=lambda row: (row["severity"], row["rule"])),
    )  # fmt: skip


def _of(row: Record) -> tuple[str, str, int]:
    return row["metric"], row["segment"], row["window"]


def _first(estimators: Sequence[str]) -> str:
    """Where no portfolio says which estimator counts."""
    return "DR" if "DR" in estimators else next(iter(estimators), "DR")


def _grid(certificates: Iterable[Record]) -> dict[str, dict[str, str]]:
    grid: dict[str, dict[str, str]] = {}
    for row in certificates:
        grid.setdefault(row["policy"], {})[row["day"]] = row["verdict"]
    return grid


def _shortlist(mine: Mapping[str, list[Record]], headline: Iterable[Record], differences: Iterable[Record]) -> list[Record]:
    """All candidates as the portfolio at the knee has them, with the intervals that belong to them."""
    rows = mine["portfolio_policies"]
    knee = next((row["k"] for row in mine["portfolio"] if row["knee"]), max((row["k"] for row in rows), default=0))
    values, changes = ({_place(row): row for row in found} for found in (headline, differences))
    chosen = sorted(
        (row for row in rows if row["k"] == knee), key=lambda row: (row["rank"] is None, row["rank"] or 0, row["policy"])
    )
    return [row | {"estimate": values.get(_place(row)), "change": changes.get(_place(row))} for row in chosen]


def _place(row: Record) -> tuple[str, str, str, str]:
    return row["evaluation_id"], row["estimator"], row["fold"], row["policy"]


def _matured(rows: Iterable[Record]) -> list[Record]:
    """Share labelled by day and age, policies weighted by their rows."""
    sums: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["rows"] and row["labelled"] is not None:
            total = sums.setdefault((row["day"], row["age_seconds"]), [0.0, 0.0])
            total[0] += row["rows"] * row["labelled"]
            total[1] += row["rows"]
    return [{"day": day, "age_seconds": age, "labelled": a / b} for (day, age), (a, b) in sorted(sums.items())]


def printed(row: Mapping[str, Any], *, signed: bool = False) -> tuple[str, str]:
    """A value and its interval as text; ("withheld", "") unless its verdict lets it be shown.

    The only printer of estimates and differences. Raises InputError where a number comes without what makes it readable.
    """
    if row["verdict"] not in SHOWN:
        return "withheld", ""
    needed = NEEDED if "ess" not in row else (*NEEDED, "n", "clusters", "ess")
    missing = [name for name in needed if row[name] is None or row[name] != row[name]]
    if missing:
        raise InputError(
            f"{row['estimator']} of {row['policy']}: found a value without {', '.join(missing)}; "
            "expected all that makes it readable, or a verdict that withholds it: run the night again"
        )
    width = row["high"] - row["low"]
    value, low, high = (_decimal(row[name], width, signed) for name in ("value", "low", "high"))
    return value, f"{low} to {high}"


def _decimal(value: float, width: float, signed: bool) -> str:
    """As many digits as the interval's width is worth."""
    sign = "+" if signed and value > 0 else ""
    if not 1e-8 < width < math.inf:
        return sign + number(value)
    return f"{sign}{value:z,.{max(0, 1 - math.floor(math.log10(width)))}f}"


def reasons(rows: Sequence[Record]) -> list[str]:
    """Every reason once, with the policies and estimators that it concerns."""
    everybody = {row["policy"] for row in rows}
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for reason in row["reasons"] or ():
            found.setdefault(reason, {}).setdefault(row["policy"], []).append(row["estimator"])
    return [f"{_whom(of, everybody)}: {reason}" for reason, of in found.items()]


def _whom(estimators: Mapping[str, Sequence[str]], everybody: Set[str]) -> str:
    if estimators.keys() == everybody and len({tuple(of) for of in estimators.values()}) == 1:
        return ", ".join(next(iter(estimators.values())))
    return "; ".join(f"{label(policy)} ({', '.join(of)})" for policy, of in estimators.items())


def cut(text: object, most: int = 80) -> str:
    """A name as it is shown: short, and what cannot be printed escaped."""
    plain = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def label(policy: str | None, most: int = 80) -> str:
    """A policy as it is shown: eight digits of its digest tell artifacts of one name apart."""
    return cut(_DIGEST.sub(r"@\1", policy or "-"), most)


def share(part: float | None) -> str:
    """A share in percent; a dash where it is not known."""
    return "-" if part is None or not math.isfinite(part) else f"{100 * part:.3g} %"


def chance(p: float | None) -> str:
    """A probability in percent, never as if it were sure; a dash where it is not known, or withheld."""
    return share(p) if p is None or 1e-3 <= p <= 1 - 1e-3 else "< 0.1 %" if p < 1e-3 else "> 99.9 %"


def worse(change: Mapping[str, Any]) -> str:
    """P(worse) of a difference; a dash also where policy and baseline are the same: then neither is worse."""
    return "-" if change["value"] == 0 and change["stderr"] == 0 else chance(change["p_worse"])


def duration(seconds: float) -> str:
    """A time in the largest unit that it has one of."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
