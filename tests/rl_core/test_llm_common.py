"""What baselines of language-model RL have in common: credit, surrogates, penalties, aggregation, invariance to batching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from math import exp, inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ope.primitives import divergences, surrogates, weights
from ope.primitives.baselines import group_center, weighted_group_center
from rl_core.aggregation import Aggregation, SequenceMean, SequenceSum, SequenceSumNorm, TokenMean
from rl_core.corrections import MaskOutside, Truncate
from rl_core.families.token import (
    TokenBatch,
    TokenMethod,
    credited,
    denominators,
    loss_and_gradient,
    objective,
    statistics,
)
from rl_core.methods.asymre import AsymRE
from rl_core.methods.bapo import BAPO, RECOMMENDED
from rl_core.methods.grpo import GRPO, KIN
from rl_core.methods.opmd import OPMD, PairwiseOPMD, TrinityOPMD
from rl_core.methods.ppo import PPO
from rl_core.methods.rec import REC, VARIANTS, Drop
from rl_core.methods.reinforce import REINFORCE
from rl_core.penalties import K2, K3, CorrectedK3, StraightThroughK3
from tests.rl_core.methods_of_tokens import micro_batches

Floats = NDArray[np.float64]
FREE = 1e9  # a bound that no ratio meets
AGGREGATIONS: list[Aggregation] = [TokenMean(), SequenceMean(), SequenceSum(), SequenceSumNorm(10.0)]
METHODS: dict[str, TokenMethod] = {
    "REINFORCE": REINFORCE(),
    "REINFORCE-TIS": REINFORCE(truncate=2.0),
    "PPO": PPO(),
    "PPO-dual": PPO(dual_clip=3.0),
    **KIN,
    "GRPO-batch-std": GRPO(scale="batch"),
    "GRPO-stale-mask": GRPO(mask_stale=0.1),
    "GRPO-TIS": GRPO(correction=Truncate(2.0)),
    "GRPO-IcePop": GRPO(correction=MaskOutside(0.5, 2.0)),
    **{f"GRPO-{type(kl).__name__}": GRPO(kl=kl) for kl in (K2(0.1), K3(0.1), CorrectedK3(0.1), StraightThroughK3(0.1))},
    **VARIANTS,
    "OPMD-sequence": OPMD(level="sequence"),
    "OPMD-soft": OPMD(soft_baseline=True),
    "TrinityOPMD": TrinityOPMD(),
    "PairwiseOPMD": PairwiseOPMD(),
    "AsymRE-shift": AsymRE(),
    "BAPO": BAPO(target=0.6),
    "BAPO-gradient": RECOMMENDED,
}
close = partial(np.testing.assert_allclose, rtol=1e-12)


def one_group(reward: list[float], tokens: int = 1) -> TokenBatch:
    """One response of `tokens` tokens per reward, all of one prompt."""
    shape = (len(reward), tokens)
    return TokenBatch(np.array(reward), np.zeros(len(reward), dtype=int), np.ones(shape, dtype=bool), np.full(shape, -1.0))


def ragged(drift: float = 0.3) -> tuple[TokenBatch, Floats]:
    """Eight responses of 1 to 6 tokens to two prompts, and log-probabilities that drifted from those of the sampler."""
    rng = np.random.default_rng(7)
    lengths = np.array([1, 6, 3, 2, 5, 4, 6, 2])
    behavior = rng.uniform(-3, -0.1, (8, 6))
    proximal, logp, ref = (behavior + drift * rng.normal(size=(8, 6)) for _ in range(3))
    batch = TokenBatch(
        reward=rng.normal(size=8),
        group=np.array([3, 3, 8, 8, 3, 8, 3, 8]),
        mask=np.arange(6) < lengths[:, None],
        logp_behavior=behavior,
        logp_proximal=proximal,
        logp_ref=ref,
        value=rng.normal(size=(8, 6)),
    )
    return batch, logp


def tensors(batch: TokenBatch) -> TokenBatch:
    found = {one.name: getattr(batch, one.name) for one in fields(batch)}
    return TokenBatch(**{name: None if value is None else torch.as_tensor(value) for name, value in found.items()})


def mean(values: Floats, mask: NDArray[np.bool_]) -> float:
    """token-mean."""
    return float(np.where(mask, values, 0.0).sum() / mask.sum())


# 1: advantages


@pytest.mark.parametrize(
    ("method", "expected", "rtol"),
    [
        (GRPO(eps_std=0.0), [1.5, -0.5, -0.5, -0.5], 1e-12),
        (GRPO(eps_std=1e-6), [1.499997, -0.499999, -0.499999, -0.499999], 1e-6),
        (GRPO(eps_std=1e-4), [1.499700, -0.499900, -0.499900, -0.499900], 1e-6),
        (GRPO(eps_std=0.0, unbiased=False), [1.732051, -0.577350, -0.577350, -0.577350], 1e-6),
        (REC(std_normalize=True), [1.732047, -0.577349, -0.577349, -0.577349], 1e-6),  # population, 1e-6
        (GRPO(scale="none"), [0.75, -0.25, -0.25, -0.25], 1e-12),
        (KIN["Dr.GRPO"], [0.75, -0.25, -0.25, -0.25], 1e-12),
        (REINFORCE(), [0.75, -0.25, -0.25, -0.25], 1e-12),
        (KIN["RLOO"], [1.0, -1 / 3, -1 / 3, -1 / 3], 1e-12),
    ],
)
def test_advantages_of_one_success_in_four(method: TokenMethod, expected: list[float], rtol: float) -> None:
    close(method.credit(one_group([1.0, 0.0, 0.0, 0.0])), expected, rtol=rtol)


def test_the_batch_scale_is_centred_by_group_and_divided_by_one_deviation() -> None:
    batch = replace(one_group([1.0, 0.0, 6.0, 2.0]), group=np.array([0, 0, 1, 1]))
    found = GRPO(scale="batch", eps_std=0.0).credit(batch)
    close(found, np.array([0.5, -0.5, 2.0, -2.0]) / np.std([1.0, 0.0, 6.0, 2.0], ddof=1), rtol=1e-12)


# RED-Weight is left out: its effective advantages are meant not to cancel.
@pytest.mark.parametrize("method", [REINFORCE(), *KIN.values(), GRPO(scale="batch"), BAPO(), REC(), REC(data=Drop())])
def test_advantages_of_a_group_sum_to_zero(method: TokenMethod) -> None:
    batch, _ = ragged()
    found = method.credit(batch)
    close([found[batch.group == label].sum() for label in (3, 8)], 0.0, atol=1e-6)


@pytest.mark.parametrize("reward", [1.0, 0.1, -3.7])
@pytest.mark.parametrize("method", [REINFORCE(), *KIN.values(), GRPO(scale="batch"), BAPO(), VARIANTS["REC-OneSide-IS"]])
def test_a_group_of_equal_rewards_moves_nothing(method: TokenMethod, reward: float) -> None:
    batch = one_group([reward] * 3, tokens=2)
    close(method.credit(batch), 0.0, atol=1e-9)
    _, gradient = loss_and_gradient(method, batch, batch.logp_behavior + 0.1)
    close(gradient, 0.0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "eps"), [(np.float32, 1e-6), (np.float64, 0.0)])
def test_equal_rewards_whose_mean_is_rounded_move_nothing(dtype: type, eps: float) -> None:
    batch = one_group([-3.3] * 7)
    found = GRPO(eps_std=eps).credit(replace(batch, reward=batch.reward.astype(dtype)))
    close(found, 0.0, atol=1e-6)


# 2: at the sampler


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda one: type(one).__name__)
def test_every_surrogate_has_one_gradient_where_the_policy_is_the_sampler(aggregation: Aggregation) -> None:
    batch, _ = ragged()
    batch = replace(batch, logp_proximal=None, advantage=np.random.default_rng(0).normal(size=8))
    of_one = [
        REINFORCE(aggregation=aggregation),
        REINFORCE(truncate=inf, aggregation=aggregation),
        GRPO(eps_low=FREE, eps_high=FREE, aggregation=aggregation),
        GRPO(aggregation=aggregation),
        PPO(aggregation=aggregation),
        replace(KIN["GSPO"], aggregation=aggregation),
        replace(KIN["CISPO"], aggregation=aggregation),
    ]
    first, *others = (loss_and_gradient(method, batch, batch.logp_behavior)[1] for method in of_one)
    assert np.abs(first).max() > 0.01
    for other in others:
        close(other, first, atol=1e-12)


@pytest.mark.parametrize("method", [PPO(), GRPO(), KIN["GSPO"]])
def test_the_value_at_the_sampler_is_minus_the_mean_advantage(method: TokenMethod) -> None:
    batch, _ = ragged()
    advantage = np.random.default_rng(0).normal(size=(8, 6))
    batch = replace(batch, logp_proximal=None, advantage=advantage)
    per_sequence = [advantage[row][batch.mask[row]].mean() for row in range(8)]
    expected = np.mean(per_sequence) if method == KIN["GSPO"] else mean(advantage, batch.mask)
    close(loss_and_gradient(method, batch, batch.logp_behavior)[0], -expected, rtol=1e-12)


# 3, 4: off-policy estimators of bandits


def snips_problem() -> tuple[TokenBatch, Floats, Floats, Floats]:
    """Responses of one token, their log-probabilities, weights, and SNIPS's gradient by log-probability."""
    rng = np.random.default_rng(3)
    batch = one_group(list(rng.normal(size=7)))
    logp = batch.logp_behavior + rng.normal(size=(7, 1))
    current = torch.tensor(logp, requires_grad=True)
    w = (current - torch.as_tensor(batch.logp_behavior)).exp()[:, 0]
    (gradient,) = torch.autograd.grad((w * torch.as_tensor(batch.reward)).sum() / w.sum(), current)
    return batch, logp, w.detach().numpy(), gradient.numpy()


