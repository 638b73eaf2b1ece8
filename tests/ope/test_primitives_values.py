"""Every primitive against a number worked out by hand, in each array library."""

from __future__ import annotations

from collections.abc import Callable
from math import e, exp, inf, log
from typing import Any

import numpy as np
import pytest

from ope.primitives import _xp, baselines, divergences, reduce, terms, weights

AsArray = Callable[..., Any]

# A log of four rows and two actions: propensities P, target propensities PI, rewards R, reward model at the logged action Q
# and averaged over the target V. The weights are .8/.5, .6/.25, .2/.5, .4/.8 = 1.6, 2.4, .4, .5.
P, PI = [0.5, 0.25, 0.5, 0.8], [0.8, 0.6, 0.2, 0.4]
R, Q, V = [1.0, 0.0, 1.0, 1.0], [0.6, 0.3, 0.7, 0.9], [0.55, 0.4, 0.5, 0.65]
W = [1.6, 2.4, 0.4, 0.5]


def equals(found: Any, expected: Any, atol: float = 1e-12) -> None:
    values = np.asarray(found)
    assert values.shape == np.shape(expected)
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=atol)


def test_importance(asarray: AsArray) -> None:
    equals(weights.importance(asarray(PI), asarray(P)), W)
    equals(weights.importance(asarray([0.0]), asarray([0.5])), [0.0])  # exactly 0, which exp of a log cannot give


def test_log_ratio(asarray: AsArray) -> None:
    logp, behavior = asarray([-1.0, -30.0, -1.0]), asarray([-1.5, -1.0, -40.0])
    equals(weights.log_ratio(logp, behavior), [0.5, -20.0, 20.0])  # .5; -29 meets the bound; 39 meets the bound
    equals(weights.log_ratio(logp, behavior, bound=0.25), [0.25, -0.25, 0.25])


def test_ratio(asarray: AsArray) -> None:
    logp, behavior = asarray([log(0.6), -0.5, -9.0]), asarray([log(0.3), -5.0, -1.0])
    equals(weights.ratio(logp, behavior, bound=1.0), [2.0, e, 1 / e])  # .6/.3; 4.5 and -8 meet the bound 1


def test_clip(asarray: AsArray) -> None:
    equals(weights.clip(asarray([0.2, 1.0, 30.0]), 0.5, 10.0), [0.5, 1.0, 10.0])
    equals(weights.clip(asarray([-1.0, 1e300])), [0.0, 1e300])  # by default a weight is at least 0 and has no ceiling


def test_switch(asarray: AsArray) -> None:
    equals(weights.switch(asarray(W), 0.5), [0.0, 0.0, 1.0, 1.0])  # the threshold itself is trusted


def test_truncate(asarray: AsArray) -> None:
    equals(weights.truncate(asarray(W), 0.5), [0.0, 0.0, 0.4, 0.5])


def test_shrink(asarray: AsArray) -> None:
    # L = 4: 4·1/(1 + 4) = .8; 4·2/(4 + 4) = 1, the peak sqrt(4)/2; 4·6/(36 + 4) = .6
    equals(weights.shrink(asarray([0.0, 1.0, 2.0, 6.0]), 4.0), [0.0, 0.8, 1.0, 0.6])


def test_saturate(asarray: AsArray) -> None:
    equals(weights.saturate(asarray([0.0, 1.0, 3.0]), 0.5), [0.0, 1.0, 1.5])  # 3/(1 - .5 + .5·3) = 3/2


def test_exp_advantage(asarray: AsArray) -> None:
    # exp(0) = 1; exp(log(4)/2) = 2; exp(10/2) = 148.4 is above 3
    equals(weights.exp_advantage(asarray([0.0, log(4), 10.0]), 2.0, high=3.0), [1.0, 2.0, 3.0])


def test_per_decision(asarray: AsArray) -> None:
    equals(weights.per_decision(asarray([[log(2), log(3), -log(6)]])), [[2.0, 6.0, 1.0]])  # 2; 2·3; 2·3/6
    equals(weights.per_decision(asarray([[30.0, -25.0]])), [[exp(20), exp(5)]])  # the sum is bounded, not each step


@pytest.mark.parametrize(("length_normalized", "exponent"), [(True, 0.1), (False, 0.3)])
def test_sequence_ratio(asarray: AsArray, length_normalized: bool, exponent: float) -> None:
    # .3 - .1 + .1 = .3 over three counted tokens: mean .1; the fourth token does not count
    log_ratios, mask = asarray([[0.3, -0.1, 0.1, 7.0]]), asarray([[True, True, True, False]])
    equals(weights.sequence_ratio(log_ratios, mask, length_normalized=length_normalized), [exp(exponent)])


