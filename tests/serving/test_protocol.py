"""Connections that send too much, too slowly or no HTTP, that are too many, or that are half-way when the service ends."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop

from serving import protocol
from serving.problems import PROBLEMS
from tests.serving.server import SECONDS, Server, exchange, make, running

PATIENCE = 0.5
"""Seconds that the services here wait for a message, so that the tests need not wait for ten."""

IMPATIENT = f"""
import sys
import serving.protocol
serving.protocol.MOST_SECONDS, serving.protocol.EVERY = {PATIENCE}, 0.1
sys.argv = sys.argv[3:]
from propel import main
main()
"""
"""Runs `python -m propel ...` with less patience."""

ENDLESS = 200 << 20

MOST_TAKEN = 16 << 20
"""Bytes that a client can get rid of before the connection is seen to be closed: buffers of both sockets hold up to 10 MiB."""

MOST_GROWN = 8 << 20
"""Bytes by which the process may grow at that: reads are of 256 KiB."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(*make(tmp_path_factory.mktemp("protocol") / "service"), sys.executable, "-c", IMPATIENT) as one:
        yield one


def post(server: Server, *headers: bytes) -> bytes:
    """A head up to its last lines."""
    lines = (b"POST /v1/ad-load/decisions HTTP/1.1", b"Host: x", b"Authorization: Bearer " + server.key.encode(), *headers)
    return b"".join(line + b"\r\n" for line in lines)


def connected(server: Server, raw: bytes = b"") -> socket.socket:
    """A connection over which that much came."""
    one = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
    one.sendall(raw)
    return one


def problem(answer: bytes, name: str) -> Any:
    """Check that an answer is a problem, and the last on its connection; its detail."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, title = PROBLEMS[name]
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    assert b"content-length: %d" % len(body) in head
    found = json.loads(body)
    assert (found["type"], found["title"], found["status"]) == (f"urn:propel:problem:{name}", title, status)
    assert "found" in found["detail"]
    return found["detail"]


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"

HEADS: dict[str, Callable[[Server], tuple[bytes, bytes]]] = {
    "a header": lambda server: (post(server) + b"x: ", b"x" * (1 << 20)),
    "headers": lambda server: (post(server), b"x: y\r\n" * (1 << 17)),
    "a path": lambda server: (b"GET /", b"x" * (1 << 20)),
    "lines of nothing": lambda server: (b"", b"\r\n" * (1 << 19)),
    "a header of a later request": lambda server: (HEALTH + post(server) + b"x: ", b"x" * (1 << 20)),
    "a trailer": lambda server: (post(server, b"Transfer-Encoding: chunked") + b"\r\n1\r\n{\r\n0\r\nx: ", b"x" * (1 << 20)),
}
"""What comes first, and what comes then without end."""


@pytest.mark.parametrize("kind", HEADS)
def test_endless_heads_are_cut_early_and_take_no_memory(server: Server, kind: str) -> None:
    first, then = HEADS[kind](server)
    before, sent, answer = peak(server), 0, b""
    with connected(server, first) as one:
        try:
            while sent < ENDLESS:
                sent += one.send(then)
        except OSError:  # closed on us
            pass
        try:
            while part := one.recv(1 << 16):
                answer += part
        except OSError:
            pass
    assert sent < MOST_TAKEN
    assert peak(server) - before < MOST_GROWN
    problem(answer[answer.rindex(b"HTTP/1.1 ") :], "head-too-large")


def peak(server: Server) -> int:
    """The most bytes of memory that the process ever held."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def test_a_head_that_is_whole_is_none_too_large_whatever_comes_with_it(server: Server) -> None:
    body = b'{"context":{}' + b" " * 200_000 + b"}"
    long = (b"x: " + b"y" * 60_000, b"Content-Length: %d" % len(body), b"Connection: close")
    assert exchange(server.port, post(server, *long) + b"\r\n" + body).startswith(b"HTTP/1.1 200 ")
    last = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    many = HEALTH * 3000 + last  # 110 KB in one piece, of heads alone
    assert exchange(server.port, many).count(b"HTTP/1.1 200 ") == 3001


