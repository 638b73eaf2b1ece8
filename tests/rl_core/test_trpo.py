"""TRPO's search along a step: what it accepts, and what it leaves untouched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl_core.loss import total
from rl_core.methods import trpo
from rl_core.methods.trpo import TRPO
from rl_core.models.distributions import Categorical
from tests.rl_core.test_control_common import bandit, double

torch.set_num_threads(1)

natural = trpo.natural_step


def searched(
    method: TRPO, step: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, sign: float = 1.0
) -> tuple[dict[str, float], Tensor, Tensor]:
    """What a search along some step tells, and the table's logits before and after it. Advantages times a sign."""
    table, batch, _ = bandit()
    batch = replace(batch, advantage=sign * batch.advantage)
    before = table.logits.detach().clone()
    monkeypatch.setattr(trpo, "natural_step", step)
    told = method.improve(table, batch, Categorical(before.expand(10, -1)), 0.0)
    return dict(told), before, table.logits.detach()


def measured(before: Tensor, after: Tensor) -> tuple[float, float]:
    """KL(old‖new), and how much the surrogate rose."""
    _, batch, _ = bandit()
    old, new = (Categorical(one.expand(10, -1)) for one in (before, after))
    rise = [float(total(TRPO().policy_loss(batch, one, old, 0.0))) for one in (old, new)]
    return float(old.kl(new).mean()), rise[1] - rise[0]


def test_a_step_that_is_near_and_goes_down_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list[Tensor]()

    def reversed_step(*given: object) -> Tensor:
        steps.append(-0.5 * natural(*given))  # type: ignore[arg-type, operator]
        return steps[-1]

    told, before, after = searched(TRPO(damping=0.0, backtracks=6), reversed_step, monkeypatch)
    assert told == {"searched": 6.0, "accepted": 0.0}
    assert torch.equal(after, before)
    for tried in range(7):
        apart, rise = measured(before, before + 0.5**tried * steps[0])
        assert apart <= 0.01
        assert rise < 0


def test_a_step_that_changes_nothing_is_no_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    told, before, after = searched(TRPO(backtracks=2), lambda gradient, *rest: torch.zeros_like(gradient), monkeypatch)
    assert told == {"searched": 2.0, "accepted": 0.0}
    assert torch.equal(after, before)


@pytest.mark.parametrize("backtrack", [0.5, 0.8])
def test_a_step_that_is_too_long_is_shortened_until_it_is_near(backtrack: float, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list[Tensor]()

    def long_step(*given: object) -> Tensor:
        steps.append(6 * natural(*given))  # type: ignore[arg-type, operator]
        return steps[-1]

    method = TRPO(damping=0.0, backtrack=backtrack, backtracks=20)
    told, before, after = searched(method, long_step, monkeypatch)
    tries = [measured(before, before + backtrack**tried * steps[0]) for tried in range(21)]
    first = next(place for place, (apart, _) in enumerate(tries) if apart <= 0.01)
    assert first > 1
    assert all(rise > 0 for _, rise in tries)
    assert told == {"searched": float(first), "accepted": 1.0}
    assert torch.equal(after, before + backtrack**first * steps[0])
    short, _, same = searched(replace(method, backtracks=first - 1), long_step, monkeypatch)
    assert short == {"searched": float(first - 1), "accepted": 0.0}
    assert torch.equal(same, before)


@pytest.mark.parametrize(("move", "sign", "accepted"), [([1.0, -0.2, -0.8], 1.0, 0.0), ([0.0, 0.0, 1.0], -1.0, 1.0)])
def test_what_is_bounded_is_the_distance_from_the_old_policy(
    move: Sequence[float], sign: float, accepted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """delta lies between KL(old‖new) and KL(new‖old) of a step that rises: which one counts decides."""
    table, _, _ = bandit()
    old = table.logits.detach()
    apart, rise = measured(old, old + double(move))
    other = float(Categorical(old + double(move)).kl(Categorical(old)))
    assert sign * rise > 0
    assert (apart < other) == bool(accepted)
    method = TRPO(delta=(apart + other) / 2, backtracks=1, backtrack=0.0)
    told, before, after = searched(method, lambda *_: double(move), monkeypatch, sign)
    assert told["accepted"] == accepted
    assert torch.equal(after, before + double(move) if accepted else before)
