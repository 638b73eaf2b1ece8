"""Validated arrays of logged trajectories: sequences of decisions, such as the tokens of responses or the steps of episodes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ope.data import BoolArray, DataError, FloatArray, checked_cluster, checked_finite


@dataclass(frozen=True, slots=True, eq=False)
class Trajectories:
    """N logged trajectories of at most T steps; arrays are checked once, here, and are 0 where no step counts.

    Raises DataError for anything that could not have come from a sampler that logged what it did.
    """

    logp_behavior: FloatArray
    """(N, T) log-probability with which the policy that sampled took each action. Densities may exceed 1."""
    reward: FloatArray
    """(N, T) of each step. Given as (N,), it is earned at the last step that counts, and kept as (N, T)."""
    mask: BoolArray
    """(N, T) True where a step counts: a run from step 0, at least one long. Under False, arrays may hold anything."""
    cluster: NDArray[Any] | None = None
    """(N,) what was randomised or drawn as one, such as the prompt of several responses; its trajectories are not independent."""
    discount: float = 1.0
    """A reward t steps on counts discount^t, in [0, 1]."""

    def __post_init__(self) -> None:
        mask = _checked_mask(self.mask)
        remedy = "Log the log-probability of what was really sampled; it is never that of an impossible action."
        logp = checked_steps("logp_behavior", self.logp_behavior, mask, remedy)
        remedy = "Drop trajectories whose reward is not known yet; unknown is not 0."
        reward: ArrayLike = self.reward
        if np.ndim(reward) == 1:
            at_end = mask & ~np.pad(mask[:, 1:], ((0, 0), (0, 1)))
            reward = np.where(at_end, checked_finite("reward", reward, (len(mask),), remedy)[:, None], 0.0)
        if not 0 <= self.discount <= 1:
            raise DataError("discount", f"{self.discount}", "a number in [0, 1]", "Use 1 where late rewards count like early ones.")
        for name, value in (("mask", mask), ("logp_behavior", logp), ("reward", checked_steps("reward", reward, mask, remedy))):
            object.__setattr__(self, name, value)
        if self.cluster is not None:
            object.__setattr__(self, "cluster", checked_cluster(self.cluster, len(mask)))

    @property
    def n(self) -> int:
        """Number of trajectories."""
        return len(self.mask)

    def take(self, rows: NDArray[Any] | slice) -> Trajectories:
        """The given trajectories: an index array, a boolean mask or a slice."""
        cluster = None if self.cluster is None else self.cluster[rows]
        return replace(
            self, logp_behavior=self.logp_behavior[rows], reward=self.reward[rows], mask=self.mask[rows], cluster=cluster
        )


def checked_steps(column: str, values: ArrayLike, mask: BoolArray, remedy: str) -> FloatArray:
    """Numbers (N, T), finite where a step counts and 0 where none does. Raises DataError at the first other trajectory."""
    return checked_finite(column, np.where(mask, shaped_steps(column, values, mask), 0.0), mask.shape, remedy)


def shaped_steps(column: str, values: ArrayLike, mask: BoolArray) -> NDArray[Any]:
    """Numbers of the mask's shape (N, T), whatever they are. Raises DataError for other arrays."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise DataError(column, f"dtype {array.dtype}", "numbers", "Convert the array first.")
    if array.shape != mask.shape:
        raise DataError(
            column, f"shape {array.shape}", f"shape {mask.shape}, as `mask`", "Pass one entry per trajectory and step, padded."
        )
    return array


def _checked_mask(values: ArrayLike) -> BoolArray:
    mask = np.asarray(values)
    if mask.dtype.kind != "b" or mask.ndim != 2:
        raise DataError("mask", f"{mask.dtype} of shape {mask.shape}", "booleans of shape (N, T)", "Pass True where a step counts.")
    if mask.size == 0:
        raise DataError("mask", f"shape {mask.shape}", "at least one trajectory of one step", "Check what selected them.")
    if not mask[:, 0].all():
        row = int(np.argmin(mask[:, 0]))
        raise DataError("mask", "a first step that does not count", "a run of True from step 0",
                        "Start at the first sampled action (no prompt, no padding on the left); drop trajectories without one.",
                        row=row)  # fmt: skip
    again = (mask[:, 1:] & ~mask[:, :-1]).any(axis=1)
    if again.any():
        raise DataError("mask", "a step that counts after one that does not", "one run of True from step 0",
                        "Move the steps that were sampled next to each other.", row=int(np.argmax(again)))  # fmt: skip
    return mask
