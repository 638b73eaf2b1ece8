"""The token family: a policy that writes sequences of tokens, groups of them per prompt, rewards for whole sequences.

A method gives credit once per optimiser step, over the whole batch, and a loss for any part of it: terms of which numerators and
denominators add over micro-batches and machines before they are divided. Methods maximise; the minus sign is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ope.primitives._xp import Array, namespace
from rl_core.loss import Loss, total
from rl_core.paper import Paper


@dataclass(frozen=True)
class TokenBatch:
    """B responses of at most T tokens, with what is known of them before the step.

    What a mask leaves out may be anything, NaN and -inf included: it is replaced before any arithmetic.
    """

    reward: Array
    """(B,)."""
    group: Array
    """(B,) label of the prompt that a response answers."""
    mask: Array
    """(B, T) True on tokens that the policy wrote, the end included; False on prompts, padding and what tools said."""
    logp_behavior: Array
    """(B, T) log-probabilities of the policy that really sampled, as it sampled (temperature, cuts)."""
    logp_proximal: Array | None = None
    """(B, T) of the centre of the trust region, where it is not the behaviour policy."""
    logp_ref: Array | None = None
    """(B, T) of the anchor of a KL penalty."""
    value: Array | None = None
    """(B, T) a critic's value of the state before each token."""
    advantage: Array | None = None
    """(B,) or (B, T) what `credit` gave."""

    def rows(self, which: Array) -> TokenBatch:
        """Some of the responses, with the credit that they were given among all."""
        return replace(self, **{one.name: value[which] for one in fields(self) if (value := getattr(self, one.name)) is not None})

    @property
    def token_advantage(self) -> Array:
        """(B, T) advantage of every token. Raises ValueError where none was given yet."""
        if self.advantage is None:
            raise ValueError("found a batch without advantages; expected those of the method: credited(method, batch)")
        xp = namespace(self.mask)
        advantage = self.advantage if self.advantage.ndim == self.mask.ndim else self.advantage[:, None]
        return xp.where(self.mask, advantage, xp.zeros_like(advantage))

    @property
    def proximal(self) -> Array:
        """(B, T) log-probabilities of the centre of the trust region."""
        return self.logp_behavior if self.logp_proximal is None else self.logp_proximal

    def anchor(self) -> Array:
        """(B, T) log-probabilities of the reference. Raises ValueError where the batch has none."""
        if self.logp_ref is None:
            raise ValueError("found no logp_ref; expected the reference's log-probabilities, which a KL penalty needs")
        return self.logp_ref


Statistics = Mapping[str, Array]
"""Sums over the whole optimiser step, by name."""


class TokenMethod(Protocol):
    """A method of the family: a frozen dataclass whose fields are its configuration."""

    paper: ClassVar[Paper]

    def credit(self, batch: TokenBatch) -> Array:
        """Advantages (B,) or (B, T), from all responses of an optimiser step."""
        ...

    def loss(self, batch: TokenBatch, logp: Array, stats: Statistics) -> Loss:
        """Terms of some of the responses. logp (B, T): of the current policy, the only thing that carries a gradient."""
        ...


@runtime_checkable
class WithStatistics(Protocol):
    """A method whose loss needs sums over the whole optimiser step first."""

    def statistics(self, batch: TokenBatch, logp: Array) -> Statistics:
        """Sums over these responses; those of several parts add."""
        ...


@runtime_checkable
class WithReference(Protocol):
    """A method that may ask for the log-probabilities of a reference model."""

    @property
    def needs_reference(self) -> bool:
        """Whether these settings do."""
        ...


@runtime_checkable
class WithCritic(Protocol):
    """A method whose credit needs values, and says how they are learned."""

    def critic(self, batch: TokenBatch, value: Array) -> Loss:
        """Terms of the critic. value (B, T): of the critic that is being learned, the only thing that carries a gradient."""
        ...


def credited(method: TokenMethod, batch: TokenBatch) -> TokenBatch:
    """The batch with the method's advantages. Raises ValueError where shapes do not fit, or a reward is not a finite number."""
    batch = checked(batch)
    return replace(batch, advantage=method.credit(batch))


