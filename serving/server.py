"""The process: uvicorn with uvloop and httptools, one line of JSON per event on standard error, and an end that drains."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from typing import Any

import structlog
import uvicorn

from ope.data import InputError
from serving.app import create_app
from serving.settings import Settings
from serving.workers import END, Workers

PORT_TAKEN = 1
"""Exit status."""


class _Lines:
    """Writes lines, and lets no full disk or closed terminal fail a request."""

    def msg(self, text: str) -> None:
        """Write a line, if that can be done."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    log = debug = info = warning = warn = error = critical = fatal = exception = msg


def configure_logging() -> None:
    """One line of JSON per event. Bodies of requests are never among them."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=lambda *args: _Lines(),
        cache_logger_on_first_use=True,
    )


def run(settings: Settings) -> int:
    """Serve until told to end; the exit status. Raises InputError for what would not start."""
    options: dict[str, Any] = {
        "loop": _installed("uvloop"), "http": _installed("httptools"), "access_log": False, "log_config": None,
        "server_header": False, "proxy_headers": False, "timeout_keep_alive": 75,
        "timeout_graceful_shutdown": settings.serve.drain_seconds, "lifespan": "on",
    }  # fmt: skip
    configure_logging()
    config, serve = uvicorn.Config(create_app(settings), **options), settings.serve
    try:
        listening = _listen(serve.host, serve.port)
    except OSError as error:
        sys.stderr.write(f"propel: {serve.host}, port {serve.port}: {error.strerror}; expected a free one: set serve.port\n")
        return PORT_TAKEN
    if serve.workers == 1:
        with listening:
            return _serve(config, listening)
    port = listening.getsockname()[1]
    listening.close()  # it was free, and nobody else's
    # a socket each, among which the system deals connections out: from one they share, the quickest would take them all
    return Workers(lambda: _serve(config, _listen(serve.host, port, reuse_port=True)), serve.workers, serve.drain_seconds).run()


def _listen(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A socket that listens. Raises OSError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048, reuse_port=reuse_port)


def _serve(config: uvicorn.Config, listening: socket.socket) -> int:
    """Serve in this process."""
    # uvicorn drains at these signals, and raises them once more afterwards: the end that was asked for is no failure
    for asked_to_end in END:
        signal.signal(asked_to_end, lambda number, frame: None)
    server = uvicorn.Server(config)
    server.run(sockets=[listening])
    return 0 if server.started else 1


def _installed(name: str) -> str:
    """A package that the service must not go without: uvicorn would take a slower one in silence."""
    try:
        __import__(name)
    except ImportError:
        raise InputError(f"found no {name}; expected it: pip install 'propel[serve]'") from None
    return name