def test_a_weighted_group_mean_makes_reinforce_the_gradient_of_snips() -> None:
    batch, logp, w, gradient = snips_problem()
    rows = batch.mask[:, 0]
    weighted = replace(batch, advantage=weighted_group_center(batch.reward, w, batch.group, rows))
    _, found = loss_and_gradient(REINFORCE(truncate=inf), weighted, logp)
    close(-found * 7 / w.sum(), gradient, atol=1e-12)
    plain = replace(batch, advantage=group_center(batch.reward, batch.group, rows))
    _, other = loss_and_gradient(REINFORCE(truncate=inf), plain, logp)
    assert np.abs(-other * 7 / w.sum() - gradient).max() > 0.01


def test_with_unit_weights_the_group_mean_is_snips_already() -> None:
    batch, _, _, _ = snips_problem()
    current = torch.tensor(batch.logp_behavior, requires_grad=True)
    w = (current - current.detach()).exp()[:, 0]
    (gradient,) = torch.autograd.grad((w * torch.as_tensor(batch.reward)).sum() / w.sum(), current)
    close(-loss_and_gradient(REINFORCE(), batch, batch.logp_behavior)[1], gradient.numpy(), atol=1e-15)


def by_logits(method: TokenMethod, batch: TokenBatch, action: NDArray[np.int64], logits: Floats) -> Floats:
    """Gradient of the objective by the logits of a softmax; rows repeat an action as often as the sampler takes it."""
    z = torch.tensor(logits, requires_grad=True)
    logp = torch.log_softmax(z, 0)[torch.as_tensor(action)][:, None]
    return torch.autograd.grad(objective(method, tensors(batch), logp, {}), z)[0].numpy()


