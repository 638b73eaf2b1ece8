"""MDPO: the closed form of a mirror step, the surrogate that climbs to it, its variant from replay, and its experiment."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ope.data import InputError
from ope.primitives import divergences
from ope.primitives.surrogates import mirror_step
from rl_core.buffers import UNKNOWN
from rl_core.envs.pendulum import Pendulum
from rl_core.envs.probes import KINDS, Kind
from rl_core.families.offline import Drawn, Learner
from rl_core.families.online import CreditedRows, Plan
from rl_core.loss import total
from rl_core.methods.mdpo import MDPO, OffPolicyMDPO
from rl_core.methods.sac import SAC
from rl_core.methods.trpo import TRPO, flat
from rl_core.models.distributions import Categorical, DiagonalGaussian
from rl_core.models.mlp import Sizes, squashed_logp
from rl_core.trainers.offline import OfflineSchedule, OfflineTrainer
from rl_core.trainers.online import OnlineSchedule, OnlineTrainer, ReplaySchedule, ReplayTrainer
from rl_core.verify import mirror
from tests.rl_core.offline_methods import best
from tests.rl_core.test_control_common import again, transitions
from tests.rl_core.test_online import replay_trainer, replayed, round_trip, same, solved

torch.set_num_threads(1)
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
double = partial(torch.tensor, dtype=torch.float64)
CHANCES, ADVANTAGE = [0.5, 0.3, 0.2], [1.0, -0.5, -1.75]
ARMS = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # in proportion to their chances: means over rows are expectations
PAGE = {
    1.0: ([0.862478, 0.115467, 0.022055], 0.311352, 0.454798),
    0.5: ([0.722253, 0.204701, 0.073046], 0.113804, 0.264464),
    0.1: ([0.549374, 0.283710, 0.166916], 0.005713, 0.058287),
}


def bandit(advantage: Sequence[float] = ADVANTAGE) -> tuple[CreditedRows, Categorical]:
    """Ten rows of the page's bandit, and who drew them."""
    old = Categorical(double(CHANCES).log().expand(10, 3))
    action, nothing = nn.functional.one_hot(ARMS, 3).double(), torch.zeros(10, dtype=torch.float64)
    return CreditedRows(nothing[:, None], action, old.logp(action), double(advantage)[ARMS], nothing, nothing), old


def climbed(method: Any, steps: int, rate: float, progress: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits after plain gradient steps on a method's loss."""
    batch, old = bandit()
    batch = CreditedRows(*(one.to(dtype) for one in vars(batch).values()))
    old, logits = Categorical(old.logits.to(dtype)), double(CHANCES).log().to(dtype).requires_grad_()
    for _ in range(steps):
        value = total(method.policy_loss(batch, Categorical(logits.expand(10, 3)), old, progress))
        (slope,) = torch.autograd.grad(value, logits)
        logits = (logits + rate * slope).detach().requires_grad_()
    return logits.detach()


# 1: the closed form


@pytest.mark.parametrize("step", PAGE)
def test_closed_form(step: float) -> None:
    chances, apart, best = PAGE[step]
    old, advantage = np.array(CHANCES), np.array(ADVANTAGE)
    found = mirror_step(old, advantage, step)
    close(found, chances)
    close(divergences.kl(found, old), apart)
    close(found @ advantage - divergences.kl(found, old) / step, best)
    close(math.log(old @ np.exp(step * advantage)) / step, best)


# 2, 3: gradients, and where they lead


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.9, 1.0])
def test_the_first_gradient_does_not_know_the_distance(progress: float) -> None:
    batch, old = bandit()
    logits = double(CHANCES).log().requires_grad_()
    value = total(MDPO().policy_loss(batch, Categorical(logits.expand(10, 3)), old, progress))
    close(torch.autograd.grad(value, logits)[0], [0.5, -0.15, -0.35])


