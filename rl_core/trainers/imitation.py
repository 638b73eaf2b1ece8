"""Imitation of an expert's rows: rounds of an inner learner whose reward is a judge's present opinion, a copy of its policy after
each, and steps of the judge against the mixture of all copies, or against replay.

Every row has the id of who acted, and weights are by id: nothing hangs on how long episodes are. Rewards are never stored. A run
goes on to the bit from where it was stopped.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ope.data import InputError
from ope.primitives.weights import effective_sample_size
from rl_core.buffers import Buffer
from rl_core.checks import at_least
from rl_core.families.imitation import SEED_ID, ImitationMethod
from rl_core.families.offline import Transitions, WithExploration, joined
from rl_core.families.online import WithChoices
from rl_core.loss import Loss, total
from rl_core.mixture import largest
from rl_core.models.discriminator import Discriminator, slope_penalty
from rl_core.models.mlp import Sizes
from rl_core.trainers.offline import Act, Environment, OfflineSchedule, OfflineTrainer
from rl_core.trainers.online import env_restored, env_state

SATURATED = 0.95
"""|D| above which a bounded judge is near its end."""


@dataclass(frozen=True)
class ImitationSchedule:
    """How a run goes, whatever its method. The defaults are those of AILBoost's code on states."""

    steps: int = 1_000_000
    """Of the environment, but for seed steps and for rows that learners are rolled for."""
    seed_steps: int = 5000
    """Uniform actions first. Replay has them, the mixture has not."""
    batch: int = 1024
    """Rows of the inner learner; the judge has half as many of each side."""
    width: int = 1024
    layers: int = 2
    judge_width: int = 64
    judge_layers: int = 2
    capacity: int = 1_000_000
    """Rows of replay, beside those of seed steps, where the judge looks at replay; else it has room for all that is kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "seed_steps", "width", "layers", "judge_width", "judge_layers", "capacity")
        at_least(self, 2, "batch")


@dataclass(frozen=True)
class MixturePolicy:
    """Learners of which each episode has one, from its first step to its last."""

    actors: Sequence[nn.Module]
    which: Tensor
    """(n,) number of the learner of each episode."""

    @torch.no_grad()
    def __call__(self, obs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Observations (n, S) of all episodes, in their order -> actions (n, A), without exploration."""
        if len(obs) != len(self.which):
            raise InputError(f"found observations of {len(obs)} episodes; expected those of all {len(self.which)}, in their order")
        seen = torch.as_tensor(obs, dtype=torch.float32)
        found: Tensor | None = None
        for number in sorted(set(self.which.tolist())):
            mine = self.which == number
            action = self.actors[number](seen[mine].to(next(self.actors[number].parameters()).device)).cpu()
            found = torch.zeros(len(seen), action.shape[1]) if found is None else found
            found[mine] = action
        assert found is not None, "there is an episode"
        return np.asarray(found.double().numpy())


def mixture_of(actors: Sequence[nn.Module], weights: Tensor, episodes: int, rng: np.random.Generator) -> MixturePolicy:
    """A learner for each of so many episodes, drawn by weight."""
    chances = weights.double().numpy()
    return MixturePolicy(actors, torch.as_tensor(rng.choice(len(actors), episodes, p=chances / chances.sum())))


def row_weights(who: Tensor, ids: Sequence[int], weights: Tensor) -> Tensor:
    """w_i / n_i for each row of learner i, of whom there are n_i rows; 0 for rows of others. (n,) -> (n,) float64."""
    found = who.long()
    counts = torch.bincount(found, minlength=max([SEED_ID, *ids]) + 1)
    share = torch.zeros(len(counts), dtype=torch.float64, device=found.device)
    place = torch.as_tensor(ids, dtype=torch.long, device=found.device)
    share[place] = weights.to(share) / counts[place].clamp(min=1)
    return share[found]


