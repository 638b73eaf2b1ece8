"""Training from transitions in memory: a batch, the method's stages, lagged copies; from a log, or from a buffer that grows.

A run can be stopped after any step and gone on with to the bit. Nothing in the loop waits for the device: what a step tells is
added up there, and read when somebody asks.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from ope.data import InputError
from rl_core.buffers import Buffer
from rl_core.checks import above, at_least, within
from rl_core.families.offline import Draw, Drawn, Learner, OfflineMethod, Stage, Transitions, WithPreparation, WithSelection
from rl_core.loss import total
from rl_core.models.mlp import Sizes
from rl_core.scaling import Scaling

LEAST_ERROR = 1e-6
"""Added to errors, so that every row may be drawn again."""


@dataclass(frozen=True)
class OfflineSchedule:
    """How a run goes, whatever its method. The defaults are those of TD3+BC's paper."""

    steps: int = 1_000_000
    batch: int = 256
    width: int = 256
    layers: int = 2
    normalize: bool = True
    """Observations less their mean over the data, over their standard deviation."""
    reward_scale: float = 1.0
    priority: float = 0.0
    """Rows are drawn in proportion to this power of their error when it was last looked at (Schaul et al. 2016: 0.6); 0: all alike.
    """
    correction: float = 0.4
    """Power of a row's rarity that it counts for in the critics' errors: this at first, 1 at the end, where no bias is left."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch", "width", "layers")
        at_least(self, 0, "priority")
        above(self, 0, "reward_scale")
        at_least(self, 0, "reward_scale")  # infinity is above 0
        within(self, 0, 1, "correction")


class OfflineTrainer:
    """A method that learns from transitions, and from those that are added later where `capacity` leaves room.

    Observations are scaled by what the first data say. `draw`: where random numbers come from, else a generator of its own.
    """

    def __init__(
        self,
        method: OfflineMethod,
        data: Transitions,
        schedule: OfflineSchedule,
        *,
        capacity: int | None = None,
        device: str | torch.device = "cpu",
        draw: Draw | None = None,
    ) -> None:
        self.method, self.schedule, self.device = method, schedule, torch.device(device)
        if isinstance(method, WithSelection):
            data = data.rows(method.select(data))
        self.scaling = Scaling.of(data.obs) if schedule.normalize else Scaling.none(data.obs.shape[1])
        self.buffer = Buffer(max(len(data), capacity or 0), *data.sizes, self.device)
        self.add(data)
        self.sizes = Sizes(*data.sizes, schedule.width, schedule.layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(schedule.seed)
            made = method.networks(self.sizes)
        self.nets = nn.ModuleDict(made).to(self.device)
        self.lagged = nn.ModuleDict({name: copy.deepcopy(self.nets[name]) for name in method.lagged()}).requires_grad_(False)
        prepared = method.prepare(self.buffer.all()) if isinstance(method, WithPreparation) else None
        self.learner = Learner(dict(self.nets.items()), dict(self.lagged.items()), prepared)
        self.stages = [_Running(stage, self.learner, method.tau) for stage in method.stages()]
        self.rng = Generator(self.device).manual_seed(schedule.seed + 1)
        self.draw = Drawn(self.rng) if draw is None else draw
        self.step, self.cpu_seconds = 0, 0.0

    def add(self, data: Transitions) -> None:
        """Learn from these, too."""
        self.buffer.add(self.scaled(data))

    def scaled(self, data: Transitions) -> Transitions:
        """As they are learned from: observations and rewards scaled."""
        obs, next_obs = self.scaling.apply(data.obs), self.scaling.apply(data.next_obs)
        return replace(data, obs=obs, next_obs=next_obs, reward=data.reward * self.schedule.reward_scale)

    def advance(self, steps: int = 1) -> None:
        """So many steps, each on a batch of its own."""
        started = time.process_time()
        for _ in range(steps):
            batch = self.batch()
            errors = self.learn(batch)
            if self.schedule.priority:
                self.prioritise(batch, errors)
        self.cpu_seconds += time.process_time() - started

    def batch(self) -> Transitions:
        """Rows of the buffer, as the schedule draws them."""
        index = self.buffer.draw(self.schedule.batch, self.rng)
        found = self.buffer.take(index)
        if not self.schedule.priority:
            return found
        start, done = self.schedule.correction, min(self.step / self.schedule.steps, 1.0)
        weight = self.buffer.rarity(index) ** (start + (1 - start) * done)
        return replace(found, weight=weight / weight.max())

    def learn(self, batch: Transitions) -> Tensor | None:
        """A step on a batch. Errors (B,) of its rows, of a method with critics, where the batch has weights."""
        self.step += 1
        errors: Tensor | None = None
        for stage in self.stages:
            if self.step % stage.stage.every == 0:
                found = stage.run(self.learner, batch, self.draw, (self.step - 1) / self.schedule.steps)
                stage.follow(self.step)
                errors = errors if found is None else found
        return errors

    def prioritise(self, batch: Transitions, errors: Tensor | None) -> None:
        """Rows of a batch are drawn by these errors from now on. Raises InputError where the method has no critic."""
        if errors is None:
            raise InputError(f"priority: found {type(self.method).__name__}, which has no critic; expected 0")
        found = (errors + LEAST_ERROR) ** self.schedule.priority
        if self.buffer.weight is None:
            self.buffer.weigh(found.max().expand(len(self.buffer)))  # the largest so far, as of rows that come later
        assert batch.row is not None, "drawn from the buffer"
        self.buffer.reweigh(batch.row, found)

    def metrics(self) -> dict[str, float]:
        """Means since they were last asked for; here alone a step waits for the device."""
        return {"step": self.step, "cpu_seconds": round(self.cpu_seconds, 3)} | {
            name: value for stage in self.stages for name, value in stage.read().items()
        }

    @torch.no_grad()
    def act(self, obs: NDArray[Any]) -> NDArray[np.float64]:
        """What the policy takes where nobody explores. (n, S) -> (n, A)."""
        tensor = torch.as_tensor(obs, dtype=torch.float32)
        return np.asarray(self.learner.nets["actor"](self.scaling.apply(tensor).to(self.device)).cpu().double().numpy())

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but for the data."""
        return copy.deepcopy({
            "nets": self.nets.state_dict(), "lagged": self.lagged.state_dict(), "rng": self.rng.get_state(),
            "stages": [stage.state() for stage in self.stages], "step": self.step, "cpu_seconds": self.cpu_seconds,
            "scaling": vars(self.scaling), "sizes": asdict(self.sizes), "weight": self.buffer.weights(),
        })  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with the same data."""
        self.nets.load_state_dict(state["nets"])
        self.lagged.load_state_dict(state["lagged"])
        self.rng.set_state(state["rng"])
        self.scaling = Scaling(**state["scaling"])
        for stage, kept in zip(self.stages, state["stages"], strict=True):
            stage.restore(kept)
        self.buffer.weight, self.buffer.mass = None, None
        if state["weight"] is not None:
            self.buffer.weigh(state["weight"])
        self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]


class _Running:
    """A stage with its optimiser, and what it told since it was last read."""

    def __init__(self, stage: Stage, learner: Learner, tau: float) -> None:
        self.stage, self.tau = stage, tau
        groups = [{"params": list(learner.nets[name].parameters()), "lr": rate} for name, rate in stage.learns.items()]
        self.weights = [weight for group in groups for weight in group["params"]]  # type: ignore[attr-defined]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.rates = [rate for _, rate in stage.learns.items()]
        self.leading: list[Tensor] = [weight for name in stage.follows for weight in learner.nets[name].parameters()]
        self.lagging: list[Tensor] = [weight for name in stage.follows for weight in learner.lagged[name].parameters()]
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, learner: Learner, batch: Transitions, draw: Draw, done: float) -> Tensor | None:
        """A step of the stage; the rows' errors. `done`: share of the schedule before this step."""
        loss = self.stage.loss(learner, batch, draw)
        gradients = torch.autograd.grad(-total(loss), self.weights)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        if self.stage.cosine:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        self.optimizer.step()
        for name, term in loss.metrics.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(term.num), torch.zeros_like(term.den)
            for held, found in zip(self.sums[name], term, strict=True):
                held += found.detach()  # in place: a graph adds to the tensors that it was captured with
        return loss.errors

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Lagged copies move, or are made anew. Without a graph, which would tie a copy to all its past."""
        every = self.stage.copied_every
        if self.lagging and every is None:
            torch._foreach_lerp_(self.lagging, self.leading, self.tau)
        elif self.lagging and every is not None and step % every == 0:
            torch._foreach_copy_(self.lagging, self.leading)

    def read(self) -> dict[str, float]:
        """Ratios since the last time, of what was told since then."""
        found = {name: float(num / den) for name, (num, den) in self.sums.items() if den != 0}
        for held in (one for pair in self.sums.values() for one in pair):
            held.zero_()
        return found

    def state(self) -> dict[str, Any]:
        """Of the optimiser, and the sums."""
        return {"optimizer": self.optimizer.state_dict(), "sums": self.sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, which stays as it is."""
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        device = self.weights[0].device
        self.sums = {name: (num.to(device, copy=True), den.to(device, copy=True)) for name, (num, den) in state["sums"].items()}


