"""Step `select`: which candidates are worth an A/B test, chosen on fold A and described by what they are worth on fold B."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ope.data import BoolArray, IntArray
from ope.selection import Fold, Selection, Shortlist, select_sums
from pipelines.nightly.estimates import p_below
from pipelines.nightly.lake import Entry, Lake, Snapshot, key_of
from pipelines.nightly.settings import Night, Settings
from pipelines.nightly.stacks import Kept, read_stack
from pipelines.nightly.tables import TABLES
from pipelines.nightly.window import listed

VERSION = 2
"""Of this step: another one makes everything anew."""

MADE = ("portfolio", "portfolio_policies")

GRADED = "not graded here"
"""An estimator is graded on known outcomes, and here there are none yet."""


NOBODY = Shortlist(0, (), math.nan, math.nan, math.nan, math.nan)
"""Stands for the shortlist where fewer than two candidates are left: k = 0 then says why."""


def select(night: Night, settings: Settings, lake: Lake, snapshot: Snapshot, progress: Callable[[int, int], object]) -> list[Entry]:
    """Partitions of `portfolio` and `portfolio_policies`, one per decision point; empty with fewer than two candidates."""
    day, entries = night.date.isoformat(), []
    for index, point in enumerate(settings.points, 1):
        stacks = snapshot.find("stacks", point.name, [day])
        file = settings.file
        key = key_of("select", VERSION, point.name, day, file.select, file.evaluate.tolerance, [entry.sha256 for entry in stacks])
        if not listed(snapshot, MADE, point.name, day, key):
            folds = [read_stack(record) for entry in stacks for record in lake.read(entry).to_pylist()]
            found = _portfolio(folds, settings) if len(folds) == 2 and len(folds[0].candidates) > 1 else ([], [])
            entries += [
                lake.write(name, TABLES[name].of(records), point=point.name, day=day, key=key)
                for name, records in zip(MADE, found, strict=True)
            ]
        progress(index, len(settings.points))
    return entries


def _portfolio(folds: Sequence[Kept], settings: Settings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of both tables."""
    whole = np.logical_and.reduce([_known(each) for each in folds])
    if not whole[-1] or whole.sum() < 3:
        return [], []
    a, b = (_of_some(each, np.flatnonzero(whole[:-1])) for each in folds)
    chosen = select_sums(
        a.candidates, a.fold, b.fold, a.distances, by=a.estimator, sizes=settings.file.select.sizes,
        tolerance=settings.file.select.duplicate,
    )  # fmt: skip
    key = {"evaluation_id": a.evaluation_id, "estimator": a.estimator, "fold": "B", "certified": a.certified and b.certified}
    portfolio = [
        key | {
            "k": one.k, "gain": one.gain, "std": one.std, "p_any_harm": one.p_any_harm, "violation": one.violation,
            "knee": one.k == chosen.knee, "graded": GRADED,
        }
        for one in chosen.shortlists
    ]  # fmt: skip
    policies = [_policy(a, b, name, settings.file.evaluate.tolerance, chosen) for name in a.candidates]
    policies += [{"policy": name} for name in folds[0].candidates if name not in a.candidates]
    return portfolio, [
        key | {"k": one.k} | policy | _decision(policy["policy"], a, one, chosen)
        for one in chosen.shortlists or (NOBODY,)
        for policy in policies
    ]


def _known(each: Kept) -> BoolArray:
    """Whose value (m + 1,) and spread on a fold are numbers, the logging policy last."""
    return np.isfinite(each.fold.stack.values()) & np.isfinite(np.diag(each.fold.stack.covariance()))


def _of_some(each: Kept, candidates: IntArray) -> Kept:
    """Some candidates, and the logging policy."""
    fold, members = each.fold, [*candidates.tolist(), len(each.candidates)]
    return each._replace(
        candidates=tuple(each.candidates[i] for i in candidates),
        fold=Fold(
            replace(fold.stack, parts=tuple(fold.stack.parts[i] for i in members)),
            tuple(fold.weights[i] for i in members), fold.checks,
        ),
        distances=each.distances[np.ix_(candidates, candidates)],
    )  # fmt: skip


def _policy(a: Kept, b: Kept, name: str, tolerance: float, chosen: Selection) -> dict[str, Any]:
    """What is the same of a candidate for every k. What fold B refuses has no number there."""
    index = a.candidates.index(name)
    twin, distance = chosen.duplicates.get(name, (None, None))
    known = {
        "policy": name, "rank": chosen.ranking.index(name) + 1 if name in chosen.ranking else None,
        "selected_on": float(a.fold.stack.values()[index]), "duplicate_of": twin, "tv": distance,
    }  # fmt: skip
    if name in chosen.doubtful:
        return known
    values, covariance = b.fold.stack.values(), b.fold.stack.covariance()
    difference = float(values[index] - values[-1])
    variance = float(covariance[index, index] + covariance[-1, -1] - 2 * covariance[index, -1])
    stderr = math.sqrt(max(variance, 0.0))
    return known | {
        "value": float(values[index]), "difference": difference, "p_worse": p_below(difference, stderr, 0.0),
        "p_below_c": p_below(difference, stderr, -tolerance),
    }  # fmt: skip


def _decision(name: str, a: Kept, shortlist: Shortlist, chosen: Selection) -> dict[str, Any]:
    """Test the best k that nothing speaks against. What fold B says of their worth decides nothing: it is there to value them."""
    logged = float(a.fold.stack.values()[-1])
    if name not in a.candidates:
        return {"decision": "blocked", "reason": "Too little overlap with the log: no value, or no spread of it."}
    if name in chosen.blocked:
        return {"decision": "blocked", "reason": " ".join(chosen.blocked[name])}
    if name in chosen.duplicates:
        twin, distance = chosen.duplicates[name]
        said = f"{distance:.2%} mean total variation from {twin}, which ranks higher; one of them is enough."
        return {"decision": "skip", "reason": said}
    if name in chosen.doubtful:
        return {"decision": "blocked", "reason": f"Refused on fold B: {' '.join(chosen.doubtful[name])}"}
    if not shortlist.k:
        return {"decision": "skip", "reason": "No other candidate is left to choose between."}
    if name not in shortlist.candidates:
        return {"decision": "skip", "reason": f"Ranks below the best {shortlist.k} on fold A."}
    if chosen.selected_on[chosen.ranking.index(name)] < logged:
        return {"decision": "skip", "reason": "Among the best, but worth less than the logging policy on fold A already."}
    return {"decision": "test", "reason": None}
