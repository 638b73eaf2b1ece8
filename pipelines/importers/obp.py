"""The feedback dict of the Open Bandit Pipeline (package `obp`), which need not be installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ope.data import DataError, FloatArray, InputError, IntArray, LoggedData, checked_finite
from pipelines.frame import shown

SOURCE = "bandit feedback"
"""Named in errors, whose columns are the dict's keys."""

KEYS = {"propensity": "pscore", "propensities": "pi_b"}

OTHERS = (
    (
        ("slate_id", "n_unique_action", "pscore_cascade", "pscore_item_position"), "feedback on slates",
        "one action per row, with a propensity of its own",
        "To value slots one by one, pass a dict without these keys: n_actions, a row per slot, pscore_item_position as pscore.",
    ),
    (
        ("stratum_idx", "n_strata", "pscore_avg", "pi_b_avg"), "feedback of several logging policies", "that of one",
        "Pass a dict without these keys: the rows of one stratum, or pscore_avg and pi_b_avg as pscore and pi_b.",
    ),
)  # fmt: skip
"""Keys of other layouts, what they are of, what is expected and what to do."""


def from_feedback(feedback: Mapping[str, Any]) -> LoggedData:
    """The log of n rounds and k actions that a feedback dict holds; each row has the vector of its own position.

    `action` (n,) integers below `n_actions`, `reward` (n,) and `pscore` (n,) are needed; `context` (n, d), `position` (n,) and
    `pi_b` (n, k, positions) may be absent or None. Where there is more than one position, one column per position follows the
    context, 1 in the row's own. `action_context` is left out: a log would hold it once per row. So is `expected_reward`, which
    no real log has. Where `pscore` was estimated, say so: `dataclasses.replace(log, propensity_estimated=True)`.

    Raises InputError for anything but one dict. Raises DataError, naming the key, for one without propensities, of slates, of
    several logging policies or of continuous actions, and for arrays that do not fit `n_rounds` and `n_actions`.
    """
    try:
        n, k, position = _rows(feedback)
        pi_b = feedback.get("pi_b")
        if feedback.get("pscore") is None:
            remedy = (
                "Estimate what was not logged (propel propensities, or ope.nuisance.cross_fit_propensity); never fill in 1."
                if pi_b is None
                else "Pass pi_b's entry of each row's action and position as pscore; never fill in 1."
            )
            raise DataError("pscore", "no propensities: they are missing", "the probability (n,) of every logged action", remedy)
        vectors = None if pi_b is None else _of_position("pi_b", pi_b, n, k, position)
        context = _context(feedback.get("context"), n, position)
        return LoggedData(feedback["action"], feedback["reward"], feedback["pscore"], context, vectors)
    except DataError as error:
        raise error.located(SOURCE, KEYS) from None


def policy_of(feedback: Mapping[str, Any], action_dist: Any) -> FloatArray:
    """An `action_dist` (n, k, positions), or a reward model's predictions of that shape, as (n, k): each row's own position.

    Raises InputError and DataError as `from_feedback` does, propensities apart, and DataError for another shape.
    """
    try:
        n, k, position = _rows(feedback)
        return _of_position("action_dist", action_dist, n, k, position)
    except DataError as error:
        raise error.located(SOURCE, {}) from None


def missing(feedback: Mapping[str, Any]) -> list[str]:
    """What the dict does not hold, a sentence each. Raises InputError for anything but one dict."""
    _check_mapping(feedback)
    found = []
    if feedback.get("pscore") is None:
        found.append("No propensities (pscore): nothing can be evaluated until they are logged or estimated.")
    if feedback.get("pi_b") is None:
        found.append("No whole vectors of the logging policy (pi_b): whether actions were drawn from them cannot be checked.")
    found.append("No eligible sets: every action counts as eligible in every row.")
    found.append("No units, such as users: rows count as independent of each other.")
    found.append("No times: neither drift nor the order of the rows can be checked.")
    return found


