"""From what a request says to arrays: one function for one request online and for a million rows in batch, equal to the bit.

A schema is part of every artifact: names, types, levels, what is missing and what is unknown are decided once, in one place.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain, product, takewhile
from operator import itemgetter
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np

from bandits.batch import DecisionBatch
from ope.data import BoolArray, FloatArray, InputError

LARGEST = 1e50
"""Numbers beyond this are mistakes; below it, scaled and squared, they stay numbers."""

LARGEST_SQUARED = LARGEST**2

NUMBERS = frozenset((float, int))
"""Types of a number; a boolean is none."""

Fields: TypeAlias = Mapping[str, Any]
Blocks: TypeAlias = Mapping[str, Sequence[float]]
"""Columns of the features that interact, by name."""

NO_BLOCKS: Blocks = {}

Encoder: TypeAlias = Callable[[Any], Sequence[float]]
Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class Number(msgspec.Struct, frozen=True, tag="number", forbid_unknown_fields=True):
    """(value - centre) / scale in one column; with a `missing` value also 1 in a second column where it was missing."""

    name: Name
    missing: float | None = None
    """Stands in for an absent or null value; without it that is an error."""
    centre: float = 0.0
    scale: float = 1.0

    def columns(self) -> list[str]:
        """Names of the columns this feature fills."""
        return [self.name] if self.missing is None else [self.name, f"{self.name} is missing"]

    def check(self) -> None:
        """Raise ValueError for settings that would leave the range of numbers."""
        for name, value, good in (
            ("scale", self.scale, 1e-50 <= self.scale <= 1e50),
            ("centre", self.centre, abs(self.centre) < 1e50),
            ("missing", self.missing, self.missing is None or abs(self.missing) < 1e50),
        ):
            if not good:
                raise ValueError(f"{self.name}: found {name} {value}; expected a number below 1e50 in size, a scale above 1e-50")

    def encoder(self) -> Encoder:
        """The function from a value to its columns. Raises InputError for a value that is not a finite number."""
        name, centre, scale, missing = self.name, self.centre, self.scale, self.missing
        absent = None if missing is None else ((missing - centre) / scale, 1.0)

        def encode(value: Any) -> Sequence[float]:
            kind = type(value)
            if (kind is float or kind is int) and -LARGEST < value < LARGEST:  # also refuses NaN
                scaled = (value - centre) / scale
                return (scaled,) if absent is None else (scaled, 0.0)
            if value is None and absent is not None:
                return absent
            raise _wrong(name, value, "a finite number" if missing is not None else "a finite number, which may not be missing")

        return encode


class Boolean(msgspec.Struct, frozen=True, tag="boolean", forbid_unknown_fields=True):
    """1 or 0 in one column; with `missing` also 1 in a second column where it was missing."""

    name: Name
    missing: bool | None = None

    def columns(self) -> list[str]:
        """Names of the columns this feature fills."""
        return [self.name] if self.missing is None else [self.name, f"{self.name} is missing"]

    def encoder(self) -> Encoder:
        """The function from a value to its columns. Raises InputError for a value that is not a boolean."""
        return _table(
            self.name,
            {flag: (float(flag),) if self.missing is None else (float(flag), 0.0) for flag in (True, False)}
            | ({} if self.missing is None else {None: (float(self.missing), 1.0)}),
            "true or false",
            bool,
        )


class Category(msgspec.Struct, frozen=True, tag="category", forbid_unknown_fields=True):
    """One column per level, and one each for missing and for unknown where those are levels of their own."""

    name: Name
    levels: tuple[str, ...]
    missing: Literal["error", "level"] = "error"
    unknown: Literal["error", "level"] = "error"

    def columns(self) -> list[str]:
        """Names of the columns this feature fills."""
        more = ["is missing"] * (self.missing == "level") + ["is unknown"] * (self.unknown == "level")
        return [f"{self.name} = {level}" for level in self.levels] + [f"{self.name} {what}" for what in more]

    def encoder(self) -> Encoder:
        """The function from a value to its columns. Raises InputError for a text that is no level, unless unknown is one."""
        rows = [tuple(row) for row in np.eye(len(self.columns())).tolist()]
        table: dict[Any, Sequence[float]] = dict(zip(self.levels, rows, strict=False))
        if self.missing == "level":
            table[None] = rows[len(self.levels)]
        levels = ", ".join(self.levels[:8]) + (", ..." if len(self.levels) > 8 else "")
        return _table(self.name, table, f"one of {levels}", str, rows[-1] if self.unknown == "level" else None)


class Hashed(msgspec.Struct, frozen=True, tag="hashed", forbid_unknown_fields=True):
    """A text among too many to list: one of `buckets` columns, by BLAKE2b of name and text; none where missing."""

    name: Name
    buckets: Annotated[int, msgspec.Meta(ge=1, le=65536)]

    def columns(self) -> list[str]:
        """Names of the columns this feature fills."""
        return [f"{self.name} # {bucket}" for bucket in range(self.buckets)]

    def encoder(self) -> Encoder:
        """The function from a text to its columns. Raises InputError for anything else."""
        name, buckets = self.name, self.buckets
        prefix = len(name.encode()).to_bytes(4, "big") + name.encode()

        @lru_cache(maxsize=65536)
        def bucket(text: str) -> Sequence[float]:
            hashed = int.from_bytes(hashlib.blake2b(prefix + text.encode(), digest_size=8).digest(), "big") % buckets
            return tuple(float(i == hashed) for i in range(buckets))

        absent = (0.0,) * buckets

        def encode(value: Any) -> Sequence[float]:
            if type(value) is str and not any("\ud800" <= character <= "\udfff" for character in value):
                return bucket(value)
            if value is None:
                return absent
            raise _wrong(name, value, "a text, or nothing")

        return encode


Feature: TypeAlias = Number | Boolean | Category | Hashed


class FeatureSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Features of contexts and of actions, and interactions between them.

    An interaction multiplies the columns of two features. One of two context features belongs to the context; any other
    belongs to the action, whose features may thus depend on the context.
    """

    context: tuple[Feature, ...] = ()
    action: tuple[Feature, ...] = ()
    interactions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        names = [feature.name for feature in (*self.context, *self.action)]
        if len(set(names)) != len(names):
            raise ValueError(f"features: found a name twice in {names}; expected distinct names")
        for pair in self.interactions:
            for name in pair:
                if name not in names:
                    raise ValueError(f"interactions: found {name!r}; expected one of {names}")
        for feature in (*self.context, *self.action):
            if isinstance(feature, Number):
                feature.check()
            if isinstance(feature, Category) and (not feature.levels or len(set(feature.levels)) != len(feature.levels)):
                raise ValueError(f"{feature.name}: found levels {list(feature.levels)}; expected at least one, all distinct")
        for columns in (self.context_columns, self.action_columns):
            if len(set(columns)) != len(columns):
                twice = min(name for name in set(columns) if columns.count(name) > 1)
                raise ValueError(f"features: found two columns named {twice!r}; expected distinct ones: rename a feature")

    @cached_property
    def context_columns(self) -> list[str]:
        """Names of the d context columns, interactions last."""
        columns = [column for feature in self.context for column in feature.columns()]
        return columns + [name for pair in self._split_pairs[0] for name in self._crossed(pair)]

    @cached_property
    def action_columns(self) -> list[str]:
        """Names of the p action columns, interactions last."""
        columns = [column for feature in self.action for column in feature.columns()]
        return columns + [name for pair in self._split_pairs[1] for name in self._crossed(pair)]

    def batch(
        self, contexts: Sequence[Fields], actions: Sequence[Sequence[Fields]] | int, eligible: BoolArray | None = None
    ) -> DecisionBatch:
        """Arrays of n requests. `actions`: the features of each row's actions, or their number where they have none.

        `eligible`: (n, k) which actions of a catalogue each request may take; by default all of them.

        Raises InputError naming row, feature, what was found and what was expected.
        """
        if len(contexts) == 0:
            raise InputError("found no request; expected at least one context, which may be empty")
        try:
            batch = self._batch(contexts, actions)
        except (TypeError, AttributeError):
            _reject_no_mappings(contexts, actions)
            raise
        if eligible is None:
            return batch
        allowed = np.asarray(eligible, dtype=np.bool_)
        if allowed.shape != batch.eligible.shape:
            raise InputError(f"eligible: found shape {allowed.shape}; expected {batch.eligible.shape}, an entry per action")
        return DecisionBatch.of(batch.context, allowed & batch.eligible, batch.action_features)

    def _batch(self, contexts: Sequence[Fields], actions: Sequence[Sequence[Fields]] | int) -> DecisionBatch:
        context, blocks = self._contexts(contexts)
        if isinstance(actions, int):
            if isinstance(actions, bool):
                raise TypeError
            if actions < 1:
                raise InputError(f"row 0: found {actions} eligible actions; expected at least one")
            if self.action:
                raise InputError(f"actions: found no features; expected {[feature.name for feature in self.action]} of each")
            return DecisionBatch(context, np.empty((len(contexts), actions, 0)), all_eligible(len(contexts), actions), True)
        if len(actions) != len(contexts):
            raise InputError(f"actions: found {len(actions)} sets for {len(contexts)} contexts; expected one each")
        sizes = [len(members) for members in actions]
        fewest, k = min(sizes), max(sizes)
        if fewest == 0:
            raise InputError(f"row {sizes.index(0)}: found no eligible action; expected at least one")
        features = self._action_rows(actions, blocks, k).reshape(len(actions), k, len(self.action_columns))
        if fewest == k:
            return DecisionBatch(context, features, all_eligible(len(actions), k), True)
        return DecisionBatch(context, features, np.arange(k) < np.array(sizes)[:, None])

    def _contexts(self, contexts: Sequence[Fields]) -> tuple[FloatArray, Sequence[Blocks]]:
        """Context columns (n, d), and the blocks of each row that interact with action features."""
        plan, pairs = self._context_plan, self._split_pairs[0]
        if plan.is_plain:
            return _plain(contexts, plan, "context"), [NO_BLOCKS] * len(contexts)
        rows = [_encode(fields, plan, pairs, NO_BLOCKS, row, "context") for row, fields in enumerate(contexts)]
        return np.array([flat for flat, _ in rows], dtype=np.float64).reshape(len(rows), -1), [kept for _, kept in rows]

    def _action_rows(self, actions: Sequence[Sequence[Fields]], blocks: Sequence[Blocks], k: int) -> FloatArray:
        """Action columns (n·k, p), rows of padding after the actions of a shorter set."""
        plan, pairs = self._action_plan, self._split_pairs[1]
        if plan.is_plain and len(actions) == 1:
            return _plain(actions[0], plan, "action")
        padding = [0.0] * len(self.action_columns)
        flat: list[list[float]] = []
        for row, (members, outer) in enumerate(zip(actions, blocks, strict=True)):
            flat += [_encode(fields, plan, pairs, outer, row, "action")[0] for fields in members]
            flat += [padding] * (k - len(members))
        return np.array(flat, dtype=np.float64)

    @property
    def plain_context(self) -> tuple[str, ...]:
        """Names of the context features where all of them are plain numbers; none elsewhere."""
        return self._context_plan.plain if self._context_plan.is_plain else ()

    @cached_property
    def _context_plan(self) -> _Plan:
        return _Plan.of(self.context, self.interactions)

    @cached_property
    def _action_plan(self) -> _Plan:
        return _Plan.of(self.action, self.interactions)

    @cached_property
    def _split_pairs(self) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
        of_action = {feature.name for feature in self.action}
        with_action = tuple(pair for pair in self.interactions if of_action & set(pair))
        return tuple(pair for pair in self.interactions if pair not in with_action), with_action

    def _crossed(self, pair: tuple[str, str]) -> list[str]:
        columns = {feature.name: feature.columns() for feature in (*self.context, *self.action)}
        return [f"{left} x {right}" for left, right in product(columns[pair[0]], columns[pair[1]])]


