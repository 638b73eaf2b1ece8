"""Were logged propensities what was sampled from, and did every row arrive? Examination of one policy's day that hold at any n.

The null hypothesis: given its logged vector over its eligible set, each row's action was drawn from that vector, apart from the
others. A sampler that keys each draw by the decision's id does just that, whoever's decisions they are: what rows of one user
share lies in the vectors and contexts, which are given, so these tests need no clusters (rewards do).

Every test sums f(row, action taken) - E[f | the row's vector]. Where vectors are known, so is the variance of the sum, exactly,
and Bernstein's inequality bounds its tail. Where the log itself was sampled, or a vector is unknown, the sum of squares takes
the variance's place, and an inequality for such sums the other's. Everything that is summed adds over parts of the day.

Rows that were kept with a known probability weigh by its inverse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from scipy.special import chdtrc, stdtrit

from ope.data import BoolArray, FloatArray, InputError, IntArray
from ope.draws import CAPS, EDGES, TAIL_CELLS, TAIL_SHARE, TAIL_STEP, Tally

Family: TypeAlias = Literal["weights", "actions", "greedy", "omnibus", "caps", "probabilities", "cells", "contexts", "columns"]

ALLOTTED: Mapping[str, float] = {
    "weights": 0.05,  # mean weight of the uniform policy, 1 test
    "actions": 0.15,  # each action's frequency: finds a fallback logged as sampled, lost rows of an action
    "greedy": 0.15,  # mean weight of the greedy policy, 1 test: finds a fallback to the most probable action
    "omnibus": 0.05,  # chi-square over actions, where counts are large: the same, spread over actions
    "caps": 0.15,  # propensities beyond each of 8 caps: finds a probability written before a cap, or sharper than the sampler
    "probabilities": 0.05,  # by the probability written, all actions together: finds a floor left out, or rounding
    "cells": 0.05,  # by the probability written, each action: finds what happens to one action only where it is rare or sure
    "contexts": 0.10,  # each context column x each action: finds rows lost by context and action
    "columns": 0.10,  # chi-square over actions along each context column, where counts are large: the same, spread over actions
    "join": 0.10,  # join rate against earlier days
    "shown": 0.05,  # not-shown against the action
}
"""Shares of the false-alarm probability. Inside a family it is divided by the number of its tests (Bonferroni)."""

UPWARD = 0.9
"""Part of the greedy policy's share for weights above 1, where fallbacks lie; the rest is for weights below."""

BINS = [f"{low:.2f} to {high:.2f}" for low, high in zip([0.0, *EDGES[1:]], [*EDGES[1:], 1.0], strict=True)]

ALONG = " along "

LARGE = 50.0
"""A sum counts as normal in a chi-square where its variance is at least this many squares of its largest term."""

LAMBDAS = 0.9 * 0.5 ** np.arange(24.0)
"""Bets that the test of sums of squares mixes: near enough to the best one whatever the spread."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One test. Expected and observed are shares of its `rows`.

    Other families have: weights and greedy, 1 and the mean; omnibus and columns, degrees of freedom and the statistic; contexts,
    0 and the mean product of the standardised column and (taken - probability); caps, 0 and the mean excess over what is expected.
    """

    family: Family
    name: str
    rows: int
    expected: float
    observed: float
    z: float
    """Difference in standard deviations of what chance explains."""
    p: float
    """At most this probable in a day that is well."""
    alpha: float
    """Its part of the false-alarm probability."""

    @property
    def failed(self) -> bool:
        """Whether chance does not explain it."""
        return self.p < self.alpha


@dataclass(frozen=True, slots=True)
class Examination:
    """Every test of a day, and the numbers that a certificate prints beside them."""

    findings: tuple[Finding, ...]
    chi2: float
    df: int
    chi2_p: float
    """NaN where counts are too small for it to be believed."""
    ess: float
    """Kish's effective sample size of the uniform policy's weights."""
    tail: float
    """Hill's index of their tail; infinity where there is none."""
    not_shown: float
    """Share not shown of the rows whose showing is known; NaN where fewer than 50 are."""
    not_shown_p: float
    """That not-shown does not depend on the action; NaN where it cannot be told."""
    not_shown_independent: bool | None

    def worst(self, family: Family) -> Finding | None:
        """The test of a family that is least explained by chance."""
        found = [one for one in self.findings if one.family == family]
        return min(found, key=lambda one: (one.p, -abs(one.z))) if found else None


