"""What every door hands on: decisions, outcomes and problems by line, and a plain report of what came through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from bandits.events import check_id
from ope.data import InputError

SHOWN_LINES = 20
"""Line numbers kept per kind of problem."""


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

ENCODER = msgspec.json.Encoder(order="sorted")


def canonical_json(value: Any) -> bytes:
    """`bandits.events.canonical` of what was JSON before, without looking at it once more.

    Raises InputError for what cannot be written again: an integer beyond 64 bits, half a surrogate pair.
    """
    try:
        return ENCODER.encode(value)
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:
        raise InputError(f"found a value that JSON cannot carry ({error}); expected 64-bit numbers and valid text") from None


def body_of(context: Any, features: Iterable[bytes]) -> bytes:
    """Canonical JSON of a context and of the features of each action, these as canonical JSON already."""
    return b'{"actions":[' + b",".join(features) + b'],"context":' + canonical_json(context) + b"}"


def is_id(text: str) -> bool:
    """True for 1 to 128 printable characters: what may name a decision, a unit or an action."""
    return 0 < len(text) <= 128 and text.isprintable()


class FaultError(Exception):
    """What is wrong with a line."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def nanoseconds(text: str | None) -> int | None:
    """Nanoseconds since 1970 of an ISO 8601 time, in UTC by default; None for no text. Raises FaultError for another text."""
    if not text:
        return None
    whole, _, rest = text.partition(".")
    zone = rest.lstrip("0123456789")
    fraction = rest[: len(rest) - len(zone)]
    return in_range(_seconds(whole + zone) * 10**9 + (int(f"{fraction[:9]:0<9}") if fraction else 0), text)


@lru_cache(maxsize=2**14)
def _seconds(text: str) -> int:
    """Of a time without a fraction. Remembered: many lines are of one second."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise FaultError("time", f"found time {text!r}; expected one such as 2021-02-04T16:31:29.246Z") from None
    since = (time if time.tzinfo else time.replace(tzinfo=UTC)) - EPOCH
    return since.days * 86400 + since.seconds


def in_range(nanoseconds: int, found: Any) -> int:
    """The same, where 64 bits hold it. Raises FaultError elsewhere."""
    if abs(nanoseconds) >= 2**63:
        raise FaultError("time", f"found time {found!r}; expected one between 1678 and 2262 (seconds, not milliseconds)")
    return nanoseconds


class Row(msgspec.Struct, frozen=True, gc=False):
    """One decision as a source tells it. None: the source does not say."""

    line: int
    """Counted from 1."""
    decision_id: str
    decided_at_ns: int | None
    unit: str | None
    session: str | None
    policy: str
    actions: tuple[str, ...]
    """Eligible actions, in order."""
    chosen: int
    propensity: float
    vector: Sequence[float] | None
    """Probabilities of `actions`."""
    context: Mapping[str, Any]
    body: bytes
    """Canonical JSON of context and action features."""
    reward: float | None
    pass_probability: float = 1.0
    excluded: tuple[tuple[str, str], ...] = ()
    kind: str = "sampled"
    deferred: bool = False
    """True if the action was not to be taken before it was activated, and nothing says whether it was."""


class Outcome(NamedTuple):
    """A reward that a source tells apart from its decision."""

    line: int
    decision_id: str
    observed_at_ns: int | None
    value: float


class Problem(NamedTuple):
    """A line that cannot be a decision, and why."""

    line: int
    kind: str
    message: str


@dataclass
class Problems:
    """Lines of one kind that were not imported."""

    count: int = 0
    first: str = ""
    """What was wrong with the first of them."""
    lines: list[int] = field(default_factory=list)
    """Numbers of the first of them, counted from 1."""


@dataclass(frozen=True)
class Naming:
    """What a source does not know about itself."""

    decision_point: str = "imported"
    tenant: str = "imported"
    reward: str = "reward"
    unit: str | None = None
    """Dotted path of the unit in the context, such as `User.id`."""
    context: tuple[str, ...] | None = None
    """Dotted paths of the log's context columns. None: the scalars of the first 1,000 decisions."""

    def __post_init__(self) -> None:
        for name in ("decision_point", "tenant", "reward"):
            check_id(name, getattr(self, name))


@dataclass
class ImportReport:
    """What came through a door, what did not, and what it lacks."""

    source: str
    format: str
    lines: int = 0
    decisions: int = 0
    rows: int = 0
    """Rows of the log: decisions that were sampled and whose reward is known."""
    kinds: Counter[str] = field(default_factory=Counter)
    rewards: int = 0
    observations: int = 0
    """Rewards that came without their decision."""
    late: int = 0
    """Those whose decision is here nevertheless."""
    problems: dict[str, Problems] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Of propensities, eligible sets, units, times, ...: a sentence where the source lacks them."""
    notes: list[str] = field(default_factory=list)
    context: list[str] = field(default_factory=list)
    """Context columns of the log."""
    usable: list[str] = field(default_factory=list)
    """Those that `propel ope --context` takes as they are: texts, and numbers without gaps, and not the unit."""
    actions: int = 0
    """Different actions."""
    largest_change: float = 0.0
    """Of a probability, by writing it as a share of 2^31 in a vector that sums to one."""
    files: list[str] = field(default_factory=list)

    def add_problem(self, problem: Problem) -> None:
        """Count a decision or line that was not imported."""
        entry = self.problems.setdefault(problem.kind, Problems())
        entry.count += 1
        entry.first = entry.first or f"line {problem.line}: {problem.message}"
        if len(entry.lines) < SHOWN_LINES:
            entry.lines.append(problem.line)

    @property
    def rejected(self) -> int:
        """Number of lines, or of decisions where a line has several, that were not imported."""
        return sum(entry.count for entry in self.problems.values())

    def to_record(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"rejected": self.rejected, "kinds": dict(self.kinds)}
