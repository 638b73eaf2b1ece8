"""Fitted Q evaluation with a network: what a policy is worth from transitions of others, where ratios of densities are of no use.

Le et al. 2019 (1903.08738). Its errors are those of the model and nobody tells them: so values are held against what rewards allow,
and policies are compared in pairs from the same starts, never by two separate values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Generator, Tensor, nn

from ope.data import InputError
from rl_core.buffers import Buffer
from rl_core.checks import at_least
from rl_core.families.offline import Draw, Drawn, Transitions, backup, numbered
from rl_core.models.mlp import Critic, Sizes
from rl_core.scaling import Scaling

TargetPolicy = Callable[[Tensor, Draw], Tensor]
"""Observations (n, S), unscaled -> actions (n, A), drawn anew at every call where the policy is not deterministic."""

SLACK = 0.006
"""Of the range between the lowest and the highest value that rewards allow: how far beyond counts as impossible."""

EPISODES = 20
"""Least episodes of a comparison: drawn anew, fewer tell too little of how far other logs would be."""

FITS = 3
"""Least fits of either policy in a comparison."""

RESAMPLED = 1
"""Beside a fit's seed: the stream that draws its episodes."""

REACH = 0.98
"""Least share of the horizon that backups must cover."""

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
        at_least(self, 1, "steps", "batch", "width", "layers")
        at_least(self, 0, "rate")
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
        return FittedQ(self, critic, scaling, policy, *_bounds(data.reward, self.discount), _mark(data))

    def fits(
        self, data: Transitions, policy: TargetPolicy, count: int = 5, progress: Callable[[int], object] = lambda step: None
    ) -> tuple[FittedQ, ...]:
        """Several fits, each from a seed of its own and on as many episodes drawn anew from the data, with replacement.

        What `paired` needs to know how far such data, and such fits, are from others. Two policies have the same draws. Raises
        InputError for data of fewer than 20 episodes.
        """
        made = list[FittedQ]()
        for one in range(count):
            settings = replace(self, seed=self.seed + one)
            found = settings.fit(resampled(data, settings.seed), policy, progress)
            lowest, highest = _bounds(data.reward, self.discount)  # of all rewards: a draw may have none of the rare ones
            made.append(replace(found, lowest=lowest, highest=highest, data=_mark(data), episodes=len(counts(data))))
        return tuple(made)


@dataclass(frozen=True)
class FittedQ:
    """A policy's critic, and between which values any critic of it must be."""

    settings: FQE
    critic: nn.Module
    scaling: Scaling
    policy: TargetPolicy
    lowest: float
    highest: float
    data: tuple[float, ...]
    """Rows, and sums of rewards and observations: what tells one data set from another."""
    episodes: int = 0
    """Of the data from which those of this fit were drawn anew, by `FQE.fits`; 0: it is of the data as they are."""

    @torch.no_grad()
    def values(self, obs: Tensor, draws: int = 8, seed: int = 0) -> NDArray[np.float64]:
        """(n,) of starts (n, S): the mean over some draws of the policy's action."""
        draw, scaled = Drawn(Generator().manual_seed(seed)), self.scaling.apply(obs)
        found = [self.critic(scaled, self.policy(obs, draw))[0] for _ in range(draws)]
        return np.asarray(torch.stack(found).mean(dim=0).double().numpy())

    def impossible(self, values: NDArray[np.float64]) -> float:
        """Share of values that rewards do not allow, by more than `SLACK`. Above `ALARM` the data do not support the policy."""
        slack = SLACK * (self.highest - self.lowest)
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
    fits: int
    reasons: tuple[str, ...]
    """Why the difference is not to be believed."""

    @property
    def promotes(self) -> bool:
        """Whether the candidate may go one step on: the interval is above 0, and nothing speaks against the numbers."""
        return self.low > 0 and not self.reasons


