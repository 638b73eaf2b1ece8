"""Feedback of the Open Bandit Pipeline: its own estimates, to the last digits, and what is asked of a dict of another kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ope import DR, IPS, SNIPS, DataError, DRos, InputError, SwitchDR, evaluate
from ope.estimators import DM, SNDR, ClippedIPS, Estimator
from pipelines.importers.obp import from_feedback, missing, policy_of

DATA = Path(__file__).parent / "data" / "obp"
NOT_KEYS = ("action_dist", "estimated_rewards", "obp_names", "obp_values")

OURS: dict[str, Estimator] = {
    "InverseProbabilityWeighting": IPS(),
    "InverseProbabilityWeighting(lambda_=2.0)": ClippedIPS(2.0),
    "SelfNormalizedInverseProbabilityWeighting": SNIPS(),
    "DirectMethod": DM(),
    "DoublyRobust": DR(),
    "SelfNormalizedDoublyRobust": SNDR(),
    "SwitchDoublyRobust(lambda_=2.0)": SwitchDR(2.0),
    "DoublyRobustWithShrinkage(lambda_=5.0)": DRos(5.0),
}
Case = tuple[dict[str, Any], dict[str, Any]]


def read(name: str) -> Case:
    """The feedback dict as OBP returned it, and what stands beside it: a policy, a reward model and OBP's estimates."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as arrays:
        beside = {key: arrays[key] for key in NOT_KEYS}
        feedback: dict[str, Any] = {key: arrays[key] for key in arrays.files if key not in NOT_KEYS}
    counts = {key: int(feedback[key]) for key in ("n_rounds", "n_actions")}
    return {"position": None, **feedback, **counts}, beside


@pytest.fixture
def case() -> Case:
    return read("case")


@pytest.fixture
def positions() -> Case:
    return read("positions")


@pytest.mark.parametrize("name", ["case", "positions"])
def test_estimates_are_obps_own(name: str) -> None:
    feedback, beside = read(name)
    target, q = policy_of(feedback, beside["action_dist"]), policy_of(feedback, beside["estimated_rewards"])
    report = evaluate(from_feedback(feedback), target, q, estimators=list(OURS.values()))
    assert beside["obp_names"].tolist() == list(OURS)
    # Every definition is the same; only the order of additions differs.
    found = {theirs: report[ours].value for theirs, ours in OURS.items()}
    assert found == pytest.approx(dict(zip(OURS, beside["obp_values"], strict=True)), rel=0, abs=1e-10)


def test_settings_change_the_estimates(case: Case, positions: Case) -> None:
    """A threshold that no weight reaches would compare DR with DR."""
    for (feedback, beside), above in ((case, 38), (positions, 7)):
        target = policy_of(feedback, beside["action_dist"])
        weight = target[np.arange(len(target)), feedback["action"]] / feedback["pscore"]
        assert int((weight > 2).sum()) == above
        values = np.sort(beside["obp_values"])
        assert np.diff(values).min() > 1e-6  # no two alike, by far more than the tolerance above


def test_log_holds_the_dicts_own_arrays(case: Case) -> None:
    feedback, _ = case
    log = from_feedback(feedback)
    assert log.propensities is not None
    assert np.shares_memory(log.propensities, feedback["pi_b"])  # one position: a view
    assert log.propensity is feedback["pscore"]
    assert log.context is feedback["context"]
    assert (log.eligible, log.action_features, log.propensity_estimated) == (None, None, False)
    # OBP drew the actions from pi_b and took pscore out of it, so evaluating the logging policy returns the plain mean.
    assert evaluate(log, "logging")["IPS"].value == pytest.approx(feedback["reward"].mean(), abs=1e-12)


def test_each_row_has_its_own_positions_vector(positions: Case) -> None:
    feedback, beside = positions
    target, dist = policy_of(feedback, beside["action_dist"]), beside["action_dist"]
    for row in (0, 100, 293):
        np.testing.assert_array_equal(target[row], dist[row, :, feedback["position"][row]])
    assert np.abs(dist[:, :, 0] - dist[:, :, 1]).max() > 0.01  # so that a wrong position would have been seen
    log = from_feedback({**feedback, "pi_b": np.full((294, 34, 3), 1 / 34)})
    assert log.propensities is not None
    assert log.propensities.shape == (294, 34)


def test_positions_follow_the_context_one_column_each(positions: Case) -> None:
    feedback, _ = positions
    context = from_feedback(feedback).context
    assert context is not None
    assert context.shape == (294, 21 + 3)
    np.testing.assert_array_equal(context[:, :21], feedback["context"])
    np.testing.assert_array_equal(context[:, 21:].sum(axis=0), [104, 107, 83])  # rows in each position
    np.testing.assert_array_equal(context[:, 21:].argmax(axis=1), feedback["position"])
    alone = from_feedback({**feedback, "context": None}).context
    assert alone is not None
    assert alone.shape == (294, 3)


def test_one_position_adds_no_column(case: Case) -> None:
    feedback, _ = case
    log = from_feedback({**feedback, "position": np.zeros(400, dtype=int)})
    assert log.context is feedback["context"]  # a column of ones would tell a model nothing
    assert from_feedback({**feedback, "context": None}).context is None


def test_pscore_that_is_not_pi_bs_is_refused_with_the_a_a_check(case: Case) -> None:
    feedback, beside = case
    log = from_feedback({**feedback, "pscore": feedback["pscore"] * 0.9})
    report = evaluate(log, policy_of(feedback, beside["action_dist"]))
    assert report.refused
    assert "A/A fails" in str(report)
    estimated = evaluate(replace(from_feedback(feedback), propensity_estimated=True), policy_of(feedback, beside["action_dist"]))
    assert estimated["SNIPS"].verdict == "caution"


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda feedback: {key: value for key, value in feedback.items() if key not in names}


