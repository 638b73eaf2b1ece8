"""Checks of settings that several records share."""

from __future__ import annotations

import math
from typing import Any

from ope.data import InputError


def at_least(record: Any, low: float, *names: str) -> None:
    """Raises InputError, naming the field, for one below or without an end; NaN is below. None is off."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not low <= value < math.inf:
            raise InputError(f"{name}: found {value}; expected at least {low:g}, and a finite number")


def above(record: Any, low: float, *names: str) -> None:
    """Raises InputError, naming the field, for one that is not above; NaN is not. None is off."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not value > low:
            raise InputError(f"{name}: found {value}; expected above {low:g}")


def within(record: Any, low: float, high: float, *names: str) -> None:
    """Raises InputError, naming the field, for one outside [low, high]. None is off."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"{name}: found {value}; expected {low:g} to {high:g}")
