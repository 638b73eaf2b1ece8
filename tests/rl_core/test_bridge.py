"""Checkpoints valued from rollouts that another policy sampled."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from ope.data import InputError
from ope.sequential import PDIS, WIS, TrajectoryIS
from rl_core.bridge import select_checkpoints, trajectories, value_checkpoints
from rl_core.methods.grpo import GRPO
from rl_core.models.lm import LM
from rl_core.rollout import Rollouts
from rl_core.tasks.addition import Fillers
from rl_core.trainers.token import Schedule, Trainer, imitate


@pytest.fixture(scope="module")
def run() -> tuple[Rollouts, dict[str, LM], dict[str, float]]:
    """Rollouts of a first policy, checkpoints after it, and what fresh rollouts of each of them earn."""
    torch.set_num_threads(1)
    start, _ = imitate(Fillers(), steps=150, batch=64, learning_rate=3e-3)
    schedule = Schedule(steps=6, prompts=16, responses=8, learning_rate=1e-4, seed=3)
    trainer = Trainer(GRPO(), Fillers(), schedule, start)
    many = Schedule(prompts=400, responses=8, seed=11)
    models, true = dict[str, LM](), dict[str, float]()
    rollouts = Trainer(GRPO(), Fillers(), many, start).collect()
    for step in (0, 2, 4, 6):
        while trainer.step < step:
            trainer.advance()
        models[f"step {step}"] = copy.deepcopy(trainer.policy)
        true[f"step {step}"] = float(Trainer(GRPO(), Fillers(), many, models[f"step {step}"]).collect().reward.mean())
    return rollouts, models, true


def test_responses_are_trajectories_of_their_prompts(run: tuple[Rollouts, dict[str, LM], dict[str, float]]) -> None:
    rollouts, _, _ = run
    data = trajectories(rollouts)
    assert data.n == 3200
    assert data.cluster is not None
    assert len(np.unique(data.cluster)) == 400
    np.testing.assert_array_equal(data.reward.sum(axis=1), rollouts.reward.numpy())  # once, at the end
    np.testing.assert_array_equal(data.mask.sum(axis=1), rollouts.mask.sum(dim=1).numpy())


def test_checkpoints_are_worth_what_their_own_rollouts_earn(run: tuple[Rollouts, dict[str, LM], dict[str, float]]) -> None:
    rollouts, models, true = run
    found = value_checkpoints(models, rollouts, [TrajectoryIS(), PDIS(), WIS()])
    own = found["step 0"].estimates
    assert own[2].value == pytest.approx(float(rollouts.reward.mean()), abs=1e-4)  # it sampled them: weights are one, in float32
    for name, report in found.items():
        for one in report.estimates:
            error = (one.stderr**2 + true[name] * (1 - true[name]) / 400) ** 0.5  # the truth is of 400 prompts, too
            assert abs(one.value - true[name]) < 4 * error, (name, one)
    sizes = [report["WIS"].ess for report in found.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_a_shortlist_of_checkpoints_is_found_on_one_half_and_valued_on_the_other(
    run: tuple[Rollouts, dict[str, LM], dict[str, float]],
) -> None:
    rollouts, models, _ = run
    chosen = select_checkpoints(models, rollouts)
    assert set(chosen.ranking) <= set(models)
    assert chosen.estimator == "WIS"
    with pytest.raises(InputError, match="found 1 clusters; expected at least 2"):
        select_checkpoints(models, rollouts.rows(slice(0, 8)))
