"""Copies of what a service cannot make again, and a service put back from them.

A backup is a folder of contents, each a file named by its SHA-256, and a manifest that says which of them lies where. The manifest
is replaced last, at one stroke: whatever kills a backup, the one before is whole. What lies there already is not copied again.

A service may run meanwhile. Whatever names something is copied before what it names, since nothing is named before it is there: log
files before the salts and policies of their decisions, `ledger.head` before the ledger whose line it names, the ledger before
artifacts. Two things can be taken away meanwhile, and are seen to where they are copied: an artifact that is pruned, and a log file
that is compacted. The latter is in the key index and in the note of such files before it goes, which are copied after the files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw
import msgspec

from bandits.artifact import FORMATS, MANIFEST, SIGNATURE
from bandits.durable import locked, sync, write_durably
from bandits.events import canonical
from bandits.log.files import COMPACTED, head_file, log_files, number_of, read_head, reading, wal_bytes
from bandits.log.segments import DamagedError, Segment, gaps, segment
from bandits.registry import Registry
from ope.data import InputError

CHUNK = 1 << 20
"""Bytes that are copied at once."""

CONTENTS, LIST, NEW, LOCK = "files", "manifest.json", "manifest.new", "lock"
"""Names in a backup."""

Progress = Callable[[int, int], object]
"""Told how many bytes are done, and how many there are, about."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a service's files lie: paths as the settings have them, relative to the settings file."""

    settings: Path
    decision_points: tuple[str, ...]
    registry: str
    data: str


class Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a backup."""

    path: str
    """Relative to the settings file."""
    sha256: str
    size: int
    mode: int
    log_id: str | None = None
    """Of a log file that was sealed: it does not change any more."""
    gaps: tuple[tuple[int, int], ...] = ()
    """First and last rows of what could not be read of a log file when it was copied."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a backup holds."""

    version: int
    made_at: str
    settings: str
    registry: str
    data: str
    files: tuple[Saved, ...]


class Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest as it lies on the disk."""

    manifest: Manifest
    sha256: str


@dataclass(frozen=True, slots=True)
class Made:
    """A backup that was made."""

    manifest: Manifest
    copied: int
    """Bytes that no earlier backup in this folder held."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A service that was put back."""

    manifest: Manifest
    config: Path
    wrong: tuple[str, ...]
    """What was wrong before it was copied."""


def back_up(
    source: Source, folder: Path, *, clock: Callable[[], int] = time.time_ns, progress: Progress = lambda done, total: None
) -> Made:
    """Copy a service, which may run meanwhile, into a folder: an empty one, or that of its earlier backup.

    Raises InputError where the folder holds something else, a path leads out of the settings' folder, or a file is lost.
    """
    root = source.settings.parent
    for key, path in (("serve.data", source.data), ("registry.folder", source.registry)):
        _check_within(path, f"{source.settings}: {key}")
    for path in source.decision_points:
        _check_within(path, f"{source.settings}: decision_points")
    folder.mkdir(parents=True, exist_ok=True)
    if other := sorted({each.name for each in folder.iterdir()} - {CONTENTS, LIST, NEW, LOCK}):
        raise InputError(
            f"{folder}: found {other[0]}, which is not of a backup; expected a backup, or an empty folder: name another"
        )
    folder.chmod(0o700)
    with locked(folder / LOCK):
        (folder / CONTENTS).mkdir(mode=0o700, exist_ok=True)
        earlier = {one.path: one for one in read_manifest(folder).files} if (folder / LIST).exists() else {}
        store = _Store(folder / CONTENTS, earlier)
        store.clear()
        before, files, done = store.names(), list[Saved](), 0
        total = sum(_size(each) for each in (root / source.data / "log").glob("*.sqlite"))
        for one in _all(store, source, root):
            files.append(one)
            done += one.size
            progress(done, max(done, total))
        made_at = datetime.fromtimestamp(clock() // 10**9, UTC).isoformat()
        manifest = Manifest(1, made_at, source.settings.name, source.registry, source.data, tuple(files))
        _write(folder, manifest)
        listed = {one.sha256: one.size for one in files}
        store.keep_only(listed)
    return Made(manifest, sum(size for name, size in listed.items() if name not in before))


def read_manifest(folder: Path) -> Manifest:
    """What a backup holds. Raises InputError where there is none, or it is damaged."""
    path = folder / LIST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected that of a backup: name the folder `propel backup` wrote to") from None
    try:
        found = msgspec.json.decode(raw, type=Written).manifest
        good = raw == _bytes(found)
    except ValueError:
        good = False
    if not good:
        raise InputError(f"{path}: found bytes that were altered; expected those that were written: use another backup")
    if found.version != 1:
        raise InputError(f"{path}: found version {found.version}; expected 1: use the propel that wrote it")
    return found


def restore(folder: Path, to: Path, *, progress: Progress = lambda done, total: None) -> Restored:
    """Put a service back into an empty folder, all of it or nothing. Raises InputError that names every damaged or missing file."""
    manifest = read_manifest(folder)
    to = to.absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to}: found something there; expected an empty folder, or none: name another")
    for one in manifest.files:
        _check_within(one.path, str(folder / LIST))
    beside = to.with_name(f".{to.name}.restoring")
    if beside.exists():
        shutil.rmtree(beside)  # of one that was killed
    beside.mkdir(parents=True, mode=0o700)
    try:
        _put(folder, manifest, beside, progress)
        beside.rename(to)
    except BaseException:
        shutil.rmtree(beside)
        raise
    sync(to.parent)
    return Restored(manifest, to / manifest.settings, tuple(_wrong(to, manifest)))


