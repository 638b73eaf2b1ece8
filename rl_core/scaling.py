"""How observations are scaled for networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STD_FLOOR = 1e-3
"""Added to the spread of every observation: constant ones are then no division by 0."""


@dataclass(frozen=True)
class Scaling:
    """What observations are shifted and divided by: it travels with the policy."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, obs: Tensor) -> Scaling:
        """Of the data."""
        return cls(obs.mean(dim=0), obs.std(dim=0, correction=0) + STD_FLOOR)

    @classmethod
    def none(cls, size: int) -> Scaling:
        """That changes nothing."""
        return cls(torch.zeros(size), torch.ones(size))

    def apply(self, obs: Tensor) -> Tensor:
        """(n, S) -> (n, S)."""
        return (obs - self.mean) / self.std
