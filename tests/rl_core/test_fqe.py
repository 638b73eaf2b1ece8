"""FQE: exact where the truth is a table, calibrated on the pendulum as its page says, an alarm where data support nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ope.data import InputError
from rl_core.families.offline import Draw, Transitions
from rl_core.fqe import ALARM, FQE, counts, paired, resampled
from rl_core.verify.fitted import ERROR, Target, fitted, logged, starts, truth


def cycle(*, terminated: float, truncated: float) -> Transitions:
    """A state that leads to itself, with a reward of -1."""
    rows = 64
    ones = torch.ones(rows)
    return Transitions(torch.zeros(rows, 1), torch.zeros(rows, 1), -ones, torch.zeros(rows, 1), terminated * ones, truncated * ones)


def still(obs: Tensor, draw: Draw) -> Tensor:
    return torch.zeros(len(obs), 1)


@pytest.mark.parametrize(("terminated", "truncated", "value"), [(1.0, 0.0, -1.0), (0.0, 1.0, -5.0), (0.0, 0.0, -5.0)])
def test_an_end_ends_values_and_a_cut_does_not(terminated: float, truncated: float, value: float) -> None:
    settings = FQE(discount=0.8, steps=600, batch=16, width=8, rate=1e-2)
    one = settings.fit(cycle(terminated=terminated, truncated=truncated), still)
    assert one.values(torch.zeros(1, 1))[0] == pytest.approx(value, abs=0.02)


TO_THE_RIGHT = torch.tensor([0.9, 0.2, 0.6, 0.3])
"""How likely the chain's policy is to take +0.8 in each state; else it takes -0.8."""
EARNED = torch.tensor([[1.0, -1.0], [0.0, 2.0], [0.0, 0.5], [-2.0, 3.0]])
"""In each state, by a step to the right and one to the left."""


def chain() -> Transitions:
    """Four states in a ring, one-hot, and each of two actions once: its sign says where it goes."""
    state, way = torch.arange(4).repeat_interleave(2), torch.tensor([1, -1]).repeat(4)
    following = torch.eye(4)[(state + way) % 4]
    return Transitions(torch.eye(4)[state], 0.8 * way[:, None].float(), EARNED.flatten(), following, torch.zeros(8), torch.zeros(8))


def wavering(obs: Tensor, draw: Draw) -> Tensor:
    return torch.where(draw.uniform(len(obs)) < obs @ TO_THE_RIGHT, 0.8, -0.8)[:, None]


def test_a_chains_values_are_those_of_its_linear_equations() -> None:
    """(I - γP_π)⁻¹r. Fits of five seeds are off by up to 0.08; with logged actions, or those drawn once, by more than 1."""
    chance = np.stack((TO_THE_RIGHT.numpy(), 1 - TO_THE_RIGHT.numpy()), axis=1).astype(float)
    moves = np.eye(4)[(np.arange(4)[:, None] + [1, -1]) % 4]
    true = np.linalg.solve(np.eye(4) - 0.7 * np.einsum("sw,swt->st", chance, moves), (chance * EARNED.numpy()).sum(axis=1))
    settings = FQE(discount=0.7, steps=2500, batch=512, width=16, layers=1, rate=1e-3, tau=0.01)
    one = settings.fit(chain(), wavering)
    assert settings.reach > 0.9998
    np.testing.assert_allclose(one.values(torch.eye(4), draws=2000), true, rtol=0, atol=0.1)
    for place, way in enumerate((1.0, -1.0)):
        first = replace(one, policy=lambda obs, draw, way=way: torch.full((len(obs), 1), 0.8 * way))
        wanted = EARNED.numpy()[:, place] + 0.7 * moves[:, place] @ true
        np.testing.assert_allclose(first.values(torch.eye(4), draws=1), wanted, rtol=0, atol=0.1)


def test_the_policy_is_asked_anew_at_every_step_for_what_follows_unscaled() -> None:
    noise, asked = list[Tensor](), list[Tensor]()

    def spied(obs: Tensor, draw: Draw) -> Tensor:
        noise.append(draw.uniform(len(obs)))
        asked.append(obs)
        return noise[-1][:, None]

    data = replace(chain(), next_obs=chain().next_obs + 5 * torch.arange(8)[:, None])
    one = FQE(steps=4, batch=16, width=4, layers=1).fit(data, spied)
    assert [len(some) for some in noise] == [16] * 4
    assert len({tuple(some.tolist()) for some in noise}) == 4
    rows = {tuple(row) for row in data.next_obs.tolist()}
    assert {tuple(row) for row in torch.cat(asked).tolist()} == rows
    one.values(torch.eye(4), draws=3)
    assert len({tuple(some.tolist()) for some in noise[4:]}) == 3


