"""AILBoost and DAC: weights of learners, what a judge says at its best, rows by learner, copies that rest, and their experiment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ope.data import InputError
from ope.primitives.divergences import kl
from ope.primitives.weights import effective_sample_size
from rl_core.buffers import Buffer
from rl_core.envs.pendulum import Pendulum
from rl_core.families.imitation import JensenShannon, Plan, ReverseKL, Wasserstein
from rl_core.families.offline import Transitions, joined
from rl_core.loss import total
from rl_core.methods.ailboost import AILBoost
from rl_core.methods.dac import DAC
from rl_core.mixture import appended, boosted, largest, per_episode, per_step
from rl_core.models.discriminator import Discriminator, slope_penalty
from rl_core.models.mlp import Deterministic, Sizes
from rl_core.trainers.imitation import ImitationSchedule, ImitationTrainer, judge_loss, mixture_of, row_weights
from rl_core.verify import boosting
from tests.rl_core.offline_methods import best

torch.set_num_threads(1)
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
double = partial(torch.tensor, dtype=torch.float64)
EXPERT, POLICY = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]


def table(chances: list[float]) -> Tensor:
    """Ten rows that have such frequencies."""
    return torch.cat([torch.full((round(10 * chance),), place) for place, chance in enumerate(chances)])


# 1, 2: weights


def test_weights_decay_from_the_newest() -> None:
    close(boosted(3, 0.05), [0.9025, 0.0475, 0.05], atol=1e-12)
    close(boosted(2, 0.05), [0.95, 0.05], atol=1e-12)
    close(boosted(1, 0.05), [1.0])
    weights = torch.zeros(0, dtype=torch.float64)
    for count in range(1, 10_001):
        weights = appended(weights, 0.05)
        assert abs(float(weights.sum()) - 1) < 1e-6
        if count in (1, 2, 3, 60, 1000):
            close(weights, boosted(count, 0.05), atol=1e-12)
    close(weights, boosted(10_000, 0.05), atol=1e-12)
    close(float(effective_sample_size(weights)), 39.0, atol=1e-6)  # (2 - α)/α
    close(float((weights**2).sum()), 0.02564, atol=1e-5)


def test_limits_are_the_last_learner_and_all_alike() -> None:
    last, alike = (torch.zeros(0, dtype=torch.float64) for _ in range(2))
    for count in range(6):
        last, alike = appended(last, 1.0), appended(alike, 1 / (count + 1))
        close(last, [0.0] * count + [1.0])
        close(alike, np.full(count + 1, 1 / (count + 1)), atol=1e-12)
        close(DAC().weigh(alike, -9.0), np.full(count + 2, 1 / (count + 2)), atol=1e-12)
        close(AILBoost(alpha=1.0).weigh(alike, 0.0), [0.0] * (count + 1) + [1.0])
        close(AILBoost().weigh(boosted(count + 1, 0.05), -1.0), boosted(count + 2, 0.05), atol=1e-12)
    for alpha in (-0.1, 1.1):
        with pytest.raises(InputError, match="alpha"):
            appended(last, alpha)
    for alpha in (0.0, 1.5):
        with pytest.raises(InputError, match="alpha"):
            AILBoost(alpha=alpha)


def test_who_is_not_better_may_be_skipped() -> None:
    method, weights = AILBoost(negative="skip"), double([0.95, 0.05])
    for edge in (-0.3, 0.0):
        close(method.weigh(weights, edge), [0.95, 0.05, 0.0])
    close(method.weigh(weights, 1e-9), [0.9025, 0.0475, 0.05])
    close(method.weigh(double([]), 0.0), [1.0])
    assert largest(method.weigh(weights, -0.3), 60).tolist() == [0, 1]


def test_the_least_mass_goes_first_and_of_equals_the_oldest() -> None:
    assert largest(double([0.9025, 0.0475, 0.05]), 2).tolist() == [0, 2]  # the second, not the first
    assert largest(double([0.25] * 4), 3).tolist() == [1, 2, 3]
    assert largest(double([0.1, 0.0, 0.9]), 5).tolist() == [0, 2]
    assert largest(double([0.5, 0.5]), 1).tolist() == [1]


# mixture propensities


def test_a_step_and_an_episode_of_a_mixture_are_two_things() -> None:
    weights, logp = double([0.5, 0.5]), double([[0.9, 0.1], [0.9, 0.1]]).log()
    close(per_step(logp, weights).exp(), [0.5, 0.5])
    close(per_episode(logp, weights).exp(), [0.5, 0.41])  # ½·0.81 + ½·0.01, not 0.25
    found = per_episode(logp, weights)
    close((found[1] - found[0]).exp(), 0.82)  # whoever did the first is likely to be who does the second
    close(per_episode(logp[:1], weights), per_step(logp[:1], weights))
    shares = double([0.2, 0.3, 0.5])
    close(per_step(double([0.1, 0.4, 0.3]).log(), shares).exp(), 0.29)
    long = double([[-5.0, -6.0]]).expand(1000, 2)
    close(per_episode(long, double([0.25, 0.75]))[-1], math.log(0.25) - 5000.0)
    close(per_episode(torch.stack((logp, logp.flip(-1))), double([1.0, 0.0])).exp(), [[0.9, 0.81], [0.1, 0.01]])
    for wrong in (double([0.5]), double([-0.5, 1.5])):
        with pytest.raises(InputError, match="one per learner"):
            per_step(logp, wrong)


# 3, 4, 5: what the judge says at its best


@pytest.mark.parametrize(
    ("divergence", "value"),
    [
        (ReverseKL(), -0.725113),
        (JensenShannon(), None),
    ],
)
def test_at_its_best_the_judge_says_the_log_ratio(divergence: Any, value: float | None) -> None:
    best = double([0.916291, 0.0, -0.916291])
    exact = (double(EXPERT) / double(POLICY)).log().requires_grad_()
    close(exact.detach(), best)
    found = total(divergence.objective(exact[table(EXPERT)], exact[table(POLICY)]))
    (slope,) = torch.autograd.grad(found, exact)
    close(slope, np.zeros(3), atol=1e-12)
    if value is None:
        middle = [(a + b) / 2 for a, b in zip(EXPERT, POLICY, strict=True)]
        value = float(kl(double(EXPERT), double(middle)) + kl(double(POLICY), double(middle))) - math.log(4)
    close(found.detach(), value)
    close(float(kl(double(POLICY), double(EXPERT))), 0.274887)
    for place in range(3):
        for change in (-0.01, 0.01):
            moved = exact.detach().clone()
            moved[place] += change
            assert total(divergence.objective(moved[table(EXPERT)], moved[table(POLICY)])) < found


def test_each_side_is_a_mean_of_its_own() -> None:
    expert, policy = double([0.2, -0.4, 1.0]), double([0.5, -0.1])
    for divergence, by_hand in (
        (ReverseKL(), -(-expert).exp().mean() - policy.mean()),
        (JensenShannon(), -nn.functional.softplus(-expert).mean() - nn.functional.softplus(policy).mean()),
        (Wasserstein(), expert.mean() - policy.mean()),
    ):
        close(total(divergence.objective(expert, policy)), by_hand, atol=1e-12)


@pytest.mark.parametrize("bounded", [True, False])
def test_a_bounded_judge_stops_at_one(bounded: bool) -> None:
    expert, policy, size = [0.7, 0.2, 0.1], [0.1, 0.2, 0.7], 1.945910  # log 7
    torch.manual_seed(0)
    judge, nothing = Discriminator(Sizes(3, 1, 64, 2), bounded=bounded), torch.zeros(10, 1)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
    points = torch.eye(3)
    for _ in range(300):
        optimizer.zero_grad()
        sides = (judge(points[table(side)], nothing) for side in (expert, policy))
        (-total(ReverseKL().objective(*sides))).backward()
        optimizer.step()
    with torch.no_grad():
        found = judge(points, nothing[:3])
    if bounded:
        assert (found.abs() <= 1).all()
        close(found[[0, 2]], [1.0, -1.0], atol=0.02)
        close(found[1], 0.0, atol=0.05)
    else:
        close(found, [size, 0.0, -size], atol=0.05)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("method", [AILBoost(penalty=0.0), DAC(penalty=0.0)], ids=["AILBoost", "DAC"])
def test_who_is_the_expert_earns_nothing_from_a_judge_at_its_best(method: Any, bounded: bool) -> None:
    torch.manual_seed(0)
    judge = Discriminator(Sizes(3, 1, 16, 1), bounded=bounded).double()
    points, nothing = torch.eye(3, dtype=torch.float64), torch.zeros(10, 1, dtype=torch.float64)
    side, share = (points[table(EXPERT)], nothing), torch.full((10,), 0.5, dtype=torch.float64)
    assert judge(points, nothing[:3]).abs().max() > 0.05
    best(lambda: total(judge_loss(method, judge, side, side, share)), *judge.parameters())
    close(method.reward(judge(points, nothing[:3])).detach(), np.zeros(3))
    assert torch.equal(method.reward(double([-1.0, 0.0, 0.7])), double([-1.0, 0.0, 0.7]))


def test_a_learner_who_is_the_expert_stays_where_it_is() -> None:
    worlds = boosting.Worlds.of(3)
    start = worlds.occupancy(np.full_like(worlds.expert, 1 / boosting.CHOICES))
    for weighting in ("boosted", "alike"):
        reached = boosting.learned(replace(worlds, expert=start), weighting, rounds=5)  # type: ignore[arg-type]
        away = boosting.learned(worlds, weighting, rounds=5)  # type: ignore[arg-type]
        for one in (reached.mixture, reached.last, reached.apart):
            close(one, np.zeros(3), atol=1e-12)
        assert min(away.mixture.min(), away.last.min()) > 0.01


# 6: a step of the mixture


class Opinion(nn.Module):
    """A judge of three points."""

    def __init__(self, says: Tensor) -> None:
        super().__init__()
        self.says = says

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return obs.double() @ self.says


def seen(points: Tensor, who: int) -> Transitions:
    """Rows of a learner, each at one of three points."""
    obs, nothing = torch.eye(3)[points], torch.zeros(len(points))
    return Transitions(obs, nothing[:, None], nothing, obs, nothing, nothing, nothing, torch.full_like(nothing, float(who)))


def of_two(method: AILBoost) -> ImitationTrainer:
    """A trainer after two rounds: the second learner has twice the rows of the first and a third of its weight."""
    schedule = ImitationSchedule(steps=10, seed_steps=1, batch=2, width=4, layers=1, judge_width=4, judge_layers=1)
    made = ImitationTrainer(method, Pendulum(), seen(table(EXPERT), 0), schedule)
    rows = joined([seen(table(POLICY), 1), seen(table([0.6, 0.2, 0.2]).repeat(2), 2)])
    made.mixed = Buffer(len(rows), 3, 1)
    made.mixed.add(rows)
    made.actors, made.ids, made.weights, made.rounds = actors(2), [1, 2], double([0.75, 0.25]), 2
    return made


def occupied(made: ImitationTrainer) -> Tensor:
    """(3,) where the mixture is that a trainer holds, by its rows and their weights."""
    rows = made.mixed.all()
    assert rows.policy is not None
    return row_weights(rows.policy, made.ids, made.weights) @ rows.obs.double()


@pytest.mark.parametrize(
    "new", [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.0, 1.0, 0.0], [0.0, 0.4, 0.6], [0.3, 0.2, 0.5]]
)
def test_a_round_descends_where_its_learner_is_above_the_mixture(new: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference of KL over α, for α of 1e-6, is the mean of the best D over the mixture less that over the learner."""
    plan = Plan(judge_steps=0, samples=10, rolls=1)
    mixture, expert, size = double([0.3, 0.275, 0.425]), double(EXPERT), 1e-6
    says = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    drawn = torch.repeat_interleave(torch.arange(3), (1000 * mixture).round().long())
    best(lambda: total(AILBoost().objective(says[table(EXPERT)], says[drawn])), says)
    close(says.detach(), (expert / mixture).log())
    for negative in ("keep", "skip"):
        made = of_two(AILBoost(alpha=size, plan=plan, negative=negative))  # type: ignore[arg-type]
        made.judge = Opinion(says.detach())  # type: ignore[assignment]
        monkeypatch.setattr(made, "roll", lambda actor, who: seen(table(new), who))
        close(occupied(made), mixture, atol=1e-12)
        made.close()
        change, edge = float(kl(occupied(made), expert) - kl(mixture, expert)) / size, made.told["edge"]
        close(edge, float((double(new) - mixture) @ says.detach()), atol=1e-9)
        assert abs(edge) > 0.01
        if negative == "keep" or edge > 0:
            close(change, -edge, atol=1e-5)
            assert made.ids == [1, 2, 3]
        else:
            close(change, 0.0, atol=1e-8)
            assert made.ids == [1, 2]


