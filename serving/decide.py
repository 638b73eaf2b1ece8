"""From a request to a decision: the one function that HTTP, simulators, replays and benchmarks call. No framework, no I/O."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from msgspec import UNSET

from bandits.batch import DecisionBatch
from bandits.decision_point import DecisionPoint
from bandits.events import Decision, check_id, digest
from bandits.ids import uuid7
from bandits.policy import Policy, floored
from bandits.sampling import TOTAL, Salt, choose, quantise
from ope.data import BoolArray, FloatArray, InputError
from serving.plain import Plain
from serving.requests import Asked
from serving.wire import Action, DecisionAnswer

_sorted = msgspec.json.Encoder(order="sorted").encode
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Served:
    """A decision point and the policy that decides there."""

    point: DecisionPoint
    policy: Policy
    reference: str
    """name@digest"""
    places: Mapping[str, int] = field(init=False)
    """Column of each action of the catalogue."""
    plain: Plain | None = field(init=False)
    """How its requests may be read where features are plain numbers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", floored(self.policy, self.point.exploration_floor))
        object.__setattr__(self, "plain", Plain.of(self.point.features))
        object.__setattr__(self, "places", {action: at for at, action in enumerate(self.point.actions.catalogue)})


@dataclass(frozen=True, slots=True)
class Offered:
    """What may be chosen from: actions in order, their features, where they stand in a catalogue, and what was removed."""

    actions: tuple[str, ...]
    features: list[dict[str, object]]
    mask: BoolArray | None
    """(k,) of the catalogue; None where every column is eligible."""
    excluded: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Decider:
    """What decisions are made with. `unit_of(tenant, unit)`: what is stored of a unit."""

    salt: Salt
    unit_of: Callable[[str, str], str]
    clock: Callable[[], int]


def decide(asked: Asked, tenant: str, served: Served, by: Decider) -> Decision:
    """A decision that is not stored yet.

    Raises InputError where nothing is eligible, or features are not as the decision point declares them.
    """
    offered = _offered(asked, served)
    return _decision(asked, tenant, served, by, offered, served.policy.propensities(_batch(asked, offered, served))[0])


def decide_all(many: Sequence[Asked], tenant: str, served: Served, by: Decider) -> list[Decision | InputError]:
    """The same of several requests, each for itself; those of plain numbers and as many actions are scored together."""
    offers: list[Offered | InputError] = []
    alike: dict[int, list[int]] = {}
    for at, asked in enumerate(many):
        try:
            offered = _offered(asked, served)
        except InputError as error:
            offers.append(error)
            continue
        offers.append(offered)
        if asked.plain and offered.mask is None:
            alike.setdefault(len(offered.actions), []).append(at)
    vectors = dict[int, FloatArray]()
    for k, places in alike.items():
        vectors |= _scored_together([many[at] for at in places], [offers[at] for at in places], places, served, k)  # type: ignore[misc]
    made: list[Decision | InputError] = []
    for at, (asked, found) in enumerate(zip(many, offers, strict=True)):
        try:
            if isinstance(found, InputError):
                raise found
            vector = vectors[at] if at in vectors else served.policy.propensities(_batch(asked, found, served))[0]
            made.append(_decision(asked, tenant, served, by, found, vector))
        except InputError as error:
            made.append(error)
    return made


def _scored_together(
    many: Sequence[Asked], offers: Sequence[Offered], places: Sequence[int], served: Served, k: int
) -> dict[int, FloatArray]:
    """Vectors by place; none where one of the requests has a number that cannot be: each is then looked at by itself."""
    assert served.plain is not None
    try:
        batch = served.plain.batch([one.request.context for one in many], [offered.features for offered in offers], k)
    except InputError:
        return {}
    return dict(zip(places, served.policy.propensities(batch), strict=True))


