"""Compares what clients noted with what the log holds, as sets: acknowledged in logged in attempted, each once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import msgspec

from bandits.events import Decision
from bandits.log.files import log_files, reading
from bandits.log.port import Kind
from bandits.log.segments import gaps, records


class Attempt(NamedTuple):
    """A request that was sent once."""

    name: str
    connection: int
    due: float
    sent: float
    body: str
    got: float | None
    """None: nothing came until the client ended."""
    status: int
    """0: no answer."""
    answer: str

    @property
    def waited(self) -> float:
        """Seconds from when it was due to its answer."""
        return (self.got or self.due) - self.due


@dataclass
class Figures:
    """What an audit counted."""

    attempted: int = 0
    acknowledged: int = 0
    logged: int = 0
    files: int = 0
    answers: dict[str, str] = field(default_factory=dict)
    """Acknowledged answers by decision id."""
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """File and row by decision id."""
    chosen: dict[str, str] = field(default_factory=dict)
    """Actions in the log by decision id."""

    def __str__(self) -> str:
        return f"{self.attempted} attempted, {self.logged} logged in {self.files} files, {self.acknowledged} acknowledged"


def attempts(*ledgers: Path) -> Iterator[Attempt]:
    """What clients noted, in the order in which they sent it."""
    for ledger in ledgers:
        opened: dict[tuple[str, int], list[Any]] = {}
        for line in ledger.read_bytes().split(b"\n")[:-1]:  # what follows the last end of line is still being written
            what, name, connection, *rest = json.loads(line)
            if what == "a":
                opened[name, connection] = rest
            else:
                due, sent, body = opened.pop((name, connection))
                status, answer = (rest[2], rest[3]) if what == "r" else (0, rest[2])
                yield Attempt(name, connection, due, sent, body, rest[1], status, answer)
        for (name, connection), (due, sent, body) in opened.items():
            yield Attempt(name, connection, due, sent, body, None, 0, "not answered")


def audit(folder: Path, *ledgers: Path, whole_batches: bool = True) -> Figures:
    """Compare ledgers with the log in a folder. Raises AssertionError with what differs.

    `whole_batches`: decisions of one request, which share a transaction, must be all there or none.
    """
    found = Figures()
    asked: dict[str, set[str]] = {}
    batches: list[list[str]] = []
    nameless = 0  # asked for without an id, and not answered
    for one in attempts(*ledgers):
        requests = _requests(one.body)
        names = [json.loads(answer)["decision_id"] for answer in _answers(one)]
        if "decision_id" in requests[0]:
            batches.append([request["decision_id"] for request in requests])
        elif names:
            assert not asked.keys() & set(names), "the service made an id twice"
            requests = [request | {"decision_id": name} for request, name in zip(requests, names, strict=True)]
        else:
            nameless += len(requests)
            requests = []
        for request in requests:
            asked.setdefault(request["decision_id"], set()).add(json.dumps(request["context"], sort_keys=True))
        for name, answer in zip(names, _answers(one), strict=True):
            assert found.answers.setdefault(name, answer) == answer, f"{name} was answered in two ways"
    logged: dict[str, tuple[str, str]] = {}
    for number, path in enumerate(paths := log_files(folder)):
        _check_file(path)
        for stored in records(path):
            if stored.kind != Kind.DECISION:
                continue
            made = msgspec.json.decode(stored.record, type=Decision)
            assert made.decision_id not in logged, f"{made.decision_id} is logged twice"
            logged[made.decision_id] = stored.answer.decode(), json.dumps(json.loads(bytes(made.body))["context"], sort_keys=True)
            found.places[made.decision_id] = number, stored.row
            found.chosen[made.decision_id] = made.actions[made.chosen]
    lost = found.answers.keys() - logged.keys()
    assert not lost, f"{len(lost)} acknowledged decisions are lost: {sorted(lost)[:5]}"
    unknown = logged.keys() - asked.keys()
    assert len(unknown) <= nameless, "a decision is logged that nobody asked for"
    for name, (answer, context) in logged.items():
        assert found.answers.get(name, answer) == answer, f"{name}: what was answered is not what is logged"
        assert name in unknown or context in asked[name], f"{name}: what was asked is not what is logged"
        assert json.loads(answer)["action"] == found.chosen[name]
    if whole_batches:
        assert not [batch for batch in batches if len({name in logged for name in batch}) == 2], "part of a group is logged"
    found.attempted, found.acknowledged, found.logged, found.files = len(asked), len(found.answers), len(logged), len(paths)
    return found


def _requests(body: str) -> list[dict[str, Any]]:
    asked = json.loads(body)
    many: list[dict[str, Any]] = asked.get("decisions", [asked])
    return many


def _answers(one: Attempt) -> list[str]:
    """The decisions that were acknowledged, byte for byte."""
    if one.status != 200:
        return []
    if not one.answer.startswith('{"decisions":'):
        return [one.answer]
    many = msgspec.json.decode(one.answer, type=dict[str, list[msgspec.Raw]])["decisions"]
    return [bytes(answer).decode() for answer in many if b'"decision_id"' in bytes(answer)[:16]]


def _check_file(path: Path) -> None:
    assert gaps(path) == [], f"{path.name}: {gaps(path)} are missing"
    connection: apsw.Connection = reading(path)
    try:
        assert connection.pragma("integrity_check") == "ok"
    finally:
        connection.close()


def waits(some: Iterable[Attempt], share: float) -> float:
    """A quantile of the seconds that attempts waited; 0 without any."""
    found = sorted(one.waited for one in some)
    return found[min(len(found) - 1, int(share * len(found)))] if found else 0.0
