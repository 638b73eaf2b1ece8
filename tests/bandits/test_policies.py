"""Every kind of policy: distributions, masks, purity, one row equal to many, and a form that survives to the byte."""

from __future__ import annotations

import io
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta

from bandits.batch import DecisionBatch
from bandits.forms import Form, from_bytes, from_form, to_bytes, to_form
from bandits.oracles import lightgbm_module
from bandits.policy import (
    POLICIES,
    UCB,
    Bagging,
    Cap,
    EpsilonGreedy,
    FastCB,
    Floor,
    Greedy,
    GuardRail,
    InverseGap,
    Mixture,
    Softmax,
    Thompson,
    Uniform,
)
from bandits.posteriors import BayesianLinear, BetaBernoulli, NormalMean
from bandits.sampling import TOTAL, quantise_rows
from bandits.scorers import Linear, Trees
from ope.data import InputError

N, K, D, P = 1000, 6, 4, 3
near = pytest.approx


def constant(*scores: float) -> Linear:
    """A score per action, whatever the features."""
    return Linear(np.array(scores), np.zeros((0, 0)), np.zeros(0))


def linear(seed: int, link: str = "identity", size: float = 0.5) -> Linear:
    rng = np.random.default_rng(seed)
    return Linear(rng.normal(size=K) * size, rng.normal(size=(D, K)) * size, rng.normal(size=P) * size, link)


def shared(seed: int, size: float = 0.5) -> Linear:
    """Of contexts and action features, with the same weights for every action, however many."""
    rng = np.random.default_rng(seed)
    return Linear(np.array([0.1]), np.zeros((0, 0)), rng.normal(size=P) * size)


def belief(seed: int = 0) -> BayesianLinear:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(30, P))
    return BayesianLinear.prior(P).update(features, features @ [0.5, -0.2, 0.1] + rng.normal(size=30))


def trees() -> Trees:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 1 + D + P))
    lightgbm = lightgbm_module()
    settings = {"num_leaves": 7, "verbose": -1, "num_threads": 1, "seed": 1, "deterministic": True}
    rows = lightgbm.Dataset(features, features[:, 1] * features[:, -1])
    return Trees(lightgbm.train(settings, rows, num_boost_round=10).model_to_string())


INSTANCES = {
    "uniform": Uniform(),
    "greedy": Greedy(linear(1)),
    "epsilon_greedy": EpsilonGreedy(linear(2), 0.1),
    "softmax": Softmax(linear(3), 0.3),
    "softmax of trees": Softmax(trees(), 0.3),
    "inverse_gap": InverseGap(linear(4), 12.0),
    "fast_cb": FastCB(linear(5, "logistic"), 7.0),
    "thompson": Thompson(belief(), 200, seed=3),
    "thompson of rates": Thompson(BetaBernoulli(np.arange(1.0, K + 1), np.full(K, 3.0)), 300),
    "ucb": UCB(belief(1), 1.5, 0.05),
    "bagging": Bagging(tuple(linear(seed) for seed in range(10, 17))),
    "mixture": Mixture((Greedy(linear(6)), Uniform(), Softmax(linear(7))), (0.5, 0.2, 0.3)),
    "floor": Floor(InverseGap(linear(8), 50.0), 0.02),
    "cap": Cap(Softmax(linear(9), 0.2), np.array([1.0])),
    "guard_rail": GuardRail(Softmax(linear(10)), linear(11), 0.2),
}
each_policy = pytest.mark.parametrize("policy", INSTANCES.values(), ids=INSTANCES)


def masked(n: int = N, seed: int = 0) -> DecisionBatch:
    rng = np.random.default_rng(seed)
    eligible = rng.uniform(size=(n, K)) < 0.6
    eligible[np.arange(n), rng.integers(K, size=n)] = True
    return DecisionBatch.of(rng.normal(size=(n, D)), eligible, rng.normal(size=(n, K, P)))


