"""`propel rl` as a stranger runs it: what is listed, what is refused, what is kept."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from propel import app
from rl_core.methods.asymre import AsymRE
from rl_core.methods.grpo import GRPO
from rl_core.models.lm import LM
from rl_core.registry import METHODS, named
from rl_core.train import Schedule
from rl_core.verify.arms import Arm, Arms, code_of, start_path
from rl_core.verify.experiments import EXPERIMENTS, at_least, at_most

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
    assert all(one["family"] == "token" and one["paper"] and one["spec"] for one in found)


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
    told = json.loads(
        RUNNER.invoke(app, ["rl", "eval", str(tmp_path / "out"), "--task", "fillers", "--prompts", "8", "--json"]).stdout
    )
    assert told["pass_at_1"] == found[-1]["pass_at_1"]
    settings.write_text("[method]\ngait = 1\n")
    result = RUNNER.invoke(app, words)
    assert (result.exit_code, "REC: found gait; expected some of gate" in result.stderr.replace("\n", " ")) == (2, True)


def test_finished_arms_are_read_and_not_run_again(folder: Path) -> None:
    arm, told = Arm(GRPO(), "fillers", SHORT), list[str]()
    (first,) = Arms(folder, told.append).run([arm])
    assert [row["step"] for row in first] == [0, 1, 2]
    assert told == ["GRPO on fillers, seed 0 (1 of 1)"]
    path = folder / f"{arm.key()}.json"
    path.write_text(json.dumps([{"step": 7}]))
    assert Arms(folder, told.append).run([arm, arm]) == [[{"step": 7}]] * 2
    assert len(told) == 1


def test_an_arm_is_another_one_by_method_task_schedule_and_code() -> None:
    arms = [
        Arm(GRPO(), "fillers", SHORT), Arm(GRPO(eps_high=0.28), "fillers", SHORT), Arm(GRPO(), "addition", SHORT),
        Arm(GRPO(), "fillers", Schedule(steps=3, prompts=2, responses=2, eval_prompts=8)), Arm(AsymRE(), "fillers", SHORT),
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
