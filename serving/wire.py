"""What goes over HTTP: requests and answers as frozen structs, from which OpenAPI is described, too.

Unknown fields of requests are refused. Answers only ever grow: who reads one passes over what is not known yet.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from bandits.events import Id

Time: TypeAlias = Annotated[dt.datetime, msgspec.Meta(tz=True)]
"""RFC 3339, with an offset."""

Reason: TypeAlias = Annotated[str, msgspec.Meta(max_length=128)]

MANY = msgspec.Meta(min_length=1, max_length=10_000)
"""How many actions a request may offer."""

MOST = 1000
"""Requests in a batch."""

UNSERVED = "default@client"
"""The policy of decisions that no answer reached: the client took the decision point's default."""


class Action(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """An action on offer."""

    id: Id
    features: dict[str, Any] | UnsetType = UNSET
    eligible: bool | UnsetType = UNSET
    reason: Reason | UnsetType = UNSET
    """Why it is not eligible; kept with the decision."""


class DecisionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """What to decide on."""

    decision_id: Id | UnsetType | None = UNSET
    """The caller's own; a repeat of the same request under it gets the same answer. Without one the service makes one."""
    unit: Id | UnsetType | None = UNSET
    """The user, card or device that rewards cluster by; only a keyed hash of it is stored."""
    session: Id | UnsetType | None = UNSET
    parent: Id | UnsetType | None = UNSET
    """The decision that this one retries."""
    context: dict[str, Any]
    """Features of the context, as the decision point declares them."""
    actions: Annotated[tuple[Action, ...], MANY] | UnsetType | None = UNSET
    """Actions on offer; a decision point with a catalogue offers all of it where there are none."""


class DecisionBatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """Several decisions, each for itself."""

    decisions: Annotated[list[DecisionRequest], msgspec.Meta(min_length=1, max_length=MOST)]


class DecisionAnswer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What was decided, with the exact propensity of every eligible action."""

    decision_id: str
    action: str
    propensity: float
    """Of the action."""
    propensities: dict[str, float]
    policy: str
    """name@digest"""
    kind: str
    token: str
    """Proves, beside a reward, that whoever sends it was given this decision."""


class RewardRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """What came of a decision."""

    decision_id: Id
    token: Annotated[str, msgspec.Meta(max_length=128)] | UnsetType | None = UNSET
    name: Id
    value: float
    event_id: Annotated[str, msgspec.Meta(max_length=128)] | UnsetType = UNSET
    """Tells several rewards of one name apart; the same one with the same value is a repeat."""
    observed_at: Time | UnsetType | None = UNSET
    """When it happened. Default: now."""


class RewardBatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """Several rewards, each for itself."""

    rewards: Annotated[list[RewardRequest], msgspec.Meta(min_length=1, max_length=MOST)]


class ShownRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """What was really shown."""

    action: Id | None
    """null: nothing."""


class UnservedRequest(DecisionRequest, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """A decision that no answer reached, and what the client did instead."""

    decision_id: Id
    """That of the request which was not answered."""
    action: Id
    """What the client did: an eligible action."""
    reason: Reason | UnsetType = UNSET
    """Why there was no answer; kept with the decision."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An event that is stored."""

    decision_id: str
    state: str
    """`stored`, or `repeated` where the same was stored before."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str


class ActionOfRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An action that was eligible."""

    id: str
    share: int
    """Of 2^31."""
    propensity: float


class Logged(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A decision as it is stored."""

    decision_id: str
    decision_point: str
    decided_at: str
    tenant: str
    unit: str
    """Keyed hash of the unit, or the decision's id where there was none."""
    session: str | None
    parent: str | None
    policy: str
    kind: str
    seed_epoch: int
    action: str
    propensity: float
    actions: list[ActionOfRecord]
    excluded: list[tuple[str, str]]
    """(action, reason)"""
    body: msgspec.Raw
    """Context and action features, in canonical JSON; and why there was no answer, where the client said so."""
    request_hash: str
    log_id: str
    row: int
    """Its number in the log."""
