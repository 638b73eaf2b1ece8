"""Group-relative REINFORCE: the consistency loss behind it, gates, regularisers, chosen data, and where each ends on a bandit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from math import inf

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ope.primitives import baselines, weights
from ope.primitives.surrogates import Gate, OneSided, Ring, TwoSided
from rl_core.aggregation import SequenceSum
from rl_core.families.token import TokenBatch, TokenMethod, credited, loss_and_gradient, objective
from rl_core.methods.asymre import AsymRE
from rl_core.methods.grpo import GRPO
from rl_core.methods.opmd import OPMD, PairwiseOPMD, TrinityOPMD
from rl_core.methods.rec import REC, VARIANTS, Weight
from rl_core.methods.reinforce import REINFORCE
from rl_core.penalties import K2, ForwardKL

Floats = NDArray[np.float64]
FREE = 1e9  # a bound that no ratio meets
UNGATED = REC(gate=None)
FAMILY: dict[str, TokenMethod] = {
    **VARIANTS,
    "none-NoIS": UNGATED,
    "none-IS": REC(gate=None, weighted=True),
    "OPMD-token": OPMD(),
    "OPMD-sequence": OPMD(level="sequence"),
    "OPMD-soft": OPMD(soft_baseline=True),
    "TrinityOPMD": TrinityOPMD(),
    "TrinityOPMD-soft": TrinityOPMD(soft_baseline=True),
    "PairwiseOPMD": PairwiseOPMD(),
    "AsymRE-shift": AsymRE(),
}
MEMBERS = pytest.mark.parametrize("method", FAMILY.values(), ids=FAMILY.keys())
close = partial(np.testing.assert_allclose, rtol=1e-12)


def one_group(reward: list[float], tokens: int = 1) -> TokenBatch:
    """One response of `tokens` tokens per reward, all of one prompt."""
    shape = (len(reward), tokens)
    return TokenBatch(np.array(reward), np.zeros(len(reward), dtype=int), np.ones(shape, dtype=bool), np.full(shape, -1.0))


def ragged() -> tuple[TokenBatch, Floats]:
    """Ten responses of 1 to 5 tokens to two prompts, more failures than successes, and a policy that drifted from the sampler."""
    rng = np.random.default_rng(11)
    behavior = rng.uniform(-3, -0.1, (10, 5))
    batch = TokenBatch(
        reward=np.array([1.0, 0.1, 0.0, 0.2, 0.9, 0.3, 0.15, 2.0, 0.05, 0.25]),
        group=np.array([4, 4, 1, 4, 1, 1, 4, 1, 1, 4]),
        mask=np.arange(5) < rng.integers(1, 6, (10, 1)),
        logp_behavior=behavior,
    )
    return batch, behavior + rng.normal(size=(10, 5))


# 1, 2: the consistency loss

ACTION = torch.tensor([0, 2, 2, 1, 3, 2])  # duplicates are as good as any
REWARD = [0.3, 1.0, 1.0, -0.4, 2.0, 1.0]
LOGITS = [0.2, -0.5, 0.9, 0.0]


def logp_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, 0)[ACTION][:, None]


@pytest.mark.parametrize("temperature", [1.0, 0.3, 7.0])
def test_a_step_on_the_consistency_loss_is_a_step_of_group_relative_reinforce(temperature: float) -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    anchor = logp_of(logits).detach()
    batch = TokenBatch(torch.tensor(REWARD, dtype=torch.float64), torch.zeros(6), torch.ones(6, 1, dtype=torch.bool), anchor)
    pairwise = PairwiseOPMD(temperature)
    (found,) = torch.autograd.grad(objective(pairwise, credited(pairwise, batch), logp_of(logits), {}), logits)
    plain = REINFORCE(aggregation=SequenceSum())
    (expected,) = torch.autograd.grad(objective(plain, credited(plain, batch), logp_of(logits), {}), logits)
    close((found / (2 * temperature)).numpy(), expected.numpy(), atol=1e-15)
    close(expected.numpy(), np.bincount(ACTION, np.array(REWARD) - np.mean(REWARD), minlength=4) / 6, atol=1e-15)  # no π: Σ A = 0


def test_the_weighted_consistency_loss_has_the_weighted_mean_as_its_baseline() -> None:
    w, tau = np.array([0.5, 2.0, 1.0, 0.1, 3.0, 0.7]), 0.3
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    logp = logp_of(logits)[:, 0]
    apart = torch.tensor(REWARD, dtype=torch.float64) - tau * (logp - logp.detach())
    pairs = torch.as_tensor(w[:, None] * w[None, :]) * (apart[:, None] - apart[None, :]) ** 2 / 2  # i < j is half of all
    (found,) = torch.autograd.grad(pairs.sum(), logits, retain_graph=True)
    rows = np.ones(6, dtype=bool)
    credit = w * w.sum() * baselines.weighted_group_center(np.array(REWARD), w, np.zeros(6), rows)
    (expected,) = torch.autograd.grad(-2 * tau * (torch.as_tensor(credit) * logp).sum(), logits)
    close(found.numpy(), expected.numpy(), atol=1e-14)


def test_the_consistency_loss_is_the_population_variance() -> None:
    batch, logp = ragged()
    gone = np.where(batch.mask, logp - batch.logp_behavior, 0.0).sum(axis=1)
    apart = batch.reward - 0.7 * gone
    expected = sum(np.var(apart[batch.group == label]) for label in (1, 4)) / 2
    pairs = sum(((apart[:, None] - apart)[np.ix_(rows, rows)] ** 2).sum() / 2 / 25 for rows in (batch.group == 1, batch.group == 4))
    close(loss_and_gradient(PairwiseOPMD(0.7), batch, logp)[0], expected, rtol=1e-12)
    close(pairs / 2, expected, rtol=1e-12)
    shifted = replace(batch, reward=batch.reward + 12.5)
    close(loss_and_gradient(PairwiseOPMD(0.7), shifted, logp)[0], expected, rtol=1e-12)


def test_the_consistency_loss_is_zero_at_the_regularised_optimum() -> None:
    batch = one_group([0.0, 0.8, 1.0, 1.0])
    logp = batch.logp_behavior + (batch.reward[:, None] - 0.37) / 0.7  # whatever the normaliser
    for found in loss_and_gradient(PairwiseOPMD(0.7), batch, logp):
        close(found, 0.0, atol=1e-15)


# 3, 4: gates


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.6, 2.0)])
def test_one_sided_with_importance_weights_has_the_gradient_of_the_clip_and_another_value(low: float, high: float) -> None:
    batch, logp = ragged()
    loss, gradient = loss_and_gradient(REC(gate=OneSided(low, high), weighted=True), batch, logp)
    clip_loss, expected = loss_and_gradient(GRPO(eps_low=low, eps_high=high, scale="none"), batch, logp)
    close(gradient, expected, atol=1e-14)
    assert abs(loss - clip_loss) > 0.01


@pytest.mark.parametrize(("weighted", "plain"), [(False, REINFORCE()), (True, REINFORCE(truncate=inf))])
@pytest.mark.parametrize("gate", [None, OneSided(FREE, FREE), TwoSided(FREE, FREE), Ring(FREE, FREE, FREE, FREE)])
def test_without_a_bound_that_is_met_it_is_reinforce(gate: Gate | None, weighted: bool, plain: REINFORCE) -> None:
    batch, logp = ragged()
    loss, gradient = loss_and_gradient(REC(gate=gate, weighted=weighted), batch, logp)
    expected, by_token = loss_and_gradient(plain, batch, logp)
    close(loss, expected)
    close(gradient, by_token)


def test_what_the_two_sided_gate_keeps_the_ring_keeps_and_the_one_sided_too() -> None:
    rng = np.random.default_rng(2)
    rho, advantage = np.exp(rng.normal(size=5000)), rng.normal(size=5000)
    two = TwoSided().keep(rho, advantage)
    for wider in (Ring().keep(rho, advantage), OneSided().keep(rho, advantage)):
        assert np.all(two <= wider)
        assert np.any(two < wider)


def test_at_the_sampler_every_gate_is_open() -> None:
    batch, _ = ragged()
    _, expected = loss_and_gradient(UNGATED, batch, batch.logp_behavior)
    for method in (replace(method, aggregation=UNGATED.aggregation) for name, method in VARIANTS.items() if "REC" in name):
        close(loss_and_gradient(method, batch, batch.logp_behavior)[1], expected, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("OneSide", [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]),
        ("TwoSide", [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]),
        ("Ring", [1, 0, 1, 0, 0], [0, 0, 1, 0, 1]),
    ],
)
def test_the_table_of_gates(name: str, up: list[int], down: list[int]) -> None:
    rho, is_open = np.array([0.3, 0.5, 1.0, 1.5, 3.5]), np.array([up, down])
    batch = replace(one_group([0.0, 0.0], tokens=5), advantage=np.array([10.0, -10.0]))
    _, plain = loss_and_gradient(VARIANTS[f"REC-{name}-NoIS"], batch, batch.logp_behavior + np.log(rho))
    close(plain, is_open * [[-1.0], [1.0]], atol=1e-15)  # -A over ten tokens where it is open
    _, weighted = loss_and_gradient(VARIANTS[f"REC-{name}-IS"], batch, batch.logp_behavior + np.log(rho))
    close(weighted, plain * rho, rtol=1e-12)


# 5, 6, 7: AsymRE and RED


def test_the_shift_and_the_imitation_are_one_gradient_while_nothing_is_gated() -> None:
    batch, logp = ragged()
    _, shift = loss_and_gradient(AsymRE(shift=-0.1), batch, logp)
    _, imitation = loss_and_gradient(VARIANTS["AsymRE"], batch, logp)
    close(shift, imitation, atol=1e-15)
    assert np.abs(shift - loss_and_gradient(UNGATED, batch, logp)[1]).max() > 1e-3


def test_gated_tokens_are_imitated_by_the_regulariser_alone() -> None:
    rho = np.array([0.5, 1.5, 1.0, 1.5, 0.5])
    advantage = np.array([-0.5, 0.5, 0.5, -0.5, 0.5])  # signs that a shift of 0.1 leaves
    gated = np.array([True, True, False, False, False])
    batch = one_group([0.0] * 5)
    logp = batch.logp_behavior + np.log(rho)[:, None]
    _, shifted = loss_and_gradient(REC(), replace(batch, advantage=advantage + 0.1), logp)
    _, imitating = loss_and_gradient(REC(regularizer=ForwardKL(0.1)), replace(batch, advantage=advantage), logp)
    close(5 * (imitating - shifted)[:, 0], np.where(gated, -0.1, 0.0), atol=1e-15)
    # a shift that flips the sign opens the gate: A = -0.05 at ρ = 0.5
    found = [loss_and_gradient(REC(), replace(batch, advantage=np.full(5, a)), logp)[1][0, 0] for a in (-0.05, 0.05)]
    close(found, [0.0, -0.05 / 5])


@pytest.mark.parametrize(
    ("reward", "kept", "expected"), [([1.0] + [0.0] * 7, 0.25, (0.5, -0.5)), ([1.0] * 3 + [0.0], 1.0, (0.25, -0.75))]
)
def test_drop_balances_the_group(reward: list[float], kept: float, expected: tuple[float, float]) -> None:
    batch = one_group(reward)
    found = VARIANTS["RED-Drop"].credit(batch)
    good = batch.reward == 1.0
    close(found[good], expected[0], atol=1e-15)
    assert (found != 0).mean() == kept
    close(found[~good & (found != 0)], expected[1], atol=1e-15)
    _, gradient = loss_and_gradient(VARIANTS["RED-Drop"], batch, batch.logp_behavior)
    close(gradient[:, 0], -found / len(reward), rtol=1e-12)  # what was dropped stays in the denominator


def test_weighted_advantages_by_hand() -> None:
    batch = one_group([1.0, 0.0, 0.0, 0.0])
    found = VARIANTS["RED-Weight"].credit(batch)
    close(found, [1.587750, -0.194700, -0.194700, -0.194700], atol=5e-7)  # A·exp(A) with A = 3/4, -1/4
    close(found.sum(), 1.003650, atol=1e-6)  # of the four rounded numbers; not rounded, 1.003649
    _, gradient = loss_and_gradient(VARIANTS["RED-Weight"], batch, batch.logp_behavior + 0.3)
    close(gradient[:, 0], -found / 4, rtol=1e-12)


# 9, 10: formulas

RHO = np.array([[0.3, 0.7, 0.9], [1.1, 1.5, 3.5], [0.35, 1.0, 1.9], [0.5, 1.25, 3.3]])
CREDIT = np.array([[0.7], [-1.1], [-0.6], [0.4]])
OLD = np.full((4, 3), -1.0)
BASE = OLD + np.log(RHO)
GEOMETRIC = RHO.prod(axis=1, keepdims=True) ** (1 / 3)


def one_side(rho: Floats, low: float, high: float) -> NDArray[np.bool_]:
    return ((CREDIT >= 0) & (rho <= 1 + high)) | ((CREDIT <= 0) & (rho >= 1 - low))


TWO = (RHO >= 0.8) & (RHO <= 1.2)
RING = TWO | ((CREDIT >= 0) & (RHO <= 0.4)) | ((CREDIT <= 0) & (RHO >= 3.0))
FORMULAS: dict[str, Callable[[Floats], Floats]] = {
    "REC-OneSide-NoIS": lambda logp: -CREDIT * one_side(RHO, 0.2, 0.2) * logp,
    "REC-OneSide-IS": lambda logp: -CREDIT * one_side(RHO, 0.2, 0.2) * RHO * logp,
    "REC-OneSide-NoIS(0.6, 2.0)": lambda logp: -CREDIT * one_side(RHO, 0.6, 2.0) * logp,
    "REC-TwoSide-NoIS": lambda logp: -CREDIT * TWO * logp,
    "REC-TwoSide-IS": lambda logp: -CREDIT * TWO * RHO * logp,
    "REC-Ring-NoIS": lambda logp: -CREDIT * RING * logp,
    "REC-Ring-IS": lambda logp: -CREDIT * RING * RHO * logp,
    "REC-GSPO-OneSide": lambda logp: -CREDIT * one_side(GEOMETRIC, 3e-4, 4e-4) * logp,
    "OPMD": lambda logp: -CREDIT * logp + 0.1 * (logp - OLD) ** 2,
    "OPMD-sequence": lambda logp: -CREDIT * 3 * logp + 0.1 * (logp - OLD).sum(axis=1, keepdims=True) ** 2,
    "AsymRE": lambda logp: -CREDIT * logp - 0.1 * logp,
    "TrinityOPMD": lambda logp: -CREDIT * logp / 2,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_gradient_is_that_of_the_formula(name: str) -> None:
    batch = replace(one_group([0.0] * 4, tokens=3), advantage=CREDIT[:, 0])
    loss, gradient = loss_and_gradient(FAMILY[name], batch, BASE)
    formula, h, expected = FORMULAS[name], 1e-4, np.zeros((4, 3))
    close(loss, formula(BASE).mean(), rtol=1e-12)  # all responses are equally long: every mean is the same
    for place in np.ndindex(4, 3):
        step = np.zeros((4, 3))
        step[place] = h
        expected[place] = (formula(BASE + step).mean() - formula(BASE - step).mean()) / (2 * h)
    close(gradient, expected, rtol=1e-6, atol=1e-10)


def paper_opmd(batch: TokenBatch, logp: Floats, tau: float) -> float:
    """-(1/K) Σ (r - mean)·l + τ/(2K) Σ (l - l_old)² with the log-probabilities of whole responses."""
    whole, old = (np.where(batch.mask, values, 0.0).sum(axis=1) for values in (logp, batch.logp_behavior))
    return float(np.mean(-(batch.reward - batch.reward.mean()) * whole + tau / 2 * (whole - old) ** 2))


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_the_squared_sum_is_the_papers_form_and_the_sum_of_squares_only_of_single_tokens(tau: float) -> None:
    batch, logp = ragged()
    batch = replace(batch, group=np.zeros(10, dtype=int))
    by_level = {one: OPMD(coef=tau / 2, level=one, aggregation=SequenceSum()) for one in ("sequence", "token")}
    close(loss_and_gradient(by_level["sequence"], batch, logp)[0], paper_opmd(batch, logp, tau), rtol=1e-12)
    assert abs(loss_and_gradient(by_level["token"], batch, logp)[0] - paper_opmd(batch, logp, tau)) > 1e-3
    single = replace(batch, mask=np.arange(5) < np.ones((10, 1)))
    for method in by_level.values():
        close(loss_and_gradient(method, single, logp)[0], paper_opmd(single, logp, tau), rtol=1e-12)
    old = REC(gate=None, regularizer=K2(tau), aggregation=SequenceSum())  # d²/2 has taken in the 1/2
    close(loss_and_gradient(old, batch, logp)[1], loss_and_gradient(by_level["token"], batch, logp)[1], atol=1e-14)


# 11, 12, 13: symmetries


@MEMBERS
def test_the_order_of_responses_does_not_matter(method: TokenMethod) -> None:
    batch, logp = ragged()
    loss, gradient = loss_and_gradient(method, batch, logp)
    # which failures stay is a matter of their order within the group, which is kept where the method has one
    order = np.argsort(batch.group, kind="stable") if method == VARIANTS["RED-Drop"] else np.random.default_rng(5).permutation(10)
    found, by_token = loss_and_gradient(method, batch.rows(order), logp[order])
    close(found, loss, rtol=1e-12)
    close(by_token, gradient[order], atol=1e-14)
    renamed = replace(batch, group=np.where(batch.group == 4, -9, 70))
    close(loss_and_gradient(method, renamed, logp)[1], gradient, atol=1e-14)


@pytest.mark.parametrize("shift", [4.0, -0.7])
@MEMBERS
def test_a_constant_added_to_rewards_changes_nothing(method: TokenMethod, shift: float) -> None:
    batch, logp = ragged()
    loss, gradient = loss_and_gradient(method, batch, logp)
    found, by_token = loss_and_gradient(method, replace(batch, reward=batch.reward + shift), logp)
    close(found, loss, rtol=1e-11)
    close(by_token, gradient, atol=1e-13)


def test_the_weighted_mean_shifts_with_the_rewards() -> None:
    batch, _ = ragged()
    batches = (batch.reward, batch.group, np.ones(10, dtype=bool)), (batch.reward + 4.0, batch.group, np.ones(10, dtype=bool))
    ws = [weights.exp_advantage(baselines.group_center(*one), 0.5) for one in batches]
    found = [baselines.weighted_group_center(one[0], w, *one[1:]) for one, w in zip(batches, ws, strict=True)]
    close(found[1], found[0], atol=1e-13)


@pytest.mark.parametrize("factor", [3.0, 0.25])
def test_rewards_scale_the_gradient_unless_it_is_normalised(factor: float) -> None:
    batch, logp = ragged()
    recs = [method for name, method in VARIANTS.items() if name.startswith("REC")]
    cases = [(one, factor, 1e-14) for one in recs] + [(one, 1.0, 1e-5) for one in (GRPO(), REC(std_normalize=True))]
    for method, times, atol in cases:  # a normalised gradient moves by the 1e-6 next to the deviation
        _, gradient = loss_and_gradient(method, batch, logp)
        _, found = loss_and_gradient(method, replace(batch, reward=factor * batch.reward), logp)
        close(found, times * gradient, atol=atol)


# 8: three arms

ARMS = np.array([0.0, 0.8, 1.0])
MU, OTHER = (3, 6, 1), (35, 9, 6)  # how often each arm is logged: (0.3, 0.6, 0.1) and (0.7, 0.18, 0.12)


def logged(counts: tuple[int, ...], anchor: Floats) -> tuple[TokenBatch, NDArray[np.int64]]:
    """One group in which every arm is as frequent as the sampler takes it: its means are the exact expectations."""
    action = np.repeat(np.arange(3), counts)
    return replace(one_group(list(ARMS[action])), logp_behavior=np.log(anchor)[action][:, None]), action


def softmax(logits: Floats) -> Floats:
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


def ascend(force: Callable[[int, Floats], Floats], steps: int = 4000, rate: float = 0.5) -> Floats:
    """The policy after gradient steps from equal logits, of forces (3,): minus the loss's derivative by log π, per arm."""
    logits = np.zeros(3)
    for step in range(steps):
        policy = softmax(logits)
        pull = force(step, policy)
        logits += rate * (pull - policy * pull.sum())
    return softmax(logits)


