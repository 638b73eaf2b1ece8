"""Files before the newest: what they hold of a key, as the index says it, or they themselves where they are not indexed yet."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw

from bandits.log.files import reading
from bandits.log.keys import ENTRY, Asked, checked, look_up, open_keys, unindexed
from bandits.log.segments import DamagedError, records

CHUNK = 500
"""Keys that are looked for in one statement."""


class Older:
    """The index and the sealed files of a log that it does not cover yet. Of one thread."""

    def __init__(self, folder: Path) -> None:
        self._keys = open_keys(folder)
        self._files: dict[Path, apsw.Connection | None] = dict.fromkeys(unindexed(self._keys, folder))
        self._salvaged: dict[Path, dict[bytes, Asked]] = {}

    @property
    def paths(self) -> list[Path]:
        """Files that are not indexed yet, as far as is known here."""
        return list(self._files)

    def add(self, path: Path) -> None:
        """Look into a file that was just sealed."""
        self._files[path] = None

    def drop(self, path: Path) -> None:
        """Leave a file to the index, which covers it now."""
        self._salvaged.pop(path, None)
        if (connection := self._files.pop(path, None)) is not None:
            connection.close()

    def find(self, wanted: Sequence[bytes]) -> dict[bytes, Asked]:
        """What was asked and answered under keys that are there; nothing of it where that is forgotten, or damaged."""
        found: dict[bytes, Asked] = {}
        for start in range(0, len(wanted), CHUNK):
            some = wanted[start : start + CHUNK]
            found |= {key: known.asked for key, known in look_up(self._keys, some).items()}
            for path in list(self._files):
                found |= self._in_file(path, some)
        return found

    def close(self) -> None:
        """Close all."""
        for connection in (self._keys, *self._files.values()):
            if connection is not None:
                connection.close()

    def _in_file(self, path: Path, some: Sequence[bytes]) -> dict[bytes, Asked]:
        """The same in one file. Where it is damaged, what can still be read of it: new entries must not wait for a repair."""
        if path not in self._salvaged:
            try:
                connection = self._files[path] = self._files[path] or reading(path)
                marks = ",".join("?" * len(some))
                rows: list[Any] = connection.execute(f"{ENTRY} IN ({marks})", tuple(some)).fetchall()
                return {row[1]: checked(*row) for row in rows}
            except apsw.CantOpenError:
                if path.exists():
                    raise
                self.drop(path)  # whoever deleted it knew what for
                return {}
            except (apsw.CorruptError, apsw.NotADBError, apsw.SQLError, UnicodeDecodeError):
                known = self._salvaged[path] = {}
                with suppress(DamagedError):
                    for one in records(path):
                        known[one.key] = Asked(one.content, one.answer)
        known = self._salvaged[path]
        return {key: known[key] for key in some if key in known}
