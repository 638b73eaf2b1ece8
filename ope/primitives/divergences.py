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


def expectile(gap: Array, level: float) -> Array:
    """|level - 1[u < 0]|·u² of gaps u = x - m: its mean over x is least at the m that is x's expectile. Any one shape.

    Newey and Powell 1987; a critic's upper expectile in IQL (Kostrikov et al. 2021). Level 0.5 is half the square.
    """
    xp = namespace(gap)
    gap = as_float32(gap)
    one = xp.ones_like(gap)
    return xp.where(gap < 0, (1 - level) * one, level * one) * gap**2


def gaussian_kl(mean: Array, log_std: Array, mean_ref: Array, log_std_ref: Array) -> Array:
    """KL(N(μ, σ²)‖N(μ0, σ0²)) of diagonal normals: Σ_j log(σ0/σ) + (σ² + (μ - μ0)²) / (2σ0²) - ½. (..., A) -> (...).

    Written by expm1 of 2·log(σ/σ0), so that near equality no digits cancel.
    """
    xp = namespace(mean, log_std, mean_ref, log_std_ref)
    same_shape(mean=mean, log_std=log_std, mean_ref=mean_ref, log_std_ref=log_std_ref)
    apart = as_float32(log_std) - as_float32(log_std_ref)
    shift = (as_float32(mean) - as_float32(mean_ref)) * xp.exp(-as_float32(log_std_ref))
    return xp.sum((xp.expm1(2 * apart) + shift**2) / 2 - apart, axis=-1)
