"""PRDC and the data as a model of their support: the numbered invariants of its page, and what the page warns of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from ope.data import InputError
from rl_core.envs.pendulum import Pendulum, dataset, uniform
from rl_core.families.offline import Learner, Transitions
from rl_core.loss import total
from rl_core.methods.prdc import PRDC
from rl_core.methods.td3 import TD3
from rl_core.methods.td3_bc import TD3BC
from rl_core.scaling import Scaling
from rl_core.support import Lists, NearestPairs, Tiles, Tree, nearest_pairs, overlap
from rl_core.trainers.offline import OfflineSchedule, OfflineTrainer, recorded
from tests.rl_core.offline_methods import Seeded, as_double

SMALL = OfflineSchedule(steps=10, batch=64, width=16, reward_scale=0.1)


def random_data(count: int = 300, obs: int = 3, action: int = 2, seed: int = 0, scale: float = 1.0) -> Transitions:
    """Of distinct observations."""
    rng = Generator().manual_seed(seed)
    made = (
        torch.randn(count, obs, generator=rng), torch.rand(count, action, generator=rng) * 2 - 1,
        scale * torch.randn(count, generator=rng), torch.randn(count, obs, generator=rng),
    )  # fmt: skip
    return Transitions(*made, torch.zeros(count), torch.zeros(count))


def actor_loss(method: TD3BC | PRDC | TD3, data: Transitions, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Of a fresh trainer's second stage on some rows of its data, in float64, and its gradient by the actor's weights."""
    trainer = OfflineTrainer(method, data, SMALL)
    trainer.nets.double()
    trainer.buffer.rows = trainer.buffer.rows.double()
    stage = trainer.stages[1]
    value = -total(stage.stage.loss(trainer.learner, trainer.buffer.take(rows), trainer.draw))
    return value.detach(), list(torch.autograd.grad(value, stage.weights))


