"""The key that a registry signs with: made once, readable by its owner alone."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bandits.durable import sync
from ope.data import InputError


def make_key(path: Path) -> bytes:
    """The public half of the key in a file, which is made where there is none."""
    if not path.exists():
        descriptor = os.open(path.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(Ed25519PrivateKey.generate().private_bytes_raw())
            file.flush()
            os.fsync(descriptor)
        path.with_suffix(".new").rename(path)
        sync(path.parent)
    return Ed25519PrivateKey.from_private_bytes(path.read_bytes()).public_key().public_bytes_raw()


def read_key(path: Path) -> Ed25519PrivateKey:
    """The key in a file. Raises InputError where there is none, or others can read it."""
    try:
        if path.stat().st_mode & 0o077:
            raise InputError(f"{path}: found a key that others can read; expected mode 0600: make a new registry, or chmod 600")
        return Ed25519PrivateKey.from_private_bytes(path.read_bytes())
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: found no signing key ({error}); this registry can be read, not changed") from None
