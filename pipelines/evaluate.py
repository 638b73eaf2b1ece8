"""Evaluate a policy on a log in a file: what `propel ope` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ope import DataError, Report, evaluate
from ope.accumulate import Candidate, Target, checked_shapes
from ope.data import FloatArray
from ope.estimators import Estimator, estimator
from ope.intervals import Interval
from ope.nuisance import Design, cross_fit_reward
from pipelines.frame import ColumnMap, Log
from pipelines.importers.files import column_names, read_log, read_policy

FOLDS = 3
"""Folds of the cross-fitted reward model."""


class Evaluated(NamedTuple):
    """A report, and the log that it is about."""

    log: Log
    report: Report


def evaluate_file(
    path: Path,
    policy: str,
    columns: ColumnMap,
    *,
    baseline: str | None = None,
    estimators: Sequence[str] | None = None,
    interval: Interval,
    level: float = 0.95,
    k: int | None = None,
    design: Design = "additive",
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> Evaluated:
    """Read a log, resolve the policies, fit a reward model where there is a context, and evaluate.

    Raises DataError, naming file, column and row, or InputError for estimators whose needs are not met.
    """
    chosen = None if estimators is None else [estimator(name) for name in estimators]
    also = [spec for spec in (policy, baseline) if spec is not None and _may_be_column(spec)]
    log = read_log(path, columns, also=also, k=k)
    there = column_names(path)
    target = read_policy(policy, log, k, there)
    against = None if baseline is None else read_policy(baseline, log, k, there)
    try:
        checked_shapes(log.data, Candidate("target", target, ()), against)
        q = _reward_model(log, target, chosen, design, seed, progress) if columns.context else None
        report = evaluate(log.data, target, q, baseline=against, estimators=chosen, level=level, interval=interval)
    except DataError as error:
        raise _located(error, log, columns, policy, baseline) from None
    return Evaluated(log, report)


def _may_be_column(spec: str) -> bool:
    return spec not in ("uniform", "logging") and not Path(spec).is_file()


def _reward_model(
    log: Log,
    target: Target,
    chosen: Sequence[Estimator] | None,
    design: Design,
    seed: int,
    progress: Callable[[], object] | None,
) -> FloatArray | None:
    """Cross-fitted predictions (n, k), or None where no estimator would use them."""
    vector = log.data.propensities if isinstance(target, str) else target
    if vector is None or vector.ndim != 2 or (chosen is not None and not any(one.needs.q for one in chosen)):
        return None
    return cross_fit_reward(log.data, vector.shape[1], design=design, folds=FOLDS, seed=seed, progress=progress)


def _located(error: DataError, log: Log, columns: ColumnMap, policy: str, baseline: str | None) -> DataError:
    """Say which file and column an array came from."""
    specs = {"target": policy, "baseline": baseline or ""}
    spec = specs.get(error.column, "")
    if spec and Path(spec).is_file():
        return error.located(spec, {error.column: "p_0, p_1, ..."})
    return error.located(log.source, {**columns.named(), **specs})
