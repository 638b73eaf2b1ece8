"""What baselines of control have in common: credit, surrogates, trust regions, replay, and loops that solve what they must."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ope.primitives import divergences, surrogates
from ope.primitives.returns import discounted, gae, retrace, reverse_sum, temporal_difference, vtrace
from ope.primitives.weights import effective_sample_size
from ope.sequential import PDIS, PDWIS, SequentialDR, TrajectoryIS, steps_of
from ope.trajectories import Trajectories
from rl_core.envs.probes import Endless
from rl_core.families.offline import Drawn, Learner, Transitions
from rl_core.families.online import CreditedRows
from rl_core.loss import total
from rl_core.methods.ppo_control import ControlPPO
from rl_core.methods.sac import SAC
from rl_core.methods.trpo import NPG, TRPO, conjugate_gradient, curvature, flat, natural_step
from rl_core.models.distributions import Categorical, DiagonalGaussian
from rl_core.models.mlp import Sizes, normal_logp, squashed_logp
from rl_core.trainers.online import OnlineSchedule, OnlineTrainer
from tests.rl_core.online_methods import collected, rows_of, steps

Floats = NDArray[np.float64]
torch.set_num_threads(1)
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
double = partial(torch.tensor, dtype=torch.float64)
NO, LAST = [False, False, False], [False, False, True]
REWARD, VALUE, FOLLOWING = [1.0, 0.0, 2.0], [0.5, 0.4, 0.3], [0.4, 0.3, 0.2]
RATIO, Q, EXPECTED = [2.0, 0.5, 1.5], [0.6, 0.5, 0.2], [0.45, 0.35, 0.25]

# 1: generalised advantages


def test_generalised_advantages() -> None:
    three = [[*REWARD]] * 3, [[*VALUE]] * 3, [[*FOLLOWING]] * 3
    found, target = ControlPPO(discount=0.9).credit(steps(*three, [NO, LAST, NO], [NO, NO, LAST]))
    goes_on, ends, cut = found.T
    close(goes_on, [2.123177, 1.4774, 1.88])
    close(ends, [1.9915925, 1.3235, 1.7])
    close(cut, goes_on)
    close(target.T, found.T + double([VALUE]))


def test_an_end_inside_keeps_nothing_of_what_comes_after() -> None:
    method = ControlPPO(discount=0.9)
    alone, _ = method.credit(steps([REWARD], [VALUE], [FOLLOWING], [LAST], [NO]))
    for flags in ([[*LAST, False]], [[*NO, False]]), ([[*NO, False]], [[*LAST, False]]):
        joined, _ = method.credit(steps([[*REWARD, 99.0]], [[*VALUE, 7.0]], [[*FOLLOWING, 8.0]], *flags))
        kept = 0.0 if flags[0][0][2] else 0.9 * 0.2
        close(joined[2, 0], 1.7 + kept)
    assert torch.equal(method.credit(steps([[*REWARD, 99.0]], [[*VALUE, 7.0]], [[*FOLLOWING, 8.0]], [[*LAST, False]],
                                           [[*NO, False]]))[0][:3], alone)  # fmt: skip


# 2: the clipped surrogate


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "moves"),
    [(1.3, 1.0, 1.2, False), (1.3, -1.0, -1.3, True), (0.7, 1.0, 0.7, True), (0.7, -1.0, -0.8, False)],
)
def test_clipped_terms(ratio: float, advantage: float, expected: float, moves: bool) -> None:
    batch, new = rows_of([ratio], [advantage])
    loss = ControlPPO().policy_loss(batch, new, new, 0.0)  # type: ignore[arg-type]
    value = total(loss)
    close(value.detach(), expected)
    (gradient,) = torch.autograd.grad(value, new.values)
    close(gradient, [ratio * advantage if moves else 0.0])
    assert float(loss.metrics["clip_fraction"].num) == float(not moves)


def test_bounds_may_differ_and_a_second_clip_bounds_losses() -> None:
    batch, new = rows_of([1.25, 0.7, 9.0], [1.0, -1.0, -1.0])

    def value(method: ControlPPO) -> float:
        return float(total(method.policy_loss(batch, new, new, 0.0)).detach())  # type: ignore[arg-type]

    close(value(ControlPPO()), (1.2 - 0.8 - 9.0) / 3)
    close(value(ControlPPO(eps_high=0.3)), (1.25 - 0.8 - 9.0) / 3)
    close(value(ControlPPO(eps_low=0.4, dual_clip=3.0)), (1.2 - 0.7 - 3.0) / 3)


def test_value_clipping_takes_the_worse() -> None:
    batch, _ = rows_of([1.0, 1.0], [0.0, 0.0])
    batch = replace(batch, target=double([2.0, 0.1]), value=double([0.0, 0.0]))
    value = double([1.5, 1.0])
    close(total(ControlPPO().value_loss(batch, value)), -0.5 * 0.5 * (0.25 + 0.81) / 2)
    close(total(ControlPPO(value_clip=0.2).value_loss(batch, value)), -0.5 * 0.5 * (1.8**2 + 0.81) / 2)


# 3: where the first step goes


def test_the_first_step_is_a_policy_gradient() -> None:
    """In float64, where rounding is far below the page's 1e-6; the ratio as it was collected is 1 to what float32 can tell."""
    trainer, batch = collected()
    policy, weights = trainer.policy, list(trainer.policy.parameters())
    close(policy(batch.obs).logp(batch.action).detach() - batch.logp_behavior, np.zeros(len(batch)), atol=1e-5)
    policy.double()
    batch = CreditedRows(*(one.double() for one in vars(batch).values())).standardised()
    batch = replace(batch, logp_behavior=policy(batch.obs).logp(batch.action).detach())
    old = policy(batch.obs)

    def gradient(value: Tensor) -> Tensor:
        return flat(torch.autograd.grad(value, weights, retain_graph=True))

    plain = gradient((batch.advantage * policy(batch.obs).logp(batch.action)).mean())
    assert plain.abs().max() > 0.01
    for method in (ControlPPO(), TRPO(), ControlPPO(dual_clip=3.0)):
        found = gradient(total(method.policy_loss(batch, policy(batch.obs), old, 0.0)))
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)


