"""Reports of a night: what the page, the summary and the JSON say, and what they must not."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pytest

from bandits.batch import DecisionBatch
from bandits.policy import Uniform
from bandits.registry import Registry
from ope.data import InputError
from ope.estimators import SNIPS
from ope.moments import Moments, per_row, per_row_gradient
from pipelines.nightly import alarms, intake
from pipelines.nightly.lake import Lake
from pipelines.nightly.mart import Mart, read_mart
from pipelines.nightly.report import render, report
from pipelines.nightly.settings import Night
from pipelines.nightly.summary import lines, needs_attention, to_json
from pipelines.nightly.tables import TABLES
from pipelines.nightly.views import chance, duration, label, point_views, printed, reasons, share, worse
from tests.nightly.report_nights import (
    DATE,
    DP,
    LIVE,
    REFUSED,
    REWARD,
    TODAY,
    YESTERDAY,
    but,
    certificate,
    certified,
    decided,
    difference,
    estimate,
    evaluated,
    night,
    observed,
    point,
    random_columns,
    reported,
    settings,
    shortlisted,
    unreadable,
    write,
)

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "reports.md"

HOSTILE = ["<img src=x onerror=alert(1)>", "</svg></script><script>alert(1)</script>", '"><svg/onload=alert(1)>', "{{7*7}}", "=1+1"]


def html(mart: Mart) -> str:
    return (mart.folder / "report.html").read_text()


def said(mart: Mart) -> str:
    """Everything that leaves the mart."""
    return html(mart) + "\n".join(lines(mart)) + json.dumps(to_json(mart), allow_nan=False)


class Tags(HTMLParser):
    """Which tags and attributes a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def rules(mart: Mart) -> dict[str, tuple[str, str]]:
    return {row["rule"]: (row["severity"], row["opened"]) for row in mart.records("alarms")}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Mart:
    """A night on which all is well, but for one refused candidate."""
    maturity = [
        {"dp": DP, "policy": policy, "day": day, "reward": "click", "age_seconds": 3600.0 * age, "rows": 100, "labelled": age / 40}
        for policy in (LIVE, "old@0") for day in (YESTERDAY, TODAY) for age in (1, 2, 4)
    ]  # fmt: skip
    return night(tmp_path_factory.mktemp("good"), {**evaluated(), **certified("pass", "pass"), "maturity": maturity})


def test_the_page_shows_what_a_reader_needs_to_believe_a_number(good: Mart) -> None:
    text = unescape(re.sub(r"<[^>]+>", " ", html(good)))
    text = re.sub(r"\s+", " ", text)
    assert "good DR B ● trust 0.600 0.580 to 0.620 normal, fixed window 1,000 900 640" in text
    assert "good DR A: chose the portfolio; optimistic ● trust 0.650" in text
    assert "bad DR B ✕ refused withheld - normal 1,000 900 640" in text
    assert "good DR ● trust +0.100 +0.080 to +0.120 normal 3.21 % 1.23 %" in text
    assert "2 (knee) 0.111 0.0222 12.3 % 4.56 % not graded here" in text
    assert "Unit: click per decision. Window: 7 days" in text
    assert f"Data through {TODAY} UTC. Built 20" in text
    assert good.manifest.snapshot_id in text
    assert "bad (DR): Because it is refused." in text
    assert text.index("Fold A: the units that chose") > text.index("bad (DR)"), "folds A and B share no column"


def test_the_page_loads_nothing_runs_nothing_and_its_charts_are_well_formed(good: Mart) -> None:
    text = html(good)
    assert not re.search(r"""<script|(src|href)=["'](?!#)|@import|url\(|javascript:""", text)
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 2, "forest and maturity; one k has no curve"
    for chart in charts:
        ET.fromstring(chart)


def test_maturity_of_all_policies_is_weighted_by_rows(good: Mart) -> None:
    rows = [(LIVE, 300, 0.2), ("old@0", 100, 0.6)]
    maturity = [
        {"dp": DP, "policy": p, "day": TODAY, "reward": "click", "age_seconds": 60.0, "rows": n, "labelled": x} for p, n, x in rows
    ]
    (view,) = point_views(but(good, maturity=maturity))
    assert view.maturity == [{"day": TODAY, "age_seconds": 60.0, "labelled": pytest.approx(0.3)}]  # (300 * .2 + 100 * .6) / 400


