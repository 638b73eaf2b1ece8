"""From the numbers of a certificate to one verdict and its reasons: what was found, what is expected, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from bandits.decision_point import DecisionPoint
from ope.certificate import Examination, reasons
from pipelines.nightly.settings import Certificate

Verdict: TypeAlias = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Judged:
    """What a verdict is made from."""

    numbers: Mapping[str, Any]
    """Columns of the table `certificates`."""
    tests: Examination | None
    """None where no row was sampled."""
    span: int
    """Record numbers between which none should be missing."""
    own_past: bool
    """Whether the join band is of this policy's own earlier days."""


def judge(found: Judged, settings: Certificate, point: DecisionPoint) -> tuple[Verdict, list[str]]:
    """The verdict and every reason against `pass`, those of a failure first."""
    failed = [*_facts(found.numbers, found.span), *(reasons(found.tests) if found.tests else [])]
    warned = _warnings(found, settings, point)
    twice, below = _conflicts(found.numbers, settings), _below(found)
    if twice is not None:
        (failed if found.numbers["conflicts"] > 1 else warned).append(twice)
    if below is not None:
        (failed if found.own_past else warned).append(below)
    return "fail" if failed else "warn" if warned else "pass", failed + warned


def _facts(numbers: Mapping[str, Any], span: int) -> list[str]:
    """What no chance explains."""
    found = []
    if numbers["outside"]:
        found.append(
            f"{numbers['outside']:,} rows have an action outside their eligible set; expected none: "
            "log the set that was drawn from, after exclusions."
        )
    if numbers["below_floor"]:
        found.append(
            f"{numbers['below_floor']:,} rows have a propensity below the exploration floor, the smallest {numbers['p_min']:.3g}; "
            "expected at least exploration_floor / (number of eligible actions): the floor is not applied, "
            "or the decision point declares another one than is in force."
        )
    if numbers["replay_wrong"]:
        found.append(
            f"{numbers['replay_wrong']:,} of {numbers['replay_checked']:,} decisions drawn again from their logged shares and salt "
            "give another action; expected none: what is logged is not what was drawn from, or a record was altered."
        )
    if numbers["gaps"]:
        found.append(
            f"{numbers['gaps']:,} of {span:,} record numbers between the first and the last of the day are missing; expected none: "
            "deliver the source's missing records again."
        )
    return found


def _conflicts(numbers: Mapping[str, Any], settings: Certificate) -> str | None:
    """Above the share that is expected. One alone is above it on any small day, and is no pattern: the caller warns."""
    everything = numbers["rows"] + numbers["conflicts"]
    if numbers["conflicts"] <= settings.conflicts * everything:
        return None
    return (
        f"{numbers['conflicts']:,} of {everything:,} decisions came with several contents under one id; expected at most "
        f"{settings.conflicts:.2%}: something rewrites records, or ids are not unique."
    )


def _below(found: Judged) -> str | None:
    numbers = found.numbers
    if numbers["join_low"] is None or numbers["join_rate"] >= numbers["join_low"]:
        return None
    if found.own_past:
        return f"Join rate {_rate(numbers)}: rewards are missing, not zero. See whether the reward stream stopped or lost ids."
    return (
        f"Join rate {_rate(numbers)} of all policies: rewards are missing, or this policy, which has no past of its own, brings "
        "fewer of them. Look at other policies of the day."
    )


def _rate(numbers: Mapping[str, Any]) -> str:
    return f"{numbers['join_rate']:.0%}, usual {numbers['join_low']:.0%} to {numbers['join_high']:.0%}"


def _warnings(found: Judged, settings: Certificate, point: DecisionPoint) -> list[str]:
    numbers, warned = found.numbers, []
    if found.tests is None:
        warned.append("No row was sampled: nothing can be learned or valued from this day, and nothing was tested.")
    elif numbers["vectors"] < 1:
        warned.append(
            f"{1 - numbers['vectors']:.0%} of the rows have no vector of propensities: whether they are calibrated could not be "
            "tested there, only the mean weight. Log the probability of every eligible action."
        )
    if numbers["join_high"] is not None and numbers["join_rate"] > numbers["join_high"]:
        warned.append(f"Join rate {_rate(numbers)}: rewards may be counted twice, or arrive that did not before.")
    if numbers["delivered"] and numbers["repeated"] > settings.duplicates * numbers["delivered"]:
        warned.append(
            f"{numbers['repeated']:,} of {numbers['delivered']:,} decisions were delivered again; expected at most "
            f"{settings.duplicates:.0%}. They count once; see why a source repeats itself."
        )
    if numbers.get("not_shown_independent") is False:
        do = "keep" if point.shown == "intention_to_treat" else "set"
        warned.append(
            f"Whether an action is shown depends on the action (p = {numbers['not_shown_p']:.1g}): leaving rows out by what was "
            f'shown would select on the action; {do} shown = "intention_to_treat".'
        )
    return warned
