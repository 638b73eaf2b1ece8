"""Edges: nothing counted, one row alone, what is masked out, half precision, bounds, and inputs that are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import exp, inf, nan
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch

from ope.primitives import _xp, baselines, divergences, reduce, surrogates, terms, weights

AsArray = Callable[..., Any]
SCOPES = ["token", "sequence"]
GROUP_BASELINES = [baselines.group_center, baselines.leave_one_out]
sequence_sum = partial(weights.sequence_ratio, length_normalized=False)
sequence_mean = partial(weights.sequence_ratio, length_normalized=True)


def equals(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-14, atol=1e-14, strict=False)


# Nothing counted


@pytest.mark.parametrize("junk", [1.0, nan, inf])
def test_an_empty_mask_sums_to_zero_and_divides_to_zero(asarray: AsArray, junk: float) -> None:
    values, mask = asarray([[junk] * 3] * 2), asarray([[False] * 3] * 2)
    equals(reduce.masked_sum(values, mask), 0.0)
    equals(reduce.masked_sum(values, mask, axis=0), [0.0, 0.0, 0.0])
    for scope in SCOPES:
        found = reduce.reduce_terms(values, mask, scope=scope)
        equals(found.num, 0.0)
        equals(found.den, 0.0)
        equals(reduce.divide(found), 0.0)


def test_an_empty_mask_gives_ratio_one_and_no_advantage(asarray: AsArray) -> None:
    mask = asarray([[False, False]])
    for sequence in (sequence_sum, sequence_mean):
        equals(sequence(asarray([[3.0, nan]]), mask), [1.0])
    for baseline in GROUP_BASELINES:
        equals(baseline(asarray([3.0, nan]), asarray([0, 0]), mask[0, :]), [0.0, 0.0])


def test_a_sequence_without_tokens_does_not_count_as_a_sequence(asarray: AsArray) -> None:
    values, mask = asarray([[4.0, 2.0], [9.0, 9.0]]), asarray([[True, True], [False, False]])
    found = reduce.reduce_terms(values, mask, scope="sequence")
    equals(found.num, 3.0)
    equals(found.den, 1.0)


def test_an_empty_mask_sends_back_zero_gradients() -> None:
    values, mask = torch.tensor([[1.0, nan]], requires_grad=True), torch.tensor([[False, False]])
    for scope in SCOPES:
        (found,) = torch.autograd.grad(reduce.divide(reduce.reduce_terms(values, mask, scope=scope)), values)
        assert found.tolist() == [[0.0, 0.0]]
    for sequence in (sequence_sum, sequence_mean):
        assert torch.autograd.grad(sequence(values, mask).sum(), values)[0].tolist() == [[0.0, 0.0]]


def test_zero_weights_have_no_effective_rows_and_finite_gradients() -> None:
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    found = weights.effective_sample_size(w)
    assert found == 0
    assert torch.autograd.grad(found, w)[0].tolist() == [0.0, 0.0, 0.0]


# One row alone


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_a_row_alone_in_its_group_has_no_advantage(asarray: AsArray, baseline: Callable[..., Any]) -> None:
    equals(baseline(asarray([7.0]), asarray([2]), asarray([True])), [0.0])
    # two groups of one each once the third row is masked out
    equals(baseline(asarray([7.0, 3.0, 5.0]), asarray([2, 4, 4]), asarray([True, True, False])), [0.0, 0.0, 0.0])


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_a_group_of_equal_rewards_has_no_advantage(asarray: AsArray, baseline: Callable[..., Any]) -> None:
    equals(baseline(asarray([0.5] * 4), asarray([1] * 4), asarray([True] * 4)), [0.0] * 4)


# What is masked out may be anything


@pytest.mark.parametrize("junk", [nan, inf, -inf])
def test_masked_rewards_do_not_leak(asarray: AsArray, junk: float) -> None:
    reward, group, mask = asarray([1.0, junk, 3.0]), asarray([0, 0, 0]), asarray([True, False, True])
    equals(baselines.group_center(reward, group, mask), [-1.0, 0.0, 1.0])  # the mean of 1 and 3 is 2
    equals(baselines.leave_one_out(reward, group, mask), [-2.0, 0.0, 2.0])  # 1 - 3, 3 - 1


@pytest.mark.parametrize("junk", [nan, inf, -inf])
def test_masked_tokens_do_not_leak(asarray: AsArray, junk: float) -> None:
    values, mask = asarray([[1.0, junk, 3.0]]), asarray([[True, False, True]])
    equals(reduce.masked_sum(values, mask), 4.0)
    for scope in SCOPES:
        equals(reduce.divide(reduce.reduce_terms(values, mask, scope=scope)), 2.0)
    equals(sequence_sum(values, mask), [exp(4)])
    equals(sequence_mean(values, mask), [exp(2)])


@pytest.mark.parametrize("junk", [nan, inf, -inf])
@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_masked_rewards_leave_gradients_finite(baseline: Callable[..., Any], junk: float) -> None:
    reward = torch.tensor([1.0, junk, 3.0], dtype=torch.float64, requires_grad=True)
    found = baseline(reward, torch.tensor([0, 0, 0]), torch.tensor([True, False, True])).square().sum()
    # centred: 2·((r0 - r2)/2)², slope 2(r0 - r2)/2 = -2; leave-one-out: 2·(r0 - r2)², slope 4(r0 - r2) = -8
    slope = 2.0 if baseline is baselines.group_center else 8.0
    assert torch.autograd.grad(found, reward)[0].tolist() == [-slope, 0.0, slope]


@pytest.mark.parametrize("junk", [nan, inf, -inf])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("each", [weights.log_ratio, weights.ratio, divergences.k1, divergences.k2, divergences.k3])
def test_masked_log_probabilities_leave_gradients_finite(each: Callable[..., Any], scope: Any, junk: float) -> None:
    mask = torch.tensor([[True, False]])
    slopes = []
    for padding in (junk, -2.0):
        logp = torch.tensor([[-1.0, padding]], dtype=torch.float64, requires_grad=True)
        logp_behavior = torch.tensor([[-1.5, junk if padding is junk else -1.0]], dtype=torch.float64)
        found = reduce.divide(reduce.reduce_terms(each(logp, logp_behavior), mask, scope=scope))
        slopes.append(torch.autograd.grad(found, logp)[0].tolist())
    assert slopes[0] == slopes[1]  # as if the masked token held an ordinary number
    assert slopes[0][0][0] != 0
    assert slopes[0][0][1] == 0


@pytest.mark.parametrize("junk", [nan, inf, -inf])
@pytest.mark.parametrize(("sequence", "slope"), [(sequence_sum, exp(1.0)), (sequence_mean, exp(0.5) / 2)])
def test_masked_log_probabilities_leave_sequence_gradients_finite(sequence: Callable[..., Any], slope: float, junk: float) -> None:
    logp = torch.tensor([[-1.0, junk, -1.0]], dtype=torch.float64, requires_grad=True)
    log_ratios = weights.log_ratio(logp, torch.tensor([[-1.5, junk, -1.5]], dtype=torch.float64))  # .5, anything, .5
    found = sequence(log_ratios, torch.tensor([[True, False, True]]))
    assert torch.autograd.grad(found.sum(), logp)[0].tolist()[0] == pytest.approx([slope, 0.0, slope], rel=1e-14)


def test_impossible_actions_leave_divergences_and_their_gradients_finite() -> None:
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64, requires_grad=True)
    for found in (divergences.kl(p, q), divergences.entropy(p), divergences.total_variation(p, q)):
        assert torch.isfinite(found)
        slopes = torch.autograd.grad(found, [p, q], allow_unused=True)
        assert all(torch.isfinite(slope).all() for slope in slopes if slope is not None)


# Precision and bounds

FROM_LOGS = {
    "log_ratio": weights.log_ratio,
    "ratio": weights.ratio,
    "k1": divergences.k1,
    "k2": divergences.k2,
    "k3": divergences.k3,
    "kl": divergences.kl,
    "total_variation": divergences.total_variation,
    "gaussian_kl": lambda x, y: divergences.gaussian_kl(x, y, y, x),
    "mirror_step": lambda x, y: surrogates.mirror_step(x, y, 0.5),
    "per_decision": lambda x, _: weights.per_decision(x),
    "exp_advantage": lambda x, _: weights.exp_advantage(x, 1.0),
    "entropy": lambda x, _: divergences.entropy(x),
    "sequence_ratio": lambda x, _: sequence_mean(x, x > 0),
}
EACH_FROM_LOGS = pytest.mark.parametrize("function", FROM_LOGS.values(), ids=FROM_LOGS)


@EACH_FROM_LOGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_widened_and_full_precision_kept(function: Callable[..., Any], dtype: torch.dtype) -> None:
    x = torch.full((2, 3), 0.25, dtype=dtype)
    assert function(x, x).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@EACH_FROM_LOGS
def test_numpy_half_precision_is_widened(function: Callable[..., Any]) -> None:
    x = np.full((2, 3), 0.25, dtype=np.float16)
    assert function(x, x).dtype == np.float32


def test_the_difference_is_taken_after_widening() -> None:
    # 1 - 2⁻¹⁰ needs more digits than bfloat16 has: subtracting first would round it to 1
    logp, behavior = torch.tensor([-(2.0**-10)], dtype=torch.bfloat16), torch.tensor([-1.0], dtype=torch.bfloat16)
    assert weights.log_ratio(logp, behavior).item() == 1 - 2**-10


def test_gradients_come_back_in_the_precision_of_the_input() -> None:
    logp = torch.tensor([-1.0], dtype=torch.bfloat16, requires_grad=True)
    weights.ratio(logp, logp.detach()).sum().backward()
    assert logp.grad is not None
    assert (logp.grad.dtype, logp.grad.item()) == (torch.bfloat16, 1.0)


def test_ratios_are_bounded_by_exp_of_20(asarray: AsArray) -> None:
    logp, behavior = asarray([-1.0, -100.0, -inf, -1.0]), asarray([-100.0, -1.0, -1.0, -inf])
    equals(weights.log_ratio(logp, behavior), [20.0, -20.0, -20.0, 20.0])
    equals(weights.ratio(logp, behavior), [exp(20), exp(-20), exp(-20), exp(20)])
    equals(divergences.k1(logp, behavior), [20.0, -20.0, -20.0, 20.0])
    equals(divergences.k2(logp, behavior), [200.0] * 4)
    equals(divergences.k3(logp, behavior), [exp(-20) - 1 + 20, exp(20) - 1 - 20, exp(20) - 1 - 20, exp(-20) - 1 + 20])


def test_products_of_ratios_are_bounded_by_exp_of_20(asarray: AsArray) -> None:
    log_ratios, mask = asarray([[15.0, 15.0], [-15.0, -15.0]]), asarray([[True, True], [True, True]])
    equals(weights.per_decision(log_ratios), [[exp(15), exp(20)], [exp(-15), exp(-20)]])
    equals(sequence_sum(log_ratios, mask), [exp(20), exp(-20)])
    equals(sequence_mean(log_ratios, mask), [exp(15), exp(-15)])
    equals(weights.sequence_ratio(log_ratios, mask, length_normalized=False, bound=2.0), [exp(2), exp(-2)])


def test_divide_keeps_rows_without_a_denominator_at_zero(asarray: AsArray) -> None:
    equals(reduce.divide(terms.Terms(asarray([1.0, 5.0]), asarray([2.0, 0.0]))), [0.5, 0.0])


# What is refused


@EACH_FROM_LOGS
def test_integers_are_refused(asarray: AsArray, function: Callable[..., Any]) -> None:
    x = asarray([[1, 2, 3]])
    with pytest.raises(TypeError, match=r"int64.*floating"):
        function(x, x)


ALIKE = {
    "importance": (weights.importance, 2),
    "log_ratio": (weights.log_ratio, 2),
    "ratio": (weights.ratio, 2),
    "sequence_ratio": (sequence_mean, 2),
    "ips": (terms.ips, 2),
    "snips": (terms.snips, 2),
    "control_variate": (terms.control_variate, 2),
    "dr": (terms.dr, 4),
    "sndr": (terms.sndr, 4),
    "log_smoothing": (partial(terms.log_smoothing, strength=0.5), 2),
    "implicit_exploration": (partial(terms.implicit_exploration, floor=0.1), 3),
    "group_center": (baselines.group_center, 3),
    "leave_one_out": (baselines.leave_one_out, 3),
    "optimal_control_variate": (baselines.optimal_control_variate, 4),
    "k1": (divergences.k1, 2),
    "k2": (divergences.k2, 2),
    "k3": (divergences.k3, 2),
    "kl": (divergences.kl, 2),
    "total_variation": (divergences.total_variation, 2),
    "gaussian_kl": (divergences.gaussian_kl, 4),
    "mirror_step": (partial(surrogates.mirror_step, step=0.5), 2),
    "masked_sum": (reduce.masked_sum, 2),
    "reduce_terms": (partial(reduce.reduce_terms, scope="token"), 2),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("other", [(3, 1), (1,), (2,)], ids=str)
def test_arrays_of_different_shapes_are_refused_by_name_and_shape(asarray: AsArray, name: str, other: tuple[int, ...]) -> None:
    function, count = ALIKE[name]
    for odd in range(count):  # whichever argument is the odd one out, even where broadcasting would have worked
        given = [asarray(np.ones(other if i == odd else (3,))) for i in range(count)]
        with pytest.raises(ValueError, match=r"\w+ \(.*\), \w+ \(") as caught:
            function(*given)
        assert "(3,)" in str(caught.value)
        assert str(other) in str(caught.value)


BUILDERS = [np.ones, partial(torch.ones, dtype=torch.float64), array_api_strict.ones]


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2)])
def test_arrays_of_two_libraries_are_refused(name: str, pair: tuple[int, int]) -> None:
    function, count = ALIKE[name]
    one, other = (BUILDERS[i] for i in pair)
    with pytest.raises(TypeError, match="Multiple namespaces"):
        function(*([one((2,))] * (count - 1)), other((2,)))


def test_namespace_skips_scalars_and_none(asarray: AsArray) -> None:
    x = asarray([1.0])
    assert _xp.namespace(x, None, 2.0, 3) is _xp.namespace(x)
    assert _xp.namespace(x).asarray is not None
    with pytest.raises(TypeError):
        _xp.namespace(None, 2.0)


def test_same_shape_names_every_array() -> None:
    _xp.same_shape(a=np.ones((2, 3)), b=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"a \(2, 3\), b \(3, 2\), c \(2, 3\)"):
        _xp.same_shape(a=np.ones((2, 3)), b=np.ones((3, 2)), c=np.ones((2, 3)))


def test_an_unknown_scope_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'batch'.*'token', 'sequence' or 'sequence_sum'"):
        reduce.reduce_terms(np.ones((1, 2)), np.ones((1, 2), dtype=bool), scope="batch")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "weight", "n"),
    [
        (np.float32, 0.3, 10),
        (np.float32, 0.3, 100),
        (np.float32, 0.7, 100_000),
        (np.float64, 0.7, 100_000),
        (np.float64, 0.7, 1_000_000),
    ],
)
def test_constant_weights_have_no_control_variate_however_their_means_round(dtype: type, weight: float, n: int) -> None:
    w, r = np.full(n, weight, dtype), (np.arange(n) % 3).astype(dtype)
    means = terms.control_variate(w, r).mean(axis=0)
    assert baselines.optimal_control_variate(*(np.asarray(mean) for mean in means)) == 0


def test_exp_advantage_is_bounded_before_it_overflows() -> None:
    advantage = torch.tensor([1000.0, 0.0], requires_grad=True)
    found = weights.exp_advantage(advantage, 1.0, 20.0)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), torch.tensor([20.0, 1.0]))
    assert advantage.grad is not None
    assert advantage.grad.tolist() == [0.0, 1.0]  # nothing flows beyond the bound
    np.testing.assert_allclose(weights.exp_advantage(np.array([1000.0, 0.0]), 1.0, 20.0), [20.0, 1.0])


def test_saturate_at_full_strength_maps_positive_weights_to_one_and_zero_to_zero(asarray: AsArray) -> None:
    assert np.asarray(weights.saturate(asarray([0.0, 2.0]), 1.0)).tolist() == [0.0, 1.0]


def test_reduce_terms_counts_exactly_in_half_precision() -> None:
    found = reduce.reduce_terms(torch.ones((1, 257), dtype=torch.bfloat16), torch.ones((1, 257), dtype=torch.bool), scope="token")
    assert (float(found.num), float(found.den)) == (257.0, 257.0)


def test_divide_refuses_a_numerator_and_denominator_of_different_shapes() -> None:
    with pytest.raises(ValueError, match=r"num \(3,\), den \(3, 1\)"):
        reduce.divide(terms.Terms(np.ones(3), np.ones((3, 1))))
