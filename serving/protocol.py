"""Connections: uvicorn's HTTP, with bounds on how many there are, what comes over each, and how slowly.

What costs nothing is left to clients; what they could make the service hold is bounded here, before the application sees it.
"""

from __future__ import annotations

import asyncio
import math
import socket

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.problems import ProblemError

MOST_CONNECTIONS = 4096
"""Of one process."""

MOST_HEAD_BYTES = 64 * 1024
"""That may come before a head is complete, and after a body before its message is."""

MOST_SECONDS = 10.0
"""From the look at which a message was first seen to be incomplete, or a connection to have sent nothing, until it is closed."""

EVERY = 1.0
"""Seconds between two looks at all connections."""

NEVER = math.inf


class Connection(HttpToolsProtocol):
    """One connection."""

    _overhead = 0  # bytes of the message that came as no part of a body, since the last such part
    _in_body = False  # whether what came last held a part of a body
    _awaited: object = None  # the message that the client was last seen to owe
    _due = NEVER  # when it is to be whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, if there are not too many."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(
                ProblemError("overloaded", f"found more than {MOST_CONNECTIONS:,} connections; expected fewer: reuse them", 1)
            )

    def data_received(self, data: bytes) -> None:
        """Take bytes, if not too many of a message belong to no body."""
        before, self._in_body = self.scope, False
        super().data_received(data)
        if self._in_body or (self.scope is not before and self.cycle is not None):
            self._overhead = 0  # at least a part of these bytes belonged to a body, or to the message before
            return
        self._overhead += len(data)
        if self._overhead > MOST_HEAD_BYTES:
            self._refuse(
                ProblemError("head-too-large", f"found more than {MOST_HEAD_BYTES:,} bytes of headers; expected at most that")
            )

    def on_body(self, body: bytes) -> None:
        """Take a part of a body. How large that may be, the application says."""
        self._in_body = True
        super().on_body(body)

    def close_if_late(self, now: float) -> None:
        """Close where the client takes too long over a message. An answer may take longer; between messages uvicorn waits."""
        if self._answering or self._idle:
            self._due = NEVER
        elif self._due == NEVER or self.scope is not self._awaited:
            self._awaited, self._due = self.scope, now + MOST_SECONDS
        elif now >= self._due:
            self.transport.close()

    def shutdown(self) -> None:
        """Close as soon as all that came whole is answered."""
        super().shutdown()
        if not self._answering:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(ProblemError("malformed", "found bytes that are no request; expected HTTP/1.1"))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: who asks for another protocol is answered over this one (RFC 9110, 7.8)."""

    @property
    def _answering(self) -> bool:
        """Whether a request that came whole waits for its answer."""
        return bool(self.pipeline) or not (self.cycle is None or self.cycle.response_complete or self.cycle.more_body)

    @property
    def _idle(self) -> bool:
        """Whether uvicorn waits for the next message, of which nothing came yet."""
        return self.timeout_keep_alive_task is not None and self.cycle.scope is self.scope

    def _refuse(self, problem: ProblemError) -> None:
        """Answer with a problem, and close."""
        if self._answering:  # first things first: the answer ends the connection, and until then nothing more is read
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            return
        cycle = self.cycle
        answered = cycle is not None and cycle.scope is self.scope and cycle.more_body and cycle.response_started  # before its end
        if not answered and not self.transport.is_closing():
            body = problem.encoded()
            headers = [*self.server_state.default_headers, *problem.headers(), (b"content-length", b"%d" % len(body))]
            lines = [b"%s: %s\r\n" % header for header in (*headers, (b"connection", b"close"))]
            self.transport.write(b"".join([STATUS_LINE[problem.status], *lines, b"\r\n", body]))
        self.transport.close()


class Server(uvicorn.Server):
    """Also looks at its connections, now and then: none needs a timer of its own for that."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start."""
        await super().startup(sockets)
        self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            now = asyncio.get_running_loop().time()
            for one in list(self.server_state.connections):
                if self.should_exit:
                    one.shutdown()  # those that came at the last moment, too
                elif isinstance(one, Connection):
                    one.close_if_late(now)
