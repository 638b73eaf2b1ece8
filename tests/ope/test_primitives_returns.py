"""Returns and surrogates: numbers by hand, and the laws that tie them to each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ope.primitives import baselines, reduce, returns, surrogates, weights

AsArray = Callable[..., Any]
NO = [[False, False, False]]
LAST = [[False, False, True]]
steps = arrays(np.float64, (3, 5), elements=st.floats(-9, 9))
flags = arrays(np.bool_, (3, 5))


def equals(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12, atol=1e-12)


def test_discounted_returns_by_hand(asarray: AsArray) -> None:
    reward = asarray([[1.0, 2.0, 4.0]])
    equals(returns.discounted(reward, asarray(NO), 0.5), [[3.0, 4.0, 4.0]])  # 1 + 2/2 + 4/4; 2 + 4/2; 4
    equals(returns.discounted(reward, asarray([[False, True, False]]), 0.5), [[2.0, 2.0, 4.0]])


def test_gae_by_hand(asarray: AsArray) -> None:
    # δ with discount 1: 1 + 2 - 1 = 2; 0 + 3 - 2 = 1; 5 - 3 = 2, where it terminated; λ = 1/2: 2 + 1/2 + 2/4, 1 + 2/2, 2
    given_ = [asarray(one) for one in ([[1.0, 0.0, 5.0]], [[1.0, 2.0, 3.0]], [[2.0, 3.0, 9.0]], LAST, NO)]
    equals(returns.gae(*given_, discount=1.0, lambda_=0.5), [[3.0, 2.0, 2.0]])


def test_a_cut_trajectory_counts_the_next_value_and_not_the_next_row(asarray: AsArray) -> None:
    given_ = [asarray(one) for one in ([[1.0, 7.0]], [[0.5, 0.0]], [[2.0, 0.0]], [[False, True]], [[True, False]])]
    equals(returns.gae(*given_, discount=0.5, lambda_=1.0), [[1.5, 7.0]])  # 1 + 2/2 - 1/2, and 7


@given(steps, steps, flags)
def test_gae_of_lambda_one_is_the_return_less_the_value(reward: Any, value: Any, terminated: Any) -> None:
    following = np.concatenate((value[:, 1:], np.zeros((3, 1))), axis=1)
    found = returns.gae(reward, value, following, terminated, np.zeros_like(terminated), 0.9, 1.0)
    np.testing.assert_allclose(found, returns.discounted(reward, terminated, 0.9) - value, rtol=0, atol=1e-9)


@given(steps, steps, steps, flags, flags)
def test_on_policy_vtrace_is_the_lambda_return_of_lambda_one(r: Any, v: Any, after: Any, terminated: Any, truncated: Any) -> None:
    one = np.ones_like(r)
    found = returns.vtrace(one, r, v, after, terminated, truncated, 0.9)
    np.testing.assert_allclose(found, v + returns.gae(r, v, after, terminated, truncated, 0.9, 1.0), rtol=0, atol=1e-9)


@given(steps, steps, steps, flags, flags)
def test_retrace_without_traces_is_one_step(r: Any, q: Any, after: Any, terminated: Any, truncated: Any) -> None:
    found = returns.retrace(np.zeros_like(r), r, q, after, terminated, truncated, 0.9)
    np.testing.assert_allclose(found, q + returns.temporal_difference(r, q, after, terminated, 0.9), rtol=0, atol=1e-9)


def test_vtrace_and_retrace_by_hand(asarray: AsArray) -> None:
    zero, ratio, reward = asarray([[0.0, 0.0]]), asarray([[3.0, 0.5]]), asarray([[1.0, 4.0]])
    terminated, truncated = asarray([[False, True]]), asarray([[False, False]])
    # vtrace: the first δ weighs min(3, 1) = 1, the second 0.5; traces 1: 1 + 2, 2. retrace: the first trace is the *next* ratio
    equals(returns.vtrace(ratio, reward, zero, zero, terminated, truncated, 1.0), [[3.0, 2.0]])
    equals(returns.retrace(ratio, reward, zero, zero, terminated, truncated, 1.0), [[3.0, 4.0]])


def test_clipped_by_hand(asarray: AsArray) -> None:
    ratio, advantage = asarray([0.5, 1.5, 0.5, 1.5, 4.0]), asarray([1.0, 1.0, -1.0, -1.0, -1.0])
    equals(surrogates.clipped(ratio, advantage, 0.8, 1.2), [0.5, 1.2, -0.8, -1.5, -4.0])
    equals(surrogates.dual_clipped(ratio, advantage, 0.8, 1.2, 3.0), [0.5, 1.2, -0.8, -1.5, -3.0])


@given(arrays(np.float64, 6, elements=st.floats(0, 9)), arrays(np.float64, 6, elements=st.floats(-9, 9)))
def test_clipped_is_pessimistic(ratio: Any, advantage: Any) -> None:
    assert (surrogates.clipped(ratio, advantage, 0.8, 1.2) <= ratio * advantage).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 2.9, 3.1])
def test_the_gradient_of_clipped_is_gated_as_the_one_sided_gate_says(ratio: float, advantage: float) -> None:
    rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([advantage], dtype=torch.float64)
    (slope,) = torch.autograd.grad(surrogates.clipped(rho, a, 0.8, 1.2).sum(), rho)
    assert slope.item() == advantage * surrogates.OneSided(0.2, 0.2).keep(rho, a).item()
    (dual,) = torch.autograd.grad(surrogates.dual_clipped(rho, a, 0.8, 1.2, 3.0).sum(), rho)
    assert dual.item() == (0.0 if advantage < 0 and ratio > 3 else slope.item())


def test_gates_keep_what_the_table_says(asarray: AsArray) -> None:
    # group_relative_reinforce's table, inner bounds .2, outer .6 and 2: columns ρ = .3, .5, 1, 1.5, 3.5; rows A > 0, A < 0
    table = {
        surrogates.OneSided(): ([1, 1, 1, 0, 0], [0, 0, 1, 1, 1]),
        surrogates.TwoSided(): ([0, 0, 1, 0, 0], [0, 0, 1, 0, 0]),
        surrogates.Ring(): ([1, 0, 1, 0, 0], [0, 0, 1, 0, 1]),
    }
    ratio = asarray([0.3, 0.5, 1.0, 1.5, 3.5])
    for gate, (up, down) in table.items():
        assert np.asarray(gate.keep(ratio, asarray([1.0] * 5))).tolist() == [bool(one) for one in up]
        assert np.asarray(gate.keep(ratio, asarray([-1.0] * 5))).tolist() == [bool(one) for one in down]


def test_two_sequences_of_lengths_two_and_eight(asarray: AsArray) -> None:
    values = asarray([[1.0] * 8, [0.0] * 8])
    mask = asarray([[True] * 2 + [False] * 6, [True] * 8])
    scopes: dict[float, Any] = {
        0.2: partial(reduce.reduce_terms, scope="token"),
        0.5: partial(reduce.reduce_terms, scope="sequence"),
        1.0: partial(reduce.reduce_terms, scope="sequence_sum"),
        0.1: partial(reduce.reduce_terms, scope="sequence_sum", length=10.0),
    }
    for expected, terms in scopes.items():
        equals(reduce.divide(terms(values, mask)), expected)


def test_group_statistics_by_hand(asarray: AsArray) -> None:
    reward, group, mask = asarray([1.0, 0.0, 0.0, 0.0]), asarray([7, 7, 7, 7]), asarray([True] * 4)
    equals(baselines.group_std(reward, group, mask, unbiased=True), [0.5] * 4)
    equals(baselines.group_std(reward, group, mask, unbiased=False), [0.4330127018922193] * 4)  # sqrt(3)/4
    centred = baselines.weighted_group_center(reward, asarray([2.0, 1.0, 1.0, 0.0]), group, mask)
    equals(centred, [0.5, -0.5, -0.5, -0.5])  # 2·1/4
    equals(baselines.group_soft_value(reward, group, mask, 1.0), [log((exp(1) + 3) / 4)] * 4)
    alone = asarray([True, False, False, False])
    equals(baselines.group_std(reward, group, alone, unbiased=True), [0.0] * 4)
    equals(baselines.group_soft_value(reward, group, alone, 1.0), [1.0, 0.0, 0.0, 0.0])


def test_soft_values_of_far_groups_do_not_meet(asarray: AsArray) -> None:
    reward, group = asarray([0.0, 0.0, 5000.0, 5000.0]), asarray([1, 1, 2, 2])
    equals(baselines.group_soft_value(reward, group, asarray([True] * 4), 1.0), [0.0, 0.0, 5000.0, 5000.0])


def test_mask_outside_by_hand(asarray: AsArray) -> None:
    equals(weights.mask_outside(asarray([0.4, 0.5, 5.0, 5.1]), 0.5, 5.0), [0.0, 0.5, 5.0, 0.0])
