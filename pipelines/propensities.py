"""Logs without propensities: estimate them, say how well that went, refuse logs from which nothing can be learned.

Nothing is ever filled in. Estimates come from a cross-fitted, calibrated classifier of the action on the context and are marked
as such, so that no verdict is better than `caution`; a log whose actions follow a fixed rule is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sklearn.base import clone
from sklearn.utils.validation import has_fit_parameter

from ope.accumulate import Target, as_target
from ope.data import (
    LARGEST,
    BoolArray,
    DataError,
    FloatArray,
    IntArray,
    checked_distribution,
    checked_width,
)
from ope.diagnostics import calibration as calibration_p_value
from ope.nuisance import fit_model
from ope.sensitivity import GAMMAS, Bounds, value_bounds
from pipelines.frame import (
    METADATA,
    ColumnMap,
    Log,
    action_indices,
    design_matrix,
    eligible_sets,
    numbers,
    require_columns,
    shown,
    to_log,
    units,
)
from pipelines.propensity_model import FOLDS, folds_of, propensity_model
from pipelines.tables import number

FEWEST = 10
"""Rows (with clusters: clusters) of an action that leave some of it in every part."""

BINS = 10

SMALL = 0.01
"""Estimated propensities of logged actions below this are counted: each such row weighs a hundred others."""

SURE_SHARE, SURPRISES, SURE_SURPRISES = 0.5, 0.05, 0.01
"""A log is refused as deterministic where, out of fold, the likeliest action was not the logged one in fewer than 5 % of the rows
and in fewer than 1 % of the half that the model is surest of.

No classifier finds the borders of a rule exactly, so a fixed rule leaves surprises too; but they lie at its borders, where the
model is unsure, and vanish from the surest half: rules of one to seven cuts and linear ones left 0 to 0.4 % of them there and
0 to 4 % overall, at 1,000 rows and more. Exploration of 5 % between two actions surprises in 2.5 % of the rows, everywhere.
A policy that explores at the borders of its rule alone looks like a rule, and its log holds nothing about the rest.
"""

EXPLORED = "a policy that sometimes took another action in the same situation"
EXPLORE = (
    "No estimator can value another policy from such a log: what was never tried left no trace. Let a policy that randomises "
    "decide, at least now and then, and log the probability of every action as it is drawn."
)

Z_LIMIT = 4.0
"""Standard errors beyond which a calibration bin is called wrong, as in `ope.diagnostics.Thresholds`."""


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Pairs of row and action whose estimated probability lies in one tenth of all of them."""

    low: float
    """Smallest estimate in the bin."""
    high: float
    count: int
    """Pairs."""
    predicted: float
    """Mean estimate, sample weights respected."""
    observed: float
    """Share of these pairs whose action was the logged one. Expected: `predicted`."""
    z: float
    """Their difference in standard errors, rows (with clusters: clusters) taken as independent."""


@dataclass(frozen=True, slots=True, eq=False)
class EstimatedPropensities:
    """Propensities of a log that had none, and what tells how far to believe them."""

    propensities: FloatArray
    """(n, k), each row by a model that saw neither it nor its cluster; 0 for actions that no row took or that were ineligible."""
    propensity: FloatArray
    """(n,) of the logged actions."""
    labels: tuple[str, ...] | None
    """The actions in the order of `propensities`, where they are texts."""
    calibration: tuple[CalibrationBin, ...]
    calibration_p: float
    """p-value of the chi-square test of action counts against the estimates (`ope.diagnostics.calibration`)."""
    determinism: float
    """Share of rows whose logged action was the likeliest one, out of fold. 1: nothing was explored."""
    sure_determinism: float
    """The same among the half of the rows that the model is surest of."""
    below: int
    """Rows whose logged action has an estimated propensity below 0.01. They are kept as they are."""
    untaken: tuple[str, ...]
    """Actions that no row took: nothing is known about them."""

    @property
    def smallest(self) -> float:
        """Smallest estimated propensity of a logged action."""
        return float(self.propensity.min())


