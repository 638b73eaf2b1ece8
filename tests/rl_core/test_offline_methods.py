"""BC, TD3, TD3+BC, IQL, AWAC, CQL: what a step learns, and what a run keeps."""

from __future__ import annotations

import copy
import io
import math
import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ope.data import InputError
from rl_core.config import from_table, to_table
from rl_core.families.offline import Learner, OfflineMethod, Stage, Transitions, joined
from rl_core.loss import Loss, total
from rl_core.methods.awac import AWAC
from rl_core.methods.bc import BC
from rl_core.methods.cql import CQL
from rl_core.methods.iql import IQL
from rl_core.methods.td3 import TD3, Twin
from rl_core.models.mlp import Gaussian
from rl_core.paper import Paper
from rl_core.trainers.offline import OfflineTrainer
from tests.rl_core.offline_methods import ACTORS, EACH, SCHEDULE, SIZES, Seeded, as_double, flat, learner, made, slopes, trainer

torch.set_num_threads(1)

# What a stage learns


class Only:
    """One stage of a method, at every step."""

    paper: ClassVar[Paper] = Paper("none", "A part", "offline_common", {}, {})

    def __init__(self, method: OfflineMethod, stage: Stage) -> None:
        self.method, self.tau, self.networks, self.lagged = method, 0.5, method.networks, method.lagged
        self.stage = replace(stage, every=1)

    def stages(self) -> tuple[Stage, ...]:
        return (self.stage,)


@EACH
def test_a_stage_moves_what_it_learns_and_nothing_else(method: OfflineMethod) -> None:
    for stage in method.stages():
        run = trainer(Only(method, stage))
        before = copy.deepcopy(run.nets)
        run.advance()
        moved = {name for name in run.nets if not torch.equal(flat(run.nets[name].parameters()), flat(before[name].parameters()))}
        behind = {name: flat(run.lagged[name].parameters()) for name in run.lagged}
        followed = {name for name in behind if not torch.equal(behind[name], flat(before[name].parameters()))}
        assert moved == set(stage.learns)
        assert followed == moved & set(stage.follows)


@pytest.mark.parametrize(
    ("method", "place", "owners"),
    [(IQL(), 1, ("value", "critic")), (CQL(temperature_start=0.5), 1, ("actor", "temperature"))],
    ids=["IQL", "CQL"],
)
def test_losses_that_share_a_stage_do_not_mix(method: OfflineMethod, place: int, owners: tuple[str, str]) -> None:
    parts = learner(method)
    loss = method.stages()[place].loss(parts, made(32), Seeded())
    for term, owner in zip(loss.terms, owners, strict=True):
        for name in owners:
            reached = any(one.any() for one in slopes(Loss((term,), (1.0,), {}), parts.nets[name]))
            assert reached == (name == owner)


@EACH
def test_lagged_copies_and_denominators_have_no_gradient(method: OfflineMethod) -> None:
    parts = learner(method)
    assert not any(weight.requires_grad for net in parts.lagged.values() for weight in net.parameters())
    for stage in method.stages():
        loss = stage.loss(parts, made(32), Seeded())
        assert not any(term.den.requires_grad for term in loss.terms)
        assert not any(ratio.num.requires_grad or ratio.den.requires_grad for ratio in loss.metrics.values())


# Differences instead of derivatives


class Apart:
    """A policy whose draws are of one network, and whose densities and means of another: draws that weights depend on stay put."""

    def __init__(self, draws: Any, scores: Any) -> None:
        self.draws, self.scores = draws, scores

    def draw(self, obs: Tensor, noise: Tensor) -> Any:
        return self.draws.draw(obs, noise)

    def logp(self, obs: Tensor, action: Tensor) -> Any:
        return self.scores.logp(obs, action)

    def __call__(self, obs: Tensor) -> Any:
        return self.scores(obs)


