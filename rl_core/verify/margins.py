"""What an experiment must show: margins, and how they widen with fewer seeds than its page has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl_core.verify.arms import Arms

SEEDS = 3
"""Of the pages' experiments on language models."""


@dataclass(frozen=True)
class Margin:
    """What an experiment must show, and what it showed."""

    name: str
    required: str
    measured: str
    passed: bool


@dataclass(frozen=True)
class Experiment:
    """What verifies a method."""

    told: str
    seeds: int
    margins: Callable[[Arms, Sequence[int]], list[Margin]]


def at_least(name: str, measured: float, required: float, seeds: int | None = None) -> Margin:
    """A value that must not be below; a margin on a mean over fewer seeds than the page has shrinks by the root of the ratio."""
    required = required if seeds is None else required * (min(seeds, SEEDS) / SEEDS) ** 0.5
    return Margin(name, f">= {_said(required)}", _said(measured), measured >= required)


def above(name: str, measured: float, bound: float = 0.0) -> Margin:
    """A value that must be above."""
    return Margin(name, f"> {_said(bound)}", _said(measured), measured > bound)


def at_most(name: str, measured: float, required: float, seeds: int | None = None) -> Margin:
    """A value that must not be above; a margin on a mean over fewer seeds than the page has grows by the root of the ratio."""
    required = required if seeds is None else required / (min(seeds, SEEDS) / SEEDS) ** 0.5
    return Margin(name, f"<= {_said(required)}", _said(measured), measured <= required)


def mean(values: Sequence[float]) -> float:
    """Of an arm's seeds."""
    return sum(values) / len(values)


def _said(value: float) -> str:
    """Three decimals, or a power of ten where they would all be 0."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
