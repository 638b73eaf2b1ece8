"""Corrections of rollouts that another policy wrote than the centre of the trust region: weights T(π_old/μ) of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ope.primitives._xp import Array, namespace
from ope.primitives.weights import clip, log_ratio, mask_outside, ratio, sequence_ratio
from rl_core.families.token import TokenBatch

Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class Truncate:
    """Rollout correction min(w, bound) with w = π_old/μ: the engine's mismatch, and staleness (TIS)."""

    bound: float = 2.0
    level: Level = "token"

    def weight(self, batch: TokenBatch) -> Array:
        """(B, T)."""
        return clip(_mismatch(batch, self.level), 0.0, self.bound)


@dataclass(frozen=True)
class MaskOutside:
    """Rollout correction w inside [low, high], else 0 (IcePop)."""

    low: float = 0.5
    high: float = 5.0
    level: Level = "token"

    def weight(self, batch: TokenBatch) -> Array:
        """(B, T)."""
        return mask_outside(_mismatch(batch, self.level), self.low, self.high)


def _mismatch(batch: TokenBatch, level: Level) -> Array:
    """(B, T) π_old/μ of each token, or of the whole response: then unbiased, with a large variance."""
    each = ratio(batch.proximal, batch.logp_behavior)
    if level == "token":
        return each
    whole = sequence_ratio(log_ratio(batch.proximal, batch.logp_behavior), batch.mask, length_normalized=False)
    return whole[:, None] * namespace(each).ones_like(each)