def test_refused_numbers_appear_nowhere(good: Mart) -> None:
    digits = re.compile(r"0?\.7654|0\.26543|0\.8154")  # the value, its difference to .5, the value on fold A
    assert not digits.search(said(good))
    assert all(b"0.76" not in path.read_bytes() for path in good.folder.glob("*.parquet"))
    packed = np.float64(REFUSED).tobytes()
    chunks = [chunk for table in good.tables.values() for column in table for chunk in column.chunks]
    assert not any(packed in buffer.to_pybytes() for chunk in chunks for buffer in chunk.buffers() if buffer is not None)
    assert "bad: refused: Because it is refused." in "\n".join(lines(good))
    (bad,) = [row for row in to_json(good)["decision_points"][0]["estimates"] if row["policy"] == "bad" and row["fold"] == "B"]
    assert (bad["value"], bad["low"], bad["moments_mean"], bad["reasons"]) == (None, None, None, ["Because it is refused."])


def test_the_printer_needs_everything_that_makes_a_number_readable() -> None:
    assert printed(estimate("good", 0.6)) == ("0.600", "0.580 to 0.620")
    assert printed(estimate("good", 0.6, "not mature")) == ("withheld", "")
    assert printed(difference("good", 0.1), signed=True) == ("+0.100", "+0.080 to +0.120")
    for name in ("value", "low", "interval_kind", "n", "clusters", "ess", "window"):
        with pytest.raises(InputError, match=f"DR of good: found a value without {name}"):
            printed(estimate("good", 0.6) | {name: None})
    with pytest.raises(InputError, match="without value, low, high"):
        printed(estimate("good", np.nan))


def test_digits_are_worth_the_interval() -> None:
    assert printed(estimate("p", 1234.5678, low=1234.5612, high=1234.5744)) == ("1,234.568", "1,234.561 to 1,234.574")
    assert printed(estimate("p", 51234.0, low=40000.0, high=62000.0)) == ("51,234", "40,000 to 62,000")
    assert printed(estimate("p", 0.5, low=0.5, high=0.5)) == ("0.500", "0.500 to 0.500")
    assert [chance(p) for p in (0.0, 1e-5, 0.0321, 1.0, None)] == ["< 0.1 %", "< 0.1 %", "3.21 %", "> 99.9 %", "-"]
    assert [share(part) for part in (0.0, 0.0321, 1.0, None)] == ["0 %", "3.21 %", "100 %", "-"]
    assert [duration(s) for s in (30, 3600, 7 * 86_400)] == ["30 seconds", "1 hours", "7 days"]


def test_reasons_are_said_once_and_of_whom() -> None:
    rows = [estimate(policy, 0.1, "caution", estimator=name) for policy in "ab" for name in ("DM", "DR")]
    assert reasons(rows) == ["DM, DR: Because it is caution."], "of everybody"
    assert reasons([*rows, estimate("c", 0.1)]) == ["a (DM, DR); b (DM, DR): Because it is caution."]


def test_an_artifact_is_told_by_eight_digits_of_its_digest() -> None:
    assert label(f"dr-2026@{'0123456789abcdef' * 2}") == "dr-2026@01234567"
    assert label("vw@v1") == "vw@v1"
    assert label(None) == "-"


def test_uncertified_is_said_wherever_a_number_stands(good: Mart, tmp_path: Path) -> None:
    tables, marked = evaluated(), ("estimates", "differences", "portfolio", "portfolio_policies")
    for name in marked:
        tables[name] = [row | {"certified": False} for row in tables[name]]
    mart = night(tmp_path, tables)
    shown = sum(len(mart.records(name)) for name in marked)
    assert html(mart).count('<span class="hatched">uncertified rows in</span>') == shown
    assert sum("[uncertified rows in]" in line for line in lines(mart)) == 4  # three policies, one portfolio
    assert "uncertified rows in" not in re.sub("Dashed interval: uncertified rows in", "", html(good))


