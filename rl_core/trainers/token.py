"""Training of a language model by a method of the token family: collect, credit, step, write down; to the bit the same again.

Who sampled is refreshed every `sync_interval` steps; every row keeps the log-probability that it was really sampled with. Several
processes take one step together through `Ranks`, whose callables do nothing where there is one.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from ope.data import InputError
from ope.primitives.reduce import divide
from ope.primitives.terms import Terms
from rl_core.diagnostics import reward_range, step_metrics
from rl_core.families.token import (
    TokenBatch,
    TokenMethod,
    WithCritic,
    WithReference,
    WithStatistics,
    counted,
    credited,
    denominators,
    statistics,
)
from rl_core.loss import Loss, total
from rl_core.models.lm import LM, Critic
from rl_core.rewards import overlong_penalty
from rl_core.rollout import CachedSampler, CausalModel, Replay, Rollouts, device_of, joined, token_logps
from rl_core.tasks.addition import END, PAD
from rl_core.trainers.checkpoints import Rows, alone, append_metrics, identity, read_checkpoint, save, write_checkpoint


class Task(Protocol):
    """Prompts, and rewards that can be checked."""

    @property
    def max_tokens(self) -> int:
        """Tokens of a response, at most."""
        ...

    def prompts(self, count: int, rng: Generator) -> Tensor:
        """(count, P)."""
        ...

    def reward(self, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        """(n,)."""
        ...


class Imitable(Task, Protocol):
    """A task with answers to begin from."""

    def examples(self, count: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """Tokens (count, P + T) to imitate, and which of them are the answer's."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How a run goes, whatever its method."""

    steps: int = 160
    prompts: int = 32
    responses: int = 8
    sync_interval: int = 1
    """Optimiser steps between two refreshes of the policy that samples."""
    sync_offset: int = 0
    """Batches that are sampled ahead: training lags so many behind what was collected."""
    epochs: int = 1
    """Passes over each batch of rollouts, every one in another order of its prompts."""
    minibatches: int = 1
    """Parts of a pass, whole prompts each: every one is an optimiser step."""
    micro_prompts: int | None = None
    """Prompts whose responses meet the model at once; None: all."""
    replay_share: float = 0.0
    """Share of the prompts of a step that are drawn from earlier rollouts."""
    replay_capacity: int = 256
    redraws: int = 0
    """Times that prompts whose responses all have one reward are replaced by others (DAPO's dynamic sampling); then they stay."""
    overlong_margin: int | None = None
    """Tokens below the longest response from which on length costs reward (DAPO's overlong shaping); None: it never does."""
    proximal: bool = False
    """Recompute the trust region's centre at every batch (three policies); else it is the policy that sampled."""
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    temperature: float = 1.0
    eval_every: int = 40
    eval_prompts: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        counts = "steps prompts responses sync_interval epochs minibatches replay_capacity eval_every eval_prompts"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise InputError(f"{name}: found {getattr(self, name)}; expected at least 1")
        for name in ("micro_prompts", "overlong_margin"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}: found {value}; expected at least 1, or none")
        for name in ("learning_rate", "temperature", "grad_clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: found {getattr(self, name)}; expected more than 0")
        if self.minibatches > self.prompts:
            raise InputError(f"minibatches: found {self.minibatches} of {self.prompts} prompts; expected at least a prompt in each")
        for name in ("sync_offset", "redraws"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: found {getattr(self, name)}; expected at least 0")
        if not 0 <= self.replay_share < 1:
            raise InputError(f"replay_share: found {self.replay_share}; expected at least 0, and below 1")


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Ranks:
    """Processes that take every step together, each with prompts of its own. The defaults: there is one."""

    rank: int = 0
    count: int = 1
    summed: Callable[[Tensor], Tensor] = _same
    """Σ over ranks."""
    rows: Callable[[Tensor], Tensor] = _same
    """Rows of all ranks after one another; how many may differ."""
    shard: Callable[[nn.Module], object] = _same
    """Spread what learns over ranks, in place. Its gradients become sums over ranks."""
    whole: Callable[[Tensor], Tensor] = _same
    """A tensor of what was spread."""


class Trainer:
    """A run that can be stopped after any step and gone on with to the bit: all that it knows is in `state`.

    `start`: any causal model, of which copies are made; with its `end` and `pad` tokens where it is not the small one. `ranks`: all
    with the same start and, but for their prompts, the same schedule. Raises InputError for a critic beside another model.
    """

    def __init__(
        self,
        method: TokenMethod,
        task: Task,
        schedule: Schedule,
        start: CausalModel,
        *,
        end: int = END,
        pad: int = PAD,
        ranks: Ranks = Ranks(),
    ) -> None:
        self.method, self.task, self.schedule, self.ranks = method, task, schedule, ranks
        self.end, self.pad = end, pad
        self.policy, self.behavior = copy.deepcopy(start), copy.deepcopy(start)
        self.reference = copy.deepcopy(start) if isinstance(method, WithReference) and method.needs_reference else None
        self.critic = _critic(start, schedule.seed) if isinstance(method, WithCritic) else None
        learned = [one for one in (self.policy, self.critic) if isinstance(one, nn.Module)]
        for module in learned:
            ranks.shard(module)
        weights = [weight for module in learned for weight in module.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
        self.rng = Generator().manual_seed(schedule.seed + 1_000_003 * ranks.rank)
        self.replay = Replay(schedule.replay_capacity, [])
        self.ahead = list[Rollouts]()
        self.step, self.sampled_by = 0, 0
        self.cpu_seconds, self.rollouts = 0.0, 0

    def advance(self) -> dict[str, float]:
        """One batch of rollouts and its optimiser steps; what is to be known of them."""
        started = time.process_time()
        if self.step % self.schedule.sync_interval == 0:
            self.behavior.load_state_dict(self.weights())
            self.sampled_by = self.step
        while len(self.ahead) <= self.schedule.sync_offset:
            self.ahead.append(self.collect())
        found = self._mixed(self.ahead.pop(0))
        batch = self.credited(found)
        told = [self.update(found.rows(part), batch.rows(part)) for part in self._minibatches(len(found))]
        self.step += 1
        self.cpu_seconds += time.process_time() - started
        means = {name: sum(one[name] for one in told) / len(told) for name in told[0]}
        return {"step": self.step, "rollouts": self.rollouts, "cpu_seconds": round(self.cpu_seconds, 3), **means}

    def collect(self) -> Rollouts:
        """Fresh rollouts of the policy that samples, which is whole on every rank: none waits for another's tokens."""
        schedule, ranks = self.schedule, self.ranks
        fresh = schedule.prompts - int(schedule.replay_share * schedule.prompts)
        numbers = torch.arange(fresh).repeat_interleave(schedule.responses)
        found = self._rolled_out(fresh)
        for _ in range(schedule.redraws):
            spread, place = reward_range(found.reward, found.group)
            varied = (spread > 0)[place]
            if varied.all():
                break
            others = self._rolled_out(fresh - int((spread > 0).sum()))
            found = replace(joined([found.rows(varied), others]), group=numbers)
        group = ((self.step + len(self.ahead)) * schedule.prompts + numbers) * ranks.count + ranks.rank
        return replace(found, group=group, policy=torch.full((len(found),), self.sampled_by))

    def _rolled_out(self, prompts: int) -> Rollouts:
        """Responses to some prompts, whose length costs where the schedule says so."""
        schedule, task = self.schedule, self.task
        found = roll_out(self.behavior, task, prompts, schedule.responses, self.rng, schedule.temperature, self.end, self.pad)
        self.rollouts += int(self.ranks.summed(torch.tensor(len(found))))
        if schedule.overlong_margin is None:
            return found
        return replace(
            found, reward=found.reward + overlong_penalty(found.mask.sum(dim=1), task.max_tokens, schedule.overlong_margin)
        )

    def _mixed(self, fresh: Rollouts) -> Rollouts:
        """Fresh rollouts, and some of earlier ones in the place of those that were not collected."""
        schedule = self.schedule
        if not schedule.replay_share:
            return fresh
        old = self.replay.draw(schedule.prompts - len(fresh) // schedule.responses, self.rng)
        self.replay.add(fresh, schedule.responses)
        return joined([fresh, *old])

    def _minibatches(self, rows: int) -> Iterator[Tensor | slice]:
        """Rows of every optimiser step: whole prompts, all of them once in an epoch. A single step keeps their order."""
        schedule = self.schedule
        if schedule.epochs == schedule.minibatches == 1:
            yield slice(None)
            return
        for _ in range(schedule.epochs):
            order = torch.randperm(rows // schedule.responses, generator=self.rng)
            for prompts in order.tensor_split(schedule.minibatches):
                yield (prompts[:, None] * schedule.responses + torch.arange(schedule.responses)).flatten()

    @torch.no_grad()
    def credited(self, found: Rollouts) -> TokenBatch:
        """This rank's rollouts with all that is known before their first update: the centre of the trust region, the reference,
        the critic's values, and the credit that the method gives among those of all ranks.
        """
        batch, temperature, ranks = found.batch(), self.schedule.temperature, self.ranks
        if self.schedule.proximal:
            batch = replace(batch, logp_proximal=token_logps(self.policy, found, temperature)[0])
        if self.reference is not None:
            batch = replace(batch, logp_ref=token_logps(self.reference, found, temperature)[0])
        if self.critic is not None:
            batch = replace(batch, value=self._values(found))
        return credited(self.method, self._everyone(batch)).rows(ranks.rows(torch.full((len(found),), ranks.rank)) == ranks.rank)

    def update(self, found: Rollouts, batch: TokenBatch) -> dict[str, float]:
        """One optimiser step on credited rollouts. Sums of the whole step come first: micro-batches and ranks change nothing."""
        method, temperature, ranks = self.method, self.schedule.temperature, self.ranks
        parts, everyone = self._parts(found, batch), self._everyone(batch)
        stats: Mapping[str, Any] = {}
        if isinstance(method, WithStatistics):
            with torch.no_grad():
                own = statistics(method, [(one, token_logps(self.policy, some, temperature)[0]) for some, one in parts])
                stats = {name: ranks.summed(value) for name, value in own.items()}
        dens = self._summed([denominators(method, one, stats) for _, one in parts])
        self.optimizer.zero_grad(set_to_none=True)
        logps, entropies, metrics = list[Tensor](), list[Tensor](), list[Loss]()
        for some, one in parts:
            logp, entropy = token_logps(self.policy, some, temperature)
            loss = method.loss(one, counted(logp, one.mask), stats)
            (-total(loss, dens)).backward()
            logps, entropies, metrics = [*logps, logp.detach()], [*entropies, entropy], [*metrics, loss]
        if isinstance(method, WithCritic):
            self._teach(method, parts)
        norm = self._clipped()
        self.optimizer.step()
        logp, entropy = (ranks.rows(torch.cat(some)[: len(found)]) for some in (logps, entropies))
        told = step_metrics(logp, entropy, everyone.logp_behavior, everyone.mask, everyone.reward, everyone.group)
        staleness = float((self.step - ranks.rows(found.policy)).float().mean())
        return told | self._ratios(metrics) | {"grad_norm": norm, "staleness": staleness}

    def _everyone(self, batch: TokenBatch) -> TokenBatch:
        """The rows of all ranks: what credit takes over a batch, it takes over the whole step."""
        values = {one.name: getattr(batch, one.name) for one in fields(batch)}
        return TokenBatch(**{name: None if value is None else self.ranks.rows(value) for name, value in values.items()})

    def _parts(self, found: Rollouts, batch: TokenBatch) -> list[tuple[Rollouts, TokenBatch]]:
        """Micro-batches, as many on every rank: one that is done goes on with a row that counts nothing, since others wait."""
        size = len(found) if self.schedule.micro_prompts is None else self.schedule.micro_prompts * self.schedule.responses
        slices = [slice(start, start + size) for start in range(0, len(found), size)]
        most = int(self.ranks.rows(torch.tensor([len(slices)])).max())
        first = batch.rows(slice(0, 1))
        idle = found.rows(slice(0, 1)), replace(first, mask=torch.zeros_like(first.mask))
        return [(found.rows(some), batch.rows(some)) for some in slices] + [idle] * (most - len(slices))

    def _summed(self, some: list[Any]) -> tuple[Any, ...]:
        """Of the parts of all ranks."""
        return tuple(self.ranks.summed(one) for one in _added(some))

    def _clipped(self) -> float:
        """The norm of the gradients of all that learns, which are cut to the schedule's."""
        weights = [one for group in self.optimizer.param_groups for one in group["params"]]
        norm = self.ranks.whole(nn.utils.get_total_norm([one.grad for one in weights if one.grad is not None]))
        nn.utils.clip_grads_with_norm_(weights, self.schedule.grad_clip, norm)
        return float(norm)

    def _ratios(self, losses: list[Loss]) -> dict[str, float]:
        """A method's own metrics, over all parts of the step."""
        return {
            name: float(divide(Terms(*_added([loss.metrics[name] for loss in losses])), self.ranks.summed))
            for name in losses[0].metrics
        }

    def _values(self, found: Rollouts) -> Tensor:
        """(B, T) the critic's values of the states before each token."""
        assert self.critic is not None, "methods with a critic have one"
        values: Tensor = self.critic(found.tokens[:, :-1].to(device_of(self.critic)))[:, found.prompt_tokens - 1 :]
        return values.cpu()

    def _teach(self, method: WithCritic, parts: list[tuple[Rollouts, TokenBatch]]) -> None:
        """Gradients of the critic."""
        with torch.no_grad():
            assert all(one.value is not None for _, one in parts), "values came with the credit"
            dens = self._summed([[term.den for term in method.critic(one, one.value).terms] for _, one in parts])
        for some, one in parts:
            (-total(method.critic(one, counted(self._values(some), one.mask)), dens)).backward()

    def evaluate(self) -> float:
        """pass@1: the share of fixed prompts that one sampled response answers."""
        schedule, policy = self.schedule, copy.deepcopy(self.behavior)
        policy.load_state_dict(self.weights())
        return evaluate(policy, self.task, schedule.eval_prompts, schedule.temperature, end=self.end, pad=self.pad)

    def weights(self) -> dict[str, Tensor]:
        """Those of the current policy, whole on every rank."""
        return {name: self.ranks.whole(value) for name, value in self.policy.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        modules = {name: getattr(self, name) for name in ("policy", "behavior", "reference", "critic")}
        return {
            **{name: None if module is None else module.state_dict() for name, module in modules.items()},
            "optimizer": self.optimizer.state_dict(), "rng": self.rng.get_state(),
            "replay": [vars(one) for one in self.replay.held], "ahead": [vars(one) for one in self.ahead],
            "step": self.step, "sampled_by": self.sampled_by,
            "cpu_seconds": self.cpu_seconds, "rollouts": self.rollouts,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name in ("policy", "behavior", "reference", "critic"):
            module = getattr(self, name)
            if module is not None:
                module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.set_state(state["rng"])
        self.replay.held, self.ahead = ([Rollouts(**one) for one in state[name]] for name in ("replay", "ahead"))
        self.step, self.sampled_by = state["step"], state["sampled_by"]
        self.cpu_seconds, self.rollouts = state["cpu_seconds"], state["rollouts"]


def roll_out(
    policy: CausalModel,
    task: Task,
    prompts: int,
    responses: int,
    rng: Generator,
    temperature: float = 1.0,
    end: int = END,
    pad: int = PAD,
) -> Rollouts:
    """Responses of a policy to fresh prompts, so many to each, with their rewards. Prompts are numbered from 0; the policy is 0."""
    asked = task.prompts(prompts, rng)
    written, logp, mask = CachedSampler(policy, end, pad).sample(asked, task.max_tokens, temperature, rng, responses)
    asked = asked.repeat_interleave(responses, dim=0)
    group = torch.arange(prompts).repeat_interleave(responses)
    reward = task.reward(asked, written, mask)
    return Rollouts(torch.cat((asked, written), dim=1), mask, logp, reward, group, torch.zeros_like(group))


def evaluate(policy: CausalModel, task: Task, prompts: int, temperature: float = 1.0, *, end: int = END, pad: int = PAD) -> float:
    """Share of `prompts` fixed prompts that one sampled response answers: always the same prompts and draws."""
    return float(roll_out(policy, task, prompts, 1, Generator().manual_seed(20_000), temperature, end, pad).reward.mean())


def imitate(
    task: Imitable,
    *,
    seed: int = 0,
    steps: int = 2000,
    batch: int = 128,
    learning_rate: float = 1e-3,
    until: float = 1.0,
    every: int = 20,
) -> tuple[LM, int]:
    """A model trained from nothing on examples, until it answers a share of prompts; and after how many steps it did."""
    torch.manual_seed(seed)
    model, rng = LM(), Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(1, steps + 1):
        tokens, mask = task.examples(batch, rng)
        chances = torch.log_softmax(model(tokens[:, :-1]), dim=-1)
        logp = chances.gather(2, tokens[:, 1:, None])[..., 0]
        optimizer.zero_grad(set_to_none=True)
        (-logp[mask[:, 1:]].mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if until < 1 and step % every == 0 and evaluate(model, task, 1024) >= until:
            return model, step
    return model, steps


def run(
    trainer: Trainer, folder: Path | None = None, progress: Callable[[dict[str, float]], object] = lambda metrics: None
) -> Rows:
    """A trainer's steps to the end of its schedule, from where its folder says it was; a line per step in `metrics.jsonl`.

    pass@1 is measured before the first step, every `eval_every` steps and at the end, where the policy's weights are kept as well
    (`kept`). A run that was killed goes on at its last evaluation, to the bit. Raises InputError for the folder of another run, and
    for a folder and several ranks: a checkpoint is of one process.
    """
    if folder is not None and trainer.ranks.count > 1:
        raise InputError(
            f"found a folder and {trainer.ranks.count} ranks; expected no folder: each would write its own part of the weights"
        )
    with alone(folder):
        return _run(trainer, folder, progress)


def _run(trainer: Trainer, folder: Path | None, progress: Callable[[dict[str, float]], object]) -> Rows:
    schedule = trainer.schedule
    about = identity(trainer.method, schedule, task=type(trainer.task).__name__)
    state, rows = read_checkpoint(folder, about, schedule.steps)
    if state is not None:
        trainer.restore(state)
    if not rows:
        rows.append({"step": 0, "rollouts": 0, "cpu_seconds": 0.0, "pass_at_1": trainer.evaluate()})
        append_metrics(folder, rows[0])
        _keep(folder, trainer, rows, about)
    while trainer.step < schedule.steps:
        metrics = trainer.advance()
        last = trainer.step == schedule.steps
        if last or trainer.step % schedule.eval_every == 0:
            metrics["pass_at_1"] = trainer.evaluate()
        rows.append(metrics)
        append_metrics(folder, metrics)
        progress(metrics)
        if "pass_at_1" in metrics:
            _keep(folder, trainer, rows, about)
    return rows


def kept(folder: Path) -> dict[int, Path]:
    """Weights of the policies that a run kept, by step. Raises InputError where there are none."""
    found = {int(path.stem.split("-")[1]): path for path in sorted(folder.glob("policy-*.pt"))}
    if not found:
        raise InputError(f"{folder}: found no kept policies; expected those of a run: propel rl train METHOD --out {folder}")
    return found


def _keep(folder: Path | None, trainer: Trainer, rows: Rows, about: Mapping[str, Any]) -> None:
    """The policy, then a checkpoint, so that one that says a step was done has its policy."""
    if folder is not None:
        save(folder / f"policy-{trainer.step:06d}.pt", trainer.weights())
        write_checkpoint(folder, trainer.state(), rows, about, trainer.schedule.steps)


def _added(some: list[Any]) -> tuple[Any, ...]:
    return tuple(sum(one[1:], one[0]) for one in zip(*some, strict=True))


def _critic(start: CausalModel, seed: int) -> Critic:
    """From a seed of its own: the same on every rank, and again."""
    if not isinstance(start, LM):
        raise InputError(f"found a method with a critic and a {type(start).__name__}; expected the small model, LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Critic(start.shape).to(device_of(start))
