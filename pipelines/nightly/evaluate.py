"""Step `evaluate`: every candidate of the night and the logging policy, by every estimator, reward, segment, fold and window.

Two passes over the rows, bucket by bucket: the first counts, over columns that are cheap; the second sums.
"""

from __future__ import annotations

import datetime as dt
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, TypeAlias

import msgspec
import numpy as np
from threadpoolctl import threadpool_limits

from bandits.artifact import build, read_verified
from bandits.batch import DecisionBatch
from bandits.policy import Policy
from bandits.registry import Registry
from bandits.reward_models import fit_scorer
from bandits.scorers import Scorer
from ope.accumulate import Accumulator, Candidate, Part
from ope.data import BoolArray, FloatArray, IntArray
from ope.estimators import estimator
from ope.evaluation import Choice
from ope.intervals import Normal
from ope.selection import mean_distances
from pipelines.nightly.estimates import Slice, Valued, records_of
from pipelines.nightly.folds import FOLDS, LEARN, A, B
from pipelines.nightly.lake import Entry, Lake, Snapshot, key_of
from pipelines.nightly.rows import Rows
from pipelines.nightly.settings import Night, Settings
from pipelines.nightly.stacks import LOGGING, STACKS, stack_record
from pipelines.nightly.tables import TABLES
from pipelines.nightly.window import Window, day_codes, listed

VERSION = 1
"""Of this step: another one makes everything anew."""

CHUNK = 2**15
"""Rows whose propensities are computed at once: trees see every action of every row as a row of a matrix."""

THREADS = min(os.cpu_count() or 1, 8)
"""That compute propensities: trees leave Python's lock alone."""

SQL = "pipelines/sql/join.sql"

ALL = "all"

Segments: TypeAlias = Mapping[str, tuple[str, str]]
"""Name of the feature and its value, by label; rows without a value are in no segment."""

MADE = ("evaluations", "estimates", "differences", "stacks")


def evaluate(
    night: Night, settings: Settings, lake: Lake, snapshot: Snapshot, progress: Callable[[int, int], object]
) -> list[Entry]:
    """Partitions of `evaluations`, `estimates`, `differences`, and of `stacks` for the step select, one per decision point.

    Where nothing is mature or certified, an evaluation that used no row. Raises InputError for a candidate that does not load.
    """
    day, entries = night.date.isoformat(), []
    for index, point in enumerate(settings.points):
        window = Window.of(night, settings, lake, snapshot, point)
        candidates = snapshot.find("candidates", point.name, [day])
        file = settings.file
        key = key_of(
            "evaluate", VERSION, point, day, night.cutoff_ns, file.train, file.evaluate, file.select.estimator, window.inputs,
            [entry.sha256 for entry in candidates],
        )  # fmt: skip
        if not listed(snapshot, MADE, point.name, day, key):

            def told(percent: int, start: int = 100 * index) -> None:
                progress(start + percent, 100 * len(settings.points))

            found = _Evaluation(window, night, key[:16], _load(settings, lake, candidates), told).tables()
            entries += [
                lake.write(name, (STACKS if name == "stacks" else TABLES[name]).of(records), point=point.name, day=day, key=key)
                for name, records in found.items()
            ]
        progress(100 * (index + 1), 100 * len(settings.points))
    return entries


def _load(settings: Settings, lake: Lake, entries: Sequence[Entry]) -> dict[str, Policy]:
    """Candidates of the night by name, in the order of their table: signed bytes, tried in a process of its own by train."""
    frame = lake.frame(entries, ["policy", "digest"])
    if frame is None:
        return {}
    registry = Registry(settings.path(settings.file.registry.folder))
    key, limits = registry.public_key(), registry.limits
    return {
        policy: build(read_verified(registry.path(digest), key, digest, limits))
        for policy, digest in frame.drop_nulls("digest").iter_rows()
    }


@dataclass(slots=True)
class _Count:
    """What the first pass finds of a slice."""

    rows: int = 0
    uncertified: int = 0
    known: int = 0
    """Rows whose whole vector was logged."""
    additive: bool = True
    """Whether no unit has rows on two days."""

    @property
    def vectors(self) -> bool:
        """Whether every row's whole vector was logged."""
        return self.known == self.rows