def unmasked(n: int = N) -> DecisionBatch:
    batch = masked(n)
    return DecisionBatch.of(batch.context, np.ones((n, K), dtype=bool), batch.action_features)


def take(batch: DecisionBatch, index: np.ndarray) -> DecisionBatch:
    return DecisionBatch.of(batch.context[index], batch.eligible[index], batch.action_features[index])


def scored(*rows: list[bool]) -> DecisionBatch:
    return DecisionBatch.of(None, np.array(rows))


FULL = scored([True, True, True])
each_batch = pytest.mark.parametrize("batch", [masked(), unmasked()], ids=["masked", "full"])


def test_every_kind_of_policy_is_here():
    assert {type(policy) for policy in INSTANCES.values()} == set(POLICIES)
    assert len({policy.kind for policy in POLICIES}) == len(POLICIES) == 13


@each_policy
@each_batch
def test_rows_are_distributions_over_the_eligible(policy, batch):
    p = policy.propensities(batch)
    assert p.shape == (N, K)
    assert np.abs(p.sum(axis=1) - 1).max() < 1e-12
    assert (p >= 0).all()
    assert (p[~batch.eligible] == 0).all()
    quantised = quantise_rows(p, batch.eligible)
    assert (quantised.sum(axis=1) == TOTAL).all()
    assert (quantised[batch.eligible] >= 1).all()
    assert (quantised[~batch.eligible] == 0).all()


@each_policy
def test_a_single_eligible_action_has_probability_1(policy):
    eligible = np.eye(K, dtype=bool)
    batch = DecisionBatch.of(np.ones((K, D)), eligible, np.ones((K, K, P)))
    assert policy.propensities(batch).tolist() == eligible.astype(float).tolist()


@each_policy
@each_batch
def test_permuted_requests_have_permuted_vectors(policy, batch):
    order = np.random.default_rng(1).permutation(N)
    assert policy.propensities(take(batch, order)).tobytes() == policy.propensities(batch)[order].tobytes()


@each_policy
@each_batch
def test_one_request_has_the_bits_of_its_row_among_a_thousand(policy, batch):
    whole = policy.propensities(batch)
    for i in range(0, N, 10):
        assert policy.propensities(take(batch, np.array([i]))).tobytes() == whole[i].tobytes(), f"row {i}"
        assert policy.propensities(batch.rows(slice(i, i + 1))).tobytes() == whole[i].tobytes(), f"row {i}, as a view"


@each_policy
def test_a_call_changes_nothing(policy):
    batch = masked()
    before = [array.copy() for array in (batch.context, batch.action_features, batch.eligible)]
    form = to_bytes(to_form(policy))
    first = policy.propensities(batch)
    assert policy.propensities(batch).tobytes() == first.tobytes(), "no hidden random state"
    after = (batch.context, batch.action_features, batch.eligible)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert to_bytes(to_form(policy)) == form


@each_policy
def test_policies_are_frozen(policy):
    with pytest.raises((FrozenInstanceError, TypeError, AttributeError)):
        policy.scorer = constant(1.0)


@each_policy
def test_forms_survive_to_the_byte_and_decide_alike(policy):
    document, arrays = to_bytes(to_form(policy))
    rebuilt = from_form(from_bytes(document, arrays))
    assert type(rebuilt) is type(policy)
    assert to_bytes(to_form(rebuilt)) == (document, arrays)
    for batch in (masked(), unmasked()):
        assert rebuilt.propensities(batch).tobytes() == policy.propensities(batch).tobytes()
    twin = from_form(to_form(policy))
    assert to_bytes(to_form(twin)) == (document, arrays), "equal policies, equal bytes"