def _put(folder: Path, manifest: Manifest, to: Path, progress: Progress) -> None:
    """Copy all files, durably. Raises InputError that names those that are not as they were."""
    wrong, done, total = list[str](), 0, sum(one.size for one in manifest.files)
    for one in manifest.files:
        content, target = folder / CONTENTS / one.sha256, to / one.path
        for above in reversed(Path(one.path).parents):
            (to / above).mkdir(mode=0o700, exist_ok=True)
        try:
            found = _copy(content, target, one.mode)
        except FileNotFoundError:
            wrong.append(f"{one.path}: found no {content}")
        else:
            if found != one.sha256:
                wrong.append(f"{one.path}: found {content} altered")
        done += one.size
        progress(done, total)
    if wrong:
        raise InputError(f"{'; '.join(wrong)}; expected what was written: nothing is restored, use another backup")
    for made in (to, *(each for each in to.rglob("*") if each.is_dir())):
        sync(made)


def _wrong(to: Path, manifest: Manifest) -> Iterator[str]:
    """What a service that was put back lacks, in words."""
    for path in log_files(to / manifest.data / "log"):
        yield from (f"{path}: found rows {first} to {last} damaged or missing" for first, last in gaps(path))
    if (to / manifest.registry / "control.sqlite").exists():
        try:
            yield from Registry(to / manifest.registry).verify()
        except InputError as error:
            yield str(error)


@dataclass(frozen=True, slots=True)
class _Store:
    """Contents by their SHA-256, and what the earlier backup listed of them."""

    folder: Path
    earlier: dict[str, Saved]

    @property
    def _new(self) -> Path:
        """What is being copied, and has no name yet."""
        return self.folder / "new"

    def names(self) -> set[str]:
        """Of all contents."""
        return {each.name for each in self.folder.iterdir()}

    def path(self, saved: Saved) -> Path:
        """Where a file's content lies."""
        return self.folder / saved.sha256

    def holds(self, saved: Saved) -> bool:
        """Whether a file's content is there, as far as its size tells."""
        return _size(self.path(saved)) == saved.size

    def clear(self) -> None:
        """Take away what was being copied by a process that was killed."""
        for each in self.folder.glob("new*"):
            each.unlink()

    def keep_only(self, listed: Iterable[str]) -> None:
        """Take away contents that are not listed."""
        for name in self.names().difference(listed):
            (self.folder / name).unlink()

    def plain(self, path: Path, name: str) -> Saved:
        """A file as it is. Raises InputError where it cannot be read."""
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            with path.open("rb") as file:
                known = self.folder / hashlib.file_digest(file, "sha256").hexdigest()
            if known.exists():
                return Saved(name, known.name, known.stat().st_size, mode)
            _copy(path, self._new)
        except FileNotFoundError:
            raise _LostError(f"{path}: found no such file; expected one: restore it from an earlier backup") from None
        return self._named(name, mode)

    def content(self, content: bytes, name: str, mode: int) -> Saved:
        """A file of these bytes."""
        write_durably(self._new, content)
        return self._named(name, mode)

    def database(self, path: Path, name: str, change: Callable[[apsw.Connection], object] = lambda copy: None) -> Saved:
        """A SQLite database as it is at one moment, whoever writes to it, then changed, in a single file.

        Raises InputError where it cannot be read.
        """
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            with closing(reading(path)) as found, closing(apsw.Connection(str(self._new))) as copy:
                copy.execute("PRAGMA synchronous = OFF")  # it has no name until it is synced
                with copy.backup("main", found, "main") as copying:
                    while not copying.done:
                        copying.step(-1)
                copy.execute("PRAGMA journal_mode = DELETE")
                change(copy)
        except (apsw.Error, OSError) as error:
            if not path.exists():
                raise _LostError(f"{path}: found no such file; expected one: restore it from an earlier backup") from None
            raise InputError(f"{path}: found {error}; expected a database that can be copied: see to it, and to the disk") from None
        sync(self._new)
        return self._named(name, mode)

    def _named(self, name: str, mode: int) -> Saved:
        """Give what was copied its name."""
        with self._new.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = self._new.stat().st_size
        self._new.chmod(0o600)
        self._new.rename(self.folder / digest)
        return Saved(name, digest, size, mode)


