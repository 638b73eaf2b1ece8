"""Methods of the online family as tests look at them: steps, and policies that say what they are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl_core.envs.pendulum import Pendulum
from rl_core.families.online import CreditedRows, OnlineMethod, Steps
from rl_core.methods.ppo_control import ControlPPO
from rl_core.trainers.online import OnlineSchedule, OnlineTrainer

Floats = NDArray[np.float64]
torch.set_num_threads(1)
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
double = partial(torch.tensor, dtype=torch.float64)
NO, LAST = [False, False, False], [False, False, True]
REWARD, VALUE, FOLLOWING = [1.0, 0.0, 2.0], [0.5, 0.4, 0.3], [0.4, 0.3, 0.2]
RATIO, Q, EXPECTED = [2.0, 0.5, 1.5], [0.6, 0.5, 0.2], [0.45, 0.35, 0.25]


def steps(reward: Any, value: Any, following: Any, terminated: Any, truncated: Any) -> Steps:
    """Arrays (N, T) as the family has them, (T, N)."""
    reward, value, following = (double(one).T for one in (reward, value, following))
    flags = (torch.tensor(one).T for one in (terminated, truncated))
    nothing = torch.zeros((*reward.shape, 1), dtype=torch.float64)
    return Steps(nothing, nothing, reward, *flags, torch.zeros_like(reward), value, following, torch.zeros_like(reward))


@dataclass(frozen=True)
class Said:
    """A distribution of which only log-probabilities of what was done are known."""

    values: Tensor

    def logp(self, action: Tensor) -> Tensor:
        return self.values

    def entropy(self) -> Tensor:
        return torch.zeros_like(self.values)

    def kl(self, other: Any) -> Tensor:
        return torch.zeros_like(self.values)

    def rows(self, which: Any) -> Said:
        return Said(self.values[which])


def rows_of(ratio: Sequence[float], advantage: Sequence[float]) -> tuple[CreditedRows, Said]:
    """Rows with such ratios, and what the policy says of them, which carries the gradient."""
    n = len(ratio)
    nothing = torch.zeros(n, dtype=torch.float64)
    batch = CreditedRows(nothing[:, None], nothing[:, None], nothing, double(advantage), nothing, nothing)
    return batch, Said(double(ratio).log().requires_grad_())


def collected(method: OnlineMethod | None = None, **settings: Any) -> tuple[OnlineTrainer, CreditedRows]:
    """A trainer on the pendulum, and a batch of it."""
    trainer = OnlineTrainer(method or ControlPPO(), Pendulum(), OnlineSchedule(horizon=32, count=4, width=16, **settings))
    return trainer, trainer.credited(trainer.collect())