def estimate_propensities(
    frame: pl.DataFrame,
    columns: ColumnMap,
    *,
    source: str = "log",
    model: Any = None,
    k: int | None = None,
    folds: int = FOLDS,
    seed: int = 0,
) -> EstimatedPropensities:
    """Estimate the propensities of a log that has none, from `columns.context`: what the logging policy looked at.

    `columns.propensity` must name no column of the frame. Clusters stay whole in folds; sample weights weigh the fit; ineligible
    actions get 0 and the others are scaled up. `model`: any scikit-learn classifier with `predict_proba`, by default
    `propensity_model`, calibrated inside each fold's training rows. `k`: number of actions, where the rows do not show it.

    Raises DataError, naming the column of `source`, for a log that has propensities, that names no context, that took an action
    too rarely, or that is deterministic.
    """
    try:
        named = {name: column for name, column in columns.named().items() if name not in ("propensity", "propensities")}
        require_columns(frame.columns, [*named.values(), *columns.context], source)
        if frame.height == 0:
            raise DataError("", "an empty log", "at least one row", "Check the filter or the date that wrote it.")
        decisions = _decisions(frame, columns, k)
        _reject_one_action(decisions)
        untaken = _reject_rare(decisions)
        propensities = np.zeros((len(decisions.action), decisions.k))
        for train, test in folds_of(decisions.action, decisions.cluster, folds, seed):
            fitted = _fitted(propensity_model(len(train)) if model is None else model, decisions, train)
            propensities[np.ix_(test, fitted.classes_)] = fitted.predict_proba(decisions.context[test])
        if decisions.eligible is not None:
            propensities = _only_eligible(propensities, decisions.eligible)
        propensity = propensities[np.arange(len(decisions.action)), decisions.action]
        _reject_impossible(propensity)
        predictable, surely = _determinism(decisions, propensities)
        _reject_deterministic(predictable, surely)
    except DataError as error:
        raise error.located(source, columns.named()) from None
    return EstimatedPropensities(
        propensities=propensities,
        propensity=propensity,
        labels=decisions.labels,
        calibration=_calibration(decisions, propensities),
        calibration_p=calibration_p_value(decisions.action, propensities),
        determinism=predictable,
        sure_determinism=surely,
        below=int((propensity < SMALL).sum()),
        untaken=untaken,
    )


def estimated_log(frame: pl.DataFrame, columns: ColumnMap, found: EstimatedPropensities, *, source: str = "log") -> Log:
    """The log with its estimated propensities, marked as estimated."""
    named = replace(
        columns,
        propensity="propensity",
        propensities="propensities",
        labels=found.labels or columns.labels,
        by_eligible=False,
        propensity_estimated=True,
    )
    return to_log(_with_estimates(frame, found, source), named, source)


def write(path: Path, frame: pl.DataFrame, found: EstimatedPropensities, *, metadata: dict[bytes, bytes] | None = None) -> None:
    """Write the frame with columns `propensity` and `propensities` to a Parquet file that says that they are estimates.

    `metadata`: key-value pairs of the file that the frame came from (`pyarrow.parquet.read_schema(path).metadata`); they are kept,
    and so is what they say, under `METADATA`, of other columns. Raises DataError where the frame already has such columns.
    """
    table = _with_estimates(frame, found, str(path)).to_arrow(compat_level=pl.CompatLevel.oldest())
    kept = {**(metadata or {}), **(table.schema.metadata or {})}
    others = {
        name: said for name, said in json.loads(kept.get(METADATA, b"{}")).items() if name not in ("propensity", "by_eligible")
    }
    says = {
        "propensity_estimated": True,
        "labels": None if found.labels is None else list(found.labels),
        "propensities": "propensities",
    }
    pq.write_table(table.replace_schema_metadata({**kept, METADATA: json.dumps(others | says).encode()}), path)


def bounds_table(log: Log, target: Target, gammas: Sequence[float] = GAMMAS) -> tuple[Bounds, ...]:
    """`ope.sensitivity.value_bounds` of a policy for every factor. "logging" is the plain mean, whatever its propensities.

    Raises DataError for a target that is no policy on this log, InputError for a factor below 1.
    """
    data, policy = log.data, as_target(target)
    rows = np.arange(data.n)
    if isinstance(policy, str):
        taken = propensity = np.ones(data.n)
    else:
        propensity = data.propensity
        if policy.ndim == 2:
            checked_distribution("target", policy, data.n, data.eligible, slice(0, data.n))
            checked_width("target", data.action, policy.shape[1])
        taken = policy if policy.ndim == 1 else policy[rows, data.action]
    return tuple(Bounds(gamma, *value_bounds(taken, propensity, data.reward, gamma, data.sample_weight)) for gamma in gammas)


