"""What a run leaves in its folder: checkpoints that are whole or not there, and a line per row of metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Rows = list[dict[str, float]]

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"


def read_checkpoint(folder: Path | None) -> tuple[dict[str, Any] | None, Rows]:
    """A trainer's state and its rows so far; none where the folder has no checkpoint."""
    if folder is None or not (folder / CHECKPOINT).exists():
        return None, []
    kept = torch.load(folder / CHECKPOINT, weights_only=True)
    return kept["trainer"], kept["rows"]


def write_checkpoint(folder: Path, state: Mapping[str, Any], rows: Sequence[dict[str, float]]) -> None:
    """State and rows; the metrics after them, which can be made again."""
    save(folder / CHECKPOINT, {"trainer": state, "rows": list(rows)})
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def save(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(content, part)
    part.replace(path)