def test_steps_climb_to_the_closed_form() -> None:
    wanted = mirror_step(double(CHANCES), double(ADVANTAGE), 1.0)
    for steps, apart in ((0, None), (1, 0.279464), (10, 0.019713), (100, 0.000175)):
        found = torch.softmax(climbed(MDPO(), steps, 0.5), 0)
        distance = divergences.kl(found, wanted)
        close(distance, 0.454798 if apart is None else apart)


# 4: one step


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.99])
def test_one_step_is_a_policy_gradient(progress: float) -> None:
    for dtype, within in ((torch.float32, 1e-6), (torch.float64, 1e-9)):
        ours, plain = (climbed(method, 1, 0.5, progress, dtype) for method in (MDPO(), TRPO()))  # TRPO's loss is the ratio alone
        np.testing.assert_allclose(ours, plain, rtol=0, atol=within)
    assert not torch.allclose(climbed(MDPO(), 2, 0.5, progress), climbed(TRPO(), 2, 0.5, progress), atol=1e-3)


# 5, 6, 9: laws of the closed form


def test_three_points() -> None:
    rng = np.random.default_rng(0)
    for step in (0.1, 1.0, 3.0):
        old, policy = rng.dirichlet(np.ones(4), 50), rng.dirichlet(np.ones(4), 50)
        advantage = rng.normal(size=(50, 4))
        new, kl = mirror_step(old, advantage, step), divergences.kl
        gain = (advantage * (policy - new)).sum(axis=1)
        np.testing.assert_allclose(gain, (kl(policy, old) - kl(policy, new) - kl(new, old)) / step, rtol=0, atol=1e-10)


