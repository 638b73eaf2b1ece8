"""TD3+BC: TD3 whose actor is held to the logged actions, the critic's value scaled to their size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ope.primitives.terms import Terms
from rl_core.checks import above, at_least
from rl_core.exploration import noisy
from rl_core.families.offline import Draw, Learner, Stage, Transitions
from rl_core.loss import Loss
from rl_core.methods.td3 import EXPLORATION, ORIGINS, Twin, twin_networks, twin_stages
from rl_core.models.mlp import Sizes
from rl_core.paper import Paper


@dataclass(frozen=True)
class TD3BC:
    """Fujimoto and Gu 2021."""

    paper: ClassVar[Paper] = Paper(
        source="2106.06860",
        title="A Minimalist Approach to Offline Reinforcement Learning",
        spec="offline_common",
        equations={
            "actor": "α·mean Q_1(s, π(s)) / mean|Q_1(s, π(s))| - mean (π(s) - a)² over rows and dimensions",
            "critic": "TD3's",
        },
        defaults={"alpha": "paper and code: 2.5", **ORIGINS, "exploration": EXPLORATION},
    )
    alpha: float = 2.5
    twin: Twin = Twin()
    exploration: float = 0.1
    """Spread of the noise with which it collects, once it does."""

    def __post_init__(self) -> None:
        at_least(self, 0, "alpha")
        above(self, 0, "exploration")

    @property
    def tau(self) -> float:
        """Share of the way that lagged copies move."""
        return self.twin.tau

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        """An actor and twin critics."""
        return twin_networks(sizes)

    def lagged(self) -> tuple[str, ...]:
        """Both."""
        return "actor", "critic"

    def stages(self) -> tuple[Stage, ...]:
        """TD3's."""
        return twin_stages(self.twin, self.actor)

    def explore(self, learner: Learner, obs: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """What the policy takes, with noise."""
        return noisy(learner.nets["actor"](obs), self.exploration, draw)

    def actor(self, learner: Learner, batch: Transitions, draw: Draw) -> Loss:
        """Value of what the policy does, and how far that is from what was done."""
        action = learner.nets["actor"](batch.obs)
        return held(learner, batch.obs, action, batch.action, self.alpha)


def held(learner: Learner, obs: Tensor, action: Tensor, wanted: Tensor, alpha: float) -> Loss:
    """α·ΣQ / Σ|Q|, without a gradient through the denominator, less the mean squared distance of actions to those wanted."""
    q = learner.nets["critic"].first(obs, action)
    apart = (action - wanted) ** 2
    value, distance = Terms(q.sum(), q.detach().abs().sum()), Terms(apart.sum(), apart.new_full((), float(apart.numel())))
    return Loss((value, distance), (alpha, -1.0), {"apart": Terms(distance.num.detach(), distance.den)})
