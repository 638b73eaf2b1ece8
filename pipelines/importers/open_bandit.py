"""The Open Bandit Dataset: the full data set's CSV files, and the bundled sample. Saito et al. 2021."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import polars as pl

from bandits.events import digest
from ope.data import InputError
from pipelines.frame import ColumnMap, Log, to_log
from pipelines.importers.events import FaultError, Problem, Row, body_of, canonical_json
from pipelines.importers.exposures import cells, header, number, records, time_of, value

OPEN_BANDIT = ColumnMap(action="item_id", reward="click", propensity="propensity_score")
"""Columns of the Open Bandit Dataset, in the publisher's names."""

AFFINITY = re.compile(r"user-item_affinity_(\d+)")


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
    columns = replace(OPEN_BANDIT, context=context, propensity_estimated=policy == "bts")
    return to_log(frame, columns, f"open_bandit/{policy}_all.parquet")


def read_open_bandit(path: Path) -> Iterator[Row | Problem]:
    """Decisions of `POLICY/CAMPAIGN/CAMPAIGN.csv`, or of a folder that holds it, with `item_context.csv` beside it if it is there.

    The item shown is the action, a click the reward, position and hashed user features the context; items carry the user's
    affinity and their own features. All items of the campaign count as eligible, and only the shown one's propensity is known.
    """
    table = csv_of(path)
    columns = header(table)
    affinities = [f"user-item_affinity_{i}" for i in range(sum(AFFINITY.fullmatch(name) is not None for name in columns))]
    users = [name for name in columns if name.startswith("user_feature_")]
    named = ["timestamp", "item_id", "position", "click", "propensity_score", *users, *affinities]
    items = _items(table.with_name("item_context.csv"), len(affinities))
    if not items:
        raise InputError(
            f"found neither {table.with_name('item_context.csv')} nor columns user-item_affinity_0, ... in {table}; "
            "expected one of them: nothing else tells how many items there are"
        )
    actions = tuple(map(str, range(len(items))))
    for line, record in records(table, named):
        try:
            yield _row(line, cells(record), actions, items, users, f"{table.parent.parent.name}/{table.parent.name}")
        except FaultError as fault:
            yield Problem(line, fault.kind, str(fault))
        except InputError as error:
            yield Problem(line, "csv", str(error))


def csv_of(path: Path) -> Path:
    """The table of decisions: the file itself, or `CAMPAIGN.csv` in a folder of that name. Its folders tell policy and campaign.

    Raises InputError for neither.
    """
    folder = (path if path.is_dir() else path.parent).resolve()
    table = folder / (f"{folder.name}.csv" if path.is_dir() else path.name)
    if not table.is_file():
        raise InputError(
            f"found no {table}; expected a folder such as random/all with all.csv in it, or that "
            "file: folders are read as the Open Bandit Dataset"
        )
    return table


def _items(path: Path, k: int) -> list[dict[str, Any]]:
    """Features of each item, from the publisher's table where it is there."""
    if not path.is_file():
        return [{} for _ in range(k)]
    try:
        with path.open(newline="", encoding="utf-8-sig") as text:
            rows = {int(row["item_id"]): row for row in csv.DictReader(text)}
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path}: found {error!r}; expected a column item_id of whole numbers") from None
    if sorted(rows) != list(range(len(rows))) or k not in (0, len(rows)):
        raise InputError(f"{path}: found items {sorted(rows)[:12]}; expected each of 0 to {max(k, len(rows)) - 1} once")
    return [{name: value(cell) for name, cell in rows[i].items() if name.startswith("item_feature")} for i in range(len(rows))]


def _row(
    line: int, record: Mapping[str, Any], actions: tuple[str, ...], items: list[dict[str, Any]], users: list[str], policy: str
) -> Row:
    taken = str(record["item_id"])
    if taken not in actions:
        raise FaultError("action", f"found item {taken!r:.80}; expected one of 0 to {len(actions) - 1}")
    propensity = number("propensity_score", record["propensity_score"])
    if propensity is None:
        raise FaultError("propensity", "found no propensity_score; expected one in every row")
    context = {name: record[name] for name in ("position", *users)}
    affinities = [number(f"user-item_affinity_{i}", record.get(f"user-item_affinity_{i}")) for i in range(len(items))]
    features = [item if x is None else item | {"affinity": x} for item, x in zip(items, affinities, strict=True)]
    return Row(
        line=line,
        decision_id=digest(f"{policy}:{line}".encode()).hex(),
        decided_at_ns=time_of(record["timestamp"]),
        unit=None,
        session=None,
        policy=policy,
        actions=actions,
        chosen=actions.index(taken),
        propensity=propensity,
        vector=None,
        context=context,
        body=body_of(context, map(canonical_json, features)),
        reward=number("click", record["click"]),
    )
