"""`propel init`: a folder with settings, a decision point, secrets and a first key, from which the service starts."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bandits.durable import locked, sync
from bandits.events import check_id
from bandits.salts import write_first_salt, write_secret
from bandits.toml import read_toml
from ope.data import InputError
from serving.access import SCOPES, Key, KeyFile, Scope, Secret

TENANT = "default"

LOCK = "keys.lock"
"""Held by whoever changes the keys, from reading to writing them."""

SETTINGS = """\
# Settings of Propel: `propel serve` and `propel nightly` both read this file. Every key that is not here has a default:
# docs/reference/settings.md.
tenant = "{tenant}"

# What is decided: a file each, relative to this one.
decision_points = ["ad-load.toml"]

[serve]
# Others can reach another address: then set behind_proxy = true, and let a proxy speak TLS.
host = "127.0.0.1"
port = {port}
# Processes that share one log. One core does about two thousand decisions a second.
workers = 1
# Log, keys and salts. Keep it on a local disk, and back it up: without the salts nothing replays.
data = "data"

[certificate]
# The night draws a sample of decisions again, to see that what was logged is what was sampled.
salts = "data/salts.toml"
"""

POINT = """\
# A decision point: how many ads go into one fetch of a feed.
name = "ad-load"
# Every action keeps at least a fifth of 10 %: what tomorrow's policy learns from.
exploration_floor = 0.1
# What a client does when the service cannot answer.
default_action = "ads-2"

[actions]
# In an order that never changes; new ones go to the end.
catalogue = ["ads-0", "ads-1", "ads-2", "ads-3", "ads-4"]

[[rewards]]
# Reported later, by the decision's id. The last value within the window counts; without one it is 0.
name = "value"
low = 0.0
high = 1.0
window_seconds = 3600.0

[features]
# All may be missing, so that an empty context is one.
context = [
    {type = "number", name = "minutes_in_session", missing = 0.0},
    {type = "category", name = "device", levels = ["phone", "tablet", "desktop"], missing = "level", unknown = "level"},
]
"""


@dataclass(frozen=True, slots=True)
class Made:
    """What `propel init` made."""

    config: Path
    key: str
    """Shown once: only its hash is kept."""
    decision_point: str
    url: str


def initialise(folder: Path, port: int = 8080) -> Made:
    """Write a folder of settings and secrets. Raises InputError where there is one already, or none can be made."""
    config, data = folder / "propel.toml", folder / "data"
    try:
        if config.exists() or data.exists():
            raise InputError(f"{folder}: found settings or data already; expected a new folder: name another, or use what is there")
        data.mkdir(parents=True, mode=0o700)
    except OSError as error:
        found = "a file in its place" if isinstance(error, NotADirectoryError) else f"no place for it ({error.strerror})"
        raise InputError(f"{folder}: found {found}; expected room for a new folder: name another") from None
    (folder / "ad-load.toml").write_text(POINT)
    write_secret(data / "secret.key", secrets.token_bytes(32))
    write_first_salt(data / "salts.toml")
    key = add_key(data, TENANT, SCOPES)
    config.write_text(SETTINGS.format(tenant=TENANT, port=port))  # last: with it the folder is whole
    return Made(config, key, "ad-load", f"http://127.0.0.1:{port}")


def add_key(data: Path, tenant: str, scopes: tuple[Scope, ...], expires: str | None = None) -> str:
    """Make a key; its text, which is kept nowhere. Raises InputError where the secret cannot be read."""
    check_id("tenant", tenant)
    text, key = Secret.read(data / "secret.key").new_key(tenant, scopes, expires)
    with locked(data / LOCK):
        _write_keys(data, (*keys_of(data), key))
    return text


def keys_of(data: Path) -> tuple[Key, ...]:
    """The keys that are kept."""
    path = data / "keys.toml"
    return read_toml(path, KeyFile).key if path.exists() else ()


def remove_key(data: Path, prefix: str) -> Key:
    """End a key. Raises InputError where none, or several, begin so."""
    with locked(data / LOCK):
        keys = keys_of(data)
        found = [key for key in keys if key.prefix.startswith(prefix)]
        if len(found) != 1 or not prefix:
            raise InputError(f"found {len(found)} keys that begin with {prefix!r}; expected one: see `propel key list`")
        _write_keys(data, [key for key in keys if key is not found[0]])
    return found[0]


def _write_keys(data: Path, keys: Iterable[Key]) -> None:
    """Replace the keys that are kept, durably. For whoever holds the lock."""
    path = data / "keys.toml"
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)  # of one that was killed
    text = "# Keys of the service, hashed. Make and end them with `propel key`.\n" + "".join(map(_told, keys))
    write_secret(new, text.encode())
    new.rename(path)
    sync(data)


def _told(key: Key) -> str:
    """A key as TOML."""
    found = {name: value for name, value in msgspec.structs.asdict(key).items() if value is not None}
    return "\n[[key]]\n" + "".join(f"{name} = {msgspec.json.encode(value).decode()}\n" for name, value in found.items())
