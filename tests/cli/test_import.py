"""`propel import` and `propel export`: exit codes, the report as text and as JSON, and folders that are whole or not there."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import Result
from typer.testing import CliRunner

from pipelines.importers import writer
from propel import app
from tests.pipelines.dsjson_lines import encoded, observation, single, slotted


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three good lines, two decisions in one of them, and three bad ones."""
    lines = [single("e1"), b"{\n", slotted(), single(Version="3"), observation("gone"), b"?\n", single("e2", _skipLearn=True)]
    path = tmp_path / "log.dsjson"
    path.write_bytes(b"".join(map(encoded, lines)))
    return path


def test_the_report_in_words(source: Path, tmp_path: Path) -> None:
    result = run("import", source, "--to", tmp_path / "events")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        f"{source} (dsjson)",
        "4 decisions (3 sampled, 1 shadow) of 3 actions, 5 rewards",
        "- 2 not imported (json): lines 2, 6",
        "  line 2: found Input data was truncated; expected one JSON object",
        "- 1 not imported (version): line 4",
        "  line 4: found version '3'; expected 1",
        "- Rewards that came without their decision: 1; of these, 0 have it in this source.",
        "- All decisions lack units: each event stands for itself, so intervals are too narrow where users come back.",
        f"decisions.parquet, log.parquet, report.json, rewards.parquet in {tmp_path / 'events'}",
        f"3 rows can be evaluated: propel ope --log {tmp_path / 'events' / 'log.parquet'} --policy uniform "
        "--context Guest.age,Guest.tier",
    ]  # slot.size is a number that lines without slots lack


def test_the_report_as_json_is_that_in_the_folder(source: Path, tmp_path: Path) -> None:
    result = run("import", source, "--to", tmp_path / "events", "--json", "--unit", "Guest.age", "--context", "Guest.age")
    report = json.loads(result.stdout)
    assert (result.exit_code, report) == (0, json.loads((tmp_path / "events" / "report.json").read_text()))
    assert {name: report[name] for name in ("format", "lines", "decisions", "rows", "rewards", "observations", "rejected")} == {
        "format": "dsjson",
        "lines": 7,
        "decisions": 4,
        "rows": 3,
        "rewards": 5,
        "observations": 1,
        "rejected": 3,
    }
    assert report["problems"]["json"]["lines"] == [2, 6]
    assert (report["missing"], report["context"]) == ({}, ["Guest.age"])


def test_names_of_point_tenant_and_reward(source: Path, tmp_path: Path) -> None:
    names = ("--decision-point", "menu", "--tenant", "cafe", "--reward-name", "tip")
    assert run("import", source, "--to", tmp_path / "events", *names).exit_code == 0
    decisions = pl.read_parquet(tmp_path / "events" / "decisions.parquet")
    rewards = pl.read_parquet(tmp_path / "events" / "rewards.parquet")
    assert decisions["decision_point"].unique().to_list() == ["menu"]
    assert decisions["tenant"].unique().to_list() == rewards["tenant"].unique().to_list() == ["cafe"]
    assert rewards["name"].unique().to_list() == ["tip"]
    bad = run("import", source, "--to", tmp_path / "more", "--tenant", "a\nb")
    assert (bad.exit_code, "tenant: found 'a\\nb'" in bad.stderr) == (2, True)


def test_nothing_left_is_2_and_no_folder(tmp_path: Path) -> None:
    source = tmp_path / "log.dsjson"
    source.write_bytes(encoded(single(Version="3")) + b"{")
    for more in ((), ("--json",)):
        result = run("import", source, "--to", tmp_path / "events", *more)
        assert result.exit_code == 2
        assert "version" in result.stdout  # what was wrong is still told
    assert "Nothing could be imported; no folder was made." in run("import", source, "--to", tmp_path / "events").stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.dsjson"]
    source.write_bytes(encoded(observation()))
    alone = run("import", source, "--to", tmp_path / "events")
    assert alone.exit_code == 0  # one reward is something
    assert "No row can be evaluated" in alone.stdout


