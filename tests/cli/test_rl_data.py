"""`propel rl data` and `propel rl compare` for control, as a stranger runs them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipelines.rl_control import averaged, ends, referenced
from propel import app
from rl_core.aggregate import interquartile_mean
from rl_core.data import read, write_parquet
from rl_core.envs.pendulum import EXPERT, RANDOM, dataset
from rl_core.methods.iql import IQL
from rl_core.methods.prdc import PRDC
from rl_core.trainers.offline import OfflineSchedule
from rl_core.verify.control import TWIN, OfflineArm, evaluated, on_pendulum

torch.set_num_threads(1)

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten expert episodes, by the command."""
    path = tmp_path_factory.mktemp("data") / "expert.parquet"
    result = RUNNER.invoke(app, ["rl", "data", "make", "pendulum", "--quality", "expert", "--to", str(path), "--seed", "2"])
    assert result.exit_code == 0, result.stderr
    assert "2,000 rows, mean return of an episode -" in result.stdout
    return path


def test_a_data_set_is_made_and_shown(made: Path, tmp_path: Path) -> None:
    shown = RUNNER.invoke(app, ["rl", "data", "show", str(made)]).stdout
    for words in (
        "2,000 rows, 10 episodes, obs 3, action 1",
        "returns: 0 % -",
        "50 % -",
        "cut 100.0%",
        "by 1 policies",
        "quality expert",
    ):
        assert words in shown
    told = json.loads(RUNNER.invoke(app, ["rl", "data", "show", str(made), "--json"]).stdout)
    returns = read(made).reward.reshape(10, 200).sum(dim=1).double().numpy()
    assert told["returns"]["50 %"] == pytest.approx(np.median(returns), rel=1e-6)
    assert (told["rows"], told["episodes"], told["terminated"], told["truncated"], told["policies"]) == (2000, 10, 0.0, 1.0, 1)
    assert told["made"]["seed"] == 2
    again = [
        "rl",
        "data",
        "make",
        "pendulum",
        "--quality",
        "expert",
        "--seed",
        "2",
        "--json",
        "--to",
        str(tmp_path / "again.parquet"),
    ]
    record = json.loads(RUNNER.invoke(app, again).stdout)
    assert record == {"file": str(tmp_path / "again.parquet"), **told["made"]}
    assert (tmp_path / "again.parquet").read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "make", "pendulum", "--quality", "expert", "--to", "x.csv"], "found x.csv; expected the name of a new file"),
        (["data", "make", "ant", "--quality", "expert", "--to", "x.parquet"], "environment: found 'ant'"),
        (["data", "make", "halfcheetah", "--quality", "expert", "--to", "x.parquet"], "expert of halfcheetah: found no recipe"),
        (["data", "show", "none.hdf5"], "none.hdf5: found no such file"),
        (["compare", "--methods", "TD3,GRPO", "--to", "x"], "found TD3 of the offline family, GRPO of the token family; expected"),
        (["compare", "--methods", ",", "--to", "x"], "--methods: found none; expected methods of one family"),
        (
            ["compare", "--methods", "GRPO", "--env", "pendulum", "--to", "x"],
            "--env: found pendulum and methods of the token family",
        ),
        (
            ["compare", "--methods", "TD3", "--task", "addition", "--to", "x"],
            "--task: found 'addition'; expected some of pend-exp10",
        ),
        (["compare", "--methods", "TD3", "--task", ",", "--to", "x"], "--task: found no data"),
        (["compare", "--methods", "TD3", "--task", "FILE", "--to", "x"], "--env: found none"),
        (["compare", "--methods", "TD3", "--task", "FILE", "--env", "Pendulum-v1", "--to", "x"], "--references: found none"),
        (["compare", "--methods", "TD3", "--references", "5,3", "--to", "x"], "--references: found '5,3'; expected two returns"),
        (
            [
                "compare",
                "--methods",
                "TD3",
                "--task",
                "FILE",
                "--env",
                "MountainCarContinuous-v0",
                "--references",
                "0,9",
                "--to",
                "x",
            ],
            "found sizes (3, 1); expected (2, 1), as MountainCarContinuous-v0 has",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], said: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, ["rl", *(str(made) if word == "FILE" else word for word in words)])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_offline_methods_beside_each_other(made: Path, tmp_path: Path) -> None:
    words = [
        "rl",
        "compare",
        "--methods",
        "td3bc,TD3",
        "--task",
        f"pend-exp10,{made}",
        "--env",
        "pendulum",
        "--steps",
        "16",
        "--json",
    ]
    words += ["--seeds", "2", "--width", "8", "--batch", "16", "--to", str(tmp_path / "out"), "--folder", str(tmp_path / "arms")]
    result = RUNNER.invoke(app, words)
    assert result.exit_code == 0, (result.stderr, result.exception)
    table = json.loads(result.stdout)
    assert [(row["method"], row["data"]) for row in table] == [
        (method, data) for method in ("td3bc", "TD3") for data in ("pend-exp10", str(made), "all")
    ]
    for row in table:
        assert row["low"] <= row["iqm"] <= row["high"]
        assert row["steps"] == 16
    for name, file, both in (table[:3], table[3:]):
        assert both["seed_1"] == pytest.approx((name["seed_1"] + file["seed_1"]) / 2)
    with (tmp_path / "out" / "compare.csv").open() as content:
        assert [float(row["iqm"]) for row in csv.DictReader(content)] == [row["iqm"] for row in table]
    picture = (tmp_path / "out" / "compare.svg").read_text()
    for said in ("gradient steps", "CPU seconds", "score, pend-exp10", "score, expert.parquet", "td3bc"):
        assert said in picture
    assert len(list((tmp_path / "arms").iterdir())) == 8


