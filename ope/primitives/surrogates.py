"""What a step of policy optimisation maximises, per row, and gates: which rows may still move the policy.

Bounds of a surrogate are on the ratio itself; those of a gate are distances from one, as the papers give them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ope.primitives._xp import Array, as_float32, namespace, same_shape
from ope.primitives.weights import clip


def clipped(ratio: Array, advantage: Array, low: float, high: float) -> Array:
    """min(ρ·A, clip(ρ, low, high)·A), never above ρ·A. Any one shape. PPO (Schulman et al. 2017, eq. 7).

    Its gradient is 0 where A > 0 and ρ > high, or A < 0 and ρ < low; elsewhere it is ρ·A's.
    """
    same_shape(ratio=ratio, advantage=advantage)
    return namespace(ratio).minimum(ratio * advantage, clip(ratio, low, high) * advantage)


def dual_clipped(ratio: Array, advantage: Array, low: float, high: float, bound: float) -> Array:
    """`clipped`, but at least bound·A where A < 0: no gradient beyond ρ = `bound` > 1 either. Ye et al. 2020, eq. 5."""
    xp = namespace(ratio, advantage)
    value = clipped(ratio, advantage, low, high)
    return xp.where(advantage < 0, xp.maximum(value, bound * advantage), value)


def mirror_step(policy: Array, advantage: Array, step: float) -> Array:
    """π·exp(step·A) / Z over the last axis: where E_π'[A] - KL(π'‖π) / step is largest. (..., k) -> (..., k).

    Mirror descent with negative entropy (Tomar et al. 2022). Z = Σ π·exp(step·A), and the optimum is log Z / step. A constant added
    to A changes nothing; what has no chance never gets one. With rewards for A, a step of natural gradient on a softmax table.
    """
    xp = namespace(policy, advantage)
    same_shape(policy=policy, advantage=advantage)
    policy, exponent = as_float32(policy), step * as_float32(advantage)
    possible = policy > 0
    highest = xp.max(xp.where(possible, exponent, -xp.inf * xp.ones_like(exponent)), axis=-1, keepdims=True)
    risen = policy * xp.exp(xp.where(possible, exponent - highest, xp.zeros_like(exponent)))  # bounded before exp can overflow
    total = xp.sum(risen, axis=-1, keepdims=True)
    return risen / xp.where(total > 0, total, xp.ones_like(total))


@dataclass(frozen=True)
class OneSided:
    """Rows that PPO's clipping lets move: not those that went beyond a bound already in the direction of their advantage."""

    eps_low: float = 0.2
    eps_high: float = 0.2

    def keep(self, ratio: Array, advantage: Array) -> Array:
        """True where a row counts. Any one shape. A = 0 always counts: it moves nothing."""
        same_shape(ratio=ratio, advantage=advantage)
        up = (advantage >= 0) & (ratio <= 1 + self.eps_high)
        return up | ((advantage <= 0) & (ratio >= 1 - self.eps_low))


@dataclass(frozen=True)
class TwoSided:
    """Rows whose ratio is near one, whatever their advantage."""

    eps_low: float = 0.2
    eps_high: float = 0.2

    def keep(self, ratio: Array, advantage: Array) -> Array:
        """True where a row counts. Any one shape."""
        same_shape(ratio=ratio, advantage=advantage)
        return (ratio >= 1 - self.eps_low) & (ratio <= 1 + self.eps_high)


@dataclass(frozen=True)
class Ring:
    """`TwoSided`, and far outside of it rows that pull back. Yao et al. 2025 (2509.24203)."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    outer_low: float = 0.6
    outer_high: float = 2.0

    def keep(self, ratio: Array, advantage: Array) -> Array:
        """True where a row counts. Any one shape."""
        inner = TwoSided(self.eps_low, self.eps_high).keep(ratio, advantage)
        back_up = (advantage >= 0) & (ratio <= 1 - self.outer_low)
        return inner | back_up | ((advantage <= 0) & (ratio >= 1 + self.outer_high))


Gate = OneSided | TwoSided | Ring
