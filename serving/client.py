"""Clients of the decision service: one that waits for its answers, and one that awaits them.

Both take the steps of `serving.asking`, each in its way. They need `httpx2` and `msgspec`, and nothing of the service itself.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from ope.data import InputError
from serving.asking import (
    ClientError,
    Core,
    Decided,
    Got,
    Missed,
    Patience,
    RefusedError,
    Send,
    Steps,
    UnavailableError,
    Wait,
    read_defaults,
    request_of,
    reward_of,
)
from serving.wire import Accepted, Action, DecisionRequest, Logged, RewardRequest

__all__ = [
    "Accepted", "Action", "AsyncClient", "Client", "ClientError", "Decided", "DecisionRequest", "Logged", "Patience",
    "RefusedError", "RewardRequest", "UnavailableError", "read_defaults",
]  # fmt: skip

T = TypeVar("T")

uniform = random.SystemRandom().random
"""Not seeded: clients that were started alike must not wait alike."""


class Client(Core):
    """A client that waits for its answers. Several threads may share one.

    `defaults`: default actions by decision point, as `read_defaults` finds them. Where no answer comes in time, a decision is the
    default of its decision point; without one, and for all else, UnavailableError is raised: whether a reward is kept and repeated
    is the caller's to say. RefusedError is raised for what the service refuses, InputError for an address or a key that cannot be.
    """

    def __init__(
        self,
        url: str,
        key: str,
        defaults: Mapping[str, str] | None = None,
        patience: Patience | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        random: Callable[[], float] = uniform,
    ) -> None:
        super().__init__(defaults or {}, patience or Patience(), clock, random)
        self._sleep = sleep
        self._http = httpx2.Client(base_url=_address(url), headers=_headers(key))

    def decide(
        self,
        point: str,
        context: Mapping[str, Any],
        *,
        actions: Sequence[Action] | None = None,
        unit: str | None = None,
        session: str | None = None,
        parent: str | None = None,
        decision_id: str | None = None,
    ) -> Decided:
        """A decision, within `patience.deadline`: the service's, or else the default. Without an id it is given one."""
        return self._run(self._decided(point, request_of(context, actions, unit, session, parent, decision_id)))

    def decide_batch(self, point: str, requests: Iterable[DecisionRequest]) -> list[Decided | ClientError]:
        """As many decisions as requests, in their order; an error in place of what was refused, or has no default."""
        return self._run(self._decided_all(point, requests))

    def reward(
        self,
        decision_id: str,
        name: str,
        value: float,
        *,
        event_id: str | None = None,
        observed_at: dt.datetime | None = None,
        token: str | None = None,
    ) -> Accepted:
        """Report a reward. `event_id` tells several of one name apart; the same one again is a repeat."""
        return self._run(self._rewarded(reward_of(decision_id, name, value, event_id, observed_at, token)))

    def rewards(self, rewards: Iterable[RewardRequest]) -> list[Accepted | RefusedError]:
        """Report several rewards; what became of each."""
        return self._run(self._rewarded_all(rewards))

    def shown(self, decision_id: str, action: str | None) -> Accepted:
        """Report what was really shown; None: nothing."""
        return self._run(self._shown(decision_id, action))

    def look_up(self, decision_id: str) -> Logged:
        """A decision as it is stored."""
        return self._run(self._looked_up(decision_id))

    def flush(self, seconds: float = 10.0) -> int:
        """Send reports that wait; how many still do, after that many seconds or where the service does not answer."""
        return self._run(self._flushed(seconds))

    def close(self, seconds: float = 10.0) -> None:
        """Send reports that wait, and end. What cannot be sent is counted as lost."""
        self._run(self._closed(seconds))
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        outcome = None
        try:
            while True:
                outcome = self._take(steps.send(outcome))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    def _take(self, step: Send | Wait) -> Got | Missed | None:
        if isinstance(step, Wait):
            self._sleep(step.seconds)
            return None
        call, left = step.call, _Left(step.seconds)
        more: dict[str, Any] = {"content": call.body, "headers": _deadline(step), "extensions": {"timeout": left}}
        try:
            with self._http.stream(call.method, call.path, **more) as response:
                parts = []
                for part in response.iter_bytes():
                    parts.append(part)
                    if left.over:  # the time for each part is set before the first
                        return Missed("timeout", f"no whole answer within {step.seconds:.3g} s")
        except httpx2.HTTPError as error:
            return _lost(error)
        return Got(response.status_code, b"".join(parts), response.headers.get("retry-after", ""))


