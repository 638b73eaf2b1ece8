"""What every method of the token family keeps, whatever it maximises."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from rl_core.config import method_from, to_table
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
from rl_core.methods.bapo import BAPO
from rl_core.methods.grpo import GRPO
from rl_core.methods.opmd import OPMD, TrinityOPMD
from rl_core.methods.ppo import PPO
from rl_core.methods.rec import REC, VARIANTS
from rl_core.methods.reinforce import REINFORCE
from rl_core.penalties import K3
from rl_core.registry import FAMILIES, METHODS, find
from tests.rl_core.methods_of_tokens import EVERY, batch, by_order, micro_batches

EACH = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@EACH
def test_loss_and_gradient_are_finite_and_there(method: TokenMethod) -> None:
    whole, logp = batch()
    loss, gradient = loss_and_gradient(method, whole, logp)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert gradient.any()


@EACH
def test_what_is_masked_does_not_matter(method: TokenMethod) -> None:
    whole, logp = batch()
    loss, gradient = loss_and_gradient(method, whole, logp)
    assert not gradient[~whole.mask].any()
    for junk in (np.nan, -np.inf, 1e30):
        names = ("logp_behavior", "logp_proximal", "logp_ref", "value")
        spoiled = {name: np.where(whole.mask, getattr(whole, name), junk) for name in names}
        found = loss_and_gradient(method, replace(whole, **spoiled), np.where(whole.mask, logp, junk))
        assert found[0] == loss
        np.testing.assert_array_equal(found[1], gradient)


@EACH
def test_appended_padding_changes_nothing(method: TokenMethod) -> None:
    whole, logp = batch()
    loss, gradient = loss_and_gradient(method, whole, logp)

    def wider(values: Any) -> Any:
        return np.concatenate((values, np.full((len(values), 3), False if values.dtype == bool else -np.inf)), axis=1)

    names = ("mask", "logp_behavior", "logp_proximal", "logp_ref", "value")
    found = loss_and_gradient(method, replace(whole, **{name: wider(getattr(whole, name)) for name in names}), wider(logp))
    close(found[0], loss)
    close(found[1][:, : gradient.shape[1]], gradient)


@EACH
def test_the_order_of_responses_does_not_matter(method: TokenMethod) -> None:
    whole, logp = batch()
    order = np.random.default_rng(1).permutation(len(logp))
    if by_order(method):  # which of a group's failures are left out is the sampler's chance, and it has none among equals
        whole = replace(whole, reward=(whole.reward > 0.5).astype(float))
        close(np.sort(credited(method, whole).advantage), np.sort(credited(method, whole.rows(order)).advantage))
        return
    loss, gradient = loss_and_gradient(method, whole, logp)
    found = loss_and_gradient(method, whole.rows(order), logp[order])
    close(found[0], loss)
    close(found[1], gradient[order])


@EACH
def test_names_of_groups_do_not_matter(method: TokenMethod) -> None:
    whole, logp = batch()
    loss, gradient = loss_and_gradient(method, whole, logp)
    found = loss_and_gradient(method, replace(whole, group=1000 - whole.group), logp)
    close(found[0], loss)
    close(found[1], gradient)


@EACH
def test_a_constant_added_to_the_rewards_changes_no_gradient(method: TokenMethod) -> None:
    whole, logp = batch()
    _, gradient = loss_and_gradient(method, whole, logp)
    _, found = loss_and_gradient(method, replace(whole, reward=whole.reward + 3.0), logp)
    np.testing.assert_allclose(found, gradient, rtol=1e-6, atol=1e-9)


@EACH
@pytest.mark.parametrize("size", [4, 8, 12])
def test_micro_batches_add_to_the_whole(method: TokenMethod, size: int) -> None:
    whole, logp = batch()
    loss, gradient = loss_and_gradient(method, whole, logp)
    given = credited(method, tensors(whole))
    current = torch.tensor(logp, requires_grad=True)
    parts, pieces = list(micro_batches(given, size)), torch.split(current, size)
    stats = statistics(method, [(part, piece.detach()) for part, piece in zip(parts, pieces, strict=True)])
    dens = [sum(some) for some in zip(*(denominators(method, part, stats) for part in parts), strict=True)]
    total = 0.0
    for part, piece in zip(parts, pieces, strict=True):
        value = -objective(method, part, piece, stats, dens)
        value.backward()
        total += value.item()
    close(total, loss)
    close(current.grad, gradient)


@EACH
def test_denominators_do_not_know_the_policy(method: TokenMethod) -> None:
    whole, logp = batch()
    given = credited(method, tensors(whole))
    stats = statistics(method, [(given, torch.tensor(logp))])
    loss = method.loss(given, torch.where(given.mask, torch.tensor(logp), 0.0), stats)
    for term, den in zip(loss.terms, denominators(method, given, stats), strict=True):
        assert term.den.item() == den.item() > 0


@EACH
def test_a_batch_without_a_counted_token_moves_nothing(method: TokenMethod) -> None:
    whole, logp = batch()
    loss, gradient = loss_and_gradient(method, replace(whole, mask=np.zeros_like(whole.mask)), logp)
    assert loss == 0
    assert not gradient.any()


@EACH
def test_a_prompt_with_one_response_is_no_trouble(method: TokenMethod) -> None:
    whole, logp = batch(prompts=5, responses=1)
    loss, gradient = loss_and_gradient(method, whole, logp)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def quoted(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {quoted(one)}" for name, one in value.items()) + "}"
    return repr(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else repr(value)


@EACH
def test_a_method_is_its_table(method: TokenMethod) -> None:
    table = {"method": type(method).__name__} | to_table(method)
    text = "".join(f"{name} = {quoted(value)}\n" for name, value in table.items())
    assert method_from(tomllib.loads(text)) == method


@pytest.mark.parametrize("method", METHODS, ids=lambda one: one.__name__)
def test_the_paper_says_where_every_default_is_from(method: Any) -> None:
    paper = method.paper
    assert set(paper.defaults) == {one.name for one in fields(method)}
    assert all((paper.source, paper.title, paper.spec, paper.equations, *paper.defaults.values()))
    assert find(method.__name__.lower()) is method
    assert find(method.__name__.upper()) is method


SAME: dict[str, tuple[TokenMethod, TokenMethod]] = {
    "REC without a gate": (REC(gate=None), REINFORCE()),
    "OPMD without its distance": (OPMD(coef=0.0), REINFORCE()),
    "TrinityOPMD that does not shrink": (TrinityOPMD(temperature=0.0), REINFORCE()),
    "AsymRE without a shift": (AsymRE(shift=0.0), REINFORCE()),
    "REC's record of OPMD": (VARIANTS["OPMD"], OPMD()),
    "REC's record of AsymRE": (VARIANTS["AsymRE"], AsymRE()),
    "BAPO that may not move": (BAPO(low_start=0.8, low_limit=0.8, high_start=1.2, high_limit=1.2), GRPO()),
    "BAPO without a target": (BAPO(target=0.0), GRPO(eps_low=0.4)),
    "GRPO that clips nothing, gated REINFORCE with a weight": (GRPO(scale="none"), REC(weighted=True)),
    "GRPO whose KL costs nothing": (GRPO(kl=K3(0.0)), GRPO()),
}


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME)
def test_a_method_is_its_parent_where_what_is_new_is_off(one: TokenMethod, other: TokenMethod) -> None:
    whole, logp = batch()
    whole = replace(whole, logp_proximal=None)
    close(loss_and_gradient(one, whole, logp)[1], loss_and_gradient(other, whole, logp)[1])


@pytest.mark.parametrize("method", FAMILIES["token"], ids=lambda one: one.__name__)
def test_a_token_bandit_is_solved(method: Any) -> None:
    """Four answers of one token, the third is right: from 1/4 to above 0.9 within 150 steps of 4 prompts x 8 answers."""
    rng, logits = np.random.default_rng(0), np.zeros(4)
    for _ in range(150):
        chance = np.exp(logits - logits.max())
        chance /= chance.sum()
        answers = rng.choice(4, size=32, p=chance)
        logp = np.log(chance)[answers][:, None]
        reward = (answers == 2).astype(float)
        value = np.full((32, 1), reward.mean()) if method is PPO else None
        made = TokenBatch(reward, np.repeat(np.arange(4), 8), np.ones((32, 1), dtype=bool), logp, value=value)
        _, gradient = loss_and_gradient(method(), made, logp)
        score = np.eye(4)[answers] - chance
        logits -= 1.0 * (gradient * score).sum(axis=0)
    assert chance[2] > 0.9


def tensors(whole: TokenBatch) -> TokenBatch:
    """The same as tensors."""
    arrays = {one.name: getattr(whole, one.name) for one in fields(whole)}
    return replace(whole, **{name: torch.from_numpy(array) for name, array in arrays.items() if array is not None})