class _Gone(msgspec.Struct, frozen=True):
    """A line of the note of compacted files."""

    file: int


class _LostError(InputError):
    """A file that was to be copied is not there."""


def _all(store: _Store, source: Source, root: Path) -> Iterator[Saved]:
    """Copy everything, in the order that makes it fit together."""
    secret = store.plain(root / source.data / "secret.key", f"{source.data}/secret.key")
    known = store.earlier.get(secret.path, secret)
    if known.sha256 != secret.sha256:
        raise InputError(
            f"{store.folder.parent}: found a backup of a service with another {secret.path}; expected one of this service: "
            "name a folder for each"
        )
    yield secret
    yield from _log(store, root / source.data / "log", f"{source.data}/log")
    for name in ("salts.toml", "keys.toml"):
        yield store.plain(root / source.data / name, f"{source.data}/{name}")
    yield from _registry(store, root / source.registry, source.registry)
    for name in (source.settings.name, *source.decision_points):
        yield store.plain(root / name, name)


def _log(store: _Store, folder: Path, name: str) -> Iterator[Saved]:
    """Files of a log, then its index."""
    paths = log_files(folder)
    if not paths:
        return
    last, copied = number_of(paths[-1]), set[int]()
    for path in paths:
        for saved in _log_file(store, path, f"{name}/{path.name}"):
            copied.add(number_of(path))
            yield saved
    if last not in copied:  # the numbers of files that the index and the note know would be given again
        raise InputError(f"{paths[-1]}: found it compacted while it was to be copied; expected it there: make the backup again")

    def forget_later(copy: apsw.Connection) -> None:
        # the index may know of entries that were stored after their file was copied, and of files after it: their numbers will be
        # given again, and what is taken for indexed would never be
        if log_files(folder)[-1:] != paths[-1:]:
            copy.execute("BEGIN")
            copy.execute("DELETE FROM keys WHERE file >= ?", (last,))
            copy.execute("DELETE FROM files WHERE file >= ?", (last,))
            copy.execute("COMMIT")

    with suppress(_LostError):  # the service makes another one from the files
        yield store.database(folder / "keys.sqlite", f"{name}/keys.sqlite", forget_later)
    if (folder / COMPACTED).exists():
        # of those that are gone in the copy, too: what a note names is deleted, also where it is another file of that number
        gone = [line for file, line in _noted(folder / COMPACTED) if file < last and file not in copied]
        yield store.content(b"".join(gone), f"{name}/{COMPACTED}", 0o644)


def _noted(path: Path) -> list[tuple[int, bytes]]:
    """Number and line of each file that was compacted. Raises InputError for a note that cannot be read."""
    try:
        return [(msgspec.json.decode(line, type=_Gone).file, line) for line in path.read_bytes().splitlines(keepends=True)]
    except msgspec.DecodeError as error:
        raise InputError(f"{path}: found {error}; expected a line of JSON for each file: restore it from a backup") from None