class _Plan(NamedTuple):
    """How the fields of one context or action are read: leading plain numbers at once, the rest one by one."""

    names: frozenset[str]
    plain: tuple[str, ...]
    read_plain: Callable[[Fields], Sequence[Any]]
    rest: tuple[tuple[str, Encoder], ...]
    keep: frozenset[str]
    """Features whose columns an interaction will want."""

    @property
    def is_plain(self) -> bool:
        """True where every feature is a plain number."""
        return not self.rest

    @classmethod
    def of(cls, features: Sequence[Feature], interactions: Sequence[tuple[str, str]]) -> _Plan:
        keep = frozenset(name for pair in interactions for name in pair)
        plain = tuple(
            feature.name
            for feature in takewhile(lambda f: isinstance(f, Number) and f == Number(f.name) and f.name not in keep, features)
        )
        read = itemgetter(*plain) if len(plain) > 1 else (lambda fields: tuple(fields[name] for name in plain))
        rest = tuple((feature.name, feature.encoder()) for feature in features[len(plain) :])
        return cls(frozenset(feature.name for feature in features), plain, read, rest, keep)


@lru_cache(maxsize=256)
def all_eligible(n: int, k: int) -> BoolArray:
    """Read-only, so that requests of one shape may share it."""
    eligible = np.ones((n, k), dtype=np.bool_)
    eligible.setflags(write=False)
    return eligible


