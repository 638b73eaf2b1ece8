"""GRPO and its kin, one loss: rewards centred and scaled within the group of a prompt, PPO's clipped surrogate on token ratios.

Dr.GRPO, DAPO, GSPO, CISPO and RLOO are settings of it (`KIN`). Value per token: min(ρA, clip(ρ, 1 - ε_low, 1 + ε_high)A), less a KL
penalty to the reference; ρ is the token's ratio or, for GSPO, the sequence's geometric mean with the token's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ope.primitives._xp import Array, namespace, stop_gradient
from ope.primitives.baselines import group_center, group_std, leave_one_out
from ope.primitives.surrogates import clipped, dual_clipped
from ope.primitives.terms import Terms
from ope.primitives.weights import clip, log_ratio, ratio, sequence_ratio
from rl_core.aggregation import Aggregation, SequenceMean, SequenceSum, SequenceSumNorm, TokenMean
from rl_core.corrections import Level, MaskOutside, Truncate
from rl_core.families.token import Statistics, TokenBatch
from rl_core.loss import Loss
from rl_core.paper import Paper
from rl_core.penalties import Penalty


@dataclass(frozen=True)
class GRPO:
    """Shao et al. 2024. Fields that are None are off."""

    paper: ClassVar[Paper] = Paper(
        source="2402.03300",
        title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        spec="llm_common",
        equations={
            "advantage": "(r - mean of the group) / (std of the group + eps_std)",
            "value": "min(ρA, clip(ρ, 1 - eps_low, 1 + eps_high)A)",
        },
        defaults={
            "eps_low": "paper and TRL 1.16: 0.2",
            "eps_high": "paper and TRL 1.16: 0.2; DAPO 0.28",
            "dual_clip": "paper: none; verl 0.9 and Trinity-RFT 0.6: 3.0",
            "objective": "paper: clipped",
            "level": "paper: token",
            "baseline": "paper: the group's mean",
            "scale": "paper: the group's std",
            "unbiased": "TRL, verl and Trinity-GRPO divide by K - 1; Trinity-REC by K",
            "eps_std": "verl and Trinity 1e-6; TRL 1e-4",
            "mask_stale": "off; DeepSeek-V3.2's mask has 0.5 in TRL, 0.1 in Trinity",
            "correction": "off; verl truncates whole sequences at 2.0, TRL masks them at 3.0",
            "kl": "TRL: none; the paper has k3 with 0.04, Trinity k2 with 0.001",
            "aggregation": "verl and Trinity token-mean; the paper and TRL's grpo seq-mean-token-mean",
        },
        differs={"a prompt with one response": "verl and Trinity let its advantage be its reward; here it is 0"},
    )
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    objective: Literal["clipped", "truncated"] = "clipped"
    """"truncated": CISPO's sg(min(ρ, 1 + eps_high))·A·logp."""
    level: Level = "token"
    """"sequence": GSPO's geometric mean of the sequence's ratios."""
    baseline: Literal["group", "leave_one_out"] = "group"
    scale: Literal["group", "batch", "none"] = "group"
    unbiased: bool = True
    eps_std: float = 1e-6
    mask_stale: float | None = None
    """Drop sequences with A < 0 of which the mean of log(μ/π) is above this."""
    correction: Truncate | MaskOutside | None = None
    kl: Penalty | None = None
    aggregation: Aggregation = TokenMean()

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL penalty."""
        return self.kl is not None

    def credit(self, batch: TokenBatch) -> Array:
        """Centred, and scaled, rewards. (B,)."""
        return group_advantage(batch, baseline=self.baseline, scale=self.scale, unbiased=self.unbiased, eps=self.eps_std)

    def loss(self, batch: TokenBatch, logp: Array, stats: Statistics) -> Loss:
        """The surrogate, and the penalty as a term of its own."""
        low, high = 1 - self.eps_low, 1 + self.eps_high
        advantage, rho = batch.token_advantage, ratios(batch, logp, self.level)
        if self.objective == "truncated":
            value = stop_gradient(clip(rho, 0.0, high)) * advantage * logp
        elif self.dual_clip is None:
            value = clipped(rho, advantage, low, high)
        else:
            value = dual_clipped(rho, advantage, low, high, self.dual_clip)
        value = self._corrected(batch, logp, value)
        terms, weights = [self.aggregation.terms(value, batch.mask)], [1.0]
        if self.kl is not None:
            terms.append(self.aggregation.terms(self.kl.value(logp, batch.anchor(), batch.logp_behavior), batch.mask))
            weights.append(-self.kl.coef)
        if self.objective == "truncated":  # its bound cuts no gradient
            metrics = cut_shares(namespace(rho).zeros_like(batch.mask), advantage, batch.mask, stop_gradient(rho))
        else:
            metrics = clip_shares(rho, advantage, batch.mask, low, high, self.dual_clip)
        return Loss(tuple(terms), tuple(weights), metrics)

    def _corrected(self, batch: TokenBatch, logp: Array, value: Array) -> Array:
        """Values weighted for a sampler that was not the trust region's centre, and without stale failures."""
        xp = namespace(value)
        if self.correction is not None:
            value = self.correction.weight(batch) * value
        if self.mask_stale is not None:
            drift = sequence_ratio(stop_gradient(log_ratio(batch.logp_behavior, logp)), batch.mask, length_normalized=True)
            stale = (xp.log(drift) > self.mask_stale)[:, None] & (batch.token_advantage < 0)
            value = xp.where(stale, xp.zeros_like(value), value)
        return value


