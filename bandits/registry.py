"""What is served and why: artifacts, one promoted pointer per decision point, and a ledger that only grows.

A folder with `control.sqlite`, the signing key and the artifacts. Every change of a pointer is one line of the ledger, chained to
the line before by its hash and signed, in the same transaction; the pointers are what the ledger says. `ledger.head` holds, signed,
where the ledger ended, so that lines missing at its end are noticed.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import apsw
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bandits.artifact import (
    MANIFEST,
    Artifact,
    Limits,
    Manifest,
    digest_of,
    load_artifact,
    parse_manifest,
    write_artifact,
)
from bandits.batch import DecisionBatch
from bandits.decision_point import DecisionPoint
from bandits.durable import sync, write_durably
from bandits.events import canonical, check_id
from bandits.policy import Policy
from bandits.signing import make_key, read_key
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


class DamageError(InputError):
    """What a registry wrote is not there as it was written."""


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


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the ledger ended when its last change was done."""

    line: int
    hash: str
    signature: str
    """Of line and hash, in hex."""


@dataclass(frozen=True, slots=True)
class Registry:
    """A folder of artifacts and its control database. Made at first use; safe for several processes.

    Raises DamageError, an InputError, where the database is lost, or cannot be read, while other files of the registry are there.
    """

    folder: Path
    clock: Callable[[], int] = field(default=time.time_ns)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "artifacts").mkdir(exist_ok=True)
        if self._read("PRAGMA user_version") == [(0,)]:
            with self._write() as connection:
                if connection.pragma("user_version") == 0:
                    if self._remains():
                        raise DamageError(
                            f"{self._database}: found an empty database beside {self._remains()[0]}; "
                            "expected the one that belongs to it: restore it from a backup"
                        )
                    connection.execute(SCHEMA)
                    connection.execute("INSERT INTO keys VALUES (?, ?)", (make_key(self.folder / "signing.key"), self.clock()))
        if (found := self._read("PRAGMA user_version")) != [(1,)]:
            raise InputError(f"{self._database}: found version {found[0][0]}; expected 1: use the propel that wrote it")
        if not self._remains() and not self._last()[0] and not self.listed():
            self._write_head()

    @property
    def _database(self) -> Path:
        return self.folder / "control.sqlite"

    @property
    def _head(self) -> Path:
        return self.folder / "ledger.head"

    def _remains(self) -> list[str]:
        """What only a registry that was in use can have beside its database."""
        return sorted(str(each) for each in (*(self.folder / "artifacts").iterdir(), self._head) if each.exists())

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

    def listed(self) -> dict[str, str]:
        """Decision points of all listed artifacts, by digest, oldest first."""
        return dict(self._read("SELECT digest, decision_point FROM artifacts ORDER BY registered_ns, digest"))

    def manifest(self, digest: str) -> Manifest:
        """Of one artifact; its other files are not read. Raises InputError that names the check that failed."""
        path = self.path(digest)
        try:
            status = os.lstat(path / MANIFEST)
            if not stat.S_ISREG(status.st_mode) or status.st_size > self.limits.file_bytes:
                raise InputError(f"{path}: folder check: found {MANIFEST} that is no plain file of at most the size allowed")
            raw = (path / MANIFEST).read_bytes()
        except OSError as error:
            raise InputError(f"{path}: folder check: {error.strerror}; expected the folder of an artifact") from None
        if digest_of(raw) != digest:
            raise InputError(f"{path}: digest check: found a manifest of digest {digest_of(raw)}; expected {digest}")
        return parse_manifest(raw, str(path))

    def pointer(self, decision_point: str) -> Pointer:
        """What is served at a decision point; nothing at one that was never promoted to."""
        rows = self._read("SELECT digest, frozen FROM pointers WHERE decision_point = ?", (decision_point,))
        return Pointer(rows[0][0], bool(rows[0][1])) if rows else Pointer(None, False)

    def pointers(self) -> dict[str, Pointer]:
        """Of all decision points."""
        rows = self._read("SELECT decision_point, digest, frozen FROM pointers ORDER BY decision_point")
        return {point: Pointer(digest, bool(frozen)) for point, digest, frozen in rows}

    def served(self, decision_point: str) -> list[str]:
        """Artifacts that led to what is served now, which is the last of them: what was rolled back is no longer among them."""
        served: list[str] = []
        for entry in self.ledger():
            if entry.decision_point == decision_point and entry.to_digest is not None:
                if entry.action == "rollback":
                    served = served[: len(served) - 1 - served[-2::-1].index(entry.to_digest)]
                elif served[-1:] != [entry.to_digest]:
                    served.append(entry.to_digest)
        return served

    def promote(self, digest: str, *, who: str, why: str, estimate: dict[str, Any] | None = None) -> Entry:
        """Serve an artifact that passes every check. Raises InputError where its decision point is frozen, or serves it already."""
        artifact = self.load(digest)
        (entry,) = self._change([("promote", artifact.digest)], artifact.manifest.decision_point, who, why, estimate)
        return entry

    def promote_frozen(self, digest: str, *, who: str, why: str) -> list[Entry]:
        """Serve an artifact, and refuse every change after it: two lines of the ledger, both or none. Raises as both do."""
        artifact = self.load(digest)
        return self._change([("promote", artifact.digest), ("freeze", None)], artifact.manifest.decision_point, who, why)

    def rollback(self, decision_point: str, *, who: str, why: str, to: str | None = None) -> Entry:
        """Serve again what was served before, or `to`. Raises InputError where nothing was, and where it is frozen."""
        self._check_known(decision_point)
        served = self.served(decision_point)
        target = self.find(to) if to is not None else served[-2] if len(served) > 1 else None
        if target is None or target not in served[:-1]:
            found = "nothing that was served before" if target is None else f"{target[:16]}, which did not lead to what is served"
            before = ", ".join(each[:16] for each in served[-6:-1]) or "there is none"
            raise InputError(
                f"decision point {decision_point!r}: found {found}; expected one served before, newest last: {before}; "
                "to serve any other artifact use `propel policy promote`, and for the default action `propel policy freeze --safe`"
            )
        self.load(target)
        (entry,) = self._change([("rollback", target)], decision_point, who, why)
        return entry

    def freeze(self, decision_point: str, *, who: str, why: str, frozen: bool = True) -> Entry:
        """Refuse every change until it is unfrozen. Raises InputError for an unknown decision point, or one so already."""
        self._check_known(decision_point)
        (entry,) = self._change([("freeze" if frozen else "unfreeze", None)], decision_point, who, why)
        return entry

    def _check_known(self, decision_point: str) -> None:
        """Raise InputError for a decision point without an artifact: a typo must not look like a change."""
        known = sorted({*self.listed().values(), *self.pointers()})
        if decision_point not in known:
            listed = ", ".join(known) or "none is known yet"
            raise InputError(f"found no artifact of decision point {decision_point!r}; expected one of: {listed}")

    def ledger(self) -> list[Entry]:
        """All lines, oldest first. Raises DamageError where one cannot be read."""
        rows = self._read("SELECT entry FROM ledger ORDER BY line")
        try:
            return [msgspec.json.decode(raw, type=Entry) for (raw,) in rows]
        except ValueError as error:  # of msgspec, too
            raise DamageError(f"{self._database}: found a ledger line that is none ({error}): `propel policy verify`") from None

    def ledger_lines(self) -> int:
        """How many lines the ledger has, good or not."""
        return int(self._read("SELECT COUNT(*) FROM ledger")[0][0])

    def verify(self) -> list[str]:
        """What is wrong, in words; nothing where all is as it was written. Raises DamageError where the database cannot be read.

        Noticed are lines of the ledger whose chain or signature breaks, lines missing at its end (it must continue `ledger.head`),
        pointers that the ledger does not explain, artifacts that are no longer listed though they are served, or
        were and still have their folder, and listed ones that fail a check or belong to another decision point. Not noticed:
        older versions of control.sqlite and ledger.head that somebody put back together, what the signing key itself
        signed, and a whole registry replaced, its key included; against these, keep the public key
        and the last line's hash on another machine.
        """
        previous, state = GENESIS, dict[str, Pointer]()
        key = self.public_key()
        rows = self._read("SELECT line, entry, hash, signature FROM ledger ORDER BY line")
        for number, (line, raw, hash_, signature) in enumerate(rows, 1):
            try:
                entry = msgspec.json.decode(raw, type=Entry)
                key.verify(signature, hash_.encode())
                good = (line, entry.line, entry.previous, hash_) == (number, number, previous, digest_of(raw))
            except (InvalidSignature, msgspec.MsgspecError, ValueError):
                good = False
            if not good:
                return [f"ledger line {number}: found a line that is not the one that was written; nothing after it can be trusted"]
            previous, state[entry.decision_point] = hash_, _after(entry, state.get(entry.decision_point, Pointer(None, False)))
        pointers, fault = self.pointers(), self._head_fault()
        wrong = [] if fault is None else [fault]
        wrong += [
            f"decision point {point!r}: found {_words(pointers.get(point))}; expected {_words(state.get(point))}, as in the ledger"
            for point in sorted(pointers.keys() | state.keys())
            if pointers.get(point) != state.get(point)
        ]
        return wrong + self._unlisted() + self._failing()

    def _unlisted(self) -> list[str]:
        """Artifacts that the registry should list: those served, and those of the ledger whose folder was not pruned."""
        listed, pointers = self.listed(), self.pointers()
        needed = {pointer.digest: f"is served at {point!r}" for point, pointer in pointers.items() if pointer.digest is not None}
        for entry in self.ledger():
            if entry.to_digest is not None and self.path(entry.to_digest).exists():
                needed.setdefault(entry.to_digest, f"was served at {entry.decision_point!r} and has a folder")
        return [
            f"artifact {digest[:16]}: found it not listed, though it {why}; restore the registry from a backup"
            for digest, why in needed.items()
            if digest not in listed
        ]

    def _failing(self) -> list[str]:
        """Listed artifacts that do not load, or are signed for another decision point."""
        wrong = []
        for digest, point in self.listed().items():
            try:
                signed = self.load(digest).manifest.decision_point
            except InputError as error:
                wrong.append(str(error))
                continue
            if signed != point:
                wrong.append(f"artifact {digest[:16]}: found it listed for {point!r}; expected {signed!r}, as in its manifest")
        return wrong

    def prune(self, keep: int) -> list[str]:
        """Delete artifacts that are neither served, nor among the last `keep` listed, nor served last before now; their digests.

        Raises DamageError where lines of the ledger are missing: what it explains can then not be told.
        """
        self._check_head()
        pointers = self.pointers()
        kept = {digest for point in pointers for digest in self.served(point)[-2:]}
        kept |= {pointer.digest for pointer in pointers.values() if pointer.digest is not None}
        listed = list(self.listed())
        gone = [digest for digest in listed[: max(0, len(listed) - keep)] if digest not in kept]
        with self._write() as connection:
            connection.executemany("DELETE FROM artifacts WHERE digest = ?", [(digest,) for digest in gone])
        for digest in gone:
            shutil.rmtree(self.path(digest), ignore_errors=True)
        return gone

    def public_key(self) -> Ed25519PublicKey:
        """What signatures are checked with. Raises DamageError where the database has none."""
        rows = self._read("SELECT public_key FROM keys ORDER BY since_ns DESC LIMIT 1")
        try:
            return Ed25519PublicKey.from_public_bytes(rows[0][0])
        except (IndexError, ValueError):
            found = f"a public key of {len(rows[0][0])} bytes" if rows else "no public key"
            raise DamageError(f"{self._database}: found {found}; expected one of 32 bytes: restore it from a backup") from None

    def sign(self, data: bytes) -> bytes:
        """Ed25519 signature of bytes by this registry's key. Raises InputError where the key cannot be read."""
        return self._signing_key().sign(data)

    def _change(
        self,
        steps: Sequence[tuple[Action, str | None]],
        point: str,
        who: str,
        why: str,
        estimate: dict[str, Any] | None = None,
    ) -> list[Entry]:
        """Lines of the ledger, one for each step, and the pointer that they move, in one transaction."""
        check_id("who", who)
        if not why.strip():
            raise InputError("why: found nothing; expected a reason, for whoever reads the ledger later")
        key, entries = self._signing_key(), list[Entry]()
        with self._write() as connection:
            before = self.pointer(point)
            self._check_head()
            line, previous = self._last()
            for action, digest in steps:
                _check_allowed(action, point, digest, before)
                entry = Entry(
                    line=line + 1, at_ns=self.clock(), who=who, action=action, decision_point=point,
                    from_digest=before.digest if digest is not None else None, to_digest=digest, why=why, estimate=estimate,
                    previous=previous,
                )  # fmt: skip
                raw = canonical(msgspec.to_builtins(entry))
                line, previous, before = entry.line, digest_of(raw), _after(entry, before)
                connection.execute("INSERT INTO ledger VALUES (?, ?, ?, ?)", (line, raw, previous, key.sign(previous.encode())))
                entries.append(entry)
            connection.execute("INSERT OR REPLACE INTO pointers VALUES (?, ?, ?)", (point, before.digest, int(before.frozen)))
        try:
            self._write_head()
        except (InputError, OSError) as error:
            raise InputError(
                f"ledger line {line} is written and in force, but ledger.head is not: found {error}; "
                "expected to write it: do not repeat this change, the next one writes it"
            ) from None
        return entries

    def _last(self) -> tuple[int, str]:
        """Number and hash of the ledger's last line."""
        rows = self._read("SELECT line, hash FROM ledger ORDER BY line DESC LIMIT 1")
        return (int(rows[0][0]), str(rows[0][1])) if rows else (0, GENESIS)

    def _write_head(self) -> None:
        """Sign where the ledger ends now. The write lock keeps a slower process from setting it back."""
        key, new = self._signing_key(), self._head.with_suffix(".new")
        with self._write():
            line, hash_ = self._last()
            new.unlink(missing_ok=True)
            write_durably(new, canonical({"line": line, "hash": hash_, "signature": key.sign(_head_bytes(line, hash_)).hex()}))
            new.rename(self._head)
            sync(self.folder)

    def _head_fault(self) -> str | None:
        """What is wrong with `ledger.head`, or with a ledger that does not continue it."""
        key, expected = self.public_key(), "restore the registry from a backup"
        try:
            head = msgspec.json.decode(self._head.read_bytes(), type=Head)
            key.verify(bytes.fromhex(head.signature), _head_bytes(head.line, head.hash))
        except (OSError, InvalidSignature, ValueError) as error:
            found = error.strerror if isinstance(error, OSError) else "a file that this registry's key did not sign"
            return f"{self._head}: found {found}; expected where the ledger ended: {expected}"
        if (lines := self.ledger_lines()) < head.line:
            return f"{self._head}: found {lines} lines in the ledger; expected {head.line} or more, its end is missing: {expected}"
        if head.line and self._read("SELECT hash FROM ledger WHERE line = ?", (head.line,)) != [(head.hash,)]:
            return f"{self._head}: found another line {head.line}; expected the one of hash {head.hash[:16]}: {expected}"
        return None

    def _check_head(self) -> None:
        """Raise DamageError where the ledger does not continue its head: a new line would hide that others are missing."""
        if (fault := self._head_fault()) is not None:
            raise DamageError(fault)

    def _signing_key(self) -> Ed25519PrivateKey:
        return read_key(self.folder / "signing.key")

    @contextmanager
    def _write(self) -> Iterator[apsw.Connection]:
        """A transaction that holds the one write lock from its start, durable when it ends."""
        with _open(self._database) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def _read(self, statement: str, bindings: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with _open(self._database) as connection:
            return connection.execute(statement, bindings).fetchall()


@contextmanager
def _open(path: Path) -> Iterator[apsw.Connection]:
    """A connection, closed at the end, which rolls back what was not committed.

    Raises DamageError for a database that cannot be read, InputError where it is locked or the disk refuses.
    """
    connection = None
    try:
        connection = apsw.Connection(str(path))
        connection.set_busy_timeout(10_000)
        connection.pragma("synchronous", "FULL")
        yield connection
    except (apsw.NotADBError, apsw.CorruptError, apsw.SQLError, UnicodeDecodeError) as error:
        raise DamageError(f"{path}: found {error}; expected the control database of a registry: restore it from a backup") from None
    except apsw.BusyError:
        raise InputError(f"{path}: found it locked for 10 s; expected a turn to write: try again, or end what holds it") from None
    except apsw.Error as error:
        raise InputError(f"{path}: found {error}; expected to read and write it: see to its permissions and disk") from None
    finally:
        if connection is not None:
            connection.close()


def _head_bytes(line: int, hash_: str) -> bytes:
    """What the signature of `ledger.head` signs."""
    return canonical({"line": line, "hash": hash_})


def _words(pointer: Pointer | None) -> str:
    """A pointer as messages name it."""
    if pointer is None:
        return "no pointer"
    return f"{pointer.digest[:16] if pointer.digest else 'nothing'} served, {'frozen' if pointer.frozen else 'not frozen'}"


def _check_allowed(action: Action, point: str, digest: str | None, before: Pointer) -> None:
    """Raise InputError for a change that would change nothing, or of a decision point that is frozen."""
    if action == "unfreeze" and not before.frozen:
        raise InputError(f"decision point {point!r} is not frozen; expected a frozen one: there is nothing to lift")
    if action == "freeze" and before.frozen:
        raise InputError(f"decision point {point!r} is frozen already; expected one that is not: there is nothing to do")
    if before.frozen and action != "unfreeze":
        raise InputError(f"decision point {point!r} is frozen; expected `propel policy freeze --off` first, by whoever froze it")
    if digest is not None and digest == before.digest:
        raise InputError(
            f"decision point {point!r}: found {digest[:16]} served already; expected another artifact: there is nothing to do"
        )


def _after(entry: Entry, before: Pointer) -> Pointer:
    """The pointer that a line of the ledger leaves behind."""
    if entry.action in ("freeze", "unfreeze"):
        return Pointer(before.digest, entry.action == "freeze")
    return Pointer(entry.to_digest, before.frozen)
