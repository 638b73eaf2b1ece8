"""Methods as tables of TOML and back: a method's fields are its whole configuration, nested records carry the name of their class.

`{"method": "REC", "gate": {"kind": "Ring", "outer_high": 2.0}}` is `REC(gate=Ring(outer_high=2.0))`; "none" switches a field off.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ope.data import InputError
from rl_core.registry import find

T = TypeVar("T")


def to_table(record: Any) -> dict[str, Any]:
    """Fields of a frozen dataclass, nested ones as tables with their class's name under `kind`."""
    found = {}
    for one in fields(record):
        value = getattr(record, one.name)
        if is_dataclass(value):
            value = {"kind": type(value).__name__} | to_table(value)
        found[one.name] = "none" if value is None else value
    return found


def from_table(kind: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """A frozen dataclass from its table. Raises InputError, naming the field, for one that is unknown or of another type."""
    hints = get_type_hints(kind)
    known = {one.name: hints[one.name] for one in fields(kind)}  # type: ignore[arg-type]
    where = where or kind.__name__
    if unknown := sorted(set(table) - set(known)):
        raise InputError(f"{where}: found {', '.join(unknown)}; expected some of {', '.join(known)}")
    values = {name: _value(known[name], value, f"{where}.{name}") for name, value in table.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{where}: {error}; expected some of {', '.join(known)}") from None


def changed(record: T, table: Mapping[str, Any]) -> T:
    """A record with some fields otherwise; of a nested one of the same kind, what is not said stays. Raises InputError."""
    return from_table(type(record), _merged(to_table(record), table))


def _merged(base: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for name, value in table.items():
        old = base.get(name)
        same = isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("kind", old.get("kind")) == old.get("kind")
        found[name] = _merged(old, value) if same else value  # type: ignore[arg-type]
    return found


def method_from(table: Mapping[str, Any]) -> Any:
    """A method from a table that names it under `method`. Raises InputError."""
    rest = dict(table)
    name = rest.pop("method", None)
    if not isinstance(name, str):
        raise InputError(f"method: found {name!r}; expected the name of a method")
    return from_table(find(name), rest)


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value of an annotated type. Whole numbers are taken for real ones."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value == "none" and type(None) in options:
        return None
    records = {one.__name__: one for one in options if isinstance(one, type) and is_dataclass(one)}
    if isinstance(value, Mapping) and records:
        rest = dict(value)
        name = rest.pop("kind", None)
        if name not in records:
            raise InputError(f"{where}.kind: found {name!r}; expected one of {', '.join(records)}")
        return from_table(records[name], rest, where)
    for one in options:
        if get_origin(one) is Literal and value in get_args(one):
            return value
        if one is float and type(value) in (int, float):
            return float(value)
        if one in (int, bool, str) and type(value) is one:
            return value
    raise InputError(f"{where}: found {value!r}; expected {_said(options)}")


def _said(options: tuple[Any, ...]) -> str:
    texts = []
    for one in options:
        if one is type(None):
            texts.append('"none"')
        elif get_origin(one) is Literal:
            texts += [repr(text) for text in get_args(one)]
        else:
            name = getattr(one, "__name__", str(one))
            texts.append("a number" if one is float else f"a table of {name}" if is_dataclass(one) else name)
    return " or ".join(texts)
