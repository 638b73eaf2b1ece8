"""Shaping of rewards that a task's checker gave."""

from __future__ import annotations

from ope.primitives._xp import Array


def overlong_penalty(length: Array, longest: int, margin: int) -> Array:
    """What is added to the rewards of responses (n,): 0 up to a length of longest - margin, down to -1 at `longest`, and beyond.

    DAPO, arXiv 2503.14476, equation 13, whose margin is 4,096 of 20,480 tokens. Raises ValueError for a margin outside 1..longest.
    """
    if not 1 <= margin <= longest:
        raise ValueError(f"margin: found {margin}; expected 1 to {longest} tokens")
    return ((longest - margin - length) / margin).clip(-1.0, 0.0)
