"""The last days of one decision point: which of its joined rows are learned from and valued on, and what a step makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bandits.decision_point import DecisionPoint
from ope.data import BoolArray, FloatArray, IntArray, LoggedData
from pipelines.nightly.folds import LEARN, fold_of, thinned
from pipelines.nightly.lake import Entry, Lake, Snapshot
from pipelines.nightly.rows import SHOWN, STATES, Rows, read_rows, width
from pipelines.nightly.settings import Night, Settings

KNOWN = (STATES.index("observed"), STATES.index("default"))
"""States of a reward that has its value."""


class Certificates(NamedTuple):
    """What the certificates of a window say."""

    entries: tuple[Entry, ...]
    passed: frozenset[tuple[str, str]]
    """(policy, day) whose certificate is there and did not fail."""
    shown_only: bool
    """Whether rows whose action was not shown as sampled are left out: only while that says nothing about the action."""


class Usable(NamedTuple):
    """Which of n rows may be used."""

    passed: BoolArray
    """Rows with a passed certificate."""
    by_reward: Mapping[str, BoolArray]
    """Rows whose value of that reward counts."""


@dataclass(frozen=True, slots=True)
class Window:
    """Joined rows of the last `train.days` days of a decision point."""

    point: DecisionPoint
    settings: Settings
    lake: Lake
    days: tuple[str, ...]
    """Oldest first."""
    entries: tuple[Entry, ...]
    certificates: Certificates
    k: int
    """Number of actions of the longest set."""
    between: tuple[int, int] | None = None
    """Moments that the decisions lie between."""

    @classmethod
    def of(cls, night: Night, settings: Settings, lake: Lake, snapshot: Snapshot, point: DecisionPoint) -> Window:
        """The window that ends with the night's date."""
        days = tuple(night.days(settings.file.train.days))
        entries = tuple(snapshot.find("rows", point.name, days))
        k = len(point.actions.catalogue) or max(width(entries, lake), 1)
        return cls(point, settings, lake, days, entries, read_certificates(lake, snapshot, point, days), k, night.between)

    @property
    def inputs(self) -> list[str]:
        """Digests of everything that is read, and what is read of it."""
        read = [entry.sha256 for entry in (*self.entries, *self.certificates.entries)]
        return read if self.between is None else [*read, *map(str, self.between)]

    @property
    def reward(self) -> str:
        """Name of the reward that policies maximise."""
        return self.point.rewards[0].name

    def buckets(self) -> list[list[Entry]]:
        """Partitions that hold rows, by bucket: all rows of a unit are in one of them."""
        held = [entry for entry in self.entries if entry.rows]
        numbers = sorted({entry.bucket for entry in held})
        return [[entry for entry in held if entry.bucket == number] for number in numbers]

    def rows(self, entries: Sequence[Entry], segments: Sequence[str] = (), *, context: bool = True) -> Rows:
        """Rows of some partitions."""
        return read_rows(self.lake, entries, self.point, k=self.k, segments=segments, context=context, between=self.between)

    def usable(self, rows: Rows) -> Usable:
        """Which rows may be used: sampled, certified, with a mature value, and shown as sampled where that is asked for."""
        passed = _passed(rows, self.certificates.passed)
        good = rows.kind == "sampled"
        if self.settings.file.evaluate.uncertified == "exclude":
            good &= passed
        if self.certificates.shown_only:
            good &= rows.shown == SHOWN.index("as_sampled")
        return Usable(
            passed,
            {name: good & np.isin(one.state, KNOWN) & ~np.isnan(one.value) for name, one in rows.rewards.items()},
        )

    def fold(self, rows: Rows) -> IntArray:
        """Fold of each row, as `folds` numbers them."""
        return fold_of(rows.unit, self.settings.file.train.share).astype(np.int64)

    def learn_log(self, reward: str) -> LoggedData | None:
        """Rows of the fold that learns, about `train.most_rows` of them at most; None where there is none.

        In the order of decision ids, so that what is fitted does not depend on the number of buckets.
        """
        held = [entry for entry in self.entries if entry.rows]
        count = sum(int(self._learning(self.rows([entry], context=False), reward).sum()) for entry in held)
        if not count:
            return None
        share = self.settings.file.train.most_rows / count
        parts, ids = [], []
        for entry in held:
            rows = self.rows([entry])
            kept = np.flatnonzero(self._learning(rows, reward) & thinned(rows.unit, share))
            if len(kept):
                parts.append(rows.logged(reward, kept))
                ids.append(rows.decision_id.take(pa.array(kept)).combine_chunks())
        return _joined(parts, np.asarray(pc.sort_indices(pa.chunked_array(ids)))) if parts else None

    def _learning(self, rows: Rows, reward: str) -> BoolArray:
        return np.asarray(self.usable(rows).by_reward[reward] & (self.fold(rows) == LEARN))


def read_certificates(lake: Lake, snapshot: Snapshot, point: DecisionPoint, days: Sequence[str]) -> Certificates:
    """Verdicts on the policies and days of a window."""
    entries = tuple(snapshot.find("certificates", point.name, days))
    frame = lake.frame(entries, ["policy", "day", "verdict", "not_shown_independent"])
    if frame is None:
        return Certificates((), frozenset(), False)
    passed = frame.filter(frame["verdict"] != "fail")
    independent = bool(frame.height and frame["not_shown_independent"].fill_null(False).all())
    return Certificates(
        entries, frozenset(zip(passed["policy"], passed["day"], strict=True)), point.shown == "exclude" and independent
    )


def listed(snapshot: Snapshot, tables: Sequence[str], point: str, day: str, key: str) -> bool:
    """Whether the partitions of these tables, made from what `key` stands for, are there already."""
    return all(any(entry.key == key for entry in snapshot.find(table, point, [day])) for table in tables)


def day_codes(rows: Rows) -> tuple[list[str], IntArray]:
    """Days in the order of the rows, and the index (n,) of each row's: rows are sorted by day, so only changes are looked for."""
    starts = np.flatnonzero(np.concatenate(([True], rows.day[1:] != rows.day[:-1])))
    code = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, rows.n)))
    return [str(day) for day in rows.day[starts]], code


def _passed(rows: Rows, certified: frozenset[tuple[str, str]]) -> BoolArray:
    days, code = day_codes(rows)
    result = np.empty(rows.n, dtype=np.bool_)
    ends = np.searchsorted(code, np.arange(len(days) + 1))
    for day, (start, end) in zip(days, pairwise(ends), strict=True):
        policies = rows.policy[start:end].tolist()
        good = {policy: (policy, day) in certified for policy in set(policies)}
        alike = len(set(good.values())) == 1
        result[start:end] = good[policies[0]] if alike else [good[policy] for policy in policies]
    return result


def _joined(parts: Sequence[LoggedData], order: IntArray) -> LoggedData:
    """One log of several, in a given order. Whole vectors stay behind: nothing that is fitted looks at them."""
    weighted = any(part.sample_weight is not None for part in parts)

    def joined(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)[order]

    weights: list[FloatArray] = [np.ones(part.n) if part.sample_weight is None else part.sample_weight for part in parts]
    return LoggedData(
        action=joined("action"), reward=joined("reward"), propensity=joined("propensity"), context=joined("context"),
        eligible=joined("eligible"), action_features=joined("action_features"), cluster=joined("cluster"),
        sample_weight=np.concatenate(weights)[order] if weighted else None,
    )  # fmt: skip
