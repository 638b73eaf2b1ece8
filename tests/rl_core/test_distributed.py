"""Two processes take the step that one takes: gloo on the CPU, prompts, micro-batches and responses all unevenly dealt."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from ope.data import InputError
from rl_core.distributed import connected, main, share, train
from rl_core.families.token import TokenMethod
from rl_core.methods.bapo import RECOMMENDED
from rl_core.methods.grpo import GRPO, KIN
from rl_core.methods.ppo import PPO
from rl_core.models.lm import LM
from rl_core.rollout import Rollouts
from rl_core.tasks.addition import Fillers
from rl_core.trainers.token import Ranks, Schedule, Trainer, run

METHODS: Mapping[str, TokenMethod] = {
    "GRPO": GRPO(),
    "GRPO over the batch": GRPO(scale="batch"),
    "GSPO": KIN["GSPO"],
    "BAPO": RECOMMENDED,
    "PPO": PPO(),
}
PROMPTS = 5
DEALT = (slice(0, 4), slice(4, 20))
"""Rows of either rank: one prompt and four, so one micro-batch and three."""
SCHEDULE = Schedule(prompts=PROMPTS, responses=4, micro_prompts=2, grad_clip=float("inf"))
CLIPPED = replace(SCHEDULE, grad_clip=0.01)


def start() -> LM:
    torch.manual_seed(0)
    return LM()


def rollouts() -> Rollouts:
    """Of prompts that are unlike: in length of responses, in rewards, and in how far the sampler is."""
    found = Trainer(GRPO(), Fillers(), SCHEDULE, start()).collect()
    rng = torch.Generator().manual_seed(1)
    length = torch.randint(1, 17, (20, 1), generator=rng)
    length[:4] = torch.tensor([[1], [2], [1], [3]])
    mask = torch.arange(16) < length
    logp = torch.log_softmax(start()(found.tokens[:, :-1])[:, 2:], dim=-1).gather(2, found.tokens[:, 3:, None])[..., 0].detach()
    apart = 0.3 * torch.randn(logp.shape, generator=rng)
    return replace(found, mask=mask, logp=torch.where(mask, logp + apart, 0.0), reward=torch.rand(20, generator=rng))


def step(
    method: TokenMethod, found: Rollouts, ranks: Ranks, schedule: Schedule = SCHEDULE
) -> tuple[list[Tensor], dict[str, float]]:
    """Gradients of all that learns, and metrics."""
    trainer = Trainer(method, Fillers(), schedule, start(), ranks=ranks)
    told = trainer.update(found, trainer.credited(found))
    learned = [trainer.policy, *([] if trainer.critic is None else [trainer.critic])]
    weights = [weight for one in learned for weight in one.parameters() if weight.grad is not None]
    return [ranks.whole(weight.grad) for weight in weights], told


def work(folder: Path) -> None:
    """What either process does."""
    torch.set_num_threads(1)
    with connected() as (ranks, _):
        own = rollouts().rows(DEALT[ranks.rank])
        found = {name: step(method, own, ranks) for name, method in METHODS.items()}
        found["clipped"] = step(GRPO(), own, ranks, CLIPPED)
        torch.save(found, folder / f"together-{ranks.rank}")
        trainer = Trainer(GRPO(), Fillers(), replace(SCHEDULE, prompts=1 + 3 * ranks.rank), start(), ranks=ranks)
        parts = [trainer.collect() for trainer.step in range(2)]
        torch.save(([(one.tokens, one.group) for one in parts], trainer.rollouts), folder / f"collected-{ranks.rank}")
        short = replace(SCHEDULE, steps=2, prompts=share(3, ranks), micro_prompts=1, eval_prompts=16)
        train(Trainer(GRPO(), Fillers(), short, start(), ranks=ranks), folder)


Results = dict[str, tuple[list[Tensor], dict[str, float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command, root = [*torchrun, "-m", "tests.rl_core.test_distributed", str(path)], Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_take_the_step_of_one(name: str, folder: Path) -> None:
    gradients, told = step(METHODS[name], rollouts(), Ranks())
    size = max(float(one.abs().max()) for one in gradients)
    alone = [step(METHODS[name], rollouts().rows(some), Ranks())[0] for some in DEALT]
    averaged = [(one + other) / 2 for one, other in zip(*alone, strict=True)]
    assert apart(averaged, gradients) > 0.05 * size  # what averaging over ranks would give
    for rank in range(2):
        found: Results = torch.load(folder / f"together-{rank}")
        assert apart(found[name][0], gradients) < 1e-6
        assert found[name][1] == pytest.approx(told, rel=1e-4, abs=1e-6)


def test_the_norm_that_is_cut_is_of_all_ranks(folder: Path) -> None:
    gradients, told = step(GRPO(), rollouts(), Ranks(), CLIPPED)
    assert torch.stack([one.norm() for one in gradients]).norm().item() == pytest.approx(0.01, rel=1e-3)
    for rank in range(2):
        found, metrics = torch.load(folder / f"together-{rank}")["clipped"]
        assert metrics["grad_norm"] == pytest.approx(told["grad_norm"], rel=1e-4)
        assert apart(found, gradients) < 1e-6


def test_ranks_ask_other_prompts_and_number_them_apart(folder: Path) -> None:
    (some, count), (others, same) = (torch.load(folder / f"collected-{rank}") for rank in range(2))
    assert count == same == 2 * 20
    assert not torch.equal(some[0][0][:4, :3], others[0][0][:4, :3])
    groups = [int(group) for found in (some, others) for _, numbers in found for group in numbers[::4]]
    assert len(groups) == len(set(groups)) == 2 * (1 + 4)


def written(folder: Path) -> list[int]:
    """Rollouts until each step of a run that left its policy."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    LM().load_state_dict(torch.load(folder / "policy.pt"))
    assert "pass_at_1" in rows[0]
    assert "pass_at_1" in rows[-1]
    return [row["rollouts"] for row in rows]


def test_the_first_of_two_ranks_writes_of_both(folder: Path) -> None:
    assert written(folder) == [0, 12, 24]


def test_the_command_is_one_of_the_ranks_that_torchrun_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    command = typer.Typer()
    command.command()(main)
    asked = {"method": "grpo", "out": tmp_path, "task": "fillers", "steps": 1, "prompts": 3, "responses": 4, "imitation": 5}
    done = CliRunner().invoke(command, [f"--{name}={value}" for name, value in asked.items()])
    assert done.exit_code == 0, done.output
    assert written(tmp_path) == [0, 12]


def test_prompts_are_dealt_and_too_few_are_refused() -> None:
    assert [share(7, Ranks(rank, 3)) for rank in range(3)] == [3, 2, 2]
    with pytest.raises(InputError, match="found 2 prompts on 3 ranks"):
        share(2, Ranks(0, 3))


def test_a_checkpoint_of_several_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder and 2 ranks"):
        run(Trainer(GRPO(), Fillers(), SCHEDULE, start(), ranks=Ranks(count=2)), tmp_path)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