def test_hostile_names_are_text(tmp_path: Path) -> None:
    tables = evaluated()
    names = [*HOSTILE, "x" * 10_000, "‮gpj", "a\x1b[31m"]
    tables["estimates"] += [estimate(name, 0.3, "caution", reasons=[name]) for name in names]
    tables["estimates"].append(estimate("good", 0.5, segment=HOSTILE[0], metric=HOSTILE[1]))
    tables["portfolio_policies"] += [tables["portfolio_policies"][0] | {"policy": name, "reason": name} for name in HOSTILE]
    tables["certificates"] = [certificate(policy=name, verdict="fail", reasons=[name]) for name in HOSTILE]
    tables["candidates"] = [{"dp": DP, "policy": name, "date": TODAY, "learner": name, "reason": name} for name in HOSTILE]
    mart = night(tmp_path, tables, settings=settings(tmp_path))
    text = html(mart)
    found = Tags()
    found.feed(text)
    assert found.names < {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "strong", "span", "bdi", "div", "table", "thead",
        "tbody", "tr", "th", "td", "ul", "li", "details", "summary", "figure", "figcaption", "svg", "g", "path", "text", "line",
        "defs", "clippath", "rect", "lineargradient", "stop",
    }  # fmt: skip
    assert not {name for name in found.attributes if name.startswith("on") or name in ("href", "src", "xlink:href")}
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "{{7*7}}" in text
    assert "49" not in re.findall(r"<bdi[^>]*>([^<]*)", text)
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(chart)
    assert re.findall(r"<bdi[^>]*>(x+…)</bdi>", text)[0] == "x" * 79 + "…", "cut at 80 characters"
    assert "\\u202egpj" in re.findall(r"<bdi[^>]*>(\\u202e.*?)</bdi>", text)
    assert all(line.isprintable() and len(line) <= 240 for line in lines(mart)), "no control characters for a terminal"


def test_an_empty_night_renders(tmp_path: Path) -> None:
    mart = night(tmp_path, {}, {})
    (row,) = mart.records("decision_points")
    assert (row["live_policy"], row["step"], row["decisions"], row["certified"], row["verdict"]) == (None, None, 0, None, "no rows")
    assert "No decisions yet." in html(mart)
    assert "No evaluation of this decision point on this date." in html(mart)
    assert lines(mart)[0].startswith(f"Night of {TODAY}, tenant shop: no data.")
    assert rules(mart) == {"no rows": ("alarm", "2026-11-14")}, "no row in all of the lookback"
    assert needs_attention(mart)
    assert to_json(mart)["data_through"] is None


def test_a_good_night_needs_no_attention(good: Mart) -> None:
    assert rules(good) == {}
    assert not needs_attention(good)
    (row,) = good.records("decision_points")
    assert (row["live_policy"], row["step"], row["decisions"], row["certified"], row["verdict"]) == (LIVE, "logged", 100, 1, "pass")
    assert (row["reward"], row["version"], row["window_seconds"], row["direction"]) == ("click", 1, 3 * 86_400, "higher")
    assert row["next_action"] == "Consider an A/B test of good, fine."


def test_the_summary_is_short_and_says_the_same(good: Mart) -> None:
    first, empty, *block = lines(good)
    assert first == f"Night of {TODAY}, tenant shop: data through {TODAY} UTC. Reports: {good.manifest.snapshot_id}."
    assert empty == ""
    assert block == [
        f"ads: 100 decisions, logged: {LIVE}",
        "  certificate: pass; 100% of the last 7 days' rows certified",
        "  click per decision, DR, 7 days, units that neither taught nor chose (95 % normal interval):",
        "    logging: 0.500 (0.480 to 0.520); 1,000 rows, 900 units, ESS 640; trust",
        "    good: 0.600 (0.580 to 0.620); difference +0.100 (+0.080 to +0.120), P(worse) 3.21 %; "
        "1,000 rows, 900 units, ESS 640; trust",
        "    bad: refused: Because it is refused.",
        "  portfolio, k = 2 (not graded here): expected gain 0.111, spread 0.0222, P(any harm) 12.3 %: good, fine",
        "  next: Consider an A/B test of good, fine.",
    ]


