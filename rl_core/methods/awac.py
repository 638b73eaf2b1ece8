"""AWAC: a policy of logged actions, weighed by how much better each is than one that the policy itself draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ope.primitives.weights import exp_advantage
from rl_core.checks import above, at_least, within
from rl_core.exploration import cut
from rl_core.families.offline import Draw, Learner, Stage, Transitions, backup, fitted, mean_of
from rl_core.loss import Loss
from rl_core.models.mlp import Critic, Gaussian, Sizes
from rl_core.paper import Paper


@dataclass(frozen=True)
class AWAC:
    """Nair et al. 2020, after CORL."""

    paper: ClassVar[Paper] = Paper(
        source="2006.09359",
        title="AWAC: Accelerating Online Reinforcement Learning with Offline Datasets",
        spec="offline_common",
        equations={
            "critic": "-Σ_j mean (Q_j(s, a) - r - γ(1 - terminated)·min_j Q̄_j(s', a'))², a' ~ π(·|s')",
            "advantage": "A = min_j Q_j(s, a) - min_j Q_j(s, ã), one ã ~ π(·|s), the critics after their step",
            "capped": "w = min(exp(A/temperature), cap)",
            "softmax": "w = B·softmax of A/temperature over the batch",
            "actor": "mean w·log π(a|s)",
        },
        defaults={
            "temperature": "CORL's configurations: 1/3, its class 1; d3rlpy: 1",
            "cap": "CORL: 100; d3rlpy has none",
            "weights": "CORL: capped; d3rlpy: softmax",
            "discount": "CORL and d3rlpy: 0.99",
            "tau": "CORL and d3rlpy: 0.005",
            "actor_rate": "CORL and d3rlpy: Adam 3e-4, d3rlpy's with weight decay 1e-4",
            "critic_rate": "CORL and d3rlpy: Adam 3e-4",
        },
        differs={
            "softmax": "d3rlpy sums over its batch of 1024, which multiplies the gradient by that; here a mean",
            "the policy's mean": "CORL's is any number, and draws are clamped to ±1; here tanh of it, and draws are clamped",
            "networks": "CORL 3 hidden layers of 256, d3rlpy 4; here the schedule says",
        },
    )
    temperature: float = 1 / 3
    """λ of the paper."""
    cap: float = 100.0
    """Of a weight, where weights are capped."""
    weights: Literal["capped", "softmax"] = "capped"
    discount: float = 0.99
    tau: float = 0.005
    actor_rate: float = 3e-4
    critic_rate: float = 3e-4

    def __post_init__(self) -> None:
        within(self, 0, 1, "discount", "tau")
        at_least(self, 0, "actor_rate", "critic_rate")
        above(self, 0, "temperature", "cap")

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        """An actor and twin critics."""
        return {"actor": Gaussian(sizes), "critic": Critic(sizes)}

    def lagged(self) -> tuple[str, ...]:
        """The critics."""
        return ("critic",)

    def stages(self) -> tuple[Stage, ...]:
        """The critics, then the actor by what they have learned."""
        return Stage({"critic": self.critic_rate}, self.critic), Stage({"actor": self.actor_rate}, self.actor, follows=("critic",))

    def explore(self, learner: Learner, obs: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Draws of the policy, cut to what can be done."""
        return cut(*learner.nets["actor"].draw(obs, draw.normal(len(obs), learner.nets["actor"].log_std.shape[0])))

    def critic(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """Squared errors to the lower lagged value of an action that the policy draws."""
        with torch.no_grad():
            following = learner.lagged["critic"](batch.next_obs, drawn(learner, batch.next_obs, batch.action, draw)).amin(dim=0)
            wanted = backup(batch, following, self.discount)
        found = learner.nets["critic"](batch.obs, batch.action)
        return fitted(found, wanted, batch)

    def actor(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """Log densities of what was done, weighed."""
        critic = learner.nets["critic"]
        with torch.no_grad():
            instead = drawn(learner, batch.obs, batch.action, draw)
            gap = critic(batch.obs, batch.action).amin(dim=0) - critic(batch.obs, instead).amin(dim=0)
            weight = self.weigh(gap)
        logp = learner.nets["actor"].logp(batch.obs, batch.action)
        told = {"advantage": mean_of(gap), "weight": mean_of(weight), "capped": mean_of((weight >= self.cap).to(weight.dtype))}
        return Loss((mean_of(weight * logp),), (1.0,), told)

    def weigh(self, gap: Tensor) -> Tensor:
        """Advantages (B,) -> weights (B,): each by itself up to the cap, or shares of the batch, B in all."""
        if self.weights == "capped":
            return exp_advantage(gap, self.temperature, self.cap)  # type: ignore[no-any-return]
        weight: Tensor = exp_advantage(gap - gap.amax(), self.temperature)  # at most 1: a constant cancels, and nothing overflows
        return weight / weight.mean()


def drawn(learner: Learner, obs: Tensor, like: Tensor, draw: Draw) -> Tensor:
    """(B, A) an action of the policy for every observation, clamped to what can be done."""
    action: Tensor = learner.nets["actor"].draw(obs, draw.normal(*like.shape))[0]
    return action.clamp(-1, 1)
