"""Models of Hugging Face, tiny and random: ragged prompts and responses, padding that nothing sees, training."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ope.data import InputError
from rl_core.methods.grpo import GRPO
from rl_core.methods.ppo import PPO
from rl_core.models.hf import HFModel, load
from rl_core.penalties import K2
from rl_core.rollout import CachedSampler, Rollouts, token_logps
from rl_core.trainers.token import Schedule, Trainer, run

WORDS, END, PAD = 20, 18, 19
SIZES = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as it lies in a folder. Weights are large enough for unequal chances."""
    torch.manual_seed(0)
    if request.param == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 32}
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **shape, **heads, initializer_range=0.3))
    else:
        model = GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3))
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


@dataclass(frozen=True)
class Repeat:
    """Prompts of one to four tokens after padding; the reward is the share of tokens of the vocabulary's lower half."""

    max_tokens: int = 6

    def prompts(self, count: int, rng: Generator) -> Tensor:
        words = torch.randint(0, END, (count, 4), generator=rng)
        missing = torch.randint(0, 4, (count, 1), generator=rng)
        return torch.where(torch.arange(4) < missing, PAD, words)

    def reward(self, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        return ((responses < WORDS // 2) & mask).sum(dim=1) / mask.sum(dim=1)


def sampled(model: HFModel, prompts: Tensor, temperature: float = 0.7) -> Rollouts:
    sampler = CachedSampler(model, model.end, model.pad)
    responses, logp, mask = sampler.sample(prompts, 6, temperature, Generator().manual_seed(1))
    rows = torch.arange(len(prompts))
    return Rollouts(torch.cat((prompts, responses), dim=1), mask, logp, rows.float(), rows, rows)


def test_what_is_stored_is_what_a_full_pass_gives(folder: Path) -> None:
    model, prompts = load(folder), Repeat().prompts(64, Generator().manual_seed(0))
    found = sampled(model, prompts)
    logp, _ = token_logps(model, found, 0.7)
    assert len((prompts == PAD).sum(dim=1).unique()) == 4
    assert len(found.mask.sum(dim=1).unique()) > 3
    assert found.logp[found.mask].std() > 0.5
    torch.testing.assert_close(torch.where(found.mask, logp, 0.0), found.logp, rtol=0, atol=1e-4)


def test_each_row_is_what_the_bare_model_says_without_any_padding(folder: Path) -> None:
    model, prompts = load(folder), Repeat().prompts(16, Generator().manual_seed(0))
    found = sampled(model, prompts)
    for row in range(16):
        start, length = int((prompts[row] == PAD).sum()), int(found.mask[row].sum())
        tokens = found.tokens[row, start : 4 + length]
        chances = torch.log_softmax(model.model(tokens[None, :-1]).logits / 0.7, dim=-1)[0]
        expected = chances.gather(1, tokens[1:, None])[-length:, 0]
        torch.testing.assert_close(found.logp[row, :length], expected, rtol=0, atol=1e-4)


def test_more_padding_changes_neither_log_probabilities_nor_gradients(folder: Path) -> None:
    found = sampled(load(folder), Repeat().prompts(16, Generator().manual_seed(0)))
    left, right = torch.full((16, 5), PAD), torch.full((16, 3), PAD)
    wide = torch.cat((left, found.tokens, right), dim=1)
    mask = torch.cat((found.mask, right != PAD), dim=1)
    padded = Rollouts(wide, mask, mask.float(), found.reward, found.group, found.policy)
    results = []
    for rollouts in (found, padded):
        model = load(folder)
        logp = token_logps(model, rollouts, 1.0)[0][:, :6]
        logp[found.mask].sum().backward()
        results.append([logp[found.mask].detach(), *(weight.grad for weight in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_end_that_also_pads_is_learned(folder: Path) -> None:
    model, prompts = load(folder, pad=END), Repeat().prompts(64, Generator().manual_seed(0))
    found = sampled(model, torch.where(prompts == PAD, END, prompts))
    same = sampled(load(folder), prompts)
    assert torch.equal(found.mask, same.mask)
    assert ((found.tokens[:, 4:] == END) & found.mask).any()
    torch.testing.assert_close(found.logp, same.logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [GRPO(), GRPO(kl=K2(0.1))], ids=["GRPO", "GRPO with a reference"])
def test_two_steps_of_training_are_the_same_again(method: GRPO, folder: Path) -> None:
    schedule = Schedule(steps=2, prompts=4, responses=4, micro_prompts=3, eval_every=2, eval_prompts=8, learning_rate=1e-2)
    rows = []
    for _ in range(2):
        model = load(folder)
        trainer = Trainer(method, Repeat(), schedule, model, end=model.end, pad=model.pad)
        rows.append([{name: value for name, value in row.items() if name != "cpu_seconds"} for row in run(trainer)])
    assert rows[0] == rows[1]
    assert rows[0][0]["pass_at_1"] != rows[0][-1]["pass_at_1"]
    assert all(row["mean_weight"] == pytest.approx(1, abs=1e-4) and row["grad_norm"] > 0 for row in rows[0][1:])


def test_what_a_model_cannot_do_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    with pytest.raises(ValueError, match="found 33 tokens; expected at most 32"):
        model.cache(1, 33)
    with pytest.raises(InputError, match="a prompt of padding alone"):
        sampled(model, torch.full((2, 4), PAD))
    with pytest.raises(InputError, match="critic and a HFModel"):
        Trainer(PPO(), Repeat(), Schedule(), model)
    model.model.generation_config.eos_token_id = [17, 18]
    model.model.save_pretrained(folder.parent / "ends")
    with pytest.raises(InputError, match=r"found \[17, 18\] as end .* load\(path, end=\.\.\.\)"):
        load(folder.parent / "ends")
    assert load(folder.parent / "ends", end=17).end == 17
    for name in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
        with pytest.raises(InputError, match=f"found no module {name}"):
            load(folder, adapter=object())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_says_the_same(folder: Path) -> None:
    found = sampled(load(folder).cuda(), Repeat().prompts(16, Generator().manual_seed(0)))
    logp, _ = token_logps(load(folder), found, 0.7)
    torch.testing.assert_close(torch.where(found.mask, logp, 0.0), found.logp, rtol=0, atol=1e-3)