def group_advantage(
    batch: TokenBatch,
    *,
    baseline: Literal["group", "leave_one_out"] = "group",
    scale: Literal["group", "batch", "none"] = "group",
    unbiased: bool = True,
    eps: float = 1e-6,
) -> Array:
    """Rewards (B,) less a baseline of their group, over a standard deviation of the group or of all responses, or over nothing."""
    xp = namespace(batch.reward, batch.mask)
    rows = xp.any(batch.mask, axis=-1)
    centre = group_center if baseline == "group" else leave_one_out
    centred = centre(batch.reward, batch.group, rows)
    if scale == "none":
        return centred
    group = batch.group if scale == "group" else xp.zeros_like(batch.group)
    spread = group_std(batch.reward, group, rows, unbiased=unbiased) + eps
    varies = spread > 0
    return xp.where(varies, centred / xp.where(varies, spread, xp.ones_like(spread)), xp.zeros_like(centred))


def ratios(batch: TokenBatch, logp: Array, level: Level) -> Array:
    """(B, T) ratios to the trust region's centre; at level "sequence" the geometric mean, whose gradient is each token's own."""
    if level == "token":
        return ratio(logp, batch.proximal)
    own = stop_gradient(sequence_ratio(log_ratio(logp, batch.proximal), batch.mask, length_normalized=True))
    return own[:, None] * namespace(logp).exp(logp - stop_gradient(logp))


def clip_shares(
    rho: Array, advantage: Array, mask: Array, low: float, high: float, dual_clip: float | None = None
) -> Mapping[str, Terms]:
    """Shares of tokens whose gradient a clip cuts: beyond the bound that stops them, or for a failure beyond the dual clip."""
    rho = stop_gradient(rho)
    cut = ((advantage > 0) & (rho > high)) | ((advantage < 0) & (rho < low))
    return cut_shares(cut if dual_clip is None else cut | ((advantage < 0) & (rho > dual_clip)), advantage, mask, rho)


def cut_shares(cut: Array, advantage: Array, mask: Array, like: Array) -> Mapping[str, Terms]:
    """Shares of tokens whose gradient is cut, by the sign of the advantage; where it is 0 there is none to cut."""
    xp, count = namespace(like), TokenMean().terms
    signs = {"clipped_up": advantage > 0, "clipped_down": advantage < 0}
    return {name: count(xp.astype(cut & sign, like.dtype), mask) for name, sign in signs.items()}


KIN: Mapping[str, GRPO] = {
    "GRPO": GRPO(),
    "Dr.GRPO": GRPO(scale="none", aggregation=SequenceSumNorm(1024.0)),
    "DAPO": GRPO(eps_high=0.28),
    "GSPO": GRPO(eps_low=3e-4, eps_high=4e-4, level="sequence", aggregation=SequenceMean()),
    "CISPO": GRPO(eps_high=0.28, objective="truncated"),
    "RLOO": GRPO(baseline="leave_one_out", scale="none", aggregation=SequenceSum()),
}
"""GRPO's kin by name. Dr.GRPO's length is that of the longest response that is allowed."""
