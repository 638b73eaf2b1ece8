"""Training from what a policy does itself: batch after batch from fresh steps, or step after step from a buffer that grows.

Both go on to the bit from where they were stopped, the environment's state included. An episode that was cut is valued at what
really followed; environments never start anew by themselves.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from ope.data import InputError
from ope.primitives.divergences import k3
from ope.primitives.weights import effective_sample_size, log_ratio
from rl_core.buffers import Buffer, mixed
from rl_core.checks import above, at_least, within
from rl_core.families.offline import Drawn, OfflineMethod, Transitions, WithExploration, joined
from rl_core.families.online import CreditedRows, OnlineMethod, Steps, WithChoices, WithUpdate
from rl_core.loss import total
from rl_core.models.distributions import Distribution
from rl_core.models.mlp import Sizes
from rl_core.models.policies import ChoicePolicy, NormalPolicy, StateValue
from rl_core.scaling import STD_FLOOR, Scaling
from rl_core.trainers.offline import Environment, OfflineSchedule, OfflineTrainer

COLLECTING = 1
"""Beside a seed: the stream of what is collected after a log."""

UNIFORM = -1.0
"""Id of uniform actions; that of a policy is how many steps it had learned for."""


@dataclass(frozen=True)
class OnlineSchedule:
    """How a run on fresh batches goes, whatever its method. The defaults are those of PPO's control tasks."""

    steps: int = 1_000_000
    """Of all environments together."""
    horizon: int = 2048
    """Steps of every environment between two updates."""
    count: int = 1
    """Environments side by side."""
    width: int = 64
    layers: int = 2
    normalize: bool = False
    """Observations less their running mean, over their running standard deviation; as they were when a batch was begun."""
    reward_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "horizon", "count", "width", "layers")
        above(self, 0, "reward_scale")
        at_least(self, 0, "reward_scale")  # infinity is above 0


@dataclass(frozen=True)
class Running:
    """Mean and spread of all that was seen, merged batch by batch."""

    count: int
    mean: Tensor
    """(S,) float64."""
    square: Tensor
    """(S,) sum of squared distances from it."""

    @classmethod
    def empty(cls, size: int) -> Running:
        """Of nothing."""
        return cls(0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))

    def merged(self, obs: Tensor) -> Running:
        """With these (n, S), too."""
        wide, n = obs.double(), len(obs)
        mean, count = wide.mean(dim=0), self.count + n
        apart = mean - self.mean
        square = self.square + ((wide - mean) ** 2).sum(dim=0) + apart**2 * (self.count * n / count)
        return Running(count, self.mean + apart * (n / count), square)

    def scaling(self) -> Scaling:
        """Of what was seen so far; none before anything was."""
        if not self.count:
            return Scaling.none(len(self.mean))
        return Scaling(self.mean.float(), (self.square / self.count).sqrt().float() + STD_FLOOR)


def env_state(env: Environment) -> Any:
    """A dataclass's fields, arrays as tensors, so that a checkpoint needs no code to be read; None of any other environment."""
    if not is_dataclass(env):
        return None
    return {name: torch.as_tensor(value).clone() if isinstance(value, np.ndarray) else value for name, value in vars(env).items()}


def env_restored(env: Environment, state: Any, obs: Tensor, rng: np.random.Generator) -> tuple[Environment, NDArray[np.float64]]:
    """The environment as it was, and what was seen there; one that cannot tell its state begins fresh episodes."""
    if state is None:
        return env, env.reset(len(obs), rng)
    values = {name: value.clone().numpy() if isinstance(value, Tensor) else value for name, value in state.items()}
    return type(env)(**values), obs.numpy()


