"""Every example on every page runs, prints what the page says it prints, and every link leads somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLE_LOG = ROOT / "docs" / "how-to" / "evaluate-your-log.md"


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def run_python(page: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=os.environ | {"COLUMNS": "80"})


def run_command(command: str) -> str:
    words = shlex.split(command)
    assert words[0] == "propel", f"pages show only propel commands with output, found {command}"
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-m", "propel", *words[1:]], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def example_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the how-to page's first example has written decisions.parquet."""
    folder = tmp_path_factory.mktemp("example")
    subprocess.run([sys.executable, "-c", blocks(EXAMPLE_LOG, "python")[0]], check=True, cwd=folder)
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(page)
    assert (tmp_path / "decisions.parquet").exists() == (page == EXAMPLE_LOG)


@pytest.mark.parametrize("page", [p for p in PAGES if "$ propel" in p.read_text()], ids=lambda page: page.stem)
def test_commands_print_what_the_page_shows(page: Path, example_log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the log of the how-to page, or on what the page's own example made: a registry, a log to import."""
    own = any(word in "".join(blocks(page, "console")) for word in ("--registry", "propel import", "propel propensities"))
    monkeypatch.chdir(tmp_path if own else example_log)
    if own:
        run_python(page)
    for block in blocks(page, "console"):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = step.partition("\n")
            shown = run_command(command)
            if expected.strip():
                assert shown.split() == expected.split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing
