"""The offline family: policies learned from transitions in memory, whoever collected them, with critics and lagged copies of them.

A method says which networks it has, and in which stages a step goes: what a stage learns, its loss as ratios of sums, how often it
comes, and which lagged copies follow it. The trainer owns all state. Losses are maximised, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from ope.primitives.terms import Terms
from rl_core.loss import Loss
from rl_core.models.mlp import Sizes
from rl_core.paper import Paper


@dataclass(frozen=True)
class Transitions:
    """n steps of an environment. Actions are in [-1, 1]."""

    obs: Tensor
    """(n, S)."""
    action: Tensor
    """(n, A)."""
    reward: Tensor
    """(n,)."""
    next_obs: Tensor
    """(n, S) what really followed, also where an episode was cut: never what a reset gave."""
    terminated: Tensor
    """(n,) 1.0 where the process ended: nothing is earned afterwards."""
    truncated: Tensor
    """(n,) 1.0 where only the recording ended: values go on."""
    logp_behavior: Tensor | None = None
    """(n,) log density with which the action was drawn, where it was drawn."""
    policy: Tensor | None = None
    """(n,) id of who acted."""
    row: Tensor | None = None
    """(n,) numbers of the rows in the buffer that they are from."""
    weight: Tensor | None = None
    """(n,) what a row counts for in the critics' errors, where rows were not drawn all alike; at most 1."""

    def __len__(self) -> int:
        return len(self.obs)

    @property
    def sizes(self) -> tuple[int, int]:
        """Dimensions of observation and action."""
        return self.obs.shape[1], self.action.shape[1]

    def rows(self, which: Tensor | slice) -> Transitions:
        """Some of them."""
        return replace(self, **{one.name: value[which] for one in fields(self) if (value := getattr(self, one.name)) is not None})


def joined(some: Sequence[Transitions]) -> Transitions:
    """Several after one another; what one of them does not know, none does."""
    columns = [[getattr(part, one.name) for part in some] for one in fields(Transitions)]
    return Transitions(*(None if any(part is None for part in column) else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def numbered(data: Transitions) -> Tensor:
    """(n,) number of the episode that each row is of: one ends where either flag is set, or with the data."""
    ends = ((data.terminated > 0) | (data.truncated > 0)).long()
    return ends.cumsum(dim=0) - ends


def discounted(reward: Tensor, episode: Tensor, discount: float) -> Tensor:
    """Σ_t γ^t r_t of every episode (episodes,), of rows (n,) in order and their episodes' numbers (n,)."""
    counts = torch.bincount(episode)
    age = torch.arange(len(reward), device=reward.device) - (counts.cumsum(dim=0) - counts)[episode]
    return torch.bincount(episode, weights=reward.double() * discount ** age.double())


class Draw(Protocol):
    """Where random numbers come from: a generator, or numbers that were drawn before."""

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        ...

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1)."""
        ...


@dataclass(frozen=True)
class Drawn:
    """Numbers of a generator."""

    rng: Generator

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.rng, device=self.rng.device)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1)."""
        return torch.rand(shape, generator=self.rng, device=self.rng.device)


@dataclass(frozen=True)
class Learner:
    """What a loss looks at: networks by name, their lagged copies, and what the method prepared from the whole data."""

    nets: Mapping[str, Any]
    lagged: Mapping[str, Any]
    prepared: Any = None


StageLoss = Callable[[Learner, Transitions, Draw], Loss]


@dataclass(frozen=True)
class Stage:
    """A part of a step. Stages follow one another, and each sees what those before it learned."""

    learns: Mapping[str, float]
    """Networks that take a step on the loss, with their learning rates. No gradient reaches others."""
    loss: StageLoss
    every: int = 1
    """Steps between two of it."""
    follows: tuple[str, ...] = ()
    """Networks whose lagged copies move towards them afterwards."""
    copied_every: int | None = None
    """Steps between two moments at which those copies become their networks; None: they move by the method's tau."""
    cosine: bool = False
    """Learning rates fall to 0 by the end of the schedule, as half a cosine."""


class OfflineMethod(Protocol):
    """A method of the family: a frozen dataclass whose fields are its configuration."""

    paper: ClassVar[Paper]

    @property
    def tau(self) -> float:
        """Share of the way that lagged copies move."""
        ...

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        """Fresh networks; "actor" maps observations (B, S) to actions (B, A)."""
        ...

    def lagged(self) -> tuple[str, ...]:
        """Networks that have a lagged copy."""
        ...

    def stages(self) -> tuple[Stage, ...]:
        """What a step does, in order."""
        ...


@runtime_checkable
class WithSelection(Protocol):
    """A method that learns from a part of the data."""

    def select(self, data: Transitions) -> Tensor:
        """Numbers of the rows that count."""
        ...


@runtime_checkable
class WithPreparation(Protocol):
    """A method that needs something of the whole data before it can learn."""

    def prepare(self, data: Transitions) -> Any:
        """What losses find in `Learner.prepared`."""
        ...


@runtime_checkable
class WithExploration(Protocol):
    """A method that draws actions when it collects data itself."""

    def explore(self, learner: Learner, obs: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Actions (B, A) for observations, and the log densities (B,) with which they were drawn."""
        ...


def mean_of(values: Tensor) -> Terms:
    """A mean over rows (B,), or the sum over members of their means (E, B)."""
    return Terms(values.sum(), values.new_full((), float(values.shape[-1])))


def weighed(values: Tensor, batch: Transitions) -> Tensor:
    """(B,) or (E, B), each row by its weight where the batch has any."""
    return values if batch.weight is None else values * batch.weight


def squared_errors(found: Tensor, wanted: Tensor, batch: Transitions) -> Terms:
    """-w(Q - y)² of every member (E, B), to be maximised: Σ over members of the mean over rows."""
    return mean_of(-weighed((found - wanted) ** 2, batch))


def fitted(found: Tensor, wanted: Tensor, batch: Transitions) -> Loss:
    """Squared errors of critics (E, B), the first one's mean value to look at, and the rows' errors where priorities need them."""
    errors = None if batch.weight is None else (found.detach() - wanted).abs().mean(dim=0)
    return Loss((squared_errors(found, wanted, batch),), (1.0,), {"q": mean_of(found.detach()[0])}, errors)


def backup(batch: Transitions, following: Tensor, discount: float) -> Tensor:
    """r + γ·(1 - terminated)·V(s'): a cut of the recording ends nothing. (B,)."""
    return batch.reward + discount * (1 - batch.terminated) * following