def test_where_the_mixture_is_the_expert_no_learner_is_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = of_two(AILBoost(plan=Plan(judge_steps=0, samples=10, rolls=1), negative="skip"))
    mixture, says = occupied(made), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    drawn = torch.repeat_interleave(torch.arange(3), (1000 * mixture).round().long())
    best(lambda: total(AILBoost().objective(says[drawn], says[drawn])), says)
    close(says.detach(), np.zeros(3), atol=1e-8)
    made.judge = Opinion(says.detach())  # type: ignore[assignment]
    for new in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0]):
        monkeypatch.setattr(made, "roll", lambda actor, who, new=new: seen(table(new), who))
        made.close()
        close(made.told["edge"], 0.0, atol=1e-8)


def test_the_experiments_first_small_step_has_the_slope_of_its_learners_edge() -> None:
    worlds, size = boosting.Worlds.of(5), 1e-6
    policy = np.full_like(worlds.expert, 1 / boosting.CHOICES)
    start = worlds.occupancy(policy)
    says = np.log(worlds.expert / start)
    bounded = says.clip(-boosting.BOUND, boosting.BOUND)
    new = worlds.occupancy(boosting.softmax(boosting.STEP * worlds.values(policy, bounded)))
    ended = boosting.learned(worlds, "boosted", rounds=1, alpha=size)
    slope = (ended.mixture - kl(start.reshape(5, -1), worlds.expert.reshape(5, -1))) / size
    edge = ((new - start) * says).sum(axis=(1, 2))
    close(slope, -edge, atol=1e-5)
    assert edge.min() > 0.01


