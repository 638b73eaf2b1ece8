"""One way to draw: a distribution becomes integer shares of 2^31, a keyed hash of the decision's id a number, and that chooses.

What was sampled from is what is logged: share / 2^31 is exact in float64, on any machine. Everything here replays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ope.data import BoolArray, FloatArray, InputError, IntArray

TOTAL = 2**31
"""What shares sum to: one share fits u32 even where it is all of them."""

TOLERANCE = 1e-6
"""How far from one a policy's probabilities may sum."""

SLACK = int(TOTAL * TOLERANCE)
"""The same in shares; rounding down adds at most one per action."""


@dataclass(frozen=True, slots=True)
class Salt:
    """The secret of one seed epoch. Without it nobody can choose an id that draws a wanted action; with it every draw replays."""

    epoch: int
    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.key, bytes) or not 16 <= len(self.key) <= 64:
            raise InputError(f"found a salt of {len(self.key)} {type(self.key).__name__}; expected 16 to 64 random bytes")

    def uniform(self, tenant: str, decision_id: str) -> int:
        """A number in [0, 2^31): the top bits of BLAKE2b, keyed, over length-prefixed tenant and decision id."""
        name, id_ = tenant.encode(), decision_id.encode()
        message = len(name).to_bytes(4, "big") + name + len(id_).to_bytes(4, "big") + id_
        return int.from_bytes(hashlib.blake2b(message, digest_size=8, key=self.key).digest(), "big") >> 33

    def uniforms(self, tenant: str, decision_ids: Sequence[str]) -> IntArray:
        """`uniform` of many decisions of one tenant (n,)."""
        name = tenant.encode()
        begun = hashlib.blake2b(len(name).to_bytes(4, "big") + name, digest_size=8, key=self.key)
        digests = []
        for id_ in map(str.encode, decision_ids):
            hash_ = begun.copy()
            hash_.update(len(id_).to_bytes(4, "big") + id_)
            digests.append(hash_.digest())
        return (np.frombuffer(b"".join(digests), ">u8") >> 33).astype(np.int64)


def quantise(vector: Sequence[float], *, explore: bool = True) -> list[int]:
    """Shares of the eligible actions' probabilities (k,), summing to 2^31.

    Each is rounded down, to at least 1 where `explore`; the largest (the first of equals) takes the difference. What rounding
    left below zero by less than a share counts as 0.
    Raises InputError where the vector is not a distribution.
    """
    least, total = 1 if explore else 0, float(TOTAL)
    try:
        shares = [int(p * total) or least for p in vector]
    except (ValueError, OverflowError, TypeError):  # NaN, infinity, no number; texts and lists would be repeated by an int
        shares = []
    left = TOTAL - sum(shares)
    if not shares or min(shares) < 0 or abs(left) > SLACK + len(shares):
        raise InputError(f"found probabilities {_shown(vector)}; expected numbers of at least 0 that sum to 1")
    shares[shares.index(max(shares))] += left
    return shares


def quantise_rows(vectors: FloatArray, eligible: BoolArray, *, explore: bool = True) -> IntArray:
    """`quantise` of every row (n, k), equal to the bit; 0 where not eligible.

    Raises InputError at the first row that is not a distribution over its eligible actions.
    """
    with np.errstate(invalid="ignore"):  # NaN becomes a number here, and fails the sum
        shares = (vectors * TOTAL).astype(np.int64)
    count = eligible.sum(axis=1)
    good = (shares >= 0).all(axis=1) & ~np.isnan(vectors).any(axis=1) & (count > 0)
    good &= ~((vectors > 0) & ~eligible).any(axis=1)
    shares = np.where(eligible, np.maximum(shares, 1 if explore else 0), 0)
    left = TOTAL - shares.sum(axis=1)
    good &= np.abs(left) <= SLACK + count
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(
            f"row {row}: found probabilities {_shown(vectors[row].tolist())}, eligible {np.flatnonzero(eligible[row]).tolist()}; "
            "expected numbers of at least 0 that sum to 1, and 0 on every ineligible action"
        )
    shares[np.arange(len(shares)), shares.argmax(axis=1)] += left
    return shares


def choose(shares: Sequence[int], u: int) -> int:
    """Index of the action into whose share the number u in [0, 2^31) falls."""
    left = u
    for index, share in enumerate(shares):
        left -= share
        if left < 0 <= u:
            return index
    raise InputError(f"found u = {u} and shares that sum to {sum(shares)}; expected u from 0 and a sum of {TOTAL}")


def choose_rows(shares: IntArray, u: IntArray) -> IntArray:
    """`choose` for every row: shares (n, k), u (n,) -> (n,)."""
    return (np.cumsum(shares, axis=1) <= u[:, None]).sum(axis=1)


def _shown(vector: Sequence[float]) -> str:
    shown = ", ".join(f"{p:.6g}" if isinstance(p, int | float) else repr(p) for p in vector[:8])
    return f"[{shown}{', ...' if len(vector) > 8 else ''}]"
