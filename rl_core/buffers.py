"""Transitions in memory: one row of one tensor each, drawn alike, by weight, or from several buffers in fixed shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from ope.data import InputError
from rl_core.families.offline import Transitions

UNKNOWN = float("nan")
"""Log density of an action of which nobody wrote down how likely it was."""


class Buffer:
    """Room for transitions; when it is full the oldest make place. A row is obs, action, reward, next obs, flags, log density, who.

    One gather makes a batch, on the device where the tensor lives.
    """

    def __init__(self, capacity: int, obs: int, action: int, device: str | torch.device = "cpu") -> None:
        self.obs, self.action, self.capacity = obs, action, capacity
        self.rows = torch.empty(capacity, 2 * obs + action + 5, device=device)
        self.size, self.next = 0, 0
        self.weight: Tensor | None = None
        self.mass: Tensor | None = None

    def __len__(self) -> int:
        return self.size

    def add(self, data: Transitions) -> None:
        """Keep these, with the largest weight so far where rows have any. Raises InputError for other dimensions, or more than
        there is room.
        """
        count = len(data)
        if data.sizes != (self.obs, self.action) or count > self.capacity:
            raise InputError(
                f"found {count} transitions of sizes {data.sizes}; expected at most {self.capacity} of {(self.obs, self.action)}"
            )
        like = data.reward
        logp = torch.full_like(like, UNKNOWN) if data.logp_behavior is None else data.logp_behavior
        policy = torch.full_like(like, UNKNOWN) if data.policy is None else data.policy
        flat = (data.reward, data.terminated, data.truncated, logp, policy)
        reward, *others = (one.to(like.dtype)[:, None] for one in flat)
        packed = torch.cat((data.obs, data.action, reward, data.next_obs, *others), dim=1)
        where = (self.next + torch.arange(count, device=self.rows.device)) % self.capacity
        self.rows[where] = packed.to(self.rows)
        self.next = (self.next + count) % self.capacity
        self.size = min(self.size + count, self.capacity)
        if self.weight is not None:
            self.weight[where] = self.weight.max()
            self.mass = None

    def weigh(self, weight: Tensor) -> None:
        """Draw row i from now on with a chance in proportion to weight[i]. Raises InputError for negative ones."""
        if weight.shape != (self.size,) or not bool(((weight >= 0) & weight.isfinite()).all()) or not bool(weight.sum() > 0):
            raise InputError(f"found weights of shape {tuple(weight.shape)}; expected {self.size}, none negative and some positive")
        self.weight, self.mass = torch.zeros(self.capacity, dtype=torch.float64, device=self.rows.device), None
        self.weight[: self.size] = weight.to(self.weight)

    def reweigh(self, index: Tensor, weight: Tensor) -> None:
        """Other weights (n,) of some rows. Nothing is looked at here: a check would wait for the device at every step."""
        assert self.weight is not None, "weighed before"
        self.weight[index] = weight.to(self.weight)
        self.mass = None

    def draw(self, count: int, rng: Generator) -> Tensor:
        """Numbers of so many rows, with replacement: all alike, or by weight."""
        if self.weight is None:
            return torch.randint(0, self.size, (count,), generator=rng, device=self.rows.device)
        if self.mass is None:
            self.mass = self.weight[: self.size].cumsum(dim=0)
        chance = torch.rand(count, generator=rng, device=self.rows.device, dtype=torch.float64) * self.mass[-1]
        return torch.searchsorted(self.mass, chance, right=True).clamp(max=self.size - 1)

    def rarity(self, index: Tensor) -> Tensor:
        """(n,) how much seldomer these rows are drawn than if all were alike: 1 / (rows·chance)."""
        if self.weight is None:
            return torch.ones(len(index), device=self.rows.device)
        found: Tensor = self.weight[: self.size].mean() / self.weight[index]
        return found.to(self.rows)

    def take(self, index: Tensor) -> Transitions:
        """Rows by number. What is not known of them is NaN."""
        return replace(self.unpacked(self.rows[index]), row=index)

    def unpacked(self, rows: Tensor) -> Transitions:
        """Views into rows (n, columns)."""
        obs, action, reward, next_obs, *flat = torch.split(rows, [self.obs, self.action, 1, self.obs, 1, 1, 1, 1], dim=1)
        terminated, truncated, logp, policy = (one[:, 0] for one in flat)
        return Transitions(obs, action, reward[:, 0], next_obs, terminated, truncated, logp, policy)

    def all(self) -> Transitions:
        """Everything that is held, in the order of its rows."""
        return replace(self.unpacked(self.rows[: self.size]), row=torch.arange(self.size, device=self.rows.device))

    def state(self) -> dict[str, Any]:
        """All that draws depend on, but for the generator."""
        return {"rows": self.rows[: self.size].clone(), "next": self.next, "weight": self.weights()}

    def weights(self) -> Tensor | None:
        """(rows,) by which rows are drawn, copied; None where all are alike."""
        return None if self.weight is None else self.weight[: self.size].clone()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.size = len(state["rows"])
        self.rows[: self.size] = state["rows"]
        self.next, self.weight, self.mass = state["next"], None, None
        if state["weight"] is not None:
            self.weigh(state["weight"])


def mixed(parts: Sequence[tuple[Buffer, float]], count: int, rng: Generator) -> Transitions:
    """A batch from several buffers in fixed shares, the last one filling up: half logged and half fresh, for instance.

    Raises InputError for shares that do not add to 1, and for empty buffers.
    """
    if abs(sum(share for _, share in parts) - 1) > 1e-9 or any(not buffer.size for buffer, _ in parts):
        raise InputError(f"found shares {[share for _, share in parts]}; expected a sum of 1, of buffers that hold something")
    counts = [round(share * count) for _, share in parts[:-1]]
    counts.append(count - sum(counts))
    first, _ = parts[0]
    return first.unpacked(torch.cat([buffer.rows[buffer.draw(some, rng)] for (buffer, _), some in zip(parts, counts, strict=True)]))
