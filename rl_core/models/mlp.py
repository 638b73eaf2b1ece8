"""Perceptrons for control: actors, critics, and ensembles of them that run as one batched product. Actions are in [-1, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

LOG_STD = (-20.0, 2.0)
"""Bounds of a policy's log standard deviation, as in SAC's code."""


@dataclass(frozen=True)
class Sizes:
    """Dimensions of observation and action, and of hidden layers."""

    obs: int
    action: int
    width: int = 256
    layers: int = 2


class Ensemble(nn.Module):
    """`members` perceptrons with ReLU between layers, which equal as many separate ones with PyTorch's own start."""

    def __init__(self, members: int, inputs: int, outputs: int, sizes: Sizes) -> None:
        super().__init__()
        widths = [inputs, *[sizes.width] * sizes.layers, outputs]
        pairs = list(pairwise(widths))
        self.weights = nn.ParameterList(_uniform(members, a, b, fan=a) for a, b in pairs)
        self.biases = nn.ParameterList(_uniform(members, 1, b, fan=a) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs), or (members, B, inputs) -> (members, B, outputs)."""
        members = len(self.weights[0])
        x = x.expand(members, *x.shape) if x.ndim == 2 else x
        last = len(self.weights) - 1
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if weight.shape[2] == 1:  # a product with one column is slow, forward and back
                x = (x * weight.transpose(1, 2)).sum(dim=2, keepdim=True) + bias
            else:
                x = torch.baddbmm(bias, x, weight)
            x = x if place == last else functional.relu(x, inplace=True)
        return x

    def first(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs) by the first member alone."""
        last = len(self.weights) - 1
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if weight.shape[2] == 1:
                x = (x * weight[0, :, 0]).sum(dim=1, keepdim=True) + bias[0]
            else:
                x = torch.addmm(bias[0], x, weight[0])
            x = x if place == last else functional.relu(x, inplace=True)
        return x


class Critic(nn.Module):
    """Values of observations and actions by several members, the twins of TD3 by default."""

    def __init__(self, sizes: Sizes, members: int = 2) -> None:
        super().__init__()
        self.members = Ensemble(members, sizes.obs + sizes.action, 1, sizes)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, obs), (B, action) -> (members, B)."""
        found: Tensor = self.members(torch.cat((obs, action), dim=-1))[..., 0]
        return found

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B,) of the first member."""
        return self.members.first(torch.cat((obs, action), dim=-1))[..., 0]


class Value(nn.Module):
    """A value of observations."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.members = Ensemble(1, sizes.obs, 1, sizes)

    def forward(self, obs: Tensor) -> Tensor:
        """(B, obs) -> (B,)."""
        return self.members.first(obs)[..., 0]


class Deterministic(nn.Module):
    """A policy that always takes tanh of its output."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.body = Ensemble(1, sizes.obs, sizes.action, sizes)

    def forward(self, obs: Tensor) -> Tensor:
        """(B, obs) -> (B, action)."""
        return torch.tanh(self.body.first(obs))


class Gaussian(nn.Module):
    """A normal policy around tanh of its output, its spread the same everywhere; not squashed, so densities are those of what is
    drawn, not of a clipped action. It acts by its mean.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.body = Ensemble(1, sizes.obs, sizes.action, sizes)
        self.log_std = nn.Parameter(torch.zeros(sizes.action))

    def forward(self, obs: Tensor) -> Tensor:
        """(B, obs) -> (B, action), the mean."""
        return torch.tanh(self.body.first(obs))

    def logp(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B,) log densities."""
        log_std = self.log_std.clamp(*LOG_STD)
        return normal_logp(action, self(obs), log_std).sum(dim=-1)

    def draw(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(B, action) of standard normal noise -> actions and log densities (B,), both with gradients."""
        log_std = self.log_std.clamp(*LOG_STD)
        return self(obs) + log_std.exp() * noise, (-0.5 * noise**2 - log_std - HALF_LOG_2PI).sum(dim=-1)


class Squashed(nn.Module):
    """SAC's policy: tanh of a normal whose mean and spread depend on the observation."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.body = Ensemble(1, sizes.obs, 2 * sizes.action, sizes)

    def ends(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, obs) -> mean and log standard deviation before tanh, each (B, action)."""
        mean, log_std = self.body.first(obs).chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD)

    def forward(self, obs: Tensor) -> Tensor:
        """(B, obs) -> (B, action), tanh of the mean."""
        return torch.tanh(self.ends(obs)[0])

    def draw(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(B, action) of standard normal noise -> actions and log densities (B,), both with gradients."""
        mean, log_std = self.ends(obs)
        before = mean + log_std.exp() * noise
        return torch.tanh(before), squashed_logp(before, mean, log_std)

    def logp(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B,) log densities of actions, which stay 1e-6 away from the ends."""
        before = torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))
        return squashed_logp(before, *self.ends(obs))


HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def normal_logp(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Elementwise log density of a normal."""
    return -0.5 * ((x - mean) / log_std.exp()) ** 2 - log_std - HALF_LOG_2PI


def squashed_logp(before: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """(B, A) -> (B,) log density of tanh(before): finite however large (control_common: log 2 - u - softplus(-2u))."""
    change = 2 * (math.log(2) - before - functional.softplus(-2 * before))
    return (normal_logp(before, mean, log_std) - change).sum(dim=-1)


def _uniform(*shape: int, fan: int) -> nn.Parameter:
    """PyTorch's own start of a linear layer with so many inputs."""
    return nn.Parameter(torch.empty(shape).uniform_(-(fan**-0.5), fan**-0.5))


class Temperature(nn.Module):
    """What a nat of a policy's entropy is worth, α > 0: its logarithm is learned (SAC, CQL)."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self) -> Tensor:
        """() α."""
        return self.log_alpha.exp()
