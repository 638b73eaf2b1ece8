"""Events to the files of other systems: VW's DSJSON."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from graphlib import CycleError, TopologicalSorter
from itertools import groupby, pairwise
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from bandits.events import Decision, Reward
from bandits.sampling import TOTAL
from ope.data import InputError
from pipelines.importers.dsjson import UNIT


def read_decisions(folder: Path) -> Iterator[Decision]:
    """Decisions of a folder that `propel import` wrote, in the order of the source. Raises InputError where there are none."""
    for record in _records(folder / "decisions.parquet"):
        record["body"] = msgspec.Raw(record["body"])
        record["actions"] = tuple(record["actions"])
        record["excluded"] = tuple((pair["action"], pair["reason"]) for pair in record["excluded"])
        yield Decision(**record)


def read_rewards(folder: Path) -> Iterator[Reward]:
    """Rewards of a folder that `propel import` wrote. Raises InputError where there are none."""
    for record in _records(folder / "rewards.parquet"):
        yield Reward(**record)


def to_dsjson(folder: Path, path: Path) -> int:
    """Write the events of a folder as DSJSON lines, gzip where the name ends in .gz; the number of lines.

    Decisions of one session whose ids are `SESSION:SLOT` become the slots of one line. Costs are negative rewards; what was not
    sampled is marked `_skipLearn`; rewards that came without their decision follow at the end. The file appears when it is whole.
    Raises InputError where the folder holds no events or the file is already there.
    """
    if path.exists():
        raise InputError(f"found {path} already there; expected a new file: name another one")
    rewards: dict[str, float] = {}
    alone = []
    for reward in read_rewards(folder):
        if reward.event_id:
            alone.append(reward)
        else:
            rewards[reward.decision_id] = reward.value
    count = 0
    handle, name = mkstemp(prefix=f".{path.name}-", dir=path.parent)
    part = Path(name)
    try:
        os.close(handle)
        with gzip.open(part, "wb") if path.suffix == ".gz" else part.open("wb") as file:
            for _, group in groupby(read_decisions(folder), key=_line_key):
                file.write(msgspec.json.encode(_line(list(group), rewards)) + b"\n")
                count += 1
            for reward in alone:
                file.write(msgspec.json.encode(_observation(reward)) + b"\n")
        part.chmod(0o644)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return count + len(alone)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"found no {path}; expected a folder that `propel import` wrote")
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=10_000):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path}: found {str(error).splitlines()[0]}; expected a complete Parquet file: import it again") from None


def _line_key(decision: Decision) -> tuple[str, bool]:
    slotted = decision.session is not None and decision.decision_id.startswith(f"{decision.session}:")
    return (decision.session or "", True) if slotted else (decision.decision_id, False)


def _line(decisions: Sequence[Decision], rewards: Mapping[str, float]) -> dict[str, Any]:
    first, slotted = decisions[0], _line_key(decisions[0])[1]
    bodies = [msgspec.json.decode(decision.body) for decision in decisions]
    ids = _in_one_order([decision.actions for decision in decisions])
    features = {
        action: one
        for decision, body in zip(decisions, bodies, strict=True)
        for action, one in zip(decision.actions, body["actions"], strict=True)
    }
    numbered = ids == [str(number) for number in range(1, len(ids) + 1)]
    multi = [features[action] if numbered else {"_tag": action} | features[action] for action in ids]
    if first.unit not in (first.decision_id, first.session):
        bodies[0]["context"][UNIT] = first.unit
    line: dict[str, Any] = {"Version": "1", "EventId": first.session if slotted else first.decision_id}
    if first.decided_at_ns:
        line["Timestamp"] = _iso(first.decided_at_ns)
    if slotted:
        slots = _slots(decisions, bodies, ids)
        line |= {
            "c": bodies[0]["context"] | {"_multi": multi, "_slots": slots},
            "_outcomes": [_outcome(decision, ids, rewards) for decision in decisions],
        }
    else:
        line = _label(first, rewards) | line | {"c": bodies[0]["context"] | {"_multi": multi}}
    if first.kind != "sampled":
        line["_skipLearn"] = True
    if first.pass_probability < 1:
        line["pdrop"] = 1 - first.pass_probability
    if first.policy.startswith("vw@"):
        line["VWState"] = {"m": first.policy.removeprefix("vw@")}
    return line


def _in_one_order(sets: Sequence[tuple[str, ...]]) -> list[str]:
    """Members of several ordered sets, in an order that is that of each of them, where there is one."""
    if len(sets) == 1:
        return list(sets[0])
    known = dict.fromkeys(action for actions in sets for action in actions)
    sorter = TopologicalSorter[str](dict.fromkeys(known, ()))
    for actions in sets:
        for before, after in pairwise(actions):
            sorter.add(after, before)
    try:
        return list(sorter.static_order())
    except CycleError:
        return list(known)


def _slots(decisions: Sequence[Decision], bodies: Sequence[dict[str, Any]], ids: Sequence[str]) -> list[dict[str, Any]]:
    """Features of each slot; `_inc` says what it chose among, where that is not all that the slots before it left."""
    slots, left = [], set(ids)
    for decision, body in zip(decisions, bodies, strict=True):
        slot = body["context"].pop("slot", {})
        if set(decision.actions) != left:
            slot |= {"_inc": [ids.index(action) for action in decision.actions]}
        left.discard(decision.actions[decision.chosen])
        slots.append(slot)
    return slots


def _label(decision: Decision, rewards: Mapping[str, float]) -> dict[str, Any]:
    label: dict[str, Any] = {} if decision.decision_id not in rewards else {"_label_cost": 0.0 - rewards[decision.decision_id]}
    label |= {
        "_label_probability": decision.propensity,
        "_label_Action": decision.chosen + 1,
        "_labelIndex": decision.chosen,
    }
    if decision.shares:
        order = _chosen_first(decision)
        label |= {"a": [place + 1 for place in order], "p": _probabilities(decision, order)}
    return label


def _outcome(decision: Decision, ids: Sequence[str], rewards: Mapping[str, float]) -> dict[str, Any]:
    order = _chosen_first(decision)
    slot = decision.decision_id.removeprefix(f"{decision.session}:")
    outcome: dict[str, Any] = {} if decision.decision_id not in rewards else {"_label_cost": 0.0 - rewards[decision.decision_id]}
    return outcome | {
        "_id": slot,
        "_a": [ids.index(decision.actions[place]) for place in order],
        "_p": _probabilities(decision, order),
    }


def _chosen_first(decision: Decision) -> list[int]:
    return [decision.chosen, *(place for place in range(len(decision.actions)) if place != decision.chosen)]


def _probabilities(decision: Decision, order: Sequence[int]) -> list[float]:
    shares = decision.share_vector()
    return [int(shares[place]) / TOTAL for place in order]


def _observation(reward: Reward) -> dict[str, Any]:
    time = {"EnqueuedTimeUtc": _iso(reward.observed_at_ns)} if reward.observed_at_ns else {}
    return {"RewardValue": reward.value, **time, "EventId": reward.decision_id, "Observations": []}


def _iso(nanoseconds: int) -> str:
    """UTC, to the nanosecond, zeros at the end left out."""
    seconds, rest = divmod(nanoseconds, 10**9)
    fraction = f".{rest:09d}".rstrip("0") if rest else ""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{fraction}Z"
