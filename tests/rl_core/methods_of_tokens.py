"""Every method of the token family as tests look at it, and batches for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rl_core.aggregation import SequenceMean, SequenceSumNorm
from rl_core.corrections import MaskOutside, Truncate
from rl_core.families.token import TokenBatch, TokenMethod
from rl_core.methods.bapo import BAPO, RECOMMENDED
from rl_core.methods.grpo import GRPO, KIN
from rl_core.methods.opmd import OPMD
from rl_core.methods.rec import REC, VARIANTS, Drop
from rl_core.methods.reinforce import REINFORCE
from rl_core.penalties import K2, K3, CorrectedK3, ForwardKL, StraightThroughK3
from rl_core.registry import FAMILIES

MORE: Mapping[str, TokenMethod] = {
    "REINFORCE, weighted": REINFORCE(truncate=2.0),
    "GRPO, batch std, k2": GRPO(scale="batch", unbiased=False, dual_clip=3.0, kl=K2(0.1)),
    "GRPO, corrected": GRPO(correction=Truncate(2.0), mask_stale=0.1, kl=CorrectedK3(0.1)),
    "GRPO, masked": GRPO(correction=MaskOutside(0.5, 5.0), kl=StraightThroughK3(0.1), aggregation=SequenceMean()),
    "GRPO, k3": GRPO(kl=K3(0.1), aggregation=SequenceSumNorm(8.0)),
    "OPMD, whole responses": OPMD(level="sequence", soft_baseline=True),
    "REC, std": REC(std_normalize=True, regularizer=ForwardKL(0.1)),
    "BAPO, gradient": RECOMMENDED,
    "BAPO, the code's": BAPO(
        target=1.0, measure="ratio", order="code", step_low=0.05, low_limit=0.8, high_limit=2.0, dual_clip=3.0
    ),
}

EVERY: Mapping[str, Any] = {method.__name__: method() for method in FAMILIES["token"]} | KIN | VARIANTS | MORE


def by_order(method: TokenMethod) -> bool:
    """Whether it matters which of equal responses comes first."""
    return isinstance(method, REC) and isinstance(method.data, Drop)


def batch(seed: int = 0, prompts: int = 4, responses: int = 4, tokens: int = 6) -> tuple[TokenBatch, np.ndarray]:
    """A ragged batch away from every kink, and the current policy's log-probabilities."""
    rng = np.random.default_rng(seed)
    rows = prompts * responses
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, rows)[:, None]
    behavior = -rng.uniform(0.05, 3, (rows, tokens))
    logp = behavior + rng.normal(0, 0.4, (rows, tokens))
    made = TokenBatch(
        reward=rng.integers(0, 2, rows).astype(float) + rng.normal(0, 0.01, rows),
        group=np.repeat(rng.permutation(prompts) * 7, responses),
        mask=mask,
        logp_behavior=behavior,
        logp_proximal=behavior + rng.normal(0, 0.1, behavior.shape),
        logp_ref=behavior + rng.normal(0, 0.3, behavior.shape),
        value=rng.normal(0, 0.3, behavior.shape),
    )
    return made, logp


def micro_batches(batch: TokenBatch, size: int) -> Iterator[TokenBatch]:
    """A credited batch in parts of at most `size` responses."""
    for start in range(0, batch.mask.shape[0], size):
        yield batch.rows(slice(start, start + size))
