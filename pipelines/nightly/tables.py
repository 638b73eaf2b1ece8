"""Tables of the reports mart: their columns and keys. Steps write these same tables into the lake, the report collects them.

Every table begins with `tenant` when it is collected; until then a night belongs to one tenant. Days and dates are ISO texts, UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

TEXT, REAL, COUNT, FLAG = pa.string(), pa.float64(), pa.int64(), pa.bool_()
TEXTS, REALS = pa.list_(TEXT), pa.list_(REAL)


class Table(NamedTuple):
    """Columns of a table, the first `keys` of which name a row."""

    keys: int
    columns: Mapping[str, pa.DataType]

    @property
    def schema(self) -> pa.Schema:
        """As Arrow has it."""
        return pa.schema(dict(self.columns))

    def of(self, records: Iterable[Mapping[str, Any]]) -> pa.Table:
        """Rows sorted by their key; what a record leaves out is null. Raises KeyError for a column that is not there."""
        rows = sorted(records, key=lambda record: tuple(str(record[name]) for name in list(self.columns)[: self.keys]))
        unknown = {name for row in rows for name in row} - set(self.columns)
        if unknown:
            raise KeyError(f"columns {sorted(unknown)} are not of this table: {list(self.columns)}")
        return pa.table({name: pa.array([row.get(name) for row in rows], kind) for name, kind in self.columns.items()})


_ESTIMATE_KEY = {
    "evaluation_id": TEXT, "policy": TEXT, "estimator": TEXT, "metric": TEXT, "segment": TEXT, "fold": TEXT, "window": COUNT,
}  # fmt: skip

TABLES: Mapping[str, Table] = {
    "decision_points": Table(1, {
        "dp": TEXT, "live_policy": TEXT, "step": TEXT, "reward": TEXT, "version": COUNT, "window_seconds": REAL, "unit": TEXT,
        "direction": TEXT, "slice": REAL, "price": REAL, "decisions": COUNT, "certified": REAL, "verdict": TEXT,
        "next_action": TEXT,
    }),
    "evaluations": Table(1, {
        "evaluation_id": TEXT, "dp": TEXT, "date": TEXT, "from": TEXT, "to": TEXT, "rows": COUNT, "rows_certified": COUNT,
        "rows_used": COUNT, "units": COUNT, "baseline": TEXT, "folds": TEXT, "level": REAL, "cutoff_ns": COUNT, "sql": TEXT,
        "parameters": TEXT, "carry_over": FLAG,
    }),
    "estimates": Table(7, {
        **_ESTIMATE_KEY, "n": COUNT, "clusters": COUNT, "moments_n": COUNT, "moments_mean": REALS, "moments_cross": REALS,
        "additive": FLAG, "value": REAL, "stderr": REAL, "low": REAL, "high": REAL, "interval_kind": TEXT, "anytime": FLAG,
        "ess": REAL, "max_share": REAL, "tail": REAL, "weight_mean": REAL, "weight_z": REAL, "unsupported": REAL, "certified": FLAG,
        "verdict": TEXT, "reasons": TEXTS,
    }),
    "differences": Table(8, {
        **_ESTIMATE_KEY, "baseline": TEXT, "value": REAL, "stderr": REAL, "low": REAL, "high": REAL, "interval_kind": TEXT,
        "p_worse": REAL, "p_below_c": REAL, "certified": FLAG, "verdict": TEXT, "reasons": TEXTS,
    }),
    "portfolio": Table(4, {
        "evaluation_id": TEXT, "estimator": TEXT, "fold": TEXT, "k": COUNT, "gain": REAL, "std": REAL, "p_any_harm": REAL,
        "violation": REAL, "knee": FLAG, "graded": TEXT, "certified": FLAG,
    }),
    "portfolio_policies": Table(5, {
        "evaluation_id": TEXT, "estimator": TEXT, "fold": TEXT, "k": COUNT, "policy": TEXT, "rank": COUNT, "selected_on": REAL,
        "value": REAL, "difference": REAL, "p_worse": REAL, "p_below_c": REAL, "duplicate_of": TEXT, "tv": REAL, "decision": TEXT,
        "reason": TEXT, "certified": FLAG,
    }),
    "candidates": Table(2, {
        "dp": TEXT, "policy": TEXT, "date": TEXT, "learner": TEXT, "digest": TEXT, "reward": TEXT, "floor": REAL, "rows": COUNT,
        "units": COUNT, "from": TEXT, "to": TEXT, "reason": TEXT,
    }),
    "certificates": Table(3, {
        "dp": TEXT, "policy": TEXT, "day": TEXT, "verdict": TEXT, "reasons": TEXTS, "rows": COUNT, "sampled": COUNT,
        "fallback": COUNT, "override": COUNT, "shadow": COUNT, "weight_mean": REAL, "weight_z": REAL, "weight_p": REAL,
        "calibration_chi2": REAL,
        "calibration_df": COUNT, "calibration_p": REAL, "replay_checked": COUNT, "replay_wrong": COUNT, "delivered": COUNT,
        "repeated": COUNT, "conflicts": COUNT, "numbered": COUNT, "gaps": COUNT, "mature": COUNT, "joined": COUNT,
        "join_rate": REAL, "join_low": REAL, "join_high": REAL, "late": COUNT, "early": COUNT, "refused": COUNT, "reversed": COUNT,
        "reward_conflicts": COUNT, "outside": COUNT, "below_floor": COUNT, "p_min": REAL, "p_max": REAL, "floor": REAL,
        "ess": REAL, "tail": REAL, "not_shown": REAL, "shown_known": COUNT, "not_shown_p": REAL, "not_shown_independent": FLAG,
        "vectors": REAL, "signature": TEXT,
    }),
    "calibration": Table(4, {
        "dp": TEXT, "policy": TEXT, "day": TEXT, "bin": TEXT, "rows": COUNT, "expected": REAL, "observed": REAL, "z": REAL,
        "p": REAL,
    }),
    "maturity": Table(5, {
        "dp": TEXT, "policy": TEXT, "day": TEXT, "reward": TEXT, "age_seconds": REAL, "rows": COUNT, "labelled": REAL,
    }),
    "support": Table(4, {
        "dp": TEXT, "policy": TEXT, "day": TEXT, "action": TEXT, "eligible": COUNT, "taken": COUNT, "expected": REAL, "p_min": REAL,
        "p_max": REAL, "shown_known": COUNT, "not_shown": COUNT,
    }),
    "alarms": Table(1, {
        "id": TEXT, "dp": TEXT, "rule": TEXT, "severity": TEXT, "opened": TEXT, "closed": TEXT, "text": TEXT, "evidence": TEXT,
    }),
    "revisions": Table(3, {
        "dp": TEXT, "day": TEXT, "revision": COUNT, "rows": COUNT, "snapshot": TEXT, "reason": TEXT,
    }),
}  # fmt: skip
"""By name: the mart has one Parquet file for each."""