def print_propensities(console: Console, found: EstimatedPropensities) -> None:
    """The calibration table, the smallest propensities, how predictable the actions were, and what follows for a verdict."""
    table = Table(box=None, pad_edge=False)
    for heading in ("estimated from", "to", "mean", "observed", "pairs", "z"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.calibration:
        z = f"[red]{one.z:.1f}[/]" if abs(one.z) > Z_LIMIT else f"{one.z:.1f}"
        table.add_row(*map(number, (one.low, one.high, one.predicted, one.observed)), f"{one.count:,}", z)
    console.print("[bold]Estimated propensities[/]")
    console.print(table)
    for line in _findings(found):
        console.print(f"- {escape(line)}", highlight=False)


def _findings(found: EstimatedPropensities) -> Iterator[str]:
    n = len(found.propensity)
    wrong = [one for one in found.calibration if abs(one.z) > Z_LIMIT]
    if wrong:
        yield (
            f"{len(wrong)} of {len(found.calibration)} tenths are more than {Z_LIMIT:g} standard errors off: the model misses "
            "how the context was used. Take another model, or let it see what changed, such as the day."
        )
    if found.calibration_p < math.erfc(Z_LIMIT / math.sqrt(2)):
        yield f"Actions do not occur as often as the estimates say (p = {found.calibration_p:.1g}): every evaluation is refused."
    yield (
        f"{found.below:,} of {n:,} logged actions have an estimated propensity below {SMALL:g}, the smallest "
        f"{number(found.smallest)}; none was dropped or clipped."
    )
    if found.untaken:
        yield f"No row took {shown(found.untaken)}: nothing is known about what it would earn."
    yield (
        f"{found.determinism:.1%} of the actions are the likeliest one, {found.sure_determinism:.1%} in the half that the model is "
        "surest of; at almost 100 % nothing would have been explored."
    )
    yield "These are estimates: no verdict is better than caution, and a cause that is not in the context shows in no number here."


@dataclass(frozen=True, slots=True, eq=False)
class _Decisions:
    """What was chosen, where, and among what: a log without rewards and propensities."""

    action: IntArray
    context: FloatArray
    k: int
    labels: tuple[str, ...] | None
    cluster: NDArray[Any] | None
    sample_weight: FloatArray | None
    eligible: BoolArray | None

    @property
    def weight(self) -> FloatArray:
        return np.ones(len(self.action)) if self.sample_weight is None else self.sample_weight

    def name(self, action: int) -> str:
        return str(action) if self.labels is None else self.labels[action]


def _decisions(frame: pl.DataFrame, columns: ColumnMap, k: int | None) -> _Decisions:
    for there in (columns.propensity, columns.propensities):
        if there in frame.columns:
            field = "propensity" if there == columns.propensity else "propensities"
            raise DataError(
                field, "logged propensities", "a log without them", "Evaluate with what was logged: no estimate is better."
            )
    if not columns.context:
        raise DataError(
            "context", "no columns named", "the columns that the logging policy looked at",
            "Name them: a probability depends on what the policy saw, and without that no estimate of it can be right.",
        )  # fmt: skip
    for name in columns.context:
        if name in (columns.action, columns.reward, columns.sample_weight):
            remedy = "A policy decides before these are known: leave it out of the context."
            raise DataError(name, "what happened, in the context", "columns known before the decision", remedy)
    action, labels = action_indices(frame[columns.action], columns.labels)
    if int(action.min()) < 0:
        row = int(np.argmax(action < 0))
        raise DataError("action", f"{action[row]}", "an index of at least 0", "Map action labels to 0..k-1.", row=row)
    width = max(k or 0, len(labels or ()), int(action.max()) + 1)
    eligible = None if columns.eligible is None else eligible_sets(frame[columns.eligible], labels, width)
    if eligible is not None and not (inside := eligible[np.arange(len(action)), action]).all():
        row = int(np.argmin(inside))
        raise DataError(
            "action", f"{labels[action[row]] if labels else action[row]}", "an action of the row's eligible set",
            "Log the eligible set that the policy really used.", row=row,
        )  # fmt: skip
    weight = None if columns.sample_weight is None else numbers("sample_weight", frame[columns.sample_weight])
    if weight is not None and not (good := (weight > 0) & (weight < LARGEST)).all():
        row = int(np.argmin(good))
        raise DataError("sample_weight", f"{weight[row]}", "a positive weight", "Drop rows that stand for nothing.", row=row)
    cluster = None if columns.cluster is None else np.unique(units(frame[columns.cluster]), return_inverse=True)[1]
    context = design_matrix(frame, columns.context)
    return _Decisions(action, context, width if eligible is None else eligible.shape[1], labels, cluster, weight, eligible)


def _fitted(model: Any, decisions: _Decisions, train: IntArray) -> Any:
    weight = None if decisions.sample_weight is None else decisions.sample_weight[train]
    if decisions.cluster is not None and has_fit_parameter(model, "groups"):
        groups = decisions.cluster[train]
        return clone(model).fit(decisions.context[train], decisions.action[train], sample_weight=weight, groups=groups)
    return fit_model(model, decisions.context[train], decisions.action[train], weight)


def _reject_one_action(decisions: _Decisions) -> None:
    first = int(decisions.action[0])
    if (decisions.action == first).all():
        raise DataError("action", f"action {decisions.name(first)!r} in every row", EXPLORED, EXPLORE)
    if decisions.eligible is not None and (decisions.eligible.sum(axis=1) == 1).all():
        raise DataError("eligible", "one eligible action in every row", EXPLORED, EXPLORE)


def _reject_rare(decisions: _Decisions) -> tuple[str, ...]:
    """Raise DataError for the first action that is too rare to estimate; names of those that no row took."""
    action, what = decisions.action, "rows"
    if decisions.cluster is not None:
        what, action = "clusters", np.unique(np.stack((decisions.action, decisions.cluster)), axis=1)[0]
    counts = np.bincount(action, minlength=decisions.k)
    rare = np.flatnonzero((counts > 0) & (counts < FEWEST))
    if len(rare):
        raise DataError(
            "action", f"action {decisions.name(int(rare[0]))!r} in {counts[rare[0]]} {what}",
            f"at least {FEWEST} {what} of every action: some to fit on, some to calibrate on, some to predict",
            "Log more decisions, or give rare actions one common name, in the log and in the policies to evaluate.",
        )  # fmt: skip
    return tuple(decisions.name(int(action)) for action in np.flatnonzero(counts == 0))


def _reject_impossible(propensity: FloatArray) -> None:
    if not (propensity > 0).all():
        row = int(np.argmin(propensity > 0))
        raise DataError(
            "action", f"an action that was taken, at an estimated probability of {propensity[row]:g}", "a probability above 0",
            "Use a model whose probabilities are calibrated and never 0 (isotonic calibration gives zeros).", row=row,
        )  # fmt: skip


def _only_eligible(propensities: FloatArray, eligible: BoolArray) -> FloatArray:
    allowed = np.where(eligible, propensities, 0.0)
    return np.asarray(allowed / allowed.sum(axis=1, keepdims=True))


def _determinism(decisions: _Decisions, propensities: FloatArray) -> tuple[float, float]:
    """Share of rows with a choice whose logged action was the likeliest: of all, and of the half with the surest prediction."""
    likeliest, hit = propensities.max(axis=1), propensities.argmax(axis=1) == decisions.action
    if decisions.eligible is not None:
        choice = decisions.eligible.sum(axis=1) > 1
        likeliest, hit = likeliest[choice], hit[choice]
    surest = np.argsort(-likeliest, kind="stable")[: max(1, int(SURE_SHARE * len(hit)))]
    return float(hit.mean()), float(hit[surest].mean())


def _reject_deterministic(predictable: float, surely: float) -> None:
    if 1 - predictable < SURPRISES and 1 - surely < SURE_SURPRISES:
        raise DataError(
            "action", f"a fixed rule: other rows predict {predictable:.1%} of the actions, {surely:.1%} of the surest half",
            EXPLORED, EXPLORE,
        )  # fmt: skip


def _calibration(decisions: _Decisions, propensities: FloatArray) -> tuple[CalibrationBin, ...]:
    """Tenths of all pairs of row and action that could have been taken, by estimated probability."""
    n, k = propensities.shape
    taken = np.zeros((n, k), dtype=np.bool_)
    taken[np.arange(n), decisions.action] = True
    possible = np.tile(taken.any(axis=0), (n, 1)) if decisions.eligible is None else decisions.eligible & taken.any(axis=0)
    order = np.flatnonzero(possible.ravel())
    order = order[np.argsort(propensities.ravel()[order], kind="stable")]
    return tuple(_bin(decisions, propensities, taken, pairs) for pairs in np.array_split(order, min(BINS, len(order))))


def _bin(decisions: _Decisions, propensities: FloatArray, taken: BoolArray, pairs: IntArray) -> CalibrationBin:
    n, k = propensities.shape
    p, y, row = propensities.ravel()[pairs], taken.ravel()[pairs], pairs // k
    weight = decisions.weight
    inside = np.bincount(row, weights=p, minlength=n)  # probability that the row's action is among its pairs in this bin
    variance = float((weight**2 * inside * (1 - inside)).sum())
    excess = weight * (np.bincount(row, weights=y, minlength=n) - inside)
    if decisions.cluster is not None:
        variance = max(variance, float((np.bincount(decisions.cluster, weights=excess) ** 2).sum()))
    return CalibrationBin(
        low=float(p[0]),
        high=float(p[-1]),
        count=len(pairs),
        predicted=float(np.average(p, weights=weight[row])),
        observed=float(np.average(y, weights=weight[row])),
        z=float(excess.sum()) / math.sqrt(variance) if variance > 0 else 0.0,
    )


def _with_estimates(frame: pl.DataFrame, found: EstimatedPropensities, source: str) -> pl.DataFrame:
    for name in ("propensity", "propensities"):
        if name in frame.columns:
            raise DataError(name, "a column of this name", "a log without it", "Rename or drop it first.", source=source)
    if frame.height != len(found.propensity):
        raise DataError("", f"{frame.height:,} rows", f"the {len(found.propensity):,} that were estimated", "Pass the same rows.",
                        source=source)  # fmt: skip
    vectors = pl.Series("propensities", found.propensities.tolist(), dtype=pl.List(pl.Float64))
    return frame.with_columns(pl.Series("propensity", found.propensity), vectors)
