"""One optimiser step of several processes, on machines with GPUs or without, that equals the step of one.

Every rank samples and credits prompts of its own. Numerators meet the denominators and the statistics of the whole step: sums are
added over ranks before anything is divided, and an average is never averaged. What learns is spread over ranks by FSDP2; what
samples is whole on each, so that no rank waits for another's tokens. Small tensors travel over gloo, weights over nccl where there
are GPUs.

    torchrun --nproc-per-node 2 -m rl_core.distributed --method GRPO --steps 2 --out runs/grpo
"""

from __future__ import annotations

import atexit
import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bandits.terminal import bad_input
from ope.data import InputError
from rl_core.settings import asked
from rl_core.trainers.token import Ranks, Trainer, imitate, run
from rl_core.verify.token import TASKS


def all_sum(value: Tensor) -> Tensor:
    """Σ over ranks."""
    total = value.clone()
    dist.all_reduce(total)
    return total


def all_rows(value: Tensor) -> Tensor:
    """Rows of all ranks in their order; how many may differ."""
    found: list[Tensor] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return torch.cat(found)


def shard(module: nn.Module) -> None:
    """FSDP2 by layers. Its gradients are sums over ranks, since losses are over global denominators, not averages."""
    for one in (*_layers(module), module):
        fully_shard(one)
        assert isinstance(one, FSDPModule), "what fully_shard makes of a module"
        one.set_gradient_divide_factor(1.0)
        one.set_force_sum_reduction_for_comms(True)


def whole(value: Tensor) -> Tensor:
    """A tensor that is spread over ranks, on each of them."""
    found: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return found


@contextmanager
def connected() -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started, and this one's device. Once in a process: torchrun's store keeps the first addresses."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), all_sum, all_rows, shard, whole), device
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()
        atexit.register(gc.collect)  # sharded modules are cycles that hold their groups: threads of these must not outlive Python


def share(total: int, ranks: Ranks) -> int:
    """This rank's part of a number of prompts: no two ranks' differ by more than one. Raises InputError for fewer than ranks."""
    if total < ranks.count:
        raise InputError(f"found {total} prompts on {ranks.count} ranks; expected at least one on each")
    return total // ranks.count + (ranks.rank < total % ranks.count)


def main(
    method: Annotated[str, typer.Option("--method", help="Name of a method, in any case.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of metrics.jsonl and policy.pt, which rank 0 writes at the end.")],
    settings: Annotated[Path | None, typer.Option("--settings", help="TOML, as `propel rl train` takes it.")] = None,
    task: Annotated[str, typer.Option("--task", help="addition or fillers.")] = "addition",
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")] = None,
    prompts: Annotated[int | None, typer.Option("--prompts", help="Of a step, dealt to the ranks.")] = None,
    responses: Annotated[int | None, typer.Option("--responses", help="To each prompt.")] = None,
    micro_prompts: Annotated[int | None, typer.Option("--micro-prompts", help="That meet the model at once; else all.")] = None,
    imitation: Annotated[int, typer.Option("--imitation", help="Steps on examples before the first reward.")] = 500,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the start, the prompts and the sampler.")] = None,
) -> None:
    """Train the small model on all ranks that torchrun started. Options go before what a file of settings says."""
    with bad_input("rl"), connected() as (ranks, device):
        if task not in TASKS:
            raise InputError(f"--task: found {task!r}; expected {' or '.join(TASKS)}")
        said = {"steps": steps, "prompts": prompts, "responses": responses, "micro_prompts": micro_prompts, "seed": seed}
        made, schedule = asked(method, settings, said)
        schedule = replace(schedule, prompts=share(schedule.prompts, ranks))
        start, _ = imitate(TASKS[task], seed=schedule.seed, steps=imitation)
        train(Trainer(made, TASKS[task], schedule, start.to(device), ranks=ranks), out)


def train(trainer: Trainer, out: Path) -> None:
    """A trainer's steps on all ranks; the first writes metrics and the policy."""
    rows = run(trainer)
    weights = {name: value.cpu() for name, value in trainer.weights().items()}
    if trainer.ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        torch.save(weights, out / "policy.pt")


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Members of a model's outermost lists."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


if __name__ == "__main__":
    typer.run(main)
