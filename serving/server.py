"""The process: uvicorn with uvloop and httptools, one line of JSON per event on standard error, and an end that drains."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import socket
import sys
import traceback
from importlib import import_module
from typing import Any

import structlog
import uvicorn

from serving.app import create_app
from serving.protocol import MOST_CONNECTIONS, Connection, Server
from serving.settings import Settings
from serving.workers import END, Workers

log = structlog.get_logger()

PORT_TAKEN = 1
"""Exit status."""

MOST_SAID = 200
"""Letters of an exception that are logged where a library logs it."""

OTHER_FILES = 512
"""Descriptors that are not of connections: the log's files, those of policies and keys."""


class _Lines:
    """Writes lines, and lets no full disk or closed terminal fail a request."""

    def msg(self, text: str) -> None:
        """Write a line, if that can be done."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    log = debug = info = warning = warn = error = critical = fatal = exception = msg


class _Events(logging.Handler):
    """Takes what libraries log, and makes an event of it: an exception, too, is a part of its line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Tell structlog."""
        told = {"logger": record.name}
        if record.exc_info and record.exc_info[1] is not None:
            told["error"] = repr(record.exc_info[1])[:MOST_SAID]  # that of a UnicodeError holds all the text that was at fault
            for frame, line in traceback.walk_tb(record.exc_info[2]):
                told["at"] = f"{frame.f_code.co_filename}:{line}"  # in the end the innermost
        (log.error if record.levelno >= logging.ERROR else log.warning)(_message(record).strip(), **told)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):  # its values do not fit it: it is told without them
        return str(record.msg)


def configure_logging() -> None:
    """One line of JSON per event, those of libraries among them from warnings on. Bodies of requests are never among them."""
    logging.basicConfig(handlers=[_Events()], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
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
    """Serve until told to end; the exit status. Raises InputError, or ModuleNotFoundError, for what would not start."""
    options: dict[str, Any] = {
        "loop": import_module("uvloop").__name__, "http": Connection, "ws": "none", "access_log": False, "log_config": None,
        "server_header": False, "proxy_headers": False, "timeout_keep_alive": 75,
        "timeout_graceful_shutdown": settings.serve.drain_seconds, "lifespan": "on",
    }  # fmt: skip
    configure_logging()
    _allow_files()
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


def _allow_files() -> None:
    """As many descriptors as all connections and the log's files need at once, or as many as the system lets us have."""
    wanted, (least, most) = MOST_CONNECTIONS + OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
    given = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    if least != resource.RLIM_INFINITY and least < given:
        resource.setrlimit(resource.RLIMIT_NOFILE, (given, most))
    if given < wanted:
        log.warning("few files", found=given, expected=wanted, do="raise the limit of open files (ulimit -Hn)")


def _listen(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A socket that listens. Raises OSError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048, reuse_port=reuse_port)


def _serve(config: uvicorn.Config, listening: socket.socket) -> int:
    """Serve in this process."""
    server = Server(config)
    # uvicorn takes these signals once it runs, and raises them again afterwards; an end that was asked for is no failure
    for asked_to_end in END:
        signal.signal(asked_to_end, server.handle_exit)
    server.run(sockets=[listening])
    return 0 if server.started else 1
