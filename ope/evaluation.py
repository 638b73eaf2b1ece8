"""One call from a log and a target policy to estimates with intervals and verdicts."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ope.accumulate import Accumulated, Candidate, Grouping, Part, Target, accumulate_parts, as_target, checked_shapes
from ope.data import DataError, FloatArray, InputError, LoggedData
from ope.diagnostics import Diagnostics, LogChecks, Thresholds, WeightTally, judge
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
    target, q, baseline = as_target(target), None if q is None else np.asarray(q), None if baseline is None else as_target(baseline)
    choice = choose(estimators, q is not None and not _scalar(target, data), baseline is not None, interval, level)
    part = part_of(data, choice, target, q, baseline)
    return evaluate_parts([part], data.n, choice, level=level, thresholds=thresholds)


@dataclass(frozen=True, slots=True)
class Choice:
    """What is estimated: the estimators asked for, those that bear witness beside them, and the kind of interval."""

    asked: tuple[Estimator, ...]
    interval: Interval

    @property
    def estimators(self) -> tuple[Estimator, ...]:
        """Those asked for, and IPS and SNIPS where nobody asked: an estimate is never believed for want of a second opinion."""
        bounded = isinstance(self.interval, EmpiricalBernstein)
        more = (one for one in (IPS(), SNIPS()) if one not in self.asked and (isinstance(one, Bounded) or not bounded))
        return (*self.asked, *more)


def choose(
    names: Sequence[str | Estimator] | None, has_q: bool, has_baseline: bool, interval: str | Interval, level: float
) -> Choice:
    """Estimators and interval from what was asked for, or by default from what there is.

    Raises InputError for an unknown name, and for an estimator that has no interval of this kind.
    """
    if not 0 < level < 1:
        raise InputError(f"found level={level}; expected a coverage between 0 and 1, such as 0.95")
    kind = interval_named(interval)
    chosen = _chosen(names, has_q, has_baseline, kind)
    if isinstance(kind, EmpiricalBernstein):
        kind.check_estimators(chosen)
    return Choice(chosen, kind)


def part_of(data: LoggedData, choice: Choice, target: Target, q: FloatArray | None, baseline: Target | None) -> Part:
    """Rows of a log, ready for `evaluate_parts`. Raises DataError or InputError where they lack what the choice needs."""
    candidate = Candidate("target", target, choice.estimators, q)
    check_candidate(data, candidate, baseline)
    if isinstance(choice.interval, EmpiricalBernstein):
        choice.interval.check_rows(data, q)
    return Part(data, (candidate,) if baseline is None else (candidate, Candidate("baseline", baseline, ())), baseline)


def evaluate_parts(
    parts: Iterable[Part],
    n: int,
    choice: Choice,
    *,
    level: float = 0.95,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    grouping: Grouping | None = None,
) -> Report:
    """`evaluate` of a log of `n` rows in parts (of `part_of`), one after the other: sums add, so the numbers are the same.

    `grouping`: where cluster sums wait; by default in memory.
    """
    kind = choice.interval
    sums = accumulate_parts(parts, n, block_seed=kind.seed if isinstance(kind, Bootstrap) else None, grouping=grouping)
    if isinstance(kind, EmpiricalBernstein):
        kind.check_weights(n, sums.weights[0])
    weight, *baseline = sums.diagnostics()
    verdicts = _Verdicts(sums.checks, weight, thresholds, baseline[0] if baseline else None, sums.weights[0])
    estimates = _estimates(sums.stack, choice, level, verdicts)
    return Report(estimates[: len(choice.asked)], weight, sums.checks)


def estimates_of(
    sums: Accumulated, choices: Sequence[Choice], *, level: float = 0.95, thresholds: Thresholds = DEFAULT_THRESHOLDS
) -> tuple[tuple[Estimate, ...], ...]:
    """Estimates of the value of every candidate of one pass: `choices[i].estimators`, which candidate i was summed with."""
    ends = np.cumsum([0, *(len(choice.estimators) for choice in choices)])
    return tuple(
        _estimates(replace(sums.stack, parts=sums.stack.parts[start:end]), choice, level,
                   _Verdicts(sums.checks, weight, thresholds, None, tally))
        for choice, weight, tally, start, end in zip(choices, sums.diagnostics(), sums.weights, ends, ends[1:], strict=False)
    )  # fmt: skip


class _Verdicts(NamedTuple):
    """What every verdict of a report stands on."""

    log: LogChecks
    weight: Diagnostics
    thresholds: Thresholds
    baseline: Diagnostics | None
    tally: WeightTally

    def of(self, kind: Estimator) -> tuple[Level, tuple[str, ...]]:
        given_up = self.tally.given_up(kind) if isinstance(kind, Transforming) else 0.0
        level, reasons = judge(self.log, self.weight, self.thresholds, model_only=kind.name == "DM", given_up=given_up)
        if kind.needs.baseline and self.baseline is not None:
            other, more = judge(self.log, self.baseline, self.thresholds, policy="baseline")
            level = max(level, other, key=("trust", "caution", "refused").index)
            reasons = tuple(dict.fromkeys((*reasons, *more)))
        return level, reasons


def _estimates(stack: Stack, choice: Choice, level: float, verdicts: _Verdicts) -> tuple[Estimate, ...]:
    kind, chosen = choice.interval, choice.estimators
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
                verdicts.log.n, verdicts.weight.ess, verdict, reasons, _notes(one, stack, kind, verdicts.log),
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


def _notes(one: Estimator, stack: Stack, kind: Interval, log: LogChecks) -> tuple[str, ...]:
    notes = []
    if one.needs.baseline:
        notes.append("The difference to the baseline, not a value.")
    elif not one.consistent:
        notes.append("Biased by design: the interval is for its own expectation, not for the policy's value.")
    if log.eligible_mean == 1:
        notes.append("One eligible action everywhere: every policy is the logging policy.")
    if stack.clustered:
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


def _scalar(target: Target, data: LoggedData) -> bool:
    return data.propensities is None if isinstance(target, str) else target.ndim == 1


def _cell(value: Any) -> str:
    if value is None:
        return "withheld"
    if isinstance(value, list):
        return " ".join(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
