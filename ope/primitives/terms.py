"""Per-row term columns (n, d) of which an estimator is a smooth function of the means, and `Terms` for losses.

A transformed weight goes in where a weight does: `ips(clip(w, high=10), r)` is clipped IPS, `dr(shrink(w, 10), ...)` is DRos.
"""

from __future__ import annotations

from typing import NamedTuple

from ope.primitives._xp import Array, namespace, same_shape


class Terms(NamedTuple):
    """A ratio before it is divided: numerator and denominator, per row or summed. Machines add both, then divide."""

    num: Array
    den: Array


def dm(v: Array) -> Array:
    """Column (v) of the direct method, v = Σ_a π(a|x) q(x, a). (n,) -> (n, 1)."""
    return v[..., None]


def ips(weight: Array, reward: Array) -> Array:
    """Column (w·r) of inverse propensity scoring. (n,) -> (n, 1). Horvitz & Thompson 1952."""
    same_shape(weight=weight, reward=reward)
    return (weight * reward)[..., None]


def snips(weight: Array, reward: Array) -> Array:
    """Columns (w·r, w) of self-normalised IPS. (n,) -> (n, 2). Swaminathan & Joachims 2015, eq. 6."""
    xp = namespace(weight, reward)
    same_shape(weight=weight, reward=reward)
    return xp.stack((weight * reward, weight), axis=-1)


def control_variate(weight: Array, reward: Array) -> Array:
    """Columns (w, w·r, w², w²·r): the sums that fix the best constant baseline. (n,) -> (n, 4). Gupta et al. 2024.

    With w = π/p these are beta-IPS's; with w = (π - ρ)/p they are Delta-OPE's (Jeunen & Ustimenko 2024).
    """
    xp = namespace(weight, reward)
    same_shape(weight=weight, reward=reward)
    weighted = weight * reward
    return xp.stack((weight, weighted, weight * weight, weight * weighted), axis=-1)


def dr(weight: Array, reward: Array, q_logged: Array, v: Array) -> Array:
    """Column (v + w·(r - q)) of the doubly robust estimator. All (n,) -> (n, 1). Dudik et al. 2011, eq. 2."""
    same_shape(weight=weight, reward=reward, q_logged=q_logged, v=v)
    return (v + weight * (reward - q_logged))[..., None]


def sndr(weight: Array, reward: Array, q_logged: Array, v: Array) -> Array:
    """Columns (v, w·(r - q), w) of self-normalised doubly robust. All (n,) -> (n, 3). Thomas & Brunskill 2016."""
    xp = namespace(weight, reward, q_logged, v)
    same_shape(weight=weight, reward=reward, q_logged=q_logged, v=v)
    return xp.stack((v, weight * (reward - q_logged), weight), axis=-1)


def log_smoothing(weight: Array, reward: Array, strength: float) -> Array:
    """Column (log(1 + l·w·r) / l) with l = `strength`, r >= 0. (n,) -> (n, 1). Sakhi et al. 2024; l -> 0 gives IPS."""
    xp = namespace(weight, reward)
    same_shape(weight=weight, reward=reward)
    return (xp.log1p(strength * weight * reward) / strength)[..., None]


def implicit_exploration(target_propensity: Array, propensity: Array, reward: Array, floor: float) -> Array:
    """Column (π/(p + g)·r) with g = `floor`. All (n,) -> (n, 1). Gabbianelli et al. 2024; g = 0 gives IPS."""
    same_shape(target_propensity=target_propensity, propensity=propensity, reward=reward)
    return (target_propensity / (propensity + floor) * reward)[..., None]