def test_the_summary_names_all_whose_numbers_it_gives(good: Mart) -> None:
    """The portfolio's numbers are of its k = 2 candidates, not of those alone that are worth a test."""
    skipped = [shortlisted(name, rank, 0.5, decision="skip") for name, rank in (("fine", 2), ("poor", 3))]
    text = lines(but(good, portfolio_policies=[shortlisted("good", 1, 0.6), *skipped]))
    assert text[-2].endswith("P(any harm) 12.3 %: good, fine (skip)")


def test_a_policy_that_is_the_baseline_is_not_said_to_be_better(good: Mart) -> None:
    same = difference("good", 0.0, stderr=0.0, low=0.0, high=0.0) | {"p_worse": 0.0}
    assert [worse(row) for row in (same, same | {"stderr": 0.01}, same | {"value": 0.1})] == ["-", "< 0.1 %", "< 0.1 %"]
    text = "\n".join(lines(but(good, differences=[same])))
    assert "difference 0 (0 to 0); 1,000 rows" in text


def test_long_blocks_are_cut_and_what_is_left_out_is_counted(good: Mart) -> None:
    tables = {**evaluated(), **certified("fail")}
    tables["estimates"] += [estimate(f"more {i}", 0.3) for i in range(20)]
    tables["certificates"][0]["reasons"] = [f"Reason {i}." for i in range(7)]
    text = lines(but(good, **tables))
    assert len(text) <= 2 + 17
    assert "    and 18 more" in text, "two candidates, a baseline and 20 more; five are shown"
    assert "    and 5 more" in text, "reasons of the certificate"


def test_failed_certificate_is_an_alarm_since_it_first_failed_without_a_break(tmp_path: Path) -> None:
    days = Night.of(DATE, settings(tmp_path)).days(6)
    verdicts = ["fail", "pass", "fail", "none", "fail", "fail"]
    tables = {"certificates": [certificate(day, v) for day, v in zip(days, verdicts, strict=True) if v != "none"]}
    rows = {day: decided() for day, verdict in zip(days, verdicts, strict=True) if verdict != "none"}
    mart = night(tmp_path, tables, rows)
    (alarm,) = mart.records("alarms")
    assert (alarm["rule"], alarm["severity"], alarm["opened"], alarm["closed"]) == ("certificate failed", "alarm", days[2], None)
    assert alarm["evidence"] == f"{LIVE}: Weights average 1.31."
    (row,) = mart.records("decision_points")
    assert (row["verdict"], row["certified"]) == ("fail", pytest.approx(1 / 5))  # one day of five with rows
    assert "until then, by default, these rows are left out" in row["next_action"]
    assert needs_attention(mart)
    assert "ALARM certificate failed: uniform@1: Weights average 1.31." in "\n".join(lines(mart))


def test_warnings_gaps_and_an_unusual_join_rate_are_cautions(tmp_path: Path) -> None:
    odd = {"gaps": 7, "numbered": 93, "join_rate": 0.71, "join_low": 0.92, "join_high": 0.95}
    tables = {"certificates": [certificate(YESTERDAY, "pass", **odd), certificate(TODAY, "warn", **odd)]}
    mart = night(tmp_path, tables)
    assert rules(mart) == {
        "certificate warned": ("caution", TODAY), "gaps": ("caution", YESTERDAY), "join rate": ("caution", YESTERDAY)
    }  # fmt: skip
    evidence = {row["rule"]: row["evidence"] for row in mart.records("alarms")}
    assert evidence["join rate"] == f"{LIVE}: Join rate 71.0%, usual 92.0% to 95.0%."
    assert evidence["gaps"] == f"{LIVE}: 7 numbers are missing."
    assert not needs_attention(mart)


def test_rows_without_a_certificate_are_an_alarm(tmp_path: Path) -> None:
    rows = {day: decided() for day in Night.of(DATE, settings(tmp_path)).days(3)}
    mart = night(tmp_path, {}, rows)
    assert rules(mart) == {"certificate missing": ("alarm", "2026-11-20"), "nothing certified": ("alarm", "2026-11-20")}
    other = night(tmp_path / "other", certified("pass"), {TODAY: decided("someone@2")})
    assert "someone@2" in other.records("alarms")[0]["evidence"]
    assert other.records("decision_points")[0]["verdict"] == "missing"
    assert "by default, estimates leave them out" in other.records("alarms")[0]["text"]


