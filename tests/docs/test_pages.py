"""Every example on every page runs, prints what the page says it prints, and every link leads somewhere."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from propel import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLE_LOG = ROOT / "docs" / "how-to" / "evaluate-your-log.md"
FILE = re.compile(r"# file: (\S+)\n")
STORIES = [page for page in PAGES if any(FILE.match(text) for _, text in BLOCK.findall(page.read_text()))]
"""Pages whose blocks belong together, from the first to the last: files to write, code, commands, and what these print."""

CHANGES = re.compile(r"\d+\.\d (?=s\b|MB\b)|@[0-9a-f]{4,}…?|(?<=-\d\d-\d\d-)[0-9a-f]{12}|\S*(?=/(?:lake|reports)/)|process \d+")
"""What is another one in every night: times and sizes, digests (a registry makes its own key), the folder, a process."""


CURL = """#!{python}
import sys, urllib.request
words, headers, data, address = sys.argv[1:], {{}}, None, ""
while words:
    word = words.pop(0)
    if word == "-H":
        name, _, value = words.pop(0).partition(": ")
        headers[name] = value
    elif word == "-d":
        data = words.pop(0).encode()
    elif word != "-s":
        address = word
print(urllib.request.urlopen(urllib.request.Request(address, data, headers)).read().decode())
"""
"""What pages use of curl, for machines without it."""


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


def words(text: str) -> list[str]:
    return CHANGES.sub("", text).split()


def follow(page: Path, folder: Path) -> None:
    """All blocks of a story in the order of the page, in a folder of their own, where `propel` can be called by name.

    Commands run in this process: a night needs longer to import what it uses than to use it.
    """
    (folder / "bin").mkdir()
    script = folder / "bin" / "propel"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m propel "$@"\n')
    script.chmod(0o755)
    if shutil.which("curl") is None:
        (folder / "bin" / "curl").write_text(CURL.format(python=sys.executable))
        (folder / "bin" / "curl").chmod(0o755)
    environment = os.environ | {"COLUMNS": "80", "PATH": f"{script.parent}:{os.environ['PATH']}"}
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for kind, text in BLOCK.findall(page.read_text()):
        if named := FILE.match(text):
            Path(named[1]).write_text(text)
        elif kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, str(page), "exec"), names)
            printed = out.getvalue()
        elif kind == "sh":
            done = subprocess.run(["sh", "-e", "-c", text], stdout=subprocess.PIPE, check=True, env=environment)
            printed = done.stdout.decode()
        elif kind == "text":
            assert words(printed) == words(text)
        elif kind == "console":
            check_console(text, environment)


def check_console(block: str, environment: dict[str, str]) -> None:
    """Commands print what the block says, on both streams, and exit with 0, unless the block asks for the code and shows it."""
    codes: list[int] = []
    for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, expected = step.replace("\\\n", "").partition("\n")
        if command == "echo $?":
            assert codes.pop() == int(expected)
            continue
        program, *rest = shlex.split(command)
        assert (program, any(codes)) == ("propel", False)
        done = CliRunner().invoke(app, rest, env=environment, catch_exceptions=False)
        codes.append(done.exit_code)
        assert words(done.output) == words(expected)
    assert not any(codes)


@pytest.fixture(scope="module")
def example_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the how-to page's first example has written decisions.parquet."""
    folder = tmp_path_factory.mktemp("example")
    subprocess.run([sys.executable, "-c", blocks(EXAMPLE_LOG, "python")[0]], check=True, cwd=folder)
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and p not in STORIES], ids=lambda page: page.stem)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(page)
    assert (tmp_path / "decisions.parquet").exists() == (page == EXAMPLE_LOG)


@pytest.mark.parametrize("page", [p for p in PAGES if "$ propel" in p.read_text() and p not in STORIES], ids=lambda page: page.stem)
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


@pytest.mark.parametrize("page", STORIES, ids=lambda page: page.stem)
def test_stories_can_be_followed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        follow(page, tmp_path)
    finally:
        for started in tmp_path.glob("*.pid"):  # what a page starts ends with it, also where it fails halfway
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(started.read_text()), signal.SIGTERM)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing
