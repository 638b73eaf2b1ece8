"""CQL: SAC whose critics are held down where the policy would go, and up where the data are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ope.primitives.terms import Terms
from rl_core.checks import above, at_least, within
from rl_core.exploration import cut
from rl_core.families.offline import Draw, Learner, Stage, Transitions, backup, fitted, mean_of, weighed
from rl_core.loss import Loss
from rl_core.methods.sac import drawn
from rl_core.models.mlp import Critic, Sizes, Squashed, Temperature
from rl_core.paper import Paper


@dataclass(frozen=True)
class CQL:
    """Kumar et al. 2020, CQL(H) with importance sampling, after CORL."""

    paper: ClassVar[Paper] = Paper(
        source="2006.04779",
        title="Conservative Q-Learning for Offline Reinforcement Learning",
        spec="offline_common",
        equations={
            "target": "y = r + γ(1 - terminated)·min_j Q̄_j(s', a'), a' ~ π(·|s'), without its entropy",
            "gap": "T·logsumexp_i [(Q_j(s, a_i) - log μ_i)/T] - Q_j(s, a): n uniform a_i, n of π(·|s'), n of π(·|s)",
            "critic": "-Σ_j [mean (Q_j(s, a) - y)² + α·mean gap_j]",
            "actor": "mean [min_j Q_j(s, ã) - exp(log_alpha)·log π(ã|s)], ã ~ π(·|s)",
            "temperature": "mean log_alpha·(log π(ã|s) - A)",
        },
        defaults={
            "alpha": "CORL: 10; d3rlpy: 5, for medium data 10",
            "samples": "CORL and d3rlpy: n = 10 of each kind",
            "softness": "CORL: T = 1",
            "discount": "CORL and d3rlpy: 0.99",
            "tau": "CORL and d3rlpy: 0.005",
            "actor_rate": "CORL: Adam 3e-5; d3rlpy: 1e-4",
            "critic_rate": "CORL and d3rlpy: Adam 3e-4",
            "temperature_rate": "CORL: the actor's, 3e-5; d3rlpy: 1e-4",
            "temperature_start": "CORL and d3rlpy: 1",
            "log_std_start": "CORL: -1, as an offset that is learned; d3rlpy: none",
        },
        differs={
            "order": "CORL: all losses on the networks before the step; here and in d3rlpy the critics go first, as in SAC",
            "start": "CORL: orthogonal weights, the last gain 0.01; here PyTorch's own",
            "networks": "CORL and d3rlpy: 3 hidden layers of 256; here the schedule says",
            "Lagrangian": "d3rlpy: a threshold of 10 for the gap; CORL has none, nor is there one here",
            "the sum over 3n": "not a mean: a constant, log 3n",
        },
    )
    alpha: float = 10.0
    """Weight of the gap. What it does depends on the scale of rewards."""
    samples: int = 10
    softness: float = 1.0
    """T: towards 0 the sum over samples becomes their maximum."""
    discount: float = 0.99
    tau: float = 0.005
    actor_rate: float = 3e-5
    critic_rate: float = 3e-4
    temperature_rate: float = 3e-5
    temperature_start: float = 1.0
    """α of the policy's entropy at first. Like `alpha` it is in units of rewards: where they are scaled, scale it, too."""
    log_std_start: float = -1.0
    """Added to the log standard deviation that a fresh network gives."""

    def __post_init__(self) -> None:
        within(self, 0, 1, "discount", "tau")
        at_least(self, 0, "alpha", "actor_rate", "critic_rate", "temperature_rate")
        at_least(self, 1, "samples")
        above(self, 0, "softness", "temperature_start")

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        """An actor, twin critics and what entropy is worth."""
        actor = Squashed(sizes)
        with torch.no_grad():
            actor.body.biases[-1][..., sizes.action :] += self.log_std_start
        return {"actor": actor, "critic": Critic(sizes), "temperature": Temperature(self.temperature_start)}

    def lagged(self) -> tuple[str, ...]:
        """The critics."""
        return ("critic",)

    def stages(self) -> tuple[Stage, ...]:
        """The critics; then the actor and its temperature."""
        rates = {"actor": self.actor_rate, "temperature": self.temperature_rate}
        return Stage({"critic": self.critic_rate}, self.critic), Stage(rates, self.actor, follows=("critic",))

    def explore(self, learner: Learner, obs: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The policy's own actions."""
        return cut(*drawn(learner.nets["actor"], obs, draw))

    def critic(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """Squared errors, and the gaps between what could be done and what was done."""
        with torch.no_grad():
            action, _ = learner.nets["actor"].draw(batch.next_obs, draw.normal(*batch.action.shape))
            wanted = backup(batch, learner.lagged["critic"](batch.next_obs, action).amin(dim=0), self.discount)
            others, density = self.candidates(learner, batch, draw)
        every = torch.cat((others, batch.action[None]))  # one pass over candidates and what was done: (3n + 1, B, A)
        obs = batch.obs.expand(len(every), *batch.obs.shape)
        q = learner.nets["critic"](obs.flatten(0, 1), every.flatten(0, 1)).unflatten(1, (len(every), len(batch)))
        found = q[:, -1]
        gap = mean_of(weighed(conservative_gap(q[:, :-1], density, found, self.softness), batch))
        told, fit = {"gap": Terms(gap.num.detach() / len(found), gap.den)}, fitted(found, wanted, batch)
        return Loss((*fit.terms, gap), (1.0, -self.alpha), {**fit.metrics, **told}, fit.errors)

    def candidates(self, learner: Learner, batch: Transitions, draw: Draw) -> tuple[Tensor, Tensor]:
        """Actions (3n, B, A), and the log densities (3n, B) with which they were drawn: uniform, of π(·|s') and of π(·|s)."""
        shape, policy = (self.samples, *batch.action.shape), learner.nets["actor"]
        uniform = 2 * draw.uniform(*shape) - 1
        following, following_logp = policy.draw(batch.next_obs, draw.normal(*shape))
        current, current_logp = policy.draw(batch.obs, draw.normal(*shape))
        flat = torch.full_like(current_logp, shape[-1] * math.log(0.5))
        return torch.cat((uniform, following, current)), torch.cat((flat, following_logp, current_logp))

    def actor(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """SAC's: the lower value of what the policy draws, and its entropy, whose worth rises while there is too little of it."""
        temperature = learner.nets["temperature"]
        action, logp = learner.nets["actor"].draw(batch.obs, draw.normal(*batch.action.shape))
        value = learner.nets["critic"](batch.obs, action).amin(dim=0) - temperature().detach() * logp
        excess = temperature.log_alpha * (logp.detach() - batch.action.shape[-1])  # the entropy aimed at is -A
        told = {"entropy": mean_of(-logp.detach()), "temperature": mean_of(temperature().detach().expand_as(logp))}
        return Loss((mean_of(value), mean_of(excess)), (1.0, 1.0), told)


def conservative_gap(q: Tensor, density: Tensor, done: Tensor, softness: float) -> Tensor:
    """T·logsumexp_i [(Q_j(s, a_i) - log μ_i)/T] - Q_j(s, a). q (E, m, B), log densities (m, B), Q_j(s, a) (E, B) -> (E, B)."""
    return softness * torch.logsumexp((q - density) / softness, dim=1) - done