@dataclass(slots=True)
class _Totals:
    """What the first pass finds of the longest window."""

    rows: int = 0
    certified: int = 0
    used: int = 0
    units: int = 0


@dataclass(slots=True)
class _Sums:
    """What the second pass keeps of a slice."""

    accumulator: Accumulator
    unsupported: FloatArray
    """Probability on actions that were never sampled, summed over rows, by policy."""
    distances: FloatArray
    """Total variation between candidates, summed over rows where candidates are chosen."""


@dataclass(slots=True, eq=False)
class _Marked:
    """Rows of a bucket, and which of them belong to which slice."""

    rows: Rows
    passed: BoolArray
    by_reward: Mapping[str, BoolArray]
    fold: IntArray
    age: IntArray
    """Days before the date."""
    used: BoolArray
    """Rows of folds A and B that any reward's estimates stand on."""
    segments: Segments
    masks: dict[str, BoolArray] = field(default_factory=dict)
    """By segment, as they are asked for."""

    def of(self, one: Slice) -> BoolArray:
        """Mask (n,) of the rows of a slice."""
        found: BoolArray = self.by_reward[one.metric] & (self.fold == one.fold) & (self.age < one.window)
        if one.segment == ALL:
            return found
        if one.segment not in self.masks:
            name, value = self.segments[one.segment]
            self.masks[one.segment] = np.asarray(self.rows.segments[name] == value)
        found &= self.masks[one.segment]
        return found