MANY = {
    "uniform": Uniform(),
    "greedy": Greedy(shared(1)),
    "epsilon_greedy": EpsilonGreedy(shared(1), 0.1),
    "softmax": Softmax(shared(1)),
    "inverse_gap": InverseGap(shared(1), 12.0),
    "fast_cb": FastCB(Linear(np.array([0.1]), np.zeros((0, 0)), np.ones(P), "logistic")),
    "thompson": Thompson(belief(), 100),
    "ucb": UCB(belief()),
    "bagging": Bagging((shared(1), shared(2))),
    "mixture": Mixture((Greedy(shared(1)), Uniform()), (0.9, 0.1)),
    "floor": Floor(Greedy(shared(1))),
    "cap": Cap(Softmax(shared(1)), np.array([0.01])),
    "guard_rail": GuardRail(Softmax(shared(1)), shared(2), 0.0),
}


@pytest.mark.parametrize("policy", MANY.values(), ids=MANY)
def test_ten_thousand_actions_are_valid(policy):
    rng = np.random.default_rng(4)
    batch = DecisionBatch.of(None, rng.uniform(size=(2, 10_000)) < 0.9, rng.normal(size=(2, 10_000, P)))
    p = policy.propensities(batch)
    assert p.shape == (2, 10_000)
    assert np.abs(p.sum(axis=1) - 1).max() < 1e-12
    assert (p[~batch.eligible] == 0).all()
    assert (quantise_rows(p, batch.eligible)[batch.eligible] >= 1).all()


@pytest.mark.parametrize(
    ("context", "eligible", "features", "message"),
    [
        (np.array([[0.0], [np.nan]]), np.ones((2, 2)), None, "^context, row 1: found a number that is not finite"),
        (None, np.ones((2, 2)), np.full((2, 2, 1), np.inf), "^action_features, row 0: found a number that is not finite"),
        (None, np.array([[1, 0], [0, 0]]), None, "^row 1: found no eligible action; expected at least one"),
        (np.zeros((3, 1)), np.ones((2, 2)), None, r"found context \(3, 1\)"),
        (None, np.ones((2, 2)), np.zeros((2, 3, 1)), r"action_features \(2, 3, 1\)"),
        (None, np.ones(2), None, r"^eligible: found shape \(2,\); expected \(n, k\)"),
    ],
)
def test_requests_that_nobody_can_decide_are_refused(context, eligible, features, message):
    with pytest.raises(InputError, match=message):
        DecisionBatch.of(context, eligible, features)


def test_a_batch_knows_when_every_action_is_eligible():
    assert unmasked().mask is None
    assert (masked().mask == masked().eligible).all()
    part = masked().rows(slice(3, 8))
    assert len(part) == 5
    assert (part.eligible == masked().eligible[3:8]).all()


def test_a_linear_score_by_hand():
    scorer = Linear(np.array([0.5, -1.0]), np.array([[1.0, 2.0], [0.0, -3.0]]), np.array([10.0]))
    batch = DecisionBatch.of(np.array([[2.0, 1.0]]), np.ones((1, 2), dtype=bool), np.array([[[0.1], [0.2]]]))
    assert scorer.scores(batch)[0].tolist() == near([0.5 + 2 + 1, -1 + 4 - 3 + 2], abs=1e-12)
    logistic = Linear(scorer.bias, scorer.context_weights, scorer.action_weights, "logistic")
    assert logistic.scores(batch)[0].tolist() == near([1 / (1 + np.exp(-3.5)), 1 / (1 + np.exp(-2.0))], abs=1e-15)
    with pytest.raises(InputError, match=r"found 2 context features, 2 actions, 1 action features; expected .*2, 3"):
        Linear(np.zeros(3), np.zeros((2, 3)), np.zeros(1)).scores(batch)


def test_policies_follow_the_pages():
    pages = {
        InverseGap(constant(0.95, 0.94, 0.90), 100.0): [0.625, 0.25, 0.125],
        InverseGap(constant(0.9, 0.8, 0.5), 10.0): [17 / 28, 1 / 4, 1 / 7],
        FastCB(constant(0.95, 0.94, 0.0), 10.0): [1 - 0.25 * 0.8 - 0.05 / 9.65, 0.05 / 0.25, 0.05 / (0.15 + 9.5)],
        EpsilonGreedy(constant(0.1, 0.9, 0.2), 0.06): [0.02, 0.96, 0.02],
        Floor(Greedy(constant(0.1, 0.9, 0.2)), 0.3): [0.1, 0.8, 0.1],
        Cap(Greedy(constant(0.1, 0.9, 0.2)), np.array([1.0, 0.4, 0.2])): [0.4, 0.4, 0.2],
        Uniform(): [1 / 3] * 3,
    }
    for policy, expected in pages.items():
        assert policy.propensities(FULL)[0].tolist() == near(expected, abs=1e-12), policy.kind


