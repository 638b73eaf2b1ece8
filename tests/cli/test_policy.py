"""`propel policy compare`: learners fitted on one half, valued on the other; the same as the library, exit codes, messages."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from bandits.batch import DecisionBatch
from bandits.learners import DR
from ope import evaluate
from ope.selection import halves
from pipelines.frame import ColumnMap
from pipelines.importers.files import read_log
from propel import app


def compare(log: Any, *options: str) -> Result:
    return CliRunner().invoke(app, ["policy", "compare", "--log", str(log), "--context", "x", *options])


def test_json_equals_the_library(write_log: Any) -> None:
    log = write_log()
    result = compare(log, "--learners", "DR,IPS", "--json")
    records = json.loads(result.stdout)
    assert result.exit_code == 0
    assert list(dict.fromkeys(record["policy"] for record in records)) == ["logging", "uniform", "DR", "IPS"]
    data = read_log(log, ColumnMap(context=("x",))).data
    fold_a, fold_b = (data.take(rows) for rows in halves(data))
    target = DR().fit(fold_a, k=3).propensities(DecisionBatch.of_log(fold_b, 3))
    expected = evaluate(fold_b, target, estimators=("SNIPS",))["SNIPS"]
    (found,) = [record for record in records if record["policy"] == "DR" and record["estimator"] == "SNIPS"]
    assert found["value"] == pytest.approx(expected.value, rel=1e-12)
    assert found["n"] == 250


def test_the_logging_policys_value_is_its_mean_reward_on_the_other_half(write_log: Any) -> None:
    log = write_log()
    data = read_log(log, ColumnMap()).data
    records = json.loads(compare(log, "--learners", "IPS", "--json").stdout)
    (ips,) = [r for r in records if r["policy"] == "logging" and r["estimator"] == "IPS"]
    assert ips["value"] == pytest.approx(data.reward[halves(data)[1]].mean(), rel=1e-12)
    (delta,) = [r for r in records if r["policy"] == "logging" and r["estimator"] == "Delta"]
    assert (delta["value"], delta["stderr"]) == (0, 0)


def test_every_learner_stands_in_the_table(write_log: Any) -> None:
    result = compare(write_log())
    assert result.exit_code == 0
    for name in ("IPS", "BanditNet", "POEM", "LS-LIN", "DR", "pessimistic", "oracle-greedy", "oracle-softmax (trees)"):
        assert name in result.stdout


def test_eligible_sets_and_labels_reach_the_learners(write_log: Any, columns: dict[str, Any]) -> None:
    names = ["small", "medium", "large"]
    eligible = [sorted({names[action], "small"}) for action in columns["action"]]
    log = write_log(action=[names[action] for action in columns["action"]], eligible=eligible)
    result = compare(log, "--learners", "DR", "--eligible", "eligible", "--labels", ",".join(names), "--json", "--force")
    assert result.exit_code in (0, 3)
    assert np.isfinite([record["value"] for record in json.loads(result.stdout)]).all()


def test_rewards_that_never_vary_refuse_everything(write_log: Any) -> None:
    result = compare(write_log(reward=[0.0] * 500), "--learners", "IPS,DR")
    assert result.exit_code == 3
    assert "withheld" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--learners", "DRR"), "unknown learner 'DRR'; expected one of IPS, BanditNet"),
        (("--reward", "rewards"), "Did you mean 'reward'?"),
        (("--actions", "2"), "Raise --actions"),
    ],
)
def test_bad_input(write_log: Any, options: tuple[str, ...], said: str) -> None:
    result = compare(write_log(), *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_negative_rewards_say_why_log_smoothing_cannot_learn(write_log: Any) -> None:
    result = compare(write_log(reward=list(np.linspace(-1, 1, 500))), "--learners", "LS-LIN")
    assert result.exit_code == 2
    assert "logarithmic smoothing expects rewards of at least 0" in result.stderr


def test_without_names_only_learners_that_can_are_run(write_log: Any) -> None:
    result = compare(write_log(reward=list(np.linspace(-1, 1, 500))))
    assert result.exit_code == 0
    assert "POEM" in result.stdout
    assert "LS-LIN" not in result.stdout
    assert "logistic" not in result.stdout


@pytest.mark.parametrize("context", ["reward", "x,propensity", "x,x"])
def test_what_is_only_known_afterwards_is_no_context(write_log: Any, context: str) -> None:
    result = CliRunner().invoke(app, ["policy", "compare", "--log", str(write_log()), "--context", context])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "in the context" in result.stderr