def _check_mapping(feedback: object) -> None:
    if not isinstance(feedback, Mapping):
        several = isinstance(feedback, tuple | list)  # OBP returns a training and a test part where it splits by time
        remedy = "Pass one of its parts." if several else "Pass what obtain_batch_bandit_feedback returns."
        raise InputError(f"{SOURCE}: found a {type(feedback).__name__}; expected one dict. {remedy}")


def _rows(feedback: Mapping[str, Any]) -> tuple[int, int, IntArray | None]:
    """Numbers of rows and of actions, and positions (n,), of a dict of one action per row, drawn by one policy."""
    _check_mapping(feedback)
    for keys, found, expected, remedy in OTHERS:
        for name in keys:
            if name in feedback:
                raise DataError(name, found, expected, remedy)
    action = np.asarray(feedback.get("action"))
    if action.dtype.kind == "f":
        remedy = "Sort continuous actions into bins, with a bin's probability as pscore; cast whole numbers with .astype(int)."
        raise DataError("action", "real numbers, as of continuous actions", "integers below n_actions", remedy)
    for name in ("n_rounds", "n_actions", "action", "reward"):
        if feedback.get(name) is None:
            there = f"it beside {shown([str(key) for key in feedback])}"
            raise DataError(name, "nothing", there, "Pass what obtain_batch_bandit_feedback returns.")
    n, k = _count("n_rounds", feedback["n_rounds"]), _count("n_actions", feedback["n_actions"])
    _check_index("action", action, n, k)
    if feedback.get("position") is None:
        return n, k, None
    position = np.asarray(feedback["position"])
    _check_index("position", position, n, None)
    return n, k, position


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int | np.integer) or value < 1:
        raise DataError(name, f"{value!r}", "a whole number of at least 1", "Count them, and check what selected the rows.")
    return int(value)


def _check_index(column: str, index: IntArray, n: int, limit: int | None) -> None:
    """Raise DataError for anything but n integers from 0, below the limit."""
    if index.shape != (n,) or index.dtype.kind not in "iu":
        remedy = "Select the same rows of every array, set n_rounds to their number, and number labels from 0."
        raise DataError(column, f"{index.dtype} of shape {index.shape}", f"n_rounds = {n} integers, shape ({n},)", remedy)
    good = (index >= 0) & (index < (np.inf if limit is None else limit))
    if not good.all():
        row, below = int(np.argmin(good)), "" if limit is None else f", below n_actions = {limit}"
        raise DataError(column, f"{index[row]}", f"an index from 0{below}", "Number them from 0 without gaps.", row=row)


def _of_position(column: str, values: Any, n: int, k: int, position: IntArray | None) -> FloatArray:
    """Entries (n, k) of each row's position from (n, k, positions)."""
    if np.ndim(values) != 3 or np.shape(values)[:2] != (n, k) or np.size(values) == 0:
        remedy = "Vectors (n, k) are used as they are." if np.shape(values) == (n, k) else "Select the dict's own rows and actions."
        raise DataError(column, f"shape {np.shape(values)}", f"({n}, {k}, positions): n_rounds and n_actions first", remedy)
    array = checked_finite(column, values, (n, k, None), "Mend the policy or model that wrote it.")
    width, last = array.shape[2], 0 if position is None else int(position.max())
    if position is None and width > 1:
        remedy = f"Add `position` to the dict, or pass one position of {column}: [:, :, :1]."
        raise DataError("position", f"none beside {column} of {width} positions", "the position of every row", remedy)
    if last >= width:
        remedy = f"Where {column} is the same in every position, repeat it: np.repeat({column}, {last + 1}, axis=2)."
        raise DataError("position", f"position {last}", f"an index below {width}, the positions of {column}", remedy)
    return array[:, :, 0] if position is None else array[np.arange(n), :, position]


def _context(context: Any, n: int, position: IntArray | None) -> Any:
    """The context as it is, or (n, d + positions) where there are several: the position is known before the decision."""
    if position is None or int(position.max()) == 0:
        return context
    places = (position[:, None] == np.arange(int(position.max()) + 1)).astype(np.float64)
    if context is None:
        return places
    return np.concatenate((checked_finite("context", context, (n, None), "Fill or drop it before evaluating."), places), axis=1)
