"""TOML files to frozen structs, with errors that name the file, the key and what was probably meant."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from ope.data import InputError

T = TypeVar("T", bound=msgspec.Struct)


def read_toml(path: Path, kind: type[T]) -> T:
    """A struct from a TOML file. Raises InputError that names file and key, and suggests the key that was meant."""
    try:
        return parse_toml(path.read_bytes(), kind, str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a TOML file") from None


def parse_toml(text: bytes | str, kind: type[T], source: str) -> T:
    """A struct from TOML text; `source` names it in errors. Raises InputError."""
    try:
        return msgspec.toml.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {_explained(str(error), kind)}") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(f"{source}: found text that is not TOML ({error})") from None


def _explained(message: str, kind: type[msgspec.Struct]) -> str:
    """msgspec's message in this house's words: the key by its path in the file, and the name that was probably meant."""
    place = re.search(r" - at `\$?\.?(.*)`$", message)
    key = place[1] if place else ""
    what = message[: place.start()] if place else message
    if what.startswith("Invalid enum value") or (what.startswith("Invalid value") and key.endswith(".type")):
        return f"{key}: {what[0].lower()}{what[1:]}; expected one of {', '.join(_choices(key, kind))}"
    unknown = re.search(r"unknown field `(.*)`", what)
    if unknown is None:
        return f"{key}: {what}" if key else what
    closest = difflib.get_close_matches(unknown[1], _known_keys(key, kind), 1, 0.5)
    hint = f"; did you mean {closest[0]!r}?" if closest else ""
    return f"{f'{key}: ' if key else ''}unknown key {unknown[1]!r}{hint}"


def _choices(key: str, kind: type[msgspec.Struct]) -> list[str]:
    """What may stand at a key that takes one of several words."""
    place, _, name = key.rpartition(".")
    if name == "type":
        return [str(struct.__struct_config__.tag) for struct in _structs(place, kind)]
    hints = [get_type_hints(struct).get(name) for struct in _structs(place, kind)]
    return [word for hint in hints for word in get_args(hint) if isinstance(word, str)]


def _known_keys(place: str, kind: type[msgspec.Struct]) -> list[str]:
    """Keys that may stand at a place of the file, such as `rewards[0]`."""
    structs = _structs(place, kind)
    keys = [name for struct in structs for name in struct.__struct_fields__]
    return [*keys, "type"] if len(structs) > 1 else keys


def _structs(place: str, kind: type[msgspec.Struct]) -> list[Any]:
    """What may stand at a place of the file: one struct, or several that a `type` tells apart."""
    found: list[Any] = [kind]
    for name in re.findall(r"[^.\[\]]+", place):
        if not name.isdigit() and name != "...":
            found = [inner for struct in found for inner in _within(get_type_hints(struct).get(name))]
    return found


def _within(hint: Any) -> list[Any]:
    """The structs that a type is made of."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint]
    return [struct for inner in get_args(hint) for struct in _within(inner)]
