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


def group_center(reward: Array, group: Array, mask: Array) -> Array:
    """r - mean of the row's group, over rows that count. (B,) -> (B,). GRPO's centring (Shao et al. 2024).

    Labels `group` (B,) are arbitrary; memory is B². Rows masked out, and rows alone in their group, give 0.
    """
    xp = namespace(reward, group, mask)
    total, count = _others(reward, group, mask)
    return xp.where(mask, reward - total / xp.clip(count, 1.0, None), xp.zeros_like(reward))


def leave_one_out(reward: Array, group: Array, mask: Array) -> Array:
    """r - mean of the *other* rows of the group. (B,) -> (B,). RLOO (Ahmadian et al. 2024).

    Equals group_center · m/(m - 1) for a group of m rows. Rows masked out, and rows alone in their group, give 0.
    """
    xp = namespace(reward, group, mask)
    total, count = _others(reward, group, mask)
    centred = reward - (total - reward) / xp.clip(count - 1, 1.0, None)
    return xp.where(mask & (count > 1), centred, xp.zeros_like(reward))


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
