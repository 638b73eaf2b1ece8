"""Sampled rows as they were logged, and the sums over them that say whether what was logged is what was sampled from.

Sums add over parts of a day, so memory does not grow with it. `ope.certificate` turns them into tests. Rows that were kept with a
known probability weigh by its inverse; where that differs from 1, squares stand in for variances, which are then unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ope.data import BoolArray, DataError, FloatArray, IntArray

EDGES = np.array([2.0**-40, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 10))])
"""Lower ends of the bins of probability; below the first is no probability at all."""

CAPS = np.array([i / 10 for i in range(2, 10)])
"""Probabilities at which a sampler may have capped what the log has uncapped."""

SHARES = 2.0**31
"""Probabilities are rounded to parts of this before they are drawn from."""

JOINT = 10
"""Largest number of actions whose residuals are tested together along each context column."""

SLICE = 2**16
"""Rows worked on at once."""

TAIL_SHARE = 0.05
"""Share of the largest weights whose tail index is taken, as `ope.diagnostics` does..."""
TAIL_LOW, TAIL_STEP, TAIL_CELLS = -10.0, 0.02, 2000
"""... from counts of the logarithms of weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """n sampled rows as they were logged. Raises DataError where shapes or numbers contradict each other."""

    action: IntArray
    propensity: FloatArray
    eligible: BoolArray
    """(n, k)"""
    propensities: FloatArray
    """(n, k); what stands where a vector is unknown does not matter."""
    vector: BoolArray
    """Rows whose vector is known."""
    context: FloatArray
    """(n, d)"""
    pass_probability: FloatArray
    shown: IntArray
    """1 where the action was shown as sampled, 0 where not, -1 where nobody said."""

    @classmethod
    def of(cls, action: IntArray, propensities: FloatArray, **others: Any) -> Draws:
        """Rows whose vectors (n, k) are all known; what else is not given is as if it were not there."""
        n = len(propensities)
        _check("action", action, (n,))
        rest = {
            "propensity": propensities[np.arange(n), action], "eligible": propensities > 0, "vector": np.ones(n, dtype=bool),
            "context": np.empty((n, 0)), "pass_probability": np.ones(n), "shown": np.full(n, -1),
        }  # fmt: skip
        return cls(action=action, propensities=propensities, **(rest | others))

    def __post_init__(self) -> None:
        n, k = self.eligible.shape
        _check("propensities", self.propensities, (n, k))
        _check("context", self.context, (n, self.context.shape[-1]))
        for name in ("action", "propensity", "vector", "pass_probability", "shown"):
            _check(name, getattr(self, name), (n,))
        for name in ("propensity", "pass_probability"):
            array = getattr(self, name)
            if not ((array > 0) & (array <= 1)).all():
                raise DataError(name, "values outside (0, 1]", "probabilities of what happened", "Log the probability itself.")

    def take(self, rows: slice | BoolArray) -> Draws:
        """Some of the rows."""
        return Draws(*(getattr(self, each.name)[rows] for each in fields(self)))


