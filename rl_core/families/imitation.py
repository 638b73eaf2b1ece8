"""The imitation family: policies learned from what an expert did, without rewards, against a judge who tells the two apart.

The judge is what papers call the discriminator, D(s, a), high where the expert was.

A method says what the judge maximises, what of its judgement is a reward, how much each policy of the past counts, and how a round
goes. The inner learner is one of the offline family that explores. The trainer owns all state. Losses are maximised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import functional

from ope.data import InputError
from rl_core.checks import at_least
from rl_core.families.offline import OfflineMethod, mean_of
from rl_core.loss import Loss
from rl_core.paper import Paper

SEED_ID = 0
"""Id of uniform actions, which no mixture counts; learners are 1, 2, ... by the round that ended with them."""


@dataclass(frozen=True)
class ReverseKL:
    """-E_e[exp(-D)] - E_d[D]: at its best D = log(e/d), and it is KL(d‖e) - 1.

    Means of minibatches are unbiased, as those of the Donsker-Varadhan form, with a logarithm of one, are not.
    """

    def objective(self, expert: Tensor, policy: Tensor) -> Loss:
        """D of expert rows (B,) and of policy rows (B',)."""
        return _both(-(-expert).exp(), -policy)


@dataclass(frozen=True)
class JensenShannon:
    """E_e[log σ(D)] + E_d[log σ(-D)]: at its best D = log(e/d), and it is 2·JS(e, d) - log 4."""

    def objective(self, expert: Tensor, policy: Tensor) -> Loss:
        """D of expert rows (B,) and of policy rows (B',)."""
        return _both(functional.logsigmoid(expert), functional.logsigmoid(-policy))


@dataclass(frozen=True)
class Wasserstein:
    """E_e[D] - E_d[D]: among functions of slope 1, to which a penalty holds D, at best the distance of the two."""

    def objective(self, expert: Tensor, policy: Tensor) -> Loss:
        """D of expert rows (B,) and of policy rows (B',)."""
        return _both(expert, -policy)


def _both(expert: Tensor, policy: Tensor) -> Loss:
    """Two means, each over its own rows."""
    return Loss((mean_of(expert), mean_of(policy)), (1.0, 1.0), {})


@dataclass(frozen=True)
class Plan:
    """How a round goes."""

    steps: int = 1000
    """Of the environment, between two learners."""
    rl_every: int = 2
    """Steps of the environment between two of the inner learner."""
    judge_steps: int = 100
    """Of the judge, after a round."""
    judge_every: int | None = None
    """Steps of the inner learner between two of the judge during a round; "none": it rests."""
    against: Literal["mixture", "replay"] = "mixture"
    """Whom the judge tells from the expert: learners by weight, from rows that each is rolled for, or all that replay holds."""
    samples: int = 1000
    """Rows that a learner is rolled for, exploration included. Whole episodes: a part of one shows early states too often."""
    rolls: int = 2
    """Episodes side by side that they are of."""
    learners: int = 60
    """Kept at most; those with the least mass go first, and what they were rolled for goes with them."""
    replay: Literal["uniform", "weighted"] = "uniform"
    """How the inner learner draws its rows: all alike, or as the judge does."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "rl_every", "judge_every", "samples", "rolls", "learners")
        at_least(self, 0, "judge_steps")
        if self.samples % self.rolls:
            raise InputError(f"samples: found {self.samples} for {self.rolls} episodes; expected as many rows of each")
        if self.against == "replay" and self.replay == "weighted":
            raise InputError('replay: found "weighted" where the judge looks at replay; expected "uniform", or against = "mixture"')


@runtime_checkable
class ImitationMethod(Protocol):
    """A method of the family: a frozen dataclass whose fields are its configuration."""

    paper: ClassVar[Paper]

    @property
    def inner(self) -> OfflineMethod:
        """Who learns from the judge's rewards; it must explore."""
        ...

    @property
    def plan(self) -> Plan:
        """How a round goes."""
        ...

    @property
    def bounded(self) -> bool:
        """Whether the judge's output is tanh'ed."""
        ...

    @property
    def judge_rate(self) -> float:
        """Learning rate of the judge."""
        ...

    @property
    def penalty(self) -> float:
        """Weight of (‖∇D‖ - 1)² between expert and policy rows."""
        ...

    @property
    def returns(self) -> Literal["mixture", "last"]:
        """What a run ends with: one of the learners for each episode, or the last policy."""
        ...

    def objective(self, expert: Tensor, policy: Tensor) -> Loss:
        """What the judge maximises, from D of expert rows (B,) and of policy rows (B',), but for the penalty."""
        ...

    def reward(self, judged: Tensor) -> Tensor:
        """(B,) D -> (B,)."""
        ...

    def weigh(self, weights: Tensor, edge: float) -> Tensor:
        """Weights (T,) of learners -> (T + 1,) with a new one, whose mean D is `edge` above theirs. 0: it is not kept."""
        ...
