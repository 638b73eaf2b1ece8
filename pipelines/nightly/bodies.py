"""Features of decisions from the bodies that were logged: the function that the service uses, on a whole partition."""

from __future__ import annotations

import gc
import struct
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bandits.decision_point import DecisionPoint
from bandits.features import LARGEST, FeatureSchema
from ope.data import FloatArray, InputError
from pipelines.nightly.contract import action_positions

TEXT = pa.string()


def features_of(decisions: pa.Table, point: DecisionPoint, segments: Sequence[str]) -> tuple[dict[str, Any], dict[int, str]]:
    """Feature columns and segments; and why not, by row, where some cannot be read: then there are no columns."""
    schema, n = point.features, decisions.num_rows
    of_action = bool(schema.action)
    if not n or not (schema.context or of_action or segments):
        return _columns(np.empty((n, len(schema.context_columns))), None, schema) | _segments([{}] * n, segments), {}
    raw = decisions["body"].to_pylist()
    if not of_action and not segments and (plain := _plain(raw, schema)) is not None:
        return _columns(plain, None, schema), {}
    with _uncollected():
        return _one_by_one(decisions, [_parsed(body) for body in raw], point, segments)


def _one_by_one(
    decisions: pa.Table, bodies: Sequence[tuple[Any, list[Any]]], point: DecisionPoint, segments: Sequence[str]
) -> tuple[dict[str, Any], dict[int, str]]:
    schema = point.features
    wanted, of_action = {one.name for one in schema.context}, {one.name for one in schema.action}
    contexts = [_picked(context, wanted) for context, _ in bodies]
    features: Any = 1
    if of_action:
        sets = zip(bodies, pc.list_value_length(decisions["actions"]).to_pylist(), strict=True)
        features = [[_picked(one, of_action) for one in (actions + [{}] * size)[:size]] for (_, actions), size in sets]
    try:
        batch = schema.batch(contexts, features)
    except InputError:
        return {}, _faults(contexts, features, point)
    told = [_picked(context, set(segments)) for context, _ in bodies] if segments else []
    placed = _placed(decisions, batch.action_features, point) if of_action else None
    return _columns(batch.context, placed, schema) | _segments(told, segments), {}


def _parsed(body: bytes) -> tuple[Any, list[Any]]:
    """Context and action features of a body; nothing where it is not what a request is logged as: then features are missing."""
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        found = None
    if not isinstance(found, dict):
        return {}, []
    actions = found.get("actions")
    return found.get("context"), actions if isinstance(actions, list) else []


def _placed(decisions: pa.Table, features: FloatArray, point: DecisionPoint) -> FloatArray:
    """Features of each row's own actions (n, k, p) where their columns are: a catalogue's places, 0 for those not eligible."""
    if not point.actions.catalogue:
        return features
    row, place, position = action_positions(decisions, point.actions.catalogue)
    wide = np.zeros((len(features), len(point.actions.catalogue), features.shape[2]))
    wide[row, position] = features[row, place]
    return wide


def _faults(contexts: Sequence[Any], features: Any, point: DecisionPoint) -> dict[int, str]:
    """Why single rows have no features."""
    found = {}
    for i, context in enumerate(contexts):
        try:
            point.features.batch([context], features if features == 1 else [features[i]])
        except InputError as error:
            found[i] = str(error)
    return found


def _columns(context: FloatArray, action_features: FloatArray | None, schema: Any) -> dict[str, Any]:
    columns = {f"x.{name}": pa.array(context[:, i]) for i, name in enumerate(schema.context_columns)}
    if action_features is not None:
        for j in range(action_features.shape[1]):
            columns |= {f"f.{j}.{name}": pa.array(action_features[:, j, i]) for i, name in enumerate(schema.action_columns)}
    return columns


def _picked(context: Any, names: Set[str]) -> Any:
    """The fields of those names, at the top or by a dotted path; what is not there is left out."""
    if not isinstance(context, dict):
        return {}
    if context.keys() == names:
        return context
    return {name: value for name in names if (value := _at(context, name)) is not None}


def _at(context: Any, name: str) -> Any:
    if name in context:
        return context[name]
    found = context
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _segments(contexts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    return {f"s.{name}": pa.array([_text(context.get(name)) for context in contexts], TEXT) for name in names}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else msgspec.json.encode(value).decode()


def _plain(bodies: Sequence[bytes], schema: FeatureSchema) -> FloatArray | None:
    """Contexts (n, d) of plain numbers alone, read into fields at once; None where a row or the schema needs a closer look."""
    names = schema.plain_context
    if not names:
        return None
    context = msgspec.defstruct("Context", [(f"f{i}", float, msgspec.field(name=name)) for i, name in enumerate(names)], gc=False)
    body = msgspec.defstruct("Body", [("context", context)], gc=False)
    decode = msgspec.json.Decoder(body).decode
    try:
        values = list(chain.from_iterable(msgspec.structs.astuple(decode(one).context) for one in bodies))  # type: ignore[attr-defined]
    except msgspec.DecodeError:
        return None
    numbers = np.frombuffer(struct.pack(f"{len(values)}d", *values)).reshape(len(bodies), -1)
    return numbers if np.abs(numbers).max() < LARGEST else None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Do not look for cycles among a million dictionaries that have none: that takes as long as reading them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