class AsyncClient(Core):
    """The same for one event loop of asyncio: every method is awaited."""

    def __init__(
        self,
        url: str,
        key: str,
        defaults: Mapping[str, str] | None = None,
        patience: Patience | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        random: Callable[[], float] = uniform,
    ) -> None:
        super().__init__(defaults or {}, patience or Patience(), clock, random)
        self._sleep = sleep
        self._http = httpx2.AsyncClient(base_url=_address(url), headers=_headers(key))

    async def decide(
        self,
        point: str,
        context: Mapping[str, Any],
        *,
        actions: Sequence[Action] | None = None,
        unit: str | None = None,
        session: str | None = None,
        parent: str | None = None,
        decision_id: str | None = None,
    ) -> Decided:
        """`Client.decide`."""
        return await self._run(self._decided(point, request_of(context, actions, unit, session, parent, decision_id)))

    async def decide_batch(self, point: str, requests: Iterable[DecisionRequest]) -> list[Decided | ClientError]:
        """`Client.decide_batch`."""
        return await self._run(self._decided_all(point, requests))

    async def reward(
        self,
        decision_id: str,
        name: str,
        value: float,
        *,
        event_id: str | None = None,
        observed_at: dt.datetime | None = None,
        token: str | None = None,
    ) -> Accepted:
        """`Client.reward`."""
        return await self._run(self._rewarded(reward_of(decision_id, name, value, event_id, observed_at, token)))

    async def rewards(self, rewards: Iterable[RewardRequest]) -> list[Accepted | RefusedError]:
        """`Client.rewards`."""
        return await self._run(self._rewarded_all(rewards))

    async def shown(self, decision_id: str, action: str | None) -> Accepted:
        """`Client.shown`."""
        return await self._run(self._shown(decision_id, action))

    async def look_up(self, decision_id: str) -> Logged:
        """`Client.look_up`."""
        return await self._run(self._looked_up(decision_id))

    async def flush(self, seconds: float = 10.0) -> int:
        """`Client.flush`."""
        return await self._run(self._flushed(seconds))

    async def close(self, seconds: float = 10.0) -> None:
        """`Client.close`."""
        await self._run(self._closed(seconds))
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        outcome = None
        try:
            while True:
                outcome = await self._take(steps.send(outcome))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    async def _take(self, step: Send | Wait) -> Got | Missed | None:
        if isinstance(step, Wait):
            await self._sleep(step.seconds)
            return None
        call = step.call
        try:
            async with asyncio.timeout(step.seconds):
                response = await self._http.request(
                    call.method, call.path, content=call.body, headers=_deadline(step), timeout=step.seconds
                )
        except TimeoutError:
            return Missed("timeout", f"no whole answer within {step.seconds:.3g} s")
        except httpx2.HTTPError as error:
            return _lost(error)
        return Got(response.status_code, response.content, response.headers.get("retry-after", ""))


class _Left(Mapping[str, float]):
    """Seconds that a request has left, told anew at each of its phases: so all of them together take no longer."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._until

    def __getitem__(self, phase: str) -> float:
        return max(0.001, self._until - time.monotonic())

    def __iter__(self) -> Iterator[str]:
        return iter(("pool", "connect", "write", "read"))

    def __len__(self) -> int:
        return 4


def _address(url: str) -> httpx2.URL:
    try:
        found = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InputError(f"url: found {url!r}, {error}; expected one such as http://127.0.0.1:8347") from None
    if found.scheme not in ("http", "https") or not found.host:
        raise InputError(f"url: found {url!r}; expected one such as http://127.0.0.1:8347")
    return found


def _headers(key: str) -> dict[str, str]:
    if not (key and key.isascii() and key.isprintable()):
        raise InputError("key: found none, or one with other characters than a key has; expected one that `propel key add` printed")
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


def _deadline(step: Send) -> dict[str, str]:
    return {"Propel-Deadline-Ms": f"{step.seconds * 1000:.3f}"}


def _lost(error: httpx2.HTTPError) -> Missed:
    return Missed("timeout" if isinstance(error, httpx2.TimeoutException) else "unreachable", f"{type(error).__name__}: {error}")
