"""Defaults of the control families as data: what this project takes, and what paper and official code have where they differ."""

from __future__ import annotations

from typing import Any

import pytest

from rl_core.config import to_table
from rl_core.registry import FAMILIES
from tests.rl_core.origins import Origin, check

TWIN = Origin(
    {
        "kind": "Twin", "discount": 0.99, "tau": 0.005, "noise": 0.2, "noise_clip": 0.5, "actor_every": 2, "actor_rate": 3e-4,
        "critic_rate": 3e-4,
    }
)  # fmt: skip
"""Those of TD3's paper and code, which agree."""


def plan(**changes: Any) -> Origin:
    """How an on-policy method passes over its batch, where it is not as TRPO and MDPO do."""
    shared = {"kind": "Plan", "epochs": 10, "minibatch": "none", "value_epochs": 5, "value_minibatch": 128, "standardize": "batch",
              "rate": 3e-4, "anneal": False, "grad_clip": 0.5, "kl_stop": "none"}  # fmt: skip
    return Origin(shared | changes)


SAC = {
    "kind": "SAC", "discount": 0.99, "tau": 0.005, "actor_rate": 1e-4, "critic_rate": 1e-4, "temperature_rate": 1e-4,
    "temperature": 1.0, "learns_temperature": True, "form": "log", "target_entropy": "none",
}  # fmt: skip
"""With the rates of AILBoost's code."""


def rounds(**changes: Any) -> dict[str, Any]:
    """Of learners, where they are not AILBoost's."""
    shared = {"kind": "Plan", "steps": 1000, "rl_every": 2, "judge_steps": 100, "judge_every": "none", "against": "mixture",
              "samples": 1000, "rolls": 2, "learners": 60, "replay": "uniform"}  # fmt: skip
    return shared | changes


