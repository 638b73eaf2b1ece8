"""A policy leaves the registry as a model that MLflow loads: the same answers, and the same checks before them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from bandits.decision_point import parse_decision_point
from bandits.learners import IPS
from bandits.policy import Floor
from bandits.registry import Registry
from ope.data import InputError
from ope.simulate import World, softmax
from pipelines import mlflow_model
from propel import app

POINT = """
name = "route"
[actions]
catalogue = ["north", "south", "west"]
[[rewards]]
name = "authorised"
low = 0.0
high = 1.0
window_seconds = 3600
[[features.context]]
name = "amount"
type = "number"
[[features.context]]
name = "hour"
type = "number"
"""
REQUESTS = [{"amount": 0.5, "hour": h / 10} for h in range(5)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, str, Path]:
    folder = tmp_path_factory.mktemp("export")
    point, rng, world = parse_decision_point(POINT), np.random.default_rng(0), World.random(d=2, k=3, seed=0)
    context = world.contexts(2000, rng)
    log = world.log(context, softmax(0.5 * context @ world.coefficient), rng)
    registry = Registry(folder / "registry")
    golden = point.features.batch(REQUESTS, actions=3)
    digest = registry.register(Floor(IPS().fit(log), 0.05), point, name="monday", golden=golden, snapshot={"rows": log.n})
    (folder / "estimates.json").write_text(json.dumps([{"estimator": "DRos(5)", "value": 0.5, "stderr": 0.1, "low": None, "n": 9}]))
    options = ["policy", "export", digest[:12], "--registry", str(folder / "registry"), "--to", str(folder / "model")]
    result = CliRunner().invoke(app, [*options, "--report", str(folder / "estimates.json")])
    assert result.exit_code == 0, result.output
    return registry, digest, folder / "model"


def load(folder: Path) -> Any:
    """As `mlflow.pyfunc.load_model` does: read MLmodel, import its loader, hand it the data folder."""
    flavor = json.loads((folder / "MLmodel").read_text())["flavors"]["python_function"]
    return importlib.import_module(flavor["loader_module"])._load_pyfunc(str(folder / flavor["data"]))


def test_the_model_answers_as_the_policy_does(exported: tuple[Registry, str, Path]) -> None:
    registry, digest, folder = exported
    artifact = registry.load(digest)
    expected = artifact.policy.propensities(artifact.manifest.features.batch(REQUESTS, actions=3))
    rows = [{"context": request} for request in REQUESTS]
    for requests in (rows, pl.DataFrame({"context": REQUESTS}).to_dicts()):
        found = load(folder).predict(requests)
        assert [list(one) for one in found] == [["north", "south", "west"]] * 5
        np.testing.assert_array_equal([list(one.values()) for one in found], expected)


def test_what_mlflow_logs_is_flat(exported: tuple[Registry, str, Path]) -> None:
    _, digest, folder = exported
    assert json.loads((folder / "metrics.json").read_text()) == {
        "DRos_5_.value": 0.5,
        "DRos_5_.stderr": 0.1,
    }  # no number that was withheld, no name that is refused
    params = json.loads((folder / "params.json").read_text())
    assert params == {"name": "monday", "decision_point": "route", "digest": digest, "parent": None}
    assert json.loads((folder / "report.json").read_text())[0]["n"] == 9


def test_a_model_that_was_changed_does_not_load(exported: tuple[Registry, str, Path]) -> None:
    _, digest, folder = exported
    arrays = folder / "data" / digest / "arrays.npz"
    raw = arrays.read_bytes()
    try:
        arrays.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(InputError, match="digest check"):
            load(folder)
    finally:
        arrays.write_bytes(raw)


def test_requests_without_a_context_and_folders_that_are_there(exported: tuple[Registry, str, Path]) -> None:
    registry, digest, folder = exported
    with pytest.raises(InputError, match="column 'context'"):
        load(folder).predict([{"amount": 1.0}])
    result = CliRunner().invoke(app, ["policy", "export", digest, "--registry", str(registry.folder), "--to", str(folder)])
    assert result.exit_code == 2
    assert "already there" in result.stderr


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({"estimator": "DR"}, "found an object; expected a list of objects"),
        ([{"value": 1.0}], "found an object without 'estimator' as record 1"),
        ([{"estimator": "DR"}, 3], "found a number as record 2"),
        ([{"estimator": "DR", "value": "high"}], "found 'high' as 'value' of record 1"),
        ([], "found an empty list"),
    ],
)
def test_a_report_that_is_none_leaves_nothing(exported: tuple[Registry, str, Path], tmp_path: Path, report: Any, said: str) -> None:
    registry, digest, _ = exported
    (tmp_path / "report.json").write_text(json.dumps(report))
    options = ["--registry", str(registry.folder), "--to", str(tmp_path / "model"), "--report", str(tmp_path / "report.json")]
    result = CliRunner().invoke(app, ["policy", "export", digest, *options])
    assert (result.exit_code, said in result.stderr) == (2, True)
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


def test_a_model_appears_whole_or_not_at_all(
    exported: tuple[Registry, str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, digest, _ = exported
    monkeypatch.setattr(mlflow_model, "_write", fail)
    with pytest.raises(OSError, match="disk"):
        mlflow_model.export_model(registry, digest, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def fail(path: Path, value: Any) -> None:
    raise OSError("no space left on the disk")


def test_prune_says_what_it_deleted(exported: tuple[Registry, str, Path]) -> None:
    registry, digest, _ = exported
    result = CliRunner().invoke(app, ["policy", "prune", "--keep", "1", "--registry", str(registry.folder), "--json"])
    assert (result.exit_code, json.loads(result.stdout)) == (0, [])
    assert list(registry.listed()) == [digest]
