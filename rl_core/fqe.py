"""Fitted Q evaluation with a network: what a policy is worth from transitions of others, where ratios of densities are of no use.

Le et al. 2019 (1903.08738). Its errors are those of the model and nobody tells them: so values are held against what rewards allow,
and policies are compared in pairs from the same starts, never by two separate values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Generator, Tensor, nn

from ope.data import InputError
from rl_core.buffers import Buffer
from rl_core.families.offline import Draw, Drawn, Transitions, backup
from rl_core.models.mlp import Critic, Sizes
from rl_core.scaling import Scaling

TargetPolicy = Callable[[Tensor, Draw], Tensor]
"""Observations (n, S), unscaled -> actions (n, A), drawn anew at every call where the policy is not deterministic."""

ALARM = 0.05
"""Share of starts with impossible values from which on an estimate is not to be believed."""


@dataclass(frozen=True)
class FQE:
    """Settings of a fit."""

    discount: float = 0.99
    steps: int = 6000
    batch: int = 256
    rate: float = 1e-3
    tau: float = 0.05
    """Share of the way that the lagged copy moves at every step."""
    width: int = 64
    layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.discount < 1 or not 0 < self.tau <= 1:
            raise InputError(f"found discount={self.discount}, tau={self.tau}; expected discount in [0, 1) and tau in (0, 1]")

    @property
    def reach(self) -> float:
        """Share of the horizon that so many backups cover: 1 - discount^(tau·steps). Below 0.98, values are too near 0."""
        return 1.0 - math.pow(self.discount, self.tau * self.steps)

    def fit(self, data: Transitions, policy: TargetPolicy, progress: Callable[[int], object] = lambda step: None) -> FittedQ:
        """A critic of the policy. `data` should be of episodes that did not teach it."""
        scaling = Scaling.of(data.obs)
        buffer = Buffer(len(data), *data.sizes)
        buffer.add(replace(data, obs=scaling.apply(data.obs), next_obs=scaling.apply(data.next_obs)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            critic = Critic(Sizes(*data.sizes, self.width, self.layers), members=1)
        lagged = copy.deepcopy(critic).requires_grad_(False)
        optimizer = torch.optim.Adam(critic.parameters(), lr=self.rate, fused=True)
        rng = Generator().manual_seed(self.seed + 1)
        draw = Drawn(rng)
        leading, lagging = list[Tensor](critic.parameters()), list[Tensor](lagged.parameters())
        for step in range(1, self.steps + 1):
            index = buffer.draw(self.batch, rng)
            batch = buffer.take(index)
            with torch.no_grad():
                following = lagged.first(batch.next_obs, policy(data.next_obs[index], draw))
                wanted = backup(batch, following, self.discount)
            optimizer.zero_grad(set_to_none=True)
            ((critic.first(batch.obs, batch.action) - wanted) ** 2).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            torch._foreach_lerp_(lagging, leading, self.tau)
            progress(step)
        return FittedQ(self, critic, scaling, policy, *_bounds(data.reward, self.discount))


@dataclass(frozen=True)
class FittedQ:
    """A policy's critic, and between which values any critic of it must be."""

    settings: FQE
    critic: nn.Module
    scaling: Scaling
    policy: TargetPolicy
    lowest: float
    highest: float

    @torch.no_grad()
    def values(self, obs: Tensor, draws: int = 8, seed: int = 0) -> NDArray[np.float64]:
        """(n,) of starts (n, S): the mean over some draws of the policy's action."""
        draw, scaled = Drawn(Generator().manual_seed(seed)), self.scaling.apply(obs)
        found = [self.critic(scaled, self.policy(obs, draw))[0] for _ in range(draws)]
        return np.asarray(torch.stack(found).mean(dim=0).double().numpy())

    def impossible(self, values: NDArray[np.float64], slack: float = 0.5) -> float:
        """Share of values that rewards do not allow, by more than `slack`. Above `ALARM` the data do not support the policy."""
        return float(((values > self.highest + slack) | (values < self.lowest - slack)).mean())


@dataclass(frozen=True)
class Paired:
    """How much more one policy is worth than another, from the same starts."""

    difference: float
    stderr: float
    low: float
    """Lower end of the one-sided interval."""
    level: float
    n: int
    reasons: tuple[str, ...]
    """Why the difference is not to be believed."""

    @property
    def promotes(self) -> bool:
        """Whether the candidate may go one step on: it is better beyond doubt, and nothing speaks against the numbers."""
        return self.low > 0 and not self.reasons


def paired(candidate: FittedQ, baseline: FittedQ, starts: Tensor, *, level: float = 0.95, slack: float = 0.5) -> Paired:
    """The difference of two critics over the same starts (n, S), those of held-out episodes. Both fitted on the same data.

    Raises InputError for fits of different settings, or fewer than two starts: sampling error is that of the starts alone.
    """
    if replace(candidate.settings, seed=0) != replace(baseline.settings, seed=0) or len(starts) < 2:
        raise InputError(f"found {len(starts)} starts, or fits of different settings; expected at least two, and the same settings")
    values = candidate.values(starts), baseline.values(starts)
    apart = values[0] - values[1]
    stderr = float(apart.std(ddof=1) / math.sqrt(len(apart)))
    reasons = [
        f"{who}: {share:.0%} of starts have values that rewards do not allow; the data do not support it"
        for who, one, found in (("candidate", candidate, values[0]), ("baseline", baseline, values[1]))
        if (share := one.impossible(found, slack)) > ALARM
    ]
    if candidate.settings.reach < 0.98:
        reasons.append(f"backups cover {candidate.settings.reach:.0%} of the horizon; expected 98 %: fit for longer")
    low = float(apart.mean() - stats.t.ppf(level, len(apart) - 1) * stderr)
    return Paired(float(apart.mean()), stderr, low, level, len(apart), tuple(reasons))


def _bounds(reward: Tensor, discount: float) -> tuple[float, float]:
    """Between which returns must be, going by the rewards that were seen; 0 is always possible, where an episode ends."""
    return min(float(reward.min()), 0.0) / (1 - discount), max(float(reward.max()), 0.0) / (1 - discount)