# 4 to 6, 14: one scan


def scans() -> tuple[Tensor, ...]:
    return tuple(double([one]) for one in (RATIO, REWARD, VALUE, FOLLOWING))


def test_vtrace() -> None:
    ratio, reward, value, following = scans()
    no = torch.tensor([NO])
    weighed = ratio.clamp(max=1.0)
    close(weighed * temporal_difference(reward, value, following, no, 0.9), [[0.86, -0.065, 1.88]])
    found = vtrace(ratio, reward, value, following, no, no, 0.9)
    close(found, [[2.0629, 1.181, 2.18]])
    later = torch.cat((found[:, 1:], following[:, -1:]), dim=1)
    close(weighed * (reward + 0.9 * later - value), [[1.5629, 0.781, 1.88]])
    ones = torch.ones_like(ratio)
    on_policy = vtrace(ones, reward, value, following, no, no, 0.9)
    close(on_policy, discounted(reward, no, 0.9) + 0.9 ** torch.arange(3, 0, -1) * 0.2)  # the n-step return
    close(on_policy, value + gae(reward, value, following, no, no, 0.9, 1.0))


def test_retrace() -> None:
    no = torch.tensor([NO])
    ratio, reward, q, expected = (double([one]) for one in (RATIO, REWARD, Q, EXPECTED))
    close(temporal_difference(reward, q, expected, no, 0.9), [[0.805, -0.185, 2.025]])
    close(retrace(ratio, reward, q, expected, no, no, 0.9), [[2.141875, 2.1375, 2.225]])


def test_per_decision_importance_sampling() -> None:
    data = Trajectories(np.zeros((1, 3)), np.array([REWARD]), np.ones((1, 3), dtype=bool), discount=0.9)
    weighed, plain = steps_of(data, np.log([RATIO])), steps_of(data, np.zeros((1, 3)))
    close(weighed.weight, [[2.0, 1.0, 1.5]])
    close(PDIS().terms(weighed), [[4.43]])
    close(TrajectoryIS().terms(weighed), [[3.93]])
    for one in (PDIS(), TrajectoryIS()):
        close(one.terms(plain), [[2.62]])


