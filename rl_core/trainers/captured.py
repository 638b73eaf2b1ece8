"""Steps on a GPU as one launch: CUDA graphs of many whole updates, where each alone is some two hundred small kernels.

A graph replays kernels on the addresses and with the numbers that it was captured with: what else changes from step to step than
random numbers is refused. `compiled` fuses the kernels of a loss first; both may be had together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ope.data import InputError
from rl_core.families.offline import Drawn, Stage
from rl_core.support import NearestPairs, Tiles
from rl_core.trainers.offline import OfflineTrainer

WARM = 3
"""Times that every stage runs before it is captured: optimisers, libraries and compilers make what they need on a first call."""


def period(stages: Sequence[Stage]) -> int:
    """Steps after which the same stages run, and the same copies are made anew."""
    return math.lcm(*(stage.every for stage in stages), *(stage.copied_every or 1 for stage in stages))


def compiled(trainer: OfflineTrainer, backend: Any = "inductor") -> OfflineTrainer:
    """The same trainer, its losses compiled by `torch.compile` when they are first asked for; gradients and Adam stay as they are.

    A random number's generator splits a loss in two. On a CPU it gains nothing: products are most of a step.
    """
    for running in trainer.stages:
        running.stage = replace(running.stage, loss=torch.compile(running.stage.loss, backend=backend, dynamic=False))
    return trainer


class Captured:
    """A trainer whose steps run as graphs of `steps` updates each, or of the next number that its stages' period divides.

    The trainer stays what it is: its state, metrics and single steps may be had in between; after a restore it is captured anew.
    Copies that are made every 1,000 steps ask for graphs of as many. Raises InputError for what cannot be captured.
    """

    def __init__(self, trainer: OfflineTrainer, steps: int = 20) -> None:
        if steps < 1:
            raise InputError(f"steps: found {steps}; expected at least 1 in a graph")
        refuse(trainer)
        stages = [running.stage for running in trainer.stages]
        self.trainer, self.period = trainer, period(stages)
        self.steps = self.period * math.ceil(steps / self.period)
        self.warm = WARM * math.lcm(*(stage.every for stage in stages))
        self.rows = trainer.buffer.size, trainer.buffer.next
        self.held: list[int] = []
        with torch.cuda.device(trainer.device):
            self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]

    def advance(self, steps: int = 1) -> None:
        """So many steps: whole graphs, and one by one what comes before the first and after the last of them."""
        trainer = self.trainer
        refuse(trainer)
        if self.rows != (found := (trainer.buffer.size, trainer.buffer.next)):
            raise InputError(f"found a buffer of {found}; expected that of {self.rows} (rows, next): capture it anew")
        known, until = self.held == _held(trainer), trainer.step + steps
        least = 0 if known else self.warm
        ahead = least + -(trainer.step + least) % self.period  # a graph begins where the order of stages does
        if ahead + self.steps <= steps:
            self._one_by_one(ahead)
            if not known:
                self._capture()
            started = time.process_time()
            for _ in range((until - trainer.step) // self.steps):
                self.graph.replay()
                trainer.step += self.steps
            trainer.cpu_seconds += time.process_time() - started
        trainer.advance(until - trainer.step)

    def _one_by_one(self, steps: int) -> None:
        """Steps on the stream that captures, between what was asked for before and what comes next."""
        with torch.cuda.device(self.trainer.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.trainer.advance(steps)
            torch.cuda.current_stream().wait_stream(self.stream)

    def _capture(self) -> None:
        """Record the next steps without taking them: the trainer is afterwards where it was."""
        trainer, self.graph, self.held = self.trainer, torch.cuda.CUDAGraph(), []
        step = trainer.step
        with torch.cuda.device(trainer.device):
            self.graph.register_generator_state(trainer.rng)  # which every replay then moves on
            try:
                with _capturable(trainer), torch.cuda.graph(self.graph, stream=self.stream):
                    trainer.advance(self.steps)
            finally:
                trainer.step = step
        self.held = _held(trainer)


def refuse(trainer: OfflineTrainer) -> None:
    """Raises InputError for a trainer of which a replay would not be what its next steps are."""
    buffer, draw, prepared = trainer.buffer, trainer.draw, trainer.learner.prepared
    falling = [name for running in trainer.stages if running.stage.cosine for name in running.stage.learns]
    if falling:
        raise InputError(f"found rates of {', '.join(falling)} that fall as a cosine; expected constant ones: a graph keeps them")
    if trainer.schedule.priority:
        raise InputError(f"priority: found {trainer.schedule.priority}; expected 0: what a row counts for changes with every step")
    if buffer.size < buffer.capacity:
        raise InputError(f"found {buffer.size} rows and room for {buffer.capacity}; expected a buffer that does not grow")
    if not isinstance(draw, Drawn) or draw.rng is not trainer.rng:
        raise InputError(f"found numbers of a {type(draw).__name__}; expected the trainer's own generator: a graph goes on with it")
    if isinstance(prepared, NearestPairs) and not isinstance(prepared.search, Tiles):
        raise InputError(f"search: found {type(prepared.search).__name__}, which asks the CPU; expected tiles")
    if trainer.device.type != "cuda":
        raise InputError(f"device: found {trainer.device}; expected cuda: there are no graphs elsewhere")


def _held(trainer: OfflineTrainer) -> list[int]:
    """Addresses of all that outlives a step: rows, their weights, networks, moments, sums. A restore makes some of them anew."""
    buffer = trainer.buffer
    found: list[Tensor] = [buffer.rows, *trainer.nets.parameters(), *trainer.lagged.parameters()]
    found += [one for one in (buffer.weight, buffer.mass) if one is not None]
    for running in trainer.stages:
        found += [one for pair in running.sums.values() for one in pair]
        found += [one for kept in running.optimizer.state.values() for one in kept.values()]
    return [one.data_ptr() for one in found]


@contextmanager
def _capturable(trainer: OfflineTrainer) -> Iterator[None]:
    """Optimisers that may be captured: their fused kernel is the same, but the flag warns where steps are also taken one by one."""
    groups = [group for running in trainer.stages for group in running.optimizer.param_groups]
    before = [group["capturable"] for group in groups]
    try:
        for group in groups:
            group["capturable"] = True
        yield
    finally:
        for group, flag in zip(groups, before, strict=True):
            group["capturable"] = flag
