"""A bandit's log as decisions of one step: what is learned where straight lines cannot, how near the log it stays, what serves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bandits.batch import DecisionBatch
from bandits.forms import to_bytes, to_form
from bandits.learners import IPS
from bandits.policy import Softmax
from bandits.scorers import Perceptron
from ope import evaluate
from ope.data import FloatArray, InputError, LoggedData
from ope.simulate import softmax
from rl_core.families.online import Plan
from rl_core.methods.mdpo import MDPO
from rl_core.methods.ppo_control import ControlPPO
from rl_core.methods.trpo import TRPO
from rl_core.models.mlp import Sizes
from rl_core.models.policies import ChoicePolicy
from rl_core.one_step import exported, learn_choices, scaling, weighted
from tests.rl_core.crossed_logs import BEST, LINEAR, WORLD, batch_of, logged, true_value

torch.set_num_threads(1)
TRAINING, HELD_OUT = logged(4000, seed=0), logged(20_000, seed=100)
FREE = MDPO(step=3.0)
"""A step that lets it go far, and not so far at once that it is sure of three quadrants before it has seen the fourth."""


def learned(method: Any = FREE, data: LoggedData = TRAINING, **settings: Any) -> Softmax:
    return learn_choices(data, method, **({"steps": 300, "rate": 1e-2, "width": 16} | settings))


def distance(policy: Softmax, data: LoggedData = HELD_OUT) -> float:
    """Mean KL to the logging policy."""
    assert data.propensities is not None
    found = policy.propensities(DecisionBatch.of_log(data))
    return float((found * np.log(found / data.propensities)).sum(axis=1).mean())


@pytest.fixture(scope="module")
def free() -> Softmax:
    return learned()


# what it learns


def test_it_learns_what_straight_lines_cannot(free: Softmax) -> None:
    """By more than 0.15 over the linear learner, whose limit is 0.575; all that there is to gain over it is 0.225."""
    straight = true_value(IPS().fit(TRAINING))
    assert straight < LINEAR + 0.003  # of a standard error of 0.001
    assert straight + 0.15 < true_value(free) < BEST


def test_off_policy_estimates_on_a_log_that_taught_nothing_are_true(free: Softmax) -> None:
    vectors, truth = free.propensities(DecisionBatch.of_log(HELD_OUT)), true_value(free)
    report = evaluate(HELD_OUT, vectors, estimators=("IPS", "SNIPS"))
    for estimate in report.values():
        assert abs(estimate.value - truth) < 4 * estimate.stderr, estimate
        assert estimate.stderr < 0.01


def test_the_smaller_the_step_the_nearer_to_the_log() -> None:
    """t -> 0 stays at the logging policy, which is not where the network began."""
    few = TRAINING.take(slice(0, 2000))
    apart = [distance(learned(MDPO(step=step, step_min=min(step, 1e-3)), few, steps=200)) for step in (1e-4, 0.1, 1.0)]
    assert apart[0] < 1e-3 < apart[1] < 0.05 < apart[2]
    assert distance(learned(MDPO(), few, steps=200, progress=0.9)) == pytest.approx(apart[1], rel=0.01), "t = step·(1 - progress)"
    uniform = Softmax(Perceptron((np.zeros((2, 2)),), (np.zeros(2),)))
    assert distance(uniform) > 0.03


def test_a_constant_step_is_the_closed_form() -> None:
    """Where contexts say nothing: π ∝ μ·exp(t·A), A the mean advantage of an action (mdpo, first invariant)."""
    rng, chances = np.random.default_rng(3), np.array([0.5, 0.3, 0.2])
    n = 5000
    action = np.repeat(np.arange(3), (n * chances).astype(int))
    reward = np.array([1.0, 0.2, 0.0])[action]
    data = LoggedData(
        action=action, reward=reward, propensity=chances[action], propensities=np.tile(chances, (n, 1)),
        context=rng.normal(size=(n, 1)),
    )  # fmt: skip
    found = learned(MDPO(step=0.5), data, layers=0, steps=400).propensities(DecisionBatch.of_log(data)).mean(axis=0)
    advantage = (np.array([1.0, 0.2, 0.0]) - reward.mean()) / reward.std()
    wanted = chances * np.exp(0.5 * advantage)
    np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.01)


def test_the_clipped_method_learns_and_stays_near() -> None:
    policy = learned(ControlPPO(), steps=400)
    assert HELD_OUT.context is not None
    assert true_value(policy) > float((HELD_OUT.propensities * WORLD.q(HELD_OUT.context)).sum(axis=1).mean()) + 0.03
    assert distance(policy) < 0.06
    stopped = learned(ControlPPO(plan=Plan(kl_stop=0.002)), steps=400)
    assert distance(stopped) < distance(policy) / 2


# how it counts


def test_equal_seeds_give_equal_bytes_and_others_do_not() -> None:
    few = TRAINING.take(slice(0, 500))
    first, second, other = (
        to_bytes(to_form(learned(ControlPPO(), few, steps=20, seed=seed, rate=rate)))
        for seed, rate in ((0, 1e-2), (0, 1e-2), (1, 1e-2))
    )
    assert first == second
    assert first != other


def test_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    learned(data=TRAINING.take(slice(0, 100)), steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_rewards_may_be_shifted_and_scaled() -> None:
    """Less their mean, over their deviation."""
    few = TRAINING.take(slice(0, 1000))
    one, other = (learned(data=data, steps=50) for data in (few, replace(few, reward=1000 + 50 * few.reward)))
    batch = DecisionBatch.of_log(few)
    np.testing.assert_allclose(one.propensities(batch), other.propensities(batch), atol=1e-6)


def test_whatever_the_units_of_contexts_the_policy_is_the_same() -> None:
    few = TRAINING.take(slice(0, 1000))
    assert few.context is not None
    moved = replace(few, context=few.context * [1e-4, 1e6] + [3.0, -1e7])
    one, other = (learned(data=data, steps=50).propensities(DecisionBatch.of_log(data)) for data in (few, moved))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_features_that_never_vary_have_no_weight() -> None:
    few = TRAINING.take(slice(0, 500))
    assert few.context is not None
    wide = np.column_stack((few.context, np.full(500, 0.1), np.zeros(500)))
    policy = learned(data=replace(few, context=wide), steps=20)
    unseen = wide + np.array([0.0, 0.0, 5.0, 1.0])
    assert (policy.propensities(batch_of(wide)) == policy.propensities(batch_of(unseen))).all()
    assert scaling(wide)[1][2:].tolist() == [np.inf, np.inf]


def test_weights_are_numbers_of_rows() -> None:
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.1, 3.0, TRAINING.n)
    rows = weighted(replace(TRAINING, sample_weight=weight), seed=0)
    counts, wanted = np.bincount(rows, minlength=TRAINING.n), TRAINING.n * weight / weight.sum()
    assert (len(rows), len(counts)) == (TRAINING.n, TRAINING.n)
    assert np.abs(counts - wanted).max() < 1
    same = weighted(replace(TRAINING, sample_weight=np.full(TRAINING.n, 0.3)), seed=1)
    assert same.tolist() == weighted(TRAINING, 0).tolist() == list(range(TRAINING.n))


def test_rows_that_were_kept_by_chance_teach_as_all_would() -> None:
    """Failures of action 0 were kept one in four: with weights such a log says the same, without them something else."""
    everything = logged(6000, seed=4)
    chance = np.where((everything.action == 0) & (everything.reward == 0), 0.25, 1.0)
    rows = np.random.default_rng(1).random(everything.n) < chance
    kept = everything.take(rows)
    whole, counted, blind = (
        learned(MDPO(), data, width=8, steps=150).propensities(DecisionBatch.of_log(HELD_OUT))[:, 0].mean()
        for data in (everything, replace(kept, sample_weight=1 / chance[rows]), kept)
    )
    assert abs(counted - whole) < 0.03
    assert blind > whole + 0.06, "action 0 seems better than it is"


# arrays


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("body", ["tanh", "relu"])
def test_scores_are_the_logits(layers: int, body: str) -> None:
    """To 1e-6, of contexts in their own units and float32 weights that have moved."""
    torch.manual_seed(0)
    policy = ChoicePolicy(Sizes(5, 4, 32, layers))
    nn.init.normal_(policy.body[-1].weight, std=0.3)  # type: ignore[arg-type]
    nn.init.normal_(policy.body[-1].bias)  # type: ignore[arg-type]
    if body == "relu":
        policy.body = nn.Sequential(*(nn.ReLU() if isinstance(one, nn.Tanh) else one for one in policy.body))
    rng = np.random.default_rng(1)
    context = rng.normal(size=(200, 5)) * [1, 10, 1e-3, 100, 1] + [0, 5, 0, -1e4, 3]
    centre, scale = scaling(context)
    with torch.no_grad():
        logits = policy.body(torch.as_tensor((context - centre) / scale, dtype=torch.float32)).numpy()
    batch = DecisionBatch.of(context, np.ones((200, 4), dtype=bool))
    scorer = exported(policy, centre, scale)
    assert (scorer.activation, len(scorer.weights)) == (body if layers else "tanh", layers + 1)
    np.testing.assert_allclose(scorer.scores(batch), logits, atol=1e-6, rtol=1e-6)
    plain = DecisionBatch.of((context - centre) / scale, batch.eligible)
    np.testing.assert_allclose(exported(policy).scores(plain), logits, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        exact = policy.double().body(torch.as_tensor((context - centre) / scale)).numpy()
    np.testing.assert_allclose(scorer.scores(batch), exact, atol=1e-9)


def test_other_bodies_are_refused() -> None:
    policy = ChoicePolicy(Sizes(2, 2, 4, 2))
    policy.body[1] = nn.ReLU()
    with pytest.raises(InputError, match="with tanh, or with ReLU"):
        exported(policy)
    policy.body = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
    with pytest.raises(InputError, match="with tanh, or with ReLU"):
        exported(policy)


# what it refuses


def eligible(part: float) -> FloatArray:
    found = np.ones((TRAINING.n, 2), dtype=bool)
    found[np.arange(TRAINING.n) < part * TRAINING.n, 1] = False
    found[np.arange(TRAINING.n), TRAINING.action] = True
    return found  # type: ignore[return-value]


VECTORS = TRAINING.propensities
assert VECTORS is not None
MASKED = eligible(0.5)
ONE_HOT = np.eye(2)[TRAINING.action]
WRONG = {
    "no contexts": (replace(TRAINING, context=None), "column 'context': found none"),
    "no vectors": (replace(TRAINING, propensities=None), "whole vectors of the logging policy.*`bandits.learners`"),
    "sets differ": (
        replace(TRAINING, eligible=MASKED, propensities=np.where(MASKED.all(axis=1)[:, None], VECTORS, ONE_HOT)),  # type: ignore[attr-defined]
        "every action in every row.*`take` the rows of one set",
    ),
    "zeros": (replace(TRAINING, propensities=ONE_HOT, propensity=np.ones(TRAINING.n)), "row 0: found 0 for action .*floor"),
    "action features": (replace(TRAINING, action_features=np.zeros((TRAINING.n, 2, 3))), "found 3 of each action"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG)
def test_logs_that_it_cannot_learn_from_are_refused(data: LoggedData, message: str) -> None:
    with pytest.raises(InputError, match=message):
        learn_choices(data)


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"width": 0}, {"layers": -1}, {"seed": -1}, {"rate": 0.0}, {"progress": 1.5}, {"progress": -0.1}]
)
def test_settings_without_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        learn_choices(TRAINING, **settings)


def test_methods_that_move_the_policy_by_themselves_are_refused() -> None:
    with pytest.raises(InputError, match=r"found TRPO.*MDPO or ControlPPO"):
        learn_choices(TRAINING, TRPO())


def test_rewards_that_are_all_alike_leave_the_logging_policy() -> None:
    assert distance(learned(data=replace(TRAINING, reward=np.full(TRAINING.n, 0.1)))) < 2e-3


def test_vectors_of_a_softmax_are_begun_with() -> None:
    """Far from uniform: what clips alone hold to the last policy must begin there."""
    context = np.random.default_rng(2).normal(size=(3000, 2))
    vectors = 0.9 * softmax(3 * context) + 0.05
    rng = np.random.default_rng(0)
    action = (rng.random(3000) > vectors[:, 0]).astype(int)
    data = LoggedData(
        action=action, reward=rng.random(3000), propensity=vectors[np.arange(3000), action], propensities=vectors, context=context
    )
    assert distance(learned(ControlPPO(), data, steps=300, rate=3e-3), data) < 0.05
