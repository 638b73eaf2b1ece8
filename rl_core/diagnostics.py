"""What every trainer writes down of a step: how far the sampler is, how the tails are, what the policy does."""

from __future__ import annotations

import torch
from torch import Tensor

from ope.primitives.weights import effective_sample_size, log_ratio


@torch.no_grad()
def step_metrics(logp: Tensor, entropy: Tensor, behavior: Tensor, mask: Tensor, reward: Tensor, group: Tensor) -> dict[str, float]:
    """Means over the counted tokens of a step, and the effective share of its weights. (B, T) and (B,).

    `ess`: (Σw)² / (n Σw²) of token ratios, `ess_sequence` of whole responses; `kl_behavior`: k1 of the sampler to the current
    policy; `chi2`: mean of w² less one; `mean_weight`: near one where propensities are right; `flat_groups`: share of prompts whose
    responses all have one reward.
    """
    logs = torch.where(mask, log_ratio(logp, behavior), 0.0)
    weight, whole = logs[mask].exp(), logs.sum(dim=1).clip(-20, 20).exp()
    found = {
        "reward": reward.float().mean(),
        "length": mask.sum(dim=1).float().mean(),
        "entropy": entropy[mask].mean(),
        "ess": effective_sample_size(weight) / len(weight),
        "ess_sequence": effective_sample_size(whole) / len(whole),
        "mean_weight": weight.mean(),
        "weight_max": weight.max(),
        "chi2": (weight**2).mean() - 1,
        "kl_behavior": -logs[mask].mean(),
        "flat_groups": (reward_range(reward, group)[0] == 0).float().mean(),
    }
    return {name: float(value) for name, value in found.items()}


def reward_range(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Highest less lowest reward of each prompt (G,), and which prompt each response (B,) is of. Where it is 0, none is better."""
    labels, place = torch.unique(group, return_inverse=True)
    highest, lowest = (
        torch.zeros(len(labels)).scatter_reduce(0, place, reward.float(), how, include_self=False) for how in ("amax", "amin")
    )
    return highest - lowest, place