def _log_file(store: _Store, path: Path, name: str) -> Iterator[Saved]:
    """A file of a log, sealed in the copy, and its head; nothing where it is gone."""
    head_name = str(head_file(Path(name)))
    head = read_head(path)  # before the rows, so that it never says more than they
    try:
        found = segment(path)
    except DamagedError:
        found = None
    earlier = store.earlier.get(name)
    if earlier is not None and _is_kept(store, earlier, found) and path.exists():
        yield earlier
        yield store.earlier[head_name]
        return
    try:
        if found is None or (found.sealed and not wal_bytes(path)):
            missing, saved = gaps(path), store.plain(path, name)
        else:
            # a copy that was written on would give the same rows of the same log twice
            saved = store.database(path, name, lambda copy: _seal(copy, head))
            missing = gaps(store.path(saved))
    except _LostError:
        return
    last = head if found is None else segment(store.path(saved)).last_row if not found.sealed else found.last_row
    log_id = found.log_id if found is not None and found.sealed else None
    yield msgspec.structs.replace(saved, log_id=log_id, gaps=tuple(missing))
    yield store.content(last.to_bytes(8, "little"), head_name, 0o644)


def _is_kept(store: _Store, earlier: Saved, found: Segment | None) -> bool:
    """Whether the earlier copy of a log file stays: it was sealed and whole, so that it would differ only by damage since."""
    return bool(earlier.log_id) and not earlier.gaps and (found is None or found.log_id == earlier.log_id) and store.holds(earlier)


def _seal(copy: apsw.Connection, head: int) -> None:
    copy.execute("UPDATE log SET sealed = 1, rows = max(rows, ?, (SELECT ifnull(max(row), 0) FROM entries))", (head,))


def _size(path: Path) -> int:
    """Bytes of a file; 0 where it is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _registry(store: _Store, folder: Path, name: str) -> Iterator[Saved]:
    """A registry's keys and ledger, and all artifacts that it lists; nothing where there is none."""
    if not (folder / "control.sqlite").exists():
        return
    for each in ("ledger.head", "signing.key"):
        with suppress(_LostError):  # a registry without its key can be read
            yield store.plain(folder / each, f"{name}/{each}")
    while True:
        control = store.database(folder / "control.sqlite", f"{name}/control.sqlite")
        listed = _listed(store.path(control))
        try:
            artifacts = [
                store.plain(folder / "artifacts" / digest / each, f"{name}/artifacts/{digest}/{each}")
                for digest in listed
                for each in (MANIFEST, SIGNATURE, *FORMATS)
            ]
        except _LostError:
            if listed == _listed(folder / "control.sqlite"):
                raise
        else:
            break
    yield control
    yield from artifacts


def _listed(path: Path) -> list[str]:
    """Digests of the artifacts that a registry lists."""
    with closing(reading(path)) as control:
        found: list[Any] = control.execute("SELECT digest FROM artifacts ORDER BY digest").fetchall()
    return [digest for (digest,) in found]


def _copy(source: Path, target: Path, mode: int = 0o600) -> str:
    """A new, durable file of a file's bytes; their SHA-256."""
    found = hashlib.sha256()
    with source.open("rb") as file, os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as copy:
        while part := file.read(CHUNK):
            found.update(part)
            copy.write(part)
        copy.flush()
        os.fchmod(copy.fileno(), mode)
        os.fsync(copy.fileno())
    return found.hexdigest()


def _write(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest, once all that it lists is on the disk."""
    sync(folder / CONTENTS)
    (folder / NEW).unlink(missing_ok=True)  # of one that was killed
    write_durably(folder / NEW, _bytes(manifest))
    (folder / NEW).chmod(0o600)
    (folder / NEW).rename(folder / LIST)
    sync(folder)


def _bytes(manifest: Manifest) -> bytes:
    """A manifest and its SHA-256, so that an altered byte is noticed."""
    told = msgspec.to_builtins(manifest)
    return canonical({"manifest": told, "sha256": hashlib.sha256(canonical(told)).hexdigest()})


def _check_within(path: str, what: str) -> None:
    """Raise InputError for a path that leads out of the settings' folder: put back elsewhere, it would lead to the old files."""
    if Path(path).is_absolute() or os.path.normpath(path).startswith(".."):
        raise InputError(
            f"{what}: found {path}; expected a path relative to the settings file, and below its folder: "
            "move it there, or put a link there that leads to it"
        )