def test_a_mixture_is_the_weighted_sum():
    policy = Mixture((Greedy(constant(1, 2, 3)), Uniform()), (0.95, 0.05))
    assert policy.propensities(FULL)[0].tolist() == near([0.05 / 3, 0.05 / 3, 0.95 + 0.05 / 3], abs=1e-15)
    batch, parts = masked(), INSTANCES["mixture"].policies
    expected = sum(w * part.propensities(batch) for w, part in zip((0.5, 0.2, 0.3), parts, strict=True))
    assert INSTANCES["mixture"].propensities(batch) == near(expected, abs=1e-15)


def test_a_guard_rail_masks_before_the_policy_and_falls_back_to_the_safest():
    policy = GuardRail(InverseGap(constant(0.95, 0.94, 0.90), 100.0), constant(0.5, 0.1, 0.3), 0.3)
    batch = scored([True, True, True], [False, True, True], [False, True, False], [True, True, False])
    # the second action is below .3: the vector of the other two; alone it is the safest there is
    expected = [[6 / 7, 0, 1 / 7], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert policy.propensities(batch) == near(np.array(expected), abs=1e-12)
    none = GuardRail(Uniform(), constant(0.1, 0.2, 0.15), 0.3)
    assert none.propensities(scored([True, True, True], [True, False, True])).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_ucb_by_hand():
    # N(0, I/4): means 0, sd = |x| / 2; the longest vector wins
    prior = UCB(BayesianLinear.prior(2, precision=4.0), 1.0, 0.3)
    features = np.array([[[1.0, 0.0], [1.0, 1.0], [0.0, -1.2]]])
    assert prior.propensities(DecisionBatch.of(None, np.ones((1, 3), dtype=bool), features))[0].tolist() == near([0.1, 0.8, 0.1])
    # mean (.5, 0): scores .5 + a/2, .5 + a sqrt(2)/2, 0 + .6 a; alpha 0 takes the first of the two equals
    shifted = BayesianLinear(np.eye(2) * 4.0, np.array([2.0, 0.0]), 4.0)
    for alpha, best in ((0.0, 0), (1.0, 1)):
        p = UCB(shifted, alpha, 0.3).propensities(DecisionBatch.of(None, np.ones((1, 3), dtype=bool), features))
        assert p.argmax() == best
        assert shifted.predict(features)[0][0] == near([0.5, 0.5, 0.0])
    # sd, not variance: .5 + .4 x .5 beats .4 x 1.5, while .5 + .4 x .25 would lose to .4 x 2.25
    pair = DecisionBatch.of(None, np.ones((1, 2), dtype=bool), np.array([[[1.0, 0.0], [0.0, 3.0]]]))
    assert UCB(shifted, 0.4, 0.2).propensities(pair)[0].tolist() == near([0.9, 0.1])
    assert UCB(shifted, 0.6, 0.2).propensities(pair)[0].tolist() == near([0.1, 0.9])
    masked_out = DecisionBatch.of(None, np.array([[True, False, True]]), features)
    assert prior.propensities(masked_out)[0].tolist() == near([0.15, 0, 0.85])


def test_bagging_counts_first_places():
    policy = Bagging((constant(3, 2, 1), constant(0, 2, 1), constant(0, 2, 3), constant(0, 0, 0)))
    assert policy.propensities(FULL).tolist() == [[0.5, 0.25, 0.25]]
    assert policy.propensities(scored([True, False, True])).tolist() == [[0.5, 0, 0.5]]


@pytest.mark.parametrize(("a", "b"), [((3.0, 5.0), (4.0, 4.0)), ((1.0, 1.0), (1.0, 1.0)), ((30.0, 2.0), (50.0, 9.0))])
def test_thompson_is_the_probability_of_being_best(a, b):
    exact, _ = quad(lambda x: beta.pdf(x, *a) * beta.cdf(x, *b), 0, 1)
    policy = Thompson(BetaBernoulli(np.array([a[0], b[0]]), np.array([a[1], b[1]])), 20_000)
    found = policy.propensities(scored([True, True]))[0]
    assert policy.error == near(0.5 / np.sqrt(20_000), rel=1e-12)
    assert abs(found[0] - exact) < 4 * policy.error
    assert found.sum() == 1.0
    other = Thompson(policy.posterior, 20_000, seed=1).propensities(scored([True, True]))[0]
    assert other[0] != found[0], "another seed, other draws"


def test_linear_thompson_on_two_orthogonal_arms_is_a_normal_probability():
    # x1 - x2 has mean .5 and variance 2/4: P(best) = Phi(.5 / sqrt(.5)) = .760250
    posterior = BayesianLinear(np.eye(2) * 4.0, np.array([2.0, 0.0]), 4.0)
    policy = Thompson(posterior, 20_000)
    p = policy.propensities(DecisionBatch.of(None, np.ones((3, 2), dtype=bool), np.tile(np.eye(2), (3, 1, 1))))
    assert np.abs(p[:, 0] - 0.760250).max() < 4 * policy.error
    assert (p == p[0]).all(), "one fixed set of draws for every row"


BY_SCORE = [
    Greedy,
    lambda scorer: EpsilonGreedy(scorer, 0.1),
    Softmax,
    InverseGap,
    lambda scorer: Floor(Greedy(scorer)),
    lambda scorer: Mixture((Uniform(), Softmax(scorer)), (0.5, 0.5)),
    lambda scorer: Cap(Softmax(scorer), np.array([1.0])),
    lambda scorer: GuardRail(Uniform(), scorer, 0.0),
]


@pytest.mark.parametrize("make", BY_SCORE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e308])
def test_scores_that_are_no_ordinary_numbers_name_row_and_action(make, bad):
    scores = Linear(np.zeros(3), np.zeros((0, 0)), np.array([1.0]))
    features = np.zeros((4, 3, 1))
    features[2, 1] = bad
    batch = DecisionBatch(np.empty((4, 0)), features, np.ones((4, 3), dtype=bool), True)
    with pytest.raises(InputError, match=r"^row 2, action 1: found a score of (nan|inf|1e\+308); expected a finite number"):
        make(scores).propensities(batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EpsilonGreedy(constant(1), 1.1), r"found epsilon=1\.1; expected a number from 0 to 1"),
        (lambda: EpsilonGreedy(constant(1), np.nan), "epsilon=nan"),
        (lambda: Softmax(constant(1), 0.0), r"temperature=0\.0"),
        (lambda: InverseGap(constant(1), -1.0), r"gamma=-1\.0"),
        (lambda: FastCB(constant(1), -1.0), r"gamma=-1\.0"),
        (lambda: Thompson(BetaBernoulli.prior(2), 100.5), "draws=100.5; expected a whole number"),
        (lambda: GuardRail(Uniform(), constant(1), float("nan")), "low=nan"),
        (lambda: Softmax(constant(1), "hot"), "found temperature='hot'; expected a number"),
        (lambda: Thompson(BetaBernoulli.prior(2), 99), "draws=99; expected a whole number from 100 to 10000000"),
        (lambda: UCB(belief(), floor=0.0), r"floor=0\.0"),
        (lambda: UCB(belief(), alpha=-1.0), r"alpha=-1\.0"),
        (lambda: Floor(Uniform(), 1.5), r"floor=1\.5"),
        (lambda: Mixture((Uniform(), Uniform()), (0.5, 0.4)), "summing to 1"),
        (lambda: Mixture((Uniform(), Uniform()), (1.5, -0.5)), r"found weight=1\.5"),
        (lambda: Mixture((Uniform(),), (0.5, 0.5)), "for 1 policies"),
        (lambda: FastCB(constant(1.1, 0.5, 0.5)).propensities(FULL), r"row 0: found a loss of -0\.1"),
        (lambda: Cap(Uniform(), np.array([0.2])).propensities(FULL), r"row 0: found caps .* 0\.6"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{"code": 1}], dtype=object))
    return buffer.getvalue()


