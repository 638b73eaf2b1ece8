"""The wire contract: what a decision was, what came of it, what was really shown. Frozen structs, schema version 1.

One schema for HTTP, the log, Kafka and OpenAPI. It only ever grows: new fields have defaults, and readers of one version read
every earlier one.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import msgspec
import numpy as np

from bandits.sampling import TOTAL
from ope.data import InputError, IntArray

SCHEMA_VERSION = 1

Id: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
"""Any 1 to 128 printable characters."""

Version: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]

Kind: TypeAlias = Literal["sampled", "fallback", "override", "shadow"]
"""How the action came about. Only `sampled` rows are learned from."""

KINDS: tuple[str, ...] = get_args(Kind)


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision as it was made: enough to prove later why this action was taken, and with which probability.

    Raises ValueError (msgspec.ValidationError when decoding) where the fields contradict each other.
    """

    schema_version: Version = SCHEMA_VERSION
    tenant: Id
    decision_point: Id
    decision_id: Id
    decided_at_ns: int
    unit: Id
    """Keyed hash of the user, card or device that is randomised and clustered by."""
    session: Id | None = None
    parent: Id | None = None
    """The decision that this one retries; the failed action is then not eligible."""
    policy: Id
    """name@digest"""
    experiment: Id | None = None
    arm: Id | None = None
    seed_epoch: int
    kind: Kind = "sampled"
    actions: tuple[Id, ...]
    """Eligible actions, in order."""
    excluded: tuple[tuple[Id, str], ...] = ()
    """(action, reason), removed before sampling."""
    shares: bytes
    """Little-endian u32 per action, summing to 2^31; empty where the vector is unknown (imports only)."""
    propensity: float
    """Of the chosen action; equals its share / 2^31 wherever shares are known."""
    chosen: int
    """Index into `actions`."""
    pass_probability: float = 1.0
    """Probability that the record was kept; 1 unless the log itself was sampled."""
    body: msgspec.Raw
    """Canonical JSON of context and action features."""
    body_hash: bytes
    request_hash: bytes

    _ids: ClassVar[tuple[str, ...]] = (
        "tenant",
        "decision_point",
        "decision_id",
        "unit",
        "session",
        "parent",
        "policy",
        "experiment",
        "arm",
    )

    def __post_init__(self) -> None:
        for name in self._ids:
            check_id(name, getattr(self, name))
        removed = [action for action, _ in self.excluded]
        _check_ids("actions", self.actions)
        _check_ids("actions", removed)
        if self.kind not in KINDS:
            raise ValueError(f"kind: found {self.kind!r}; expected one of {', '.join(KINDS)}")
        if len(self.shares) % 4:
            raise ValueError(f"shares: found {len(self.shares)} bytes; expected four per action")
        if len(set(self.actions)) != len(self.actions):
            raise ValueError("actions: found one twice; expected distinct ids")
        if removed and (both := set(self.actions) & set(removed)):
            raise ValueError(f"excluded: found {min(both)!r}, which is among the eligible actions; expected one or the other")
        if not 0 <= self.chosen < len(self.actions):
            raise ValueError(f"chosen: found {self.chosen}; expected an index into the {len(self.actions)} actions")
        if not (0 < self.propensity <= 1 and 0 < self.pass_probability <= 1):
            raise ValueError(
                f"propensity, pass_probability: found {self.propensity}, {self.pass_probability}; expected both in (0, 1]"
            )
        if self.shares:
            shares = struct.unpack(f"<{len(self.shares) // 4}I", self.shares)
            if len(shares) != len(self.actions) or sum(shares) != TOTAL:
                raise ValueError(
                    f"shares: found {len(shares)} summing to {sum(shares)}; expected {len(self.actions)} summing to {TOTAL}"
                )
            if shares[self.chosen] / TOTAL != self.propensity:
                raise ValueError(f"propensity: found {self.propensity}; expected its share, {shares[self.chosen] / TOTAL}")

    def check_body(self) -> None:
        """Raise InputError where the body is not the one that was hashed when the decision was made."""
        if digest(bytes(self.body)) != self.body_hash:
            raise InputError(
                f"decision {self.decision_id!r}: found a body that differs from its hash {self.body_hash.hex()}; "
                "expected the bytes that were decided on: restore the record from where it was first written"
            )

    def share_vector(self) -> IntArray:
        """Integer shares (k,), summing to 2^31; empty where the vector is unknown."""
        return np.frombuffer(self.shares, dtype="<u4").astype(np.int64)