@pytest.mark.parametrize(("method", "place"), ACTORS.values(), ids=ACTORS)
def test_the_actors_gradient_is_the_difference_quotient(method: OfflineMethod, place: int) -> None:
    parts, data = learner(method, dtype=torch.float64), as_double(made(64))
    actor, stage = parts.nets["actor"], method.stages()[place]

    def loss(parts: Learner) -> Loss:
        """The actor's term alone, without that of CQL's temperature."""
        found = stage.loss(parts, data, Seeded(dtype=torch.float64))
        return Loss(found.terms[:1], found.weights[:1], {})

    slope = flat(slopes(loss(parts), actor))
    start = nn.utils.parameters_to_vector(actor.parameters()).detach()
    direction = torch.randn(len(start), generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def value(step: float) -> float:
        moved = copy.deepcopy(actor)
        nn.utils.vector_to_parameters(start + step * direction, moved.parameters())
        policy = moved if isinstance(method, CQL) else Apart(actor, moved)  # CQL's draws carry its gradient
        nets = {**parts.nets, "actor": policy}
        return float(total(loss(Learner(nets, parts.lagged))).detach())

    width = 1e-6
    assert (slope @ direction).item() == pytest.approx((value(width) - value(-width)) / (2 * width), rel=1e-6)


# IQL's order


def test_iql_takes_its_steps_in_corls_order() -> None:
    """V(s') first, then V, Q, copies, and the actor with u from before; separate optimisers, the actor's rate on a cosine."""
    method, data = IQL(actor_rate=1e-2, value_rate=1e-2, critic_rate=1e-2, tau=0.1), made(64)
    run = OfflineTrainer(method, data, replace(SCHEDULE, steps=10, normalize=False))
    nets, behind = copy.deepcopy(run.nets), copy.deepcopy(run.lagged["critic"])
    optimizers = {name: torch.optim.Adam(net.parameters(), 1e-2) for name, net in nets.items()}

    def step(name: str, loss: Tensor) -> None:
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()

    for number in range(1, 6):
        run.learn(data)
        with torch.no_grad():
            next_value = nets["value"](data.next_obs)
            lowest = behind(data.obs, data.action).amin(dim=0)
        gap = lowest - nets["value"](data.obs)
        step("value", ((0.7 - (gap < 0).float()).abs() * gap**2).mean())
        target = data.reward + 0.99 * (1 - data.terminated) * next_value
        step("critic", ((nets["critic"](data.obs, data.action) - target) ** 2).mean(dim=1).sum())
        with torch.no_grad():
            for lagging, leading in zip(behind.parameters(), nets["critic"].parameters(), strict=True):
                lagging.mul_(0.9).add_(0.1 * leading)
        weight = (3 * gap.detach()).exp().clamp(max=100)
        optimizers["actor"].param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * (number - 1) / 10))
        step("actor", -(weight * nets["actor"].logp(data.obs, data.action)).mean())
    for name in nets:
        torch.testing.assert_close(flat(run.nets[name].parameters()), flat(nets[name].parameters()), rtol=0, atol=1e-5)
    torch.testing.assert_close(flat(run.lagged["critic"].parameters()), flat(behind.parameters()), rtol=0, atol=1e-5)


