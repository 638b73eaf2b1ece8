"""Who may do what: keys as keyed hashes, tokens of decisions, keyed hashes of units. All from one secret."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from bandits.events import Id
from bandits.salts import check_secret
from bandits.toml import read_toml
from ope.data import InputError
from serving.problems import ProblemError

Scope: TypeAlias = Literal["decide", "reward", "read"]

MOST_SEEN = 1000
"""Headers that are remembered as good."""

SCOPES: tuple[Scope, ...] = ("decide", "reward", "read")


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key as it is kept: what it may do, and a hash that only the secret's owner can compute."""

    prefix: str
    """First part of the key, by which it is found."""
    hash: str
    tenant: Id
    scopes: tuple[Scope, ...]
    expires: str | None = None
    """Date, UTC, from which on it is not valid."""


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """keys.toml."""

    key: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class Secret:
    """32 random bytes; every use has a key of its own derived from them."""

    bytes_: bytes = field(repr=False)
    _uses: dict[tuple[bytes, int], Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    """Hashes that have taken in the key already, one per use and size."""

    @classmethod
    def read(cls, path: Path) -> Secret:
        """The secret in a file. Raises InputError where it is lost, short, or open to others."""
        check_secret(path)
        found = path.read_bytes()
        if len(found) != 32:
            raise InputError(
                f"{path}: found {len(found)} bytes; expected the 32 that `propel init` wrote: restore it from a backup"
            )
        return cls(found)

    def keyed(self, use: bytes, *parts: str, size: int = 16) -> bytes:
        """Keyed BLAKE2b of texts, each after its length, for one use."""
        begun = self._uses.get((use, size))
        if begun is None:
            begun = self._uses[use, size] = hashlib.blake2b(digest_size=size, key=self.bytes_, person=use)
        hash_ = begun.copy()
        for part in parts:
            one = part.encode()
            hash_.update(len(one).to_bytes(4, "big") + one)
        digest: bytes = hash_.digest()
        return digest

    def token(self, tenant: str, decision_id: str) -> str:
        """What proves that a decision was given out."""
        return base64.urlsafe_b64encode(self.keyed(b"tokens", tenant, decision_id)).rstrip(b"=").decode()

    def is_token(self, token: str, tenant: str, decision_id: str) -> bool:
        """Whether a token is that of a decision."""
        return hmac.compare_digest(token.encode(), self.token(tenant, decision_id).encode())

    def unit(self, tenant: str, unit: str) -> str:
        """What is stored of a unit."""
        return self.keyed(b"units", tenant, unit).hex()

    def new_key(self, tenant: str, scopes: Iterable[Scope], expires: str | None = None) -> tuple[str, Key]:
        """A key, which nobody can be told again, and what is kept of it."""
        prefix = secrets.token_hex(6)
        text = f"propel_{prefix}_{secrets.token_urlsafe(32)}"
        return text, Key(prefix, self.keyed(b"keys", text, size=32).hex(), tenant, tuple(scopes), expires)


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose request it is, and what it may do."""

    tenant: str
    scopes: tuple[Scope, ...]


class Access:
    """The keys of a service, read again when their file changes."""

    def __init__(self, secret: Secret, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.secret, self.path, self.clock = secret, path, clock
        self._keys: dict[str, Key] = {}
        self._seen: dict[bytes, Key] = {}  # headers whose keys were found to be good: they need no second hash
        self._stamp: tuple[int, int] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Take what the file says now. Raises InputError where it cannot be read; the keys then stay as they were."""
        status = self.path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            self._keys = {key.prefix: key for key in read_toml(self.path, KeyFile).key}
            self._seen, self._stamp = {}, stamp

    def principal(self, header: bytes | None, scope: Scope) -> Principal:
        """Who a request's `Authorization` header speaks for. Raises ProblemError where it may not do this."""
        key = self._seen.get(header) if header is not None else None
        if key is None:
            key = self._known(header)
        if key.expires is not None and time.strftime("%Y-%m-%d", time.gmtime(self.clock())) >= key.expires:
            raise ProblemError("unauthorized", f"found a key that expired on {key.expires}; expected a valid one: make a new one")
        if scope not in key.scopes:
            raise ProblemError("forbidden", f"found a key with the scopes {', '.join(key.scopes)}; expected {scope} among them")
        return Principal(key.tenant, key.scopes)

    def _known(self, header: bytes | None) -> Key:
        """The key in a header that was not seen before."""
        if header is None or header[:7].lower() != b"bearer ":
            raise ProblemError("unauthorized", "found no key; expected the header `Authorization: Bearer KEY`")
        text = header[7:].decode("latin-1").strip()
        key = self._keys.get(text[7:19])
        known = hmac.compare_digest(self.secret.keyed(b"keys", text, size=32).hex(), key.hash if key else "")
        if key is None or not known:
            raise ProblemError(
                "unauthorized", "found a key that is not known; expected one that `propel init` or `propel key` made"
            )
        if len(self._seen) < MOST_SEEN:
            self._seen[header] = key
        return key
