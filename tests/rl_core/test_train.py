"""Training of the small model: what is sampled is what is stored, parts add to the whole, and a run is the same again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from ope.data import InputError
from rl_core.diagnostics import reward_range
from rl_core.families.token import TokenBatch, TokenMethod
from rl_core.loss import Loss
from rl_core.methods.bapo import RECOMMENDED
from rl_core.methods.grpo import GRPO
from rl_core.methods.ppo import PPO
from rl_core.methods.reinforce import REINFORCE
from rl_core.models.lm import LM, Critic
from rl_core.penalties import K2
from rl_core.registry import FAMILIES
from rl_core.rewards import overlong_penalty
from rl_core.rollout import CachedSampler, Replay, token_logps
from rl_core.tasks.addition import END, FILLER, PAD, Addition, Fillers
from rl_core.trainers.token import Schedule, Trainer, evaluate, imitate, kept, run

SHORT = Schedule(steps=4, prompts=6, responses=4, sync_interval=2, eval_every=2, eval_prompts=16)


@pytest.fixture(scope="module")
def start() -> LM:
    """A model that answers now and then: sums of fillers after a few examples."""
    torch.set_num_threads(1)
    model, _ = imitate(Fillers(), steps=150, batch=64, learning_rate=3e-3)
    return model


def trained(method: TokenMethod, start: LM, schedule: Schedule = SHORT) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = Trainer(method, Fillers(), schedule, start)
    return trainer, [without_clock(row) for row in run(trainer)]


def without_clock(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "cpu_seconds"}


def test_the_model_has_the_parameters_of_the_page() -> None:
    assert sum(weight.numel() for weight in LM().parameters()) == 103_552


def test_what_is_stored_is_what_was_sampled(start: LM) -> None:
    trainer = Trainer(GRPO(), Fillers(), SHORT, start)
    rollouts = trainer.collect()
    logp, entropy = token_logps(trainer.behavior, rollouts, 1.0)
    torch.testing.assert_close(torch.where(rollouts.mask, logp, 0.0), rollouts.logp, rtol=0, atol=1e-5)  # float32, another order
    assert (entropy[rollouts.mask] > 0).all()
    written = rollouts.tokens[:, 3:]
    assert (written[~rollouts.mask] == PAD).all()
    ended = (written == END) & rollouts.mask
    assert (ended.sum(dim=1) <= 1).all()
    assert rollouts.mask.sum(dim=1).float().mean() > 3


def test_a_temperature_is_part_of_the_log_probability(start: LM) -> None:
    prompts = Fillers().prompts(64, Generator().manual_seed(0))
    for temperature in (0.5, 2.0):
        _, logp, mask = CachedSampler(start, END, PAD).sample(prompts, 1, temperature, Generator().manual_seed(1))
        chances = torch.log_softmax(start(prompts)[:, -1] / temperature, dim=-1)
        assert mask.all()
        assert all(chances[row].sub(logp[row, 0]).abs().min() < 1e-5 for row in range(64))


def test_sampled_tokens_come_as_often_as_their_probabilities_say(start: LM) -> None:
    prompts = torch.tensor([[4, 7, 11]]).expand(20_000, 3)
    tokens, _, _ = CachedSampler(start, END, PAD).sample(prompts, 1, 1.0, Generator().manual_seed(0))
    chances = torch.softmax(start(prompts[:1])[0, -1], dim=-1)
    found = torch.bincount(tokens[:, 0], minlength=15) / 20_000
    assert (found - chances).abs().max() < 4 * 0.5 / 20_000**0.5  # four standard errors of the most uncertain share


@pytest.mark.parametrize("method", [GRPO(kl=K2(0.1)), PPO(), RECOMMENDED], ids=["GRPO with a reference", "PPO", "BAPO"])
def test_micro_batches_add_to_the_gradient_of_the_whole(method: TokenMethod, start: LM) -> None:
    whole = gradients(method, start, SHORT)
    for micro in (1, 4):  # 4 prompts and then 2: uneven
        for one, other in zip(whole, gradients(method, start, replace(SHORT, micro_prompts=micro)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def gradients(method: TokenMethod, start: LM, schedule: Schedule) -> list[torch.Tensor]:
    """Of the second step on one batch of rollouts, whose ratios are no longer one."""
    trainer = Trainer(method, Fillers(), schedule, start)
    rollouts = trainer.collect()
    with torch.no_grad():
        for weight in trainer.policy.parameters():
            weight.mul_(1.01)
    trainer.update(rollouts, trainer.credited(rollouts))
    return [weight.grad for weight in trainer.policy.parameters() if weight.grad is not None]


SCHEDULES = [
    SHORT, replace(SHORT, replay_share=0.5), replace(SHORT, redraws=2), replace(SHORT, epochs=2, minibatches=3, proximal=True),
]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_is_the_same_again(schedule: Schedule, start: LM) -> None:
    assert trained(GRPO(), start, schedule)[1] == trained(GRPO(), start, schedule)[1]


def test_an_epoch_meets_every_prompt_once_in_another_order(start: LM) -> None:
    trainer = Trainer(GRPO(), Fillers(), replace(SHORT, prompts=8, epochs=2, minibatches=3), start)
    parts = list(trainer._minibatches(32))
    assert [len(part) // 4 for part in parts] == [3, 3, 2, 3, 3, 2]
    epochs = [torch.cat(parts[:3]), torch.cat(parts[3:])]
    assert all(sorted(rows.tolist()) == list(range(32)) for rows in epochs)
    assert not torch.equal(*epochs)
    for part in parts:  # whole prompts
        assert (part.view(-1, 4) // 4 == part.view(-1, 4)[:, :1] // 4).all()


def test_values_and_credit_are_of_the_batch_before_its_first_update(start: LM) -> None:
    """The clip of values must see how far the critic went: with values made anew at every update it would see nothing."""
    seen = list[float]()

    @dataclass(frozen=True)
    class Watched(PPO):
        def critic(self, batch: TokenBatch, value: Any) -> Loss:
            if value.requires_grad:
                seen.append(float((value - batch.value)[batch.mask].detach().abs().max()))
            return super().critic(batch, value)

    trainer = Trainer(Watched(), Fillers(), replace(SHORT, epochs=3, learning_rate=1e-2), start)
    trainer.advance()
    assert seen[0] < 1e-6
    assert min(seen[1:]) > 1e-3


@pytest.mark.parametrize("method", [GRPO(kl=K2(0.1)), *(one() for one in FAMILIES["token"])], ids=lambda one: type(one).__name__)
def test_a_run_that_was_stopped_goes_on_to_the_bit(method: TokenMethod, start: LM, tmp_path: Path) -> None:
    schedule = replace(SHORT, replay_share=0.5, sync_offset=2)
    whole, rows = trained(method, start, schedule)
    run(Trainer(method, Fillers(), replace(schedule, steps=2), start), tmp_path)
    trainer = Trainer(method, Fillers(), schedule, LM())  # all that it needs is in the folder
    found = run(trainer, tmp_path)
    assert [without_clock(row) for row in found] == rows
    for one, other in zip(whole.policy.parameters(), trainer.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == found
    assert list(kept(tmp_path)) == [0, 2, 4]
    last = torch.load(kept(tmp_path)[4], weights_only=True)
    assert all(torch.equal(last[name], value) for name, value in whole.policy.state_dict().items())


def test_the_folder_of_another_run_is_refused(start: LM, tmp_path: Path) -> None:
    run(Trainer(GRPO(), Fillers(), SHORT, start), tmp_path)
    others = {
        "method.eps_high": Trainer(GRPO(eps_high=0.28), Fillers(), SHORT, start),
        "method; expected": Trainer(REINFORCE(), Fillers(), SHORT, start),
        "schedule.seed": Trainer(GRPO(), Fillers(), replace(SHORT, seed=1), start),
        "task": Trainer(GRPO(), Addition(), SHORT, start),
    }
    for name, trainer in others.items():
        with pytest.raises(InputError, match=f"found a run of another .*{name}"):
            run(trainer, tmp_path)
    with pytest.raises(InputError, match="found a run of 4 steps; expected at least as many, not 3"):
        run(Trainer(GRPO(), Fillers(), replace(SHORT, steps=3), start), tmp_path)
    longer = run(Trainer(GRPO(), Fillers(), replace(SHORT, steps=5), start), tmp_path)
    assert [row["step"] for row in longer] == [0, 1, 2, 3, 4, 5]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_rows_say_who_sampled_them_and_how_long_ago(start: LM) -> None:
    _, rows = trained(REINFORCE(), start)
    assert [row["staleness"] for row in rows[1:]] == [0, 1, 0, 1]
    assert [row["ess"] == 1 for row in rows[1:]] == [True, False, True, False]
    assert all(abs(row["mean_weight"] - 1) < 0.3 for row in rows[1:])
    assert rows[0]["pass_at_1"] == evaluate(start, Fillers(), 16)


def test_training_lags_behind_what_was_sampled_ahead(start: LM) -> None:
    _, rows = trained(REINFORCE(), start, replace(SHORT, sync_interval=1, sync_offset=2))
    assert [row["staleness"] for row in rows[1:]] == [0, 1, 2, 2]  # three batches of the start, then one of every step
    trainer = Trainer(REINFORCE(), Fillers(), replace(SHORT, sync_offset=2), start)
    trainer.advance()
    groups = torch.cat([one.group for one in (*trainer.ahead, trainer.collect())])
    assert len(groups.unique()) == 3 * SHORT.prompts


def test_prompts_that_teach_nothing_are_drawn_again(start: LM) -> None:
    trainer = Trainer(GRPO(), Fillers(), replace(SHORT, prompts=12, redraws=50), start)
    found = trainer.collect()
    spread, place = reward_range(found.reward, found.group)
    assert len(spread) == 12
    assert (spread > 0).all()
    assert torch.bincount(place).tolist() == [4] * 12
    assert trainer.rollouts > 48  # what was thrown away was sampled, too
    flat, _ = reward_range(*(getattr(Trainer(GRPO(), Fillers(), replace(SHORT, prompts=12), start).collect(), name)
                             for name in ("reward", "group")))  # fmt: skip
    assert (flat == 0).any()


def test_length_costs_near_the_longest() -> None:
    lengths = torch.tensor([0.0, 12.0, 13.0, 14.0, 16.0, 20.0])
    assert overlong_penalty(lengths, 16, 4).tolist() == [0, 0, -0.25, -0.5, -1, -1]
    length = np.array([16384.0, 16385.0, 20480.0])  # the paper's own: 20,480 tokens, a margin of 4,096
    np.testing.assert_allclose(overlong_penalty(length, 20480, 4096), [0, -1 / 4096, -1], rtol=1e-12)
    for margin in (0, 17):
        with pytest.raises(ValueError, match=f"found {margin}; expected 1 to 16 tokens"):
            overlong_penalty(lengths, 16, margin)


def test_shaped_rewards_are_those_of_the_task_and_of_length(start: LM) -> None:
    plain, shaped = (Trainer(GRPO(), Fillers(), replace(SHORT, overlong_margin=margin), start).collect() for margin in (None, 8))
    assert torch.equal(plain.tokens, shaped.tokens)
    torch.testing.assert_close(shaped.reward - plain.reward, overlong_penalty(plain.mask.sum(dim=1), 16, 8))
    assert (shaped.reward < plain.reward).any()


def test_replay_keeps_prompts_whole_and_forgets_the_oldest(start: LM) -> None:
    trainer = Trainer(GRPO(), Fillers(), SHORT, start)
    replay = Replay(8, [])
    for _ in range(2):
        replay.add(trainer.collect(), SHORT.responses)
        trainer.step += 1
    assert len(replay.held) == 8
    assert [int(one.group[0]) for one in replay.held] == list(range(4, 12))
    drawn = replay.draw(5, Generator().manual_seed(0))
    assert len({int(one.group[0]) for one in drawn}) == 5
    assert all(len(one) == 4 and len(one.group.unique()) == 1 for one in drawn)


def test_imitation_learns_and_evaluation_is_the_same_again(start: LM) -> None:
    assert evaluate(start, Fillers(), 512) > 2 * evaluate(LM(), Fillers(), 512)
    assert evaluate(start, Fillers(), 512) == evaluate(start, Fillers(), 512)


def test_examples_of_sums_after_fillers_are_as_often_wrong_as_they_should_be() -> None:
    tokens, mask = Fillers().examples(40_000, Generator().manual_seed(0))
    right, fillers = Fillers().reward(tokens[:, :3], tokens[:, 3:], mask[:, 3:]), (tokens == FILLER).sum(dim=1)
    for count in (0, 6, 12):
        some = right[fillers == count]
        expected = 0.95 - 0.06 * count
        assert abs(some.mean().item() - expected) < 4 * (expected * (1 - expected) / len(some)) ** 0.5
    assert mask.sum(dim=1).float().mean().item() == pytest.approx(9.0, abs=0.1)  # 6 fillers, two digits, an end


def test_rewards_of_sums_are_exact() -> None:
    task = Addition()
    tokens, mask = task.examples(500, Generator().manual_seed(0))
    prompts, answers, counted = tokens[:, :6], tokens[:, 6:], mask[:, 6:]
    assert task.reward(prompts, answers, counted).all()
    for place in range(4):
        wrong = answers.clone()
        wrong[:, place] = (wrong[:, place] + 1) % 10
        assert not task.reward(prompts, wrong, counted).any()
    said = ["".join("0123456789+=."[token] for token in row) for row in tokens[:, :9].tolist()]
    assert all(int(text[:2]) + int(text[3:5]) == int(text[6:]) for text in said)


def test_a_critic_has_a_value_for_every_token() -> None:
    assert Critic()(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("responses", 0), ("replay_share", 1.0), ("eval_prompts", -1), ("sync_offset", -1), ("redraws", -1),
        ("minibatches", 33), ("micro_prompts", 0), ("temperature", 0.0), ("learning_rate", -1.0), ("overlong_margin", 0),
        ("epochs", 0),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        Schedule(**{field: value})


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="positions"):
        CachedSampler(LM(), END, PAD).sample(torch.zeros(1, 20, dtype=torch.int64), 5, 1.0, Generator())