def bernstein_p(total: FloatArray, variance: FloatArray, bound: FloatArray | float, share: float = 0.5) -> FloatArray:
    """Two-sided p-values of sums of centred terms: exp(-t² / (2 (V + b t / 3))) / share, at most 1.

    `variance`: of the sum, known; `bound`: no term is larger in the direction of the total. Bernstein 1946; Freedman 1975.
    `share`: part of the false alarms that this direction has; the other has the rest.
    """
    size = np.abs(total)
    scale = 2 * (variance + bound * size / 3)
    exponent = np.divide(size**2, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.minimum(1.0, np.exp(-exponent) / share)


def squares_p(total: FloatArray, squares: FloatArray, bound: FloatArray | float, share: float = 0.5) -> FloatArray:
    """Two-sided p-values of sums of centred terms, given the sum of their squares (variances, where known, may stand among them).

    For λ in (0, 1), exp(λ Σξ - (-log(1 - λ) - λ) Σξ²) has mean at most 1 where every ξ = term / bound is at least -1 (Fan, Grama &
    Liu 2015, as in Howard et al. 2021); so has its mean over several λ and both signs, and p is at most one over that (Ville).
    `share`: part of the false alarms that the total's direction has, its weight in that mean.
    """
    scaled, spread = np.abs(total / bound)[..., None], (squares / np.square(bound))[..., None]
    penalty = (-np.log1p(-LAMBDAS) - LAMBDAS) * spread
    logs = np.concatenate((LAMBDAS * scaled - penalty, -LAMBDAS * scaled - penalty), axis=-1)
    top = logs.max(axis=-1)
    sides = np.repeat([share, 1 - share], len(LAMBDAS)) / len(LAMBDAS)
    evidence = top + np.log(np.exp(logs - top[..., None]) @ sides)
    return np.exp(-np.maximum(evidence, 0.0))


def examine(total: Tally, false_alarm: float, actions: Sequence[str], columns: Sequence[str]) -> Examination:
    """Every test of the rows that were tallied; `actions` (k) and `columns` (d) are their names.

    Raises InputError where nothing was tallied.
    """
    if not total.rows:
        raise InputError("found no sampled row; expected at least one: there is nothing to test")
    sums, alpha = total.sums, {family: share * false_alarm for family, share in ALLOTTED.items()}
    findings = [_weight_finding(total, alpha["weights"])]
    chi2, df, chi2_p = math.nan, 0, math.nan
    if sums["known"]:
        chi2, df, chi2_p = _chi_square(sums["residual"], sums["covariance"], float(total.highs["times"]))
        if not math.isnan(chi2_p):
            known = int(sums["known"])
            findings.append(Finding("omnibus", "all actions", known, df, chi2, math.nan, chi2_p, alpha["omnibus"]))
        findings += _action_findings(total, alpha["actions"], actions)
        findings.append(_greedy_finding(total, alpha["greedy"]))
        findings += _cap_findings(total, alpha["caps"])
        findings += _cell_findings(total, alpha, actions)
        findings += _context_findings(total, alpha, actions, columns)
    told = int(sums["shown_known"].sum())
    p = (
        _smallest(_p(total, sums["hidden_residual"], sums["hidden_spread"], 1.0), sums["hidden_spread"] > 0)
        if told >= 50
        else math.nan
    )
    return Examination(
        findings=tuple(findings), chi2=chi2, df=df, chi2_p=chi2_p,
        ess=float((total.sums["weight"]) ** 2 / total.sums["squares"]), tail=_tail(sums["tail"]),
        not_shown=float(sums["not_shown"].sum() / told) if told >= 50 else math.nan,
        not_shown_p=p, not_shown_independent=None if math.isnan(p) else bool(p >= alpha["shown"]),
    )  # fmt: skip


def _p(total: Tally, sums: FloatArray, spread: FloatArray, bound: FloatArray | float, share: float = 0.5) -> FloatArray:
    """p-values by the known variance, or, where the log was sampled, by sums of squares; then every term is within
    1 x times, or `bound` x times.

    `bound`: of a term in the direction of its sum; `share`: part of the false alarms in that direction.
    """
    times = float(total.highs["times"])
    if times == 1:
        return bernstein_p(sums, spread, bound, share)
    return squares_p(sums, spread, times * np.maximum(bound, 1.0), share)


def _smallest(p: FloatArray, tested: BoolArray) -> float:
    """The smallest of several p-values, times their number."""
    return float(min(1.0, p[tested].min() * tested.sum())) if tested.any() else 1.0


def _weight_finding(total: Tally, alpha: float) -> Finding:
    sums, times = total.sums, float(total.highs["times"])
    excess, spread = sums["weight"] - sums["reach"], sums["weight_spread"]
    largest = np.maximum(total.highs["weight"], times)  # a row may weigh as little as nothing, where `times` is expected
    if total.highs["estimated"]:
        p = squares_p(excess, spread, largest)
    else:
        p = bernstein_p(excess, spread, largest if excess > 0 else 1.0)
    return Finding(
        "weights", "uniform policy", total.rows, 1.0, float(sums["weight"] / sums["reach"]), _z(excess, spread), float(p), alpha
    )


def _greedy_finding(total: Tally, alpha: float) -> Finding:
    sums, most, times = total.sums, float(total.highs["greedy"]), float(total.highs["times"])
    excess, spread = sums["greedy"], sums["greedy_spread"]
    up = bool(excess > 0)
    bound = most if up else max(1.0, most * (times > 1))  # sums of squares are bounded on both sides
    p = float(_p(total, excess, spread, bound, UPWARD if up else 1 - UPWARD)) if spread > 0 else 1.0
    observed = float(1 + excess / sums["known_times"])
    return Finding("greedy", "most probable action", int(sums["known"]), 1.0, observed, _z(excess, spread), p, alpha)


def _action_findings(total: Tally, alpha: float, actions: Sequence[str]) -> list[Finding]:
    sums = total.sums
    difference = sums["observed"] - sums["expected"]
    p, tested = _p(total, difference, sums["spread"], 1.0), sums["spread"] > 0
    return [
        Finding(
            "actions", actions[int(j)], int(sums["known"]), float(sums["expected"][j] / sums["known_times"]),
            float(sums["observed"][j] / sums["known_times"]), _z(difference[j], sums["spread"][j]), float(p[j]),
            alpha / tested.sum(),
        )
        for j in np.flatnonzero(tested)
    ]  # fmt: skip


def _cap_findings(total: Tally, alpha: float) -> list[Finding]:
    sums, n = total.sums, float(total.sums["known_times"])
    bound = np.where(sums["beyond"] > 0, 1 - CAPS, total.highs["beyond_mean"])
    p, tested = _p(total, sums["beyond"], sums["beyond_spread"], bound), sums["beyond_spread"] > 0
    return [
        Finding(
            "caps", f"{CAPS[i]:.1f}", int(sums["known"]), 0.0, float(sums["beyond"][i] / n),
            _z(sums["beyond"][i], sums["beyond_spread"][i]), float(p[i]), alpha / tested.sum(),
        )
        for i in np.flatnonzero(tested)
    ]  # fmt: skip


def _cell_findings(total: Tally, alpha: Mapping[str, float], actions: Sequence[str]) -> list[Finding]:
    """By the probability written: all actions together, each bin; then those bins of single actions that stand out."""
    sums, known = total.sums, slice(1, None)
    pairs, times = sums["cell_pairs"][known], sums["cell_times"][known]
    expected, observed, spread = sums["cell_expected"][known], sums["cell_observed"][known], sums["cell_spread"][known]
    row_spread = sums["bin_spread"][known]
    difference = (observed - expected).sum(axis=1)
    p, tested = _p(total, difference, row_spread, 1.0), row_spread > 0
    found = [
        Finding(
            "probabilities", BINS[b], int(pairs[b].sum()), float(expected[b].sum() / times[b].sum()),
            float(observed[b].sum() / times[b].sum()), _z(difference[b], row_spread[b]), float(p[b]),
            alpha["probabilities"] / tested.sum(),
        )
        for b in np.flatnonzero(tested)
    ]  # fmt: skip
    difference, tested = observed - expected, spread > 0
    low, high = EDGES[:, None], np.append(EDGES[1:], 1.0)[:, None]
    p = _p(total, difference, spread, np.where(difference > 0, 1 - low, high))
    return found + [
        Finding(
            "cells", f"{actions[j]}, {BINS[b]}", int(pairs[b, j]), float(expected[b, j] / times[b, j]),
            float(observed[b, j] / times[b, j]), _z(difference[b, j], spread[b, j]), float(p[b, j]), alpha["cells"] / tested.sum(),
        )
        for b, j in _standing_out(p, tested, alpha["cells"])
    ]  # fmt: skip


def _context_findings(total: Tally, alpha: Mapping[str, float], actions: Sequence[str], columns: Sequence[str]) -> list[Finding]:
    """Residuals along every context column, centred and scaled by the day's own contexts: those that stand out."""
    sums, n = total.sums, int(total.sums["known"])
    mean, square = sums["x"] / n, sums["x_square"] / n
    sd = np.sqrt(np.maximum(square - mean**2, 0.0))
    varies = sd > 1e-6 * np.sqrt(square)  # below that rounding is all there is
    scale, centre = np.where(varies, sd, 1.0)[:, None], mean[:, None]
    difference = (sums["x_residual"] - centre * sums["residual"]) / scale
    spread = (sums["x_square_spread"] - 2 * centre * sums["x_spread"] + centre**2 * sums["spread"]) / scale**2
    bound = np.where(varies, np.maximum(total.highs["x"] - mean, mean - total.lows["x"]), 1.0)[:, None] / scale
    tested = varies[:, None] & (spread > 0) & (sums["spread"] > 0)
    p = _p(total, difference, np.maximum(spread, 0.0), bound)
    found = [
        Finding(
            "contexts", f"{actions[j]}{ALONG}{columns[i]}", n, 0.0, float(difference[i, j] / sums["known_times"]),
            _z(difference[i, j], spread[i, j]), float(p[i, j]), alpha["contexts"] / tested.sum(),
        )
        for i, j in _standing_out(p, tested, alpha["contexts"])
    ]  # fmt: skip
    if "x_joint" not in sums:
        return found
    centre, times = centre[:, :, None], float(total.highs["times"])
    joint = (sums["x_square_joint"] - 2 * centre * sums["x_joint"] + centre**2 * sums["covariance"]) / scale[:, :, None] ** 2
    each = [_chi_square(difference[i], joint[i], times * float(bound[i, 0])) for i in range(len(mean)) if varies[i]]
    p = np.array([p for _, _, p in each])
    tested = ~np.isnan(p)
    names = [columns[i] for i in range(len(mean)) if varies[i]]
    return found + [
        Finding("columns", names[i], n, each[i][1], each[i][0], math.nan, float(p[i]), alpha["columns"] / tested.sum())
        for i, _ in _standing_out(p[:, None], tested[:, None], alpha["columns"])
    ]


def _standing_out(p: FloatArray, tested: BoolArray, alpha: float) -> list[tuple[int, int]]:
    """Places of a table of tests that fail at their part of alpha, and in any case that of the smallest p."""
    if not tested.any():
        return []
    least = np.where(tested, p, np.inf)
    failed = least < alpha / tested.sum()
    failed[np.unravel_index(least.argmin(), p.shape)] = True
    return [(int(i), int(j)) for i, j in np.argwhere(failed)]


def _chi_square(difference: FloatArray, covariance: FloatArray, bound: float) -> tuple[float, int, float]:
    """Of differences (k,) with their covariance, those of enough rows: statistic, degrees of freedom and p, NaN where none is."""
    used = np.diag(covariance) >= LARGE * bound**2
    if not used.any():
        return 0.0, 0, math.nan
    eigenvalues, vectors = np.linalg.eigh(covariance[np.ix_(used, used)])
    kept = eigenvalues > 1e-9 * float(eigenvalues.max())
    statistic, df = float(((vectors.T @ difference[used])[kept] ** 2 / eigenvalues[kept]).sum()), int(kept.sum())
    return statistic, df, float(chdtrc(df, statistic))


def _z(difference: Any, spread: Any) -> float:
    return float(difference / math.sqrt(spread)) if spread > 0 else 0.0


def _tail(counts: IntArray) -> float:
    """Hill's index of the largest weights, from counts of their logarithms. Infinity where fewer than ten, or equal ones."""
    most = int(counts.sum() * TAIL_SHARE)
    above = np.cumsum(counts[::-1])[::-1]  # rows in this cell or a higher one
    if most < 10:
        return math.inf
    threshold = int(np.flatnonzero(above > most).max())
    excess = TAIL_STEP * float((np.arange(TAIL_CELLS - threshold) * counts[threshold:])[1:].sum())
    return most / excess if excess > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Usual:
    """Join rates of earlier days, rounded to a thousandth so that one late reward does not make another certificate."""

    days: int
    rate: float
    spread: float
    """Standard deviation between days."""

    @classmethod
    def of(cls, joined: Sequence[int], mature: Sequence[int], *, days: int = 7, rows: int = 100) -> Usual | None:
        """Of days with at least `rows` mature rows; None where there are fewer than `days` of them."""
        rates = [j / m for j, m in zip(joined, mature, strict=True) if m >= rows]
        if len(rates) < days:
            return None
        return cls(len(rates), round(float(np.mean(rates)), 3), round(float(np.std(rates, ddof=1)), 3))

    def band(self, mature: int, false_alarm: float) -> tuple[float, float]:
        """Where the rate of a further day of so many mature rows lies, unless something is wrong.

        A prediction interval: Student's t of the days, the spread between them or the binomial one, whichever is larger, and a
        margin for rounding and for the few rows that make a rate near 0 or 1.
        """
        alpha = ALLOTTED["join"] * false_alarm
        rate = (self.rate * mature + 1) / (mature + 2)
        variance = max(self.spread**2, rate * (1 - rate) / mature) * (1 + 1 / self.days)
        quantile = float(stdtrit(self.days - 1, 1 - alpha / 2))
        half = quantile * math.sqrt(variance) + 5e-4 + 2 * math.log(2 / alpha) / (3 * mature)
        return max(0.0, self.rate - half), min(1.0, self.rate + half)


def reasons(found: Examination) -> list[str]:
    """The worst failed test of each family in words, what is least explained by chance first."""
    worst = [one for family in get_args(Family) if (one := found.worst(family)) is not None and one.failed]
    return [explain(one) for one in sorted(worst, key=lambda one: (one.p, -abs(one.z)))]


def explain(one: Finding) -> str:
    """A failed test in words: what was found, what is expected, what to do."""
    p = f"p = {one.p:.1g}" if one.p > 1e-99 else "p < 1e-99"
    sure = f"(z = {one.z:.1f}, {p}, {one.rows:,} rows)"
    more = one.observed > one.expected
    if one.family == "weights":
        return (
            f"Weights of the uniform policy average {one.observed:.4g} where 1 is expected {sure}: "
            "logged propensities are not what was sampled, or rows are missing. See what the other tests name."
        )
    if one.family == "greedy":
        advice = (
            "a fallback to the best action may be logged as sampled, or rows of other actions are missing: log its kind, count "
            "every hop"
            if more
            else "its rows may be missing, or the sampler draws more evenly than it logs: count every hop, log the vector that is "
            "drawn from"
        )
        return (
            f"The most probable action was taken {'more often' if more else 'less often'} than its propensities say: its weights "
            f"average {one.observed:.4g} where 1 is expected {sure}: {advice}."
        )
    if one.family == "omnibus":
        return (
            f"Actions differ together from their propensities: chi-square {one.observed:.1f} where {one.expected:.0f} is expected "
            f"({p}, {one.rows:,} rows). Look at expected and taken in the support table."
        )
    if one.family == "caps":
        return (
            f"Actions of a logged probability beyond {one.name} are taken too {'often' if more else 'seldom'} {sure}: typical of "
            "a probability written before a cap, guard rail or temperature is applied. Log the vector that is drawn from."
        )
    if one.family == "columns":
        return (
            f"Actions depend on {one.name} in another way than their propensities: chi-square {one.observed:.1f} where "
            f"{one.expected:.0f} is expected ({p}, {one.rows:,} rows): rows are lost by context and action, or the "
            "sampler saw another context. Compare counts before and after each hop."
        )
    if one.family == "contexts":
        action, _, column = one.name.rpartition(ALONG)
        return (
            f"Action {action} is taken too {'often' if more else 'seldom'} where {column} is high {sure}: "
            "rows are lost by context and action, or the sampler saw another context. Compare counts before and after each hop."
        )
    taken = f"{one.observed:.2%} taken where {one.expected:.2%} is expected"
    if one.family == "actions":
        advice = (
            "a fallback or override may be logged as sampled, or rows of other actions are missing: log its kind, count every hop"
            if more
            else "its rows may be missing, or a fallback takes its place: count every hop, log the kind of each decision"
        )
        return f"Action {one.name}: {taken} {sure}: {advice}."
    where = "Propensities of" if one.family == "probabilities" else "Propensities of action"
    return (
        f"{where} {one.name}: {taken} {sure}: typical of a floor, cap or rule that acts after the probability is written, or of a "
        "fallback logged as sampled. Log the vector that is drawn from, and the kind of each decision."
    )