class Environment(Protocol):
    """Episodes side by side. Observations (n, S), actions (n, A) in [-1, 1], flags (n,)."""

    @property
    def obs_size(self) -> int:
        """S."""
        ...

    @property
    def action_size(self) -> int:
        """A."""
        ...

    def reset(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """So many fresh episodes. Returns observations."""
        ...

    def restart(self, which: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float64]:
        """Fresh episodes where True. Returns the observations of all."""
        ...

    def step(
        self, action: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
        """What really follows, rewards, terminated, truncated. Nothing starts anew by itself."""
        ...


Act = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def returns(act: Act, env: Environment, episodes: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Undiscounted returns (episodes,) of episodes side by side."""
    obs = env.reset(episodes, rng)
    earned, going = np.zeros(episodes), np.ones(episodes, dtype=np.bool_)
    while going.any():
        obs, reward, terminated, truncated = env.step(act(obs))
        earned += np.where(going, reward, 0.0)
        going &= ~(terminated | truncated)
    return earned


def recorded(
    act: Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]],
    env: Environment,
    episodes: int,
    rng: np.random.Generator,
) -> Transitions:
    """Transitions of whole episodes, each after the other, in their order."""
    obs = env.reset(episodes, rng)
    parts, going = list[tuple[NDArray[Any], ...]](), np.ones(episodes, dtype=np.bool_)
    while going.any():
        action = act(obs, rng)
        following, reward, terminated, truncated = env.step(action)
        parts.append((obs, action, reward, following, terminated, truncated, going.copy()))
        going &= ~(terminated | truncated)
        obs = following
    columns = [np.stack(column, axis=1) for column in zip(*parts, strict=True)]
    counted = columns.pop()
    return Transitions(*(torch.as_tensor(column[counted], dtype=torch.float32) for column in columns))
