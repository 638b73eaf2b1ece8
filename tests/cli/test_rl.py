"""`propel rl` as a stranger runs it: what is listed, what is refused, what is kept."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from propel import app
from rl_core.methods.asymre import AsymRE
from rl_core.methods.grpo import GRPO
from rl_core.models.lm import LM
from rl_core.registry import FAMILIES, METHODS, named
from rl_core.tasks.addition import Fillers
from rl_core.trainers.token import Schedule, imitate
from rl_core.verify.arms import Arms, code_of
from rl_core.verify.experiments import EXPERIMENTS
from rl_core.verify.margins import at_least, at_most
from rl_core.verify.token import TokenArm, start_path

RUNNER = CliRunner()
SHORT = Schedule(steps=2, prompts=2, responses=2, eval_prompts=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where arms are kept, with a start that knows nothing."""
    made = tmp_path_factory.mktemp("arms")
    for task in ("addition", "fillers"):
        torch.manual_seed(0)
        torch.save(LM().state_dict(), start_path(task, made))
    return made


def test_every_method_is_listed_with_its_page() -> None:
    found = json.loads(RUNNER.invoke(app, ["rl", "list", "--json"]).stdout)
    assert [one["name"] for one in found] == [method.__name__ for method in METHODS]
    assert all(one["name"] in [method.__name__ for method in FAMILIES[one["family"]]] for one in found)
    assert all(one["paper"] and one["spec"] for one in found)


def test_a_method_is_shown_in_any_case() -> None:
    found = json.loads(RUNNER.invoke(app, ["rl", "show", "bapo", "--json"]).stdout)
    assert found["name"] == "BAPO"
    assert set(found["settings"]) == set(found["defaults"])
    assert found["settings"]["high_limit"] == 3.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "sarsa"], "method: found 'sarsa'; expected one of REINFORCE, PPO, GRPO"),
        (["verify", "ppo"], "found PPO, whose page has no experiment; expected one of REINFORCE, GRPO"),
        (["train", "grpo", "--out", "x", "--task", "chess"], "--task: found 'chess'; expected addition or fillers"),
        (["train", "grpo", "--out", "x", "--settings", "none.toml"], "none.toml: found"),
        (["train", "grpo", "--out", "x", "--steps", "0"], "steps: found 0; expected at least 1"),
        (["eval", "nowhere"], "checkpoint.pt: found none"),
        (["compare", "--methods", "GRPO,SARSA", "--to", "x"], "'SARSA'; expected one of"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, ["rl", *words])
    assert result.exit_code == 2
    assert said in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_settings_with_a_name_are_shown() -> None:
    found = json.loads(RUNNER.invoke(app, ["rl", "show", "dapo", "--json"]).stdout)
    assert (found["name"], found["settings"]["eps_high"]) == ("GRPO", 0.28)


