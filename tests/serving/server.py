"""The real service for tests: a folder as `propel init` makes it, the process, and requests to it."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bandits.log.files import log_files
from bandits.log.port import Stored
from bandits.log.segments import records
from serving.setup import add_key, initialise

SECONDS = 20.0
"""How long anything may take before a test fails: a start takes under 3 s on a loaded machine."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """By lower-case name."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A service that runs, and a key with every scope."""

    config: Path
    key: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        return self.config.parent / "data"

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = "",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request on a connection of its own. `body`: bytes, or what becomes JSON. `key`: another one, or None for none."""
        sent = dict(headers or {})
        if key is not None:
            sent["Authorization"] = f"Bearer {key or self.key}"
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, raw, sent)
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def decide(self, body: Any = None, *, point: str = "ad-load", **more: Any) -> Answer:
        """Ask for a decision."""
        return self.ask("POST", f"/v1/{point}/decisions", {"context": {}} if body is None else body, **more)

    def new_key(self, *scopes: Any, tenant: str = "default", expires: str | None = None) -> str:
        """A further key, which the service takes within seconds."""
        return add_key(self.data, tenant, scopes or ("decide", "reward", "read"), expires)

    def stored(self) -> list[Stored]:
        """Everything in the log, oldest first."""
        return [one for path in log_files(self.data / "log") for one in records(path)]

    def errors(self) -> str:
        """What the process wrote to standard error."""
        return (self.config.parent / "stderr.txt").read_text(errors="replace")


def within(seconds: float, holds: Callable[[], bool]) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds
        time.sleep(0.05)
    return time.monotonic() - began


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def make(folder: Path, *, points: Mapping[str, str] | None = None, serve: str = "") -> tuple[Path, str]:
    """Settings and key of a folder as `propel init` makes it. `points`: TOML by name, for its own; `serve`: more settings."""
    made = initialise(folder, free_port())
    text = made.config.read_text()
    if points is not None:
        for name, point in points.items():
            (folder / f"{name}.toml").write_text(point)
        text = text.replace('["ad-load.toml"]', json.dumps([f"{name}.toml" for name in points]))
    made.config.write_text(text.replace("workers = 1\n", f"workers = 1\n{serve}\n"))
    return made.config, made.key


def start(config: Path, *before: str) -> subprocess.Popen[bytes]:
    """`propel serve`, its standard error in a file beside the settings. `before`: what it runs under, such as strace."""
    with (config.parent / "stderr.txt").open("ab") as errors:
        return subprocess.Popen([*before, sys.executable, "-m", "propel", "serve", "--config", str(config)], stderr=errors)


@contextmanager
def running(config: Path, key: str, *before: str) -> Iterator[Server]:
    """The service of a folder, from ready to its end by SIGTERM, which is to leave exit status 0."""
    text = config.read_text()
    port = int(text.split("port = ")[1].split("\n")[0])
    server = Server(config, key, port, start(config, *before))
    try:
        wait_until_ready(server)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
        try:
            status = server.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
            raise
    assert status == 0, server.errors()[-2000:]


def wait_until_ready(server: Server) -> None:
    """Until it says that it can decide."""
    until = time.monotonic() + SECONDS
    while True:
        try:
            if server.ask("GET", "/readyz", key=None).status == 200:
                return
        except OSError:
            pass
        assert server.process.poll() is None, server.errors()[-2000:]
        assert time.monotonic() < until, "not ready"
        time.sleep(0.02)


def exchange(port: int, raw: bytes, *, seconds: float = 5.0) -> bytes:
    """What comes back for raw bytes until the other side closes, or has been silent for that long."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as one:
        found = b""
        try:
            one.sendall(raw)
            while part := one.recv(65536):
                found += part
        except OSError:  # closed on us while we wrote, or silent
            pass
        return found
