"""Alarms of a night, from what its tables show: what is wrong, since when, how badly.

Severity `alarm`: a certificate fails or is missing, nothing arrives, or nothing can be used. All else is `caution`: how often a
certificate fails by chance is set, how often one of its figures looks odd is not.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from pipelines.nightly.lake import key_of
from pipelines.nightly.mart import SHOWN
from pipelines.nightly.views import duration, label

Record = Mapping[str, Any]
Severity = Literal["alarm", "caution"]

RECENT_DAYS = 7
"""Days up to the date of whose rows some must be certified."""


GRAVE = 0.01
"""Share of records above which a fault in them is an alarm."""

MOST_KINDS = 3
"""Kinds of faults that evidence names; the others are counted."""


@dataclass(frozen=True, slots=True)
class Day:
    """A decision point's day."""

    day: str
    rows: int
    """Joined rows of the lake."""
    policies: frozenset[str]
    """That must have a certificate; empty where only their rows were counted."""
    certificates: tuple[Record, ...]

    @property
    def certified(self) -> int:
        """Rows of policies whose certificate did not fail."""
        return min(self.rows, sum(one["rows"] or 0 for one in self.certificates if one["verdict"] != "fail"))

    @property
    def missing(self) -> bool:
        """Whether rows lack a certificate."""
        return self.rows > 0 and (not self.certificates or bool(self.policies - {one["policy"] for one in self.certificates}))

    @property
    def verdict(self) -> str:
        """The worst of its certificates: `fail`, `missing`, `warn`, `pass`; `no rows` where nothing was decided."""
        found = {one["verdict"] for one in self.certificates} | ({"missing"} if self.missing else set())
        worst = next((word for word in ("fail", "missing", "warn", "pass") if word in found), "no rows")
        return worst if self.rows else "no rows"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a night knows of one decision point."""

    dp: str
    days: tuple[Day, ...]
    """Oldest first, the last of them the date's."""
    window_seconds: float
    """Of the first reward."""
    estimates: tuple[Record, ...]
    """Of the candidates' first reward."""
    unreadable: Counter[str]
    """Decisions of the date whose features do not fit the decision point, by what is wrong with them."""

    @property
    def today(self) -> Day:
        """The date."""
        return self.days[-1]

    @property
    def recent(self) -> tuple[Day, ...]:
        """The last days up to the date."""
        return self.days[-RECENT_DAYS:]


class _Rule(NamedTuple):
    """A rule on certificates: it holds on a day for the policies whose certificate it names."""

    name: str
    severity: Severity
    holds: Callable[[Record], bool]
    text: str
    evidence: Callable[[Record], str]


def _outside(one: Record) -> bool:
    rate, low, high = one["join_rate"], one["join_low"], one["join_high"]
    return None not in (rate, low, high) and not low <= rate <= high


def _why(one: Record) -> str:
    return " ".join(one["reasons"] or ["No reason was written."])


_RULES = (
    _Rule("certificate failed", "alarm", lambda one: one["verdict"] == "fail",
          "The logging certificate failed; rows of this policy and day are not certified.", _why),
    _Rule("certificate warned", "caution", lambda one: one["verdict"] == "warn", "The logging certificate has warnings.", _why),
    _Rule("gaps", "caution", lambda one: bool(one["gaps"]), "Numbered records are missing: decisions were lost.",
          lambda one: f"{one['gaps']:,} numbers are missing."),
    _Rule("join rate", "caution", _outside, "The join rate is unusual: if it is low, rewards are missing, not zero.",
          lambda one: f"Join rate {one['join_rate']:.1%}, usual {one['join_low']:.1%} to {one['join_high']:.1%}."),
)  # fmt: skip


def alarms(facts: Facts) -> list[dict[str, Any]]:
    """Records of the table `alarms` that hold on the date."""
    return [*_of_certificates(facts), *_of_nothing(facts), *_of_estimates(facts)]


def _of_certificates(facts: Facts) -> Iterator[dict[str, Any]]:
    for rule in _RULES:
        found = [one for one in facts.today.certificates if rule.holds(one)]
        if found:
            opened = _since(facts.days, partial(_any, rule.holds))
            evidence = " ".join(f"{label(one['policy'])}: {rule.evidence(one)}" for one in found)
            yield alarm(facts.dp, rule.name, rule.severity, opened, rule.text, evidence)
    if facts.today.missing:
        without = sorted(facts.today.policies - {one["policy"] for one in facts.today.certificates})
        yield alarm(
            facts.dp, "certificate missing", "alarm", _since(facts.days, lambda day: day.missing),
            "Rows have no logging certificate; by default, estimates leave them out. Run the night again.",
            f"Policies: {', '.join(map(label, without))}.",
        )  # fmt: skip