def test_effective_sample_size(asarray: AsArray) -> None:
    equals(weights.effective_sample_size(asarray([3.0, 1.0])), 1.6)  # 4²/(9 + 1)
    # the tiny log: sum 4.9, squares 2.56 + 5.76 + .16 + .25 = 8.73, 24.01/8.73
    equals(weights.effective_sample_size(asarray(W)), 2.750286, atol=1e-6)


def test_dm(asarray: AsArray) -> None:
    equals(terms.dm(asarray(V)), [[0.55], [0.4], [0.5], [0.65]])


def test_ips(asarray: AsArray) -> None:
    equals(terms.ips(asarray(W), asarray(R)), [[1.6], [0.0], [0.4], [0.5]])


def test_snips(asarray: AsArray) -> None:
    equals(terms.snips(asarray(W), asarray(R)), [[1.6, 1.6], [0.0, 2.4], [0.4, 0.4], [0.5, 0.5]])


def test_control_variate(asarray: AsArray) -> None:
    # w = 3, r = 2: w, w·r = 6, w² = 9, w²·r = 18
    equals(terms.control_variate(asarray([3.0, -0.5]), asarray([2.0, 4.0])), [[3.0, 6.0, 9.0, 18.0], [-0.5, -2.0, 0.25, 1.0]])


def test_dr(asarray: AsArray) -> None:
    # .55 + 1.6·.4; .4 + 2.4·(-.3); .5 + .4·.3; .65 + .5·.1
    equals(terms.dr(asarray(W), asarray(R), asarray(Q), asarray(V)), [[1.19], [-0.32], [0.62], [0.7]])


def test_sndr(asarray: AsArray) -> None:
    found = terms.sndr(asarray(W), asarray(R), asarray(Q), asarray(V))
    equals(found, [[0.55, 0.64, 1.6], [0.4, -0.72, 2.4], [0.5, 0.12, 0.4], [0.65, 0.05, 0.5]])


def test_log_smoothing(asarray: AsArray) -> None:
    # l = .5: log(1 + .8)/.5, log(1)/.5, log(1.2)/.5, log(1.25)/.5
    equals(terms.log_smoothing(asarray(W), asarray(R), 0.5), [[2 * log(1.8)], [0.0], [2 * log(1.2)], [2 * log(1.25)]])


def test_implicit_exploration(asarray: AsArray) -> None:
    # g = .1: .8/.6 = 4/3; reward 0; .2/.6 = 1/3; .4/.9 = 4/9
    equals(terms.implicit_exploration(asarray(PI), asarray(P), asarray(R), 0.1), [[4 / 3], [0.0], [1 / 3], [4 / 9]])


@pytest.mark.parametrize(
    ("column", "value"),
    [  # means over the tiny log of each method's rows, to the six digits of the published check
        (lambda w, r, q, v: terms.ips(weights.clip(w, high=1.5), r), 0.6),  # (1.5 + 0 + .4 + .5)/4
        (lambda w, r, q, v: terms.dr(weights.truncate(w, 1.0), r, q, v), 0.5675),  # (.55 + .4 + .62 + .7)/4
        (lambda w, r, q, v: terms.dr(weights.shrink(w, 1.0), r, q, v), 0.579179),
        (lambda w, r, q, v: terms.ips(weights.saturate(w, 0.5), r), 0.617216),  # (1.6/1.3 + 0 + .4/.7 + .5/.75)/4
        (lambda w, r, q, v: terms.dr(weights.saturate(w, 0.5), r, q, v), 0.601718),
        (lambda w, r, q, v: terms.dr(w, r, q, v), 0.5475),  # (1.19 - .32 + .62 + .7)/4
        (lambda w, r, q, v: terms.log_smoothing(w, r, 0.5), 0.496626),  # (1.175573 + .364643 + .446287)/4
    ],
    ids=["cIPS(1.5)", "Switch-DR(1)", "DRos(1)", "SG-IPS(.5)", "SG-DR(.5)", "DR", "LS(.5)"],
)
def test_transformed_weights_give_the_published_estimates(asarray: AsArray, column: Callable[..., Any], value: float) -> None:
    rows = column(asarray(W), asarray(R), asarray(Q), asarray(V))
    equals(np.asarray(rows).mean(axis=0), [value], atol=5e-7)


# Labels 7, 3, 7, 3, 7 and the fourth row masked out: group 7 holds rewards 1, 0, 2; group 3 holds 5 alone.
GROUPED = ([1.0, 5.0, 0.0, 9.0, 2.0], [7, 3, 7, 3, 7], [True, True, True, False, True])


