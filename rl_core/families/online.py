"""The online family: a policy learned from what it sampled itself a moment ago, batch after batch.

A method gives credit over whole trajectories, and for any rows of them what a step of the policy and one of the value function
maximise; how often it steps on a batch, and on how many rows at a time, is its `Plan`. The trainer owns all state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from ope.primitives.returns import gae
from ope.primitives.terms import Terms
from rl_core.checks import above, at_least
from rl_core.families.offline import mean_of
from rl_core.loss import Loss
from rl_core.models.distributions import Distribution
from rl_core.paper import Paper

STD_EPS = 1e-8
"""Added to the deviation that advantages are divided by."""


@dataclass(frozen=True)
class Steps:
    """T steps of N environments side by side, time first. Rows after an end belong to another episode."""

    obs: Tensor
    """(T, N, S) as the policy saw them."""
    action: Tensor
    """(T, N, A) as they were sampled: environments may have clipped them, densities are of these."""
    reward: Tensor
    """(T, N)."""
    terminated: Tensor
    """(T, N) True where the process ended: nothing is earned afterwards."""
    truncated: Tensor
    """(T, N) True where only the recording ended: values go on."""
    logp_behavior: Tensor
    """(T, N) log densities of the policy that acted."""
    value: Tensor
    """(T, N) of the observation."""
    next_value: Tensor
    """(T, N) of what really followed, also where an episode was cut: never of what a reset gave."""
    policy: Tensor
    """(T, N) id of who acted."""


@dataclass(frozen=True)
class CreditedRows:
    """B steps with the credit they were given among all."""

    obs: Tensor
    """(B, S)."""
    action: Tensor
    """(B, A)."""
    logp_behavior: Tensor
    """(B,)."""
    advantage: Tensor
    """(B,) of the policy that acted, standardised as the plan says."""
    target: Tensor
    """(B,) what the value function is to learn."""
    value: Tensor
    """(B,) what it said when the steps were collected."""

    def __len__(self) -> int:
        return len(self.obs)

    def rows(self, which: Any) -> CreditedRows:
        """Some of them."""
        return replace(self, **{one.name: getattr(self, one.name)[which] for one in fields(self)})

    def standardised(self) -> CreditedRows:
        """(A - mean) / (std + 1e-8) over these rows."""
        spread = self.advantage.std(correction=0)
        return replace(self, advantage=(self.advantage - self.advantage.mean()) / (spread + STD_EPS))


@dataclass(frozen=True)
class Plan:
    """How a method uses a batch."""

    epochs: int = 10
    """Passes of the policy over the batch."""
    minibatch: int | None = 64
    """Rows of a step; "none": all of them."""
    value_epochs: int = 0
    """Passes of the value function after those of the policy; 0: it steps together with the policy, under one norm of gradients."""
    value_minibatch: int | None = 64
    standardize: Literal["minibatch", "batch", "none"] = "minibatch"
    """Over which rows advantages get mean 0 and deviation 1."""
    rate: float = 3e-4
    anneal: bool = False
    """The rate falls to 0 by the end of the schedule, in a line."""
    grad_clip: float = 0.5
    kl_stop: float | None = None
    """No further step of the policy on a batch once the mean k3 of the rows at hand is above 1.5 times this."""

    def __post_init__(self) -> None:
        at_least(self, 1, "epochs", "minibatch", "value_minibatch")
        at_least(self, 0, "value_epochs", "rate")
        above(self, 0, "grad_clip", "kl_stop")


class OnlineMethod(Protocol):
    """A method of the family: a frozen dataclass whose fields are its configuration."""

    paper: ClassVar[Paper]

    @property
    def plan(self) -> Plan:
        """How it uses a batch."""
        ...

    def credit(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Advantages and targets of the value function, each (T, N), before anything is standardised."""
        ...

    def policy_loss(self, batch: CreditedRows, new: Distribution, old: Distribution, progress: float) -> Loss:
        """What the policy maximises. `new`: its distributions at the rows, which carry the gradient; `old`: who acted.

        progress: share of the schedule that was done when the batch was collected.
        """
        ...

    def value_loss(self, batch: CreditedRows, value: Tensor) -> Loss:
        """What the value function maximises. value (B,): its values of the rows, which carry the gradient."""
        ...


@runtime_checkable
class WithUpdate(Protocol):
    """A method that moves the policy by itself, where no steps of an optimiser do."""

    def improve(self, policy: nn.Module, batch: CreditedRows, old: Distribution, progress: float) -> Mapping[str, float]:
        """Move it, in place; what is to be known of that."""
        ...


@runtime_checkable
class WithChoices(Protocol):
    """An environment whose actions may be choices, one-hot."""

    @property
    def discrete(self) -> bool:
        """Whether these settings have choices."""
        ...


def generalised(steps: Steps, discount: float, lambda_: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and λ-returns, (T, N) each: a cut ends the sum and keeps the next value, an end keeps neither."""
    reward, value, next_value = steps.reward.T, steps.value.T, steps.next_value.T
    advantage: Tensor = gae(reward, value, next_value, steps.terminated.T, steps.truncated.T, discount, lambda_).T
    return advantage, advantage + steps.value


def value_errors(batch: CreditedRows, value: Tensor, near: float | None) -> Terms:
    """-(V - R)² of rows (B,), to be maximised; with `near` the larger of that and of V kept so near to the old value."""
    worse = (value - batch.target) ** 2
    if near is not None:
        kept = batch.value + (value - batch.value).clamp(-near, near)
        worse = worse.maximum((kept - batch.target) ** 2)
    return mean_of(-worse)
