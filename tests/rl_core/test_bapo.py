"""BAPO: where the search for clip bounds starts, moves and ends, what it measures, and the loss within the bounds it found."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from ope.primitives import divergences
from rl_core.families.token import TokenBatch, loss_and_gradient, objective, statistics
from rl_core.methods.bapo import BAPO, RECOMMENDED, Bounds
from rl_core.methods.grpo import GRPO

Floats = NDArray[np.float64]
Mode = Literal["value", "gradient"]
CODE = BAPO(target=1.0, low_limit=0.8, high_limit=2.0, step_low=0.05, measure="ratio", order="code")  # the code's yaml
MODES = pytest.mark.parametrize("mode", ["value", "gradient"])
close = partial(np.testing.assert_allclose, rtol=1e-12)


def tokens(rho: Any, advantage: Any) -> tuple[TokenBatch, Floats]:
    """One response per token, with its ratio and advantage."""
    behavior = np.full((len(rho), 1), -1.0)
    batch = TokenBatch(
        np.zeros(len(rho)), np.arange(len(rho)), behavior < 0, behavior, advantage=np.asarray(advantage, dtype=float)
    )
    return batch, behavior + np.log(np.asarray(rho, dtype=float))[:, None]


def searched(method: BAPO, *parts: tuple[TokenBatch, Floats]) -> Bounds:
    """Bounds of a step whose batch came in these parts."""
    return method.search(statistics(method, parts))


def measured(rho: Floats, advantage: Floats, low: float, high: float, mode: Mode) -> float:
    """The share of positive contributions at given bounds, by the formulas."""
    up, down = advantage > 0, advantage < 0
    if mode == "value":
        positive = (np.minimum(rho, high) * advantage)[up].sum()
        negative = (np.maximum(rho, low) * -advantage)[down].sum()
    else:
        positive = (rho * advantage)[up & (rho < high)].sum()
        negative = (rho * -advantage)[down & (rho > low)].sum()
    return float(positive / (positive + negative))


# 1, 2: where the search starts and ends


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_bounds_that_cannot_move_are_those_of_grpo(dual_clip: float | None) -> None:
    rng = np.random.default_rng(4)
    behavior = rng.uniform(-3, -0.1, (8, 5))
    mask = np.arange(5) < rng.integers(1, 6, (8, 1))
    batch = TokenBatch(rng.normal(size=8), np.repeat([2, 9], 4), mask, behavior)
    logp = behavior + rng.normal(size=(8, 5))
    fixed = BAPO(target=0.99, low_start=0.8, low_limit=0.8, high_start=1.2, high_limit=1.2, dual_clip=dual_clip)
    loss, gradient = loss_and_gradient(fixed, batch, logp)
    expected, by_token = loss_and_gradient(GRPO(dual_clip=dual_clip), batch, logp)
    close(loss, expected)
    close(gradient, by_token, atol=1e-15)
    found = searched(fixed, (replace(batch, advantage=fixed.credit(batch)), logp))
    assert (found.low, found.high, found.steps, found.hit_limit) == (0.8, 1.2, 0, True)


@MODES
def test_a_target_of_nothing_moves_nothing(mode: Mode) -> None:
    for advantage in ([1.0, -1.0, -2.0], [-1.0, -1.0, -1.0]):
        found = searched(BAPO(target=0.0, contribution=mode), tokens([0.5, 1.0, 2.0], advantage))
        assert (found.low, found.high, found.steps, found.hit_limit) == (0.6, 1.2, 0, False)


@MODES
def test_successes_alone_are_the_whole_share(mode: Mode) -> None:
    found = searched(BAPO(target=1.0, contribution=mode), tokens([0.5, 1.0, 2.0], [1.0, 2.0, 0.5]))
    assert (found.low, found.high, found.steps, found.share, found.hit_limit) == (0.6, 1.2, 0, 1.0, False)


@MODES
def test_failures_alone_send_the_search_to_its_end(mode: Mode) -> None:
    found = searched(BAPO(contribution=mode), tokens([0.5, 1.0, 2.0], [-1.0, -2.0, -0.5]))
    assert found.steps == 51  # 1.8/0.05 + 0.3/0.02, which a float loop without tolerance misses by one
    assert found.share == 0.0
    assert found.hit_limit
    close([found.low, found.high], [0.9, 3.0], rtol=1e-14)


def test_bounds_stay_within_one_step_of_limits_that_the_grid_misses() -> None:
    failures = tokens([0.5, 1.0], [-1.0, -2.0])
    paper = BAPO(low_limit=0.87, high_limit=1.43, step_low=0.05, step_high=0.1)
    found = searched(paper, failures)
    close([found.low, found.high], [0.85, 1.4], rtol=1e-14)
    assert found.steps == 5 + 2
    narrow = searched(BAPO(low_start=0.8), failures)
    assert narrow.steps == 36 + 5  # of 0.02 in 0.9 - 0.8, of which floats make 4.99...
    close(narrow.low, 0.9, rtol=1e-14)
    cut = searched(replace(paper, order="code"), failures)  # the code's last step is cut by the limit
    close([cut.low, cut.high], [0.87, 1.43], rtol=1e-14)


# 3: by hand

HAND_RHO, HAND_ADVANTAGE = [1.0, 1.5, 2.6, 1.0, 0.75, 0.5, 1.3], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]


def test_the_sums_at_the_start_by_hand() -> None:
    batch, logp = tokens(HAND_RHO, HAND_ADVANTAGE)
    found = statistics(BAPO(), [(batch, logp)])
    close(found["positive"][0], 3.4)  # 1 + 1.2 + 1.2
    close(found["negative"][0], 3.65)  # 1 + 0.75 + 0.6 + 1.3
    close(searched(BAPO(target=0.0), (batch, logp)).share, 0.482270, atol=5e-7)
    close(searched(replace(CODE, target=0.0), (batch, logp)).share, 0.931507, atol=5e-7)


@pytest.mark.parametrize(
    ("method", "low", "high", "steps", "share", "hit_limit"),
    [
        (BAPO(target=0.4), 0.6, 1.2, 0, 0.482270, False),
        (BAPO(target=0.5), 0.6, 1.35, 3, 0.503401, False),  # P = 1 + 1.35 + 1.35
        (BAPO(target=0.55), 0.6, 2.0, 16, 0.552147, False),  # P = 1 + 1.5 + 2
        (replace(CODE, target=0.5), 0.6, 1.2, 0, 0.931507, False),
        (replace(CODE, target=1.0), 0.8, 1.45, 9, 1.0, False),  # P = N = 3.9: met exactly
        (replace(CODE, target=1.3), 0.8, 2.0, 20, 1.153846, True),
    ],
)
def test_the_search_by_hand(method: BAPO, low: float, high: float, steps: int, share: float, hit_limit: bool) -> None:
    found = searched(method, tokens(HAND_RHO, HAND_ADVANTAGE))
    close([found.low, found.high], [low, high], rtol=1e-14)
    close(found.share, share, atol=5e-7)
    assert (found.steps, found.hit_limit) == (steps, hit_limit)


def test_the_sums_where_the_codes_target_is_met_by_hand() -> None:
    found = statistics(CODE, [tokens(HAND_RHO, HAND_ADVANTAGE)])
    close([found["positive"][5], found["negative"][4]], 3.9)  # 1 + 1.45 + 1.45 and 1 + 0.8 + 0.8 + 1.3


# 4: value and gradient

RHOS = arrays(np.int64, 12, elements=st.integers(10, 400)).map(lambda x: (x + 0.5) / 100)  # never at a bound of the grids
ADVANTAGES = arrays(np.float64, 12, elements=st.floats(0.1, 3)).map(lambda x: x * np.where(np.arange(12) % 2, 1, -1))


def shares(mode: Mode, rho: Floats, advantage: Floats) -> Floats:
    """Shares by upper bound (rows) and lower bound, from the sums of one pass."""
    found = statistics(BAPO(contribution=mode), [tokens(rho, advantage)])
    total = found["positive"][:, None] + found["negative"][None, :]
    return np.divide(found["positive"][:, None], total, out=np.zeros_like(total), where=total > 0)


@given(rho=RHOS, advantage=ADVANTAGES)
def test_tightening_from_below_lowers_the_share_of_value(rho: Floats, advantage: Floats) -> None:
    found = shares("value", rho, advantage)
    assert np.all(np.diff(found, axis=0) >= -1e-12)
    assert np.all(np.diff(found, axis=1) <= 1e-12)


@given(rho=RHOS, advantage=ADVANTAGES)
def test_both_steps_raise_the_share_of_gradient(rho: Floats, advantage: Floats) -> None:
    found = shares("gradient", rho, advantage)
    nothing = statistics(RECOMMENDED, [tokens(rho, advantage)])["positive"] == 0  # 0/0 is no share
    assert np.all(np.diff(found, axis=0) >= -1e-12)
    assert np.all(np.diff(found[~nothing], axis=1) >= -1e-12)


def test_the_share_of_value_falls_in_the_example() -> None:
    found = statistics(CODE, [tokens(HAND_RHO, HAND_ADVANTAGE)])["negative"]
    close(found[[0, -1]], [3.65, 3.9])


@MODES
@given(rho=RHOS, advantage=ADVANTAGES, target=st.floats(0.05, 0.95))
def test_the_search_is_the_papers_algorithm(mode: Mode, rho: Floats, advantage: Floats, target: float) -> None:
    up = down = 0  # in steps, so that no bound is added up

    def bounds() -> tuple[float, float]:
        return min(0.6 + 0.02 * down, 0.9), min(1.2 + 0.05 * up, 3.0)

    def share() -> float:
        with np.errstate(invalid="ignore"):
            found = measured(rho, advantage, *bounds(), mode)
        return 1.0 if np.isnan(found) else found  # nothing to balance

    while share() < target - 1e-9 and down < 15:
        up, down = (up + 1, down) if up < 36 else (up, down + 1)
    found = searched(BAPO(target=target, contribution=mode), tokens(rho, advantage))
    close([found.low, found.high], bounds(), rtol=1e-14)
    close(found.share, share(), atol=1e-12)
    assert found.steps == up + down
    assert found.hit_limit == (share() < target - 1e-9)


# 5: the loss within its bounds


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_gate_is_that_of_the_clip(sign: float, dual_clip: float | None) -> None:
    rho = np.array([0.3, 0.59, 0.61, 0.79, 1.0, 1.19, 1.21, 1.6, 2.9, 3.1])
    batch, logp = tokens(rho, np.full(10, 1.5 * sign))
    _, gradient = loss_and_gradient(BAPO(target=0.0, dual_clip=dual_clip), batch, logp)
    shut = rho > 1.2 if sign > 0 else rho < 0.6
    if dual_clip is not None and sign < 0:
        shut = shut | (rho > dual_clip)
    close(gradient[:, 0] * 10, np.where(shut, 0.0, -rho * 1.5 * sign))


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_the_gradient_is_the_difference_quotient_at_the_bounds_of_the_base(dual_clip: float | None) -> None:
    advantage = np.array(HAND_ADVANTAGE)[:, None]
    batch, logp = tokens(HAND_RHO, HAND_ADVANTAGE)
    loss, gradient = loss_and_gradient(BAPO(target=0.5, dual_clip=dual_clip), batch, logp)

    def value(at: Floats) -> float:
        rho = np.exp(at + 1.0)
        found = np.maximum(-advantage * rho, -advantage * np.clip(rho, 0.6, 1.35))
        if dual_clip is not None:
            found = np.where(advantage < 0, np.minimum(found, -advantage * dual_clip), found)
        return float(found.mean())

    close(loss, value(logp))
    steps = 1e-4 * np.eye(7)[:, :, None]
    close(gradient[:, 0], [(value(logp + step) - value(logp - step)) / 2e-4 for step in steps], rtol=1e-6, atol=1e-10)


# 6: entropy


@pytest.mark.parametrize("seed", range(5))
def test_the_change_of_entropy_is_a_covariance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = np.array([1, 2, 3, 4, 5, 5])
    action, rollout = np.repeat(np.arange(6), counts), counts / 20  # rows are as frequent as the sampler takes them
    logits, advantage = rng.normal(size=6), rng.normal(size=6)
    z = torch.tensor(logits, requires_grad=True)
    policy = torch.softmax(z.detach(), 0).numpy()
    rho = policy / rollout

    batch, _ = tokens(np.ones(20), advantage[action])
    batch = replace(batch, logp_behavior=np.log(rollout)[action][:, None])
    parts = [torch.as_tensor(one) for one in (batch.reward, batch.group, batch.mask, batch.logp_behavior)]
    given_ = TokenBatch(*parts, advantage=torch.as_tensor(batch.advantage))
    method = BAPO(low_start=0.8, low_limit=0.8, high_start=1.2, high_limit=1.2)
    logp = torch.log_softmax(z, 0)[torch.as_tensor(action)][:, None]
    with torch.no_grad():
        stats = statistics(method, [(given_, logp)])
    (gradient,) = torch.autograd.grad(objective(method, given_, logp, stats), z)

    open_ = ((advantage > 0) & (rho < 1.2)) | ((advantage < 0) & (rho > 0.8))
    natural = advantage * open_ - policy @ (advantage * open_)
    close(gradient.numpy(), policy * natural, atol=1e-12)

    def entropy(at: Floats) -> float:
        return float(divergences.entropy(torch.softmax(torch.as_tensor(at), 0)))

    for direction in (gradient.numpy(), natural):
        slope = (entropy(logits + 1e-4 * direction) - entropy(logits - 1e-4 * direction)) / 2e-4
        covariance = policy @ (np.log(policy) * (direction - policy @ direction))
        close(slope, -covariance, rtol=0, atol=1e-6)


# 7, 8: machines and masks


def two_machines() -> list[tuple[TokenBatch, Floats]]:
    """A batch whose halves differ in the balance of signs: successes here, mostly failures there."""
    rng = np.random.default_rng(6)
    rho = np.exp(0.4 * rng.normal(size=40))
    advantage = np.where(np.arange(40) < 16, 1.0, -1.0)
    batch, logp = tokens(rho, advantage)
    return [(batch.rows(slice(None, 20)), logp[:20]), (batch.rows(slice(20, None)), logp[20:])]


@pytest.mark.parametrize("method", [BAPO(target=0.45), BAPO(target=0.45, contribution="gradient"), CODE])
def test_sums_of_two_machines_give_the_bounds_of_one(method: BAPO) -> None:
    here, there = two_machines()
    names = ("reward", "group", "mask", "logp_behavior", "advantage")
    joined = TokenBatch(**{name: np.concatenate((getattr(here[0], name), getattr(there[0], name))) for name in names})
    whole = searched(method, (joined, np.concatenate((here[1], there[1]))))
    reduced = searched(method, here, there)
    assert whole.steps > 0
    assert reduced._replace(share=whole.share) == whole
    close(reduced.share, whole.share)
    alone = [searched(method, part) for part in (here, there)]
    assert (alone[0].low, alone[0].high) != (alone[1].low, alone[1].high)


@MODES
def test_masked_tokens_move_neither_bounds_nor_loss(mode: Mode) -> None:
    batch, logp = tokens(HAND_RHO, HAND_ADVANTAGE)
    method = BAPO(target=0.55, contribution=mode)
    loss, gradient = loss_and_gradient(method, batch, logp)

    def wider(values: Floats, fill: Any) -> Any:
        return np.concatenate((values, np.full((7, 2), fill)), axis=1)

    more = TokenBatch(
        batch.reward,
        batch.group,
        wider(batch.mask, False),
        wider(batch.logp_behavior, -1.0),
        advantage=wider(batch.advantage[:, None], 100.0),
    )
    found, by_token = loss_and_gradient(method, more, wider(logp, -0.3))
    close(found, loss)
    close(by_token, wider(gradient, 0.0))
    assert searched(method, (more, wider(logp, -0.3))) == searched(method, (batch, logp))


# The controller on whole batches: 64 prompts of 8 responses, right in 3 of 10, failures twice as long as successes


def synthetic(sd: float, *, swapped: bool = False, seed: int = 0) -> tuple[TokenBatch, Floats]:
    rng = np.random.default_rng(seed)
    right = rng.random(512) < 0.3
    length = np.where(right != swapped, rng.integers(20, 41, 512), rng.integers(40, 81, 512))
    mask = np.arange(80) < length[:, None]
    behavior = np.full((512, 80), -1.0)
    batch = TokenBatch(right.astype(float), np.repeat(np.arange(64), 8), mask, behavior)
    return replace(batch, advantage=BAPO().credit(batch)), behavior + sd * rng.normal(size=(512, 80))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("mode", "sd", "start", "end"),
    [("value", 0.1, 0.331, 0.330), ("gradient", 0.1, 0.323, 0.361), ("value", 0.4, 0.302, 0.314), ("gradient", 0.4, 0.215, 0.396)],
)
def test_long_failures_set_the_search_going(mode: Mode, sd: float, start: float, end: float, seed: int) -> None:
    step, method = synthetic(sd, seed=seed), BAPO(contribution=mode)
    first, last = searched(replace(method, target=0.0), step), searched(method, step)
    close([first.share, last.share], [start, end], atol=0.03)  # of one draw; twelve draws spread by 0.011
    assert last.steps > 0
    assert (last.share > first.share) == (end > start)
    if (mode, sd) != ("gradient", 0.4):  # there the target may be met just before the limits
        assert last.hit_limit
        close([last.low, last.high], [0.9, 3.0], rtol=1e-14)
    assert last.hit_limit == (last.share < 0.4)
    half = [(step[0].rows(rows), step[1][rows]) for rows in (slice(None, 256), slice(256, None))]
    assert searched(method, *half)[:3] == last[:3]


@MODES
def test_long_successes_leave_the_bounds_alone(mode: Mode) -> None:
    found = searched(BAPO(contribution=mode), synthetic(0.1, swapped=True))
    assert (found.low, found.high, found.steps, found.hit_limit) == (0.6, 1.2, 0, False)
    close(found.share, 0.66, atol=0.03)


@MODES
def test_a_target_within_reach_ends_at_the_first_point_that_meets_it(mode: Mode) -> None:
    batch, logp = synthetic(0.4)
    start = searched(BAPO(target=0.0, contribution=mode), (batch, logp)).share
    found = searched(BAPO(target=start + 0.01, contribution=mode), (batch, logp))
    assert 0 < found.steps <= 36
    assert not found.hit_limit
    assert found.share >= start + 0.01
    rho, advantage = np.exp(logp + 1.0)[batch.mask], np.broadcast_to(batch.advantage[:, None], logp.shape)[batch.mask]
    at = [measured(rho, advantage, 0.6, 1.2 + 0.05 * step, mode) for step in range(found.steps + 1)]
    close(found.share, at[-1])
    assert max(at[:-1]) < start + 0.01


def test_at_the_sampler_the_share_is_that_of_mean_lengths() -> None:
    batch, _ = synthetic(0.1)
    one = batch.rows(np.isin(batch.group, [0]))
    length, right = one.mask.sum(axis=1), one.reward == 1
    assert 0 < right.sum() < 8
    up, down = length[right].mean(), length[~right].mean()
    close(searched(BAPO(), (one, one.logp_behavior)).share, up / (up + down), rtol=1e-9)
