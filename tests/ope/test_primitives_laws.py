"""Laws that the papers prove about weights, term columns and baselines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ope.primitives import baselines, terms, weights

WEIGHTS = arrays(np.float64, 6, elements=st.floats(0.01, 50))
REWARDS = arrays(np.float64, 6, elements=st.floats(-5, 5))
GAINS = arrays(np.float64, 6, elements=st.floats(0, 5))
CHANCES = arrays(np.float64, 6, elements=st.floats(0.01, 1)).map(lambda x: x / x.sum())
STRENGTH = st.floats(0.05, 100)
LOG_RATIOS = arrays(np.float64, (3, 4), elements=st.floats(-4, 4))
MASKS = arrays(np.bool_, (3, 4))

close = np.testing.assert_allclose


@given(pi=CHANCES, p=CHANCES, f=REWARDS)
def test_importance_weights_change_the_measure(pi: np.ndarray, p: np.ndarray, f: np.ndarray) -> None:
    w = weights.importance(pi, p)
    close(p @ w, 1.0, rtol=1e-12)
    close(p @ (w * f), pi @ f, atol=1e-12)


@given(pi=CHANCES, p=CHANCES)
def test_ratios_of_logs_are_importance_weights_and_invert(pi: np.ndarray, p: np.ndarray) -> None:
    close(weights.ratio(np.log(pi), np.log(p)), pi / p, rtol=1e-12)
    np.testing.assert_array_equal(weights.log_ratio(np.log(pi), np.log(p)), -weights.log_ratio(np.log(p), np.log(pi)))
    close(weights.ratio(np.log(pi), np.log(p)) * weights.ratio(np.log(p), np.log(pi)), 1.0, rtol=1e-12)


@given(logp=arrays(np.float64, 4, elements=st.floats(-500, 0)), behavior=arrays(np.float64, 4, elements=st.floats(-500, 0)))
def test_every_ratio_stays_within_exp_of_20(logp: np.ndarray, behavior: np.ndarray) -> None:
    assert np.all(np.abs(weights.log_ratio(logp, behavior)) <= 20)
    for found in (weights.ratio(logp, behavior), weights.per_decision(logp - behavior)):
        assert np.all((found >= np.exp(-20.0)) & (found <= np.exp(20.0)))


@given(pi=CHANCES, p=CHANCES, q=GAINS, high=st.floats(0.1, 20))
def test_clipping_costs_exactly_the_clipped_share(pi: np.ndarray, p: np.ndarray, q: np.ndarray, high: float) -> None:
    # bias of clipped IPS = -E_pi[(1 - L/w)+ q]
    w = pi / p
    bias = p @ (weights.clip(w, high=high) * q) - pi @ q
    close(bias, -pi @ (np.maximum(1 - high / w, 0) * q), atol=1e-12)
    np.testing.assert_array_equal(weights.clip(w), w)


@given(pi=CHANCES, p=CHANCES, q=REWARDS, threshold=st.floats(0.1, 20))
def test_switch_splits_the_value_between_weights_and_model(pi: np.ndarray, p: np.ndarray, q: np.ndarray, threshold: float) -> None:
    w = pi / p
    trusted = weights.switch(w, threshold)
    close(p @ (w * trusted * q) + pi @ (q * (1 - trusted)), pi @ q, atol=1e-12)
    np.testing.assert_array_equal(weights.truncate(w, threshold), w * trusted)
    np.testing.assert_array_equal(weights.truncate(w, np.inf), w)


@given(w=WEIGHTS, strength=STRENGTH)
def test_shrunk_weights_peak_at_half_the_root_of_the_strength(w: np.ndarray, strength: float) -> None:
    top = np.sqrt(strength)
    assert np.all(weights.shrink(w, strength) <= top / 2 * (1 + 1e-12))
    close(weights.shrink(np.array([top]), strength), [top / 2], rtol=1e-12)
    assert np.all(weights.shrink(top * np.array([0.9, 1.1]), strength) < top / 2)


@given(w=WEIGHTS)
def test_shrinkage_runs_from_nothing_to_the_whole_weight(w: np.ndarray) -> None:
    np.testing.assert_array_equal(weights.shrink(w, 0.0), np.zeros(6))
    np.testing.assert_array_equal(weights.shrink(w, np.inf), w)
    path = [weights.shrink(w, strength) for strength in (0.1, 1.0, 10.0, 1e3, 1e9)]
    assert np.all(np.diff(path, axis=0) > 0)
    close(path[-1], w, rtol=50**2 / 1e9)  # w - shrink(w) = w³/(w² + L) <= w·w²/L


@given(w=WEIGHTS, strength=st.floats(0.01, 1))
def test_saturated_weight_is_a_harmonic_mean_with_one(w: np.ndarray, strength: float) -> None:
    found = weights.saturate(w, strength)
    close(1 / found, (1 - strength) / w + strength, rtol=1e-12)
    assert np.all(found <= 1 / strength * (1 + 1e-12))
    np.testing.assert_array_equal(weights.saturate(w, 0.0), w)


@given(pi=CHANCES, mu=CHANCES, advantage=REWARDS, temperature=st.floats(0.5, 5))
def test_exp_advantage_solves_the_kl_regularised_problem(
    pi: np.ndarray, mu: np.ndarray, advantage: np.ndarray, temperature: float
) -> None:
    # max over pi of E_pi[A] - T·KL(pi|mu) is T·log E_mu[exp(A/T)], reached at pi = mu·exp(A/T)/E_mu[exp(A/T)]
    w = weights.exp_advantage(advantage, temperature)
    best = mu * w / (mu @ w)

    def objective(policy: np.ndarray) -> float:
        return float(policy @ advantage - temperature * policy @ np.log(policy / mu))

    close(objective(best), temperature * np.log(mu @ w), atol=1e-11)
    assert objective(best) >= objective(pi) - 1e-11


@given(log_ratios=LOG_RATIOS)
def test_per_decision_weights_are_running_products(log_ratios: np.ndarray) -> None:
    found = weights.per_decision(log_ratios)
    close(found, np.cumprod(np.exp(log_ratios), axis=-1), rtol=1e-12)
    everything = np.ones(log_ratios.shape, dtype=bool)
    close(found[:, -1], weights.sequence_ratio(log_ratios, everything, length_normalized=False), rtol=1e-12)


@given(log_ratios=LOG_RATIOS, mask=MASKS)
def test_sequence_ratio_is_the_length_normalised_one_to_the_power_of_the_length(log_ratios: np.ndarray, mask: np.ndarray) -> None:
    whole = weights.sequence_ratio(log_ratios, mask, length_normalized=False)
    each = weights.sequence_ratio(log_ratios, mask, length_normalized=True)
    close(whole, each ** mask.sum(-1), rtol=1e-12)
    close(whole, np.prod(np.exp(log_ratios), axis=-1, where=mask), rtol=1e-12)


@given(logp=arrays(np.float64, (4, 1), elements=st.floats(-9, 0)), behavior=arrays(np.float64, (4, 1), elements=st.floats(-9, 0)))
def test_one_token_sequences_have_the_token_ratio(logp: np.ndarray, behavior: np.ndarray) -> None:
    token = weights.ratio(logp, behavior)[:, 0]
    for normalised in (True, False):
        found = weights.sequence_ratio(logp - behavior, np.ones((4, 1), dtype=bool), length_normalized=normalised)
        close(found, token, rtol=1e-12)


@given(w=WEIGHTS, scale=st.floats(1e-3, 1e3))
def test_effective_sample_size_lies_between_one_and_n_and_ignores_scale(w: np.ndarray, scale: float) -> None:
    found = weights.effective_sample_size(w)
    assert 1 - 1e-12 <= found <= 6 + 1e-12
    close(weights.effective_sample_size(scale * w), found, rtol=1e-12)
    close(weights.effective_sample_size(np.full(6, scale)), 6.0, rtol=1e-12)
    close(weights.effective_sample_size(np.array([0.0, scale, 0.0])), 1.0, rtol=1e-12)


@given(pi=CHANCES, p=CHANCES, q=REWARDS, model=REWARDS)
def test_ips_and_dr_are_exact_in_expectation_whatever_the_model(
    pi: np.ndarray, p: np.ndarray, q: np.ndarray, model: np.ndarray
) -> None:
    value, v = pi @ q, np.full(6, pi @ model)
    close(p @ terms.ips(pi / p, q), [value], atol=1e-11)
    close(p @ terms.dr(pi / p, q, model, v), [value], atol=1e-11)
    means = p @ terms.sndr(pi / p, q, model, v)
    close(means[0] + means[1] / means[2], value, atol=1e-11)


@given(w=WEIGHTS, r=REWARDS, v=REWARDS)
def test_doubly_robust_columns_reduce_to_their_parts(w: np.ndarray, r: np.ndarray, v: np.ndarray) -> None:
    nothing = np.zeros(6)
    np.testing.assert_array_equal(terms.dr(w, r, nothing, nothing), terms.ips(w, r))
    np.testing.assert_array_equal(terms.sndr(w, r, nothing, nothing)[:, 1:], terms.snips(w, r))
    np.testing.assert_array_equal(terms.dr(nothing, r, r - 1, v), terms.dm(v))  # no weight: the model alone
    np.testing.assert_array_equal(terms.dr(w, r, r, v), terms.dm(v))  # exact model, no noise: the model's value


@given(w=WEIGHTS, r=REWARDS, q=REWARDS, v=REWARDS, shift=st.floats(-5, 5))
def test_a_shift_of_the_rewards_moves_self_normalised_values_by_itself(
    w: np.ndarray, r: np.ndarray, q: np.ndarray, v: np.ndarray, shift: float
) -> None:
    def snips(reward: np.ndarray) -> float:
        num, den = terms.snips(w, reward).mean(0)
        return float(num / den)

    def sndr(reward: np.ndarray, model: np.ndarray, value: np.ndarray) -> float:
        mean, num, den = terms.sndr(w, reward, model, value).mean(0)
        return float(mean + num / den)

    close(snips(r + shift) - snips(r), shift, atol=1e-11)
    close(sndr(r + shift, q + shift, v + shift) - sndr(r, q, v), shift, atol=1e-11)
    close(terms.dr(w, r + shift, q + shift, v + shift) - terms.dr(w, r, q, v), shift, atol=1e-11)
    close(terms.ips(w, r + shift).mean() - terms.ips(w, r).mean(), shift * w.mean(), atol=1e-11)


@given(p=CHANCES, r=REWARDS)
def test_the_logging_policy_is_worth_its_mean_reward(p: np.ndarray, r: np.ndarray) -> None:
    w = weights.importance(p, p)
    close(terms.ips(w, r).mean(), r.mean(), atol=1e-14)
    close(terms.snips(w, r).mean(0), [r.mean(), 1.0], atol=1e-14)
    close(terms.implicit_exploration(p, p, r, 0.0).mean(), r.mean(), atol=1e-14)


@given(w=WEIGHTS, r=GAINS, strength=st.floats(0.01, 2))
def test_log_smoothing_is_a_lower_ips_that_grows_back_to_it(w: np.ndarray, r: np.ndarray, strength: float) -> None:
    ips, found = terms.ips(w, r), terms.log_smoothing(w, r, strength)
    assert np.all(found <= ips + 1e-12)
    assert np.all(found <= terms.log_smoothing(w, r, strength / 2) + 1e-12)
    assert np.all(ips - terms.log_smoothing(w, r, 1e-9) <= 1e-9 * ips**2 / 2 + 1e-12)  # x - log(1 + l·x)/l <= l·x²/2
    middle = terms.log_smoothing((w + 1) / 2, r, strength)
    assert np.all(middle >= (found + terms.log_smoothing(np.ones(6), r, strength)) / 2 - 1e-12)  # concave in the weight


@given(pi=CHANCES, p=CHANCES, r=GAINS, floor=st.floats(0.01, 1))
def test_implicit_exploration_falls_from_ips_as_its_floor_rises(pi: np.ndarray, p: np.ndarray, r: np.ndarray, floor: float) -> None:
    ips = terms.implicit_exploration(pi, p, r, 0.0)
    close(ips, terms.ips(pi / p, r), rtol=1e-12)
    low, high = terms.implicit_exploration(pi, p, r, floor), terms.implicit_exploration(pi, p, r, 2 * floor)
    assert np.all((high <= low) & (low <= ips))
    close(low, ips * (p / (p + floor))[:, None], rtol=1e-12, atol=1e-300)  # subnormal numbers have no twelve digits


@given(w=WEIGHTS, r=REWARDS)
def test_the_best_baseline_is_the_regression_of_wr_on_w(w: np.ndarray, r: np.ndarray) -> None:
    w = w + np.arange(6) * 10  # weights that vary
    found = baselines.optimal_control_variate(*terms.control_variate(w, r).mean(0))
    cov = np.cov(w, w * r)
    close(found, cov[0, 1] / cov[0, 0], rtol=1e-9, atol=1e-9)
    least = np.var(w * r - found * w)
    assert all(least <= np.var(w * r - (found + step) * w) + 1e-9 for step in (-1.0, -0.1, 0.1, 1.0))


@pytest.mark.parametrize("constant", [0.0, 0.7, 1.0, 3.0])
@given(r=REWARDS)
def test_weights_that_do_not_vary_need_no_baseline(constant: float, r: np.ndarray) -> None:
    assert baselines.optimal_control_variate(*terms.control_variate(np.full(6, constant), r).mean(0)) == 0


def test_rounding_in_the_means_is_not_taken_for_variation() -> None:
    # w = .7 in every row, E[w²] a hundred units in the last place too high: cov/var would be noise over noise, about 0.75
    w, wr, w2, w2r = (np.asarray(x) for x in (0.7, 0.35, 0.49 * (1 + 2e-14), 0.245 * (1 + 3e-14)))
    assert w2 > w * w
    assert baselines.optimal_control_variate(w, wr, w2, w2r) == 0


def test_delta_columns_cancel_for_equal_policies_and_centre_for_others() -> None:
    pi, rho, p = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6]), np.array([0.2, 0.3, 0.5])
    q = np.array([1.0, 2.0, 4.0])
    means = p @ terms.control_variate((pi - rho) / p, q)
    close(means[:2], [0.0, 0.7 + 0.4 + 0.4 - (0.1 + 0.6 + 2.4)], atol=1e-12)  # E[dw] = 0; V(pi) - V(rho) = 1.5 - 3.1
    np.testing.assert_array_equal(terms.control_variate((pi - pi) / p, q), np.zeros((3, 4)))


GROUPS = arrays(np.int64, 6, elements=st.integers(0, 2))
COUNTED = arrays(np.bool_, 6)


@given(r=REWARDS, group=GROUPS, mask=COUNTED)
def test_leave_one_out_is_the_centred_reward_times_m_over_m_minus_one(r: np.ndarray, group: np.ndarray, mask: np.ndarray) -> None:
    centred, loo = baselines.group_center(r, group, mask), baselines.leave_one_out(r, group, mask)
    for label in range(3):
        rows = mask & (group == label)
        m = rows.sum()
        close(centred[rows], r[rows] - r[rows].sum() / max(m, 1), atol=1e-12)
        close(loo[rows], centred[rows] * m / (m - 1) if m > 1 else np.zeros(m), atol=1e-12)
    assert not centred[~mask].any()
    assert not loo[~mask].any()


@given(r=REWARDS, group=GROUPS, mask=COUNTED, shift=st.floats(-5, 5))
def test_advantages_sum_to_zero_and_ignore_shifts_and_names_of_groups(
    r: np.ndarray, group: np.ndarray, mask: np.ndarray, shift: float
) -> None:
    names = np.array([40, -7, 11])
    for baseline in (baselines.group_center, baselines.leave_one_out):
        found = baseline(r, group, mask)
        close([found[group == label].sum() for label in range(3)], np.zeros(3), atol=1e-12)
        close(baseline(r + shift * (group + 1), names[group], mask), found, atol=1e-12)


@given(r=REWARDS, own=st.floats(-5, 5))
def test_the_leave_one_out_baseline_does_not_look_at_its_own_reward(r: np.ndarray, own: float) -> None:
    group, everyone = np.zeros(6, dtype=int), np.ones(6, dtype=bool)
    changed = np.concatenate([[own], r[1:]])
    before, after = (baselines.leave_one_out(x, group, everyone)[0] for x in (r, changed))
    close(r[0] - before, own - after, atol=1e-12)
    close(r[0] - before, r[1:].mean(), atol=1e-12)
