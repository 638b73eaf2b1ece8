"""Methods of the offline family as tests look at them: data, networks and draws that are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl_core.families.offline import Draw, Learner, OfflineMethod, Transitions
from rl_core.loss import Loss, total
from rl_core.methods.awac import AWAC
from rl_core.methods.bc import BC
from rl_core.methods.cql import CQL
from rl_core.methods.iql import IQL
from rl_core.methods.td3 import TD3
from rl_core.methods.td3_bc import TD3BC
from rl_core.models.mlp import Sizes
from rl_core.trainers.offline import OfflineSchedule, OfflineTrainer

torch.set_num_threads(1)

SIZES = Sizes(obs=3, action=2, width=16, layers=2)
SCHEDULE = OfflineSchedule(steps=100, batch=32, width=16)
METHODS: dict[str, OfflineMethod] = {
    "BC": BC(), "stochastic BC": BC(stochastic=True), "10 % BC": BC(top=0.1), "IQL": IQL(), "AWAC": AWAC(),
    "AWAC softmax": AWAC(weights="softmax"), "CQL": CQL(samples=3, alpha=2.0), "TD3": TD3(), "TD3BC": TD3BC(),
}  # fmt: skip
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
WITH_CRITIC = pytest.mark.parametrize("method", [one for name, one in METHODS.items() if "BC" not in name or name == "TD3BC"])
ACTORS: dict[str, tuple[OfflineMethod, int]] = {
    "BC": (BC(), 0), "stochastic BC": (BC(stochastic=True), 0), "IQL": (IQL(), 0), "AWAC": (AWAC(), 1),
    "AWAC softmax": (AWAC(weights="softmax"), 1), "CQL": (CQL(temperature_start=0.5), 1),
}  # fmt: skip
"""Methods of this page, and the place of the actor's stage."""


def made(count: int = 200, seed: int = 0, length: int = 20) -> Transitions:
    """Rows of a process without sense; every second episode ends by itself, the others are cut."""
    rng = torch.Generator().manual_seed(seed)
    last = (torch.arange(count) % length == length - 1).float()
    even = (torch.arange(count) // length % 2 == 0).float()
    obs, following = torch.randn(count, 3, generator=rng), torch.randn(count, 3, generator=rng)
    action = torch.rand(count, 2, generator=rng) * 1.8 - 0.9
    return Transitions(obs, action, torch.randn(count, generator=rng), following, last * even, last * (1 - even))


class Recorded:
    """A draw that remembers what it gave."""

    def __init__(self, inner: Draw) -> None:
        self.inner = inner
        self.kept: list[Tensor] = []

    def normal(self, *shape: int) -> Tensor:
        self.kept.append(self.inner.normal(*shape))
        return self.kept[-1]

    def uniform(self, *shape: int) -> Tensor:
        self.kept.append(self.inner.uniform(*shape))
        return self.kept[-1]


class Replayed:
    """A draw of numbers that are there already."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.left = iter(kept)

    def normal(self, *shape: int) -> Tensor:
        found = next(self.left)
        assert found.shape == shape
        return found

    uniform = normal


class Seeded:
    """A draw that starts anew with every object, in the dtype that is asked for."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.rng, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, dtype=self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.rng, dtype=self.dtype)


def learner(method: OfflineMethod, seed: int = 0, dtype: torch.dtype = torch.float32) -> Learner:
    """Fresh networks, and lagged ones that differ from them."""
    torch.manual_seed(seed)
    nets = {name: net.to(dtype) for name, net in method.networks(SIZES).items()}
    behind = {name: method.networks(SIZES)[name].to(dtype).requires_grad_(False) for name in method.lagged()}
    return Learner(nets, behind)


def as_double(data: Transitions) -> Transitions:
    known = {one.name: getattr(data, one.name) for one in fields(data)}
    return replace(data, **{name: value.double() for name, value in known.items() if value is not None})


def slopes(loss: Loss, *nets: nn.Module) -> list[Tensor]:
    """Of what is maximised; 0 where a network has no part in it."""
    weights = [weight for net in nets for weight in net.parameters()]
    found = torch.autograd.grad(total(loss), weights, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(weight) if slope is None else slope for weight, slope in zip(weights, found, strict=True)]


def flat(tensors: Any) -> Tensor:
    return torch.cat([one.detach().flatten() for one in tensors])


def trainer(method: OfflineMethod, **settings: Any) -> OfflineTrainer:
    return OfflineTrainer(method, made(), replace(SCHEDULE, **settings))


def best(value: Callable[[], Tensor], *given: Tensor) -> None:
    """Move what is given to where a value is largest."""
    settings: dict[str, Any] = {"max_iter": 300, "tolerance_grad": 1e-12, "tolerance_change": 1e-16}
    optimizer = torch.optim.LBFGS(given, line_search_fn="strong_wolfe", **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -value()
        loss.backward()
        return loss

    optimizer.step(closure)
