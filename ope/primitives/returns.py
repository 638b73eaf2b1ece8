"""Sums over the rest of a trajectory, all by one reverse recurrence y_t = x_t + f_t·y_{t+1} along the last axis.

`terminated`: nothing is worth anything after this step. `truncated`: the trajectory was only cut, so that the value of the next
state counts and what the array holds next does not. Rows after an end belong to another trajectory, or to none.
"""

from __future__ import annotations

from ope.primitives._xp import Array, namespace, same_shape


def reverse_sum(first: Array, factor: Array) -> Array:
    """y_t = x_t + f_t·y_{t+1} with y beyond the end 0. (..., T), (..., T) -> (..., T)."""
    xp = namespace(first, factor)
    same_shape(first=first, factor=factor)
    found, after = [], xp.zeros_like(first[..., 0])
    for t in reversed(range(first.shape[-1])):
        after = first[..., t] + factor[..., t] * after
        found.append(after)
    return xp.stack(found[::-1], axis=-1)


def discounted(reward: Array, ended: Array, discount: float) -> Array:
    """Σ_u discount^u r_{t+u} up to the end of the trajectory. (..., T) -> (..., T)."""
    return reverse_sum(reward, discount * _goes_on(reward, ended))


def temporal_difference(reward: Array, value: Array, next_value: Array, terminated: Array, discount: float) -> Array:
    """δ_t = r_t + discount·V(s_{t+1}) - V(s_t), without the next value where the trajectory terminated. Any one shape."""
    same_shape(reward=reward, value=value, next_value=next_value, terminated=terminated)
    xp = namespace(reward)
    return reward + discount * xp.where(terminated, xp.zeros_like(next_value), next_value) - value


def gae(
    reward: Array, value: Array, next_value: Array, terminated: Array, truncated: Array, discount: float, lambda_: float
) -> Array:
    """Advantage Σ_u (discount·λ)^u δ_{t+u}. All (..., T) -> (..., T). Schulman et al. 2016, eq. 16.

    Plus `value` it is the λ-return; λ = 1 gives discounted returns minus `value`, λ = 0 the temporal difference.
    """
    delta = temporal_difference(reward, value, next_value, terminated, discount)
    return reverse_sum(delta, discount * lambda_ * _goes_on(delta, terminated | truncated))


def vtrace(
    ratio: Array,
    reward: Array,
    value: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    discount: float,
    rho_max: float = 1.0,
    c_max: float = 1.0,
) -> Array:
    """Value targets V + Σ_u discount^u (Π c) min(ρ, rho_max) δ. All (..., T) -> (..., T). Espeholt et al. 2018, eq. 1.

    On-policy, and with bounds of at least 1, the λ-return with λ = 1.
    """
    xp = namespace(ratio, reward)
    delta = xp.clip(ratio, None, rho_max) * temporal_difference(reward, value, next_value, terminated, discount)
    trace = discount * xp.clip(ratio, None, c_max) * _goes_on(delta, terminated | truncated)
    return value + reverse_sum(delta, trace)


def retrace(
    ratio: Array,
    reward: Array,
    q: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    discount: float,
    lambda_: float = 1.0,
) -> Array:
    """Targets of Q(s_t, a_t): Q + Σ_u discount^u (Π_{s=t+1}^{t+u} λ·min(1, ρ_s)) δ. All (..., T). Munos et al. 2016, eq. 3-4.

    `next_value`: the target policy's mean of Q at the next state. The ratio of step t does not weigh its own δ.
    """
    xp = namespace(ratio, reward)
    delta = temporal_difference(reward, q, next_value, terminated, discount)
    trace = lambda_ * xp.clip(ratio, None, 1.0)
    following = xp.concat((trace[..., 1:], xp.zeros_like(trace[..., :1])), axis=-1)
    return q + reverse_sum(delta, discount * following * _goes_on(delta, terminated | truncated))


def _goes_on(like: Array, ended: Array) -> Array:
    """1 where the trajectory goes on after a step, else 0."""
    xp = namespace(like, ended)
    same_shape(values=like, ended=ended)
    return xp.where(ended, xp.zeros_like(like), xp.ones_like(like))
