"""The portfolio benchmark: which estimator sends the better four of twelve policies to an A/B test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from ope.accumulate import Candidate, accumulate
from ope.estimators import DM, DR, IPS, SNIPS, ClippedIPS
from ope.nuisance import cross_fit_reward
from ope.selection import sharpe_ratio_at_k, top_k
from ope.simulate import World, softmax
from tests.once import once

SEEDS = range(50)
KINDS = (DM(), IPS(), SNIPS(), ClippedIPS(5.0), DR())
NAMES = tuple(str(kind) for kind in KINDS)
TEMPERATURES = (-8, -4, -2, 2, 4, 8)
REGIMES = {"easy": (2.0, 1000), "hard": (6.0, 150)}
"""Inverse temperature of the logging policy, and rows."""


def deranged(rng: np.random.Generator, k: int = 10, moved: int = 5) -> np.ndarray:
    """Columns (k,) of which 5 change places, none of them staying where it was."""
    columns, chosen = np.arange(k), rng.choice(k, moved, replace=False)
    columns[chosen] = np.roll(chosen, 1)
    return columns


def candidates_of(q: np.ndarray, columns: np.ndarray) -> Iterator[np.ndarray]:
    """The twelve policies on contexts whose true rewards are q (n, k)."""
    for scores in (q, q[:, columns]):
        for beta in TEMPERATURES:
            yield softmax(beta * scores)


@dataclass(frozen=True)
class Trial:
    """One log: true values (12,), the logging policy's own, and the estimates (12,) by estimator."""

    true: np.ndarray
    baseline: float
    estimates: dict[str, np.ndarray]

    def ratio(self, name: str) -> float:
        return sharpe_ratio_at_k(self.estimates[name], self.true, self.baseline, 4)

    def violation(self, name: str) -> float:
        return top_k(self.estimates[name], self.true, self.baseline, 4).violation

    def picks_disagree(self) -> bool:
        """True if the estimator with the least squared error is not among those with the best portfolio."""
        errors = {name: np.mean((found - self.true) ** 2) for name, found in self.estimates.items()}
        ratios = {name: self.ratio(name) for name in NAMES}
        return ratios[min(errors, key=errors.__getitem__)] < max(ratios.values()) - 1e-12


def trial(world: World, columns: np.ndarray, true: np.ndarray, fresh: np.ndarray, regime: str, rng: np.random.Generator) -> Trial:
    beta, n = REGIMES[regime]
    context = world.contexts(n, rng)
    q = world.q(context)
    data = world.log(context, softmax(beta * q), rng)
    model = cross_fit_reward(data, 10, Ridge(alpha=1.0))
    candidates = [Candidate(f"{i}", target, KINDS, model) for i, target in enumerate(candidates_of(q, columns))]
    values = accumulate(data, candidates).stack.values().reshape(12, len(KINDS))
    baseline = float((softmax(beta * fresh) * fresh).sum(axis=1).mean())
    return Trial(true, baseline, dict(zip(NAMES, values.T, strict=True)))


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return once(tmp_path_factory, "sharpe-benchmark", all_trials)


def all_trials():
    """Regime -> 50 trials, each in a world of its own."""
    found: dict[str, list[Trial]] = {regime: [] for regime in REGIMES}
    for seed in SEEDS:
        rng, world = np.random.default_rng((11, seed)), World.random(5, 10, seed, bias_spread=0.5)
        columns = deranged(rng)
        fresh = world.q(world.contexts(40_000, rng))
        true = np.array([(policy * fresh).sum(axis=1).mean() for policy in candidates_of(fresh, columns)])
        for regime, done in found.items():
            done.append(trial(world, columns, true, fresh, regime, rng))
    return found


def mean_ratio(trials, regime: str, name: str) -> float:
    return float(np.mean([one.ratio(name) for one in trials[regime]]))


def mean_violation(trials, regime: str, name: str) -> float:
    return float(np.mean([one.violation(name) for one in trials[regime]]))


def disagreement(trials, regime: str) -> float:
    return float(np.mean([one.picks_disagree() for one in trials[regime]]))


def test_derangement_moves_five_columns():
    columns = deranged(np.random.default_rng(0))
    assert sorted(columns) == list(range(10))
    assert (columns != np.arange(10)).sum() == 5


def test_true_values_span_the_logging_policy(trials):
    for one in (*trials["easy"], *trials["hard"]):
        assert one.true.min() < one.baseline < one.true.max()


def test_wrong_model_costs_the_portfolio_in_the_easy_regime(trials):
    assert mean_ratio(trials, "easy", "DR") - mean_ratio(trials, "easy", "DM") > 0.2


@pytest.mark.parametrize("name", ["IPS", "SNIPS", "cIPS(5)", "DR"])
def test_wrong_model_sends_more_harmful_policies_in_the_easy_regime(trials, name):
    assert mean_violation(trials, "easy", "DM") > mean_violation(trials, "easy", name) + 0.05
    assert mean_ratio(trials, "easy", name) > mean_ratio(trials, "easy", "DM") + 0.2


def test_least_squared_error_picks_another_estimator_in_the_hard_regime(trials):
    assert disagreement(trials, "hard") > 0.1
    assert disagreement(trials, "easy") < disagreement(trials, "hard"), "with enough rows every estimator finds the same four"
