"""Drives decisions from a process of its own and notes every attempt and every answer in its ledger.

`start(...)` runs this module with its options as JSON. The ledger holds a JSON list a line, flushed: `["a", id, connection, due,
sent, body]` before a request is sent, then `["r", id, connection, sent, got, status, body]`, or `["f", id, connection, sent, got,
reason]` where no answer came. Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

DEVICES = ("phone", "tablet", "desktop")


@dataclass(frozen=True)
class Options:
    """What to send."""

    port: int
    key: str
    ledger: str
    name: str = "t"
    """Ids begin with it."""
    connections: int = 8
    rate: float = 0.0
    """Requests a second, whatever comes back; 0: each connection sends its next when it has an answer."""
    seconds: float = 1.0
    batch: int = 1
    """Decisions of a request."""
    named: bool = True
    """False: the service makes the ids."""
    pad: int = 0
    """Characters by which requests are larger."""
    timeout: float = 10.0
    tries: int = 1
    """How often a request without an answer is sent before it is given up."""
    again: str | None = None
    """File of [id, body] a line to send instead of new ones."""
    copies: int = 1
    """How often each of those is sent, at once."""


def start(**options: object) -> subprocess.Popen[bytes]:
    """A client that runs."""
    given = Options(**options)  # type: ignore[arg-type]
    Path(given.ledger).touch()
    return subprocess.Popen([sys.executable, "-m", "tests.faults.load_client", json.dumps(asdict(given))])


def run(**options: object) -> None:
    """A client that ran to its end."""
    assert start(**options).wait(timeout=300) == 0


def request_body(name: str, batch: int = 1, pad: int = 0, named: bool = True) -> str:
    """What is asked under a name: the same for the same one."""
    many = []
    for at in range(batch):
        number = sum(name.encode()) + at
        many.append(
            {
                "context": {"minutes_in_session": number / 8, "device": DEVICES[number % 3]},
            }
            | ({"decision_id": name if batch == 1 else f"{name}.{at}"} if named else {})
            | ({"session": "s" * min(pad, 128), "unit": "u" * min(pad, 128)} if pad else {})
        )
    return json.dumps(many[0] if batch == 1 else {"decisions": many})


class Ledger:
    """Lines, each on its way to the disk before anything else happens."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115, PTH123

    def note(self, *values: object) -> None:
        self.file.write(json.dumps(values).encode() + b"\n")


class Connection:
    """One connection, opened when it is needed."""

    def __init__(self, options: Options, number: int) -> None:
        self.options, self.number = options, number
        route = "decisions" if options.batch == 1 else "decisions:batch"
        self.head = f"POST /v1/ad-load/{route} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {options.key}\r\nContent-Length: "
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, body: str) -> tuple[int, str]:
        """Status and body. Raises OSError, EOFError or TimeoutError where no answer comes."""
        async with asyncio.timeout(self.options.timeout):
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.options.port)
            assert self.reader is not None
            self.writer.write(f"{self.head}{len(body)}\r\n\r\n{body}".encode())
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            answer = (await self.reader.readexactly(size)).decode()
        if b"connection: close" in head:
            self.close()
        return int(head[9:12]), answer

    def close(self) -> None:
        """Go away."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


async def attempt(connection: Connection, ledger: Ledger, name: str, body: str, due: float | None = None) -> None:
    """Send a request until it is answered, or was sent often enough."""
    for _ in range(connection.options.tries):
        sent = time.monotonic()
        ledger.note("a", name, connection.number, due or sent, sent, body)
        try:
            status, answer = await connection.ask(body)
        except (OSError, EOFError, TimeoutError) as error:
            ledger.note("f", name, connection.number, sent, time.monotonic(), type(error).__name__)
            connection.close()
            await asyncio.sleep(0.02)  # a server that starts anew refuses connections: do not spin
            continue
        ledger.note("r", name, connection.number, sent, time.monotonic(), status, answer)
        return


async def _new_ones(options: Options, connections: list[Connection], ledger: Ledger) -> None:
    began, numbers = time.monotonic(), iter(range(10**9))

    async def drive(connection: Connection) -> None:
        while True:
            number = next(numbers)
            due = began + number / options.rate if options.rate else time.monotonic()
            if due >= began + options.seconds:
                return
            if (ahead := due - time.monotonic()) > 0:
                await asyncio.sleep(ahead)
            elif time.monotonic() >= began + options.seconds:
                return
            name = f"{options.name}-{number}"
            await attempt(connection, ledger, name, request_body(name, options.batch, options.pad, options.named), due)

    await asyncio.gather(*map(drive, connections))


async def _again(options: Options, connections: list[Connection], ledger: Ledger) -> None:
    """Each request `copies` times at once, every copy over a connection of its own."""
    requests: Iterator[tuple[str, str]] = map(json.loads, Path(options.again or "").read_text().splitlines())

    async def drive(some: list[Connection]) -> None:
        for name, body in requests:
            await asyncio.gather(*(attempt(connection, ledger, name, body) for connection in some))

    groups = [connections[at : at + options.copies] for at in range(0, len(connections), options.copies)]
    await asyncio.gather(*map(drive, groups))


async def main(options: Options) -> None:
    """Send everything."""
    connections = [Connection(options, number) for number in range(options.connections)]
    ledger = Ledger(options.ledger)
    sending: Callable[..., object] = _again if options.again else _new_ones
    await sending(options, connections, ledger)  # type: ignore[misc]
    for connection in connections:
        connection.close()


if __name__ == "__main__":
    uvloop.run(main(Options(**json.loads(sys.argv[1]))))
