"""PPO: the clipped surrogate with a critic's generalised advantages, one credit per token.

Value per token: min(ρA, clip(ρ, 1 - ε_low, 1 + ε_high)A). The critic minimises half of the larger of two squared
errors, its own and that of its value kept near the old one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ope.primitives._xp import Array, namespace
from ope.primitives.reduce import divide
from ope.primitives.returns import reverse_sum, temporal_difference
from ope.primitives.surrogates import clipped, dual_clipped
from ope.primitives.weights import ratio
from rl_core.aggregation import Aggregation, TokenMean
from rl_core.families.token import Statistics, TokenBatch, counted
from rl_core.loss import Loss
from rl_core.methods.grpo import clip_shares
from rl_core.paper import Paper


@dataclass(frozen=True)
class PPO:
    """Schulman et al. 2017, with the discount and λ that language models use. Needs `value` in the batch."""

    paper: ClassVar[Paper] = Paper(
        source="1707.06347",
        title="Proximal Policy Optimization Algorithms",
        spec="llm_common",
        equations={
            "value": "min(ρA, clip(ρ, 1 - eps_low, 1 + eps_high)A)",
            "advantage": "GAE of the reward at the last token, whitened over all tokens",
            "critic": "max((V - R)², (clip(V, V_old ± value_clip) - R)²) / 2",
        },
        defaults={
            "eps_low": "paper: 0.2",
            "eps_high": "paper: 0.2",
            "dual_clip": "paper: none; verl 0.9 and Trinity-RFT 0.6: 3.0",
            "discount": "language models: 1; the paper's control tasks 0.99",
            "lambda_": "language models: 1; the paper's control tasks 0.95",
            "value_coef": "paper: 0.5 to 1, within the loss here",
            "value_clip": "verl 0.9: 0.5; TRL: 0.2, which was taken",
            "aggregation": "verl 0.9: token-mean",
        },
        differs={"clipped values": "not in the paper; in the official baselines, and in every library since"},
    )
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    discount: float = 1.0
    lambda_: float = 1.0
    value_coef: float = 0.5
    value_clip: float = 0.2
    aggregation: Aggregation = TokenMean()

    def credit(self, batch: TokenBatch) -> Array:
        """Whitened advantages (B, T): (A - mean) / sqrt(var + 1e-8) over counted tokens."""
        advantage = self._advantage(batch)
        count = TokenMean().terms
        centred = advantage - divide(count(advantage, batch.mask))
        return centred / (divide(count(centred**2, batch.mask)) + 1e-8) ** 0.5

    def loss(self, batch: TokenBatch, logp: Array, stats: Statistics) -> Loss:
        """The policy's term."""
        low, high = 1 - self.eps_low, 1 + self.eps_high
        advantage, rho = batch.token_advantage, ratio(logp, batch.proximal)
        if self.dual_clip is None:
            value = clipped(rho, advantage, low, high)
        else:
            value = dual_clipped(rho, advantage, low, high, self.dual_clip)
        return Loss(
            (self.aggregation.terms(value, batch.mask),), (1.0,), clip_shares(rho, advantage, batch.mask, low, high, self.dual_clip)
        )

    def critic(self, batch: TokenBatch, value: Array) -> Loss:
        """The critic's term, to be maximised too. value (B, T): of the critic that is being learned."""
        xp = namespace(value)
        old = self._values(batch)
        target = self._advantage(batch) + old
        near = old + xp.clip(value - old, -self.value_clip, self.value_clip)
        worse = xp.maximum((value - target) ** 2, (near - target) ** 2)
        return Loss((self.aggregation.terms(-worse / 2, batch.mask),), (self.value_coef,), {})

    def _advantage(self, batch: TokenBatch) -> Array:
        """(B, T) before whitening. The reward is that of the last counted token, where the response ends."""
        xp = namespace(batch.mask)
        value, zero = self._values(batch), xp.zeros_like(self._values(batch))
        count = xp.astype(batch.mask, value.dtype)
        last = batch.mask & (xp.cumulative_sum(count, axis=-1) == xp.sum(count, axis=-1)[:, None])
        onwards = reverse_sum(value, 1 - count)  # what tools said between two tokens is no step: the next token's value counts
        following = xp.concat((onwards[:, 1:], zero[:, :1]), axis=-1)
        reward = xp.where(last, batch.reward[:, None], zero)
        delta = temporal_difference(reward, value, following, last, self.discount)
        trace = xp.where(batch.mask, self.discount * self.lambda_ * (1 - xp.astype(last, value.dtype)), xp.ones_like(value))
        return xp.where(batch.mask, reverse_sum(counted(delta, batch.mask), trace), zero)

    def _values(self, batch: TokenBatch) -> Array:
        if batch.value is None:
            raise ValueError("found a batch without values; expected those of a critic, which PPO's advantages need")
        return counted(batch.value, batch.mask)
