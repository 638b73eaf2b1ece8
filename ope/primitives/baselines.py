"""What is subtracted from a reward without moving the expectation: group means, leave-one-out means, a best constant."""

from __future__ import annotations

from ope.primitives._xp import Array, namespace, same_shape


def _segments(reward: Array, group: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Rows sorted by group, in each the counted ones last, by reward; first and last + 1 place of each row's group. (B,) each."""
    xp = namespace(reward, group, mask)
    same_shape(reward=reward, group=group, mask=mask)
    order = xp.argsort(reward, stable=True)
    for key in (xp.astype(mask, xp.int64), group):
        order = xp.take(order, xp.argsort(xp.take(key, order), stable=True))
    labels = xp.take(group, order)
    return order, xp.searchsorted(labels, group, side="left"), xp.searchsorted(labels, group, side="right")


def _sums(values: Array, mask: Array, segments: tuple[Array, Array, Array]) -> Array:
    """Σ of the counted values in each row's group, in float64: a difference of long sums must not lose digits. (B,) -> (B,)."""
    xp = namespace(values, mask)
    order, first, last = segments
    kept = xp.take(xp.astype(xp.where(mask, values, xp.zeros_like(values)), xp.float64), order)
    running = xp.concat((xp.zeros_like(kept[:1]), xp.cumulative_sum(kept)))
    return xp.astype(xp.take(running, last) - xp.take(running, first), values.dtype)


def _counts(like: Array, mask: Array, segments: tuple[Array, Array, Array]) -> Array:
    """Counted rows of each row's group, as numbers like those. (B,)."""
    return _sums(namespace(like).ones_like(like), mask, segments)


def _highest(reward: Array, mask: Array, segments: tuple[Array, Array, Array]) -> Array:
    """The highest counted reward of each row's group, 0 where none counts. (B,)."""
    xp = namespace(reward, mask)
    order, _, last = segments
    return xp.take(xp.take(xp.where(mask, reward, xp.zeros_like(reward)), order), last - 1)


def _centred(reward: Array, group: Array, mask: Array) -> tuple[Array, Array]:
    """r - mean of the row's group over rows that count, exactly 0 for equal ones; and how many count. (B,) -> (B,), (B,)."""
    xp = namespace(reward, group, mask)
    segments = _segments(reward, group, mask)
    count = _counts(reward, mask, segments)
    below = xp.where(mask, reward - _highest(reward, mask, segments), xp.zeros_like(reward))  # a rounded mean would leave a rest
    mean = _sums(below, mask, segments) / xp.clip(count, 1.0, None)
    return xp.where(mask, below - mean, xp.zeros_like(reward)), count


def group_center(reward: Array, group: Array, mask: Array) -> Array:
    """r - mean of the row's group, over rows that count. (B,) -> (B,). GRPO's centring (Shao et al. 2024).

    Labels `group` (B,) are arbitrary. Rows masked out, rows alone in their group, and equal rewards give exactly 0.
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
    centred, count = _centred(reward, group, mask)
    square = _sums(centred * centred, mask, _segments(reward, group, mask))
    varies = mask & (square > 0)  # the root of 0 has no gradient
    std = xp.sqrt(xp.where(varies, square / xp.clip(count - 1 if unbiased else count, 1.0, None), xp.ones_like(square)))
    return xp.where(varies, std, xp.zeros_like(std))


def weighted_group_center(reward: Array, weight: Array, group: Array, mask: Array) -> Array:
    """r - Σwr/Σw of the row's group. (B,) -> (B,). With w = π/μ its policy gradient is that of SNIPS. Yao et al. 2025.

    A group whose weights are all 0 keeps its rewards.
    """
    xp = namespace(reward, weight, group, mask)
    same_shape(reward=reward, weight=weight)
    segments = _segments(reward, group, mask)
    total, mass = _sums(weight * reward, mask, segments), _sums(weight, mask, segments)
    mean = total / xp.where(mass != 0, mass, xp.ones_like(mass))
    return xp.where(mask, reward - mean, xp.zeros_like(reward))


def group_soft_value(reward: Array, group: Array, mask: Array, temperature: float) -> Array:
    """τ·log(mean of exp(r/τ)) of the row's group, the value of the KL-regularised optimum. (B,) -> (B,). Rows masked out: 0."""
    xp = namespace(reward, group, mask)
    segments = _segments(reward, group, mask)
    high, count = _highest(reward, mask, segments), _counts(reward, mask, segments)
    below = xp.where(mask, (reward - high) / temperature, xp.zeros_like(reward))  # at most 0: the exponents stay finite
    mean = _sums(xp.exp(below), mask, segments) / xp.clip(count, 1.0, None)
    soft = high + temperature * xp.log(xp.where(mask, mean, xp.ones_like(mean)))
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
