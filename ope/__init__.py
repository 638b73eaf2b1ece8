"""Off-policy evaluation: arrays in, estimates with intervals and verdicts out. No torch, no input or output.

Names below load on first use, so that `import ope.primitives` stays as light as NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ope.data import DataError, InputError, LoggedData
    from ope.estimate import Estimate
    from ope.estimators import DM, DR, ESTIMATORS, IPS, SNDR, SNIPS, BetaIPS, ClippedIPS, Delta, DRos, SwitchDR
    from ope.evaluation import Report, evaluate
    from ope.intervals import Bootstrap, EmpiricalBernstein, Normal
    from ope.moments import ClusterSums, Moments

__all__ = [
    "DM",
    "DR",
    "ESTIMATORS",
    "IPS",
    "SNDR",
    "SNIPS",
    "BetaIPS",
    "Bootstrap",
    "ClippedIPS",
    "ClusterSums",
    "DRos",
    "DataError",
    "Delta",
    "EmpiricalBernstein",
    "Estimate",
    "InputError",
    "LoggedData",
    "Moments",
    "Normal",
    "Report",
    "SwitchDR",
    "evaluate",
]

_HOMES = {
    "data": ("DataError", "InputError", "LoggedData"),
    "estimate": ("Estimate",),
    "estimators": (
        "DM", "DR", "ESTIMATORS", "IPS", "SNDR", "SNIPS", "BetaIPS", "ClippedIPS", "Delta", "DRos", "SwitchDR",
    ),
    "evaluation": ("Report", "evaluate"),
    "intervals": ("Bootstrap", "EmpiricalBernstein", "Normal"),
    "moments": ("ClusterSums", "Moments"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ope' has no attribute {name!r}")
    return getattr(import_module(f"ope.{_HOME[name]}"), name)
