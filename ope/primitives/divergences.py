"""Distances between policies: from log-probabilities of what was taken, or from whole distributions."""

from __future__ import annotations

from ope.primitives._xp import Array, as_float32, namespace, same_shape
from ope.primitives.weights import log_ratio


def k1(logp: Array, logp_ref: Array) -> Array:
    """-log(ref/π) at sampled actions: unbiased for KL(π‖ref), may be negative. Any one shape. Schulman 2020."""
    return log_ratio(logp, logp_ref)


def k2(logp: Array, logp_ref: Array) -> Array:
    """½ log²(ref/π) at sampled actions: biased, small variance, its gradient is KL's. Any one shape. Schulman 2020."""
    return log_ratio(logp, logp_ref) ** 2 / 2


def k3(logp: Array, logp_ref: Array) -> Array:
    """ref/π - 1 - log(ref/π) at sampled actions: unbiased for KL(π‖ref) and never negative. Schulman 2020."""
    back = log_ratio(logp_ref, logp)
    return namespace(back).expm1(back) - back


def kl(p: Array, q: Array) -> Array:
    """KL(p‖q) = Σ_a p log(p/q) over the last axis. (..., k) -> (...). 0·log 0 = 0; infinite where p > 0 = q."""
    xp = namespace(p, q)
    same_shape(p=p, q=q)
    p, q = as_float32(p), as_float32(q)
    one = xp.ones_like(p)
    safe_p, safe_q = xp.where(p > 0, p, one), xp.where(q > 0, q, one)  # the logs stay finite, and so do their gradients
    terms = p * (xp.log(safe_p) - xp.log(safe_q))
    return xp.sum(xp.where((p > 0) & (q <= 0), one * xp.inf, terms), axis=-1)


def entropy(p: Array) -> Array:
    """-Σ_a p log p over the last axis, in nats. (..., k) -> (...). 0·log 0 = 0."""
    xp = namespace(p)
    p = as_float32(p)
    return -xp.sum(p * xp.log(xp.where(p > 0, p, xp.ones_like(p))), axis=-1)


def total_variation(p: Array, q: Array) -> Array:
    """½ Σ_a |p - q| over the last axis, in [0, 1]. (..., k) -> (...)."""
    xp = namespace(p, q)
    same_shape(p=p, q=q)
    return xp.sum(xp.abs(as_float32(p) - as_float32(q)), axis=-1) / 2
