"""The demo on the bundled log: the figures that the log is known for, and a page that says what the numbers say."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from rich.console import Console

from pipelines.demo import THOMPSON, Demo, compute, conclusion, forecasts, print_demo
from pipelines.demo_nights import lines as nights
from pipelines.demo_nights import run_week
from pipelines.importers.open_bandit import open_bandit
from pipelines.report import write_demo_report
from tests.once import once


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return once(tmp_path_factory, "demo", lambda: compute(lambda step: None))


@pytest.fixture(scope="module")
def out(found: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_report(tmp_path_factory.mktemp("demo") / "new" / "folder", found, conclusion(found)).parent


def test_bundled_logs_are_the_published_sample() -> None:
    random, thompson = open_bandit("random").data, open_bandit("bts").data
    assert (random.n, thompson.n) == (10_000, 10_000)
    assert (random.reward.sum(), thompson.reward.sum()) == (38, 42)
    assert random.propensity == pytest.approx(1 / 80)
    assert (random.propensity_estimated, thompson.propensity_estimated) == (False, True)
    assert random.context is not None
    assert random.context.shape == (10_000, 3 + 24)  # positions, and the levels that four features have here


def test_thompson_samplings_own_rate_is_inside_the_forecasts(found: Demo) -> None:
    assert found.on_policy.value == pytest.approx(0.0042)
    assert found.on_policy.stderr == pytest.approx(0.00065, abs=5e-6)
    for forecast in forecasts(found):
        assert forecast.low < found.on_policy.value < forecast.high or forecast.estimator == "DM"


def test_ips_forecast_equals_a_sum_over_rows_by_hand(found: Demo) -> None:
    random, thompson = open_bandit("random"), open_bandit("bts")
    position, shown = thompson.frame["position"].cast(int).to_numpy(), thompson.frame["item_id"].to_numpy()
    total = 0.0
    for item, place, click in random.frame.select("item_id", "position", "click").iter_rows():
        if click:
            here = position == int(place)
            total += 80 * np.mean(shown[here] == item)
    assert found.reports[THOMPSON]["IPS"].value == pytest.approx(total / 10_000, rel=1e-9)


def test_the_other_direction_is_refused(found: Demo) -> None:
    weights = found.reverse.weights
    assert weights.ess == pytest.approx(340, abs=1)
    assert weights.tail_index == pytest.approx(1.3, abs=0.05)
    assert weights.max_share == pytest.approx(0.027, abs=5e-4)
    assert {estimate.verdict for estimate in found.reverse.estimates} == {"refused"}


def test_uniform_is_the_logging_policy(found: Demo) -> None:
    uniform = found.reports["uniform"]
    for name in ("IPS", "cIPS", "SNIPS", "beta-IPS"):
        assert uniform[name].value == pytest.approx(0.0038, rel=1e-12)
    assert (uniform["Delta"].value, uniform["Delta"].stderr) == (0, 0)


def test_shortlists_grow_in_gain_and_leave_blocked_candidates_out(found: Demo) -> None:
    shortlists = found.selection.shortlists
    assert [s.k for s in shortlists] == [2, 3, 4, 5]
    assert np.all(np.diff([s.gain for s in shortlists]) >= 0)
    assert set(found.selection.blocked) == {"greedy"}  # one item of eighty: some 60 effective rows
    assert all("greedy" not in s.candidates for s in shortlists)


def test_page_is_self_contained_and_its_charts_are_well_formed(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\(""", page)
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        ET.fromstring(chart)
    assert "38 clicks" in page
    assert "CC BY 4.0" in page


def test_refused_numbers_are_nowhere_in_the_files(found: Demo, out: Path) -> None:
    texts = [path.read_text() for path in out.iterdir()]
    assert len(texts) == 3
    for estimate in found.reverse.estimates:
        for number in (estimate.value, estimate.low, estimate.high):
            assert all(repr(number) not in text for text in texts)
    records = json.loads((out / "demo.json").read_text())["other_direction"]["estimates"]
    assert all(record["value"] is None and record["reasons"] for record in records)


def test_csv_and_json_hold_the_same_estimates(out: Path) -> None:
    with (out / "estimates.csv").open() as file:
        rows = list(csv.DictReader(file))
    candidates = json.loads((out / "demo.json").read_text())["candidates"]
    assert len(rows) == sum(len(records) for records in candidates.values()) == 10 * (6 + 7)
    for row in rows:
        (record,) = [r for r in candidates[row["policy"]] if r["estimator"] == row["estimator"]]
        assert (float(row["value"]) if row["value"] else None) == record["value"]


def test_a_second_report_replaces_the_first_and_leaves_no_parts(found: Demo, out: Path) -> None:
    write_demo_report(out, found, "another conclusion")
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "estimates.csv", "report.html"]
    assert "another conclusion" in (out / "report.html").read_text()


def test_terminal_shows_every_estimator_and_fits_80_columns(found: Demo) -> None:
    console = Console(width=80, file=io.StringIO())
    print_demo(found, console)
    shown = console.file.getvalue()
    assert len(re.findall(r"^ *Switch-DR\(10\) +-?[\d.]+", shown, re.MULTILINE)) >= 7  # six candidates, and the check
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_a_night_of_the_week_is_killed_and_gone_on_with(tmp_path: Path) -> None:
    week = run_week(tmp_path / "nights", lambda step: None, nights=1, killed_on=1)
    assert [mart.manifest.date for mart in week.marts] == ["2019-11-24"]
    assert [mart.records("certificates")[0]["verdict"] for mart in week.marts] == ["pass"]
    told = {one.step: one.partitions for one in week.killed.steps}
    assert (told["ingest"], told["join"]) == (0, 0), "done before the kill"
    assert min(told[step] for step in ("certify", "train", "evaluate", "select")) > 0
    text = nights(week)
    assert text[1].split()[:3] == ["2019-11-24", "1,484", "pass"]
    assert "Night 1 was killed (SIGKILL) once join was committed" in text[-3]
    assert max(map(len, text)) <= 80, text