def test_1_a_large_weight_of_observations_makes_it_td3_bc() -> None:
    data, rows = random_data(), torch.arange(0, 300, 3)
    (one, gradient), (other, expected) = actor_loss(PRDC(state_weight=1e6), data, rows), actor_loss(TD3BC(), data, rows)
    assert one == pytest.approx(float(other), abs=1e-6)
    for a, b in zip(gradient, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_2_without_a_weight_of_observations_only_actions_count_and_dense_ones_cost_nothing() -> None:
    data = random_data(20_000, action=1)
    support = nearest_pairs(data.obs, data.action, 0.0)
    action = torch.linspace(-0.99, 0.99, 50)[:, None]
    found = [support.project(obs.expand(50, 3), action) for obs in (torch.zeros(3), 5 * torch.ones(3))]
    assert torch.equal(found[0], found[1])
    assert ((found[0] - action) ** 2).mean() < 1e-6
    (one, gradient), (other, expected) = (
        actor_loss(method, data, torch.arange(200)) for method in (PRDC(state_weight=0.0, alpha=1.0), TD3())
    )
    value = OfflineTrainer(TD3(), data, SMALL)
    assert one == pytest.approx(float(other / scale(value, data)), abs=1e-4)  # TD3's objective, over the mean |Q|
    for a, b in zip(gradient, expected, strict=True):
        torch.testing.assert_close(a, b / scale(value, data), atol=1e-3, rtol=1e-2)


def scale(trainer: OfflineTrainer, data: Transitions) -> float:
    """Mean |Q| of what the policy does in the first 200 rows."""
    batch = trainer.buffer.take(torch.arange(200))
    with torch.no_grad():
        return float(trainer.nets["critic"].first(batch.obs, trainer.nets["actor"](batch.obs)).abs().mean())


@pytest.mark.parametrize(("weight", "action", "distance"), [(1.0, 1.0, 0.60828), (3.0, 0.0, 1.5)])
def test_3_the_pages_example_by_hand(weight: float, action: float, distance: float) -> None:
    pairs = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    support = nearest_pairs(pairs, pairs, weight)
    obs, asked = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([[0.9]], dtype=torch.float64)
    assert support.project(obs, asked).item() == action
    assert support.distance(obs, asked).item() == pytest.approx(distance, abs=5e-6)
    assert (asked - support.project(obs, asked)).item() ** 2 == pytest.approx({1.0: 0.01, 3.0: 0.81}[weight])


def test_3_the_switch_is_at_two() -> None:
    pairs = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    obs, asked = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([[0.9]], dtype=torch.float64)
    found = [nearest_pairs(pairs, pairs, weight).project(obs, asked).item() for weight in (2 - 1e-9, 2 + 1e-9)]
    assert found == [1.0, 0.0]


def test_4_logged_pairs_are_at_distance_nothing_and_distances_are_lipschitz() -> None:
    data = random_data()
    support = nearest_pairs(data.obs.double(), data.action.double(), 2.0)
    assert support.distance(data.obs, data.action).max() == 0
    rng = Generator().manual_seed(1)
    obs, other = (torch.randn(500, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    action, another = (torch.rand(500, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    apart = torch.linalg.vector_norm(support.query(obs, action) - support.query(other, another), dim=1)
    assert ((support.distance(obs, action) - support.distance(other, another)).abs() <= apart + 1e-12).all()


class Alike:
    """A critic of whom every action is worth the same."""

    def first(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.ones(len(obs), dtype=action.dtype)


def regulariser(method: PRDC) -> tuple[Callable[[Tensor], Tensor], NearestPairs, Transitions, Tensor]:
    """The method's actor loss without values, to be minimised, of actions in 50 rows; its support; those rows; some actions."""
    method, data = replace(method, alpha=0.0), as_double(random_data())
    batch, support = data.rows(slice(50)), method.prepare(data)
    action = torch.rand(50, 2, generator=Generator().manual_seed(2), dtype=torch.float64) - 0.5

    def loss(action: Tensor) -> Tensor:
        parts = Learner({"actor": lambda obs: action, "critic": Alike()}, {}, support)
        return -total(method.actor(parts, batch, Seeded()))

    return loss, support, batch, action.requires_grad_()


def slopes_along(loss: Callable[[Tensor], Tensor], at: Tensor, directions: Tensor, size: float = 1e-6) -> Tensor:
    """Central differences of a loss of actions along some directions."""
    with torch.no_grad():
        return torch.stack([(loss(at + size * one) - loss(at - size * one)) / (2 * size) for one in directions])


def directions_of(action: Tensor) -> Tensor:
    """Some 20 in which all actions move, and 10 in which one number of one row does."""
    mixed = torch.randn(20, *action.shape, generator=Generator().manual_seed(4), dtype=torch.float64)
    alone = torch.eye(action.numel(), dtype=torch.float64)[::10].reshape(-1, *action.shape)
    return torch.cat((mixed, alone))


@pytest.mark.parametrize("norm", ["squared", "l2"])
def test_5_the_gradient_of_the_methods_own_loss_is_that_to_a_fixed_pair(norm: Any) -> None:
    loss, support, batch, action = regulariser(PRDC(norm=norm))
    (gradient,) = torch.autograd.grad(loss(action), action)
    asked, directions = action.detach(), directions_of(action)
    apart = torch.cdist(torch.cat((2 * batch.obs, asked), dim=1), support.points)
    nearest = support.points[apart.argmin(dim=1)]
    gap = asked - nearest[:, 3:]
    wanted = 2 * gap / (50 * 2) if norm == "squared" else gap / (50 * apart.min(dim=1).values[:, None])
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    assert (nearest[:, :3] != 2 * batch.obs).any(dim=1).float().mean() > 0.2  # of other rows, which TD3+BC would not look at
    for one in directions:
        for moved in (asked + 1e-6 * one, asked - 1e-6 * one):
            assert torch.equal(support.nearest(batch.obs, moved), nearest)
    torch.testing.assert_close(slopes_along(loss, asked, directions), (directions * gradient).sum(dim=(1, 2)), rtol=1e-6, atol=1e-9)


def test_5_no_gradient_goes_through_the_search() -> None:
    """A kernel's mean moves with the action: the loss holds it fixed, which is not the slope of the loss as a whole."""
    loss, support, batch, action = regulariser(PRDC(bandwidth=0.3))
    (gradient,) = torch.autograd.grad(loss(action), action)
    asked, directions = action.detach(), directions_of(action)
    apart = torch.cdist(torch.cat((2 * batch.obs, asked), dim=1), support.points)
    mean = torch.softmax(-(apart**2) / (2 * 0.3**2), dim=1) @ support.points[:, 3:]
    torch.testing.assert_close(gradient, 2 * (asked - mean) / (50 * 2), rtol=1e-9, atol=1e-12)
    found, whole = (directions * gradient).sum(dim=(1, 2)), slopes_along(loss, asked, directions)
    assert (found - whole).abs().max() > 0.05 * found.abs().max()


@pytest.mark.parametrize("scaled", [0.01, 100.0])
def test_6_the_actors_loss_does_not_know_the_scale_of_values(scaled: float) -> None:
    data, rows = random_data(), torch.arange(100)
    found = []
    for factor in (1.0, scaled):
        trainer = OfflineTrainer(PRDC(), data, SMALL)
        with torch.no_grad():
            for last in (trainer.nets["critic"].members.weights[-1], trainer.nets["critic"].members.biases[-1]):
                last.mul_(factor)
        loss = total(trainer.stages[1].stage.loss(trainer.learner, trainer.buffer.take(rows), trainer.draw))
        found.append(float(loss.detach()))
    assert found[1] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("sizes", [(3, 1), (17, 6)])
def test_7_all_engines_find_the_same_distance(sizes: tuple[int, int]) -> None:
    data = random_data(5000, *sizes)
    rng = Generator().manual_seed(3)
    row = torch.randint(0, 5000, (10_000,), generator=rng)
    action = torch.rand(10_000, sizes[1], generator=rng) * 2 - 1
    found = {}
    for engine in ("tree", "tiles", "lists"):
        support = nearest_pairs(data.obs, data.action, 2.0, search=engine)
        found[engine] = support.distance(data.obs[row], action, row)
    for engine in ("tiles", "lists"):
        torch.testing.assert_close(found[engine], found["tree"], atol=1e-5, rtol=0)
    by_action = nearest_pairs(data.obs, data.action, 0.2, search="tree")
    short = Lists.of(0.2 * data.obs, by_action.points, by_action.search, count=8)
    distance = replace(by_action, search=short).distance(data.obs[row], action, row)
    torch.testing.assert_close(distance, by_action.distance(data.obs[row], action), atol=1e-5, rtol=0)
    assert short.asked == 10_000
    assert short.missed > 0  # what lists cannot certify is searched by the tree


def test_7_lists_of_all_rows_miss_nothing_and_need_row_numbers() -> None:
    data = random_data(50)
    support = nearest_pairs(data.obs, data.action, 2.0, search="lists")
    row, action = torch.arange(50), torch.zeros(50, 2)
    whole = nearest_pairs(data.obs, data.action, 2.0, search="tiles")
    assert isinstance(whole.search, Tiles)
    torch.testing.assert_close(support.distance(data.obs, action, row), whole.distance(data.obs, action))
    assert isinstance(support.search, Lists)
    assert support.search.missed == 0
    with pytest.raises(InputError, match="without row numbers"):
        support.project(data.obs, action)


def test_8_the_kernels_mean_less_the_point_is_the_score() -> None:
    data = random_data(200, 2, 1)
    obs, action = data.obs.double(), data.action.double()
    for width in (1.0, 0.05):
        support = nearest_pairs(obs, action, 1.0, bandwidth=width)
        at = obs[:20] + 0.3 * width
        asked = (action[:20] + 0.3 * width).requires_grad_()
        (gradient,) = torch.autograd.grad(support.log_density(at, asked).sum(), asked)
        torch.testing.assert_close(support.score(at, asked).detach(), gradient, rtol=1e-8, atol=1e-8)
        mean = support.project(at, asked)
        torch.testing.assert_close((mean - asked).detach(), width**2 * gradient, rtol=1e-8, atol=1e-8)


def test_8_a_narrow_kernel_is_the_nearest_pair() -> None:
    data = random_data(200, 2, 1)
    obs, action = data.obs.double(), data.action.double()
    hard = nearest_pairs(obs, action, 1.0)
    at, asked = obs[:1] + 0.01, action[:1] + 0.01  # one row is clearly the nearest
    apart = [
        float((nearest_pairs(obs, action, 1.0, bandwidth=width).project(at, asked) - hard.project(at, asked)).norm())
        for width in (1.0, 0.05)
    ]
    assert apart[1] <= 0.1 * apart[0]


def test_the_density_integrates_to_one() -> None:
    support = nearest_pairs(torch.zeros(3, 1), torch.tensor([[-0.5], [0.0], [0.5]]), 1.0, bandwidth=0.1)
    grid = torch.linspace(-2, 2, 801)
    obs, action = (one.reshape(-1, 1) for one in torch.meshgrid(grid, grid, indexing="ij"))
    assert float(support.log_density(obs, action).exp().sum()) * (4 / 800) ** 2 == pytest.approx(1, abs=1e-3)


def test_candidates_are_actions_of_the_nearest_observations() -> None:
    obs, action = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.1], [0.2], [0.3]])
    support = nearest_pairs(obs, action, 2.0)
    torch.testing.assert_close(support.candidates(torch.tensor([[0.9]]), 2), torch.tensor([[[0.2], [0.1]]]))


def test_the_index_is_of_scaled_observations_and_is_asked_in_the_same_scale() -> None:
    data = random_data()
    stretched = replace(data, obs=data.obs * torch.tensor([1.0, 100.0, 0.5]))
    found = []
    for one in (data, stretched):
        trainer = OfflineTrainer(PRDC(), one, replace(SMALL, normalize=True))
        batch = trainer.buffer.take(torch.arange(300))
        found.append(trainer.learner.prepared.project(batch.obs, torch.zeros(300, 2), batch.row))
    assert (found[0] == found[1]).all(dim=1).float().mean() > 0.98  # but for the floor of the spread


def test_the_whole_data_are_searched_and_not_the_batch() -> None:
    data = random_data()
    trainer = OfflineTrainer(PRDC(state_weight=0.0), data, SMALL)
    batch = trainer.buffer.take(torch.arange(4))
    wanted = trainer.learner.prepared.project(batch.obs, torch.full((4, 2), 0.9), batch.row)
    assert not any((wanted[0] == row).all() for row in data.action[:4])


def test_the_papers_own_norm_is_the_mean_distance() -> None:
    data, rows = random_data(), torch.arange(100)
    trainer = OfflineTrainer(PRDC(norm="l2", alpha=0.0), data, SMALL)
    batch = trainer.buffer.take(rows)
    support = trainer.learner.prepared
    with torch.no_grad():
        expected = support.distance(batch.obs, trainer.nets["actor"](batch.obs), batch.row).mean()
    found = total(trainer.stages[1].stage.loss(trainer.learner, batch, trainer.draw)).detach()
    assert -float(found) == pytest.approx(float(expected), rel=1e-5)


def test_overlap_raises_an_alarm_where_a_policy_leaves_its_data() -> None:
    data = dataset("pend-exp10", 0)
    scaling = Scaling.of(data.obs)
    support = nearest_pairs(scaling.apply(data.obs), data.action, 2.0)
    others = recorded(uniform, Pendulum(), 10, np.random.default_rng(5))
    away = overlap(support, scaling.apply(others.obs), others.action)
    home = overlap(support, scaling.apply(data.obs), data.action)
    assert away.alarm
    assert not home.alarm
    assert home.quantiles["largest"] < 1e-6
    assert 0 < home.limit < away.quantiles["99 %"] < away.quantiles["largest"]


def test_what_cannot_be_is_refused() -> None:
    data = random_data(10)
    with pytest.raises(InputError, match="found 'ball'; expected auto, tree, tiles, lists"):
        nearest_pairs(data.obs, data.action, 2.0, search="ball")
    with pytest.raises(InputError, match="state weight of -1"):
        nearest_pairs(data.obs, data.action, -1.0)
    with pytest.raises(InputError, match="bandwidth of 0"):
        nearest_pairs(data.obs, data.action, 1.0).log_density(data.obs, data.action)
    assert isinstance(nearest_pairs(data.obs, data.action, 1.0).search, Tree)
