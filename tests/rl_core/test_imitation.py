"""The imitation trainer: learners rest, rows are of whom they say, runs go on to the bit; and what its experiments measure."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ope.data import InputError
from rl_core.envs.pendulum import Pendulum
from rl_core.envs.probes import Probe
from rl_core.families.imitation import SEED_ID, ImitationMethod, JensenShannon, Plan, ReverseKL, Wasserstein
from rl_core.families.offline import Transitions
from rl_core.methods.ailboost import AILBoost
from rl_core.methods.bc import BC
from rl_core.methods.dac import DAC
from rl_core.methods.sac import SAC
from rl_core.mixture import appended, boosted
from rl_core.trainers.imitation import ImitationSchedule, ImitationTrainer
from rl_core.verify import boosting
from rl_core.verify.arms import Arm
from rl_core.verify.imitation import METHODS, ImitationArm, demonstrations, thinned
from tests.rl_core.test_online import round_trip, same, saved

torch.set_num_threads(1)
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
double = partial(torch.tensor, dtype=torch.float64)
EXPERT, POLICY = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]


# the trainer

PLAN = Plan(steps=20, judge_steps=3, samples=16, rolls=2, learners=3)
SMALL = ImitationSchedule(steps=1000, seed_steps=30, batch=8, width=8, layers=1, judge_width=8, judge_layers=1)


def trainer(method: ImitationMethod | None = None, **settings: Any) -> ImitationTrainer:
    chosen = AILBoost(plan=PLAN) if method is None else method
    return ImitationTrainer(chosen, Pendulum(steps=8), demonstrations(2, 10, 0), replace(SMALL, **settings))


def checksum(net: nn.Module) -> str:
    content = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        content.update(name.encode() + value.numpy().tobytes())
    return content.hexdigest()


def test_learners_rest_once_they_are_stored() -> None:
    """8: the official code stores references, so that every learner is the present policy."""
    made = trainer(AILBoost(plan=replace(PLAN, learners=60)))
    sums, obs = list[str](), np.random.default_rng(0).normal(size=(5, 3))
    acts = list[Any]()
    for count in range(1, 5):
        made.advance(20)
        assert [checksum(actor) for actor in made.actors[:-1]] == sums
        sums.append(checksum(made.actors[-1]))
        assert sums[-1] == checksum(made.learner.nets["actor"])  # a copy of now
        assert len(set(sums)) == count
        acts.append(made.act(obs))
    made.advance(7)
    assert checksum(made.learner.nets["actor"]) not in sums
    for number in range(4):
        policy = replace(made.mixture(5, np.random.default_rng(0)), which=torch.full((5,), number))
        np.testing.assert_array_equal(policy(obs), acts[number])
    assert not any(weight.requires_grad for actor in made.actors for weight in actor.parameters())
    close(made.weights, boosted(4, 0.05), atol=1e-12)
    other: Any = copy.deepcopy(made.actors[0])
    with torch.no_grad():
        other.body.weights[-1].zero_()
        other.body.biases[-1].copy_(torch.tensor([[[0.5, -20.0]]]))
    close(made.roll(other, 9).action, np.full((16, 1), math.tanh(0.5)))  # whoever is asked for acts, not the present policy
    early = trainer(AILBoost(plan=replace(PLAN, judge_every=1)))
    early.advance(19)
    assert not early.optimizer.state_dict()["state"]  # nobody to judge yet
    early.advance(5)
    assert {float(one["step"]) for one in early.optimizer.state_dict()["state"].values()} == {3.0 + 2.0}
    with pytest.raises(InputError, match="no learner"):
        trainer().mixture(3, np.random.default_rng(0))


def test_rows_are_of_their_learner_and_replay_holds_what_the_judge_looks_at() -> None:
    made = trainer()
    assert len(made.learner.buffer) == 30
    made.advance(50)  # two rounds and a half
    held, replayed = made.store.all(), made.learner.buffer.all()
    assert held.policy is not None
    assert replayed.policy is not None
    assert torch.bincount(held.policy.long()).tolist() == [30, 16, 16]
    assert torch.bincount(replayed.policy.long()).tolist() == [30, 16, 16, 10]
    torch.testing.assert_close(replayed.obs[:62], held.obs, rtol=0, atol=0)
    assert made.store.rows.data_ptr() != made.learner.buffer.rows.data_ptr()
    assert (held.obs[held.policy == 1][:2, 2].abs() <= 1).all()  # fresh episodes begin slowly
    assert made.metrics()["taken"] == 30 + 50 + 32
    made.advance(50)
    held = made.store.all()
    assert held.policy is not None
    assert made.ids == [1, 4, 5]  # of 2 to 5 the oldest have the least mass
    close(made.weights.sum(), 1.0, atol=1e-12)
    weights = boosted(4, 0.05)[[0, 2, 3]]
    weights = appended(weights / weights.sum(), 0.05)[[0, 2, 3]]
    close(made.weights, weights / weights.sum(), atol=1e-12)
    assert torch.bincount(held.policy.long()).tolist() == [30, 16, 0, 0, 16, 16]
    assert made.metrics()["learners"] == 3
    assert held.logp_behavior is not None
    assert torch.isfinite(held.logp_behavior).all()


def went_on(rows: Transitions, side: int, *, last: bool = False) -> None:
    """Rows of `side` episodes at once, cut after 8 steps and, where they are a learner's last, there: what the pendulum does
    follows, then a fresh one.
    """
    angle = [torch.atan2(one[:, 1], one[:, 0]) for one in (rows.obs, rows.next_obs)]
    moved = torch.remainder(angle[1] - angle[0] - 0.05 * rows.next_obs[:, 2] + math.pi, 2 * math.pi) - math.pi
    assert moved.abs().max() < 1e-4
    speed = (rows.obs[:, 2] + 0.05 * (15 * rows.obs[:, 1] + 6 * rows.action[:, 0])).clamp(-8, 8)
    torch.testing.assert_close(rows.next_obs[:, 2], speed, rtol=0, atol=1e-4)
    cut = rows.truncated.bool()
    count, final = torch.arange(len(rows)), len(rows) - side if last else len(rows)
    assert torch.equal(cut, (count // side % 8 == 7) | (count >= final))
    follows = (rows.next_obs[:-side] == rows.obs[side:]).all(dim=1)
    assert torch.equal(follows, ~cut[:-side])
    assert (rows.obs[side:][~follows, 2].abs() <= 1).all()
    assert not rows.terminated.any()


def test_rows_are_of_what_really_followed_and_cut_episodes_start_anew() -> None:
    made = trainer(DAC(plan=replace(DAC().plan, steps=20)))
    made.advance(50)
    went_on(made.store.all(), 1)
    boost = trainer(AILBoost(plan=replace(PLAN, samples=40)))
    boost.advance(23)
    held = boost.store.all()
    assert held.policy is not None
    went_on(held.rows(held.policy == 1), 2, last=True)
    # rolling leaves the round's episode where it was
    mine = boost.learner.buffer.all().rows(slice(70, 73))
    assert boost.env.age.tolist() == [(30 + 23) % 8]  # type: ignore[attr-defined]
    assert torch.equal(mine.next_obs[:-1], mine.obs[1:])


def test_drawn_for_the_judge_by_weight_and_for_the_learner_all_alike() -> None:
    made = trainer(AILBoost(plan=replace(PLAN, steps=3, learners=60), alpha=0.3))
    made.advance(12)
    n = 40_000
    drawn = made.store.take(made.store.draw(n, torch.Generator().manual_seed(0)))
    assert drawn.policy is not None
    for name, weight in zip(made.ids, made.weights.tolist(), strict=True):
        assert abs(float((drawn.policy == name).double().mean()) - weight) < 3 * math.sqrt(weight * (1 - weight) / n)
    assert not (drawn.policy == SEED_ID).any()
    made.advance(2)
    assert made.learner.buffer.mass is None
    weighted = trainer(AILBoost(plan=replace(PLAN, replay="weighted"), alpha=0.3))
    weighted.advance(2)
    mass = weighted.learner.buffer.mass
    assert mass is not None
    close(mass[29:], [0.0, 0.5, 1.0])  # of 30 seed rows none, of two fresh ones half each
    weighted.advance(22)
    mass = weighted.learner.buffer.mass
    assert mass is not None
    close(torch.diff(mass[29:]), [0.7 / 16] * 16 + [0.3 / 4] * 4, atol=1e-9)


def test_rewards_are_the_present_judges_and_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    seen = list[tuple[Transitions, nn.Module]]()
    learn = made.learner.learn

    def watched(batch: Transitions) -> None:
        seen.append((batch, copy.deepcopy(made.judge)))
        learn(batch)

    monkeypatch.setattr(made.learner, "learn", watched)
    made.advance(45)
    assert len(seen) == 22 == made.learner.step  # every second step
    for batch, judge in seen:
        with torch.no_grad():
            torch.testing.assert_close(batch.reward, judge(batch.obs, batch.action), rtol=0, atol=0)
        assert not batch.reward.requires_grad
        assert batch.reward.any()
    assert checksum(seen[0][1]) == checksum(seen[9][1]) != checksum(seen[10][1])  # it learns between rounds alone
    for buffer in (made.learner.buffer, made.store):
        assert not buffer.all().reward.any()
    steps = {float(one["step"]) for one in made.optimizer.state_dict()["state"].values()}
    assert steps == {6.0}


def test_dac_is_the_same_loop_with_the_judge_at_every_step_against_replay() -> None:
    made = trainer(DAC(plan=replace(DAC().plan, steps=20)))
    assert made.store is made.learner.buffer
    made.advance(30)
    assert {float(one["step"]) for one in made.optimizer.state_dict()["state"].values()} == {15.0}
    held = made.store.all()
    assert held.policy is not None
    assert torch.bincount(held.policy.long()).tolist() == [30, 20, 10]  # nothing is rolled, nothing replaced
    assert made.metrics()["taken"] == 60
    assert (len(made.actors), made.weights.tolist()) == (1, [1.0])
    close(made.metrics()["ess"], 50)
    obs = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_array_equal(made.returned(5, np.random.default_rng(0))(obs), made.act(obs))
    boost = trainer()
    boost.advance(30)
    assert not np.array_equal(boost.returned(5, np.random.default_rng(0))(obs), boost.act(obs))


def test_the_judge_learns_to_tell_and_rounds_say_so() -> None:
    method = AILBoost(judge_rate=1e-2, plan=replace(PLAN, judge_steps=60))
    made = trainer(method, batch=32, judge_width=32)
    made.advance(20)
    told = made.metrics()
    assert {"expert_d", "policy_d", "saturated", "ess", "edge", "learners", "q", "entropy", "rounds"} <= set(told)
    assert told["expert_d"] > told["policy_d"] + 0.3
    assert told["edge"] == 0.0
    assert told["ess"] == 16
    with torch.no_grad():
        held = made.store.all()
        assert held.policy is not None
        close(told["expert_d"], made.judge(*made.expert).mean())
        close(told["policy_d"], made.judge(held.obs, held.action)[held.policy == 1].mean())
    judge = copy.deepcopy(made.judge)
    made.advance(20)
    with torch.no_grad():
        held = made.store.all()
        assert held.policy is not None
        found = judge(held.obs, held.action)
    close(made.told["edge"], found[held.policy == 2].mean() - found[held.policy == 1].mean(), atol=1e-5)
    mean = [float(made.judge(held.obs, held.action).detach()[held.policy == name].mean()) for name in (1, 2)]
    close(made.told["policy_d"], 0.95 * mean[0] + 0.05 * mean[1], atol=1e-5)
    close(made.told["ess"], 16 / (0.95**2 + 0.05**2), atol=1e-3)
    with torch.no_grad():
        made.judge.body.biases[-1].fill_(50.0)
    assert made._described()["saturated"] == pytest.approx(1.0)


def test_a_learner_that_is_skipped_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(AILBoost(negative="skip", plan=PLAN))
    edges = iter([0.0, -0.1, 0.2])
    monkeypatch.setattr(made, "_edge", lambda rows, who: next(edges))
    made.advance(60)
    assert made.ids == [1, 3]
    close(made.weights, [0.95, 0.05])
    held = made.store.all()
    assert held.policy is not None
    assert sorted(set(held.policy.tolist())) == [0.0, 1.0, 3.0]


CHOSEN = {
    "AILBoost": AILBoost(plan=PLAN),
    "weighted, at every step": AILBoost(plan=replace(PLAN, replay="weighted", judge_every=2), divergence=Wasserstein()),
    "DAC": DAC(plan=replace(DAC().plan, steps=20)),
}


@pytest.mark.parametrize("method", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("at", [9, 40, 71])
def test_runs_go_on_to_the_bit(method: ImitationMethod, at: int, tmp_path: Path) -> None:
    whole, half, later = (trainer(method) for _ in range(3))
    whole.advance(90)
    half.advance(at)
    kept = saved(half.state(), tmp_path)
    half.advance(5)  # what was kept is its own
    later.restore(kept)
    later.advance(90 - at)
    same(later.state(), whole.state())
    one, other = (made.mixture(7, np.random.default_rng(1))(np.ones((7, 3))) for made in (whole, later))
    np.testing.assert_array_equal(one, other)


def test_seeds_are_runs_of_their_own() -> None:
    one, again, other = trainer(), trainer(), trainer(seed=1)
    for made in (one, again, other):
        made.advance(25)
    same(one.state(), again.state())
    assert checksum(one.learner.nets["actor"]) != checksum(other.learner.nets["actor"])
    assert checksum(trainer().judge) != checksum(trainer(seed=1).judge)


def test_what_cannot_be_is_refused() -> None:
    data = demonstrations(1, 10, 0)
    with pytest.raises(InputError, match="BC, which has no explore"):
        ImitationTrainer(replace(AILBoost(), sac=BC()), Pendulum(), data, SMALL)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="environment of choices"):
        ImitationTrainer(AILBoost(), Probe("action", discrete=True), data, SMALL)
    with pytest.raises(InputError, match="expert: found 0 rows"):
        ImitationTrainer(AILBoost(), Pendulum(), data.rows(slice(0)), SMALL)
    with pytest.raises(InputError, match="expert: found 20 rows of sizes"):
        ImitationTrainer(AILBoost(), Pendulum(), replace(data, action=data.action.repeat(1, 2)), SMALL)
    ends = replace(data, obs=data.obs[:, :1], next_obs=data.next_obs[:, :1])
    with pytest.raises(InputError, match="absorbing"):
        ImitationTrainer(AILBoost(), Probe("action"), ends, SMALL)
    for name in ("steps", "rl_every", "judge_every", "samples", "rolls", "learners"):
        with pytest.raises(InputError, match=name):
            replace(Plan(), **{name: 0})
    with pytest.raises(InputError, match="judge_steps"):
        Plan(judge_steps=-1)
    with pytest.raises(InputError, match="samples: found 1000 for 3"):
        Plan(rolls=3)
    with pytest.raises(InputError, match="weighted"):
        Plan(against="replay", replay="weighted")
    for name in ("seed_steps", "batch", "judge_width", "capacity"):
        with pytest.raises(InputError, match=name):
            ImitationSchedule(**{name: 0})
    with pytest.raises(InputError, match="batch: found 1"):
        ImitationSchedule(batch=1)


@pytest.mark.parametrize(
    "method",
    [
        AILBoost(), AILBoost(alpha=0.2, negative="skip", divergence=Wasserstein(), bounded=False, sac=SAC(), plan=PLAN), DAC(),
        DAC(divergence=ReverseKL(), plan=replace(DAC().plan, steps=3)),
    ],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_settings_survive_toml_and_say_where_they_are_from(method: Any) -> None:
    round_trip(method)
    assert isinstance(method, ImitationMethod)
    assert not isinstance(BC(), ImitationMethod)


def test_defaults_are_those_of_the_code() -> None:
    method, dac, schedule = AILBoost(), DAC(), ImitationSchedule()
    assert (method.alpha, method.penalty, method.bounded, method.judge_rate) == (0.05, 10.0, True, 1e-4)
    assert method.divergence == ReverseKL()
    assert dac.divergence == JensenShannon()
    assert (method.returns, dac.returns) == ("mixture", "last")
    plan = method.plan
    assert (plan.steps, plan.rl_every, plan.judge_steps, plan.judge_every, plan.samples, plan.rolls) == (
        1000,
        2,
        100,
        None,
        1000,
        2,
    )
    assert (dac.plan.judge_steps, dac.plan.judge_every, dac.plan.against) == (0, 1, "replay")
    assert (schedule.seed_steps, schedule.batch, schedule.width, schedule.layers) == (5000, 1024, 1024, 2)
    assert (schedule.judge_width, schedule.judge_layers) == (64, 2)
    for one in (method.sac, dac.sac):
        assert one == SAC(actor_rate=1e-4, critic_rate=1e-4, temperature_rate=1e-4, temperature=1.0, discount=0.99, tau=0.005)


# experiments


def test_the_experiment_is_what_its_page_says() -> None:
    worlds = boosting.Worlds.of(10)
    close(worlds.expert.sum(axis=(1, 2)), np.ones(10))
    rng = np.random.default_rng(0)
    policy = rng.dirichlet(np.ones(boosting.CHOICES), (10, boosting.STATES))
    seen, reward = worlds.occupancy(policy), rng.normal(size=worlds.expert.shape)
    start = (worlds.start * (policy * worlds.values(policy, reward)).sum(axis=2)).sum(axis=1)
    close((seen * reward).sum(axis=(1, 2)), (1 - boosting.DISCOUNT) * start)
    best = worlds.values(worlds.best(reward), reward)
    assert (best >= worlds.values(policy, reward) - 1e-9).all()
    found = boosting.measured()
    assert all(margin.passed for margin in boosting.margins(found))
    assert set(found) == set(boosting.REQUIRED)
    calibrated = {"alike, KL of the mixture": 0.0390, "alike, KL of the last": 0.0113,
                  "best responses, KL of the mixture: boosted less alike": 0.0530 - 0.0058}  # fmt: skip
    for name, value in calibrated.items():
        close(found[name], value, atol=1e-4)
    late = {
        "boosted": (0.1602, 0.0163, 0.05), "alike": (0.2529, 0.0143, 0.05),
    }  # fmt: skip
    for weighting, (mixture, last, alpha) in late.items():
        ended = boosting.learned(worlds, weighting, rounds=60, alpha=alpha)  # type: ignore[arg-type]
        close([np.median(ended.mixture), np.median(ended.last)], [mixture, last], atol=1e-4)
    fresh = boosting.learned(worlds, "boosted", rounds=60, alpha=1.0)
    assert np.median(fresh.mixture) == np.median(fresh.last) <= 1e-4


def test_demonstrations_are_thinned_by_episode() -> None:
    n = 40
    obs = torch.arange(n, dtype=torch.float32)[:, None]
    cut = torch.zeros(n)
    cut[[19, 39]] = 1
    nothing = torch.zeros(n)
    rows = Transitions(obs, obs, nothing, obs, nothing, cut)
    found = [thinned(rows, 10, np.random.default_rng(seed)).obs[:, 0].tolist() for seed in range(30)]
    firsts = {one[0] for one in found}
    assert firsts <= set(range(10))
    assert len(firsts) > 5
    for one in found:
        assert len(one) == 4
        assert one[1] - one[0] == one[3] - one[2] == 10
        assert 20 <= one[2] < 30
    with pytest.raises(InputError, match="every"):
        thinned(rows, 21, np.random.default_rng(0))
    assert len(demonstrations(4, 10, 0)) == 80


def test_arms_are_kept_by_what_they_depend_on_and_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = replace(SMALL, steps=60)
    arm = ImitationArm(AILBoost(plan=PLAN), schedule, evaluations=3)
    checked: Arm = arm
    others = [replace(arm, trajectories=3), replace(arm, every=5), replace(arm, method=AILBoost(alpha=0.1, plan=PLAN)),
              replace(arm, schedule=replace(schedule, seed=1)), replace(arm, evaluations=2)]  # fmt: skip
    assert len({checked.key(), *(one.key() for one in others)}) == 6
    whole = arm.run(tmp_path / "whole")
    assert [row["step"] for row in whole] == [20, 40, 60]
    assert {"score", "last", "expert_d", "policy_d"} <= set(whole[-1])
    assert not list((tmp_path / "whole").iterdir())
    real, count = ImitationTrainer.advance, iter(range(10))

    def killed(self: ImitationTrainer, steps: int = 1) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt
        real(self, steps)

    monkeypatch.setattr(ImitationTrainer, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        arm.run(tmp_path / "killed")
    monkeypatch.setattr(ImitationTrainer, "advance", real)
    rows = arm.run(tmp_path / "killed")
    assert [{**row, "cpu_seconds": 0} for row in rows] == [{**row, "cpu_seconds": 0} for row in whole]
    assert list(METHODS) == ["AILBoost", "DAC", "BC"]
    monkeypatch.setattr("rl_core.verify.imitation.CLONING", 20)
    (cloned,) = ImitationArm(BC(), replace(schedule, batch=2)).run(tmp_path / "clone")
    assert cloned["score"] == cloned["last"]
