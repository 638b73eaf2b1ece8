"""The loop closes: a day is logged, a night learns from it, its winner is served, and the next day earns what was forecast."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from bandits.log.files import log_files
from bandits.log.replay import judges, replay
from bandits.policy import UNIFORM, Uniform
from bandits.registry import Registry
from bandits.simulators.payments import World
from ope.data import InputError
from pipelines.log.audit import audit
from pipelines.nightly.lake import open_lake
from pipelines.nightly.mart import Mart, read_mart
from pipelines.nightly.promote import promote
from pipelines.nightly.run import nightly
from pipelines.nightly.settings import Night, Settings, read_settings
from propel import app
from tests.nightly.events import records
from tests.once import once
from tests.verify.closed_loop import DAYS, SALT, live_a_day, prepare, run

PAYMENTS = 5000


@pytest.fixture(scope="module")
def first_night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A day of payments routed evenly, and its night."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("loop") / "shop"
        settings = prepare(folder)
        live_a_day(World.draw(5), settings.points[0], Uniform(), UNIFORM, DAYS[0], folder, np.random.default_rng(1), PAYMENTS)
        nightly(DAYS[0], settings)
        return folder

    return once(tmp_path_factory, "first_night", make)


@pytest.fixture
def shop(first_night: Path, tmp_path: Path) -> Settings:
    """A copy of it."""
    shutil.copytree(first_night, tmp_path / "shop")
    return read_settings(tmp_path / "shop" / "propel.toml")


def mart_of(settings: Settings) -> Mart:
    return read_mart(settings.folder / "reports", settings.tenant, DAYS[0].isoformat())


def changed(mart: Mart, table: str, **columns: Any) -> Mart:
    """A report with other values in some columns."""
    found = mart.tables[table]
    for name, value in columns.items():
        at = found.schema.get_field_index(name)
        found = found.set_column(at, found.schema.field(name), pa.array([value] * found.num_rows, found.schema.field(name).type))
    return dataclasses.replace(mart, tables={**mart.tables, table: found})


@pytest.mark.parametrize("seed", [1, 5])
def test_the_second_day_earns_what_was_forecast(seed: int, tmp_path: Path) -> None:
    """Within 4 standard errors of forecast and second day together; and more than the first, by more than 4 of theirs."""
    found = run(seed, tmp_path / "loop", PAYMENTS)
    assert found is not None
    assert abs(found.z) < 4
    assert abs(found.day2 - found.true) < 4 * found.day2_stderr
    assert found.day2 - found.day1 > 4 * np.sqrt(2) * found.day2_stderr


def test_the_winner_is_served_and_the_ledger_says_why(shop: Settings) -> None:
    (found,) = promote(mart_of(shop), shop)
    registry = Registry(shop.folder / "registry")
    assert found.promoted
    assert registry.pointer("payments").digest == found.digest
    line = registry.ledger()[-1]
    assert line.estimate is not None
    assert line.estimate["low"] > 0
    assert line.estimate["fold"] == "B"
    assert line.who == "propel promote"
    assert registry.verify() == []
    (again,) = promote(mart_of(shop), shop)
    assert (again.promoted, again.reasons) == (False, ("It is served already.",))


def test_a_dry_run_promotes_nothing(shop: Settings) -> None:
    (found,) = promote(mart_of(shop), shop, dry_run=True)
    assert found.promoted
    assert Registry(shop.folder / "registry").pointer("payments").digest is None


@pytest.mark.parametrize(
    ("table", "columns", "reason"),
    [
        ("certificates", {"verdict": "warn"}, "The certificate of uniform@builtin says warn: "),
        ("certificates", {"weight_mean": 1.5}, "The certificate of uniform@builtin is not what was signed."),
        ("certificates", {"day": "2026-11-01"}, "The date has no certificate."),
        ("differences", {"low": 0.0}, "It may be worse: the lower bound of its difference on fold B is +0; expected above 0 "),
        ("differences", {"verdict": "caution"}, "The verdict on its difference is caution: "),
        ("differences", {"certified": False}, "Its difference stands on rows without a passed certificate."),
        ("estimates", {"verdict": "caution"}, "The verdict on its value is caution: "),
        ("differences", {"value": None}, "Its difference to the policy that logged is not known on fold B."),
        ("portfolio_policies", {"decision": "skip"}, "No candidate is worth a test: see the report."),
        ("candidates", {"digest": None}, "It is no artifact of this night."),
    ],
)
def test_each_guard_rail_keeps_the_winner_back(shop: Settings, table: str, columns: dict[str, Any], reason: str) -> None:
    (found,) = promote(changed(mart_of(shop), table, **columns), shop)
    assert not found.promoted
    assert [one[: len(reason)] for one in found.reasons] == [reason]
    assert Registry(shop.folder / "registry").pointer("payments").digest is None


def test_a_frozen_decision_point_stays_as_it_is(shop: Settings) -> None:
    registry = Registry(shop.folder / "registry")
    registry.freeze("payments", who="test", why="test")
    (found,) = promote(mart_of(shop), shop)
    assert found.reasons == ("The decision point is frozen: `propel policy freeze payments --off` lifts that.",)


def test_a_winner_must_be_better_than_what_is_served(shop: Settings) -> None:
    """The day was decided by uniform routing: once something else serves, what is better than uniform says nothing of that."""
    registry, found = Registry(shop.folder / "registry"), promote(mart_of(shop), shop)[0]
    others = [row["digest"] for row in mart_of(shop).records("candidates") if row["digest"] and row["digest"] != found.digest]
    registry.promote(others[0], who="test", why="test")
    (again,) = promote(mart_of(shop), shop)
    assert not again.promoted
    assert again.reasons[0].startswith("It is not known to be better than ")
    assert "in every window uniform@builtin decided, too" in again.reasons[0]
    assert again.reasons[1].startswith("What is served was changed after this report was made (")


def test_every_decision_of_the_day_replays(shop: Settings) -> None:
    found = replay(log_files(shop.log), {SALT.epoch: SALT}, judges(None, shop.points))
    assert (found.decisions, found.actions, found.vectors, found.wrong) == (PAYMENTS, PAYMENTS, PAYMENTS, [])
    told = audit(shop)
    assert (told.decisions, told.rewards, told.orphans, told.findings) == (PAYMENTS, PAYMENTS, 0, [])


def call(shop: Settings, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--config", str(shop.folder / "propel.toml")])


def test_the_command_promotes_once(shop: Settings) -> None:
    result = call(shop, "promote", "--date", str(DAYS[0]))
    assert (result.exit_code, result.stdout.strip().endswith(": promoted")) == (0, True)
    result = call(shop, "promote", "--date", str(DAYS[0]), "--json")
    (found,) = json.loads(result.stdout)
    assert (result.exit_code, found["reasons"]) == (3, ["It is served already."])
    assert "expected a decision point of the settings: payments" in call(shop, "promote", "--point", "x").stderr.replace("\n", " ")


def test_a_night_may_be_a_stretch_of_time(shop: Settings) -> None:
    """Half of the day: only its decisions are certified, learned from and valued, and only those that are mature by its end."""
    start = dt.datetime(2026, 11, 2, 6, tzinfo=dt.UTC)
    end = start + dt.timedelta(hours=12)
    times = [row["decided_at_ns"] for row in records(open_lake(shop), open_lake(shop).snapshot().find("decisions"))]
    night = Night.cut(start, end, shop)
    assert night.between is not None
    inside = sum(night.between[0] <= one < night.between[1] for one in times)
    assert 0.45 * PAYMENTS < inside < 0.55 * PAYMENTS
    run_of = nightly(night, shop)
    mart = read_mart(shop.folder / "reports", shop.tenant, Path(run_of.report).name)
    (certificate,) = mart.records("certificates")
    assert (certificate["rows"], certificate["verdict"]) == (inside, "pass")
    (evaluation,) = mart.records("evaluations")
    assert evaluation["rows"] == inside
    again = nightly(night, shop)
    assert [one.partitions for one in again.steps] == [0] * 7
    result = call(shop, "nightly", "--from", "2026-11-02T06:00:00Z", "--to", "2026-11-02T18:00:00", "--json")
    assert result.exit_code in (0, 3)
    assert json.loads(result.stdout)["report"]["snapshot_id"] == mart.manifest.snapshot_id


def test_half_a_stretch_of_time_is_refused(shop: Settings) -> None:
    moment = dt.datetime(2026, 11, 2, 6, tzinfo=dt.UTC)
    with pytest.raises(InputError, match=r"expected two times with their zone, such as .*, the second one later"):
        Night.cut(moment, moment, shop)
    result = call(shop, "nightly", "--from", "2026-11-02T06:00:00Z")
    assert result.exit_code == 2
    assert "expected both, or a date alone" in result.stderr