def test_weights_have_mean_one() -> None:
    rng = np.random.default_rng(0)
    behavior, target = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])
    taken = rng.choice(3, (20_000, 4), p=behavior)
    data = Trajectories(np.log(behavior)[taken], np.zeros(taken.shape), np.ones(taken.shape, dtype=bool))
    weight = steps_of(data, np.log(target)[taken]).weight
    assert (np.abs(weight.mean(axis=0) - 1) < 4 * weight.std(axis=0) / len(taken) ** 0.5).all()


def test_every_trace_is_the_same_scan() -> None:
    ratio, reward, value, following = scans()
    q, expected = double([Q]), double([EXPECTED])
    for terminated, truncated in ((NO, NO), (LAST, NO), (NO, LAST), ([False, True, False], NO), (NO, [True, False, False])):
        over, cut = torch.tensor([terminated]), torch.tensor([truncated])
        goes_on = 0.9 * (~(over | cut)).double()
        delta = temporal_difference(reward, value, following, over, 0.9)
        bounded = ratio.clamp(max=1.0)
        later = torch.cat((bounded[:, 1:], torch.zeros(1, 1, dtype=torch.float64)), dim=1)
        close(reverse_sum(delta, goes_on * 0.95), gae(reward, value, following, over, cut, 0.9, 0.95))
        close(value + reverse_sum(bounded * delta, goes_on * bounded), vtrace(ratio, reward, value, following, over, cut, 0.9))
        found = q + reverse_sum(temporal_difference(reward, q, expected, over, 0.9), goes_on * later)
        close(found, retrace(ratio, reward, q, expected, over, cut, 0.9))
    close(reverse_sum(ratio * reward, 0.9 * ratio)[0, 0], 4.43)  # per-decision importance sampling, from the end
    model = double([[0.7, 0.2, 0.9]]), double([[0.6, 0.4, 0.8]])  # q and v of the doubly robust one
    values = torch.cat((model[1][:, 1:], torch.zeros(1, 1, dtype=torch.float64)), dim=1)
    found = model[1] + reverse_sum(ratio * (reward + 0.9 * values - model[0]), 0.9 * ratio)
    data = Trajectories(np.zeros((1, 3)), np.array([REWARD]), np.ones((1, 3), dtype=bool), discount=0.9)
    close(found[0, 0], SequentialDR().terms(steps_of(data, np.log([RATIO]), *(one.numpy() for one in model)))[0, 0])


# 7: effective sample size


def test_effective_sample_size() -> None:
    weight = np.array([1.0, 1.0, 1.0, 1.0, 6.0])
    close(effective_sample_size(weight), 2.5)
    close(effective_sample_size(weight[[4, 2, 0, 1, 3]] * 7), 2.5)


# 8: squashed densities


def test_squashed_density() -> None:
    u, zero = double([[0.5]]), double([[0.0]])
    naive = normal_logp(u, zero, zero)[:, 0] - torch.log(1 - torch.tanh(u) ** 2)[:, 0]
    np.testing.assert_allclose(squashed_logp(u, zero, zero), [-0.8037095192881], rtol=0, atol=1e-12)
    np.testing.assert_allclose(naive, [-0.8037095192881], rtol=0, atol=1e-12)
    far = double([[20.0], [-20.0]])
    assert torch.isfinite(squashed_logp(far, far, torch.zeros_like(far))).all()
    assert torch.isinf(torch.log(1 - torch.tanh(far) ** 2)).all()


# 9: distances


def test_estimators_of_kl() -> None:
    old, new = double([0.0]), double([math.log(1.2)])
    close(divergences.k1(old, new), [-0.182322])
    close(divergences.k2(old, new), [0.182322**2 / 2])
    close(divergences.k3(old, new), [0.017678])


