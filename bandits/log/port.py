"""What a decision log is: entries go in, each is stored once, and nobody is told so before it is durable."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

from ope.data import InputError

PIECE = 2000
"""Bytes that are hashed at once: for more, Python gives its lock away and has to wait for it again."""


class Kind(IntEnum):
    """What a record is."""

    DECISION = 1
    REWARD = 2
    SHOWN = 3
    QUARANTINED = 4
    """A reward whose token was wrong: kept, never learned from."""


KINDS = {int(kind): kind for kind in Kind}
"""By the number that is stored."""


class Entry(NamedTuple):
    """Something to be stored once."""

    kind: Kind
    key: bytes
    """What there is one of, such as tenant and decision id."""
    content: bytes
    """Hash of what was asked: the same key with another one is a conflict."""
    record: bytes
    answer: bytes = b""
    """What a repeat is answered with, byte for byte."""
    fresh: bool = False
    """True where the key was made just now, so that no older file can hold it."""
    kept: bool = False
    """Whether a conflicting record is stored beside the first, under a key of its own."""

    @property
    def size(self) -> int:
        """Bytes, about."""
        return len(self.key) + len(self.record) + len(self.answer) + 64


class Outcome(NamedTuple):
    """What became of an entry, once that is durable."""

    state: Literal["stored", "repeated", "conflict", "expired"]
    """`repeated`: the same was stored before. `conflict`: another content has the key. `expired`: the key is known, but no longer
    what was asked or answered."""
    answer: bytes


class Stored(NamedTuple):
    """An entry as it stands in a log."""

    log_id: str
    row: int
    kind: Kind
    key: bytes
    content: bytes
    record: bytes
    answer: bytes


class LogUnavailableError(InputError):
    """The log takes nothing now; nothing that it refused is stored, and it may take it later."""


class LogFailedError(InputError):
    """The disk did not confirm a write: what is stored is unknown until the process starts anew and reads it."""


Done = Callable[[Outcome | Exception], object]
"""Told once what became of an entry: an outcome, a LogUnavailableError or a LogFailedError."""


class DecisionLog(Protocol):
    """Stores entries durably, each key once, over all processes that share it."""

    def submit(self, entry: Entry, done: Done) -> None:
        """Queue an entry; `done` is told once it is durable, or refused."""
        ...

    def append(self, entries: Sequence[Entry]) -> list[Outcome]:
        """Store entries and wait until they are durable. Raises LogUnavailableError or LogFailedError."""
        ...

    def find(self, key: bytes) -> Stored | None:
        """The entry of a key, wherever it stands; None where it is not, or its file is gone."""
        ...

    @property
    def waiting(self) -> tuple[int, int]:
        """Entries, and bytes, that were submitted and not settled."""
        ...

    @property
    def expected_wait(self) -> float:
        """Seconds that an entry submitted now would wait, about."""
        ...

    def close(self) -> None:
        """Settle what was submitted, and end."""
        ...


def decision_key(tenant: str, decision_id: str) -> bytes:
    """Key of a decision. Ids hold no control characters, so that nothing else has it."""
    return f"d\0{tenant}\0{decision_id}".encode()


def is_forgotten(key: bytes) -> bool:
    """Whether what was asked and answered under a key is forgotten after the retry window: for decisions alone, since rewards and
    shown events have no answer, and a repeat of them may come whenever."""
    return key.startswith(b"d\0")


def reward_key(tenant: str, decision_id: str, name: str, event_id: str) -> bytes:
    """Key of a reward."""
    return f"r\0{tenant}\0{decision_id}\0{name}\0{event_id}".encode()


def shown_key(tenant: str, decision_id: str) -> bytes:
    """Key of what was shown of a decision."""
    return f"s\0{tenant}\0{decision_id}".encode()


def beside(entry: Entry) -> Entry:
    """A conflicting entry under a key of its own, so that it is kept."""
    return entry._replace(key=entry.key + b"\0\0" + entry.content, kept=False)


def check_of(entry: Entry) -> bytes:
    """Checksum of what is stored of an entry: BLAKE2b-128 of `whole_of` it."""
    whole = whole_of(entry.kind, entry.key, entry.content, entry.record, entry.answer)
    hash_ = hashlib.blake2b(digest_size=16)
    for start in range(0, len(whole), PIECE):
        hash_.update(whole[start : start + PIECE])
    return hash_.digest()


def whole_of(kind: int, key: bytes, content: bytes, record: bytes, answer: bytes) -> bytes:
    """All that is stored of an entry in one: its kind, how long its parts are, and the parts."""
    return b"".join((_head(kind, len(key), len(content), len(record), len(answer)), key, content, record, answer))


_head = struct.Struct("<B4I").pack
