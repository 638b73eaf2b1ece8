"""OPMD, one derivation in three forms: at the regularised optimum π* ∝ π_t·exp(r/τ), r - τ·log(π/π_t) is one number for all y.

`OPMD` takes one pointwise step (Kimi's form): A·logp - c·(logp - logp_behavior)² per token. `TrinityOPMD` only scales the step.
`PairwiseOPMD` minimises the variance of r - τ·log(π/π_t) within the group: its fixed point is π* whoever sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ope.primitives._xp import Array, namespace
from ope.primitives.baselines import group_center, group_soft_value
from ope.primitives.divergences import k2
from ope.primitives.reduce import masked_sum
from ope.primitives.terms import Terms
from rl_core.aggregation import Aggregation, SequenceSum, TokenMean
from rl_core.families.token import Statistics, TokenBatch
from rl_core.loss import Loss
from rl_core.paper import Paper

_ARXIV, _TITLE = "2509.24203", "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm"


@dataclass(frozen=True)
class OPMD:
    """Kimi's OPMD as Yao et al. 2025 run it: REP-k2, per token or on the summed log-ratio of a response."""

    paper: ClassVar[Paper] = Paper(
        source=_ARXIV,
        title=_TITLE,
        spec="group_relative_reinforce",
        equations={"value": "(r - baseline)·logp - coef·(logp - logp_behavior)²"},
        defaults={
            "coef": "README: 0.1, which has taken in the 1/2 of the paper's τ/2",
            "level": "code: token; the paper's response-level form squares the sum",
            "soft_baseline": "code: off; only with τ·log of the mean of exp(r/τ) is the fixed point that of any sampler",
            "aggregation": "code: token-mean; of level token alone, a response's score being its sum at level sequence",
        },
        differs={"level": "paper: the squared sum of log-ratios; code: the sum of squares, which was taken"},
    )
    coef: float = 0.1
    level: Literal["token", "sequence"] = "token"
    soft_baseline: bool = False
    aggregation: Aggregation = TokenMean()

    def credit(self, batch: TokenBatch) -> Array:
        """Rewards less the group's mean, or less its soft value at temperature 2·coef. (B,)."""
        return _centred(batch, 2 * self.coef if self.soft_baseline else None)

    def loss(self, batch: TokenBatch, logp: Array, stats: Statistics) -> Loss:
        """The score, and the distance to the sampler as a term of its own."""
        aggregation = self.aggregation if self.level == "token" else SequenceSum()
        score = aggregation.terms(batch.token_advantage * logp, batch.mask)
        if self.level == "token":
            away = aggregation.terms(k2(logp, batch.logp_behavior), batch.mask)
        else:
            whole = masked_sum(logp - batch.logp_behavior, batch.mask, axis=-1)
            away = _over_responses(whole**2 / 2, batch.mask)
        return Loss((score, away), (1.0, -2 * self.coef), {})


@dataclass(frozen=True)
class TrinityOPMD:
    """Trinity-RFT's OPMD: A·logp / (1 + τ). With the group's mean it only scales the step."""

    paper: ClassVar[Paper] = Paper(
        source=_ARXIV,
        title=_TITLE,
        spec="group_relative_reinforce",
        equations={"value": "(r - baseline)·logp / (1 + τ)"},
        defaults={
            "temperature": "Trinity-RFT 0.6: 1",
            "soft_baseline": "Trinity-RFT 0.6: the mean; opmd_baseline = logavgexp is the other",
            "aggregation": "Trinity-RFT 0.6: token-mean",
        },
    )
    temperature: float = 1.0
    soft_baseline: bool = False
    aggregation: Aggregation = TokenMean()

    def credit(self, batch: TokenBatch) -> Array:
        """Rewards less the group's mean, or less its soft value. (B,)."""
        return _centred(batch, self.temperature if self.soft_baseline else None)

    def loss(self, batch: TokenBatch, logp: Array, stats: Statistics) -> Loss:
        """One term."""
        return Loss((self.aggregation.terms(batch.token_advantage * logp, batch.mask),), (1 / (1 + self.temperature),), {})


@dataclass(frozen=True)
class PairwiseOPMD:
    """The consistency loss itself, minimised for several steps from one anchor: 1/K² Σ_{i<j} (a_i - a_j)², a = r - τ·log(π/π_t).

    The anchor is the policy that sampled. Needs whole groups in every micro-batch, since responses meet in pairs.
    """

    paper: ClassVar[Paper] = Paper(
        source=_ARXIV,
        title=_TITLE,
        spec="group_relative_reinforce",
        equations={"loss": "population variance over the group of r - τ·log(π/π_t), the mean over responses"},
        defaults={"temperature": "the paper's derivation: a step size only while each step has its own anchor"},
    )
    temperature: float = 1.0

    def credit(self, batch: TokenBatch) -> Array:
        """Rewards less the group's mean, which the loss does not ask for: it centres by itself. (B,)."""
        return _centred(batch, None)

    def loss(self, batch: TokenBatch, logp: Array, stats: Statistics) -> Loss:
        """Minus the variance, every response weighing the same."""
        rows = namespace(batch.mask).any(batch.mask, axis=-1)
        gone = masked_sum(logp - batch.logp_behavior, batch.mask, axis=-1)
        apart = group_center(batch.reward - self.temperature * gone, batch.group, rows)
        return Loss((_over_responses(-(apart**2), batch.mask),), (1.0,), {})


def _centred(batch: TokenBatch, temperature: float | None) -> Array:
    rows = namespace(batch.mask).any(batch.mask, axis=-1)
    if temperature is None:
        return group_center(batch.reward, batch.group, rows)
    return batch.reward - group_soft_value(batch.reward, batch.group, rows, temperature)


def _over_responses(values: Array, mask: Array) -> Terms:
    """Mean over responses (B,) with a counted token."""
    xp = namespace(values, mask)
    rows = xp.any(mask, axis=-1)
    return Terms(masked_sum(values, rows), xp.sum(xp.astype(rows, values.dtype)))