# 7: rows by weight


def test_rows_come_by_weight_of_their_learner() -> None:
    counts, weights = {0: 50, 1: 40, 2: 400, 5: 10}, boosted(3, 0.2)
    who = torch.cat([torch.full((count,), float(name)) for name, count in counts.items()])[torch.randperm(500)]
    found = row_weights(who, [1, 2, 5], weights)
    close(found.sum(), 1.0)
    for name, weight in zip((0, 1, 2, 5), (0.0, *weights.tolist()), strict=True):
        close(found[who == name], np.full(counts[name], weight / counts[name]), atol=1e-12)
    buffer, n = Buffer(500, 1, 1), 200_000
    nothing = torch.zeros(500)
    buffer.add(Transitions(who[:, None], nothing[:, None], nothing, who[:, None], nothing, nothing, policy=who))
    buffer.weigh(found)
    drawn = buffer.take(buffer.draw(n, torch.Generator().manual_seed(0)))
    assert drawn.policy is not None
    assert drawn.row is not None
    for name, weight in zip((0, 1, 2, 5), (0.0, *weights.tolist()), strict=True):
        share = float((drawn.policy == name).double().mean())
        assert abs(share - weight) <= 3 * math.sqrt(weight * (1 - weight) / n)
    each = torch.bincount(drawn.row, minlength=500)[who == 2].double()
    assert abs(float(each.var() / each.mean()) - 1) < 0.3  # within a learner all alike


