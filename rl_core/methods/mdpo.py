"""MDPO: several plain gradient steps per batch on the ratio surrogate less an exact KL to the policy of the last one.

The KL is new-first and of whole distributions; nothing clips the ratio. From replay the policy it is held to is a copy made anew
every so many steps, the entropy bonus is linearised there, and SAC is what is left where both weights are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ope.data import InputError
from ope.primitives.terms import Terms
from ope.primitives.weights import ratio
from rl_core.buffers import UNKNOWN
from rl_core.checks import at_least, within
from rl_core.exploration import cut
from rl_core.families.offline import Draw, Learner, Stage, Transitions, backup, fitted, mean_of, squared_errors
from rl_core.families.online import CreditedRows, Plan, Steps, generalised, value_errors
from rl_core.loss import Loss
from rl_core.models.distributions import Distribution
from rl_core.models.mlp import Critic, Sizes, Squashed, Value, squashed_logp
from rl_core.paper import Paper


@dataclass(frozen=True)
class MDPO:
    """Tomar et al. 2022, from fresh batches."""

    paper: ClassVar[Paper] = Paper(
        source="2005.09814",
        title="Mirror Descent Policy Optimization",
        spec="mdpo",
        equations={
            "policy": "mean ρA - (1/t_k)·mean KL(π‖π_k), t_k = 1 - (k - 1)/K",
            "value": "-mean max((V - R)², (clip(V, V_old ± value_clip) - R)²)",
        },
        defaults={
            "step": "paper and code: 1, the largest t_k",
            "step_min": "neither: 1/t_k would have no bound at the end",
            "discount": "paper and code: 0.99",
            "lambda_": "paper and code: 0.95",
            "value_clip": "code: 0.2; the paper's minimal runs have none",
            "plan": "paper and code: 10 steps on the whole batch, Adam 3e-4, advantages standardised over it, gradients' norm 0.5; "
            "then 5 passes of the value function over minibatches of 128",
        },
        differs={
            "rate": "the paper lists a falling rate; the code holds 3e-4, which was taken",
            "step": "t_k begins at 1 + 1/K in the code, which counts from 0; at 1 here, as in the paper",
            "standardised": "over std + 1e-8; the code adds nothing",
            "rewards": "the paper's loaded runs and the code divide them by a running deviation of returns; here the schedule has "
            "one fixed scale, and running means of observations alone",
            "Tsallis": "not here: the code's version on fresh batches lacks the ratio and, at q = 1, pays for moving away",
        },
    )
    step: float = 1.0
    """t of the first batch: it falls to 0 in a line."""
    step_min: float = 1e-3
    discount: float = 0.99
    lambda_: float = 0.95
    value_clip: float | None = 0.2
    plan: Plan = Plan(epochs=10, minibatch=None, value_epochs=5, value_minibatch=128, standardize="batch")

    def __post_init__(self) -> None:
        within(self, 0, 1, "discount", "lambda_")
        at_least(self, 0, "value_clip")
        if not 0 < self.step_min <= self.step:
            raise InputError(f"step_min: found {self.step_min}; expected above 0 and at most step, {self.step}")

    def credit(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Generalised advantages and λ-returns."""
        return generalised(steps, self.discount, self.lambda_)

    def policy_loss(self, batch: CreditedRows, new: Distribution, old: Distribution, progress: float) -> Loss:
        """The surrogate, and the distance."""
        rho = ratio(new.logp(batch.action), batch.logp_behavior)
        apart, size = mean_of(new.kl(old)), max(self.step * (1 - progress), self.step_min)
        metrics = {"kl_new_old": Terms(apart.num.detach(), apart.den)}
        return Loss((mean_of(rho * batch.advantage), apart), (1.0, -1 / size), metrics)

    def value_loss(self, batch: CreditedRows, value: Tensor) -> Loss:
        """The worse of two squared errors."""
        return Loss((value_errors(batch, value, self.value_clip),), (1.0,), {})


