"""Replay: every action from its logged shares (L1), every share from its logged request and the policy's bytes (L2).

L1 needs the secret salts alone: the number that was drawn with is a keyed hash of tenant and decision id. L2 needs the policy by
its digest, and the features as they were declared to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from threadpoolctl import threadpool_limits

from bandits.batch import DecisionBatch
from bandits.decision_point import DecisionPoint
from bandits.features import FeatureSchema
from bandits.log.segments import decisions
from bandits.policy import UNIFORM, Policy, Uniform, floored
from bandits.registry import Registry
from bandits.sampling import TOTAL, Salt, choose_rows, quantise_rows
from ope.data import BoolArray, InputError, IntArray

CHUNK = 2_000
"""Decisions that are looked at together."""

TOLD = 20
"""Decisions, at most, that are named."""


class Drawn(msgspec.Struct, gc=False, frozen=True):
    """What L1 looks at of a decision."""

    tenant: str
    decision_id: str
    kind: str
    seed_epoch: int
    shares: bytes
    propensity: float
    chosen: int


class Asked(msgspec.Struct, gc=False, frozen=True):
    """What L2 looks at of a decision."""

    decision_point: str
    decision_id: str
    policy: str
    kind: str
    actions: list[str]
    shares: bytes
    body: msgspec.Raw


@dataclass(slots=True)
class Replayed:
    """What a replay found."""

    decisions: int = 0
    sampled: int = 0
    """Those that were sampled, with their shares: what can be drawn again."""
    actions: int = 0
    """Of those, how many drew the logged action again."""
    vectors: int = 0
    """And how many gave the logged shares again, where that was asked for."""
    unreadable: int = 0
    wrong: list[str] = field(default_factory=list)
    """Sentences about the first of those that did not."""
    missing: Counter[str] = field(default_factory=Counter)
    """Decisions that could not be replayed, by what was missing for it, such as a salt or a policy."""

    def tell(self, text: str) -> None:
        """Name one that did not replay."""
        if len(self.wrong) < TOLD:
            self.wrong.append(text)


@dataclass(frozen=True, slots=True)
class Judge:
    """A policy as it was served at a decision point."""

    policy: Policy
    features: FeatureSchema
    catalogue: tuple[str, ...]
    explores: bool


Judges = Callable[[str, str], Judge | str]
"""(policy, decision point) -> the policy as it was served there, or what is missing for it."""


def judges(registry: Registry | None, points: Sequence[DecisionPoint]) -> Judges:
    """Policies by what decisions name them, out of a registry, each loaded once. The floor is that of the decision points now."""
    known = {point.name: point for point in points}
    found: dict[tuple[str, str], Judge | str] = {}

    def load(reference: str, name: str) -> Judge | str:
        point = known.get(name)
        if point is None:
            return f"decision point {name}"
        if reference == UNIFORM:
            return Judge(Uniform(), point.features, point.actions.catalogue, point.explores)
        try:
            if registry is None:
                return f"policy {reference}"
            artifact = registry.load(reference.rpartition("@")[2])
        except InputError as error:
            return f"policy {reference}: {error}"
        manifest = artifact.manifest
        return Judge(
            floored(artifact.policy, point.exploration_floor), manifest.features, manifest.actions.catalogue, point.explores
        )

    def judge(reference: str, name: str) -> Judge | str:
        key = reference, name
        if key not in found:
            found[key] = load(*key)
        return found[key]

    return judge


def replay(
    files: Sequence[Path],
    salts: Mapping[int, Salt],
    judge: Judges | None = None,
    progress: Callable[[int], object] = lambda decisions: None,
) -> Replayed:
    """Draw all decisions of some files of a log again; with `judge`, compute their shares again, too.

    Raises DamagedError for a file that cannot be read. A record that is damaged counts as unreadable, or does not replay.
    """
    result = Replayed()
    for path in files:
        for some in _chunks(path):
            result.decisions += len(some)
            _draw_again(path, some, salts, result)
            if judge is not None:
                with threadpool_limits(1, "blas"):  # products of a chunk are too small to share between threads
                    _decide_again(path, some, judge, result)
            progress(result.decisions)
    return result


def _chunks(path: Path) -> Iterator[list[tuple[int, bytes]]]:
    some: list[tuple[int, bytes]] = []
    for one in decisions(path):
        some.append(one)
        if len(some) == CHUNK:
            yield some
            some = []
    if some:
        yield some


def _decoded(
    path: Path, some: Sequence[tuple[int, bytes]], decode: Callable[[bytes], Any], tell: Callable[[str], object]
) -> list[tuple[int, Any]]:
    """(row, struct) of the sampled decisions whose shares are known."""
    try:
        return [(row, one) for row, record in some if (one := decode(record)).kind == "sampled" and one.shares]
    except msgspec.DecodeError:
        read = []
        for row, record in some:
            try:
                read.append((row, decode(record)))
            except msgspec.DecodeError as error:
                tell(f"{path.name}, row {row}: found no decision ({error})")
    return [one for one in read if one[1].kind == "sampled" and one[1].shares]


def _draw_again(path: Path, some: Sequence[tuple[int, bytes]], salts: Mapping[int, Salt], result: Replayed) -> None:
    def unreadable(text: str) -> None:
        result.unreadable += 1
        result.tell(text)

    drawn = _decoded(path, some, msgspec.json.Decoder(Drawn).decode, unreadable)
    result.sampled += len(drawn)

    groups: dict[tuple[int, str, int], list[tuple[int, Drawn]]] = {}
    for one in drawn:
        groups.setdefault((one[1].seed_epoch, one[1].tenant, len(one[1].shares)), []).append(one)
    for (epoch, tenant, size), alike in groups.items():
        if epoch not in salts:
            result.missing[f"salt of epoch {epoch}"] += len(alike)
        elif size % 4:
            for row, found in alike:
                result.tell(
                    f"{path.name}, row {row}: decision {found.decision_id}: found {size} bytes of shares; expected four per action"
                )
        else:
            _draw_alike(path, alike, salts[epoch].uniforms(tenant, [found.decision_id for _, found in alike]), result)


def _draw_alike(path: Path, alike: Sequence[tuple[int, Drawn]], u: IntArray, result: Replayed) -> None:
    """Draw decisions (n,) with as many shares again, from the numbers u (n,)."""
    rows, n = [one for _, one in alike], len(alike)
    shares = np.frombuffer(b"".join([one.shares for one in rows]), "<u4").reshape(n, -1).astype(np.int64)
    chosen, propensity = np.array([one.chosen for one in rows]), np.array([one.propensity for one in rows])
    again = choose_rows(shares, u)
    own = shares[np.arange(n), np.clip(chosen, 0, shares.shape[1] - 1)] / TOTAL
    good = (again == chosen) & (own == propensity) & (shares.sum(axis=1) == TOTAL)
    result.actions += int(good.sum())
    for at in np.flatnonzero(~good).tolist():
        result.tell(
            f"{path.name}, row {alike[at][0]}: decision {rows[at].decision_id}: found action {chosen[at]} of propensity "
            f"{propensity[at]!r}; its shares {shares[at].tolist()} and its salt draw action {again[at]}"
        )


def _decide_again(path: Path, some: Sequence[tuple[int, bytes]], judge: Judges, result: Replayed) -> None:
    def unreadable(text: str) -> None:
        if text not in result.wrong:  # what L1 could not read either is told already
            result.tell(text)

    asked = _decoded(path, some, msgspec.json.Decoder(Asked).decode, unreadable)

    def kind(one: tuple[int, Asked]) -> tuple[str, str, int]:
        return one[1].policy, one[1].decision_point, len(one[1].actions)

    for (reference, point, _), group in groupby(sorted(asked, key=kind), key=kind):
        alike, by = list(group), judge(reference, point)
        if isinstance(by, str):
            result.missing[by] += len(alike)
            continue
        good = _agree([one for _, one in alike], by)
        result.vectors += int(good.sum())
        for at in np.flatnonzero(~good).tolist():
            row, one = alike[at]
            result.tell(f"{path.name}, row {row}: decision {one.decision_id}: {reference} gives other shares than were logged")


def _agree(alike: Sequence[Asked], by: Judge) -> BoolArray:
    """Which of some decisions with as many actions have the shares that the policy gives; where one cannot be read, one by one."""
    try:
        batch, columns = _request(alike, by)
        logged = np.frombuffer(b"".join([one.shares for one in alike]), "<u4").reshape(columns.shape)
        shares = quantise_rows(by.policy.propensities(batch), batch.eligible, explore=by.explores)
        good = (np.take_along_axis(shares, columns, axis=1) == logged).all(axis=1)
    except (InputError, msgspec.DecodeError, ValueError, KeyError):
        if len(alike) == 1:
            return np.zeros(1, dtype=np.bool_)
        return np.concatenate([_agree([one], by) for one in alike])
    if len(alike) > 1:  # products of many rows may end in other bits than that of one, which is how requests are mostly decided on
        for at in np.flatnonzero(~good).tolist():
            good[at] = _agree([alike[at]], by)[0]
    return np.asarray(good)


def _request(alike: Sequence[Asked], by: Judge) -> tuple[DecisionBatch, IntArray]:
    """The requests as the service made arrays of them, and the column (n, k) of each of their actions."""
    bodies = [msgspec.json.decode(one.body) for one in alike]
    n, k = len(alike), len(alike[0].actions)
    features = [body["actions"] for body in bodies] if by.features.action else k
    batch = by.features.batch([body["context"] for body in bodies], features)
    if not by.catalogue:
        return batch, np.broadcast_to(np.arange(k), (n, k))
    places = {action: at for at, action in enumerate(by.catalogue)}
    columns = np.array([[places[action] for action in one.actions] for one in alike])
    if k == len(by.catalogue):
        return batch, columns
    eligible = np.zeros((n, len(by.catalogue)), dtype=np.bool_)
    np.put_along_axis(eligible, columns, True, axis=1)
    wide = np.zeros((n, len(by.catalogue), batch.action_features.shape[2]))
    wide[np.arange(n)[:, None], columns] = batch.action_features
    return DecisionBatch(batch.context, wide, eligible), columns
