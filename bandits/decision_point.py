"""A decision point: what is decided, on which features, for which rewards, and how much it must explore. Read from TOML.

The service, the join and the learners read the same file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from bandits.events import Id, check_id
from bandits.features import FeatureSchema
from bandits.toml import parse_toml, read_toml
from ope.data import InputError

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class Actions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fixed catalogue, or sets that come with each request."""

    catalogue: tuple[Id, ...] = ()
    """Every action there is, in an order that never changes; new ones go to the end."""
    per_request: bool = False
    most: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    """Largest set that a request may bring."""

    def __post_init__(self) -> None:
        if bool(self.catalogue) == self.per_request:
            raise ValueError("expected either a catalogue or per_request = true")
        if len(set(self.catalogue)) != len(self.catalogue):
            raise ValueError("catalogue: found an action twice; expected distinct ids")
        for action in self.catalogue:
            check_id("catalogue", action)


class RewardRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One reward: what counts as its value, and until when."""

    name: Id
    low: float
    high: float
    """Values outside [low, high] are refused, never clipped."""
    window_seconds: Positive
    """Events up to this long after the decision count; until then the reward is unknown, not 0."""
    aggregation: Literal["first", "last", "sum", "max", "min"] = "last"
    default: float | Literal["unknown"] = 0.0
    """Value at maturity where no event came; "unknown" leaves the row out."""
    conflict: Literal["exclude", "first", "last"] = "exclude"
    """What becomes of an event id that came with two values."""
    clock_tolerance_seconds: NotNegative = 5.0
    """How much before its decision an event may seem to be observed."""
    version: Annotated[int, msgspec.Meta(ge=1)] = 1

    def __post_init__(self) -> None:
        check_id("name", self.name)
        for key in ("window_seconds", "clock_tolerance_seconds"):
            if not math.isfinite(getattr(self, key)):
                raise ValueError(f"{key}: found {getattr(self, key)}; expected a finite number of seconds")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low, high: found {self.low}, {self.high}; expected finite numbers, the first smaller")
        if self.default != "unknown" and not self.low <= self.default <= self.high:
            raise ValueError(f"default: found {self.default}; expected a value within [{self.low}, {self.high}]")

    @property
    def at_maturity(self) -> float | None:
        """Value of a decision without events once the window has closed; None leaves the row out."""
        return None if self.default == "unknown" else self.default

    @property
    def reversible(self) -> bool:
        """Whether a negative event takes back an earlier one: so it is in a sum of what cannot be negative itself."""
        return self.aggregation == "sum" and self.low >= 0

    @property
    def least(self) -> float:
        """Smallest value of one event."""
        return -self.high if self.reversible else self.low

    def check(self, value: float) -> float:
        """The value. Raises InputError where it lies outside the declared range or is no number."""
        if type(value) not in (int, float) or not self.least <= value <= self.high:
            raise InputError(f"reward {self.name!r}: found {value}; expected a number within [{self.least:g}, {self.high:g}]")
        return value


class DecisionPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that is fixed about a decision before it is made."""

    name: Id
    actions: Actions
    rewards: tuple[RewardRule, ...]
    """The first is the one that policies maximise unless told otherwise."""
    features: FeatureSchema = FeatureSchema()
    exploration_floor: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.02
    """φ: every eligible action keeps a probability of at least φ / (number of eligible actions)."""
    default_action: Id | None = None
    """What a client does when the service cannot answer; of the catalogue where there is one."""
    attribution: Literal["decision", "root"] = "decision"
    """Rewards belong to the decision they name, or to the first of the chain of retries that it ends."""
    shown: Literal["intention_to_treat", "exclude"] = "intention_to_treat"
    """Rows whose action was not shown: kept as sampled, or left out (only while not-shown is independent of the action)."""
    version: Annotated[int, msgspec.Meta(ge=1)] = 1

    def __post_init__(self) -> None:
        check_id("name", self.name)
        if not self.rewards:
            raise ValueError("rewards: found none; expected at least one")
        names = [rule.name for rule in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards: found {names}; expected distinct names")
        if self.actions.catalogue and self.default_action is not None and self.default_action not in self.actions.catalogue:
            raise ValueError(f"default_action: found {self.default_action!r}; expected one of {list(self.actions.catalogue)}")

    @property
    def explores(self) -> bool:
        """Whether every eligible action keeps a share of at least one in 2^31."""
        return self.exploration_floor > 0

    def reward(self, name: str) -> RewardRule:
        """The rule of this name. Raises InputError for another."""
        for rule in self.rewards:
            if rule.name == name:
                return rule
        raise InputError(
            f"decision point {self.name!r}: found reward {name!r}; expected one of {[rule.name for rule in self.rewards]}"
        )


def read_decision_point(path: Path) -> DecisionPoint:
    """A decision point from a TOML file. Raises InputError that names file and key, and suggests the key that was meant."""
    return read_toml(path, DecisionPoint)


def read_decision_points(settings: Path, names: Sequence[str]) -> tuple[DecisionPoint, ...]:
    """The decision points that a settings file names, relative to itself. Raises InputError, too, for two of one name."""
    points = tuple(read_decision_point(settings.resolve().parent / name) for name in names)
    found = sorted(point.name for point in points)
    if len(set(found)) != len(found):
        raise InputError(f"{settings}: decision_points: found {found}; expected distinct names")
    return points


def parse_decision_point(text: bytes | str, source: str = "decision point") -> DecisionPoint:
    """A decision point from TOML text; `source` names it in errors."""
    return parse_toml(text, DecisionPoint, source)
