"""Which units learn, which choose and which value: by a hash of the unit, and so the same whole units every night."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ope.data import FloatArray, IntArray

LEARN, A, B = 0, 1, 2
FOLDS = ("learn", "A", "B")
"""Names by code: policies and reward models learn on the first, candidates are chosen on A and valued on B."""

_FOLD, _THIN = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03


def fold_of(unit: IntArray, share: float) -> NDArray[np.int8]:
    """Fold (n,) of each unit hash (n,): `share` of the units learn, the others are half A and half B.

    Independent of the low bits of the hash, which choose its bucket.
    """
    place = _uniform(unit, _FOLD)
    return (place >= share).astype(np.int8) + (place >= (1 + share) / 2)


def thinned(unit: IntArray, share: float) -> NDArray[np.bool_]:
    """Which units (n,) are among `share` of all units, independently of their fold and bucket; all of them from 1 on."""
    return _uniform(unit, _THIN) < share


def _uniform(unit: IntArray, stream: int) -> FloatArray:
    """A number in [0, 1) of each unit: splitmix64's finaliser, after Stafford's mix 13. Steele, Lea & Flood 2014."""
    mixed = np.asarray(unit).astype(np.uint64) + np.uint64(stream)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
