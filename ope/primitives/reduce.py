"""From rows to one number: masked sums, explicit denominators, and a division that waits for every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ope.primitives._xp import Array, as_float32, namespace, same_shape
from ope.primitives.terms import Terms

Scope = Literal["token", "sequence", "sequence_sum"]
"""What weighs the same in a mean over tokens."""


def masked_sum(values: Array, mask: Array, axis: int | None = None) -> Array:
    """Σ of `values` where `mask` is True. What is masked out may be anything, NaN included."""
    xp = namespace(values, mask)
    same_shape(values=values, mask=mask)
    return xp.sum(xp.where(mask, values, xp.zeros_like(values)), axis=axis)


def reduce_terms(values: Array, mask: Array, *, scope: Scope, length: float | None = None) -> Terms:
    """Numerator and denominator of a masked mean of token values (B, T), each a scalar.

    "token": every counted token weighs the same. "sequence": every sequence with a counted token weighs the same, each by its mean.
    "sequence_sum": each by its sum, over `length` where one is given. Which one is meant changes results more than most methods do,
    so it is never a default.
    """
    xp = namespace(values, mask)
    values = as_float32(values)  # bfloat16 cannot count beyond 256
    count = xp.sum(xp.astype(mask, values.dtype), axis=-1)
    total = masked_sum(values, mask, axis=-1)
    if scope == "token":
        return Terms(xp.sum(total), xp.sum(count))
    sequences = xp.sum(xp.astype(count > 0, values.dtype))
    if scope == "sequence":
        return Terms(xp.sum(total / xp.clip(count, 1.0, None)), sequences)
    if scope == "sequence_sum":
        return Terms(xp.sum(total) / (1.0 if length is None else length), sequences)
    raise ValueError(f"found scope {scope!r}, expected 'token', 'sequence' or 'sequence_sum'")


def divide(terms: Terms, all_sum: Callable[[Array], Array] = lambda x: x) -> Array:
    """num / den after `all_sum` added each over machines: sums are exact where averages of averages are not.

    An empty denominator gives 0, so that a batch without a counted row changes nothing.
    """
    xp = namespace(terms.num, terms.den)
    same_shape(num=terms.num, den=terms.den)
    num, den = all_sum(terms.num), all_sum(terms.den)
    counted = den != 0
    return xp.where(counted, num / xp.where(counted, den, xp.ones_like(den)), xp.zeros_like(num))