def test_only_iqls_actor_slows_down() -> None:
    run = trainer(IQL())
    run.advance(SCHEDULE.steps // 2)
    rates = [[group["lr"] for group in stage.optimizer.param_groups] for stage in run.stages]
    half = 3e-4 * 0.5 * (1 + math.cos(math.pi * (SCHEDULE.steps // 2 - 1) / SCHEDULE.steps))  # the rate of the last step taken
    assert rates == [[pytest.approx(half)], [3e-4, 3e-4]]
    run.advance(SCHEDULE.steps // 2)
    last = 3e-4 * 0.5 * (1 + math.cos(math.pi * (SCHEDULE.steps - 1) / SCHEDULE.steps))
    assert run.stages[0].optimizer.param_groups[0]["lr"] == pytest.approx(last)
    constant = trainer(IQL(cosine=False))
    constant.advance(SCHEDULE.steps)
    assert constant.stages[0].optimizer.param_groups[0]["lr"] == 3e-4


# 10 % BC


def episodes(*rewards: list[float]) -> Transitions:
    """One episode per list; the first that terminates, the others are cut, the last one stays open."""
    found = []
    for place, some in enumerate(rewards):
        last = torch.eye(len(some))[-1]
        terminated = last * (place == 0)
        truncated = last * (0 < place < len(rewards) - 1)
        count = len(some)
        found.append(
            Transitions(
                torch.zeros(count, 3), torch.zeros(count, 2), torch.tensor(some), torch.zeros(count, 3), terminated, truncated
            )
        )
    return joined(found)


def test_the_best_episodes_are_found_by_what_they_earned_discounted() -> None:
    data = episodes([1.0, 1.0, 1.0], [0.0, 0.0, 3.5], [3.0], [1.0, 1.0])  # 1.75, .875, 3 and 1.5 at discount ½
    assert BC(top=0.25, episode_discount=0.5).select(data).tolist() == [6]
    assert BC(top=0.5, episode_discount=0.5).select(data).tolist() == [0, 1, 2, 6]
    assert BC(top=0.75, episode_discount=0.5).select(data).tolist() == [0, 1, 2, 6, 7, 8]  # the open one counts, too
    assert BC(top=0.25, episode_discount=1.0).select(data).tolist() == [3, 4, 5]
    assert BC(top=0.01, episode_discount=0.5).select(data).tolist() == [6]  # never none
    assert BC().select(data).tolist() == list(range(9))


def test_a_share_of_29_in_100_is_29() -> None:
    data = episodes(*[[float(one)] for one in range(100)])
    assert BC(top=0.29).select(data).tolist() == list(range(71, 100))


def test_a_return_is_not_rounded_to_the_next_one() -> None:
    """The best of 10 episodes by 1e-8 of what they earned, which float32 cannot tell from 1,000."""
    rewards = [[1.0] * 1000 for _ in range(10)]
    rewards[7][0] += 1e-5
    assert BC(top=0.1, episode_discount=1.0).select(episodes(*rewards)).tolist() == list(range(7000, 8000))


def test_what_is_not_selected_is_not_seen() -> None:
    data = episodes([1.0, 1.0, 1.0], [0.0, 0.0, 3.5], [3.0], [1.0, 1.0])
    run = OfflineTrainer(BC(top=0.5, episode_discount=0.5), data, SCHEDULE)
    assert run.buffer.all().reward.tolist() == [1, 1, 1, 3]


# Learning


def test_cloning_finds_the_policy_that_made_the_data() -> None:
    data = made(1000)
    wanted = torch.tanh(data.obs @ torch.tensor([[0.5, -1.0], [1.0, 0.3], [0.0, 0.8]]))
    data = replace(data, action=wanted)
    for method in (BC(rate=3e-3), BC(stochastic=True, rate=3e-3), AWAC(actor_rate=3e-3, temperature=100.0)):
        run = OfflineTrainer(method, data, replace(SCHEDULE, width=32, batch=64))
        run.advance(500)
        error = np.abs(run.act(data.obs.numpy()) - wanted.numpy()).mean()
        assert error < 0.06, (method, error)  # actions differ by .5 from their mean


@pytest.mark.parametrize(
    "method",
    [
        IQL(actor_rate=3e-3, value_rate=3e-3, critic_rate=3e-3, cosine=False),
        AWAC(actor_rate=3e-3, critic_rate=3e-3),
        AWAC(actor_rate=3e-3, critic_rate=3e-3, weights="softmax"),
        CQL(alpha=0.2, samples=4, actor_rate=3e-3, critic_rate=3e-3, temperature_rate=3e-3),
    ],
    ids=["IQL", "AWAC", "AWAC softmax", "CQL"],
)
def test_methods_do_better_than_the_data_where_cloning_cannot(method: OfflineMethod) -> None:
    """One step, actions uniform, reward -3|a - .5|²: cloning acts by the mean, 0, and loses 1.5."""
    rng = torch.Generator().manual_seed(0)
    action = torch.rand(2000, 2, generator=rng) * 2 - 1
    data = replace(made(2000), action=action, reward=-3 * ((action - 0.5) ** 2).sum(dim=1), terminated=torch.ones(2000))
    run = OfflineTrainer(method, data, replace(SCHEDULE, batch=64))
    run.advance(500)
    found = run.act(data.obs.numpy())
    lost = 3 * ((found - 0.5) ** 2).sum(axis=1).mean()
    assert lost < 0.75, lost


# Runs, tables, papers


@EACH
def test_a_run_goes_on_to_the_bit(method: OfflineMethod) -> None:
    whole, first, second = trainer(method), trainer(method), trainer(method, seed=0)
    whole.advance(9)
    first.advance(4)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second.restore(torch.load(file))
    second.advance(5)
    assert torch.equal(flat(second.nets.parameters()), flat(whole.nets.parameters()))
    assert torch.equal(flat([torch.zeros(1), *second.lagged.parameters()]), flat([torch.zeros(1), *whole.lagged.parameters()]))
    told, known = second.metrics(), whole.metrics()
    assert {name: value for name, value in told.items() if name != "cpu_seconds"} == {
        name: value for name, value in known.items() if name != "cpu_seconds"
    }
    assert all(math.isfinite(value) for value in told.values())


def toml(table: Mapping[str, Any]) -> str:
    return "\n".join(
        f"{name} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for name, value in table.items()
        if not isinstance(value, dict)
    )


@pytest.mark.parametrize(
    "method",
    [
        BC(),
        BC(stochastic=True, top=0.1),
        IQL(),
        IQL(temperature=math.inf, cosine=False),
        AWAC(),
        AWAC(weights="softmax"),
        CQL(),
        CQL(samples=3),
    ],
)
def test_methods_survive_toml(method: Any) -> None:
    table = tomllib.loads(toml(to_table(method)))
    assert from_table(type(method), table) == method


@pytest.mark.parametrize("kind", [BC, IQL, AWAC, CQL])
def test_every_default_has_an_origin(kind: Any) -> None:
    assert set(kind.paper.defaults) == {one.name for one in fields(kind)}
    assert kind.paper.spec == "offline_common"


@pytest.mark.parametrize(
    ("kind", "table", "told"),
    [
        (BC, {"top": 0.0}, "top: found 0.0"),
        (BC, {"top": 10}, "top: found 10.0; expected a share"),
        (IQL, {"expectile": 1.0}, "expectile: found 1.0"),
        (IQL, {"temperature": 0}, "temperature: found 0.0"),
        (AWAC, {"temperature": -1}, "temperature: found -1.0"),
        (AWAC, {"weights": "sum"}, r"AWAC.weights: found 'sum'; expected 'capped' or 'softmax'"),
        (CQL, {"samples": 0}, "samples: found 0"),
    ],
)
def test_what_makes_no_sense_is_refused(kind: Any, table: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        from_table(kind, table)


def test_the_defaults_are_those_of_the_page() -> None:
    iql, awac, cql = IQL(), AWAC(), CQL()
    assert (iql.expectile, 1 / iql.temperature, iql.cap, iql.tau, iql.discount) == (0.7, 3.0, 100.0, 0.005, 0.99)
    assert (awac.temperature, awac.cap, awac.tau, awac.actor_rate, awac.critic_rate) == (1 / 3, 100.0, 0.005, 3e-4, 3e-4)
    assert (cql.alpha, cql.samples, cql.softness, cql.actor_rate, cql.critic_rate) == (10.0, 10, 1.0, 3e-5, 3e-4)
    assert TD3().twin == Twin(discount=0.99, tau=0.005, noise=0.2, noise_clip=0.5, actor_every=2)
    assert isinstance(iql.networks(SIZES)["actor"], Gaussian)