def with_(**arrays: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda feedback: {**feedback, **arrays}


ERRORS: list[tuple[Callable[[dict[str, Any]], Any], str, str]] = [
    (without("pscore", "pi_b"), "pscore", r"missing.*propel propensities.*never fill in 1"),
    (with_(pscore=None), "pscore", r"missing.*pi_b's entry of each row's action"),
    (with_(slate_id=np.arange(400)), "slate_id", r"feedback on slates; .*pscore_item_position as pscore"),
    (with_(stratum_idx=np.zeros(400)), "stratum_idx", r"several logging policies; .*rows of one stratum, or pscore_avg"),
    (with_(action=np.linspace(0.0, 1.0, 400)), "action", r"continuous actions; .*n_actions.*bins"),
    (without("n_actions"), "n_actions", r"found nothing; expected it beside .*n_rounds.*obtain_batch"),
    (without("action"), "action", r"found nothing"),
    (with_(n_rounds=401), "action", r"shape \(400,\); expected n_rounds = 401 integers"),
    (with_(n_rounds=400.0), "n_rounds", r"found 400\.0; expected a whole number"),
    (with_(n_rounds=0), "n_rounds", r"found 0; expected a whole number of at least 1"),
    (with_(action=np.full(400, 5)), "action", r"row 0.*found 5; expected an index from 0, below n_actions = 5"),
    (with_(action=np.full(400, -1)), "action", r"row 0.*found -1"),
    (with_(action=np.full(400, "a")), "action", r"found <U1 of shape \(400,\)"),
    (with_(reward=np.zeros(399)), "reward", r"found shape \(399,\); expected shape \(400,\)"),
    (with_(pscore=np.full(400, 1.5)), "pscore", r"found 1\.5; expected a probability"),
    (with_(context=np.zeros((399, 3))), "context", r"found shape \(399, 3\)"),
    (with_(context=np.zeros(399), position=np.arange(400) % 2, pi_b=None), "context", r"found shape \(399,\)"),
    (with_(pi_b=np.full((400, 5), 0.2)), "pi_b", r"found shape \(400, 5\); expected \(400, 5, positions\)"),
    (with_(pi_b=np.full((400, 4, 1), 0.25)), "pi_b", r"found shape \(400, 4, 1\)"),
    (with_(pi_b=np.full((400, 5, 1), 0.25)), "pi_b", r"row 0.*sums to 1\.25"),
    (with_(pi_b=np.full((400, 5, 2), 0.2)), "position", r"none beside pi_b of 2 positions"),
    (with_(position=np.arange(400) % 2), "position", r"found position 1; expected an index below 1.*np\.repeat\(pi_b, 2, axis=2\)"),
    (with_(position=np.full(400, -1)), "position", r"row 0.*found -1; expected an index from 0"),
    (with_(position=np.zeros(400)), "position", r"found float64 of shape \(400,\)"),
    (with_(position=np.zeros(3, dtype=int)), "position", r"found int64 of shape \(3,\)"),
]


@pytest.mark.parametrize(("change", "column", "message"), ERRORS, ids=lambda part: part if isinstance(part, str) else "")
def test_errors_name_the_key_and_what_to_do(case: Case, change: Callable[[dict[str, Any]], Any], column: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)^bandit feedback, column '{column}'.*{message}") as caught:
        from_feedback(change(case[0]))
    assert (caught.value.column, caught.value.source) == (column, "bandit feedback")
    assert caught.value.remedy


def test_every_function_wants_one_dict(case: Case) -> None:
    # A split by time returns two dicts, training and test.
    for function in (from_feedback, missing, lambda feedback: policy_of(feedback, np.ones((1, 1, 1)))):
        with pytest.raises(InputError, match=r"found a tuple; expected one dict\. Pass one of its parts"):
            function((case[0], case[0]))
        with pytest.raises(InputError, match=r"found a list"):
            function([])
        with pytest.raises(InputError, match=r"found a NoneType; expected one dict\. Pass what obtain_batch"):
            function(None)


def test_policies_of_another_shape_are_refused(case: Case, positions: Case) -> None:
    feedback, beside = positions
    with pytest.raises(DataError, match=re.escape("np.repeat(action_dist, 3, axis=2)")):
        policy_of(feedback, beside["action_dist"][:, :, :1])
    with pytest.raises(DataError, match=r"none beside action_dist of 3 positions"):
        policy_of({**feedback, "position": None}, beside["action_dist"])
    with pytest.raises(DataError, match=r"'action_dist': found shape \(400, 5\).*Vectors \(n, k\) are used as they are"):
        policy_of(case[0], case[1]["action_dist"][:, :, 0])
    with pytest.raises(DataError, match=r"found shape \(399, 5, 1\).*the dict's own rows"):
        policy_of(case[0], case[1]["action_dist"][1:])
    with pytest.raises(DataError, match=r"found nan"):
        policy_of(case[0], np.full((400, 5, 1), np.nan))
    # A policy needs no propensities: a log may be read for them first.
    assert policy_of({**case[0], "pscore": None}, case[1]["action_dist"]).shape == (400, 5)


def test_missing_says_what_a_dict_does_not_hold(case: Case) -> None:
    always = ["No eligible sets", "No units", "No times"]
    for feedback, first in (
        (case[0], []),
        ({**case[0], "pi_b": None}, ["No whole vectors"]),
        (without("pscore", "pi_b")(case[0]), ["No propensities", "No whole vectors"]),
    ):
        sentences = missing(feedback)
        for sentence, start in zip(sentences, [*first, *always], strict=True):
            assert sentence.startswith(start)
        assert all(sentence.endswith(".") for sentence in sentences)