def actors(count: int) -> list[nn.Module]:
    """Policies that always take 0.1, 0.2, ..."""
    found = list[nn.Module]()
    for number in range(count):
        actor = Deterministic(Sizes(3, 1, 4, 1))
        with torch.no_grad():
            for weight in actor.parameters():
                weight.zero_()
            actor.body.biases[-1].fill_(math.atanh(0.1 * (number + 1)))
        found.append(actor)
    return found


def test_an_episode_has_one_learner_from_first_to_last() -> None:
    weights = double([0.6, 0.3, 0.1])
    policy = mixture_of(actors(3), weights, 20_000, np.random.default_rng(0))
    obs = np.random.default_rng(1).normal(size=(20_000, 3))
    first, second = policy(obs), policy(-obs)
    np.testing.assert_array_equal(first, second)
    close(first[:, 0], 0.1 * (policy.which.numpy() + 1), atol=1e-6)
    for number, weight in enumerate(weights.tolist()):
        share = float((policy.which == number).double().mean())
        assert abs(share - weight) < 3 * math.sqrt(weight * (1 - weight) / 20_000)
    with pytest.raises(InputError, match="episodes"):
        policy(obs[:5])


# 9: the judge's slope


def test_the_penalty_of_slopes() -> None:
    torch.manual_seed(0)
    direction = nn.functional.normalize(torch.randn(4), dim=0)
    expert, policy, share = (torch.randn(8, 3), torch.randn(8, 1)), (torch.randn(8, 3), torch.randn(8, 1)), torch.rand(8)

    class Said(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, obs: Tensor, action: Tensor) -> Tensor:
            return self.function(torch.cat((obs, action), dim=-1))

    def penalty(function: Callable[[Tensor], Tensor]) -> float:
        """What it takes from the judge's objective."""
        judge = Said(function)
        with_, without = (
            total(judge_loss(replace(AILBoost(), penalty=size), judge, expert, policy, share)) for size in (10.0, 0.0)
        )
        return float((without - with_).detach())

    close(penalty(lambda x: x @ direction), 0.0, atol=1e-5)
    close(penalty(lambda x: 0 * x.sum(dim=-1)), 10.0, atol=1e-5)
    close(penalty(lambda x: x[:, 0].clone()), 0.0, atol=1e-5)
    close(penalty(lambda x: x @ (3 * direction)), 40.0, atol=1e-4)
    # the points are between the two sides: of |x|²/2 the slope is x itself
    between = share[:, None] * torch.cat(expert, dim=-1) + (1 - share[:, None]) * torch.cat(policy, dim=-1)
    close(penalty(lambda x: (x**2).sum(dim=-1) / 2), 10 * ((between.norm(dim=-1) - 1) ** 2).mean(), atol=1e-4)


