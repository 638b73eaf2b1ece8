"""A folder for a log, and logs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bandits.log.sqlite import SqliteLog


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[..., SqliteLog]]:
    """Opens logs on the folder, and closes them at the end."""
    logs: list[SqliteLog] = []

    def open_one(**changed: object) -> SqliteLog:
        logs.append(SqliteLog(folder, **{"reserve": 1, **changed}))  # type: ignore[arg-type]
        return logs[-1]

    yield open_one
    for log in logs:
        log.close()
