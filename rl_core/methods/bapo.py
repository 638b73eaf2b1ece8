"""BAPO: GRPO whose clip bounds are searched anew at every update, so that tokens of positive advantage keep a share of the loss.

Value per token: min(ρA, clip(ρ, c_low, c_high)A), bounds on the ratio itself. With P(c_high) = Σ_{A>0} min(ρ, c_high)·A and
N(c_low) = Σ_{A<0} max(ρ, c_low)·|A| over the whole mini-batch, bounds widen upwards, then tighten from below, until P/(P + N) is at
least `target`. P depends on c_high alone and N on c_low alone, so that one pass gives both over all steps of the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import ClassVar, Literal, NamedTuple

from ope.primitives._xp import Array, namespace, stop_gradient
from ope.primitives.reduce import masked_sum
from ope.primitives.surrogates import clipped, dual_clipped
from ope.primitives.terms import Terms
from ope.primitives.weights import ratio
from rl_core.aggregation import Aggregation, TokenMean
from rl_core.families.token import Statistics, TokenBatch
from rl_core.loss import Loss
from rl_core.methods.grpo import clip_shares, group_advantage
from rl_core.paper import Paper

TOLERANCE = 1e-9
"""Of comparisons of bounds and of the target: 1.2 + 0.05·k is not exact."""


class Bounds(NamedTuple):
    """What a search found."""

    low: float
    high: float
    steps: int
    share: float
    """Share, or ratio, of positive contributions at these bounds."""
    hit_limit: bool
    """Whether the search ran out of steps before the target was met."""


@dataclass(frozen=True)
class BAPO:
    """Xi et al. 2025; the defaults are the paper's main column."""

    paper: ClassVar[Paper] = Paper(
        source="2510.18927",
        title="Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy Optimization with Adaptive Clipping",
        spec="bapo",
        equations={
            "eq. 4": "min(ρA, clip(ρ, c_low, c_high)A)",
            "eq. 8": "P / (P + N) >= target",
            "algorithm 1": "c_high by step_high while it may; then c_low by step_low",
        },
        defaults={
            "target": "paper's main runs: 0.4; its 3B run 0.45; the code's yaml: P/N of 1, its script 0.5",
            "low_start": "paper: 0.6",
            "low_limit": "paper: 0.9; the code's yaml 0.8, its script 0.95",
            "high_start": "paper: 1.2",
            "high_limit": "paper: 3.0; the code's yaml 2.0",
            "step_low": "paper: 0.02; code: 0.05",
            "step_high": "paper: 0.05; the code's script 0.1",
            "measure": "paper: share; code: the ratio P/N",
            "contribution": "paper and code: value; `RECOMMENDED` has gradient",
            "order": "paper: upper first; code: lower first",
            "dual_clip": "paper: none; code: 3.0, verl's",
            "eps_std": "verl's GRPO: 1e-6",
            "aggregation": "code: verl's token-mean",
        },
        differs={
            "the denominator of eq. 8": "printed as |signed sum|, singular at balance; P + N fits the plots",
            "weights w_t of eq. 8": "tokens were drawn from π_rollout already: 1 on samples",
            "A = 0": "the code counts it as positive; it adds nothing to either sum",
            "search": "the code's is per micro-batch; here of the whole step",
        },
    )
    target: float = 0.4
    low_start: float = 0.6
    low_limit: float = 0.9
    high_start: float = 1.2
    high_limit: float = 3.0
    step_low: float = 0.02
    step_high: float = 0.05
    measure: Literal["share", "ratio"] = "share"
    contribution: Literal["value", "gradient"] = "value"
    """"gradient" counts only what the clip lets through: then tightening from below raises the share, as it is meant to."""
    order: Literal["paper", "code"] = "paper"
    dual_clip: float | None = None
    eps_std: float = 1e-6
    aggregation: Aggregation = TokenMean()

    def credit(self, batch: TokenBatch) -> Array:
        """GRPO's advantages. (B,)."""
        return group_advantage(batch, eps=self.eps_std)

    def statistics(self, batch: TokenBatch, logp: Array) -> Statistics:
        """Positive contributions at every upper bound (J,), negative ones at every lower bound (K,)."""
        xp = namespace(logp)
        rho, advantage = stop_gradient(ratio(logp, batch.proximal)), batch.token_advantage
        positive, negative = batch.mask & (advantage > 0), batch.mask & (advantage < 0)
        if self.contribution == "value":
            up = [masked_sum(xp.clip(rho, None, high) * advantage, positive) for high in self.highs]
            down = [masked_sum(xp.clip(rho, low, None) * -advantage, negative) for low in self.lows]
        else:
            up = [masked_sum(rho * advantage, positive & (rho < high)) for high in self.highs]
            down = [masked_sum(rho * -advantage, negative & (rho > low)) for low in self.lows]
        return {"positive": xp.stack(up), "negative": xp.stack(down)}

    def loss(self, batch: TokenBatch, logp: Array, stats: Statistics) -> Loss:
        """One term, within the bounds that the step's sums ask for."""
        found = self.search(stats)
        advantage, rho = batch.token_advantage, ratio(logp, batch.proximal)
        if self.dual_clip is None:
            value = clipped(rho, advantage, found.low, found.high)
        else:
            value = dual_clipped(rho, advantage, found.low, found.high, self.dual_clip)
        one = namespace(logp).ones_like(stats["positive"][0])
        begun = self._measured(float(stats["positive"][0]), float(stats["negative"][0]))
        told = {
            "ratio_low": found.low, "ratio_high": found.high, "share_before": begun, "share": found.share,
            "search_steps": float(found.steps), "hit_limit": float(found.hit_limit),
        }  # fmt: skip
        metrics = {name: Terms(number * one, one) for name, number in told.items()}
        shares = clip_shares(rho, advantage, batch.mask, found.low, found.high, self.dual_clip)
        return Loss((self.aggregation.terms(value, batch.mask),), (1.0,), metrics | dict(shares))

    @property
    def highs(self) -> tuple[float, ...]:
        """Upper bounds in the order of the search."""
        return _grid(self.high_start, self.high_limit, self.step_high, whole_range=self.order == "code")

    @property
    def lows(self) -> tuple[float, ...]:
        """Lower bounds in the order of the search."""
        return _grid(self.low_start, self.low_limit, self.step_low, whole_range=self.order == "code")

    def search(self, stats: Statistics) -> Bounds:
        """Bounds from the sums of the whole step. In whole steps of the grids: no bound is ever added up."""
        positive = [float(one) for one in stats["positive"]]
        negative = [float(one) for one in stats["negative"]]
        high = low = 0

        def short() -> bool:
            return self._measured(positive[high], negative[low]) < self.target - TOLERANCE

        last_high, last_low = len(positive) - 1, len(negative) - 1
        if self.order == "paper":
            while short() and low < last_low:  # the paper's test is of the lower bound alone
                high, low = (high + 1, low) if high < last_high else (high, low + 1)
        else:
            while short() and low < last_low:
                low += 1
            while short() and high < last_high:
                high += 1
        share = self._measured(positive[high], negative[low])
        return Bounds(self.lows[low], self.highs[high], low + high, share, share < self.target - TOLERANCE)

    def _measured(self, positive: float, negative: float) -> float:
        """The share, or the ratio, of positive contributions. Nothing on either side meets every target."""
        if negative == 0:
            return float("inf") if self.measure == "ratio" else 1.0
        return positive / negative if self.measure == "ratio" else positive / (positive + negative)


def _grid(start: float, limit: float, step: float, *, whole_range: bool) -> tuple[float, ...]:
    """start, start + step, ... up to the limit; `whole_range`: the last step is cut so as to end at it."""
    count = floor((limit - start) / step + TOLERANCE)
    found = [start + step * place for place in range(count + 1)]
    if whole_range and limit - found[-1] > TOLERANCE:
        found.append(limit)
    return tuple(min(one, limit) for one in found)


RECOMMENDED = BAPO(target=0.5, contribution="gradient")
"""The setting whose two phases both raise the share: what the controller is meant to do."""
