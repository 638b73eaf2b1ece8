"""Rollouts: responses with the log-probability that really sampled them, and who it was.

A causal model gives logits, with a cache or without: the small one, or `rl_core.models.hf.HFModel`. It stands on any device; what
is sampled from it, and its log-probabilities, are on the CPU. Nothing here knows a method or a reward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from rl_core.families.token import TokenBatch


@dataclass(frozen=True)
class Rollouts:
    """B responses of at most T tokens after prompts of P. Rows of one prompt stand together."""

    tokens: Tensor
    """(B, P + T)."""
    mask: Tensor
    """(B, T) True on tokens that were written, the end included."""
    logp: Tensor
    """(B, T) log-probabilities of the policy that sampled, at its temperature."""
    reward: Tensor
    """(B,)."""
    group: Tensor
    """(B,) which prompt, by a number that no other prompt of the run has."""
    policy: Tensor
    """(B,) id of the policy that sampled: the optimiser step that its weights are from."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt_tokens(self) -> int:
        """P."""
        return self.tokens.shape[1] - self.mask.shape[1]

    def batch(self) -> TokenBatch:
        """What a method sees of them."""
        return TokenBatch(self.reward, self.group, self.mask, self.logp)

    def rows(self, which: Tensor | slice) -> Rollouts:
        """Some of them."""
        return Rollouts(*(getattr(self, one.name)[which] for one in fields(self)))


def joined(some: Sequence[Rollouts]) -> Rollouts:
    """Several after one another."""
    return Rollouts(*(torch.cat([getattr(one, name.name) for one in some]) for name in fields(Rollouts)))


class CausalModel(Protocol):
    """A module that gives the logits of what follows each token."""

    def __call__(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """(B, S) -> (B, S, vocabulary); tokens follow those in the cache."""
        ...

    def cache(self, rows: int, length: int) -> Any:
        """Room for `length` tokens of so many rows. Raises ValueError for more than the model has positions."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As a module has them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As a module has it."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """As a module does."""
        ...


def device_of(model: CausalModel | nn.Module) -> torch.device:
    """Where a model stands."""
    return next(model.parameters()).device


class Sampler(Protocol):
    """Writes responses."""

    def sample(
        self, prompts: Tensor, max_tokens: int, temperature: float, rng: Generator, responses: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Responses (B, T), their log-probabilities and mask, (B, T), T = max_tokens; so many after one another to each prompt."""
        ...


@dataclass(frozen=True)
class CachedSampler:
    """Samples from a model, one token of every row at a time."""

    model: CausalModel
    end: int
    pad: int

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, max_tokens: int, temperature: float, rng: Generator, responses: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A row that ended is padded, and not counted. A prompt is read once, whatever the number of its responses."""
        length, device, rows = prompts.shape[1], device_of(self.model), len(prompts) * responses
        cache = self.model.cache(len(prompts), length + max_tokens)
        logits = self._following(prompts.to(device), cache).repeat_interleave(responses, dim=0)
        cache.repeat(responses)
        tokens = torch.full((rows, max_tokens), self.pad)
        logp, mask = torch.zeros(rows, max_tokens), torch.zeros(rows, max_tokens, dtype=torch.bool)
        going = torch.ones(rows, dtype=torch.bool)
        for place in range(max_tokens):
            chances = torch.log_softmax(logits / temperature, dim=-1)
            drawn = torch.multinomial(chances.exp(), 1, generator=rng)[:, 0]
            logp[:, place] = torch.where(going, chances.gather(1, drawn[:, None])[:, 0], 0.0)
            tokens[:, place] = torch.where(going, drawn, self.pad)
            mask[:, place] = going
            going = going & (drawn != self.end)
            if place + 1 == max_tokens or not going.any():
                break
            logits = self._following(tokens[:, place : place + 1].to(device), cache)
        return tokens, logp, mask

    def _following(self, tokens: Tensor, cache: Any) -> Tensor:
        """Logits (B, vocabulary) of what follows the last token."""
        with torch.inference_mode():
            return self.model(tokens, cache)[:, -1].cpu()


def token_logps(model: CausalModel, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the tokens that were written, at a temperature, and entropies (B, T) of the choices among all."""
    start, tokens = rollouts.prompt_tokens, rollouts.tokens.to(device_of(model))
    logits = model(tokens[:, :-1])[:, start - 1 :]
    chances = torch.log_softmax(logits / temperature, dim=-1)
    logp = chances.gather(2, tokens[:, start:, None])[..., 0]
    with torch.no_grad():
        entropy = -(chances.exp() * chances).sum(dim=-1)
    return logp.cpu(), entropy.cpu()


@dataclass
class Replay:
    """The last rollouts of whole prompts, drawn from again beside fresh ones. Every row keeps who sampled it."""

    capacity: int
    """Prompts that are kept."""
    held: list[Rollouts]

    def add(self, fresh: Rollouts, responses: int) -> None:
        """Keep the rollouts of every prompt, `responses` rows each; the oldest go."""
        self.held += [fresh.rows(slice(start, start + responses)) for start in range(0, len(fresh), responses)]
        del self.held[: -self.capacity]

    def draw(self, prompts: int, rng: Generator) -> list[Rollouts]:
        """So many prompts' rollouts, none twice; fewer where fewer are held."""
        order = torch.randperm(len(self.held), generator=rng)[:prompts]
        return [self.held[place] for place in order.tolist()]