def constant_force(method: TokenMethod, counts: tuple[int, ...] = MU) -> Floats:
    """The force of a method whose loss is linear in log π."""
    batch, action = logged(counts, np.full(3, 1 / 3))
    here, there = (loss_and_gradient(method, batch, batch.logp_behavior + drift)[1][:, 0] for drift in (0.0, -1.7))
    close(here, there, atol=1e-16)
    return np.bincount(action, -here)


@pytest.mark.parametrize(
    ("method", "counts", "value", "policy"),
    [
        (REINFORCE(), MU, 0.80, (0.0, 1.0, 0.0)),
        (AsymRE(-1.0), MU, 0.7276, (0.126, 0.732, 0.142)),
        (AsymRE(-0.1), MU, 0.80, (0.0, 1.0, 0.0)),
        (AsymRE(-0.3), MU, 0.82, (0.0, 0.9, 0.1)),
        (AsymRE(-0.5), MU, 0.832, (0.0, 0.84, 0.16)),
        (REC(gate=None, regularizer=ForwardKL(0.5)), MU, 0.832, (0.0, 0.84, 0.16)),
        (REC(gate=None, data=Weight(1.0)), MU, 0.8232, ()),
        (REC(gate=None, data=Weight(0.2)), MU, 0.8927, ()),
        (REC(gate=None, data=Weight(0.1)), MU, 0.9403, ()),
        (REINFORCE(), OTHER, 0.80, (0.0, 1.0, 0.0)),
    ],
)
def test_where_linear_members_end(method: TokenMethod, counts: tuple[int, ...], value: float, policy: tuple[float, ...]) -> None:
    force = constant_force(method, counts)
    found = ascend(lambda _step, _policy: force)
    close(found @ ARMS, value, atol=5e-4)
    close(found[: len(policy)], policy, atol=5e-4)


