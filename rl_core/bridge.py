"""From rollouts to off-policy evaluation: what a checkpoint is worth, from responses that another policy sampled.

Estimates are those of `ope.sequential`, clustered by prompt; checkpoints worth paying for are chosen on one half of the prompts
and valued on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ope.evaluation import Report
from ope.selection import Selection
from ope.sequential import WIS, TrajectoryEstimator, evaluate_trajectories, select_trajectories
from ope.trajectories import Trajectories
from rl_core.rollout import CausalModel, Rollouts, token_logps


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
) -> dict[str, Report]:
    """Estimates of each checkpoint's mean reward, by name, from rollouts that none of them need have sampled."""
    data = trajectories(rollouts)
    return {
        name: evaluate_trajectories(data, target_logps(model, rollouts, temperature), estimators) for name, model in models.items()
    }


def select_checkpoints(
    models: Mapping[str, CausalModel], rollouts: Rollouts, estimator: TrajectoryEstimator | None = None, temperature: float = 1.0
) -> Selection:
    """The shortlist of checkpoints worth a real evaluation: found on one half of the prompts, valued on the other."""
    logps = {name: target_logps(model, rollouts, temperature) for name, model in models.items()}
    return select_trajectories(trajectories(rollouts), logps, estimator)
