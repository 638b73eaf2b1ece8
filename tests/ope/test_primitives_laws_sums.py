"""Laws of divergences between policies, and of sums that are divided only once."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ope.primitives import divergences, reduce
from ope.primitives.terms import Terms

CHANCES = arrays(np.float64, 5, elements=st.floats(0.01, 1)).map(lambda x: x / x.sum())
GAPPED = arrays(np.float64, 5, elements=st.just(0.0) | st.floats(0.01, 1)).filter(np.any).map(lambda x: x / x.sum())
TOKENS = arrays(np.float64, (4, 3), elements=st.floats(-9, 9))
MASKS = arrays(np.bool_, (4, 3))
Scope = Literal["token", "sequence"]
SCOPES = pytest.mark.parametrize("scope", ["token", "sequence"])

close = np.testing.assert_allclose


@given(p=CHANCES, q=CHANCES)
def test_k1_and_k3_are_unbiased_for_kl(p: np.ndarray, q: np.ndarray) -> None:
    exact = np.sum(p * np.log(p / q))
    close(divergences.kl(p, q), exact, atol=1e-14)
    close(p @ divergences.k1(np.log(p), np.log(q)), exact, atol=1e-14)
    close(p @ divergences.k3(np.log(p), np.log(q)), exact, atol=1e-14)


@given(p=CHANCES, direction=arrays(np.float64, 5, elements=st.floats(-1, 1)))
def test_k2_misses_kl_only_to_third_order(p: np.ndarray, direction: np.ndarray) -> None:
    # for q = p·exp(t·f) normalised, both are t²·var(f)/2 + O(t³): a tenth of t leaves a thousandth of the gap
    def gap(t: float) -> float:
        q = p * np.exp(t * direction)
        q = q / q.sum()
        return float(abs(p @ divergences.k2(np.log(p), np.log(q)) - np.sum(p * np.log(p / q))))

    assert gap(0.01) <= 10 * 0.01**3
    assert gap(0.001) <= 10 * 0.001**3


@given(d=arrays(np.float64, 6, elements=st.floats(-30, 30)))
def test_k3_and_k2_are_never_negative_and_k1_changes_sign(d: np.ndarray) -> None:
    nothing = np.zeros(6)
    assert np.all(divergences.k3(d, nothing) >= 0)
    assert np.all(divergences.k2(d, nothing) >= 0)
    np.testing.assert_array_equal(divergences.k2(d, nothing), divergences.k2(nothing, d))
    np.testing.assert_array_equal(divergences.k1(d, nothing), -divergences.k1(nothing, d))
    for estimator in (divergences.k1, divergences.k2, divergences.k3):
        np.testing.assert_array_equal(estimator(d, d), nothing)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_k3_keeps_its_digits_near_zero(dtype: Any) -> None:
    d = np.array([1e-3, -1e-3], dtype=dtype)
    found = divergences.k3(d, np.zeros(2, dtype=dtype))
    expected = np.array([1e-6 / 2 - 1e-9 / 6, 1e-6 / 2 + 1e-9 / 6])  # exp(-d) - 1 + d = d²/2 - d³/6 + ...
    close(found, expected, rtol=2e-4 if dtype is np.float32 else 1e-6)


@given(p=GAPPED, q=GAPPED)
def test_kl_is_never_negative_and_zero_only_between_equals(p: np.ndarray, q: np.ndarray) -> None:
    found = divergences.kl(p, q)
    assert found >= -1e-14
    assert divergences.kl(p, p) == 0
    gap = np.abs(p - q).max()
    assert gap < 1e-6 or found > 1e-14
    assert np.isinf(found) == bool(np.any((p > 0) & (q == 0)))


@given(p=GAPPED, q=GAPPED)
def test_pinsker_bounds_total_variation_by_kl(p: np.ndarray, q: np.ndarray) -> None:
    assert divergences.total_variation(p, q) <= np.sqrt(max(divergences.kl(p, q), 0.0) / 2) + 1e-7


@given(p=GAPPED, q=GAPPED, third=GAPPED)
def test_total_variation_is_a_metric_bounded_by_one(p: np.ndarray, q: np.ndarray, third: np.ndarray) -> None:
    found = divergences.total_variation(p, q)
    assert 0 <= found <= 1 + 1e-15
    assert (found == 0) == np.array_equal(p, q)
    assert found == divergences.total_variation(q, p)
    assert found <= divergences.total_variation(p, third) + divergences.total_variation(third, q) + 1e-15
    close(found, np.maximum(p - q, 0).sum(), atol=1e-14)  # the largest difference of any event's probability


@given(p=CHANCES, q=CHANCES, other=CHANCES, another=CHANCES)
def test_kl_and_entropy_add_over_independent_choices(p: np.ndarray, q: np.ndarray, other: np.ndarray, another: np.ndarray) -> None:
    both, both_ref = np.outer(p, other).ravel(), np.outer(q, another).ravel()
    close(divergences.kl(both, both_ref), divergences.kl(p, q) + divergences.kl(other, another), atol=1e-13)
    close(divergences.entropy(both), divergences.entropy(p) + divergences.entropy(other), atol=1e-13)


@given(p=GAPPED)
def test_entropy_is_the_log_of_the_count_less_the_distance_from_uniform(p: np.ndarray) -> None:
    found = divergences.entropy(p)
    close(found, np.log(5) - divergences.kl(p, np.full(5, 0.2)), atol=1e-13)
    assert -1e-15 <= found <= np.log(5) + 1e-14


@given(values=TOKENS, mask=MASKS)
def test_masked_sums_add_what_counts(values: np.ndarray, mask: np.ndarray) -> None:
    close(reduce.masked_sum(values, mask), values[mask].sum(), atol=1e-12)
    close(reduce.masked_sum(values, mask) + reduce.masked_sum(values, ~mask), values.sum(), atol=1e-12)
    close(reduce.masked_sum(values, mask, axis=-1), [row[keep].sum() for row, keep in zip(values, mask, strict=True)], atol=1e-12)


@given(values=TOKENS, mask=MASKS)
def test_a_token_mean_weighs_tokens_and_a_sequence_mean_weighs_sequences(values: np.ndarray, mask: np.ndarray) -> None:
    token, sequence = (reduce.divide(reduce.reduce_terms(values, mask, scope=scope)) for scope in ("token", "sequence"))
    rows = [row[keep].mean() for row, keep in zip(values, mask, strict=True) if keep.any()]
    close(token, values[mask].mean() if mask.any() else 0.0, atol=1e-12)
    close(sequence, np.mean(rows) if rows else 0.0, atol=1e-12)


@given(values=TOKENS)
def test_scopes_agree_when_all_lengths_are_equal(values: np.ndarray) -> None:
    mask = np.tile([True, False, True], (4, 1))
    token, sequence = (reduce.divide(reduce.reduce_terms(values, mask, scope=scope)) for scope in ("token", "sequence"))
    close(token, sequence, atol=1e-12)


@SCOPES
@given(values=TOKENS, mask=MASKS, padding=TOKENS)
def test_padding_changes_nothing(scope: Scope, values: np.ndarray, mask: np.ndarray, padding: np.ndarray) -> None:
    plain = reduce.reduce_terms(values, mask, scope=scope)
    padded = reduce.reduce_terms(np.hstack([values, padding]), np.hstack([mask, np.zeros_like(mask)]), scope=scope)
    close(padded, plain, atol=1e-12)


def on_two_machines(mine: Terms, theirs: Terms) -> Any:
    """What a machine computes when `all_sum` adds the other machine's part to each number that it is handed."""
    return reduce.divide(mine, all_sum=lambda x: x + (theirs.num if x is mine.num else theirs.den))


