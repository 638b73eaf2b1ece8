"""Wrong loggers are caught, right ones pass; bounds are what they say, and parts add to the whole."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ope.certificate import ALLOTTED, Examination, Usual, bernstein_p, examine, explain, squares_p
from ope.data import DataError, InputError
from ope.diagnostics import hill_tail_index
from ope.draws import Draws, Tally, tally
from ope.simulate import sample_actions
from pipelines.nightly.settings import Certificate
from pipelines.nightly.verdict import Judged, judge
from tests.nightly.certified_lakes import POINT
from tests.nightly.loggers import (
    COLUMNS,
    FLOOR,
    NAMES,
    WRONG,
    draws,
    fallback_as_sampled,
    greedy_fallback,
    right,
    rows_lost,
    rows_lost_evenly,
)

ALPHA = 0.01


def examined(day: Draws, floor: float = FLOOR) -> Examination:
    return examine(tally(day, floor), ALPHA, NAMES, COLUMNS)


def families(found: Examination) -> set[str]:
    return {one.family for one in found.findings if one.failed}


def test_shares_of_the_false_alarm_make_one():
    assert math.isclose(sum(ALLOTTED.values()), 1.0)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_logger_is_caught_in_every_of_twenty_days(name):
    caught = [families(examined(draws(WRONG[name](20_000, np.random.default_rng(seed))))) for seed in range(20)]
    assert all(caught), [len(found) for found in caught]


def test_a_greedy_fallback_of_three_percent_is_caught_on_every_other_day():
    """No test sees more: weights of the greedy policy, the likelihood ratio, are 3.6 standard deviations off; 3.7 are needed.

    Other tests see none of the 20 days at 3 %. At 5 % each of ten days is caught.
    """
    days = [families(examined(draws(greedy_fallback(20_000, np.random.default_rng(seed))))) for seed in range(20)]
    assert sum("greedy" in found for found in days) == 11
    assert not any(found - {"greedy"} for found in days)
    assert all("greedy" in families(examined(draws(greedy_fallback(20_000, np.random.default_rng(s), 0.05)))) for s in range(10))


def test_the_greedy_policys_weights_have_their_exact_variance():
    """The most probable action of 0.8 weighs 1.25, its variance is 1/0.8 - 1 = 0.25; of 0.5 twice, the first is meant: 2, and 1."""
    vectors = np.array([[0.2, 0.8]] * 400 + [[0.5, 0.5]] * 100)
    sums = tally(Draws.of(np.array([1] * 400 + [0] * 60 + [1] * 40), vectors))
    assert float(sums.sums["greedy"]) == pytest.approx(400 * 0.25 + 60 - 40)
    assert float(sums.sums["greedy_spread"]) == pytest.approx(400 * 0.25 + 100)
    found = examine(sums, ALPHA, ["a", "b"], []).worst("greedy")
    assert found is not None
    assert found.observed == pytest.approx(1 + 120 / 500)
    assert found.z == pytest.approx(120 / math.sqrt(200))
    assert found.p == pytest.approx(math.exp(-(120**2) / (2 * (200 + 120 / 3))) / 0.9)
    assert explain(found).startswith("The most probable action was taken more often than its propensities say")
    fewer = examine(tally(Draws.of(np.zeros(500, int), vectors)), ALPHA, ["a", "b"], []).worst("greedy")
    assert fewer is not None
    assert fewer.p == pytest.approx(math.exp(-(300**2) / (2 * (200 + 300 / 3))) / 0.1)
    assert explain(fewer).startswith("The most probable action was taken less often")


def test_one_conflicting_id_warns_and_two_fail_above_the_share():
    """0.1 % of 500 decisions is half a decision: one id is above it by chance, two are not. One of 5,000 is below it."""
    clean = {"outside": 0, "below_floor": 0, "replay_wrong": 0, "gaps": 0, "join_low": None, "join_high": None, "delivered": 0}
    tests = examine(tally(Draws.of(np.arange(100) % 2, np.full((100, 2), 0.5))), ALPHA, ["a", "b"], [])
    verdicts = {}
    for conflicts, rows in ((0, 500), (1, 499), (2, 498), (1, 4_999), (5, 4_995), (6, 4_994)):
        numbers = clean | {"conflicts": conflicts, "rows": rows, "vectors": 1.0}
        verdict, why = judge(Judged(numbers, tests, 0, False), Certificate(), POINT)
        verdicts[conflicts, rows + conflicts] = verdict
        assert all(one.startswith(f"{conflicts} of {rows + conflicts:,} decisions came with several contents") for one in why)
    assert verdicts == {
        (0, 500): "pass", (1, 500): "warn", (2, 500): "fail", (1, 5_000): "pass", (5, 5_000): "pass", (6, 5_000): "fail",
    }  # fmt: skip


def test_rows_lost_that_single_actions_do_not_show_are_caught_along_their_column():
    """Ten days of 40,000 rows; with 20,000 rows about two days in three are caught: no test of frequencies alone sees any."""
    for seed in range(10):
        found = examined(draws(rows_lost_evenly(40_000, np.random.default_rng(seed))))
        assert "columns" in families(found)
        assert not {"actions", "omnibus", "weights"} & families(found)


def test_a_right_logger_passes_every_of_twenty_days():
    assert not any(families(examined(draws(right(20_000, np.random.default_rng(seed))))) for seed in range(20))


def test_false_alarms_are_at_most_one_in_a_hundred():
    """Of 400 right days of 2,000 rows at most 4 are expected to fail; 10 or more would be below 1 % probable."""
    failed = sum(bool(families(examined(draws(right(2_000, np.random.default_rng(1000 + seed)))))) for seed in range(400))
    assert failed < 10


def test_thirty_rows_of_a_right_logger_never_fail_in_five_hundred_days():
    """A certificate that is normal theory alone would fail some: cells of one row with a propensity of 0.004 have z beyond 4."""
    found = [examined(draws(right(30, np.random.default_rng(5000 + seed)))) for seed in range(500)]
    assert sum(bool(families(one)) for one in found) == 0
    assert max(abs(each.z) for one in found for each in one.findings if not math.isnan(each.z)) > 4


def test_each_wrong_logger_is_named_by_what_it_does():
    rng = np.random.default_rng(0)
    lost = examined(draws(rows_lost(20_000, rng)))
    worst = lost.worst("contexts")
    assert worst is not None
    assert worst.name == "d along x0"
    assert worst.z < -10
    assert "Action d is taken too seldom where x0 is high" in explain(worst)
    fallen = examined(draws(fallback_as_sampled(20_000, rng))).worst("actions")
    assert fallen is not None
    assert fallen.name == "a"
    assert fallen.observed - fallen.expected == pytest.approx(0.03 * (1 - fallen.expected), rel=0.35)
    assert "Action a: " in explain(fallen)
    capped = examined(draws(WRONG["before the cap"](20_000, rng))).worst("caps")
    assert capped is not None
    assert explain(capped).startswith(f"Actions of a logged probability beyond {capped.name} are taken too seldom")


@pytest.mark.parametrize("name", WRONG)
def test_every_reason_is_a_sentence_that_says_what_to_do(name):
    found = examined(draws(WRONG[name](20_000, np.random.default_rng(3))))
    for one in found.findings:
        if one.failed:
            assert explain(one).endswith(".")
            assert "p = " in explain(one)


def test_bernstein_by_hand():
    """t = 30, V = 100, b = 1: 2 exp(-900 / (2 (100 + 10))) = 2 exp(-4.0909)."""
    assert bernstein_p(np.array([30.0]), np.array([100.0]), 1.0)[0] == pytest.approx(2 * math.exp(-900 / 220), rel=1e-14)
    assert bernstein_p(np.array([0.0, -1.0]), np.array([0.0, 100.0]), 1.0).tolist() == [1.0, 1.0]


def test_bernstein_holds_where_the_normal_does_not():
    """A sum of 300 rare events, expected 0.3: three or more happen 0.36 % of the time, where z = 4.9 says once in a million."""
    p, n = 0.001, 300
    exact = 1 - sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(3))
    bound = bernstein_p(np.array([3 - n * p]), np.array([n * p * (1 - p)]), 1.0)[0]
    assert exact == pytest.approx(0.0036, abs=2e-4)
    assert bound >= exact


def test_sums_of_squares_bound_what_they_say_and_still_see():
    """Of 4,000 sums of 200 skewed terms below 5 % have p <= 0.05; a shift of a fifth of a standard deviation is seen in 2,000."""
    rng = np.random.default_rng(2)
    terms = np.where(rng.random((4000, 200)) < 0.1, 0.9, -0.1)
    p = squares_p(terms.sum(axis=1), (terms**2).sum(axis=1), 1.0)
    assert (p <= 0.05).mean() < 0.05
    shifted = np.where(rng.random(2000) < 0.16, 0.9, -0.1)
    assert squares_p(np.array([shifted.sum()]), np.array([(shifted**2).sum()]), 1.0)[0] < 1e-4


def test_parts_add_to_the_whole():
    day = draws(right(3_000, np.random.default_rng(4)))
    day = replace(day, shown=np.random.default_rng(5).integers(-1, 2, 3_000))
    whole = tally(day, FLOOR)
    cut = [day.take(slice(0, 10)), day.take(slice(10, 10)), day.take(slice(10, 2_000)), day.take(slice(2_000, None))]
    parts = sum((tally(part, FLOOR) for part in cut), Tally())
    for kind in ("sums", "lows", "highs"):
        for name, value in getattr(whole, kind).items():
            np.testing.assert_allclose(getattr(parts, kind)[name], value, rtol=1e-10, atol=1e-9, err_msg=name)
    first, second = (examine(one, ALPHA, NAMES, COLUMNS) for one in (whole, parts))
    assert [one.p for one in second.findings] == pytest.approx([one.p for one in first.findings], rel=1e-7)


def test_the_tail_from_counts_is_the_tail_from_weights():
    day = draws(right(20_000, np.random.default_rng(6)))
    weight = 1 / (len(NAMES) * day.propensity)
    assert examined(day).tail == pytest.approx(hill_tail_index(weight), rel=0.03)
    assert examined(day).ess == pytest.approx(weight.sum() ** 2 / (weight**2).sum())


def test_the_uniform_policys_weights_have_their_exact_variance():
    """Two actions of 0.25 and 0.75: weights are 2 and 2/3, their variance (1/0.25 + 1/0.75) / 4 - 1 = 1/3."""
    vectors = np.tile([0.25, 0.75], (300, 1))
    action = np.arange(300) % 4 > 0
    found = examine(tally(Draws.of(action.astype(int), vectors)), ALPHA, ["a", "b"], []).worst("weights")
    assert found is not None
    assert (found.observed, found.z) == pytest.approx((1.0, 0.0), abs=1e-12)
    all_first = examine(tally(Draws.of(np.zeros(300, int), vectors)), ALPHA, ["a", "b"], []).worst("weights")
    assert all_first is not None
    assert all_first.z == pytest.approx(300 / math.sqrt(300 / 3))


def test_propensities_below_the_floor_and_actions_outside_their_set_are_counted():
    vectors = np.array([[0.5, 0.5, 0.0], [0.989, 0.01, 0.001], [0.5, 0.25, 0.25]])
    eligible = np.array([[True, True, False], [True, True, True], [True, True, True]])
    day = Draws.of(np.array([2, 0, 1]), vectors, eligible=eligible, propensity=np.array([0.5, 0.989, 0.25]))
    sums = tally(day, floor=0.02).sums  # 0.02 / 3 is more than 0.001
    assert (int(sums["rows"]), int(sums["outside"]), int(sums["below"])) == (2, 1, 1)
    rounded = Draws.of(np.array([0]), np.array([[1 - 0.01 + 1 / 2**31, 0.01 - 1 / 2**31]]))
    assert int(tally(rounded, floor=0.02).sums["below"]) == 0


def kept(day: Draws, rng: np.random.Generator, rate: np.ndarray) -> Draws:
    """A log of a log: each row kept with a probability that depends on its action, and says so."""
    probability = rate[day.action]
    return replace(day, pass_probability=probability).take(rng.random(len(probability)) < probability)


def test_a_log_that_was_sampled_by_action_is_weighted_back():
    rate = np.array([0.2, 0.9, 0.5, 1.0, 0.6])
    for seed in range(10):
        rng = np.random.default_rng(seed)
        good, bad = draws(right(20_000, rng)), draws(rows_lost(40_000, rng))
        assert not families(examined(kept(good, rng, rate)))
        assert {"actions", "contexts"} <= families(examined(kept(bad, rng, rate)))
        assert "greedy" in families(examined(kept(draws(greedy_fallback(40_000, rng, 0.1)), rng, rate)))


def test_without_vectors_the_mean_weight_is_what_is_left():
    failed = 0
    for seed in range(20):
        day = draws(right(20_000, np.random.default_rng(seed)))
        found = examined(replace(day, vector=np.zeros(20_000, dtype=bool)))
        assert {one.family for one in found.findings} == {"weights"}
        failed += bool(families(found))
    assert failed == 0
    halved = replace(day, vector=np.zeros(20_000, dtype=bool), propensity=day.propensity / 2)
    assert families(examined(halved)) == {"weights"}


def test_rows_not_shown_depend_on_the_action_or_do_not():
    rng = np.random.default_rng(8)
    day = draws(right(20_000, rng))
    even = replace(day, shown=(rng.random(20_000) > 0.1).astype(int))
    assert examined(even).not_shown_independent is True
    assert examined(even).not_shown == pytest.approx(0.1, abs=0.01)
    uneven = replace(day, shown=(rng.random(20_000) > np.where(day.action == 1, 0.2, 0.1)).astype(int))
    assert examined(uneven).not_shown_independent is False
    few = replace(day, shown=np.where(np.arange(20_000) < 49, 0, -1))
    assert examined(few).not_shown_independent is None
    assert math.isnan(examined(few).not_shown)


def test_sets_of_other_sizes_are_no_reason():
    rng = np.random.default_rng(9)
    eligible = rng.random((20_000, 5)) < 0.7
    eligible[:, 0] = True
    vectors = np.where(eligible, rng.random((20_000, 5)) + 0.05, 0.0)
    vectors /= vectors.sum(axis=1, keepdims=True)
    day = Draws.of(sample_actions(vectors, rng), vectors, eligible=eligible, context=rng.normal(size=(20_000, 16)))
    assert not families(examined(day, floor=0.0))


def test_columns_far_from_zero_are_tested_and_constant_ones_are_not():
    action, vectors, context, arrived = rows_lost(20_000, np.random.default_rng(0))
    moved = np.column_stack((context[:, 0] * 1e3 + 1e8, np.full(20_000, 7.0)))
    day = Draws.of(action[arrived], vectors[arrived], context=moved[arrived])
    there, here = (examine(tally(one, FLOOR), ALPHA, NAMES, ["far", "same"]).worst("contexts") for one in (
        day, replace(day, context=context[arrived][:, :1] * [1.0, 0.0])))  # fmt: skip
    assert there is not None
    assert here is not None
    assert there.name == here.name.replace("same", "far") == "d along far"
    assert there.z == pytest.approx(here.z, rel=1e-4)


def test_the_join_band_is_the_spread_of_days_or_of_rows():
    """Ten days of 93 %, 1 % apart: t(9) at 0.0005 is 4.78, times 0.0103 x sqrt(1.1); with 100 rows the binomial spread is wider."""
    joined = [930, 940, 920, 930, 940, 920, 930, 940, 920, 930]
    usual = Usual.of(joined, [1000] * 10)
    assert usual == Usual(10, 0.93, 0.008)
    low, high = usual.band(100_000, ALPHA)
    assert (low, high) == pytest.approx(
        (0.93 - 4.78 * 0.008 * math.sqrt(1.1) - 5.5e-4, 0.93 + 4.78 * 0.008 * math.sqrt(1.1) + 5.5e-4), abs=2e-4
    )
    assert low > 0.71
    assert usual.band(100, ALPHA)[0] < low - 0.05
    assert Usual.of([50] * 6, [100] * 6) is None
    assert Usual.of([50] * 9, [99] * 9) is None


def test_steady_join_rates_leave_their_band_once_in_a_thousand_days_at_most():
    """2,000 futures of 14 days of 500 rows and then one more; 1 in 1,000 is allotted, so 8 or more would be 0.1 % probable."""
    rng = np.random.default_rng(10)
    for rate in (0.02, 0.5, 0.99):
        joined = rng.binomial(500, rate, (2000, 15))
        left = 0
        for row in joined:
            usual = Usual.of(row[:14].tolist(), [500] * 14)
            low, high = usual.band(500, ALPHA)
            left += not low <= row[14] / 500 <= high
        assert left < 8, rate


def test_what_cannot_be_a_log_is_refused():
    vectors = np.full((3, 2), 0.5)
    with pytest.raises(DataError, match="propensity"):
        Draws.of(np.zeros(3, int), vectors, propensity=np.array([0.5, 0.0, 0.5]))
    with pytest.raises(DataError, match=r"shape \(2,\)"):
        Draws.of(np.zeros(2, int), vectors, propensity=np.full(3, 0.5))
    with pytest.raises(InputError, match="no sampled row"):
        examine(Tally(), ALPHA, NAMES, COLUMNS)