def _check(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise DataError(name, f"shape {array.shape}", f"{shape}, as the vectors have it", "Pass one value, or one line, per row.")


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """Sums, minima and maxima of some rows, by name; `+` gives those of both. Both sides have the same k and d."""

    sums: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    lows: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    highs: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        """Of the rows of both."""
        if not self.sums or not other.sums:
            return other if not self.sums else self
        return Tally(
            {name: value + other.sums[name] for name, value in self.sums.items()},
            {name: np.minimum(value, other.lows[name]) for name, value in self.lows.items()},
            {name: np.maximum(value, other.highs[name]) for name, value in self.highs.items()},
        )

    @property
    def rows(self) -> int:
        """Sampled rows, those whose action lies outside its set left out."""
        return int(self.sums["rows"]) if self.sums else 0


def tally(draws: Draws, floor: float = 0.0) -> Tally:
    """Everything that the tests need of n rows.

    `floor`: φ; every eligible action should keep at least φ / (number of eligible actions), and no weight exceeds 1/φ.
    """
    total = Tally()
    for start in range(0, len(draws.action), SLICE):
        part = draws.take(slice(start, start + SLICE))
        inside = (part.action >= 0) & (part.action < part.eligible.shape[1])
        inside[inside] = part.eligible[inside, part.action[inside]]
        counts = Tally({"rows": np.array(inside.sum()), "outside": np.array((~inside).sum())})
        good = part if inside.all() else part.take(inside)
        known = good if good.vector.all() else good.take(good.vector)
        total += _joined(counts, _weights(good, floor), _calibration(known), _shown(known))
    return total


def _joined(*parts: Tally) -> Tally:
    """Tallies of the same rows, of different names, as one."""
    return Tally(
        *({name: value for part in parts for name, value in getattr(part, kind).items()} for kind in ("sums", "lows", "highs"))
    )


def _weights(rows: Draws, floor: float) -> Tally:
    """Weights of the uniform policy, 1 / (m p): their mean against 1, their spread, tail and support; the floor."""
    n, k = rows.eligible.shape
    size, times = rows.eligible.sum(axis=1), 1 / rows.pass_probability
    weight = 1 / (size * rows.propensity)
    vectors = np.where(rows.eligible, rows.propensities, 0.0)
    inverse = np.divide(1.0, vectors, out=np.zeros_like(vectors), where=(vectors > 0) & rows.vector[:, None])
    reach = np.where(rows.vector, np.count_nonzero(inverse, axis=1) / size, 1.0)
    excess = times * (weight - reach)
    exact = rows.vector & (times == 1)
    variance = np.where(exact, inverse @ np.ones(k) / size**2 - reach**2, excess**2)
    largest = np.where(rows.vector, inverse.max(axis=1, initial=0) / size, np.maximum(weight, 1 / floor if floor > 0 else 0))
    cell = ((np.log(weight * times) - TAIL_LOW) / TAIL_STEP).astype(np.int64).clip(0, TAIL_CELLS - 1)
    least = floor / size - 2 / SHARES
    low = np.where(rows.eligible, rows.propensities, np.inf).min(axis=1, initial=np.inf)
    low = np.where(rows.vector, low, rows.propensity)
    taken = np.zeros((n, k), dtype=bool)
    taken[np.arange(n), rows.action] = True
    seen = np.where(rows.vector[:, None], rows.propensities, rows.propensity[:, None])
    seen_at = np.where(rows.vector[:, None], rows.eligible, taken)
    lows = np.where(seen_at, seen, np.inf).min(axis=0, initial=np.inf)
    highs = np.where(seen_at, seen, -np.inf).max(axis=0, initial=-np.inf)
    return Tally(
        {
            "times": times.sum(), "weight": times @ weight, "reach": times @ reach, "weight_spread": variance.sum(),
            "squares": ((times * weight) ** 2).sum(), "tail": np.bincount(cell, minlength=TAIL_CELLS),
            "vectors": rows.vector.sum(), "below": (low < least).sum(),
            "eligible": rows.eligible.sum(axis=0), "taken": taken.sum(axis=0),
        },
        {"p": lows, "floor": (floor / size).min(initial=np.inf)},
        {
            "p": highs, "weight": (times * largest).max(initial=0.0), "times": times.max(initial=1.0),
            "estimated": (~exact).max(initial=False),
        },
    )  # fmt: skip


def _calibration(rows: Draws) -> Tally:
    """Frequencies against propensities: by action, by probability, by both, and along every context column."""
    n, k = rows.eligible.shape
    cells = len(EDGES) + 1
    times = 1 / rows.pass_probability
    vectors = np.where(rows.eligible, rows.propensities, 0.0)
    taken = np.zeros((n, k))
    taken[np.arange(n), rows.action] = 1.0
    residual = times[:, None] * (taken - vectors)
    sampled = (times != 1)[:, None]
    spread = np.where(sampled, residual**2, vectors * (1 - vectors))
    expected, observed = times[:, None] * vectors, times[:, None] * taken
    where = np.searchsorted(EDGES, vectors.ravel(), side="right")
    cell = where * k + np.tile(np.arange(k), n)
    row_cell = where + np.repeat(np.arange(n) * cells, k)

    def by(index: IntArray, values: FloatArray | None, shape: tuple[int, int]) -> NDArray[Any]:
        flat = None if values is None else values.ravel()
        return np.bincount(index, flat, minlength=shape[0] * shape[1]).reshape(shape)

    row_expected, row_residual = by(row_cell, vectors, (n, cells)), by(row_cell, residual, (n, cells))
    row_spread = np.where(sampled, row_residual**2, row_expected * (1 - row_expected))
    exact = residual[~sampled[:, 0]].shape[0] == n
    covariance = np.diag(expected.T @ np.ones(n)) - vectors.T @ vectors if exact else residual.T @ residual
    beyond, beyond_spread, beyond_mean = _beyond(rows.action, vectors, times)
    greedy, greedy_spread, greedy_most = _greedy(rows.action, vectors, times)
    x, square, ones = rows.context, rows.context**2, np.ones(n)
    joint = _joint(residual, vectors, sampled, x, square) if k <= JOINT else {}
    return Tally(
        {
            "expected": ones @ expected, "observed": ones @ observed, "spread": ones @ spread,
            "known_times": times.sum(), "known": np.array(n), "covariance": covariance,
            "cell_pairs": by(cell, None, (cells, k)), "cell_times": by(cell, np.repeat(times, k), (cells, k)),
            "cell_expected": by(cell, expected, (cells, k)), "cell_observed": by(cell, observed, (cells, k)),
            "cell_spread": by(cell, spread, (cells, k)), "bin_spread": ones @ row_spread,
            "beyond": beyond, "beyond_spread": beyond_spread, "greedy": greedy, "greedy_spread": greedy_spread,
            "x": ones @ x, "x_square": ones @ square, "x_residual": x.T @ residual, "residual": ones @ residual,
            "x_spread": x.T @ spread, "x_square_spread": square.T @ spread, **joint,
        },
        {"x": x.min(axis=0, initial=np.inf)},
        {"x": x.max(axis=0, initial=-np.inf), "beyond_mean": beyond_mean, "greedy": greedy_most},
    )  # fmt: skip


def _beyond(action: IntArray, vectors: FloatArray, times: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """By how much the propensity of the action taken exceeds each cap, less its expectation: sums, spreads, largest expectations.

    To first order this is the likelihood ratio of a sampler that caps there.
    """
    taken = vectors[np.arange(len(action)), action]
    totals, spreads, largest = np.zeros(len(CAPS)), np.zeros(len(CAPS)), np.zeros(len(CAPS))
    for i, cap in enumerate(CAPS):
        excess = np.maximum(vectors - cap, 0.0)
        mean = np.einsum("ij,ij->i", vectors, excess)
        total = times * (np.maximum(taken - cap, 0.0) - mean)
        totals[i] = total.sum()
        spreads[i] = np.where(times == 1, np.einsum("ij,ij,ij->i", vectors, excess, excess) - mean**2, total**2).sum()
        largest[i] = mean.max(initial=0.0)
    return totals, spreads, largest


def _greedy(action: IntArray, vectors: FloatArray, times: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weights of the policy that takes the first of the most probable actions, less 1: their sum, its spread, the largest one.

    This is the likelihood ratio of some rows on which that action was taken whatever was drawn. Its variance is 1/p - 1.
    """
    top = vectors.argmax(axis=1)
    most = vectors[np.arange(len(top)), top]
    excess = np.divide(1.0, most, out=np.ones_like(most), where=most > 0) - 1
    term = times * np.where(action == top, excess, -1.0) * (most > 0)
    spread = np.where(times == 1, excess, term**2)
    return np.array(term.sum()), np.array(spread.sum()), np.array(excess.max(initial=0.0))


def _joint(
    residual: FloatArray, vectors: FloatArray, sampled: BoolArray, x: FloatArray, square: FloatArray
) -> dict[str, NDArray[Any]]:
    """Covariances of the actions' residuals (k, k), summed along each context column and its square: (d, k, k) each."""
    n, k = residual.shape
    outer = -vectors[:, :, None] * vectors[:, None, :]
    outer[:, np.arange(k), np.arange(k)] += vectors
    if sampled.any():
        outer = np.where(sampled[:, :, None], residual[:, :, None] * residual[:, None, :], outer)
    flat = outer.reshape(n, k * k)
    return {"x_joint": (x.T @ flat).reshape(-1, k, k), "x_square_joint": (square.T @ flat).reshape(-1, k, k)}


def _shown(rows: Draws) -> Tally:
    """Rows that were not shown: their actions against their vectors."""
    k = rows.eligible.shape[1]
    hidden = rows.take(rows.shown == 0)
    times = 1 / hidden.pass_probability[:, None]
    vectors = np.where(hidden.eligible, hidden.propensities, 0.0)
    residual = -vectors
    residual[np.arange(len(residual)), hidden.action] += 1
    spread = np.where(times == 1, vectors * (1 - vectors), (times * residual) ** 2)
    return Tally({
        "shown_known": np.bincount(rows.action[rows.shown >= 0], minlength=k),
        "not_shown": np.bincount(hidden.action, minlength=k),
        "hidden_residual": (times * residual).sum(axis=0), "hidden_spread": spread.sum(axis=0),
    })  # fmt: skip
