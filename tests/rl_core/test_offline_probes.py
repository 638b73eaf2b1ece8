"""Every offline method on environments whose answers are known: values, discounts, and which action is best where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from rl_core.envs.probes import KINDS, Kind, Probe
from rl_core.families.offline import Transitions
from rl_core.methods.awac import AWAC
from rl_core.methods.bc import BC
from rl_core.methods.cql import CQL
from rl_core.methods.iql import IQL
from rl_core.methods.prdc import PRDC
from rl_core.methods.td3 import TD3, Twin
from rl_core.methods.td3_bc import TD3BC
from rl_core.registry import FAMILIES
from rl_core.trainers.offline import OfflineSchedule, OfflineTrainer, recorded

torch.set_num_threads(1)
DISCOUNT = 0.5
TWIN = Twin(discount=DISCOUNT, tau=0.05, actor_rate=3e-3, critic_rate=3e-3)
FAST = {"discount": DISCOUNT, "tau": 0.05, "actor_rate": 3e-3, "critic_rate": 3e-3}
METHODS: dict[str, Any] = {
    "TD3": TD3(TWIN), "TD3BC": TD3BC(twin=TWIN), "PRDC": PRDC(twin=TWIN), "AWAC": AWAC(temperature=0.1, **FAST),
    "IQL": IQL(expectile=0.9, temperature=0.1, value_rate=3e-3, cosine=False, **FAST),
    "CQL": CQL(alpha=0.05, temperature_rate=3e-3, temperature_start=0.05, samples=4, **FAST),
}  # fmt: skip
SCHEDULE = OfflineSchedule(steps=700, batch=64, width=32, normalize=False)


def logged(kind: Kind, *, best: bool = False) -> tuple[Probe, Transitions]:
    """400 episodes of uniform actions, or of the best ones."""
    env = Probe(kind)

    def act(obs: NDArray[np.float64], rng: Generator) -> NDArray[np.float64]:
        return env.best(obs) if best else rng.uniform(-1, 1, (len(obs), 1))

    return env, recorded(act, env, 400, np.random.default_rng(0))


def learned(method: Any, kind: Kind, **changes: Any) -> tuple[Probe, OfflineTrainer]:
    env, data = logged(kind, best=isinstance(method, BC))
    trainer = OfflineTrainer(method, data, replace(SCHEDULE, **changes))
    trainer.advance(trainer.schedule.steps)
    return env, trainer


def test_no_method_is_left_out() -> None:
    assert {type(one) for one in METHODS.values()} | {BC} == set(FAMILIES["offline"])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("action", "both")])
def test_values_are_known(method: Any, kind: Kind) -> None:
    """Rewards that no action moves: 1; what is seen; half of 1, one step ahead."""
    env, trainer = learned(method, kind, steps=300)
    obs, values = env.values(DISCOUNT)
    inputs, action = torch.as_tensor(obs, dtype=torch.float32), torch.zeros(len(obs), 1)
    with torch.no_grad():
        found = trainer.nets["critic"](inputs, action).mean(dim=0)
    np.testing.assert_allclose(found.numpy(), values, atol=0.1)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_best_action_is_found_where_there_is_one(method: Any) -> None:
    env, trainer = learned(method, "action")
    found = trainer.act(np.zeros((1, 1)))
    assert found[0, 0] == pytest.approx(float(env.best(np.zeros((1, 1)))[0, 0]), abs=0.25)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_best_action_depends_on_what_is_seen(method: Any) -> None:
    env, trainer = learned(method, "both")
    obs = np.array([[-1.0], [1.0]])
    np.testing.assert_allclose(trainer.act(obs), env.best(obs), atol=0.25)


@pytest.mark.parametrize("stochastic", [False, True])
def test_cloning_does_what_was_done(stochastic: bool) -> None:
    env, trainer = learned(BC(rate=3e-3, stochastic=stochastic), "both")
    obs = np.array([[-1.0], [1.0]])
    np.testing.assert_allclose(trainer.act(obs), env.best(obs), atol=0.05)