DEFAULTS: dict[str, dict[str, Origin]] = {
    "BC": {
        "stochastic": Origin(False, None, False), "top": Origin("none"), "episode_discount": Origin(0.99, None, 0.99),
        "rate": Origin(3e-4, None, 3e-4),
    },
    "TD3": {"twin": TWIN, "exploration": Origin(0.1, 0.1, 0.1)},
    "TD3BC": {"alpha": Origin(2.5, 2.5, 2.5), "twin": TWIN, "exploration": Origin(0.1, 0.1, 0.1)},
    "IQL": {
        "expectile": Origin(0.7, 0.7, 0.7), "temperature": Origin(1 / 3), "cap": Origin(100.0, 100.0, 100.0),
        "discount": Origin(0.99, 0.99, 0.99), "tau": Origin(0.005, 0.005, 0.005), "actor_rate": Origin(3e-4, 3e-4, 3e-4),
        "value_rate": Origin(3e-4, 3e-4, 3e-4), "critic_rate": Origin(3e-4, 3e-4, 3e-4), "cosine": Origin(True, True, True),
    },
    "AWAC": {
        "temperature": Origin(1 / 3, None, 1.0), "cap": Origin(100.0, None, 100.0), "weights": Origin("capped", None, "capped"),
        "discount": Origin(0.99, None, 0.99), "tau": Origin(0.005, None, 0.005), "actor_rate": Origin(3e-4, None, 3e-4),
        "critic_rate": Origin(3e-4, None, 3e-4),
    },
    "CQL": {
        "alpha": Origin(10.0, None, 10.0), "samples": Origin(10, None, 10), "softness": Origin(1.0, None, 1.0),
        "discount": Origin(0.99, None, 0.99), "tau": Origin(0.005, None, 0.005), "actor_rate": Origin(3e-5, None, 3e-5),
        "critic_rate": Origin(3e-4, None, 3e-4), "temperature_rate": Origin(3e-5, None, 3e-5),
        "temperature_start": Origin(1.0, None, 1.0), "log_std_start": Origin(-1.0, None, -1.0),
    },
    "PRDC": {
        "alpha": Origin(2.5, 2.5, 2.5), "state_weight": Origin(2.0, 2.0, 1.0), "norm": Origin("squared", "l2", "squared"),
        "bandwidth": Origin(0.0), "search": Origin("auto", None, "tree"), "twin": TWIN,
    },
    "ControlPPO": {
        "eps_low": Origin(0.2, 0.2, 0.2), "eps_high": Origin(0.2, 0.2, 0.2), "dual_clip": Origin("none", "none", "none"),
        "discount": Origin(0.99, 0.99, 0.99), "lambda_": Origin(0.95, 0.95, 0.95), "value_coef": Origin(0.5, 0.5, 0.5),
        "value_clip": Origin("none", "none", 0.2), "entropy_coef": Origin(0.0, 0.0, 0.0),
        "plan": plan(minibatch=64, value_epochs=0, value_minibatch=64, standardize="minibatch"),
    },
    "TRPO": {
        "delta": Origin(0.01, 0.01, 0.01), "damping": Origin(0.1, None, 0.1), "conjugate_steps": Origin(10, 10, 10),
        "backtracks": Origin(10, None, 10), "backtrack": Origin(0.5, None, 0.5), "discount": Origin(0.99, 0.99, 0.99),
        "lambda_": Origin(0.97, 0.97, 0.97), "plan": plan(epochs=1, rate=1e-3),
    },
    "MDPO": {
        "step": Origin(1.0, 1.0, 1.0), "step_min": Origin(1e-3), "discount": Origin(0.99, 0.99, 0.99),
        "lambda_": Origin(0.95, 0.95, 0.95), "value_clip": Origin(0.2, None, 0.2), "plan": plan(),
    },
    "SAC": {
        "discount": Origin(0.99, 0.99, 0.99), "tau": Origin(0.005, 0.005, 0.005), "actor_rate": Origin(3e-4, 3e-4, 3e-4),
        "critic_rate": Origin(3e-4, 3e-4, 1e-3), "temperature_rate": Origin(3e-4, 3e-4, 1e-3),
        "temperature": Origin(1.0, None, 1.0),
        "learns_temperature": Origin(True, True, True), "form": Origin("log", "linear", "log"), "target_entropy": Origin("none"),
    },
    "OffPolicyMDPO": {
        "kl_coef": Origin(1.0, 1.0, 1.0), "entropy_coef": Origin(0.2, None, 0.2), "refresh": Origin(1000, 1000, 1000),
        "discount": Origin(0.99, 0.99, 0.99), "tau": Origin(0.005, None, 0.005), "rate": Origin(3e-4, 3e-4, 3e-4),
        "penalty": Origin(1e-3, None, 1e-3), "samples": Origin(True, True, False),
    },
    "DAC": {
        "divergence": Origin({"kind": "JensenShannon"}), "penalty": Origin(10.0, None, 10.0), "bounded": Origin(True, None, True),
        "judge_rate": Origin(1e-4, None, 1e-4), "sac": Origin(SAC), "plan": Origin(rounds(
            judge_steps=0, judge_every=1, against="replay", learners=1
        )),
    },
    "AILBoost": {
        "alpha": Origin(0.05, None, 0.05), "negative": Origin("keep", None, "keep"), "divergence": Origin({"kind": "ReverseKL"}),
        "penalty": Origin(10.0, None, 10.0), "bounded": Origin(True, None, True), "judge_rate": Origin(1e-4, None, 1e-4),
        "sac": Origin(SAC), "plan": Origin(rounds()),
    },
}  # fmt: skip


@pytest.mark.parametrize("method", [one for family in FAMILIES if family != "token" for one in FAMILIES[family]])
def test_defaults_are_those_of_the_table(method: Any) -> None:
    assert to_table(method()) == {name: origin.ours for name, origin in DEFAULTS[method.__name__].items()}
    check(method, DEFAULTS[method.__name__])