@dataclass(frozen=True)
class OffPolicyMDPO:
    """Tomar et al. 2022, from replay."""

    paper: ClassVar[Paper] = Paper(
        source="2005.09814",
        title="Mirror Descent Policy Optimization",
        spec="mdpo",
        equations={
            "policy": "mean Q_1(s, ã) - c·log π(ã|s) - (λ - c)·log π_k(ã|s), ã ~ π with its gradient; less "
            "penalty·(mean μ² + mean (log σ)²)",
            "critics": "-½ Σ_j mean (Q_j(s, a) - r - γ(1 - terminated)·V̄(s'))² - ½ mean (V(s) - min_j Q_j(s, ã) + λ·log π(ã|s))²",
        },
        defaults={
            "kl_coef": "code: c = 1/t = 1, constant",
            "entropy_coef": "code: λ = 0.2; paper: 0 is the hard variant",
            "refresh": "paper and code: 1000 steps",
            "discount": "paper and code: 0.99",
            "tau": "code: 0.005, of V alone",
            "rate": "code: 3e-4 for all",
            "penalty": "code: 1e-3; the paper does not tell of it",
            "samples": "paper: yes; the code takes the mean",
        },
        differs={
            "collection": "the official code collects with the mean action after its random steps; the paper samples, as here",
            "density": "the official code adds 1e-6 inside the logarithm; the stable form is here, of both policies",
            "critics": "the policy learns from the first critic, V from the lower one, as in the code",
            "Tsallis": "the q-logarithm of the paper's further runs is not here",
        },
    )
    kl_coef: float = 1.0
    entropy_coef: float = 0.2
    refresh: int = 1000
    """Steps between two copies of the policy that it is held to."""
    discount: float = 0.99
    tau: float = 0.005
    rate: float = 3e-4
    penalty: float = 1e-3
    samples: bool = True
    """Collect by sampling; else by the mean, of which no density is known."""

    def __post_init__(self) -> None:
        at_least(self, 1, "refresh")
        within(self, 0, 1, "discount", "tau")
        at_least(self, 0, "kl_coef", "entropy_coef", "rate", "penalty")

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        """An actor, twin critics of actions and a value of observations."""
        return {"actor": Squashed(sizes), "critic": Critic(sizes), "value": Value(sizes)}

    def lagged(self) -> tuple[str, ...]:
        """The policy of a while ago, and the value."""
        return "actor", "value"

    def stages(self) -> tuple[Stage, ...]:
        """The policy, then critics and value together. The copy of the policy is made anew at its own pace."""
        return (
            Stage({"actor": self.rate}, self.actor, follows=("actor",), copied_every=self.refresh),
            Stage({"critic": self.rate, "value": self.rate}, self.critics, follows=("value",)),
        )

    def explore(self, learner: Learner, obs: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """The policy's own actions, or its mean."""
        if not self.samples:
            action = learner.nets["actor"](obs)
            return action, torch.full_like(action[:, 0], UNKNOWN)
        before, logp, *_ = fresh(learner.nets["actor"], obs, draw)
        return cut(torch.tanh(before), logp)

    def actor(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """Value, and distance to the lagged policy with the entropy's bonus linearised there. Both densities are of one u."""
        before, logp, mean, log_std = fresh(learner.nets["actor"], batch.obs, draw)
        old = squashed_logp(before, *learner.lagged["actor"].ends(batch.obs))
        value = learner.nets["critic"].first(batch.obs, torch.tanh(before))
        gain = value - self.kl_coef * logp - (self.entropy_coef - self.kl_coef) * old
        sizes = mean_of((mean**2 + log_std**2).flatten())
        apart = mean_of((logp - old).detach())
        return Loss((mean_of(gain), sizes), (1.0, -self.penalty), {"kl_new_old": apart, "entropy": mean_of(-logp.detach())})

    def critics(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """Squared errors of both critics and of the value."""
        nets = learner.nets
        with torch.no_grad():
            before, logp, *_ = fresh(nets["actor"], batch.obs, draw)
            soft = nets["critic"](batch.obs, torch.tanh(before)).amin(dim=0) - self.entropy_coef * logp
            wanted = backup(batch, learner.lagged["value"](batch.next_obs), self.discount)
        found, value = nets["critic"](batch.obs, batch.action), nets["value"](batch.obs)
        fit = fitted(found, wanted, batch)
        return Loss((*fit.terms, squared_errors(value, soft, batch)), (0.5, 0.5), fit.metrics, fit.errors)


def fresh(actor: Any, obs: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Actions of a squashed policy before tanh (B, A), their log densities (B,), and the mean and log spread that they are from."""
    mean, log_std = actor.ends(obs)
    before = mean + log_std.exp() * draw.normal(*mean.shape)
    return before, squashed_logp(before, mean, log_std), mean, log_std
