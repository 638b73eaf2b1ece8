"""The methods, by name. One tuple: a method that is not in it does not exist."""

from __future__ import annotations

from collections.abc import Mapping

from ope.data import InputError
from rl_core.families.token import TokenMethod
from rl_core.methods.asymre import AsymRE
from rl_core.methods.bapo import BAPO, RECOMMENDED
from rl_core.methods.grpo import GRPO, KIN
from rl_core.methods.opmd import OPMD, PairwiseOPMD, TrinityOPMD
from rl_core.methods.ppo import PPO
from rl_core.methods.rec import REC, VARIANTS
from rl_core.methods.reinforce import REINFORCE

Method = TokenMethod

FAMILIES: Mapping[str, tuple[type[Method], ...]] = {
    "token": (REINFORCE, PPO, GRPO, REC, OPMD, TrinityOPMD, PairwiseOPMD, AsymRE, BAPO),
}
METHODS: tuple[type[Method], ...] = tuple(method for methods in FAMILIES.values() for method in methods)


def find(name: str) -> type[Method]:
    """A method's class by its name, in any case. Raises InputError, naming those that there are."""
    for method in METHODS:
        if method.__name__.lower() == name.lower():
            return method
    raise InputError(f"method: found {name!r}; expected one of {', '.join(one.__name__ for one in METHODS)}")


SETTINGS: Mapping[str, Method] = {**KIN, **VARIANTS, "BAPO-gradient": RECOMMENDED}
"""Settings that papers and libraries have names for."""


def named(name: str) -> Method:
    """A method with its defaults, or a setting that has a name of its own, in any case. Raises InputError."""
    for known, method in SETTINGS.items():
        if known.lower() == name.lower():
            return method
    try:
        return find(name)()
    except InputError as error:
        raise InputError(f"{error}, {', '.join(SETTINGS)}") from None
