"""Edges: padding changes no bit, the two quantisers agree, and settings, forms and requests that cannot be are refused."""

from __future__ import annotations

import io
import math
from functools import reduce

import msgspec
import numpy as np
import pytest

from bandits import exploration
from bandits.batch import DecisionBatch
from bandits.decision_point import RewardRule, parse_decision_point
from bandits.events import Decision, canonical
from bandits.features import FeatureSchema, Number
from bandits.forms import Form, from_bytes, from_form, to_bytes, to_form
from bandits.learners import OracleGreedy
from bandits.oracles import logistic
from bandits.policy import UCB, Bagging, FastCB, InverseGap, Mixture, Softmax, Thompson, Uniform
from bandits.posteriors import BayesianLinear, BetaBernoulli, NormalMean
from bandits.sampling import TOTAL, Salt, choose, quantise, quantise_rows
from bandits.scorers import Linear
from ope import LoggedData
from ope.data import InputError

LINEAR = Linear(np.zeros(1), np.empty((0, 0)), np.linspace(-0.1, 0.1, 20))


CHANCE = Linear(LINEAR.bias, LINEAR.context_weights, LINEAR.action_weights, link="logistic")


@pytest.mark.parametrize("policy", [Softmax(LINEAR, 0.7), InverseGap(LINEAR, 50.0), FastCB(CHANCE, 5.0)], ids=lambda p: p.kind)
def test_padding_to_a_longer_set_changes_no_bit(policy: Softmax) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 13, 3000)
    features = rng.normal(size=(3000, 12, 20))
    padded = policy.propensities(DecisionBatch.of(None, np.arange(12) < sizes[:, None], features))
    for row, size in enumerate(sizes):
        own = policy.propensities(DecisionBatch.of(None, np.ones((1, size), dtype=bool), features[row : row + 1, :size]))
        assert own.tobytes() == padded[row, :size].tobytes()


def test_strides_of_weights_change_no_bit() -> None:
    big = np.random.default_rng(1).normal(size=(40, 20))
    policy = Softmax(Linear(np.zeros(5), big[::2, ::4], np.empty(0)))
    rebuilt = from_form(from_bytes(*to_bytes(to_form(policy))))
    batch = DecisionBatch.of(np.random.default_rng(2).normal(size=(500, 20)), np.ones((500, 5), dtype=bool))
    assert rebuilt.propensities(batch).tobytes() == policy.propensities(batch).tobytes()


@pytest.mark.parametrize(
    "vector", [[0.5, 0.5000005], [1 + 9e-7], [0.3, 0.7 - 9e-7], [0.2, 0.3], [0.5, 0.50001], [1.0, -1e-17], [1.1, -0.1]]
)
def test_the_two_quantisers_agree_on_what_they_take_and_on_every_share(vector: list[float]) -> None:
    def outcome(call):  # type: ignore[no-untyped-def]
        try:
            return list(call())
        except InputError:
            return "refused"

    rows = outcome(lambda: quantise_rows(np.array([vector]), np.ones((1, len(vector)), dtype=bool))[0].tolist())
    assert outcome(lambda: quantise(vector)) == rows
    assert rows == "refused" or sum(rows) == TOTAL


def test_scores_that_are_no_numbers_are_refused_by_bagging_too() -> None:
    bad = Linear(np.array([math.nan, 1.0, 2.0]), np.empty((0, 0)), np.empty(0))
    with pytest.raises(InputError, match="row 0, action 0"):
        Bagging((bad,)).propensities(DecisionBatch.of(None, np.ones((1, 3), dtype=bool)))


def test_scores_below_the_limit_are_taken_and_ineligible_ones_ignored() -> None:
    assert exploration.softmax(np.array([[9e99, 8e99]]), None, 1.0).tolist() == [[1.0, 0.0]]
    mask = np.array([[True, False, True]])
    assert exploration.greedy(np.array([[1.0, math.nan, 2.0]]), mask).tolist() == [[0.0, 0.0, 1.0]]
    with pytest.raises(InputError, match="row 0, action 1: found a score of 1e\\+308"):
        exploration.softmax(np.array([[1.0, 1e308]]), None, 1.0)


