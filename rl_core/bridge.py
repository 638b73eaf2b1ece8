"""From rollouts to off-policy evaluation: what a checkpoint is worth, from responses that another policy sampled.

Estimates are those of `ope.sequential`, clustered by prompt; checkpoints worth paying for are chosen on one half of the prompts
and valued on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ope.data import InputError
from ope.estimate import Estimate
from ope.selection import Selection, select_sums
from ope.sequential import WIS, TrajectoryEstimator, compare_trajectories, evaluate_trajectories
from ope.trajectories import Trajectories
from rl_core.rollout import CausalModel, Rollouts, token_logps

DEFAULT = WIS()
"""What values checkpoints: whole responses are one decision each, and their weights are far from one."""


def trajectories(rollouts: Rollouts) -> Trajectories:
    """Responses as trajectories whose steps are tokens: rewards at their ends, clusters by prompt."""
    return Trajectories(
        logp_behavior=rollouts.logp.double().numpy(),
        reward=rollouts.reward.double().numpy(),
        mask=rollouts.mask.numpy(),
        cluster=rollouts.group.numpy(),
    )


def target_logps(model: CausalModel, rollouts: Rollouts, temperature: float = 1.0) -> NDArray[np.float64]:
    """(B, T) log-probabilities that a checkpoint gives the tokens that were sampled."""
    with torch.no_grad():
        logp, _ = token_logps(model, rollouts, temperature)
    return np.asarray(logp.double().numpy())


def value_checkpoints(
    models: Mapping[str, CausalModel],
    rollouts: Rollouts,
    estimators: Sequence[TrajectoryEstimator] = (WIS(),),
    temperature: float = 1.0,
) -> dict[str, list[Estimate]]:
    """Estimates of each checkpoint's mean reward, by name, from rollouts that none of them need have sampled."""
    data = trajectories(rollouts)
    return {
        name: evaluate_trajectories(data, target_logps(model, rollouts, temperature), estimators) for name, model in models.items()
    }


def select_checkpoints(
    models: Mapping[str, CausalModel], rollouts: Rollouts, estimator: TrajectoryEstimator = DEFAULT, temperature: float = 1.0
) -> Selection:
    """The shortlist of checkpoints worth a real evaluation: found on one half of the prompts, valued on the other.

    Raises InputError for rollouts of fewer than four prompts.
    """
    labels = np.unique(rollouts.group.numpy())
    if len(labels) < 4:
        raise InputError(f"found rollouts of {len(labels)} prompts; expected at least 4: two halves are compared")
    first = torch.from_numpy(np.isin(rollouts.group.numpy(), labels[::2]))
    halves = []
    for rows in (first, ~first):
        some = rollouts.rows(rows)
        logps = {name: target_logps(model, some, temperature) for name, model in models.items()}
        halves.append(compare_trajectories(trajectories(some), logps, estimator))
    a, b = halves
    return select_sums(a.labels, a.fold, b.fold, a.distances, by=estimator)
