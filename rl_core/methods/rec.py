"""REC, REP and RED: group-relative REINFORCE without division by a standard deviation, kept stable by a gate, a regulariser or
a choice of data, one loss for all of them.

Value per token: M·wt·A·logp less coef·D, where wt is 1 or the ratio, M a gate on the ratio and D a distance to the sampler; the
regulariser is not gated. Differs from GRPO in: no std, no importance weight by default, and a gate that is a gate: REINFORCE's
gradient inside, none outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ope.primitives._xp import Array, namespace, stop_gradient
from ope.primitives.baselines import group_center, group_std
from ope.primitives.surrogates import Gate, OneSided, Ring, TwoSided
from ope.primitives.terms import Terms
from ope.primitives.weights import exp_advantage, log_ratio, ratio, sequence_ratio
from rl_core.aggregation import Aggregation, SequenceMean, TokenMean
from rl_core.families.token import Statistics, TokenBatch
from rl_core.loss import Loss
from rl_core.methods.grpo import cut_shares
from rl_core.paper import Paper
from rl_core.penalties import K2, ForwardKL


@dataclass(frozen=True)
class Drop:
    """RED-Drop: where a group has more failures than successes, as many of them are left out as are too many."""

    def kept(self, reward: Array, group: Array, rows: Array) -> Array:
        """(B,) True for those that stay. The failures that stay are the first of each group."""
        xp = namespace(reward, group, rows)
        centred = group_center(reward, group, rows)
        good, bad = rows & (centred >= 0), rows & (centred < 0)
        mates = group[:, None] == group[None, :]
        order = xp.arange(reward.shape[0])
        place = xp.sum(xp.astype(mates & bad[None, :] & (order[None, :] < order[:, None]), reward.dtype), axis=-1)
        room = xp.sum(xp.astype(mates & good[None, :], reward.dtype), axis=-1)
        return good | (bad & (place < room))

    def weight(self, advantage: Array) -> Array:
        """All that stay weigh the same. (B,)."""
        return namespace(advantage).ones_like(advantage)


@dataclass(frozen=True)
class Weight:
    """RED-Weight: A·exp(A/temperature) with the unweighted baseline: success counts more."""

    temperature: float = 1.0

    def kept(self, reward: Array, group: Array, rows: Array) -> Array:
        """(B,) all."""
        return rows

    def weight(self, advantage: Array) -> Array:
        """exp(A/temperature). (B,)."""
        return exp_advantage(advantage, self.temperature)


@dataclass(frozen=True)
class REC:
    """Yao et al. 2025. Fields that are None are off."""

    paper: ClassVar[Paper] = Paper(
        source="2509.24203",
        title="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm",
        spec="group_relative_reinforce",
        equations={
            "advantage": "r - mean of the group",
            "value": "M·wt·A·logp - coef·D",
            "gate": "OneSided is PPO's, TwoSided ignores the advantage, Ring keeps what pulls back from far outside",
        },
        defaults={
            "gate": "README: REC-OneSide-NoIS with 0.2 and 0.2; the paper recommends (0.6, 2.0) as the fast setting",
            "weighted": "README: NoIS",
            "level": "README: token; GSPO-OneSide gates by the sequence's geometric mean",
            "std_normalize": "paper: off",
            "data": "off: RED's part",
            "regularizer": "off: REP's part",
            "aggregation": "code: token-mean",
        },
        differs={
            "ring bounds": "the code's constructor has 0.4 and 0.4, its default_args and README 0.6 and 2.0: the latter taken",
            "KL to the reference": "the algorithm class adds k2 with 0.001; left out, as in the paper's pure variants",
            "RED-Drop": "the code drops failures at random; here the last of each group, so that a seed is not needed",
        },
    )
    gate: Gate | None = OneSided(0.2, 0.2)
    weighted: bool = False
    level: Literal["token", "sequence"] = "token"
    std_normalize: bool = False
    data: Drop | Weight | None = None
    regularizer: K2 | ForwardKL | None = None
    aggregation: Aggregation = TokenMean()

    def credit(self, batch: TokenBatch) -> Array:
        """Centred rewards, of chosen or weighted data. (B,)."""
        xp = namespace(batch.reward, batch.mask)
        rows = xp.any(batch.mask, axis=-1)
        if self.data is not None:
            rows = self.data.kept(batch.reward, batch.group, rows)
        advantage = group_center(batch.reward, batch.group, rows)
        weight = xp.ones_like(advantage) if self.data is None else self.data.weight(advantage)
        if self.std_normalize:
            advantage = advantage / (group_std(batch.reward, batch.group, rows, unbiased=False) + 1e-6)
        return weight * advantage

    def loss(self, batch: TokenBatch, logp: Array, stats: Statistics) -> Loss:
        """The gated score, and the regulariser as a term of its own."""
        xp = namespace(logp)
        advantage, rho = batch.token_advantage, stop_gradient(ratio(logp, batch.logp_behavior))
        value, metrics = advantage * logp, dict[str, Terms]()
        if self.weighted:
            value = rho * value
        if self.gate is not None:
            keep = self.gate.keep(self._gated(batch, logp, rho), advantage)
            value = xp.where(keep, value, xp.zeros_like(value))
            metrics = dict(cut_shares(~keep, advantage, batch.mask, logp))
        terms, weights = [self.aggregation.terms(value, batch.mask)], [1.0]
        if self.regularizer is not None:
            away = self.regularizer.value(logp, batch.logp_behavior, batch.logp_behavior)
            terms.append(self.aggregation.terms(away, batch.mask))
            weights.append(-self.regularizer.coef)
        return Loss(tuple(terms), tuple(weights), metrics)

    def _gated(self, batch: TokenBatch, logp: Array, rho: Array) -> Array:
        """(B, T) the ratio that the gate looks at."""
        if self.level == "token":
            return rho
        whole = sequence_ratio(stop_gradient(log_ratio(logp, batch.logp_behavior)), batch.mask, length_normalized=True)
        return whole[:, None] * namespace(rho).ones_like(rho)


VARIANTS: Mapping[str, REC] = {
    "REC-OneSide-NoIS": REC(),
    "REC-OneSide-IS": REC(weighted=True),
    "REC-OneSide-NoIS(0.6, 2.0)": REC(gate=OneSided(0.6, 2.0)),
    "REC-TwoSide-NoIS": REC(gate=TwoSided(0.2, 0.2)),
    "REC-TwoSide-IS": REC(gate=TwoSided(0.2, 0.2), weighted=True),
    "REC-Ring-NoIS": REC(gate=Ring(0.2, 0.2, 0.6, 2.0)),
    "REC-Ring-IS": REC(gate=Ring(0.2, 0.2, 0.6, 2.0), weighted=True),
    "REC-GSPO-OneSide": REC(gate=OneSided(3e-4, 4e-4), level="sequence", aggregation=SequenceMean()),
    "OPMD": REC(gate=None, regularizer=K2(0.2)),
    "AsymRE": REC(gate=None, regularizer=ForwardKL(0.1)),
    "RED-Drop": REC(gate=None, data=Drop()),
    "RED-Weight": REC(gate=None, data=Weight(1.0)),
}
"""The README's variants by name. OPMD's coefficient of 0.1 is that of d² and not of d²/2."""
