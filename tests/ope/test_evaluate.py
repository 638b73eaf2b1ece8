"""`evaluate` at its edges: one row, no overlap, constant weights, odd requests, and what a report prints."""

from __future__ import annotations

import numpy as np
import pytest

from ope import DM, ESTIMATORS, ClippedIPS, DataError, DRos, InputError, LoggedData, evaluate

WITHOUT_BASELINE = [one for one in ESTIMATORS if not one.needs.baseline]


def log(n: int = 5, **more: object) -> LoggedData:
    fields = {"action": np.zeros(n, int), "reward": np.arange(float(n)), "propensity": np.full(n, 0.5)}
    return LoggedData(**(fields | more))  # type: ignore[arg-type]


def test_one_row_has_a_value_and_no_interval() -> None:
    report = evaluate(log(1, reward=np.ones(1)), np.full((1, 2), 0.5), np.ones((1, 2)), estimators=WITHOUT_BASELINE)
    assert {estimate.value for estimate in report.estimates} == {1.0}
    assert all(np.isnan(estimate.stderr) for estimate in report.estimates)
    assert report.refused


def test_no_overlap_is_refused_whatever_the_interval() -> None:
    target = np.tile([0.0, 1.0], (5, 1))
    for interval in ("normal", "bootstrap"):
        report = evaluate(log(), target, estimators=("IPS", "SNIPS", "beta-IPS"), interval=interval)
        assert report.refused
        assert report["IPS"].value == 0
        assert np.isnan(report["SNIPS"].value)
        assert report["IPS"].reasons[0] == "No overlap: the target never takes an action that was logged."


def test_constant_weights_give_no_control_variate_and_z_0() -> None:
    report = evaluate(log(), "logging", estimators=("IPS", "beta-IPS"))
    assert report.weights.weight_z == 0
    assert report["beta-IPS"].value == report["IPS"].value == 2.0  # the plain mean of 0..4
    assert report["beta-IPS"].stderr == pytest.approx(np.arange(5).std(ddof=1) / np.sqrt(5), rel=1e-12)


def test_constant_weights_that_are_not_one_are_refused() -> None:
    report = evaluate(log(), np.tile([0.3, 0.7], (5, 1)))
    assert report.weights.weight_z == 0
    assert "All weights of the target equal 0.6 where 1 is expected." in report["IPS"].reasons


def test_defaults_follow_from_what_is_given() -> None:
    pi, q = np.full((5, 2), 0.5), np.ones((5, 2))
    assert list(evaluate(log(), pi)) == ["IPS", "SNIPS"]
    assert list(evaluate(log(), pi, q)) == ["DM", "IPS", "SNIPS", "DR"]
    assert list(evaluate(log(), pi, q, baseline="logging")) == ["DM", "IPS", "SNIPS", "DR", "Delta"]
    assert list(evaluate(log(), pi[:, 0], q)) == ["IPS", "SNIPS"]  # one probability per row: no vector for DM, DR


def test_reports_are_keyed_by_printed_name_object_or_short_name() -> None:
    report = evaluate(log(), np.full((5, 2), 0.5), np.ones((5, 2)), estimators=("cIPS", "cIPS(2)", DRos(100.0)))
    assert list(report) == ["cIPS(10)", "cIPS(2)", "DRos(100)"]
    assert report["cIPS"] is report[ClippedIPS(10.0)] is report["cIPS(10)"]
    assert report["DRos(100)"] is report[DRos(100.0)]
    assert "DR" not in report
    assert "nonsense" not in report
    with pytest.raises(KeyError, match=r"DM: this report has cIPS\(10\), cIPS\(2\), DRos\(100\)"):
        report[DM()]


def test_an_estimate_prints_one_line() -> None:
    report = evaluate(log(400, action=np.arange(400) % 2), "logging", estimators=("IPS",))
    assert str(report) == "IPS 199.5 ± 5.8 (95 % normal 188.17 to 210.83), n = 400, ESS = 400, trust"