def test_who_is_slow_is_cut_off_and_who_is_idle_is_not(server: Server) -> None:
    half_body = post(server, b"Content-Length: 1000000") + b"\r\n{"
    refused = half_body.replace(server.key.encode(), b"none")  # answered before its body came
    kinds: dict[str, tuple[bytes, bytes]] = {
        "nothing": (b"", b""),
        "half a head": (post(server), b""),
        "a header now and then": (post(server), b"x: y\r\n"),
        "half a body": (half_body, b""),
        "a byte of a body now and then": (half_body, b" "),
        "half a head of a later request": (HEALTH + post(server), b""),
        "a byte now and then of a body that was refused": (refused, b" "),
        "lines of nothing now and then": (HEALTH, b"\r\n"),
        "idle": (HEALTH, b""),
    }
    with ExitStack() as stack:
        left = {kind: stack.enter_context(connected(server, first)) for kind, (first, _) in kinds.items()}
        started, closed = time.monotonic(), dict[str, float]()
        while len(left) > 1 and time.monotonic() - started < PATIENCE + 3:
            time.sleep(0.05)
            for kind, one in list(left.items()):
                if gone(one, kinds[kind][1]):
                    closed[kind] = time.monotonic() - started
                    del left[kind]
        assert list(left) == ["idle"]
        assert min(closed.values()) > PATIENCE * 0.9, closed
        left["idle"].sendall(HEALTH)
        assert left["idle"].recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    assert server.decide().status == 200


def gone(one: socket.socket, sent: bytes) -> bool:
    """Send something more, and tell whether the other side has closed."""
    one.setblocking(False)
    try:
        one.sendall(sent)
        while part := one.recv(1 << 16):
            assert part
        return True
    except BlockingIOError:
        one.settimeout(SECONDS)
        return False
    except OSError:
        return True


@pytest.mark.parametrize(
    "raw", [b"\0\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", b"no HTTP\r\n\r\n"]
)
def test_bytes_that_are_no_http_get_a_problem(server: Server, raw: bytes) -> None:
    assert "expected HTTP/1.1" in problem(exchange(server.port, raw), "malformed")
    one, _, other = exchange(server.port, HEALTH + raw).partition(b'{"status":"ok"}')
    assert one.startswith(b"HTTP/1.1 200 ")  # what came whole is answered
    assert other == b""  # and then it is closed
    with connected(server, HEALTH) as idle:
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            answer += idle.recv(1 << 16)
        idle.sendall(raw)
        problem(b"".join(iter(lambda: idle.recv(1 << 16), b"")), "malformed")


def test_who_asks_for_another_protocol_is_answered_over_this_one(server: Server) -> None:
    for other in (b"websocket\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13", b"h2c"):
        raw = HEALTH.replace(b"Host: x", b"Host: x\r\nConnection: Upgrade, close\r\nUpgrade: " + other)
        assert exchange(server.port, raw).endswith(b'{"status":"ok"}')
    assert "pgrade" not in server.errors()


def test_sigterm_waits_for_nobody_who_is_half_way_and_all_that_is_said_is_json(tmp_path: Path) -> None:
    with running(*make(tmp_path / "service", serve="drain_seconds = 10")) as server, ExitStack() as stack:
        half_body = post(server, b"Content-Length: 100") + b"\r\n{"
        halves = [half_body] * 50 + [b"", post(server), HEALTH + post(server), HEALTH + half_body, HEALTH]
        for raw in halves:
            stack.enter_context(connected(server, raw))
        problem(exchange(server.port, b"no HTTP\r\n\r\n"), "malformed")
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 0
        assert time.monotonic() - started < 2
        told = [json.loads(line) for line in server.errors().splitlines()]
    (warned,) = [one for one in told if one["level"] == "warning"]
    assert (warned["logger"], warned["event"]) == ("uvicorn.error", "Invalid HTTP request received.")


