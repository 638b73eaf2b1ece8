"""Every diagnostic against what it should find, and every threshold on both sides."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from ope import ESTIMATORS, LoggedData, evaluate
from ope.accumulate import check_log
from ope.diagnostics import Diagnostics, LogChecks, Thresholds, calibration, hill_tail_index, judge
from ope.simulate import sample_actions, softmax

from .logs import Case, random_case

ALL = [str(one) for one in ESTIMATORS]
GOOD_WEIGHTS = Diagnostics(
    n=10_000, ess=5000.0, weight_mean=1.01, weight_z=0.5, constant=False, max_share=0.001,
    reward_low=0.0, reward_high=1.0, tail_index=5.0,
)  # fmt: skip
GOOD_LOG = LogChecks(
    n=10_000, inverse_mean=3.01, eligible_mean=3.0, inverse_z=0.3, calibration_p=0.4, vector_gap=0.0, estimated=False
)  # fmt: skip


def verdict(weight=None, log=None, **options):
    changed_weight, changed_log = replace(GOOD_WEIGHTS, **(weight or {})), replace(GOOD_LOG, **(log or {}))
    return judge(changed_log, changed_weight, Thresholds(), **options)


def reports(case: Case, **options):
    return evaluate(case.data, case.target, case.q, baseline=case.baseline, estimators=ALL, **options)


# Hill's tail index


@pytest.mark.parametrize("alpha", [0.8, 1.5, 2.0, 4.0])
def test_hill_index_finds_the_exponent_of_pareto_weights(alpha):
    weight = 1 + np.random.default_rng(1).pareto(alpha, 100_000)
    assert hill_tail_index(weight) == pytest.approx(alpha, rel=4 / math.sqrt(5000)), "four standard errors of 5,000 tail weights"


def test_hill_index_is_the_mean_log_excess_over_the_next_weight():
    weight = np.exp(np.arange(400) / 100.0)
    assert hill_tail_index(np.random.default_rng(2).permutation(weight)) == pytest.approx(100 / np.arange(1, 21).mean(), rel=1e-9)


def test_hill_index_has_no_units_and_skips_weights_of_zero():
    weight = 1 + np.random.default_rng(3).pareto(1.5, 4000)
    index = hill_tail_index(weight)
    assert hill_tail_index(50 * weight) == pytest.approx(index, rel=1e-12)
    assert hill_tail_index(np.concatenate((weight, np.zeros(8000)))) == index


@pytest.mark.parametrize("weight", [np.ones(1000), np.full(1000, 1 / 3), np.zeros(100), np.arange(1.0, 100.0)])
def test_hill_index_is_infinite_without_a_tail(weight):
    assert hill_tail_index(weight) == math.inf


# Thresholds, just inside and just outside


def test_good_log_is_trusted_without_a_reason():
    assert verdict() == ("trust", ())


@pytest.mark.parametrize(
    ("inside", "outside", "level", "reason"),
    [
        ({"ess": 200.0}, {"ess": 199.0}, "caution", "199 effective rows of 10,000"),
        ({"n": 100_000, "ess": 1000.0}, {"n": 100_000, "ess": 999.0}, "caution", "999 effective rows of 100,000"),
        ({"max_share": 0.05}, {"max_share": 0.0501}, "caution", "One row carries 5.0% of all weight"),
        ({"tail_index": 2.0}, {"tail_index": 1.99}, "caution", "tail index 1.99"),
        ({"weight_z": 4.0}, {"weight_z": 4.01}, "refused", "where 1 is expected"),
        ({"weight_z": -4.0}, {"weight_z": -4.01}, "refused", "where 1 is expected"),
        ({"n": 2}, {"n": 1}, "refused", "no standard error"),
        ({"reward_low": 0.999}, {"reward_low": 1.0}, "refused", "is 1: nothing varies"),
        (
            {"weight_z": 0.0, "constant": True, "weight_mean": 1 + 1e-7},
            {"weight_z": 0.0, "constant": True, "weight_mean": 1.1},
            "refused",
            "equal 1.1",
        ),
    ],
)
def test_weights_cross_one_threshold_at_a_time(inside, outside, level, reason):
    assert verdict(inside) == ("trust", ())
    found, reasons = verdict(outside)
    assert found == level
    assert len(reasons) == 1
    assert reason in reasons[0]


@pytest.mark.parametrize(
    ("caution", "refused"),
    [
        ({"ess": 500.0}, {"ess": 499.0}),
        ({"max_share": 0.02}, {"max_share": 0.0201}),
        ({"ess": 5000.0, "max_share": 0.001}, {"ess": 250.0, "max_share": 0.04}),
    ],
)
def test_heavy_tail_is_refused_only_where_few_rows_carry_it(caution, refused):
    assert verdict({"tail_index": 1.2, **caution})[0] == "caution", "bounded weights read low too"
    level, reasons = verdict({"tail_index": 1.2, **refused})
    assert level == "refused"
    assert "variance looks infinite" in reasons[0]
    assert verdict({"tail_index": 2.1, **refused})[0] == "trust", "without the tail neither number matters"


FOUR_SIGMA = math.erfc(4 / math.sqrt(2))  # 6.3e-5


@pytest.mark.parametrize(
    ("inside", "outside", "level", "reason"),
    [
        ({"inverse_z": 4.0}, {"inverse_z": 4.01}, "refused", "logged propensities are too small"),
        ({"inverse_z": -4.0}, {"inverse_z": -4.01}, "caution", "never sampled"),
        ({"calibration_p": FOUR_SIGMA * 1.01}, {"calibration_p": FOUR_SIGMA * 0.99}, "refused", "not drawn"),
        ({"vector_gap": 1e-6}, {"vector_gap": 1.01e-6}, "refused", "A/A fails"),
        ({"estimated": False}, {"estimated": True}, "caution", "estimated, not logged"),
        ({"calibration_p": math.nan, "vector_gap": math.nan, "inverse_z": math.nan}, {"inverse_z": 9.0}, "refused", "too small"),
    ],
)
def test_log_crosses_one_threshold_at_a_time(inside, outside, level, reason):
    assert verdict(log=inside) == ("trust", ())
    found, reasons = verdict(log=outside)
    assert found == level
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_no_overlap_is_refused():
    level, reasons = verdict(
        {"ess": 0.0, "weight_mean": 0.0, "weight_z": 0.0, "max_share": 1.0, "reward_low": math.nan, "reward_high": math.nan}
    )
    assert level == "refused"
    assert "No overlap" in reasons[0]


def test_gravest_reason_comes_first():
    level, reasons = verdict({"ess": 150.0, "weight_z": 9.0}, {"estimated": True}, model_only=True)
    assert level == "refused"
    assert "where 1 is expected" in reasons[0]
    assert len(reasons) == 4


# The same through the front door


def good_case(n: int = 4000, seed: int = 1) -> Case:
    """Mild weights: what an estimate may be trusted on."""
    case = random_case(n, 3, seed)
    mixed, other = (0.8 * case.data.propensities + 0.2 * policy for policy in (case.target, case.baseline))
    return replace(case, target=mixed, baseline=other)


def test_mild_weights_on_a_right_log_are_trusted_by_all_but_the_model():
    report = reports(good_case())
    assert {one.verdict for name, one in report.items() if name != "DM"} == {"trust"}
    assert report["DM"].verdict == "caution"
    assert "Model only" in report["DM"].reasons[0]
    assert not report.refused


@pytest.mark.parametrize("name", ["Switch-DR(0)", "Switch-DR(10)", "DRos(0.1)", "cIPS(5)"])
def test_an_estimator_that_gives_up_most_of_the_weight_is_caution_whatever_else_was_asked_for(name):
    rng = np.random.default_rng(0)
    action = rng.integers(0, 20, 12_000)
    log = LoggedData(action=action, reward=np.where(action == 0, 0.6, 0.1) > rng.random(12_000), propensity=np.full(12_000, 0.05))
    greedy = np.tile(np.eye(20)[0], (12_000, 1))  # weights are 0 or 20
    report = evaluate(log, greedy, np.full((12_000, 20), 0.3), estimators=[name])
    assert list(report) == [name]
    assert report[name].verdict == "caution"
    assert any("gives up" in reason for reason in report[name].reasons)
    assert any("do not meet" in reason for reason in report[name].reasons)  # IPS and SNIPS bear witness unasked


@pytest.mark.parametrize(
    ("clusters", "verdict_found"), [(2, "refused"), (4, "refused"), (5, "caution"), (39, "caution"), (40, "trust")]
)
def test_few_clusters_are_not_trusted(clusters, verdict_found):
    rng = np.random.default_rng(1)
    data = LoggedData(rng.integers(0, 2, 4000), rng.random(4000), np.full(4000, 0.5), cluster=np.arange(4000) % clusters)
    assert evaluate(data, np.tile([0.4, 0.6], (4000, 1)), estimators=["SNIPS"])["SNIPS"].verdict == verdict_found


def test_one_cluster_says_so_and_not_that_weights_are_equal():
    rng = np.random.default_rng(1)
    data = LoggedData(rng.integers(0, 2, 4000), rng.random(4000), np.full(4000, 0.5), cluster=np.zeros(4000))
    reasons = " ".join(evaluate(data, np.tile([0.4, 0.6], (4000, 1)))["IPS"].reasons)
    assert "1 cluster: no interval holds" in reasons
    assert "All weights" not in reasons


def test_an_interval_that_is_not_finite_is_refused():
    rng = np.random.default_rng(2)
    data = LoggedData(rng.integers(0, 10, 30), rng.random(30), np.full(30, 0.1))
    report = evaluate(data, np.tile(np.eye(10)[data.action[0]], (30, 1)), estimators=["SNIPS"], interval="bootstrap")
    assert not np.isfinite(report["SNIPS"].low)  # a resample without that action has no SNIPS value
    assert report["SNIPS"].verdict == "refused"
    assert "no finite interval" in report["SNIPS"].reasons[-1]


def test_estimated_propensities_are_at_most_caution():
    case = good_case()
    report = reports(replace(case, data=replace(case.data, propensity_estimated=True)))
    assert {one.verdict for one in report.values()} == {"caution"}
    assert all("estimated" in " ".join(one.reasons) for one in report.values())


def test_rewards_of_zero_are_refused_with_the_value_zero():
    case = good_case()
    silent = replace(case, data=replace(case.data, reward=np.zeros(4000)), q=np.zeros((4000, 3)))
    report = reports(silent)
    assert report.refused
    for one in report.values():
        assert (one.value, one.stderr, one.verdict) == (0, 0, "refused")
        assert "Every reward that" in one.reasons[0]
        assert "is 0" in one.reasons[0]
        assert one.to_record()["value"] is None
        assert one.to_record(force=True)["value"] == 0


def test_rewards_that_vary_only_where_the_target_never_goes_are_refused():
    case = good_case()
    never = case.data.action == 2
    target = case.target * [1, 1, 0]
    reward = np.where(never, case.data.reward, 1.0)
    report = evaluate(replace(case.data, reward=reward), target / target.sum(axis=1, keepdims=True), estimators=["SNIPS"])
    assert report["SNIPS"].value == pytest.approx(1.0, rel=1e-14)
    assert report["SNIPS"].stderr < 1e-12, "without the refusal this would pass for certainty"
    assert report.refused


def scaled(case: Case, factor: float) -> Case:
    """Wrong propensities, with nothing else in the log to give them away."""
    wrong = np.minimum(factor * case.data.propensity, 1.0)
    return replace(case, data=replace(case.data, propensity=wrong, propensities=None))


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_wrong_propensities_are_refused_by_every_estimator(factor):
    assert reports(scaled(good_case(), 1.0))["IPS"].verdict == "trust"
    report = reports(scaled(good_case(), factor))
    assert report.refused
    assert all("where 1 is expected" in " ".join(one.reasons) for one in report.values())
    assert (report.weights.weight_mean > 1) == (factor < 1)


def test_propensities_of_one_in_place_of_the_unknown_are_refused():
    case = good_case()
    report = reports(replace(case, data=replace(case.data, propensity=np.ones(4000), propensities=None)))
    assert report.refused


def test_weights_of_a_target_that_was_never_logged_are_refused():
    data = LoggedData(action=np.zeros(300, dtype=int), reward=np.arange(300.0), propensity=np.full(300, 0.5))
    report = evaluate(data, np.tile([0.0, 1.0], (300, 1)), estimators=["IPS"])
    assert report.refused
    assert (report["IPS"].value, report.weights.ess) == (0, 0)
    assert "No overlap" in " ".join(report["IPS"].reasons)


def test_difference_is_judged_by_the_weights_of_both_policies():
    case = good_case()
    rare = np.zeros((4000, 3))
    rare[np.arange(4000), case.data.propensities.argmin(axis=1)] = 1.0
    taken = (case.data.action == rare.argmax(axis=1)).astype(float) / case.data.propensity
    assert taken.sum() ** 2 / (taken**2).sum() < 700, "the baseline has few effective rows"
    thresholds = Thresholds(ess=700.0)
    report = evaluate(case.data, case.target, baseline=rare, estimators=["IPS", "Delta"], thresholds=thresholds)
    assert report["IPS"].verdict == "trust"
    assert report["Delta"].verdict == "caution"
    assert "effective rows of 4,000" in " ".join(report["Delta"].reasons)


def test_consistent_estimates_that_do_not_meet_warn_each_other():
    case = good_case()
    report = evaluate(case.data, case.target, case.q + 5, estimators=["DM", "IPS", "SNIPS"])
    assert "do not meet" in " ".join(report["DM"].reasons)
    assert report["IPS"].verdict == "trust", "a wrong model does not discredit the weights"


def test_z_of_the_mean_weight_respects_clusters():
    case = good_case(400)
    copies = case.take(np.repeat(np.arange(400), 10))
    clustered = replace(copies, data=replace(copies.data, cluster=np.repeat(np.arange(400), 10)))
    once, tenfold = reports(case).weights, reports(clustered).weights
    assert tenfold.weight_z == pytest.approx(once.weight_z, rel=1e-9)
    assert abs(reports(copies).weights.weight_z) == pytest.approx(abs(once.weight_z) * math.sqrt(10), rel=2e-3)


def test_a_constant_propensity_that_is_wrong_needs_no_sampling_error_to_be_found():
    action = np.arange(50) % 5
    for propensity, z, verdict_found in ((0.1, math.inf, "refused"), (0.2, 0.0, "caution"), (0.4, -math.inf, "refused")):
        data = LoggedData(action=action, reward=action / 4, propensity=np.full(50, propensity))
        report = evaluate(data, np.tile([0.6, 0.1, 0.1, 0.1, 0.1], (50, 1)), estimators=["IPS"])
        assert report.log.inverse_z == z
        assert report["IPS"].verdict == verdict_found  # 50 rows are caution at best; at 0.4 weights average 0.5


def test_mean_of_inverse_propensities_is_the_number_of_eligible_actions():
    case = random_case(20_000, 4, 3)
    log = check_log(case.data, 4)
    inverse = 1 / case.data.propensity
    assert log.inverse_mean == pytest.approx(inverse.mean(), rel=1e-12)
    assert log.inverse_z == pytest.approx((inverse.mean() - 4) / (inverse.std(ddof=1) / math.sqrt(20_000)), rel=1e-9)
    assert abs(log.inverse_z) < 4
    assert check_log(scaled(case, 0.8).data, 4).inverse_z > 4
    assert check_log(scaled(case, 1.2).data, 4).inverse_z < -4


# A/A


def test_logging_policy_of_a_whole_vector_log_is_worth_exactly_the_plain_mean():
    data = good_case().data
    for target in ("logging", data.propensities):
        report = evaluate(data, target, estimators=["IPS", "SNIPS"])
        assert report["IPS"].value == pytest.approx(data.reward.mean(), abs=1e-12)
        assert report["SNIPS"].value == pytest.approx(data.reward.mean(), abs=1e-12)
        assert (report.log.vector_gap, report.weights.weight_z, report.weights.weight_mean) == (0, 0, 1)
        assert report["IPS"].verdict == "trust"


def test_vector_that_is_not_the_logged_propensity_is_refused():
    data = good_case().data
    one = data.propensity.copy()
    one[17] *= 1 - 1e-4
    report = evaluate(replace(data, propensity=one), data.propensities)
    assert report.log.vector_gap == pytest.approx(1e-4, rel=1e-3)
    assert report.refused
    assert "A/A fails" in " ".join(report["IPS"].reasons)


# Calibration


def vectors(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    return softmax(1.5 * rng.normal(size=(n, 1)) * np.linspace(-1, 1, k) + 0.3 * rng.normal(size=(n, k)))


def p_values(distort, logs: int, n: int = 800, k: int = 5) -> np.ndarray:
    rng, found = np.random.default_rng(4), []
    for _ in range(logs):
        true = vectors(n, k, rng)
        found.append(calibration(sample_actions(true, rng), distort(true)))
    return np.array(found)


def test_calibration_of_right_vectors_is_uniform():
    found = p_values(lambda true: true, 200)
    assert kstest(found, "uniform").pvalue > 0.01
    assert 0.02 <= np.mean(found < 0.1) <= 0.2


def test_calibration_of_wrong_vectors_is_tiny():
    tilt = np.linspace(0.6, 1.6, 5)
    found = p_values(lambda true: true * tilt / (true * tilt).sum(axis=1, keepdims=True), 20)
    assert found.max() < 1e-6


def test_calibration_of_equal_rows_is_the_textbook_chi_square():
    rng = np.random.default_rng(5)
    p = np.array([0.1, 0.2, 0.3, 0.4])
    action = rng.choice(4, 500, p=p)
    expected = chisquare(np.bincount(action, minlength=4), 500 * p).pvalue
    assert calibration(action, np.tile(p, (500, 1))) == pytest.approx(expected, rel=1e-9)


def test_calibration_of_certain_actions_has_nothing_to_test():
    assert calibration(np.zeros(10, dtype=int), np.tile([1.0, 0.0], (10, 1))) == 1


def test_uncalibrated_vectors_are_refused_although_weights_agree_with_them():
    rng = np.random.default_rng(6)
    true = vectors(3000, 4, rng)
    action = sample_actions(true, rng)
    tilted = true * np.array([0.8, 0.9, 1.1, 1.2])
    claimed = tilted / tilted.sum(axis=1, keepdims=True)
    reward = rng.random(3000)
    data = LoggedData(action=action, reward=reward, propensity=claimed[np.arange(3000), action], propensities=claimed)
    report = evaluate(data, "logging")
    assert report.weights.weight_mean == 1
    assert report.log.calibration_p < 1e-6
    assert report.refused
    assert "not drawn from the logged vectors" in " ".join(report["IPS"].reasons)
