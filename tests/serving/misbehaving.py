"""A server that misbehaves as it is told, one request after another, and notes what it was asked; and both clients alike."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import msgspec

from serving.client import AsyncClient, Client
from tests.serving.server import SECONDS, Server


class Seen(NamedTuple):
    """A request that arrived."""

    path: str
    deadline: float
    """Milliseconds, as its header says."""
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Handler(BaseHTTPRequestHandler):
    """Does with each request what is next."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Misbehaving

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.note(self, body)(self, body)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *said: object) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str], size: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:size])


Behave = Callable[[Handler, bytes], None]


class Misbehaving(ThreadingHTTPServer):
    """`plan`: what to do with one request after another; what is last goes on."""

    daemon_threads = True

    def __init__(self, *plan: Behave) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.seen, self.over = list(plan), list[Seen](), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def note(self, handler: Handler, body: bytes) -> Behave:
        self.seen.append(Seen(handler.path, float(handler.headers["Propel-Deadline-Ms"]), body))
        return self.plan.pop(0) if len(self.plan) > 1 else self.plan[0]

    def handle_error(self, *about: object) -> None:
        """Clients go away: that is what is tested."""


@contextmanager
def misbehaving(*plan: Behave) -> Iterator[Misbehaving]:
    """Such a server, while it is needed."""
    with Misbehaving(*plan) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(0.01))
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


def says(status: int, body: bytes = b"{}", **headers: str) -> Behave:
    """Answers so."""
    return lambda handler, _: handler.answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def drops(handler: Handler, _: bytes) -> None:
    """Closes the connection in place of an answer."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def hangs(handler: Handler, _: bytes) -> None:
    """Answers nothing for as long as the test runs."""
    handler.close_connection = True
    handler.server.over.wait(SECONDS)


def cuts(handler: Handler, _: bytes) -> None:
    """Closes the connection after some bytes of an answer."""
    handler.close_connection = True
    handler.answer(200, b'{"decision_id":"x","action":"ads-1"}', {}, 20)


def drips(handler: Handler, _: bytes) -> None:
    """A byte of an answer from time to time, and never all of them."""
    handler.close_connection = True
    handler.answer(200, b" " * 1000, {}, 0)
    with suppress(OSError):
        while not handler.server.over.wait(0.03):
            handler.wfile.write(b" ")


def forwards(real: Server) -> Behave:
    """Does as the real service does."""

    def behave(handler: Handler, body: bytes) -> None:
        found = real.ask(handler.command, handler.path, body or None)
        handler.answer(found.status, found.body, {})

    return behave


def loses(real: Server) -> Behave:
    """Lets the real service do it, and loses its answer."""

    def behave(handler: Handler, body: bytes) -> None:
        assert real.ask(handler.command, handler.path, body).status == 200
        drops(handler, body)

    return behave


class FakeTime:
    """A clock that goes on only while somebody sleeps, and what was slept."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


class Awaited:
    """An AsyncClient whose every method is awaited at once."""

    def __init__(self, *given: Any, **more: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*given, **more)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        return (lambda *given, **more: self._runner.run(found(*given, **more))) if asyncio.iscoroutinefunction(found) else found

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *raised: object) -> None:
        self._runner.run(self._client.close(0.5))
        self._runner.close()


class Waiting(Client):
    """A Client that does not wait long at its end."""

    def __exit__(self, *raised: object) -> None:
        self.close(0.5)


CLIENTS = {"waits": Waiting, "awaits": Awaited}


def client_of(kind: str, url: str, key: str = "propel_key", *given: Any, time: FakeTime | None = None, **more: Any) -> Any:
    """One of both clients, in a time of its own where there is one."""
    if time is not None:
        more |= {"clock": time.clock, "sleep": time.sleep if kind == "waits" else time.sleep_async}
    return CLIENTS[kind](url, key, *given, **more)
