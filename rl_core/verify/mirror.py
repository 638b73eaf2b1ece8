"""MDPO's experiment: small random processes, exact advantages with noise, softmax tables, and plain gradient steps.

All seeds learn side by side in one table, each from its own rows; losses are those of the methods themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rl_core.families.online import CreditedRows, OnlineMethod
from rl_core.loss import total
from rl_core.methods.mdpo import MDPO
from rl_core.methods.ppo_control import ControlPPO
from rl_core.methods.trpo import TRPO
from rl_core.models.distributions import Categorical

Floats = NDArray[np.float64]

STATES, CHOICES, DISCOUNT = 20, 4, 0.95
ITERATIONS, ROWS, NOISE, RATE = 60, 256, 3.0, 10.0
"""Batches, rows of each, deviation of the noise on standardised advantages, and size of a gradient step."""


@dataclass(frozen=True)
class Worlds:
    """One process per seed. Starts are uniform."""

    transition: Floats
    """(seeds, S, A, S)."""
    reward: Floats
    """(seeds, S, A)."""

    @classmethod
    def of(cls, seeds: int, first: int = 0) -> Worlds:
        """Transitions Dirichlet(0.2), rewards uniform."""
        chances = [np.random.default_rng(first + seed) for seed in range(seeds)]
        transition = np.stack([rng.dirichlet(np.full(STATES, 0.2), (STATES, CHOICES)) for rng in chances])
        return cls(transition, np.stack([rng.uniform(size=(STATES, CHOICES)) for rng in chances]))

    def values(self, policy: Floats) -> Floats:
        """(seeds, S, A) -> V = (I - γP_π)⁻¹ r_π, (seeds, S)."""
        moves = np.einsum("gsa,gsat->gst", policy, self.transition)
        earned = (policy * self.reward).sum(axis=2)
        return np.asarray(np.linalg.solve(np.eye(STATES) - DISCOUNT * moves, earned[..., None])[..., 0])

    def advantages(self, policy: Floats) -> Floats:
        """(seeds, S, A)."""
        value = self.values(policy)
        return np.asarray(self.reward + DISCOUNT * np.einsum("gsat,gt->gsa", self.transition, value) - value[..., None])

    def occupancy(self, policy: Floats) -> Floats:
        """(1 - γ) Σ_t γ^t Pr(s_t = s), (seeds, S)."""
        moves = np.einsum("gsa,gsat->gts", policy, self.transition)
        start = np.full((len(policy), STATES, 1), (1 - DISCOUNT) / STATES)
        return np.asarray(np.linalg.solve(np.eye(STATES) - DISCOUNT * moves, start)[..., 0])

    def score(self, policy: Floats) -> Floats:
        """(J - J of the uniform policy) / (J of the best - J of the uniform policy), (seeds,)."""
        uniform = np.full_like(self.reward, 1 / CHOICES)
        best = uniform
        for _ in range(100):  # policy iteration: far more than it needs
            best = np.eye(CHOICES)[(self.advantages(best) + 1e-12 * best).argmax(axis=2)]
        low, high, found = (self.values(one).mean(axis=1) for one in (uniform, best, policy))
        return np.asarray((found - low) / (high - low))


def learned(method: OnlineMethod, inner: int, seeds: int = 20, first: int = 0) -> Floats:
    """The softmax tables (seeds, S, A) that a method's policy loss ends with, `inner` gradient steps on every batch."""
    worlds = Worlds.of(seeds, first)
    chances = [np.random.default_rng(1_000_003 * (first + seed + 1)) for seed in range(seeds)]
    table = torch.zeros((seeds, STATES, CHOICES), dtype=torch.float64, requires_grad=True)
    which = torch.arange(seeds).repeat_interleave(ROWS)
    for iteration in range(ITERATIONS):
        policy = torch.softmax(table.detach(), dim=-1).numpy()
        state, choice, advantage = _drawn(worlds, policy, chances)
        action = torch.nn.functional.one_hot(choice, CHOICES).double()
        old = Categorical(table.detach()[which, state].clone())
        nothing = torch.zeros_like(advantage)
        batch = CreditedRows(state, action, old.logp(action), advantage, nothing, nothing)
        for _ in range(inner):
            value = total(method.policy_loss(batch, Categorical(table[which, state]), old, iteration / ITERATIONS))
            (slope,) = torch.autograd.grad(seeds * value, table)  # a mean over all seeds' rows; tables do not touch one another
            with torch.no_grad():
                table += RATE * slope
    return np.asarray(torch.softmax(table.detach(), dim=-1).numpy())


def _drawn(worlds: Worlds, policy: Floats, chances: list[np.random.Generator]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States and choices from every seed's occupancy, and advantages over their spread, with noise, standardised per seed."""
    seen, true = worlds.occupancy(policy), worlds.advantages(policy)
    columns = []
    for seed, rng in enumerate(chances):
        joint = np.clip(seen[seed][:, None] * policy[seed], 0, None).ravel()
        drawn = rng.choice(STATES * CHOICES, ROWS, p=joint / joint.sum())
        exact = true[seed].ravel()[drawn]
        noisy = exact / exact.std() + NOISE * rng.normal(size=ROWS)
        columns.append((drawn // CHOICES, drawn % CHOICES, (noisy - noisy.mean()) / noisy.std()))
    state, choice, advantage = (torch.as_tensor(np.concatenate(column)) for column in zip(*columns, strict=True))
    return state, choice, advantage


ARMS: Mapping[str, tuple[OnlineMethod, int]] = {
    "PG": (TRPO(), 1),
    "no KL, m=50": (TRPO(), 50),
    "PPO, m=50": (ControlPPO(), 50),
    "MDPO, m=10": (MDPO(), 10),
    "MDPO, m=50": (MDPO(), 50),
    "MDPO, m=1": (MDPO(), 1),
}
"""Losses, and gradient steps on a batch. TRPO's loss is the ratio alone; one step on it is a policy gradient."""


def tables(seeds: int = 20, first: int = 0) -> dict[str, Floats]:
    """What every arm ends with, (seeds, S, A) each."""
    return {name: learned(method, inner, seeds, first) for name, (method, inner) in ARMS.items()}


def measured(found: Mapping[str, Floats], first: int = 0) -> dict[str, float]:
    """What the page's margins are about, of the arms' tables: means over seeds of MDPO's score (m = 10) above those of others, and
    how far its chances are from a policy gradient's at m = 1.
    """
    worlds = Worlds.of(len(found["PG"]), first)
    mean = {name: float(worlds.score(table).mean()) for name, table in found.items()}
    return {
        "above no KL (m=50)": mean["MDPO, m=10"] - mean["no KL, m=50"],
        "above policy gradient": mean["MDPO, m=10"] - mean["PG"],
        "above PPO (m=50)": mean["MDPO, m=10"] - mean["PPO, m=50"],
        "m=1 apart from policy gradient": float(np.abs(found["MDPO, m=1"] - found["PG"]).max()),
    }


REQUIRED: Mapping[str, float] = {"above no KL (m=50)": 0.02, "above policy gradient": 0.04, "above PPO (m=50)": 0.0}
"""Least of the paired means over 20 seeds; the last is to be above it. MDPO (m=1) equals the policy gradient to 1e-9."""
