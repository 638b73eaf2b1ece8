"""Whether the log says what really decided: its shares, computed again from the artifact that each decision names."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bandits.decision_point import DecisionPoint
from bandits.events import Decision
from bandits.log.port import Kind, Stored
from bandits.policy import UNIFORM, Uniform
from bandits.registry import Registry
from bandits.sampling import Salt
from serving.decide import Decider, Served, decide
from serving.requests import asked

BY = Decider(Salt(1, bytes(32)), lambda tenant, unit: unit, lambda: 0)
"""Another salt than the service's: the action that it draws differs, the shares do not."""


def recomputed(stored: Sequence[Stored], registry: Registry, point: DecisionPoint) -> set[str]:
    """References of the policies that decided on the whole catalogue. Raises AssertionError for shares that are not theirs."""
    served: dict[str, Served] = {}
    for one in stored:
        if one.kind != Kind.DECISION:
            continue
        made = msgspec.json.decode(one.record, type=Decision)
        if made.policy not in served:
            digest = made.policy.partition("@")[2]
            policy = Uniform() if made.policy == UNIFORM else registry.load(digest).policy
            served[made.policy] = Served(point, policy, made.policy)
        by = served[made.policy]
        context = msgspec.json.encode({"context": msgspec.json.decode(bytes(made.body))["context"]})
        again = decide(asked(context, by.plain), made.tenant, by, BY)
        assert (again.shares, again.actions) == (made.shares, made.actions), f"{made.decision_id}: other shares than {made.policy}"
    return set(served)
