"""A disk that is full at any moment of a night: a plain message, nothing listed that is not there, the rest once there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ope.data import InputError
from pipelines.nightly.run import nightly
from pipelines.nightly.settings import read_settings
from tests.faults import harm
from tests.nightly.small_nights import SECOND, before_the_second, check_readable, state

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")


SHARES = (0.0, 0.2, 0.4, 0.6, 0.75, 0.9) if "PROPEL_KILLS" in os.environ else (0.0, 0.5, 0.9)
"""Of the room that the night needs; `make faults` tries more of them."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB."""
    with harm.small_disk(tmp_path / "disk", 64) as folder:
        yield folder


def resize(disk: Path, free: int | None) -> None:
    """Leave that many bytes of room; None: plenty."""
    used = shutil.disk_usage(disk).used
    size = "64m" if free is None else str(used + free)
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_full_disk_is_said_and_nothing_is_lost(disk: Path, tmp_path: Path) -> None:
    before = before_the_second(tmp_path / "before")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(before, undisturbed)
    nightly(SECOND, read_settings(undisturbed / "propel.toml"))
    needed = sum(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    needed -= sum(path.stat().st_size for path in before.rglob("*") if path.is_file())
    full = 0
    for share in SHARES:
        folder = disk / "feed"
        shutil.copytree(before, folder)
        resize(disk, int(share * needed))
        try:
            nightly(SECOND, read_settings(folder / "propel.toml"))
        except InputError as error:
            assert "the disk is full; what was committed before stays as it is: make room and run the night again" in str(error)  # noqa: PT017
            full += 1
        check_readable(folder)
        resize(disk, None)
        nightly(SECOND, read_settings(folder / "propel.toml"))
        assert state(folder) == state(undisturbed)
        shutil.rmtree(folder)
    assert full >= len(SHARES) - 1
