"""Policies: frozen objects of arrays and settings that turn a batch of requests into distributions, and nothing else.

A policy returns a distribution; one sampler draws from it. Floors, caps and guard rails act on the vector before the draw, so
that what is logged is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from bandits import exploration
from bandits.batch import DecisionBatch
from bandits.posteriors import BayesianLinear, BetaBernoulli, NormalMean
from bandits.scorers import Scorer, frozen
from ope.data import FloatArray, InputError


class Policy(Protocol):
    """Who decides: pure, with no state that a call could change."""

    kind: ClassVar[str]

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """Distributions (n, k): rows sum to 1, ineligible actions have 0."""
        ...


UNIFORM = "uniform@builtin"
"""What decisions name as their policy where none was promoted: `Uniform`."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """Even over the eligible actions."""

    kind: ClassVar[str] = "uniform"

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        return exploration.uniform(batch.eligible)


@dataclass(frozen=True, slots=True, eq=False)
class Greedy:
    """All on the highest score. Its log cannot value any other policy: put a floor on it before it serves."""

    scorer: Scorer
    kind: ClassVar[str] = "greedy"

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        return exploration.greedy(self.scorer.scores(batch), batch.mask)


@dataclass(frozen=True, slots=True, eq=False)
class EpsilonGreedy:
    """The highest score, but for a share ε spread evenly."""

    scorer: Scorer
    epsilon: float = 0.05
    kind: ClassVar[str] = "epsilon_greedy"

    def __post_init__(self) -> None:
        _within("epsilon", self.epsilon, 0.0, 1.0)

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        return exploration.epsilon_greedy(self.scorer.scores(batch), batch.mask, self.epsilon)


@dataclass(frozen=True, slots=True, eq=False)
class Softmax:
    """In proportion to exp(score / temperature)."""

    scorer: Scorer
    temperature: float = 1.0
    kind: ClassVar[str] = "softmax"

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 1e-100, 1e100)

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        return exploration.softmax(self.scorer.scores(batch), batch.mask, self.temperature)


@dataclass(frozen=True, slots=True, eq=False)
class InverseGap:
    """SquareCB: less likely the further below the best. Foster & Rakhlin 2020; `exploration.falcon_gamma` gives FALCON's γ."""

    scorer: Scorer
    gamma: float = 490.0
    kind: ClassVar[str] = "inverse_gap"

    def __post_init__(self) -> None:
        _within("gamma", self.gamma, 0.0, 1e100)

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        return exploration.inverse_gap(self.scorer.scores(batch), batch.mask, self.gamma)


