"""AILBoost's experiment on random processes, all exact: mirror steps against a clipped log-ratio, boosted or with equal weights.

And its counter-check: where every learner is a best response from scratch, equal weights have the better mixture. Boosting helps
because early learners of a warm start are bad and must be forgotten. All seeds run side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ope.primitives.divergences import kl, total_variation
from rl_core.verify.margins import Margin, at_least, at_most

Floats = NDArray[np.float64]

STATES, CHOICES, DISCOUNT = 12, 3, 0.9
TEMPERATURE, SPREAD = 0.5, 3.0
"""Of the expert's softmax, and standard deviation of the rewards that it is soft-optimal for."""
ROUNDS, STEP, ALPHA, BOUND = 300, 0.2, 0.05, 1.0
"""Rounds, size of a mirror step, share of the newest learner, and where the judge's log-ratio is clipped."""

Weighting = Literal["boosted", "alike"]
Response = Literal["mirror", "greedy"]


@dataclass(frozen=True)
class Worlds:
    """One process per seed, and its expert's occupancy."""

    transition: Floats
    """(seeds, S, A, S)."""
    start: Floats
    """(seeds, S)."""
    expert: Floats
    """(seeds, S, A), adds to 1."""

    @classmethod
    def of(cls, seeds: int, first: int = 0) -> Worlds:
        """Transitions Dirichlet(0.3), starts Dirichlet(1), rewards N(0, 9)."""
        chances = [np.random.default_rng(first + seed) for seed in range(seeds)]
        transition = np.stack([rng.dirichlet(np.full(STATES, 0.3), (STATES, CHOICES)) for rng in chances])
        start = np.stack([rng.dirichlet(np.ones(STATES)) for rng in chances])
        reward = np.stack([rng.normal(0, SPREAD, (STATES, CHOICES)) for rng in chances])
        q = np.zeros_like(reward)
        for _ in range(500):  # 0.9^500 is 1e-23
            v = TEMPERATURE * np.logaddexp.reduce(q / TEMPERATURE, axis=2)
            q = reward + DISCOUNT * np.einsum("gsat,gt->gsa", transition, v)
        bare = cls(transition, start, np.zeros_like(reward))
        return cls(transition, start, bare.occupancy(softmax(q / TEMPERATURE)))

    def occupancy(self, policy: Floats) -> Floats:
        """(1 - γ) Σ_t γ^t Pr(s_t = s)·π(a|s), (seeds, S, A)."""
        moves = np.einsum("gsa,gsat->gts", policy, self.transition)
        seen = np.linalg.solve(np.eye(STATES) - DISCOUNT * moves, (1 - DISCOUNT) * self.start[..., None])
        return np.asarray(seen * policy)

    def values(self, policy: Floats, reward: Floats) -> Floats:
        """Q of a policy for rewards, both (seeds, S, A) -> (seeds, S, A)."""
        moves = np.einsum("gsa,gsat->gst", policy, self.transition)
        v = np.linalg.solve(np.eye(STATES) - DISCOUNT * moves, (policy * reward).sum(axis=2)[..., None])[..., 0]
        return np.asarray(reward + DISCOUNT * np.einsum("gsat,gt->gsa", self.transition, v))

    def best(self, reward: Floats) -> Floats:
        """A best policy by policy iteration, each state's choices one-hot. (seeds, S, A)."""
        policy = np.full_like(reward, 1 / CHOICES)
        for _ in range(100):  # far more than it needs
            better = np.eye(CHOICES)[(self.values(policy, reward) + 1e-12 * policy).argmax(axis=2)]
            if (better == policy).all():
                break
            policy = better
        return np.asarray(policy)


def softmax(scores: Floats) -> Floats:
    """Over the last axis."""
    found = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(found / found.sum(axis=-1, keepdims=True))


@dataclass(frozen=True)
class Ended:
    """Distances to the expert's occupancy after a run, (seeds,) each."""

    mixture: Floats
    """KL of the mixture."""
    last: Floats
    """KL of the last policy: infinite where it never does what the mixture does and the expert does not."""
    apart: Floats
    """Total variation of the last policy."""


def learned(
    worlds: Worlds, weighting: Weighting, response: Response = "mirror", *, rounds: int = ROUNDS, step: float = STEP,
    alpha: float = ALPHA,
) -> Ended:  # fmt: skip
    """Rounds of a judge D = clip(log e/d, ±1) and of a learner for it; d ← (1 - α) d + α d^π, α fixed or 1/t."""
    logits = np.zeros_like(worlds.expert)
    policy = softmax(logits)
    mixture = found = worlds.occupancy(policy)
    for count in range(1, rounds + 1):
        judge = np.clip(np.log(worlds.expert / mixture), -BOUND, BOUND)
        if response == "mirror":
            logits = logits + step * worlds.values(policy, judge)
            policy = softmax(logits)
        else:
            policy = worlds.best(judge)
        found = worlds.occupancy(policy)
        share = alpha if weighting == "boosted" else 1 / (count + 1)
        mixture = (1 - share) * mixture + share * found
    flat = [one.reshape(len(one), -1) for one in (mixture, found, worlds.expert)]
    mixed, last, expert = flat
    return Ended(np.asarray(kl(mixed, expert)), np.asarray(kl(last, expert)), np.asarray(total_variation(last, expert)))


def measured(seeds: int = 10, first: int = 0) -> dict[str, float]:
    """What the page's margins are about: medians over seeds."""
    worlds = Worlds.of(seeds, first)
    boosted, alike = (learned(worlds, weighting) for weighting in ("boosted", "alike"))
    greedy = {weighting: learned(worlds, weighting, "greedy") for weighting in ("boosted", "alike")}
    return {
        "boosted, KL of the mixture": float(np.median(boosted.mixture)),
        "boosted, KL of the last": float(np.median(boosted.last)),
        "alike, KL of the mixture": float(np.median(alike.mixture)),
        "alike, KL of the last": float(np.median(alike.last)),
        "best responses, KL of the mixture: boosted less alike": float(
            np.median(greedy["boosted"].mixture) - np.median(greedy["alike"].mixture)
        ),
        "best responses, distance of the last: boosted": float(np.median(greedy["boosted"].apart)),
        "best responses, distance of the last: alike": float(np.median(greedy["alike"].apart)),
    }


REQUIRED: Mapping[str, tuple[Literal["at least", "at most"], float]] = {
    "boosted, KL of the mixture": ("at most", 1e-3),
    "boosted, KL of the last": ("at most", 1e-3),
    "alike, KL of the mixture": ("at least", 2e-2),
    "alike, KL of the last": ("at least", 5e-3),
    "best responses, KL of the mixture: boosted less alike": ("at least", 0.0),
    "best responses, distance of the last: boosted": ("at least", 0.1),
    "best responses, distance of the last: alike": ("at least", 0.1),
}
"""Of medians over 10 seeds. The last three are the counter-check, which says where boosting does not help."""


def margins(found: Mapping[str, float]) -> list[Margin]:
    """What was required, beside what was measured."""
    check = {"at least": at_least, "at most": at_most}
    return [check[kind](name, found[name], bound) for name, (kind, bound) in REQUIRED.items()]
