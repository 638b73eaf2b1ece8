"""TD3's step, on which TD3+BC and PRDC stand: whom its target asks, with which noise, and what an end is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_core.families.offline import Learner, OfflineMethod, Stage, Transitions
from rl_core.loss import total
from rl_core.methods.prdc import PRDC
from rl_core.methods.td3 import TD3, Twin, actor, target
from rl_core.methods.td3_bc import TD3BC
from tests.rl_core.offline_methods import Replayed

torch.set_num_threads(1)

TWIN = Twin(discount=0.9, tau=0.25, noise=0.5, noise_clip=0.3, actor_every=3, actor_rate=1e-4, critic_rate=2e-3)
METHODS: dict[str, OfflineMethod] = {"TD3": TD3(TWIN), "TD3BC": TD3BC(twin=TWIN), "PRDC": PRDC(twin=TWIN)}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def known(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# what follows: what the lagged policy does there is written into the observation; noise; and what is done of both
PLANNED = known([0.1, 0.0], [0.1, -0.2], [-0.2, 0.3], [0.9, -0.8], [-0.9, 0.4], [0.0, 0.5])
NOISE = known([0.2, -0.4], [2.0, 0.1], [-3.0, 0.6], [0.4, -0.5], [-1.0, 9.0], [0.0, -0.2])
DONE = known([0.2, -0.2], [0.4, -0.15], [-0.5, 0.6], [1.0, -1.0], [-1.0, 0.7], [0.0, 0.4])
LOWER = known([1.2, 1.2, -0.6, -17.0, -3.2, 6.6])[0]
"""The lower of 10a + 4b + t and 9 - 20a + 12b + 2t of row t: the second one in rows 1 and 3 alone."""
REWARD = known([1.0, 2.0, -3.0, 0.5, 4.0, -1.0])[0]
TERMINATED, TRUNCATED = known([0, 0, 1, 0, 1, 0])[0], known([0, 1, 0, 0, 1, 1])[0]
WANTED = known([2.08, 3.08, -3.0, -14.8, 4.0, 4.94])[0]


class Asked:
    """A stub that remembers what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.kept = answer, list[tuple[Tensor, ...]]()

    def __call__(self, *asked: Tensor) -> Tensor:
        self.kept.append(asked)
        found: Tensor = self.answer(*asked)
        return found


def twins(obs: Tensor, action: Tensor) -> Tensor:
    """What the lagged critics say: known, and each the lower one in some rows."""
    a, b, row = action[:, 0], action[:, 1], obs[:, 2]
    return torch.stack((10 * a + 4 * b + row, 9 - 20 * a + 12 * b + 2 * row))


def batch() -> Transitions:
    """Rows numbered in their observations, which differ from what follows."""
    following = torch.cat((PLANNED, torch.arange(6, dtype=torch.float64)[:, None]), dim=1)
    return Transitions(following + 7, 0.5 * NOISE.clamp(-1, 1), REWARD, following, TERMINATED, TRUNCATED)


def stubs(q: Tensor) -> tuple[Learner, Asked, Asked]:
    """Networks whose answers are known: present critics say q of whatever they are asked, lagged ones are `twins`."""
    present, lagged = Asked(lambda obs, action: q), Asked(twins)
    nets = {"actor": lambda obs: -0.6 * obs[:, :2], "critic": present}
    return Learner(nets, {"actor": lambda obs: obs[:, :2], "critic": lagged}), present, lagged


def test_the_target_is_the_lower_twins_value_of_a_smoothed_action_by_hand() -> None:
    parts, present, lagged = stubs(torch.zeros(2, 6, dtype=torch.float64))
    found = target(parts, batch(), Replayed([NOISE]), TWIN)
    ((obs, action),) = lagged.kept
    torch.testing.assert_close(action, DONE, rtol=0, atol=1e-12)
    assert torch.equal(obs, batch().next_obs)
    assert present.kept == []
    torch.testing.assert_close(found, LOWER, rtol=0, atol=1e-12)
    assert set(twins(obs, DONE).argmin(dim=0).tolist()) == {0, 1}


@EACH
def test_the_critics_are_pulled_to_the_target_by_hand(method: OfflineMethod) -> None:
    """-Σ_j mean (q_j - y)² has the slope -2(q_j - y)/6 in each q_j: it says which y each row has."""
    q = torch.linspace(-2, 3, 12, dtype=torch.float64).reshape(2, 6).requires_grad_()
    parts, present, lagged = stubs(q)
    loss = method.stages()[0].loss(parts, batch(), Replayed([NOISE]))
    value = total(loss)
    (slope,) = torch.autograd.grad(value, q)
    torch.testing.assert_close(q.detach() + 3 * slope, WANTED.expand(2, 6), rtol=0, atol=1e-12)
    torch.testing.assert_close(value.detach(), -((q.detach() - WANTED) ** 2).mean(dim=1).sum(), rtol=1e-12, atol=0)
    (asked,) = present.kept
    assert all(torch.equal(one, wanted) for one, wanted in zip(asked, (batch().obs, batch().action), strict=True))
    assert len(lagged.kept) == 1


@EACH
def test_only_an_end_keeps_the_target_from_what_follows(method: OfflineMethod) -> None:
    never, always = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    q = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    for terminated in (never, always):
        for truncated in (never, always):
            rows = replace(batch(), terminated=terminated, truncated=truncated)
            loss = method.stages()[0].loss(stubs(q)[0], rows, Replayed([NOISE]))
            (slope,) = torch.autograd.grad(total(loss), q)
            wanted = REWARD + (0.9 * LOWER if terminated is never else 0)
            torch.testing.assert_close(3 * slope, wanted.expand(2, 6), rtol=0, atol=1e-12)


@EACH
def test_the_actor_and_all_copies_come_every_so_many_steps(method: OfflineMethod) -> None:
    critic, policy = method.stages()
    assert critic == Stage({"critic": 2e-3}, critic.loss)
    assert policy == Stage({"actor": 1e-4}, policy.loss, every=3, follows=("actor", "critic"))
    assert method.lagged() == ("actor", "critic")
    assert method.tau == 0.25


def test_the_actor_climbs_the_first_present_critic() -> None:
    class First:
        def first(self, obs: Tensor, action: Tensor) -> Tensor:
            return twins(obs, action)[0]

    action = PLANNED.clone().requires_grad_()
    value = total(actor(Learner({"actor": lambda obs: action, "critic": First()}, {}), batch(), Replayed([])))
    torch.testing.assert_close(value.detach(), twins(batch().obs, PLANNED)[0].mean(), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(value, action)
    torch.testing.assert_close(slope, known([10.0, 4.0]).expand(6, 2) / 6, rtol=1e-12, atol=0)
