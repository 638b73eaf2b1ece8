"""PPO for control: the clipped surrogate on standardised generalised advantages, several passes over small parts of a batch.

Value per row: min(ρA, clip(ρ, 1 - ε_low, 1 + ε_high)A). For A < 0 nothing bounds it as ρ grows: watch `max_ratio`, or clip twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ope.primitives.surrogates import OneSided, clipped, dual_clipped
from ope.primitives.weights import ratio
from rl_core.checks import at_least, within
from rl_core.families.offline import mean_of
from rl_core.families.online import CreditedRows, Plan, Steps, generalised, value_errors
from rl_core.loss import Loss
from rl_core.models.distributions import Distribution
from rl_core.paper import Paper


@dataclass(frozen=True)
class ControlPPO:
    """Schulman et al. 2017, with the settings of its control tasks."""

    paper: ClassVar[Paper] = Paper(
        source="1707.06347",
        title="Proximal Policy Optimization Algorithms",
        spec="control_common",
        equations={
            "policy": "mean min(ρA, clip(ρ, 1 - eps_low, 1 + eps_high)A) + entropy_coef·H",
            "dual clip": "at least dual_clip·A where A < 0",
            "value": "-value_coef/2·mean max((V - R)², (clip(V, V_old ± value_clip) - R)²)",
            "advantage": "A_t = δ_t + γλ(1 - terminated ∨ truncated)A_{t+1}, δ_t = r_t + γ(1 - terminated)V(s_{t+1}) - V(s_t)",
        },
        defaults={
            "eps_low": "paper: 0.2",
            "eps_high": "paper: 0.2",
            "dual_clip": "paper: none; Ye et al. 2020: 3",
            "discount": "paper: 0.99",
            "lambda_": "paper: 0.95",
            "value_coef": "paper: 0.5 to 1; CleanRL and Stable-Baselines3: 0.5",
            "value_clip": "paper and Stable-Baselines3: none, since it depends on the rewards' scale; CleanRL: 0.2",
            "entropy_coef": "paper: 0 on control tasks; CleanRL and Stable-Baselines3: 0; Tianshou: 0.01",
            "plan": "paper: 10 epochs, minibatches of 64, Adam 3e-4; CleanRL and Stable-Baselines3: advantages standardised per "
            "minibatch (1e-8), norm of gradients 0.5",
        },
        differs={
            "advantages": "TorchRL does not standardise them; CleanRL, Stable-Baselines3 and Tianshou do",
            "time limits": "CleanRL takes a cut for an end; here the value of what really followed counts",
            "rate": "CleanRL lets it fall; off here, a setting of the plan",
            "KL penalty": "the paper's second variant has an adaptive coefficient; only the clipped one is here",
        },
    )
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    discount: float = 0.99
    lambda_: float = 0.95
    value_coef: float = 0.5
    value_clip: float | None = None
    entropy_coef: float = 0.0
    plan: Plan = Plan()

    def __post_init__(self) -> None:
        within(self, 0, 1, "discount", "lambda_", "eps_low")
        at_least(self, 0, "eps_high", "value_coef", "value_clip", "entropy_coef")
        at_least(self, 1, "dual_clip")

    def credit(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Generalised advantages and λ-returns."""
        return generalised(steps, self.discount, self.lambda_)

    def policy_loss(self, batch: CreditedRows, new: Distribution, old: Distribution, progress: float) -> Loss:
        """The surrogate, and the entropy where it counts."""
        low, high = 1 - self.eps_low, 1 + self.eps_high
        rho = ratio(new.logp(batch.action), batch.logp_behavior)
        if self.dual_clip is None:
            value = clipped(rho, batch.advantage, low, high)
        else:
            value = dual_clipped(rho, batch.advantage, low, high, self.dual_clip)
        stopped = ~OneSided(self.eps_low, self.eps_high).keep(rho.detach(), batch.advantage)
        metrics = {"clip_fraction": mean_of(stopped.to(rho.dtype))}
        if not self.entropy_coef:
            return Loss((mean_of(value),), (1.0,), metrics)
        return Loss((mean_of(value), mean_of(new.entropy())), (1.0, self.entropy_coef), metrics)

    def value_loss(self, batch: CreditedRows, value: Tensor) -> Loss:
        """Half the squared errors, or the worse of two."""
        return Loss((value_errors(batch, value, self.value_clip),), (self.value_coef / 2,), {})
