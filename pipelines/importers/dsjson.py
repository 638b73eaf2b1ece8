"""VW's DSJSON: one JSON object per line, as VW's decision service, Azure Personalizer and the reinforcement-learning client log.

A line is a decision of a contextual bandit (`a`, `p`, `_label_*`), one with several slots (`_outcomes`, a decision each), or an
observation that came without its decision (`RewardValue`). Costs are negative rewards; `a` counts actions from 1, `_a` from 0.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeAlias

import msgspec

from bandits.events import digest
from ope.data import InputError
from pipelines.importers.events import FaultError, Naming, Outcome, Problem, Row, body_of, canonical_json, nanoseconds
from pipelines.importers.paths import Names, at

UNIT = "_unit"
"""Name in the context under which `propel export` keeps a unit that is not there otherwise; VW reads it as a remark."""

VERSIONS = (None, "1", 1)
"""Versions of the format that this reads; None where the line does not say."""

LABEL_TOLERANCE = 1e-4
"""Relative difference between the label's probability and that in the vector: both may be rounded to a few digits."""


class Outcomes(msgspec.Struct, gc=False):
    """One slot of a line with several."""

    actions: list[int] = msgspec.field(name="_a", default=[])
    probabilities: list[float] | None = msgspec.field(name="_p", default=None)
    cost: float | None = msgspec.field(name="_label_cost", default=None)
    id: str | int | None = msgspec.field(name="_id", default=None)


class State(msgspec.Struct, gc=False):
    """Which model decided."""

    model: str | None = msgspec.field(name="m", default=None)


class Line(msgspec.Struct, gc=False):
    """What is read of a line; other fields are skipped."""

    context: dict[str, msgspec.Raw] = msgspec.field(name="c", default={})
    actions: list[int] | None = msgspec.field(name="a", default=None)
    probabilities: list[float] | None = msgspec.field(name="p", default=None)
    cost: float | None = msgspec.field(name="_label_cost", default=None)
    probability: float | None = msgspec.field(name="_label_probability", default=None)
    action: int | None = msgspec.field(name="_label_Action", default=None)
    index: int | None = msgspec.field(name="_labelIndex", default=None)
    skip: bool = msgspec.field(name="_skipLearn", default=False)
    deferred: bool = msgspec.field(name="DeferredAction", default=False)
    slots: list[Outcomes] | None = msgspec.field(name="_outcomes", default=None)
    event_id: str | None = msgspec.field(name="EventId", default=None)
    time: str | None = msgspec.field(name="Timestamp", default=None)
    version: str | int | None = msgspec.field(name="Version", default=None)
    dropped: float = msgspec.field(name="pdrop", default=0.0)
    state: State | None = msgspec.field(name="VWState", default=None)
    observed: float | None = msgspec.field(name="RewardValue", default=None)
    enqueued: str | None = msgspec.field(name="EnqueuedTimeUtc", default=None)
    continuous: msgspec.Raw = msgspec.field(name="_label_ca", default=msgspec.Raw())