def test_dropping_failures_lets_the_rare_best_arm_win() -> None:
    batch, _ = logged(OTHER, np.full(3, 1 / 3))
    kept = VARIANTS["RED-Drop"].credit(batch)
    close(batch.reward[kept != 0] - kept[kept != 0], 0.44, rtol=1e-12)  # (0.18·0.8 + 0.12) / (2·0.3)
    close(constant_force(REINFORCE()), [-0.174, 0.132, 0.042], atol=1e-12)  # μ(r - 0.58): nothing is dropped there
    close(constant_force(VARIANTS["RED-Drop"]), constant_force(REINFORCE()), atol=1e-12)
    force = constant_force(VARIANTS["RED-Drop"], OTHER)
    assert ascend(lambda _step, _policy: force) @ ARMS > 0.99


@pytest.mark.parametrize("size", [4, 8])
def test_dropping_in_small_groups_ends_with_the_frequent_arm(size: int) -> None:
    # every ordered group and its chance: since all orders count, the failures that stay are random ones
    groups = np.array(list(product(range(3), repeat=size)))
    chance = np.array([0.3, 0.6, 0.1])[groups].prod(axis=1)
    force = np.zeros(3)
    for part in np.array_split(np.arange(len(groups)), max(1, len(groups) // 80)):
        action = groups[part].ravel()
        batch = replace(one_group(list(ARMS[action])), group=np.repeat(part, size))
        force += np.bincount(action, VARIANTS["RED-Drop"].credit(batch) * np.repeat(chance[part], size) / size, minlength=3)
    close(ascend(lambda _step, _policy: force) @ ARMS, 0.80, atol=5e-4)


def test_importance_weights_with_their_own_baseline_find_the_best_arm() -> None:
    mu = np.array([0.3, 0.6, 0.1])
    batch, action = logged(MU, mu)
    rows = batch.mask[:, 0]

    def credit(policy: Floats) -> tuple[Floats, Floats]:
        w = weights.ratio(np.log(policy), np.log(mu))[action]
        return w, baselines.weighted_group_center(batch.reward, w, batch.group, rows)

    policy = np.array([0.2, 0.5, 0.3])
    w, advantage = credit(policy)
    _, gradient = loss_and_gradient(REINFORCE(truncate=inf), replace(batch, advantage=advantage), np.log(policy)[action][:, None])
    close(-gradient[:, 0], w * advantage / 10, rtol=1e-12)
    found = ascend(lambda _step, policy: np.bincount(action, np.multiply(*credit(policy)) / 10))
    close(found @ ARMS, 0.9997, atol=5e-4)


def test_one_sided_gates_hold_back_the_frequent_arm() -> None:
    batch, action = logged(MU, np.full(3, 1 / 3))
    whole = replace(batch, advantage=REC().credit(batch))

    def force(step: int, policy: Floats) -> Floats:
        nonlocal whole
        logp = np.log(policy)[action][:, None]
        if step % 10 == 0:
            whole = replace(whole, logp_behavior=logp)
        return np.bincount(action, -loss_and_gradient(REC(), whole, logp)[1][:, 0])

    found = ascend(force)  # the last of 4000 steps is the end of a block
    close(found, [0.0, 0.816, 0.184], atol=5e-4)
    close(found @ ARMS, 0.8368, atol=5e-4)


def converged(method: TokenMethod, batch: TokenBatch, action: NDArray[np.int64]) -> Floats:
    """The policy at which a smooth loss, in the logits of three arms, has no gradient left."""
    whole = TokenBatch(*(torch.as_tensor(one) for one in (batch.reward, batch.group, batch.mask, batch.logp_behavior)))
    given = credited(method, whole) if batch.advantage is None else replace(whole, advantage=torch.as_tensor(batch.advantage))
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -objective(method, given, torch.log_softmax(logits, 0)[torch.as_tensor(action)][:, None], {})
        loss.backward()
        return loss

    optimizer.step(closure)
    return softmax(logits.detach().numpy())


@pytest.mark.parametrize("counts", [MU, OTHER, (1, 1, 1)])
def test_pairs_lead_to_the_regularised_optimum_whoever_sampled(counts: tuple[int, ...]) -> None:
    found = converged(PairwiseOPMD(), *logged(counts, np.full(3, 1 / 3)))
    close(found, softmax(ARMS), atol=1e-7)
    close(found, [0.1682, 0.3744, 0.4573], atol=5e-5)


def test_iterating_the_anchor_cools_the_optimum() -> None:
    policy, values = np.full(3, 1 / 3), []
    for times in range(1, 21):
        policy = converged(PairwiseOPMD(), *logged(MU, policy))
        close(policy, softmax(times * ARMS), atol=1e-5)
        values.append(policy @ ARMS)
    close([values[place - 1] for place in (1, 2, 10, 20)], [0.7569, 0.8508, 0.9761, 0.9964], atol=5e-4)


def test_the_pointwise_form_with_the_plain_mean_depends_on_the_sampler() -> None:
    found = converged(OPMD(coef=0.5), *logged(MU, np.full(3, 1 / 3)))
    close(found, [0.1814, 0.4023, 0.4163], atol=5e-4)
    other = converged(OPMD(coef=0.5), *logged(OTHER, np.full(3, 1 / 3)))
    assert np.abs(other - found).max() > 0.01
    assert np.abs(found - softmax(ARMS)).max() > 0.01


@pytest.mark.parametrize("counts", [MU, OTHER, (1, 1, 1)])
def test_the_pointwise_form_with_the_anchors_soft_value_does_not(counts: tuple[int, ...]) -> None:
    anchor, _ = logged((1, 1, 1), np.full(3, 1 / 3))
    credit = OPMD(coef=0.5, soft_baseline=True).credit(anchor)
    close(anchor.reward - credit, 0.683740, atol=5e-7)  # log((1 + exp 0.8 + e) / 3)
    batch, action = logged(counts, np.full(3, 1 / 3))
    batch = replace(batch, advantage=credit[action])
    _, gradient = loss_and_gradient(OPMD(coef=0.5), batch, np.log(softmax(ARMS))[action][:, None])
    close(gradient, 0.0, atol=1e-15)