@pytest.mark.parametrize(("back", "severity"), [(1, "caution"), (2, "alarm"), (3, "alarm")])
def test_late_data_is_a_caution_for_one_night_and_then_an_alarm(tmp_path: Path, back: int, severity: str) -> None:
    days = Night.of(DATE, settings(tmp_path)).days(back + 1)
    mart = night(tmp_path, {"certificates": [certificate(days[0])]}, {days[0]: decided()})
    assert rules(mart) == {"no rows": (severity, days[1])}
    assert mart.manifest.data_through == days[0]
    assert f"Data ends {days[0]} UTC, {back} night{'s' * (back > 1)} late." in html(mart)


def test_nothing_mature_is_expected_until_the_window_has_passed(tmp_path: Path) -> None:
    def mart(window_days: float) -> Mart:
        days = Night.of(DATE, settings(tmp_path)).days(5)
        tables = {"certificates": [certificate(day, mature=0) for day in days]}
        folder = tmp_path / f"{window_days}"
        return night(folder, tables, {day: decided() for day in days}, settings=settings(folder, point(window_days=window_days)))

    assert rules(mart(7)) == {"nothing mature": ("caution", "2026-11-18")}
    assert rules(mart(3)) == {"nothing mature": ("alarm", "2026-11-18")}  # the oldest rows are four days old


def test_all_estimates_refused_is_an_alarm_of_candidates_alone(tmp_path: Path) -> None:
    tables = {**evaluated(), **certified("pass", "pass")}
    tables["estimates"] = [estimate("logging", 0.5), *(estimate(name, 0.6, "refused") for name in ("good", "bad"))]
    mart = night(tmp_path, tables)
    assert rules(mart) == {"all estimates refused": ("alarm", TODAY)}
    assert mart.records("alarms")[0]["evidence"] == "Because it is refused."
    assert "no candidate can be valued" in mart.records("decision_points")[0]["next_action"]


def test_orphans_belong_to_no_decision_point_and_are_said(tmp_path: Path) -> None:
    chosen, lake = settings(tmp_path), Lake(tmp_path / "lake")
    write(lake, certified("pass", "pass"), {TODAY: decided(), YESTERDAY: decided()})
    snapshot = lake.commit([lake.write("orphan_rewards", decided(rows=12))])
    mart = reported(chosen, lake, snapshot)
    assert [(row["dp"], row["rule"], row["evidence"]) for row in mart.records("alarms")] == [("", "orphans", "12 rewards.")]
    assert lines(mart)[-1].startswith(
        "caution orphans: Events wait for decisions that are not known, or whose id came with several"
    )


def test_decisions_that_cannot_be_read_are_an_alarm_where_they_are_many(tmp_path: Path) -> None:
    chosen, lake = settings(tmp_path), Lake(tmp_path / "lake")
    write(lake, certified("pass", "pass"), {TODAY: decided(), YESTERDAY: decided()})
    wrong = [f"row {i}, action {what}" for i, what in enumerate(("'y': found nothing.", "'y': found nothing.", "'x': found text."))]
    snapshot = lake.commit([lake.write("unreadable", unreadable(*wrong), point=DP, day=day) for day in (TODAY, YESTERDAY)])
    mart = reported(chosen, lake, snapshot)
    assert rules(mart) == {"unreadable": ("alarm", TODAY)}
    assert mart.records("alarms")[0]["evidence"] == "3 decisions: 2 action 'y': found nothing, 1 action 'x': found text."
    snapshot = lake.commit([lake.write("unreadable", unreadable(*wrong[:1]), point=DP, day=TODAY)])
    assert rules(reported(chosen, lake, snapshot)) == {"unreadable": ("caution", TODAY)}


