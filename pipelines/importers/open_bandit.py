"""The Open Bandit Dataset: the bundled sample."""

from __future__ import annotations

from importlib import resources
from typing import Literal

import polars as pl

from pipelines.frame import ColumnMap, Log, to_log

OPEN_BANDIT = ColumnMap(action="item_id", reward="click", propensity="propensity_score")
"""Columns of the Open Bandit Dataset, in the publisher's names."""


def open_bandit(policy: Literal["random", "bts"]) -> Log:
    """The bundled sample, 10,000 rows: "random", the uniform policy, or "bts", Bernoulli Thompson sampling.

    The context is the position and the four hashed user features. Thompson sampling's propensities were estimated by the
    publisher, so verdicts on that log are at most `caution`.
    """
    folder = resources.files("pipelines") / "data" / "open_bandit"
    with resources.as_file(folder / f"{policy}_all.parquet") as path:
        frame = pl.read_parquet(path)
    frame = frame.with_columns(pl.col("position").cast(pl.String))
    context = ("position", *(f"user_feature_{i}" for i in range(4)))
    columns = ColumnMap(OPEN_BANDIT.action, OPEN_BANDIT.reward, OPEN_BANDIT.propensity, context=context)
    return to_log(frame, columns, f"open_bandit/{policy}_all.parquet", estimated=policy == "bts")
