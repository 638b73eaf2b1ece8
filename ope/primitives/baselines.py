"""What is subtracted from a reward without moving the expectation: group means, leave-one-out means, a best constant."""

from __future__ import annotations

from ope.primitives._xp import Array, namespace, same_shape


def _others(reward: Array, group: Array, mask: Array) -> tuple[Array, Array]:
    """Sum and count of the counted rewards in each row's group, the row itself included. (B,) -> (B,), (B,)."""
    xp = namespace(reward, group, mask)
    same_shape(reward=reward, group=group, mask=mask)
    kept = xp.where(mask, reward, xp.zeros_like(reward))
    mates = xp.astype(group[:, None] == group[None, :], reward.dtype)  # labels are compared, never used as indices
    return mates @ kept, mates @ xp.astype(mask, reward.dtype)


def _centred(reward: Array, group: Array, mask: Array) -> tuple[Array, Array]:
    """r - mean of the row's group over rows that count, exactly 0 for equal ones; and how many count. (B,) -> (B,), (B,)."""
    xp = namespace(reward, group, mask)
    same_shape(reward=reward, group=group, mask=mask)
    kept = xp.where(mask, reward, xp.zeros_like(reward))
    mates = xp.astype((group[:, None] == group[None, :]) & mask[None, :], reward.dtype)
    count = xp.sum(mates, axis=-1)
    gaps = xp.sum(mates * (kept[:, None] - kept[None, :]), axis=-1)  # a mean of differences: a rounded mean would leave a rest
    return xp.where(mask, gaps / xp.clip(count, 1.0, None), xp.zeros_like(reward)), count


def group_center(reward: Array, group: Array, mask: Array) -> Array:
    """r - mean of the row's group, over rows that count. (B,) -> (B,). GRPO's centring (Shao et al. 2024).

    Labels `group` (B,) are arbitrary; memory is B². Rows masked out, rows alone in their group, and equal rewards give exactly 0.
    """
    return _centred(reward, group, mask)[0]


def leave_one_out(reward: Array, group: Array, mask: Array) -> Array:
    """r - mean of the *other* rows of the group. (B,) -> (B,). RLOO (Ahmadian et al. 2024).

    group_center · m/(m - 1) for a group of m rows. Rows masked out, and rows alone in their group, give 0.
    """
    centred, count = _centred(reward, group, mask)
    xp = namespace(centred)
    return centred * (count / xp.clip(count - 1, 1.0, None))


def group_std(reward: Array, group: Array, mask: Array, *, unbiased: bool) -> Array:
    """Standard deviation of the rewards in each row's group, over m - 1 or over m. (B,) -> (B,). 0 where there is one row alone."""
    xp = namespace(reward, group, mask)
    centred = group_center(reward, group, mask)
    square, count = _others(centred * centred, group, mask)
    varies = mask & (square > 0)  # the root of 0 has no gradient
    std = xp.sqrt(xp.where(varies, square / xp.clip(count - 1 if unbiased else count, 1.0, None), xp.ones_like(square)))
    return xp.where(varies, std, xp.zeros_like(std))


def weighted_group_center(reward: Array, weight: Array, group: Array, mask: Array) -> Array:
    """r - Σwr/Σw of the row's group. (B,) -> (B,). With w = π/μ its policy gradient is that of SNIPS. Yao et al. 2025.

    A group whose weights are all 0 keeps its rewards.
    """
    xp = namespace(reward, weight, group, mask)
    same_shape(reward=reward, weight=weight)
    total, _ = _others(weight * reward, group, mask)
    mass, _ = _others(weight, group, mask)
    mean = total / xp.where(mass != 0, mass, xp.ones_like(mass))
    return xp.where(mask, reward - mean, xp.zeros_like(reward))


def group_soft_value(reward: Array, group: Array, mask: Array, temperature: float) -> Array:
    """τ·log(mean of exp(r/τ)) of the row's group, the value of the KL-regularised optimum. (B,) -> (B,). Rows masked out: 0."""
    xp = namespace(reward, group, mask)
    same_shape(reward=reward, group=group, mask=mask)
    mates = (group[:, None] == group[None, :]) & mask[None, :]
    theirs = xp.where(mates, reward[None, :] / temperature, xp.full_like(reward, -xp.inf)[None, :])
    high = xp.max(theirs, axis=-1)
    high = xp.where(xp.isfinite(high), high, xp.zeros_like(high))  # the exponents stay finite
    count = xp.sum(xp.astype(mates, reward.dtype), axis=-1)
    mean = xp.sum(xp.exp(theirs - high[:, None]), axis=-1) / xp.clip(count, 1.0, None)
    soft = temperature * (high + xp.log(xp.where(mask, mean, xp.ones_like(mean))))
    return xp.where(mask, soft, xp.zeros_like(soft))


def weights_vary(w: Array, w2: Array) -> Array:
    """True where the means of w and w² show a variance that is more than rounding: over half of its digits survive."""
    xp = namespace(w, w2)
    same_shape(w=w, w2=w2)
    return w2 - w * w > xp.finfo(w2.dtype).eps ** 0.5 * w2


def optimal_control_variate(w: Array, wr: Array, w2: Array, w2r: Array) -> Array:
    """b = cov(w, w·r) / var(w) from the means of w, w·r, w², w²·r (any one shape): minimises var(w·r - b·w).

    Gupta et al. 2024 in covariance form. Where the weights do not vary, b = 0.
    """
    xp = namespace(w, wr, w2, w2r)
    same_shape(w=w, wr=wr, w2=w2, w2r=w2r)
    vary, variance = weights_vary(w, w2), w2 - w * w
    return xp.where(vary, (w2r - w * wr) / xp.where(vary, variance, xp.ones_like(variance)), xp.zeros_like(variance))
