"""From bytes to requests: one decoder, nothing doubtful let through, and the canonical JSON that is hashed and logged."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET

from serving.plain import Plain
from serving.problems import ProblemError
from serving.wire import DecisionBatchRequest, DecisionRequest

T = TypeVar("T")

DECISION = msgspec.json.Decoder(DecisionRequest)
DECISIONS = msgspec.json.Decoder(DecisionBatchRequest)

NESTED = "found JSON nested too deeply; expected what a request needs"

_sorted = msgspec.json.Encoder(order="sorted").encode
_encode = msgspec.json.Encoder().encode


class Asked(NamedTuple):
    """A request with the parts that are kept of it."""

    request: DecisionRequest
    context: bytes
    """Canonical JSON."""
    actions: bytes
    plain: bool = False
    """Whether features are structs of plain numbers, and not dictionaries."""


def decoded(raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A request. Raises ProblemError for bytes that are no JSON, or not of its shape."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise ProblemError("invalid", str(error)) from None
    except RecursionError:
        raise ProblemError("malformed", NESTED) from None
    except (msgspec.DecodeError, ValueError) as error:
        raise ProblemError("malformed", f"found {error}") from None


def asked(raw: bytes, plain: Plain | None = None) -> Asked:
    """One decision's request; `plain`: how those of its decision point may be read. Raises ProblemError."""
    read = None if plain is None else _read_plain(raw, plain.decoder)
    found = canonical(decoded(raw, DECISION)) if read is None else read[0]
    refuse_repeated_keys(raw, _quotes(found))
    return found


def asked_many(raw: bytes, plain: Plain | None = None) -> list[Asked]:
    """The requests of a batch. Raises ProblemError."""
    found = None if plain is None else _read_plain(raw, plain.several)
    if found is None:
        found = [canonical(request) for request in decoded(raw, DECISIONS).decisions]
    refuse_repeated_keys(raw, 2 + sum(map(_quotes, found)))
    return found


def _read_plain(raw: bytes, decoder: msgspec.json.Decoder[Any]) -> list[Asked] | None:
    """Requests of plain numbers, or None where they are not, or cannot be read: the general reader then says why."""
    try:
        found = decoder.decode(raw)
        requests = [found] if hasattr(found, "context") else found.decisions
        return [Asked(one, _encode(one.context), _encode(one.actions) if one.actions else b"null", True) for one in requests]
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError):
        return None


def refuse_repeated_keys(raw: bytes, quotes: int) -> None:
    """Raise ProblemError where an object says a key twice, since readers differ in which one they take; and for NUL in a text.

    `quotes`: what is left of quotation marks in what was decoded. Fewer than in the bytes, and a key was lost.
    """
    if b"\\" not in raw:
        if raw.count(b'"') != quotes:
            raise ProblemError("malformed", "found a key twice in one object; expected it once")
        return
    try:
        if b"\\u0000" in raw and "\0" in "".join(_texts(json.loads(raw))):
            raise ProblemError("malformed", "found a NUL character in a text; expected printable ones")
        json.loads(raw, object_pairs_hook=_distinct)
    except RecursionError:
        raise ProblemError("malformed", NESTED) from None
    except ValueError as error:  # what this reader refuses, and the other did not
        raise ProblemError("malformed", f"found {error}") from None


def canonical(request: DecisionRequest) -> Asked:
    """A request with its parts in canonical JSON."""
    actions = request.actions
    return Asked(request, _sorted(request.context), b"null" if actions is UNSET or actions is None else _sorted(actions))


def _quotes(one: Asked) -> int:
    """Quotation marks of a request whose texts need no escapes."""
    request = one.request
    found = one.context.count(b'"') + 2 + (0 if request.actions is UNSET else 2 + one.actions.count(b'"'))
    for value in (request.decision_id, request.unit, request.session, request.parent):
        if value is not UNSET:
            found += 2 if value is None else 4
    return found


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *_texts(item))]
    return []


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ProblemError("malformed", "found a key twice in one object; expected it once")
    return found