def test_a_date_of_which_nothing_can_be_read_is_not_one_on_which_nothing_came(tmp_path: Path) -> None:
    chosen, lake = settings(tmp_path), Lake(tmp_path / "lake")
    wrong = unreadable(*(f"row {i}, context feature 'y': found nothing; expected a number" for i in range(600)))
    write(lake, {"certificates": [certificate(YESTERDAY)]}, {YESTERDAY: decided(), TODAY: decided(rows=0)})
    snapshot = lake.commit([lake.write("unreadable", wrong, point=DP, day=TODAY)])
    mart = reported(chosen, lake, snapshot)
    assert rules(mart) == {"unreadable": ("alarm", TODAY)}
    why = "context feature 'y': found nothing; expected a number."
    assert mart.records("alarms")[0]["evidence"] == f"600 decisions: {why}"
    assert mart.records("decision_points")[0]["next_action"] == f"Mend the features of the decision point: {why}"
    assert mart.manifest.data_through == TODAY, "decisions arrived"


def test_rewards_of_unknown_names_and_rejected_records_are_said(tmp_path: Path) -> None:
    chosen, lake = settings(tmp_path), Lake(tmp_path / "lake")
    write(lake, certified("pass", "pass"), {TODAY: decided(), YESTERDAY: decided()})
    reasons = pa.table({"kind": ["decisions"] * 7 + ["quarantined"] * 3, "reason": ["kind: expected"] * 5 + ["unit: expected"] * 5})
    sources = pa.table({name: [count] for name, count in {"decisions": 900, "rewards": 93, "shown": 0, "rejected": 7}.items()})
    written = [lake.write("rewards", observed(4, "buy"), point=DP, day=TODAY), lake.write("sources", sources)]
    snapshot = lake.commit(
        [*written, lake.write("rewards", observed(96), point=DP, day=YESTERDAY), lake.write("rejected", reasons)]
    )
    mart = reported(chosen, lake, snapshot)
    assert rules(mart) == dict.fromkeys(("rejected", "quarantined"), ("caution", TODAY)) | {"unknown rewards": ("alarm", TODAY)}
    evidence = {row["rule"]: row["evidence"] for row in mart.records("alarms")}
    assert (evidence["quarantined"], evidence["rejected"]) == ("3 rewards.", "7 of 1,000: 5 kind: expected, 2 unit: expected.")
    assert evidence["unknown rewards"] == f"4 buy; the decision point knows {REWARD}, spend."


def test_mature_decisions_without_a_single_reward_are_an_alarm(tmp_path: Path) -> None:
    found = [certificate(day, mature=60, joined=0) for day in (TODAY, YESTERDAY)]
    mart = night(tmp_path, {"certificates": found})
    assert rules(mart)["no rewards"] == ("alarm", TODAY)
    assert "120 mature decisions" in next(row["evidence"] for row in mart.records("alarms") if row["rule"] == "no rewards")


def test_the_same_alarm_keeps_its_id(tmp_path: Path) -> None:
    one, two = (night(tmp_path / name, certified("pass", "fail")) for name in "ab")
    assert [row["id"] for row in one.records("alarms")] == [row["id"] for row in two.records("alarms")]
    assert (
        len({row["id"] for row in night(tmp_path / "c", certified("fail", "fail")).records("alarms")}) == 2
    )  # and nothing certified


def test_revisions_are_days_that_were_written_again(tmp_path: Path) -> None:
    chosen, lake = settings(tmp_path), Lake(tmp_path / "lake")
    write(lake, certified("pass", "pass"), {TODAY: decided(), YESTERDAY: decided()})
    for rows in (110, 120):
        lake.commit([lake.write("rows", decided(rows=rows), point=DP, day=YESTERDAY)])
    lake.commit([lake.write("rewards", observed(rows), point=DP, day=TODAY) for rows in (1, 2)])
    snapshot = lake.commit([lake.write("rows", decided(rows=5), point=DP, day=YESTERDAY, bucket=1)])
    (row,) = reported(chosen, lake, snapshot).records("revisions")
    assert row == {
        "tenant": "shop", "dp": DP, "day": YESTERDAY, "revision": 3, "rows": 125, "snapshot": snapshot.id,
        "reason": "Rewards matured, or settings changed, after the rows were first written.",
    }  # fmt: skip
    for rows in (3, 4):
        lake.commit([lake.write("rewards", observed(rows), point=DP, day=YESTERDAY)])
    mart = reported(chosen, lake, lake.snapshot())
    (row,) = mart.records("revisions")
    assert row["reason"] == "Rewards arrived after the rows were first written."
    assert "Rewards arrived after the rows were first written." in html(mart)


