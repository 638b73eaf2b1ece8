"""Rules of the repository that no linter knows: sizes of files, and words that do not belong in it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = [p for folder in ("ope", "bandits", "serving", "pipelines", "rl_core", "benchmarks") for p in (ROOT / folder).rglob("*.py")]


def test_files_stay_under_500_lines() -> None:
    assert not [p for p in [*CODE, ROOT / "propel.py"] if len(p.read_text().splitlines()) >= 500]


def test_primitives_are_short_functions_without_classes_or_randomness() -> None:
    for path in (ROOT / "ope" / "primitives").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^import random|\.random|\+=|print\(", text), path
        for body in re.split(r"^(?:def|class) ", text, flags=re.MULTILINE)[1:]:
            assert len(body.splitlines()) <= 32, (path.name, body.splitlines()[0])


def test_nothing_is_left_for_later() -> None:
    leftover = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    assert not [p for p in [*CODE, ROOT / "propel.py"] if leftover.search(p.read_text())]
