"""A policy that is one of several, drawn once per episode: weights of learners, and how likely the mixture was to do what was done.

d_t = Σ_i w_i d^{π_i} for occupancies d, so that a step d_{t+1} = (1 - α) d_t + α d^{π_{t+1}} is a step of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ope.data import InputError


def appended(weights: Tensor, alpha: float) -> Tensor:
    """[(1 - α)·w, α], the first learner's weight 1 whatever α is. (T,) -> (T + 1,) float64. AILBoost; α = 1/(T + 1): all alike.

    Raises InputError for an α outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha: found {alpha}; expected the share of the newest learner, between 0 and 1")
    if not len(weights):
        return torch.ones(1, dtype=torch.float64)
    return torch.cat(((1 - alpha) * weights.double(), torch.tensor([alpha], dtype=torch.float64)))


def boosted(count: int, alpha: float) -> Tensor:
    """w_1 = (1 - α)^{T - 1}, w_i = α(1 - α)^{T - i}, (T,) float64: what `appended` comes to after T learners."""
    powers = torch.tensor(1 - alpha, dtype=torch.float64) ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
    powers[1:] *= alpha
    return powers


def largest(weights: Tensor, cap: int) -> Tensor:
    """Numbers of the `cap` learners with the most mass, in their order; none without mass. Of equal ones the newer are kept."""
    newest_first = torch.arange(len(weights) - 1, -1, -1)
    by_mass = newest_first[weights[newest_first].argsort(descending=True, stable=True)][:cap]
    return by_mass[weights[by_mass] > 0].sort().values


def per_step(logp: Tensor, weights: Tensor) -> Tensor:
    """log Σ_i w_i π_i(a|x) from log π_i(a|x) (..., K) and w (K,) -> (...).

    Exact where every decision draws a learner of its own, as of several logging policies of a bandit: the balance heuristic's
    denominator. Within an episode of one learner it is not: see `per_episode`.
    """
    _checked(logp, weights)
    return torch.logsumexp(logp + weights.to(logp).log(), dim=-1)


def per_episode(logp: Tensor, weights: Tensor) -> Tensor:
    """log Σ_i w_i Π_{u<=t} π_i(a_u|s_u) of every prefix, from log π_i(a_t|s_t) (..., T, K) and w (K,) -> (..., T).

    Exact where one learner acted throughout. The chance of step t given the past is the difference of two neighbours.
    """
    _checked(logp, weights)
    return torch.logsumexp(logp.cumsum(dim=-2) + weights.to(logp).log(), dim=-1)


def _checked(logp: Tensor, weights: Tensor) -> None:
    if weights.ndim != 1 or logp.shape[-1:] != weights.shape or not bool((weights >= 0).all()):
        raise InputError(
            f"found weights of shape {tuple(weights.shape)} for log-probabilities {tuple(logp.shape)}; "
            "expected one per learner, none negative"
        )