def checked(batch: TokenBatch) -> TokenBatch:
    """The batch, zeros where its mask is False. Raises ValueError, naming the field, for a shape that does not fit, or a NaN."""
    rows, tokens = batch.mask.shape
    expected: Mapping[str, tuple[tuple[int, ...], ...]] = {
        "reward": ((rows,),), "group": ((rows,),), "advantage": ((rows,), (rows, tokens)),
    }  # fmt: skip
    changes, xp = {}, namespace(batch.mask)
    for one in fields(batch):
        value = getattr(batch, one.name)
        if value is None or one.name == "mask":
            continue
        shapes = expected.get(one.name, ((rows, tokens),))
        if tuple(value.shape) not in shapes:
            raise ValueError(
                f"{one.name}: found shape {tuple(value.shape)}; expected {' or '.join(map(str, shapes))}, as the mask says"
            )
        if len(value.shape) > 1:
            changes[one.name] = value = counted(value, batch.mask)
        if one.name != "group" and not xp.all(xp.isfinite(value)):
            raise ValueError(f"{one.name}: found NaN or an infinity where the mask counts; expected finite numbers")
    return replace(batch, **changes)


def counted(values: Array, mask: Array) -> Array:
    """Values (B, T), zero where the mask is False: before any arithmetic, so that not even a gradient meets a NaN."""
    xp = namespace(values, mask)
    return xp.where(mask, values, xp.zeros_like(values))


def statistics(method: TokenMethod, parts: Sequence[tuple[TokenBatch, Array]]) -> Statistics:
    """A method's sums over all parts (batch, logp) of an optimiser step; none where it needs none."""
    if not isinstance(method, WithStatistics):
        return {}
    first, *others = (method.statistics(batch, counted(logp, batch.mask)) for batch, logp in parts)
    return {name: sum((one[name] for one in others), value) for name, value in first.items()}


def denominators(method: TokenMethod, batch: TokenBatch, stats: Statistics) -> tuple[Array, ...]:
    """Denominators of a method's terms over some responses: known before the policy was asked."""
    return tuple(term.den for term in method.loss(batch, batch.logp_behavior, stats).terms)


def objective(method: TokenMethod, batch: TokenBatch, logp: Array, stats: Statistics, dens: Sequence[Array] | None = None) -> Array:
    """What some responses add to the value that the whole step maximises. `dens`: of the whole step, where this is a part of it."""
    return total(method.loss(batch, counted(logp, batch.mask), stats), dens)


def loss_and_gradient(method: TokenMethod, batch: TokenBatch, logp: NDArray[Any]) -> tuple[float, NDArray[np.float64]]:
    """The scalar loss of a whole optimiser step and its derivative by every log-probability. NumPy in float64, in and out.

    batch: of NumPy arrays, credited here unless it has advantages; logp (B, T) of the current policy. Returns the loss, to be
    minimised, and (B, T). Raises ValueError where shapes do not fit.

    >>> import numpy as np
    >>> from rl_core.methods.grpo import GRPO
    >>> logp = np.log([[0.5, 0.5], [0.25, 0.5]])
    >>> batch = TokenBatch(np.array([1.0, 0.0]), np.array([0, 0]), np.ones((2, 2), dtype=bool), logp)
    >>> loss, gradient = loss_and_gradient(GRPO(), batch, logp)
    >>> gradient.round(4).tolist()
    [[-0.1768, -0.1768], [0.1768, 0.1768]]
    """
    floats = {one.name: _tensor(getattr(batch, one.name)) for one in fields(batch) if one.name not in ("mask", "group")}
    labels = np.unique(np.asarray(batch.group), return_inverse=True)[1].reshape(np.shape(batch.group))
    tensors = replace(batch, mask=_mask(batch.mask), group=torch.from_numpy(labels), **floats)
    current = _tensor(logp).requires_grad_()
    if tuple(current.shape) != tuple(tensors.mask.shape):
        raise ValueError(f"logp: found shape {tuple(current.shape)}; expected {tuple(tensors.mask.shape)}, as the mask says")
    if not bool(counted(current.detach(), tensors.mask).isfinite().all()):
        raise ValueError("logp: found NaN or an infinity where the mask counts; expected finite numbers")
    whole = checked(tensors) if tensors.advantage is not None else credited(method, tensors)
    with torch.no_grad():
        stats = statistics(method, [(whole, current)])
    loss = -objective(method, whole, current, stats)
    (gradient,) = torch.autograd.grad(loss, current, allow_unused=True)
    found = torch.zeros_like(current) if gradient is None else gradient
    return float(loss.detach()), found.numpy()


def _tensor(values: Any) -> Any:
    if values is None:
        return None
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _mask(values: Any) -> Tensor:
    """Booleans, or numbers that are 0 or 1. Raises ValueError for others."""
    array = np.asarray(values)
    if array.ndim != 2 or not np.isin(array, (0, 1)).all():
        raise ValueError(f"mask: found {array.dtype} of shape {array.shape}; expected booleans of shape (B, T)")
    return torch.from_numpy(array.astype(np.bool_))
