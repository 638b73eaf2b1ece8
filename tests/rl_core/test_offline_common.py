"""The offline baselines: their equations by hand, what each stage learns from, and runs that can be stopped anywhere.

Numbers are those of the page offline_common. Its invariant 8 is about valuing a fixed policy, which is not of this family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ope.data import InputError
from ope.primitives.divergences import expectile
from rl_core.families.offline import Draw, Learner, OfflineMethod, Stage, Transitions, backup, mean_of
from rl_core.loss import Loss, total
from rl_core.methods.awac import AWAC
from rl_core.methods.bc import BC
from rl_core.methods.cql import CQL, conservative_gap
from rl_core.methods.iql import IQL
from rl_core.methods.td3 import actor as td3_actor
from rl_core.methods.td3_bc import TD3BC, held
from rl_core.models.mlp import Ensemble, Sizes, Temperature
from rl_core.paper import Paper
from rl_core.scores import REFERENCES, d4rl_score
from rl_core.trainers.offline import OfflineTrainer
from tests.rl_core.offline_methods import (
    EACH,
    SCHEDULE,
    SIZES,
    WITH_CRITIC,
    Recorded,
    Replayed,
    Seeded,
    flat,
    learner,
    made,
    slopes,
    trainer,
)

torch.set_num_threads(1)

# 1: D4RL's score


@pytest.mark.parametrize(
    ("env", "found", "score"), [("hopper", 1500, 46.7119), ("halfcheetah", 5000, 42.53), ("walker2d", 3000, 65.3144)]
)
def test_scores_by_hand(env: str, found: float, score: float) -> None:
    assert d4rl_score(env, found) == pytest.approx(score, abs=5e-5)


@pytest.mark.parametrize("env", REFERENCES)
def test_the_references_score_0_and_100(env: str) -> None:
    low, high = REFERENCES[env]
    assert (d4rl_score(env, low), d4rl_score(env, high)) == (0.0, 100.0)


def test_an_unknown_environment_has_no_score() -> None:
    with pytest.raises(InputError, match=r"found 'humanoid'; expected one of halfcheetah, .*antmaze"):
        d4rl_score("humanoid", 1.0)


# 2: expectiles


def minimiser(data: list[float], level: float) -> float:
    """Where the mean expectile loss is least, by halving on the sign of its slope."""
    x, low, high = torch.tensor(data, dtype=torch.float64), min(data), max(data)
    for _ in range(60):
        m = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(expectile(x - m, level).mean(), m)
        low, high = (m.item(), high) if slope < 0 else (low, m.item())
    return (low + high) / 2


def test_expectiles_by_hand() -> None:
    assert minimiser([0, 1], 0.7) == pytest.approx(0.7, abs=1e-12)
    assert minimiser([0, 0, 0, 1], 0.9) == pytest.approx(0.75, abs=1e-12)  # .9·(1 - m) = .1·3m
    assert minimiser([3, -1, 4, 1, 5], 0.5) == pytest.approx(2.4, abs=1e-12)
    assert minimiser([3, -1, 4, 1, 5], 1 - 1e-9) == pytest.approx(5, abs=1e-7)


def test_the_expectile_leans_to_gaps_above() -> None:
    np.testing.assert_allclose(expectile(np.array([-2.0, 0.0, 2.0]), 0.7), [0.3 * 4, 0.0, 0.7 * 4], rtol=1e-15)
    assert expectile(torch.zeros(1, dtype=torch.bfloat16), 0.7).dtype == torch.float32


def test_iqls_value_is_pulled_to_the_expectile_of_the_lagged_critics() -> None:
    method, data = IQL(expectile=0.7), made(2)
    parts = learner(method)
    q = torch.tensor([[0.0, 1.0], [5.0, 2.0]])  # the lower ones are 0 and 1, whose expectile is .7
    level = nn.Parameter(torch.tensor(0.7))
    nets = {**parts.nets, "value": lambda obs: level.expand(len(obs))}
    loss = method.values(Learner(nets, {"critic": lambda obs, action: q}), data, Seeded())
    (slope,) = torch.autograd.grad(total(loss._replace(terms=loss.terms[:1], weights=(1.0,))), level)
    assert slope.abs().item() < 1e-7
    assert total(loss._replace(terms=loss.terms[:1], weights=(1.0,))).item() == pytest.approx(-(0.3 * 0.49 + 0.7 * 0.09) / 2)


# 3: TD3+BC


class Scaled:
    """A critic c times as large."""

    def __init__(self, critic: Any, by: float) -> None:
        self.critic, self.by = critic, by

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.by * self.critic.first(obs, action)


def test_td3_bc_does_not_see_the_scale_of_values() -> None:
    parts, data = learner(TD3BC()), made(64)
    action = parts.nets["actor"](data.obs)
    plain = total(held(parts, data.obs, action, data.action, 2.5)).item()
    for by in (1e-3, 7.0, 1e4):
        scaled = Learner({**parts.nets, "critic": Scaled(parts.nets["critic"], by)}, parts.lagged)
        assert total(held(scaled, data.obs, action, data.action, 2.5)).item() == pytest.approx(plain, abs=1e-6)


def test_td3_bc_lies_between_cloning_and_td3() -> None:
    parts, data = learner(TD3BC()), made(64)
    net = parts.nets["actor"]
    cloning = slopes(BC().actor(parts, data, Seeded()), net)
    torch.testing.assert_close(slopes(TD3BC(alpha=0.0).actor(parts, data, Seeded()), net), cloning)
    loss = TD3BC().actor(parts, data, Seeded())
    alone = flat(slopes(loss._replace(weights=(loss.weights[0], 0.0)), net))
    value = flat(slopes(td3_actor(parts, data, Seeded()), net))
    assert functional.cosine_similarity(alone, value, dim=0).item() == pytest.approx(1, abs=1e-6)


# 4: IQL's weights


def test_iql_at_beta_0_is_stochastic_cloning() -> None:
    parts, data = learner(IQL()), made(64)
    found = slopes(IQL(temperature=math.inf).actor(parts, data, Seeded()), parts.nets["actor"])
    torch.testing.assert_close(found, slopes(BC(stochastic=True).actor(parts, data, Seeded()), parts.nets["actor"]), rtol=0, atol=0)


@pytest.mark.parametrize("method", [IQL(), AWAC()])
def test_a_weight_is_capped_at_100(method: Any) -> None:
    """A = 2 at β = 3 is e⁶ = 403.4; A = 1 is e³ = 20.1."""
    nets = learner(method).nets
    behind = {"critic": lambda obs, action: torch.tensor([[2.0, 1.0]] * 2)}
    data = made(2)

    def critic(obs: Tensor, action: Tensor) -> Tensor:
        return torch.tensor([[2.0, 1.0]] * 2) * float(torch.equal(action, data.action))

    stubs = {**nets, "value": lambda obs: torch.zeros(len(obs)), "critic": critic}
    loss = method.actor(Learner(stubs, behind), data, Seeded())
    wanted = (torch.tensor([100.0, math.exp(3)]) * nets["actor"].logp(data.obs, data.action)).mean()
    assert total(loss).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert loss.metrics["capped"].num.item() == 1


# 5: AWAC's two kinds of weights


def test_shares_of_the_batch_add_to_its_size_and_cancel_constants() -> None:
    gap = torch.linspace(-3, 5, 64, dtype=torch.float64)
    soft, capped = AWAC(weights="softmax", temperature=1.0), AWAC(temperature=1.0)
    weight = soft.weigh(gap)
    assert weight.sum().item() == pytest.approx(64, rel=1e-12)
    torch.testing.assert_close(weight, 64 * torch.softmax(gap, dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(soft.weigh(gap + 1000), weight, rtol=1e-10, atol=0)
    torch.testing.assert_close(capped.weigh(gap + 1), (math.e * gap.exp()).clamp(max=100), rtol=1e-12, atol=0)


def test_awac_uses_one_draw_clamped_to_what_can_be_done() -> None:
    method, data = AWAC(), made(64)
    parts, seen = learner(method), list[Tensor]()
    with torch.no_grad():
        parts.nets["actor"].log_std.fill_(1.0)

    def critic(obs: Tensor, action: Tensor) -> Tensor:
        seen.append(action)
        return action.sum(dim=-1).expand(2, -1)

    spied = Learner({**parts.nets, "critic": critic}, {"critic": critic})
    draw = Recorded(Seeded())
    method.actor(spied, data, draw)
    done, instead = seen
    assert [one.shape for one in draw.kept] == [(64, 2)]
    torch.testing.assert_close(done, data.action, rtol=0, atol=0)
    torch.testing.assert_close(instead, (parts.nets["actor"](data.obs) + math.e * draw.kept[0]).clamp(-1, 1).detach())
    assert (instead.abs() == 1).any()  # the spread of e makes most draws too large


def test_awacs_critic_asks_for_a_draw_at_what_follows() -> None:
    method, data, draw = AWAC(discount=0.9), made(32), Seeded()
    parts = learner(method)
    found = total(method.critic(parts, data, Seeded())).item()
    with torch.no_grad():
        following = (parts.nets["actor"](data.next_obs) + draw.normal(32, 2)).clamp(-1, 1)  # a spread of exp(0)
        target = data.reward + 0.9 * (1 - data.terminated) * parts.lagged["critic"](data.next_obs, following).amin(dim=0)
        loss = sum(((one - target) ** 2).mean() for one in parts.nets["critic"](data.obs, data.action))
    assert found == pytest.approx(-float(loss), rel=1e-5)


# 6, 7: CQL's gap


def test_the_optimum_of_cql_by_hand() -> None:
    """Every action is a candidate with log μ = 0, and the logged ones weigh as often as they are taken."""
    alpha, reward, share = 2.0, torch.tensor([1.0, 0.2], dtype=torch.float64), torch.tensor([0.7, 0.3], dtype=torch.float64)

    def optimum(reward: Tensor, share: Tensor) -> Tensor:
        q = reward.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [q], max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            candidates = q[None, :, None].expand(1, 2, 2)  # the same two for either logged action
            gap = conservative_gap(candidates, torch.zeros(2, 2, dtype=torch.float64), q[None], 1.0)[0]
            loss = (share * ((q - reward) ** 2 + alpha * gap)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return q.detach()

    found = optimum(reward, share)
    np.testing.assert_allclose(found, [1.007111, 0.183407], atol=5e-7)
    torch.testing.assert_close(found, reward - alpha / 2 * (torch.softmax(found, 0) / share - 1), rtol=0, atol=1e-8)
    flat_reward, alike = torch.full((2,), 0.4, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(optimum(flat_reward, alike), flat_reward, rtol=0, atol=1e-9)


@pytest.mark.parametrize("softness", [1.0, 0.5])
def test_a_constant_critic_has_a_constant_gap_without_a_slope(softness: float) -> None:
    n = 10
    level = torch.tensor(3.7, dtype=torch.float64, requires_grad=True)
    density = torch.full((n, 4), math.log(0.5), dtype=torch.float64)
    gap = conservative_gap(level.expand(2, n, 4), density, level.expand(2, 4), softness)
    wanted = softness * math.log(n) + math.log(2)
    torch.testing.assert_close(gap, torch.full((2, 4), wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(gap.sum(), level)
    assert abs(slope.item()) < 1e-12


def test_candidates_come_from_where_their_densities_say() -> None:
    method, data = CQL(samples=4), made(16)
    parts = learner(method)
    actor = parts.nets["actor"]
    with torch.no_grad():
        action, density = method.candidates(parts, data, Seeded())
    assert action.shape == (12, 16, 2)
    assert action.abs().max() <= 1
    np.testing.assert_allclose(density[:4], 2 * math.log(0.5))  # uniform over a square of area 4
    for place in range(4):
        torch.testing.assert_close(density[4 + place], actor.logp(data.next_obs, action[4 + place]).detach(), rtol=0, atol=2e-3)
        torch.testing.assert_close(density[8 + place], actor.logp(data.obs, action[8 + place]).detach(), rtol=0, atol=2e-3)


def test_cqls_critic_loss_is_the_pages() -> None:
    method, data = CQL(samples=4, alpha=3.0, discount=0.9), made(16)
    parts = learner(method)
    found = total(method.critic(parts, data, Seeded())).item()
    draw, actor, critic = Seeded(), parts.nets["actor"], parts.nets["critic"]
    with torch.no_grad():
        following, _ = actor.draw(data.next_obs, draw.normal(16, 2))
        target = data.reward + 0.9 * (1 - data.terminated) * parts.lagged["critic"](data.next_obs, following).amin(dim=0)
        action, density = method.candidates(parts, data, draw)
        q = critic(data.obs, data.action)
        loss = torch.tensor(0.0)
        for j in range(2):
            at = torch.stack([critic(data.obs, one)[j] for one in action]) - density  # all of them at s, those of π(·|s'), too
            loss = loss + ((q[j] - target) ** 2).mean() + 3.0 * (at.exp().sum(dim=0).log() - q[j]).mean()
    assert found == pytest.approx(-loss.item(), rel=1e-5)


def test_temperature_rises_where_there_is_too_little_entropy() -> None:
    method, data = CQL(), made(32)
    parts = learner(method)
    assert parts.nets["temperature"]().item() == 1
    assert Temperature(0.2)().item() == pytest.approx(0.2)
    body = parts.nets["actor"].body
    for log_std, sign in ((-5.0, 1.0), (0.0, -1.0)):  # entropies of about 2·(-3.6), and of 2·.6 or so, where -2 is aimed at
        with torch.no_grad():
            body.weights[-1].zero_()
            body.biases[-1].copy_(torch.tensor([0.0, 0.0, log_std, log_std]))
        loss = method.actor(parts, data, Seeded())
        (slope,) = slopes(loss, parts.nets["temperature"])
        entropy = (loss.metrics["entropy"].num / loss.metrics["entropy"].den).item()
        assert slope.item() == pytest.approx(-2 - entropy, rel=1e-5)
        assert slope.item() * sign > 0


# 9: two flags


@pytest.mark.parametrize(
    ("terminated", "truncated", "wanted"), [(1.0, 0.0, 2.0), (0.0, 1.0, 2 + 0.9 * 10), (0.0, 0.0, 2 + 0.9 * 10)]
)
def test_only_a_terminal_state_is_worth_nothing(terminated: float, truncated: float, wanted: float) -> None:
    ends = torch.tensor([terminated]), torch.tensor([truncated])
    row = Transitions(torch.zeros(1, 3), torch.zeros(1, 2), torch.tensor([2.0]), torch.zeros(1, 3), *ends)
    assert backup(row, torch.tensor([10.0]), 0.9).item() == pytest.approx(wanted)


@WITH_CRITIC
def test_critics_look_behind_a_cut_and_not_behind_an_end(method: OfflineMethod) -> None:
    if isinstance(method, CQL):
        method = replace(method, alpha=0.0)  # its candidates are of π(·|s'), whatever the flags say
    parts = learner(method)
    stage = next(one for one in method.stages() if "critic" in one.learns)
    data = made(32)
    never, always = torch.zeros(32), torch.ones(32)

    def loss(terminated: Tensor, truncated: Tensor, following: Tensor) -> float:
        batch = replace(data, terminated=terminated, truncated=truncated, next_obs=following)
        return float(total(stage.loss(parts, batch, Seeded())).detach())

    here, elsewhere = data.next_obs, data.next_obs + 3
    assert loss(always, never, here) == loss(always, never, elsewhere)
    assert loss(never, always, here) != pytest.approx(loss(never, always, elsewhere), rel=1e-3)
    assert loss(never, always, here) == loss(never, never, here)


# 10: lagged copies


class Constant(nn.Module):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.ones(1))

    def forward(self, obs: Tensor) -> Tensor:
        return self.level.expand(len(obs), 2)


class Follows:
    """A method that learns nothing, and whose copy follows."""

    paper: ClassVar[Paper] = Paper("none", "A copy", "offline_common", {}, {})

    def __init__(self, tau: float) -> None:
        self.tau = tau

    def networks(self, sizes: Sizes) -> Mapping[str, nn.Module]:
        return {"actor": Constant()}

    def lagged(self) -> tuple[str, ...]:
        return ("actor",)

    def stages(self) -> tuple[Stage, ...]:
        def loss(learner: Learner, batch: Transitions, draw: Draw) -> Loss:
            return Loss((mean_of(learner.nets["actor"](batch.obs)[:, 0]),), (1.0,), {})

        return (Stage({"actor": 0.0}, loss, follows=("actor",)),)


@pytest.mark.parametrize("tau", [0.0, 0.005, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 25])
def test_copies_come_nearer_by_tau(tau: float, steps: int) -> None:
    run = trainer(Follows(tau))
    with torch.no_grad():
        run.lagged["actor"].level.zero_()
    run.advance(steps)
    assert run.nets["actor"].level.item() == 1
    found = run.lagged["actor"].level.item()
    assert found == pytest.approx(1 - (1 - tau) ** steps, rel=1e-5)


# 11: what was drawn before gives the same run


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@EACH
def test_numbers_drawn_before_give_the_run_of_the_generator(method: OfflineMethod, device: str) -> None:
    plain = OfflineTrainer(method, made(), SCHEDULE)
    draw = plain.draw = Recorded(plain.draw)
    batches = []
    for _ in range(100):
        batches.append(plain.buffer.draw(SCHEDULE.batch, plain.rng))
        plain.learn(plain.buffer.take(batches[-1]))
    untouched = OfflineTrainer(method, made(), SCHEDULE)
    untouched.advance(100)
    kept = [one.to(device) for one in draw.kept]
    again = OfflineTrainer(method, made(), SCHEDULE, device=device, draw=Replayed(kept))
    for index in batches:
        again.learn(again.buffer.take(index.to(device)))
    assert torch.equal(flat(untouched.nets.parameters()), flat(plain.nets.parameters()))
    tolerance = 0 if device == "cpu" else 1e-4
    torch.testing.assert_close(flat(again.nets.parameters()).cpu(), flat(plain.nets.parameters()), rtol=0, atol=tolerance)
    torch.testing.assert_close(flat(again.nets.parameters()).cpu(), flat(untouched.nets.parameters()), rtol=0, atol=tolerance)


# 12: an ensemble is its members


@pytest.mark.parametrize("members", [1, 2, 5])
def test_an_ensemble_is_as_many_separate_networks(members: int) -> None:
    torch.manual_seed(3)
    stacked = Ensemble(members, 5, 2, SIZES)
    separate = [nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)) for _ in range(members)]
    linear = [[one[place] for place in (0, 2, 4)] for one in separate]
    with torch.no_grad():
        for j, layers in enumerate(linear):
            for place, layer in enumerate(layers):
                layer.weight.copy_(stacked.weights[place][j].T)
                layer.bias.copy_(stacked.biases[place][j, 0])
    together = torch.optim.Adam(stacked.parameters(), 1e-2, fused=True)
    each = [torch.optim.Adam(one.parameters(), 1e-2) for one in separate]
    x, y = torch.randn(64, 5), torch.randn(members, 64, 2)
    for _ in range(3):  # of Adam, on the sum of the members' mean squared errors
        apart = stacked(x)
        torch.testing.assert_close(apart, torch.stack([one(x) for one in separate]), rtol=0, atol=1e-5)
        torch.testing.assert_close(stacked.first(x), separate[0](x), rtol=0, atol=1e-5)
        together.zero_grad()
        ((apart - y) ** 2).mean(dim=(1, 2)).sum().backward()
        for j, (one, optimizer) in enumerate(zip(separate, each, strict=True)):
            optimizer.zero_grad()
            ((one(x) - y[j]) ** 2).mean().backward()
            for place, layer in enumerate(linear[j]):
                torch.testing.assert_close(stacked.weights[place].grad[j].T, layer.weight.grad, rtol=0, atol=1e-5)
                torch.testing.assert_close(stacked.biases[place].grad[j, 0], layer.bias.grad, rtol=0, atol=1e-5)
            optimizer.step()
        together.step()