def test_a_constant_baseline_does_not_move_the_expected_gradient_of_ips() -> None:
    action, mu = np.repeat([0, 1, 2], [3, 6, 1]), np.array([0.3, 0.6, 0.1])
    batch = replace(one_group([0.0] * 10), logp_behavior=np.log(mu[action])[:, None])
    logits = np.array([0.4, -0.7, 1.3])
    ones = replace(batch, advantage=np.ones(10))
    close(by_logits(REINFORCE(truncate=inf), ones, action, logits), 0.0, atol=1e-12)  # E_μ[w ∇log π] = 0
    assert np.abs(by_logits(REINFORCE(), ones, action, logits)).max() > 0.1  # E_μ[∇log π] is not
    reward = np.array([0.0, 0.8, 1.0])[action]
    found = [by_logits(REINFORCE(truncate=inf), replace(batch, advantage=reward - b), action, logits) for b in (0.0, 0.58, 5.0)]
    close(found[1], found[0], atol=1e-12)
    close(found[2], found[0], atol=1e-12)


# 5: PPO's gate

RHO = np.array([0.3, 0.7, 0.79, 0.81, 1.0, 1.19, 1.21, 1.5, 2.9, 3.1])


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("kind", [PPO, GRPO])
def test_the_gate_of_the_clip_is_one_sided(kind: type[PPO] | type[GRPO], dual_clip: float | None, advantage: float) -> None:
    batch = replace(one_group([0.0] * len(RHO)), advantage=np.full(len(RHO), advantage))
    _, gradient = loss_and_gradient(kind(dual_clip=dual_clip), batch, batch.logp_behavior + np.log(RHO)[:, None])
    shut = RHO > 1.2 if advantage > 0 else RHO < 0.8
    if dual_clip is not None and advantage < 0:
        shut = shut | (dual_clip < RHO)
    close(gradient[:, 0] * len(RHO), np.where(shut, 0.0, -RHO * advantage), rtol=1e-12)