def test_ends_by_hand() -> None:
    def run(*scores: float) -> list[dict[str, float]]:
        return [{"step": 4 * (at + 1), "cpu_seconds": at + 1.0, "score": one, "return": 10 * one} for at, one in enumerate(scores)]

    runs = [run(1, 10), run(2, 20), run(3, 30), run(4, 80)]
    row = ends("BC", "some", [runs])
    assert (row["iqm"], row["return"], row["steps"], row["cpu_seconds"], row["seed_3"]) == (25.0, 350.0, 8, 2.0, 80.0)
    both = ends("BC", "all", [runs, runs])
    assert both["iqm"] == interquartile_mean([[10, 10], [20, 20], [30, 30], [80, 80]])
    assert ends("BC", "some", [runs[:1]])["low"] is None
    points = averaged("BC", "score_0", runs)
    assert [point["score_0"] for point in points] == [2.5, 25.0]
    assert [point["step"] for point in points] == [4, 8]
    assert averaged("BC", "score_0", runs[:1])[0]["score_0_low"] == 1.0


def test_settings_and_references() -> None:
    assert on_pendulum(PRDC()) == PRDC(twin=TWIN)
    assert on_pendulum(IQL()) == IQL(discount=0.98, actor_rate=1e-3, value_rate=1e-3, critic_rate=1e-3)
    assert referenced(" -280,12135") == (-280.0, 12135.0)
    assert referenced(None) is None

    def still(obs: np.ndarray) -> np.ndarray:
        return np.zeros((len(obs), 1))

    own = evaluated(still)
    assert own["score"] == pytest.approx(100 * (own["return"] - RANDOM) / (EXPERT - RANDOM))
    other = evaluated(still, env="Pendulum-v1", references=(-1000.0, 0.0))
    assert other["score"] == pytest.approx(100 + other["return"] / 10)


def test_an_arm_is_another_one_by_the_content_of_its_file(tmp_path: Path) -> None:
    schedule, data = OfflineSchedule(), dataset("pend-exp10", 0)
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", data.rows(slice(0, 200)))
    write_parquet(tmp_path / "c.parquet", data.rows(slice(0, 400)))
    (tmp_path / "folder").mkdir()
    keys = [OfflineArm(IQL(), str(tmp_path / f"{name}.parquet"), schedule).key() for name in ("a", "b", "c")]
    assert keys[0] == keys[1] != keys[2]
    assert OfflineArm(IQL(), "pend-exp10", schedule).key() not in keys
    assert OfflineArm(IQL(), str(tmp_path / "a.parquet"), schedule, "Pendulum-v1", (0, 1)).key() not in keys


def test_references_are_two_returns_or_those_of_d4rl() -> None:
    assert referenced(None) is None
    assert referenced("-286,5159") == (-286.0, 5159.0)
    low, high = referenced("halfcheetah") or (0, 0)
    assert 100 * (5000 - low) / (high - low) == pytest.approx(42.53, abs=1e-4)  # offline_common, invariant 1
