"""One way to draw: exact shares, a keyed hash of the id, and draws that are as likely as the shares say."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import power_divergence

from bandits.sampling import TOTAL, Salt, choose, choose_rows, quantise, quantise_rows
from ope.data import InputError

KEY = bytes(range(32))
SALT = Salt(1, KEY)
GOLDEN = {
    ("acme", "d-1"): 464625926,
    ("acme", "0190f5a2-7c3e-7d44-9b1a-2f6c8e0d1a2b"): 2097058944,
    ("ü", "é" * 128): 767000600,
    ("ab", "c"): 440807386,
    ("a", "bc"): 906234438,
}


@st.composite
def distributions(draw) -> np.ndarray:
    """1 to 200 probabilities of very different sizes, some of them 0."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = rng.exponential(size=draw(st.integers(1, 200))) ** draw(st.sampled_from([0.1, 1.0, 4.0, 20.0]))
    weights[rng.uniform(size=len(weights)) < draw(st.sampled_from([0.0, 0.5, 0.95]))] = 0.0
    weights[rng.integers(len(weights))] += 1e-3
    return weights / weights.sum()


@given(vector=distributions(), explore=st.booleans())
def test_shares_sum_exactly_and_lie_within_k_of_the_probabilities(vector, explore):
    shares = np.array(quantise(vector.tolist(), explore=explore))
    assert shares.sum() == TOTAL == 2**31
    assert shares.min() >= (1 if explore else 0), "exploring leaves no eligible action without a share"
    assert np.abs(shares / TOTAL - vector).max() <= len(vector) / TOTAL
    if not explore:
        assert (shares[vector == 0] == 0).all()


@given(seed=st.integers(0, 2**32), k=st.integers(1, 200), explore=st.booleans())
def test_rows_have_the_shares_of_each_alone_with_and_without_masks(seed, k, explore):
    rng = np.random.default_rng(seed)
    eligible = rng.uniform(size=(20, k)) < 0.6
    eligible[np.arange(20), rng.integers(k, size=20)] = True
    weights = np.where(eligible, rng.exponential(size=(20, k)) ** 3 + 1e-9, 0)
    vectors = weights / weights.sum(axis=1, keepdims=True)
    shares = quantise_rows(vectors, eligible, explore=explore)
    for row, vector, mask in zip(shares, vectors, eligible, strict=True):
        assert row[mask].tolist() == quantise(vector[mask].tolist(), explore=explore)
        assert (row[~mask] == 0).all()


@pytest.mark.parametrize(
    ("vector", "explore", "shares"),
    [
        ([1.0], True, [2**31]),
        ([0.5, 0.5], True, [2**30, 2**30]),
        ([0.25, 0.5, 0.25], True, [2**29, 2**30, 2**29]),
        ([0.0, 1.0], True, [1, 2**31 - 1]),
        ([0.0, 1.0], False, [0, 2**31]),
        ([1.0] + [0.0] * 9999, True, [2**31 - 9999] + [1] * 9999),
        ([1e-12, 1 - 1e-12], True, [1, 2**31 - 1]),
        # a third of 2^31 is 715827882.67: 2 are lost in rounding down, and the first of equals takes them
        ([1 / 3, 1 / 3, 1 / 3], True, [715827884, 715827882, 715827882]),
    ],
)
def test_shares_by_hand(vector, explore, shares):
    assert quantise(vector, explore=explore) == shares
    rows = np.array([vector, vector])
    assert quantise_rows(rows, np.ones(rows.shape, dtype=bool), explore=explore).tolist() == [shares, shares]


@pytest.mark.parametrize(
    "vector",
    [[np.nan, 1.0], [0.5, np.nan], [-0.1, 1.1], [0.5, 0.4], [0.6, 0.6], [], [np.inf, 0.0], [1 + 2e-6]],
    ids=["NaN", "NaN last", "negative", "0.9", "1.2", "empty", "infinite", "over tolerance"],
)
def test_what_is_no_distribution_is_refused_alone_and_in_rows(vector):
    with pytest.raises(InputError, match=r"found probabilities \[.*sum to 1"):
        quantise(vector)
    good = np.full((2, len(vector)), 1 / max(len(vector), 1))
    rows = np.concatenate((good, [vector], good)) if vector else np.empty((1, 0))
    with pytest.raises(InputError, match=rf"^row {2 if vector else 0}: found probabilities"):
        quantise_rows(rows, np.ones(rows.shape, dtype=bool))


def test_mass_on_an_ineligible_action_and_rows_without_actions_are_refused():
    vectors = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    eligible = np.array([[True, True, False], [True, True, False]])
    with pytest.raises(InputError, match=r"^row 1: found probabilities \[0, 0, 1\], eligible \[0, 1\]; expected .* 0 on every"):
        quantise_rows(vectors, eligible)
    with pytest.raises(InputError, match=r"^row 0: .*eligible \[\]"):
        quantise_rows(np.zeros((1, 3)), np.zeros((1, 3), dtype=bool))
    with pytest.raises(InputError, match=r"^row 0: "):
        quantise_rows(np.array([[1 - 1e-9, 1e-9]]), np.array([[True, False]]))


def independent(tenant: str, id_: str, key: bytes = KEY) -> int:
    parts = (tenant.encode(), id_.encode())
    message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    number = int(hashlib.blake2b(message, digest_size=8, key=key).hexdigest(), 16)
    return number // 2**33  # the top 31 of 64 bits