def test_a_notebook_shows_a_table_with_refused_numbers_withheld_and_text_escaped() -> None:
    page = evaluate(log(reward=np.zeros(5)), np.full((5, 2), 0.5))._repr_html_()
    assert page.count("<tr>") == 3
    assert page.count("withheld") == 8
    assert "<td>refused</td>" in page


def test_records_withhold_refused_numbers_unless_forced() -> None:
    report = evaluate(log(reward=np.zeros(5)), np.full((5, 2), 0.5), estimators=("IPS",))
    (record,), (forced,) = report.to_records(), report.to_records(force=True)
    assert (record["value"], record["low"], record["high"], record["stderr"]) == (None,) * 4
    assert (forced["value"], forced["low"], forced["high"], forced["stderr"]) == (0, 0, 0, 0)
    assert record["ess"] == forced["ess"] == 5


def test_baseline_checks_count_for_delta_alone() -> None:
    rng = np.random.default_rng(0)
    data = LoggedData(rng.integers(0, 2, 1000), rng.random(1000), np.full(1000, 0.5))
    never = np.tile([0.0, 1.0], (1000, 1))
    never[data.action == 1] = [1.0, 0.0]  # a baseline that never does what was logged
    report = evaluate(data, np.full((1000, 2), 0.5), baseline=never, estimators=("IPS", "Delta"))
    assert report["IPS"].verdict == "trust"
    assert report["Delta"].verdict == "refused"
    assert "the baseline never takes" in report["Delta"].reasons[0]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: evaluate(log(), "uniform"), InputError, "expected an array of probabilities, or 'logging'"),
        (lambda: evaluate(log(), np.ones((5, 2, 1))), DataError, r"shape \(n, k\), or \(n,\)"),
        (lambda: evaluate(log(), np.full((4, 2), 0.5)), DataError, r"'target': found shape \(4, 2\); expected shape \(5, 2\)"),
        (lambda: evaluate(log(), np.full((5, 2), 0.5), np.ones((5, 3))), DataError, r"'q': found shape \(5, 3\)"),
        (lambda: evaluate(log(), np.full((5, 2), 0.5), np.full((5, 2), np.nan)), DataError, "'q', row 0: found a prediction"),
        (lambda: evaluate(log(), np.full((5, 2), 0.5), estimators="IPS"), InputError, r"a sequence such as \('IPS',\)"),
        (lambda: evaluate(log(), np.full((5, 2), 0.5), estimators=()), InputError, "at least one"),
        (lambda: evaluate(log(), np.full((5, 2), 0.5), interval="exact"), InputError, "expected normal, bootstrap"),
        (lambda: evaluate(log(), np.full((5, 2), 0.5), interval="bernstein"), InputError, r"EmpiricalBernstein\(weight_bound"),
        (lambda: evaluate(log(), "logging", estimators=("DR",), q=np.ones((5, 2))), DataError, "all k of them, which DR needs"),
        (lambda: log(propensities=np.full((5, 2), 0.4)), DataError, "'propensities', row 0: found a row that sums to 0.8"),
        (lambda: log(sample_weight=[1, 1, 0, 1, 1]), DataError, "'sample_weight', row 2: found 0.0"),
        (lambda: log(cluster=[1, 2]), DataError, r"'cluster': found shape \(2,\); expected shape \(5,\)"),
        (lambda: log(rewards={"sales": [1, 2, np.inf, 4, 5]}), DataError, r"rewards\['sales'\].*row 2: found inf"),
        (lambda: log().with_reward("sales"), DataError, "no reward 'sales'"),
        (lambda: log(action=np.array([0, 0, 0, 0, 2]), eligible=np.ones((5, 2), bool)), DataError, "row 4: found action 2"),
    ],
)  # fmt: skip
def test_requests_and_arrays_that_cannot_be_met(call, error, said) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=said):
        call()


def test_rewards_by_name_and_rows_by_index() -> None:
    data = log(rewards={"sales": [5.0, 4, 3, 2, 1]})
    assert data.with_reward("sales").reward.tolist() == [5, 4, 3, 2, 1]
    assert data.take(np.array([4, 0])).rewards["sales"].tolist() == [1, 5]
    assert data.take(data.reward > 2).n == 2
