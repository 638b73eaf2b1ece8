"""The online trainers: probes are solved, runs go on to the bit, rows say what really followed."""

from __future__ import annotations

import copy
import json
import math
import tomllib
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ope.data import InputError
from rl_core.config import from_table, to_table
from rl_core.envs.gym import GymEnv
from rl_core.envs.pendulum import Pendulum, dataset
from rl_core.envs.probes import KINDS, Endless, Kind, Probe
from rl_core.families.online import OnlineMethod, Plan
from rl_core.methods.bc import BC
from rl_core.methods.ppo_control import ControlPPO
from rl_core.methods.sac import SAC
from rl_core.methods.trpo import NPG, TRPO
from rl_core.models.mlp import Sizes
from rl_core.models.policies import NormalPolicy
from rl_core.trainers.control import fresh
from rl_core.trainers.offline import OfflineSchedule, returns
from rl_core.trainers.online import UNIFORM, OnlineSchedule, OnlineTrainer, ReplaySchedule, ReplayTrainer, Running
from tests.rl_core.online_methods import collected

Floats = NDArray[np.float64]
torch.set_num_threads(1)
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
double = partial(torch.tensor, dtype=torch.float64)
NO, LAST = [False, False, False], [False, False, True]
REWARD, VALUE, FOLLOWING = [1.0, 0.0, 2.0], [0.5, 0.4, 0.3], [0.4, 0.3, 0.2]
RATIO, Q, EXPECTED = [2.0, 0.5, 1.5], [0.6, 0.5, 0.2], [0.45, 0.35, 0.25]

# the loops


def probe_settings() -> Plan:
    return Plan(epochs=4, minibatch=128, rate=3e-3)


