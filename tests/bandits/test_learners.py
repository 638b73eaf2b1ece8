"""Every learner: no worse than who logged, weights are repeats, clusters stay whole, masks hold, one seed gives one policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bandits import learners, softmax_linear
from bandits.batch import DecisionBatch
from bandits.forms import from_bytes, from_form, to_bytes, to_form
from bandits.learners import (
    DR,
    IPS,
    LEARNERS,
    POEM,
    BanditNet,
    LSLin,
    OracleGreedy,
    OracleSoftmax,
    Pessimistic,
    label,
    reward_range,
)
from bandits.policy import Greedy, Softmax
from bandits.reward_models import cross_fitted
from bandits.scorers import Linear, Trees
from ope import LoggedData, evaluate
from ope.data import InputError
from ope.simulate import World
from tests.bandits.learner_logs import (
    every_learner,
    is_distribution,
    logging_policy,
    masked_log,
    masks,
    ragged_log,
    requests,
    simulated,
)

D = 4
ANY_REWARD = [each for each in LEARNERS if reward_range(each) == (-np.inf, np.inf)]


@every_learner
@pytest.mark.parametrize("k", [4, 6])
def test_never_below_the_logging_policy(learner, k):
    """On 5 worlds. `World.value` takes both true values over the same 20,000 fresh contexts, so the noise of their difference is
    the standard error of the mean of the differences context by context.
    """
    for seed in range(5):
        world, rng = World.random(5, k, seed), np.random.default_rng(100 + seed)
        context = world.contexts(4000, rng)
        policy = learner.fit(world.log(context, logging_policy(world, context), rng), k=k, seed=seed)
        kept: list[np.ndarray] = []

        def learned(context, policy=policy, kept=kept):
            kept.append(context)
            kept.append(policy.propensities(DecisionBatch.of(context, np.ones((len(context), k), dtype=bool))))
            return kept[-1]

        gain = world.value(learned, n=20_000) - world.value(lambda fresh, world=world: logging_policy(world, fresh), n=20_000)
        fresh, vectors = kept
        each = ((vectors - logging_policy(world, fresh)) * world.q(fresh)).sum(axis=1)
        assert gain == pytest.approx(each.mean(), abs=1e-12), "one set of contexts for both"
        assert gain > -2 * each.std(ddof=1) / np.sqrt(len(each))


@every_learner
def test_policy_has_the_kind_that_its_page_says(learner):
    policy = learner.fit(simulated(), k=4)
    greedy = isinstance(learner, OracleGreedy)
    assert isinstance(policy, Greedy if greedy else Softmax)
    assert isinstance(policy.scorer, Trees if label(learner).endswith("(trees)") else Linear)


@every_learner
def test_same_seed_gives_the_same_bytes(learner):
    data = simulated()
    first, second = (to_bytes(to_form(learner.fit(data, k=4, seed=3))) for _ in range(2))
    assert first == second


@every_learner
def test_policy_survives_its_serialised_form(learner):
    policy = learner.fit(simulated(), k=4)
    written = to_bytes(to_form(policy))
    back = from_form(from_bytes(*written))
    assert np.array_equal(back.propensities(requests()), policy.propensities(requests()))
    assert to_bytes(to_form(back)) == written


@every_learner
def test_inputs_are_left_as_they_were(learner):
    data, _, _ = ragged_log(400)
    for log in (data, simulated(400, sample_weight=np.linspace(1, 3, 400), cluster=np.arange(400) // 2), masked_log(400)):
        names = ("action", "reward", "propensity", "context", "eligible", "action_features", "sample_weight", "cluster")
        before = {name: getattr(log, name).copy() for name in names if getattr(log, name) is not None}
        for name in before:
            getattr(log, name).flags.writeable = False  # a write in between would raise
        learner.fit(log)
        assert all(np.array_equal(getattr(log, name), copy) for name, copy in before.items())


@every_learner
def test_masks_hold_in_the_vectors(learner):
    """For named actions, on the log's own masks and on others, one of them with a single action."""
    policy = learner.fit(masked_log())
    fresh = np.random.default_rng(6).normal(size=(500, D))
    eligible = masks(500, 4, 7)
    eligible[0] = [False, False, True, False]
    vectors = policy.propensities(DecisionBatch.of(fresh, eligible))
    assert is_distribution(vectors, eligible)
    assert vectors[0, 2] == 1
    assert is_distribution(policy.propensities(DecisionBatch.of_log(masked_log())), masked_log().eligible)


