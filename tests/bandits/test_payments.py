"""The simulated payments are those of the published design: values over many worlds, eligibility, delays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bandits.decision_point import parse_decision_point
from bandits.simulators.payments import ACTIONS, CHARGEBACKS, DAY, POINT, SLOW, Outage, World, results
from ope.data import InputError

WORLDS = 200


def values(base: float) -> tuple[np.ndarray, np.ndarray]:
    """Value of uniform and of best routing in each of many worlds."""
    found = []
    for seed in range(WORLDS):
        world = World.draw(seed, base=base)
        payments = world.payments(4_000, np.random.default_rng(seed))
        found.append((world.value(payments, world.uniform(payments)), world.value(payments, world.best(payments))))
    uniform, best = np.array(found).T
    return uniform, best


@pytest.mark.parametrize(
    ("base", "uniform", "uniform_sd", "best", "best_sd"), [(2.6, 0.861, 0.032, 0.947, 0.017), (4.0, 0.953, 0.014, 0.985, 0.005)]
)
def test_worlds_are_worth_what_the_design_says(base: float, uniform: float, uniform_sd: float, best: float, best_sd: float) -> None:
    """Means over 200 drawn worlds within 4 standard errors of the published means, and spreads alike."""
    of_uniform, of_best = values(base)
    for found, mean, sd in ((of_uniform, uniform, uniform_sd), (of_best, best, best_sd)):
        assert found.mean() == pytest.approx(mean, abs=4 * sd * np.sqrt(2 / WORLDS) + 0.0005)  # theirs varies, too
        assert 0.75 * sd < found.std() < 1.33 * sd
    assert (of_best > of_uniform).all()


def test_mandates_and_tokens_decide_what_may_be_tried() -> None:
    payments = World.draw(0).payments(4_000, np.random.default_rng(1))
    assert set(payments.eligible.sum(axis=1)) == {4, 6, 8, 12}
    for action, name in enumerate(ACTIONS):
        may = payments.eligible[:, action]
        if "3ds-off" in name:
            assert not may[payments.sca_mandate].any()
        if name.startswith("acquirer-3"):
            assert not may[~payments.network_token].any()
    assert payments.eligible[~payments.sca_mandate & payments.network_token].all()


def test_results_come_as_probable_and_as_late_as_they_should() -> None:
    world, rng = World.draw(3), np.random.default_rng(4)
    n = 200_000
    payments = world.payments(n, rng)
    vectors = world.uniform(payments)
    action = (vectors.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    found = results(world, payments, action, rng)
    value = world.value(payments, vectors)
    assert found.authorised.mean() == pytest.approx(value, abs=4 * np.sqrt(value * (1 - value) / n))
    slow = found.after >= 3600
    assert slow.mean() == pytest.approx(SLOW, abs=4 * np.sqrt(SLOW / n))
    assert found.after[~slow].mean() == pytest.approx(2.0, abs=4 * 2 / np.sqrt(n))
    assert found.after.max() <= DAY
    back = np.isfinite(found.reversed_after)
    assert not back[~found.authorised].any()
    assert back.sum() == pytest.approx(CHARGEBACKS * found.authorised.sum(), abs=4 * np.sqrt(CHARGEBACKS * n))
    quick = results(world, payments, action, np.random.default_rng(5), second=1e-4)
    assert quick.after.max() <= DAY * 1e-4


def test_drift_moves_issuers_and_an_outage_one_acquirer_for_some_hours() -> None:
    world = World.draw(0, outage=Outage(day=2, hours=(10, 12), acquirer=1))
    rng = np.random.default_rng(0)
    days = [world]
    for _ in range(3):
        days.append(days[-1].drifted(rng, 0.02))
    moved = np.stack([later.issuer_term - earlier.issuer_term for earlier, later in itertools.pairwise(days)])
    assert moved.std() == pytest.approx(0.02, rel=0.25)  # of 90 steps
    still = world.drifted(rng, 0.0)
    assert (still.day, still.issuer_term is world.issuer_term) == (1, True)
    payments = world.payments(5_000, rng)
    same = World(**{name: getattr(days[2], name) for name in World.__slots__} | {"outage": None})
    ratio = days[2].acceptance(payments) / same.acceptance(payments)
    during = (payments.hour >= 10) & (payments.hour < 12)
    hit = np.array(["acquirer-2" in name for name in ACTIONS])
    assert (ratio[np.ix_(during, hit)] < 0.95).all()
    assert np.array_equal(ratio[~during], np.ones_like(ratio[~during]))
    assert np.array_equal(ratio[:, ~hit], np.ones_like(ratio[:, ~hit]))


def test_what_may_not_be_tried_is_refused() -> None:
    world = World.draw(0)
    payments = world.payments(100, np.random.default_rng(0))
    row = int(payments.sca_mandate.argmax())
    vectors = world.uniform(payments)
    vectors[row] = np.eye(len(ACTIONS))[0]
    with pytest.raises(InputError, match=f"row {row}: found weight on an action that may not be tried"):
        world.value(payments, vectors)
    with pytest.raises(InputError, match="found acquirer-1/3ds-off/A, which may not be tried"):
        results(world, payments, np.where(np.arange(100) == row, 0, 3), np.random.default_rng(0))


def test_a_request_is_what_the_decision_point_declares() -> None:
    point = parse_decision_point(POINT)
    assert point.actions.catalogue == ACTIONS
    contexts = World.draw(0).payments(50, np.random.default_rng(0)).contexts()
    batch = point.features.batch(contexts, len(ACTIONS))
    assert batch.context.shape == (50, 30 + 8 + 4)
