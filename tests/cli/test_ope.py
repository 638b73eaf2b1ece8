"""`propel ope`: the same numbers as the library, exit codes, JSON, odd but valid logs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ope import LoggedData, evaluate
from tests.cli.conftest import Run

KEYS = {"estimator", "value", "stderr", "low", "high", "n", "ess", "notes", "verdict", "reasons"}


def library(columns: dict[str, Any], target: Any, **more: Any) -> Any:
    log = LoggedData(np.array(columns["action"]), np.array(columns["reward"]), np.array(columns["propensity"]))
    return evaluate(log, target, **more)


def test_json_is_a_list_of_objects_equal_to_the_library(write_log: Any, run: Run, columns: dict[str, Any]) -> None:
    result = run(write_log(), "--json", "--baseline", "logging", policy="policy")
    records = json.loads(result.stdout)
    expected = library(columns, np.array(columns["policy"]), baseline="logging")
    assert result.exit_code == 0
    assert [record["estimator"] for record in records] == ["IPS", "SNIPS", "Delta"]
    for record in records:
        assert set(record) >= KEYS
        for name in ("value", "stderr", "low", "high", "ess"):
            assert record[name] == getattr(expected[record["estimator"]], name)


def test_policy_by_list_scalar_file_and_csv_agree(write_log: Any, run: Run, columns: dict[str, Any], tmp_path: Path) -> None:
    vectors = np.array(columns["policy"])
    order = np.random.default_rng(1).permutation(500)
    file = tmp_path / "policy.parquet"
    pl.DataFrame({"row": order, **{f"p_{j}": vectors[order, j] for j in range(3)}}).write_parquet(file)
    scalar = vectors[np.arange(500), columns["action"]].tolist()
    runs = [
        run(write_log(), "--json", policy="policy"),
        run(write_log(), "--json", policy=str(file)),
        run(write_log(scalar=scalar), "--json", policy="scalar"),
        run(write_log("log.csv"), "--json", policy="policy"),
    ]
    values = [[record["value"] for record in json.loads(result.stdout)] for result in runs]
    assert values[0] == values[1] == values[2]
    np.testing.assert_allclose(values[3], values[0], rtol=1e-12)


def test_context_enables_the_reward_model(write_log: Any, run: Run) -> None:
    result = run(write_log(), "--json", "--context", "x,user", policy="policy")
    assert [record["estimator"] for record in json.loads(result.stdout)] == ["DM", "IPS", "SNIPS", "DR"]


def test_clusters_change_the_interval_and_not_the_value(write_log: Any, run: Run) -> None:
    plain = json.loads(run(write_log(), "--json", policy="policy").stdout)[0]
    clustered = json.loads(run(write_log(), "--json", "--cluster", "user", policy="policy").stdout)[0]
    assert clustered["value"] == pytest.approx(plain["value"], rel=1e-12)
    assert clustered["stderr"] != plain["stderr"]
    assert "100 clusters." in clustered["notes"]
    assert "100 clusters." in run(write_log(), "--cluster", "user", policy="policy").stdout


def test_text_actions_follow_the_order_of_the_labels(write_log: Any, run: Run, columns: dict[str, Any], tmp_path: Path) -> None:
    names = ["small", "medium", "large"]  # sorted, large would come first
    log = write_log(action=[names[action] for action in columns["action"]])
    file = tmp_path / "policy.parquet"
    pl.DataFrame(
        {"row": range(500), **{f"p_{name}": [row[j] for row in columns["policy"]] for j, name in enumerate(names)}}
    ).write_parquet(file)
    by_index = json.loads(run(write_log("index.parquet"), "--json", policy="policy").stdout)
    assert json.loads(run(log, "--json", "--labels", "small,medium,large", policy="policy").stdout) == by_index
    assert json.loads(run(log, "--json", policy=str(file)).stdout) == by_index
    assert run(log, "--json").exit_code == 0  # uniform needs no order


def test_all_refused_exits_with_3_and_withholds_numbers(write_log: Any, run: Run) -> None:
    log = write_log(reward=[0.0] * 500)
    table, records, forced = (run(log, *more, policy="policy") for more in ((), ("--json",), ("--json", "--force")))
    assert {table.exit_code, records.exit_code, forced.exit_code} == {3}
    assert "withheld" in table.stdout
    assert all(record["value"] is None and record["high"] is None for record in json.loads(records.stdout))
    assert all("Every reward" in record["reasons"][0] for record in json.loads(records.stdout))
    assert all(record["value"] == 0 for record in json.loads(forced.stdout))


def test_one_action_is_valid_and_noted(write_log: Any, run: Run) -> None:
    result = run(write_log(action=[0] * 500, propensity=[1.0] * 500), "--json")
    (note,) = {note for record in json.loads(result.stdout) for note in record["notes"]}
    assert result.exit_code == 0
    assert note == "One eligible action everywhere: every policy is the logging policy."


def test_eligible_sets_make_uniform_uniform_over_them(write_log: Any, run: Run, columns: dict[str, Any]) -> None:
    eligible = [sorted({action, 0}) for action in columns["action"]]
    result = run(write_log(eligible=eligible), "--json", "--eligible", "eligible", "--estimators", "IPS", "--force")
    share = np.array([1 / len(set_) for set_ in eligible])
    by_hand = np.mean(share / np.array(columns["propensity"]) * np.array(columns["reward"]))
    assert json.loads(result.stdout)[0]["value"] == pytest.approx(by_hand, rel=1e-12)


def test_bernstein_and_bootstrap_from_the_command_line(write_log: Any, run: Run) -> None:
    bernstein = run(
        write_log(), "--json", "--interval", "bernstein", "--weight-bound", "60", "--reward-range", "0,1", "--estimators", "IPS"
    )
    bootstrap = run(write_log(), "--json", "--interval", "bootstrap", "--seed", "3", "--estimators", "IPS")
    normal = run(write_log(), "--json", "--estimators", "IPS")
    widths = [r["high"] - r["low"] for r in (json.loads(x.stdout)[0] for x in (bernstein, bootstrap, normal))]
    assert widths[0] > 2 * widths[2]
    assert widths[1] == pytest.approx(widths[2], rel=0.15)


def test_the_real_process_has_two_names_and_one_behaviour(write_log: Any) -> None:
    options = ["ope", "--log", str(write_log()), "--policy", "policy", "--json"]
    module = subprocess.run([sys.executable, "-m", "propel", *options], capture_output=True, text=True)
    script = subprocess.run([str(Path(sys.executable).with_name("propel")), *options], capture_output=True, text=True)
    assert module.returncode == script.returncode == 0
    assert json.loads(module.stdout) == json.loads(script.stdout)
    assert module.stderr == script.stderr == ""


def test_version() -> None:
    shown = subprocess.run([sys.executable, "-m", "propel", "--version"], capture_output=True, text=True, check=True).stdout
    assert shown == "propel 0.1.0\n"
