"""Sums of two numbers of two digits, character by character: "47+85=" is answered by "132" and an end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

CHARACTERS = "0123456789+=."
"""The vocabulary; after it an end and padding."""
END, PAD = 13, 14
PLUS, EQUALS, FILLER = 10, 11, 12


@dataclass(frozen=True)
class Addition:
    """Prompts "ab+cd=", answers of three digits and an end. Reward 1 for exactly that, else 0."""

    max_tokens: int = 4
    prompt_tokens: int = 6

    def prompts(self, count: int, rng: Generator) -> Tensor:
        """(count, 6) tokens; both numbers uniform over 0..99."""
        numbers = torch.randint(0, 100, (count, 2), generator=rng)
        plus, equals = torch.full((count, 1), PLUS), torch.full((count, 1), EQUALS)
        return torch.cat((_digits(numbers[:, 0], 2), plus, _digits(numbers[:, 1], 2), equals), dim=1)

    def answers(self, prompts: Tensor) -> Tensor:
        """(n, 4) right answers."""
        total = 10 * prompts[:, 0] + prompts[:, 1] + 10 * prompts[:, 3] + prompts[:, 4]
        return torch.cat((_digits(total, 3), torch.full((len(prompts), 1), END)), dim=1)

    def reward(self, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        """(n,) of responses (n, T), of which mask (n, T) counts the tokens that were written."""
        right = self.answers(prompts)
        if responses.shape[1] < right.shape[1]:
            return torch.zeros(len(prompts))
        exact = (responses[:, : right.shape[1]] == right).all(dim=1)
        return (exact & (mask.sum(dim=1) == right.shape[1])).float()

    def examples(self, count: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """Prompts with right answers (count, 10), and which tokens are the answer's."""
        prompts = self.prompts(count, rng)
        tokens = torch.cat((prompts, self.answers(prompts)), dim=1)
        return tokens, torch.arange(tokens.shape[1]).expand_as(tokens) >= self.prompt_tokens


@dataclass(frozen=True)
class Fillers:
    """Sums of two digits after any number of fillers: "47=" is answered by "....11" and an end. Reward 1 for a right sum.

    Examples to imitate have 0 to 12 fillers and are the more often wrong the more they have, so that failures are longer.
    """

    max_tokens: int = 16
    prompt_tokens: int = 3
    most: int = 12
    """Fillers of an example, at most."""

    def prompts(self, count: int, rng: Generator) -> Tensor:
        """(count, 3) tokens; both digits uniform."""
        return torch.cat((torch.randint(0, 10, (count, 2), generator=rng), torch.full((count, 1), EQUALS)), dim=1)

    def reward(self, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        """(n,): 1 where fillers, the sum's two digits and an end are all that was written."""
        total = prompts[:, 0] + prompts[:, 1]
        length = mask.sum(dim=1)
        place = torch.arange(responses.shape[1])
        tail = _digits(total, 2)
        from_end = place - length[:, None]  # -1: the end, -2 and -3: the digits
        right = (
            ((from_end != -1) | (responses == END))
            & ((from_end != -2) | (responses == tail[:, 1:]))
            & ((from_end != -3) | (responses == tail[:, :1]))
            & ((from_end > -4) | (responses == FILLER))
        )
        return (right.all(dim=1) & (length >= 3)).float()

    def examples(self, count: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """Prompts with answers (count, 19), padded, and which tokens are the answer's. Wrong at a rate of 0.05 + 0.06·fillers."""
        prompts = self.prompts(count, rng)
        fillers = torch.randint(0, self.most + 1, (count,), generator=rng)
        wrong = torch.rand(count, generator=rng) < 0.05 + 0.06 * fillers
        total = prompts[:, 0] + prompts[:, 1]
        other = (total + torch.randint(1, 19, (count,), generator=rng)) % 19
        digits = _digits(torch.where(wrong, other, total), 2)
        place = torch.arange(self.max_tokens) - fillers[:, None]
        answer = torch.full((count, self.max_tokens), PAD)
        answer = torch.where(place < 0, FILLER, answer)
        for at, token in enumerate((digits[:, :1], digits[:, 1:], torch.tensor(END))):
            answer = torch.where(place == at, token, answer)
        tokens = torch.cat((prompts, answer), dim=1)
        return tokens, (torch.arange(tokens.shape[1]) >= self.prompt_tokens) & (tokens != PAD)


def _digits(numbers: Tensor, count: int) -> Tensor:
    """(n,) -> (n, count) decimal digits, zeros in front."""
    return torch.stack([numbers // 10**place % 10 for place in reversed(range(count))], dim=1)
