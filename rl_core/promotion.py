"""Whether a policy of control may take the place of another: by transitions that taught neither, and always in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ope.data import InputError
from rl_core.families.offline import Draw, Transitions
from rl_core.fqe import FQE, REACH, Paired, TargetPolicy, counts, paired
from rl_core.scaling import Scaling
from rl_core.support import SAMPLE, nearest_pairs, overlap
from rl_core.trainers.offline import Act

STATE_WEIGHT = 2.0
"""What a difference in standardised observations costs beside one in actions, as in PRDC."""

LARGEST = 100.0
"""Size of the largest value that rewards allow, to which they are scaled for fitting."""


@dataclass(frozen=True)
class Verdict:
    """What speaks for a candidate, and what against."""

    paired: Paired
    """Difference of discounted values at the starts of the episodes, in units of rewards."""
    beyond: float
    """Share of the candidate's actions that are farther from the data than all but 1 % of logged ones are."""
    reasons: tuple[str, ...]
    """Why the difference is not to be believed."""

    @property
    def promotes(self) -> bool:
        """The interval of the difference is above 0, and nothing speaks against the numbers."""
        return self.paired.low > 0 and not self.reasons


def compared(
    candidate: Act,
    baseline: Act,
    data: Transitions,
    settings: FQE,
    *,
    fits: int = 5,
    level: float = 0.95,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Verdict:
    """Paired FQE of two policies from the starts of the episodes of held-out data, several fits of each.

    Raises InputError for data of fewer than 20 episodes, fewer than three fits, fits that do not reach over the horizon, and
    policies of other sizes than the data.
    """
    if settings.reach < REACH:
        raise InputError(
            f"steps: found {settings.steps}, whose backups cover {settings.reach:.0%} of the horizon; expected at least "
            f"{math.ceil(math.log(1 - REACH) / math.log(settings.discount) / settings.tau):,}"
        )
    for who, policy in (("candidate", candidate), ("baseline", baseline)):
        check_sizes(who, policy, data)
    size = max(float(data.reward.abs().max()), 1e-12) / (1 - settings.discount)
    scaled = replace(data, reward=data.reward * (LARGEST / size))
    done, steps = 0, 2 * fits * settings.steps

    def advance(step: int) -> None:
        nonlocal done
        done += 1
        if done % 100 == 0:
            progress(done, steps)

    found = [settings.fits(scaled, target_of(one), fits, advance) for one in (candidate, baseline)]
    apart = paired(found[0], found[1], starts(data), level=level)
    share, alarm = unsupported(candidate, data)
    against = [f"candidate: {share:.0%} of its actions are beyond the data; expected at most 5 %"] if alarm else []
    back = size / LARGEST
    told = replace(apart, difference=apart.difference * back, stderr=apart.stderr * back, low=apart.low * back)
    return Verdict(told, share, (*apart.reasons, *against))


def check_sizes(who: str, policy: Act, data: Transitions) -> None:
    """Raises InputError for a policy that does not take the data's observations, or acts in other dimensions."""
    try:
        found = policy(data.obs[:1].double().numpy()).shape[1]
    except InputError as error:
        raise InputError(f"{who}: {error}") from None
    if found != data.sizes[1]:
        raise InputError(f"{who}: found actions of {found} numbers; expected {data.sizes[1]}, as the data have")


def starts(data: Transitions) -> Tensor:
    """Observations (n, S) with which episodes begin."""
    lengths = counts(data)
    return data.obs[lengths.cumsum(dim=0) - lengths]


def unsupported(policy: Act, data: Transitions) -> tuple[float, bool]:
    """Share of a policy's actions, at rows of the data, that are far from any logged pair; whether it is too large."""
    scaling = Scaling.of(data.obs)
    obs = data.obs[:: math.ceil(len(data) / SAMPLE)]
    found = overlap(
        nearest_pairs(scaling.apply(data.obs), data.action, STATE_WEIGHT), scaling.apply(obs),
        torch.as_tensor(policy(obs.double().numpy()), dtype=torch.float32),
    )  # fmt: skip
    return found.beyond, found.alarm


def target_of(act: Act) -> TargetPolicy:
    """A policy of arrays as one of tensors."""

    def target(obs: Tensor, draw: Draw) -> Tensor:
        return torch.as_tensor(act(obs.double().numpy()), dtype=torch.float32)

    return target
