"""The service's log as a source: what was written since the last night, of sealed files and of the one that is written to.

A record's number in its log never changes, so that what was read is a list of ranges, and what is new begins after them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pyarrow as pa

from bandits.log.files import log_files, reading
from bandits.log.port import Kind as Recorded
from bandits.log.segments import DamagedError, Segment, numbered, segment
from ope.data import InputError
from pipelines.nightly.lake import Lake, Snapshot
from pipelines.nightly.settings import Settings
from pipelines.nightly.sources import BATCH, NUMBERED, SCHEMAS, Kind, Source, inbox

KINDS: Mapping[Kind, Recorded] = {
    "decisions": Recorded.DECISION,
    "rewards": Recorded.REWARD,
    "shown": Recorded.SHOWN,
    "quarantined": Recorded.QUARANTINED,
}

PIECE = 2**12
"""Records that are read together: more of them leave the processor's cache."""

NAME = re.compile(r"(?P<log_id>log-[0-9]+-[0-9a-f]+)/(?P<first>[0-9]+)-(?P<last>[0-9]+)")
"""What a range is called."""


class Decision(msgspec.Struct, gc=False):
    """A decision as it is recorded: `bandits.events.Decision` in its order, without its checks, which ingest makes itself."""

    schema_version: int
    tenant: str
    decision_point: str
    decision_id: str
    decided_at_ns: int
    unit: str
    session: str | None
    parent: str | None
    policy: str
    experiment: str | None
    arm: str | None
    seed_epoch: int
    kind: str
    actions: msgspec.Raw
    excluded: msgspec.Raw
    shares: bytes
    propensity: float
    chosen: int
    pass_probability: float
    body: msgspec.Raw
    body_hash: bytes
    request_hash: bytes


class Reward(msgspec.Struct, gc=False):
    """A reward as it is recorded."""

    schema_version: int
    tenant: str
    decision_id: str
    name: str
    event_id: str
    observed_at_ns: int
    received_at_ns: int
    value: float


class Shown(msgspec.Struct, gc=False):
    """What was shown, as it is recorded."""

    schema_version: int
    tenant: str
    decision_id: str
    action: str | None
    observed_at_ns: int
    received_at_ns: int


SHAPES: Mapping[Kind, type[msgspec.Struct]] = {"decisions": Decision, "rewards": Reward, "shown": Shown, "quarantined": Reward}


@dataclass(frozen=True, slots=True)
class LogRange:
    """Consecutive records of one file of a log."""

    path: Path
    log_id: str
    first: int
    last: int

    @property
    def name(self) -> str:
        """The log's id and the numbers of the records."""
        return f"{self.log_id}/{self.first}-{self.last}"

    def identity(self) -> str:
        """The name: the id is the file's own, and a record that has its number keeps it."""
        return self.name

    def stamp(self) -> str:
        """The name."""
        return self.name

    def batches(self) -> Iterator[tuple[Kind, pa.Table]]:
        """Records by kind; damaged ones are left out, and are missing numbers. Raises DamagedError where the file is."""
        readers = {kind: msgspec.json.Decoder(shape).decode for kind, shape in SHAPES.items()}
        tables: dict[Kind, list[pa.Table]] = {kind: [] for kind in KINDS}
        stored = numbered(self.path, self.first - 1, self.last)
        while piece := list(islice(stored, PIECE)):
            for kind, recorded in KINDS.items():
                if some := [(row, record) for row, number, record in piece if number == recorded]:
                    tables[kind].append(_table(kind, self.log_id, some, readers[kind]))
                if len(tables[kind]) == BATCH // PIECE:
                    yield kind, pa.concat_tables(tables[kind])
                    tables[kind].clear()
        yield from ((kind, pa.concat_tables(some)) for kind, some in tables.items() if some)


def sources_of(settings: Settings, lake: Lake, snapshot: Snapshot) -> list[Source]:
    """All that a night reads: folders in the inbox, and the service's log. Raises DamagedError where a file of the log is."""
    listed = lake.frame(snapshot.find("sources"), ["name"])
    read = [] if listed is None else listed["name"].to_list()
    held = lake.frame(snapshot.find("sequence"))
    there = {} if held is None else held.group_by("log_id").agg("first", "last").rows_by_key("log_id", unique=True)
    found = {log_id: list(zip(*ends, strict=True)) for log_id, ends in there.items()}
    return [*inbox(settings.path(settings.file.lake.inbox)), *log_ranges(settings.log, read, found)]


