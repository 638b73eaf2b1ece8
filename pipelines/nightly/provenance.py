"""What the raw events of a day say of each policy's log: draws that replay, deliveries twice, contradictions, missing numbers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bandits.salts import read_salts
from bandits.sampling import Salt, choose
from ope.data import IntArray
from pipelines.nightly.lake import Entry, Lake, Snapshot, key_of
from pipelines.nightly.settings import Settings

REPLAYED = ("tenant", "decision_id", "policy", "kind", "seed_epoch", "shares", "chosen")
NUMBERED = ("policy", "log_id", "log_row")


@dataclass(slots=True)
class Provenance:
    """Of the decisions of one policy on one day. None: no source tells."""

    delivered: int = 0
    repeated: int = 0
    """Of those delivered, how many had been delivered before."""
    conflicts: int = 0
    """Decisions whose id came with several contents; they are not among the rows."""
    replay_checked: int = 0
    replay_wrong: int = 0
    numbered: int = 0
    gaps: int | None = None
    """Record numbers missing between the day's first and last, of every log that these decisions came from."""
    span: int = 0
    """Record numbers from the first to the last."""


@dataclass(frozen=True, slots=True)
class Raw:
    """What all days of a lake share: salts, record numbers that are missing, decisions that contradict themselves."""

    salts: Mapping[int, Salt]
    replayed: int
    holes: Mapping[str, tuple[IntArray, IntArray]] | None
    """By log: first and last numbers of what is missing between records; None where no source numbers its records."""
    conflicts: Mapping[tuple[str, str], Mapping[str, set[str]]] = field(default_factory=dict)
    """Ids by policy, by decision point and day."""

    @classmethod
    def of(cls, settings: Settings, lake: Lake, snapshot: Snapshot) -> Raw:
        """What the lake lists now. Raises InputError where the file of salts is not what it should be."""
        conflicts: dict[tuple[str, str], dict[str, set[str]]] = {}
        for entry in snapshot.find("conflicts"):
            for row in lake.read(entry).to_pylist():
                conflicts.setdefault((row["point"], row["day"]), {}).setdefault(row["policy"], set()).add(row["decision_id"])
        certificate, entries = settings.file.certificate, snapshot.find("sequence")
        holes = _holes(pa.concat_tables([lake.read(entry) for entry in entries])) if entries else None
        salts = {} if certificate.salts is None else read_salts(settings.path(certificate.salts))
        return cls(salts, certificate.replayed, holes, conflicts)

    def key(self, point: str, day: str, entries: Sequence[Entry]) -> str:
        """Digest of everything that `provenance` of this day looks at; `entries`: its decisions and deliveries."""
        holes = None if self.holes is None else {log: [first.tolist(), last.tolist()] for log, (first, last) in self.holes.items()}
        salts = {str(epoch): salt.key.hex() for epoch, salt in self.salts.items()}
        ids = {policy: sorted(found) for policy, found in self.conflicts.get((point, day), {}).items()}
        return key_of(holes, salts, self.replayed, ids, [entry.sha256 for entry in entries])


def provenance(
    lake: Lake, raw: Raw, point: str, day: str, decisions: Sequence[Entry], deliveries: Sequence[Entry]
) -> dict[str, Provenance]:
    """By policy, from the partitions of one decision point and day. Memory: one partition's few columns."""
    found: dict[str, Provenance] = {}

    def of(policy: str) -> Provenance:
        return found.setdefault(policy, Provenance())

    for entry in deliveries:
        for row in lake.read(entry).to_pylist():
            of(row["policy"]).delivered += row["delivered"]
            of(row["policy"]).repeated += row["repeated"]
    for policy, ids in raw.conflicts.get((point, day), {}).items():
        of(policy).conflicts = len(ids)
    if raw.salts:
        tables = (lake.read(entry, REPLAYED) for entry in decisions)
        for policy, (checked, wrong) in replay(tables, raw.salts, raw.replayed).items():
            of(policy).replay_checked, of(policy).replay_wrong = checked, wrong
    if raw.holes is not None:
        _count_gaps(of, (lake.read(entry, NUMBERED) for entry in decisions), raw.holes)
    return found


