"""Validated arrays of a log, and the one error that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]

LARGEST = 1e100
"""Numbers beyond this are mistakes: their squares would no longer add."""

SUM_TOLERANCE = 1e-6
"""How far from one the probabilities of a row may sum: float32 vectors pass, forgotten actions do not."""


class InputError(ValueError):
    """A request that cannot be met: what was found, what was expected, what to do."""


class DataError(InputError):
    """Arrays that cannot be evaluated: where that was found, what was expected and what to do about it.

    `column` is the field of `LoggedData` (or the argument) until `located` puts the name of a file's column in its place.
    """

    def __init__(self, column: str, found: str, expected: str, remedy: str, *, row: int | None = None, source: str | None = None):
        self.column, self.found, self.expected, self.remedy, self.row, self.source = column, found, expected, remedy, row, source
        where = (
            source,
            f"column {column!r}" if column else "",
            "" if row is None else f"row {row} (counted from 0)" if source else f"row {row}",
        )
        place = ", ".join(part for part in where if part)
        super().__init__(f"{place}: found {found}; expected {expected}. {remedy}")

    def located(self, source: str, columns: Mapping[str, str]) -> DataError:
        """The same error, naming the file it came from and that file's own column name."""
        name = columns.get(self.column, self.column)
        return DataError(name, self.found, self.expected, self.remedy, row=self.row, source=source)

    def shifted(self, rows: int) -> DataError:
        """The same error, its row counted from that many rows earlier."""
        row = None if self.row is None else self.row + rows
        return DataError(self.column, self.found, self.expected, self.remedy, row=row, source=self.source)


@dataclass(frozen=True, slots=True, eq=False)
class LoggedData:
    """A log of n decisions; arrays are checked once, here, and kept without a copy where their dtype allows.

    Raises DataError for anything that could not have come from a sampler that logged what it did.
    """

    action: IntArray
    """(n,) index of the action taken, 0 <= action < k."""
    reward: FloatArray
    """(n,) finite."""
    propensity: FloatArray
    """(n,) probability with which the logging policy took the logged action, in (0, 1]."""
    context: FloatArray | None = None
    """(n, d) features that reward models may use."""
    propensities: FloatArray | None = None
    """(n, k) the whole vector of the logging policy, where it was logged."""
    eligible: BoolArray | None = None
    """(n, k) actions that could have been taken; None means all of them."""
    action_features: FloatArray | None = None
    """(n, k, p)"""
    sample_weight: FloatArray | None = None
    """(n,) positive: how many rows each row stands for, such as 1 / probability that the record was kept."""
    cluster: NDArray[Any] | None = None
    """(n,) the unit (user, card, device) that was randomised; rows of one cluster are not independent."""
    rewards: Mapping[str, FloatArray] = field(default_factory=dict)
    """Further rewards by name, each (n,); `with_reward` selects one."""
    propensity_estimated: bool = False
    """True if propensities were estimated afterwards rather than logged: verdicts are then at most `caution`."""

    def __post_init__(self) -> None:
        action = _checked_action(self.action)
        n = len(action)
        columns: dict[str, Any] = {
            "action": action,
            "reward": checked_finite("reward", self.reward, (n,), "Drop rows whose reward is not known yet; unknown is not 0."),
            "propensity": checked_propensity("propensity", self.propensity, n),
        }
        if self.eligible is not None:
            columns["eligible"] = _checked_eligible(self.eligible, action)
        if self.propensities is not None:
            columns["propensities"] = checked_distribution(
                "propensities", self.propensities, n, columns.get("eligible"), slice(0, n)
            )
            checked_width("propensities", action, columns["propensities"].shape[1])
        if self.context is not None:
            context = np.asarray(self.context)
            remedy = "Fill or drop it before evaluating."
            columns["context"] = checked_finite("context", context[:, None] if context.ndim == 1 else context, (n, None), remedy)
        if self.action_features is not None:
            remedy = "Fill or drop it before evaluating; padding may be any number."
            columns["action_features"] = checked_finite("action_features", self.action_features, (n, None, None), remedy)
            checked_width("action_features", action, columns["action_features"].shape[1])
        if self.sample_weight is not None:
            weight = checked_finite("sample_weight", self.sample_weight, (n,), "Drop rows that stand for nothing.")
            _reject_rows("sample_weight", weight, weight > 0, "a positive weight", "Drop rows that stand for nothing.")
            columns["sample_weight"] = weight
        if self.cluster is not None:
            columns["cluster"] = checked_cluster(self.cluster, n)
        columns["rewards"] = {
            name: checked_finite(f"rewards[{name!r}]", values, (n,), "Drop rows whose reward is not known yet.")
            for name, values in self.rewards.items()
        }
        for name, value in columns.items():
            object.__setattr__(self, name, value)

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.action)

    def with_reward(self, name: str) -> LoggedData:
        """The same log, valued by the reward `name`. Raises DataError for an unknown name."""
        if name not in self.rewards:
            raise DataError("rewards", f"no reward {name!r}", f"one of {sorted(self.rewards)}", "Name a reward of this log.")
        return replace(self, reward=self.rewards[name])

    def take(self, rows: NDArray[Any] | slice) -> LoggedData:
        """The log of the given rows: an index array, a boolean mask or a slice."""
        arrays = {
            name: getattr(self, name)[rows]
            for name in self.__dataclass_fields__
            if name not in ("rewards", "propensity_estimated") and getattr(self, name) is not None
        }
        return replace(self, **arrays, rewards={name: values[rows] for name, values in self.rewards.items()})


