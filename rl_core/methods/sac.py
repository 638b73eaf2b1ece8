"""SAC: twin critics of a policy that is paid for entropy, whose price is learned so that the entropy stays at a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rl_core.checks import above, at_least, within
from rl_core.exploration import cut
from rl_core.families.offline import Draw, Learner, Stage, Transitions, backup, fitted, mean_of
from rl_core.loss import Loss
from rl_core.models.mlp import Critic, Sizes, Squashed, Temperature
from rl_core.paper import Paper


@dataclass(frozen=True)
class SAC:
    """Haarnoja et al. 2018, with one policy, twin critics and a learned temperature."""

    paper: ClassVar[Paper] = Paper(
        source="1812.05905",
        title="Soft Actor-Critic Algorithms and Applications",
        spec="control_common",
        equations={
            "target": "y = r + γ(1 - terminated)(min_j Q̄_j(s', a') - α·log π(a'|s')), a' ~ π(·|s')",
            "critic": "-Σ_j mean (Q_j(s, a) - y)²",
            "actor": "mean min_j Q_j(s, ã) - α·log π(ã|s), ã ~ π(·|s) with its gradient",
            "temperature": "log α·mean(log π(ã|s) + H̄), or α·mean(...); H̄ = -dim(A)",
            "density": "log N(u) - Σ 2(log 2 - u - softplus(-2u)), a = tanh u",
        },
        defaults={
            "discount": "paper: 0.99",
            "tau": "paper: 0.005",
            "actor_rate": "paper: 3e-4",
            "critic_rate": "paper: 3e-4; CleanRL: 1e-3",
            "temperature_rate": "paper: 3e-4; CleanRL: 1e-3",
            "temperature": "Stable-Baselines3: 1 to begin with",
            "learns_temperature": "paper: yes",
            "form": "Stable-Baselines3: log; paper and CleanRL: linear. Their gradients by log α differ by a factor α",
            "target_entropy": "paper and code: -dim(A)",
        },
        differs={
            "actor": "the paper and Stable-Baselines3 step it every step; CleanRL twice every second step",
            "spread": "log σ is clamped to [-20, 2] as in the paper's code; CleanRL maps it by tanh to [-5, 2]",
            "density": "the official code adds 1e-6 inside the logarithm, which bounds it near the ends; the stable form is here",
            "squared errors": "Stable-Baselines3 halves them; CleanRL and TD3 do not",
        },
    )
    discount: float = 0.99
    tau: float = 0.005
    actor_rate: float = 3e-4
    critic_rate: float = 3e-4
    temperature_rate: float = 3e-4
    temperature: float = 1.0
    """α, to begin with."""
    learns_temperature: bool = True
    form: Literal["log", "linear"] = "log"
    """What multiplies the excess of entropy in the temperature's objective: log α or α."""
    target_entropy: float | None = None
    """H̄ in nats; None: -dim(A)."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "discount", "tau")
        at_least(self, 0, "actor_rate", "critic_rate", "temperature_rate")
        above(self, 0, "temperature")

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        """An actor, twin critics and a temperature."""
        return {"actor": Squashed(sizes), "critic": Critic(sizes), "temperature": Temperature(self.temperature)}

    def lagged(self) -> tuple[str, ...]:
        """The critics."""
        return ("critic",)

    def stages(self) -> tuple[Stage, ...]:
        """Critics, actor, temperature. The copies move right after the critics: what comes in between does not look at them."""
        critic, actor = (
            Stage({"critic": self.critic_rate}, self.critic, follows=("critic",)),
            Stage({"actor": self.actor_rate}, self.actor),
        )
        if not self.learns_temperature:
            return critic, actor
        return critic, actor, Stage({"temperature": self.temperature_rate}, self.dual)

    def explore(self, learner: Learner, obs: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The policy's own actions."""
        return cut(*drawn(learner.nets["actor"], obs, draw))

    def critic(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """Squared errors of both critics."""
        with torch.no_grad():
            action, logp = drawn(learner.nets["actor"], batch.next_obs, draw)
            following = learner.lagged["critic"](batch.next_obs, action).amin(dim=0) - learner.nets["temperature"]() * logp
            wanted = backup(batch, following, self.discount)
        found = learner.nets["critic"](batch.obs, batch.action)
        return fitted(found, wanted, batch)

    def actor(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """The lower critic's value of what the policy does, and its entropy at the present price."""
        action, logp = drawn(learner.nets["actor"], batch.obs, draw)
        value = learner.nets["critic"](batch.obs, action).amin(dim=0)
        price = learner.nets["temperature"]().detach()
        return Loss((mean_of(value - price * logp),), (1.0,), {"entropy": mean_of(-logp.detach())})

    def dual(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """The price rises while entropy is below its target, and stays where it is there."""
        with torch.no_grad():
            action, logp = drawn(learner.nets["actor"], batch.obs, draw)
            target = -float(action.shape[-1]) if self.target_entropy is None else self.target_entropy
        temperature = learner.nets["temperature"]
        price = temperature.log_alpha if self.form == "log" else temperature()
        return Loss((mean_of(price * (logp + target)),), (1.0,), {"temperature": mean_of(temperature().detach()[None])})


def drawn(actor: Any, obs: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Actions of a squashed policy and their log densities, both with gradients."""
    half = actor.body.biases[-1].shape[-1] // 2
    found: tuple[Tensor, Tensor] = actor.draw(obs, draw.normal(len(obs), half))
    return found
