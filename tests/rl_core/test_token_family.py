"""What the token family promises whatever the page: masks with holes, what is cut, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ope.primitives.surrogates import TwoSided
from rl_core.corrections import MaskOutside, Truncate
from rl_core.families.token import TokenBatch, TokenMethod, loss_and_gradient
from rl_core.methods.bapo import BAPO
from rl_core.methods.grpo import GRPO
from rl_core.methods.ppo import PPO
from rl_core.methods.rec import REC, Drop, Weight

LOGP = np.log([[0.5, 0.4], [0.3, 0.9]])
PAIR = TokenBatch(np.array([1.0, 0.0]), np.array([0, 0]), np.ones((2, 2), dtype=bool), LOGP)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_what_tools_said_between_tokens_is_no_step_of_advantages() -> None:
    """λ = 0.9, discount 0.95: with a hole in the mask the advantages are those of the same trajectory without it."""
    method, mask = PPO(lambda_=0.9, discount=0.95), np.array([[True, False, True, True]])
    holed = TokenBatch(np.array([1.0]), np.array([0]), mask, np.zeros((1, 4)), value=np.array([[0.3, 9.0, 0.5, 0.1]]))
    whole = TokenBatch(
        np.array([1.0]), np.array([0]), np.ones((1, 3), dtype=bool), np.zeros((1, 3)), value=np.array([[0.3, 0.5, 0.1]])
    )
    found, expected = method._advantage(holed), method._advantage(whole)
    close(found[0, [0, 2, 3]], expected[0])
    assert found[0, 1] == 0
    last = 1 - 0.1
    middle = 0.95 * 0.1 - 0.5 + 0.95 * 0.9 * last
    close(expected[0], [0.95 * 0.5 - 0.3 + 0.95 * 0.9 * middle, middle, last])


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e9])
def test_credit_does_not_see_what_is_masked(junk: float) -> None:
    values, mask = np.array([[0.2, 0.4, 0.1], [0.5, 0.3, 0.0]]), np.array([[True, True, True], [True, True, False]])
    batch = TokenBatch(np.array([1.0, 0.0]), np.array([0, 0]), mask, np.zeros((2, 3)), value=values)
    spoiled = replace(batch, value=np.where(mask, values, junk))
    np.testing.assert_array_equal(PPO().credit(spoiled)[mask], PPO().credit(batch)[mask])


@pytest.mark.parametrize(
    ("method", "up", "down"),
    [
        (GRPO(dual_clip=3.0), 0.25, 0.5),
        (GRPO(), 0.25, 0.25),
        (GRPO(objective="truncated"), 0.0, 0.0),
        (REC(), 0.25, 0.25),
        (REC(gate=TwoSided(0.2, 0.2)), 0.25, 0.5),
    ],
)
def test_clip_shares_are_of_tokens_whose_gradient_is_cut(method: TokenMethod, up: float, down: float) -> None:
    advantage, logp = np.array([1.0, 1.0, -1.0, -1.0]), np.log([[1.5], [1.0], [0.5], [4.0]])
    batch = TokenBatch(np.zeros(4), np.arange(4), np.ones((4, 1), dtype=bool), np.zeros((4, 1)), advantage=advantage)
    metrics = method.loss(batch, logp, {}).metrics
    shares = {name: float(metrics[name].num / metrics[name].den) for name in ("clipped_up", "clipped_down")}
    assert shares == {"clipped_up": up, "clipped_down": down}
    cut = loss_and_gradient(method, batch, logp)[1][:, 0] == 0
    assert ((cut & (advantage > 0)).mean(), (cut & (advantage < 0)).mean()) == (up, down)


def test_a_correction_may_be_of_whole_responses() -> None:
    behavior = np.log([[0.25, 0.8], [0.3, 0.3]])
    batch = replace(PAIR, logp_behavior=behavior, logp_proximal=LOGP)
    close(Truncate(10.0).weight(batch), [[2.0, 0.5], [1.0, 3.0]])
    close(Truncate(10.0, "sequence").weight(batch), [[1.0, 1.0], [3.0, 3.0]])
    close(MaskOutside(0.5, 2.0, "sequence").weight(batch), [[1.0, 1.0], [0.0, 0.0]])


def test_a_deviation_is_of_the_data_that_stay() -> None:
    """One right of eight: RED-Drop keeps one failure, A = +-0.5 over a population deviation of 0.5."""
    batch = TokenBatch(np.array([1.0, *[0.0] * 7]), np.zeros(8), np.ones((8, 1), dtype=bool), np.zeros((8, 1)))
    found = REC(data=Drop(), std_normalize=True).credit(batch)
    np.testing.assert_allclose(found, [1.0, -1.0, *[0.0] * 6], atol=1e-5)
    weighted = REC(data=Weight(1.0)).credit(replace(batch, reward=np.array([1.0, 0, 0, 0, 1.0, 0, 0, 0])))
    np.testing.assert_allclose(weighted[:2], [0.75 * np.exp(0.75), -0.25 * np.exp(-0.25)], rtol=1e-12)


def test_a_search_tells_where_it_began_and_whether_it_ran_out() -> None:
    rho, advantage = np.array([[1.0], [2.0]]), np.array([1.0, -1.0])
    batch = TokenBatch(np.zeros(2), np.arange(2), np.ones((2, 1), dtype=bool), np.zeros((2, 1)), advantage=advantage)
    method = BAPO(target=0.9)
    metrics = method.loss(batch, np.log(rho), method.statistics(batch, np.log(rho))).metrics
    told = {name: float(term.num / term.den) for name, term in metrics.items()}
    assert told["share_before"] == pytest.approx(1 / 3)
    assert (told["hit_limit"], told["ratio_low"], told["ratio_high"]) == (1.0, pytest.approx(0.9), pytest.approx(3.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": np.array([np.nan, 0.0])}, "reward: found NaN"),
        ({"mask": np.array([[2, 1], [1, 1]])}, "mask: found int64 of shape"),
        ({"advantage": np.zeros(3)}, r"advantage: found shape \(3,\); expected \(2,\) or \(2, 2\)"),
        ({"logp_behavior": np.full((2, 2), -np.inf)}, "logp_behavior: found NaN or an infinity"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loss_and_gradient(GRPO(), replace(PAIR, **changes), LOGP)


def test_log_probabilities_that_are_not_finite_are_refused_where_they_count() -> None:
    with pytest.raises(ValueError, match="logp: found NaN"):
        loss_and_gradient(GRPO(), PAIR, np.full((2, 2), np.nan))


def test_numbers_of_any_kind_are_taken_for_what_they_are() -> None:
    """Rewards and masks of whole numbers, groups of names."""
    loose = TokenBatch(np.array([1, 0]), np.array(["a", "a"]), np.ones((2, 2), dtype=int), LOGP)
    np.testing.assert_array_equal(loss_and_gradient(GRPO(), loose, LOGP)[1], loss_and_gradient(GRPO(), PAIR, LOGP)[1])