def assign_folds(data: LoggedData, folds: int, seed: int) -> IntArray:
    """Fold of each row (n,), folds of equal size to within one; the rows of a cluster stay together.

    Raises InputError where there are fewer rows, or clusters, than folds.
    """
    if data.cluster is None:
        return folds_of_units(data.n, folds, seed, "rows")
    unit = np.unique(data.cluster, return_inverse=True)[1]
    return folds_of_units(int(unit.max()) + 1, folds, seed, "clusters")[unit]


def folds_of_units(units: int, folds: int, seed: int, what: str) -> IntArray:
    """Fold of each of some units, of equal size to within one. Raises InputError where there are fewer units than folds."""
    if not 2 <= folds <= units:
        raise InputError(
            f"found {units} {what}; expected at least {folds}, one for each fold: log more decisions, or do without a model"
        )
    if seed < 0:
        raise InputError(f"found seed={seed}; expected a number of at least 0")
    return np.random.default_rng(seed).permutation(np.arange(units) % folds)


def checked_propensity(column: str, propensity: ArrayLike, n: int, *, target: bool = False, first_row: int = 0) -> FloatArray:
    """Probabilities of logged actions (n,), each in (0, 1]; those of a target may be 0. Raises DataError at the first other."""
    values = _floats(column, propensity, (n,))
    low, high = float(values.min()), float(values.max())
    if not ((low >= 0 if target else low > 0) and high <= 1 + 1e-9):  # NaN fails both comparisons
        good = ((values >= 0) if target else (values > 0)) & (values <= 1 + 1e-9)
        remedy = (
            "Give the probability with which the policy takes the logged action."
            if target
            else "Log the probability of the action that was really served; where it is unknown, drop the row or estimate it, "
            "never fill in 1."
        )
        _reject_rows(column, values, good, f"a probability in {'[' if target else '('}0, 1]", remedy, first_row)
    return values


def checked_distribution(column: str, vectors: ArrayLike, n: int, eligible: BoolArray | None, rows: slice) -> FloatArray:
    """Rows of probabilities (n, k): none negative, each summing to one, nothing on ineligible actions.

    `rows` is the part of the log, and of `eligible`, that the vectors belong to. Raises DataError at the first other row.
    """
    first_row: int = rows.start
    values = np.asarray(vectors, dtype=np.float64)
    if values.ndim != 2 or len(values) != n:
        raise DataError(column, f"shape {values.shape}", f"({n}, k): one probability per action and row", "Pass whole vectors.")
    total = values @ np.ones(values.shape[1])
    good = np.abs(total - 1) <= SUM_TOLERANCE  # NaN and infinity are not close to one
    if not good.all():
        row = int(np.argmin(good))
        raise DataError(
            column, f"a row that sums to {total[row]:.6g}", f"probabilities that sum to 1 within {SUM_TOLERANCE:g}",
            "Normalise over the eligible actions of the row.", row=first_row + row,
        )  # fmt: skip
    if values.min() < 0:
        row, action = (int(i) for i in np.argwhere(values < 0)[0])
        raise DataError(
            column, f"{values[row, action]:.6g} for action {action}", "probabilities of at least 0", "Mend the policy.",
            row=first_row + row,
        )  # fmt: skip
    if eligible is not None:
        allowed = eligible[rows]
        if allowed.shape != values.shape:
            raise DataError(
                column, f"{values.shape[1]} actions", f"k = {allowed.shape[1]}, as in `eligible`", "Use one k for the whole log."
            )
        if np.any((values > 0) & ~allowed):
            row, action = (int(i) for i in np.argwhere((values > 0) & ~allowed)[0])
            raise DataError(
                column, f"probability {values[row, action]:.6g} on ineligible action {action}", "0 on every ineligible action",
                "Mask before normalising.", row=first_row + row,
            )  # fmt: skip
    return values


