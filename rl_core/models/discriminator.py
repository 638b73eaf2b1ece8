"""A function of observation and action that is high where the expert was, and its slope, which a penalty keeps near 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ope.primitives.terms import Terms
from rl_core.families.offline import mean_of
from rl_core.models.mlp import Ensemble, Sizes


class Discriminator(nn.Module):
    """D(s, a), two hidden layers of 64 by default. Bounded: tanh of the output, which cuts the log-ratio that it learns to [-1, 1].

    Where |log e/d| > 1 the bounded one can only say ±1: it no longer tells far from farther.
    """

    def __init__(self, sizes: Sizes, *, bounded: bool = True) -> None:
        super().__init__()
        self.bounded = bounded
        self.body = Ensemble(1, sizes.obs + sizes.action, 1, sizes)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, obs), (B, action) -> (B,)."""
        found = self.body.first(torch.cat((obs, action), dim=-1))[..., 0]
        return torch.tanh(found) if self.bounded else found


def slope_penalty(
    judge: nn.Module, expert: tuple[Tensor, Tensor], policy: tuple[Tensor, Tensor], share: Tensor, to: float = 1.0
) -> Terms:
    """Mean over rows of (‖∇D(x)‖₂ - 1)², x = u·expert + (1 - u)·policy, observation and action together (WGAN-GP).

    Both sides (B, S) and (B, A); share u (B,), one per row. To be subtracted; carries D's gradient.
    """
    points = [
        (share[:, None] * ours + (1 - share)[:, None] * theirs).detach().requires_grad_()
        for ours, theirs in zip(expert, policy, strict=True)
    ]
    with torch.enable_grad():
        found = judge(*points).sum()
        slopes = torch.autograd.grad(found, points, create_graph=True, materialize_grads=True)
    return mean_of((torch.linalg.vector_norm(torch.cat(slopes, dim=-1), dim=-1) - to) ** 2)
