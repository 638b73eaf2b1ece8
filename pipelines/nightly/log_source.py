"""The service's log as a source: what was written since the last night, of sealed files and of the one that is written to.

A record's number in its log never changes, so that what was read is a list of ranges, and what is new begins after them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pyarrow as pa

from bandits.log.files import log_files, reading
from bandits.log.port import Kind as Recorded
from bandits.log.segments import DamagedError, numbered, segment
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
    return [*inbox(settings.path(settings.file.lake.inbox)), *log_ranges(settings.log, read)]


def log_ranges(folder: Path, read: Collection[str]) -> list[LogRange]:
    """Ranges of a log's files: those that were read before, by their names, and of each file what came since.

    Raises DamagedError for a file that cannot be read.
    """
    before: dict[str, list[tuple[int, int]]] = {}
    for found in filter(None, map(NAME.fullmatch, read)):
        before.setdefault(found["log_id"], []).append((int(found["first"]), int(found["last"])))
    ranges = []
    for path in log_files(folder):
        described, last = segment(path), _last_row(path)
        log_id = described.log_id
        known = sorted(before.get(log_id, []))
        ranges += [LogRange(path, log_id, *ends) for ends in known]
        first = known[-1][1] + 1 if known else 1
        if last < first - 1 and not described.sealed:  # its next record would have a number that was read
            raise DamagedError(
                f"{path}: found {last} as its last record; expected {first - 1}, which was read: restore it from a backup, or move "
                "it away, so that a new file is begun"
            )
        if last >= first:
            ranges.append(LogRange(path, log_id, first, last))
    return ranges


def _last_row(path: Path) -> int:
    """The last record that is there: beyond it, numbers may still be given away."""
    try:
        with closing(reading(path)) as connection:
            return int(connection.execute("SELECT coalesce(max(row), 0) FROM entries").get)
    except apsw.Error as error:
        raise DamagedError(f"{path}: found {error}; expected a file of a log: restore it from a backup") from None


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
    arrays = [_array(name, columns[name], schema.field(name).type) for name in schema.names[: -len(NUMBERED)]]
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
