"""Several estimates on the same rows: one set of moments, one Jacobian, and so one covariance between all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ope.data import FloatArray
from ope.estimators import Smooth
from ope.moments import Moments, per_row, per_row_gradient


@dataclass(frozen=True, slots=True)
class Part:
    """One estimate's share of the columns."""

    label: str
    estimator: Smooth
    columns: slice


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """m estimates whose d columns, and a last one that counts, were summed over the same rows (or clusters)."""

    parts: tuple[Part, ...]
    moments: Moments
    """Of rows, or of cluster sums: (d + 1)."""
    blocks: FloatArray
    """Sums over the bootstrap's blocks (blocks, d + 1); empty unless asked for."""
    clustered: bool = False
    """True where the moments are of cluster sums."""

    def values(self, mean: FloatArray | None = None) -> FloatArray:
        """Values (..., m) at counted means (..., d + 1), by default those of the log."""
        rows = per_row(self.moments.mean if mean is None else mean)
        with _no_overlap():
            return np.stack([part.estimator.value(rows[..., part.columns]) for part in self.parts], axis=-1)

    def jacobian(self) -> FloatArray:
        """Gradients of all values at the counted mean (m, d + 1)."""
        rows = per_row(self.moments.mean)
        gradients = np.zeros((len(self.parts), len(rows)))
        with _no_overlap():
            for row, part in zip(gradients, self.parts, strict=True):
                row[part.columns] = part.estimator.gradient(rows[part.columns])
            return per_row_gradient(gradients, self.moments.mean)

    def covariance(self) -> FloatArray:
        """Covariance of all values (m, m), by the delta method."""
        jacobian = self.jacobian()
        with _no_overlap():
            return jacobian @ self.moments.covariance() @ jacobian.T

    def stderrs(self) -> FloatArray:
        """Standard errors (m,)."""
        return np.sqrt(np.clip(np.diag(self.covariance()), 0.0, None))  # rounding may leave -1e-20 where nothing varies

    def __add__(self, other: Stack) -> Stack:
        """The whole from two parts of a log that no cluster spans. Raises ValueError if the parts estimate other things."""
        if self.parts != other.parts:
            raise ValueError(f"stacks differ: {_labels(self.parts)} and {_labels(other.parts)}; expected the same estimates")
        return Stack(self.parts, self.moments + other.moments, np.concatenate((self.blocks, other.blocks)), self.clustered)


def _no_overlap() -> np.errstate:
    """Silence divisions by Σw = 0: the value is then NaN, and the verdict says that nothing overlaps."""
    return np.errstate(divide="ignore", invalid="ignore")


def parts_of(estimators: Sequence[tuple[str, Smooth, int]]) -> tuple[Part, ...]:
    """Parts from (label, estimator, number of columns), laid side by side."""
    ends = np.cumsum([0, *(width for _, _, width in estimators)])
    return tuple(
        Part(label, estimator, slice(int(start), int(end)))
        for (label, estimator, _), start, end in zip(estimators, ends, ends[1:], strict=False)
    )


def _labels(parts: Sequence[Part]) -> str:
    return ", ".join(part.label for part in parts)
