"""Step `train`: each learner learns from the fold that learns, and what it made is kept in the registry as a candidate."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bandits.batch import DecisionBatch
from bandits.forms import to_form
from bandits.learners import Learner, reward_range
from bandits.policy import Floor, Policy, Uniform
from bandits.registry import Registry
from ope.data import InputError, LoggedData
from pipelines.compare import learners_named
from pipelines.nightly.lake import Entry, Lake, Snapshot, key_of
from pipelines.nightly.settings import Night, Settings
from pipelines.nightly.tables import TABLES
from pipelines.nightly.window import Window, listed

VERSION = 1
"""Of this step: another one makes everything anew."""

SEED = 0
GOLDEN = 16
"""Requests whose answers are recorded with each artifact."""

UNIFORM = "uniform"


def train(night: Night, settings: Settings, lake: Lake, snapshot: Snapshot, progress: Callable[[int, int], object]) -> list[Entry]:
    """Partitions of the table `candidates`, one per decision point. Equal rows and settings make equal artifacts.

    A learner that cannot learn from these rewards, or makes a policy that cannot leave the process, is a row with a reason.
    Raises InputError for a learner that is not known.
    """
    day, entries = night.date.isoformat(), []
    learners = learners_named(settings.file.train.learners, np.empty(0))
    each = len(learners) + 1
    for index, point in enumerate(settings.points):
        window = Window.of(night, settings, lake, snapshot, point)
        key = key_of("train", VERSION, point, day, settings.file.train, settings.file.evaluate.uncertified, window.inputs)
        made = snapshot.find("candidates", point.name, [day]) if listed(snapshot, ["candidates"], point.name, day, key) else []
        if not made or not _kept_still(settings, lake, made):

            def told(done: int, start: int = index * each) -> None:
                progress(start + done, len(settings.points) * each)

            records = _candidates(window, day, learners, told)
            entries.append(lake.write("candidates", TABLES["candidates"].of(records), point=point.name, day=day, key=key))
        progress((index + 1) * each, len(settings.points) * each)
    return entries


def _kept_still(settings: Settings, lake: Lake, made: Sequence[Entry]) -> bool:
    """Whether the registry still has every artifact of these candidates: it may have been pruned."""
    wanted = {digest for entry in made for digest in lake.read(entry, ["digest"])["digest"].drop_null().to_pylist()}
    return wanted <= set(Registry(settings.path(settings.file.registry.folder)).listed())


def _candidates(window: Window, day: str, learners: dict[str, Learner], progress: Callable[[int], object]) -> list[dict[str, Any]]:
    """Records of the table `candidates`."""
    least, point = window.settings.file.train.least_rows, window.point
    data = window.learn_log(window.reward)
    rows = 0 if data is None else data.n
    registry = Registry(window.settings.path(window.settings.file.registry.folder))
    golden = _golden(window, data)
    shared = {
        "dp": point.name, "date": day, "reward": window.reward, "rows": rows, "from": window.days[0], "to": window.days[-1],
        "units": 0 if data is None or data.cluster is None else len(np.unique(data.cluster)),
    }  # fmt: skip
    few = f"{rows:,} rows to learn from; expected at least {least:,} (train.least_rows): nothing else was learned."
    records = [shared | _kept(registry, window, Uniform(), UNIFORM, day, golden) | {"reason": few if rows < least else None}]
    progress(1)
    if data is None or rows < least:
        return records
    for done, (name, learner) in enumerate(learners.items(), 2):
        learned = _learn(learner, data, window.k, point.exploration_floor)
        if isinstance(learned, str):
            records.append(shared | {"policy": _slug(name, day), "learner": name, "reason": learned})
        else:
            records.append(shared | _kept(registry, window, learned, name, day, golden))
        progress(done)
    return records


def _learn(learner: Learner, data: LoggedData, k: int, floor: float) -> Policy | str:
    """A policy with its floor, or why there is none."""
    low, high = reward_range(learner)
    least, most = float(data.reward.min()), float(data.reward.max())
    if not low <= least <= most <= high:
        return f"Rewards from {least:g} to {most:g}; it learns from rewards within [{low:g}, {high:g}]."
    try:
        policy = Floor(learner.fit(data, k=k, seed=SEED), floor)
        to_form(policy)
    except InputError as error:
        return str(error)
    return policy


def _kept(registry: Registry, window: Window, policy: Policy, name: str, day: str, golden: DecisionBatch) -> dict[str, Any]:
    """What the record of a registered candidate says of it."""
    called = _slug(name, day)
    made_from = {
        "date": day, "days": list(window.days), "rows": hashlib.sha256("\n".join(window.inputs).encode()).hexdigest(),
        "reward": window.reward, "learner": name, "seed": SEED,
    }  # fmt: skip
    digest = registry.register(policy, window.point, name=called, golden=golden, snapshot=made_from)
    return {
        "policy": f"{called}@{digest[:32]}", "learner": name, "digest": digest, "floor": window.point.exploration_floor,
    }  # fmt: skip


def _golden(window: Window, data: LoggedData | None) -> DecisionBatch:
    """Some requests that were learned from; where there are none, one without any feature."""
    if data is not None:
        return DecisionBatch.of_log(data.take(slice(0, GOLDEN)), window.k)
    features = window.point.features
    return DecisionBatch.of(
        np.zeros((1, len(features.context_columns))), np.ones((1, window.k), dtype=np.bool_),
        np.zeros((1, window.k, len(features.action_columns))),
    )  # fmt: skip


def _slug(name: str, day: str) -> str:
    """A learner's label and a date as a name that is safe anywhere."""
    return f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{day}"
