"""Columns of the Parquet files that imported events become, and how probabilities become shares there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bandits.sampling import TOTAL
from ope.data import FloatArray, IntArray

TEXT = pa.string()
NAMED = pa.dictionary(pa.int32(), TEXT)
DECISIONS = pa.schema(
    {
        "schema_version": pa.int16(),
        "tenant": NAMED,
        "decision_point": NAMED,
        "decision_id": TEXT,
        "decided_at_ns": pa.int64(),
        "unit": TEXT,
        "session": TEXT,
        "parent": TEXT,
        "policy": NAMED,
        "experiment": NAMED,
        "arm": NAMED,
        "seed_epoch": pa.int64(),
        "kind": NAMED,
        "actions": pa.list_(TEXT),
        "excluded": pa.list_(pa.struct({"action": TEXT, "reason": TEXT})),
        "shares": pa.binary(),
        "propensity": pa.float64(),
        "chosen": pa.int32(),
        "pass_probability": pa.float64(),
        "body": pa.binary(),
        "body_hash": pa.binary(16),
        "request_hash": pa.binary(16),
    }
)
"""Columns of decisions.parquet: the fields of `bandits.events.Decision`."""

REWARDS = pa.schema(
    {
        "schema_version": pa.int16(),
        "tenant": NAMED,
        "decision_id": TEXT,
        "name": NAMED,
        "event_id": TEXT,
        "observed_at_ns": pa.int64(),
        "received_at_ns": pa.int64(),
        "value": pa.float64(),
    }
)
"""Columns of rewards.parquet: the fields of `bandits.events.Reward`."""


def nearest_shares(vectors: FloatArray) -> IntArray:
    """Shares of 2^31 (n, k) that sum to it, none a whole share away from its probability: the largest remainders are rounded up.

    A sampler gives what is left to the largest share instead, which costs it no more than a share per action; but these
    probabilities were drawn from elsewhere.
    """
    exact = vectors * TOTAL
    shares = np.floor(exact).astype(np.int64)
    left = TOTAL - shares.sum(axis=1)
    rank: IntArray = np.argsort(np.argsort(shares - exact, axis=1, kind="stable"), axis=1, kind="stable")
    rounded: IntArray = shares + (rank < left[:, None])
    return rounded


def vectors_of(shares: pa.ChunkedArray) -> pa.Array:
    """Probabilities of each row's shares; null where they are unknown."""
    column = shares.combine_chunks()
    _, ends, data = column.buffers()
    offsets = np.frombuffer(ends, dtype=np.int32)[column.offset : column.offset + len(column) + 1] // 4
    flat = np.frombuffer(data or b"", dtype="<u4")[: offsets[-1]] / TOTAL
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=pa.array(np.diff(offsets) == 0))


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer; what hardly ever repeats is not looked up in dictionaries."""
    unique = ("decision_id", "body", "body_hash", "request_hash", "shares")
    repeated = [name for name in schema.names if name not in unique]
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=repeated, write_statistics=repeated)


def constant(text: str, n: int) -> pa.Array:
    """A text n times."""
    return pa.DictionaryArray.from_arrays(pa.repeat(0, n).cast(pa.int32()), pa.array([text]))


def table_of(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns, lists or arrays, as the schema has them."""
    arrays = [
        columns[name].cast(kind) if isinstance(columns[name], pa.Array) else pa.array(columns[name], kind)
        for name, kind in zip(schema.names, schema.types, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
