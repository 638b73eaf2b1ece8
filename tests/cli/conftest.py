"""Logs in files, good but for what a test spoils, and the command line to run on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import Result
from typer.testing import CliRunner

from ope.simulate import World, sample_actions, softmax
from propel import app

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def columns() -> dict[str, Any]:
    """Five hundred good rows of three actions; row numbers in the tests below refer to them."""
    rng = np.random.default_rng(0)
    world = World.random(2, 3, seed=0)
    context = world.contexts(500, rng)
    logging = softmax(context @ world.coefficient)
    action = sample_actions(logging, rng)
    chosen = logging[np.arange(500), action]
    return {
        "action": action.tolist(),
        "reward": (rng.random(500) < world.q(context)[np.arange(500), action]).astype(float).tolist(),
        "propensity": chosen.tolist(),
        "x": context[:, 0].tolist(),
        "policy": softmax(2 * context @ world.coefficient).tolist(),
        "scalar": chosen.tolist(),
        "eligible": [[0, 1, 2]] * 500,
        "user": [f"u{i % 100}" for i in range(500)],
    }


@pytest.fixture
def write_log(tmp_path: Path, columns: dict[str, Any]) -> Callable[..., Path]:
    """Write the good log with some columns replaced, or some entries of a column: `write_log(reward={3: None})`."""

    def write(name: str = "log.parquet", **changes: Any) -> Path:
        spoiled = dict(columns)
        for column, change in changes.items():
            if isinstance(change, dict):
                spoiled[column] = [change.get(row, value) for row, value in enumerate(columns[column])]
            else:
                spoiled[column] = change
        frame = pl.DataFrame({column: values for column, values in spoiled.items() if values is not None}, strict=False)
        path = tmp_path / name
        if path.suffix == ".csv":
            lists = [column for column in frame.columns if isinstance(frame.schema[column], pl.List)]
            frame.with_columns(pl.Series(column, [str(value) for value in spoiled[column]]) for column in lists).write_csv(path)
        else:
            frame.write_parquet(path)
        return path

    return write


@pytest.fixture
def run() -> Run:
    """Run `propel ope` in this process: result with exit_code, stdout, stderr."""

    def call(log: Path, *options: str, policy: str = "uniform") -> Result:
        return CliRunner().invoke(app, ["ope", "--log", str(log), "--policy", policy, *options])

    return call
