"""Learning from replay: rows drawn by their errors, logged and collected rows in fixed shares, a log first and then the world."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from ope.data import InputError
from rl_core.buffers import Buffer
from rl_core.envs.pendulum import Pendulum, dataset
from rl_core.exploration import cut, noisy
from rl_core.families.offline import Drawn, WithExploration, fitted
from rl_core.methods.awac import AWAC
from rl_core.methods.bc import BC
from rl_core.methods.cql import CQL
from rl_core.methods.iql import IQL
from rl_core.methods.mdpo import OffPolicyMDPO
from rl_core.methods.prdc import PRDC
from rl_core.methods.sac import SAC
from rl_core.methods.td3 import TD3
from rl_core.methods.td3_bc import TD3BC
from rl_core.registry import FAMILIES
from rl_core.trainers.control import course_of
from rl_core.trainers.offline import OfflineSchedule, OfflineTrainer
from rl_core.trainers.online import ReplaySchedule, ReplayTrainer
from rl_core.verify.control import evaluated, on_pendulum
from tests.rl_core.offline_methods import made

torch.set_num_threads(1)

SMALL = OfflineSchedule(steps=100, batch=32, width=16, seed=3)
EXPLORING: dict[str, Any] = {"TD3": TD3(), "TD3BC": TD3BC(), "IQL": IQL(), "AWAC": AWAC(), "CQL": CQL(samples=2), "SAC": SAC()}


def test_weights_undo_that_rows_are_not_drawn_alike() -> None:
    """Σ_i chance_i·weight_i·x_i is the mean of x up to one constant, whatever the chances (Schaul et al. 2016, correction 1)."""
    rows = made(6, length=3)
    buffer = Buffer(6, *rows.sizes)
    buffer.add(rows)
    chance = torch.tensor([0.05, 0.1, 0.3, 0.25, 0.1, 0.2])
    buffer.weigh(10 * chance)
    rarity = buffer.rarity(torch.arange(6))
    torch.testing.assert_close(rarity, 1 / (6 * chance))
    x = torch.arange(6.0) ** 2
    torch.testing.assert_close((chance * rarity * x).sum(), x.mean())


def test_critics_count_a_row_by_its_weight() -> None:
    batch = made(4, length=2)
    found, wanted = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    plain, weighed = (fitted(found, wanted, replace(batch, weight=weight)) for weight in (None, torch.tensor([1.0, 0.5, 0.0, 0.0])))
    assert float(plain.terms[0].num / plain.terms[0].den) == -(1 + 4 + 4 + 9 + 1 + 1) / 4
    assert float(weighed.terms[0].num / weighed.terms[0].den) == -(1 + 0.5 * 4) / 4
    assert plain.errors is None
    assert weighed.errors is not None
    assert weighed.errors.tolist() == [0.5, 1.0, 1.5, 2.0]


def test_rows_are_drawn_by_what_they_were_wrong_by() -> None:
    """One row of a hundred has a reward that no other has: it is the one that is drawn most."""
    rows = made(100, length=10)
    odd = replace(rows, reward=torch.where(torch.arange(100) == 42, 50.0, 0.0))
    trainer = OfflineTrainer(TD3(), odd, replace(SMALL, priority=0.6))
    plain = OfflineTrainer(TD3(), odd, SMALL)
    for one in (trainer, plain):
        one.advance(30)
    weight = trainer.buffer.weight
    assert weight is not None
    assert int(weight.argmax()) == 42
    share = float(weight[42] / weight.sum())
    drawn = torch.bincount(trainer.buffer.draw(20_000, Generator().manual_seed(0)), minlength=100)[42] / 20_000
    assert float(drawn) == pytest.approx(share, abs=4 * (share / 20_000) ** 0.5)
    assert share > 0.05
    assert plain.buffer.weight is None
    batch = trainer.batch()
    assert batch.weight is not None
    assert float(batch.weight.max()) == 1.0
    trainer.add(odd.rows(slice(0, 0)))
    assert trainer.buffer.weight is weight


def test_a_correction_of_1_at_the_end() -> None:
    trainer = OfflineTrainer(SAC(), made(50), replace(SMALL, steps=10, priority=1.0, correction=0.4))
    trainer.advance(10)
    batch = trainer.batch()
    assert batch.row is not None
    assert batch.weight is not None
    rarity = trainer.buffer.rarity(batch.row)
    torch.testing.assert_close(batch.weight, rarity / rarity.max())


@pytest.mark.parametrize(
    "method", [IQL(), AWAC(), CQL(samples=2), TD3(), SAC(), OffPolicyMDPO()], ids=lambda one: type(one).__name__
)
def test_a_row_without_weight_says_nothing_to_critics(method: Any) -> None:
    """All terms that critics and values learn from: what half the rows earned is nothing to them where its weight is 0."""
    trainer = OfflineTrainer(method, made(), SMALL)
    whole = trainer.buffer.take(torch.arange(20))
    half = (torch.arange(20) < 10).float()
    stage = next(one.stage for one in trainer.stages if "critic" in one.stage.learns)

    def terms(batch: Any) -> list[float]:
        return [float(term.num.detach()) for term in stage.loss(trainer.learner, batch, Drawn(Generator().manual_seed(1))).terms]

    weighed = terms(replace(whole, weight=half))
    assert all(weighed)
    assert terms(replace(whole, weight=half, reward=whole.reward + 100 * (1 - half))) == pytest.approx(weighed, rel=1e-6)
    assert terms(replace(whole, weight=0 * half)) == [0.0] * len(weighed)


@pytest.mark.parametrize("method", [*EXPLORING.values(), OffPolicyMDPO()], ids=lambda one: type(one).__name__)
def test_every_critic_says_its_errors(method: Any) -> None:
    trainer = OfflineTrainer(method, made(), replace(SMALL, priority=0.6))
    trainer.advance(2)
    assert trainer.buffer.weight is not None
    assert len(trainer.buffer.weight.unique()) > 20
    assert all(bool(weight.isfinite().all()) for weight in trainer.nets.parameters())


def test_a_prioritised_run_goes_on_to_the_bit() -> None:
    whole, parts, again = (OfflineTrainer(TD3BC(), made(), replace(SMALL, priority=0.6)) for _ in range(3))
    whole.advance(12)
    parts.advance(5)
    fresh = again.state()
    again.restore(parts.state())
    again.advance(7)
    for one, other in zip(whole.nets.parameters(), again.nets.parameters(), strict=True):
        assert torch.equal(one, other)
    again.restore(fresh)
    assert again.buffer.weight is None


def test_what_was_never_drawn_is_drawn_as_often_as_what_was_most_wrong() -> None:
    trainer = OfflineTrainer(SAC(), made(), replace(SMALL, batch=8, priority=1.0, reward_scale=10.0))
    trainer.advance(1)
    weight = trainer.buffer.weights()
    assert weight is not None
    assert int((weight == weight.max()).sum()) >= 192
    assert float(weight.max()) > 2  # in the scale of errors, not 1


@pytest.mark.parametrize("name", EXPLORING)
def test_a_log_first_and_then_the_environment(name: str) -> None:
    """Half of every batch stays logged; the buffer of the log is left as it is."""
    data = dataset("pend-exp10", 0)
    schedule = ReplaySchedule(replace(SMALL, normalize=True), offline_steps=10, count=4, ratio=0.5, offline_share=0.5)
    trainer = ReplayTrainer(EXPLORING[name], Pendulum(), schedule, data=data)
    trainer.advance(10)
    assert (trainer.learner.step, trainer.taken) == (10, 0)
    trainer.advance(10)
    assert (trainer.learner.step, trainer.taken) == (30, 40)
    assert trainer.fresh is not None
    assert len(trainer.fresh) == 40
    assert len(trainer.learner.buffer) == len(data) == 2000
    found = trainer.fresh.all()
    assert found.logp_behavior is not None
    assert found.policy is not None
    cut_off = found.action.abs().amax(dim=1) >= 1
    assert torch.equal(found.logp_behavior.isnan(), cut_off)
    assert set(found.policy.tolist()) == {float(step) for step in range(10, 30, 2)}
    torch.testing.assert_close(trainer.learner.buffer.all().obs, trainer.learner.scaling.apply(data.obs))
    parts = ReplayTrainer(EXPLORING[name], Pendulum(), schedule, data=data)
    parts.restore(trainer.state())
    for one in (trainer, parts):
        one.advance(3)
    for a, b in zip(trainer.learner.nets.parameters(), parts.learner.nets.parameters(), strict=True):
        assert torch.equal(a, b)


def test_shares_are_what_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = ReplaySchedule(SMALL, count=4, offline_share=0.25)
    trainer = ReplayTrainer(TD3(), Pendulum(), schedule, data=dataset("pend-exp10", 0))
    seen = list[Any]()
    monkeypatch.setattr(trainer.learner, "learn", seen.append)
    trainer.advance(5)
    for batch in seen:
        assert int(batch.policy.isnan().sum()) == 8  # of 32: nobody wrote down who the expert was
    assert len(seen) == 20


def test_going_online_mends_what_the_log_left_out() -> None:
    """Ten expert episodes of which TD3+BC makes little (seed 2: 31 of 100); 12,000 of its own steps later it swings up: 98."""
    data = dataset("pend-exp10", 2)
    learning = OfflineSchedule(steps=4500, batch=64, width=64, reward_scale=0.1, seed=2)
    schedule = ReplaySchedule(learning, offline_steps=1500, count=4, ratio=0.25, offline_share=0.25)
    trainer = ReplayTrainer(on_pendulum(TD3BC()), Pendulum(), schedule, data=data)
    trainer.advance(1500)
    before = evaluated(trainer.act, seed=2)["score"]
    trainer.advance(3000)
    assert trainer.taken == 12_000
    assert before < 60
    assert evaluated(trainer.act, seed=2)["score"] > 85


def test_densities_are_of_what_was_drawn() -> None:
    draw = Drawn(Generator().manual_seed(0))
    mean = torch.tensor([[0.2, -0.3]]).expand(5000, 2)
    action, logp = noisy(mean, 0.1, draw)
    apart = (action - mean) / 0.1
    expected = (-0.5 * apart**2).sum(dim=1) - 2 * np.log(0.1 * np.sqrt(2 * np.pi))
    torch.testing.assert_close(logp, expected.float(), rtol=1e-4, atol=1e-4)
    assert float(apart.std()) == pytest.approx(1, abs=4 / (2 * 10_000) ** 0.5)
    found, known = cut(torch.tensor([[0.5, 1.3], [0.1, -0.2]]), torch.tensor([-1.0, -2.0]))
    assert found.tolist() == [[0.5, 1.0], [pytest.approx(0.1), pytest.approx(-0.2)]]
    assert (bool(known[0].isnan()), float(known[1])) == (True, -2.0)


def test_who_explores() -> None:
    """All of the offline family but those that do what was logged: a clone, and a policy held to the nearest pair."""
    found = {method.__name__ for method in FAMILIES["offline"] if isinstance(method(), WithExploration)}
    assert found == {"TD3", "TD3BC", "IQL", "AWAC", "CQL"}


def test_what_cannot_be_is_refused() -> None:
    data = dataset("pend-exp10", 0)
    with pytest.raises(InputError, match="priority: found BC, which has no critic"):
        OfflineTrainer(BC(), made(), replace(SMALL, priority=0.6)).advance()
    with pytest.raises(InputError, match="offline_share, offline_steps: found no data"):
        ReplayTrainer(TD3(), Pendulum(), ReplaySchedule(replace(SMALL, normalize=False), warmup=10, offline_share=0.5))
    with pytest.raises(InputError, match="one of the two"):
        ReplaySchedule(replace(SMALL, priority=0.6), offline_share=0.5)
    with pytest.raises(InputError, match="expected a row of either"):
        ReplayTrainer(TD3(), Pendulum(), ReplaySchedule(SMALL, offline_share=0.01), data=data)
    with pytest.raises(InputError, match="expected below 1"):
        ReplaySchedule(SMALL, offline_share=1.0)
    for name, value in (("priority", -1.0), ("correction", 1.5), ("reward_scale", 0.0), ("reward_scale", np.inf)):
        with pytest.raises(InputError, match=name):
            replace(SMALL, **{name: value})
    with pytest.raises(InputError, match="PRDC does not learn from replay"):
        course_of(PRDC(), {}, {"offline_steps": 10}, data=data, env=Pendulum(), told={})
    with pytest.raises(InputError, match="or a table \\[collection\\]"):
        course_of(TD3(), {}, None, data=None, env=Pendulum(), told={})


def test_a_method_with_and_without_a_log() -> None:
    """With a table of collection an offline method collects from the start, or after its steps on a log."""
    schedule = {"steps": 40, "batch": 16, "width": 16}
    for data, collection, taken in (
        (None, {"warmup": 20}, 20 + 40),
        (dataset("pend-exp10", 0), {"offline_steps": 30}, 10),
        (dataset("pend-exp10", 0), {"offline_steps": 25, "ratio": 2.0}, 8),
    ):
        run = course_of(TD3(), schedule, collection, data=data, env=Pendulum(), evaluations=2, told={})
        rows = run.run(lambda policies: {})
        assert [row["step"] for row in rows] == [20, 40] if data is None else rows[-1]["step"] >= 40
        assert rows[-1]["taken"] == taken