def solved(method: OnlineMethod, kind: Kind, discrete: bool, batches: int) -> None:
    """Values and actions are those that are known."""
    env = Probe(kind, discrete)
    trainer = OnlineTrainer(method, env, OnlineSchedule(steps=batches * 256, horizon=16, count=16, width=16, layers=1))
    for _ in range(batches):
        told = trainer.advance()
    obs, values = env.values(0.9)
    with torch.no_grad():
        found = trainer.value(torch.tensor(obs, dtype=torch.float32))
    acts = kind in ("action", "both")
    np.testing.assert_allclose(found, values, rtol=0, atol=0.15 if acts and not discrete else 0.05)
    assert told["log_ratio_at_start"] < 1e-4
    if acts:
        np.testing.assert_allclose(trainer.act(obs), env.best(obs), rtol=0, atol=0.0 if discrete else 0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("discrete", [False, True], ids=["numbers", "choices"])
def test_ppo_solves_the_probes(kind: Kind, discrete: bool) -> None:
    solved(ControlPPO(discount=0.9, plan=probe_settings()), kind, discrete, 60 if kind in ("action", "both") else 25)


@pytest.mark.parametrize("kind", ["action", "both"])
def test_trpo_and_npg_solve_the_probes(kind: Kind) -> None:
    plan = replace(TRPO().plan, rate=3e-3)
    for method in (TRPO(discount=0.9, plan=plan), replace(NPG, discount=0.9, plan=plan)):
        solved(method, kind, True, 20)


def replayed(method: Any, kind: Kind, steps: int) -> None:
    """Critics' values of what the policy does, and what it does, are those that are known."""
    env = Probe(kind)
    learning = OfflineSchedule(steps=steps, batch=32, width=32, layers=1, normalize=False)
    trainer = ReplayTrainer(method, env, ReplaySchedule(learning, warmup=256, capacity=2000))
    trainer.advance(steps)
    obs, values = env.values(0.9)
    action = trainer.act(obs)
    with torch.no_grad():
        found = trainer.learner.learner.nets["critic"].first(*(torch.tensor(one, dtype=torch.float32) for one in (obs, action)))
    np.testing.assert_allclose(found, values, rtol=0, atol=0.08)
    if kind in ("action", "both"):
        np.testing.assert_allclose(action, env.best(obs), rtol=0, atol=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_sac_solves_the_probes(kind: Kind) -> None:
    rates: dict[str, Any] = {"actor_rate": 3e-3, "critic_rate": 3e-3}
    replayed(SAC(discount=0.9, tau=0.05, temperature=1e-3, learns_temperature=False, **rates), kind, 500)


def same(one: Any, other: Any) -> None:
    """Two states are equal to the bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            if name != "cpu_seconds":
                same(one[name], other[name])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif isinstance(one, Tensor):
        assert torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other)
    elif hasattr(one, "__dict__"):
        same(vars(one), vars(other))
    else:
        assert one == other


def saved(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Written and read, as numbers alone."""
    torch.save(state, folder / "state.pt")
    found: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    return found


@pytest.mark.parametrize("method", [ControlPPO(plan=replace(Plan(), kl_stop=0.02)), TRPO()], ids=["PPO", "TRPO"])
def test_fresh_batches_go_on_to_the_bit(method: OnlineMethod, tmp_path: Path) -> None:
    def made() -> OnlineTrainer:
        return OnlineTrainer(method, Pendulum(steps=50), OnlineSchedule(steps=1000, horizon=33, count=3, width=8, normalize=True))

    whole, half = made(), made()
    for _ in range(4):
        whole.advance()
    for _ in range(2):
        half.advance()
    later = made()
    later.restore(saved(half.state(), tmp_path))
    for _ in range(2):
        later.advance()
    same(later.state(), whole.state())


def replay_trainer(method: Any = SAC(), **settings: Any) -> ReplayTrainer:  # noqa: B008
    learning = OfflineSchedule(steps=100, batch=8, width=8, layers=1, normalize=False)
    return ReplayTrainer(
        method, Pendulum(steps=20), ReplaySchedule(learning, **{"warmup": 30, "capacity": 60, "count": 2} | settings)
    )


def test_replay_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, half = replay_trainer(ratio=0.75), replay_trainer(ratio=0.75)
    whole.advance(25)
    half.advance(11)
    later = replay_trainer(ratio=0.75)
    later.restore(saved(half.state(), tmp_path))
    later.advance(14)
    same(later.state(), whole.state())
    assert later.learner.step == int(0.75 * 2 * 25)


def test_replay_keeps_what_really_followed_and_who_acted() -> None:
    trainer = replay_trainer(capacity=1000)
    trainer.advance(30)
    held = trainer.learner.buffer.all()
    assert len(held) == trainer.taken == 90
    assert not held.terminated.any()
    cut = held.truncated.bool()
    assert cut.sum() == 4  # two environments, episodes of 20 steps, 45 steps
    # of a step of the pendulum the angle moves by 0.05·speed: what a reset gave would be anywhere
    angle = [torch.atan2(one[:, 1], one[:, 0]) for one in (held.obs, held.next_obs)]
    moved = torch.remainder(angle[1] - angle[0] - 0.05 * held.next_obs[:, 2] + math.pi, 2 * math.pi) - math.pi
    assert moved.abs().max() < 1e-4
    assert held.policy is not None
    assert held.logp_behavior is not None
    assert (held.policy[:30] == UNIFORM).all()
    assert held.policy[30:].tolist() == [float(2 * (n // 2)) for n in range(60)]
    np.testing.assert_allclose(held.logp_behavior[:30], math.log(0.5), rtol=1e-6)
    assert torch.isfinite(held.logp_behavior).all()


def test_a_log_comes_first_where_there_is_one() -> None:
    data = dataset("pend-exp10", 0)
    learning = OfflineSchedule(steps=100, batch=8, width=8, layers=1, normalize=True)
    schedule = ReplaySchedule(learning, offline_steps=5, capacity=3000)
    trainer = ReplayTrainer(SAC(), Pendulum(), schedule, data=data)
    trainer.advance(5)
    assert (trainer.learner.step, trainer.taken, len(trainer.learner.buffer)) == (5, 0, len(data))
    trainer.advance(7)
    assert (trainer.learner.step, trainer.taken, len(trainer.learner.buffer)) == (12, 7, len(data) + 7)
    scaled = trainer.learner.scaling.apply(data.obs)
    torch.testing.assert_close(trainer.learner.buffer.all().obs[: len(data)], scaled)


def test_what_cannot_collect_is_refused() -> None:
    with pytest.raises(InputError, match="BC, which has no explore"):
        replay_trainer(BC())
    with pytest.raises(InputError, match="environment of choices"):
        ReplayTrainer(SAC(), Probe("action", discrete=True), ReplaySchedule(warmup=1))
    with pytest.raises(InputError, match="normalize = true and no data"):
        ReplayTrainer(SAC(), Pendulum(), ReplaySchedule(OfflineSchedule(), warmup=1))
    for settings, name in (({"minibatch": 0}, "minibatch"), ({"epochs": 0}, "epochs")):
        with pytest.raises(InputError, match=name):
            Plan(**settings)
    with pytest.raises(InputError, match="temperature"):
        SAC(temperature=0.0)


def test_densities_are_of_what_was_sampled_not_of_what_was_clipped() -> None:
    trainer = OnlineTrainer(ControlPPO(), Endless(), OnlineSchedule(horizon=64, count=8, width=8))
    found = trainer.collect()
    assert (found.action.abs() > 1).any()
    with torch.no_grad():
        torch.testing.assert_close(trainer.policy(found.obs).logp(found.action), found.logp_behavior)
    assert (found.policy == 0).all()


def test_an_episode_that_was_cut_is_valued_at_what_really_followed() -> None:
    trainer = OnlineTrainer(ControlPPO(), Pendulum(steps=10), OnlineSchedule(horizon=25, count=4, width=8))
    trainer.value.forward = lambda obs: obs[..., 2]  # type: ignore[method-assign]
    found = trainer.collect()
    assert found.truncated.sum() == 8
    torque = 2 * found.action[..., 0].clamp(-1, 1)
    speed = (found.obs[..., 2] + 0.05 * (15 * found.obs[..., 1] + 3 * torque)).clamp(-8, 8)
    torch.testing.assert_close(found.next_value, speed, rtol=0, atol=1e-4)
    going = ~found.truncated[:-1]
    torch.testing.assert_close(found.next_value[:-1][going], found.value[1:][going])
    assert (found.value[1:][~going].abs() <= 1).all()  # fresh episodes begin slowly


def test_a_distribution_stays_what_it_was_when_the_policy_moves() -> None:
    policy = NormalPolicy(Sizes(2, 1, 4, 1))
    with torch.no_grad():
        old = policy(torch.zeros(3, 2))
        policy.log_std += 1
    assert not old.log_std.any()


def test_scaling_is_of_all_that_was_seen_and_rests_in_evaluation() -> None:
    trainer, _ = collected(normalize=True)
    first = trainer.scaling
    seen = np.concatenate(
        [trainer.act(np.ones((2, 3))), returns(trainer.act, Pendulum(steps=5), 2, np.random.default_rng(0))[:, None]]
    )
    assert np.isfinite(seen).all()
    assert trainer.scaling is first
    parts = [torch.randn(n, 2, generator=torch.Generator().manual_seed(n)) + n for n in (3, 50, 7)]
    running = Running.empty(2)
    assert running.scaling().std.tolist() == [1, 1]
    for part in parts:
        running = running.merged(part)
    whole = torch.cat(parts).double()
    torch.testing.assert_close(running.mean, whole.mean(dim=0))
    torch.testing.assert_close(running.scaling().std, (whole.std(dim=0, correction=0) + 1e-3).float())


def test_a_bound_on_the_distance_stops_the_passes() -> None:
    free, bound = (ControlPPO(plan=Plan(minibatch=16, rate=3e-2, kl_stop=stop)) for stop in (None, 1e-3))
    found = {}
    for name, method in (("free", free), ("bound", bound)):
        trainer, _ = collected(method)
        found[name] = trainer.advance()
    assert found["bound"]["kl_stopped"] == 1
    assert found["bound"]["updates"] < found["free"]["updates"] == 80
    assert set(found["free"]) >= {
        "kl",
        "clip_fraction",
        "max_ratio",
        "ess",
        "explained_variance",
        "entropy",
        "grad_norm",
        "cpu_seconds",
    }


def test_lagged_copies_have_no_graph() -> None:
    trainer = replay_trainer()
    trainer.advance(3)
    for weight in trainer.learner.lagged.parameters():
        assert weight.is_leaf
        assert not weight.requires_grad


# environments of Gymnasium


def test_gymnasium_side_by_side() -> None:
    pytest.importorskip("gymnasium")
    rng = np.random.default_rng(0)
    env = GymEnv("CartPole-v1", 3)
    assert (env.obs_size, env.action_size, env.discrete) == (4, 2, True)
    obs = env.reset(3, rng)
    right = np.tile([0.0, 1.0], (3, 1))
    for _ in range(40):
        following, reward, terminated, truncated = env.step(right)
        if terminated.any():
            break
        assert (reward == 1).all()
        obs = following
    assert not truncated.any()
    assert (np.abs(following[terminated][:, 2]) > 0.2094).all()  # the pole that fell, not a fresh one
    assert np.abs(following - obs).max() < 1
    again, reward, still, _ = env.step(right)
    np.testing.assert_array_equal(again[terminated], following[terminated])
    assert not reward[terminated].any()
    assert still[terminated].all()
    fresh = env.restart(terminated, rng)
    assert (np.abs(fresh[terminated]) < 0.06).all()
    np.testing.assert_array_equal(fresh[~terminated], again[~terminated])


def test_gymnasium_actions_reach_the_ends_and_cuts_are_no_ends() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    ours, theirs = GymEnv("Pendulum-v1", 1, max_episode_steps=5), gymnasium.make("Pendulum-v1")
    rng = np.random.default_rng(3)
    obs = ours.reset(1, rng)
    native, _ = theirs.reset(seed=int(np.random.default_rng(3).integers(2**31)))
    np.testing.assert_allclose(obs[0], native)
    for step, action in enumerate((-1.0, 1.0, 0.25, 0.0, 3.0)):
        found = ours.step(np.array([[action]]))
        native, reward, *_ = theirs.step(np.array([2 * min(action, 1.0)], dtype=np.float32))
        np.testing.assert_allclose(found[0][0], native, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found[1][0], reward, rtol=0, atol=1e-6)
        assert (bool(found[2][0]), bool(found[3][0])) == (False, step == 4)
    _, reward, terminated, truncated = ours.step(np.array([[1.0]]))  # cut it stays: it has not ended since
    assert (reward[0], bool(terminated[0]), bool(truncated[0])) == (0.0, False, True)
    trainer = OnlineTrainer(ControlPPO(), ours, OnlineSchedule(horizon=8, count=2, width=8))
    state, state_of_policy = trainer.state(), copy.deepcopy(trainer.policy.state_dict())
    trainer.advance()
    later = OnlineTrainer(ControlPPO(), GymEnv("Pendulum-v1", 1, max_episode_steps=5), OnlineSchedule(horizon=8, count=2, width=8))
    state["earned"] = torch.tensor([-600.0, -1.0])
    later.restore(state)  # Gymnasium's environments cannot tell their state: fresh episodes begin, and have earned nothing
    assert later.earned.tolist() == [0.0, 0.0]
    torch.testing.assert_close(later.policy.state_dict(), state_of_policy, rtol=0, atol=0)
    assert later.obs.shape == (2, 3)
    assert later.advance()["step"] == 1


# settings


METHODS = [ControlPPO(), ControlPPO(dual_clip=3.0, value_clip=0.2, plan=Plan(kl_stop=0.01, minibatch=None)), TRPO(), NPG,
           SAC(), SAC(target_entropy=-2.0, form="linear")]  # fmt: skip


def round_trip(method: Any) -> None:
    text = _toml(to_table(method))
    assert from_table(type(method), tomllib.loads(text)) == method
    assert set(method.paper.defaults) == {one.name for one in fields(method)}
    assert all(
        (method.paper.source, method.paper.title, method.paper.spec, method.paper.equations, *method.paper.defaults.values())
    )


def _toml(table: dict[str, Any]) -> str:
    return "".join(f"{name} = {_inline(value)}\n" for name, value in table.items())


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_inline(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)


@pytest.mark.parametrize("method", METHODS, ids=lambda one: type(one).__name__)
def test_settings_survive_toml_and_say_where_they_are_from(method: Any) -> None:
    round_trip(method)


def test_broken_weights_are_found_though_choices_still_earn() -> None:
    """A policy of weights that are no numbers chooses the first choice, whose return is a number."""
    env = Probe("constant", discrete=True)
    run = fresh(ControlPPO(), env, OnlineSchedule(steps=8, horizon=8, width=8), told={})
    real = run.trainer.advance

    def broken() -> dict[str, float]:
        found: dict[str, float] = real()
        with torch.no_grad():
            next(run.trainer.nets.parameters()).fill_(math.nan)
        return found

    run.trainer.advance = broken
    with pytest.raises(InputError, match=r"step 8: found a return of 1\.0, or weights, that are no numbers"):
        run.run(lambda policies: {"return": float(returns(policies(4), env, 4, np.random.default_rng(0)).mean())})
