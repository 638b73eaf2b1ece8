"""The secret salts of the seed epochs, in a file: the newest draws, the others replay."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec

from bandits.durable import sync
from bandits.sampling import Salt
from ope.data import InputError


def read_salts(path: Path) -> dict[int, Salt]:
    """Salts by seed epoch from a TOML file of lines such as `1 = "00ff..."`. Raises InputError that names the file."""
    try:
        found = msgspec.toml.decode(path.read_bytes(), type=dict[str, str])
        salts = {int(epoch): Salt(int(epoch), bytes.fromhex(key)) for epoch, key in found.items()}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the salts of the seed epochs") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except ValueError:
        raise InputError(f'{path}: found no TOML of epochs and salts; expected lines such as 1 = "00ff...", in hex') from None
    if not salts:
        raise InputError(f'{path}: found no salt; expected at least one line such as 1 = "00ff...", in hex')
    return salts


def write_first_salt(path: Path) -> None:
    """A new file with a salt for epoch 1, which only its owner can read."""
    note = '# Secret. A new line, such as 2 = "...", begins a new seed epoch. Keep the old ones: without them nothing replays.'
    write_secret(path, f'{note}\n1 = "{secrets.token_hex(32)}"\n'.encode())


def write_secret(path: Path, content: bytes) -> None:
    """A new file that only its owner can read, durable when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    sync(path.parent)


def check_secret(path: Path) -> None:
    """Raise InputError for a file that others can read, or that is not there."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a secret that `propel init` made") from None
    if mode & 0o077:
        raise InputError(f"{path}: found a secret that others can read; expected mode 0600: chmod 600 {path}")
