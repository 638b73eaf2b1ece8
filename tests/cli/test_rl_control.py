"""`propel rl train` for policies of control: from a log, from replay, from fresh batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ope.data import InputError
from propel import app
from rl_core.envs.pendulum import Pendulum, dataset
from rl_core.methods.td3_bc import TD3BC
from rl_core.trainers.checkpoints import alone
from rl_core.trainers.control import Course, load_policy, offline
from rl_core.trainers.offline import OfflineSchedule, OfflineTrainer, returns
from rl_core.verify.control import EPISODES

RUNNER = CliRunner()
SMALL, REPLAY = "[schedule]\nwidth = 16\n", "[collection]\nwarmup = 200\ncount = 4\nratio = 0.5\n"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def train(folder: Path, *words: str) -> list[dict[str, Any]]:
    (folder / "settings.toml").write_text(SMALL + REPLAY * (words[0] == "sac"))
    result = RUNNER.invoke(
        app, ["rl", "train", *words, "--out", str(folder / "out"), "--settings", str(folder / "settings.toml"), "--json"]
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("td3bc", "--data", "pend-mix10"), ("sac",), ("sac", "--env", "Pendulum-v1"), ("ControlPPO",),
        ("ailboost", "--data", "pend-exp10"),
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)  # fmt: skip
def test_a_run_goes_on_where_it_was_stopped(words: tuple[str, ...], tmp_path: Path) -> None:
    steps = {"ControlPPO": (2048, 4096), "ailboost": (100, 200)}.get(words[0], (20, 40))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    expected = train(whole, *words, "--steps", str(steps[1]))
    assert [row["step"] for row in expected][-1] == steps[1]
    train(parts, *words, "--steps", str(steps[0]))
    found = train(parts, *words, "--steps", str(steps[1]))
    last = {name: value for name, value in found[-1].items() if name in ("step", "return", "score")}
    if "Pendulum-v1" not in words:  # Gymnasium's environments cannot tell their state: fresh episodes begin
        assert last == {name: expected[-1][name] for name in last}
    assert train(parts, *words, "--steps", str(steps[1])) == found  # there is nothing left to do
    assert len((parts / "out" / "metrics.jsonl").read_text().splitlines()) == len(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["td3bc"], "--data: found none; expected a set of the pendulum"),
        (["td3bc", "--data", "nowhere.parquet"], "nowhere.parquet"),
        (["bc", "--data", "pend-exp10", "--steps", "0"], "steps: found 0; expected at least 1"),
        (["sac", "--env", "Chess-v0"], "Chess-v0"),
        (["sac", "--device", "tpu"], "--device: found tpu"),
        (["sac", "--task", "addition"], "expected none: it is of language models"),
        (["grpo", "--data", "pend-exp10"], "--data: found with a method to which it says nothing"),
        (["ControlPPO", "--data", "pend-exp10"], "ControlPPO learns from what it has just done itself"),
        (["dac"], "--data: found none; expected what the expert did"),
        (["bc", "--data", "pend-exp10", "--env", "CartPole-v1"], "--data: found sizes (3, 1); expected (4, 2)"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["rl", "train", *words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, (result.stdout, result.exception)
    assert said in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_methods_that_collect_are_compared_by_steps_of_the_environment(tmp_path: Path) -> None:
    words = ["rl", "compare", "--methods", "SAC,TRPO", "--seeds", "1", "--steps", "2048", "--width", "16", "--batch", "8"]
    result = RUNNER.invoke(app, [*words, "--to", str(tmp_path / "to"), "--folder", str(tmp_path / "arms"), "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = json.loads(result.stdout)
    assert [(row["method"], row["data"], row["steps"]) for row in found] == [("SAC", "pendulum", 2048), ("TRPO", "pendulum", 2048)]
    assert "environment steps" in (tmp_path / "to" / "compare.svg").read_text()
    refused = RUNNER.invoke(app, ["rl", "compare", "--methods", "SAC,TD3BC", "--to", str(tmp_path / "no")])
    assert (refused.exit_code, "expected methods of one family" in refused.stderr) == (2, True)


def test_what_was_learned_is_loaded_without_its_data(tmp_path: Path) -> None:
    rows = train(tmp_path, "td3bc", "--data", "pend-mix10", "--steps", "20")
    act = load_policy(tmp_path / "out")
    found = returns(act, Pendulum(), EPISODES, np.random.default_rng(10_000)).mean()
    assert found == pytest.approx(rows[-1]["return"], rel=1e-6)


def test_an_offline_method_goes_on_in_the_environment(tmp_path: Path) -> None:
    collection = "[collection]\noffline_steps = 20\ncount = 4\nratio = 0.5\noffline_share = 0.5\n"
    (tmp_path / "settings.toml").write_text(SMALL + "batch = 16\n" + collection)
    words = ["rl", "train", "iql", "--data", "pend-exp10", "--steps", "40", "--settings", str(tmp_path / "settings.toml")]
    result = RUNNER.invoke(app, [*words, "--evaluations", "2", "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert [(row["step"], row["taken"]) for row in json.loads(result.stdout)] == [(20, 0), (40, 40)]
    refused = RUNNER.invoke(app, ["rl", "train", "prdc", *words[3:], "--out", str(tmp_path / "no")])
    assert (refused.exit_code, "PRDC does not learn from replay" in refused.stderr) == (2, True)


def test_methods_that_imitate_are_compared(tmp_path: Path) -> None:
    words = ["rl", "compare", "--methods", "DAC,AILBoost", "--seeds", "1", "--steps", "16", "--width", "8", "--batch", "4"]
    folders = ["--to", str(tmp_path / "to"), "--folder", str(tmp_path / "arms")]
    result = RUNNER.invoke(app, [*words, *folders, "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    found = json.loads(result.stdout)
    assert [(row["method"], row["data"], row["steps"]) for row in found] == [("DAC", "pendulum", 16), ("AILBoost", "pendulum", 16)]
    assert [path.suffix for path in (tmp_path / "arms").iterdir()] == [".json"] * 2  # what runs need to go on is gone
    for option, said in (("--env", "--env: found CartPole-v1"), ("--references", "--references: found CartPole-v1")):
        refused = RUNNER.invoke(app, [*words, *folders, option, "CartPole-v1"])
        assert (refused.exit_code, said in refused.stderr) == (2, True)


def test_a_run_that_diverges_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_core.verify.control.returns", lambda act, env, episodes, rng: np.full(episodes, np.nan))
    words = ["rl", "train", "bc", "--data", "pend-exp10", "--steps", "5", "--evaluations", "1", "--out", str(tmp_path / "out")]
    result = RUNNER.invoke(app, words)
    assert (result.exit_code, "step 5: found a return of nan" in result.stderr) == (2, True)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    words = ["rl", "train", "bc", "--data", "pend-exp10", "--steps", "5", "--evaluations", "1", "--out", str(tmp_path / "out")]
    with alone(tmp_path / "out"):
        result = RUNNER.invoke(app, words)
        assert (result.exit_code, "still going on there" in result.stderr.replace("\n", " ")) == (2, True)
    assert RUNNER.invoke(app, words).exit_code == 0
    result = RUNNER.invoke(app, ["rl", "train", "td3", *words[3:]])
    assert result.exit_code == 2
    assert "found a run of another method; expected" in result.stderr.replace("\n", " ")


def test_a_run_is_kept_between_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the fourth of five pieces, with no evaluation yet: it goes on from the third, and ends as one that was not."""
    monkeypatch.setattr("rl_core.trainers.control.PIECE", 4)
    monkeypatch.setattr("rl_core.trainers.control.KEPT", 0.0)

    def made() -> Course:
        return offline(TD3BC(), dataset("pend-exp10", 0), OfflineSchedule(steps=20, batch=8, width=8), told={})

    expected, real = made(), OfflineTrainer.advance
    rows = expected.run(lambda policies: {})

    def killed(self: OfflineTrainer, steps: int = 1) -> None:
        if self.step == 12:
            raise KeyboardInterrupt
        real(self, steps)

    monkeypatch.setattr(OfflineTrainer, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        made().run(lambda policies: {}, tmp_path)
    monkeypatch.setattr(OfflineTrainer, "advance", real)
    with pytest.raises(InputError, match="step 20: found a return of nan"):  # the last piece leaves nothing behind without its row
        made().run(lambda policies: {"return": float("nan")}, tmp_path)
    last = made()
    found = last.run(lambda policies: {}, tmp_path)
    assert [{**row, "cpu_seconds": 0} for row in found] == [{**row, "cpu_seconds": 0} for row in rows]
    for one, other in zip(expected.trainer.nets.parameters(), last.trainer.nets.parameters(), strict=True):
        assert torch.equal(one, other)