def test_the_clipped_value_is_pessimistic() -> None:
    rng = np.random.default_rng(1)
    rho, advantage = rng.uniform(0, 4, 1000), rng.normal(size=1000)
    assert np.all(surrogates.clipped(rho, advantage, 0.8, 1.2) <= rho * advantage)
    batch, logp = ragged(drift=1.0)
    batch = replace(batch, logp_proximal=None, advantage=rng.normal(size=8))
    free = GRPO(eps_low=FREE, eps_high=FREE)
    assert loss_and_gradient(GRPO(), batch, logp)[0] > loss_and_gradient(free, batch, logp)[0]


# 6: KL penalties

SHARES = np.array([1, 2, 3, 4, 5, 5]) / 20


def penalty_gradients() -> dict[str, Floats]:
    """Expected gradient by the logits of each penalty and of both divergences: six actions, in 20 rows that are π's shares."""
    action = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 5])
    ref = np.log(np.array([4, 1, 2, 6, 3, 4]) / 20)
    behavior = np.log(SHARES)
    batch = replace(
        one_group([0.0] * 20), advantage=np.zeros(20), logp_ref=ref[action][:, None], logp_behavior=behavior[action][:, None]
    )
    kinds = (K2(1.0), K3(1.0), CorrectedK3(1.0), StraightThroughK3(1.0))
    found = {type(kl).__name__: -by_logits(GRPO(kl=kl), batch, action, behavior) for kl in kinds}
    z = torch.tensor(behavior, requires_grad=True)
    logp, anchor = torch.log_softmax(z, 0), torch.as_tensor(ref)
    sampled = (torch.as_tensor(SHARES) * divergences.k1(logp, anchor)).sum()
    found["k1"] = torch.autograd.grad(sampled, z, retain_graph=True)[0].numpy()
    found["reverse"] = torch.autograd.grad(divergences.kl(logp.exp(), anchor.exp()), z, retain_graph=True)[0].numpy()
    found["forward"] = torch.autograd.grad(divergences.kl(anchor.exp(), logp.exp()), z)[0].numpy()
    return found


def test_each_penalty_has_the_gradient_of_its_divergence() -> None:
    found = penalty_gradients()
    assert np.abs(found["reverse"] - found["forward"]).max() > 0.01
    close(found["k1"], 0.0, atol=1e-12)
    close(found["K2"], found["reverse"], atol=1e-12)
    close(found["K3"], found["forward"], atol=1e-12)
    close(found["CorrectedK3"], found["reverse"], atol=1e-12)
    close(found["StraightThroughK3"], found["reverse"], atol=1e-12)


@pytest.mark.parametrize(("d", "two", "three"), [(0.1, 0.005, 0.00483742), (-0.5, 0.125, 0.14872127)])
def test_values_of_the_penalties(d: float, two: float, three: float) -> None:
    batch = replace(one_group([0.0]), logp_ref=np.array([[-1.0]]), advantage=np.zeros(1))
    logp = np.array([[-1.0 + d]])
    for kl, expected in [(K2(1.0), two), (K3(1.0), three), (StraightThroughK3(1.0), three), (CorrectedK3(1.0), exp(d) * three)]:
        close(loss_and_gradient(GRPO(kl=kl), batch, logp)[0], expected, atol=1e-8)
    close(divergences.k1(logp, batch.logp_ref), [[d]], rtol=1e-12)


# 7, 8, 9: aggregation, micro-batches, padding


