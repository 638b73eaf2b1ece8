"""From scores to propensities: numbers worked on paper, limits, masks, floors, caps, and scores that are no numbers."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from bandits.exploration import (
    epsilon_greedy,
    falcon_gamma,
    fast_cb,
    greedy,
    inverse_gap,
    softmax,
    uniform,
    winning_share,
    with_cap,
    with_floor,
)
from bandits.sampling import Salt, choose_rows, quantise_rows
from ope.data import InputError

SCORES = np.array([[0.95, 0.94, 0.90]])
ALL = np.ones((1, 3), dtype=bool)
WITHOUT_2 = np.array([[True, False, True]])
RULES = {
    "greedy": lambda scores, mask: greedy(scores, mask),
    "epsilon-greedy": lambda scores, mask: epsilon_greedy(scores, mask, 0.1),
    "softmax": lambda scores, mask: softmax(scores, mask, 0.3),
    "inverse gap": lambda scores, mask: inverse_gap(scores, mask, 12.0),
    "inverse gap, gamma 0": lambda scores, mask: inverse_gap(scores, mask, 0.0),
    "FastCB": lambda scores, mask: fast_cb(1 - scores, mask, 12.0),
    "FastCB, gamma 0": lambda scores, mask: fast_cb(1 - scores, mask, 0.0),
    "floor": lambda scores, mask: with_floor(greedy(scores, mask), mask, 0.2),
    "cap": lambda scores, mask: with_cap(softmax(scores, mask, 0.05), mask, 1.0),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
near = pytest.approx


def masked_scores(seed: int, n: int = 40, k: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    eligible = rng.uniform(size=(n, k)) < 0.6
    eligible[np.arange(n), rng.integers(k, size=n)] = True
    return np.round(rng.uniform(size=(n, k)), int(rng.integers(1, 4))), eligible  # rounding makes ties


@pytest.mark.parametrize("mask", [None, ALL], ids=["no mask", "full mask"])
def test_inverse_gap_weighting_of_the_pages(mask):
    assert inverse_gap(SCORES, mask, 100.0)[0].tolist() == near([0.625, 0.25, 0.125], abs=1e-12)
    assert inverse_gap(SCORES, mask, 0.0)[0].tolist() == near([1 / 3] * 3, abs=1e-15)
    assert inverse_gap(SCORES, mask, 1e9)[0].tolist() == near([1, 0, 0], abs=1e-6)
    assert inverse_gap(np.array([[0.9, 0.8, 0.5]]), mask, 10.0)[0].tolist() == near([17 / 28, 1 / 4, 1 / 7], abs=1e-12)


def test_masked_actions_do_not_count_among_the_eligible():
    # two are eligible: 1 - 1/(2 + 100 x .05), and 1/(2 + 100 x .05)
    p = inverse_gap(SCORES, WITHOUT_2, 100.0)[0]
    assert p.tolist() == near([6 / 7, 0, 1 / 7], abs=1e-12)
    assert p[1] == 0.0
    assert inverse_gap(SCORES, np.array([[False, True, False]]), 100.0).tolist() == [[0.0, 1.0, 0.0]]
    renormalised = np.array([0.625, 0.125]) / 0.75
    assert renormalised.tolist() == near([5 / 6, 1 / 6]), "masking afterwards is another rule, .833 and .167"


@given(seed=st.integers(0, 2**32), gamma=st.floats(0, 1e6))
def test_the_best_action_has_the_largest_share_whatever_gamma(seed, gamma):
    scores, eligible = masked_scores(seed)
    p = inverse_gap(scores, eligible, gamma)
    best = np.where(eligible, scores, -np.inf).argmax(axis=1)
    assert (p[np.arange(len(p)), best] >= p.max(axis=1) - 1e-15).all()


def test_one_of_the_equals_gets_the_rest():
    scores = np.array([[0.3, 0.9, 0.9, 0.9]])
    p = inverse_gap(scores, None, 10.0)[0]
    # 1/(4 + 10 x .6) below, 1/4 at zero gap, and what is left to the first of the best
    assert p.tolist() == near([0.1, 0.4, 0.25, 0.25], abs=1e-15)
    assert greedy(scores, None).tolist() == [[0, 1, 0, 0]]
    assert greedy(scores, np.array([[True, False, True, True]])).tolist() == [[0, 0, 1, 0]]
    assert greedy(np.zeros((1, 3)), None).tolist() == [[1, 0, 0]]
    p = fast_cb(1 - scores, None, 10.0)[0]
    assert p[2:].tolist() == near([0.25, 0.25], abs=1e-15)
    assert p[0] == near(0.1 / (0.4 + 6), abs=1e-15)


def test_fast_cb_of_the_page_explores_less_than_inverse_gap():
    losses = np.array([[0.05, 0.06]])
    assert fast_cb(losses, None, 10.0)[0].tolist() == near([0.75, 0.25], abs=1e-12)
    assert inverse_gap(-losses, None, 10.0)[0, 1] == near(1 / 2.1, abs=1e-12)
    # K counts the eligible: the third action changes nothing
    three = np.array([[0.05, 0.06, 0.01]])
    assert fast_cb(three, np.array([[True, True, False]]), 10.0)[0].tolist() == near([0.75, 0.25, 0], abs=1e-12)
    assert fast_cb(three, np.array([[True, True, False]]), 0.0)[0].tolist() == near([0.5, 0.5, 0], abs=1e-12)


def test_fast_cb_with_a_best_loss_of_0_is_greedy_but_for_equals():
    assert fast_cb(np.array([[0.2, 0.0, 0.3]]), None, 10.0).tolist() == [[0, 1, 0]]
    assert fast_cb(np.array([[0.0, 0.0, 0.3]]), None, 10.0)[0].tolist() == near([2 / 3, 1 / 3, 0], abs=1e-15)
    with pytest.raises(InputError, match=r"row 1: found a loss of -0\.5; expected losses of at least 0"):
        fast_cb(np.array([[0.1, 0.2], [-0.5, 0.2]]), None, 10.0)


def test_the_falcon_schedule_by_hand():
    # c sqrt(K n / log(|F| n / delta)): K = 12, n = 20,000, |F| = e, delta = .05: log(e 20,000 / .05) = 13.8992
    assert falcon_gamma(12, 20_000) == near(math.sqrt(240_000 / 13.89921982), rel=1e-9)
    assert falcon_gamma(12, 20_000, c=2.0) == near(2 * falcon_gamma(12, 20_000), rel=1e-15)
    assert falcon_gamma(4, 1, class_size=0.05 * math.e, delta=0.05) == near(2.0, rel=1e-15)
    assert falcon_gamma(3, 1000, class_size=math.exp(10), delta=0.1) == near(math.sqrt(3000 / (10 + math.log(10_000))), rel=1e-15)
    for k, rows in ((0, 1), (1, 0), (3, -5)):
        with pytest.raises(InputError, match=f"k={k}, rows={rows}"):
            falcon_gamma(k, rows)


def test_epsilon_greedy_by_hand():
    assert epsilon_greedy(SCORES, None, 0.06)[0].tolist() == near([0.96, 0.02, 0.02], abs=1e-15)
    assert epsilon_greedy(SCORES, WITHOUT_2, 0.06)[0].tolist() == near([0.97, 0, 0.03], abs=1e-15)
    assert epsilon_greedy(SCORES, None, 0.0).tolist() == [[1, 0, 0]]
    assert epsilon_greedy(SCORES, None, 1.0)[0].tolist() == near([1 / 3] * 3, abs=1e-15)


def test_softmax_by_hand_and_at_its_limits():
    odds = np.exp(np.array([0.05, 0.04, 0.0]) / 0.02)
    assert softmax(SCORES, None, 0.02)[0].tolist() == near(list(odds / odds.sum()), rel=1e-12)
    assert softmax(SCORES, WITHOUT_2, 0.02)[0].tolist() == near([odds[0] / (odds[0] + 1), 0, 1 / (odds[0] + 1)], rel=1e-12)
    assert softmax(SCORES, ALL, 1e9)[0].tolist() == near([1 / 3] * 3, abs=1e-9)
    assert softmax(SCORES, WITHOUT_2, 1e-12).tolist() == [[1, 0, 0]]
    assert softmax(np.array([[2.0, 2.0, 1.0]]), None, 1e-12).tolist() == [[0.5, 0.5, 0]], "equals stay equal when cold"
    far = softmax(np.array([[1e99, 0.0, -1e99]]), None, 1e-12)
    assert far.tolist() == [[1, 0, 0]]
    assert softmax(SCORES + 1e3, None, 0.02)[0].tolist() == near(list(odds / odds.sum()), rel=1e-9), "only differences count"


def test_uniform_counts_the_eligible():
    eligible = np.array([[True, True, False, True], [False, False, True, False]])
    assert uniform(eligible).tolist() == [[1 / 3, 1 / 3, 0, 1 / 3], [0, 0, 1, 0]]


def test_a_floor_bounds_the_weights_of_the_page():
    greedy4 = np.array([[1.0, 0, 0, 0]])
    p = with_floor(greedy4, None, 0.02)
    assert p[0].tolist() == near([0.985, 0.005, 0.005, 0.005], abs=1e-15)
    weights = 0.25 / p[0]
    assert weights.max() == near(50.0, rel=1e-12), "1 / phi for the uniform target"
    assert (p[0] * weights).sum() == near(1.0, rel=1e-12), "E[w] stays 1"
    mask = np.array([[True, True, False, False]])
    assert with_floor(greedy4, mask, 0.02)[0].tolist() == near([0.99, 0.01, 0, 0], abs=1e-15)
    assert with_floor(greedy4, mask, 1.0)[0].tolist() == near([0.5, 0.5, 0, 0], abs=1e-15)
    assert with_floor(greedy4, mask, 0.0).tolist() == greedy4.tolist()


@given(seed=st.integers(0, 2**32), floor=st.floats(0, 1))
def test_every_eligible_action_keeps_its_floor(seed, floor):
    scores, eligible = masked_scores(seed)
    p = with_floor(softmax(scores, eligible, 0.01), eligible, floor)
    least = floor / eligible.sum(axis=1, keepdims=True)
    assert (p >= np.where(eligible, least * (1 - 1e-12), 0)).all()
    assert np.abs(p.sum(axis=1) - 1).max() < 1e-12
    assert (p[~eligible] == 0).all()


@pytest.mark.parametrize(
    ("vector", "high", "expected"),
    [
        ([0.7, 0.2, 0.1], 0.6, [0.6, 0.2 * 4 / 3, 0.1 * 4 / 3]),
        # the .2 over goes 3:2 to the others, which lifts the second over its own .35; the third takes the rest
        ([0.7, 0.18, 0.12], [0.5, 0.29, 1.0], [0.5, 0.29, 0.21]),
        ([1.0, 0.0, 0.0], 0.5, [0.5, 0.25, 0.25]),
        ([1.0, 0.0, 0.0], [0.5, 0.1, 1.0], [0.5, 0.1, 0.4]),
        ([0.5, 0.5, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]),
        ([0.2, 0.3, 0.5], 1 / 3, [1 / 3, 1 / 3, 1 / 3]),
        ([0.2, 0.3, 0.5], 0.5, [0.2, 0.3, 0.5]),
    ],
)
def test_caps_by_hand(vector, high, expected):
    found = with_cap(np.array([vector]), None, np.array(high))[0]
    assert found.tolist() == near(expected, abs=1e-12)
    masked = with_cap(np.array([[*vector, 0.0]]), np.array([[True] * 3 + [False]]), np.append(np.broadcast_to(high, 3), 1.0))
    assert masked[0].tolist() == near([*expected, 0.0], abs=1e-12), "an ineligible action takes nothing, whatever its cap"


@given(seed=st.integers(0, 2**32), spare=st.floats(0.0, 2.0))
def test_caps_hold_and_keep_the_mass(seed, spare):
    scores, eligible = masked_scores(seed, n=20)
    vectors = softmax(scores, eligible, 0.05)
    least = 1 / eligible.sum(axis=1).min()
    high = np.random.default_rng(seed).uniform(least, least * (1 + spare) + 1e-6, size=7)
    capped = with_cap(vectors, eligible, high)
    assert np.abs(capped.sum(axis=1) - 1).max() < 1e-12
    assert (capped <= high + 1e-12).all()
    assert (capped[~eligible] == 0).all()
    assert (capped >= 0).all()
    within = (vectors <= high).all(axis=1)
    assert (capped[within] == vectors[within]).all(), "rows within their caps keep their bits"
    uncapped = capped < high - 1e-9
    assert (capped[uncapped] >= vectors[uncapped] - 1e-12).all(), "nobody below the cap pays for others"


def test_caps_that_cannot_hold_a_distribution_name_the_row():
    vectors, mask = np.array([[0.5, 0.5, 0], [0.5, 0.5, 0]]), np.array([[True, True, True], [True, True, False]])
    with pytest.raises(InputError, match=r"^row 1: found caps of the eligible actions that sum to 0\.8; expected at least 1"):
        with_cap(vectors, mask, 0.4)


def test_winning_shares_by_hand():
    samples = np.array([[[3.0, 2, 1], [0, 1, 9]], [[1, 2, 3], [5, 5, 9]], [[9, 9, 8], [1, 0, 9]], [[0, 1, 2], [0, 1, 9]]])
    assert winning_share(samples, None).tolist() == [[0.5, 0, 0.5], [0, 0, 1]], "the first of equals wins"
    mask = np.array([[True, True, True], [True, True, False]])
    assert winning_share(samples, mask).tolist() == [[0.5, 0, 0.5], [0.5, 0.5, 0]]


@each_rule
@given(seed=st.integers(0, 2**32))
def test_every_rule_gives_distributions_over_the_eligible(rule, seed):
    scores, eligible = masked_scores(seed)
    kept = scores.copy()
    p = rule(scores, eligible)
    assert np.abs(p.sum(axis=1) - 1).max() < 1e-12
    assert (p >= 0).all()
    assert (p[~eligible] == 0).all()
    single = eligible.sum(axis=1) == 1
    assert (p[single][eligible[single]] == 1).all(), "one eligible action has probability 1"
    assert (scores == kept).all()


@each_rule
@given(seed=st.integers(0, 2**32))
def test_no_mask_and_a_full_mask_are_equal_to_the_bit(rule, seed):
    scores, eligible = masked_scores(seed)
    assert rule(scores, None).tobytes() == rule(scores, np.ones_like(eligible)).tobytes()


SCORED = {name: rule for name, rule in RULES.items() if "FastCB" not in name}


@pytest.mark.parametrize("rule", SCORED.values(), ids=SCORED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e308, -1e308])
def test_scores_that_are_no_ordinary_numbers_name_row_and_action(rule, bad):
    scores = np.tile(SCORES, (4, 1))
    scores[2, 1] = bad
    for mask in (None, np.tile(ALL, (4, 1))):
        with pytest.raises(InputError, match=rf"^row 2, action 1: found a score of {re.escape(str(bad))}; expected a finite"):
            rule(scores, mask)


def test_ten_thousand_actions_are_valid():
    scores = np.random.default_rng(0).uniform(size=(2, 10_000))
    for name, rule in RULES.items():
        p = rule(scores, None)
        assert np.abs(p.sum(axis=1) - 1).max() < 1e-12, name
        assert (p >= 0).all(), name


def chosen(vectors: np.ndarray, epoch: int) -> np.ndarray:
    salt = Salt(epoch, bytes([epoch]) * 16)
    u = np.array([salt.uniform("t", f"d{i}") for i in range(len(vectors))])
    return choose_rows(quantise_rows(vectors, vectors > 0), u)


def test_weights_of_a_uniform_slice_average_to_one():
    scores, eligible = masked_scores(5, n=100_000)
    logged = with_floor(inverse_gap(scores, eligible, 490.0), eligible, 0.05)
    action = chosen(logged, 1)
    weight = 1 / (eligible.sum(axis=1) * logged[np.arange(len(action)), action])
    assert weight.max() <= 1 / 0.05 + 1e-9
    assert abs(weight.mean() - 1) < 4 * weight.std() / math.sqrt(len(weight))


def test_counts_of_actions_are_the_sums_of_their_propensities():
    scores, eligible = masked_scores(6, n=100_000)
    logged = inverse_gap(scores + np.linspace(0, 0.3, 7), eligible, 20.0)
    counts, expected = np.bincount(chosen(logged, 2), minlength=7), logged.sum(axis=0)
    assert expected.sum() == near(100_000, abs=1e-6)
    assert chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue > 1e-3
    assert chisquare(counts, np.roll(expected, 1)).pvalue < 1e-9, "the test would see the vectors of other actions"
