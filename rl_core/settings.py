"""A method and a schedule of the token family, from a file of settings and from what a command line says otherwise."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ope.data import InputError
from rl_core.config import changed, from_table
from rl_core.registry import FAMILIES, named
from rl_core.trainers.token import Schedule


def read_tables(settings: Path | None) -> dict[str, Any]:
    """[method], [schedule] and [collection] of a file of TOML; none of no file. Raises InputError for one that has others."""
    if settings is None:
        return {}
    try:
        tables = tomllib.loads(settings.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{settings}: found {error}; expected a file of TOML") from None
    if unknown := sorted(set(tables) - {"method", "schedule", "collection"}):
        raise InputError(f"{settings}: found {', '.join(unknown)}; expected [method], [schedule] and, of replay, [collection]")
    return tables


def asked(name: str, settings: Path | None, changes: Mapping[str, Any]) -> tuple[Any, Schedule]:
    """`name`: a method, or settings that have one, in any case; `changes`: fields of the schedule, None where nothing is said.

    Raises InputError for a file that cannot be read, unknown fields, and a method of another family.
    """
    tables = read_tables(settings)
    made = named(name)
    if type(made) not in FAMILIES["token"]:
        token = ", ".join(one.__name__ for one in FAMILIES["token"])
        raise InputError(f"method: found {name}, which does not learn language models; expected one of {token}")
    schedule = tables.get("schedule", {}) | {field: value for field, value in changes.items() if value is not None}
    return changed(made, tables.get("method", {})), from_table(Schedule, schedule)
