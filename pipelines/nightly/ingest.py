"""Ingest: events from any source into the lake, each exactly once, whatever the order, split or repeat they come in.

A decision's partition is its decision point, its day and the hash of its unit; a reward's and a shown event's is that of the
decision they are attributed to. What has no decision yet is an orphan and is tried again at every ingest. A partition is a
function of the set of its records: one id with several contents stays in the lake with all of them, and is listed in `conflicts`.
"""

from __future__ import annotations

import datetime as dt
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import duckdb
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ope.data import InputError
from pipelines.nightly.contract import Judged, judge_decisions, judge_quarantined, judge_rewards, judge_shown, unit_hashes
from pipelines.nightly.lake import Entry, Lake, Snapshot, key_of
from pipelines.nightly.merging import counts_by, distinct_decisions, distinct_rewards, distinct_shown, runs, united
from pipelines.nightly.settings import DAY_NS, Settings
from pipelines.nightly.sources import NUMBERED, SCHEMAS, Kind, Source

TEXT, COUNT = pa.string(), pa.int64()
DECISIONS = pa.schema([*SCHEMAS["decisions"], pa.field("unit_hash", COUNT)])
REWARDS = pa.schema(
    [
        *SCHEMAS["rewards"],
        pa.field("attributed_id", TEXT),
        pa.field("version", pa.int32()),
        pa.field("event", pa.int32()),
    ]
)
SHOWN = pa.schema([*SCHEMAS["shown"], pa.field("attributed_id", TEXT)])
REJECTED = pa.schema({"source": TEXT, "kind": TEXT, "row": COUNT, "decision_id": TEXT, "reason": TEXT, "record": TEXT, **NUMBERED})
"""`record`: all of it, as JSON, so that nothing is lost where the source no longer has it."""
CONFLICTS = pa.schema({"decision_id": TEXT, "point": TEXT, "day": TEXT, "policy": TEXT})
DELIVERIES = pa.schema({"source": TEXT, "policy": TEXT, "delivered": COUNT, "repeated": COUNT})
SEQUENCE = pa.schema({"log_id": TEXT, "first": COUNT, "last": COUNT})
LAYOUT = pa.schema({"buckets": COUNT})
SOURCES = pa.schema(
    {
        **dict.fromkeys(("name", "identity", "stamp", "contract"), TEXT),
        **dict.fromkeys(("decisions", "rewards", "shown", "rejected", "foreign"), COUNT),
    }
)

Progress = Callable[[int, int], object]

EPOCH = dt.date(1970, 1, 1)


class Place(NamedTuple):
    """What a partition of decisions, of their rewards and of what was shown is named by."""

    point: str
    day: str
    bucket: int


NOTHING = Entry("", "", "", 0, "", 0, 0, "")


@dataclass
class Ingested:
    """What an ingest wrote, and what it met."""

    entries: list[Entry] = field(default_factory=list)
    dropped: set[tuple[str, str, str, int]] = field(default_factory=set)
    """Places whose partitions have nothing left."""
    counts: Counter[str] = field(default_factory=Counter)
    """New decisions, rewards, shown events; repeated, conflicts, orphan_rewards, orphan_shown, rejected, foreign."""


