"""REINFORCE: the advantage times the log-likelihood. Whose samples they are enters as a weight on the ratio, or not at all.

Value per token: min(ρ, bound)·A·logp with ρ = π/μ held fixed, or A·logp. With a group's mean as baseline and ρ = 1 its direction is
the gradient of self-normalised IPS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ope.primitives._xp import Array, namespace, stop_gradient
from ope.primitives.baselines import group_center
from ope.primitives.weights import clip, ratio
from rl_core.aggregation import Aggregation, TokenMean
from rl_core.families.token import Statistics, TokenBatch
from rl_core.loss import Loss
from rl_core.paper import Paper


@dataclass(frozen=True)
class REINFORCE:
    """Williams 1992, with the mean of the group as baseline. `truncate`: bound of the importance weight (TIS); None: no weight."""

    paper: ClassVar[Paper] = Paper(
        source="10.1007/BF00992696",
        title="Simple statistical gradient-following algorithms for connectionist reinforcement learning",
        spec="llm_common",
        equations={"value": "A·logp, or sg(min(ρ, bound))·A·logp"},
        defaults={"truncate": "the paper knows one policy only", "aggregation": "verl 0.9 and Trinity-RFT 0.6"},
        differs={"baseline": "Williams leaves it open; the mean of the group, as GRPO's kin have it, was taken"},
    )
    truncate: float | None = None
    aggregation: Aggregation = TokenMean()

    def credit(self, batch: TokenBatch) -> Array:
        """Rewards less their group's mean. (B,)."""
        return group_center(batch.reward, batch.group, namespace(batch.mask).any(batch.mask, axis=-1))

    def loss(self, batch: TokenBatch, logp: Array, stats: Statistics) -> Loss:
        """One term."""
        value = batch.token_advantage * logp
        if self.truncate is not None:
            value = clip(stop_gradient(ratio(logp, batch.logp_behavior)), 0.0, self.truncate) * value
        return Loss((self.aggregation.terms(value, batch.mask),), (1.0,), {})
