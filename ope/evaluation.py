"""One call from a log and a target policy to estimates with intervals and verdicts."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ope.accumulate import Accumulated, Candidate, Target, accumulate, as_target, checked_shapes, width_of
from ope.data import DataError, FloatArray, InputError, LoggedData
from ope.diagnostics import Diagnostics, LogChecks, Thresholds, check_log, judge, weight_diagnostics
from ope.estimate import Estimate, Level
from ope.estimators import IPS, SNIPS, Bounded, Estimator, Transforming, estimator
from ope.intervals import Bootstrap, EmpiricalBernstein, Interval, interval_named
from ope.stack import Stack

DEFAULT_THRESHOLDS = Thresholds()


@dataclass(frozen=True, slots=True)
class Report(Mapping[str, Estimate]):
    """Estimates of one policy, keyed by `str(estimator)`. Prints a line each; a notebook shows it as a table."""

    estimates: tuple[Estimate, ...]
    weights: Diagnostics
    """Of the target's importance weights."""
    log: LogChecks

    def __getitem__(self, key: str | Estimator) -> Estimate:
        try:
            wanted = str(estimator(key))
        except InputError:
            wanted = str(key)
        for estimate in self.estimates:
            if estimate.estimator == wanted:
                return estimate
        raise KeyError(f"{wanted}: this report has {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        return iter([estimate.estimator for estimate in self.estimates])

    def __len__(self) -> int:
        return len(self.estimates)

    @property
    def refused(self) -> bool:
        """True if no estimate of this report should be believed."""
        return all(estimate.verdict == "refused" for estimate in self.estimates)

    def to_records(self, *, force: bool = False) -> list[dict[str, Any]]:
        """A dict per estimator, ready for JSON or any data frame. Refused numbers are None unless forced."""
        return [estimate.to_record(force=force) for estimate in self.estimates]

    def __str__(self) -> str:
        return "\n".join(str(estimate) for estimate in self.estimates)

    def _repr_html_(self) -> str:
        head = ("estimator", "value", "stderr", "low", "high", "n", "ess", "verdict", "reasons")
        cells = [[_cell(record[name]) for name in head] for record in self.to_records()]
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
        return f"<table><thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead><tbody>{body}</tbody></table>"


def evaluate(
    data: LoggedData,
    target: Target,
    q: FloatArray | None = None,
    *,
    baseline: Target | None = None,
    estimators: Sequence[str | Estimator] | None = None,
    level: float = 0.95,
    interval: str | Interval = "normal",
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
) -> Report:
    """Estimate what `target` would have earned per decision in the logged contexts, with every estimator asked for.

    `target`, `baseline`: (n, k) probabilities, or (n,) those of the logged actions, or "logging", the policy that logged.
    `q` (n, k): what a reward model, fitted on other rows than these, predicts for every action (`ope.nuisance` makes one).
    `estimators`: names or objects; by default IPS and SNIPS, with `q` also DM and DR, with a `baseline` also Delta.
    `level`: two-sided coverage. `interval`: "normal", "bootstrap" or an object of `ope.intervals`.

    Raises DataError for arrays that no policy could have written, InputError for an estimator whose needs are not met.
    """
    if not 0 < level < 1:
        raise InputError(f"found level={level}; expected a coverage between 0 and 1, such as 0.95")
    target, q, baseline = as_target(target), None if q is None else np.asarray(q), None if baseline is None else as_target(baseline)
    kind = interval_named(interval)
    chosen = _chosen(estimators, q is not None and not _scalar(target, data), baseline is not None, kind)
    candidate = Candidate("target", target, chosen + _witnesses(chosen, kind), q)
    check_candidate(data, candidate, baseline)
    if isinstance(kind, EmpiricalBernstein):
        kind.check_log(data, q, chosen)
    seed = kind.seed if isinstance(kind, Bootstrap) else None
    sums = accumulate(data, [candidate], baseline=baseline, block_seed=seed)
    if isinstance(kind, EmpiricalBernstein):
        kind.check_weights(sums.weights[0])
    weight = candidate_diagnostics(data, sums)[0]
    log = check_log(data, width_of(data, [candidate], baseline))
    against = None if baseline is None else _baseline_diagnostics(data, baseline)
    verdicts = _Verdicts(log, weight, thresholds, against, sums.weights[0])
    estimates = _estimates(data, sums.stack, candidate.estimators, kind, level, verdicts)
    return Report(estimates[: len(chosen)], weight, log)


def candidate_diagnostics(data: LoggedData, sums: Accumulated) -> list[Diagnostics]:
    """Diagnostics of every candidate's weights, from one pass over the log."""
    means, stderrs = sums.weight_means.values(), sums.weight_means.stderrs()
    return [
        weight_diagnostics(
            weight if data.sample_weight is None else weight * data.sample_weight, data.reward, float(mean), float(stderr)
        )
        for weight, mean, stderr in zip(sums.weights, means, stderrs, strict=True)
    ]


class _Verdicts(NamedTuple):
    """What every verdict of a report stands on."""

    log: LogChecks
    weight: Diagnostics
    thresholds: Thresholds
    baseline: Diagnostics | None
    weights: FloatArray

    def of(self, kind: Estimator) -> tuple[Level, tuple[str, ...]]:
        given_up = 0.0
        if isinstance(kind, Transforming) and self.weight.ess > 0:
            given_up = 1 - float(kind.transformed(self.weights).sum() / self.weights.sum())
        level, reasons = judge(self.log, self.weight, self.thresholds, model_only=kind.name == "DM", given_up=given_up)
        if kind.needs.baseline and self.baseline is not None:
            other, more = judge(self.log, self.baseline, self.thresholds, policy="baseline")
            level = max(level, other, key=("trust", "caution", "refused").index)
            reasons = tuple(dict.fromkeys((*reasons, *more)))
        return level, reasons


def _estimates(
    data: LoggedData, stack: Stack, chosen: Sequence[Estimator], kind: Interval, level: float, verdicts: _Verdicts
) -> tuple[Estimate, ...]:
    values, stderrs = stack.values(), stack.stderrs()
    low, high = kind.ends(stack, level)
    apart = _apart(chosen, low, high)
    estimates = []
    for i, one in enumerate(chosen):
        verdict, reasons = verdicts.of(one)
        if not np.isfinite((values[i], low[i], high[i])).all():
            verdict, reasons = "refused", (*reasons, "It has no finite interval: too few rows overlap with the policy.")
        if apart[i]:
            verdict = "caution" if verdict == "trust" else verdict
            reasons = (*reasons, f"Its interval and that of {', '.join(apart[i])} do not meet: at least one of them is wrong.")
        estimates.append(
            Estimate(
                str(one), float(values[i]), float(stderrs[i]), float(low[i]), float(high[i]), level, kind.name,
                data.n, verdicts.weight.ess, verdict, reasons, _notes(one, data, stack, kind, verdicts.log),
            )
        )  # fmt: skip
    return tuple(estimates)


def _apart(chosen: Sequence[Estimator], low: FloatArray, high: FloatArray) -> list[list[str]]:
    """For each estimate of the value, the consistent estimates whose intervals do not overlap its own."""
    return [
        [
            str(other)
            for j, other in enumerate(chosen)
            if other.consistent and not one.needs.baseline and (low[i] > high[j] or low[j] > high[i])
        ]
        for i, one in enumerate(chosen)
    ]


def _witnesses(chosen: Sequence[Estimator], kind: Interval) -> tuple[Estimator, ...]:
    """IPS and SNIPS where nobody asked for them: an estimate is never believed for want of a second opinion."""
    bounded = isinstance(kind, EmpiricalBernstein)
    return tuple(one for one in (IPS(), SNIPS()) if one not in chosen and (isinstance(one, Bounded) or not bounded))


def _notes(one: Estimator, data: LoggedData, stack: Stack, kind: Interval, log: LogChecks) -> tuple[str, ...]:
    notes = []
    if one.needs.baseline:
        notes.append("The difference to the baseline, not a value.")
    elif not one.consistent:
        notes.append("Biased by design: the interval is for its own expectation, not for the policy's value.")
    if log.eligible_mean == 1:
        notes.append("One eligible action everywhere: every policy is the logging policy.")
    if data.cluster is not None:
        notes.append(f"{stack.moments.n:,} clusters.")
    if isinstance(kind, Bootstrap):
        notes.append(f"{kind.resamples:,} resamples of {len(stack.blocks):,} blocks.")
    return tuple(notes)


def _chosen(names: Sequence[str | Estimator] | None, has_q: bool, has_baseline: bool, kind: Interval) -> tuple[Estimator, ...]:
    if isinstance(names, str):
        raise InputError(f"found estimators={names!r}; expected a sequence such as ({names!r},)")
    if names is None:
        names = [*(["DM"] if has_q else []), "IPS", "SNIPS", *(["DR"] if has_q else []), *(["Delta"] if has_baseline else [])]
        if isinstance(kind, EmpiricalBernstein):
            names = [name for name in names if isinstance(estimator(name), Bounded)]
    chosen = tuple(dict.fromkeys(estimator(name) for name in names))
    if not chosen:
        raise InputError("no estimator was asked for; expected at least one, such as 'IPS'")
    return chosen


def check_candidate(data: LoggedData, candidate: Candidate, baseline: Target | None) -> None:
    """Raise, before any work, where shapes do not fit or an estimator lacks what it needs."""
    checked_shapes(data, candidate, baseline)
    for one in candidate.estimators:
        if one.needs.baseline and baseline is None:
            raise InputError(
                f"{one} compares two policies; expected a baseline: (n, k) probabilities, or 'logging' "
                "(on the command line: --baseline)"
            )
        if one.needs.q and _scalar(candidate.target, data):
            raise DataError(
                "target", "one probability per row", f"all k of them, which {one} needs beside the logged action's",
                "Give the whole vector (n, k), or ask only for IPS, SNIPS, cIPS, beta-IPS or Delta.",
            )  # fmt: skip
        if one.needs.q and candidate.q is None:
            raise InputError(
                f"{one} needs a reward model; expected q, its predictions (n, k). "
                "Pass q, or fit one with ope.nuisance.cross_fit_reward (on the command line: --context)"
            )


def _baseline_diagnostics(data: LoggedData, baseline: Target) -> Diagnostics:
    return candidate_diagnostics(data, accumulate(data, [Candidate("baseline", baseline, ())]))[0]


def _scalar(target: Target, data: LoggedData) -> bool:
    return data.propensities is None if isinstance(target, str) else target.ndim == 1


def _cell(value: Any) -> str:
    if value is None:
        return "withheld"
    if isinstance(value, list):
        return " ".join(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