def test_a_posterior_over_other_actions_is_refused() -> None:
    batch = DecisionBatch.of(None, np.array([[True, True, True], [True, False, True]]))
    with pytest.raises(InputError, match=r"found .*3 actions.*expected 2"):
        Thompson(BetaBernoulli.prior(2)).propensities(batch)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda schema: schema.batch([], []), "at least one context"),
        (lambda schema: schema.batch([{"x": 10**400}], 2), "row 0, context feature 'x'"),
        (lambda schema: schema.batch([{"x": 1.7e308}, {"x": -1.7e308}], 2), "row 0, context feature 'x'"),
        (lambda schema: schema.batch([{"x": 1.0}], 0), "found 0 eligible actions"),
        (lambda schema: Softmax(LINEAR, math.inf), "temperature=inf"),
        (lambda schema: InverseGap(LINEAR, math.inf), "gamma=inf"),
        (lambda schema: Mixture((Uniform(),), (math.nan,)), "found weight=nan; expected a number from 0 to 1"),
        (lambda schema: exploration.with_cap(np.array([[0.5, 0.5]]), None, -0.1), "at least 0"),
        (lambda schema: exploration.with_cap(np.array([[0.5, 0.5]]), None, np.ones(3)), "or 2 of them"),
        (lambda schema: from_form(Form({"kind": [1]}, {})), "found kind"),
        (lambda schema: from_form(Form({"kind": "greedy", "scorer": 5}, {})), "expected a part with a kind"),
        (lambda schema: from_form(Form({"kind": "greedy", "scorer": {"kind": "uniform"}}, {})), "expected a part with a kind"),
        (lambda schema: exploration.falcon_gamma(10, 100, delta=0.0), "delta in"),
        (lambda schema: from_form(Form({"kind": "cap", "high": {"array": ["x"]}}, {})), "found no array"),
        (lambda schema: canonical({"x": [b"bytes"]}), r"x\[0\]: found a bytes"),
        (lambda schema: canonical({"x": "\ud800"}), "JSON does not have"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_message(call, said) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=said):
        call(FeatureSchema(context=(Number("x"),)))


def test_bytes_that_hold_no_policy() -> None:
    document, arrays = to_bytes(to_form(Softmax(LINEAR)))
    plain = io.BytesIO()
    np.save(plain, np.ones(3))
    for broken in (arrays[:-30], arrays[: len(arrays) // 2], b"", plain.getvalue()):
        with pytest.raises(InputError):
            from_bytes(document, broken)


@pytest.mark.parametrize("setting", [{"missing": math.nan}, {"scale": 1e-300}, {"scale": math.inf}, {"centre": math.inf}])
def test_numbers_of_a_schema_stay_numbers(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"x: found {next(iter(setting))}"):
        FeatureSchema(context=(Number("x", **setting),))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('[action]\ncatalogue = ["a"]', "unknown key 'action'; did you mean 'actions'?"),
        ('[[rewards]]\nname = "r"\nlow = 0\nhigh = 1\nwindow_second = 5', "did you mean 'window_seconds'?"),
        ('[[rewards]]\nname = "r\\n"\nlow = 0\nhigh = 1\nwindow_seconds = 5', "name: found 'r\\n'"),
        ('[[rewards]]\nname = "r"\nlow = 0\nhigh = 1\nwindow_seconds = inf', "window_seconds: found inf"),
    ],
)
def test_keys_are_suggested_from_where_they_may_stand(line: str, said: str) -> None:
    good = 'name = "p"\n' + ("" if "[action]" in line else '[actions]\ncatalogue = ["a"]\n')
    with pytest.raises(InputError) as caught:
        parse_decision_point(good + line, "point.toml")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": ""}, "unit: found ''"),
        ({"unit": "u" * 129}, "unit: found"),
        ({"kind": "guessed"}, "kind: found 'guessed'"),
        ({"excluded": (("b\n", "no stock"),)}, "actions: found"),
        ({"shares": b"123"}, "shares: found 3 bytes"),
    ],
)
def test_a_decision_checks_itself_however_it_is_made(change: dict[str, object], said: str) -> None:
    good: dict[str, object] = {
        "tenant": "t", "decision_point": "p", "decision_id": "d", "decided_at_ns": 1, "unit": "u", "policy": "x@y", "seed_epoch": 1,
        "actions": ("a",), "shares": TOTAL.to_bytes(4, "little"), "propensity": 1.0, "chosen": 0,
        "body": msgspec.Raw(b"{}"), "body_hash": b"", "request_hash": b"",
    }  # fmt: skip
    assert Decision(**good).propensity == 1  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        Decision(**(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Thompson, UCB])
def test_twins_in_a_padded_set_get_the_same_bits_as_alone(kind: type[Thompson] | type[UCB]) -> None:
    rng = np.random.default_rng(3)
    posterior = BayesianLinear.prior(20).update(rng.normal(size=(300, 20)), rng.normal(size=300))
    features = rng.normal(size=(60, 9, 20))
    features[:, 4] = features[:, 0]  # two actions alike: the last bit decides who wins
    policy = kind(posterior)
    padded = policy.propensities(DecisionBatch.of(None, np.tile(np.arange(9) < 5, (60, 1)), features))
    for row in range(60):
        own = policy.propensities(DecisionBatch.of(None, np.ones((1, 5), dtype=bool), features[row : row + 1, :5]))
        assert own.tobytes() == padded[row, :5].tobytes()


