"""Behaviour cloning: what was done is done again, by everyone, or by the best episodes alone (10 % BC)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ope.data import InputError
from ope.primitives.terms import Terms
from rl_core.checks import at_least, within
from rl_core.families.offline import Draw, Learner, Stage, Transitions, discounted, mean_of, numbered
from rl_core.loss import Loss
from rl_core.models.mlp import Deterministic, Gaussian, Sizes
from rl_core.paper import Paper


@dataclass(frozen=True)
class BC:
    """Pomerleau 1991; by the best episodes, Chen et al. 2021. No critic, so no lagged copy and no use of rewards but in `top`."""

    paper: ClassVar[Paper] = Paper(
        source="2106.01345",
        title="Decision Transformer: Reinforcement Learning via Sequence Modeling",
        spec="offline_common",
        equations={
            "deterministic": "-mean (π(s) - a)² over rows and dimensions",
            "stochastic": "mean log π(a|s)",
            "10 % BC": "rows of the episodes with the highest Σ γ^t r, max(1, ⌊top·episodes⌋) of them",
        },
        defaults={
            "stochastic": "CORL: no, a deterministic policy and squared errors",
            "top": "BC: everything; 10 % BC: 0.1",
            "episode_discount": "CORL: 0.99, for the order of episodes alone",
            "rate": "CORL: Adam 3e-4, batch 256",
        },
    )
    stochastic: bool = False
    top: float | None = None
    """Share of the episodes that is learned from."""
    episode_discount: float = 0.99
    """Of the returns by which episodes are ordered."""
    rate: float = 3e-4

    def __post_init__(self) -> None:
        at_least(self, 0, "rate")
        within(self, 0, 1, "episode_discount")
        if self.top is not None and not 0 < self.top <= 1:
            raise InputError(f"top: found {self.top}; expected a share above 0, at most 1, or none for all episodes")

    @property
    def tau(self) -> float:
        """Nothing lags."""
        return 0.0

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        """An actor."""
        return {"actor": Gaussian(sizes) if self.stochastic else Deterministic(sizes)}

    def lagged(self) -> tuple[str, ...]:
        """None."""
        return ()

    def stages(self) -> tuple[Stage, ...]:
        """The actor."""
        return (Stage({"actor": self.rate}, self.actor),)

    def select(self, data: Transitions) -> Tensor:
        """Numbers (m,) of the rows of the best episodes, in their order; of all rows without `top`."""
        if self.top is None:
            return torch.arange(len(data), device=data.reward.device)
        episode = numbered(data)
        earned = discounted(data.reward, episode, self.episode_discount)
        count = max(1, int(self.top * len(earned) + 1e-9))  # 0.29·100 is 28.99...
        best = earned.argsort(descending=True, stable=True)[:count]
        return torch.isin(episode, best).nonzero()[:, 0]

    def actor(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """How close the policy is to what was done."""
        policy = learner.nets["actor"]
        if self.stochastic:
            found = mean_of(policy.logp(batch.obs, batch.action))
            return Loss((found,), (1.0,), {"logp": Terms(found.num.detach(), found.den)})
        apart = (policy(batch.obs) - batch.action) ** 2
        distance = Terms(apart.sum(), apart.new_full((), float(apart.numel())))
        return Loss((distance,), (-1.0,), {"apart": Terms(distance.num.detach(), distance.den)})