def _plain(rows: Sequence[Fields], plan: _Plan, what: str) -> FloatArray:
    """Columns (m, d) of contexts or actions that have plain numbers alone: what `_encode` gives, read and checked at once."""
    if not plan.plain:
        if any(rows):
            row = next(row for row, fields in enumerate(rows) if fields)
            raise _unknown(rows[row], plan, row, what)
        return np.empty((len(rows), 0))
    if {len(plan.plain)} != set(map(len, rows)):
        row = next(row for row, fields in enumerate(rows) if len(fields) != len(plan.plain))
        _reject_bad_numbers([rows[row]], plan, what, row)
        raise _unknown(rows[row], plan, row, what)
    try:
        values = list(chain.from_iterable(map(plan.read_plain, rows)))
        numbers = np.frombuffer(struct.pack(f"{len(values)}d", *values))  # four times as fast as np.array of a list
    except (KeyError, struct.error, OverflowError):
        _reject_bad_numbers(rows, plan, what)
        raise
    # counting floats is faster than asking which types there are, and mostly all there is to do
    alike = list(map(type, values)).count(float) == len(values) or NUMBERS.issuperset(map(type, values))
    if not (alike and np.vdot(numbers, numbers) < LARGEST_SQUARED):
        _reject_bad_numbers(rows, plan, what)
    return numbers.reshape(len(rows), -1)


