"""Which records of a log the lake holds, by the number that each has in its log."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ope.data import BoolArray
from pipelines.nightly.lake import Lake, Snapshot
from pipelines.nightly.log_source import NAME
from pipelines.nightly.sources import NUMBERED

TABLES = ("decisions", "rewards", "shown", "orphan_rewards", "orphan_shown", "rejected")
"""Tables whose rows are records as they came, each with its number."""


def held_rows(lake: Lake, snapshot: Snapshot, last: Mapping[str, int]) -> dict[str, BoolArray]:
    """By log: which of the records 0 to `last` the partitions of a snapshot hold; 0 stands for none.

    Raises LakeError for a partition that is not what was listed.
    """
    held = {log_id: np.zeros(rows + 1, dtype=np.bool_) for log_id, rows in last.items()}
    wanted = pa.array(list(last), pa.string())
    for table in TABLES:
        for entry in snapshot.find(table):
            found = lake.read(entry, list(NUMBERED))
            found = found.filter(pc.is_in(found["log_id"], wanted))
            for log_id in pc.unique(found["log_id"]).to_pylist():
                rows = found.filter(pc.equal(found["log_id"], log_id))["log_row"].to_numpy()
                held[log_id][rows[rows <= last[log_id]]] = True
    return held


def read_until(lake: Lake, snapshot: Snapshot) -> dict[str, int]:
    """By log: the last record that an ingest has looked at."""
    listed = lake.frame(snapshot.find("sources"), ["name"])
    until: dict[str, int] = {}
    for found in filter(None, map(NAME.fullmatch, [] if listed is None else listed["name"].to_list())):
        until[found["log_id"]] = max(until.get(found["log_id"], 0), int(found["last"]))
    return until
