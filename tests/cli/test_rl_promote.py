"""`propel rl eval` and `propel rl promote`: what a run learned, and whether it may take the place of another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from propel import app
from rl_core.data import write_parquet
from rl_core.envs.pendulum import Mixed, Pendulum, dataset, expert
from rl_core.fqe import FQE
from rl_core.promotion import compared, starts, unsupported
from rl_core.trainers.checkpoints import alone, load_checkpoint
from rl_core.trainers.control import load_policy
from rl_core.trainers.offline import returns

torch.set_num_threads(1)

RUNNER = CliRunner()
SETTINGS = """
[method]
twin = {kind = "Twin", discount = 0.98, actor_rate = 1e-3, critic_rate = 1e-3}
[schedule]
width = 64
batch = 64
reward_scale = 0.1
"""
FITS = ["--discount", "0.9", "--steps", "800", "--fits", "5", "--width", "32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on the same data: one that was stopped at once, and one that has learned."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "settings.toml").write_text(SETTINGS)
    for name, steps in (("short", 10), ("long", 1200)):
        words = ["rl", "train", "td3bc", "--data", "pend-eps60", "--settings", str(folder / "settings.toml"), "--steps", str(steps)]
        result = RUNNER.invoke(app, [*words, "--evaluations", "1", "--out", str(folder / name)])
        assert result.exit_code == 0, (result.stderr, result.exception)
    return folder


def promote(*words: str) -> tuple[int, dict[str, Any]]:
    result = RUNNER.invoke(app, ["rl", "promote", *words, *FITS, "--json"])
    assert result.exit_code in (0, 1), (result.stderr, result.exception)
    return result.exit_code, json.loads(result.stdout)


def test_the_better_policy_takes_the_place_of_the_other(runs: Path, tmp_path: Path) -> None:
    serving = tmp_path / "serving"
    words = (str(runs / "long"), "--over", str(runs / "short"), "--data", "pend-eps60", "--seed", "1")
    code, told = promote(*words, "--to", str(serving))
    assert (code, told["promotes"], told["reasons"]) == (0, True, [])
    assert told["low"] > 0
    assert told["starts"] == 100
    obs = np.random.default_rng(0).normal(size=(7, 3))
    np.testing.assert_array_equal(load_policy(serving)(obs), load_policy(runs / "long")(obs))
    assert (serving / "metrics.jsonl").read_text() == (runs / "long" / "metrics.jsonl").read_text()
    assert load_checkpoint(serving)["promotion"]["low"] == told["low"]
    (line,) = (serving / "promotions.jsonl").read_text().splitlines()
    assert json.loads(line)["low"] == told["low"]
    code, told = promote(str(runs / "short"), "--over", str(serving), "--data", "pend-eps60", "--seed", "1", "--to", str(serving))
    assert (code, told["promotes"]) == (1, False)
    assert told["difference"] < 0
    np.testing.assert_array_equal(load_policy(serving)(obs), load_policy(runs / "long")(obs))  # as it was
    assert len((serving / "promotions.jsonl").read_text().splitlines()) == 1


def test_what_speaks_against_the_numbers_stops_a_promotion(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interval above 0, but for one reason each: values that rewards do not allow, actions beyond the data."""
    words = ("rl", "promote", str(runs / "long"), "--over", str(runs / "short"), "--data", "pend-eps60", "--seed", "1", "--json")
    for share, said in ((0.2, "beyond the data"), (0.0, "rewards do not allow")):
        with monkeypatch.context() as patch:
            patch.setattr("rl_core.promotion.unsupported", lambda policy, data, share=share: (share, share > 0.05))
            patch.setattr("rl_core.fqe.FittedQ.impossible", lambda self, values, said=said: 0.5 * ("allow" in said))
            patch.setattr("rl_core.fqe.FittedQ.values", better(runs))
            options = ["--discount", "0.9", "--steps", "800", "--fits", "3", "--width", "8", "--to", str(tmp_path / "to")]
            result = RUNNER.invoke(app, [*words, *options])
        told = json.loads(result.stdout)
        assert told["low"] > 0
        assert (result.exit_code, told["promotes"]) == (1, False)
        assert any(said in reason for reason in told["reasons"]), told["reasons"]
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["lock"]


