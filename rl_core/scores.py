"""D4RL's scores: mean returns on a scale from a random policy's to a reference's, with the constants of its package."""

from __future__ import annotations

from collections.abc import Mapping

from ope.data import InputError

REFERENCES: Mapping[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "antmaze": (0.0, 1.0),
}
"""Returns of score 0 and of score 100, for the physics of D4RL's time: Gymnasium's v5 needs references of its own."""


def d4rl_score(env: str, mean_return: float) -> float:
    """100·(R - R_min)/(R_max - R_min) of undiscounted returns (Fu et al. 2020). Raises InputError for an unknown environment."""
    if env not in REFERENCES:
        raise InputError(f"environment: found {env!r}; expected one of {', '.join(REFERENCES)}, or scores of your own references")
    low, high = REFERENCES[env]
    return 100 * (mean_return - low) / (high - low)