def test_group_center(asarray: AsArray) -> None:
    equals(baselines.group_center(*map(asarray, GROUPED)), [0.0, 0.0, -1.0, 0.0, 1.0])  # minus the mean 1; alone: 5 - 5


def test_leave_one_out(asarray: AsArray) -> None:
    # 1 - (0 + 2)/2; alone: 0; 0 - (1 + 2)/2; masked: 0; 2 - (1 + 0)/2
    equals(baselines.leave_one_out(*map(asarray, GROUPED)), [0.0, 0.0, -1.5, 0.0, 1.5])


def test_one_success_in_a_group_of_four(asarray: AsArray) -> None:
    group = asarray([1.0, 0.0, 0.0, 0.0]), asarray([0, 0, 0, 0]), asarray([True] * 4)
    equals(baselines.group_center(*group), [0.75, -0.25, -0.25, -0.25])
    equals(baselines.leave_one_out(*group), [1.0, -1 / 3, -1 / 3, -1 / 3])


def test_optimal_control_variate(asarray: AsArray) -> None:
    # w = (1, 3), r = (1, 0): means 2, .5, 5, .5, so cov = .5 - 2·.5 = -.5 and var = 5 - 4 = 1.
    # The tiny log: (.7425 - 1.225·.625)/(2.1825 - 1.225²) = -.023125/.681875 = -.0339138.
    found = baselines.optimal_control_variate(*map(asarray, ([2.0, 1.225], [0.5, 0.625], [5.0, 2.1825], [0.5, 0.7425])))
    equals(found, [-0.5, -0.0339138], atol=1e-7)


@pytest.mark.parametrize(
    ("estimator", "values"),
    [  # d = logp - logp_ref = .1, -.5: d; d²/2; exp(-d) - 1 + d
        (divergences.k1, [0.1, -0.5]),
        (divergences.k2, [0.005, 0.125]),
        (divergences.k3, [0.00483742, 0.14872127]),
    ],
)
def test_k1_k2_k3(asarray: AsArray, estimator: Callable[..., Any], values: list[float]) -> None:
    equals(estimator(asarray([-1.0, -2.0]), asarray([-1.1, -1.5])), values, atol=5e-9)


def test_kl(asarray: AsArray) -> None:
    p, q = asarray([[0.5, 0.5], [1.0, 0.0]]), asarray([[0.25, 0.75], [0.25, 0.75]])
    equals(divergences.kl(p, q), [0.5 * log(4 / 3), log(4)])  # .5 log(2) + .5 log(2/3); 1·log(1/.25) + 0
    equals(divergences.kl(asarray([0.5, 0.5]), asarray([1.0, 0.0])), inf)


def test_entropy(asarray: AsArray) -> None:
    equals(divergences.entropy(asarray([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])), [1.5 * log(2), 0.0])  # .5·log 2 + 2·.25·log 4


def test_total_variation(asarray: AsArray) -> None:
    p, q = asarray([[0.5, 0.5], [1.0, 0.0]]), asarray([[0.25, 0.75], [0.0, 1.0]])
    equals(divergences.total_variation(p, q), [0.25, 1.0])  # (.25 + .25)/2; (1 + 1)/2


def test_masked_sum(asarray: AsArray) -> None:
    values, mask = asarray([[1.0, 2.0], [3.0, 4.0]]), asarray([[True, False], [True, True]])
    equals(reduce.masked_sum(values, mask), 8.0)
    equals(reduce.masked_sum(values, mask, axis=0), [4.0, 4.0])
    equals(reduce.masked_sum(values, mask, axis=-1), [1.0, 7.0])


@pytest.mark.parametrize(("scope", "num", "den", "mean"), [("token", 2.0, 10.0, 0.2), ("sequence", 1.0, 2.0, 0.5)])
def test_reduce_terms_and_divide(asarray: AsArray, scope: Any, num: float, den: float, mean: float) -> None:
    # two sequences of lengths 2 and 8, ones on the first and zeros on the second: 2/10 of the tokens, 1/2 of the sequences
    values = asarray([[1.0] * 2 + [5.0] * 6, [0.0] * 8])
    mask = asarray([[True] * 2 + [False] * 6, [True] * 8])
    found = reduce.reduce_terms(values, mask, scope=scope)
    equals(found.num, num)
    equals(found.den, den)
    equals(reduce.divide(found), mean)


def test_stop_gradient_and_as_float32_keep_the_values(asarray: AsArray) -> None:
    equals(_xp.stop_gradient(asarray(W)), W)
    equals(_xp.as_float32(asarray(W)), W)
