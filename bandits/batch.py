"""What a policy sees: contexts, action features and eligibility, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ope.data import BoolArray, FloatArray, InputError, LoggedData


@dataclass(frozen=True, slots=True, eq=False)
class DecisionBatch:
    """n requests for a decision. Column j of row i is the j-th action of that row, k the longest set; padding is ineligible.

    `of` checks; the constructor does not, since the service makes one per request from features that were checked.
    """

    context: FloatArray
    """(n, d); d may be 0"""
    action_features: FloatArray
    """(n, k, p); p may be 0"""
    eligible: BoolArray
    """(n, k)"""
    full: bool = False
    """True only where every action of every row is known to be eligible; saves the masks."""

    @property
    def mask(self) -> BoolArray | None:
        """`eligible`, or None where it would hide nothing."""
        return None if self.full else self.eligible

    @classmethod
    def of(cls, context: FloatArray | None, eligible: BoolArray, action_features: FloatArray | None = None) -> DecisionBatch:
        """A checked batch. Raises InputError for shapes that differ, numbers that are not finite, rows without an action."""
        eligible = np.asarray(eligible, dtype=np.bool_)
        if eligible.ndim != 2:
            raise InputError(f"eligible: found shape {eligible.shape}; expected (n, k)")
        n, k = eligible.shape
        context = np.empty((n, 0)) if context is None else np.asarray(context, dtype=np.float64)
        features = np.empty((n, k, 0)) if action_features is None else np.asarray(action_features, dtype=np.float64)
        if context.ndim != 2 or len(context) != n or features.shape[:2] != (n, k):
            raise InputError(
                f"found context {context.shape}, action_features {features.shape}, eligible {eligible.shape}; "
                "expected (n, d), (n, k, p), (n, k)"
            )
        for name, array in (("context", context), ("action_features", features)):
            if not np.isfinite(array).all():
                row = int(np.argmin(np.isfinite(array).reshape(n, -1).all(axis=1)))
                raise InputError(f"{name}, row {row}: found a number that is not finite; fill or drop it before deciding")
        if not eligible.any(axis=1).all():
            raise InputError(f"row {int(np.argmin(eligible.any(axis=1)))}: found no eligible action; expected at least one")
        return cls(context, features, eligible, bool(eligible.all()))

    @classmethod
    def of_log(cls, data: LoggedData, k: int | None = None) -> DecisionBatch:
        """The requests of a log, whose number of actions is `k` where neither eligibility nor vectors say it."""
        if data.eligible is not None:
            eligible = data.eligible
        elif data.propensities is not None:
            eligible = np.ones(data.propensities.shape, dtype=np.bool_)
        elif data.action_features is not None:
            eligible = np.ones(data.action_features.shape[:2], dtype=np.bool_)
        else:
            eligible = np.ones((data.n, max(k or 0, int(data.action.max()) + 1)), dtype=np.bool_)
        return cls.of(data.context, eligible, data.action_features)

    def __len__(self) -> int:
        return len(self.eligible)

    def rows(self, part: slice) -> DecisionBatch:
        """A part of the batch, without a copy."""
        return DecisionBatch(self.context[part], self.action_features[part], self.eligible[part], self.full)