@dataclass(slots=True, eq=False)
class _Evaluation:
    """One decision point on one night."""

    window: Window
    night: Night
    id: str
    candidates: dict[str, Policy]
    progress: Callable[[int], object]
    """Told the percent done."""

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Records by table."""
        with threadpool_limits(1, "blas"):  # products of a chunk are too small to share, and one thread adds in one order
            segments = self._segments()
            totals, counts = self._count(segments)
            scorers, notes = self._scorers() if counts else ({}, [])
            return self._records(totals, counts, self._sum(segments, counts, scorers), set(scorers), notes)

    # First pass

    @property
    def _longest(self) -> int:
        return max(self.window.settings.file.evaluate.windows)

    def _buckets(self) -> list[list[Entry]]:
        days = set(self.window.days[-self._longest :])
        found = [[entry for entry in bucket if entry.day in days] for bucket in self.window.buckets()]
        return [bucket for bucket in found if bucket]

    def _mark(self, bucket: Sequence[Entry], segments: Segments, *, context: bool) -> _Marked:
        window = self.window
        rows = window.rows(bucket, window.settings.file.evaluate.segments, context=context)
        usable, fold = window.usable(rows), window.fold(rows)
        days, code = day_codes(rows)
        age = np.array([(self.night.date - dt.date.fromisoformat(day)).days for day in days])[code]
        used = (fold != LEARN) & np.logical_or.reduce(list(usable.by_reward.values()))
        return _Marked(rows, usable.passed, usable.by_reward, fold, age, used, segments)

    def _segments(self) -> Segments:
        """The most frequent values of each feature that segments."""
        file = self.window.settings.file.evaluate
        seen: dict[str, Counter[str]] = {name: Counter() for name in file.segments}
        for bucket in self._buckets() if seen else ():
            marked = self._mark(bucket, {}, context=False)
            for name, found in seen.items():
                found.update(value for value in marked.rows.segments[name][marked.used].tolist() if value is not None)
        return {
            f"{name}={value}": (name, value)
            for name, found in seen.items()
            for value, _ in sorted(found.items(), key=lambda item: (-item[1], item[0]))[: file.most_segments]
        }

    def _count(self, segments: Segments) -> tuple[_Totals, dict[Slice, _Count]]:
        metrics = [rule.name for rule in self.window.point.rewards]
        windows = sorted(set(self.window.settings.file.evaluate.windows))
        counts = {Slice(*each): _Count() for each in product(metrics, (ALL, *segments), (A, B), windows)}
        totals = _Totals()
        for bucket in self._buckets():
            marked = self._mark(bucket, segments, context=False)
            rows = marked.rows
            order = np.lexsort((marked.age, rows.unit))
            unit, age = rows.unit[order], marked.age[order]
            totals.rows += rows.n
            totals.certified += int(marked.passed.sum())
            totals.used += int(marked.used.sum())
            totals.units += len(np.unique(rows.unit[marked.used]))
            for one, count in counts.items():
                mask = marked.of(one)
                count.rows += int(mask.sum())
                count.uncertified += int((mask & ~marked.passed).sum())
                count.known += int((mask & rows.vector).sum())
                count.additive &= not _returns(unit[mask[order]], age[mask[order]])
        return totals, {one: count for one, count in counts.items() if count.rows}

    # Second pass

    def _scorers(self) -> tuple[dict[str, Scorer], list[str]]:
        """Reward models by reward, fitted on the fold that learns, where an estimator needs one; and why there is none."""
        settings = self.window.settings.file
        needing = [name for name in settings.evaluate.estimators if estimator(name).needs.q]
        scorers: dict[str, Scorer] = {}
        notes: list[str] = []
        for rule in self.window.point.rewards if needing else ():
            data = self.window.learn_log(rule.name)
            if data is None or data.n < settings.train.least_rows:
                notes.append(
                    f"{', '.join(needing)} of {rule.name} left out: {0 if data is None else data.n:,} rows to fit a reward model "
                    f"on; expected at least {settings.train.least_rows:,} (train.least_rows)."
                )
            else:
                scorers[rule.name] = fit_scorer(None, data, self.window.k)
        return scorers, notes

    def _choices(self, count: _Count, modelled: bool) -> tuple[Choice, ...]:
        """Estimators of every policy: those asked for that have the reward model, and the vectors, that they need."""
        asked = tuple(dict.fromkeys(estimator(name) for name in self.window.settings.file.evaluate.estimators))
        plain = tuple(one for one in asked if not one.needs.q)
        return (
            *(Choice(asked if modelled else plain, Normal()) for _ in self.candidates),
            Choice(asked if modelled and count.vectors else plain, Normal()),
        )

    def _sum(self, segments: Segments, counts: Mapping[Slice, _Count], scorers: Mapping[str, Scorer]) -> dict[Slice, _Sums]:
        m = len(self.candidates)
        sums = {one: _Sums(Accumulator(count.rows), np.zeros(m + 1), np.zeros((m, m))) for one, count in counts.items()}
        buckets = self._buckets() if sums else []
        for done, bucket in enumerate(buckets, 1):
            marked = self._mark(bucket, segments, context=True)
            answers = _answers(marked, self.candidates, scorers)
            for one, each in sums.items():
                rows = np.flatnonzero(marked.of(one))
                if len(rows):
                    self._add(each, one, counts[one], marked.rows, rows, answers)
            self.progress(100 * done // len(buckets))
        return sums

    def _add(self, each: _Sums, one: Slice, count: _Count, rows: Rows, members: IntArray, answers: _Answers) -> None:
        data, at = rows.logged(one.metric, members), answers.place[members]
        if not count.vectors:
            data = replace(data, propensities=None)  # vectors are of use where every row has one
        q = answers.q[one.metric][at] if one.metric in answers.q else None
        targets: list[FloatArray] = [target[at] for target in answers.targets]
        choices = self._choices(count, q is not None)
        candidates = [
            Candidate(name, target, choice.estimators, q)
            for name, target, choice in zip(self.candidates, targets, choices[:-1], strict=True)
        ]
        logging = Candidate(LOGGING, "logging", choices[-1].estimators, q)
        each.accumulator.add(Part(data, (*candidates, logging), closed=True))
        each.unsupported[:-1] += [float(lost[at].sum()) for lost in answers.unsupported]
        if one == self._chosen_on(A):
            each.distances += len(members) * mean_distances(targets)

    def _chosen_on(self, fold: int) -> Slice:
        """Where candidates are chosen, and valued."""
        return Slice(self.window.reward, ALL, fold, self._longest)

    def _records(
        self, totals: _Totals, counts: Mapping[Slice, _Count], sums: Mapping[Slice, _Sums], modelled: set[str], notes: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        file = self.window.settings.file
        policies = (*self.candidates, LOGGING)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in MADE}
        found["evaluations"].append(self._evaluation(totals, [*notes, *_unvectored(counts)]))
        chosen = {self._chosen_on(fold) for fold in (A, B)}
        kind = estimator(file.select.estimator)
        for one, count in counts.items():
            valued = Valued(
                sums[one].accumulator.result(), policies, self._choices(count, one.metric in modelled),
                sums[one].unsupported / count.known if count.known else None, count.additive, not count.uncertified,
            )  # fmt: skip
            key = {"evaluation_id": self.id} | one._asdict() | {"fold": FOLDS[one.fold]}
            estimates, differences = records_of(valued, key, level=file.evaluate.level, tolerance=file.evaluate.tolerance)
            found["estimates"] += estimates
            found["differences"] += differences
            if chosen <= counts.keys() and one in chosen and all(kind in each.asked for each in valued.choices[:-1]):
                found["stacks"].append(
                    stack_record(
                        valued.sums, self.id, FOLDS[one.fold], policies, kind, sums[one].distances / count.rows, valued.certified
                    )
                )
        return found

    def _evaluation(self, totals: _Totals, notes: Sequence[str]) -> dict[str, Any]:
        file, share = self.window.settings.file, self.window.settings.file.train.share
        settings = {
            "evaluate": file.evaluate, "train": {name: getattr(file.train, name) for name in ("days", "share", "most_rows")},
            "select": {"estimator": file.select.estimator}, "notes": notes,
        }  # fmt: skip
        return {
            "evaluation_id": self.id, "dp": self.window.point.name, "date": self.window.days[-1],
            "from": self.window.days[-self._longest :][0], "to": self.window.days[-1], "rows": totals.rows,
            "rows_certified": totals.certified, "rows_used": totals.used, "units": totals.units, "baseline": LOGGING,
            "folds": f"learn {share:g}, A {(1 - share) / 2:g}, B {(1 - share) / 2:g} of the units", "level": file.evaluate.level,
            "cutoff_ns": self.night.cutoff_ns, "sql": SQL, "parameters": msgspec.json.encode(settings, order="sorted").decode(),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Answers:
    """What candidates and reward models say of the m used rows of a bucket."""

    place: IntArray
    """Index (n,) of each used row among them."""
    targets: list[FloatArray]
    """(m, k) of each candidate"""
    q: dict[str, FloatArray]
    """(m, k) by reward"""
    unsupported: list[FloatArray]
    """(m,) of each candidate: its probability on eligible actions that had no share, where vectors were logged."""


def _answers(marked: _Marked, candidates: Mapping[str, Policy], scorers: Mapping[str, Scorer]) -> _Answers:
    """Asks each once per bucket; leaves rows without their features, which nothing needs any more."""
    rows, kept = marked.rows, np.flatnonzero(marked.used)
    targets = [np.empty((len(kept), rows.k)) for _ in candidates]
    q = {reward: np.empty((len(kept), rows.k)) for reward in scorers}

    def answer(start: int) -> None:
        part = slice(start, start + CHUNK)
        batch: DecisionBatch = rows.batch(kept[part])
        for target, policy in zip(targets, candidates.values(), strict=True):
            target[part] = policy.propensities(batch)
        for reward, scorer in scorers.items():
            q[reward][part] = scorer.scores(batch)

    with ThreadPoolExecutor(THREADS) as pool:  # a row's answer is the same to the bit whatever rows come with it
        list(pool.map(answer, range(0, len(kept), CHUNK)))
    marked.rows = replace(rows, context=np.empty((rows.n, 0)), action_features=np.empty((rows.n, rows.k, 0)))
    never = (rows.shares[kept] == 0) & rows.vector[kept, None]
    unsupported = [np.einsum("nk,nk->n", target, never) for target in targets]
    return _Answers(np.cumsum(marked.used) - 1, targets, q, unsupported)


def _returns(unit: IntArray, age: IntArray) -> bool:
    """Whether a unit has rows on two days; sorted by unit, then by day."""
    return bool(((unit[1:] == unit[:-1]) & (age[1:] != age[:-1])).any())


def _unvectored(counts: Mapping[Slice, _Count]) -> list[str]:
    unknown = sorted({one.metric for one, count in counts.items() if not count.vectors})
    return [
        f"{metric}: estimators with a reward model left out for the logging policy where vectors were not logged."
        for metric in unknown
    ]