@pytest.mark.parametrize(("aggregation", "expected"), list(zip(AGGREGATIONS, [0.2, 0.5, 1.0, 0.1], strict=True)))
def test_a_short_sequence_of_ones_and_a_long_one_of_zeros(aggregation: Aggregation, expected: float) -> None:
    batch = one_group([1.0, 0.0], tokens=8)
    batch = replace(batch, mask=np.arange(8) < np.array([[2], [8]]), advantage=np.array([1.0, 0.0]))
    close(loss_and_gradient(GRPO(aggregation=aggregation), batch, batch.logp_behavior)[0], -expected, rtol=1e-12)


def gradient_of_parts(method: TokenMethod, parts: list[TokenBatch], logps: list[Floats], *, own: bool = False) -> list[Floats]:
    """Gradients by each part's log-probabilities, with the denominators and sums of all parts, or with its own denominators."""
    currents = [torch.tensor(logp, requires_grad=True) for logp in logps]
    with torch.no_grad():
        stats = statistics(method, list(zip(parts, currents, strict=True)))
        dens = [sum(dens) for dens in zip(*(denominators(method, part, stats) for part in parts), strict=True)]
    found = []
    for part, current in zip(parts, currents, strict=True):
        value = objective(method, part, current, stats, None if own else dens)
        found.append(-torch.autograd.grad(value, current)[0].numpy())
    return found


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("kind", [REINFORCE(truncate=2.0), PPO(), GRPO(kl=K2(0.1)), KIN["GSPO"], VARIANTS["OPMD"], BAPO(0.6)])
def test_gradients_of_micro_batches_add_to_that_of_the_batch(kind: Any, aggregation: Aggregation, size: int) -> None:
    method = replace(kind, aggregation=aggregation)
    batch, logp = ragged()
    _, whole = loss_and_gradient(method, batch, logp)
    parts = list(micro_batches(credited(method, tensors(batch)), size))
    logps = [logp[start : start + size] for start in range(0, 8, size)]
    close(np.concatenate(gradient_of_parts(method, parts, logps)), whole, atol=1e-12)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_gradients_of_an_arbitrary_partition_add_to_that_of_the_batch(method: TokenMethod) -> None:
    batch, logp = ragged()
    _, whole = loss_and_gradient(method, batch, logp)
    places = [[0, 1, 4, 6], [2, 3, 5, 7]] if isinstance(method, PairwiseOPMD) else [[5, 0], [7, 2, 1, 4], [3], [6]]
    parts = [credited(method, tensors(batch)).rows(torch.tensor(place)) for place in places]
    found = gradient_of_parts(method, parts, [logp[place] for place in places])
    for place, gradient in zip(places, found, strict=True):
        close(gradient, whole[place], atol=1e-12)


def test_a_local_token_mean_is_another_gradient() -> None:
    batch, logp = ragged()
    _, whole = loss_and_gradient(GRPO(), batch, logp)
    parts = list(micro_batches(credited(GRPO(), tensors(batch)), 2))
    local = gradient_of_parts(GRPO(), parts, [logp[start : start + 2] for start in range(0, 8, 2)], own=True)
    assert np.abs(np.concatenate(local) / len(parts) - whole).max() > 1e-3 * np.abs(whole).max()


def padded(values: Floats, fill: float) -> Floats:
    return np.concatenate((values, np.full((8, 3), fill)), axis=1)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_what_the_mask_leaves_out_changes_nothing(method: TokenMethod) -> None:
    batch, logp = ragged()
    loss, gradient = loss_and_gradient(method, batch, logp)
    for junk, other in [(-2.5, -0.1), (-inf, -1.0), (-1.0, -inf), (-inf, -inf), (nan, nan)]:
        wide = TokenBatch(
            batch.reward,
            batch.group,
            np.concatenate((batch.mask, np.zeros((8, 3), dtype=bool)), axis=1),
            padded(np.where(batch.mask, batch.logp_behavior, other), other),
            padded(np.where(batch.mask, batch.logp_proximal, other), other),
            padded(np.where(batch.mask, batch.logp_ref, other), other),
            padded(np.where(batch.mask, batch.value, other), other),
        )
        found, by_token = loss_and_gradient(method, wide, padded(np.where(batch.mask, logp, junk), junk))
        close(found, loss, rtol=1e-12)
        close(by_token, padded(gradient, 0.0), atol=1e-14)


# 10, 11, 12: sequences