LINE = msgspec.json.Decoder(Line)
RAWS = msgspec.json.Decoder(list[msgspec.Raw])
OBJECT = msgspec.json.Decoder(dict[str, Any])
OBJECTS = msgspec.json.Decoder(list[dict[str, Any]])
VALUE = msgspec.json.Decoder()

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are not the JSON expected."""

BOM = b"\xef\xbb\xbf"
"""What some editors put in front of UTF-8."""

MAX_KNOWN = 20_000
"""Actions whose features are remembered: the same ones come with line after line."""


class Slot(msgspec.Struct, gc=False):
    """One decision of a line, checked: numbers still as the line has them."""

    name: str | None
    chosen: int
    """Place in `offered`."""
    offered: Sequence[int]
    """Actions, counted from 0, in the order of `_multi`."""
    vector: list[float] | None
    propensity: float
    cost: float | None
    pass_probability: float


Known: TypeAlias = dict[bytes, tuple[str | None, bytes]]
"""Tag and canonical features of actions, by how lines spell them."""


def read_dsjson(
    path: Path, naming: Naming, *, pass_in_label: bool = False, progress: Callable[[int], object] | None = None
) -> Iterator[Row | Outcome | Problem]:
    """Decisions, outcomes and problems of a file, gzip or not, line by line.

    `pass_in_label`: the label's probability is that of the action times that of being kept, as the reinforcement-learning
    client's converter writes it. `progress` is told the bytes of the file read so far.
    """
    unit = None if naming.unit is None else tuple(naming.unit.split("."))
    known: Known = {}
    with path.open("rb") as raw:
        number = 0
        try:
            for number, text in enumerate(_lines(raw), 1):
                if number == 1:
                    text = text.removeprefix(BOM)
                if progress is not None and not number % 1000:
                    progress(raw.tell())
                if not text.isspace():
                    yield from _events(text, number, path.name, unit, pass_in_label, known)
        except (EOFError, zlib.error, OSError) as error:
            yield Problem(number + 1, "truncated", f"found a file that ends or breaks here ({error})")


def read_line(text: bytes, pass_in_label: bool = False) -> tuple[Line, list[msgspec.Raw], list[Slot]]:
    """A line without its actions, these with their features unread, and its decisions; none for an observation.

    Raises FaultError where it cannot be a decision.
    """
    try:
        line = LINE.decode(text)
        if line.version not in VERSIONS:
            raise FaultError("version", f"found version {line.version!r}; expected 1")
        if line.observed is not None and not line.context:
            return line, [], []
        multi = line.context.pop("_multi", None)
        offered = [] if multi is None else RAWS.decode(multi)
    except UNREADABLE as error:
        _unreadable(error, text)
    if multi is None or not offered:
        what = "a continuous action" if bytes(line.continuous) else "no actions in c._multi"
        raise FaultError("kind", f"found {what}; expected a decision among the actions listed there")
    if "_slots" in line.context and b'"_slot_id"' in bytes(multi):
        raise FaultError("kind", "found a slate, whose slots have actions of their own; expected slots that share them")
    if not 0 <= line.dropped < 1:
        raise FaultError("pdrop", f"found pdrop {line.dropped}; expected a probability below 1")
    if line.slots is None:
        return line, offered, [_single(line, len(offered), pass_in_label)]
    if not line.slots:
        raise FaultError("action", "found an empty _outcomes; expected the action taken in each slot")
    return line, offered, [_slot(line, place, outcome, len(offered)) for place, outcome in enumerate(line.slots)]


def _unreadable(error: Exception, text: bytes) -> NoReturn:
    """Raise the FaultError of a line that could not be decoded."""
    if isinstance(error, msgspec.ValidationError):
        raise FaultError("field", f"found {str(error)[:200]}; expected a field of that kind") from None
    kind = "truncated" if not text.endswith(b"\n") and "truncated" in str(error) else "json"
    raise FaultError(kind, f"found {str(error)[:200]}; expected one JSON object") from None


def _single(line: Line, k: int, pass_in_label: bool) -> Slot:
    numbers = list(range(1, k + 1)) if line.actions is None else line.actions
    taken = line.action if line.action is not None else None if line.index is None else line.index + 1
    if taken is None:
        if not line.actions:
            raise FaultError("action", "found no action taken; expected a or _label_Action")
        taken = numbers[0]
    if line.index is not None and line.index != taken - 1:
        raise FaultError("action", f"found _label_Action {taken} beside _labelIndex {line.index}; expected one action")
    if taken not in numbers:
        raise FaultError("action", f"found action {taken} taken, outside the set {_few(numbers)}; expected one of them")
    offered, vector, chosen = _in_order(numbers, line.probabilities, taken, 1, k)
    kept = 1 - line.dropped
    logged = None if vector is None else vector[chosen]
    stated = line.probability
    if pass_in_label and logged and stated and not line.dropped:
        kept, stated = min(stated / logged, 1.0), logged
    if stated is None and logged is None:
        raise FaultError("propensity", "found neither p nor _label_probability; expected the probability of the action taken")
    if stated is not None and logged is not None and abs(stated - logged) > LABEL_TOLERANCE * logged:
        raise FaultError(
            "propensity",
            f"found _label_probability {stated:g} beside {logged:g} in p; expected the same "
            "(if the label's is times the probability of being kept: --pass-in-label)",
        )
    return Slot(None, chosen, offered, vector, logged if logged is not None else stated or 0.0, line.cost, kept)


def _slot(line: Line, place: int, outcome: Outcomes, k: int) -> Slot:
    if not outcome.actions:
        raise FaultError("action", f"slot {place}: found no actions; expected _a, the action taken first")
    offered, vector, chosen = _in_order(outcome.actions, outcome.probabilities, outcome.actions[0], 0, k)
    if vector is None:
        raise FaultError("propensity", f"slot {place}: found no _p; expected the probability of each action")
    name = str(place if outcome.id is None else outcome.id)
    return Slot(name, chosen, offered, vector, vector[chosen], outcome.cost, 1 - line.dropped)


def _in_order(
    numbers: Sequence[int], probabilities: Sequence[float] | None, taken: int, first: int, k: int
) -> tuple[Sequence[int], list[float] | None, int]:
    """Actions counted from 0, and their probabilities, in the order of `_multi`; and where the one taken is then.

    `numbers` and `taken` count from `first`.
    """
    if probabilities is not None and len(probabilities) != len(numbers):
        raise FaultError("probabilities", f"found {len(probabilities)} probabilities of {len(numbers)} actions; expected one each")
    if probabilities is not None and len(numbers) == k and min(numbers) == first and max(numbers) == first + k - 1:
        vector: list[float | None] = [None] * k
        for number, probability in zip(numbers, probabilities, strict=True):
            vector[number - first] = probability
        if None not in vector:  # every action once: the usual case
            return range(k), vector, taken - first  # type: ignore[return-value]
    by_number = dict(zip(numbers, probabilities or numbers, strict=True))
    ordered = sorted(by_number)
    if ordered[0] < first or ordered[-1] >= first + k or len(ordered) != len(numbers):
        raise FaultError("action", f"found actions {_few(numbers)} (from {first}) of {k}; expected different ones of them")
    offered = range(k) if len(ordered) == k else [number - first for number in ordered]
    return offered, None if probabilities is None else [by_number[number] for number in ordered], ordered.index(taken)


def _events(
    text: bytes, number: int, source: str, unit: Names | None, pass_in_label: bool, known: Known
) -> Sequence[Row | Outcome | Problem]:
    try:
        line, offered, slots = read_line(text, pass_in_label)
        if slots:
            return _rows(
                line, [known.get(raw) or _read_action(raw, known) for raw in map(bytes, offered)], slots, number, source, unit
            )
        if not line.event_id:
            raise FaultError("id", "found an observation without EventId; expected that of its decision")
        return [Outcome(number, line.event_id, nanoseconds(line.enqueued), line.observed or 0.0)]
    except FaultError as fault:
        return [Problem(number, fault.kind, str(fault)[:300])]
    except (*UNREADABLE, InputError) as error:
        return [Problem(number, "json", str(error)[:300])]


def _rows(
    line: Line, offered: Sequence[tuple[str | None, bytes]], slots: Sequence[Slot], number: int, source: str, unit: Names | None
) -> list[Row]:
    ids, features = _named([tag for tag, _ in offered]), [one for _, one in offered]
    raw_slots = line.context.pop("_slots", None)
    context = {name: VALUE.decode(raw) for name, raw in line.context.items()}
    slot_features = [] if line.slots is None else _slot_features(raw_slots, context, len(slots))
    event_id = line.event_id or digest(f"{source}:{number}".encode()).hex()
    noted = context.pop(UNIT, None)
    whom = noted if unit is None else at(unit, {(): [context]})[0]
    if isinstance(whom, dict | list):
        whom = None
    time = nanoseconds(line.time)
    rows = []
    for place, slot in enumerate(slots):
        seen = context if slot.name is None else context | {"slot": slot_features[place]}
        whole = len(slot.offered) == len(ids)
        rows.append(
            Row(
                line=number,
                decision_id=event_id if slot.name is None else f"{event_id}:{slot.name}",
                decided_at_ns=time,
                unit=None if whom is None else str(whom),
                session=None if slot.name is None else event_id,
                policy=f"vw@{line.state.model}" if line.state is not None and line.state.model else "vw",
                actions=tuple(ids) if whole else tuple([ids[action] for action in slot.offered]),
                chosen=slot.chosen,
                propensity=slot.propensity,
                vector=slot.vector,
                context=seen,
                body=body_of(seen, features if whole else [features[action] for action in slot.offered]),
                reward=None if slot.cost is None else 0.0 - slot.cost,
                pass_probability=slot.pass_probability,
                excluded=() if whole else _excluded(ids, slot.offered),
                kind="shadow" if line.skip else "sampled",
                deferred=line.deferred and not line.skip,
            )
        )
    return rows


def _slot_features(raw: msgspec.Raw | None, context: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Features of each slot; what its `_inc` says is in its set of actions."""
    if raw is None:
        return [{}] * count
    features = OBJECTS.decode(raw)
    if len(features) != count:
        raise FaultError("slots", f"found {count} outcomes of {len(features)} slots; expected one each")
    if "slot" in context:
        raise FaultError("slots", "found a feature named slot in a line with slots; expected another name: theirs go there")
    return [{name: value for name, value in one.items() if name != "_inc"} for one in features]