def checked_width(column: str, action: IntArray, k: int) -> None:
    """Raise DataError at the first logged action that `column`, k entries wide, has no entry for."""
    if int(action.max()) >= k:
        row = int(np.argmax(action >= k))
        raise DataError(
            "action", f"action {int(action[row])}", f"an index below k = {k}, the width of {column}",
            f"Widen {column}, or map the actions to 0..k-1.", row=row,
        )  # fmt: skip


def checked_finite(column: str, values: ArrayLike, shape: tuple[int | None, ...], remedy: str) -> FloatArray:
    """Finite numbers of this shape, below 1e100 in size so that their squares add. Raises DataError at the first other."""
    array = _floats(column, values, shape)
    if not np.vdot(array, array) < LARGEST**2:  # one product finds NaN, infinity and 1e100 anywhere; only then look for where
        good = np.abs(array) < LARGEST
        if not good.all():
            place = tuple(int(i) for i in np.argwhere(~good)[0])
            raise DataError(column, f"{array[place]}", f"a finite number below {LARGEST:g} in size", remedy, row=place[0])
    return array


def _checked_action(values: ArrayLike) -> IntArray:
    action = np.asarray(values)
    if action.ndim != 1:
        raise DataError("action", f"shape {action.shape}", "one action index per row, shape (n,)", "Pass a flat array.")
    if action.size == 0:
        raise DataError("action", "an empty log", "at least one row", "Check the filter or the date that selected it.")
    if action.dtype.kind not in "iu":
        raise DataError(
            "action", f"dtype {action.dtype}", "integer action indices", "Map labels to 0..k-1, or cast with .astype(int)."
        )
    _reject_rows("action", action, action >= 0, "an index of at least 0", "Map action labels to 0..k-1.")
    return action.astype(np.int64, copy=False)


def checked_cluster(values: ArrayLike, n: int) -> NDArray[Any]:
    """Units (n,), none of them missing; objects as text. Raises DataError."""
    cluster = np.asarray(values)
    if cluster.shape != (n,):
        raise DataError("cluster", f"shape {cluster.shape}", f"shape ({n},)", "Pass one unit id per row.")
    missing = np.array([label is None or label != label for label in cluster.tolist()]) if cluster.dtype.kind in "Of" else None
    if missing is not None and missing.any():
        row = int(np.argmax(missing))
        raise DataError(
            "cluster", "a missing value", "a unit id in every row", "Drop the row, or give it an id of its own.", row=row
        )
    return cluster.astype(str) if cluster.dtype.kind == "O" else cluster


def _checked_eligible(values: ArrayLike, action: IntArray) -> BoolArray:
    eligible = np.asarray(values)
    if eligible.dtype.kind != "b" or eligible.ndim != 2 or len(eligible) != len(action):
        raise DataError(
            "eligible", f"{eligible.dtype} of shape {eligible.shape}", f"booleans of shape ({len(action)}, k)",
            "Pass True where an action could have been taken.",
        )  # fmt: skip
    checked_width("eligible", action, eligible.shape[1])
    inside = eligible[np.arange(len(action)), action]
    _reject_rows(
        "action", action, inside, "an action of the row's eligible set", "Log the eligible set that the sampler really used."
    )
    return eligible


def _floats(column: str, values: ArrayLike, shape: tuple[int | None, ...]) -> FloatArray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(column, f"values that are not numbers ({error})", "numbers", "Convert the column first.") from None
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        wanted = "(" + ", ".join("any" if want is None else str(want) for want in shape) + ("," if len(shape) == 1 else "") + ")"
        raise DataError(column, f"shape {array.shape}", f"shape {wanted}", "Pass one entry per row of the log.")
    return array


def _reject_rows(column: str, values: NDArray[Any], good: BoolArray, expected: str, remedy: str, first_row: int = 0) -> None:
    """Raise DataError at the first row that is not good."""
    if not good.all():
        row = int(np.argmin(good))
        raise DataError(column, f"{values[row]!s}", expected, remedy, row=first_row + row)