def log_ranges(folder: Path, read: Collection[str], held: Mapping[str, Sequence[tuple[int, int]]]) -> list[LogRange]:
    """Ranges of a log's files: those that were read before, by their names; of each file what came since; and what was put back.

    `held`: by log, the numbers of records that were met. Others that were read over, as damaged or missing, are looked for again.
    Raises DamagedError for a file that cannot be read.
    """
    before: dict[str, list[tuple[int, int]]] = {}
    for found in filter(None, map(NAME.fullmatch, read)):
        before.setdefault(found["log_id"], []).append((int(found["first"]), int(found["last"])))
    ranges = []
    for path in log_files(folder):
        described = segment(path)
        last = _last_row(path, described)
        log_id = described.log_id
        known = sorted(before.get(log_id, []))
        ranges += [LogRange(path, log_id, *ends) for ends in known]
        first = max((end for _, end in known), default=0) + 1
        if last < first - 1 and not described.sealed:  # its next record would have a number that was read
            raise DamagedError(
                f"{path}: found {last} as its last record; expected {first - 1}, which was read: restore it from a backup, or move "
                "it away, so that a new file is begun"
            )
        ranges += [one for one in _put_back(path, log_id, first - 1, held.get(log_id, [])) if one.name not in read]
        if last >= first:
            ranges.append(LogRange(path, log_id, first, last))
    return ranges


def _put_back(path: Path, log_id: str, until: int, held: Sequence[tuple[int, int]]) -> Iterator[LogRange]:
    """Gaps among the records that were read, of which something can be read now."""
    after = 0
    for first, last in [*sorted(held), (until + 1, until + 1)]:
        if first > after + 1:
            with suppress(DamagedError):  # still damaged
                if next(numbered(path, after, first - 1), None) is not None:
                    yield LogRange(path, log_id, after + 1, first - 1)
        after = max(after, last)


def _last_row(path: Path, described: Segment) -> int:
    """The last record that is there: beyond it, numbers may still be given away. Of a sealed file the last that must be there."""
    if described.sealed:
        return described.last_row
    try:
        with closing(reading(path)) as connection:
            last = int(connection.execute("SELECT coalesce(max(row), 0) FROM entries").get)
    except apsw.Error as error:
        raise DamagedError(f"{path}: found {error}; expected a file of a log: restore it from a backup") from None
    if last < described.last_row:  # a tail that vanished, or a damaged end, before which there may be more
        with suppress(DamagedError):
            for row, *_ in numbered(path, last, described.last_row):
                last = row
    return last


def _table(kind: Kind, log_id: str, some: Sequence[tuple[int, bytes]], read: Callable[[bytes], Any]) -> pa.Table:
    """Records as columns of `SCHEMAS`. Raises InputError for one that this version cannot read."""
    schema = SCHEMAS[kind]
    try:
        rows = [msgspec.structs.astuple(read(record)) for _, record in some]
    except msgspec.DecodeError as error:
        raise InputError(
            f"{log_id}: found {error} in a record of {kind}; expected one of this version: use a newer propel"
        ) from None
    columns = dict(zip(schema.names, zip(*rows, strict=True), strict=False))
    try:
        arrays = [_array(name, columns[name], schema.field(name).type) for name in schema.names[: -len(NUMBERED)]]
    except (pa.ArrowException, OverflowError) as error:
        raise InputError(
            f"{log_id}: found {error} in a record of {kind}; expected one of this version: use a newer propel"
        ) from None
    numbers = [pa.repeat(pa.scalar(log_id), len(some)), pa.array([row for row, _ in some], pa.int64())]
    return pa.Table.from_arrays([*arrays, *numbers], schema=schema)


def _array(name: str, values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if name == "actions":
        return _lists(values, lambda raw: msgspec.json.decode(raw), kind)
    if name == "excluded":
        return _lists(values, lambda raw: [{"action": one, "reason": why} for one, why in msgspec.json.decode(raw)], kind)
    return pa.array(map(bytes, values) if name == "body" else values, kind, size=len(values))


def _lists(values: Sequence[msgspec.Raw], decode: Callable[[bytes], Any], kind: pa.DataType) -> pa.Array:
    """Lists, of which few are different: each is read once."""
    coded = pa.array(map(bytes, values), pa.binary(), size=len(values)).dictionary_encode()
    return pa.array(list(map(decode, coded.dictionary.to_pylist())), kind).take(coded.indices)
