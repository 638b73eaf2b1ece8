"""A decision log in memory: the contract without a disk, for tests and simulations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bandits.log.port import Done, Entry, Outcome, Stored, beside, is_forgotten

DAY_NS = 86_400 * 10**9


class MemoryLog:
    """Entries of one process, in order. Nothing here outlives it."""

    def __init__(self, clock: Callable[[], int], retry_days: float = 7.0) -> None:
        self.clock, self.window_ns = clock, int(retry_days * DAY_NS)
        self.entries: list[Stored] = []
        self._rows: dict[bytes, tuple[int, int]] = {}

    def submit(self, entry: Entry, done: Done) -> None:
        """Store an entry at once."""
        done(self._store(entry))

    def append(self, entries: Sequence[Entry]) -> list[Outcome]:
        """Store entries."""
        return [self._store(entry) for entry in entries]

    def find(self, key: bytes) -> Stored | None:
        """The entry of a key."""
        found = self._rows.get(key)
        return None if found is None else self.entries[found[0]]

    @property
    def waiting(self) -> tuple[int, int]:
        """Nothing ever waits."""
        return 0, 0

    @property
    def expected_wait(self) -> float:
        """Nothing ever waits."""
        return 0.0

    def close(self) -> None:
        """Nothing to settle."""

    def _store(self, entry: Entry) -> Outcome:
        found = self._rows.get(entry.key)
        if found is None:
            self._rows[entry.key] = len(self.entries), self.clock()
            self.entries.append(Stored("memory", len(self.entries) + 1, *entry[:5]))
            return Outcome("stored", entry.answer)
        row, stored_ns = found
        if is_forgotten(entry.key) and self.clock() - stored_ns > self.window_ns:
            return Outcome("expired", b"")
        if self.entries[row].content == entry.content:
            return Outcome("repeated", self.entries[row].answer)
        if entry.kept:
            self._store(beside(entry))
        return Outcome("conflict", b"")