@pytest.mark.parametrize(("tenant", "id_"), list(GOLDEN))
def test_draws_are_those_that_were_released(tenant, id_):
    assert SALT.uniform(tenant, id_) == GOLDEN[tenant, id_] == independent(tenant, id_)


def test_golden_choices():
    shares = quantise([0.1, 0.2, 0.3, 0.4])
    assert shares == [214748364, 429496729, 644245094, 858993461]
    assert [choose(shares, u) for u in GOLDEN.values()] == [1, 3, 2, 1, 2]


@given(tenant=st.text(max_size=20), id_=st.text(max_size=20), key=st.binary(min_size=16, max_size=64))
def test_draws_follow_the_published_construction(tenant, id_, key):
    u = Salt(3, key).uniform(tenant, id_)
    assert 0 <= u < TOTAL
    assert u == independent(tenant, id_, key)


@pytest.mark.parametrize("size", [0, 15, 65])
def test_a_salt_is_16_to_64_bytes(size):
    with pytest.raises(InputError, match=f"{size} bytes; expected 16 to 64"):
        Salt(1, b"x" * size)


def test_tenant_and_id_do_not_run_into_each_other():
    pairs = [("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", "")]
    assert len({SALT.uniform(*pair) for pair in pairs}) == 4


def test_another_epoch_gives_other_draws():
    ids = [f"d{i}" for i in range(1000)]
    one, other = ([Salt(epoch, bytes([epoch]) * 32).uniform("acme", id_) for id_ in ids] for epoch in (1, 2))
    assert sum(a == b for a, b in zip(one, other, strict=True)) == 0, "expected 1000 / 2^31 agreements"
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(1000)
    assert [Salt(9, bytes([1]) * 32).uniform("acme", id_) for id_ in ids] == one, "the key draws, the epoch only names it"


@pytest.mark.parametrize(
    ("u", "index"),
    [(0, 0), (9, 0), (10, 2), (11, 2), (2**31 - 6, 2), (2**31 - 5, 4), (2**31 - 1, 4)],
)
def test_choices_at_the_edges_of_shares(u, index):
    shares = [10, 0, 2**31 - 15, 0, 5]
    assert choose(shares, u) == index, "an action without a share is never chosen"
    assert choose_rows(np.array([shares]), np.array([u])).tolist() == [index]


def test_a_number_past_the_last_share_is_refused():
    with pytest.raises(InputError, match="expected u from 0"):
        choose([5, 5], 10)


@given(vector=distributions(), seed=st.integers(0, 2**32))
def test_rows_choose_as_each_alone(vector, seed):
    shares = quantise(vector.tolist())
    edges = np.cumsum(shares)
    u = np.concatenate((np.random.default_rng(seed).integers(0, TOTAL, 50), edges - 1, edges[:-1], [0]))
    assert choose_rows(np.tile(shares, (len(u), 1)), u).tolist() == [choose(shares, int(each)) for each in u]


def test_a_draw_knows_nothing_of_the_shares_it_falls_into():
    u = [SALT.uniform("acme", f"d{i}") for i in range(100)]
    for vector in ([0.3, 0.7], [0.1] * 10):
        quantise(vector)
        choose_rows(np.tile(quantise(vector), (100, 1)), np.array(u))
        assert [SALT.uniform("acme", f"d{i}") for i in reversed(range(100))] == u[::-1], "same numbers, whatever came between"


@pytest.fixture(scope="module")
def hashed() -> np.ndarray:
    """Draws of 1,000,000 ids, sorted."""
    return np.sort(np.fromiter((SALT.uniform("acme", f"decision-{i}") for i in range(1_000_000)), dtype=np.int64))


SHAPES = {
    "fair coin": [0.5, 0.5],
    "skewed coin": [0.001, 0.999],
    "thirds": [1 / 3] * 3,
    "ten": [0.1] * 10,
    "geometric": [0.5**i for i in range(1, 12)] + [0.5**11],
    "floor": [0.98 + 0.002] + [0.002] * 9,
    "hundred": [0.01] * 100,
    "ramp": [i / 1275 for i in range(1, 51)],
    "ramp down": [i / 1275 for i in range(50, 0, -1)],
    "thousand": [0.001] * 1000,
}


@pytest.mark.parametrize("name", SHAPES)
def test_draws_on_each_of_ten_vectors_are_as_likely_as_their_shares(name):
    """Ten million draws in all, of as many ids, where `make faults` asks for them: each vector has a tenant of its own."""
    shares, n = np.array(quantise(SHAPES[name])), 1_000_000 if "PROPEL_KILLS" in os.environ else 200_000
    u = np.fromiter((SALT.uniform(name, f"decision-{i}") for i in range(n)), dtype=np.int64, count=n)
    counts = np.zeros(len(shares), dtype=np.int64)
    for start in range(0, n, 20_000):
        part = u[start : start + 20_000]
        counts += np.bincount(choose_rows(np.broadcast_to(shares, (len(part), len(shares))), part), minlength=len(shares))
    test = power_divergence(counts, shares / TOTAL * n, lambda_="log-likelihood")
    assert test.pvalue > 1e-3, f"G = {test.statistic:.1f} on {len(shares) - 1} degrees of freedom"


def test_the_g_test_would_see_a_bias_of_half_a_percent(hashed):
    counts = np.diff(np.searchsorted(hashed, [TOTAL * 505 // 1000, TOTAL]), prepend=0)
    test = power_divergence(counts, [500_000, 500_000], lambda_="log-likelihood")
    assert test.pvalue < 1e-9