@SCOPES
@given(values=TOKENS, mask=MASKS, cut=st.integers(1, 3))
def test_sums_from_two_machines_divide_to_the_whole(scope: Scope, values: np.ndarray, mask: np.ndarray, cut: int) -> None:
    whole = reduce.divide(reduce.reduce_terms(values, mask, scope=scope))
    parts = [reduce.reduce_terms(values[rows], mask[rows], scope=scope) for rows in (slice(cut), slice(cut, None))]
    close(on_two_machines(parts[0], parts[1]), whole, atol=1e-12)
    close(on_two_machines(parts[1], parts[0]), whole, atol=1e-12)  # both machines learn the same number


@pytest.mark.parametrize(("scope", "whole", "averaged"), [("token", 0.2, 0.5), ("sequence", 1 / 3, 0.5)])
def test_averages_of_averages_are_wrong(scope: Scope, whole: float, averaged: float) -> None:
    # machine 1: one sequence of two ones; machine 2: two sequences of four zeros
    ones, zeros = np.ones((1, 2)), np.zeros((2, 4))
    first = reduce.reduce_terms(ones, ones > 0, scope=scope)
    second = reduce.reduce_terms(zeros, zeros == 0, scope=scope)
    close((reduce.divide(first) + reduce.divide(second)) / 2, averaged)
    close(on_two_machines(first, second), whole)
