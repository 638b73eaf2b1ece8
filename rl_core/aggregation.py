"""How token values become one number: what weighs the same. The field's names for it stand in each docstring."""

from __future__ import annotations

from dataclasses import dataclass

from ope.primitives._xp import Array
from ope.primitives.reduce import reduce_terms
from ope.primitives.terms import Terms


@dataclass(frozen=True)
class TokenMean:
    """token-mean: every token weighs the same (DAPO)."""

    def terms(self, values: Array, mask: Array) -> Terms:
        """(B, T) -> scalars."""
        return reduce_terms(values, mask, scope="token")


@dataclass(frozen=True)
class SequenceMean:
    """seq-mean-token-mean: every sequence weighs the same, by its mean (GRPO's paper, GSPO)."""

    def terms(self, values: Array, mask: Array) -> Terms:
        """(B, T) -> scalars."""
        return reduce_terms(values, mask, scope="sequence")


@dataclass(frozen=True)
class SequenceSum:
    """seq-mean-token-sum: every sequence by its sum, the log-likelihood of whole responses (RLOO)."""

    def terms(self, values: Array, mask: Array) -> Terms:
        """(B, T) -> scalars."""
        return reduce_terms(values, mask, scope="sequence_sum")


@dataclass(frozen=True)
class SequenceSumNorm:
    """seq-mean-token-sum-norm: every sequence by its sum over one constant length (Dr.GRPO)."""

    length: float

    def terms(self, values: Array, mask: Array) -> Terms:
        """(B, T) -> scalars."""
        return reduce_terms(values, mask, scope="sequence_sum", length=self.length)


Aggregation = TokenMean | SequenceMean | SequenceSum | SequenceSumNorm
