"""The process: uvicorn with uvloop and httptools, one line of JSON per event on standard error, and an end that drains."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI

from ope.data import InputError
from serving.app import create_app
from serving.settings import Settings, read_settings

CONFIG = "PROPEL_CONFIG"

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


def app_of_environment() -> FastAPI:
    """The application of the settings file that the environment names: what each of several workers makes."""
    configure_logging()
    return create_app(read_settings(Path(os.environ[CONFIG])))


def run(config: Path, settings: Settings) -> int:
    """Serve until told to end; the exit status. Raises InputError for what would not start."""
    options: dict[str, Any] = {
        "host": settings.serve.host, "port": settings.serve.port, "loop": _installed("uvloop"), "http": _installed("httptools"),
        "access_log": False, "log_config": None, "server_header": False, "proxy_headers": False, "timeout_keep_alive": 75,
        "timeout_graceful_shutdown": settings.serve.drain_seconds, "lifespan": "on",
    }  # fmt: skip
    configure_logging()
    if settings.serve.workers > 1:
        create_app(settings)  # what is wrong is said once, here
        os.environ[CONFIG] = str(config.resolve())
        uvicorn.run("serving.server:app_of_environment", factory=True, workers=settings.serve.workers, **options)
        return 0
    server = uvicorn.Server(uvicorn.Config(create_app(settings), **options))
    # uvicorn drains at these signals, and raises them once more afterwards: the end that was asked for is no failure
    for asked_to_end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked_to_end, lambda number, frame: None)
    try:
        server.run()
    except SystemExit:
        return PORT_TAKEN
    return 0 if server.started else PORT_TAKEN


def _installed(name: str) -> str:
    """A package that the service must not go without: uvicorn would take a slower one in silence."""
    try:
        __import__(name)
    except ImportError:
        raise InputError(f"found no {name}; expected it: pip install 'propel[serve]'") from None
    return name
