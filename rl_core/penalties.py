"""KL penalties on sampled tokens: what is subtracted from the objective, each with the gradient it has in expectation."""

from __future__ import annotations

from dataclasses import dataclass

from ope.primitives._xp import Array, stop_gradient
from ope.primitives.divergences import k2, k3
from ope.primitives.weights import clip, ratio


@dataclass(frozen=True)
class K2:
    """d²/2 with d = logp - logp_anchor: biased, with the gradient of KL(π‖anchor)."""

    coef: float

    def value(self, logp: Array, anchor: Array, behavior: Array) -> Array:
        """(B, T) -> (B, T)."""
        return k2(logp, anchor)


@dataclass(frozen=True)
class K3:
    """exp(-d) - 1 + d: unbiased, with the gradient of the *forward* KL(anchor‖π)."""

    coef: float

    def value(self, logp: Array, anchor: Array, behavior: Array) -> Array:
        """(B, T) -> (B, T)."""
        return k3(logp, anchor)


@dataclass(frozen=True)
class CorrectedK3:
    """(π/μ)·k3, the ratio at most `bound` and differentiable: unbiased, with the gradient of KL(π‖anchor)."""

    coef: float
    bound: float = 2.0

    def value(self, logp: Array, anchor: Array, behavior: Array) -> Array:
        """(B, T) -> (B, T)."""
        return clip(ratio(logp, behavior), 0.0, self.bound) * k3(logp, anchor)


@dataclass(frozen=True)
class StraightThroughK3:
    """k3's value and k2's gradient: unbiased, with the gradient of KL(π‖anchor)."""

    coef: float

    def value(self, logp: Array, anchor: Array, behavior: Array) -> Array:
        """(B, T) -> (B, T)."""
        smooth = k2(logp, anchor)
        return smooth + stop_gradient(k3(logp, anchor) - smooth)


@dataclass(frozen=True)
class ForwardKL:
    """-logp, up to a constant the KL(sampler‖π) of samples: imitation of whoever sampled (AsymRE's regulariser)."""

    coef: float

    def value(self, logp: Array, anchor: Array, behavior: Array) -> Array:
        """(B, T) -> (B, T)."""
        return -logp


Penalty = K2 | K3 | CorrectedK3 | StraightThroughK3 | ForwardKL
