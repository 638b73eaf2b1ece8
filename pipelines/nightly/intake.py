"""Alarms about what came in: events without a decision, broken records, rewards that no rule knows or that never come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bandits.decision_point import DecisionPoint
from pipelines.nightly.alarms import GRAVE, Severity, alarm, counted
from pipelines.nightly.lake import Lake, Snapshot
from pipelines.nightly.settings import Settings

ENOUGH = 100
"""Mature decisions that cannot all be without a reward by chance."""


def intake_alarms(
    settings: Settings, lake: Lake, snapshot: Snapshot, days: Sequence[str], certificates: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Records of the table `alarms`. `certificates`: those of the days, the last of which is the night's."""
    yield from _orphans(snapshot, days[-1])
    yield from _rejected(lake, snapshot, days[-1])
    for point in settings.points:
        yield from _unknown_names(lake, snapshot, point, days)
        yield from _no_rewards(point, days, [one for one in certificates if one["dp"] == point.name])


def _orphans(snapshot: Snapshot, date: str) -> Iterator[dict[str, Any]]:
    waiting = {kind: sum(entry.rows for entry in snapshot.find(f"orphan_{kind}")) for kind in ("rewards", "shown")}
    if any(waiting.values()):
        text = "Events wait for decisions that are not known, or whose id came with several contents; they are kept."
        evidence = ", ".join(f"{count:,} {kind}" for kind, count in waiting.items() if count)
        yield alarm("", "orphans", "caution", date, text, f"{evidence}.")


def _rejected(lake: Lake, snapshot: Snapshot, date: str) -> Iterator[dict[str, Any]]:
    found, sources = lake.frame(snapshot.find("rejected"), ["kind", "reason"]), lake.frame(snapshot.find("sources"))
    if found is None or sources is None:
        return
    rejected = found.filter(found["kind"] != "quarantined")
    if forged := found.height - rejected.height:
        text = "Rewards came with the token of another decision; they are kept aside and count for nothing: find who sends them."
        yield alarm("", "quarantined", "caution", date, text, f"{forged:,} rewards.")
    if not rejected.height:
        return
    read = sum(int(sources[name].sum()) for name in ("decisions", "rewards", "shown", "rejected"))
    evidence = f"{rejected.height:,} of {read:,}: {counted(Counter(rejected['reason']))}."
    text = "Records break the contract and were left out; mend the source or the settings, and the next night reads them again."
    yield alarm("", "rejected", _severity(rejected.height, read), date, text, evidence)


def _unknown_names(lake: Lake, snapshot: Snapshot, point: DecisionPoint, days: Sequence[str]) -> Iterator[dict[str, Any]]:
    names: Counter[str] = Counter()
    for entry in snapshot.find("rewards", point.name, days):
        names.update(lake.read(entry, ["name"])["name"].to_pylist())
    known = [rule.name for rule in point.rewards]
    unknown = Counter({name: count for name, count in names.items() if name not in known})
    if unknown:
        evidence = f"{counted(unknown)}; the decision point knows {', '.join(known)}."
        text = "Rewards have names that the decision point does not know; they count for nothing until it does."
        yield alarm(point.name, "unknown rewards", _severity(unknown.total(), names.total()), days[-1], text, evidence)


def _no_rewards(point: DecisionPoint, days: Sequence[str], certificates: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    counted = [one for one in certificates if one["joined"] is not None]
    mature = sum(one["mature"] for one in counted)
    if mature >= ENOUGH and not sum(one["joined"] for one in counted):
        text = "Not one mature decision has a reward: rewards are missing, or have another name, or come after their window."
        evidence = f"{mature:,} mature decisions of the days from {days[0]} on, and no {point.rewards[0].name}."
        yield alarm(point.name, "no rewards", "alarm", days[-1], text, evidence)


def _severity(bad: int, total: int) -> Severity:
    return "alarm" if bad > GRAVE * total else "caution"
