"""Routes. The hot ones are plain ASGI endpoints: raw bytes with a limit while they stream, one decoder, one answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

import msgspec
from starlette.routing import BaseRoute, Route

from serving.access import Access, Principal, Scope
from serving.problems import ProblemError
from serving.requests import asked, asked_many, decoded, refuse_repeated_keys
from serving.service import Service
from serving.wire import DecisionBatchRequest, DecisionRequest, RewardBatchRequest, RewardRequest, ShownRequest

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

JSON = [(b"content-type", b"application/json")]

BATCH = 16
"""How many times as large as others a batch may be."""

encode = msgspec.json.Encoder().encode


class Gone(Exception):  # noqa: N818
    """The client went away before its request was read."""


class Hot:
    """An ASGI endpoint: who asks, what, and in time; then what `answer` says."""

    def __init__(self, service: Service, access: Access, route: str, scope: Scope, *, batch: bool = False) -> None:
        self.service, self.access, self.route, self.needs = service, access, route, scope
        self.most = service.limits.most_body_kilobytes * 1024 * (BATCH if batch else 1)

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
            self.service.admit(deadline, time.perf_counter() - started)
            body = await self.answer(raw, scope["path_params"], principal)
            headers = JSON
        except ProblemError as problem:
            status, body, headers = problem.status, problem.encoded(), problem.headers()
        except Gone:
            return
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": body})
        self.service.metrics.observe(self.route, status, time.perf_counter() - started)

    async def answer(self, raw: bytes, path: MutableMapping[str, str], principal: Principal) -> bytes:
        """The answer's bytes. Raises ProblemError."""
        raise NotImplementedError


class Decisions(Hot):
    """`POST /v1/{decision_point}/decisions`"""

    decoder = msgspec.json.Decoder(DecisionRequest)

    async def answer(self, raw: bytes, path: MutableMapping[str, str], principal: Principal) -> bytes:
        """One decision."""
        served = self.service.point(path["decision_point"])
        return await self.service.decide(asked(raw, self.decoder), principal.tenant, served)


class DecisionBatch(Hot):
    """`POST /v1/{decision_point}/decisions:batch`"""

    decoder = msgspec.json.Decoder(DecisionBatchRequest)

    async def answer(self, raw: bytes, path: MutableMapping[str, str], principal: Principal) -> bytes:
        """As many answers as requests, in their order; a problem where one could not be decided on."""
        served = self.service.point(path["decision_point"])
        answers = await self.service.decide_all(asked_many(raw, self.decoder), principal.tenant, served)
        return b'{"decisions":[' + b",".join(answers) + b"]}"


class Rewards(Hot):
    """`POST /v1/rewards`"""

    decoder = msgspec.json.Decoder(RewardRequest)

    async def answer(self, raw: bytes, path: MutableMapping[str, str], principal: Principal) -> bytes:
        """One reward."""
        request = decoded(raw, self.decoder)
        refuse_repeated_keys(raw, encode(request).count(b'"'))
        return encode(await self.service.reward(request, principal.tenant))


class RewardBatch(Hot):
    """`POST /v1/rewards:batch`"""

    decoder = msgspec.json.Decoder(RewardBatchRequest)

    async def answer(self, raw: bytes, path: MutableMapping[str, str], principal: Principal) -> bytes:
        """What became of each reward, in their order; a problem where one was not accepted."""
        request = decoded(raw, self.decoder)
        refuse_repeated_keys(raw, encode(request).count(b'"'))
        found = await self.service.rewards(request.rewards, principal.tenant)
        return encode({"rewards": [one.body if isinstance(one, ProblemError) else one for one in found]})


class ShownEvents(Hot):
    """`POST /v1/decisions/{decision_id}/shown`"""

    decoder = msgspec.json.Decoder(ShownRequest)

    async def answer(self, raw: bytes, path: MutableMapping[str, str], principal: Principal) -> bytes:
        """What was shown of a decision."""
        request = decoded(raw, self.decoder)
        refuse_repeated_keys(raw, encode(request).count(b'"'))
        return encode(await self.service.shown(path["decision_id"], request, principal.tenant))


class LookUp(Hot):
    """`GET /v1/decisions/{decision_id}`"""

    async def answer(self, raw: bytes, path: MutableMapping[str, str], principal: Principal) -> bytes:
        """A decision as it is stored."""
        return encode(await asyncio.to_thread(self.service.look_up, path["decision_id"], principal.tenant))


def routes(service: Service, access: Access) -> list[BaseRoute]:
    """The hot routes, the most frequent first."""
    table: list[tuple[str, str, type[Hot], Scope, bool]] = [
        ("POST", "/v1/{decision_point}/decisions", Decisions, "decide", False),
        ("POST", "/v1/rewards", Rewards, "reward", False),
        ("POST", "/v1/{decision_point}/decisions:batch", DecisionBatch, "decide", True),
        ("POST", "/v1/rewards:batch", RewardBatch, "reward", True),
        ("POST", "/v1/decisions/{decision_id:path}/shown", ShownEvents, "reward", False),
        ("GET", "/v1/decisions/{decision_id:path}", LookUp, "read", False),
    ]
    return [
        Route(path, kind(service, access, path.replace(":path", ""), scope, batch=batch), methods=[method])
        for method, path, kind, scope, batch in table
    ]


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
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise ProblemError("invalid", f"Propel-Deadline-Ms: found {value[:40]!r}; expected milliseconds, such as 50")
    return found / 1000