def _encode(
    fields: Fields, plan: _Plan, pairs: Sequence[tuple[str, str]], outer: Blocks, row: int, what: str
) -> tuple[list[float], Blocks]:
    """Columns of one context or action, and the blocks of its features that interact."""
    try:
        flat = list(plan.read_plain(fields))
    except KeyError:
        flat = [None]
    if not (NUMBERS.issuperset(map(type, flat)) and all(-LARGEST < value < LARGEST for value in flat)):
        _reject_bad_numbers([fields], plan, what, row)
    kept: dict[str, Sequence[float]] = {}
    absent = False
    for name, encode in plan.rest:
        value = fields.get(name)
        absent = absent or value is None
        try:
            block = encode(value)
        except InputError as error:
            raise InputError(f"row {row}, {what} {error}") from None
        flat += block
        if name in plan.keep:
            kept[name] = block
    if (absent or len(fields) != len(plan.names)) and not fields.keys() <= plan.names:
        raise _unknown(fields, plan, row, what)
    for left, right in pairs:
        flat += [a * b for a in kept.get(left) or outer[left] for b in kept.get(right) or outer[right]]
    return flat, kept


def _unknown(fields: Fields, plan: _Plan, row: int, what: str) -> InputError:
    unknown = min(fields.keys() - plan.names, key=str)
    return InputError(f"row {row}, {what} feature {unknown!r}: not in the schema; expected {sorted(plan.names)}")


def _reject_bad_numbers(rows: Sequence[Fields], plan: _Plan, what: str, first_row: int = 0) -> None:
    """Raise InputError at the first plain number that is none."""
    for row, fields in enumerate(rows, first_row):
        for name in plan.plain:
            value = fields.get(name)
            if type(value) not in NUMBERS or not -LARGEST < value < LARGEST:  # type: ignore[operator]
                raise InputError(f"row {row}, {what} {_wrong(name, value, 'a finite number, which may not be missing')}") from None


def _reject_no_mappings(contexts: Sequence[Any], actions: Any) -> None:
    """Raise InputError at the first context or action that has no names for its values."""
    for row, fields in enumerate(contexts):
        if not isinstance(fields, Mapping):
            raise InputError(f"row {row}: found a {type(fields).__name__} as context; expected a mapping of names to values")
    if isinstance(actions, bool) or not isinstance(actions, int | Sequence):
        raise InputError(f"actions: found a {type(actions).__name__}; expected one list of mappings per row, or a number")
    for row, members in enumerate([] if isinstance(actions, int) else actions):
        if isinstance(members, str | Mapping) or not isinstance(members, Sequence):
            raise InputError(f"row {row}: found a {type(members).__name__} as actions; expected a list of mappings, one per action")
        for index, fields in enumerate(members):
            if not isinstance(fields, Mapping):
                raise InputError(
                    f"row {row}, action {index}: found a {type(fields).__name__}; expected a mapping of names to values"
                )


def _table(
    name: str, table: Mapping[Any, Sequence[float]], expected: str, kind: type, unknown: Sequence[float] | None = None
) -> Encoder:
    def encode(value: Any) -> Sequence[float]:
        if type(value) is kind or value is None:
            found = table.get(value)
            if found is not None:
                return found
            if unknown is not None and value is not None:
                return unknown
        raise _wrong(name, value, expected)

    return encode


def _wrong(name: str, value: Any, expected: str) -> InputError:
    if type(value) in NUMBERS and abs(value) >= LARGEST and abs(value) != math.inf:
        expected = expected.replace("a finite number", f"a number below {LARGEST:g} in size")
    elif isinstance(value, np.generic):
        expected += ", of Python's own types"
    found = "nothing" if value is None else repr(value)[:80]
    return InputError(f"feature {name!r}: found {found}; expected {expected}")