def test_too_few_backups_cover_a_part_of_the_horizon() -> None:
    """K = tau·steps backups from 0 of a reward of -1: 0.70245 of the limit after 60, 0.99767 after 300."""
    assert FQE(discount=0.98, tau=0.01, steps=6000).reach == pytest.approx(0.70245, abs=5e-6)
    assert FQE(discount=0.98, tau=0.05, steps=6000).reach == pytest.approx(0.99767, abs=5e-6)
    short = FQE(discount=0.98, tau=0.1, steps=150, batch=16, width=8, rate=1e-2)
    found = short.fit(cycle(terminated=0, truncated=0), still).values(torch.zeros(1, 1))[0]
    assert found == pytest.approx(-50 * short.reach, rel=0.1)


REACHING = FQE(discount=0.98, steps=4000, batch=128)
"""Less than the page has: `propel rl verify td3` has all of it, and more policies."""


def test_values_are_right_where_data_are_mixed_and_no_alarm_is_raised() -> None:
    one = fitted("pend-eps60", 0.2, REACHING)
    values = one.values(starts())
    assert abs(values.mean() - truth(0.2)) <= ERROR
    assert one.impossible(values) <= ALARM


def test_uniform_data_raise_the_alarm_of_an_expert() -> None:
    data = logged("pend-rand")
    good, poor = REACHING.fit(data, Target(0.0)), REACHING.fit(data, Target(1.0))
    assert good.impossible(good.values(starts())) > ALARM
    assert poor.impossible(poor.values(starts())) <= ALARM
    assert good.values(starts()).mean() > poor.values(starts()).mean() + 10  # the number alone would promote
    several = [[replace(one, settings=replace(one.settings, seed=seed), episodes=100) for seed in range(3)] for one in (good, poor)]
    found = paired(several[0], several[1], starts())
    assert not found.promotes
    assert "candidate" in found.reasons[0]
    assert "rewards do not allow" in found.reasons[0]


QUICK = FQE(discount=0.9, steps=400, batch=64, width=32, tau=0.2, rate=3e-3)


def test_a_pair_is_compared_from_the_same_starts_over_several_fits() -> None:
    data = logged("pend-eps60")
    good, poor = (QUICK.fits(data, Target(share), 4) for share in (0.2, 1.0))
    found = paired(good, poor, starts())
    apart = np.stack([one.values(starts()) - other.values(starts()) for one, other in zip(good, poor, strict=True)])
    assert found.difference == pytest.approx(apart.mean())
    expected = 100 / 99 * apart.mean(axis=1).var(ddof=1) + apart.mean(axis=0).var(ddof=1) / 400
    assert found.stderr == pytest.approx(expected**0.5)
    assert found.promotes, found
    assert not paired(poor, good, starts()).promotes


def test_fits_are_of_episodes_drawn_anew() -> None:
    data = logged("pend-eps60")
    one, other, again = (resampled(data, seed) for seed in (0, 1, 0))
    assert torch.equal(one.obs, again.obs)
    assert not torch.equal(one.obs, other.obs)
    whole = {tuple(row) for row in data.obs[::200].tolist()}
    begun = [tuple(row) for row in one.obs[::200].tolist()]
    assert len(one) == len(data)  # all have 200 steps
    assert set(begun) <= whole
    assert 50 < len(set(begun)) < 75  # of 100: 63 are expected
    assert torch.equal(one.next_obs[:199], one.obs[1:200])
    uneven = data.rows(slice(150, 4060))  # episodes of 50 steps, 19 of 200, and 60 that were not finished
    assert counts(uneven).tolist() == [50, *[200] * 19, 60]
    drawn = resampled(uneven, 3)
    places = {tuple(row): place for place, row in enumerate(uneven.obs.tolist())}
    order = torch.tensor([places[tuple(row)] for row in drawn.obs.tolist()])
    whole = [(int(start), int(stop)) for start, stop in zip(*edges(order), strict=True)]
    ends = np.cumsum([0, *counts(uneven).tolist()]).tolist()
    assert len(whole) == 21
    assert set(whole) <= set(pairwise(ends))
    with pytest.raises(InputError, match="found 19 episodes; expected at least 20"):
        resampled(data.rows(slice(3800)), 0)


