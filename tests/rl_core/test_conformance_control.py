"""What every method that learns from transitions keeps, whatever it maximises."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from rl_core.config import method_from, to_table
from rl_core.exploration import log_density
from rl_core.families.offline import OfflineMethod, Transitions, WithExploration
from rl_core.loss import Loss
from rl_core.methods.prdc import PRDC
from rl_core.methods.sac import SAC
from rl_core.methods.td3_bc import TD3BC
from rl_core.models.mlp import Deterministic
from rl_core.registry import FAMILIES, find
from rl_core.trainers.offline import OfflineSchedule, OfflineTrainer

torch.set_num_threads(1)
ROWS = 24
METHODS: dict[str, Any] = {
    one.__name__: one() for one in (*FAMILIES["offline"], *FAMILIES["online"]) if hasattr(one, "stages")
} | {"PRDC, l2": PRDC(norm="l2"), "SAC, linear": SAC(form="linear")}  # fmt: skip
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Known:
    """Random numbers of a seed, of which every row keeps its own wherever it stands."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.rng = rows, Generator().manual_seed(5)

    def normal(self, *shape: int) -> Tensor:
        """Of (..., rows, A)."""
        return torch.randn((*shape[:-2], ROWS, shape[-1]), generator=self.rng, dtype=torch.float64)[..., self.rows, :]

    def uniform(self, *shape: int) -> Tensor:
        """Of (..., rows, A)."""
        return torch.rand((*shape[:-2], ROWS, shape[-1]), generator=self.rng, dtype=torch.float64)[..., self.rows, :]


def data() -> Transitions:
    rng = Generator().manual_seed(1)
    flags = [(torch.rand(ROWS, generator=rng) < chance).float() for chance in (0.2, 0.1)]
    return Transitions(
        torch.randn(ROWS, 3, generator=rng), torch.rand(ROWS, 2, generator=rng) * 1.8 - 0.9, torch.randn(ROWS, generator=rng),
        torch.randn(ROWS, 3, generator=rng), *flags,
    )  # fmt: skip


def made(method: OfflineMethod) -> OfflineTrainer:
    """In float64, after some steps: no network is as it began."""
    trainer = OfflineTrainer(method, data(), OfflineSchedule(steps=10, batch=ROWS, width=16))
    trainer.advance(3)
    trainer.nets.double()
    trainer.lagged.double()
    trainer.buffer.rows = trainer.buffer.rows.double()
    return trainer


def losses(trainer: OfflineTrainer, rows: Tensor) -> list[Loss]:
    """Of every stage, on some rows."""
    batch = trainer.buffer.take(rows)
    return [stage.stage.loss(trainer.learner, batch, Known(rows)) for stage in trainer.stages]


def value(loss: Loss, dens: list[Tensor]) -> Tensor:
    """Over denominators of a whole."""
    return sum((weight * term.num / den for term, weight, den in zip(loss.terms, loss.weights, dens, strict=True)), torch.zeros(()))


def gradients(trainer: OfflineTrainer, place: int, values: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(values, trainer.stages[place].weights))


@EACH
def test_losses_and_gradients_are_finite_and_there(method: OfflineMethod) -> None:
    trainer = made(method)
    for place, loss in enumerate(losses(trainer, torch.arange(ROWS))):
        dens = [term.den for term in loss.terms]
        found = gradients(trainer, place, value(loss, dens))
        assert all(one.isfinite().all() for one in found)
        assert any(one.any() for one in found)
        assert all(not den.requires_grad for den in dens)
        assert all(not term.num.requires_grad for term in loss.metrics.values())


@EACH
def test_the_order_of_rows_does_not_matter(method: OfflineMethod) -> None:
    trainer = made(method)
    order = torch.randperm(ROWS, generator=Generator().manual_seed(2))
    for one, other in zip(losses(trainer, torch.arange(ROWS)), losses(trainer, order), strict=True):
        for a, b in zip(one.terms, other.terms, strict=True):
            torch.testing.assert_close(a.num, b.num, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(a.den, b.den, rtol=1e-10, atol=1e-10)


@EACH
def test_parts_add_to_the_whole(method: OfflineMethod) -> None:
    """Numerators over the denominators of the whole step: uneven parts have the gradient of the batch."""
    trainer = made(method)
    for place, loss in enumerate(losses(trainer, torch.arange(ROWS))):
        dens = [term.den for term in loss.terms]
        whole = gradients(trainer, place, value(loss, dens))
        parts = [losses(trainer, rows)[place] for rows in (torch.arange(5), torch.arange(5, ROWS))]
        for a, b, den in zip(parts[0].terms, parts[1].terms, dens, strict=True):
            torch.testing.assert_close(a.den + b.den, den, rtol=1e-10, atol=1e-10)
        for one, other in zip(whole, gradients(trainer, place, sum(value(part, dens) for part in parts)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@EACH
def test_the_same_seed_gives_the_same_run(method: OfflineMethod) -> None:
    one, other = (OfflineTrainer(method, data(), OfflineSchedule(steps=10, batch=8, width=16)) for _ in range(2))
    for trainer in (one, other):
        trainer.advance(6)
    for a, b in zip(one.nets.parameters(), other.nets.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", [one for one in METHODS.values() if isinstance(one, WithExploration)])
def test_what_explores_says_how_likely_it_was(method: Any) -> None:
    trainer = made(method)
    obs = trainer.buffer.all().obs
    action, logp = method.explore(trainer.learner, obs, Known(torch.arange(ROWS)))
    actor = trainer.nets["actor"]
    expected = log_density(actor(obs), action, method.exploration) if isinstance(actor, Deterministic) else actor.logp(obs, action)
    known = ~logp.isnan()
    assert torch.equal(known, (action.abs() < 1).all(dim=1))  # of what was cut no density is known
    assert int(known.sum()) >= ROWS // 3
    torch.testing.assert_close(logp[known], expected[known], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [one for family in FAMILIES if family != "token" for one in FAMILIES[family]])
def test_papers_are_complete_and_tables_are_methods(method: Any) -> None:
    paper, table = method.paper, to_table(method())
    assert set(paper.defaults) == {one.name for one in fields(method)}
    assert all((paper.source, paper.title, paper.spec, paper.equations, *paper.defaults.values()))
    assert method_from({"method": method.__name__.upper()} | table) == method()
    assert find(method.__name__.lower()) is method
    assert is_dataclass(method)


def test_a_method_is_its_parent_where_what_is_new_is_off() -> None:
    rows = torch.arange(ROWS)
    one, other = (losses(made(method), rows)[1] for method in (PRDC(state_weight=1e6), TD3BC()))
    for a, b in zip(one.terms, other.terms, strict=True):
        torch.testing.assert_close(a.num, b.num, rtol=1e-5, atol=1e-6)
