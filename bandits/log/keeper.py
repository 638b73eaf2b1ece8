"""What becomes of sealed files: they are made whole in themselves, their keys indexed, and old answers forgotten."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw

from bandits.log.files import Connect, log_files, wal_bytes
from bandits.log.keys import forget, index, open_keys, unindexed

REST = 60.0
"""Seconds after which answers are looked for that are to be forgotten."""

SOON = 5.0
"""Seconds after which what failed is tried again: a file was being copied, or the disk was full."""


class Keeper:
    """A thread that tends sealed files, off the way of whoever waits.

    `indexed` is told a file that the index covers now, or that is gone.
    What it cannot do, since a file is damaged or in use, it tries again later: until then the file itself is looked into.
    """

    def __init__(
        self, folder: Path, connect: Connect, clock: Callable[[], int], window_ns: int, indexed: Callable[[Path], object]
    ) -> None:
        self._folder, self._connect, self._clock, self._window_ns, self._indexed = folder, connect, clock, window_ns, indexed
        self._keys = open_keys(folder)
        self._sealed: queue.SimpleQueue[tuple[Path, apsw.Connection | None] | None] = queue.SimpleQueue()
        self._closing = False
        for path in log_files(folder)[:-1]:
            if wal_bytes(path) or path in unindexed(self._keys, folder):
                self._sealed.put((path, None))
        self._thread = threading.Thread(target=self._run, name="log keeper", daemon=True)
        self._thread.start()

    def keep(self, path: Path, connection: apsw.Connection | None) -> None:
        """Tend a file that was sealed; `connection`, which wrote it, is closed here."""
        self._sealed.put((path, connection))

    def close(self) -> None:
        """End; the next start goes on with what is left."""
        self._closing = True
        self._sealed.put(None)
        self._thread.join()
        self._keys.close()

    def _run(self) -> None:
        left: set[Path] = set()
        while True:
            try:
                one = self._sealed.get(timeout=SOON if left else REST)
            except queue.Empty:
                left = {path for path in left if not self._tend(path, None)}
            else:
                if one is None:
                    return
                if not self._tend(*one):
                    left.add(one[0])
            with contextlib.suppress(apsw.Error, OSError):
                forget(self._keys, self._clock() - self._window_ns)

    def _tend(self, path: Path, connection: apsw.Connection | None) -> bool:
        """Whether nothing is left to be done about a file."""
        try:
            if not path.exists():
                self._indexed(path)
                return True
            whole = _make_whole(connection or self._connect(path))
            index(self._keys, path, self._clock, lambda: not self._closing)
        except (apsw.Error, OSError, ValueError):
            return False
        if not self._closing:
            self._indexed(path)
        return whole


def _make_whole(connection: apsw.Connection) -> bool:
    """Move the write-ahead log into a file, so that it can be copied without what lies beside it; whether that is done."""
    with closing(connection):
        found: list[Any] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return not found[0][0]
