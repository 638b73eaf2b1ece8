"""From sums to records of the tables `estimates` and `differences`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr

from ope.accumulate import Accumulated
from ope.data import FloatArray
from ope.diagnostics import Diagnostics
from ope.estimate import Estimate
from ope.estimators import IPS
from ope.evaluation import Choice, estimates_of
from ope.intervals import t_quantile
from pipelines.nightly.stacks import LOGGING, own_moments, part_named

UNCERTIFIED = "Rows of days and policies without a passed certificate are in."

_LEVELS = ("trust", "caution", "refused")


class Slice(NamedTuple):
    """The rows that one set of estimates stands on."""

    metric: str
    segment: str
    """`all`, or name=value."""
    fold: int
    window: int
    """Days up to the date."""


class Valued(NamedTuple):
    """One pass over a slice: its sums, and what else its records say."""

    sums: Accumulated
    policies: tuple[str, ...]
    """Candidates in the order of the pass, the logging policy last."""
    choices: tuple[Choice, ...]
    """Of each of them."""
    unsupported: FloatArray | None
    """Mean probability of each policy on actions that were never sampled; None where whole vectors were not logged."""
    additive: bool
    certified: bool


def records_of(
    valued: Valued, key: dict[str, Any], *, level: float, tolerance: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of `estimates` and of `differences` of a slice; `key` holds the columns that name it."""
    found = estimates_of(valued.sums, valued.choices, level=level)
    asked = [(i, one) for i, choice in enumerate(valued.choices) for one in found[i][: len(choice.asked)]]
    weights = valued.sums.diagnostics()
    estimates = [_estimate(valued, key, i, one, weights[i]) for i, one in asked]
    plain = next(one for one in found[-1] if one.estimator == str(IPS()))
    differences = [
        key | {"policy": valued.policies[i], "estimator": one.estimator} | difference
        for (i, one), difference in zip(asked, _differences(valued, asked, plain, level, tolerance), strict=False)
    ]  # the logging policy comes last, and is not compared with itself
    return estimates, differences


def _estimate(valued: Valued, key: dict[str, Any], index: int, one: Estimate, weight: Diagnostics) -> dict[str, Any]:
    policy, stack = valued.policies[index], valued.sums.stack
    own = own_moments(stack, [next(p for p in stack.parts if p.label == f"{policy}: {one.estimator}")])
    record = one.to_record()
    return key | {
        "policy": policy, "estimator": one.estimator, "n": one.n, "clusters": valued.sums.checks.clusters, "moments_n": own.n,
        "moments_mean": own.mean.tolist(), "moments_cross": own.cross.ravel().tolist(), "additive": valued.additive,
        **{name: record[name] for name in ("value", "stderr", "low", "high", "ess")}, "interval_kind": one.interval,
        "anytime": False, "max_share": weight.max_share, "tail": _finite(weight.tail_index),
        "weight_mean": weight.weight_mean, "weight_z": _finite(weight.weight_z),
        "unsupported": None if valued.unsupported is None else float(valued.unsupported[index]),
        **_verdict(valued.certified, one),
    }  # fmt: skip


def _differences(
    valued: Valued, asked: Sequence[tuple[int, Estimate]], plain: Estimate, level: float, tolerance: float
) -> Iterator[dict[str, Any]]:
    """Each candidate's estimate minus what the logging policy earned, paired: on the same rows, by their joint covariance."""
    stack = valued.sums.stack
    values, covariance, labels = stack.values(), stack.covariance(), [part.label for part in stack.parts]
    base = labels.index(part_named(stack.parts, LOGGING, IPS()).label)
    quantile = t_quantile(level, stack.moments.n)
    for index, one in asked:
        if valued.policies[index] == LOGGING:
            return
        at = labels.index(f"{valued.policies[index]}: {one.estimator}")
        value = float(values[at] - values[base])
        variance = float(covariance[at, at] + covariance[base, base] - 2 * covariance[at, base])
        said = _verdict(valued.certified, one, plain)
        believed = said["verdict"] != "refused" and math.isfinite(value) and math.isfinite(variance)
        stderr = math.sqrt(max(variance, 0.0)) if believed else math.nan
        numbers = {
            "value": value, "stderr": stderr, "low": value - quantile * stderr, "high": value + quantile * stderr,
            "p_worse": p_below(value, stderr, 0.0), "p_below_c": p_below(value, stderr, -tolerance),
        }  # fmt: skip
        yield {"baseline": LOGGING, "interval_kind": one.interval, **said} | (numbers if believed else {})


def p_below(value: float, stderr: float, limit: float) -> float:
    """Probability that a normal number of this mean and standard error is below a limit."""
    return float(ndtr((limit - value) / stderr)) if stderr > 0 else float(value < limit)


def _verdict(certified: bool, *estimates: Estimate) -> dict[str, Any]:
    """The gravest verdict of some estimates, with all of their reasons."""
    level = max((one.verdict for one in estimates), key=_LEVELS.index)
    reasons = list(dict.fromkeys(reason for one in estimates for reason in one.reasons))
    if not certified:
        level, reasons = max(level, "caution", key=_LEVELS.index), [*reasons, UNCERTIFIED]
    return {"certified": certified, "verdict": level, "reasons": reasons}


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None