@pytest.mark.parametrize("bounded", [True, False])
def test_the_judge_can_be_differentiated_twice(bounded: bool) -> None:
    torch.manual_seed(1)
    judge = Discriminator(Sizes(3, 2, 64, 2), bounded=bounded).double()
    obs, action = (torch.randn(4, size, dtype=torch.float64, requires_grad=True) for size in (3, 2))
    assert torch.autograd.gradcheck(judge, (obs, action))
    assert torch.autograd.gradgradcheck(judge, (obs, action))
    sides = ((obs.detach(), action.detach()), (torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)))
    share = torch.rand(4, dtype=torch.float64)
    weight = judge.body.weights[1]

    def value() -> Tensor:
        found = slope_penalty(judge, *sides, share)
        return torch.as_tensor(found.num / found.den)

    (slope,) = torch.autograd.grad(value(), weight)
    direction, size = torch.randn_like(weight), 1e-6
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * size * direction
        ends.append(float(value().detach()))
        with torch.no_grad():
            weight -= sign * size * direction
    assert float(slope.abs().sum()) > 0
    close((ends[0] - ends[1]) / (2 * size), float((slope * direction).sum()), atol=1e-5)


def test_without_a_slope_the_penalty_has_a_gradient_that_is_a_number() -> None:
    judge = Discriminator(Sizes(3, 1, 4, 1))
    with torch.no_grad():
        for weight in judge.parameters():
            weight.zero_()
    side = (torch.ones(2, 3), torch.ones(2, 1))
    gradients = torch.autograd.grad(
        total(judge_loss(AILBoost(), judge, side, side, torch.rand(2))), list(judge.parameters()), materialize_grads=True
    )
    assert all(bool(torch.isfinite(one).all()) for one in gradients)
