"""Lines of DSJSON for the tests of the importer, invented here, and what an import makes of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from bandits.events import Decision, Reward
from pipelines.exporters import read_decisions, read_rewards
from pipelines.importers.events import ImportReport, Naming
from pipelines.imports import import_log
from propel import app


class Imported(NamedTuple):
    report: ImportReport
    decisions: list[Decision]
    rewards: list[Reward]
    folder: Path


def single(event: str = "e1", **changes: Any) -> dict[str, Any]:
    """A decision among three teas; None leaves a field out."""
    line = {
        "_label_cost": -1.5,
        "_label_probability": 0.25,
        "_label_Action": 3,
        "_labelIndex": 2,
        "Timestamp": "2023-05-06T07:08:09.1234567Z",
        "Version": "1",
        "EventId": event,
        "a": [3, 1, 2],
        "p": [0.25, 0.125, 0.625],
        "c": {
            "Guest": {"age": 41, "tier": "gold"},
            "_multi": [{"_tag": "mint", "T": {"price": 3}}, {"_tag": "oolong", "T": {"price": 5}}, {"_tag": "sencha", "T": {}}],
        },
        "VWState": {"m": "m7"},
        **changes,
    }
    return {name: value for name, value in line.items() if value is not None}


def slotted(event: str = "s1", **changes: Any) -> dict[str, Any]:
    """A decision of two slots among the same three things."""
    line = {
        "Timestamp": "2023-05-06T07:08:09Z",
        "Version": "1",
        "EventId": event,
        "c": {
            "Guest": {"age": 41},
            "_multi": [{"_tag": "mint", "price": 3}, {"_tag": "oolong", "price": 5}, {"_tag": "sencha", "price": 4}],
            "_slots": [{"_id": "top", "size": 2}, {"_id": "side", "size": 1, "_inc": [0, 2]}],
        },
        "_outcomes": [
            {"_label_cost": 0, "_id": "top", "_a": [1, 0, 2], "_p": [0.5, 0.375, 0.125], "_o": []},
            {"_label_cost": -2, "_id": "side", "_a": [2, 0], "_p": [0.75, 0.25], "_o": [-2]},
        ],
        **changes,
    }
    return {name: value for name, value in line.items() if value is not None}


def observation(event: str = "e1", **changes: Any) -> dict[str, Any]:
    """A reward that came without its decision."""
    return {"RewardValue": 2.5, "EnqueuedTimeUtc": "2023-05-06T08:00:00Z", "EventId": event, "Observations": []} | changes


def encoded(line: Any) -> bytes:
    return line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"


def import_lines(
    folder: Path, lines: Sequence[Any], naming: Naming | None = None, *, name: str = "log", **options: Any
) -> Imported:
    """Write lines (objects, or bytes as they are; a name that ends in .gz compresses) and import them."""
    source, to = folder / f"{name}.dsjson", folder / f"{name}-events"
    text = b"".join(map(encoded, lines))
    source.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    return import_file(source, to, naming, **options)


def import_file(source: Path, to: Path, naming: Naming | None = None, **options: Any) -> Imported:
    report = import_log(source, to, naming or Naming(), kind="dsjson", **options)
    if not report.files:
        return Imported(report, [], [], to)
    return Imported(report, list(read_decisions(to)), list(read_rewards(to)), to)


def ope(log: Path, *options: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """Estimates of uniform on a log, by estimator."""
    result = CliRunner().invoke(app, ["ope", "--log", str(log), "--policy", "uniform", "--json", *options])
    assert result.exit_code == code, result.output
    return {record["estimator"]: record for record in json.loads(result.stdout)}
