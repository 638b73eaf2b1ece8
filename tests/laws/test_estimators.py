"""Every estimator against the reference log, the exact invariants, its own gradient and its influence function."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ope import DM, DR, ESTIMATORS, IPS, SNDR, SNIPS, BetaIPS, ClippedIPS, Delta, DRos, LoggedData, SwitchDR, evaluate
from ope.primitives import terms, weights

from .logs import Case, random_case, tiny, two_actions

ALL = [str(one) for one in ESTIMATORS]
BIG = 1e30


def reports(case: Case, *names, **options):
    return evaluate(case.data, case.target, case.q, baseline=case.baseline, estimators=names or ALL, **options)


def value(case: Case, name) -> float:
    return reports(case, name)[name].value


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DM", 0.525000), ("IPS", 0.625000), ("cIPS(1.5)", 0.600000), ("SNIPS", 0.510204), ("DR", 0.547500), ("SNDR", 0.543367),
        ("Switch-DR(1)", 0.567500), ("DRos(1)", 0.579179), ("beta-IPS", 0.632631),
    ],
)  # fmt: skip
def test_reference_log_gives_the_printed_value(name, expected):
    assert value(tiny(), name) == pytest.approx(expected, abs=5.1e-7)


def reference_rows():
    return tiny().rows()


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (lambda r: terms.implicit_exploration(tiny().target[:, 0], tiny().data.propensity, r.reward, 0.1), 0.527778),
        (lambda r: terms.log_smoothing(r.weight, r.reward, 0.5), 0.496626),
        (lambda r: terms.ips(weights.saturate(r.weight, 0.5), r.reward), 0.617216),
        (lambda r: terms.dr(weights.saturate(r.weight, 0.5), r.reward, r.q_logged, r.v), 0.601718),
    ],
    ids=["IX(.1)", "LS(.5)", "SG-IPS(.5)", "SG-DR(.5)"],
)
def test_reference_log_gives_the_printed_value_from_primitives(column, expected):
    assert column(reference_rows()).mean() == pytest.approx(expected, abs=5.1e-7)


def test_reference_weights_and_model_values_are_the_printed_ones():
    rows = reference_rows()
    assert rows.weight == pytest.approx([1.6, 2.4, 0.4, 0.5], rel=1e-15)
    assert rows.v == pytest.approx([0.55, 0.4, 0.5, 0.65], rel=1e-14)
    assert weights.effective_sample_size(rows.weight) == pytest.approx(2.750286, abs=5.1e-7)


def test_report_carries_the_effective_rows_and_the_mean_weight_of_the_reference_log():
    report = reports(tiny(), "IPS")
    assert report.weights.ess == pytest.approx(2.750286, abs=5.1e-7)
    assert report["IPS"].ess == report.weights.ess
    assert report.weights.weight_mean == pytest.approx(1.225, rel=1e-14)


@pytest.mark.parametrize(("name", "expected"), [("IPS", 0.117292), ("SNIPS", 0.122831)])
def test_reference_variance_uses_divisor_n_minus_1(name, expected):
    assert reports(tiny(), name)[name].stderr ** 2 == pytest.approx(expected, abs=5.1e-7)


def test_reference_snips_variance_with_divisor_n_is_three_quarters():
    assert reports(tiny(), "SNIPS")["SNIPS"].stderr ** 2 * 3 / 4 == pytest.approx(0.092123, abs=5.1e-7)


def test_three_forms_of_the_best_constant_differ_on_the_reference_log():
    rows = reference_rows()
    w, wr, w2, w2r = terms.control_variate(rows.weight, rows.reward).mean(axis=0)
    assert (w2r - wr) / (w2 - w) == pytest.approx(0.122715, abs=5.1e-7)
    assert wr - (w2r - wr) / (w2 - w) * (w - 1) == pytest.approx(0.597389, abs=5.1e-7)
    assert (w2r - wr) / (w2 - 1) == pytest.approx(0.099366, abs=5.1e-7)
    shipped = (wr - BetaIPS().value(np.array([w, wr, w2, w2r]))) / (w - 1)
    assert shipped == pytest.approx(-0.033914, abs=5.1e-7), "the covariance form is the one in use"


# Invariant 1: the logging policy itself


@pytest.mark.parametrize("name", ["IPS", "SNIPS", "beta-IPS"])
def test_logging_policy_is_worth_the_plain_mean(name):
    case = random_case(400, 4, 1, shift=3.0)
    for target in ("logging", case.data.propensities, case.data.propensity):
        got = evaluate(case.data, target, estimators=[name])[name]
        assert got.value == pytest.approx(case.data.reward.mean(), abs=1e-12)
        assert got.stderr == pytest.approx(case.data.reward.std(ddof=1) / 20, rel=1e-10)


def test_logging_policy_beats_itself_by_nothing():
    case = random_case(400, 4, 2)
    got = evaluate(case.data, "logging", baseline="logging", estimators=["Delta"])["Delta"]
    assert (got.value, got.stderr, got.low, got.high) == (0, 0, 0, 0)
    same = evaluate(case.data, case.target, baseline=case.target, estimators=["Delta"])["Delta"]
    assert (same.value, same.stderr) == (0, 0)


@pytest.mark.parametrize("name", ["DR", "SNDR"])
def test_model_that_knows_the_action_moves_the_plain_mean(name):
    case = replace(tiny(), target=tiny().baseline)
    moved = case.data.reward.mean() + ((case.baseline * case.q).sum(axis=1) - case.q[:, 0]).mean()
    assert value(case, name) == pytest.approx(moved, abs=1e-14)
    assert value(case, name) == pytest.approx(0.713542, abs=5.1e-7)
    blind = replace(case, q=np.repeat(case.q[:, :1], 2, axis=1))
    assert value(blind, name) == pytest.approx(0.75, abs=1e-12)


def test_delta_is_the_difference_of_ips_less_a_constant_times_the_mean_change_of_weight():
    case = random_case(500, 3, 3, shift=1.0)
    rows = case.rows()
    change = rows.weight - case.baseline[np.arange(500), case.data.action] / case.data.propensity
    b = np.cov(change, change * rows.reward)[0, 1] / change.var(ddof=1)
    both = [value(replace(case, target=policy), "IPS") for policy in (case.target, case.baseline)]
    assert value(case, "Delta") == pytest.approx(both[0] - both[1] - b * change.mean(), abs=1e-12)


def test_delta_changes_sign_with_the_order_of_the_policies():
    case = random_case(500, 3, 4)
    assert value(replace(case, target=case.baseline, baseline=case.target), "Delta") == pytest.approx(
        -value(case, "Delta"), rel=1e-12
    )


# Invariant 2: limits of the parameters


@pytest.mark.parametrize(
    ("kind", "infinite", "zero"),
    [(ClippedIPS, "IPS", None), (SwitchDR, "DR", "DM"), (DRos, "DR", "DM")],
)
def test_parameter_spans_from_no_weights_to_all_of_them(kind, infinite, zero):
    case = random_case(300, 4, 5)
    assert value(case, kind(math.inf)) == pytest.approx(value(case, infinite), abs=1e-14)
    assert value(case, kind(BIG)) == pytest.approx(value(case, infinite), rel=1e-12)
    assert value(case, kind(0.0)) == pytest.approx(0.0 if zero is None else value(case, zero), abs=1e-14)


def test_switch_keeps_a_weight_that_equals_its_threshold():
    by_hand = 0.525 + (1.6 * 0.4 + 0.4 * 0.3 + 0.5 * 0.1) / 4  # of w = 1.6, 2.4, .4, .5 only the second is above 1.6
    assert value(tiny(), "Switch-DR(1.6)") == pytest.approx(by_hand, abs=1e-14)


def test_smoothed_forms_start_from_ips():
    rows, case = reference_rows(), tiny()
    assert terms.implicit_exploration(case.target[:, 0], case.data.propensity, rows.reward, 0.0).mean() == pytest.approx(0.625)
    assert terms.log_smoothing(rows.weight, rows.reward, 1e-9).mean() == pytest.approx(0.625, abs=5e-7)
    assert terms.ips(weights.saturate(rows.weight, 0.0), rows.reward).mean() == pytest.approx(0.625, abs=1e-15)


def test_shrunk_weight_peaks_at_half_the_root_of_its_strength():
    grid = np.linspace(0, 50, 500_001)
    shrunk = weights.shrink(grid, 9.0)
    assert shrunk.max() == pytest.approx(1.5, rel=1e-12)
    assert grid[shrunk.argmax()] == pytest.approx(3.0, abs=1e-4)


# Invariant 3: a constant added to rewards and model


@pytest.mark.parametrize("name", ["SNIPS", "SNDR", "DR", "DM", "beta-IPS", "Switch-DR(1)", "DRos(1)"])
@pytest.mark.parametrize("c", [-2.0, 0.5, 100.0])
def test_shift_of_rewards_and_model_moves_the_value_by_as_much(name, c):
    for case in (tiny(), random_case(200, 5, 6)):
        moved = replace(case, data=replace(case.data, reward=case.data.reward + c), q=case.q + c)
        assert value(moved, name) - value(case, name) == pytest.approx(c, abs=1e-11)


def test_shift_of_rewards_moves_ips_by_the_mean_weight_and_delta_not_at_all():
    case = tiny()
    moved = replace(case, data=replace(case.data, reward=case.data.reward + 3.0))
    assert value(moved, "IPS") - value(case, "IPS") == pytest.approx(3.0 * 1.225, abs=1e-13)
    assert value(moved, "Delta") == pytest.approx(value(case, "Delta"), abs=1e-13)


# Invariant 4: empty and perfect models


@pytest.mark.parametrize(("name", "without"), [("DR", "IPS"), ("SNDR", "SNIPS")])
def test_model_of_zeros_leaves_the_weights_alone(name, without):
    case = replace(random_case(300, 4, 7), q=np.zeros((300, 4)))
    pair = reports(case, name, without)
    assert pair[name].value == pytest.approx(pair[without].value, abs=1e-14)
    assert pair[name].stderr == pytest.approx(pair[without].stderr, rel=1e-12)


@pytest.mark.parametrize("name", ["DR", "SNDR", "Switch-DR", "DRos"])
def test_perfect_model_without_noise_leaves_the_mean_value_of_the_contexts(name):
    case = random_case(300, 4, 8)
    exact = replace(case, data=replace(case.data, reward=case.q[np.arange(300), case.data.action]))
    values = (case.target * case.q).sum(axis=1)
    got = reports(exact, name)[name]
    assert got.value == pytest.approx(values.mean(), abs=1e-14)
    assert got.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(300), rel=1e-10)


# Invariant 5: pessimism for rewards of at least 0


@given(seed=st.integers(0, 10_000), strength=st.floats(1e-3, 10), floor=st.floats(1e-3, 2))
def test_log_smoothing_and_added_floors_stay_below_ips(seed, strength, floor):
    case = random_case(50, 3, seed)
    w, r = case.rows().weight, np.abs(case.data.reward)
    ips = terms.ips(w, r)
    assert np.all(terms.log_smoothing(w, r, strength) < ips)
    taken, p = case.target[np.arange(50), case.data.action], case.data.propensity
    low, high = (terms.implicit_exploration(taken, p, r, g) for g in (floor, 2 * floor))
    assert np.all(high < low), "more floor, less value"
    assert np.all(low < ips)
    assert np.all(terms.ips(weights.clip(w, high=2.0), r) <= ips)


@given(strength=st.floats(0.01, 10), reward=st.floats(0.01, 5))
def test_log_smoothing_is_concave_in_the_weight(strength, reward):
    w = np.linspace(0, 20, 41)
    smoothed = terms.log_smoothing(w, np.full(41, reward), strength)[:, 0]
    assert np.all(np.diff(smoothed, 2) < 0)
    assert np.all(np.diff(smoothed) > 0)


# Weights that do not vary


def test_equal_weights_leave_no_constant_to_choose():
    data = LoggedData(action=np.zeros(4, dtype=int), reward=np.array([1.0, 0, 1, 1]), propensity=np.full(4, 0.5))
    report = evaluate(data, two_actions([0.4] * 4), baseline=two_actions([0.2] * 4), estimators=["IPS", "beta-IPS", "Delta"])
    assert report["beta-IPS"].value == pytest.approx(0.6, abs=1e-15), "b = 0, so the value is that of IPS"
    assert report["beta-IPS"].stderr == pytest.approx(report["IPS"].stderr, rel=1e-12)
    assert report["Delta"].value == pytest.approx(0.3, abs=1e-15)
    assert report.weights.weight_z == 0


def test_weights_of_one_have_no_z():
    case = random_case(100, 3, 9)
    report = evaluate(case.data, "logging")
    assert (report.weights.weight_z, report.weights.weight_mean, report.weights.ess) == (0, 1, 100)


# Derivatives


def mean_terms(one, seed: int, n: int = 40, shift: float = 0.5) -> np.ndarray:
    return one.terms(random_case(n, 3, seed, shift=shift).rows()).mean(axis=0)


def central_differences(one, mean: np.ndarray) -> np.ndarray:
    steps = 1e-5 * np.maximum(np.abs(mean), 0.1)
    ups, downs = mean + np.diag(steps), mean - np.diag(steps)
    return (one.value(ups) - one.value(downs)) / (2 * steps)


@pytest.mark.parametrize("one", ESTIMATORS, ids=str)
@given(seed=st.integers(0, 100_000), shift=st.floats(-5, 5))
def test_gradient_is_the_slope_of_the_value(one, seed, shift):
    mean = mean_terms(one, seed, shift=shift)
    slope = central_differences(one, mean)
    assert one.gradient(mean) == pytest.approx(slope, rel=1e-6, abs=1e-6 * (1 + np.abs(slope).max()))


@pytest.mark.parametrize("one", ESTIMATORS, ids=str)
def test_value_of_many_means_is_the_value_of_each(one):
    means = np.stack([mean_terms(one, seed) for seed in range(6)]).reshape(2, 3, -1)
    looped = [[float(one.value(mean)) for mean in row] for row in means]
    assert one.value(means).shape == (2, 3)
    assert one.value(means) == pytest.approx(np.array(looped), rel=1e-15)


# Influence functions


def influence(name: str, case: Case) -> np.ndarray:
    rows = case.rows()
    w, r, v, e = rows.weight, rows.reward, rows.v, rows.reward - rows.q_logged
    if name == "IPS":
        return w * r
    if name == "SNIPS":
        centre = (w * r).sum() / w.sum()
        return centre + w / w.mean() * (r - centre)
    if name == "DR":
        return v + w * e
    centre = (w * e).sum() / w.sum()
    return v + w / w.mean() * (e - centre) + centre


@pytest.mark.parametrize("one", [IPS(), SNIPS(), DR(), SNDR()], ids=str)
@given(seed=st.integers(0, 100_000), n=st.integers(5, 200), shift=st.floats(-3, 3))
def test_standard_error_is_that_of_the_influence_function(one, seed, n, shift):
    case = random_case(n, 3, seed, shift=shift)
    psi, got = influence(str(one), case), reports(case, one)[one]
    assert got.value == pytest.approx(psi.mean(), rel=1e-10, abs=1e-12)
    assert got.stderr == pytest.approx(psi.std(ddof=1) / math.sqrt(n), rel=1e-10)


def test_standard_error_of_delta_is_that_of_its_influence_function_in_large_logs():
    case = random_case(40_000, 3, 10, shift=2.0)
    change, r = case.rows().weight_change, case.data.reward
    b = (change**2 * r).mean() / (change**2).mean()
    psi = change * (r - b)
    assert reports(case, Delta())[Delta()].stderr == pytest.approx(psi.std(ddof=1) / 200, rel=5e-3)


def test_standard_error_of_the_model_alone_is_the_spread_of_its_values():
    case = random_case(100, 3, 11)
    assert reports(case, DM())[DM()].stderr == pytest.approx(case.rows().v.std(ddof=1) / 10, rel=1e-12)