def paired(candidate: Sequence[FittedQ], baseline: Sequence[FittedQ], starts: Tensor, *, level: float = 0.95) -> Paired:
    """The difference of two policies over the same starts (n, S), of held-out episodes: mean over pairs of fits, by `FQE.fits`.

    Its error is the deviation of pairs, each of other episodes and another seed, and that of the mean over starts; the interval is
    Student's t of pairs. The deviation is not divided by their number: all pairs are of one log, and its noise is in every one of
    them. By starts alone, or by seeds alone, a policy that is no better is promoted in a third of all logs.
    Raises InputError for fewer than three fits of either, other numbers of them, other settings, seeds or data, or fewer than two
    starts.
    """
    every = [*candidate, *baseline]
    if min(len(candidate), len(baseline)) < FITS or len(candidate) != len(baseline) or len(starts) < 2:
        found = f"{len(candidate)} and {len(baseline)} fits, {len(starts)} starts"
        raise InputError(f"found {found}; expected as many of either, at least {FITS}, by FQE.fits, and at least two starts")
    if len({(replace(one.settings, seed=0), one.data) for one in every}) > 1:
        raise InputError("found fits of different settings or data; expected the same of both policies")
    seeds = [[one.settings.seed for one in some] for some in (candidate, baseline)]
    if seeds[0] != seeds[1] or len(set(seeds[0])) < len(seeds[0]):
        raise InputError(f"found fits of seeds {seeds[0]} and {seeds[1]}; expected the same of both, each once, by FQE.fits")
    if not all(one.episodes for one in every):
        raise InputError("found fits of the data as they are; expected those of FQE.fits, each of episodes drawn anew")
    values = [np.stack([one.values(starts) for one in some]) for some in (candidate, baseline)]
    apart = values[0] - values[1]
    between_fits, between_starts = apart.mean(axis=1), apart.mean(axis=0)
    count, n = apart.shape
    episodes = candidate[0].episodes
    among = episodes / (episodes - 1) * between_fits.var(ddof=1)  # n drawn anew spread by (n - 1) / n of what others would
    stderr = math.sqrt(among + between_starts.var(ddof=1) / n)
    reasons = [
        f"{who}: {share:.0%} of starts have values that rewards do not allow; the data do not support it"
        for who, fits, found in (("candidate", candidate, values[0]), ("baseline", baseline, values[1]))
        if (share := float(np.mean([one.impossible(some) for one, some in zip(fits, found, strict=True)]))) > ALARM
    ]
    if candidate[0].settings.reach < REACH:
        reasons.append(f"backups cover {candidate[0].settings.reach:.0%} of the horizon; expected 98 %: fit for longer")
    low = float(apart.mean() - stats.t.ppf(level, count - 1) * stderr)
    return Paired(float(apart.mean()), stderr, low, level, n, count, tuple(reasons))


def resampled(data: Transitions, seed: int) -> Transitions:
    """As many episodes as there are, drawn with replacement. Raises InputError for fewer than 20."""
    lengths = counts(data)
    if len(lengths) < EPISODES:
        raise InputError(
            f"found {len(lengths)} episodes; expected at least {EPISODES}: how sure a difference is, is seen between them"
        )
    first = lengths.cumsum(dim=0) - lengths
    rng = np.random.default_rng((seed, RESAMPLED))
    drawn = torch.as_tensor(rng.integers(len(lengths), size=len(lengths)))
    long = lengths[drawn]
    age = torch.arange(int(long.sum())) - (long.cumsum(dim=0) - long).repeat_interleave(long)
    return data.rows(first[drawn].repeat_interleave(long) + age)


def counts(data: Transitions) -> Tensor:
    """(episodes,) rows of each."""
    return torch.bincount(numbered(data))


def _mark(data: Transitions) -> tuple[float, ...]:
    """What tells one data set from another."""
    return len(data), float(data.reward.double().sum()), float(data.obs.double().sum())


def _bounds(reward: Tensor, discount: float) -> tuple[float, float]:
    """Between which returns must be, going by the rewards that were seen; 0 is always possible, where an episode ends."""
    return min(float(reward.min()), 0.0) / (1 - discount), max(float(reward.max()), 0.0) / (1 - discount)