@every_learner
def test_masks_that_hide_nothing_change_nothing(learner):
    data = simulated()
    hidden = replace(data, eligible=np.ones((data.n, 4), dtype=bool))
    assert to_bytes(to_form(learner.fit(hidden))) == to_bytes(to_form(learner.fit(data, k=4)))


@every_learner
def test_ragged_actions_with_features(learner):
    """One to five a row: what is not eligible gets nothing, and the policy earns more than the one that logged.

    Noise is the standard error of the difference context by context, on contexts that were not learned from.
    """
    policy = learner.fit(ragged_log()[0])
    data, p, q = ragged_log(5000, seed=2)
    vectors = policy.propensities(DecisionBatch.of_log(data))
    assert is_distribution(vectors, data.eligible)
    gain = ((vectors - p) * q).sum(axis=1)
    assert gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain))


@every_learner
def test_one_action(learner):
    data = simulated(60, k=1)
    assert np.array_equal(learner.fit(data).propensities(requests(9, 1)), np.ones((9, 1)))


@every_learner
def test_actions_that_the_log_never_took(learner):
    policy = learner.fit(simulated(), k=6)
    assert is_distribution(policy.propensities(requests(50, 6)), np.ones((50, 6), dtype=bool))


@every_learner
def test_rewards_that_never_vary(learner):
    policy = learner.fit(simulated(reward=np.full(1000, 0.5)), k=4)
    assert is_distribution(policy.propensities(requests()), np.ones((2000, 4), dtype=bool))


@every_learner
def test_a_log_without_features(learner):
    """The best action of all, the same everywhere: nothing else is known."""
    rng = np.random.default_rng(8)
    action = rng.integers(0, 3, 900)
    reward = (rng.random(900) < np.array([0.2, 0.8, 0.4])[action]).astype(float)
    policy = learner.fit(LoggedData(action=action, reward=reward, propensity=np.full(900, 1 / 3)))
    vectors = policy.propensities(DecisionBatch.of(None, np.ones((5, 3), dtype=bool)))
    assert (vectors == vectors[0]).all()
    assert vectors[0].argmax() == 1
    assert vectors[0, 1] > 1 / 3


