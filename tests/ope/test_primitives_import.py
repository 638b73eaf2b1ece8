"""Importing the primitives stays as light as the array namespace."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = [
    "ope.primitives",
    *(f"ope.primitives.{name}" for name in ("_xp", "weights", "terms", "baselines", "divergences", "reduce")),
]
HEAVY = ["scipy", "sklearn", "torch", "pandas", "polars"]


@pytest.mark.parametrize("module", MODULES)
def test_a_fresh_interpreter_loads_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert module in loaded  # the list is of the interpreter that did import it
    assert loaded.isdisjoint(HEAVY)
