"""TD3: twin critics of which the lower counts, smoothed targets, an actor that learns half as often. Others build on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rl_core.checks import above, at_least, within
from rl_core.exploration import noisy
from rl_core.families.offline import Draw, Learner, Stage, StageLoss, Transitions, backup, fitted, mean_of
from rl_core.loss import Loss
from rl_core.models.mlp import Critic, Deterministic, Sizes
from rl_core.paper import Paper


@dataclass(frozen=True)
class Twin:
    """Settings of the twin critics, and of how often the actor follows them."""

    discount: float = 0.99
    tau: float = 0.005
    noise: float = 0.2
    """Spread of the noise on the target policy's action."""
    noise_clip: float = 0.5
    actor_every: int = 2
    actor_rate: float = 3e-4
    critic_rate: float = 3e-4

    def __post_init__(self) -> None:
        within(self, 0, 1, "discount", "tau")
        at_least(self, 0, "noise", "noise_clip", "actor_rate", "critic_rate")
        at_least(self, 1, "actor_every")


ORIGINS: Mapping[str, str] = {
    "twin": "paper and code: discount 0.99, tau 0.005, noise 0.2 cut at 0.5, the actor every second step, Adam 3e-4",
}

EXPLORATION = "paper and code: normal noise of 0.1 around the action, for collecting alone"


@dataclass(frozen=True)
class TD3:
    """Fujimoto et al. 2018."""

    paper: ClassVar[Paper] = Paper(
        source="1802.09477",
        title="Addressing Function Approximation Error in Actor-Critic Methods",
        spec="offline_common",
        equations={
            "target": "y = r + γ(1 - terminated)·min_j Q̄_j(s', clip(π̄(s') + clip(σε, ±c), ±1))",
            "critic": "-Σ_j mean (Q_j(s, a) - y)²",
            "actor": "mean Q_1(s, π(s))",
        },
        defaults={**ORIGINS, "exploration": EXPLORATION},
    )
    twin: Twin = Twin()
    exploration: float = 0.1
    """Spread of the noise with which it collects."""

    def __post_init__(self) -> None:
        above(self, 0, "exploration")

    @property
    def tau(self) -> float:
        """Share of the way that lagged copies move."""
        return self.twin.tau

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        """An actor and twin critics."""
        return twin_networks(sizes)

    def lagged(self) -> tuple[str, ...]:
        """Both."""
        return "actor", "critic"

    def stages(self) -> tuple[Stage, ...]:
        """The critic; every second step the actor, and the copies."""
        return twin_stages(self.twin, actor)

    def explore(self, learner: Learner, obs: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """What the policy takes, with noise."""
        return noisy(learner.nets["actor"](obs), self.exploration, draw)


def actor(learner: Learner, batch: Transitions, draw: Draw) -> Loss:
    """The first critic's value of what the policy does."""
    return Loss((mean_of(learner.nets["critic"].first(batch.obs, learner.nets["actor"](batch.obs))),), (1.0,), {})


def twin_networks(sizes: Sizes) -> Mapping[str, nn.Module]:
    """An actor and twin critics."""
    return {"actor": Deterministic(sizes), "critic": Critic(sizes)}


def twin_stages(twin: Twin, actor_loss: StageLoss) -> tuple[Stage, ...]:
    """TD3's step around any objective of the actor."""
    return (
        Stage({"critic": twin.critic_rate}, lambda learner, batch, draw: critic(learner, batch, draw, twin)),
        Stage({"actor": twin.actor_rate}, actor_loss, every=twin.actor_every, follows=("actor", "critic")),
    )


def critic(learner: Learner, batch: Transitions, draw: Draw, twin: Twin) -> Loss:
    """Squared errors of both critics, and their mean value to look at."""
    with torch.no_grad():
        wanted = backup(batch, target(learner, batch, draw, twin), twin.discount)
    found = learner.nets["critic"](batch.obs, batch.action)
    return fitted(found, wanted, batch)


def target(learner: Learner, batch: Transitions, draw: Draw, twin: Twin) -> Tensor:
    """(B,) the lower of the lagged twins' values of the lagged policy's action, smoothed."""
    noise = (twin.noise * draw.normal(*batch.action.shape)).clamp(-twin.noise_clip, twin.noise_clip)
    action = (learner.lagged["actor"](batch.next_obs) + noise).clamp(-1, 1)
    lowest: Tensor = learner.lagged["critic"](batch.next_obs, action).amin(dim=0)
    return lowest