def test_gspo_weighs_by_the_geometric_mean_of_the_sequence() -> None:
    log_rho = np.array([[0.3, -0.1, 0.1]])
    batch = replace(one_group([0.0], tokens=3), advantage=np.ones(1))
    gspo = GRPO(level="sequence", eps_low=FREE, eps_high=FREE, aggregation=SequenceMean())
    loss, gradient = loss_and_gradient(gspo, batch, batch.logp_behavior + log_rho)
    close(loss, -1.105171, rtol=1e-6)  # exp(0.1)
    close(gradient, np.full((1, 3), -exp(0.1) / 3), rtol=1e-12)
    close(weights.sequence_ratio(log_rho, batch.mask, length_normalized=False), 1.349859, rtol=1e-6)  # exp(0.3)


def test_gspo_of_single_tokens_is_ppo() -> None:
    batch = replace(one_group([0.0] * len(RHO)), advantage=np.linspace(-1.0, 1.3, len(RHO)))
    logp = batch.logp_behavior + np.log(RHO)[:, None]
    loss, gradient = loss_and_gradient(GRPO(level="sequence", aggregation=SequenceMean()), batch, logp)
    expected, by_token = loss_and_gradient(PPO(), batch, logp)
    close(loss, expected, rtol=1e-14)
    close(gradient, by_token, rtol=1e-14)


def test_the_product_of_token_ratios_is_the_ratio_of_the_sequence() -> None:
    batch, logp = ragged()
    log_rho = weights.log_ratio(logp, batch.logp_behavior)
    product = np.where(batch.mask, np.exp(log_rho), 1.0).prod(axis=1)
    whole = weights.sequence_ratio(log_rho, batch.mask, length_normalized=False)
    close(whole, product, rtol=1e-12)
    geometric = weights.sequence_ratio(log_rho, batch.mask, length_normalized=True)
    close(geometric ** batch.mask.sum(axis=1), whole, rtol=1e-12)
    close(weights.per_decision(np.where(batch.mask, log_rho, 0.0))[:, -1], whole, rtol=1e-12)


@pytest.mark.parametrize(("w", "share"), [([1.0] * 4, 1.0), ([4.0, 0.0, 0.0, 0.0], 0.25)])
def test_the_effective_share_of_a_sample(w: list[float], share: float) -> None:
    for scale in (1.0, 0.1, 30.0):
        close(weights.effective_sample_size(scale * np.array(w)) / 4, share, rtol=1e-12)


# 13: three policies


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda one: type(one).__name__)
def test_the_decoupled_ratio_times_the_mismatch_is_the_ratio_to_the_sampler(aggregation: Aggregation) -> None:
    batch, logp = ragged()
    decoupled = GRPO(eps_low=FREE, eps_high=FREE, scale="none", correction=Truncate(inf), aggregation=aggregation)
    bypass = REINFORCE(truncate=inf, aggregation=aggregation)
    _, expected = loss_and_gradient(bypass, batch, logp)
    close(loss_and_gradient(decoupled, batch, logp)[1], expected, atol=1e-13)
    assert np.abs(loss_and_gradient(replace(decoupled, correction=None), batch, logp)[1] - expected).max() > 1e-3


# 14: finite differences of the formulas, what carries no gradient frozen at the base point

LOG_RHO = np.log([[0.4, 0.7, 0.9, 1.1], [1.35, 1.9, 3.4, 1.0], [0.5, 0.95, 1.05, 1.3], [0.75, 1.15, 2.5, 3.2]])
LENGTHS = np.array([[4], [4], [3], [4]])
MISMATCH = np.log([[0.9, 1.3, 1.0, 2.4], [1.1, 0.4, 0.8, 1.0], [1.2, 3.0, 0.7, 1.0], [1.0, 0.6, 1.5, 0.9]])
CREDIT = np.array([[0.7], [-1.1], [-1.6], [0.4]]) * np.array([1.0, 1.3, 0.8, 1.1])
OLD = np.full((4, 4), -1.0)
REF = OLD + np.array([[0.2, -0.3, 0.5, 0.0], [0.1, 0.7, -0.6, 0.4], [-0.2, 0.3, 0.1, 0.0], [0.6, -0.5, 0.2, -0.1]])
BASE = OLD + LOG_RHO
MASK = np.arange(4) < LENGTHS
W = np.exp(-MISMATCH)  # π_old/μ with log μ = OLD + MISMATCH
GEOMETRIC = np.exp(np.where(MASK, LOG_RHO, 0.0).sum(axis=1, keepdims=True) / LENGTHS)
# only the second and the third sequence have failed, and their drifts are on both sides of -0.6
STALE = (CREDIT < 0) & (np.where(MASK, OLD + MISMATCH - BASE, 0.0).sum(axis=1, keepdims=True) / LENGTHS > -0.6)


