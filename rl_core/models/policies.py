"""Policies and values for learning from fresh batches: tanh layers with orthogonal starts, separate networks."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from rl_core.models.distributions import Categorical, DiagonalGaussian, Distribution
from rl_core.models.mlp import Sizes

POLICY_GAIN = 0.01
"""Of the last layer of a policy: it begins almost the same everywhere. Values: 1; hidden layers: √2, as in the baselines."""


class NormalPolicy(nn.Module):
    """A normal whose mean depends on the observation and whose spread is the same everywhere."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.body = perceptron(sizes.obs, sizes.action, sizes, POLICY_GAIN)
        self.log_std = nn.Parameter(torch.zeros(sizes.action))

    def forward(self, obs: Tensor) -> Distribution:
        """(..., S) -> actions (..., A)."""
        mean = self.body(obs)
        return DiagonalGaussian(mean, self.log_std.expand_as(mean).clone())  # a view would follow the policy when it moves on


class ChoicePolicy(nn.Module):
    """Chances of choices."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.body = perceptron(sizes.obs, sizes.action, sizes, POLICY_GAIN)

    def forward(self, obs: Tensor) -> Distribution:
        """(..., S) -> one-hot actions (..., A)."""
        return Categorical(self.body(obs))


class StateValue(nn.Module):
    """A value of observations."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.body = perceptron(sizes.obs, 1, sizes, 1.0)

    def forward(self, obs: Tensor) -> Tensor:
        """(..., S) -> (...,)."""
        found: Tensor = self.body(obs)[..., 0]
        return found


def perceptron(inputs: int, outputs: int, sizes: Sizes, gain: float) -> nn.Sequential:
    """Layers with tanh between them; weights orthogonal, biases 0."""
    widths = [inputs, *[sizes.width] * sizes.layers, outputs]
    layers: list[nn.Module] = []
    for place, (a, b) in enumerate(pairwise(widths)):
        linear = nn.Linear(a, b)
        nn.init.orthogonal_(linear.weight, gain if place == sizes.layers else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear] if place == sizes.layers else [linear, nn.Tanh()]
    return nn.Sequential(*layers)
