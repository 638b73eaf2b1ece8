"""Reports as files: one self-contained page with inline charts, and the same numbers as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from ope import InputError, Report
from pipelines import charts, tables

if TYPE_CHECKING:
    from pipelines.demo import Demo

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("pipelines"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters |= {"number": tables.number}


def write_demo_report(out: Path, found: Demo, conclusion: str) -> Path:
    """Write report.html, demo.json and estimates.csv into `out`, each whole or not at all; the page's path."""
    texts = {
        "estimates.csv": _csv(found.reports),
        "demo.json": json.dumps(_json(found, conclusion), indent=2, allow_nan=False) + "\n",
        "report.html": _html(found, conclusion),
    }
    for name, text in texts.items():  # all are rendered before the first is written
        write_whole(out / name, text)
    return out / "report.html"


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it, so that a reader never sees half of it.

    Raises InputError, naming the file, where it cannot be written; nothing of it is then left.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise InputError(
            f"{path}: {error.strerror}; expected a folder that can be written, with room for {len(text):,} bytes"
        ) from None


def _csv(reports: Mapping[str, Report]) -> str:
    rows = [{"policy": policy} | record for policy, report in reports.items() for record in report.to_records()]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: " ".join(cell) if isinstance(cell, list) else cell for name, cell in row.items()} for row in rows)
    return text.getvalue()


def _json(found: Demo, conclusion: str) -> dict[str, Any]:
    selection = found.selection
    return {
        "propel": version("propel"),
        "candidates": {policy: report.to_records() for policy, report in found.reports.items()},
        "check": {"policy": found.thompson, "on_policy": found.on_policy.to_record()},
        "other_direction": {
            "policy": "uniform",
            "on_policy": found.reverse_truth.to_record(),
            "estimates": found.reverse.to_records(),
        },
        "portfolio": {
            "estimator": selection.estimator,
            "ranking": list(selection.ranking),
            "blocked": {label: list(why) for label, why in selection.blocked.items()},
            "doubtful": {label: list(why) for label, why in selection.doubtful.items()},
            "values": selection.values.tolist(),
            "baseline": selection.baseline,
            "shortlists": [asdict(shortlist) for shortlist in selection.shortlists],
            "knee": selection.knee,
        },
        "conclusion": conclusion,
    }


def _html(found: Demo, conclusion: str) -> str:
    weight = found.reverse.weights
    forecasts = [e for e in found.reports[found.thompson].estimates if e.estimator != "Delta"]
    return TEMPLATES.get_template("demo.html.j2").render(
        found=found,
        version=version("propel"),
        built=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        conclusion=conclusion,
        forecasts=forecasts,
        inside=sum(e.low <= found.on_policy.value <= e.high for e in forecasts),
        weight=weight,
        reasons=tables.reasons(found.reports),
        notes=tables.notes(found.reports),
        reverse_reasons=tables.reasons({"uniform": found.reverse}),
        **charts.drawn(
            {
                "forest": charts.forest(found.reports, found.reverse_truth.value),
                "check": charts.check(forecasts, found.on_policy),
                "weights": charts.weights(found.reverse_weights),
                "portfolio": charts.portfolio(found.selection.shortlists, found.selection.knee),
            }
        ),
    )
