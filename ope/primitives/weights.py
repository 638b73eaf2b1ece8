"""Importance weights and their transforms. Every transform maps weights to weights, elementwise, shape kept."""

from __future__ import annotations

import math

from ope.primitives._xp import Array, as_float32, namespace, same_shape


def importance(target_propensity: Array, propensity: Array) -> Array:
    """w = π(a|x) / p of logged probabilities, any one shape.

    Plain division, not exp of logs: both are exact probabilities from a log, and a target of 0 must give exactly 0.
    """
    same_shape(target_propensity=target_propensity, propensity=propensity)
    return target_propensity / propensity


def log_ratio(logp: Array, logp_behavior: Array, bound: float = 20.0) -> Array:
    """log(π/μ) from log-probabilities, bounded at ±`bound`, in float32 or better.

    Where both are -inf there is no ratio: mask such positions (`where`) before, not after.
    """
    xp = namespace(logp, logp_behavior)
    same_shape(logp=logp, logp_behavior=logp_behavior)
    return xp.clip(as_float32(logp) - as_float32(logp_behavior), -bound, bound)


def ratio(logp: Array, logp_behavior: Array, bound: float = 20.0) -> Array:
    """π/μ from log-probabilities, bounded by exp(±`bound`)."""
    return namespace(logp).exp(log_ratio(logp, logp_behavior, bound))


def clip(weight: Array, low: float = 0.0, high: float = math.inf) -> Array:
    """min(max(w, low), high). Clipped IPS with `high` = L (Ionides 2008)."""
    return namespace(weight).clip(weight, low, high)


def switch(weight: Array, threshold: float) -> Array:
    """1 where w <= threshold (importance weighting is trusted), else 0, in the weight's dtype (Wang et al. 2017)."""
    return namespace(weight).astype(weight <= threshold, weight.dtype)


def truncate(weight: Array, threshold: float) -> Array:
    """w where w <= threshold, else 0: the weight of Switch-DR (Wang et al. 2017)."""
    xp = namespace(weight)
    return xp.where(weight <= threshold, weight, xp.zeros_like(weight))


def mask_outside(weight: Array, low: float, high: float) -> Array:
    """w where low <= w <= high, else 0: masked importance sampling (IcePop). `truncate` has no lower end."""
    xp = namespace(weight)
    return xp.where((weight >= low) & (weight <= high), weight, xp.zeros_like(weight))


def shrink(weight: Array, strength: float) -> Array:
    """L·w / (w² + L): optimistic shrinkage of DRos with L = `strength` (Su et al. 2020, eq. 10).

    Peaks at sqrt(L)/2 where w = sqrt(L). L = inf keeps w; L = 0 gives 0.
    """
    if strength == 0:
        return namespace(weight).zeros_like(weight)
    return weight / (1 + weight * weight / strength)


def saturate(weight: Array, strength: float) -> Array:
    """w / (1 - L + L·w): the harmonic, subgaussian weight, at most 1/L (Metelli et al. 2021). L = 0 keeps w."""
    xp = namespace(weight)
    divisor = 1 - strength + strength * weight
    positive = divisor > 0  # 0/0 only at L = 1 and w = 0, where the limit is 0
    return xp.where(positive, weight / xp.where(positive, divisor, xp.ones_like(divisor)), xp.zeros_like(weight))


def exp_advantage(advantage: Array, temperature: float, high: float = math.inf) -> Array:
    """exp(A / temperature), at most `high`: the weight of advantage-weighted regression (Peng et al. 2019)."""
    xp = namespace(advantage)
    exponent = as_float32(advantage) / temperature
    return xp.exp(xp.clip(exponent, None, math.log(high)))  # bounded before exp can overflow


def per_decision(log_ratios: Array, bound: float = 20.0) -> Array:
    """w_{0:t} = Π_{u<=t} w_u along the last axis from log-ratios (..., T) -> (..., T) (Precup 2000)."""
    xp = namespace(log_ratios)
    return xp.exp(xp.clip(xp.cumulative_sum(as_float32(log_ratios), axis=-1), -bound, bound))


def sequence_ratio(log_ratios: Array, mask: Array, *, length_normalized: bool, bound: float = 20.0) -> Array:
    """One ratio per sequence from token log-ratios (B, T) and mask (B, T) -> (B,).

    exp of the masked sum, or of the masked mean where `length_normalized` (GSPO, Zheng et al. 2025). No token: ratio 1.
    """
    xp = namespace(log_ratios, mask)
    same_shape(log_ratios=log_ratios, mask=mask)
    kept = as_float32(log_ratios)
    total = xp.sum(xp.where(mask, kept, xp.zeros_like(kept)), axis=-1)
    if length_normalized:
        total = total / xp.clip(xp.sum(xp.astype(mask, kept.dtype), axis=-1), 1.0, None)
    return xp.exp(xp.clip(total, -bound, bound))


def effective_sample_size(weight: Array) -> Array:
    """Kish's (Σw)² / Σw² of weights (n,) -> scalar; 0 where every weight is 0."""
    xp = namespace(weight)
    square = xp.sum(weight * weight)
    return xp.sum(weight) ** 2 / xp.where(square > 0, square, xp.ones_like(square))
