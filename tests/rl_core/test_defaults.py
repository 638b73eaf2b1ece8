"""Every default as data: what this project takes, and what paper and official code have where they differ."""

from __future__ import annotations

from typing import Any

import pytest

from rl_core.config import to_table
from rl_core.methods.bapo import BAPO, RECOMMENDED
from rl_core.methods.grpo import GRPO, KIN
from rl_core.methods.rec import VARIANTS
from rl_core.penalties import K2, ForwardKL
from rl_core.registry import FAMILIES
from tests.rl_core.origins import Origin, check

TOKEN_MEAN = {"kind": "TokenMean"}


DEFAULTS: dict[str, dict[str, Origin]] = {
    "REINFORCE": {"truncate": Origin("none"), "aggregation": Origin(TOKEN_MEAN, None, "token-mean")},
    "PPO": {
        "eps_low": Origin(0.2, 0.2, 0.2), "eps_high": Origin(0.2, 0.2, 0.2), "dual_clip": Origin("none", None, 3.0),
        "discount": Origin(1.0, 0.99, 1.0), "lambda_": Origin(1.0, 0.95, 1.0), "value_coef": Origin(0.5, 1.0, 0.5),
        "value_clip": Origin(0.2, None, 0.2), "aggregation": Origin(TOKEN_MEAN, None, "token-mean"),
    },
    "GRPO": {
        "eps_low": Origin(0.2, 0.2, 0.2), "eps_high": Origin(0.2, 0.2, 0.2), "dual_clip": Origin("none", None, 3.0),
        "objective": Origin("clipped", "clipped", "clipped"), "level": Origin("token", "token", "token"),
        "baseline": Origin("group", "group", "group"), "scale": Origin("group", "group", "group"),
        "unbiased": Origin(True, None, True), "eps_std": Origin(1e-6, None, 1e-6), "mask_stale": Origin("none", None, 0.1),
        "correction": Origin("none", None, 2.0), "kl": Origin("none", 0.04, 0.001),
        "aggregation": Origin(TOKEN_MEAN, "seq-mean-token-mean", "token-mean"),
    },
    "REC": {
        "gate": Origin({"kind": "OneSided", "eps_low": 0.2, "eps_high": 0.2}, (0.6, 2.0), (0.2, 0.2)),
        "weighted": Origin(False, False, False), "level": Origin("token", "token", "token"),
        "std_normalize": Origin(False, False, False), "data": Origin("none"), "regularizer": Origin("none", None, 0.001),
        "aggregation": Origin(TOKEN_MEAN, None, "token-mean"),
    },
    "OPMD": {
        "coef": Origin(0.1, None, 0.1), "level": Origin("token", "sequence", "token"), "soft_baseline": Origin(False, None, False),
        "aggregation": Origin(TOKEN_MEAN, None, "token-mean"),
    },
    "TrinityOPMD": {
        "temperature": Origin(1.0, None, 1.0), "soft_baseline": Origin(False, None, False),
        "aggregation": Origin(TOKEN_MEAN, None, "token-mean"),
    },
    "PairwiseOPMD": {"temperature": Origin(1.0)},
    "AsymRE": {"shift": Origin(-0.1, None, -0.1), "aggregation": Origin(TOKEN_MEAN, None, "token-mean")},
    "BAPO": {
        "target": Origin(0.4, 0.4, 1.0), "low_start": Origin(0.6, 0.6, 0.6), "low_limit": Origin(0.9, 0.9, 0.8),
        "high_start": Origin(1.2, 1.2, 1.2), "high_limit": Origin(3.0, 3.0, 2.0), "step_low": Origin(0.02, 0.02, 0.05),
        "step_high": Origin(0.05, 0.05, 0.05), "measure": Origin("share", "share", "ratio"),
        "contribution": Origin("value", "value", "value"), "order": Origin("paper", "paper", "code"),
        "dual_clip": Origin("none", None, 3.0), "eps_std": Origin(1e-6, None, 1e-6),
        "aggregation": Origin(TOKEN_MEAN, None, "token-mean"),
    },
}  # fmt: skip


@pytest.mark.parametrize("method", FAMILIES["token"], ids=lambda one: one.__name__)
def test_defaults_are_those_of_the_table(method: Any) -> None:
    assert to_table(method()) == {name: origin.ours for name, origin in DEFAULTS[method.__name__].items()}
    check(method, DEFAULTS[method.__name__])


def test_kin_and_variants_are_those_of_their_papers() -> None:
    assert KIN["DAPO"] == GRPO(eps_low=0.2, eps_high=0.28)
    assert (KIN["GSPO"].eps_low, KIN["GSPO"].eps_high) == (3e-4, 4e-4)
    assert KIN["Dr.GRPO"].scale == KIN["RLOO"].scale == "none"
    assert VARIANTS["OPMD"].regularizer == K2(2 * 0.1)  # the code's 0.1 is of d², K2's of d²/2
    assert VARIANTS["AsymRE"].regularizer == ForwardKL(0.1)
    assert BAPO(target=0.5, contribution="gradient") == RECOMMENDED
    assert len(VARIANTS) == 12
