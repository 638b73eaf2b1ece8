"""What serves when nothing that was learned is trusted: a decision point's default action, as an artifact like any other.

Decisions go on being logged with exact propensities under a digest, so that this time, too, can be learned from later.
"""

from __future__ import annotations

import numpy as np

from bandits.batch import DecisionBatch
from bandits.decision_point import DecisionPoint
from bandits.policy import Floor, Softmax
from bandits.registry import Entry, Registry
from bandits.scorers import Linear
from ope.data import InputError

SHARP = 1e-3
"""Temperature at which exp(-1 / temperature) is 0 as a float64: the softmax of 1 and zeros is exactly 1 and zeros."""


def safe_policy(point: DecisionPoint) -> Floor:
    """The default action, and the exploration floor on the others; uniform where the default action is not eligible.

    Raises InputError for a decision point without a default action, or whose actions come with each request: policies
    know those by their features alone.
    """
    catalogue = point.actions.catalogue
    if not catalogue or point.default_action is None:
        found = "actions that come with each request" if not catalogue else "no default_action"
        raise InputError(
            f"decision point {point.name!r}: found {found}; expected a catalogue and a default_action of it, which --safe plays: "
            "roll back to what is trusted, and freeze that"
        )
    bias = np.array([float(action == point.default_action) for action in catalogue])
    scorer = Linear(bias, np.empty((0, 0)), np.zeros(len(point.features.action_columns)))
    return Floor(Softmax(scorer, SHARP), point.exploration_floor)


def freeze_safe(registry: Registry, point: DecisionPoint, *, who: str, why: str) -> list[Entry]:
    """Serve the safe policy of a decision point, and refuse every change after it; the lines of the ledger.

    Raises InputError where it is frozen already, or has no safe policy.
    """
    now = registry.pointer(point.name)
    if now.frozen:
        raise InputError(
            f"decision point {point.name!r} is frozen; expected one that is not: lift it first, "
            f"`propel policy freeze {point.name} --off`, or leave it as it is"
        )
    snapshot = {"default_action": point.default_action, "exploration_floor": point.exploration_floor}
    digest = registry.register(safe_policy(point), point, name="safe", golden=_golden(point), snapshot=snapshot)
    if now.digest is not None and _same(registry, now.digest, digest):
        return [registry.freeze(point.name, who=who, why=why)]
    return registry.promote_frozen(digest, who=who, why=why)


def _golden(point: DecisionPoint) -> DecisionBatch:
    """A request with all actions and, where there are others, one without the default action."""
    catalogue, features = point.actions.catalogue, point.features
    eligible = np.array([[True] * len(catalogue), [action != point.default_action for action in catalogue]])
    eligible = eligible[eligible.any(axis=1)]
    rows, k = eligible.shape
    return DecisionBatch.of(
        np.zeros((rows, len(features.context_columns))), eligible, np.zeros((rows, k, len(features.action_columns)))
    )


def _same(registry: Registry, one: str, other: str) -> bool:
    """Whether two artifacts are one policy for the same features and actions. False for what cannot be read."""
    try:
        first, second = registry.manifest(one), registry.manifest(other)
    except InputError:
        return False
    return (first.files, first.features, first.actions) == (second.files, second.features, second.actions)
