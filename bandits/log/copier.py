"""Moves a write-ahead log into its file beside whoever writes, so that nobody waits for it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw

from bandits.log.files import PAGE, Connect
from bandits.log.room import means_full

NEARLY = 512 << 10
"""Bytes that may be left over: the rest is soon done by whoever writes, in between."""

PASSES = 4
"""How often what was written meanwhile is copied, too."""


class Copier:
    """A thread that copies, with a connection of its own. `failed` is told what the disk did not confirm.

    Two connections that checkpoint are what SQLite before 3.51.3 could lose a commit by: `check_sqlite` refuses it.
    """

    def __init__(self, connect: Connect, failed: Callable[[Exception], object]) -> None:
        self._connect, self._failed = connect, failed
        self._wanted: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self.idle = threading.Event()
        self.idle.set()
        self._thread = threading.Thread(target=self._run, name="log copier", daemon=True)
        self._thread.start()

    def copy(self, path: Path) -> None:
        """Begin to copy a file's write-ahead log; `idle` is set at the end."""
        self.idle.clear()
        self._wanted.put(path)

    def close(self) -> None:
        """End what was begun."""
        self._wanted.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (path := self._wanted.get()) is not None:
            try:
                with contextlib.suppress(apsw.BusyError), closing(self._connect(path)) as connection:
                    _copy(connection)
            except (apsw.Error, OSError) as error:
                if not means_full(error):
                    self._failed(error)
            finally:
                self.idle.set()


def _copy(connection: apsw.Connection) -> None:
    for _ in range(PASSES):
        found: list[Any] = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        ((busy, pages, copied),) = found
        if busy or (pages - copied) * PAGE <= NEARLY:
            return