LOGS = """
import logging
import warnings
from serving.server import configure_logging
configure_logging()
logging.getLogger("uvicorn.error").info("too much")
logging.getLogger("uvicorn.error").warning("%s of them\\nand more", 7)
logging.getLogger("any").warning("%d", "no number")
try:
    bytes(1000).decode("ascii") + (b"secret" * 1000 + b"\\xff").decode("ascii")
except ValueError:
    logging.getLogger("asyncio").exception("failed")
warnings.warn("old")
"""


def test_what_libraries_log_is_a_line_of_json_each() -> None:
    done = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True, timeout=SECONDS, check=True)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(one["logger"], one["level"]) for one in told] == [
        ("uvicorn.error", "warning"), ("any", "warning"), ("asyncio", "error"), ("py.warnings", "warning"),
    ]  # fmt: skip
    assert [one["event"] for one in told[:3]] == ["7 of them\nand more", "%d", "failed"]
    assert told[2]["error"].startswith("UnicodeDecodeError(")
    assert len(told[2]["error"]) == 200  # not all of what could not be read
    assert told[2]["at"].startswith("<string>:")


def within(test: Callable[[protocol.Server, int], Awaitable[None]]) -> None:
    """Run a test beside a server whose application answers /0.3 after so many seconds."""

    async def run() -> None:
        async with _server() as (server, port):
            await asyncio.wait_for(test(server, port), SECONDS)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


@asynccontextmanager
async def _server() -> AsyncIterator[tuple[protocol.Server, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        config = uvicorn.Config(_sleeps, http=protocol.Connection, ws="none", lifespan="off", log_config=None, access_log=False)
        server = protocol.Server(config)
        serving = asyncio.create_task(server.serve([listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield server, port
        server.should_exit = True
        await serving


async def _sleeps(scope: Any, receive: Any, send: Any) -> None:
    message = {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            return
    await asyncio.sleep(float(scope["path"][1:]))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(scope["path"]))]})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


async def _exchange(port: int, raw: bytes) -> bytes:
    """What comes back until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    found = await reader.read()
    writer.close()
    return found


def test_an_answer_may_take_longer_than_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MOST_SECONDS", 0.1)
    monkeypatch.setattr(protocol, "EVERY", 0.02)

    async def test(server: protocol.Server, port: int) -> None:
        found = await _exchange(port, b"GET /0.4 HTTP/1.1\r\n\r\nGET /0.3 HTTP/1.1\r\n\r\nGET /0.2 HTTP")
        assert found.endswith(b"/0.3")  # and then the third is late
        assert found.count(b"200 OK") == 2
        assert not server.server_state.connections

    within(test)


def test_what_came_whole_is_answered_before_garbage_or_the_end_closes_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "EVERY", 0.02)

    async def test(server: protocol.Server, port: int) -> None:
        whole = b"GET /0.2 HTTP/1.1\r\n\r\nGET /0.1 HTTP/1.1\r\n\r\n"
        for rest in (b"\0", b"GET /" + b"x" * 300_000, b"POST /0 HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
            if rest[-1:] == b"{":
                asyncio.get_running_loop().call_later(0.1, setattr, server, "should_exit", True)
            started = time.monotonic()
            found = await _exchange(port, whole + rest)
            assert found.count(b"HTTP/1.1") == found.count(b"200 OK") == 2, found
            assert 0.29 < time.monotonic() - started < 3  # not the ten seconds that the half one has

    within(test)


def test_a_connection_too_many_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", 3)

    async def test(server: protocol.Server, port: int) -> None:
        three = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        found = await _exchange(port, b"")
        assert "found more than 3 connections" in problem(found, "overloaded")
        assert b"retry-after: 1\r\n" in found
        three[0][1].write(b"GET /0 HTTP/1.1\r\n\r\n")  # those that were there are served
        assert (await three[0][0].readline()) == b"HTTP/1.1 200 OK\r\n"
        for _, writer in three:
            writer.close()
        while server.server_state.connections:
            await asyncio.sleep(0.01)
        assert (await _exchange(port, b"GET /0 HTTP/1.1\r\nConnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")

    within(test)
