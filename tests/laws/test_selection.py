"""SharpeRatio@k against its published tables, and live shortlists against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm, spearmanr
from sklearn.metrics import mean_squared_error

from ope import InputError, LoggedData
from ope.data import assign_folds
from ope.selection import Shortlist, halves, near_duplicates, ranking, regret_at_k, select, sharpe_ratio_at_k, top_k
from ope.simulate import softmax

from .logs import random_case

TRUE = np.array([1.0, 3, 4, 5, 6, 7, 8, 9, 10, 12])
X, Y = TRUE.copy(), TRUE.copy()
X[[7, 8]], Y[[1, 2]] = 2, 11
TRUE2 = np.arange(1.0, 20)
W = np.where(TRUE2 <= 10, TRUE2 - 0.5, 20 - TRUE2)
Z = np.array([5.0, 11, 14, 17, 15, 3, 10, 4, 1, 19, 12, 7, 2, 18, 13, 8, 9, 6, 16])
DIGITS = 5.1e-5


def ratios(estimated, *, ddof=1, tie="last", true=TRUE, baseline=8.0):
    return [sharpe_ratio_at_k(estimated, true, baseline, k, ddof, tie=tie) for k in range(2, len(true) + 1)]


def portfolios(estimated, tie="last", **options):
    return [top_k(estimated, TRUE, 8.0, k, tie=tie, **options) for k in range(1, 11)]


# Example 1


@pytest.mark.parametrize("estimated", [X, Y], ids="XY")
def test_conventional_metrics_cannot_tell_the_first_two_estimators_apart(estimated):
    assert mean_squared_error(TRUE, estimated) == pytest.approx(11.3)
    assert spearmanr(TRUE, estimated).statistic == pytest.approx(0.413376, abs=5.1e-7)
    assert regret_at_k(estimated, TRUE, 3, tie="last") == 0


@pytest.mark.parametrize(
    ("estimated", "order"), [(X, [12, 8, 7, 6, 5, 4, 3, 10, 9, 1]), (Y, [12, 4, 3, 10, 9, 8, 7, 6, 5, 1])], ids="XY"
)
def test_later_index_first_gives_the_published_order(estimated, order):
    assert TRUE[ranking(estimated, tie="last")].tolist() == order


@pytest.mark.parametrize(
    ("estimated", "ddof", "expected"),
    [
        (X, 1, [1.4142, 1.5119, 1.5209, 1.4805, 1.4142, 1.3369, 1.3139, 1.3631, 1.1853]),
        (X, 0, [2.0000, 1.8516, 1.7562, 1.6552, 1.5492, 1.4440, 1.4046, 1.4458, 1.2494]),
        (Y, 1, [0.7071, 0.8109, 0.9039, 1.0226, 1.1421, 1.2472, 1.3242, 1.3631, 1.1853]),
    ],
    ids=["X figure", "X formula", "Y figure"],
)
def test_first_example_gives_the_published_ratios(estimated, ddof, expected):
    assert ratios(estimated, ddof=ddof) == pytest.approx(expected, abs=DIGITS)


def test_first_example_gives_the_published_spread():
    expected = [2.8284, 2.6458, 2.6300, 2.7019, 2.8284, 2.9921, 3.0443, 2.9345, 3.3747]
    assert [p.std for p in portfolios(X)[1:]] == pytest.approx(expected, abs=DIGITS)


def test_other_order_of_ties_moves_one_ratio_only():
    y, x = ratios(Y, tie="first"), ratios(X, tie="first")
    assert y[0] == pytest.approx(0.6285, abs=DIGITS)
    assert y[1:] == pytest.approx(ratios(Y)[1:], rel=1e-12)
    assert x[6] == pytest.approx(1.3720, abs=DIGITS)
    assert x[:6] + x[7:] == pytest.approx(ratios(X)[:6] + ratios(X)[7:], rel=1e-12)


@pytest.mark.parametrize(
    ("estimated", "worst"), [(X, [12, 8, 7, 6, 5, 4, 3, 3, 3, 1]), (Y, [12, 4, 3, 3, 3, 3, 3, 3, 3, 1])], ids="XY"
)
def test_first_example_gives_the_published_best_and_worst(estimated, worst):
    assert [p.worst for p in portfolios(estimated)] == worst
    assert [p.best for p in portfolios(estimated)] == [12] * 10


def test_first_example_gives_the_published_violations():
    expected = [0, 0, 1 / 3, 1 / 2, 0.6, 2 / 3, 5 / 7, 5 / 8, 5 / 9, 0.6]
    assert [p.violation for p in portfolios(X)] == pytest.approx(expected, rel=1e-15)
    assert top_k(X, TRUE, 8.0, 2, tie="last").violation == 0, "a value at the threshold is no violation"
    assert [p.violation for p in portfolios(X, threshold=7.5)][2] == pytest.approx(1 / 3)


# Example 2


@pytest.mark.parametrize(("estimated", "mse", "correlation"), [(W, 60.1316, 0.0789), (Z, 58.6316, 0.0228)], ids=["W", "Z"])
def test_conventional_metrics_prefer_neither_of_the_second_two_estimators(estimated, mse, correlation):
    assert mean_squared_error(TRUE2, estimated) == pytest.approx(mse, abs=DIGITS)
    assert spearmanr(TRUE2, estimated).statistic == pytest.approx(correlation, abs=DIGITS)
    assert regret_at_k(estimated, TRUE2, 1) == 9


def test_second_example_gives_the_published_orders():
    assert TRUE2[ranking(W)][:6].tolist() == [10, 11, 9, 12, 8, 13]
    assert TRUE2[ranking(Z)].tolist() == [10, 14, 4, 19, 5, 3, 15, 11, 2, 7, 17, 16, 12, 18, 1, 8, 6, 13, 9]


@pytest.mark.parametrize(
    ("baseline", "estimated", "expected"),
    [
        (5, W, [8.4853, 6.0000, 5.4222, 4.4272, 3.3029, 3.0509, 2.4879]),
        (5, Z, [3.1820, 1.7881, 2.2067, 2.2332, 2.4412, 2.3505, 2.4879]),
        (10, W, [1.4142, 1.0000, 1.5492, 1.2649, 1.6514, 1.6641, 1.5993]),
        (10, Z, [1.4142, 0.7947, 1.4186, 1.4356, 1.5693, 1.5110, 1.5993]),
        (15, W, [0, 0, 0, 0, 0, 0.2774, 0.7108]),
        (15, Z, [0, 0, 0.6305, 0.6381, 0.6975, 0.6716, 0.7108]),
    ],
)
def test_second_example_gives_the_published_ratios(baseline, estimated, expected):
    got = [sharpe_ratio_at_k(estimated, TRUE2, baseline, k) for k in (2, 3, 4, 5, 10, 12, 19)]
    assert got == pytest.approx(expected, abs=DIGITS)


def test_second_example_changes_its_winner_with_the_baseline():
    lead = {b: np.subtract(ratios(W, true=TRUE2, baseline=b), ratios(Z, true=TRUE2, baseline=b)) for b in (5, 10, 15)}
    assert np.all(lead[5][:17] > 0)
    assert np.abs(lead[10]).max() <= 0.2055  # printed as .205
    assert lead[10].min() < 0 < lead[10].max()
    assert lead[15][:2].tolist() == [0, 0]
    assert np.all(lead[15][2:16] < 0)
    assert lead[15][16] == pytest.approx(0.058, abs=5.1e-4)


# Invariants 3 to 6

values = st.lists(st.integers(-50, 50), min_size=2, max_size=8, unique=True).map(lambda v: np.array(v, dtype=float))


@given(true=values, seed=st.integers(0, 1000), baseline=st.integers(-60, 60))
def test_ratio_of_all_candidates_depends_on_no_estimator(true, seed, baseline):
    a, b = np.random.default_rng(seed).normal(size=(2, len(true)))
    k = len(true)
    assert sharpe_ratio_at_k(a, true, baseline, k) == pytest.approx(sharpe_ratio_at_k(b, true, baseline, k), rel=1e-12)


@given(true=values, seed=st.integers(0, 1000), baseline=st.integers(-60, 60), scale=st.floats(0.1, 50), shift=st.floats(-20, 20))
def test_ratio_has_no_units_and_sees_only_the_order_of_the_estimates(true, seed, baseline, scale, shift):
    estimated = np.random.default_rng(seed).normal(size=len(true))
    for k in range(2, len(true) + 1):
        ratio = sharpe_ratio_at_k(estimated, true, baseline, k)
        moved = sharpe_ratio_at_k(estimated, scale * true + shift, scale * baseline + shift, k)
        assert moved == pytest.approx(ratio, rel=1e-9, abs=1e-9)
        assert sharpe_ratio_at_k(np.exp(3 * estimated), true, baseline, k) == ratio


@given(true=values, seed=st.integers(0, 1000), baseline=st.integers(-60, 60))
def test_ratio_is_zero_exactly_where_nothing_beats_the_baseline(true, seed, baseline):
    estimated = np.random.default_rng(seed).normal(size=len(true))
    found = [top_k(estimated, true, baseline, k) for k in range(1, len(true) + 1)]
    for one in found[1:]:
        assert one.sharpe_ratio >= 0
        assert (one.sharpe_ratio == 0) == (one.best <= baseline)
    assert np.all(np.diff([one.best for one in found]) >= 0)
    assert np.all(np.diff([one.worst for one in found]) <= 0)
    assert found[-1].mean == pytest.approx(true.mean(), abs=1e-12)


@pytest.mark.parametrize(("ddof", "factor"), [(1, math.sqrt(2)), (0, 2.0)])
def test_two_candidates_have_a_closed_form(ddof, factor):
    assert sharpe_ratio_at_k([1, 2], [3.0, 7.5], 2.0, 2, ddof) == pytest.approx(factor * 5.5 / 4.5, rel=1e-12)


# Edges


def test_one_candidate_has_no_spread_and_no_ratio():
    alone = top_k(X, TRUE, 8.0, 1)
    assert (alone.std, alone.sharpe_ratio, alone.best, alone.candidates) == (None, None, 12, (9,))
    assert sharpe_ratio_at_k(X, TRUE, 8.0, 1) is None
    assert sharpe_ratio_at_k(X, TRUE, 8.0, 1, tie="average") is None


def test_zero_spread_gives_the_cap_or_nothing():
    for gain, cap, expected in ((1.0, math.inf, math.inf), (1.0, 100.0, 100.0), (0.0, 100.0, 0.0), (-1.0, 100.0, 0.0)):
        assert sharpe_ratio_at_k([2, 1], [5.0, 5.0], 5.0 - gain, 2, cap=cap) == expected
    assert sharpe_ratio_at_k([0, 1, 2], [0.1, 0.1, 0.1], 0.05, 3) == math.inf  # their computed spread is 2e-17


def test_cap_bounds_near_duplicates_too():
    assert sharpe_ratio_at_k([2, 1], [5.0, 5.0 + 1e-9], 4.0, 2, cap=100.0) == 100
    assert sharpe_ratio_at_k([2, 1], [5.0, 5.0 + 1e-9], 4.0, 2) > 1e8


def test_average_over_ties_is_the_mean_of_every_choice():
    true = np.array([9.0, 1, 4, 6, 2])
    estimated = np.array([5.0, 3, 3, 3, 1])
    by_hand = [(9 - 3) / np.std([9, other], ddof=1) for other in (1, 4, 6)]
    assert sharpe_ratio_at_k(estimated, true, 3.0, 2, tie="average") == pytest.approx(np.mean(by_hand), rel=1e-12)
    for k in (4, 5):
        assert sharpe_ratio_at_k(estimated, true, 3.0, k, tie="average") == pytest.approx(
            sharpe_ratio_at_k(estimated, true, 3.0, k), rel=1e-12
        ), "no tie is cut at this place"
    assert sharpe_ratio_at_k(Y, TRUE, 8.0, 2, tie="average") == pytest.approx((0.7071 + 0.6285) / 2, abs=DIGITS)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_ranking_is_by_estimate_then_index(estimated):
    by_hand = sorted(range(len(estimated)), key=lambda i: (-estimated[i], i))
    assert ranking(estimated).tolist() == by_hand
    assert ranking(estimated, tie="last").tolist() == sorted(range(len(estimated)), key=lambda i: (-estimated[i], -i))


def test_ranking_rejects_what_has_no_order():
    with pytest.raises(ValueError, match="finite"):
        ranking([1.0, math.nan])
    with pytest.raises(ValueError, match="k=4"):
        top_k([1, 2, 3], [1, 2, 3], 0.0, 4)


@pytest.mark.parametrize(("k", "regret"), [(1, 9), (2, 8), (4, 7), (19, 0)])
def test_regret_is_the_best_missed(k, regret):
    assert regret_at_k(W, TRUE2, k) == regret


def test_near_duplicates_name_the_better_twin_and_the_distance():
    flat = np.full((10, 4), 0.25)
    nudged, other = flat + np.array([0.004, -0.004, 0, 0]), flat + np.array([0.1, -0.1, 0, 0])
    targets = {"a": flat, "b": nudged, "c": other}
    assert near_duplicates(targets, ["a", "b", "c"]) == {"b": ("a", pytest.approx(0.004))}
    assert near_duplicates(targets, ["c", "b", "a"]) == {"a": ("b", pytest.approx(0.004))}
    assert near_duplicates(targets, ["a", "b", "c"], tolerance=0.003) == {}
    assert set(near_duplicates(targets, ["a", "b", "c"], tolerance=0.11)) == {"b", "c"}


# Live shortlists

N = 4000
DRAWS = 200_000


def two_policy_log(seed: int = 1) -> tuple[LoggedData, dict[str, np.ndarray]]:
    """Six actions logged evenly; policies a and b act on two actions each, so their estimates share no weighted row."""
    rng = np.random.default_rng(seed)
    action = rng.integers(0, 6, N)
    reward = 0.1 + np.array([0.9, 0.9, 0.86, 0.86, 0.02, 0.02])[action] + rng.normal(size=N)
    data = LoggedData(action=action, reward=reward, propensity=np.full(N, 1 / 6), propensities=np.full((N, 6), 1 / 6))
    rows = np.eye(6)
    policies = {"a": (rows[0] + rows[1]) / 2, "b": (rows[2] + rows[3]) / 2}
    return data, {label: np.tile(policy, (N, 1)) for label, policy in policies.items()}


def fold_b(data: LoggedData, targets, order, seed: int = 0) -> np.ndarray:
    """Influence columns w·r of the candidates, and r of the logging policy, on fold B."""
    rows = np.flatnonzero(assign_folds(data, 2, seed) == 1)
    columns = [(targets[label][np.arange(N), data.action] / data.propensity * data.reward)[rows] for label in order]
    return np.stack((*columns, data.reward[rows]), axis=1)


def test_values_and_covariance_are_those_of_the_other_fold():
    data, targets = two_policy_log()
    got = select(data, targets, by="IPS", sizes=(2,))
    psi = fold_b(data, targets, got.ranking)
    assert got.values == pytest.approx(psi.mean(axis=0)[:2], rel=1e-12)
    assert got.baseline == pytest.approx(psi.mean(axis=0)[2], rel=1e-12)
    assert got.covariance == pytest.approx(np.cov(psi.T) / len(psi), rel=1e-9)


def shortlist(threshold: float | None = None) -> tuple[Shortlist, np.ndarray, np.ndarray]:
    """A shortlist of two with the mean and covariance of its posterior, both computed here from the rows of fold B."""
    data, targets = two_policy_log()
    got = select(data, targets, by="IPS", sizes=(2,), draws=DRAWS, threshold=threshold)
    psi = fold_b(data, targets, got.ranking)
    return got.shortlists[0], psi.mean(axis=0), np.cov(psi.T) / len(psi)


def test_gain_of_two_candidates_is_the_expected_maximum():
    short, mean, cov = shortlist()
    lift = np.array([[1, 0, -1], [0, 1, -1]])
    m, s = lift @ mean, lift @ cov @ lift.T
    theta = math.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])
    alpha = (m[0] - m[1]) / theta
    expected = m[0] * norm.cdf(alpha) + m[1] * norm.cdf(-alpha) + theta * norm.pdf(alpha)
    assert m.min() > 5 * math.sqrt(s.max()), "the baseline is out of reach, so that no gain is clipped"
    assert expected > m.max() + 0.1 * theta, "the maximum of two is worth more than either"
    assert short.gain == pytest.approx(expected, abs=4 * math.sqrt(s.max() / DRAWS))


def test_spread_of_two_candidates_is_a_folded_normal():
    short, mean, cov = shortlist()
    d, s = mean[0] - mean[1], math.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    folded = s * math.sqrt(2 / math.pi) * math.exp(-(d**2) / (2 * s**2)) + d * (1 - 2 * norm.cdf(-d / s))
    assert short.std == pytest.approx(folded / math.sqrt(2), abs=4 * s / math.sqrt(2 * DRAWS))


def test_harm_of_two_candidates_is_a_normal_probability():
    _, mean, cov = shortlist()
    c = float(mean[:2].mean() - 0.8 * math.sqrt(cov[0, 0]))
    short, mean, cov = shortlist(c)
    safe = multivariate_normal(-mean[:2], cov[:2, :2]).cdf(np.full(2, -c))
    below = norm.cdf((c - mean[:2]) / np.sqrt(np.diag(cov)[:2]))
    error = 4 * 0.5 / math.sqrt(DRAWS)
    assert 0.1 < below.min() < below.max() < 0.9
    assert short.p_any_harm == pytest.approx(1 - safe, abs=error)
    assert short.violation == pytest.approx(below.mean(), abs=error)


def near_baseline():
    """The same log with a baseline about as good as the candidates: shortlist, and mean and covariance of the two lifts."""
    data, targets = two_policy_log()
    close = replace(data, reward=data.reward + 0.95 * (data.action >= 4))
    got = select(close, targets, by="IPS", sizes=(2,), draws=DRAWS)
    psi, lift = fold_b(close, targets, got.ranking), np.array([[1, 0, -1], [0, 1, -1]])
    return got.shortlists[0], lift @ psi.mean(axis=0), lift @ (np.cov(psi.T) / len(psi)) @ lift.T


def test_harm_against_the_baseline_uses_the_joint_draw():
    short, m, s = near_baseline()
    below, error = norm.cdf(-m / np.sqrt(np.diag(s))), 4 * 0.5 / math.sqrt(DRAWS)
    assert 0.05 < below.mean() < 0.95
    assert short.violation == pytest.approx(below.mean(), abs=error)
    assert short.p_any_harm == pytest.approx(1 - multivariate_normal(-m, s).cdf(np.zeros(2)), abs=error)


def test_gain_below_the_baseline_counts_as_none():
    short, m, s = near_baseline()
    joint, top = multivariate_normal(m, s), float(m.max() + 8 * math.sqrt(s.max()))
    grid = np.linspace(0, top, 801)
    exceeds = 1 - np.array([joint.cdf(np.full(2, t)) for t in grid])  # E[max(a, b, 0)] = integral of P(max(a, b) > t)
    assert short.gain == pytest.approx(np.trapezoid(exceeds, grid), abs=4 * math.sqrt(s.max() / DRAWS))
    assert short.gain > 1.05 * m.max(), "the clip matters here"


def many_policies(seed: int = 2):
    case = random_case(2000, 5, seed)
    rng = np.random.default_rng(seed)
    targets = {f"p{i}": np.tile(rng.dirichlet(np.ones(5)), (2000, 1)) for i in range(6)}
    return case, targets


def changed_on(case, side: int):
    rows = np.flatnonzero(assign_folds(case.data, 2, 0) == side)
    reward = case.data.reward.copy()
    reward[rows] += np.random.default_rng(3).normal(size=len(rows)) * 5
    return replace(case.data, reward=reward)


@pytest.mark.parametrize("by", ["IPS", "SNIPS", "DR"])
def test_fold_that_chooses_never_values(by):
    case, targets = many_policies()
    before = select(case.data, targets, q=case.q, by=by)
    choice = select(changed_on(case, 0), targets, q=case.q, by=by)
    assert dict(zip(choice.ranking, choice.values, strict=True)) == dict(zip(before.ranking, before.values, strict=True))
    assert not np.array_equal(choice.selected_on, before.selected_on)
    assert choice.baseline == before.baseline
    worth = select(changed_on(case, 1), targets, q=case.q, by=by)
    assert worth.ranking == before.ranking
    assert np.array_equal(worth.selected_on, before.selected_on)
    assert not np.array_equal(worth.values, before.values)
    assert np.all(np.diff(before.selected_on) <= 0)


def test_longer_shortlists_gain_more_and_risk_more():
    case, targets = many_policies()
    found = select(case.data, targets, q=case.q, sizes=(2, 3, 4, 5, 6, 7))
    assert [one.k for one in found.shortlists] == [2, 3, 4, 5, 6], "seven of six cannot be had"
    assert np.all(np.diff([one.gain for one in found.shortlists]) >= 0)
    assert np.all(np.diff([one.p_any_harm for one in found.shortlists]) >= 0)
    assert all(one.candidates == found.ranking[: one.k] for one in found.shortlists)
    assert found.knee in [one.k for one in found.shortlists]


def test_twin_leaves_the_ranking_and_is_reported():
    case, targets = many_policies()
    found = select(case.data, {**targets, "twin": targets["p0"]}, q=case.q)
    assert found.duplicates == {"twin": ("p0", 0.0)}, "equal estimates rank by index, so the later twin goes"
    assert "twin" not in found.ranking
    assert len(found.ranking) == 6


# What `select` refuses, blocks and doubts


def test_choosing_looks_at_fold_a_alone():
    rng = np.random.default_rng(5)
    data, targets, q = _rare_reward_log(rng)
    before = select(data, targets, q=q)
    fold_b = halves(data)[1]
    changed = data.reward.copy()
    changed[fold_b] = rng.permutation(changed[fold_b])  # other rewards on fold B
    after = select(replace(data, reward=changed), targets, q=q)
    assert (after.ranking, after.blocked, after.duplicates) == (before.ranking, before.blocked, before.duplicates)
    np.testing.assert_array_equal(after.selected_on, before.selected_on)
    assert not np.array_equal(after.values, before.values)


def test_a_candidate_with_few_effective_rows_is_blocked_and_one_refused_on_b_is_named():
    data, targets, q = _rare_reward_log(np.random.default_rng(5))
    lonely = np.zeros((data.n, 40))
    lonely[:, 0] = 1.0  # one action of forty: about 50 rows of fold A
    assert "lonely" in select(data, targets | {"lonely": lonely}, q=q).blocked
    silent = replace(data, reward=np.where(np.isin(np.arange(data.n), halves(data)[1]), 0.0, data.reward))
    assert set(select(silent, targets, q=q).doubtful) == set(targets)  # no reward at all on fold B


@pytest.mark.parametrize(
    ("options", "said"),
    [({"by": "DR"}, "needs a reward model"), ({"by": "Delta"}, "an estimator of a value"), ({"q": 1, "one": True}, "at least two")],
)
def test_select_says_what_it_lacks(options, said):
    data, targets, q = _rare_reward_log(np.random.default_rng(5))
    if options.pop("one", False):
        targets = dict(list(targets.items())[:1])
    with pytest.raises(InputError, match=said):
        select(data, targets, **(options | ({"q": q} if "q" in options else {})))


def _rare_reward_log(rng):
    action = rng.integers(0, 40, 4000)
    data = LoggedData(action, (rng.random(4000) < 0.1).astype(float), np.full(4000, 1 / 40))
    targets = {f"tilt {t}": softmax(np.tile(t * np.linspace(0, 1, 40), (4000, 1))) for t in (0.5, 1.0, 2.0)}
    return data, targets, np.full((4000, 40), 0.1)


def test_misspelt_ties_and_missing_truths_are_errors():
    for call in (
        lambda: sharpe_ratio_at_k([1, 2], [1.0, 2.0], 0.0, 2, tie="lst"),
        lambda: sharpe_ratio_at_k([1, 2], [1.0, np.nan], 0.0, 2),
        lambda: sharpe_ratio_at_k([1, 2], [1.0, 2.0], 0.0, 2, ddof=2),
    ):
        with pytest.raises(InputError):
            call()
