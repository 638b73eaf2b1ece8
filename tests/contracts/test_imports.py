"""What an import may load: primitives stay as light as NumPy, and nothing below rl_core ever reaches torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ope.primitives.weights, ope.primitives.terms", {"scipy", "scipy.stats", "sklearn", "torch", "polars"}),
        ("import ope.primitives", {"scipy", "scipy.stats", "sklearn", "torch", "polars"}),
        ("import ope, bandits, serving, pipelines, rl_core", {"numpy", "scipy", "sklearn", "torch", "polars"}),
        ("from ope import LoggedData, evaluate", {"scipy.stats", "sklearn", "torch", "polars"}),
        ("import propel", {"numpy", "torch", "polars", "altair"}),
        ("import pipelines.demo, pipelines.evaluate", {"torch", "fastapi", "kafka"}),
    ],
)
def test_import_loads_no_more_than_it_needs(statement: str, absent: set[str]) -> None:
    assert not loaded_by(statement) & absent


def test_public_names_are_those_of_all() -> None:
    import ope

    assert {name: getattr(ope, name).__module__ for name in ope.__all__ if name != "ESTIMATORS"}
    assert set(ope.__all__) == set(ope._HOME)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ope.nothing