def test_a_folder_must_be_new(source: Path, tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    assert run("import", source, "--to", tmp_path / "events").exit_code == 0  # empty is as good as new
    before = {path.name: path.read_bytes() for path in (tmp_path / "events").iterdir()}
    again = run("import", source, "--to", tmp_path / "events")
    assert (again.exit_code, "expected a new folder: name another one" in again.stderr) == (2, True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "events").iterdir()} == before
    onto_a_file = run("import", source, "--to", source)
    assert (onto_a_file.exit_code, "expected a new folder" in onto_a_file.stderr) == (2, True)


def test_into_the_folder_one_stands_in(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("import", source, "--to", ".").exit_code == 0
    assert (tmp_path / "here" / "report.json").is_file()


@pytest.mark.parametrize("place", ["_write_decisions", "_write_rewards", "_write_log", "_summarise", "_log_columns", "_publish"])
def test_an_error_in_the_middle_leaves_no_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def broken(*_: Any) -> None:
        raise OSError("found no space left; expected some")

    monkeypatch.setattr(writer.EventWriter, place, broken)
    result = run("import", source, "--to", tmp_path / "events")
    assert (result.exit_code, result.stderr) == (2, "propel: found no space left; expected some\n")
    assert [path.name for path in tmp_path.iterdir()] == ["log.dsjson"]


def test_files_of_others_beside_the_folder_stay(source: Path, tmp_path: Path) -> None:
    for name in ("events.part", "log.dsjson.part", "back.dsjson.part"):
        (tmp_path / name).write_text("mine")
    assert run("import", source, "--to", tmp_path / "events").exit_code == 0
    assert run("export", tmp_path / "events", "--to", tmp_path / "back.dsjson").exit_code == 0
    there = ["back.dsjson", "back.dsjson.part", "events", "events.part", "log.dsjson", "log.dsjson.part"]
    assert sorted(path.name for path in tmp_path.iterdir()) == there
    assert (tmp_path / "back.dsjson.part").read_text() == "mine"


def test_a_short_file_that_was_cut_is_imported_up_to_there(source: Path, tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(encoded(single(f"e{i}")) for i in range(200)))
    (tmp_path / "cut.dsjson.gz").write_bytes(whole[: len(whole) // 2])
    result = run("import", tmp_path / "cut.dsjson.gz", "--to", tmp_path / "cut", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert 10 < report["decisions"] < 200
    assert report["problems"]["truncated"]["lines"] == [report["decisions"] + 1]


def test_options_of_tables_are_refused_for_other_formats(source: Path, tmp_path: Path) -> None:
    result = run("import", source, "--to", tmp_path / "events", "--split", "a=0.5,b=0.5")
    assert result.exit_code == 2
    assert "options of an exposure table for dsjson" in result.stderr


def test_the_format_is_found_out(source: Path, tmp_path: Path) -> None:
    def kind(path: Path, *more: str) -> str:
        result = run("import", path, "--to", tmp_path / f"to-{path.name}", "--json", *more)
        assert result.exit_code == 0, result.output
        return str(json.loads(result.stdout)["format"])

    assert kind(source) == "dsjson"
    (tmp_path / "log.json.gz").write_bytes(gzip.compress(source.read_bytes()))
    assert kind(tmp_path / "log.json.gz") == "dsjson"
    (tmp_path / "broken-first").write_bytes(b'"EventId": "half a line"}\n' + source.read_bytes())
    assert kind(tmp_path / "broken-first") == "dsjson"
    (tmp_path / "table.CSV").write_text("action,p\na,0.5\n")
    assert kind(tmp_path / "table.CSV", "--propensity", "p") == "exposures"


def test_what_cannot_be_read_is_2(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gz").write_bytes(gzip.compress(source.read_bytes())[:15])
    (tmp_path / "log.txt").write_text("some words\n")
    (tmp_path / "table.csv").write_text("action,p\na,0.5\n")
    for path, more, says in (
        (tmp_path / "none", (), "no such file; expected a log: check the path"),
        (tmp_path / "cut.gz", (), "give --format"),
        (tmp_path / "log.txt", (), "give --format"),
        (tmp_path, (), "expected a folder such as random/all"),
        (tmp_path / "table.csv", (), "propel propensities"),
        (tmp_path / "table.csv", ("--propensity", "q"), "column 'q': found no such column"),
        (tmp_path / "table.csv", ("--split", "a=0.5,b=0.4"), "expected positive shares that sum to 1"),
        (tmp_path / "table.csv", ("--split", "a:0.5"), "expected names and shares, such as"),
    ):
        result = run("import", path, "--to", tmp_path / "events", *more)
        assert result.exit_code == 2
        assert says in " ".join(result.stderr.replace("│", " ").split()), result.stderr
        assert not (tmp_path / "events").exists()


def test_a_table_by_options(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("variant,ok,user,at,id,kept,os,by\nnew,1,u1,2023-05-06,x1,0.5,ios,flag@1\nold,0,u2,2023-05-06,x2,1,,flag@2\n")
    options = ("--action", "variant", "--reward", "ok", "--unit", "user", "--time", "at", "--decision-id", "id")
    more = ("--pass-probability", "kept", "--policy", "by", "--context", "os", "--split", "old=0.5,new=0.5", "--estimated")
    result = run("import", table, "--to", tmp_path / "my events", *options, *more)
    assert result.exit_code == 0
    assert f"propel ope --log '{tmp_path / 'my events' / 'log.parquet'}' --policy uniform --context os" in result.stdout
    assert "at most caution" in result.stdout
    log = pl.read_parquet(tmp_path / "my events" / "log.parquet")
    assert log.select("decision_id", "action", "unit", "policy", "sample_weight", "os").rows() == [
        ("x1", "new", "u1", "flag@1", 2.0, "ios"),
        ("x2", "old", "u2", "flag@2", 1.0, None),
    ]


def test_terminal_codes_in_a_log_do_not_reach_the_terminal(tmp_path: Path) -> None:
    source = tmp_path / "log.dsjson"
    nasty = "\x1b[2J[bold]"
    lines = [single(nasty), single(Version=nasty), single(c={nasty: 1}), observation(nasty), single(Timestamp=nasty), single("ok")]
    source.write_bytes(b"".join(map(encoded, lines)))
    result = run("import", source, "--to", tmp_path / "events")
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "[bold]" in result.output  # shown as it is, not obeyed


def test_out_and_in_again(source: Path, tmp_path: Path) -> None:
    run("import", source, "--to", tmp_path / "events")
    result = run("export", tmp_path / "events", "--to", tmp_path / "back.dsjson.gz")
    assert (result.exit_code, result.stdout) == (0, f"4 lines in {tmp_path / 'back.dsjson.gz'}\n")
    again = run("import", tmp_path / "back.dsjson.gz", "--to", tmp_path / "again")
    assert again.stdout.splitlines()[1] == "4 decisions (3 sampled, 1 shadow) of 3 actions, 5 rewards"
    names = ["decision_id", "shares", "propensity", "chosen", "kind", "body_hash", "request_hash"]
    first, second = (pl.read_parquet(tmp_path / name / "decisions.parquet", columns=names) for name in ("events", "again"))
    assert first.equals(second)


def test_export_refuses_and_leaves_nothing_half_written(source: Path, tmp_path: Path) -> None:
    run("import", source, "--to", tmp_path / "events")
    there = run("export", tmp_path / "events", "--to", source)
    assert (there.exit_code, "already there; expected a new file" in there.stderr) == (2, True)
    nothing = run("export", tmp_path, "--to", tmp_path / "back")
    assert (nothing.exit_code, "expected a folder that `propel import` wrote" in nothing.stderr) == (2, True)
    decisions = tmp_path / "events" / "decisions.parquet"
    whole = decisions.read_bytes()
    for spoilt, says in ((whole[:100], "expected a complete Parquet file"), (None, "found no")):
        decisions.unlink()
        if spoilt is not None:
            decisions.write_bytes(spoilt)
        result = run("export", tmp_path / "events", "--to", tmp_path / "back")
        assert (result.exit_code, says in result.stderr) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events", "log.dsjson"]


def test_the_real_process(source: Path, tmp_path: Path) -> None:
    words = ["import", str(source), "--to", str(tmp_path / "events"), "--json"]
    done = subprocess.run([sys.executable, "-m", "propel", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr, json.loads(done.stdout)["decisions"]) == (0, "", 4)
