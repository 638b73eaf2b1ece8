"""From scores to propensities: how much to explore. Arrays (n, k) in, distributions (n, k) out, 0 where not eligible.

`eligible` (n, k) may be None where every action is. Ties go to the first action. Scores must be finite and below 1e100 in size:
beyond that differences are no longer numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ope.data import BoolArray, FloatArray, InputError

SIZE = 1e100


def greedy(scores: FloatArray, eligible: BoolArray | None) -> FloatArray:
    """All on the highest score."""
    chosen = np.zeros(scores.shape)
    chosen[np.arange(len(scores)), _masked(scores, eligible).argmax(axis=1)] = 1.0
    return chosen


def epsilon_greedy(scores: FloatArray, eligible: BoolArray | None, epsilon: float) -> FloatArray:
    """(1 - ε) on the highest score, ε spread evenly over the eligible actions."""
    masked, vectors = _masked(scores, eligible), np.empty(scores.shape)
    if eligible is None:
        vectors.fill(epsilon / scores.shape[1])
    else:
        np.multiply(eligible, epsilon / _count(eligible, scores.shape[1]), out=vectors)
    if len(vectors) == 1:  # one request online: two index arrays would cost as much as the rest together
        vectors[0, masked.argmax()] += 1 - epsilon
    else:
        vectors[np.arange(len(vectors)), masked.argmax(axis=1)] += 1 - epsilon
    return vectors


def uniform(eligible: BoolArray) -> FloatArray:
    """Even over the eligible actions."""
    _reject_none_eligible(eligible)
    return eligible / _count(eligible, eligible.shape[1])


def softmax(scores: FloatArray, eligible: BoolArray | None, temperature: float) -> FloatArray:
    """In proportion to exp(score / temperature)."""
    masked = _masked(scores, eligible)
    weight = masked - np.maximum.reduce(masked, axis=1, keepdims=True)
    if temperature != 1:
        weight /= temperature
    np.exp(weight, weight)
    weight /= _sum(weight)
    return weight


def inverse_gap(scores: FloatArray, eligible: BoolArray | None, gamma: float) -> FloatArray:
    """1 / (K + γ·gap) on every action but the best, which takes the rest; K counts the eligible. Foster & Rakhlin 2020."""
    masked = _masked(scores, eligible)
    gap = np.maximum.reduce(masked, axis=1, keepdims=True) - masked  # infinite where not eligible
    others = 1 / (_count(eligible, scores.shape[1]) + _times(gamma, gap, eligible))
    return _rest_to_best(others, masked)


def fast_cb(losses: FloatArray, eligible: BoolArray | None, gamma: float) -> FloatArray:
    """l_b / (K·l_b + γ(l_a - l_b)) on every action but b, that of the smallest loss: the smaller the loss, the less it explores.

    Losses in [0, 1], such as 1 - acceptance rate. Foster & Krishnamurthy 2021. A best loss of 0 is greedy but for equals.
    """
    masked = _masked(-losses, eligible)
    best = -np.maximum.reduce(masked, axis=1, keepdims=True)
    if not (best >= 0).all():
        raise InputError(f"row {int(np.argmin(best >= 0))}: found a loss of {best.min():.6g}; expected losses of at least 0")
    count = _count(eligible, losses.shape[1])
    below = count * best + _times(gamma, -masked - best, eligible)
    others = np.where(below > 0, best / np.where(below > 0, below, 1.0), 1 / count)
    return _rest_to_best(others if eligible is None else np.where(eligible, others, 0.0), masked)


def falcon_gamma(k: int, rows: int, *, c: float = 1.0, class_size: float = math.e, delta: float = 0.05) -> float:
    """γ = c·sqrt(K·n / log(|F|·n / δ)) for the generation after `rows` rows. FALCON, Simchi-Levi & Xu 2020."""
    if rows < 1 or k < 1 or not 0 < delta < class_size * rows:
        raise InputError(
            f"found k={k}, rows={rows}, delta={delta}; expected at least one of each, and delta in (0, class_size·rows)"
        )
    return c * math.sqrt(k * rows / math.log(class_size * rows / delta))


def winning_share(samples: FloatArray, eligible: BoolArray | None) -> FloatArray:
    """How often each action scores highest over m samples (m, n, k) -> (n, k): Thompson sampling's vector, and bagging's."""
    m, n, k = samples.shape
    if eligible is not None:
        _reject_none_eligible(eligible)
    if not np.isfinite(samples).all():
        _, row, action = (int(i) for i in np.argwhere(~np.isfinite(samples))[0])
        raise InputError(f"row {row}, action {action}: found a score that is not finite; expected numbers below {SIZE:g} in size")
    winners = (samples if eligible is None else np.where(eligible[None], samples, -np.inf)).argmax(axis=2)
    counts = np.bincount((winners + np.arange(n) * k).ravel(), minlength=n * k)
    return counts.reshape(n, k) / m


def with_floor(vectors: FloatArray, eligible: BoolArray | None, floor: float) -> FloatArray:
    """(1 - φ)·p + φ/K: every eligible action keeps at least φ/K, so that weights of any policy are at most K/φ."""
    if eligible is None:
        result = (1 - floor) * vectors
        result += floor / vectors.shape[1]
        return result
    _reject_none_eligible(eligible)
    return (1 - floor) * vectors + eligible * (floor / _count(eligible, vectors.shape[1]))


def with_cap(vectors: FloatArray, eligible: BoolArray | None, high: FloatArray | float) -> FloatArray:
    """No action above `high` (one bound, or one per action (k,)): what is over goes to the others in proportion to theirs.

    Where the others have nothing it goes evenly to those with room. Raises InputError where the bounds cannot hold a distribution.
    """
    eligible = np.ones(vectors.shape, dtype=np.bool_) if eligible is None else eligible
    if (np.ndim(high) and np.shape(high)[-1] not in (1, vectors.shape[1])) or not (np.asarray(high) >= 0).all():
        raise InputError(f"found caps {high}; expected one number of at least 0, or {vectors.shape[1]} of them")
    bound = np.where(eligible, np.broadcast_to(high, vectors.shape), 0.0)
    room = bound.sum(axis=1)
    if not (room >= 1 - 1e-9).all():
        row = int(np.argmin(room))
        raise InputError(f"row {row}: found caps of the eligible actions that sum to {room[row]:.6g}; expected at least 1")
    result, full = vectors, np.zeros(vectors.shape, dtype=np.bool_)
    for _ in range(vectors.shape[1]):  # each pass fills at least one action of each row it changes
        over = (result > bound + 1e-15).any(axis=1, keepdims=True)
        if not over.any():
            break
        full |= (result > bound) & over
        free = eligible & ~full
        left = 1 - _sum(np.where(full, bound, 0.0))
        shares = np.where(free, result, 0.0)
        total = _sum(shares)
        even = free / np.maximum(free.sum(axis=1, keepdims=True), 1)
        spread = np.where(total > 0, shares / np.where(total > 0, total, 1.0), even) * left
        result = np.where(over, np.where(full, bound, spread), result)  # rows within their caps keep their bits
    return result


def _reject_none_eligible(eligible: BoolArray) -> None:
    if not eligible.any(axis=1).all():
        raise InputError(f"row {int(np.argmin(eligible.any(axis=1)))}: found no eligible action; expected at least one")


def _masked(scores: FloatArray, eligible: BoolArray | None) -> FloatArray:
    """Scores, minus infinity where not eligible. Raises InputError where a score is no number of ordinary size."""
    if not np.vdot(scores, scores) < SIZE:  # one product finds NaN, infinity and 1e308 anywhere
        bad = ~(np.abs(scores) < SIZE) & (True if eligible is None else eligible)
        if bad.any():
            row, action = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"row {row}, action {action}: found a score of {scores[row, action]}; "
                f"expected a finite number below {SIZE:g} in size"
            )
    if eligible is None:
        return scores
    _reject_none_eligible(eligible)
    return np.where(eligible, scores, -np.inf)


def _sum(values: FloatArray) -> FloatArray:
    """Row sums (n, 1), added from left to right: padding at the end changes no bit."""
    return np.add.accumulate(values, axis=1)[:, -1:]


def _count(eligible: BoolArray | None, k: int) -> Any:
    """Number of eligible actions of each row, (n, 1), or k for all."""
    return float(k) if eligible is None else np.add.reduce(eligible, axis=1, keepdims=True, dtype=np.float64)


def _times(gamma: float, gap: FloatArray, eligible: BoolArray | None) -> FloatArray:
    """γ·gap, infinite where not eligible even for γ = 0."""
    if gamma > 0:
        return gamma * gap
    return np.zeros(gap.shape) if eligible is None else np.where(eligible, 0.0, np.inf)


def _rest_to_best(others: FloatArray, masked: FloatArray) -> FloatArray:
    """Give the first best action of each row what the others leave. `others` (n, k) is 0 where not eligible."""
    rows: Any = np.arange(len(others))
    best = masked.argmax(axis=1)
    others[rows, best] = 0.0
    others[rows, best] = 1 - _sum(others)[:, 0]
    return others
