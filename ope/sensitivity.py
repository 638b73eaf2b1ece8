"""What a value could be if propensities are wrong by a bounded factor: bounds for propensities that were estimated.

Marginal sensitivity model (Tan 2006): the odds of the true propensity of the logged action, p/(1 - p), and those of the one at
hand differ by at most a factor Γ >= 1, in either direction and in every row by another amount. For the value of a policy:
Kallus & Zhou 2018, "Confounding-robust policy improvement"; Zhao, Small & Bhattacharya 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ope.data import BoolArray, DataError, FloatArray, InputError, checked_finite, checked_propensity

GAMMAS = (1.0, 1.5, 2.0, 3.0)
"""Factors between true and estimated odds that bounds are shown for."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Smallest and largest self-normalised value where the odds of propensities are wrong by a factor of at most `gamma`."""

    gamma: float
    low: float
    high: float


def value_bounds(
    weight_target: ArrayLike, propensity: ArrayLike, reward: ArrayLike, gamma: float, sample_weight: ArrayLike | None = None
) -> tuple[float, float]:
    """The smallest and the largest self-normalised value Σ W_i r_i / Σ W_i that propensities within a factor `gamma` allow.

    `weight_target` (n,): the target's probabilities π_i of the logged actions. `propensity` (n,) in (0, 1], `reward` (n,),
    `sample_weight` (n,) positive. W_i = π_i s_i u_i with 1 + (1/p_i - 1)/Γ <= u_i <= 1 + (1/p_i - 1)Γ. At gamma = 1 both are
    SNIPS. The bounds are in units of the reward and exact for these rows; sampling error comes on top of them.

    A ratio of linear functions is largest where every u_i is at an end, the upper one for rewards above the optimum: after
    sorting by reward, one of n + 1 cuts. O(n log n). Raises DataError for arrays that no log has, InputError for gamma < 1.
    """
    if not 1 <= gamma < np.inf:
        raise InputError(f"found gamma={gamma}; expected a finite factor of at least 1, where 1 says that propensities are right")
    rewards = checked_finite("reward", reward, (None,), "Drop rows whose reward is not known yet; unknown is not 0.")
    n = len(rewards)
    if n == 0:
        raise DataError("reward", "an empty log", "at least one row", "Check the filter or the date that selected it.")
    odds = 1 / checked_propensity("propensity", propensity, n) - 1
    mass = checked_propensity("weight_target", weight_target, n, target=True)
    if sample_weight is not None:
        times = checked_finite("sample_weight", sample_weight, (n,), "Drop rows that stand for nothing.")
        if not (times > 0).all():
            row = int(np.argmin(times > 0))
            raise DataError("sample_weight", f"{times[row]}", "a positive weight", "Drop rows that stand for nothing.", row=row)
        mass = mass * times
    if not mass.any():
        raise InputError(
            "found a target that never takes an action that was logged; expected some overlap: no value can be bounded without it"
        )
    return _extremes(rewards, mass * (1 + odds / gamma), mass * (1 + odds * gamma), mass > 0)


def _extremes(reward: FloatArray, least: FloatArray, most: FloatArray, counts: BoolArray) -> tuple[float, float]:
    """Extremes of Σ W r / Σ W over least <= W <= most (n,): rows below each cut have one end, those above it the other."""
    order = np.argsort(reward, kind="stable")
    least, most = least[order], most[order]
    middle = float(reward[counts].mean())
    centred = reward[order] - middle  # sums of large, nearly equal rewards would lose the digits in which they differ

    def at_cuts(below: FloatArray, above: FloatArray) -> FloatArray:
        total = _until(below) + _from(above)
        return np.asarray((_until(below * centred) + _from(above * centred)) / total)

    ends = np.array([at_cuts(most, least).min(), at_cuts(least, most).max()]) + middle
    low, high = np.clip(ends, reward[counts].min(), reward[counts].max()).tolist()
    return low, high


def _until(values: FloatArray) -> FloatArray:
    """Sums of the first 0..n values (n + 1,)."""
    return np.concatenate(([0.0], np.cumsum(values)))


def _from(values: FloatArray) -> FloatArray:
    """Sums of all values (n,) but the first 0..n (n + 1,)."""
    return np.concatenate((np.cumsum(values[::-1])[::-1], [0.0]))