class ImitationTrainer:
    """A method of the family, an environment and an expert's rows, of which observations and actions alone are looked at.

    Raises InputError for an inner learner that cannot explore, an environment of choices, and an expert without rows.
    """

    def __init__(
        self,
        method: ImitationMethod,
        env: Environment,
        expert: Transitions,
        schedule: ImitationSchedule,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        if not isinstance(method.inner, WithExploration):
            raise InputError(f"found {type(method.inner).__name__}, which has no explore; expected one that draws actions: SAC")
        if isinstance(env, WithChoices) and env.discrete:
            raise InputError("found an environment of choices; expected one whose actions are numbers in [-1, 1]")
        if not len(expert) or expert.sizes != (env.obs_size, env.action_size):
            raise InputError(
                f"expert: found {len(expert)} rows of sizes {expert.sizes}; expected some of {(env.obs_size, env.action_size)}"
            )
        self.method, self.env, self.schedule, self.device = method, env, schedule, torch.device(device)
        self.rolling = copy.deepcopy(env)  # learners are rolled there: the round's episode goes on undisturbed
        self.expert = (expert.obs.float().to(self.device), expert.action.float().to(self.device))
        self.chance = np.random.default_rng(schedule.seed)
        self.obs = env.reset(1, self.chance)
        plan = method.plan
        room = schedule.capacity if plan.against == "replay" else (plan.learners + 1) * plan.samples + plan.steps
        room += schedule.seed_steps
        learning = OfflineSchedule(schedule.steps, schedule.batch, schedule.width, schedule.layers, False, seed=schedule.seed)
        start = self._uniform(schedule.seed_steps)
        self.learner = OfflineTrainer(method.inner, start, learning, capacity=room, device=device)
        self.rng = self.learner.rng
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(schedule.seed + 2)
            sizes = Sizes(env.obs_size, env.action_size, schedule.judge_width, schedule.judge_layers)
            self.judge = Discriminator(sizes, bounded=method.bounded).to(self.device)
        self.optimizer = torch.optim.Adam(self.judge.parameters(), lr=method.judge_rate, fused=True)
        self.actors, self.ids, self.weights = list[nn.Module](), list[int](), torch.zeros(0, dtype=torch.float64)
        self.mixed = _buffer_of(self.learner.buffer.all(), self.device)
        self.told: dict[str, float] = {}
        self.step, self.rounds, self.rolled, self.cpu_seconds = 0, 0, 0, 0.0

    @property
    def store(self) -> Buffer:
        """What the judge draws policies' rows from."""
        return self.learner.buffer if self.method.plan.against == "replay" else self.mixed

    def _uniform(self, steps: int) -> Transitions:
        """Seed steps."""
        parts, size = list[Transitions](), self.env.action_size
        for _ in range(steps):
            parts.append(self._taken(self.chance.uniform(-1, 1, (1, size)), torch.full((1,), -size * math.log(2)), SEED_ID))
        return joined(parts)

    def _taken(self, action: NDArray[np.float64], logp: Tensor, who: int) -> Transitions:
        """One step of the environment, with what really followed."""
        self.obs, found = _stepped(self.env, self.obs, action, logp, who, self.chance)
        return found

    def advance(self, steps: int = 1) -> None:
        """So many steps of the environment, with what is learned in between."""
        started, plan = time.process_time(), self.method.plan
        for _ in range(steps):
            action, logp = self._explored(self.obs, self.learner.nets["actor"])
            self.learner.buffer.add(self._taken(action, logp, self.rounds + 1))
            self.step += 1
            if self.step % plan.rl_every == 0:
                self.learner.learn(self._batch())
                if plan.judge_every is not None and self.learner.step % plan.judge_every == 0:
                    self.judged()
            if self.step % plan.steps == 0:
                self.close()
        self.cpu_seconds += time.process_time() - started

    @torch.no_grad()
    def _explored(self, obs: NDArray[np.float64], actor: nn.Module) -> tuple[NDArray[np.float64], Tensor]:
        """Actions (n, A) of a policy that explores, and their log densities (n,)."""
        inner, learner = self.method.inner, self.learner
        assert isinstance(inner, WithExploration), "looked at when it was made"
        acting = replace(learner.learner, nets={**learner.learner.nets, "actor": actor})
        action, logp = inner.explore(acting, torch.as_tensor(obs, dtype=torch.float32).to(self.device), learner.draw)
        return action.clamp(-1, 1).cpu().double().numpy(), logp.cpu()

    def _batch(self) -> Transitions:
        """Rows of replay, as the plan draws them, with the present judge's rewards."""
        buffer = self.learner.buffer
        if self.method.plan.replay == "weighted":
            weights = self.method.weigh(self.weights, math.inf)  # this round's rows count as those of the next learner
            buffer.weigh(row_weights(_who(buffer.all()), [*self.ids, self.rounds + 1], weights))
        batch = buffer.take(buffer.draw(self.schedule.batch, self.rng))
        with torch.no_grad():
            return replace(batch, reward=self.method.reward(self.judge(batch.obs, batch.action)))

    def judged(self) -> None:
        """A step of the judge, once there is anybody to judge."""
        if self.method.plan.against == "mixture" and not self.ids:
            return
        half = self.schedule.batch // 2
        which = torch.randint(len(self.expert[0]), (half,), generator=self.rng, device=self.device)
        rows = self.store.take(self.store.draw(half, self.rng))
        expert = (self.expert[0][which], self.expert[1][which])
        loss = judge_loss(self.method, self.judge, expert, (rows.obs, rows.action), self.learner.draw.uniform(half))
        gradients = torch.autograd.grad(-total(loss), list(self.judge.parameters()))
        for weight, gradient in zip(self.judge.parameters(), gradients, strict=True):
            weight.grad = gradient
        self.optimizer.step()

    def close(self) -> None:
        """The end of a round: a copy of the policy, rows of it, weights, steps of the judge, and what replay holds next."""
        plan, who = self.method.plan, self.rounds + 1
        frozen = copy.deepcopy(self.learner.nets["actor"]).requires_grad_(False)
        rows = self.roll(frozen, who) if plan.against == "mixture" else None
        edge = self._edge(rows, who)
        weights = self.method.weigh(self.weights, edge)
        kept = largest(weights, plan.learners)
        self.actors = [[*self.actors, frozen][place] for place in kept.tolist()]
        self.ids = [[*self.ids, who][place] for place in kept.tolist()]
        self.weights = weights[kept] / weights[kept].sum()
        if rows is not None:
            held = joined([replace(self.mixed.all(), row=None), rows])
            theirs = torch.isin(_who(held), torch.tensor([SEED_ID, *self.ids], device=self.device, dtype=held.reward.dtype))
            self.mixed = _buffer_of(held.rows(theirs), self.device)
            self.mixed.weigh(row_weights(_who(self.mixed.all()), self.ids, self.weights))
        for _ in range(plan.judge_steps):
            self.judged()
        if rows is not None:
            buffer = self.learner.buffer
            buffer.restore({"rows": self.mixed.rows[: len(self.mixed)], "next": len(self.mixed) % buffer.capacity, "weight": None})
        self.rounds = who
        self.told = self._described() | {"edge": edge}

    def roll(self, actor: nn.Module, who: int) -> Transitions:
        """Rows of fresh episodes of a policy that explores."""
        plan = self.method.plan
        obs, parts = self.rolling.reset(plan.rolls, self.chance), list[Transitions]()
        for _ in range(plan.samples // plan.rolls):
            action, logp = self._explored(obs, actor)
            obs, found = _stepped(self.rolling, obs, action, logp, who, self.chance)
            parts.append(found)
        parts[-1] = replace(parts[-1], truncated=torch.ones_like(parts[-1].truncated))  # no further row of these episodes
        self.rolled += plan.samples
        return _moved(joined(parts), self.device)

    @torch.no_grad()
    def _edge(self, rows: Transitions | None, who: int) -> float:
        """Mean D of the new learner's rows less that of what the judge looked at before; 0 where that was nothing."""
        held = self.store.all()
        found = self.judge(held.obs, held.action)
        if rows is None:
            mine = _who(held) == who
            return float(found[mine].mean() - found[~mine].mean()) if bool(mine.any()) and not bool(mine.all()) else 0.0
        if not self.ids:
            return 0.0
        weight = row_weights(_who(held), self.ids, self.weights)
        return float(self.judge(rows.obs, rows.action).mean() - (weight * found).sum())

    @torch.no_grad()
    def _described(self) -> dict[str, float]:
        """What the judge thinks of both sides, how near it is to its ends, and how many rows and learners count."""
        held = self.store.all()
        if self.method.plan.against == "mixture":
            weight = row_weights(_who(held), self.ids, self.weights)
        else:
            weight = torch.full((len(held),), 1 / len(held), dtype=torch.float64, device=self.device)
        ours, theirs = self.judge(*self.expert), self.judge(held.obs, held.action)
        ends = [(ours.abs() > SATURATED).double().mean(), (weight * (theirs.abs() > SATURATED)).sum()]
        return {
            "expert_d": float(ours.mean()), "policy_d": float((weight * theirs).sum()),
            "saturated": float(ends[0] + ends[1]) / 2, "ess": float(effective_sample_size(weight)),
            "learners": float(len(self.ids)), "learners_ess": float(effective_sample_size(self.weights)),
        }  # fmt: skip

    def mixture(self, episodes: int, rng: np.random.Generator) -> MixturePolicy:
        """A learner for each of so many episodes. Raises InputError before the first round has ended."""
        if not self.actors:
            raise InputError(
                f"found no learner after {self.step} steps; expected at least one round of {self.method.plan.steps} steps"
            )
        return mixture_of(self.actors, self.weights, episodes, rng)

    def returned(self, episodes: int, rng: np.random.Generator) -> Act:
        """What the method ends with, for so many episodes: its mixture, or its last policy."""
        return self.mixture(episodes, rng) if self.method.returns == "mixture" else self.act

    def act(self, obs: NDArray[Any]) -> NDArray[np.float64]:
        """What the last policy takes where nobody explores. (n, S) -> (n, A)."""
        return self.learner.act(obs)

    def metrics(self) -> dict[str, float]:
        """Those of learning since they were last asked for, of the last round, and how much was collected."""
        taken = {"taken": float(self.schedule.seed_steps + self.step + self.rolled), "rounds": float(self.rounds)}
        return self.learner.metrics() | self.told | taken | {"step": self.step, "cpu_seconds": round(self.cpu_seconds, 3)}

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, learners, rows and environment included; not the expert's rows."""
        return copy.deepcopy({
            "learner": self.learner.state(), "buffer": self.learner.buffer.state(), "mixed": self.mixed.state(),
            "judge": self.judge.state_dict(), "optimizer": self.optimizer.state_dict(),
            "actors": [actor.state_dict() for actor in self.actors], "ids": self.ids, "weights": self.weights,
            "chance": self.chance.bit_generator.state, "env": env_state(self.env), "obs": torch.as_tensor(self.obs),
            "told": self.told, "step": self.step, "rounds": self.rounds, "rolled": self.rolled, "cpu_seconds": self.cpu_seconds,
        })  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a trainer that was made alike."""
        state = copy.deepcopy(dict(state))
        self.learner.buffer.restore(state["buffer"])
        self.learner.restore(state["learner"])
        self.mixed = Buffer(len(state["mixed"]["rows"]), self.env.obs_size, self.env.action_size, self.device)
        self.mixed.restore(state["mixed"])
        self.judge.load_state_dict(state["judge"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.actors = [copy.deepcopy(self.learner.nets["actor"]).requires_grad_(False) for _ in state["actors"]]
        for actor, kept in zip(self.actors, state["actors"], strict=True):
            actor.load_state_dict(kept)
        self.ids, self.weights, self.told = list(state["ids"]), state["weights"], dict(state["told"])
        self.chance.bit_generator.state = state["chance"]
        self.env, self.obs = env_restored(self.env, state["env"], state["obs"], self.chance)
        self.step, self.rounds, self.rolled = state["step"], state["rounds"], state["rolled"]
        self.cpu_seconds = state["cpu_seconds"]


def judge_loss(
    method: ImitationMethod, judge: nn.Module, expert: tuple[Tensor, Tensor], policy: tuple[Tensor, Tensor], share: Tensor
) -> Loss:
    """What the judge maximises: the method's objective less its penalty. Both sides (B, S) and (B, A); share u (B,)."""
    found = method.objective(judge(*expert), judge(*policy))
    slope = slope_penalty(judge, expert, policy, share)
    return Loss((*found.terms, slope), (*found.weights, -method.penalty), found.metrics)


def _stepped(
    env: Environment, obs: NDArray[Any], action: NDArray[Any], logp: Tensor, who: int, rng: np.random.Generator
) -> tuple[NDArray[Any], Transitions]:
    """A step of every episode, and what they go on with: fresh ones where they were cut.

    Raises InputError where one ends: a judge's reward may be negative everywhere, and ending would pay.
    """
    following, _, terminated, truncated = env.step(action)
    if terminated.any():
        raise InputError("found an episode that ended; expected ones that are only cut: there are no absorbing states")
    arrays = (obs, action, np.zeros(len(obs)), following, terminated, truncated)
    columns = [torch.as_tensor(one, dtype=torch.float32) for one in arrays]
    found = Transitions(*columns, logp_behavior=logp, policy=torch.full_like(logp, float(who)))  # type: ignore[misc]
    return env.restart(truncated, rng) if truncated.any() else following, found


def _who(rows: Transitions) -> Tensor:
    """(n,) ids."""
    assert rows.policy is not None, "every row of a buffer has one"
    return rows.policy


def _moved(rows: Transitions, device: torch.device) -> Transitions:
    """On a device."""
    return replace(rows, **{name: value.to(device) for name, value in vars(rows).items() if value is not None})


def _buffer_of(rows: Transitions, device: torch.device) -> Buffer:
    """A buffer that holds just these, copied."""
    buffer = Buffer(len(rows), *rows.sizes, device)
    buffer.add(rows)
    return buffer