def edges(order: Tensor) -> tuple[Tensor, Tensor]:
    """Of places of rows: where every stretch of consecutive ones begins and ends."""
    jump = (order[1:] != order[:-1] + 1).nonzero()[:, 0] + 1
    starts_ = torch.cat((torch.zeros(1, dtype=torch.long), jump))
    stops = torch.cat((jump, torch.tensor([len(order)]))) - 1
    return order[starts_], order[stops] + 1


def test_bounds_are_of_all_rewards_and_fits_of_whole_data_are_no_comparison() -> None:
    rare = decisions(0, 60)
    rare = replace(rare, reward=(torch.arange(60) == 7).float())
    fits = FQE(discount=0.0, steps=2, batch=8, width=4).fits(rare, still, 5)
    assert any(float(resampled(rare, seed).reward.max()) == 0 for seed in range(5))
    assert {one.highest for one in fits} == {1.0}
    plain = [FQE(discount=0.0, steps=2, batch=8, width=4, seed=seed).fit(rare, still) for seed in range(5)]
    with pytest.raises(InputError, match=r"expected those of FQE\.fits"):
        paired(plain, plain, rare.obs)


def decisions(seed: int, rows: int = 200) -> Transitions:
    """Episodes of one step: what an action earns is noise of deviation 1 around a function of the observation alone."""
    rng = np.random.default_rng(seed)
    obs, action = rng.normal(size=(rows, 1)), rng.uniform(-1, 1, (rows, 1))
    reward = np.sin(2 * obs[:, 0]) + rng.normal(size=rows)
    columns = (obs, action, reward, obs, np.ones(rows), np.zeros(rows))
    return Transitions(*(torch.as_tensor(one, dtype=torch.float32) for one in columns))


def test_noise_of_a_log_promotes_nobody() -> None:
    """A/A over 24 logs: two policies that earn the same. One-sided at 5 %, one is expected; 5 or more have a chance of 0.6 %.

    By the error of a mean over fits, which leaves out that all are of one log, it is a quarter of them and more.
    """
    promoted, narrow = 0, 0
    for seed in range(24):
        data = decisions(seed)
        settings = FQE(discount=0.0, steps=100, batch=32, width=8, tau=1.0, rate=1e-2, seed=10 * seed)
        sides = [settings.fits(data, lambda obs, draw, at=at: torch.full((len(obs), 1), at), 5) for at in (0.5, -0.5)]  # type: ignore[misc]
        found = paired(sides[0], sides[1], data.obs)
        promoted += found.low > 0
        one, other = (np.stack([fit.values(data.obs) for fit in side]).mean(axis=1) for side in sides)
        narrow += (one - other).mean() > 2.13 * (one - other).std(ddof=1) / 5**0.5
    assert promoted < 5, promoted
    assert narrow >= 5, narrow


def test_a_fit_is_the_same_again_and_settings_that_cannot_be_are_refused() -> None:
    data = cycle(terminated=1, truncated=0)
    one, other = (FQE(steps=20, batch=8, width=8).fit(data, still) for _ in range(2))
    np.testing.assert_array_equal(one.values(torch.zeros(3, 1)), other.values(torch.zeros(3, 1)))
    for changes in ({"discount": 1.0}, {"tau": 0.0}):
        with pytest.raises(InputError, match="expected discount in"):
            FQE(**changes)
    with pytest.raises(InputError, match=r"fits of seeds \[0, 0, 0\]"):
        paired([one] * 3, [other] * 3, torch.zeros(3, 1))
    with pytest.raises(InputError, match="different settings or data"):
        paired([one] * 3, [FQE(steps=21, batch=8, width=8).fit(data, still)] * 3, torch.zeros(3, 1))
    more = replace(data, reward=2 * data.reward)
    with pytest.raises(InputError, match="different settings or data"):
        paired([one] * 3, [FQE(steps=20, batch=8, width=8).fit(more, still)] * 3, torch.zeros(3, 1))
    with pytest.raises(InputError, match="found 3 and 3 fits, 1 starts"):
        paired([one] * 3, [other] * 3, torch.zeros(1, 1))
    with pytest.raises(InputError, match="found 1 and 1 fits"):
        paired([one], [other], torch.zeros(3, 1))
    with pytest.raises(InputError, match="steps: found 0; expected at least 1"):
        FQE(steps=0)