def test_a_policy_never_changes_with_the_arrays_it_was_made_of() -> None:
    bias = np.zeros(3)
    scorer = Linear(bias, np.empty((0, 0)), np.empty(0))
    bias[0] = 5.0
    assert scorer.bias.tolist() == [0.0, 0.0, 0.0]
    assert not scorer.bias.flags.writeable


def test_a_salt_does_not_show_its_key() -> None:
    assert "secret" not in repr(Salt(1, b"secret, and long enough"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: quantise(["a", "b"]), "found probabilities \\['a', 'b'\\]"),
        (lambda: quantise([None, 1.0]), "found probabilities \\[None, 1\\]"),
        (lambda: Salt(1, "k" * 32), "found a salt of 32 str"),
        (lambda: choose([2**30, 2**30], -1), "found u = -1"),
        (lambda: choose([2**30], 2**30), "expected u from 0"),
        (lambda: from_form(Form([1], {})), "found a list; expected a document"),
        (
            lambda: from_form(Form({"kind": "greedy", "scorer": {"kind": "linear", "bias": "abc", "context_weights": 0}}, {})),
            "policy.scorer",
        ),
        (lambda: canonical(reduce(lambda inner, _: [inner], range(5000), [])), "nested too deeply"),
        (lambda: FeatureSchema().batch([{}], True), "found a bool; expected"),
        (lambda: FeatureSchema().batch([{1: 2, "z": 3}], 2), "feature 1: not in the schema"),
        (lambda: FeatureSchema(context=(Number("x"),)).batch([{"x": 1e308}], 2), "expected a number below 1e\\+50 in size"),
        (lambda: FeatureSchema(context=(Number("x"),)).batch([{"x": np.float64(1)}], 2), "of Python's own types"),
        (lambda: FeatureSchema().batch([{}], 2, np.ones((1, 3), dtype=bool)), "eligible: found shape"),
        (lambda: FeatureSchema().batch([{}], 2, np.zeros((1, 2), dtype=bool)), "no eligible action"),
        (lambda: UCB(NormalMean.prior(2)).propensities(FeatureSchema().batch([{}], 3)), "found a batch of 3 actions; expected 2"),
    ],
)
def test_mistakes_of_callers_are_told_what_was_found(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_a_catalogue_with_exclusions_is_masked():
    batch = FeatureSchema().batch([{}, {}], 3, np.array([[True, False, True], [True, True, True]]))
    assert Uniform().propensities(batch).tolist() == [[0.5, 0.0, 0.5], [1 / 3] * 3]


def test_normal_and_beta_beliefs_about_named_actions_decide():
    """A hundred rows each of means 0, .5 and 1 with unit noise: the last is best in nearly every draw."""
    belief = NormalMean.prior(3).update(np.repeat([0, 1, 2], 100), np.repeat([0.0, 0.5, 1.0], 100))
    batch = FeatureSchema().batch([{}, {}], 3, np.array([[True] * 3, [True, True, False]]))
    vectors = Thompson(belief, 2000).propensities(batch)
    assert vectors[0, 2] == pytest.approx(0.9998, abs=0.001)  # the chance that N(.5, sd .14) exceeds 0
    assert vectors[1, 2] == 0
    assert vectors[1, 1] > 0.99
    assert UCB(belief, floor=0.03).propensities(batch).argmax(axis=1).tolist() == [2, 1]
    assert UCB(BetaBernoulli.prior(3).update([1], [1.0]), floor=0.03).propensities(batch).argmax(axis=1).tolist() == [1, 1]


@pytest.mark.parametrize("k", [100, 1000])
def test_logistic_models_of_hardly_tried_actions_are_carried_too(k):
    """Two rows an action: most models are constants or nearly certain."""
    rng = np.random.default_rng(0)
    action, context = rng.integers(0, k, 2000), rng.normal(size=(2000, 3))
    reward = (rng.random(2000) < 1 / (1 + np.exp(-context[:, 0]))).astype(float)
    data = LoggedData(action=action, reward=reward, propensity=np.full(2000, 1 / k), context=context)
    policy = OracleGreedy(logistic()).fit(data, k=k)
    assert isinstance(policy.scorer, Linear)
    batch = DecisionBatch.of(context[:50], np.ones((50, k), dtype=bool))
    assert np.array_equal(from_form(to_form(policy)).propensities(batch), policy.propensities(batch))


def test_unknown_at_maturity_leaves_a_row_out():
    rules = [RewardRule("r", 0.0, 1.0, 60.0, default=default) for default in (0.0, 0.5, "unknown")]
    assert [rule.at_maturity for rule in rules] == [0.0, 0.5, None]
