"""Beliefs: worked on paper, additive in any order, discounted around the prior, sampled as they say."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from bandits.posteriors import BayesianLinear, BetaBernoulli, NormalMean
from ope.data import InputError

K = 3
D = 2


def rows(seed: int, n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "action": rng.integers(0, K, n),
        "features": rng.normal(size=(n, D)),
        "reward": rng.uniform(size=n),
        "weight": rng.uniform(0, 3, n),
    }


def update(belief, data, index, *, weighted=True):
    first = data["features"] if isinstance(belief, BayesianLinear) else data["action"]
    return belief.update(first[index], data["reward"][index], data["weight"][index] if weighted else None)


def numbers(belief) -> np.ndarray:
    names = ("alpha", "beta") if isinstance(belief, BetaBernoulli) else ("precision", "shift")
    return np.concatenate([getattr(belief, name).ravel() for name in names])


def same(one, other) -> bool:
    return numbers(one) == pytest.approx(numbers(other), rel=1e-12, abs=1e-12)


PRIORS = {
    "beta": BetaBernoulli.prior(K, 2.0, 0.5),
    "normal": NormalMean.prior(K, mean=-1.5, precision=0.3, noise_variance=2.0),
    "linear": BayesianLinear.prior(D, precision=0.7, noise_variance=0.5),
}
each_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)


def test_importing_loads_no_library_but_numpy():
    code = "import sys, bandits.posteriors; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    ours = {name for name in loaded - sys.stdlib_module_names if not name.startswith("_")}
    # modules that an installed package's .pth file loads at start-up are there without any import of ours
    bare = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True)
    assert ours - {name.partition(".")[0] for name in bare.stdout.split()} == {"bandits", "ope", "numpy"}


def test_beta_on_paper():
    belief = BetaBernoulli.prior(2).update([0, 0, 1], [1.0, 0.0, 0.25])
    assert belief.alpha.tolist() == [2.0, 1.25]
    assert belief.beta.tolist() == [2.0, 1.75]
    assert belief.mean() == pytest.approx([1 / 2, 1.25 / 3])
    assert belief.variance() == pytest.approx([2 * 2 / (16 * 5), 1.25 * 1.75 / (9 * 4)])


def test_normal_on_paper():
    # prior N(1, 1/2), noise variance 4: three rewards 3, 5, 4 give precision 2 + 3/4 and mean (2 + 12/4) / 2.75
    belief = NormalMean.prior(2, mean=1.0, precision=2.0, noise_variance=4.0).update([1, 1, 1], [3.0, 5.0, 4.0])
    assert belief.mean() == pytest.approx([1.0, 5 / 2.75])
    assert belief.variance() == pytest.approx([1 / 2, 1 / 2.75])


def test_linear_on_paper():
    # X'X = [[2, 1], [1, 2]] and X'y = (4, 5); with prior precision 1 and noise 1, Λ = [[3, 1], [1, 3]]
    belief = BayesianLinear.prior(2).update([[1, 0], [0, 1], [1, 1]], [1.0, 2.0, 3.0])
    assert belief.precision.tolist() == [[3.0, 1.0], [1.0, 3.0]]
    assert belief.shift.tolist() == [4.0, 5.0]
    assert belief.mean() == pytest.approx([7 / 8, 11 / 8])
    assert belief.covariance() == pytest.approx(np.array([[3, -1], [-1, 3]]) / 8)
    mean, variance = belief.predict([[[1.0, 0.0]], [[1.0, 1.0]]])
    assert mean == pytest.approx(np.array([[7 / 8], [18 / 8]]))
    assert variance == pytest.approx(np.array([[3 / 8], [4 / 8]]))
    assert belief.predict([1.0, 1.0])[1] == pytest.approx(0.5)


@each_prior
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 40), cut=st.integers(0, 40), weighted=st.booleans())
def test_two_parts_in_any_order_equal_the_whole(prior, seed, n, cut, weighted):
    data, order = rows(seed, n), np.random.default_rng(seed + 1).permutation(n)
    whole = update(prior, data, slice(None), weighted=weighted)
    first, second = (update(prior, data, part, weighted=weighted) for part in (order[:cut], order[cut:]))
    assert same(update(first, data, order[cut:], weighted=weighted), whole)
    assert same(first.merge(second), whole)
    assert same(second.merge(first), whole)


@each_prior
def test_weight_is_repeats_and_zero_weight_is_no_row(prior):
    data, times = rows(1, 30), np.arange(30) % 4
    weighted = update(prior, {**data, "weight": times.astype(float)}, slice(None))
    assert same(weighted, update(prior, data, np.repeat(np.arange(30), times), weighted=False))


@each_prior
def test_discount_shrinks_the_evidence_around_the_prior(prior):
    belief = update(prior, rows(2, 25), slice(None))
    assert np.array_equal(numbers(belief.discount(1)), numbers(belief))
    assert np.array_equal(numbers(belief.discount(0)), numbers(prior))
    assert numbers(belief.discount(0.5)) == pytest.approx((numbers(belief) + numbers(prior)) / 2)
    assert same(belief.discount(0.5).merge(belief.discount(0.5)), belief)


@pytest.mark.parametrize("name", ["beta", "normal"])
def test_discount_may_differ_by_action(name):
    prior = PRIORS[name]
    belief = update(prior, rows(3, 25), slice(None))
    mean = belief.discount([0.0, 1.0, 1.0]).mean()
    assert mean == pytest.approx([prior.mean()[0], *belief.mean()[1:]])


@each_prior
def test_samples_have_the_mean_and_variance_of_the_belief(prior):
    belief = update(prior, rows(4, 12), slice(None))
    draws = belief.sample(np.random.default_rng(5), 20_000)
    variance = np.diag(belief.covariance()) if isinstance(belief, BayesianLinear) else belief.variance()
    assert draws.shape == (20_000, len(belief.mean()))
    centred = draws - belief.mean()
    for terms, expected in ((centred, 0.0), (centred**2, variance)):
        assert np.all(np.abs(terms.mean(axis=0) - expected) < 4 * terms.std(axis=0) / np.sqrt(len(draws)))
    if isinstance(belief, BayesianLinear):
        product = centred[:, 0] * centred[:, 1]
        assert abs(product.mean() - belief.covariance()[0, 1]) < 4 * product.std() / np.sqrt(len(draws))


@each_prior
def test_same_seed_same_draws(prior):
    one, other = (prior.sample(np.random.default_rng(6), 3) for _ in range(2))
    assert np.array_equal(one, other)


def test_linear_mean_is_ridge_regression():
    rng = np.random.default_rng(7)
    X, y, weight = rng.normal(size=(200, 6)), rng.normal(size=200), rng.uniform(0.1, 3, 200)
    belief = BayesianLinear.prior(6, precision=0.4, noise_variance=2.5).update(X, y, weight)
    ridge = Ridge(alpha=0.4 * 2.5, fit_intercept=False).fit(X, y, sample_weight=weight)
    assert belief.mean() == pytest.approx(ridge.coef_, rel=1e-10, abs=1e-10)
    assert belief.predict(X)[0] == pytest.approx(ridge.predict(X), rel=1e-10, abs=1e-10)
    assert belief.predict(X)[1] == pytest.approx(np.einsum("nd,de,ne->n", X, np.linalg.inv(belief.precision), X), rel=1e-10)


@each_prior
def test_beliefs_do_not_change(prior):
    before = numbers(prior).copy()
    update(prior, rows(8, 5), slice(None))
    assert np.array_equal(numbers(prior), before)
    name = "alpha" if isinstance(prior, BetaBernoulli) else "precision"
    with pytest.raises(ValueError, match="read-only"):
        getattr(prior, name)[0] = 9.0
    with pytest.raises(FrozenInstanceError):
        setattr(prior, name, np.ones(3))


def test_a_belief_keeps_its_own_copy():
    alpha = np.ones(2)
    belief = BetaBernoulli(alpha, np.ones(2))
    alpha[0] = 7.0
    assert belief.alpha.tolist() == [1.0, 1.0]


BETA, NORMAL, LINEAR = PRIORS.values()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: BETA.update([0, 1], [0.5, 1.5]), r"reward, entry 1: found 1.5; expected a reward in \[0, 1\]"),
        (lambda: BETA.update([0, 3], [0.5, 0.5]), r"action, entry 1: found 3; expected an index in 0..2"),
        (lambda: BETA.update([0, -1], [0.5, 0.5]), "entry 1: found -1"),
        (lambda: BETA.update([0.0], [0.5]), "found float64 of shape .1,.; expected integer indices"),
        (lambda: BETA.update([0, 1], [0.5]), r"reward: found shape \(1,\); expected \(2\)"),
        (lambda: NORMAL.update([0], [np.nan]), "reward, entry 0: found nan; expected finite numbers. Leave out"),
        (lambda: NORMAL.update([0], [1.0], [-1.0]), "weight, entry 0: found -1.0; expected a weight of at least 0"),
        (lambda: LINEAR.update([[1.0]], [1.0]), r"features: found shape \(1, 1\); expected \(any, 2\)"),
        (lambda: LINEAR.update([[1.0, 2.0], [1.0, np.inf]], [1.0, 1.0]), r"features, entry 1: found \[ 1. inf\]; expected finite"),
        (lambda: LINEAR.predict([1.0, 2.0, 3.0]), r"features: found shape \(3,\); expected \(\.\.\., 2\)"),
        (lambda: BETA.discount(1.5), r"discount: found factor 1.5; expected one number in \[0, 1\], or one per action"),
        (lambda: LINEAR.discount(np.array([0.5, 0.5])), "expected one number"),
        (lambda: BETA.merge(BetaBernoulli.prior(K)), "merge: found prior_alpha 2.0 and 1.0; expected one"),
        (lambda: BETA.merge(BetaBernoulli.prior(2, 2.0, 0.5)), "BetaBernoulli of 3 and BetaBernoulli of 2"),
        (lambda: BETA.merge(NORMAL), "BetaBernoulli of 3 and NormalMean of 3"),
        (lambda: LINEAR.merge(BayesianLinear.prior(D, 0.7, 1.0)), "found noise_variance 0.5 and 1.0"),
        (lambda: BetaBernoulli.prior(2, alpha=0.0), r"BetaBernoulli\(prior_alpha=0.0\): expected a finite number above 0"),
        (lambda: NormalMean.prior(2, noise_variance=np.inf), "noise_variance=inf"),
        (lambda: NormalMean.prior(0), "found k = 0; expected at least 1"),
        (lambda: BetaBernoulli(np.array([1.0, -1.0]), np.ones(2)), "alpha, entry 1: found -1.0; expected a number above 0"),
        (lambda: BayesianLinear(np.array([[1.0, 2.0], [0.0, 1.0]]), np.zeros(2)), "differ from their mirror by 2"),
        (lambda: BayesianLinear(np.array([[1.0, 2.0], [2.0, 1.0]]), np.zeros(2)).mean(), "smallest eigenvalue of -1"),
    ],
)  # fmt: skip
def test_errors_say_what_was_found_and_expected(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()