def test_closed_forms_are_what_samples_say() -> None:
    draw = Drawn(torch.Generator().manual_seed(0))
    gaussian = [
        DiagonalGaussian(torch.tensor(m), torch.tensor(s)) for m, s in (([0.3, -0.2], [-0.5, 0.1]), ([0.0, 0.4], [-0.2, 0.3]))
    ]
    choice = [Categorical(torch.tensor(logits)) for logits in ([0.3, -1.0, 0.8], [0.0, 0.5, -0.4])]
    for new, old in (gaussian, choice):
        many = [one.rows(None).rows(torch.zeros(200_000, dtype=torch.long)) for one in (new, old)]  # type: ignore[attr-defined]
        action = many[0].sample(draw)
        assert action.shape == (200_000, many[0].mode().shape[-1])
        for exact, sampled in (
            (new.kl(old), many[0].logp(action) - many[1].logp(action)),  # type: ignore[attr-defined]
            (new.entropy(), -many[0].logp(action)),  # type: ignore[attr-defined]
        ):
            assert abs(float(exact) - float(sampled.mean())) < 4 * float(sampled.std()) / 200_000**0.5
        assert float(new.kl(new)) == pytest.approx(0, abs=1e-7)  # type: ignore[attr-defined]


def test_choices_come_as_often_as_they_should() -> None:
    chances = Categorical(torch.log(torch.tensor([0.0, 0.2, 0.5, 0.3])).expand(100_000, 4))
    found = chances.sample(Drawn(torch.Generator().manual_seed(1))).mean(dim=0)
    assert found[0] == 0
    np.testing.assert_allclose(found, [0.0, 0.2, 0.5, 0.3], rtol=0, atol=0.006)


# 10, 12: natural gradients


def test_a_quadratic_trust_region() -> None:
    curve, gradient = torch.diag(double([2.0, 8.0])), double([2.0, 8.0])
    direction = conjugate_gradient(lambda v: curve @ v, gradient, 10)
    close(direction, [1.0, 1.0])
    step = natural_step(gradient, lambda v: curve @ v, 0.01, 10)
    assert step is not None
    close(step, [0.0447214] * 2)
    close(step @ curve @ step / 2, 0.01)
    assert natural_step(torch.zeros(2), lambda v: v, 0.01, 10) is None


