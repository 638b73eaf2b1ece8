"""The methods, by name. One tuple: a method that is not in it does not exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ope.data import InputError
from rl_core.families.imitation import ImitationMethod
from rl_core.families.offline import OfflineMethod
from rl_core.families.online import OnlineMethod
from rl_core.families.token import TokenMethod
from rl_core.methods.ailboost import AILBoost
from rl_core.methods.asymre import AsymRE
from rl_core.methods.awac import AWAC
from rl_core.methods.bapo import BAPO, RECOMMENDED
from rl_core.methods.bc import BC
from rl_core.methods.cql import CQL
from rl_core.methods.dac import DAC
from rl_core.methods.grpo import GRPO, KIN
from rl_core.methods.iql import IQL
from rl_core.methods.mdpo import MDPO, OffPolicyMDPO
from rl_core.methods.opmd import OPMD, PairwiseOPMD, TrinityOPMD
from rl_core.methods.ppo import PPO
from rl_core.methods.ppo_control import ControlPPO
from rl_core.methods.prdc import PRDC
from rl_core.methods.rec import REC, VARIANTS
from rl_core.methods.reinforce import REINFORCE
from rl_core.methods.sac import SAC
from rl_core.methods.td3 import TD3
from rl_core.methods.td3_bc import TD3BC
from rl_core.methods.trpo import NPG, TRPO

Method = TokenMethod | OfflineMethod | OnlineMethod | ImitationMethod

FAMILIES: Mapping[str, tuple[type[Any], ...]] = {
    "token": (REINFORCE, PPO, GRPO, REC, OPMD, TrinityOPMD, PairwiseOPMD, AsymRE, BAPO),
    "offline": (BC, TD3, TD3BC, IQL, AWAC, CQL, PRDC),
    "online": (ControlPPO, TRPO, MDPO, SAC, OffPolicyMDPO),
    "imitation": (DAC, AILBoost),
}
METHODS: tuple[type[Any], ...] = tuple(method for methods in FAMILIES.values() for method in methods)


def find(name: str, family: str | None = None) -> type[Any]:
    """A method's class by its name, in any case; of a family if one is asked for. Raises InputError that names them."""
    known = METHODS if family is None else FAMILIES[family]
    for method in known:
        if method.__name__.lower() == name.lower():
            return method
    kind = "" if family is None else f" of the {family} family"
    raise InputError(f"method: found {name!r}; expected one{kind} of {', '.join(one.__name__ for one in known)}")


def family_of(method: type[Any]) -> str:
    """The family that a method's class is of."""
    return next(family for family, methods in FAMILIES.items() if method in methods)


_NAMED: Mapping[str, Method] = {**KIN, **VARIANTS, "BAPO-gradient": RECOMMENDED, "10%BC": BC(top=0.1), "NPG": NPG}

SETTINGS: Mapping[str, Method] = {
    name: made for name, made in _NAMED.items() if name not in {method.__name__ for method in METHODS}
}
"""Settings that papers and libraries have names for, where no method has that name itself."""


def named(name: str) -> Any:
    """A method with its defaults, or a setting that has a name of its own, in any case. Raises InputError."""
    for known, method in SETTINGS.items():
        if known.lower() == name.lower():
            return method
    try:
        return find(name)()
    except InputError as error:
        raise InputError(f"{error}, {', '.join(SETTINGS)}") from None
