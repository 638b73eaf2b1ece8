"""A policy as a folder that can leave the machine: signed manifest, plain files, and recorded answers to prove that it loads right.

Nothing is parsed before its bytes are known: names, sizes and digests first, then a trial in a child process with limits on
memory and time, and only then the same bytes in this process. Formats are JSON (LightGBM's text inside it) and npz without
pickles or compression.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bandits.batch import DecisionBatch
from bandits.decision_point import Actions
from bandits.durable import sync, write_durably
from bandits.events import canonical, check_id
from bandits.features import FeatureSchema
from bandits.forms import to_bytes, to_form, write_arrays
from bandits.policy import Policy
from bandits.trial import build as build
from ope.data import InputError

FORMAT = 1

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"

FORMATS = {"policy.json": "json", "arrays.npz": "npz", "golden.npz": "npz"}
"""Every file of an artifact beside the manifest and its signature."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What loading may cost before it is given up."""

    file_bytes: int = 2**28
    memory_bytes: int = 2**32
    """Address space of the trial process, libraries included."""
    seconds: int = 60


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file must be, byte for byte."""

    format: str
    size: Annotated[int, msgspec.Meta(ge=0)]
    blake2b: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an artifact is and where it came from. Its own digest names the artifact."""

    format: int
    name: str
    decision_point: str
    files: dict[str, File]
    features: FeatureSchema
    actions: Actions
    snapshot: dict[str, Any]
    """What it was trained on: enough to train it again."""
    parent: str | None
    """Digest of the artifact it replaces."""
    metrics: dict[str, Any]
    """Estimates and whatever else was measured."""


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """A policy that passed every check."""

    digest: str
    manifest: Manifest
    policy: Policy

    @property
    def reference(self) -> str:
        """name@digest, as decisions log it."""
        return f"{self.manifest.name}@{self.digest[:32]}"


def write_artifact(
    folder: Path,
    policy: Policy,
    key: Ed25519PrivateKey,
    *,
    name: str,
    decision_point: str,
    features: FeatureSchema,
    actions: Actions,
    golden: DecisionBatch,
    snapshot: Mapping[str, Any] | None = None,
    parent: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """Write a policy under `folder`/digest, whole or not at all, and return the digest. Equal content, equal digest.

    `golden`: requests whose propensities are recorded. Raises InputError for a policy that has no form, or fails on them.
    """
    check_id("name", name)
    document, arrays = to_bytes(to_form(policy))
    recorded = {
        "context": golden.context, "action_features": golden.action_features, "eligible": golden.eligible,
        "propensities": policy.propensities(golden),
    }  # fmt: skip
    files = {"policy.json": document, "arrays.npz": arrays, "golden.npz": write_arrays(recorded)}
    described = {path: File(FORMATS[path], len(raw), digest_of(raw)) for path, raw in files.items()}
    manifest = Manifest(
        FORMAT, name, decision_point, described, features, actions, dict(snapshot or {}), parent, dict(metrics or {})
    )
    raw = canonical(msgspec.to_builtins(manifest))
    files |= {MANIFEST: raw, SIGNATURE: key.sign(raw)}
    digest, target = digest_of(raw), folder / digest_of(raw)
    if target.exists():
        return digest
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        for path, content in files.items():
            write_durably(scratch / path, content)
        sync(scratch)
        scratch.rename(target)
        sync(folder)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        if not target.exists():  # another process wrote the same bytes first
            raise
    return digest


def read_verified(path: Path, public_key: Ed25519PublicKey, digest: str, limits: Limits = Limits()) -> dict[str, bytes]:
    """The bytes of an artifact, known to be those that were signed. Nothing but the manifest is parsed.

    Raises InputError that names the check that failed.
    """
    names = {MANIFEST, SIGNATURE, *FORMATS}
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise InputError(f"{path}: folder check: found no plain folder; expected the folder of an artifact")
        found = {each.name for each in path.iterdir()}
        if found != names:
            odd = sorted(found ^ names)
            raise InputError(f"{path}: folder check: found or missed {', '.join(map(repr, odd[:5]))}; expected {sorted(names)}")
        files = {name: _read_plain(path / name, limits.file_bytes) for name in sorted(names)}
    except OSError as error:
        raise InputError(f"{path}: folder check: {error.strerror}; expected the folder of an artifact") from None
    raw = files[MANIFEST]
    if digest_of(raw) != digest:
        raise InputError(f"{path}: digest check: found a manifest of digest {digest_of(raw)}; expected {digest}")
    try:
        public_key.verify(files[SIGNATURE], raw)
    except InvalidSignature:
        raise InputError(f"{path}: signature check: found a signature that is not of this registry's key; do not load it") from None
    manifest = parse_manifest(raw, str(path))
    if set(manifest.files) != set(FORMATS):
        raise InputError(f"{path}: manifest check: found files {sorted(manifest.files)}; expected {sorted(FORMATS)}")
    for name, file in manifest.files.items():
        if file.format != FORMATS[name]:
            raise InputError(f"{path}: format check: found {name} as {file.format!r}; expected {FORMATS[name]!r}")
        if len(files[name]) != file.size or digest_of(files[name]) != file.blake2b:
            raise InputError(f"{path}: digest check: found {name} of {len(files[name])} bytes that differ from the manifest's")
    return files


def parse_manifest(raw: bytes, source: str) -> Manifest:
    """The manifest in these bytes. Raises InputError where they are none of this format."""
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InputError(f"{source}: manifest check: {error}") from None
    if manifest.format != FORMAT:
        raise InputError(f"{source}: manifest check: found format {manifest.format}; expected {FORMAT}")
    return manifest


def load_artifact(path: Path, public_key: Ed25519PublicKey, digest: str, limits: Limits = Limits()) -> Artifact:
    """The policy of an artifact: bytes verified, tried in a child process, then built from the same bytes here.

    Raises InputError that names the check that failed; this process survives whatever the bytes do to the child.
    """
    files = read_verified(path, public_key, digest, limits)
    try_in_child(files, str(path), limits)
    return Artifact(digest, parse_manifest(files[MANIFEST], str(path)), build(files))


def try_in_child(files: Mapping[str, bytes], source: str, limits: Limits = Limits()) -> None:
    """Build the policy and answer the golden requests in a child with limits. Raises InputError where that fails or dies."""
    start = "import os; os.nice(5); from bandits.trial import trial; raise SystemExit(trial())"  # what serves comes first
    command = [sys.executable, "-c", start, str(limits.memory_bytes), str(limits.seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    payload = msgspec.msgpack.encode({name: files[name] for name in FORMATS})
    try:
        child = subprocess.run(  # noqa: S603  # this interpreter, with numbers of ours
            command, input=payload, capture_output=True, timeout=limits.seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"{source}: trial check: found no answer in {limits.seconds} s; expected the golden ones") from None
    if child.returncode:
        said = child.stderr.decode(errors="replace").strip().splitlines()
        died = f"the child died of signal {-child.returncode}" if child.returncode < 0 else (said[-1] if said else "no message")
        raise InputError(f"{source}: trial check: {died[:500]}")


def digest_of(raw: bytes) -> str:
    """BLAKE2b-256 in hex."""
    return hashlib.blake2b(raw, digest_size=32).hexdigest()


def _read_plain(path: Path, most: int) -> bytes:
    """A regular file's bytes, without following links. Raises InputError for anything else, or more bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise InputError(f"{path}: folder check: found no plain file, or one with several names; expected a file of its own")
        if status.st_size > most:
            raise InputError(f"{path}: size check: found {status.st_size:,} bytes; expected at most {most:,}")
        return file.read(most + 1)
