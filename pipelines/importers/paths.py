"""Values of a nested context by the path of names that leads to them: what a column of a log holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

Names: TypeAlias = tuple[str, ...]
"""Of nested objects, outermost first."""

MAX_DEPTH = 20
"""Names of a context column's path: what lies deeper is in the events only."""


def scalars(value: Any, path: Names = ()) -> Iterator[tuple[Names, Any]]:
    """(path, value) of every number, text and boolean of a context. Objects in lists lie at the list's own path.

    Names that begin with an underscore are remarks, not features, as in VW.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            if not name.startswith("_") and len(path) < MAX_DEPTH:
                yield from scalars(item, (*path, name))
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                yield from scalars(item, path)
    elif value is not None:
        yield path, value


def at(path: Names, known: dict[Names, list[Any]]) -> list[Any]:
    """What lies at a path of `scalars` in each of many values. `known`: those of shorter paths, at least (); filled as needed."""
    if path not in known:
        name = path[-1]
        known[path] = [
            value.get(name) if value.__class__ is dict else _in_list(value, name) if value.__class__ is list else None
            for value in at(path[:-1], known)
        ]
    return known[path]


def _in_list(values: Sequence[Any], name: str) -> Any:
    for value in values:
        if value.__class__ is dict and name in value:
            return value[name]
    return None
