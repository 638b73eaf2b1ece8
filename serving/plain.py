"""Requests whose features are plain numbers, read into structs of their own at once.

A fast way to what the general one gives, to the bit: where it fails, for whatever reason, the general one is asked, and says why.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from bandits.batch import DecisionBatch
from bandits.events import Id
from bandits.features import LARGEST, FeatureSchema, Number, all_eligible
from serving.wire import MANY, MOST, DecisionBatchRequest, DecisionRequest, Reason

Values: TypeAlias = Callable[[Any], Sequence[float]]

OPTIONS: dict[str, Any] = {"frozen": True, "forbid_unknown_fields": True, "kw_only": True, "gc": False}


@dataclass(frozen=True, slots=True)
class Plain:
    """How the requests of a decision point are read whose every feature is a number as it is."""

    schema: FeatureSchema
    decoder: msgspec.json.Decoder[DecisionRequest]
    """Its structs have the fields of `DecisionRequest` in the order of their names, so that they encode to canonical JSON."""
    several: msgspec.json.Decoder[DecisionBatchRequest]
    """The same of a batch."""
    context: Values
    action: Values

    @classmethod
    def of(cls, schema: FeatureSchema) -> Plain | None:
        """None where a feature is of another kind, may be missing, is scaled or interacts."""
        features = (*schema.context, *schema.action)
        if schema.interactions or any(not isinstance(one, Number) or one != Number(one.name) for one in features):
            return None
        context, context_values = _numbers("Context", schema.context)  # type: ignore[arg-type]
        features_of, action_values = _numbers("Features", schema.action)  # type: ignore[arg-type]
        action = msgspec.defstruct(
            "Action",
            [
                ("eligible", bool | UnsetType, UNSET),
                ("features", features_of) if schema.action else ("features", features_of | UnsetType, UNSET),
                ("id", Id),
                ("reason", Reason | UnsetType, UNSET),
            ],
            **OPTIONS,
        )
        some, actions = Id | UnsetType | None, Annotated[tuple[action, ...], MANY]  # type: ignore[valid-type]
        request = msgspec.defstruct(
            "Request",
            [
                ("actions", actions | UnsetType | None, UNSET),
                ("context", context),
                *[(name, some, UNSET) for name in ("decision_id", "parent", "session", "unit")],
            ],
            **OPTIONS,
        )
        decisions = Annotated[list[request], msgspec.Meta(min_length=1, max_length=MOST)]  # type: ignore[valid-type]
        several = msgspec.defstruct("Batch", [("decisions", decisions)], **OPTIONS)
        return cls(schema, msgspec.json.Decoder(request), msgspec.json.Decoder(several), context_values, action_values)

    def batch(self, contexts: Sequence[Any], features: Sequence[Sequence[Any]], k: int) -> DecisionBatch:
        """Arrays of n requests with k actions each, as `FeatureSchema.batch` makes them. Raises its InputError."""
        n, d, of_action = len(contexts), len(self.schema.context), bool(self.schema.action)
        values = list(chain.from_iterable(map(self.context, contexts)))
        if of_action:
            values += chain.from_iterable(map(self.action, chain.from_iterable(features)))
        try:
            numbers = np.frombuffer(struct.pack(f"{len(values)}d", *values))
        except (OverflowError, struct.error):
            numbers = np.array([np.inf])
        if not np.vdot(numbers, numbers) < LARGEST**2:
            told = [msgspec.to_builtins(list(one)) for one in features]
            return self.schema.batch([msgspec.to_builtins(one) for one in contexts], told if of_action else k)
        action_features = numbers[n * d :].reshape(n, k, -1) if of_action else np.empty((n, k, 0))
        return DecisionBatch(numbers[: n * d].reshape(n, d), action_features, all_eligible(n, k), True)


def _numbers(name: str, features: Sequence[Number]) -> tuple[type[msgspec.Struct], Values]:
    """A struct of numbers, its fields in the order of their names, and what reads them in the order of the features."""
    places = {feature.name: f"f{at}" for at, feature in enumerate(features)}
    kind = msgspec.defstruct(name, [(places[one], int | float, msgspec.field(name=one)) for one in sorted(places)], **OPTIONS)
    read: Values = (
        attrgetter(*places.values()) if len(places) > 1 else lambda one: [getattr(one, place) for place in places.values()]
    )
    return kind, read
