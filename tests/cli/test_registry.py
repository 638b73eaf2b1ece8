"""`propel policy list|show|promote|rollback|freeze|verify` on a registry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bandits.registry import Registry
from propel import app
from serving.setup import initialise
from tests.bandits.test_registry import execute, registry


@pytest.fixture(scope="module")
def store(tmp_path_factory: Any) -> Any:
    return registry(tmp_path_factory.mktemp("cli"), policies=2)


def run(store: Any, *words: str) -> Result:
    return CliRunner().invoke(app, ["policy", *words, "--registry", str(store[0].folder)])


def test_from_nothing_to_promoted_rolled_back_frozen_and_verified(store: Any) -> None:
    _, (first, second) = store
    why = ("--who", "ops", "--why", "better")
    assert "night-0" in run(store, "list").stdout
    assert "serving" not in run(store, "list").stdout
    assert f"promote route nothing -> {first[:16]}  by ops: better" in run(store, "promote", first[:12], *why).stdout
    promoted = json.loads(run(store, "promote", second, *why, "--json").stdout)
    assert (promoted["from_digest"], promoted["to_digest"], promoted["line"]) == (first, second, 2)
    rows = json.loads(run(store, "list", "--json").stdout)
    assert [(row["digest"], row["serving"]) for row in rows] == [(first, False), (second, True)]
    assert rows[1]["decision_point"] == "route"
    shown = json.loads(run(store, "show", second[:10], "--json").stdout)
    assert shown["manifest"]["name"] == "night-1"
    assert [line["line"] for line in shown["ledger"]] == [2]
    assert "night-1@" in run(store, "show", second).stdout
    assert json.loads(run(store, "rollback", "route", *why, "--json").stdout)["to_digest"] == first
    assert run(store, "freeze", "route", *why).exit_code == 0
    refused = run(store, "promote", second, *why)
    assert (refused.exit_code, "is frozen" in refused.stderr) == (2, True)
    assert run(store, "freeze", "route", *why, "--off").exit_code == 0
    well = run(store, "verify")
    assert (well.exit_code, well.stdout) == (0, "5 lines of the ledger and every artifact are as they were written.\n")
    execute(store[0], "UPDATE pointers SET frozen = 1")
    wrong = run(store, "verify", "--json")
    assert wrong.exit_code == 3
    assert "decision point 'route'" in json.loads(wrong.stdout)["wrong"][0]


def test_a_folder_without_a_registry_and_an_estimate_that_is_no_json(store: Any, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["policy", "list", "--registry", str(tmp_path)])
    assert (result.exit_code, "found no registry" in result.stderr) == (2, True)
    (tmp_path / "estimate.json").write_text("{")
    result = run(store, "promote", store[1][0], "--who", "ops", "--why", "x", "--estimate", str(tmp_path / "estimate.json"))
    assert (result.exit_code, "expected JSON" in result.stderr) == (2, True)


def test_an_estimate_is_a_list_of_records(tmp_path: Path) -> None:
    store = registry(tmp_path / "registry", policies=1)
    file = tmp_path / "estimate.json"
    words = ("promote", store[1][0], "--who", "ops", "--why", "x", "--estimate", str(file))
    file.write_text('{"value": 1}')
    refused = run(store, *words)
    assert (refused.exit_code, "estimate.json: found an object; expected a list" in refused.stderr) == (2, True)
    assert store[0].ledger_lines() == 0
    file.write_text('[{"estimator": "DR", "value": 0.4}]')
    assert run(store, *words).exit_code == 0
    assert store[0].ledger()[0].estimate == {"records": [{"estimator": "DR", "value": 0.4}]}


def test_one_damaged_artifact_hides_no_other(tmp_path: Path) -> None:
    store = registry(tmp_path, policies=3)
    bad, gone, good = store[1]
    manifest = store[0].path(bad) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"night-0", b"night-9"))
    shutil.rmtree(store[0].path(gone))
    rows = json.loads(run(store, "list", "--json").stdout)
    assert [row["name"] for row in rows] == [None, None, "night-2"]
    assert [str(row["damaged"]).split(":")[0] for row in rows] == ["digest check", "folder check", "None"]
    assert "(no name) damaged: digest check" in run(store, "list").stdout
    assert json.loads(run(store, "show", good, "--json").stdout)["manifest"]["name"] == "night-2"
    refused = run(store, "show", bad)
    assert (refused.exit_code, "digest check" in refused.stderr) == (2, True)


def test_a_damaged_database_is_said_without_a_traceback(tmp_path: Path) -> None:
    store = registry(tmp_path, policies=1)
    execute(store[0], "DROP TABLE ledger")
    database = tmp_path / "control.sqlite"
    for content in (database.read_bytes(), bytes(range(256)) * 32, b""):
        database.write_bytes(content)
        verified = run(store, "verify", "--json")
        assert (verified.exit_code, verified.stderr) == (3, "")
        assert "control.sqlite: found" in json.loads(verified.stdout)["wrong"][0]
        refused = run(store, "promote", store[1][0], "--who", "ops", "--why", "x")
        assert (refused.exit_code, "control.sqlite: found" in refused.stderr) == (2, True)


def test_freeze_safe_serves_the_default_action_of_the_settings(tmp_path: Path) -> None:
    config = initialise(tmp_path / "shop", 8080).config
    words = ("policy", "freeze", "ad-load", "--who", "ops", "--why", "incident", "--config", str(config))
    frozen = CliRunner().invoke(app, [*words, "--safe", "--json"])
    assert [line["action"] for line in json.loads(frozen.stdout)] == ["promote", "freeze"]
    store = Registry(config.parent / "registry")
    assert store.manifest(str(store.pointer("ad-load").digest)).name == "safe"
    for more, said in (
        (("--safe",), "'ad-load' is frozen; expected one that is not: lift it first, `propel policy freeze ad-load --off`"),
        (("--safe", "--off"), "found --safe with --off; expected one of them"),
    ):
        refused = CliRunner().invoke(app, [*words, *more])
        assert (refused.exit_code, said in refused.stderr) == (2, True)
    elsewhere = CliRunner().invoke(app, ["policy", "freeze", "ad-lod", *words[3:], "--safe"])
    assert (elsewhere.exit_code, "found no decision point 'ad-lod'; expected one of ad-load" in elsewhere.stderr) == (2, True)
    lifted = CliRunner().invoke(app, [*words, "--off", "--registry", str(store.folder)])
    assert (lifted.exit_code, "unfreeze ad-load" in lifted.stdout) == (0, True)
    again = CliRunner().invoke(app, [*words, "--safe"]).stdout
    assert (len(again.splitlines()), "freeze ad-load" in again) == (1, True)
