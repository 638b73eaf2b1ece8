"""What every family's methods return: ratios of sums, before anything is divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ope.primitives._xp import Array
from ope.primitives.reduce import divide
from ope.primitives.terms import Terms


class Loss(NamedTuple):
    """Σ_j weight_j · num_j / den_j to be maximised, before anything is divided. Denominators carry no gradient."""

    terms: tuple[Terms, ...]
    weights: tuple[float, ...]
    metrics: Mapping[str, Terms]
    """Ratios to look at, of the same kind."""
    errors: Array | None = None
    """(B,) sizes of the rows' errors, where rows are drawn by them."""


def total(found: Loss, dens: Sequence[Array] | None = None) -> Array:
    """The weighted sum of a loss's ratios, over denominators of a whole of which it is a part where they are given."""
    whole = [term.den for term in found.terms] if dens is None else dens
    first, *others = (
        weight * divide(Terms(term.num, den)) for term, weight, den in zip(found.terms, found.weights, whole, strict=True)
    )
    return sum(others, first)
