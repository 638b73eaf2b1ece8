"""Simulated payments against the real service, and the live demo from end to end, small."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bandits.decision_point import read_decision_point
from bandits.events import Decision, Reward
from bandits.log.files import log_files
from bandits.log.port import Kind
from bandits.log.segments import records
from bandits.simulators.payments import World
from propel import app
from serving.live_demo import POINT, prepare, run_live, serving, window

PAYMENTS = 400


def test_every_payment_is_decided_on_and_its_result_reported(tmp_path: Path) -> None:
    made = prepare(tmp_path / "shop")
    ledger = tmp_path / "ledger.jsonl"
    words = (
        "simulate",
        "--url",
        made.url,
        "--key",
        made.key,
        "--payments",
        str(PAYMENTS),
        "--second",
        "0",
        "--ledger",
        str(ledger),
    )
    with serving(made, tmp_path):
        result = CliRunner().invoke(app, [*words, "--ledger", str(ledger), "--json"])
        refused = CliRunner().invoke(app, [*words[:4], made.key[:-1], "--payments", "2"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["payments"], found["served"]) == (PAYMENTS, PAYMENTS)
    stored = [one for path in log_files(made.config.parent / "data" / "log") for one in records(path)]
    assert Counter(one.kind for one in stored) == {Kind.DECISION: PAYMENTS, Kind.REWARD: PAYMENTS}
    decisions = [msgspec.json.decode(one.record, type=Decision) for one in stored if one.kind is Kind.DECISION]
    rewards = [msgspec.json.decode(one.record, type=Reward) for one in stored if one.kind is Kind.REWARD]
    assert {one.decision_id for one in decisions} == {one.decision_id for one in rewards}
    assert np.mean([one.value for one in rewards]) == pytest.approx(found["authorised"])
    assert {json.loads(line)["decision_id"] for line in ledger.read_text().splitlines()} == {one.decision_id for one in decisions}
    # uniform routing of this world: 200 worlds are worth .861 with a spread of .032, and 400 payments vary by .017
    assert abs(found["authorised"] - found["true"]) < 4 * found["stderr"]
    rng = np.random.default_rng(0)
    payments = World.draw(0).payments(20_000, rng)
    assert found["true"] == pytest.approx(World.draw(0).value(payments, World.draw(0).uniform(payments)), abs=0.03)
    assert (refused.exit_code, "expected a service with the decision point of --print-point" in refused.output) == (2, True)


def test_the_point_that_is_asked_can_be_printed(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["simulate", "--print-point"])
    (tmp_path / "payments.toml").write_text(printed.stdout)
    assert read_decision_point(tmp_path / "payments.toml").rewards[0].window_seconds == 86_400


def test_the_live_demo_from_its_first_payment_to_the_last_replay(tmp_path: Path) -> None:
    """1,000 payments a day are few to promote by: what must hold is that both days and the night between them are whole."""
    console = Console(record=True, width=120, quiet=True)
    status = run_live(tmp_path, console, payments=1000, second=1e-5)
    found = json.loads((tmp_path / "live" / "live.json").read_text())
    assert status == (0 if found["promotion"]["promoted"] else 3)
    assert found["replay"]["replayed"] == {"actions": 1.0, "shares": 1.0}
    assert (found["replay"]["sampled"], found["audit"]["attempts"], found["audit"]["decisions"]) == (2000, 2000, 2000)
    assert (found["audit"]["rewards"], found["audit"]["findings"], found["audit"]["orphans"]) == (2000, [], 0)
    assert [found[day]["served"] for day in ("day 1", "day 2")] == [1000, 1000]
    for day in ("day 1", "day 2"):
        assert abs(found[day]["authorised"] - found[day]["true"]) < 4 * found[day]["stderr"]
    point = read_decision_point(tmp_path / "live" / f"{POINT}.toml")
    assert point.rewards[0].window_seconds == window(1e-5) == 1.5