def ppo_loss(rho: Floats, low: float = 0.8, high: float = 1.2) -> Floats:
    return -np.minimum(rho * CREDIT, np.clip(rho, low, high) * CREDIT)


def dual_loss(rho: Floats) -> Floats:
    return np.where(CREDIT < 0, np.minimum(-3.0 * CREDIT, ppo_loss(rho)), ppo_loss(rho))


def k3_loss(logp: Floats) -> Floats:
    return np.exp(REF - logp) - 1 + logp - REF


def rho_of(logp: Floats) -> Floats:
    return np.exp(logp - OLD)


def pi_over_mu(logp: Floats) -> Floats:
    return np.exp(logp - OLD - MISMATCH)


FORMULAS: list[tuple[TokenMethod, Callable[[Floats], Floats]]] = [
    (REINFORCE(), lambda logp: -CREDIT * logp),
    (REINFORCE(truncate=inf), lambda logp: -pi_over_mu(BASE) * CREDIT * logp),
    (REINFORCE(truncate=1.5), lambda logp: -np.minimum(pi_over_mu(BASE), 1.5) * CREDIT * logp),
    (PPO(), lambda logp: ppo_loss(rho_of(logp))),
    (PPO(dual_clip=3.0), lambda logp: dual_loss(rho_of(logp))),
    (GRPO(), lambda logp: ppo_loss(rho_of(logp))),
    (GRPO(dual_clip=3.0), lambda logp: dual_loss(rho_of(logp))),
    (KIN["DAPO"], lambda logp: ppo_loss(rho_of(logp), high=1.28)),
    (KIN["CISPO"], lambda logp: -np.minimum(rho_of(BASE), 1.28) * CREDIT * logp),
    (GRPO(level="sequence", eps_low=0.05, eps_high=0.05), lambda logp: ppo_loss(GEOMETRIC * np.exp(logp - BASE), 0.95, 1.05)),
    (GRPO(correction=Truncate(2.0)), lambda logp: np.minimum(W, 2.0) * ppo_loss(rho_of(logp))),
    (GRPO(correction=MaskOutside(0.5, 1.5)), lambda logp: np.where((W >= 0.5) & (W <= 1.5), W, 0.0) * ppo_loss(rho_of(logp))),
    (GRPO(mask_stale=-0.6), lambda logp: np.where(STALE, 0.0, ppo_loss(rho_of(logp)))),
    (GRPO(kl=K2(0.3)), lambda logp: ppo_loss(rho_of(logp)) + 0.3 * (logp - REF) ** 2 / 2),
    (GRPO(kl=K3(0.3)), lambda logp: ppo_loss(rho_of(logp)) + 0.3 * k3_loss(logp)),
    (GRPO(kl=CorrectedK3(0.3)), lambda logp: ppo_loss(rho_of(logp)) + 0.3 * np.minimum(pi_over_mu(logp), 2.0) * k3_loss(logp)),
]


@pytest.mark.parametrize(("method", "formula"), FORMULAS)
def test_the_gradient_is_that_of_the_formula(method: TokenMethod, formula: Callable[[Floats], Floats]) -> None:
    batch = TokenBatch(np.zeros(4), np.arange(4), MASK, OLD + MISMATCH, OLD, REF, advantage=CREDIT)
    loss, gradient = loss_and_gradient(method, batch, BASE)
    close(loss, mean(formula(BASE), MASK), rtol=1e-12)
    h, expected = 1e-4, np.zeros((4, 4))
    for place in np.ndindex(4, 4):
        step = np.zeros((4, 4))
        step[place] = h
        expected[place] = (mean(formula(BASE + step), MASK) - mean(formula(BASE - step), MASK)) / (2 * h)
    close(gradient, expected, rtol=1e-6, atol=1e-10)