class Table(nn.Module):
    """One context's logits."""

    def __init__(self, chances: Sequence[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(double(chances).log())

    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(self.logits.expand(len(obs), -1).clone())


def bandit() -> tuple[Table, CreditedRows, Tensor]:
    """Three arms in proportion to their chances: means over rows are expectations."""
    table, advantage = Table([0.5, 0.3, 0.2]), double([1.0, -0.5, -1.75])
    arm = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    action = nn.functional.one_hot(arm, 3).double()
    nothing = torch.zeros(10, dtype=torch.float64)
    obs = nothing[:, None]
    return table, CreditedRows(obs, action, table(obs).logp(action).detach(), advantage[arm], nothing, nothing), advantage


def test_a_natural_step_on_a_table_is_a_mirror_step() -> None:
    table, batch, advantage = bandit()
    old = Categorical(table.logits.detach().expand(10, -1))
    (gradient,) = torch.autograd.grad(total(TRPO().policy_loss(batch, table(batch.obs), old, 0.0)), table.logits)
    close(gradient, [0.5, -0.15, -0.35])
    direction = conjugate_gradient(curvature(table, batch, old, 0.0), gradient, 10)
    chances = double([0.5, 0.3, 0.2])
    for size in (0.1, 0.5, 1.0):
        close(torch.softmax(table.logits.detach() + size * direction, 0), surrogates.mirror_step(chances, advantage, size))


def test_trust_regions_hold_and_a_failed_search_changes_nothing() -> None:
    for method, searched in ((TRPO(), True), (NPG, False)):
        trainer, batch = collected(method)
        with torch.no_grad():
            old = trainer.policy(batch.obs)
        before = copy.deepcopy(trainer.policy.state_dict())
        told = method.improve(trainer.policy, batch, old, 0.0)
        with torch.no_grad():
            new = trainer.policy(batch.obs)
        apart, gain = (
            float(old.kl(new).mean()),
            float((batch.advantage * (new.logp(batch.action) - batch.logp_behavior).exp()).mean()),
        )
        assert told["accepted"] == 1
        assert 0.002 < apart < (0.01 if searched else 0.02)
        assert gain > float(batch.advantage.mean())
        trainer.policy.load_state_dict(before)
        elsewhere = DiagonalGaussian(old.mean + 1, old.log_std)  # so far away already that no step is near enough
        told = replace(method, backtracks=4).improve(trainer.policy, batch, elsewhere, 0.0)
        assert told == {"searched": 4.0, "accepted": 0.0}
        for name, value in trainer.policy.state_dict().items():
            assert torch.equal(value, before[name])


# 11: SAC


def learner_of(method: SAC, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    nets = method.networks(Sizes(3, 2, 16, 1))
    return Learner(nets, {name: copy.deepcopy(nets[name]) for name in method.lagged()})


def transitions(n: int = 32) -> Transitions:
    draw = torch.Generator().manual_seed(5)
    random = [torch.randn((n, size), generator=draw) for size in (3, 2, 1, 3)]
    return Transitions(
        random[0], torch.tanh(random[1]), random[2][:, 0], random[3], (torch.arange(n) % 4 == 0).float(), torch.zeros(n)
    )


def again() -> Drawn:
    return Drawn(torch.Generator().manual_seed(9))


@pytest.mark.parametrize("price", [1e-12, 0.3])  # without a price of entropy the backup is that of twins
def test_the_backup_pays_for_entropy(price: float) -> None:
    method, batch = SAC(temperature=price), transitions()
    learner = learner_of(method)
    with torch.no_grad():
        action, logp = learner.nets["actor"].draw(batch.next_obs, again().normal(32, 2))
        lowest = learner.lagged["critic"](batch.next_obs, action).amin(dim=0) - price * logp
        wanted = batch.reward + 0.99 * (1 - batch.terminated) * lowest
        expected = -((learner.nets["critic"](batch.obs, batch.action) - wanted) ** 2).mean(dim=1).sum()
    close(total(method.critic(learner, batch, again())).detach(), expected, atol=1e-5)


def test_the_price_of_entropy_rests_at_its_target_and_moves_towards_it() -> None:
    batch, slopes = transitions(), dict[tuple[str, float], float]()
    learner = learner_of(SAC())
    with torch.no_grad():
        _, logp = learner.nets["actor"].draw(batch.obs, again().normal(32, 2))
    entropy = float(-logp.mean())
    for form in ("log", "linear"):
        for shift in (0.0, 0.5, -0.5):
            method = SAC(form=form, target_entropy=entropy + shift, temperature=0.5)  # type: ignore[arg-type]
            price = method.networks(Sizes(3, 2, 16, 1))["temperature"]
            loss = method.dual(Learner({**learner.nets, "temperature": price}, {}), batch, again())
            (slope,) = torch.autograd.grad(total(loss), list(price.parameters()))
            slopes[form, shift] = float(slope)
    close(slopes["log", 0.0], 0.0)
    close(slopes["log", 0.5], 0.5)  # too little entropy: its price rises
    close(slopes["log", -0.5], -0.5)
    close(slopes["linear", 0.5], 0.5 * 0.5)  # a factor α apart


def test_scaled_rewards_and_a_scaled_price_leave_the_policy() -> None:
    batch, scale, found = transitions(), 7.0, list[Tensor]()
    for factor in (1.0, scale):
        method = SAC(temperature=0.3 * factor)
        learner = learner_of(method)
        body = learner.nets["critic"].members
        with torch.no_grad():
            body.weights[-1] *= factor
            body.biases[-1] *= factor
        value = total(method.actor(learner, batch, again()))
        found.append(flat(torch.autograd.grad(value, list(learner.nets["actor"].parameters()))))
    torch.testing.assert_close(found[1], scale * found[0], rtol=1e-4, atol=1e-6)


# 13: cut and ended


def test_a_cut_is_no_end() -> None:
    method = ControlPPO(discount=0.5, lambda_=1.0)
    trainer = OnlineTrainer(method, Endless(), OnlineSchedule(horizon=2, count=3))
    trainer.value.forward = lambda obs: torch.full(obs.shape[:-1], 2.0)  # type: ignore[method-assign]
    found = trainer.collect()
    assert found.truncated.tolist() == [[False] * 3, [True] * 3]
    assert not found.terminated.any()
    close(method.credit(found)[0], np.zeros((2, 3)))
    wrong, _ = method.credit(replace(found, terminated=found.truncated))
    close(wrong, [[-0.5] * 3, [-1.0] * 3])
    trainer.collect()
    assert trainer.obs.shape == (3, 1)


# the off-policy check: 3 random processes, 20 logs of each


@dataclass(frozen=True)
class Process:
    """10 states, 3 actions, 10 steps: who logged, who is judged, and the latter's values, all exact."""

    transition: Floats
    reward: Floats
    behavior: Floats
    target: Floats
    q: Floats
    """(T, S, A)."""
    v: Floats
    """(T + 1, S), 0 after the last step."""

    @classmethod
    def of(cls, seed: int, states: int = 10, actions: int = 3, horizon: int = 10) -> Process:
        rng = np.random.default_rng(seed)
        transition, reward = rng.dirichlet(np.full(states, 0.3), (states, actions)), rng.uniform(size=(states, actions))
        behavior = rng.dirichlet(np.full(actions, 2.0), states)
        target = 0.5 * behavior + 0.5 * rng.dirichlet(np.full(actions, 0.5), states)
        v, q = np.zeros((horizon + 1, states)), np.zeros((horizon, states, actions))
        for t in reversed(range(horizon)):
            q[t] = reward + 0.95 * transition @ v[t + 1]
            v[t] = (target * q[t]).sum(axis=1)
        return cls(transition, reward, behavior, target, q, v)

    def log(self, n: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        """States (n, T + 1), actions and rewards (n, T)."""
        horizon, states = len(self.q), len(self.reward)
        state = np.empty((n, horizon + 1), dtype=np.int64)
        action = np.empty((n, horizon), dtype=np.int64)
        state[:, 0] = rng.integers(states, size=n)
        for t in range(horizon):
            action[:, t] = (self.behavior[state[:, t]].cumsum(axis=1) < rng.random(n)[:, None]).sum(axis=1).clip(max=2)
            chances = self.transition[state[:, t], action[:, t]].cumsum(axis=1)
            state[:, t + 1] = (chances < rng.random(n)[:, None]).sum(axis=1).clip(max=states - 1)
        return state, action, self.reward[state[:, :-1], action] + 0.3 * rng.normal(size=action.shape)


def traced(process: Process, state: Any, action: Any, reward: Floats, bound: float) -> float:
    """Mean V-trace target of the first step, with values that are a fifth too small."""
    ratio = process.target[state[:, :-1], action] / process.behavior[state[:, :-1], action]
    small = 0.8 * process.v[np.arange(11), state]
    ended = np.zeros(action.shape, dtype=bool)
    ended[:, -1] = True
    found = vtrace(ratio, reward, small[:, :-1], small[:, 1:], ended, np.zeros_like(ended), 0.95, bound, bound)
    return float(found[:, 0].mean())


def test_off_policy_estimators_of_a_policy_of_control() -> None:
    ratios, repeats = list[list[float]](), 20
    for seed in range(3):
        process, rng = Process.of(seed), np.random.default_rng(100 + seed)
        truth, found, traces = float(process.v[0].mean()), list[list[float]](), list[list[float]]()
        for _ in range(repeats):
            state, action, reward = process.log(2000, rng)
            where = (np.arange(10), state[:, :-1])
            data = Trajectories(
                np.log(process.behavior[where[1], action]), reward, np.ones(action.shape, dtype=bool), discount=0.95
            )
            logp = np.log(process.target[where[1], action])
            q, v = process.q[(*where, action)], process.v[:-1][where]
            exact, shrunk = steps_of(data, logp, q, v), steps_of(data, logp, 0.9 * q, 0.9 * v)
            each: list[tuple[Any, Any]] = [(TrajectoryIS(), exact), (PDIS(), exact), (PDWIS(), exact), (SequentialDR(), exact),
                                           (SequentialDR(), shrunk)]  # fmt: skip
            found.append([float(one.value(one.terms(some).mean(axis=0))) for one, some in each])
            traces.append([traced(process, state, action, reward, bound) for bound in (math.inf, 1.0)])
        whole, step, weighted, robust, rough = np.sqrt(((np.array(found) - truth) ** 2).mean(axis=0))
        free, bound = np.array(traces).T - truth
        assert abs(free.mean()) < 4 * free.std(ddof=1) / repeats**0.5
        assert bound.mean() <= -0.2
        assert weighted < step
        ratios.append([step / whole, robust / step, rough / robust])
    per_decision, doubly, shrinking = np.median(ratios, axis=0)
    assert per_decision <= 0.6
    assert doubly <= 0.5
    assert shrinking <= 1.25
