"""What is served and why: artifacts, one promoted pointer per decision point, and a ledger that only grows.

A folder with `control.sqlite`, the signing key and the artifacts. Every change of a pointer is one line of the ledger, chained to
the line before by its hash and signed, in the same transaction; the pointers are what the ledger says.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import apsw
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bandits.artifact import (
    Artifact,
    Limits,
    Manifest,
    digest_of,
    load_artifact,
    parse_manifest,
    sync_folder,
    write_artifact,
)
from bandits.batch import DecisionBatch
from bandits.decision_point import DecisionPoint
from bandits.events import canonical, check_id
from bandits.policy import Policy
from ope.data import InputError

SCHEMA = """
CREATE TABLE keys (public_key BLOB PRIMARY KEY, since_ns INTEGER NOT NULL) STRICT;
CREATE TABLE artifacts (digest TEXT PRIMARY KEY, decision_point TEXT NOT NULL, registered_ns INTEGER NOT NULL) STRICT;
CREATE TABLE pointers (decision_point TEXT PRIMARY KEY, digest TEXT, frozen INTEGER NOT NULL) STRICT;
CREATE TABLE ledger (line INTEGER PRIMARY KEY, entry BLOB NOT NULL, hash TEXT NOT NULL, signature BLOB NOT NULL) STRICT;
CREATE TRIGGER no_update BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
PRAGMA user_version = 1;
"""

Action = Literal["promote", "rollback", "freeze", "unfreeze"]

GENESIS = "0" * 64
"""What the first line of a ledger is chained to."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the ledger: who changed what, from what to what, and why."""

    line: int
    at_ns: int
    who: str
    action: Action
    decision_point: str
    from_digest: str | None
    to_digest: str | None
    why: str
    estimate: dict[str, Any] | None
    """The estimate that justified it, as `Report.to_records` gives it."""
    previous: str
    """Hash of the line before."""


class Pointer(msgspec.Struct, frozen=True):
    """What is served at a decision point."""

    digest: str | None
    frozen: bool


