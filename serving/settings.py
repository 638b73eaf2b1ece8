"""Settings of the service, from the file that the night reads, too: each checks its own tables and leaves the others alone."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bandits.decision_point import DecisionPoint, read_decision_points
from bandits.events import Id, check_id
from bandits.toml import read_toml
from ope.data import InputError

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Registry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[registry]`: where promoted policies are."""

    folder: str = "registry"


class Serve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[serve]`: where the service listens, what it keeps, and when it refuses."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8080
    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    behind_proxy: bool = False
    """True allows an address that others can reach: keys and contexts are readable on the way unless a proxy speaks TLS."""
    data: str = "data"
    """Log, keys and salts, relative to the settings file."""
    retry_days: Positive = 7.0
    """How long a repeated decision id is answered as the first time; later it is refused."""
    rotate_megabytes: Count = 256
    rotate_seconds: Positive = 3600.0
    """A file of the log is sealed at this size or age."""
    most_body_kilobytes: Count = 256
    """Larger bodies are refused; those of batches may be 16 times as large."""
    most_waiting: Count = 8192
    """Entries that wait for the disk, beyond which requests are refused."""
    most_waiting_megabytes: Count = 32
    longest_wait_seconds: Positive = 1.0
    """Requests that would wait longer for the disk are refused."""
    most_lag_milliseconds: Positive = 100.0
    """Requests are refused while the event loop comes this late to its work."""
    drain_seconds: Count = 10
    """How long requests under way are finished for, when the service is told to end."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings file as it is written."""

    tenant: Id
    decision_points: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    registry: Registry = Registry()
    serve: Serve = Serve()
    lake: dict[str, Any] = {}
    join: dict[str, Any] = {}
    certificate: dict[str, Any] = {}
    train: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}
    select: dict[str, Any] = {}
    reports: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Settings:
    """A settings file that was read, with its decision points."""

    file: File
    points: tuple[DecisionPoint, ...]
    folder: Path
    """That of the settings file."""

    @property
    def serve(self) -> Serve:
        """The table `[serve]`."""
        return self.file.serve

    @property
    def data(self) -> Path:
        """Folder of the log, the keys and the salts."""
        return self.folder / self.file.serve.data

    @property
    def registry(self) -> Path:
        """Folder of the registry."""
        return self.folder / self.file.registry.folder


def read_settings(path: Path) -> Settings:
    """Settings and decision points. Raises InputError that names file and key."""
    file, folder = read_toml(path, File), path.resolve().parent
    check_id("tenant", file.tenant)
    points = read_decision_points(path, file.decision_points)
    for point in points:
        if "/" in point.name:
            raise InputError(f"{path}: decision point {point.name!r}: found a slash; expected a name that fits into an address")
    if not file.serve.behind_proxy and not _is_loopback(file.serve.host):
        raise InputError(
            f"{path}: serve.host: found {file.serve.host}, which others can reach; expected 127.0.0.1, "
            "or behind_proxy = true where a proxy speaks TLS"
        )
    return Settings(file, points, folder)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
