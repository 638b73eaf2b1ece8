"""A causal transformer of a hundred thousand parameters, with a cache for sampling: what experiments on two cores run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NEAR = 0.1
"""Spread of fresh embeddings. With torch's own, 1, what the layers add is small beside it: sums take twice the examples to learn,
and how long hangs on the seed."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. The defaults have 103,552 parameters."""

    vocabulary: int = 15
    positions: int = 24
    layers: int = 2
    width: int = 64
    heads: int = 4


class Cache:
    """Keys and values of the tokens so far, for every layer: room is made once."""

    def __init__(self, shape: Shape, rows: int, length: int, like: Tensor) -> None:
        size = (shape.layers, rows, shape.heads, length, shape.width // shape.heads)
        self.keys, self.values = like.new_empty(size), like.new_empty(size)
        self.length = 0

    def repeat(self, count: int) -> None:
        """Every row so many times, one after the other: several responses go on from one prompt."""
        self.keys, self.values = (held.repeat_interleave(count, dim=1) for held in (self.keys, self.values))


class Block(nn.Module):
    """Attention and a GELU layer, each after a normalisation and around a shortcut."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.before = nn.LayerNorm(shape.width)
        self.attention = nn.Linear(shape.width, 3 * shape.width)
        self.joined = nn.Linear(shape.width, shape.width)
        self.between = nn.LayerNorm(shape.width)
        self.wide = nn.Linear(shape.width, 4 * shape.width)
        self.narrow = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor, cache: Cache | None, layer: int) -> Tensor:
        """(B, S, width) -> (B, S, width)."""
        rows, length, width = x.shape
        parts = self.attention(self.before(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            end = cache.length + length
            cache.keys[layer, :, :, cache.length : end], cache.values[layer, :, :, cache.length : end] = key, value
            key, value = cache.keys[layer, :, :, :end], cache.values[layer, :, :, :end]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=length > 1)
        x = x + self.joined(mixed.transpose(1, 2).reshape(rows, length, width))
        further: Tensor = self.narrow(functional.gelu(self.wide(self.between(x))))
        return x + further


class LM(nn.Module):
    """Learned positions, biases everywhere but in the output head, which is not tied to the embedding."""

    def __init__(self, shape: Shape = Shape()) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.positions, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.last = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=NEAR)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Last layer's states (B, S, width) of tokens (B, S), which follow those in the cache."""
        start = 0 if cache is None else cache.length
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.places(places)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length += tokens.shape[1]
        found: Tensor = self.last(x)
        return found

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, S, vocabulary) of what follows each token."""
        logits: Tensor = self.head(self.hidden(tokens, cache))
        return logits

    def cache(self, rows: int, length: int) -> Cache:
        """Room for `length` tokens of so many rows. Raises ValueError for more than the model has positions."""
        if length > self.shape.positions:
            raise ValueError(f"found {length} tokens; expected at most {self.shape.positions}, the model's positions")
        return Cache(self.shape, rows, length, self.head.weight)


class Critic(nn.Module):
    """A value of the state after each token, on a body of its own."""

    def __init__(self, shape: Shape = Shape()) -> None:
        super().__init__()
        self.body = LM(shape)
        self.value = nn.Linear(shape.width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B, S)."""
        found: Tensor = self.value(self.body.hidden(tokens)).sum(dim=-1)  # of one number: FSDP2 wants no view
        return found
