"""Transitions in memory: what is kept, how often each is drawn, in which shares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Generator

from ope.data import InputError
from rl_core.buffers import Buffer, mixed
from rl_core.families.offline import Transitions


def rows(count: int, first: int = 0) -> Transitions:
    """Of which the reward is the number."""
    number = torch.arange(first, first + count, dtype=torch.float32)
    return Transitions(
        number[:, None].expand(count, 3), -number[:, None].expand(count, 2), number, number[:, None].expand(count, 3) + 0.5,
        (number % 2 == 0).float(), (number % 3 == 0).float(), logp_behavior=-number / 10, policy=number + 100,
    )  # fmt: skip


def filled(count: int, capacity: int | None = None, first: int = 0) -> Buffer:
    made = Buffer(capacity or count, 3, 2)
    made.add(rows(count, first))
    return made


def test_a_row_comes_back_as_it_was() -> None:
    found, expected = filled(10).take(torch.tensor([7, 0, 3])), rows(10).rows(torch.tensor([7, 0, 3]))
    for name in ("obs", "action", "reward", "next_obs", "terminated", "truncated", "logp_behavior", "policy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.row is not None
    assert found.row.tolist() == [7, 0, 3]


def test_who_acted_may_be_unknown() -> None:
    made = Buffer(2, 3, 2)
    made.add(replace(rows(2), logp_behavior=None, policy=None))
    found = made.all()
    assert found.logp_behavior is not None
    assert found.policy is not None
    assert found.logp_behavior.isnan().all()
    assert found.policy.isnan().all()


def test_the_oldest_make_place() -> None:
    made = filled(3, capacity=5)
    made.add(rows(4, first=3))
    assert len(made) == 5
    assert sorted(made.all().reward.tolist()) == [2, 3, 4, 5, 6]


def test_rows_are_drawn_alike_or_by_weight() -> None:
    made, draws = filled(4), 40_000
    plain = torch.bincount(made.draw(draws, Generator().manual_seed(0)), minlength=4) / draws
    weight = torch.tensor([0.0, 1.0, 3.0, 4.0])
    made.weigh(weight)
    weighed = torch.bincount(made.draw(draws, Generator().manual_seed(1)), minlength=4) / draws
    for found, chance in ((plain, torch.full((4,), 0.25)), (weighed, weight / 8)):
        assert ((found - chance).abs() <= 4 * (chance * (1 - chance) / draws).sqrt()).all()
    assert weighed[0] == 0
    made.add(rows(1))  # in the place of the oldest, and to be drawn as often as any
    assert made.weights() is not None
    assert made.weights().tolist() == [4.0, 1.0, 3.0, 4.0]
    made.reweigh(torch.tensor([1, 2]), torch.tensor([0.0, 0.0]))
    assert set(made.draw(1000, Generator().manual_seed(2)).tolist()) == {0, 3}


def test_a_batch_has_fixed_shares_of_several_buffers() -> None:
    logged, fresh = filled(50), filled(50, first=1000)
    found = mixed([(logged, 0.25), (fresh, 0.75)], 64, Generator().manual_seed(0))
    assert int((found.reward < 1000).sum()) == 16
    assert len(found) == 64


def test_a_buffer_goes_on_from_its_state() -> None:
    made = filled(6, capacity=8)
    made.weigh(torch.arange(6.0))
    other = Buffer(8, 3, 2)
    other.restore(made.state())
    one, two = (buffer.draw(20, Generator().manual_seed(3)) for buffer in (made, other))
    assert torch.equal(one, two)
    for buffer in (made, other):
        buffer.add(rows(4, first=50))
    np.testing.assert_array_equal(made.all().reward, other.all().reward)


def test_what_does_not_fit_is_refused() -> None:
    made = filled(4)
    with pytest.raises(InputError, match=r"found 5 transitions of sizes \(3, 2\); expected at most 4"):
        made.add(rows(5))
    for weight in (
        torch.ones(3),
        torch.tensor([1.0, -1.0, 1.0, 1.0]),
        torch.zeros(4),
        torch.full((4,), torch.nan),
        torch.full((4,), torch.inf),
    ):
        with pytest.raises(InputError, match="found weights of shape"):
            made.weigh(weight)
    with pytest.raises(InputError, match="expected a sum of 1"):
        mixed([(made, 0.5)], 8, Generator())
    with pytest.raises(InputError, match="expected a sum of 1"):
        mixed([(made, 0.5), (Buffer(3, 3, 2), 0.5)], 8, Generator())
