"""Every public primitive gives the same float64 numbers in NumPy, torch and array-api-strict, and touches nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import array_api_compat
import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ope.primitives import _xp, baselines, divergences, reduce, returns, surrogates, terms, weights

MODULES = (_xp, weights, terms, baselines, divergences, reduce, returns, surrogates)
NOT_NUMBERS = {"_xp.namespace", "_xp.same_shape"}


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


def of(dtype: type, elements: st.SearchStrategy[Any]) -> tuple[type, st.SearchStrategy[Any]]:
    return dtype, elements


WEIGHT = of(np.float64, st.just(0.0) | between(1e-6, 50))
PROPENSITY = of(np.float64, between(0.01, 1))
LOGP = of(np.float64, between(-40, 0))  # differences pass the bound of 20 often enough
LOG_RATIO = of(np.float64, between(-15, 15))
REWARD = of(np.float64, between(-100, 100))
POSITIVE = of(np.float64, between(0, 10))
ADVANTAGE = of(np.float64, between(-9, 9))
CHANCE = of(np.float64, st.just(0.0) | between(1e-6, 1))
LOG_STD = of(np.float64, between(-3, 2))
LABEL = of(np.int64, st.integers(0, 2))
MASK = of(np.bool_, st.booleans())
SHAPES = {1: st.sampled_from([(1,), (2,), (5,)]), 2: st.sampled_from([(1, 1), (1, 3), (3, 2)])}


def columns(*kinds: tuple[type, st.SearchStrategy[Any]], ndim: int = 1) -> st.SearchStrategy[tuple[np.ndarray, ...]]:
    """One array per kind, all of one shape."""
    return SHAPES[ndim].flatmap(lambda shape: st.tuples(*[arrays(dtype, shape, elements=values) for dtype, values in kinds]))


def moments(weight: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, ...]:
    """Means that belong together: of w, w·r, w², w²·r."""
    return tuple(np.asarray(np.mean(c)) for c in (weight, weight * reward, weight**2, weight**2 * reward))


class Case(NamedTuple):
    function: Callable[..., Any]
    inputs: st.SearchStrategy[tuple[np.ndarray, ...]]


TOKENS = columns(REWARD, MASK, ndim=2)
GROUPS = columns(REWARD, LABEL, MASK)
WR = columns(WEIGHT, REWARD)
WRQV = columns(WEIGHT, REWARD, REWARD, REWARD)
PAIR = columns(LOGP, LOGP, ndim=2)
DISTRIBUTIONS = columns(CHANCE, CHANCE, ndim=2)
W = columns(WEIGHT)
RATIO_ADVANTAGE = columns(WEIGHT, ADVANTAGE, ndim=2)
STEP = columns(ADVANTAGE, ADVANTAGE, ADVANTAGE, MASK, MASK, ndim=2)
WEIGHED_STEP = columns(WEIGHT, ADVANTAGE, ADVANTAGE, ADVANTAGE, MASK, MASK, ndim=2)

CASES = {
    "_xp.stop_gradient": Case(_xp.stop_gradient, W),
    "_xp.as_float32": Case(_xp.as_float32, W),
    "weights.importance": Case(weights.importance, columns(PROPENSITY, PROPENSITY)),
    "weights.log_ratio": Case(weights.log_ratio, PAIR),
    "weights.log_ratio bound 1": Case(partial(weights.log_ratio, bound=1.0), PAIR),
    "weights.ratio": Case(weights.ratio, PAIR),
    "weights.clip": Case(partial(weights.clip, low=0.5, high=10.0), W),
    "weights.clip default": Case(weights.clip, W),
    "weights.switch": Case(partial(weights.switch, threshold=5.0), W),
    "weights.truncate": Case(partial(weights.truncate, threshold=5.0), W),
    "weights.mask_outside": Case(partial(weights.mask_outside, low=0.5, high=5.0), W),
    "weights.shrink": Case(partial(weights.shrink, strength=10.0), W),
    "weights.shrink 0": Case(partial(weights.shrink, strength=0.0), W),
    "weights.shrink inf": Case(partial(weights.shrink, strength=np.inf), W),
    "weights.saturate": Case(partial(weights.saturate, strength=0.3), W),
    "weights.saturate 1": Case(partial(weights.saturate, strength=1.0), W),
    "weights.exp_advantage": Case(partial(weights.exp_advantage, temperature=3.0, high=20.0), columns(ADVANTAGE)),
    "weights.per_decision": Case(weights.per_decision, columns(LOG_RATIO, ndim=2)),
    "weights.sequence_ratio sum": Case(partial(weights.sequence_ratio, length_normalized=False), columns(LOG_RATIO, MASK, ndim=2)),
    "weights.sequence_ratio mean": Case(partial(weights.sequence_ratio, length_normalized=True), columns(LOG_RATIO, MASK, ndim=2)),
    "weights.effective_sample_size": Case(weights.effective_sample_size, W),
    "terms.dm": Case(terms.dm, columns(REWARD)),
    "terms.ips": Case(terms.ips, WR),
    "terms.snips": Case(terms.snips, WR),
    "terms.control_variate": Case(terms.control_variate, WR),
    "terms.dr": Case(terms.dr, WRQV),
    "terms.sndr": Case(terms.sndr, WRQV),
    "terms.log_smoothing": Case(partial(terms.log_smoothing, strength=0.5), columns(WEIGHT, POSITIVE)),
    "terms.implicit_exploration": Case(partial(terms.implicit_exploration, floor=0.1), columns(PROPENSITY, PROPENSITY, REWARD)),
    "baselines.group_center": Case(baselines.group_center, GROUPS),
    "baselines.leave_one_out": Case(baselines.leave_one_out, GROUPS),
    "baselines.group_std": Case(partial(baselines.group_std, unbiased=True), GROUPS),
    "baselines.group_std of all": Case(partial(baselines.group_std, unbiased=False), GROUPS),
    "baselines.weighted_group_center": Case(baselines.weighted_group_center, columns(REWARD, PROPENSITY, LABEL, MASK)),
    "baselines.group_soft_value": Case(partial(baselines.group_soft_value, temperature=2.0), GROUPS),
    "baselines.weights_vary": Case(baselines.weights_vary, WR.map(lambda wr: moments(*wr)[::2])),
    "baselines.optimal_control_variate": Case(baselines.optimal_control_variate, WR.map(lambda wr: moments(*wr))),
    "divergences.k1": Case(divergences.k1, PAIR),
    "divergences.k2": Case(divergences.k2, PAIR),
    "divergences.k3": Case(divergences.k3, PAIR),
    "divergences.kl": Case(divergences.kl, DISTRIBUTIONS),
    "divergences.entropy": Case(divergences.entropy, columns(CHANCE, ndim=2)),
    "divergences.total_variation": Case(divergences.total_variation, DISTRIBUTIONS),
    "reduce.masked_sum": Case(reduce.masked_sum, TOKENS),
    "reduce.masked_sum axis": Case(partial(reduce.masked_sum, axis=-1), TOKENS),
    "reduce.reduce_terms token": Case(partial(reduce.reduce_terms, scope="token"), TOKENS),
    "reduce.reduce_terms sequence": Case(partial(reduce.reduce_terms, scope="sequence"), TOKENS),
    "reduce.reduce_terms sum": Case(partial(reduce.reduce_terms, scope="sequence_sum"), TOKENS),
    "reduce.reduce_terms norm": Case(partial(reduce.reduce_terms, scope="sequence_sum", length=10.0), TOKENS),
    "divergences.expectile": Case(partial(divergences.expectile, level=0.7), columns(REWARD)),
    "divergences.gaussian_kl": Case(divergences.gaussian_kl, columns(ADVANTAGE, LOG_STD, ADVANTAGE, LOG_STD, ndim=2)),
    "surrogates.mirror_step": Case(partial(surrogates.mirror_step, step=0.5), columns(CHANCE, ADVANTAGE, ndim=2)),
    "surrogates.clipped": Case(partial(surrogates.clipped, low=0.8, high=1.2), RATIO_ADVANTAGE),
    "surrogates.dual_clipped": Case(partial(surrogates.dual_clipped, low=0.8, high=1.2, bound=3.0), RATIO_ADVANTAGE),
    "surrogates.OneSided": Case(surrogates.OneSided().keep, RATIO_ADVANTAGE),
    "surrogates.TwoSided": Case(surrogates.TwoSided().keep, RATIO_ADVANTAGE),
    "surrogates.Ring": Case(surrogates.Ring().keep, RATIO_ADVANTAGE),
    "returns.reverse_sum": Case(returns.reverse_sum, columns(ADVANTAGE, CHANCE, ndim=2)),
    "returns.discounted": Case(partial(returns.discounted, discount=0.9), columns(ADVANTAGE, MASK, ndim=2)),
    "returns.temporal_difference": Case(
        partial(returns.temporal_difference, discount=0.9), columns(ADVANTAGE, ADVANTAGE, ADVANTAGE, MASK, ndim=2)
    ),
    "returns.gae": Case(partial(returns.gae, discount=0.9, lambda_=0.8), STEP),
    "returns.vtrace": Case(partial(returns.vtrace, discount=0.9), WEIGHED_STEP),
    "returns.retrace": Case(partial(returns.retrace, discount=0.9, lambda_=0.8), WEIGHED_STEP),
    "reduce.divide": Case(lambda num, den: reduce.divide(terms.Terms(num, den)), columns(REWARD, WEIGHT)),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def read_only(inputs: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    for array in inputs:
        array.setflags(write=False)
    return list(inputs)


def outputs(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


def test_the_table_names_every_public_function() -> None:
    found = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    gates = {f"surrogates.{gate.__name__}" for gate in get_args(surrogates.Gate)}
    assert found - NOT_NUMBERS | gates == {name.split()[0] for name in CASES}


@EACH
@given(data=st.data())
def test_three_libraries_agree_to_1e_12_and_answer_in_their_own_arrays(case: Case, data: st.DataObject) -> None:
    inputs = read_only(data.draw(case.inputs))
    expected = outputs(case.function(*inputs))
    for convert in (torch.tensor, array_api_strict.asarray):
        given_arrays = [convert(array) for array in inputs]
        found = outputs(case.function(*given_arrays))
        assert len(found) == len(expected)
        for theirs, ours in zip(found, expected, strict=True):
            assert array_api_compat.array_namespace(theirs) is array_api_compat.array_namespace(*given_arrays)
            values = np.asarray(theirs)
            assert values.dtype == np.asarray(ours).dtype
            assert values.dtype in (np.float64, np.bool_)
            np.testing.assert_allclose(values, ours, rtol=1e-12, atol=1e-12, strict=True)


@EACH
@settings(max_examples=3)
@given(data=st.data())
def test_inputs_are_left_as_they_were(case: Case, data: st.DataObject) -> None:
    inputs = read_only(data.draw(case.inputs))  # NumPy raises on any write to these
    case.function(*inputs)
    tensors = [torch.tensor(array) for array in inputs]
    case.function(*tensors)
    assert [tensor._version for tensor in tensors] == [0] * len(tensors)  # torch counts writes in place
    strict = [array_api_strict.asarray(array) for array in inputs]
    case.function(*strict)
    for before, after in zip(inputs, strict, strict=True):
        np.testing.assert_array_equal(before, np.asarray(after))


@EACH
@settings(max_examples=3)
@given(data=st.data())
def test_nothing_random_is_drawn(case: Case, data: st.DataObject) -> None:
    inputs = data.draw(case.inputs)
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    first = outputs(case.function(*inputs))
    case.function(*[torch.tensor(array) for array in inputs])
    for one, other in zip(first, outputs(case.function(*inputs)), strict=True):
        np.testing.assert_array_equal(one, other)
    _, keys_after, position_after, *_ = np.random.get_state()  # noqa: NPY002
    assert position == position_after
    np.testing.assert_array_equal(keys, keys_after)
    assert torch.equal(torch_state, torch.get_rng_state())
