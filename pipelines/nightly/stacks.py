"""The lake's table `stacks`: joint sums of all candidates, kept between the steps evaluate and select. Not for readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ope.accumulate import Accumulated
from ope.data import FloatArray
from ope.diagnostics import Diagnostics, LogChecks
from ope.estimators import IPS, Estimator, estimator
from ope.moments import Moments
from ope.selection import Fold
from ope.stack import Part, Stack, parts_of
from pipelines.nightly.tables import COUNT, FLAG, REAL, REALS, TEXT, TEXTS, Table

LOGGING = "logging"
"""Label of the policy that logged: what it earned is a plain mean, whatever the estimator."""

_ARROW = {"int": COUNT, "float": REAL, "bool": FLAG, "int | None": COUNT}


def _struct(kind: type[Any]) -> pa.DataType:
    return pa.struct([(field.name, _ARROW[str(field.type)]) for field in fields(kind)])


STACKS = Table(2, {
    "evaluation_id": TEXT, "fold": TEXT, "estimator": TEXT, "policies": TEXTS, "widths": pa.list_(COUNT), "n": COUNT,
    "mean": REALS, "cross": REALS, "weights": pa.list_(_struct(Diagnostics)), "checks": _struct(LogChecks), "distances": REALS,
    "certified": FLAG,
})  # fmt: skip
"""One row per fold. `policies`: candidates, the logging policy last; `distances`: mean total variation, on fold A."""


class Kept(NamedTuple):
    """A row of the table."""

    evaluation_id: str
    estimator: str
    candidates: tuple[str, ...]
    fold: Fold
    distances: FloatArray
    """(m, m)"""
    certified: bool


def part_named(parts: Sequence[Part], policy: str, kind: Estimator) -> Part:
    """The part of one policy and estimator among those of a pass with several estimators each."""
    return next(part for part in parts if part.label == f"{policy}: {kind}")


def stack_record(
    sums: Accumulated,
    evaluation_id: str,
    fold: str,
    policies: Sequence[str],
    kind: Estimator,
    distances: FloatArray,
    certified: bool,
) -> dict[str, Any]:
    """A row of the table: the columns of one estimator, and of the logging policy's plain mean, out of a pass."""
    stack = sums.stack
    parts = [part_named(stack.parts, policy, IPS() if policy == LOGGING else kind) for policy in policies]
    moments = own_moments(stack, parts)
    return {
        "evaluation_id": evaluation_id, "fold": fold, "estimator": str(kind), "policies": list(policies),
        "widths": [part.columns.stop - part.columns.start for part in parts], "n": moments.n, "mean": moments.mean.tolist(),
        "cross": moments.cross.ravel().tolist(), "weights": [asdict(one) for one in sums.diagnostics()],
        "checks": asdict(sums.checks), "distances": distances.ravel().tolist(), "certified": certified,
    }  # fmt: skip


def read_stack(record: dict[str, Any]) -> Kept:
    """A row of the table as `ope.selection.select_sums` takes it. Its rows were clusters."""
    kind, policies, mean = estimator(record["estimator"]), record["policies"], np.array(record["mean"])
    kinds = [IPS() if policy == LOGGING else kind for policy in policies]
    parts = parts_of(list(zip(policies, kinds, record["widths"], strict=True)))
    moments = Moments(record["n"], mean, np.array(record["cross"]).reshape(len(mean), len(mean)))
    fold = Fold(
        Stack(parts, moments, np.zeros((0, 0)), clustered=True), tuple(Diagnostics(**one) for one in record["weights"]),
        LogChecks(**record["checks"]),
    )  # fmt: skip
    m = len(policies) - 1
    return Kept(
        record["evaluation_id"], record["estimator"], tuple(policies[:-1]), fold, np.array(record["distances"]).reshape(m, m),
        record["certified"],
    )  # fmt: skip


def own_moments(stack: Stack, parts: Sequence[Part]) -> Moments:
    """Moments of the columns of some parts, the count last."""
    columns = [*(i for part in parts for i in range(part.columns.start, part.columns.stop)), len(stack.moments.mean) - 1]
    return replace(stack.moments, mean=stack.moments.mean[columns], cross=stack.moments.cross[np.ix_(columns, columns)])