def test_a_verification_that_is_killed_leaves_nobody_behind(folder: Path) -> None:
    """Workers end with the process that asked, which a kill does not ask to clean up."""
    code = (
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from rl_core.methods.grpo import GRPO\n"
        "from rl_core.trainers.token import Schedule\n"
        "from rl_core.verify.arms import Arms\n"
        "from rl_core.verify.token import TokenArm\n"
        "if __name__ == '__main__':\n"
        f"    arms = [TokenArm(GRPO(), 'fillers', Schedule(steps=100_000, prompts=2, responses=2, seed=s)) for s in (0, 1)]\n"
        f"    Arms(Path({str(folder)!r})).run(arms)\n"
    )
    script = folder / "verify.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60
    while len(workers := busy(parent.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [worker for worker in workers if alive(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert left == []


def busy(parent: int) -> list[int]:
    """Children of a process that have worked for two seconds."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    spent = {int(child): int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11]) for child in children}
    return [child for child, ticks in spent.items() if ticks > 2 * os.sysconf("SC_CLK_TCK")]


def alive(process: int) -> bool:
    """Whether it still runs, and is not only unburied."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_file_of_settings_is_the_method(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    torch.save(LM().state_dict(), start_path("fillers", tmp_path / "out"))
    settings = tmp_path / "settings.toml"
    settings.write_text(
        '[method]\ngate = { kind = "Ring", outer_high = 2.0 }\nweighted = true\n'
        "[schedule]\nsteps = 2\nprompts = 2\nresponses = 2\neval_prompts = 8\neval_every = 1\n"
    )
    words = ["rl", "train", "rec", "--out", str(tmp_path / "out"), "--task", "fillers", "--settings", str(settings), "--json"]
    found = json.loads(RUNNER.invoke(app, words).stdout)
    assert [row["step"] for row in found] == [0, 1, 2]
    assert RUNNER.invoke(app, words).stdout == json.dumps(found, indent=2) + "\n"  # gone on with: there is nothing left to do
    told = json.loads(RUNNER.invoke(app, ["rl", "eval", str(tmp_path / "out"), "--prompts", "8", "--json"]).stdout)
    assert told["pass_at_1"] == found[-1]["pass_at_1"]
    refused = RUNNER.invoke(app, [*words, "--seed", "7"])
    assert (refused.exit_code, "found a run of another schedule.seed" in refused.stderr.replace("\n", " ")) == (2, True)
    settings.write_text("[method]\ngait = 1\n")
    result = RUNNER.invoke(app, words)
    assert (result.exit_code, "REC: found gait; expected some of gate" in result.stderr.replace("\n", " ")) == (2, True)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of the first policy of a short run from a model that answers now and then, with what each kept one says of them."""
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("run")
    start, _ = imitate(Fillers(), steps=150, batch=64, learning_rate=3e-3)
    torch.save(start.state_dict(), start_path("fillers", made))
    (made / "settings.toml").write_text("[schedule]\nlearning_rate = 1e-4\neval_every = 2\neval_prompts = 8\n")
    words = ["rl", "train", "grpo", "--out", str(made), "--task", "fillers", "--steps", "4", "--settings"]
    trained = RUNNER.invoke(app, [*words, str(made / "settings.toml")])
    assert trained.exit_code == 0, (trained.stderr, trained.exception)
    written = ["rl", "rollouts", str(made), "--to", str(made / "log.parquet"), "--prompts", "300", "--json"]
    logged = RUNNER.invoke(app, written)
    assert logged.exit_code == 0, (logged.stderr, logged.exception)
    told = json.loads(logged.stdout)
    assert told == {"log": str(made / "log.parquet"), "rows": 2400, "by": "step_0", "policies": ["step_0", "step_2", "step_4"]}
    assert "expected the name of a new file" in RUNNER.invoke(app, written).stderr.replace("\n", " ")
    return made / "log.parquet"


def test_checkpoints_are_valued_from_the_rollouts_of_another(log: Path) -> None:
    frame = pl.read_parquet(log)
    words = ["ope", "--log", str(log), "--policy", "step_0,step_4", "--estimators", "wis,PDIS", "--json"]
    records = json.loads(RUNNER.invoke(app, words).stdout)
    assert [(one["policy"], one["estimator"]) for one in records] == [
        (policy, name) for policy in ("step_0", "step_4") for name in ("WIS", "PDIS")
    ]
    for one in records[:2]:  # of the policy that sampled: the mean reward, but for float32
        assert one["value"] == pytest.approx(frame["reward"].mean(), abs=1e-5)
        assert any("300 clusters" in note for note in one["notes"])
    weight = np.exp([sum(new) - sum(old) for new, old in zip(frame["step_4"], frame["logp_behavior"], strict=True)])
    assert records[2]["value"] == pytest.approx(np.average(frame["reward"], weights=weight), abs=1e-5)


def test_a_shortlist_of_checkpoints_is_described(log: Path) -> None:
    result = RUNNER.invoke(app, ["ope", "--log", str(log), "--policy", "step_0,step_2,step_4"])
    assert result.exit_code == 0, result.stderr
    for words in ("2,400 rollouts", "step_2", "PDIS", "valued on the other, by WIS", "k = 2: gain"):
        assert words in " ".join(result.stdout.split())  # a terminal breaks lines


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, ["--policy", "step_9"], "step_9"),
        ({}, ["--policy", "step_0", "--context", "x"], "found --context and a log of rollouts"),
        ({}, ["--policy", "step_0", "--estimators", "SNIPS"], "unknown estimator 'SNIPS' of trajectories"),
        ({}, ["--policy", "reward"], "column 'reward': found dtype Float64; expected lists of numbers"),
        ({"step_0": pl.col("step_0").list.head(2)}, ["--policy", "step_0"], "column 'step_0', row 0 (counted from 0): found 2"),
        ({"logp_behavior": pl.lit(None, pl.List(pl.Float64))}, ["--policy", "step_0"], "column 'logp_behavior', row 0"),
        ({"reward": pl.lit(None, pl.Float64)}, ["--policy", "step_0"], "column 'reward', row 0 (counted from 0): found nan"),
    ],
)
def test_a_log_of_rollouts_that_cannot_be_is_refused(
    log: Path, tmp_path: Path, changes: Any, options: list[str], said: str
) -> None:
    spoiled = tmp_path / "spoiled.parquet"
    pl.read_parquet(log).with_columns(**changes).write_parquet(spoiled)
    result = RUNNER.invoke(app, ["ope", "--log", str(spoiled), *options])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_finished_arms_are_read_and_not_run_again(folder: Path) -> None:
    arm, told = TokenArm(GRPO(), "fillers", SHORT), list[str]()
    (first,) = Arms(folder, told.append).run([arm])
    assert [row["step"] for row in first] == [0, 1, 2]
    assert told == ["GRPO on fillers, seed 0 (1 of 1)"]
    path = folder / f"{arm.key()}.json"
    path.write_text(json.dumps([{"step": 7}]))
    assert Arms(folder, told.append).run([arm, arm]) == [[{"step": 7}]] * 2
    assert len(told) == 1


def test_an_arm_is_another_one_by_method_task_schedule_and_code() -> None:
    arms = [
        TokenArm(GRPO(), "fillers", SHORT), TokenArm(GRPO(eps_high=0.28), "fillers", SHORT), TokenArm(GRPO(), "addition", SHORT),
        TokenArm(AsymRE(), "fillers", SHORT), TokenArm(GRPO(), "fillers", replace(SHORT, steps=3)),
    ]  # fmt: skip
    assert len({arm.key() for arm in arms}) == len(arms)
    assert code_of("rl_core.methods.asymre") != code_of("rl_core.methods.reinforce")


def test_methods_beside_each_other(folder: Path, tmp_path: Path) -> None:
    words = ["rl", "compare", "--methods", "GRPO,dapo", "--task", "fillers", "--steps", "2", "--seeds", "1"]
    result = RUNNER.invoke(app, [*words, "--to", str(tmp_path), "--folder", str(folder), "--json"])
    assert result.exit_code == 0, result.stderr
    table = json.loads(result.stdout)
    assert [row["method"] for row in table] == ["GRPO", "dapo"]
    assert all(row["rollouts"] == 2 * 32 * 8 and row["stderr"] is None for row in table)
    with (tmp_path / "compare.csv").open() as file:
        assert [float(row["pass_at_1"]) for row in csv.DictReader(file)] == [row["pass_at_1"] for row in table]
    picture = (tmp_path / "compare.svg").read_text()
    for words_ in ("CPU seconds", "rollouts", "pass@1", "reward", "length", "entropy", "ESS", "clip share", "dapo"):
        assert words_ in picture


def test_margins_of_fewer_seeds_are_wider() -> None:
    assert at_least("rise", 0.04, 0.06, seeds=1).passed  # 0.06 / sqrt(3) = 0.035
    assert not at_least("rise", 0.04, 0.06, seeds=3).passed
    assert at_most("gap", 0.06, 0.04, seeds=1).passed  # 0.04 * sqrt(3) = 0.069
    assert not at_most("gap", 0.06, 0.04, seeds=3).passed
    assert not at_least("rise", 0.05, 0.06, seeds=9).passed


def test_experiments_are_of_methods_and_settings_have_names() -> None:
    assert set(EXPERIMENTS) <= {method.__name__ for method in METHODS}
    assert named("dapo") == GRPO(eps_high=0.28)
    assert named("GRPO") == GRPO()