class Reward(msgspec.Struct, frozen=True, kw_only=True):
    """One observation of a named reward of a decision. A reversal is a further, negative event with its own id."""

    schema_version: Version = SCHEMA_VERSION
    tenant: Id
    decision_id: Id
    name: Id
    event_id: Annotated[str, msgspec.Meta(max_length=128)] = ""
    """"" is the one of that name."""
    observed_at_ns: int
    received_at_ns: int
    value: float

    def __post_init__(self) -> None:
        for name in ("tenant", "decision_id", "name"):
            check_id(name, getattr(self, name) or "")
        check_id("event_id", self.event_id or None)
        if not math.isfinite(self.value):
            raise ValueError(f"value: found {self.value}; expected a finite number")


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller really did with a decision: an action, or none."""

    schema_version: Version = SCHEMA_VERSION
    tenant: Id
    decision_id: Id
    action: Id | None
    observed_at_ns: int
    received_at_ns: int

    def __post_init__(self) -> None:
        for name in ("tenant", "decision_id", "action"):
            check_id(name, getattr(self, name))


def check_id(field: str, text: str | None) -> None:
    """Raise InputError unless it is 1 to 128 printable characters: ids end up in logs, file names and terminals."""
    if text is not None and not (isinstance(text, str) and 1 <= len(text) <= 128 and text.isprintable()):
        raise InputError(
            f"{field}: found {text if not isinstance(text, str) else text[:140]!r}; expected 1 to 128 printable characters"
        )


def _check_ids(field: str, texts: Sequence[str]) -> None:
    """`check_id` of many: at once where all are well."""
    try:
        sizes = [len(text) for text in texts]
        good = not sizes or ("".join(texts).isprintable() and min(sizes) >= 1 and max(sizes) <= 128)
    except TypeError:
        good = False
    if not good:
        for text in texts:
            check_id(field, text)


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal JSON values, equal bytes; 1 and 1.0 are different ones.

    Raises InputError for what JSON does not have.
    """
    try:
        _reject_not_json(value, "")
        return msgspec.json.encode(value, order="sorted")
    except RecursionError:
        raise InputError("found a value nested too deeply; expected what a request needs: names, values, lists of them") from None
    except InputError:
        raise
    except (ValueError, OverflowError) as error:  # a lone surrogate, an integer beyond 64 bits
        raise InputError(f"found a value that JSON does not have: {error}") from None


def digest(data: bytes) -> bytes:
    """BLAKE2b-128."""
    return hashlib.blake2b(data, digest_size=16).digest()


def request_hash(decision_point: str, unit: str, session: str | None, parent: str | None, context: Any, actions: Any) -> bytes:
    """What a repeat is decided by: the hash of the whole request in canonical JSON."""
    return digest(
        canonical(
            {
                "decision_point": decision_point,
                "unit": unit,
                "session": session,
                "parent": parent,
                "context": context,
                "actions": actions,
            }
        )
    )


def _reject_not_json(value: Any, place: str) -> None:
    kind = type(value)
    if value is None or kind is str or kind is int or kind is bool:
        return
    if kind is float:
        if not math.isfinite(value):
            raise InputError(f"{place or 'value'}: found {value}; expected a finite number")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(f"{place or 'value'}: found the key {key!r}, which JSON does not have; expected texts")
            _reject_not_json(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _reject_not_json(item, f"{place}[{index}]")
    else:
        raise InputError(
            f"{place or 'value'}: found a {kind.__name__}, which JSON does not have; "
            "expected text, numbers, booleans, null, lists, objects"
        )