def _of_nothing(facts: Facts) -> Iterator[dict[str, Any]]:
    """Alarms about what is not there at all."""
    filled = [day for day in facts.days if day.rows]
    unreadable = facts.unreadable.total()
    if not facts.today.rows and not unreadable:
        opened = _since(facts.days, lambda day: not day.rows, empty=True)
        late = (dt.date.fromisoformat(facts.today.day) - dt.date.fromisoformat(opened)).days + 1
        ends = (
            f"Decisions end {filled[-1].day} UTC, {_nights(late)} late." if filled else f"None in the last {len(facts.days)} days."
        )
        yield alarm(
            facts.dp, "no rows", "caution" if filled and late == 1 else "alarm", opened, "No decision arrived on this date.", ends
        )
    if unreadable:
        severity: Severity = "alarm" if unreadable > GRAVE * facts.today.rows else "caution"
        why = counted(facts.unreadable) if len(facts.unreadable) > 1 else next(iter(facts.unreadable))
        text = "Decisions whose features cannot be read are left out."
        yield alarm(facts.dp, "unreadable", severity, facts.today.day, text, f"{unreadable:,} decisions: {why}.")
    if filled and all(day.certificates and not _mature(day) for day in filled):
        age = (dt.date.fromisoformat(facts.today.day) - dt.date.fromisoformat(filled[0].day)).days
        overdue = age * 86_400 > facts.window_seconds
        yield alarm(
            facts.dp, "nothing mature", "alarm" if overdue else "caution", filled[0].day,
            "No decision has a mature first reward, so nothing can be valued yet.",
            f"The oldest rows are {age} days old; the reward is known {duration(facts.window_seconds)} after a decision.",
        )  # fmt: skip
    rows = sum(day.rows for day in facts.recent)
    if rows and not any(day.certified for day in facts.recent):
        yield alarm(
            facts.dp, "nothing certified", "alarm", _since(facts.days, lambda day: not day.certified),
            f"None of the rows of the last {RECENT_DAYS} days is certified.", f"{rows:,} rows.",
        )  # fmt: skip


def _of_estimates(facts: Facts) -> Iterator[dict[str, Any]]:
    if facts.estimates and not any(one["verdict"] in SHOWN for one in facts.estimates):
        reasons = Counter(reason for one in facts.estimates for reason in one["reasons"] or ())
        yield alarm(
            facts.dp, "all estimates refused", "alarm", facts.today.day, "No candidate has an estimate that may be shown.",
            next(iter(most_common(reasons)), "No reason was written."),
        )  # fmt: skip


def _any(holds: Callable[[Record], bool], day: Day) -> bool:
    return any(map(holds, day.certificates))


def _mature(day: Day) -> int:
    return sum(one["mature"] or 0 for one in day.certificates)


def _since(days: Sequence[Day], holds: Callable[[Day], bool], *, empty: bool = False) -> str:
    """First day of the unbroken run that ends on the date; days without rows break it only where rows are asked about."""
    opened = days[-1].day
    for day in reversed(days[:-1]):
        if day.rows or empty:
            if not holds(day):
                break
            opened = day.day
    return opened


def _nights(count: int) -> str:
    return f"{count} night" if count == 1 else f"{count} nights"


def counted(found: Counter[str]) -> str:
    """The most frequent of some kinds and how many there are of each, as text."""
    rest = len(found) - MOST_KINDS
    text = ", ".join(f"{found[what]:,} {what}" for what in most_common(found)[:MOST_KINDS])
    return f"{text} and {rest} more kinds" if rest > 0 else text


def most_common(found: Counter[str]) -> list[str]:
    """Kinds, the most frequent one first; of equals, by name."""
    return sorted(found, key=lambda what: (-found[what], what))


def alarm(dp: str, rule: str, severity: Severity, opened: str, text: str, evidence: str) -> dict[str, Any]:
    """A record of the table `alarms`, still open."""
    return {
        "id": key_of(dp, rule, opened)[:32], "dp": dp, "rule": rule, "severity": severity, "opened": opened,
        "closed": None, "text": text, "evidence": evidence,
    }  # fmt: skip
