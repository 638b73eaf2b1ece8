"""`propel nightly` and `propel report`, as cron and people meet them."""

from __future__ import annotations

import datetime as dt
import fcntl
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from propel import app
from tests.nightly.small_nights import FIRST, SECOND, feed


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder whose first night was run, and what that said."""
    folder = tmp_path_factory.mktemp("cli") / "feed"
    feed(folder, 3000)
    return folder, run(folder, "nightly")


def run(folder: Path, command: str, *words: str, date: object = FIRST) -> Result:
    return CliRunner().invoke(app, [command, "--date", str(date), "--config", str(folder / "propel.toml"), *words])


def test_a_night_says_what_it_did_and_what_it_found(night: tuple[Path, Result]) -> None:
    _, result = night
    assert result.exit_code == 0, result.output
    steps = [line.split()[0] for line in result.stdout.splitlines()[:7]]
    assert steps == ["ingest", "join", "certify", "train", "evaluate", "select", "report"]
    assert "3,000 decisions" in result.stdout
    assert "certificate: pass" in result.stdout
    assert "portfolio (not graded here): none. " in result.stdout  # 3,000 decisions are few
    assert "are needed to choose by" in result.stdout


def test_a_second_run_has_nothing_to_do_and_json_says_so(night: tuple[Path, Result]) -> None:
    folder, _ = night
    result = run(folder, "nightly", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [step["partitions"] for step in found["run"]["steps"]] == [0] * 7
    assert found["report"]["decision_points"][0]["dp"] == "ads"
    kept = json.loads((folder / "lake" / "feed" / "runs" / f"{FIRST}.json").read_text())
    assert kept == found["run"]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    feed(tmp_path / "feed")
    result = run(tmp_path / "feed", "nightly", "--dry-run")
    assert result.exit_code == 0
    assert "1 of 1 sources are new: first" in result.stdout
    assert not (tmp_path / "feed" / "lake").exists()


def test_the_report_of_a_date_is_rendered_again(night: tuple[Path, Result]) -> None:
    folder, first = night
    page = Path(first.stdout.splitlines()[-1].removeprefix("Report: "))
    page.unlink()
    result = run(folder, "report")
    assert result.exit_code == 0
    assert page.is_file()
    assert result.stdout.splitlines() == first.stdout.splitlines()[7:]
    missing = run(folder, "report", date=SECOND + dt.timedelta(days=9))
    assert missing.exit_code == 2
    assert str(SECOND + dt.timedelta(days=9)) in missing.stderr


def test_one_night_without_rows_is_a_caution_and_two_need_attention(night: tuple[Path, Result]) -> None:
    folder, _ = night
    assert run(folder, "nightly", date=SECOND).exit_code == 0
    result = run(folder, "nightly", date=SECOND + dt.timedelta(days=1))
    assert result.exit_code == 3
    assert "no rows" in result.stdout.lower()


def test_another_night_holds_the_lake(night: tuple[Path, Result]) -> None:
    folder, _ = night
    with (folder / "lake" / "feed" / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run(folder, "nightly")
    assert result.exit_code == 4
    assert "another night is running" in result.stderr


def test_a_date_that_is_not_over_is_refused(night: tuple[Path, Result]) -> None:
    folder, _ = night
    for words in ((), ("--dry-run",)):
        result = run(folder, "nightly", *words, date=dt.datetime.now(dt.UTC).date())
        assert result.exit_code == 2
        assert "expected that to be over: wait" in result.stderr


@pytest.mark.parametrize("date", ["0001-01-01", "9999-12-31"])
def test_dates_beyond_what_can_be_counted_are_refused(tmp_path: Path, date: str) -> None:
    feed(tmp_path / "feed")
    result = run(tmp_path / "feed", "nightly", date=date)
    assert (result.exit_code, "expected one from 1970 to 2115" in result.stderr) == (2, True)


def test_damage_and_mistakes_are_named(night: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = night
    assert "propel.toml" in run(tmp_path, "nightly").stderr
    (folder / "wrong.toml").write_text((folder / "propel.toml").read_text().replace("buckets", "bucket"))
    result = CliRunner().invoke(app, ["nightly", "--config", str(folder / "wrong.toml")])
    assert result.exit_code == 2
    assert "unknown key 'bucket'; did you mean 'buckets'?" in result.stderr
    partition = next((folder / "lake" / "feed" / "rows").rglob("*.parquet"))
    raw = partition.read_bytes()
    partition.write_bytes(raw[:-4] + b"0000")
    (folder / "propel.toml").write_text((folder / "propel.toml").read_text().replace("least_rows = 100", "least_rows = 101"))
    result = run(folder, "nightly")
    partition.write_bytes(raw)
    assert result.exit_code == 2
    assert partition.name in result.stderr
    assert "the partition was altered" in result.stderr
