"""Distributions of actions for policies that are learned from what they sampled: densities, entropies and KL in closed form.

A choice among k is an action too, a one-hot row of k numbers: so environments, batches and buffers know one kind of action.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ope.primitives import divergences
from rl_core.families.offline import Draw
from rl_core.models.mlp import HALF_LOG_2PI, normal_logp


class Distribution(Protocol):
    """Of one action per row of observations (...,)."""

    def logp(self, action: Tensor) -> Tensor:
        """(..., A) -> (...,) log density."""
        ...

    def entropy(self) -> Tensor:
        """(...,) in nats."""
        ...

    def kl(self, other: Any) -> Tensor:
        """(...,) KL(self‖other), exact; the other of the same kind."""
        ...

    def sample(self, draw: Draw) -> Tensor:
        """(..., A)."""
        ...

    def mode(self) -> Tensor:
        """(..., A) what is likeliest: how a policy acts where nobody explores."""
        ...

    def rows(self, which: Any) -> Any:
        """Of some rows."""
        ...


@dataclass(frozen=True)
class DiagonalGaussian:
    """Normal and independent in every dimension; neither squashed nor clipped, so the density is that of what was drawn."""

    mean: Tensor
    """(..., A)."""
    log_std: Tensor
    """(..., A)."""

    def logp(self, action: Tensor) -> Tensor:
        """(..., A) -> (...,) log density."""
        return normal_logp(action, self.mean, self.log_std).sum(dim=-1)

    def entropy(self) -> Tensor:
        """(...,) Σ_j log σ_j + ½ log 2πe."""
        return (self.log_std + HALF_LOG_2PI + 0.5).sum(dim=-1)

    def kl(self, other: DiagonalGaussian) -> Tensor:
        """(...,) KL(self‖other)."""
        return divergences.gaussian_kl(self.mean, self.log_std, other.mean, other.log_std)  # type: ignore[no-any-return]

    def sample(self, draw: Draw) -> Tensor:
        """(..., A)."""
        return self.mean + self.log_std.exp() * draw.normal(*self.mean.shape)

    def mode(self) -> Tensor:
        """(..., A)."""
        return self.mean

    def rows(self, which: Any) -> DiagonalGaussian:
        """Of some rows."""
        return DiagonalGaussian(self.mean[which], self.log_std[which])


@dataclass(frozen=True)
class Categorical:
    """A choice among k, as one-hot rows."""

    logits: Tensor
    """(..., k)."""

    def logp(self, action: Tensor) -> Tensor:
        """(..., k) one-hot -> (...,) log-probability."""
        return (torch.log_softmax(self.logits, dim=-1) * action).sum(dim=-1)

    def entropy(self) -> Tensor:
        """(...,)."""
        return divergences.entropy(torch.softmax(self.logits, dim=-1))  # type: ignore[no-any-return]

    def kl(self, other: Categorical) -> Tensor:
        """(...,) KL(self‖other) = Σ p(log(p/q) - 1) + q: at equality value and gradient are 0 to the bit, however they are weighed.

        From log-probabilities, so that those of unlikely choices do not round to 0.
        """
        own, others = torch.log_softmax(self.logits, dim=-1), torch.log_softmax(other.logits, dim=-1)
        return (own.exp() * (own - others - 1) + others.exp()).sum(dim=-1)

    def sample(self, draw: Draw) -> Tensor:
        """(..., k) one-hot, by the inverse of the running sum of the chances."""
        chance = torch.softmax(self.logits, dim=-1)
        below = chance.cumsum(dim=-1)[..., :-1] <= draw.uniform(*chance.shape[:-1])[..., None]
        return self._one_hot(below.sum(dim=-1))

    def mode(self) -> Tensor:
        """(..., k) one-hot."""
        return self._one_hot(self.logits.argmax(dim=-1))

    def rows(self, which: Any) -> Categorical:
        """Of some rows."""
        return Categorical(self.logits[which])

    def _one_hot(self, index: Tensor) -> Tensor:
        return functional.one_hot(index, self.logits.shape[-1]).to(self.logits.dtype)
