"""How policies act that collect data for themselves, and with which densities: normal noise around an action, cut to [-1, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rl_core.buffers import UNKNOWN
from rl_core.families.offline import Draw


def noisy(mean: Tensor, noise: float, draw: Draw) -> tuple[Tensor, Tensor]:
    """What a policy takes (B, A) with normal noise of a spread, as TD3 does, and the log densities (B,)."""
    action = (mean + noise * draw.normal(*mean.shape)).clamp(-1, 1)
    return action, log_density(mean, action, noise)


def log_density(mean: Tensor, action: Tensor, noise: float) -> Tensor:
    """(B,) of noisy actions (B, A). NaN where one was cut: the ends are drawn with a mass, which no density tells."""
    found = (-0.5 * ((action - mean) / noise) ** 2 - math.log(noise * math.sqrt(2 * math.pi))).sum(dim=1)
    return known_inside(action, found)


def cut(action: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    """Draws of a policy (B, A), cut to [-1, 1], and their log densities (B,) where none is at an end.

    A squashed draw may be there, too: tanh of 10 is 1 in single precision, of which the density was not.
    """
    action = action.clamp(-1, 1)
    return action, known_inside(action, logp)


def known_inside(action: Tensor, logp: Tensor) -> Tensor:
    """(B,) log densities of actions (B, A) of which none is at an end; NaN for others."""
    return torch.where((action.abs() < 1).all(dim=1), logp, torch.full_like(logp, UNKNOWN))
