"""TRPO: the largest step along the natural gradient that keeps KL(old‖new) small, halved until it does and the surrogate rises.

`NPG` is the same step without the search: Kakade's natural gradient, as long as a quadratic model of the KL allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ope.primitives.weights import ratio
from rl_core.checks import above, at_least, within
from rl_core.families.offline import mean_of
from rl_core.families.online import CreditedRows, Plan, Steps, generalised, value_errors
from rl_core.loss import Loss, total
from rl_core.models.distributions import Distribution
from rl_core.paper import Paper

Product = Callable[[Tensor], Tensor]
"""v -> (F + ξI)v of flat weights (P,)."""


@dataclass(frozen=True)
class TRPO:
    """Schulman et al. 2015."""

    paper: ClassVar[Paper] = Paper(
        source="1502.05477",
        title="Trust Region Policy Optimization",
        spec="control_common",
        equations={
            "problem": "max mean ρA subject to mean KL(old‖new) <= delta",
            "step": "√(2·delta / xᵀ(F + ξI)x)·x, where (F + ξI)x = g, g = ∇ mean ρA, F the second derivative of the mean KL",
            "search": "step·backtrack^j for j = 0, 1, ... until KL <= delta and mean ρA rises; else the policy stays",
        },
        defaults={
            "delta": "paper: 0.01",
            "damping": "paper: none; the official code and Stable-Baselines3: 0.1",
            "conjugate_steps": "paper and code: 10",
            "backtracks": "paper: as many as needed; the official code: 10",
            "backtrack": "official code: 0.5; Stable-Baselines3: 0.8",
            "discount": "paper: 0.99",
            "lambda_": "generalised advantages' paper: 0.97",
            "plan": "the value function alone, 5 passes over minibatches of 128 with Adam 1e-3, advantages standardised over the "
            "batch: Stable-Baselines3 has 10 passes, Tianshou 20",
        },
        differs={"failed search": "the policy is restored to the bit; Tianshou kept the last try until 2.0.1"},
    )
    delta: float = 0.01
    damping: float = 0.1
    conjugate_steps: int = 10
    backtracks: int = 10
    """Times that a step is made smaller; 0: it is taken as it is, which is NPG."""
    backtrack: float = 0.5
    discount: float = 0.99
    lambda_: float = 0.97
    plan: Plan = Plan(epochs=1, minibatch=None, value_epochs=5, value_minibatch=128, standardize="batch", rate=1e-3)

    def __post_init__(self) -> None:
        within(self, 0, 1, "discount", "lambda_", "backtrack")
        above(self, 0, "delta")
        at_least(self, 0, "damping", "backtracks")
        at_least(self, 1, "conjugate_steps")

    def credit(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Generalised advantages and λ-returns."""
        return generalised(steps, self.discount, self.lambda_)

    def policy_loss(self, batch: CreditedRows, new: Distribution, old: Distribution, progress: float) -> Loss:
        """mean ρA, which nothing clips."""
        rho = ratio(new.logp(batch.action), batch.logp_behavior)
        return Loss((mean_of(rho * batch.advantage),), (1.0,), {})

    def value_loss(self, batch: CreditedRows, value: Tensor) -> Loss:
        """Squared errors."""
        return Loss((value_errors(batch, value, None),), (1.0,), {})

    def improve(self, policy: nn.Module, batch: CreditedRows, old: Distribution, progress: float) -> Mapping[str, float]:
        """One step, or none."""
        weights = list(policy.parameters())
        surrogate = total(self.policy_loss(batch, policy(batch.obs), old, progress))
        gradient = flat(torch.autograd.grad(surrogate, weights))
        step = natural_step(gradient, curvature(policy, batch, old, self.damping), self.delta, self.conjugate_steps)
        start, before = parameters_to_vector(weights).detach().clone(), float(surrogate.detach())
        told = {"searched": 0.0, "accepted": 0.0}
        if step is None:
            return told
        for tried in range(self.backtracks + 1):
            vector_to_parameters(start + self.backtrack**tried * step, weights)
            with torch.no_grad():
                new = policy(batch.obs)
                apart, after = float(old.kl(new).mean()), float(total(self.policy_loss(batch, new, old, progress)))
            if not self.backtracks or (apart <= self.delta and after > before):
                return {"searched": float(tried), "accepted": 1.0}
        vector_to_parameters(start, weights)
        return told | {"searched": float(self.backtracks)}


NPG = TRPO(backtracks=0)
"""Kakade 2001, within a trust region."""


def natural_step(gradient: Tensor, product: Product, delta: float, conjugate_steps: int) -> Tensor | None:
    """√(2δ / xᵀFx)·x with Fx = g: what a quadratic model of the KL puts at δ. None without a gradient."""
    direction = conjugate_gradient(product, gradient, conjugate_steps)
    bend = float(direction @ product(direction))
    return (2 * delta / bend) ** 0.5 * direction if bend > 0 else None


def conjugate_gradient(product: Product, wanted: Tensor, steps: int, least: float = 1e-10) -> Tensor:
    """x with product(x) = wanted, for a symmetric positive product, in at most so many steps."""
    found, rest = torch.zeros_like(wanted), wanted.clone()
    direction, size = rest.clone(), float(rest @ rest)
    for _ in range(steps):
        if size < least:
            break
        image = product(direction)
        length = size / float(direction @ image)
        found, rest = found + length * direction, rest - length * image
        size, before = float(rest @ rest), size
        direction = rest + size / before * direction
    return found


def curvature(policy: nn.Module, batch: CreditedRows, old: Distribution, damping: float) -> Product:
    """v -> (F + ξI)v, F the second derivative of the mean KL(old‖policy) by the policy's weights."""
    weights = list(policy.parameters())
    slope = flat(torch.autograd.grad(old.kl(policy(batch.obs)).mean(), weights, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        bent = torch.autograd.grad(slope @ vector, weights, retain_graph=True)
        return flat(bent) + damping * vector

    return product


def flat(parts: tuple[Tensor, ...]) -> Tensor:
    """(P,) of gradients by several weights."""
    return torch.cat([part.reshape(-1) for part in parts])
