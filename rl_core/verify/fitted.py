"""Fitted Q evaluation on the analytic pendulum: values of known policies, how far few backups reach, when to believe neither."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rl_core.envs.pendulum import Mixed, Pendulum, dataset, expert
from rl_core.families.offline import Draw, Transitions
from rl_core.fqe import ALARM, FQE, FittedQ
from rl_core.verify.margins import Margin, above, at_most

SHARES = (0.0, 0.2, 0.4, 0.6, 1.0)
"""Of steps at which the expert acts uniformly, of each policy that is valued."""

SETTINGS = FQE(discount=0.98)

ERROR = 2.0
"""Of a value, rewards a tenth; the page's own runs are off by up to 1.3."""


@dataclass(frozen=True)
class Target:
    """The expert, uniform at a share of its steps."""

    share: float

    def __call__(self, obs: Tensor, draw: Draw) -> Tensor:
        """Observations (n, 3) -> actions (n, 1)."""
        best = torch.as_tensor(expert(obs.double().numpy(), np.random.default_rng(0)), dtype=torch.float32)
        return torch.where(draw.uniform(len(obs), 1) < self.share, 2 * draw.uniform(len(obs), 1) - 1, best)


def truth(share: float, discount: float = SETTINGS.discount, episodes: int = 400) -> float:
    """Discounted value over episodes of such a policy, rewards a tenth."""
    env, rng = Pendulum(), np.random.default_rng(7)
    obs, value = env.reset(episodes, rng), 0.0
    for step in range(env.steps):
        obs, reward, _, _ = env.step(Mixed(share)(obs, rng))
        value += float(discount**step * 0.1 * reward.mean())
    return value


def starts(count: int = 400) -> Tensor:
    """(count, 3) of fresh episodes."""
    return torch.as_tensor(Pendulum().reset(count, np.random.default_rng(3)), dtype=torch.float32)


def logged(name: str) -> Transitions:
    """A set of the pendulum, rewards a tenth."""
    data = dataset(name, 0)
    return replace(data, reward=0.1 * data.reward)


def fitted(name: str, share: float, settings: FQE = SETTINGS) -> FittedQ:
    """A critic of such a policy from a set of the pendulum."""
    return settings.fit(logged(name), Target(share))


def calibration() -> list[Margin]:
    """The page's: five values from mixed data, the share of the horizon that few backups cover, the alarm where data are random."""
    margins = list[Margin]()
    for share in SHARES:
        one = fitted("pend-eps60", share)
        values, true = one.values(starts()), truth(share)
        margins += [
            at_most(f"FQE on pend-eps60, {share:.0%} random, {true:.1f}: error of the value", abs(values.mean() - true), ERROR),
            at_most(f"FQE on pend-eps60, {share:.0%} random: starts with impossible values", one.impossible(values), ALARM),
        ]
    wild = fitted("pend-rand", 0.0)
    short = fitted("pend-mix10", 1.0, replace(SETTINGS, tau=0.01)).values(starts()).mean() / truth(1.0)
    return [
        *margins,
        above("FQE of the expert on pend-rand: starts with impossible values", wild.impossible(wild.values(starts())), ALARM),
        Margin("FQE on pend-mix10, 60 backups: share of the value", "0.65 to 0.75", f"{short:.3f}", bool(0.65 <= short <= 0.75)),
    ]