def ingest(
    settings: Settings, lake: Lake, snapshot: Snapshot, sources: Sequence[Source], progress: Progress = lambda done, total: None
) -> Ingested:
    """Read sources that were not read before, and make partitions that hold their records too.

    Raises InputError for a source that cannot be read and for a lake of another number of buckets; nothing is then listed.
    """
    _check_buckets(settings, lake, snapshot)
    fresh, again = _unread(settings, lake, snapshot, sources)
    if not fresh:
        return Ingested()
    work = lake.folder / ".work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        return _Ingest(settings, lake, snapshot, work, again, progress).run(fresh)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Ingest:
    """One ingest: read and check, spread over partitions, merge each with what it held, attribute what came later."""

    def __init__(self, settings: Settings, lake: Lake, snapshot: Snapshot, work: Path, again: Set[str], progress: Progress):
        self.settings, self.lake, self.snapshot, self.work, self.progress = settings, lake, snapshot, work, progress
        self.again = again
        self.points = {point.name: point for point in settings.points}
        self.result = Ingested()
        self.pieces: dict[Place, list[Path]] = defaultdict(list)
        self.later: dict[Kind, list[Path]] = {"rewards": [], "shown": []}
        self.spilled = 0
        self.rejected: list[pa.Table] = []
        self.numbers: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.deliveries: dict[tuple[str, str], list[pa.Table]] = defaultdict(list)
        self.names: list[str] = []
        self.disputed: set[tuple[str, str]] = set()

    def run(self, fresh: Sequence[tuple[Source, str]]) -> Ingested:
        """Ingest sources that were not read before."""
        records = []
        for index, (source, identity) in enumerate(fresh):
            self.names.append(source.name)
            told = {"name": source.name, "identity": identity, "stamp": source.stamp(), "contract": _contract(self.settings)}
            records.append(told | self._read(index, source))
            self.progress(index + 1, 2 * len(fresh))
        held = self._merge_decisions()
        places = sorted(held)
        with self._database() as database:
            self._list_conflicts(database, held)
            self._make_roots(database, [held[place] for place in places if self._by_root(place.point)])
            for kind in ("rewards", "shown"):
                self._merge_later(database, kind, places, [held[place] for place in places])
        self._write_ledgers(records)
        return self.result

    def _read(self, index: int, source: Source) -> dict[str, int]:
        """Check the records of a source, and put them where they will be merged; how many there were of each kind."""
        judges: Mapping[Kind, Callable[[pa.Table], Judged]] = {
            "decisions": lambda table: judge_decisions(table, self.settings.tenant, self.points),
            "rewards": lambda table: judge_rewards(table, self.settings.tenant),
            "shown": lambda table: judge_shown(table, self.settings.tenant),
            "quarantined": lambda table: judge_quarantined(table, self.settings.tenant),
        }
        counts, first = dict.fromkeys((*judges, "rejected", "foreign"), 0), Counter[Kind]()
        for kind, table in source.batches():
            self.lake.bytes_read += table.nbytes
            judged = judges[kind](table)
            counts[kind] += judged.kept.num_rows
            counts[kind if kind == "quarantined" else "rejected"] += len(judged.rejected)
            counts["foreign"] += judged.foreign
            self._keep_rejected(source.name, kind, table, judged, first[kind])
            self._keep_numbers(table)
            if kind == "decisions":
                self._spread(judged.kept.append_column("source", pa.array(np.full(judged.kept.num_rows, index))))
            elif kind in self.later:
                self.later[kind].append(self._spill(judged.kept))
            first[kind] += table.num_rows
        self.result.counts.update({name: counts[name] for name in ("rejected", "foreign", "quarantined")})
        return counts

    def _keep_rejected(self, source: str, kind: Kind, table: pa.Table, judged: Judged, first: int) -> None:
        rows = sorted(judged.rejected)
        if rows:
            told = [
                one
                | {"source": source, "kind": kind, "row": first + row, "reason": judged.rejected[row]}
                | {"record": msgspec.json.encode(one).decode()}
                for row, one in zip(rows, table.take(pa.array(rows)).to_pylist(), strict=True)
            ]
            self.rejected.append(pa.Table.from_pylist(told, schema=REJECTED))

    def _keep_numbers(self, table: pa.Table) -> None:
        """What a source's own numbers say of records that are there, whatever became of them."""
        numbered = table.select(list(NUMBERED)).filter(pc.is_valid(table["log_row"]))
        for name in pc.unique(numbered["log_id"]).drop_null().to_pylist():
            self.numbers[name] += runs(numbered.filter(pc.equal(numbered["log_id"], name))["log_row"].to_numpy())

    def _spread(self, table: pa.Table) -> None:
        """Decisions into one file per partition."""
        if not table.num_rows:
            return
        unit = unit_hashes(table["unit"])
        point = table["decision_point"].combine_chunks().dictionary_encode()
        day = np.asarray(table["decided_at_ns"].to_numpy()) // DAY_NS
        bucket = (unit.view(np.uint64) % np.uint64(self.settings.file.lake.buckets)).astype(np.int64)
        order = np.lexsort((bucket, day, point.indices.to_numpy()))
        keys = np.stack([point.indices.to_numpy(), day, bucket])[:, order]
        starts = np.flatnonzero(np.concatenate(([True], (keys[:, 1:] != keys[:, :-1]).any(axis=0))))
        table = table.append_column("unit_hash", pa.array(unit)).take(pa.array(order))
        for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
            name, since, part = (int(number) for number in keys[:, start])
            place = Place(point.dictionary[name].as_py(), (EPOCH + dt.timedelta(days=since)).isoformat(), part)
            self.pieces[place].append(self._spill(table.slice(start, end - start)))

    def _spill(self, table: pa.Table) -> Path:
        self.spilled += 1
        path = self.work / f"{self.spilled}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return path

    def _merge_decisions(self) -> dict[Place, Entry]:
        """Write the partitions that change; all partitions of decisions by place."""
        held = {Place(one.point, one.day, one.bucket): one for one in self.snapshot.find("decisions")}
        places = sorted(self.pieces)
        with ThreadPoolExecutor(2) as threads:
            for done, (place, entry) in enumerate(
                zip(places, threads.map(self._merge, places, map(held.get, places)), strict=True)
            ):
                if entry is not None:
                    self.result.entries.append(entry)
                    self.result.counts["decisions"] += entry.rows - (held[place].rows if place in held else 0)
                    held[place] = entry
                self.progress(len(places) + done + 1, 2 * len(places))
        return held

    def _merge(self, place: Place, held: Entry | None) -> Entry | None:
        """One partition with its new records; None where all of them were there already."""
        tables = [_spilled(path) for path in self.pieces[place]]
        if held is not None:
            old = self.lake.read(held)
            tables.insert(0, old.append_column("source", pa.array(np.full(held.rows, -1))))
        every = pa.concat_tables([one.select([*DECISIONS.names, "source"]) for one in tables])
        table, repeated = distinct_decisions(every)
        self.deliveries[place.point, place.day].append(self._delivered(every, repeated))
        self.result.counts["repeated"] += repeated.num_rows
        if held is not None and table.num_rows == held.rows:
            return None
        return self.lake.write("decisions", table.select(DECISIONS.names), **place._asdict(), id_column="decision_id")

    def _delivered(self, every: pa.Table, repeated: pa.Table) -> pa.Table:
        """How many decisions each source delivered to a partition, and how many of them were there already, by policy."""
        twice = {(source, policy): count for source, policy, count in counts_by(repeated, ("source", "policy"))}
        rows = []
        for source, policy, count in counts_by(every, ("source", "policy")):
            known = twice.get((source, policy), 0)
            if source >= 0 and self.names[source] in self.again:  # it was delivered once, and is only looked at again
                count, known = count - known, 0
            if source >= 0 and count:
                rows.append({"source": self.names[source], "policy": policy, "delivered": count, "repeated": known})
        return pa.Table.from_pylist(rows, schema=DELIVERIES)

    def _list_conflicts(self, database: duckdb.DuckDBPyConnection, held: Mapping[Place, Entry]) -> None:
        """List ids that came with several contents: within a partition, or in several of them."""
        changed = [entry for entry in self.result.entries if entry.table == "decisions"]
        if not changed:
            return
        low, high = min(entry.low for entry in changed), max(entry.high for entry in changed)
        near = {str(self.lake.checked(one)): one for one in held.values() if one.low <= high and low <= one.high}
        fresh = [str(self.lake.checked(entry)) for entry in changed]
        found = database.execute(_sql("conflicts"), {"fresh": fresh, "near": list(near)}).fetchall()
        if found:
            rows = {(id_, near[file].point, near[file].day, policy) for id_, file, policy in found}
            self.disputed = {(near[file].point, near[file].day) for _, file, _ in found}
            self.result.counts["conflicts"] += len({id_ for id_, *_ in rows})
            old = self.lake.frame(self.snapshot.find("conflicts"))
            every = sorted(rows | (set() if old is None else set(old.rows())))
            records = [dict(zip(CONFLICTS.names, row, strict=True)) for row in every]
            self.result.entries.append(self.lake.write("conflicts", pa.Table.from_pylist(records, schema=CONFLICTS)))

    def _by_root(self, name: str) -> bool:
        """Whether rewards of a decision point belong to the first of a chain of retries."""
        point = self.points.get(name)
        return point is not None and point.attribution == "root"

    def _make_roots(self, database: duckdb.DuckDBPyConnection, entries: Sequence[Entry]) -> None:
        """Table `roots` (decision_id, root): the first of the chain of retries that each decision ends."""
        database.execute("create temp table roots (decision_id text, root text)")
        if entries:
            files = [str(self.lake.checked(entry)) for entry in entries]
            database.execute(f"insert into roots {_sql('roots')}", {"files": files})

    def _merge_later(
        self,
        database: duckdb.DuckDBPyConnection,
        kind: Literal["rewards", "shown"],
        places: Sequence[Place],
        entries: Sequence[Entry],
    ) -> None:
        """Write the partitions of rewards, or of what was shown, that change, and the orphans."""
        distinct, schema = (distinct_rewards, REWARDS) if kind == "rewards" else (distinct_shown, SHOWN)
        waiting = self.snapshot.find(f"orphan_{kind}")
        tables = [_spilled(path) for path in self.later[kind]] + [self.lake.read(entry) for entry in waiting]
        held = {Place(one.point, one.day, one.bucket): one for one in self.snapshot.find(kind)}
        recalled = {place: one for place, one in held.items() if (place.point, place.day) in self.disputed}
        tables += [self.lake.read(one, SCHEMAS[kind].names) for one in recalled.values()]
        held = {place: one for place, one in held.items() if place not in recalled}
        if not tables:
            return
        orphans = schema.empty_table()
        for number, table in self._attributed(database, kind, pa.concat_tables(tables), entries):
            if number < 0:
                orphans = distinct(table)
                continue
            place, before = places[number], held.get(places[number])
            if before is not None:
                table = pa.concat_tables([self.lake.read(before, table.column_names), table])
            entry = self.lake.write(kind, distinct(table).select(schema.names), **place._asdict(), id_column="attributed_id")
            self.result.counts[kind] += entry.rows - (before or recalled.get(places[number]) or NOTHING).rows
            self.result.entries.append(entry)
        written = {entry.place for entry in self.result.entries}
        self.result.dropped |= {one.place for one in recalled.values()} - written
        self.result.counts[f"orphan_{kind}"] = orphans.num_rows
        if orphans.num_rows or waiting:
            self.result.entries.append(self.lake.write(f"orphan_{kind}", orphans.select(SCHEMAS[kind].names)))

    def _attributed(
        self, database: duckdb.DuckDBPyConnection, kind: Kind, table: pa.Table, entries: Sequence[Entry]
    ) -> Iterator[tuple[int, pa.Table]]:
        """Records by the number of their decision's partition; -1 for those whose decision is not there."""
        paths = [str(self.lake.checked(entry)) for entry in entries]
        if not paths:
            yield -1, table.append_column("attributed_id", table["decision_id"])
            return
        database.register("later", table)
        database.register("files", pa.table({"filename": paths, "number": pa.array(range(len(paths)), pa.int32())}))
        reader = database.sql(_sql("attribute"), params={"files": paths, "by_root": kind == "rewards"}).to_arrow_reader(2**17)
        pending: list[pa.Table] = []
        current = None
        for batch in reader:
            for number, part in _by_number(pa.Table.from_batches([batch])):
                if number != current and pending:
                    yield current or 0, pa.concat_tables(pending)
                    pending = []
                current = number
                pending.append(part)
        if pending:
            yield current or 0, pa.concat_tables(pending)
        database.unregister("later")

    def _write_ledgers(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._append("sources", [pa.Table.from_pylist(list(records), schema=SOURCES)], instead_of="name")
        self._append("rejected", [REJECTED.empty_table(), *self.rejected], instead_of="source")
        for (point, day), tables in sorted(self.deliveries.items()):
            summed = pa.concat_tables(tables).group_by(["source", "policy"]).aggregate([("delivered", "sum"), ("repeated", "sum")])
            renamed = summed.rename_columns({"delivered_sum": "delivered", "repeated_sum": "repeated"}).select(DELIVERIES.names)
            self._append("deliveries", [renamed.sort_by([("source", "ascending"), ("policy", "ascending")])], point, day)
        if not self.snapshot.find("layout"):
            layout = pa.Table.from_pylist([{"buckets": self.settings.file.lake.buckets}], schema=LAYOUT)
            self.result.entries.append(self.lake.write("layout", layout))
        if self.numbers:
            old = self.lake.frame(self.snapshot.find("sequence"))
            if old is not None:
                for name, first, last in old.rows():
                    self.numbers[name].append((first, last))
            rows = [
                {"log_id": name, "first": first, "last": last}
                for name, intervals in sorted(self.numbers.items())
                for first, last in united(intervals)
            ]
            self.result.entries.append(self.lake.write("sequence", pa.Table.from_pylist(rows, schema=SEQUENCE)))

    def _append(self, table: str, new: Sequence[pa.Table], point: str = "", day: str = "", *, instead_of: str = "") -> None:
        """Rows after those that a ledger had; `instead_of`: the column that names sources whose old rows are left out."""
        old = [self.lake.read(entry) for entry in self.snapshot.find(table, point, [day])]
        if instead_of:
            names = pa.array(sorted(self.again), TEXT)
            old = [one.filter(pc.invert(pc.is_in(one[instead_of], names))) for one in old]
        if any(one.num_rows for one in new) or old:
            rows = pa.concat_tables([*old, *new], promote_options="default")  # earlier ones may lack a column
            self.result.entries.append(self.lake.write(table, rows, point=point, day=day))

    def _database(self) -> duckdb.DuckDBPyConnection:
        memory = self.settings.file.lake.memory
        return duckdb.connect(config={"memory_limit": memory, "threads": 2, "temp_directory": str(self.work / "duckdb")})


def _unread(
    settings: Settings, lake: Lake, snapshot: Snapshot, sources: Sequence[Source]
) -> tuple[list[tuple[Source, str]], Set[str]]:
    """Sources to read, with their identities, and the names of those that were read before.

    A source is read again where records of it were rejected, or another tenant's, and the settings are others now.
    """
    read = lake.frame(snapshot.find("sources"))
    rows = [] if read is None else read.to_dicts()
    settled = [row for row in rows if not row["rejected"] + row["foreign"] or row["contract"] == _contract(settings)]
    stamps, known = {(row["name"], row["stamp"]) for row in settled}, {row["identity"] for row in settled}
    before = {row["identity"] for row in rows}
    changed = [one for one in sources if (one.name, one.stamp()) not in stamps]
    fresh = [(one, identity) for one in changed if (identity := one.identity()) not in known]
    return fresh, {one.name for one, identity in fresh if identity in before}


def _contract(settings: Settings) -> str:
    """Digest of what decides which records are rejected."""
    return key_of(settings.tenant, settings.points)


def _check_buckets(settings: Settings, lake: Lake, snapshot: Snapshot) -> None:
    """Raise InputError where a lake was made with another number of buckets: units would move between them."""
    made = lake.frame(snapshot.find("layout"))
    if made is not None and made["buckets"][0] != settings.file.lake.buckets:
        raise InputError(
            f"lake.buckets: found {settings.file.lake.buckets}; expected {made['buckets'][0]}, as {lake.folder} was made with: "
            "set it back, or ingest into a new folder"
        )


def _by_number(table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """Runs of rows of one number, the number left out."""
    number = np.asarray(table["number"].to_numpy())
    starts = np.flatnonzero(np.concatenate(([True], number[1:] != number[:-1])))
    rest = table.drop_columns(["number"])
    for start, end in zip(starts, [*starts[1:], len(number)], strict=True):
        yield int(number[start]), rest.slice(start, end - start)


def _spilled(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _sql(name: str) -> str:
    return (resources.files("pipelines") / "sql" / f"{name}.sql").read_text()