class OnlineTrainer:
    """A method that learns from fresh batches. The policy that acts is that at the start of a batch, and so are its densities."""

    def __init__(
        self, method: OnlineMethod, env: Environment, schedule: OnlineSchedule, *, device: str | torch.device = "cpu"
    ) -> None:
        self.method, self.env, self.schedule, self.device = method, env, schedule, torch.device(device)
        self.sizes = Sizes(env.obs_size, env.action_size, schedule.width, schedule.layers)
        self.choices = isinstance(env, WithChoices) and env.discrete
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(schedule.seed)
            policy = ChoicePolicy(self.sizes) if self.choices else NormalPolicy(self.sizes)
            self.nets = nn.ModuleDict({"policy": policy, "value": StateValue(self.sizes)}).to(self.device)
        self.policy, self.value = self.nets["policy"], self.nets["value"]
        self.optimizer = torch.optim.Adam(self.nets.parameters(), lr=method.plan.rate, eps=1e-5)
        self.rng = Generator(self.device).manual_seed(schedule.seed + 1)
        self.draw = Drawn(self.rng)
        self.chance = np.random.default_rng(schedule.seed)
        self.running = Running.empty(env.obs_size)
        self.scaling = self.running.scaling()
        self.obs = env.reset(schedule.count, self.chance)
        self.earned, self.finished = np.zeros(schedule.count), list[float]()
        self.step, self.taken, self.cpu_seconds = 0, 0, 0.0

    def advance(self) -> dict[str, float]:
        """A batch, and what is learned from it; what is to be known of that. `return`: mean of the episodes that ended in it."""
        started = time.process_time()
        progress = min(self.taken / self.schedule.steps, 1.0)
        steps = self.collect()
        batch = self.credited(steps)
        with torch.no_grad():
            old = self.policy(batch.obs)
            begun = float((old.logp(batch.action) - batch.logp_behavior).abs().max())
        told = self.learn(batch, old, progress)
        self.step += 1
        self.cpu_seconds += time.process_time() - started
        ended, self.finished = self.finished, []
        told |= {"log_ratio_at_start": begun, "episodes": float(len(ended))}
        told |= {"return": sum(ended) / len(ended)} if ended else {}
        return {"step": self.step, "taken": self.taken, "cpu_seconds": round(self.cpu_seconds, 3)} | told

    @torch.no_grad()
    def collect(self) -> Steps:
        """`horizon` steps of every environment. Actions are clipped to [-1, 1] for the environment alone."""
        rows, followed, schedule = list[tuple[Any, ...]](), list[Tensor](), self.schedule
        seen = list[Tensor]()
        for _ in range(schedule.horizon):
            raw = torch.as_tensor(self.obs, dtype=torch.float32)
            obs = self.scaling.apply(raw).to(self.device)
            chances: Distribution = self.policy(obs)
            action = chances.sample(self.draw)
            following, earned, over, cut = self.env.step(action.clamp(-1, 1).cpu().double().numpy())
            flat = (torch.as_tensor(earned, dtype=torch.float32), torch.as_tensor(over), torch.as_tensor(cut))
            rows.append((obs, action, *(one.to(self.device) for one in flat), chances.logp(action)))
            seen.append(raw)
            followed.append(self.scaling.apply(torch.as_tensor(following, dtype=torch.float32)).to(self.device))
            self._count(following, earned, over | cut)
        self.taken += schedule.horizon * schedule.count
        states, action, reward, terminated, truncated, logp = (torch.stack(column) for column in zip(*rows, strict=True))
        value, next_value = self.value(states), self.value(torch.stack(followed))
        if schedule.normalize:
            self.running = self.running.merged(torch.cat(seen))
            self.scaling = self.running.scaling()
        policy = torch.full_like(reward, float(self.step))
        reward = reward * schedule.reward_scale
        return Steps(states, action, reward, terminated, truncated, logp, value, next_value, policy)

    def _count(self, following: NDArray[Any], reward: NDArray[Any], ended: NDArray[np.bool_]) -> None:
        """Returns of episodes, and fresh ones in the place of those that ended."""
        self.earned += reward
        self.finished += [float(one) for one in self.earned[ended]]
        self.earned[ended] = 0.0
        self.obs = self.env.restart(ended, self.chance) if ended.any() else following

    def credited(self, steps: Steps) -> CreditedRows:
        """Rows of a batch with the method's credit, standardised where the plan says so for the whole."""
        advantage, target = self.method.credit(steps)
        columns = (steps.obs, steps.action, steps.logp_behavior, advantage, target, steps.value)
        batch = CreditedRows(*(one.flatten(0, 1) for one in columns))
        return batch.standardised() if self.method.plan.standardize == "batch" else batch

    def learn(self, batch: CreditedRows, old: Distribution, progress: float) -> dict[str, float]:
        """All steps on a batch, and what came of them."""
        plan, method = self.method.plan, self.method
        if plan.anneal:
            for group in self.optimizer.param_groups:
                group["lr"] = plan.rate * (1 - progress)
        if isinstance(method, WithUpdate):
            told = dict(method.improve(self.policy, batch, old, progress))
        else:
            told = self._pass_policy(batch, old, progress)
        for rows in self._minibatches(len(batch), plan.value_epochs, plan.value_minibatch):
            part = batch.rows(rows)
            self._ascend(total(method.value_loss(part, self.value(part.obs))))
        return told | self.described(batch)

    def _pass_policy(self, batch: CreditedRows, old: Distribution, progress: float) -> dict[str, float]:
        """The plan's passes of the policy, and of the value function where they go together."""
        plan, method = self.method.plan, self.method
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        norms, stopped = list[Tensor](), 0.0
        for rows in self._minibatches(len(batch), plan.epochs, plan.minibatch):
            part = batch.rows(rows)
            part = part.standardised() if plan.standardize == "minibatch" else part
            new: Distribution = self.policy(part.obs)
            if (
                plan.kl_stop is not None
                and float(k3(part.logp_behavior, new.logp(part.action).detach()).mean()) > 1.5 * plan.kl_stop
            ):
                stopped = 1.0
                break
            loss = method.policy_loss(part, new, old.rows(rows), progress)
            value = total(loss)
            if not plan.value_epochs:
                value = value + total(method.value_loss(part, self.value(part.obs)))
            norms.append(self._ascend(value))
            for name, term in loss.metrics.items():
                num, den = sums.get(name, (0.0, 0.0))
                sums[name] = num + term.num.detach(), den + term.den.detach()
        told = {name: float(num / den) for name, (num, den) in sums.items()}
        return told | {"updates": float(len(norms)), "kl_stopped": stopped, "grad_norm": float(sum(norms) / max(len(norms), 1))}

    def _minibatches(self, count: int, epochs: int, size: int | None) -> Iterator[Any]:
        """Numbers of rows: every row once an epoch, in an order of its own; the last part of one may be short."""
        for _ in range(epochs):
            if size is None or size >= count:
                yield slice(None)
                continue
            yield from torch.split(torch.randperm(count, generator=self.rng, device=self.device), size)

    def _ascend(self, value: Tensor) -> Tensor:
        """A step up. Returns the norm of the gradients before it was cut."""
        self.optimizer.zero_grad(set_to_none=True)
        (-value).backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.nets.parameters(), self.method.plan.grad_clip)
        self.optimizer.step()
        return norm

    @torch.no_grad()
    def described(self, batch: CreditedRows) -> dict[str, float]:
        """How far the policy is from the one that acted, over all rows; and what the values explained of the returns."""
        new: Distribution = self.policy(batch.obs)
        logp = new.logp(batch.action)
        ratio, spread = log_ratio(logp, batch.logp_behavior).exp(), batch.target.var(correction=0)
        explained = 1 - (batch.target - batch.value).var(correction=0) / spread
        return {
            "kl": float(k3(batch.logp_behavior, logp).mean()), "max_ratio": float(ratio.max()),
            "ess": float(effective_sample_size(ratio)) / len(batch), "entropy": float(new.entropy().mean()),
            "explained_variance": float(explained) if float(spread) > 0 else math.nan,
        }  # fmt: skip

    @torch.no_grad()
    def act(self, obs: NDArray[Any]) -> NDArray[np.float64]:
        """What the policy takes where nobody explores, the scaling as it is. (n, S) -> (n, A)."""
        tensor = self.scaling.apply(torch.as_tensor(obs, dtype=torch.float32)).to(self.device)
        return np.asarray(self.policy(tensor).mode().clamp(-1, 1).cpu().double().numpy())

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, the environment included."""
        return copy.deepcopy({
            "nets": self.nets.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": self.rng.get_state(),
            "sizes": asdict(self.sizes), "choices": self.choices, "chance": self.chance.bit_generator.state,
            "env": env_state(self.env), "obs": torch.as_tensor(self.obs),
            "running": vars(self.running), "earned": torch.as_tensor(self.earned), "finished": self.finished,
            "step": self.step, "taken": self.taken, "cpu_seconds": self.cpu_seconds,
        })  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        state = copy.deepcopy(dict(state))
        self.nets.load_state_dict(state["nets"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.set_state(state["rng"])
        self.chance.bit_generator.state = state["chance"]
        self.env, self.obs = env_restored(self.env, state["env"], state["obs"], self.chance)
        self.running = Running(**state["running"])
        self.scaling = self.running.scaling()
        self.earned, self.finished = state["earned"].numpy(), state["finished"]
        if state["env"] is None:
            self.earned = np.zeros_like(self.earned)  # fresh episodes have begun
        self.step, self.taken, self.cpu_seconds = state["step"], state["taken"], state["cpu_seconds"]


@dataclass(frozen=True)
class ReplaySchedule:
    """How a run from replay goes: what `learning` says of batches, networks and seed, and what of collection is said here."""

    learning: OfflineSchedule = field(default_factory=lambda: OfflineSchedule(normalize=False))
    warmup: int = 5000
    """Uniform transitions before anything is learned, where no data are given."""
    offline_steps: int = 0
    """Steps on the given data before collection begins."""
    count: int = 1
    """Environments side by side."""
    ratio: float = 1.0
    """Steps of learning per transition."""
    capacity: int = 1_000_000
    """Rows of replay; with `offline_share`, of those that were collected."""
    offline_share: float = 0.0
    """Of every batch, from the given data, which nothing displaces (Ball et al. 2023: 0.5); 0: given and collected are one."""

    def __post_init__(self) -> None:
        at_least(self, 1, "warmup", "count", "capacity")
        at_least(self, 0, "offline_steps")
        above(self, 0, "ratio")
        within(self, 0, 1, "offline_share")
        if self.offline_share == 1 or (self.offline_share and self.learning.priority):
            raise InputError(
                f"offline_share: found {self.offline_share} and a priority of {self.learning.priority}; expected below 1, and "
                "one of the two: shares are of rows that are drawn all alike"
            )


class ReplayTrainer:
    """A method of the offline family that collects: uniform actions or logged data first, then its own, one learning step per
    transition. It has an `OfflineTrainer`, whose buffer grows.

    Raises InputError for a method that cannot explore, and for observations scaled by uniform actions, which see little.
    """

    def __init__(
        self,
        method: OfflineMethod,
        env: Environment,
        schedule: ReplaySchedule,
        *,
        data: Transitions | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if not isinstance(method, WithExploration):
            raise InputError(
                f"found {type(method).__name__}, which has no explore; expected a method that draws actions, such as SAC"
            )
        if isinstance(env, WithChoices) and env.discrete:
            raise InputError("found an environment of choices; expected one whose actions are numbers in [-1, 1]")
        if data is None and schedule.learning.normalize:
            raise InputError("found normalize = true and no data; expected normalize = false, or data whose spread is known")
        self.method, self.env, self.schedule = method, env, schedule
        # a log of the pendulum is drawn from its seed alone: the same stream would begin with the same episodes
        self.chance = np.random.default_rng(schedule.learning.seed if data is None else (schedule.learning.seed, COLLECTING))
        self.obs = env.reset(schedule.count, self.chance)
        self.started_from = len(data) if data is not None else 0
        start = self._warmed_up() if data is None else data
        if data is None and (schedule.offline_share or schedule.offline_steps):
            raise InputError("offline_share, offline_steps: found no data; expected some to learn from, or 0")
        apart = schedule.offline_share > 0
        if apart and not 0 < round(schedule.offline_share * schedule.learning.batch) < schedule.learning.batch:
            raise InputError(
                f"offline_share: found {schedule.offline_share} of {schedule.learning.batch} rows; expected a row of either"
            )
        room = len(start) if apart else max(schedule.capacity, len(start))
        self.learner = OfflineTrainer(method, start, schedule.learning, capacity=room, device=device)
        self.fresh = Buffer(schedule.capacity, *start.sizes, self.learner.device) if apart else None
        self.taken, self.owed = 0 if data is not None else len(start), 0.0
        self.cpu_seconds = 0.0

    def _warmed_up(self) -> Transitions:
        """Uniform actions; what they are worth in density is known exactly."""
        parts = list[Transitions]()
        for _ in range(math.ceil(self.schedule.warmup / self.schedule.count)):
            action = self.chance.uniform(-1, 1, (self.schedule.count, self.env.action_size))
            logp = torch.full((self.schedule.count,), -self.env.action_size * math.log(2))
            parts.append(self._taken(action, logp, UNIFORM))
        return joined(parts)

    def _taken(self, action: NDArray[np.float64], logp: Tensor, policy: float) -> Transitions:
        """One step of every environment, with what really followed."""
        obs = self.obs
        following, reward, terminated, truncated = self.env.step(action)
        ended = terminated | truncated
        self.obs = self.env.restart(ended, self.chance) if ended.any() else following
        arrays = [torch.as_tensor(one, dtype=torch.float32) for one in (obs, action, reward, following, terminated, truncated)]
        return Transitions(*arrays, logp_behavior=logp.cpu(), policy=torch.full_like(logp, policy, device="cpu"))  # type: ignore[misc]

    def advance(self, steps: int = 1) -> None:
        """So many steps: of learning alone while the schedule has offline ones, else of every environment with what they owe."""
        started = time.process_time()
        for _ in range(steps):
            if self.started_from and self.learner.step < self.schedule.offline_steps:
                self.learner.advance()
                continue
            self._keep(self.collect())
            self.taken += self.schedule.count
            self.owed += self.schedule.count * self.schedule.ratio
            self._learn(int(self.owed))
            self.owed -= int(self.owed)
        self.cpu_seconds += time.process_time() - started

    def _keep(self, found: Transitions) -> None:
        """Among what was given, or apart from it."""
        if self.fresh is None:
            self.learner.add(found)
        else:
            self.fresh.add(self.learner.scaled(found))

    def _learn(self, steps: int) -> None:
        """From all that is held alike, or in fixed shares."""
        learner, share = self.learner, self.schedule.offline_share
        if self.fresh is None:
            learner.advance(steps)
            return
        for _ in range(steps):
            parts = ((learner.buffer, share), (self.fresh, 1 - share))
            learner.learn(mixed(parts, self.schedule.learning.batch, learner.rng))

    @torch.no_grad()
    def collect(self) -> Transitions:
        """One step of every environment by the method's exploration."""
        learner = self.learner
        obs = learner.scaling.apply(torch.as_tensor(self.obs, dtype=torch.float32)).to(learner.device)
        assert isinstance(self.method, WithExploration), "looked at when it was made"
        action, logp = self.method.explore(learner.learner, obs, learner.draw)
        return self._taken(action.clamp(-1, 1).cpu().double().numpy(), logp, float(learner.step))

    def act(self, obs: NDArray[Any]) -> NDArray[np.float64]:
        """What the policy takes where nobody explores. (n, S) -> (n, A)."""
        return self.learner.act(obs)

    def metrics(self) -> dict[str, float]:
        """Those of learning since they were last asked for, and how much was collected."""
        return self.learner.metrics() | {"taken": float(self.taken), "cpu_seconds": round(self.cpu_seconds, 3)}

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, buffer and environment included."""
        return copy.deepcopy({
            "learner": self.learner.state(), "buffer": self.learner.buffer.state(),
            "fresh": None if self.fresh is None else self.fresh.state(), "chance": self.chance.bit_generator.state,
            "env": env_state(self.env), "obs": torch.as_tensor(self.obs),
            "step": self.learner.step, "taken": self.taken, "owed": self.owed, "cpu_seconds": self.cpu_seconds,
        })  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a trainer that was made alike."""
        state = copy.deepcopy(dict(state))
        self.learner.buffer.restore(state["buffer"])
        self.learner.restore(state["learner"])
        if self.fresh is not None:
            self.fresh.restore(state["fresh"])
        self.chance.bit_generator.state = state["chance"]
        self.env, self.obs = env_restored(self.env, state["env"], state["obs"], self.chance)
        self.taken, self.owed, self.cpu_seconds = state["taken"], state["owed"], state["cpu_seconds"]
