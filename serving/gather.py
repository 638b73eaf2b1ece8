"""Entries on their way from the event loop to the log: in groups that are the larger the busier the loop is.

A group costs as much CPU as many entries, and the thread that commits it takes the interpreter from the loop. So a loaded service
sends few large groups, while an idle one sends each entry at once.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from bandits.log.port import DecisionLog, Done, Entry, LogFailedError, Stored

PATIENCE = 0.005
"""Seconds from one group to the next, at least, where the loop is loaded."""

IDLE, LOADED = 0.5, 0.7
"""Shares of its time that the loop is busy: up to the first nobody waits for others, from the second on as long as that."""


class GroupLog(DecisionLog, Protocol):
    """A log that also takes several entries for one transaction."""

    @property
    def full(self) -> bool:
        """Whether the disk was full when it was last written to."""
        ...

    @property
    def failed(self) -> LogFailedError | None:
        """Why nothing is acknowledged any more."""
        ...

    @property
    def last_group(self) -> int:
        """Entries of the last transaction."""
        ...

    def submit_all(self, entries: list[tuple[Entry, Done]]) -> None:
        """Queue entries that share a transaction; they are told in their order."""
        ...


class Gathering:
    """The entries of one event loop on their way to a log."""

    def __init__(self, log: GroupLog, loop: asyncio.AbstractEventLoop) -> None:
        self._log, self._loop = log, loop
        self._waiting: list[tuple[Entry, Done]] = []
        self._size = 0  # bytes of those
        self._patience = 0.0
        self._next = 0.0  # when the next group may go
        self._held = False  # whether one waits until it may go

    def adapt(self, busy: float) -> None:
        """Learn which share of its time the loop was busy."""
        self._patience = PATIENCE * min(1.0, max(0.0, (busy - IDLE) / (LOADED - IDLE)))

    def submit(self, entry: Entry, done: Done) -> None:
        """Queue an entry; `done` is told once it is durable, or refused."""
        self.submit_all([(entry, done)])

    def submit_all(self, entries: list[tuple[Entry, Done]]) -> None:
        """Queue entries that share a transaction. From the loop alone."""
        self._waiting += entries
        self._size += sum(entry.size for entry, _ in entries)
        if not self._held:
            self._send_in_time()

    @property
    def waiting(self) -> tuple[int, int]:
        """Entries, and bytes, that were submitted and not settled."""
        entries, size = self._log.waiting
        return entries + len(self._waiting), size + self._size

    @property
    def expected_wait(self) -> float:
        """Seconds that an entry submitted now would wait, about."""
        return self._log.expected_wait + max(0.0, self._next - self._loop.time())

    @property
    def full(self) -> bool:
        """Whether the disk was full when it was last written to."""
        return self._log.full

    @property
    def failed(self) -> LogFailedError | None:
        """Why nothing is acknowledged any more."""
        return self._log.failed

    @property
    def last_group(self) -> int:
        """Entries of the last transaction."""
        return self._log.last_group

    def find(self, key: bytes) -> Stored | None:
        """The entry of a key."""
        return self._log.find(key)

    def close(self) -> None:
        """Settle what was submitted, and end. The loop must not submit any more."""
        entries, self._waiting = self._waiting, []
        self._log.submit_all(entries)
        self._log.close()

    def _send_in_time(self) -> None:
        if (early := self._next - self._loop.time()) > 0:
            self._held = True
            self._loop.call_later(early, self._send)
        else:
            self._send()

    def _send(self) -> None:
        entries, self._waiting, self._size, self._held = self._waiting, [], 0, False
        if entries:
            self._next = self._loop.time() + self._patience
            self._log.submit_all(entries)
