"""Whether records are what the wire contract says, column by column: what is not is named and left out, never mended."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bandits.decision_point import DecisionPoint
from bandits.events import KINDS, SCHEMA_VERSION, digest
from bandits.sampling import TOTAL
from ope.data import BoolArray, IntArray

NOT_PRINTABLE = r"[\p{C}\p{Zl}\p{Zp}]"
LATEST_NS = 2**62
"""About the year 2116: later times are milliseconds taken for nanoseconds, or the other way round."""


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Records that keep the contract, and why the others do not."""

    kept: pa.Table
    rejected: Mapping[int, str]
    """Reason by row."""
    foreign: int
    """Records of other tenants: theirs to read."""


class _Judge:
    """Collects, for every row, the first thing that is wrong with it."""

    def __init__(self, rows: int):
        self.reason = np.zeros(rows, dtype=np.int16)
        self.texts = [""]

    def reject(self, bad: NDArray[np.bool_] | pa.ChunkedArray | pa.Array, text: str) -> None:
        """Rows (n,) that are not what is expected, unless they were rejected before; null counts as bad."""
        where = bad if isinstance(bad, np.ndarray) else np.asarray(pc.fill_null(bad, True).to_numpy(zero_copy_only=False))
        if where.any():
            self.texts.append(text)
            self.reason[where & (self.reason == 0)] = len(self.texts) - 1

    def judged(self, table: pa.Table, ours: BoolArray) -> Judged:
        wrong = np.flatnonzero((self.reason > 0) & ours)
        kept = table if not len(wrong) and ours.all() else table.filter(pa.array(ours & (self.reason == 0)))
        return Judged(kept, {int(row): self.texts[self.reason[row]] for row in wrong}, int((~ours).sum()))


def judge_decisions(table: pa.Table, tenant: str, points: Mapping[str, DecisionPoint]) -> Judged:
    """Decisions against `bandits.events.Decision` and the decision points."""
    table = table.combine_chunks()
    judge, ours = _Judge(table.num_rows), _ours(table, tenant)
    _check_version(judge, table)
    for name in ("tenant", "decision_id", "unit", "policy", "decision_point"):
        _check_ids(judge, table, name)
    for name in ("session", "parent", "experiment", "arm"):
        _check_ids(judge, table, name, optional=True)
    judge.reject(pc.invert(pc.is_in(table["decision_point"], pa.array(list(points)))), "decision_point: not one of the settings")
    judge.reject(pc.invert(pc.is_in(table["kind"], pa.array(KINDS))), f"kind: expected one of {', '.join(KINDS)}")
    _check_times(judge, table, "decided_at_ns")
    for name in ("propensity", "pass_probability"):
        value = _floats(table, name)
        judge.reject(~((value > 0) & (value <= 1)), f"{name}: expected a probability above 0, at most 1")
    _check_actions(judge, table, points)
    _check_hashes(judge, table)
    return judge.judged(table, ours)


def judge_rewards(table: pa.Table, tenant: str) -> Judged:
    """Rewards against `bandits.events.Reward`. Ranges are judged where they are joined: only there is the decision known."""
    judge, ours = _Judge(table.num_rows), _ours(table, tenant)
    _check_version(judge, table)
    for name in ("tenant", "decision_id", "name"):
        _check_ids(judge, table, name)
    _check_ids(judge, table, "event_id")
    for name in ("observed_at_ns", "received_at_ns"):
        _check_times(judge, table, name)
    judge.reject(~np.isfinite(_floats(table, "value")), "value: expected a finite number")
    return judge.judged(table, ours)


def judge_quarantined(table: pa.Table, tenant: str) -> Judged:
    """Rewards whose token was that of another decision: none of ours is kept among the rewards."""
    ours = _ours(table, tenant)
    said = "token: of another decision, as whoever guesses ids would send"
    return Judged(table.slice(0, 0), dict.fromkeys(np.flatnonzero(ours).tolist(), said), int((~ours).sum()))


