"""AsymRE: REINFORCE with a baseline below the group's mean, so that success counts more than failure off-policy.

Value per token: (r - (mean + shift))·logp with shift < 0, which is REINFORCE plus |shift|·logp: an imitation of whoever sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ope.primitives._xp import Array, namespace
from ope.primitives.baselines import group_center
from rl_core.aggregation import Aggregation, TokenMean
from rl_core.families.token import Statistics, TokenBatch
from rl_core.loss import Loss
from rl_core.paper import Paper


@dataclass(frozen=True)
class AsymRE:
    """Arnal et al. 2025, in the form of Yao et al. 2025."""

    paper: ClassVar[Paper] = Paper(
        source="2506.20520",
        title="Asymmetric REINFORCE for off-policy Reinforcement Learning: Balancing positive and negative rewards",
        spec="group_relative_reinforce",
        equations={"advantage": "r - (mean of the group + shift)", "value": "A·logp"},
        defaults={"shift": "Trinity-RFT's asymre advantage: -0.1", "aggregation": "Trinity-RFT 0.6: token-mean"},
        differs={"form": "the regulariser -coef·logp of REC is the same gradient while nothing is gated; here the shift"},
    )
    shift: float = -0.1
    aggregation: Aggregation = TokenMean()

    def credit(self, batch: TokenBatch) -> Array:
        """Rewards less the group's mean and the shift. (B,)."""
        rows = namespace(batch.mask).any(batch.mask, axis=-1)
        return group_center(batch.reward, batch.group, rows) - self.shift

    def loss(self, batch: TokenBatch, logp: Array, stats: Statistics) -> Loss:
        """One term."""
        return Loss((self.aggregation.terms(batch.token_advantage * logp, batch.mask),), (1.0,), {})
