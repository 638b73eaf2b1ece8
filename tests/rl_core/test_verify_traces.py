"""Experiments of traces, cuts and natural gradients: what is right keeps the margins, and each catches what it is there for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ope.primitives.returns import vtrace
from ope.sequential import SequentialDR, Steps, TrajectoryIS
from rl_core.envs.pendulum import EXPERT, RANDOM, Pendulum
from rl_core.families.offline import Drawn
from rl_core.methods.trpo import TRPO
from rl_core.verify import online, traces
from rl_core.verify.arms import Arms
from rl_core.verify.control import PENDULUM, OnlineArm
from rl_core.verify.traces import DISCOUNT, HORIZON, STATES, Aimless, Ending, World

torch.set_num_threads(1)
Floats = NDArray[np.float64]
SEEDS = range(3)


def failed(found: Sequence[Any]) -> list[int]:
    """Places of margins that are not kept."""
    return [place for place, one in enumerate(found) if not one.passed]


# the off-policy check


def test_a_world_is_worth_the_sum_of_its_steps() -> None:
    world = World.of(3)
    q, v = world.model()
    moves, earned = np.einsum("sa,sat->st", world.target, world.transition), (world.target * world.reward).sum(axis=1)
    sum_of_steps = sum((DISCOUNT**t * np.linalg.matrix_power(moves, t) @ earned for t in range(HORIZON)), start=np.zeros(STATES))
    np.testing.assert_allclose(v[0], sum_of_steps, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(v[HORIZON], 0)
    np.testing.assert_allclose(q[HORIZON - 1], world.reward, rtol=0, atol=1e-12)
    _, _, reward = replace(world, behavior=world.target).drawn(20_000, np.random.default_rng(0))
    returns = reward @ DISCOUNT ** np.arange(HORIZON)
    assert abs(returns.mean() - v[0].mean()) < 4 * returns.std() / len(returns) ** 0.5


def test_estimators_and_traces_keep_the_margins_of_the_page() -> None:
    found = [traces.off_policy_of(seed, repeats=20) for seed in SEEDS]
    assert failed(traces.off_policy_margins(found)) == []
    for one in found:  # fewer ratios in the products, then less that they weigh
        assert one["PDDR"] < one["PDIS"] < one["IS"]


class Early(SequentialDR):
    """Weighs what a step earned as if the step before had led to it."""

    def terms(self, steps: Steps) -> Floats:
        before = np.concatenate((np.ones_like(steps.weight[:, :1]), steps.weight[:, :-1]), axis=1)
        return np.asarray((before * (steps.v + steps.reward - steps.q)).sum(axis=1, keepdims=True))


def bounded(*given: Any) -> Floats:
    """Whatever bounds are asked for, 1."""
    return np.asarray(vtrace(*given[:-2], 1.0, 1.0))


def unbounded(*given: Any) -> Floats:
    """Whatever bounds are asked for, none."""
    return np.asarray(vtrace(*given[:-2], np.inf, np.inf))


@pytest.mark.parametrize(
    ("name", "wrong", "margins"),
    [
        ("PDIS", (TrajectoryIS(), 1.0), [0]),
        ("PDDR", (Early(), 1.0), [1]),
        ("PDDR, model shrunk", (Early(), 0.9), [2]),
        ("vtrace", bounded, [3]),
        ("vtrace", unbounded, [4]),
    ],
    ids=["whole products", "weights too early", "a wrong model's too early", "bounds that are not asked for", "no bounds"],
)
def test_wrong_estimators_fail_the_margin_that_is_theirs(
    name: str, wrong: Any, margins: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "vtrace":
        monkeypatch.setattr(traces, "vtrace", wrong)
    else:
        monkeypatch.setattr(traces, "ESTIMATORS", {**traces.ESTIMATORS, name: wrong})
    assert failed(traces.off_policy_margins([traces.off_policy_of(1, repeats=20)])) == margins


# what a cut is worth


def test_the_truth_is_that_of_the_page() -> None:
    starts, true = traces.truth()
    assert starts.shape == (traces.STARTS, 3)
    assert true == pytest.approx(-615, abs=10)  # of Gymnasium's pendulum, whose equations these are


def test_a_policy_of_uniform_actions() -> None:
    chances = Aimless()(torch.zeros(4, 5, 3))
    action = chances.sample(Drawn(torch.Generator().manual_seed(0)))
    assert action.shape == (4, 5, 1)
    assert bool((action.abs() <= 1).all())
    np.testing.assert_allclose(chances.logp(action), np.log(0.5), rtol=0, atol=1e-6)
    assert chances.mode().shape == action.shape
    assert float(chances.rows(slice(2)).kl(chances).abs().max()) == 0


@pytest.mark.parametrize(("learned", "steps"), [(traces.by_returns, 20_480), (traces.by_backups, 2000)], ids=["online", "FQE"])
def test_a_cut_is_no_end_and_what_takes_it_for_one_fails(learned: Callable[..., float], steps: int) -> None:
    starts, true = traces.truth(500)
    right, wrong = (learned(kind(steps=traces.CUT), starts, 0, steps) for kind in (Pendulum, Ending))
    assert traces.cut_margin("learner", true, [(right, wrong)]).passed
    assert not traces.cut_margin("learner", true, [(wrong, wrong)]).passed
    assert not traces.cut_margin("learner", true, [(right, wrong), (wrong, right)]).passed
    if learned is traces.by_backups:  # every row ends with a chance of 1 in 100: the mean reward over 1 - 0.99·0.99
        assert wrong == pytest.approx(true * 0.01 / (1 - 0.99 * 0.99), rel=0.05)


# methods that collect for themselves


class Said(Arms):
    """Rows that are given, and what was asked for."""

    def __init__(self, rows: Sequence[dict[str, float]]) -> None:
        super().__init__(Path())
        self.rows, self.asked = list(rows), list[Any]()

    def run(self, arms: Any) -> Any:
        self.asked = list(arms)
        return [self.rows for _ in self.asked]


class Tens(Said):
    """Of which ten steps on a batch earn more than one, by as much as there are."""

    def run(self, arms: Any) -> Any:
        return [[{"return": float(arm.method.plan.epochs)}] for arm in arms]


def test_margins_of_methods_are_on_the_end_of_their_worst_seed() -> None:
    def rows(*returned: float) -> list[dict[str, float]]:
        return [{"return": one, "score": 100 * (one - RANDOM) / (EXPERT - RANDOM)} for one in returned]

    assert failed(online.inner_steps(Said(rows(12.0, 34.0)))) == [0, 1]  # ten steps are no better than one
    assert failed(online.inner_steps(Tens(rows(12.0, 34.0)))) == []
    experiments = {online.natural: 2, online.mirror_replay: 1, online.judged: 1}
    for margins, methods in experiments.items():
        arms = Said(rows(RANDOM, *[EXPERT] * online.LAST))
        assert failed(margins(arms, SEEDS)) == []
        assert len({arm.key() for arm in arms.asked}) == len(arms.asked) == methods * len(SEEDS)
        assert failed(margins(Said(rows(EXPERT, *[RANDOM] * online.LAST)), SEEDS)) == list(range(methods))


def test_the_natural_gradient_is_what_climbs(tmp_path: Path) -> None:
    """A fifth of the experiment: half way to the expert, and where damping drowns the curvature it stays where it began."""
    found = []
    for method in (online.NATURAL["TRPO"], replace(online.NATURAL["TRPO"], damping=1e3)):
        rows = OnlineArm(method, PENDULUM, 30_720, 0, reward_scale=0.1, evaluations=1).run(tmp_path)
        found.append(rows[-1]["return"])
    assert found[0] > -750
    assert found[1] < -1000
    assert isinstance(online.NATURAL["NPG"], TRPO)
    assert online.NATURAL["NPG"].backtracks == 0
