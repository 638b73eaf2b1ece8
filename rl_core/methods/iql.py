"""IQL: a value that leans towards the better logged actions, a critic that asks no others, a policy of the logged ones, weighed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ope.data import InputError
from ope.primitives.divergences import expectile
from ope.primitives.weights import exp_advantage
from rl_core.checks import above, at_least, within
from rl_core.exploration import cut
from rl_core.families.offline import Draw, Learner, Stage, Transitions, backup, fitted, mean_of, weighed
from rl_core.loss import Loss
from rl_core.models.mlp import Critic, Gaussian, Sizes, Value
from rl_core.paper import Paper


@dataclass(frozen=True)
class IQL:
    """Kostrikov et al. 2021, in the order of CORL: all three losses see the networks as the step found them."""

    paper: ClassVar[Paper] = Paper(
        source="2110.06169",
        title="Offline Reinforcement Learning with Implicit Q-Learning",
        spec="offline_common",
        equations={
            "advantage": "u = min_j Q̄_j(s, a) - V(s)",
            "value": "-mean |τ - 1[u < 0]|·u²",
            "critic": "-Σ_j mean (Q_j(s, a) - r - γ(1 - terminated)·V(s'))²",
            "actor": "mean min(exp(u/temperature), cap)·log π(a|s)",
        },
        defaults={
            "expectile": "paper and code: 0.7; AntMaze 0.9; CORL's hopper-medium-expert 0.5",
            "temperature": "paper and code: 1/3, written β = 3; AntMaze 1/10; CORL's hopper-medium-expert 1/6",
            "cap": "paper and code: 100",
            "discount": "paper and code: 0.99",
            "tau": "paper and code: 0.005; CORL's hopper-medium and -medium-replay 0.001",
            "actor_rate": "paper and code: Adam 3e-4",
            "value_rate": "paper and code: Adam 3e-4",
            "critic_rate": "paper and code: Adam 3e-4",
            "cosine": "paper and code: the actor's rate falls to 0 as a cosine, over 1e6 steps; here over the schedule's",
        },
        differs={
            "order": "CORL: all three on the values before the step; official code: V first, then actor and critic on the new V",
            "critic": "official code: the sum over both critics, taken; CORL halves it, which Adam hardly sees",
            "actor": "CORL's is deterministic on hopper-medium and -medium-replay; here always the paper's normal policy",
        },
    )
    expectile: float = 0.7
    temperature: float = 1 / 3
    """1/β of the paper; inf is behaviour cloning."""
    cap: float = 100.0
    """Of a weight."""
    discount: float = 0.99
    tau: float = 0.005
    actor_rate: float = 3e-4
    value_rate: float = 3e-4
    critic_rate: float = 3e-4
    cosine: bool = True
    """Of a short schedule it takes much: over 6,000 steps on pend-rand, medians of 75 with it and 81 without."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "discount", "tau")
        at_least(self, 0, "actor_rate", "value_rate", "critic_rate")
        if not 0 < self.expectile < 1:
            raise InputError(f"expectile: found {self.expectile}; expected a level between 0 and 1, 0.5 being the mean")
        above(self, 0, "temperature", "cap")

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        """An actor, twin critics and a value."""
        return {"actor": Gaussian(sizes), "critic": Critic(sizes), "value": Value(sizes)}

    def lagged(self) -> tuple[str, ...]:
        """The critics: the value has no copy."""
        return ("critic",)

    def stages(self) -> tuple[Stage, ...]:
        """The actor first, whose weights are then those before the others' step; value and critic on one and the same V."""
        return (
            Stage({"actor": self.actor_rate}, self.actor, cosine=self.cosine),
            Stage({"value": self.value_rate, "critic": self.critic_rate}, self.values, follows=("critic",)),
        )

    def explore(self, learner: Learner, obs: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Draws of the policy, cut to what can be done."""
        return cut(*learner.nets["actor"].draw(obs, draw.normal(len(obs), learner.nets["actor"].log_std.shape[0])))

    def actor(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """Log densities of what was done, weighed by how much better it was than the value."""
        with torch.no_grad():
            gap = advantage(learner, batch, learner.nets["value"](batch.obs))
            weight: Tensor = exp_advantage(gap, self.temperature, self.cap)
        logp = learner.nets["actor"].logp(batch.obs, batch.action)
        told = {"advantage": mean_of(gap), "weight": mean_of(weight), "capped": mean_of((weight >= self.cap).to(weight.dtype))}
        return Loss((mean_of(weight * logp),), (1.0,), told)

    def values(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """The expectile of the lagged critics' values, and squared errors to what V says of the next observation."""
        value, critic = learner.nets["value"], learner.nets["critic"]
        with torch.no_grad():
            wanted = backup(batch, value(batch.next_obs), self.discount)
        found = critic(batch.obs, batch.action)
        apart = expectile(advantage(learner, batch, value(batch.obs)), self.expectile)
        fit = fitted(found, wanted, batch)
        return Loss((mean_of(-weighed(apart, batch)), *fit.terms), (1.0, 1.0), fit.metrics, fit.errors)


def advantage(learner: Learner, batch: Transitions, value: Tensor) -> Tensor:
    """(B,) min_j Q̄_j(s, a) - V(s), of V (B,); no gradient through the critics."""
    with torch.no_grad():
        lowest = learner.lagged["critic"](batch.obs, batch.action).amin(dim=0)
    gap: Tensor = lowest - value
    return gap
