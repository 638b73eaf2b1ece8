"""Routes. The hot ones are plain ASGI endpoints: raw bytes with a limit while they stream, one decoder, one answer."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

import msgspec
import structlog
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.routing import Route

from serving.access import Access, Scope
from serving.problems import ProblemError
from serving.requests import asked, asked_many, decoded, refuse_repeated_keys
from serving.service import Service
from serving.wire import RewardBatchRequest, RewardRequest, ShownRequest, UnservedRequest

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


class Call(NamedTuple):
    """What is known of a request beside its body."""

    path: MutableMapping[str, str]
    """What the route's path said."""
    tenant: str
    until: float | None
    """When the answer is of no use any more, as `time.perf_counter` counts."""


Answer: TypeAlias = Callable[[Service, bytes, Call], Awaitable[bytes]]
"""The bytes that answer a body. Raises ProblemError."""

T = TypeVar("T")

log = structlog.get_logger()

JSON = [(b"content-type", b"application/json")]

MILLISECONDS = re.compile(rb"[0-9]{1,9}([.][0-9]{1,9})?")

BATCH = 16
"""How many times as large as others a batch may be."""

encode = msgspec.json.Encoder().encode

REWARD = msgspec.json.Decoder(RewardRequest)
REWARDS = msgspec.json.Decoder(RewardBatchRequest)
SHOWN = msgspec.json.Decoder(ShownRequest)
UNSERVED = msgspec.json.Decoder(UnservedRequest)


class Gone(Exception):  # noqa: N818
    """The client went away before its request was read."""


@dataclass(frozen=True, slots=True)
class Hot:
    """An ASGI endpoint: who asks, what, and in time; then what `answer` says. Counted under the name of its route."""

    service: Service
    access: Access
    route: str
    needs: Scope
    admitted: Scope
    """As what it is let in: some of what a key that decides may send is an event."""
    answer: Answer
    most: int
    """Bytes of a body."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        started = time.perf_counter()
        status = 200
        try:
            authorization = deadline = None
            for name, value in scope["headers"]:
                if name == b"authorization":
                    authorization = value
                elif name == b"propel-deadline-ms":
                    deadline = _seconds(value)
            principal = self.access.principal(authorization, self.needs)
            raw = await _body(receive, self.most)
            until = None if deadline is None else started + deadline
            self.service.admit(until, self.admitted)
            body = await self.answer(self.service, raw, Call(scope["path_params"], principal.tenant, until))
            headers = JSON
        except ProblemError as problem:
            status, body, headers = problem.status, problem.encoded(), problem.headers()
        except Gone:
            return
        except Exception as error:  # our fault: it is said, and the next request is served
            log.error("fault", route=self.route, error=repr(error)[:200])
            fault = ProblemError("internal", "found a fault of the service; its log says more")
            status, body, headers = fault.status, fault.encoded(), fault.headers()
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": body})
        self.service.metrics.observe(self.route, status, time.perf_counter() - started)


async def decisions(service: Service, raw: bytes, call: Call) -> bytes:
    """One decision."""
    served = service.point(call.path["decision_point"])
    return await service.decide(asked(raw, served.plain), call.tenant, served)


async def decision_batch(service: Service, raw: bytes, call: Call) -> bytes:
    """As many answers as requests, in their order; a problem where one could not be decided on."""
    served = service.point(call.path["decision_point"])
    answers = await service.decide_all(asked_many(raw, served.plain), call.tenant, served, call.until)
    return b'{"decisions":[' + b",".join(answers) + b"]}"


async def rewards(service: Service, raw: bytes, call: Call) -> bytes:
    """One reward."""
    return encode(await service.reward(_whole(raw, REWARD), call.tenant))


async def reward_batch(service: Service, raw: bytes, call: Call) -> bytes:
    """What became of each reward, in their order; a problem where one was not accepted."""
    found = await service.rewards(_whole(raw, REWARDS).rewards, call.tenant)
    return encode({"rewards": [one.body if isinstance(one, ProblemError) else one for one in found]})


async def shown(service: Service, raw: bytes, call: Call) -> bytes:
    """What was shown of a decision."""
    return encode(await service.shown(call.path["decision_id"], _whole(raw, SHOWN), call.tenant))


async def unserved(service: Service, raw: bytes, call: Call) -> bytes:
    """A decision that no answer reached."""
    served = service.point(call.path["decision_point"])
    return encode(await service.unserved(_whole(raw, UNSERVED), call.tenant, served))


async def look_up(service: Service, raw: bytes, call: Call) -> bytes:
    """A decision as it is stored."""
    return encode(await asyncio.to_thread(service.look_up, call.path["decision_id"], call.tenant))


class _Id(PathConvertor):
    """Any text, so that an id that cannot be is refused with a reason. Starlette's own ends at a line break."""

    regex = "(?s:.*)"


register_url_convertor("id", _Id())

ROUTES: tuple[tuple[str, str, Answer, Scope, int], ...] = (
    ("POST", "/v1/{decision_point}/decisions", decisions, "decide", 1),
    ("POST", "/v1/rewards", rewards, "reward", 1),
    ("POST", "/v1/{decision_point}/decisions:batch", decision_batch, "decide", BATCH),
    ("POST", "/v1/rewards:batch", reward_batch, "reward", BATCH),
    ("POST", "/v1/decisions/{decision_id:id}/shown", shown, "reward", 1),
    ("POST", "/v1/{decision_point}/unserved", unserved, "decide", 1),
    ("GET", "/v1/decisions/{decision_id:id}", look_up, "read", 1),
)
"""Method, path, what it answers, the scope it needs, and how many times as large as others its body may be."""


def routes(service: Service, access: Access) -> list[Route]:
    """The hot routes, the most frequent first."""
    most = service.limits.most_body_kilobytes * 1024
    return [
        Route(
            path,
            Hot(service, access, path.replace(":id", ""), scope, _admitted(answer, scope), answer, most * times),
            methods=[method],
        )
        for method, path, answer, scope, times in ROUTES
    ]


def _admitted(answer: Answer, scope: Scope) -> Scope:
    """What a route is let in as. A report of what an overload left unserved must not be shed with what overloads."""
    return "reward" if answer is unserved else scope


class Direct:
    """Takes the most frequent route past the router and the layers around it; all else goes on as it came."""

    def __init__(self, app: Any, routes: list[Route]) -> None:
        self.app, self.decide = app, routes[0].endpoint

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["method"] == "POST":
            _, version, point, what = (*scope["path"].split("/", 3), "", "", "")[:4]
            if version == "v1" and what == "decisions":
                scope["path_params"] = {"decision_point": point}
                await self.decide(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _whole(raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A request whose every key was read. Raises ProblemError."""
    found = decoded(raw, decoder)
    refuse_repeated_keys(raw, encode(found).count(b'"'))
    return found


async def _body(receive: Receive, most: int) -> bytes:
    """The body. Raises ProblemError as soon as it is larger than `most`, Gone where the client went away."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise ProblemError("too-large", f"found more than {most:,} bytes; expected at most that: split the request")
        if not message.get("more_body", False):
            return part if not parts else b"".join([*parts, part])
        parts.append(part)


def _seconds(value: bytes) -> float:
    """The header `Propel-Deadline-Ms`. Raises ProblemError for what is no number of milliseconds."""
    if not MILLISECONDS.fullmatch(value):
        raise ProblemError(
            "invalid", f"Propel-Deadline-Ms: found {value[:40].decode('latin-1')!r}; expected milliseconds, such as 50"
        )
    return float(value) / 1000
