"""The application: settings, registry and log in, FastAPI out. Nothing happens at import."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any

import msgspec
import structlog
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from bandits.log.port import LogFailedError
from bandits.log.sqlite import SqliteLog, tell
from bandits.salts import check_secret, read_salts
from ope.data import InputError
from serving.access import Access, Secret
from serving.gather import Gathering, GroupLog
from serving.http import Direct, routes
from serving.metrics import Metrics
from serving.openapi import described
from serving.problems import ProblemError
from serving.reload import Reload
from serving.service import Service
from serving.settings import Settings

log = structlog.get_logger()

encode = msgspec.json.Encoder().encode

FAILED = 74
"""Exit status after a write that the disk did not confirm (EX_IOERR)."""

HEARTBEAT = 0.02
"""Seconds between looks at how late the event loop is."""


def create_app(
    settings: Settings,
    *,
    make_log: Callable[..., GroupLog] | None = None,
    on_failure: Callable[[LogFailedError], object] | None = None,
) -> FastAPI:
    """The application. Its policies are loaded here; the log is opened when it starts, and closed when it ends.

    Raises InputError where settings, secrets, keys or policies are not what they should be.
    """
    reload = Reload(settings)
    secret = Secret.read(settings.data / "secret.key")
    access = Access(secret, settings.data / "keys.toml")
    check_secret(settings.data / "salts.toml")
    salts = read_salts(settings.data / "salts.toml")
    metrics = Metrics(
        {
            "propel_log_waiting": ("Entries that wait for the disk.", lambda: service.log.waiting[0]),
            "propel_log_expected_wait_seconds": ("What an entry would wait now.", lambda: service.log.expected_wait),
            "propel_log_group_entries": ("Entries of the last transaction.", lambda: service.log.last_group),
            "propel_log_full": ("1 while the disk is full.", lambda: float(service.log.full)),
            "propel_loop_lag_seconds": ("How late the event loop is.", lambda: service.lag),
        },
        settings.data / "metrics" if settings.serve.workers > 1 else None,
        {
            "propel_policy_info": (
                "1 for what serves.", ("decision_point", "policy"),
                lambda: {(name, one.served.reference): 1.0 for name, one in reload.standing.items()},
            ),
            "propel_policy_reload_failed": (
                "1 where what is promoted does not serve, because it failed.", ("decision_point",),
                lambda: {(name,): float(one.failed is not None) for name, one in reload.standing.items()},
            ),
        },
    )  # fmt: skip
    service = Service(
        reload.served, _Unopened(), salts[max(salts)], secret, settings.serve, metrics  # type: ignore[arg-type]
    )  # fmt: skip

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        log_ = (make_log or _sqlite_log)(
            settings,
            lambda results: loop.call_soon_threadsafe(tell, results),
            on_failure or (lambda error: loop.call_soon_threadsafe(_end, loop, error)),
        )
        service.log = gathering = Gathering(log_, loop)
        gc.collect()
        gc.freeze()  # what is there now stays: no collection looks at it again
        gc.set_threshold(20_000, 20, 50)  # requests leave no cycles behind
        tasks = [asyncio.create_task(one) for one in (_beat(service, gathering), _refresh(access), _leave(metrics))]
        try:
            async with reload.follow(service):
                points = {name: one.reference for name, one in service.served.items()}
                log.info("serving", points=points, process=os.getpid())
                yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.to_thread(service.log.close)
            log.info("ended", process=os.getpid())

    app = FastAPI(
        title="Propel", version=version("propel"), lifespan=lifespan, docs_url="/docs", redoc_url=None, redirect_slashes=False
    )
    hot = routes(service, access)
    app.router.routes[:0] = hot  # for what the shorter way does not know
    layers = app.build_middleware_stack
    app.build_middleware_stack = lambda: Direct(layers(), hot)  # type: ignore[method-assign]
    _add_plain_routes(app, service, reload)
    _add_problems(app)
    app.state.service = service
    openapi = app.openapi
    app.openapi = lambda: app.openapi_schema or _described(app, openapi)  # type: ignore[method-assign]
    return app


class _Unopened:
    """Stands for the log until the application starts."""

    full, failed, last_group = False, None, 0
    waiting, expected_wait = (0, 0), 0.0


def _sqlite_log(settings: Settings, deliver: Callable[..., object], on_failure: Callable[..., object]) -> SqliteLog:
    serve = settings.serve
    return SqliteLog(
        settings.data / "log", rotate_bytes=serve.rotate_megabytes << 20, rotate_seconds=serve.rotate_seconds,
        retry_days=serve.retry_days, deliver=deliver, on_failure=on_failure,
    )  # fmt: skip


def _end(loop: asyncio.AbstractEventLoop, error: LogFailedError) -> None:
    """Say why, let the requests under way be refused, and end: a process that starts anew reads what is really stored."""
    log.error("log failed", error=str(error))
    loop.call_later(0.2, os._exit, FAILED)


async def _beat(service: Service, gathering: Gathering) -> None:
    """Measure how late the event loop is, and how busy."""
    loop = asyncio.get_running_loop()
    before, worked, full = loop.time(), time.thread_time(), False
    while True:
        await asyncio.sleep(HEARTBEAT)
        now, work = loop.time(), time.thread_time()
        late = max(0.0, now - before - HEARTBEAT)
        service.lag = late if late > service.lag else 0.7 * service.lag + 0.3 * late
        gathering.adapt((work - worked) / (now - before))
        if gathering.full != full:
            full = gathering.full
            log.error("the disk is full" if full else "there is room on the disk again")
        before, worked = now, work


async def _refresh(access: Access) -> None:
    """Take changes of the keys."""
    while True:
        await asyncio.sleep(2.0)
        try:
            access.refresh()
        except (InputError, OSError) as error:
            log.error("keys not read", error=str(error))


async def _leave(metrics: Metrics) -> None:
    """Let other workers know what was counted here."""
    while True:
        with contextlib.suppress(OSError):  # a full disk costs numbers, not requests
            metrics.leave()
        await asyncio.sleep(1.0)


def _add_plain_routes(app: FastAPI, service: Service, reload: Reload) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Whether the process runs")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="Whether it can decide", responses={503: {"description": "It cannot now."}})
    async def readyz() -> Response:
        state = "log-failed" if service.log.failed is not None else "log-full" if service.log.full else "ok"
        told: dict[str, str | list[str]] = {"status": state} | ({"stale": reload.stale} if reload.stale else {})
        return Response(encode(told), 200 if state == "ok" else 503, media_type="application/json")

    @app.get("/metrics", summary="Numbers for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            there = [route for route in app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
            allowed = sorted({method for route in there for method in getattr(route, "methods", ())})
            error.headers = {"Allow": ", ".join(allowed)}  # of all routes of this path, and not of the first alone
            return _problem(ProblemError("method-not-allowed", f"found {request.method}; expected {' or '.join(allowed)}"), error)
        return _problem(
            ProblemError("not-found", f"found no route {request.url.path!r}; expected one that /openapi.json describes"), error
        )

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        log.error("fault", path=request.url.path, error=repr(error)[:200])
        return _problem(ProblemError("internal", "found a fault of the service; its log says more"))


def _problem(problem: ProblemError, error: HTTPException | None = None) -> Response:
    headers = {name.decode(): value.decode() for name, value in problem.headers()}
    return Response(problem.encoded(), problem.status, headers=dict(error.headers or {} if error else {}) | headers)


def _described(app: FastAPI, openapi: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    app.openapi_schema = described(openapi())
    return app.openapi_schema