GREEDY = {"kind": "greedy", "scorer": {"kind": "linear", "bias": {"array": "b"}, "context_weights": 0, "action_weights": 0}}
FORMS = {
    "unknown kind": (lambda: from_form(Form({"kind": "oracle"}, {})), "policy: found kind 'oracle'; expected one of uniform"),
    "no kind": (lambda: from_form(Form({}, {})), "policy: found kind None"),
    "unknown part": (lambda: from_form(Form({"kind": "greedy", "scorer": {"kind": "os"}}, {})), r"policy\.scorer: found kind"),
    "unknown setting": (lambda: from_form(Form({"kind": "uniform", "x": 1}, {})), "policy: found setting 'x'"),
    "missing setting": (lambda: from_form(Form({"kind": "greedy"}, {})), "policy: .*scorer"),
    "missing array": (lambda: from_form(Form(GREEDY, {"c": np.ones(1)})), r"policy\.scorer\.bias: found no array 'b'; .* c"),
    "bad setting": (lambda: from_form(Form({"kind": "floor", "policy": {"kind": "uniform"}, "floor": 2.0}, {})), r"floor=2\.0"),
    "a scorer is no policy": (lambda: from_form(to_form(constant(1.0))), "policy: found kind 'linear'; expected one of uniform"),
    "a belief is no policy": (lambda: from_form(to_form(NormalMean.prior(2))), "policy: found kind 'normal_mean'"),
    "a part of another kind": (lambda: to_form(Greedy(object())), r"policy\.scorer: found a object"),
    "pickled arrays": (lambda: from_bytes(b'{"kind":"uniform"}', pickled()), "without pickles"),
    "junk arrays": (lambda: from_bytes(b'{"kind":"uniform"}', b"junk"), "without pickles"),
    "no arrays": (lambda: from_bytes(b'{"kind":"uniform"}', b""), "without pickles"),
    "junk document": (lambda: from_bytes(b"{", to_bytes(to_form(Uniform()))[1]), "hold no policy"),
    "a list": (lambda: from_bytes(b"[]", to_bytes(to_form(Uniform()))[1]), "hold no policy"),
}


@pytest.mark.parametrize(("make", "message"), FORMS.values(), ids=FORMS)
def test_forms_that_hold_no_policy_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_form_is_canonical_json_and_plain_arrays():
    document, arrays = to_bytes(to_form(Floor(Greedy(constant(1.0, 2.0)), 0.25)))
    assert document == (
        b'{"floor":0.25,"kind":"floor","policy":{"kind":"greedy","scorer":{"action_weights":{"array":"policy.policy.scorer.action_'
        b'weights"},"bias":{"array":"policy.policy.scorer.bias"},"context_weights":{"array":"policy.policy.scorer.context_weights"},'
        b'"kind":"linear","link":"identity"}}}'
    )
    with np.load(io.BytesIO(arrays), allow_pickle=False) as loaded:
        assert loaded["policy.policy.scorer.bias"].tolist() == [1.0, 2.0]
        assert len(loaded.files) == 3
    form = from_bytes(document, arrays)
    reversed_arrays = dict(reversed(list(form.arrays.items())))
    assert to_bytes(Form(form.document, reversed_arrays)) == (document, arrays), "the order of arrays is no part of a policy"
    assert b"\x21\x00" in arrays[:16], "members carry the zip format's first day, not today's"
