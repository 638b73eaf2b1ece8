"""Sums of per-row columns that add, and the delta method on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ope.data import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums of per-row columns that add: n rows, their mean (d,) and centred cross products (d, d)."""

    n: int
    mean: FloatArray
    cross: FloatArray

    @classmethod
    def of(cls, columns: FloatArray) -> Moments:
        """Moments of columns (n, d), n >= 1."""
        mean = columns.mean(axis=0)
        centred = columns - mean
        return cls(len(columns), mean, centred.T @ centred)

    @classmethod
    def zero(cls, d: int) -> Moments:
        """Moments of no row: the neutral element of `+`."""
        return cls(0, np.zeros(d), np.zeros((d, d)))

    def __add__(self, other: Moments) -> Moments:
        """Pairwise update: the whole from its parts, in any order. Chan, Golub & LeVeque 1983."""
        n, delta = self.n + other.n, other.mean - self.mean
        if n == 0:
            return self
        cross = self.cross + other.cross + np.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), cross)

    def covariance(self) -> FloatArray:
        """Covariance of the mean (d, d): cross / (n (n - 1)). NaN where one row leaves it unknown."""
        return self.cross / (self.n * (self.n - 1)) if self.n > 1 else np.full_like(self.cross, np.nan)

    def stderr(self, gradient: FloatArray) -> float:
        """Delta method: standard error of a value whose gradient at the mean is (d,)."""
        return float(np.sqrt(gradient @ self.covariance() @ gradient))


@dataclass(frozen=True, slots=True, eq=False)
class ClusterSums:
    """Columns summed within clusters of dependent rows, to be added by key *before* anything is squared.

    `cluster` (c,) sorted and unique; `total` (c, d + 1), whose last column is the row count (or the summed sample weight):
    a mean over rows is column / count, and a gradient that left the count out would take cluster sizes for constants.
    """

    cluster: NDArray[Any]
    total: FloatArray

    @classmethod
    def of(cls, counted: FloatArray, cluster: NDArray[Any]) -> ClusterSums:
        """Sums of counted columns (n, d + 1) by the label of each row (n,)."""
        labels, code = np.unique(cluster, return_inverse=True)
        return cls(labels, sum_by_code(counted, code, len(labels)))

    def __add__(self, other: ClusterSums) -> ClusterSums:
        """Sums of both parts, clusters that span them added together."""
        return ClusterSums.of(np.concatenate((self.total, other.total)), np.concatenate((self.cluster, other.cluster)))

    def moments(self) -> Moments:
        """Moments with clusters as rows."""
        return Moments.of(self.total)


def sum_by_code(columns: FloatArray, code: NDArray[Any], size: int) -> FloatArray:
    """Sum columns (n, d) into (size, d) by integer code (n,) in [0, size)."""
    return np.stack([np.bincount(code, weights=column, minlength=size) for column in columns.T], axis=1)


def counted(*blocks: FloatArray, weight: FloatArray | None = None) -> FloatArray:
    """Blocks of columns (n, d_i), times the sample weight (n,) where there is one, and that weight (or 1): (n, d + 1)."""
    result = np.empty((len(blocks[0]), sum(block.shape[1] for block in blocks) + 1), order="F")  # columns are summed
    result[:, -1] = 1.0 if weight is None else weight
    np.concatenate(blocks, axis=1, out=result[:, :-1])
    if weight is not None:
        result[:, :-1] *= weight[:, None]
    return result


def per_row(mean: FloatArray) -> FloatArray:
    """Means of counted columns (..., d + 1) -> means over rows (..., d): column / count."""
    return mean[..., :-1] / mean[..., -1:]


def per_row_gradient(gradient: FloatArray, mean: FloatArray) -> FloatArray:
    """Chain rule through `per_row`: gradients (..., d) at the row means -> (..., d + 1) at the counted mean (d + 1,)."""
    count_part = -(gradient @ per_row(mean))[..., None]
    return np.concatenate((gradient, count_part), axis=-1) / mean[-1]