def _excluded(ids: Sequence[str], offered: Sequence[int]) -> tuple[tuple[str, str], ...]:
    return tuple((ids[action], "not offered") for action in sorted(set(range(len(ids))) - set(offered)))


def _read_action(raw: bytes, known: Known) -> tuple[str | None, bytes]:
    """Tag, where it has one, and features of an action as canonical JSON; remembered."""
    features = OBJECT.decode(raw)
    tag = features.pop("_tag", None)
    if tag is not None and not isinstance(tag, str):
        raise FaultError("action", f"found _tag {tag!r:.80} of an action; expected a text")
    if len(known) >= MAX_KNOWN:
        known.clear()
    known[raw] = tag or None, canonical_json(features)
    return known[raw]


def _named(tags: list[str | None]) -> list[str]:
    """Id of each action: its tag where all have different ones, else its number from 1."""
    distinct = set(tags)
    if None in distinct or len(distinct) < len(tags):
        return [str(number) for number in range(1, len(tags) + 1)]
    return tags  # type: ignore[return-value]


def _few(numbers: Sequence[int]) -> str:
    return f"[{', '.join(map(str, numbers[:12]))}{', ...' if len(numbers) > 12 else ''}]"


def _lines(raw: BinaryIO) -> Iterator[bytes]:
    """Lines of a file that may be compressed."""
    magic = raw.read(2)
    raw.seek(0)
    if magic == b"\x1f\x8b":
        with gzip.open(raw) as text:
            yield from text
    else:
        yield from raw