def test_limits_of_the_step() -> None:
    old, advantage = np.array([0.5, 0.3, 0.0, 0.2]), np.array([1.0, 1.5, 9.0, -2.0])
    np.testing.assert_allclose(mirror_step(old, advantage, 1e-12), old, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(mirror_step(old, advantage, 1e4), [0.0, 1.0, 0.0, 0.0])
    assert mirror_step(old, advantage, 1.0)[2] == 0
    np.testing.assert_allclose(mirror_step(old, advantage + 5, 0.7), mirror_step(old, advantage, 0.7), rtol=1e-12)


def test_a_constant_moves_the_sampled_surrogate() -> None:
    (batch, old), (shifted, _) = bandit(), bandit([2.0, 0.5, -0.75])
    batch, shifted = (one.rows([0, 0, 1, 2]) for one in (batch, shifted))  # not in proportion: ratios do not add to one
    slopes = []
    for one in (batch, shifted):
        logits = double([0.3, 0.1, -0.2]).requires_grad_()
        value = total(MDPO().policy_loss(one, Categorical(logits.expand(4, 3)), old.rows(slice(4)), 0.0))
        slopes.append(torch.autograd.grad(value, logits)[0])
    assert not torch.allclose(slopes[0], slopes[1], atol=1e-2)
    torch.testing.assert_close(batch.standardised().advantage, shifted.standardised().advantage)


# 7: from replay


def learner_of(method: OffPolicyMDPO | SAC) -> Learner:
    torch.manual_seed(3)
    nets = {"critic": SAC().networks(Sizes(3, 2, 16, 1))["critic"]}  # one critic and one actor for both
    nets["actor"] = SAC().networks(Sizes(3, 2, 16, 1))["actor"]
    nets |= {name: net for name, net in method.networks(Sizes(3, 2, 16, 1)).items() if name not in nets}
    lagged = {name: copy.deepcopy(nets[name]) for name in method.lagged()}
    if "actor" in lagged:  # a policy of long ago
        with torch.no_grad():
            for weight in lagged["actor"].parameters():
                weight += 0.3
    return Learner(nets, lagged)


def actor_gradient(method: Any) -> tuple[Tensor, Tensor]:
    learner = learner_of(method)
    learner.nets["critic"].members.weights[-1].data[1] = learner.nets["critic"].members.weights[-1].data[0]
    for part in (learner.nets["critic"].members.weights, learner.nets["critic"].members.biases):
        for weight in part:
            weight.data[1] = weight.data[0]  # twins that agree: SAC takes the lower, MDPO the first
    value = total(method.actor(learner, transitions(), again()))
    return value.detach(), flat(torch.autograd.grad(value, list(learner.nets["actor"].parameters())))


def test_with_equal_weights_it_is_sac() -> None:
    (ours, slope), (theirs, expected) = (
        actor_gradient(method) for method in (OffPolicyMDPO(kl_coef=0.2, entropy_coef=0.2, penalty=0.0), SAC(temperature=0.2))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)
    other, _ = actor_gradient(OffPolicyMDPO(kl_coef=1.0, entropy_coef=0.2, penalty=0.0))
    assert abs(float(other - theirs)) > 0.1


@pytest.mark.parametrize("entropy", [0.0, 0.2])
def test_the_distance_is_to_the_lagged_policy_and_the_bonus_is_linear_there(entropy: float) -> None:
    method, batch = OffPolicyMDPO(kl_coef=0.7, entropy_coef=entropy, penalty=0.0), transitions()
    learner = learner_of(method)
    with torch.no_grad():
        mean, log_std = learner.nets["actor"].ends(batch.obs)
        before = mean + log_std.exp() * again().normal(32, 2)
        logp, old = (squashed_logp(before, *actor.ends(batch.obs)) for actor in (learner.nets["actor"], learner.lagged["actor"]))
        value = learner.nets["critic"](batch.obs, torch.tanh(before))[0]  # the first critic's, which is not always the lower
        expected = (value - 0.7 * (logp - old) - entropy * old).mean()
    close(total(method.actor(learner, batch, again())).detach(), expected)


@pytest.mark.parametrize("entropy", [0.0, 0.2])
def test_the_best_of_choices_in_closed_form(entropy: float) -> None:
    # the loss of the off-policy variant, every choice enumerated: its gradient is 0 at π_k^(1 - λt)·exp(tQ) / Z
    old, q, coef = double(CHANCES), double([0.4, -0.3, 0.9]), 0.7
    wanted = mirror_step(old ** (1 - entropy / coef), q, 1 / coef)
    if entropy == 0:
        close(wanted, mirror_step(old, q, 1 / coef))
    logits = wanted.log().requires_grad_()
    new = torch.softmax(logits, 0)
    value = (new * (q - coef * new.log() - (entropy - coef) * old.log())).sum()
    close(torch.autograd.grad(value, logits)[0], np.zeros(3), atol=1e-10)


@pytest.mark.parametrize(("step", "progress", "size"), [(1.0, 0.0, 1.0), (1.0, 0.75, 0.25), (3.0, 0.5, 1.5), (0.1, 0.0, 0.1)])
def test_the_best_table_for_the_methods_own_loss_is_the_closed_form(step: float, progress: float, size: float) -> None:
    """Each of 4 choices in 3 contexts is one row, its advantage times 4 chances: means over the 12 rows are expectations."""
    rng = np.random.default_rng(2)
    chances, advantage = double(rng.dirichlet(np.ones(4), 3)), double(rng.normal(size=(3, 4)))
    old, action = Categorical(chances.log().repeat_interleave(4, 0)), torch.eye(4, dtype=torch.float64).repeat(3, 1)
    nothing = torch.zeros(12, dtype=torch.float64)
    weighed = (4 * chances * advantage).flatten()
    batch = CreditedRows(nothing[:, None], action, old.logp(action), weighed, nothing, nothing)
    logits = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    method = MDPO(step=step)
    best(lambda: total(method.policy_loss(batch, Categorical(logits.repeat_interleave(4, 0)), old, progress)), logits)
    found, wanted = torch.softmax(logits.detach(), -1), mirror_step(chances, advantage, size)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (found - chances).abs().max() > 0.01


class Ends(nn.Module):
    """A squashed normal, the same everywhere."""

    def __init__(self, mean: float, log_std: float) -> None:
        super().__init__()
        self.mean, self.log_std = (nn.Parameter(double([one])) for one in (mean, log_std))

    def ends(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean.expand(len(obs), 1), self.log_std.expand(len(obs), 1)


@pytest.mark.parametrize("coef", [0.5, 2.0])
def test_the_best_normal_for_the_replayed_loss_is_the_closed_form(coef: float) -> None:
    """Q = 1.2u - 0.4u² of u before tanh makes π_k·exp(tQ)/Z a squashed normal, and noise of ±1 makes means exact."""
    method = OffPolicyMDPO(kl_coef=coef, entropy_coef=0.0, penalty=0.0)
    old, new = Ends(-0.3, -0.6), Ends(0.4, 0.1)

    class Quadratic:
        def first(self, obs: Tensor, action: Tensor) -> Tensor:
            before = torch.atanh(action[:, 0])
            return 1.2 * before - 0.4 * before**2

    class Both:
        def normal(self, *shape: int) -> Tensor:
            assert shape == (2, 1)
            return double([[1.0], [-1.0]])

        uniform = normal

    batch = transitions(2)
    parts = Learner({"actor": new, "critic": Quadratic()}, {"actor": old})
    best(lambda: total(method.actor(parts, batch, Both())), *new.parameters())
    precision = math.exp(1.2) + 0.8 / coef
    close(new.mean.detach(), (-0.3 * math.exp(1.2) + 1.2 / coef) / precision)
    close(new.log_std.detach(), -0.5 * math.log(precision))


def test_penalty_and_values() -> None:
    method, batch = OffPolicyMDPO(), transitions()
    learner = learner_of(method)
    mean, log_std = learner.nets["actor"].ends(batch.obs)
    expected = 1e-3 * float(((mean**2).mean() + (log_std**2).mean()).detach())
    with_, without = (total(one.actor(learner, batch, again())) for one in (method, replace(method, penalty=0.0)))
    close(float((without - with_).detach()), expected)
    with torch.no_grad():
        action, logp = learner.nets["actor"].draw(batch.obs, again().normal(32, 2))
        soft = learner.nets["critic"](batch.obs, action).amin(dim=0) - 0.2 * logp
        wanted = batch.reward + 0.99 * (1 - batch.terminated) * learner.lagged["value"](batch.next_obs)
        errors = [(learner.nets["critic"](batch.obs, batch.action) - wanted) ** 2, (learner.nets["value"](batch.obs) - soft) ** 2]
        loss = 0.5 * sum(one.mean(dim=-1).sum() for one in errors)
    close(float(total(method.critics(learner, batch, again())).detach()), -float(loss))


def test_the_policy_it_is_held_to_is_a_copy_made_anew_at_its_own_pace() -> None:
    learning = OfflineSchedule(steps=20, batch=8, width=8, layers=1, normalize=False)
    trainer = OfflineTrainer(OffPolicyMDPO(refresh=3, tau=0.1), transitions(), learning)
    start = copy.deepcopy(trainer.nets.state_dict())

    def lagged(name: str) -> Tensor:
        return flat(tuple(trainer.lagged[name].parameters()))

    def current(name: str) -> Tensor:
        return flat(tuple(trainer.nets[name].parameters())).detach()

    value = lagged("value").clone()
    for step in range(1, 8):
        trainer.advance()
        value = torch.lerp(value, current("value"), 0.1)
        torch.testing.assert_close(lagged("value"), value)
        if step % 3 == 0:
            kept = current("actor").clone()
        if step >= 3:
            assert torch.equal(lagged("actor"), kept)
        else:
            assert torch.equal(
                lagged("actor"), flat(tuple(start[f"actor.{name}"] for name, _ in trainer.lagged["actor"].named_parameters()))
            )
            assert not torch.equal(lagged("actor"), current("actor"))
    assert not lagged("actor").requires_grad


def test_it_collects_by_sampling_or_by_its_mean() -> None:
    learner, obs = learner_of(OffPolicyMDPO()), transitions().obs
    action, logp = OffPolicyMDPO().explore(learner, obs, again())
    torch.testing.assert_close(logp, learner.nets["actor"].logp(obs, action), rtol=1e-3, atol=1e-3)
    action, logp = OffPolicyMDPO(samples=False).explore(learner, obs, again())
    assert torch.equal(action, learner.nets["actor"](obs))
    assert torch.isnan(logp).all()
    assert math.isnan(UNKNOWN)


# 8: KL of normals


def gaussian() -> list[Tensor]:
    return [double(one) for one in ([0.3, -1.0, 0.2], [-0.4, 0.3, 0.0], [0.1, -0.5, 0.9], [0.2, -0.3, 0.5])]


def test_kl_of_normals() -> None:
    mean, log_std, mean_ref, log_std_ref = gaussian()
    assert float(divergences.gaussian_kl(mean, log_std, mean, log_std)) == 0
    found = float(divergences.gaussian_kl(mean, log_std, mean_ref, log_std_ref))
    std, ref = log_std.exp(), log_std_ref.exp()
    close(found, float((torch.log(ref / std) + (std**2 + (mean - mean_ref) ** 2) / (2 * ref**2) - 0.5).sum()), atol=1e-12)
    torch.testing.assert_close(
        torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(mean_ref, ref)).sum(),
        double(found),
    )
    new, old = (
        DiagonalGaussian(m.expand(1_000_000, 3), s.expand(1_000_000, 3)) for m, s in ((mean, log_std), (mean_ref, log_std_ref))
    )
    action = new.sample(Drawn(torch.Generator().manual_seed(0)))
    sampled = new.logp(action) - old.logp(action)
    assert abs(found - float(sampled.mean())) < 3 * float(sampled.std()) / 1000


def test_gradient_of_kl_of_normals() -> None:
    given = [one.requires_grad_() for one in gaussian()]
    slopes = torch.autograd.grad(divergences.gaussian_kl(*given), given)
    for place, slope in enumerate(slopes):
        for k in range(3):
            moved = [[one.detach().clone() for one in given] for _ in range(2)]
            moved[0][place][k] += 1e-5
            moved[1][place][k] -= 1e-5
            high, low = (float(divergences.gaussian_kl(*some)) for some in moved)
            close(float(slope[k]), (high - low) / 2e-5, atol=1e-5)


# step sizes, loops, settings


def test_steps_shrink_in_a_line_and_not_to_nothing() -> None:
    batch, old = bandit()
    new = Categorical(double([[0.1, 0.2, -0.4]]).expand(10, 3))
    apart = float(new.kl(old).mean())
    for method, progress, size in ((MDPO(), 0.0, 1.0), (MDPO(), 0.75, 0.25), (MDPO(), 1.0, 1e-3), (MDPO(step=0.4), 0.5, 0.2)):
        loss = method.policy_loss(batch, new, old, progress)
        close(float(total(loss._replace(terms=loss.terms[1:], weights=loss.weights[1:]))), -apart / size, atol=1e-9 / size)
    with pytest.raises(InputError, match="step_min"):
        MDPO(step_min=0.0)
    with pytest.raises(InputError, match="refresh"):
        OffPolicyMDPO(refresh=0)


def test_one_batch_is_ten_steps_on_all_of_it_and_then_the_values() -> None:
    trainer = OnlineTrainer(MDPO(), Pendulum(steps=50), OnlineSchedule(steps=2048, horizon=64, count=4, width=8))
    told = trainer.advance()
    assert told["updates"] == 10
    assert told["kl_new_old"] > 0
    steps = {float(one["step"]) for one in trainer.optimizer.state_dict()["state"].values()}
    assert steps == {10.0}  # and the value function's: 5 passes over 256 rows by 128
    trainer.method = replace(MDPO(), plan=replace(MDPO().plan, value_minibatch=64))
    trainer.advance()
    assert {float(one["step"]) for one in trainer.optimizer.state_dict()["state"].values()} == {20.0, 30.0}


PROBES = Plan(epochs=10, minibatch=None, value_epochs=4, value_minibatch=128, standardize="batch", rate=3e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("discrete", [False, True], ids=["numbers", "choices"])
def test_it_solves_the_probes(kind: Kind, discrete: bool) -> None:
    solved(MDPO(discount=0.9, value_clip=None, plan=PROBES), kind, discrete, 60 if kind in ("action", "both") else 25)


@pytest.mark.parametrize("kind", KINDS)
def test_it_solves_the_probes_from_replay(kind: Kind) -> None:
    replayed(OffPolicyMDPO(discount=0.9, tau=0.05, rate=3e-3, kl_coef=0.1, entropy_coef=1e-3, refresh=50), kind, 600)


def test_runs_go_on_to_the_bit() -> None:
    def made() -> OnlineTrainer:
        return OnlineTrainer(MDPO(), Pendulum(steps=50), OnlineSchedule(steps=1000, horizon=33, count=3, width=8, normalize=True))

    whole, half, later = made(), made(), made()
    for trainer, batches in ((whole, 4), (half, 2)):
        for _ in range(batches):
            trainer.advance()
    later.restore(half.state())
    for _ in range(2):
        later.advance()
    same(later.state(), whole.state())
    method = OffPolicyMDPO(refresh=5)
    once, first, then = (replay_trainer(method) for _ in range(3))
    once.advance(12)
    first.advance(7)  # its next copy is made at step 15, from what was kept at 10
    then.restore(first.state())
    then.advance(5)
    same(then.state(), once.state())


METHODS = [MDPO(), MDPO(step=0.5, value_clip=None, plan=PROBES), OffPolicyMDPO(), OffPolicyMDPO(samples=False, entropy_coef=0.0)]


@pytest.mark.parametrize("method", METHODS, ids=lambda one: type(one).__name__)
def test_settings_survive_toml_and_say_where_they_are_from(method: Any) -> None:
    round_trip(method)


def test_the_pendulum_from_replay_moves_every_part() -> None:
    learning = OfflineSchedule(steps=20, batch=16, width=8, layers=1, normalize=False)
    trainer = ReplayTrainer(OffPolicyMDPO(refresh=10), Pendulum(), ReplaySchedule(learning, warmup=50, capacity=100))
    start = copy.deepcopy(trainer.learner.nets.state_dict())
    trainer.advance(20)
    told = trainer.metrics()
    assert {"q", "entropy", "kl_new_old", "taken", "cpu_seconds"} <= set(told)
    for name, value in trainer.learner.nets.state_dict().items():
        assert not torch.equal(value, start[name]), name


# the experiment, on two seeds: the page's margins are of twenty (`propel rl verify`)


def test_the_experiment_is_what_its_page_says() -> None:
    worlds = mirror.Worlds.of(2)
    uniform = np.full_like(worlds.reward, 0.25)
    close(worlds.score(uniform), [0.0, 0.0])
    close(worlds.occupancy(uniform).sum(axis=1), [1.0, 1.0])
    close((worlds.advantages(uniform) * uniform).sum(axis=2), np.zeros((2, 20)))
    found = {name: mirror.learned(method, inner, 2) for name, (method, inner) in mirror.ARMS.items() if inner < 50}
    np.testing.assert_allclose(found["MDPO, m=1"], found["PG"], rtol=0, atol=1e-9)
    scores = {name: worlds.score(table) for name, table in found.items()}
    assert (scores["MDPO, m=10"] > scores["PG"] + 0.02).all()
    assert (scores["PG"] > 0.85).all()