@every_learner
def test_clusters_are_accepted_and_change_only_what_is_held_out(learner):
    data = simulated(cluster=np.arange(1000) // 4)
    policy = learner.fit(data, k=4)
    assert is_distribution(policy.propensities(requests()), np.ones((2000, 4), dtype=bool))
    if not isinstance(learner, BanditNet | POEM | DR | Pessimistic):  # these hold nothing out
        assert to_bytes(to_form(policy)) == to_bytes(to_form(learner.fit(simulated(), k=4)))


def test_reward_of_a_row_does_not_reach_the_predictions_of_its_cluster():
    """Nor of the fold that its cluster is in, while the others do learn from it."""
    data = simulated(300, cluster=np.random.default_rng(2).integers(0, 40, 300))
    reward = data.reward.copy()
    reward[data.cluster == 5] += 50.0
    before, after = (cross_fitted(None, each, 4, 3, 0) for each in (data, replace(data, reward=reward)))
    unmoved = (before == after).all(axis=1)
    assert unmoved[data.cluster == 5].all()
    assert 60 < unmoved.sum() < 140, "a third of the rows share its fold"


@pytest.mark.parametrize("learner", [BanditNet(), POEM()], ids=label)
def test_settings_are_chosen_on_clusters_that_were_not_learned_from(learner, monkeypatch):
    learned: list[LoggedData] = []
    held_out: list[LoggedData] = []

    def problem_spy(data, *args, **kwargs):
        learned.append(data)
        return softmax_linear.problem_of(data, *args, **kwargs)

    def evaluate_spy(data, *args, **kwargs):
        held_out.append(data)
        return evaluate(data, *args, **kwargs)

    monkeypatch.setattr(learners, "problem_of", problem_spy)
    monkeypatch.setattr(learners, "evaluate", evaluate_spy)
    cluster = np.random.default_rng(3).integers(0, 90, 600)
    learner.fit(simulated(600, cluster=cluster), k=4)
    settings = len(learner.shifts if isinstance(learner, BanditNet) else learner.penalties)
    assert len(held_out) == settings
    assert len(learned) == settings + 1, "once more on the whole log"
    for train, test in zip(learned, held_out, strict=False):
        assert not set(train.cluster) & set(test.cluster)
        assert train.n + test.n == 600
    assert learned[-1].n == 600


@every_learner
def test_weight_is_repeats_of_a_row(learner, monkeypatch):
    """A log in which row i counts m_i times, against one that holds it m_i times, its copies one cluster.

    Four things would make them differ. The ridge penalty is chosen by leaving out a row, which for a repeated one is a copy of
    many, so one penalty is given here. Penalties and temperatures are in units of the plain spread of the rewards, so both
    classes of rewards get the same weights here. Standard errors count weighted rows as an effective sample, which is
    smaller than that of the copies, so POEM and the pessimistic learner get no penalty by them here; log smoothing
    has its l from the number of rows, so it is given. And trees bin by rows, so features have few values. Linear policies
    then agree to 1e-3, those of oracles in the ranking of at least 99 % of contexts.
    """
    monkeypatch.setattr(softmax_linear, "PENALTIES", np.array([30.0]))
    data = simulated()
    data = replace(data, context=np.round(data.context, 1), cluster=np.arange(1000))
    times = np.empty(1000, dtype=int)
    for value in (0, 1):
        rows = np.random.default_rng(4).permutation(np.flatnonzero(data.reward == value))
        third = len(rows) // 3
        times[rows] = np.repeat((1, 3, 2), (third, third, len(rows) - 2 * third))
    learner = {
        "POEM": POEM(penalties=(0.0,)), "pessimistic": Pessimistic(z=0.0), "LS-LIN": LSLin(smoothing=0.03)
    }.get(learner.name, learner)  # fmt: skip
    copies = np.repeat(np.arange(1000), times)
    batch = DecisionBatch.of(np.round(requests().context, 1), requests().eligible)
    weighted, repeated = (
        learner.fit(each, k=4).propensities(batch) for each in (replace(data, sample_weight=times.astype(float)), data.take(copies))
    )
    if isinstance(learner, OracleGreedy | OracleSoftmax):
        assert (weighted.argmax(axis=1) == repeated.argmax(axis=1)).mean() >= 0.99
    else:
        assert weighted == pytest.approx(repeated, rel=0, abs=1e-3)
    plain = learner.fit(data, k=4).propensities(batch)
    assert np.abs(plain - weighted).max() > 0.01, "the weights do matter"


@pytest.mark.parametrize("learner", [OracleGreedy(), OracleSoftmax()], ids=label)
def test_ridge_ranks_as_it_does_on_repeats_though_it_chooses_its_own_penalty(learner):
    """Neighbouring penalties, of weights and of copies, rank alike but where two actions are nearly equal."""
    data, times = simulated(4000), np.random.default_rng(5).integers(1, 4, 4000)
    weighted = learner.fit(replace(data, sample_weight=times.astype(float)), k=4).propensities(requests())
    repeated = learner.fit(data.take(np.repeat(np.arange(4000), times)), k=4).propensities(requests())
    assert (weighted.argmax(axis=1) == repeated.argmax(axis=1)).mean() >= 0.99


@pytest.mark.parametrize("shift", [1.0, -7.0])
@pytest.mark.parametrize("learner", [each for each in ANY_REWARD if not isinstance(each, IPS | POEM)], ids=label)
def test_a_constant_added_to_every_reward_changes_no_policy(learner, shift):
    """The model moves by it, and a residual does not; shares of the reward's range move with it. Not so for the weight of a
    reward in IPS, POEM and log smoothing, where c adds c·mean(w) and so pulls towards actions that were logged too often.
    """
    data = simulated()
    before, after = (learner.fit(each, k=4).propensities(requests()) for each in (data, replace(data, reward=data.reward + shift)))
    assert after == pytest.approx(before, rel=0, abs=1e-3)


def test_a_constant_added_to_every_reward_does_change_what_ips_learns():
    data = simulated()
    before, after = (IPS().fit(each, k=4).propensities(requests()) for each in (data, replace(data, reward=data.reward + 1)))
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("scale", [0.01, 1000.0])
@pytest.mark.parametrize("learner", [each for each in ANY_REWARD if isinstance(each, OracleGreedy | OracleSoftmax)], ids=label)
def test_oracles_do_not_mind_the_unit_of_the_reward(learner, scale):
    data = simulated()
    before, after = (learner.fit(each, k=4).propensities(requests()) for each in (data, replace(data, reward=data.reward * scale)))
    assert (after.argmax(axis=1) == before.argmax(axis=1)).mean() >= 0.99
    assert np.abs(after - before).mean() < 1e-2


def test_log_smoothing_refuses_negative_rewards():
    data = simulated()
    with pytest.raises(InputError, match=r"found a reward of -0\.25; .* expects rewards of at least 0: shift them"):
        LSLin().fit(replace(data, reward=data.reward - 0.25), k=4)