def better(runs: Path) -> Any:
    """Values by which the run that has learned is better: 1 of it, 0 of others, a little off from fit to fit."""
    obs = np.zeros((1, 3))
    good = load_policy(runs / "long")(obs)

    def values(self: Any, starts: torch.Tensor) -> np.ndarray[Any, Any]:
        action = self.policy(torch.zeros(1, 3), None).numpy()
        return np.full(len(starts), float(np.allclose(action, good)) * (1 + 0.01 * self.settings.seed))

    return values


def test_nobody_writes_where_a_promotion_is_decided(runs: Path, tmp_path: Path) -> None:
    words = ["rl", "promote", str(runs / "long"), "--over", str(runs / "short"), "--data", "pend-rand", "--to", str(tmp_path)]
    with alone(tmp_path):
        result = RUNNER.invoke(app, words)
    assert (result.exit_code, "still going on there" in result.stderr.replace("\n", " ")) == (2, True)


def test_a_set_is_drawn_by_the_seed_of_the_run_wherever_it_is_said(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("[schedule]\nseed = 5\nwidth = 8\nbatch = 8\n")
    words = ["rl", "train", "bc", "--data", "pend-exp10", "--settings", str(tmp_path / "settings.toml"), "--steps", "1"]
    assert RUNNER.invoke(app, [*words, "--out", str(tmp_path / "out")]).exit_code == 0
    mean = load_checkpoint(tmp_path / "out")["trainer"]["scaling"]["mean"]
    torch.testing.assert_close(mean, dataset("pend-exp10", 5).obs.mean(dim=0), rtol=1e-4, atol=1e-5)
    result = RUNNER.invoke(
        app, ["rl", "promote", str(tmp_path / "out"), "--over", str(runs / "short"), "--data", "pend-exp10", "--seed", "5"]
    )
    assert (result.exit_code, "of seed 5, which taught" in result.stderr.replace("\n", " ")) == (2, True)


def test_what_cannot_be_compared_is_refused(runs: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    whole = (runs / "long" / "checkpoint.pt").read_bytes()
    (damaged / "checkpoint.pt").write_bytes(whole[:100])
    half = tmp_path / "half"
    half.mkdir()
    (half / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    taught, held_out = ["--data", "pend-eps60"], ["--data", "pend-eps60", "--seed", "1"]  # of seed 0, as in training; of another
    (tmp_path / "foreign").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "foreign" / "checkpoint.pt")
    other = tmp_path / "other.parquet"
    write_parquet(other, replace(dataset("pend-rand", 0), obs=torch.zeros(20_000, 2), next_obs=torch.zeros(20_000, 2)))
    for first, options, said in (
        (runs / "long", taught, "found pend-eps60 of seed 0, which taught"),
        (damaged, ["--data", "pend-rand"], "found a damaged file"),
        (half, ["--data", "pend-rand"], "found a damaged file"),
        (runs / "long", ["--data", "pend-mix10"], "found pend-mix10 of seed 0, which taught"),  # its expert episodes are the same
        (tmp_path / "foreign", ["--data", "pend-rand"], "found something else; expected the checkpoint of a run"),
        (runs / "long", ["--data", str(other)], "candidate: found observations of (2,); expected (3,)"),
        (runs / "long", [*held_out, "--steps", "300"], "whose backups cover 14% of the horizon; expected at least 7,785"),
        (runs / "long", ["--data", "pend-exp10", "--seed", "3"], "found 10 episodes; expected at least 20"),
    ):
        result = RUNNER.invoke(app, ["rl", "promote", str(first), "--over", str(runs / "short"), *options])
        assert result.exit_code == 2, (result.stdout, result.exception)
        assert said in result.stderr.replace("\n", " ")


def test_an_evaluation_of_a_run_is_that_of_its_policy(runs: Path) -> None:
    result = RUNNER.invoke(app, ["rl", "eval", str(runs / "long"), "--episodes", "20", "--seed", "3", "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    told = json.loads(result.stdout)
    found = returns(load_policy(runs / "long"), Pendulum(), 20, np.random.default_rng(10_003))
    assert told["return"] == pytest.approx(found.mean())
    assert told["stderr"] == pytest.approx(found.std(ddof=1) / 20**0.5)
    assert told["episodes"] == 20
    shown = RUNNER.invoke(app, ["rl", "eval", str(runs / "long"), "--episodes", "20", "--seed", "3"]).stdout
    assert shown.startswith(f"return {found.mean():.1f} +- ")


def test_values_are_in_units_of_rewards() -> None:
    """The expert above one that is random at three steps of five, by rewards as they are: truth from 400 long runs of both."""
    rng = np.random.default_rng(5)
    held_out = dataset("pend-eps60", seed=4)
    noisy = Mixed(0.6)

    def one(obs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return expert(obs, rng)

    def other(obs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return noisy(obs, rng)

    verdict = compared(one, other, held_out, FQE(discount=0.9, steps=600, width=32, tau=0.1), fits=3)
    true = discounted(one) - discounted(other)
    assert verdict.paired.difference == pytest.approx(true, abs=3 * verdict.paired.stderr + 1.0)


def discounted(act: Any) -> float:
    """Mean discounted return (0.9) from the episodes' starts."""
    env, rng = Pendulum(), np.random.default_rng(9)
    obs, total, factor = env.reset(400, rng), np.zeros(400), 1.0
    for _ in range(100):
        obs, reward, _, _ = env.step(act(obs))
        total, factor = total + factor * reward, factor * 0.9
    return float(total.mean())


def test_where_the_data_say_nothing() -> None:
    narrow = dataset("pend-exp10", seed=0)
    assert unsupported(lambda obs: np.ones((len(obs), 1)), narrow)[1]
    share, alarm = unsupported(lambda obs: expert(obs, np.random.default_rng(0)), narrow)
    assert (share, alarm) == (0.0, False)  # it is what was logged
    assert len(starts(narrow)) == 10
    assert torch.equal(starts(narrow), narrow.obs[::200])


@pytest.mark.parametrize("method", ["ailboost", "ControlPPO", "sac"])
def test_what_any_family_learned_is_loaded_and_judged(method: str, tmp_path: Path) -> None:
    steps = {"ControlPPO": 2048, "ailboost": 60, "sac": 20}[method]
    plan = '[method]\nplan = {kind = "Plan", steps = 20, samples = 20, rolls = 1}\n' if method == "ailboost" else ""
    collection = "[collection]\nwarmup = 100\n" if method == "sac" else ""
    schedule = "width = 8\n" + ("batch = 8\nseed_steps = 50\n" if method == "ailboost" else "")
    (tmp_path / "settings.toml").write_text(f"{plan}[schedule]\n{schedule}{collection}")
    words = ["rl", "train", method, "--settings", str(tmp_path / "settings.toml"), "--steps", str(steps), "--evaluations", "1"]
    words += ["--data", "pend-exp10"] if method == "ailboost" else []
    trained = RUNNER.invoke(app, [*words, "--out", str(tmp_path / "out"), "--json"])
    assert trained.exit_code == 0, (trained.stderr, trained.exception)
    result = RUNNER.invoke(app, ["rl", "eval", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert json.loads(result.stdout)["return"] == pytest.approx(json.loads(trained.stdout)[-1]["return"], rel=1e-6)
    if method == "ailboost":
        refused = RUNNER.invoke(
            app, ["rl", "promote", str(tmp_path / "out"), "--over", str(tmp_path / "out"), "--data", "pend-rand"]
        )
        assert refused.exit_code == 2
        assert "found a mixture" in refused.stderr
