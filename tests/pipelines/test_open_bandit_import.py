"""The Open Bandit Dataset's CSV layout: the bundled sample written out in it gives its own numbers, and odd files are refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from bandits.events import digest
from ope import InputError, evaluate
from pipelines.exporters import read_decisions, read_rewards
from pipelines.importers.events import Naming
from pipelines.importers.open_bandit import open_bandit
from pipelines.imports import import_log
from propel import app
from tests.pipelines.dsjson_lines import Imported

HEADER = ["", "timestamp", "item_id", "position", "click", "propensity_score", *(f"user_feature_{i}" for i in range(4))]
USER = ["81ce123cbb5bd8ce818f60fb3586bba5", "03a5648a76832f83c859d46bc06cb64a", "2ff", "c2"]


def write_dataset(folder: Path, rows: list[list[Any]], items: int, *, affinity: bool = True, context: bool = True) -> Path:
    """`folder` (POLICY/CAMPAIGN) with CAMPAIGN.csv and item_context.csv in the publisher's layout."""
    folder.mkdir(parents=True)
    header = HEADER + [f"user-item_affinity_{i}" for i in range(items) if affinity]
    with (folder / f"{folder.name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    if context:
        with (folder / "item_context.csv").open("w", newline="") as file:
            names = ["", "item_id", "item_feature_0", "item_feature_1"]
            csv.writer(file).writerows([names, *([i, i, 0.5 * i, f"h{i}"] for i in reversed(range(items)))])
    return folder


ROWS = [
    [0, "2019-11-24 00:00:00.004101+00:00", 2, 3, 1, 1 / 3, *USER, 0.0, 1.0, 2.0],
    [1, "2019-11-24 00:00:01+00:00", 0, 1, 0, 1 / 3, *USER, 0.0, 0.0, 0.0],
]


def imported(source: Path, to: Path, **options: Any) -> Imported:
    report = import_log(source, to, Naming(), **options)
    return Imported(report, list(read_decisions(to)) if report.files else [], list(read_rewards(to)) if report.files else [], to)


def test_a_row_by_hand(tmp_path: Path) -> None:
    found = imported(write_dataset(tmp_path / "random" / "all", ROWS, 3), tmp_path / "events")
    first, second = found.decisions
    assert (first.actions, first.chosen, first.propensity, first.shares) == (("0", "1", "2"), 2, 1 / 3, b"")
    assert first.decided_at_ns == 1_574_553_600_004_101_000  # 18,224 days after 1970, and 4,101 microseconds
    assert (first.policy, first.decision_id) == ("random/all", digest(b"random/all:2").hex())
    assert json.loads(bytes(first.body)) == {
        "actions": [  # by id, whatever the order of the publisher's table
            {"item_feature_0": 0.0, "item_feature_1": "h0", "affinity": 0.0},
            {"item_feature_0": 0.5, "item_feature_1": "h1", "affinity": 1.0},
            {"item_feature_0": 1.0, "item_feature_1": "h2", "affinity": 2.0},
        ],
        "context": {"position": "3"} | {f"user_feature_{i}": USER[i] for i in range(4)},
    }
    assert [(reward.decision_id, reward.value) for reward in found.rewards] == [(first.decision_id, 1.0), (second.decision_id, 0.0)]
    assert set(found.report.missing) == {"eligible sets", "units", "vectors"}
    assert found.report.format == "open-bandit"
    assert found.report.context == ["position", *(f"user_feature_{i}" for i in range(4))]


def test_the_sample_in_the_full_layout_gives_its_own_numbers(tmp_path: Path) -> None:
    log = open_bandit("random")
    frame = log.frame
    rows = [
        [row, "2019-11-24 00:00:00+00:00", record["item_id"], record["position"], record["click"], record["propensity_score"],
         *(record[f"user_feature_{i}"] for i in range(4))]
        for row, record in enumerate(frame.iter_rows(named=True))
    ]  # fmt: skip
    items = 80  # of the campaign; the sample does not show them all
    folder = write_dataset(tmp_path / "random" / "all", rows, items, affinity=False)
    found = import_log(folder, tmp_path / "events", Naming())
    assert (found.decisions, found.rows, found.actions, found.problems) == (10_000, 10_000, items, {})
    options = ["--policy", "uniform", "--estimators", "IPS,SNIPS,DR", "--context", ",".join(found.context), "--json"]
    result = CliRunner().invoke(app, ["ope", "--log", str(tmp_path / "events" / "log.parquet"), *options])
    records = {record["estimator"]: record for record in json.loads(result.stdout)}
    expected = evaluate(log.data, np.full((10_000, items), 1 / items), estimators=("IPS", "SNIPS"))
    for name in ("IPS", "SNIPS"):
        for key in ("value", "stderr", "ess"):
            assert records[name][key] == pytest.approx(getattr(expected[name], key), rel=1e-12)
    # DR by the same command on the sample itself.
    frame.write_parquet(tmp_path / "sample.parquet")
    columns = ["--action", "item_id", "--reward", "click", "--propensity", "propensity_score", "--actions", str(items)]
    result = CliRunner().invoke(app, ["ope", "--log", str(tmp_path / "sample.parquet"), *options, *columns])
    own = {record["estimator"]: record for record in json.loads(result.stdout)}
    for key in ("value", "stderr", "low", "high", "verdict"):
        assert records["DR"][key] == (
            own["DR"][key] if isinstance(own["DR"][key], str) else pytest.approx(own["DR"][key], rel=1e-9)
        )


@pytest.mark.parametrize("how", ["folder", "file", "inside", "file inside"])
def test_propensities_of_thompson_sampling_are_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """From wherever the data set is named: the name of its folder says which policy it was."""
    folder = write_dataset(tmp_path / "bts" / "men", ROWS, 3)
    if "inside" in how:
        monkeypatch.chdir(folder)
    source = {"folder": folder, "file": folder / "men.csv", "inside": Path(), "file inside": Path("men.csv")}[how]
    found = imported(source, tmp_path / "events")
    assert "at most caution" in found.report.missing["propensities"]
    assert {decision.policy for decision in found.decisions} == {"bts/men"}
    shutil.rmtree(tmp_path / "events")
    uniform = write_dataset(tmp_path / "random" / "men", ROWS, 3)
    assert "propensities" not in imported(uniform, tmp_path / "events").report.missing


def test_faulty_rows_are_counted_and_the_rest_imported(tmp_path: Path) -> None:
    def row(place: int, cell: Any) -> list[Any]:
        return [cell if i == place else value for i, value in enumerate(ROWS[0])]

    rows = [row(2, 3), ROWS[0], row(2, ""), row(5, ""), row(5, 0), row(1, "noon"), row(4, "x"), row(10, "y"), ROWS[0][:-1], ROWS[1]]
    found = imported(write_dataset(tmp_path / "random" / "all", rows, 3), tmp_path / "events")
    assert len(found.decisions) == 2
    assert {kind: problems.lines for kind, problems in found.report.problems.items()} == {
        "action": [2, 4],
        "propensity": [5, 6],
        "time": [7],
        "number": [8, 9],
        "csv": [10],
    }


def test_without_item_context_or_affinities(tmp_path: Path) -> None:
    found = imported(write_dataset(tmp_path / "random" / "all", ROWS, 3, context=False), tmp_path / "events")
    assert json.loads(bytes(found.decisions[0].body))["actions"] == [{"affinity": 0.0}, {"affinity": 1.0}, {"affinity": 2.0}]
    short = [row[:10] for row in ROWS]
    found = imported(write_dataset(tmp_path / "random" / "men", short, 3, affinity=False), tmp_path / "more")
    assert json.loads(bytes(found.decisions[0].body))["actions"][1] == {"item_feature_0": 0.5, "item_feature_1": "h1"}
    with pytest.raises(InputError, match="nothing else tells how many items"):
        imported(write_dataset(tmp_path / "random" / "women", short, 3, affinity=False, context=False), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_item_context_that_does_not_fit(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "random" / "all", ROWS, 3)
    for text, error in (
        ("item_id\n0\n1\n", "each of 0 to 2 once"),
        ("item\n0\n1\n2\n", "a column item_id of whole numbers"),
        ("item_id\n0\none\n", "whole numbers"),
    ):
        (folder / "item_context.csv").write_text(text)
        with pytest.raises(InputError, match=error):
            imported(folder, tmp_path / "events")
    (folder / "all.csv").unlink()
    with pytest.raises(InputError, match=r"all\.csv; expected a folder such as random/all"):
        imported(folder, tmp_path / "events")
    assert not (tmp_path / "events").exists()


def test_clicks_and_positions_survive_as_columns(tmp_path: Path) -> None:
    found = imported(write_dataset(tmp_path / "random" / "all", ROWS, 3), tmp_path / "events")
    log = pl.read_parquet(found.folder / "log.parquet")
    assert log["position"].to_list() == ["3", "1"]  # a category, as in the bundled sample
    assert log["eligible"].to_list() == [["0", "1", "2"]] * 2
    assert log["reward"].to_list() == [1.0, 0.0]
