"""The whole server process, as an operator starts it: a folder from `propel init`, `propel serve`, signals, exit statuses."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from serving.setup import Made, initialise
from tests.faults.harm import attached

KILLS = int(os.environ.get("PROPEL_KILLS", "0"))
"""0 in `make test`; more where there is time for it."""


def make(folder: Path, **serve: object) -> Made:
    """A folder from which a server starts on a free port, with settings of `[serve]` beside the first ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = initialise(folder, port)
    settings = {"workers": 1} | serve
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    made.config.write_text(made.config.read_text().replace("workers = 1", lines))
    return made


def port_of(made: Made) -> int:
    return int(made.url.rpartition(":")[2])


def log_of(made: Made) -> Path:
    """Folder of the log's files."""
    return made.config.parent / "data" / "log"


def status_of(made: Made, path: str, key: str | None = None, seconds: float = 0.5) -> tuple[int, bytes]:
    """Status and body of a GET; 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(made), timeout=seconds)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


@dataclass
class Live:
    """A server that runs, or ran, in a process group of its own."""

    made: Made
    process: subprocess.Popen[bytes]
    told: Path
    """What it wrote to standard error."""
    ready_seconds: float = field(default=0.0)

    @property
    def port(self) -> int:
        return port_of(self.made)

    @property
    def descendants(self) -> list[int]:
        """Processes below the first one, those that a wrapper started among them."""
        found, todo = [], [self.process.pid]
        while todo:
            for below in _children(todo.pop()):
                found.append(below)
                todo.append(below)
        return found

    @property
    def workers(self) -> list[int]:
        """Processes that serve: those that hold the log open."""
        return [pid for pid in [self.process.pid, *self.descendants] if _holds(pid, "writer.lock")]

    def signal_all(self, number: signal.Signals) -> None:
        """A signal to every process of the server at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> int:
        """SIGKILL to every process; the exit status of the first."""
        self.signal_all(signal.SIGKILL)
        return self.process.wait(timeout=10)

    def end(self, seconds: float = 20.0) -> tuple[int, float]:
        """SIGTERM to the first process; its exit status, and how long it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=seconds)
        return status, time.monotonic() - started

    def wait_ready(self, limit: float = 20.0) -> float:
        """Wait until it is ready; seconds since now."""
        started = time.monotonic()
        while status_of(self.made, "/readyz")[0] != 200:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.told.read_text()[-2000:]}"
            assert time.monotonic() - started < limit, f"not ready after {limit} s: {self.told.read_text()[-2000:]}"
            time.sleep(0.02)
        return time.monotonic() - started

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *raised: object) -> None:
        self.kill()


def start(made: Made, wrapper: Sequence[str] = (), environment: dict[str, str] | None = None, stderr: str | None = None) -> Live:
    """Start a server and wait until it is ready. `wrapper`: words before the command. `stderr`: file, where not one of its own."""
    told = made.config.parent / "stderr"
    began = time.monotonic()
    with Path(stderr or told).open("ab") as errors:
        process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "propel", "serve", "--config", str(made.config)],
            stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True, env=os.environ | (environment or {}),
        )  # fmt: skip
    live = Live(made, process, told)
    try:
        live.wait_ready()
    except BaseException:
        live.kill()
        raise
    live.ready_seconds = time.monotonic() - began
    return live


@contextmanager
def traced(pid: int, inject: str, notes: Path = Path(os.devnull), on: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """strace at work on a process that runs already, and its threads, from here on.

    Each thread's calls are counted from here. `notes`: file for the calls, with seconds since 1970. `on`: the only file to count.
    """
    options = ["-ttt", f"--trace={inject.partition(':')[0]}", f"--inject={inject}", *([] if on is None else ["-P", str(on)])]
    tracer = attached(pid, options, notes)
    try:
        yield tracer
    finally:
        tracer.terminate()
        tracer.communicate()


def show(figures: str) -> None:
    """A line for whoever runs the tests with -s."""
    sys.stdout.write(figures + "\n")


def load() -> str:
    """The machine's load, for whoever reads a figure that depends on time."""
    return "load " + " ".join(f"{one:.1f}" for one in os.getloadavg())


def sockets(pid: int) -> int:
    """How many sockets a process holds."""
    found = 0
    for descriptor in Path("/proc").glob(f"{pid}/fd/*"):
        with suppress(OSError):
            found += str(descriptor.readlink()).startswith("socket:")
    return found


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path("/proc").glob(f"{pid}/task/*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def _holds(pid: int, name: str) -> bool:
    for descriptor in Path("/proc").glob(f"{pid}/fd/*"):
        with suppress(OSError):
            if descriptor.readlink().name == name:
                return True
    return False
