"""Where a default is from, and whether a method's own words say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Origin(NamedTuple):
    """A default, the paper's value and the official code's; None where a source has none of its own."""

    ours: Any
    paper: Any = None
    code: Any = None


def check(method: Any, origins: Mapping[str, Origin]) -> None:
    """Where paper and code differ in a number, the method's origin names both."""
    for name, origin in origins.items():
        if isinstance(origin.paper, float | int) and isinstance(origin.code, float | int) and origin.paper != origin.code:
            told = method.paper.defaults[name].replace("1e-3", "0.001").replace("3e-4", "0.0003")
            assert isinstance(origin.code, bool) or f"{origin.code:g}" in told, (name, told)
            assert isinstance(origin.paper, bool) or f"{origin.paper:g}" in told, (name, told)
