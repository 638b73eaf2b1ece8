"""From a stack of estimates to two ends each. An interval never asks which estimator it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import numpy as np
from scipy.special import ndtri, stdtrit

from ope.data import DataError, FloatArray, InputError, LoggedData
from ope.diagnostics import WeightTally
from ope.estimators import Bounded, Estimator, Limits
from ope.stack import Stack

Ends: TypeAlias = tuple[FloatArray, FloatArray]


class Interval(Protocol):
    """Two ends for every estimate of a stack."""

    name: ClassVar[str]

    def ends(self, stack: Stack, level: float) -> Ends:
        """Lower and upper ends (m,), (m,), two-sided at `level`."""
        ...


def normal_quantile(level: float) -> float:
    """z such that a standard normal lies within ±z with probability `level`."""
    return float(ndtri((1 + level) / 2))


def t_quantile(level: float, units: int) -> float:
    """The same for Student's t of units - 1 degrees of freedom: few clusters know their own spread badly."""
    return float(stdtrit(units - 1, (1 + level) / 2)) if units > 1 else math.nan


@dataclass(frozen=True)
class Normal:
    """value ± z·stderr, by the central limit theorem and the delta method; with clusters, Student's t of their number less one."""

    name: ClassVar[str] = "normal"

    def ends(self, stack: Stack, level: float) -> Ends:
        """Lower and upper ends (m,), (m,)."""
        half = (t_quantile(level, stack.moments.n) if stack.clustered else normal_quantile(level)) * stack.stderrs()
        return stack.values() - half, stack.values() + half


@dataclass(frozen=True)
class Bootstrap:
    """Percentiles of the whole estimator, denominators included, recomputed on resampled blocks of rows.

    Multinomial weights over blocks: one block per cluster; without clusters single rows, or random blocks of rows where
    there are more than 4,096. Blocks are unequal, so resampled sums are divided by resampled counts. Efron & Tibshirani 1993.
    """

    resamples: int = 1000
    seed: int = 0
    name: ClassVar[str] = "bootstrap"

    def __post_init__(self) -> None:
        if self.resamples < 1000:
            raise InputError(f"found resamples={self.resamples}, expected at least 1000: fewer leave the ends to chance")
        if self.seed < 0:
            raise InputError(f"found seed={self.seed}; expected a number of at least 0")

    def ends(self, stack: Stack, level: float) -> Ends:
        """Lower and upper ends (m,), (m,); needs a stack that kept its blocks."""
        values = np.concatenate([stack.values(mean) for mean in self._means(stack.blocks)])
        tail = (1 - level) / 2
        low, high = np.quantile(values, (tail, 1 - tail), axis=0)
        return low, high

    def _means(self, sums: FloatArray) -> Iterator[FloatArray]:
        """Resampled means (b, d + 1) of the blocks' counted sums (blocks, d + 1), a bounded number of draws at a time."""
        rng, blocks = np.random.default_rng(self.seed), len(sums)
        step = max(1, 2**20 // blocks)
        for start in range(0, self.resamples, step):
            size = min(step, self.resamples - start)
            drawn = rng.integers(0, blocks, (size, blocks), dtype=np.int32)
            drawn += np.arange(size, dtype=np.int32)[:, None] * np.int32(blocks)
            times = np.bincount(drawn.ravel(), minlength=size * blocks).reshape(size, blocks)
            yield times @ sums / blocks


@dataclass(frozen=True)
class EmpiricalBernstein:
    """mean ± sqrt(2 S² log(4/a) / n) + 7 b log(4/a) / (3(n - 1)): holds at every n, for plain means of bounded rows.

    Needs what the data cannot tell: the largest weight that could occur and the range of rewards. Maurer & Pontil 2009.
    """

    weight_bound: float
    reward_range: Limits
    name: ClassVar[str] = "bernstein"

    def __post_init__(self) -> None:
        low, high = self.reward_range
        if not (0 < self.weight_bound < math.inf and -math.inf < low < high < math.inf):
            raise InputError(
                f"found weight_bound={self.weight_bound}, reward_range={self.reward_range}; "
                "expected a positive, finite bound and a finite range (low, high) with low < high"
            )

    def check_estimators(self, estimators: Sequence[Estimator]) -> None:
        """Raise InputError unless every estimator is a plain mean of bounded rows."""
        for one in estimators:
            if not isinstance(one, Bounded):
                raise InputError(
                    f"{one} has no empirical-Bernstein interval: it is not the plain mean of one bounded column. "
                    'Ask for interval="normal" or "bootstrap", or for estimators such as IPS, cIPS or DR'
                )

    def check_rows(self, data: LoggedData, q: FloatArray | None) -> None:
        """Raise unless rows are independent and bounded as promised."""
        if data.cluster is not None or data.sample_weight is not None:
            raise InputError(
                "empirical-Bernstein intervals hold for independent rows that count alike; this log has clusters or "
                'sample weights. Ask for interval="normal" or "bootstrap"'
            )
        low, high = self.reward_range
        for name, values in (("reward", data.reward), ("q", q)):
            if values is None:
                continue
            rows = values.reshape(len(values), -1)
            good = ((rows >= low) & (rows <= high)).all(axis=1)
            if not good.all():
                row = int(np.argmin(good))
                worst = rows[row][~((rows[row] >= low) & (rows[row] <= high))][0]
                raise DataError(
                    name, f"a value of {worst:.6g}", f"a value within [{low:g}, {high:g}]",
                    "Widen reward_range to what could occur.", row=row,
                )  # fmt: skip

    def check_weights(self, n: int, weights: WeightTally) -> None:
        """Raise DataError if a weight exceeds the promised bound, InputError where one row leaves the variance unknown."""
        if n < 2:
            raise InputError("an empirical-Bernstein interval needs a variance; found one row, expected at least two")
        if weights.unscaled_largest > self.weight_bound:
            raise DataError(
                "propensity", f"a weight of {weights.unscaled_largest:.6g}", f"a weight within [0, {self.weight_bound:g}]",
                "Raise weight_bound to what could occur, not to what did.", row=weights.largest_row,
            )  # fmt: skip

    def ends(self, stack: Stack, level: float) -> Ends:
        """Lower and upper ends (m,), (m,), of a stack whose log and weights were checked."""
        n, log_term = stack.moments.n, math.log(4 / (1 - level))
        limits = [part.estimator.limits(self.weight_bound, self.reward_range) for part in stack.parts]  # type: ignore[attr-defined]
        width = np.array([high - low for low, high in limits])
        half = stack.stderrs() * math.sqrt(2 * log_term) + 7 * width * log_term / (3 * (n - 1))  # stderr² = S² / n
        return stack.values() - half, stack.values() + half


def interval_named(name: str | Interval) -> Interval:
    """An interval from its name. Raises InputError for an unknown name or one that cannot stand alone."""
    if not isinstance(name, str):
        return name
    if name == "bernstein":
        raise InputError(
            "an empirical-Bernstein interval needs a bound on the weights and the range of rewards: "
            "pass EmpiricalBernstein(weight_bound=10.0, reward_range=(0.0, 1.0)) with your numbers"
        )
    known: dict[str, Interval] = {"normal": Normal(), "bootstrap": Bootstrap()}
    if name not in known:
        raise InputError(f"unknown interval {name!r}; expected normal, bootstrap or an EmpiricalBernstein")
    return known[name]