def test_a_night_that_runs_again_is_the_same_to_the_byte(tmp_path: Path) -> None:
    chosen, lake = settings(tmp_path), Lake(tmp_path / "lake")
    snapshot = write(lake, {**evaluated(), **certified("pass", "warn")}, {TODAY: decided(), YESTERDAY: decided()})
    first = report(Night.of(DATE, chosen), chosen, lake, snapshot)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    assert report(Night.of(DATE, chosen), chosen, lake, snapshot) == first
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


def test_a_date_is_rendered_again_from_its_tables(good: Mart) -> None:
    before = html(good)
    (good.folder / "report.html").unlink()
    text = render(read_mart(good.folder.parent.parent, "shop", TODAY))
    assert html(good) == before
    assert text == lines(good)


def test_what_is_promoted_is_the_live_policy(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    batch = DecisionBatch(np.zeros((1, 0)), np.zeros((1, 2, 0)), np.ones((1, 2), dtype=bool), True)
    digest = registry.register(Uniform(), point(), name="even", golden=batch)
    night(tmp_path, certified("pass"))
    assert read_mart(tmp_path / "reports", "shop").records("decision_points")[0]["live_policy"] == LIVE, "nothing is promoted yet"
    registry.promote(digest, who="me", why="to see")
    (row,) = night(tmp_path, certified("pass")).records("decision_points")
    assert (row["live_policy"], row["step"]) == (f"even@{digest[:32]}", "live")


def test_reporting_makes_no_registry(tmp_path: Path) -> None:
    night(tmp_path, {})
    assert not (tmp_path / "registry").exists()


def test_two_decision_points_keep_their_numbers_apart(tmp_path: Path) -> None:
    tables = evaluated()
    tables["evaluations"].append(tables["evaluations"][0] | {"evaluation_id": "e2", "dp": "search"})
    tables["estimates"].append(estimate("only here", 0.9, evaluation_id="e2"))
    mart = night(tmp_path, {}, settings=settings(tmp_path, point(), point("search")))  # nothing to draw
    ads, search = point_views(but(mart, evaluations=tables["evaluations"], estimates=tables["estimates"]))
    assert {row["policy"] for row in search.headline} == {"only here"}
    assert "only here" not in {row["policy"] for row in ads.headline}


def test_the_reference_names_every_table_with_its_keys_and_columns() -> None:
    sections = re.findall(r"^### `(\w+)`\n(.*?)(?=^#|\Z)", REFERENCE.read_text(), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in sections] == list(TABLES)
    for name, text in sections:
        cells = [cell for row in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE) for cell in re.findall(r"`([^`]+)`", row)]
        assert cells == list(TABLES[name].columns), name
        keys = re.search(r"^Key: (.*)\.$", text, re.MULTILINE)
        assert keys, name
        assert re.findall(r"`([^`]+)`", keys[1]) == list(TABLES[name].columns)[: TABLES[name].keys], name


def test_the_reference_names_every_alarm() -> None:
    (listed,) = re.findall(r"^\| `rule` \| (.*) \|$", REFERENCE.read_text(), re.MULTILINE)
    source = "".join(Path(module.__file__ or "").read_text() for module in (alarms, intake))
    yielded = re.findall(r'(?:_Rule\(|alarm\(\s*(?:facts\.dp|point\.name|""), )"([a-z ]+)"', source)
    assert sorted(re.findall(r"`([^`]+)`", listed)) == sorted(yielded)


def test_moments_of_two_buckets_add_to_those_of_the_whole() -> None:
    """What the reference says of merging: SNIPS from merged moments is SNIPS of all rows."""
    parts = [random_columns(700, 1), random_columns(400, 2)]
    whole, merged = Moments.of(np.concatenate(parts)), Moments.of(parts[0]) + Moments.of(parts[1])
    means, value = per_row(merged.mean), SNIPS().value(per_row(merged.mean))
    everything = np.concatenate(parts)
    assert value == pytest.approx(everything[:, 0].sum() / everything[:, 1].sum(), rel=1e-12)
    gradient = per_row_gradient(SNIPS().gradient(means), merged.mean)
    assert merged.stderr(gradient) == pytest.approx(whole.stderr(gradient), rel=1e-12)