@dataclass(frozen=True, slots=True, eq=False)
class FastCB:
    """Inverse gap weighting on losses 1 - score, scores in [0, 1]: explores less where the best loss is small."""

    scorer: Scorer
    gamma: float = 10.0
    kind: ClassVar[str] = "fast_cb"

    def __post_init__(self) -> None:
        _within("gamma", self.gamma, 0.0, 1e100)

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k). Raises InputError for a score above 1."""
        return exploration.fast_cb(1 - self.scorer.scores(batch), batch.mask, self.gamma)


@dataclass(frozen=True, slots=True, eq=False)
class Thompson:
    """Each action with the probability that it is best under the posterior, by Monte Carlo over one fixed set of draws.

    The vector is computed first and sampled from then, so what is logged is what was drawn from. Its error is a setting of the
    form, and so under the digest that every decision names. Put a floor on it: an action that won no draw has probability 0.
    """

    posterior: BetaBernoulli | NormalMean | BayesianLinear
    """Of the reward of each named action, or of weights on the action features."""
    draws: int = 1000
    seed: int = 0
    error: float = field(init=False)
    """Largest standard error of a probability, ½ / sqrt(draws); that of p is sqrt(p (1 - p) / draws)."""
    _sampled: FloatArray = field(init=False, repr=False)
    """(draws, k) or (draws, p), the same for every request."""
    kind: ClassVar[str] = "thompson"

    def __post_init__(self) -> None:
        _whole("draws", self.draws, 100, 10_000_000)
        _whole("seed", self.seed, 0, 2**63)
        object.__setattr__(self, "error", float(0.5 / np.sqrt(self.draws)))
        object.__setattr__(self, "_sampled", frozen(self.posterior.sample(np.random.default_rng(self.seed), self.draws)))

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        sampled = self._sampled
        linear = isinstance(self.posterior, BayesianLinear)
        found = batch.action_features.shape[2] if linear else batch.eligible.shape[1]
        if found != sampled.shape[1]:
            raise InputError(
                f"found a batch of {found} actions, or action features; expected {sampled.shape[1]}, as in the posterior"
            )
        if not linear:
            if batch.full:
                return np.repeat(exploration.winning_share(sampled[:, None, :], None), len(batch), axis=0)
            return _by_rows(batch, lambda part: np.repeat(sampled[:, None, :], len(part), axis=1), self.draws)
        return _by_rows(batch, lambda part: np.vecdot(part.action_features, sampled[:, None, None, :]), self.draws)


@dataclass(frozen=True, slots=True, eq=False)
class UCB:
    """The highest mean + α·sd under a posterior, with a floor, without which its log could value nothing."""

    posterior: BetaBernoulli | NormalMean | BayesianLinear
    """Of the reward of each named action, or of weights on the action features."""
    alpha: float = 1.0
    floor: float = 0.02
    kind: ClassVar[str] = "ucb"

    def __post_init__(self) -> None:
        _within("alpha", self.alpha, 0.0, 1e100)
        _within("floor", self.floor, 1e-9, 1.0)

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        if isinstance(self.posterior, BayesianLinear):
            mean, variance = self.posterior.predict(batch.action_features)
        else:
            mean, variance = self.posterior.mean(), self.posterior.variance()
            if mean.shape != batch.eligible.shape[1:]:
                raise InputError(f"found a batch of {batch.eligible.shape[1]} actions; expected {len(mean)}, as in the posterior")
            mean, variance = (np.broadcast_to(each, batch.eligible.shape) for each in (mean, variance))
        best = exploration.greedy(mean + self.alpha * np.sqrt(variance), batch.mask)
        return exploration.with_floor(best, batch.mask, self.floor)


@dataclass(frozen=True, slots=True, eq=False)
class Bagging:
    """Each action with the share of scorers, fitted on bootstrap samples, that rank it first. Put a floor on it."""

    scorers: tuple[Scorer, ...]
    kind: ClassVar[str] = "bagging"

    def __post_init__(self) -> None:
        if not self.scorers:
            raise InputError("found no scorers; expected at least one")

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        return exploration.winning_share(np.stack([scorer.scores(batch) for scorer in self.scorers]), batch.mask)


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """One of several policies, drawn with fixed weights; its vector is their weighted sum, whichever fires."""

    policies: tuple[Policy, ...]
    weights: tuple[float, ...]
    kind: ClassVar[str] = "mixture"

    def __post_init__(self) -> None:
        for weight in self.weights:
            _within("weight", weight, 0.0, 1.0)
        if len(self.policies) != len(self.weights) or not abs(sum(self.weights) - 1) <= 1e-9:
            raise InputError(f"found weights {self.weights} for {len(self.policies)} policies; expected one each, summing to 1")

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        parts = [weight * policy.propensities(batch) for weight, policy in zip(self.weights, self.policies, strict=True)]
        return np.add.reduce(parts)


@dataclass(frozen=True, slots=True, eq=False)
class Floor:
    """(1 - φ)·p + φ/K. Weights of any policy on its log are at most K/φ."""

    policy: Policy
    floor: float = 0.02
    kind: ClassVar[str] = "floor"

    def __post_init__(self) -> None:
        _within("floor", self.floor, 0.0, 1.0)

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        return exploration.with_floor(self.policy.propensities(batch), batch.mask, self.floor)


def floored(policy: Policy, floor: float) -> Policy:
    """A policy that keeps a decision point's floor, which those that learn here do already."""
    if floor == 0 or isinstance(policy, Uniform) or (isinstance(policy, Floor) and policy.floor >= floor):
        return policy
    return Floor(policy, floor)


@dataclass(frozen=True, slots=True, eq=False)
class Cap:
    """No action more often than its cap; what is over goes to the others in proportion."""

    policy: Policy
    high: FloatArray
    """(k,), or (1,) for one cap on all"""
    kind: ClassVar[str] = "cap"

    def __post_init__(self) -> None:
        object.__setattr__(self, "high", frozen(self.high))

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k). Raises InputError where the caps of the eligible actions sum to less than 1."""
        return exploration.with_cap(self.policy.propensities(batch), batch.mask, self.high)


@dataclass(frozen=True, slots=True, eq=False)
class GuardRail:
    """Only actions whose guarded metric is predicted to be at least `low`; where none is, the one predicted highest.

    Put it outermost: a `Floor` around it would give the others their share back.
    """

    policy: Policy
    guard: Scorer
    low: float
    kind: ClassVar[str] = "guard_rail"

    def __post_init__(self) -> None:
        _within("low", self.low, -1e100, 1e100)

    def propensities(self, batch: DecisionBatch) -> FloatArray:
        """(n, k)"""
        predicted = self.guard.scores(batch)
        allowed = batch.eligible & (predicted >= self.low)
        none = ~allowed.any(axis=1, keepdims=True)
        allowed = np.where(none, exploration.greedy(predicted, batch.mask) > 0, allowed)
        return self.policy.propensities(DecisionBatch(batch.context, batch.action_features, allowed))


def _by_rows(batch: DecisionBatch, sample: Callable[[DecisionBatch], FloatArray], draws: int) -> FloatArray:
    """Winning shares, some rows at a time: samples of all rows at once would not fit in memory."""
    step = max(1, 2**22 // (draws * batch.eligible.shape[1]))
    parts = [batch.rows(slice(start, start + step)) for start in range(0, len(batch), step)]
    return np.concatenate([exploration.winning_share(sample(part), part.eligible) for part in parts])


def _within(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"found {name}={value!r}; expected a number from {low:g} to {high:g}")


def _whole(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"found {name}={value!r}; expected a whole number from {low} to {high}")


POLICIES: tuple[type[Policy], ...] = (
    Uniform, Greedy, EpsilonGreedy, Softmax, InverseGap, FastCB, Thompson, UCB, Bagging, Mixture, Floor, Cap, GuardRail,
)  # fmt: skip
"""Every kind of policy: what an artifact may hold."""
