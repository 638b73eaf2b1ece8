"""Logs of trajectories in Parquet files: what `propel ope` values checkpoints from, and `propel rl rollouts` writes.

A row is a response, or an episode: `logp_behavior`, a list with the log-probability of every token or step as it was sampled;
`reward`, a number or a list alike; `group`, what rows have in common, such as their prompt; and for every candidate a column of
lists with *its* log-probabilities of what was sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ope.data import BoolArray, DataError, FloatArray, InputError
from ope.evaluation import Report
from ope.selection import Selection
from ope.sequential import evaluate_trajectories, select_trajectories, trajectory_estimator
from ope.trajectories import Trajectories
from pipelines.importers.files import read_frame

BEHAVIOR = "logp_behavior"
"""The column that tells such a log from others."""


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointLog:
    """A log of trajectories, and each candidate's log-probabilities (N, T) of what was sampled."""

    data: Trajectories
    logps: Mapping[str, FloatArray]

    def evaluate(self, estimators: Sequence[str] | None = None, level: float = 0.95) -> dict[str, Report]:
        """A report of each candidate, by name."""
        chosen = None if estimators is None else [trajectory_estimator(name) for name in estimators]
        return {name: evaluate_trajectories(self.data, logp, chosen, level=level) for name, logp in self.logps.items()}

    def select(self, estimator: str | None = None, seed: int = 0) -> Selection:
        """The shortlist of candidates worth paying for, by WIS if nothing else is said."""
        return select_trajectories(self.data, self.logps, None if estimator is None else trajectory_estimator(estimator), seed=seed)


def holds_rollouts(path: Path) -> bool:
    """Whether a file is a log of trajectories. False for one that cannot be read, which reading then tells."""
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    try:
        return BEHAVIOR in pl.read_parquet_schema(path)
    except (pl.exceptions.PolarsError, OSError):
        return False


def read_rollouts(path: Path, candidates: Sequence[str], reward: str = "reward", cluster: str | None = None) -> CheckpointLog:
    """A validated log. `cluster`: by default the column `group` where there is one; rows of a cluster depend on each other.

    Raises DataError, naming file, column and row.
    """
    if not candidates:
        raise InputError("found no policy; expected columns of log-probabilities, such as --policy step_40,step_80")
    wanted = [BEHAVIOR, reward, *candidates, *([] if cluster is None else [cluster])]
    frame = read_frame(path, wanted, ["group"])
    group = cluster or ("group" if "group" in frame.columns else None)
    try:
        lengths = _lengths(frame)
        mask = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
        rewards = frame[reward]
        data = Trajectories(
            logp_behavior=_padded(frame[BEHAVIOR], mask),
            reward=_padded(rewards, mask) if isinstance(rewards.dtype, pl.List) else rewards.to_numpy(),
            mask=mask,
            cluster=None if group is None else frame[group].to_numpy(),
        )
        return CheckpointLog(data, {name: _padded(frame[name], mask) for name in candidates})
    except DataError as error:
        raise error.located(str(path), {"reward": reward, "cluster": group or ""}) from None


def write_rollouts(path: Path, columns: Mapping[str, Any]) -> None:
    """A log in a new file. Raises InputError where there is one."""
    if path.exists() or path.suffix.lower() != ".parquet":
        raise InputError(f"--to: found {path}; expected the name of a new file that ends in .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(columns).write_parquet(path)


def _lengths(frame: pl.DataFrame) -> NDArray[np.int64]:
    """(N,) tokens or steps of each row."""
    column = frame[BEHAVIOR]
    if not isinstance(column.dtype, pl.List):
        raise DataError(BEHAVIOR, f"dtype {column.dtype}", "lists of numbers, one per token", "Log every token's log-probability.")
    missing = column.is_null()
    if missing.any():
        raise DataError(BEHAVIOR, "null", "a list of numbers", "Drop rows whose sampler is not known.", row=missing.arg_max())
    return column.list.len().to_numpy().astype(np.int64)


def _padded(column: pl.Series, mask: BoolArray) -> FloatArray:
    """Lists as (N, T), zeros behind each. Raises DataError where a row has not as many entries as the sampler logged."""
    if not isinstance(column.dtype, pl.List) or not column.dtype.inner.is_numeric():
        raise DataError(column.name, f"dtype {column.dtype}", "lists of numbers", "Give one log-probability per token.")
    found, expected = column.list.len().fill_null(0).to_numpy(), mask.sum(axis=1)
    if (found != expected).any():
        row = int(np.argmax(found != expected))
        raise DataError(column.name, f"{found[row]} entries", f"{expected[row]}, as {BEHAVIOR} has",
                        "Score exactly the tokens that were sampled.", row=row)  # fmt: skip
    values = np.zeros(mask.shape)
    values[mask] = column.filter(pl.Series(expected > 0)).explode().cast(pl.Float64).to_numpy()
    return values