def replay(tables: Iterable[pa.Table], salts: Mapping[int, Salt], most: int) -> dict[str, tuple[int, int]]:
    """Draw again: by policy, how many decisions, at most `most`, and how many of them drew another action than was logged.

    `tables`: raw decisions. Those with the smallest digests of their ids are drawn; only sampled ones whose salt and shares are
    known can be.
    """
    kept: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}
    for table in tables:
        known = pc.and_(pc.equal(table["kind"], "sampled"), pc.is_in(table["seed_epoch"], pa.array(list(salts), pa.int64())))
        table = table.filter(pc.and_(known, pc.greater(pc.binary_length(table["shares"]), 0)))
        digests = [hashlib.blake2b(id_.encode(), digest_size=8).digest() for id_ in table["decision_id"].to_pylist()]
        order = np.frombuffer(b"".join(digests), ">u8")
        for policy in pc.unique(table["policy"]).to_pylist():
            rows = np.flatnonzero(pc.equal(table["policy"], policy).to_numpy())
            rows = rows[np.argsort(order[rows], kind="stable")[:most]]
            drawn = zip(order[rows].tolist(), table.take(rows).to_pylist(), strict=True)
            every = [*kept.get(policy, []), *((place, row["decision_id"], row) for place, row in drawn)]
            kept[policy] = sorted(every, key=lambda one: one[:2])[:most]
    return {policy: (len(drawn), sum(not _replays(row, salts) for _, _, row in drawn)) for policy, drawn in kept.items()}


def _replays(row: Mapping[str, Any], salts: Mapping[int, Salt]) -> bool:
    shares = np.frombuffer(row["shares"], "<u4").tolist()
    return choose(shares, salts[row["seed_epoch"]].uniform(row["tenant"], row["decision_id"])) == int(row["chosen"])


def _holes(sequence: pa.Table) -> dict[str, tuple[IntArray, IntArray]]:
    """By log: first and last numbers of what lies between the intervals of records that are there."""
    holes = {}
    for log in sorted(pc.unique(sequence["log_id"]).to_pylist()):
        mine = sequence.filter(pc.equal(sequence["log_id"], log)).sort_by("first")
        first, last = mine["first"].to_numpy(), mine["last"].to_numpy()
        holes[log] = (last[:-1] + 1, first[1:] - 1)
    return holes


def _count_gaps(
    of: Callable[[str], Provenance], tables: Iterable[pa.Table], holes: Mapping[str, tuple[IntArray, IntArray]]
) -> None:
    """Fill in how many decisions are numbered, and what is missing of the logs that they came from."""
    ends: dict[str, tuple[int, int]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for table in tables:
        numbered = table.filter(pc.and_(pc.is_valid(table["log_row"]), pc.is_valid(table["log_id"])))
        for row in numbered.group_by("log_id").aggregate([("log_row", "min"), ("log_row", "max")]).to_pylist():
            low, high = ends.get(row["log_id"], (row["log_row_min"], row["log_row_max"]))
            ends[row["log_id"]] = (min(low, row["log_row_min"]), max(high, row["log_row_max"]))
        for row in numbered.group_by(["policy", "log_id"]).aggregate([("log_row", "count")]).to_pylist():
            counts[row["policy"], row["log_id"]] += row["log_row_count"]
    for (policy, log), count in counts.items():
        (low, high), one = ends[log], of(policy)
        first, last = holes.get(log, (np.empty(0, np.int64), np.empty(0, np.int64)))
        gaps = np.maximum(np.minimum(last, high) - np.maximum(first, low) + 1, 0).sum()
        one.numbered, one.gaps, one.span = one.numbered + count, (one.gaps or 0) + int(gaps), one.span + high - low + 1
