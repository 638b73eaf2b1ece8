"""SIGKILL at any write of any step: the lake of before stays readable, and the next run ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nightly.small_nights import SECOND, before_the_second, check_readable, state

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")

POINTS = int(os.environ.get("PROPEL_KILLS", "4"))
"""Kills; `make faults` asks for more of them."""

CALLS = {"write": 0.25, "fsync": 0.5, "rename": 0.25}
"""System calls, and which share of the kills is at each of them."""


class Server:
    """The parent of nights that are killed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.killed_nights"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder: Path, call: str = "-", when: int = 0) -> tuple[int, dict[str, int]]:
        """Exit status of a night of the second date, and the calls of each kind where they were counted."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{folder} {SECOND} {call} {when}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["calls"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    assert one.process.stdin is not None
    one.process.stdin.close()
    one.process.wait()
    one.process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A night that ended well, and the next day's events in the inbox."""
    return before_the_second(tmp_path_factory.mktemp("before") / "feed")


def test_a_killed_night_leaves_the_lake_readable_and_ends_the_same(server: Server, before: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(before, undisturbed)
    status, calls = server.run(undisturbed, "count")
    assert status == 0
    expected = state(undisturbed)
    killed = 0
    for call, part in CALLS.items():
        points = max(1, round(POINTS * part))
        for point in range(points):
            folder = tmp_path / "killed"
            shutil.copytree(before, folder)
            status, _ = server.run(folder, call, 1 + (2 * point + 1) * calls[call] // (2 * points))
            assert status == -9
            killed += 1
            check_readable(folder)
            assert server.run(folder)[0] == 0
            assert state(folder) == expected
            shutil.rmtree(folder)
    assert killed >= POINTS
