"""Room on the disk: a reserve that is given up when it is full, and taken again once there is room."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import apsw

from bandits.log.port import LogUnavailableError

RESERVE = 64 << 20
"""Bytes kept on the disk, so that whoever runs the service can still write when it is full."""


def means_full(error: Exception) -> bool:
    """Whether an error says that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, apsw.FullError) or getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_SHMSIZE


class Room:
    """The reserve of a folder, at most a twentieth of its disk, and whether that is full."""

    def __init__(self, folder: Path, reserve: int = RESERVE) -> None:
        self.folder, self.full = folder, False
        status = os.statvfs(folder)
        self.reserve = min(reserve, status.f_blocks * status.f_frsize // 20)
        self._take()

    def check(self) -> None:
        """Raise LogUnavailableError while the disk is full. It is not any more once there is room for twice the reserve."""
        if not self.full:
            return
        status = os.statvfs(self.folder)
        if status.f_bavail * status.f_frsize < 2 * self.reserve:
            raise LogUnavailableError(f"{self.folder}: the disk is full; expected room: it goes on by itself once there is some")
        self.full = False
        self._take()

    def filled(self, error: Exception) -> LogUnavailableError:
        """Give the reserve up, and say why nothing is taken."""
        self.full = True
        self._file.unlink(missing_ok=True)
        return LogUnavailableError(f"{self.folder}: the disk is full ({error}); it goes on by itself once there is room")

    @property
    def _file(self) -> Path:
        return self.folder / "reserve"

    def _take(self) -> None:
        try:
            with self._file.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, self.reserve))
        except OSError:
            self._file.unlink(missing_ok=True)  # no room: what there is goes to the log