def _decision(asked: Asked, tenant: str, served: Served, by: Decider, offered: Offered, vector: FloatArray) -> Decision:
    """The decision that a policy's vector (k,) leads to."""
    request, point, salt = asked.request, served.point, by.salt
    now = by.clock()
    decision_id = request.decision_id or uuid7(now)
    for name, value in (
        ("decision_id", decision_id),
        ("unit", request.unit),
        ("session", request.session),
        ("parent", request.parent),
    ):
        if value is not UNSET:
            check_id(name, value)
    shares = quantise((vector if offered.mask is None else vector[offered.mask]).tolist(), explore=point.explores)
    chosen = choose(shares, salt.uniform(tenant, decision_id))
    features = (_encode if asked.plain else _sorted)(offered.features) if point.features.action else b"[]"
    body = b'{"actions":' + features + b',"context":' + asked.context + b"}"
    return Decision(
        tenant=tenant,
        decision_point=point.name,
        decision_id=decision_id,
        decided_at_ns=now,
        unit=by.unit_of(tenant, request.unit) if request.unit else decision_id,
        session=request.session or None,
        parent=request.parent or None,
        policy=served.reference,
        seed_epoch=salt.epoch,
        actions=offered.actions,
        excluded=offered.excluded,
        shares=struct.pack(f"<{len(shares)}I", *shares),
        propensity=shares[chosen] / TOTAL,
        chosen=chosen,
        body=msgspec.Raw(body),
        body_hash=digest(body),
        request_hash=_request_hash(asked, point.name),
    )


def answer(decision: Decision, token: str) -> DecisionAnswer:
    """What the caller is told: a function of the decision alone."""
    shares = struct.unpack(f"<{len(decision.actions)}I", decision.shares)
    return DecisionAnswer(
        decision_id=decision.decision_id, action=decision.actions[decision.chosen], propensity=decision.propensity,
        propensities={action: share / TOTAL for action, share in zip(decision.actions, shares, strict=True)},
        policy=decision.policy, kind=decision.kind, token=token,
    )  # fmt: skip


def _offered(asked: Asked, served: Served) -> Offered:
    """The eligible actions in the order of their columns, and why others are not."""
    actions: tuple[Action, ...] = asked.request.actions or ()
    catalogue, most = served.point.actions.catalogue, served.point.actions.most
    if not actions:
        if not catalogue:
            raise InputError("actions: found none; expected at least one, since this decision point has no catalogue")
        if served.point.features.action:
            raise InputError("actions: found none; expected each with its features")
        return Offered(catalogue, [], None, ())
    if len(actions) > most:
        raise InputError(f"actions: found {len(actions)}; expected at most {most}")
    if len({action.id for action in actions}) != len(actions):
        raise InputError("actions: found an id twice; expected distinct ones")
    if catalogue:
        actions = _in_catalogue(actions, served)
    eligible = [action for action in actions if action.eligible is not False]
    if not eligible:
        raise InputError(f"actions: found none of {len(actions)} eligible; expected at least one")
    excluded: tuple[tuple[str, str], ...] = ()
    if len(eligible) < len(actions):
        excluded = tuple((action.id, action.reason or "not eligible") for action in actions if action.eligible is False)
    mask = None
    if catalogue and len(eligible) < len(catalogue):
        named = {action.id for action in actions}
        excluded += tuple((action, "not offered") for action in catalogue if action not in named)
        mask = np.zeros(len(catalogue), dtype=np.bool_)
        mask[[served.places[action.id] for action in eligible]] = True
    features = [{} if action.features is UNSET else action.features for action in eligible]
    return Offered(tuple([action.id for action in eligible]), features, mask, excluded)


def _in_catalogue(actions: tuple[Action, ...], served: Served) -> tuple[Action, ...]:
    """Actions in the order of the catalogue."""
    for action in actions:
        if action.id not in served.places:
            raise InputError(f"actions: found {action.id!r}; expected actions of the catalogue")
    return tuple(sorted(actions, key=lambda action: served.places[action.id]))


def _batch(asked: Asked, offered: Offered, served: Served) -> DecisionBatch:
    """The request as arrays, in the columns of the policy."""
    schema, context = served.point.features, asked.request.context
    if not schema.action and not asked.plain and any(offered.features):
        raise InputError("actions: found features; expected none, since the decision point declares none of actions")
    if asked.plain and served.plain is not None:
        batch = served.plain.batch([context], [offered.features], len(offered.actions))
    else:
        batch = schema.batch([context], [offered.features] if schema.action else len(offered.actions))
    if offered.mask is None:
        return batch
    k, features = len(offered.mask), batch.action_features
    wide = np.zeros((1, k, features.shape[2]))
    wide[0, offered.mask] = features[0]
    return DecisionBatch(batch.context, wide, offered.mask[None])


def _request_hash(asked: Asked, point: str) -> bytes:
    """`bandits.events.request_hash` of the request, from parts that are canonical already."""
    request = asked.request
    rest = _sorted(
        {
            "decision_point": point,
            "parent": request.parent or None,
            "session": request.session or None,
            "unit": request.unit or None,
        }
    )
    return digest(b'{"actions":' + asked.actions + b',"context":' + asked.context + b"," + rest[1:])
