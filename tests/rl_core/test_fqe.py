"""FQE: exact where the truth is a table, calibrated on the pendulum as its page says, an alarm where data support nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ope.data import InputError
from rl_core.families.offline import Draw, Transitions
from rl_core.fqe import ALARM, FQE, paired
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
    found = paired([good] * 3, [poor] * 3, starts())
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
    expected = apart.mean(axis=1).var(ddof=1) / 4 + apart.mean(axis=0).var(ddof=1) / 400
    assert found.stderr == pytest.approx(expected**0.5)
    assert found.promotes, found
    assert not paired(poor, good, starts()).promotes


def test_a_policy_is_not_promoted_over_itself() -> None:
    """A/A: 20 comparisons of a policy with itself, fits of other seeds. One-sided at 5 % one is expected; 5 or more: p < 0.003."""
    data = logged("pend-eps60")
    fits = [replace(QUICK, seed=100 + one).fit(data, Target(0.3)) for one in range(24)]
    rng, promoted, alone = np.random.default_rng(0), 0, 0
    for _ in range(20):
        order = rng.permutation(24)
        one, other = ([fits[place] for place in some] for some in (order[:4], order[4:8]))
        promoted += paired(one, other, starts(100)).promotes
        apart = one[0].values(starts(100)) - other[0].values(starts(100))
        alone += apart.mean() > 1.66 * apart.std(ddof=1) / 10
    assert promoted < 5
    assert alone >= 5  # what starts alone would promote


def test_a_fit_is_the_same_again_and_settings_that_cannot_be_are_refused() -> None:
    data = cycle(terminated=1, truncated=0)
    one, other = (FQE(steps=20, batch=8, width=8).fit(data, still) for _ in range(2))
    np.testing.assert_array_equal(one.values(torch.zeros(3, 1)), other.values(torch.zeros(3, 1)))
    for changes in ({"discount": 1.0}, {"tau": 0.0}):
        with pytest.raises(InputError, match="expected discount in"):
            FQE(**changes)
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