def judge_shown(table: pa.Table, tenant: str) -> Judged:
    """Shown events against `bandits.events.Shown`."""
    judge, ours = _Judge(table.num_rows), _ours(table, tenant)
    _check_version(judge, table)
    for name in ("tenant", "decision_id"):
        _check_ids(judge, table, name)
    _check_ids(judge, table, "action", optional=True)
    for name in ("observed_at_ns", "received_at_ns"):
        _check_times(judge, table, name)
    return judge.judged(table, ours)


def action_positions(table: pa.Table, catalogue: tuple[str, ...]) -> tuple[IntArray, IntArray, IntArray]:
    """(row, place in the row's set, position) of every eligible action: its place in the catalogue, or in the set; -1: unknown."""
    actions = table["actions"].combine_chunks()
    lengths = np.diff(actions.offsets.to_numpy())
    row = np.repeat(np.arange(len(actions)), lengths)
    place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if not catalogue:
        return row, place, place
    coded = actions.flatten().dictionary_encode()
    known = np.append(pc.index_in(coded.dictionary, pa.array(catalogue, pa.string())).fill_null(-1).to_numpy(), -1)
    return row, place, known[coded.indices.fill_null(len(known) - 1).to_numpy()].astype(np.int64)


def flat_shares(table: pa.Table) -> tuple[IntArray, IntArray]:
    """Shares of all rows one after the other, and how many each row has."""
    column = table["shares"].combine_chunks()
    _, ends, data = column.buffers()
    offsets = np.frombuffer(ends, dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    raw = np.frombuffer(data or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
    return np.frombuffer(raw[: len(raw) // 4 * 4].tobytes(), dtype="<u4").astype(np.int64), np.diff(offsets).astype(np.int64)


def unit_hashes(units: pa.ChunkedArray) -> IntArray:
    """64 bits of BLAKE2b of each unit, as a signed number: which bucket and fold it is in, and what rows are clustered by."""
    coded = units.combine_chunks().dictionary_encode()
    hashed = [hashlib.blake2b(unit.encode(), digest_size=8).digest() for unit in coded.dictionary.to_pylist()]
    return np.asarray(np.frombuffer(b"".join(hashed), dtype="<i8")[coded.indices.to_numpy()])


def _ours(table: pa.Table, tenant: str) -> BoolArray:
    return np.asarray(pc.fill_null(pc.equal(table["tenant"], tenant), True).to_numpy(), dtype=np.bool_)


def _check_version(judge: _Judge, table: pa.Table) -> None:
    version = table["schema_version"]
    known = pc.and_kleene(pc.greater_equal(version, 1), pc.less_equal(version, SCHEMA_VERSION))
    judge.reject(pc.invert(known), f"schema_version: expected 1 to {SCHEMA_VERSION}, those that this version reads")


def _check_ids(judge: _Judge, table: pa.Table, name: str, *, optional: bool = False) -> None:
    column = table[name].combine_chunks()
    coded = column if len(column) < 2 or name in ("decision_id",) else column.dictionary_encode()
    texts = coded.dictionary if isinstance(coded, pa.DictionaryArray) else coded
    length = pc.utf8_length(texts)
    bad = pc.or_kleene(pc.greater(length, 128), pc.match_substring_regex(texts, NOT_PRINTABLE))
    if name != "event_id":  # "" is the one event of a name
        bad = pc.or_kleene(bad, pc.equal(length, 0))
    if isinstance(coded, pa.DictionaryArray):
        bad = bad.take(coded.indices)
    judge.reject(pc.fill_null(bad, not optional), f"{name}: expected 1 to 128 printable characters")


def _check_times(judge: _Judge, table: pa.Table, name: str) -> None:
    time = table[name]
    inside = pc.and_kleene(pc.greater_equal(time, 0), pc.less(time, LATEST_NS))
    judge.reject(pc.invert(inside), f"{name}: expected nanoseconds since 1970")


def _check_actions(judge: _Judge, table: pa.Table, points: Mapping[str, DecisionPoint]) -> None:
    """Actions known and distinct, the chosen one among them, shares that sum to 2^31 and agree with the propensity."""
    n = table.num_rows
    actions = table["actions"].combine_chunks()
    judge.reject(actions.is_null(), "actions: expected a list")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(actions), 0).to_numpy()).astype(np.int64)
    nulls = np.zeros(n, dtype=np.bool_)
    row_of, *_ = action_positions(table, ())
    nulls[row_of[np.asarray(actions.flatten().is_null().to_numpy(zero_copy_only=False), dtype=np.bool_)]] = True
    judge.reject(nulls, "actions: expected texts")
    judge.reject(lengths == 0, "actions: expected at least one eligible action")
    chosen = np.asarray(table["chosen"].fill_null(-1).to_numpy()).astype(np.int64)
    judge.reject((chosen < 0) | (chosen >= lengths), "chosen: expected an index into the actions")
    for name, point in points.items():
        of_point = np.asarray(pc.fill_null(pc.equal(table["decision_point"], name), False).to_numpy())
        catalogue = point.actions.catalogue
        if catalogue and of_point.any():
            row, _, position = action_positions(table, catalogue)
            unknown = np.bincount(row, weights=position < 0, minlength=n) > 0
            judge.reject(unknown & of_point, f"actions: expected those of the catalogue of {name}")
    judge.reject(_repeats(actions, row_of), "actions: expected distinct ones")
    _check_shares(judge, table, lengths, chosen)


def _repeats(actions: pa.ListArray, row: IntArray) -> BoolArray:
    """Which of n lists have a text twice; `row`: of each text."""
    code = actions.flatten().dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64)
    falls = np.flatnonzero((code[1:] <= code[:-1]) & (row[1:] == row[:-1]))
    found = np.zeros(len(actions), dtype=np.bool_)
    if len(falls):  # codes are given as texts appear: lists in one order always rise, and need no sorting
        doubtful = np.zeros(len(actions), dtype=np.bool_)
        doubtful[row[falls]] = True
        pairs = np.sort((row * (code.max() + 2) + code)[doubtful[row]])
        found[pairs[1:][pairs[1:] == pairs[:-1]] // (code.max() + 2)] = True
    return found


def _check_shares(judge: _Judge, table: pa.Table, lengths: IntArray, chosen: IntArray) -> None:
    size = np.asarray(pc.fill_null(pc.binary_length(table["shares"]), -1).to_numpy()).astype(np.int64)
    judge.reject(size < 0, "shares: expected bytes, empty where the vector is unknown")
    judge.reject((size > 0) & (size != 4 * lengths), "shares: expected four bytes per action, or none")
    rows = np.flatnonzero((size >= 0) & (size % 4 == 0))
    part = table if len(rows) == table.num_rows else table.take(pa.array(rows))
    flat, bytes_ = flat_shares(part)
    _agree(judge, rows, flat, bytes_ // 4, chosen[rows], _floats(part, "propensity"))


def _agree(
    judge: _Judge,
    rows: IntArray,
    flat: IntArray,
    lengths: IntArray,
    chosen: IntArray,
    propensity: NDArray[np.float64],
) -> None:
    """Reject rows whose shares do not sum to 2^31, or differ from the propensity of the action taken."""
    ends = np.cumsum(lengths)
    running = np.concatenate(([0], np.cumsum(flat)))
    sums = running[ends] - running[ends - lengths]
    known = lengths > 0
    bad = np.zeros(len(judge.reason), dtype=np.bool_)
    bad[rows] = known & (sums != TOTAL)
    judge.reject(bad, f"shares: expected them to sum to {TOTAL}")
    inside = known & (chosen >= 0) & (chosen < lengths)
    taken = flat[np.where(inside, ends - lengths + chosen, 0)] / TOTAL if len(flat) else np.zeros(len(rows))
    bad = np.zeros(len(judge.reason), dtype=np.bool_)
    bad[rows] = inside & (taken != propensity)
    judge.reject(bad, "propensity: expected the share of the action taken")


def _check_hashes(judge: _Judge, table: pa.Table) -> None:
    """Bodies must be the bytes that were decided on."""
    bodies = table["body"].fill_null(b"").to_pylist()
    found = pa.array([digest(body) for body in bodies], pa.binary())
    kept = pc.and_kleene(pc.equal(found, table["body_hash"]), pc.is_valid(table["body"]))
    judge.reject(pc.invert(kept), "body: found another one than was hashed when the decision was made")


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    return np.asarray(table[name].cast(pa.float64()).to_numpy())