@dataclass(frozen=True, slots=True)
class Registry:
    """A folder of artifacts and its control database. Made at first use; safe for several processes."""

    folder: Path
    clock: Callable[[], int] = field(default=time.time_ns)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "artifacts").mkdir(exist_ok=True)
        with self._write() as connection:
            if connection.pragma("user_version") == 0:
                connection.execute(SCHEMA)
                connection.execute("INSERT INTO keys VALUES (?, ?)", (_new_key(self.folder / "signing.key"), self.clock()))

    def register(
        self,
        policy: Policy,
        point: DecisionPoint,
        *,
        name: str,
        golden: DecisionBatch,
        snapshot: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> str:
        """Write, sign, try and list an artifact of a policy; returns its digest. Its parent is what is served now."""
        digest = write_artifact(
            self.folder / "artifacts", policy, self._signing_key(), name=name, decision_point=point.name,
            features=point.features, actions=point.actions, golden=golden, snapshot=snapshot,
            parent=self.pointer(point.name).digest, metrics=metrics,
        )  # fmt: skip
        load_artifact(self.path(digest), self.public_key(), digest, self.limits)
        with self._write() as connection:
            row = (digest, point.name, self.clock())
            connection.execute("INSERT OR IGNORE INTO artifacts VALUES (?, ?, ?)", row)
        return digest

    def load(self, digest: str) -> Artifact:
        """A listed artifact that passes every check. Raises InputError for any other."""
        return load_artifact(self.path(self.find(digest)), self.public_key(), self.find(digest), self.limits)

    def find(self, prefix: str) -> str:
        """The one listed digest that begins so. Raises InputError where there is none, or several."""
        rows = self._read("SELECT digest FROM artifacts WHERE substr(digest, 1, ?) = ?", (len(prefix), prefix))
        if len(rows) != 1 or not prefix:
            raise InputError(
                f"found {len(rows)} artifacts whose digest begins with {prefix!r}; expected one: see `propel policy list`"
            )
        return str(rows[0][0])

    def path(self, digest: str) -> Path:
        """Where an artifact lies."""
        return self.folder / "artifacts" / digest

    def manifests(self) -> dict[str, Manifest]:
        """Of all listed artifacts, by digest, oldest first."""
        rows = self._read("SELECT digest FROM artifacts ORDER BY registered_ns, digest")
        return {digest: parse_manifest((self.path(digest) / "manifest.json").read_bytes(), digest) for (digest,) in rows}

    def pointer(self, decision_point: str) -> Pointer:
        """What is served at a decision point; nothing at one that was never promoted to."""
        rows = self._read("SELECT digest, frozen FROM pointers WHERE decision_point = ?", (decision_point,))
        return Pointer(rows[0][0], bool(rows[0][1])) if rows else Pointer(None, False)

    def pointers(self) -> dict[str, Pointer]:
        """Of all decision points."""
        rows = self._read("SELECT decision_point, digest, frozen FROM pointers ORDER BY decision_point")
        return {point: Pointer(digest, bool(frozen)) for point, digest, frozen in rows}

    def promote(self, digest: str, *, who: str, why: str, estimate: dict[str, Any] | None = None) -> Entry:
        """Serve an artifact at its decision point, after it passed every check. Raises InputError where that is frozen."""
        artifact = self.load(digest)
        return self._change("promote", artifact.manifest.decision_point, artifact.digest, who, why, estimate)

    def rollback(self, decision_point: str, *, who: str, why: str, to: str | None = None) -> Entry:
        """Serve again what was served before, or `to`. Raises InputError where nothing was, and where it is frozen."""
        served = self._served(decision_point)
        target = self.find(to) if to is not None else served[-2] if len(served) > 1 else None
        if target is None or target not in served[:-1]:
            found = "nothing that was served before" if target is None else f"{target[:16]}, which did not lead to what is served"
            raise InputError(
                f"decision point {decision_point!r}: found {found}; expected an earlier artifact: see `propel policy list`"
            )
        self.load(target)
        return self._change("rollback", decision_point, target, who, why, None)

    def _served(self, decision_point: str) -> list[str]:
        """Artifacts that led to what is served now, oldest first: what was rolled back is no longer among them."""
        served: list[str] = []
        for entry in self.ledger():
            if entry.decision_point == decision_point and entry.to_digest is not None:
                if entry.action == "rollback":
                    served = served[: served.index(entry.to_digest) + 1]
                else:
                    served.append(entry.to_digest)
        return served

    def freeze(self, decision_point: str, *, who: str, why: str, frozen: bool = True) -> Entry:
        """Refuse every change of a decision point until it is unfrozen."""
        return self._change("freeze" if frozen else "unfreeze", decision_point, None, who, why, None)

    def ledger(self) -> list[Entry]:
        """All lines, oldest first."""
        return [msgspec.json.decode(raw, type=Entry) for (raw,) in self._read("SELECT entry FROM ledger ORDER BY line")]

    def verify(self) -> list[str]:
        """What is wrong: lines whose chain or signature breaks, pointers the ledger does not explain, artifacts that fail."""
        wrong: list[str] = []
        previous, state = GENESIS, dict[str, Pointer]()
        key = self.public_key()
        for number, (line, raw, hash_, signature) in enumerate(
            self._read("SELECT line, entry, hash, signature FROM ledger ORDER BY line"), 1
        ):
            try:
                entry = msgspec.json.decode(raw, type=Entry)
                key.verify(signature, hash_.encode())
                good = (line, entry.line, entry.previous, hash_) == (number, number, previous, digest_of(raw))
            except (InvalidSignature, msgspec.MsgspecError):
                good = False
            if not good:
                return [f"ledger line {number}: found a line that is not the one that was written; nothing after it can be trusted"]
            previous, state[entry.decision_point] = hash_, _after(entry, state.get(entry.decision_point, Pointer(None, False)))
        pointers = self.pointers()
        wrong += [
            f"decision point {point!r}: found {pointers.get(point)}; expected {state.get(point)}, as in the ledger"
            for point in sorted(pointers.keys() | state.keys())
            if pointers.get(point) != state.get(point)
        ]
        for (digest,) in self._read("SELECT digest FROM artifacts ORDER BY registered_ns, digest"):
            try:
                self.load(digest)
            except InputError as error:
                wrong.append(str(error))
        return wrong

    def prune(self, keep: int) -> list[str]:
        """Delete artifacts that are neither served, nor among the last `keep` listed, nor served last before now; their digests."""
        kept = {digest for point in self.pointers() for digest in self._served(point)[-2:]}
        listed = [digest for (digest,) in self._read("SELECT digest FROM artifacts ORDER BY registered_ns, digest")]
        gone = [digest for digest in listed[: max(0, len(listed) - keep)] if digest not in kept]
        with self._write() as connection:
            connection.executemany("DELETE FROM artifacts WHERE digest = ?", [(digest,) for digest in gone])
        for digest in gone:
            shutil.rmtree(self.path(digest), ignore_errors=True)
        return gone

    def public_key(self) -> Ed25519PublicKey:
        """What signatures are checked with."""
        return Ed25519PublicKey.from_public_bytes(self._read("SELECT public_key FROM keys ORDER BY since_ns DESC LIMIT 1")[0][0])

    def _change(self, action: Action, point: str, digest: str | None, who: str, why: str, estimate: dict[str, Any] | None) -> Entry:
        """A line of the ledger and the pointer that it moves, in one transaction."""
        check_id("who", who)
        if not why.strip():
            raise InputError("why: found nothing; expected a reason, for whoever reads the ledger later")
        key = self._signing_key()
        with self._write() as connection:
            before = self.pointer(point)
            if before.frozen and action != "unfreeze":
                raise InputError(
                    f"decision point {point!r} is frozen; expected `propel policy freeze --off` first, by whoever froze it"
                )
            last = self._read("SELECT line, hash FROM ledger ORDER BY line DESC LIMIT 1") or [(0, GENESIS)]
            moved = action in ("promote", "rollback")
            entry = Entry(
                line=last[0][0] + 1, at_ns=self.clock(), who=who, action=action, decision_point=point,
                from_digest=before.digest if moved else None, to_digest=digest, why=why, estimate=estimate, previous=last[0][1],
            )  # fmt: skip
            raw = canonical(msgspec.to_builtins(entry))
            after, hash_ = _after(entry, before), digest_of(raw)
            connection.execute("INSERT INTO ledger VALUES (?, ?, ?, ?)", (entry.line, raw, hash_, key.sign(hash_.encode())))
            connection.execute("INSERT OR REPLACE INTO pointers VALUES (?, ?, ?)", (point, after.digest, int(after.frozen)))
        return entry

    def _signing_key(self) -> Ed25519PrivateKey:
        path = self.folder / "signing.key"
        try:
            if path.stat().st_mode & 0o077:
                raise InputError(f"{path}: found a key that others can read; expected mode 0600: make a new registry, or chmod 600")
            return Ed25519PrivateKey.from_private_bytes(path.read_bytes())
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: found no signing key ({error}); this registry can be read, not changed") from None

    @contextmanager
    def _write(self) -> Iterator[apsw.Connection]:
        """A transaction that holds the one write lock from its start, durable when it ends."""
        connection = _connect(self.folder / "control.sqlite")
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()  # rolls back what was not committed

    def _read(self, statement: str, bindings: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        connection = _connect(self.folder / "control.sqlite")
        try:
            return connection.execute(statement, bindings).fetchall()
        finally:
            connection.close()


def _connect(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(10_000)
    connection.pragma("synchronous", "FULL")
    return connection


def _after(entry: Entry, before: Pointer) -> Pointer:
    """The pointer that a line of the ledger leaves behind."""
    if entry.action in ("freeze", "unfreeze"):
        return Pointer(before.digest, entry.action == "freeze")
    return Pointer(entry.to_digest, before.frozen)


def _new_key(path: Path) -> bytes:
    """The public half of the signing key, which is made where there is none; only its owner can read it."""
    if not path.exists():
        descriptor = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(Ed25519PrivateKey.generate().private_bytes_raw())
            file.flush()
            os.fsync(descriptor)
        path.with_suffix(".new").rename(path)
        sync_folder(path.parent)
    return Ed25519PrivateKey.from_private_bytes(path.read_bytes()).public_key().public_bytes_raw()
