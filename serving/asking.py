"""What clients of the decision service ask, when they ask again, and what they do where it cannot answer. No network here.

All of it is generators of steps: `Send` and `Wait` come out, and what came of them goes in. A decision that no answer reached in
time is the decision point's default: it is counted, kept, and reported with a later call, so that its rewards have something to
belong to.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import UNSET, UnsetType

from bandits.decision_point import read_decision_point
from bandits.ids import uuid7
from ope.data import InputError
from serving.wire import (
    UNSERVED,
    Accepted,
    Action,
    DecisionAnswer,
    DecisionRequest,
    Logged,
    Problem,
    RewardRequest,
    ShownRequest,
    UnservedRequest,
)

T = TypeVar("T")

Why: TypeAlias = Literal["timeout", "unreachable", "overloaded", "failed"]
"""Why there is no answer: none in time, no connection, 429 or 503, or an answer that is none."""

REPORTS = 2
"""Reports that one call takes with it, at most: each of them holds its answer up by as much as it takes."""

_encode = msgspec.json.Encoder().encode


class ClientError(Exception):
    """Why a call has no answer."""


class RefusedError(ClientError):
    """The request is at fault, and a repeat would be refused, too. `code`: the problem's name, such as `invalid`; "" for none."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"{status} {code}: {detail}" if code else f"{status}: {detail}")
        self.status, self.code, self.detail = status, code, detail


class UnavailableError(ClientError):
    """No answer came in time. Nothing is known of whether the request arrived: repeat it as it was, under the same ids."""

    def __init__(self, reason: Why, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds, how often to ask again, and how much to keep. Raises InputError for what cannot be."""

    timeout: float = 0.5
    """Of one try of a decision."""
    deadline: float = 1.0
    """Of a decision in all: its tries, the waits between them, and reports that go with it."""
    other_timeout: float = 5.0
    """The same of all else: batches, rewards, what was shown, what is looked up."""
    other_deadline: float = 15.0
    retries: int = 3
    """Tries after the first."""
    backoff: float = 0.05
    """Before the n-th retry: a uniform wait below backoff · 2^(n-1), but below `longest_backoff`; or what Retry-After asks for."""
    longest_backoff: float = 2.0
    most_waiting: int = 10_000
    """Reports that are kept in memory; each is about as large as its request."""

    def __post_init__(self) -> None:
        for name in ("timeout", "deadline", "other_timeout", "other_deadline"):
            if not 0 < getattr(self, name) <= 86_400:
                raise InputError(f"{name}: found {getattr(self, name)}; expected seconds, more than 0 and at most a day")
        for name in ("retries", "backoff", "longest_backoff", "most_waiting"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}: found {getattr(self, name)}; expected a number that is not negative")


@dataclass(frozen=True, slots=True)
class Decided:
    """What to do, and whether the service said so."""

    decision_id: str
    action: str
    served: bool = False
    """False: no answer came in time, and the action is the decision point's default."""
    propensity: float | None = None
    """Of the action; None where it was not sampled by the service."""
    propensities: Mapping[str, float] | None = None
    policy: str = UNSERVED
    kind: str = "fallback"
    token: str | None = None
    """To be sent with rewards; a decision that was not served has none, and needs none."""
    reason: Why | None = None
    """Why no answer came."""


class Call(NamedTuple):
    """A request, without what is another one at every try."""

    method: str
    path: str
    body: bytes | None = None


class Send(NamedTuple):
    """A step: ask, and take the whole answer, within some seconds."""

    call: Call
    seconds: float


class Wait(NamedTuple):
    """A step: wait."""

    seconds: float


class Got(NamedTuple):
    """An answer, of whatever status."""

    status: int
    body: bytes
    retry_after: str = ""


class Missed(NamedTuple):
    """No answer, but another try may bring one."""

    reason: Why
    detail: str
    wait: float = 0.0
    """Seconds that the service asks to wait."""


class Report(NamedTuple):
    """What the service is yet to be told; `instead`: what to tell it where it did decide."""

    call: Call
    instead: Call | None = None


Steps: TypeAlias = Generator[Send | Wait, Got | Missed | None, T]
"""What is to be done until there is a result. Raises ClientError."""

_Read: TypeAlias = Callable[[bytes], T]
"""An answer's body, read. Raises ValueError or MsgspecError."""


class _Decisions(msgspec.Struct):
    decisions: list[msgspec.Raw]


class _Rewards(msgspec.Struct):
    rewards: list[msgspec.Raw]


_answer: _Read[DecisionAnswer] = msgspec.json.Decoder(DecisionAnswer).decode
_accepted: _Read[Accepted] = msgspec.json.Decoder(Accepted).decode
_logged: _Read[Logged] = msgspec.json.Decoder(Logged).decode
_problem: _Read[Problem] = msgspec.json.Decoder(Problem).decode


def read_defaults(paths: Iterable[Path]) -> dict[str, str]:
    """Default actions by decision point, from its TOML file. Raises InputError for a file that names none."""
    found = {}
    for path in paths:
        point = read_decision_point(path)
        if point.default_action is None:
            raise InputError(f"{path}: found no default_action; expected what a client does without the service: add it")
        found[point.name] = point.default_action
    return found


def pause(patience: Patience, retry: int, uniform: float) -> float:
    """Seconds before a retry, counted from 0: full jitter, `uniform` of the longest that it may be."""
    return uniform * min(patience.longest_backoff, patience.backoff * 2.0**retry)


def missed(got: Got) -> Missed:
    """Why an answer is none yet. Raises RefusedError where it will not be one either at another try."""
    try:
        problem = _problem(got.body)
        code, detail = problem.type.rpartition(":")[2], problem.detail
    except (msgspec.MsgspecError, ValueError):  # not of the service, but of a proxy before it
        code, detail = "", got.body[:200].decode(errors="replace")
    if got.status != 429 and got.status < 500:
        raise RefusedError(got.status, code, detail)
    asked = float(got.retry_after) if got.retry_after.isdecimal() and len(got.retry_after) < 10 else 0.0
    return Missed("overloaded" if got.status in (429, 503) else "failed", f"{got.status} {code or detail}", asked)


def request_of(
    context: Mapping[str, Any],
    actions: Sequence[Action] | None,
    unit: str | None,
    session: str | None,
    parent: str | None,
    decision_id: str | None,
) -> DecisionRequest:
    """A request for a decision."""
    return DecisionRequest(
        context=dict(context), actions=UNSET if actions is None else tuple(actions), unit=_or_unset(unit),
        session=_or_unset(session), parent=_or_unset(parent), decision_id=_or_unset(decision_id),
    )  # fmt: skip


def reward_of(
    decision_id: str, name: str, value: float, event_id: str | None, observed_at: dt.datetime | None, token: str | None
) -> RewardRequest:
    """A reward."""
    return RewardRequest(
        decision_id=decision_id, name=name, value=value, event_id=_or_unset(event_id), observed_at=_or_unset(observed_at),
        token=_or_unset(token),
    )  # fmt: skip


class Core:
    """What both clients do, as steps, and what they count. `random`: uniform on [0, 1)."""

    def __init__(
        self, defaults: Mapping[str, str], patience: Patience, clock: Callable[[], float], random: Callable[[], float]
    ) -> None:
        self._defaults, self.patience = dict(defaults), patience
        self._clock, self._random = clock, random
        self._lock = threading.Lock()  # of what follows; never held while anything is asked
        self._reports: deque[Report] = deque()
        self._unserved: Counter[tuple[str, Why]] = Counter()
        self._reported: Counter[str] = Counter()

    @property
    def unserved(self) -> Counter[tuple[str, Why]]:
        """Decisions that no answer reached, by decision point and reason."""
        with self._lock:
            return self._unserved.copy()

    @property
    def reported(self) -> Counter[str]:
        """What became of their reports: `stored` or `repeated`; `shown` where the service had decided; `refused`; `lost`."""
        with self._lock:
            return self._reported.copy()

    @property
    def waiting(self) -> int:
        """Reports that are yet to be sent."""
        return len(self._reports)

    def _decided(self, point: str, request: DecisionRequest) -> Steps[Decided]:
        until, request = self._clock() + self.patience.deadline, _with_id(request)
        call = Call("POST", f"/v1/{_quoted(point)}/decisions", _encode(request))
        try:
            return _served((yield from self._asked(call, _answer, self.patience.timeout, until)))
        except UnavailableError as error:
            return self._by_default(point, request, error)

    def _decided_all(self, point: str, requests: Iterable[DecisionRequest]) -> Steps[list[Decided | ClientError]]:
        many = [_with_id(request) for request in requests]
        call = Call("POST", f"/v1/{_quoted(point)}/decisions:batch", _encode({"decisions": many}))
        try:
            found = yield from self._other(call, partial(_decisions, len(many)))
        except UnavailableError as error:
            return [self._by_default_or_not(point, request, error) for request in many]
        return [one if isinstance(one, RefusedError) else _served(one) for one in found]

    def _rewarded(self, reward: RewardRequest) -> Steps[Accepted]:
        return self._other(Call("POST", "/v1/rewards", _encode(reward)), _accepted)

    def _rewarded_all(self, rewards: Iterable[RewardRequest]) -> Steps[list[Accepted | RefusedError]]:
        many = list(rewards)
        return self._other(Call("POST", "/v1/rewards:batch", _encode({"rewards": many})), partial(_outcomes, len(many)))

    def _shown(self, decision_id: str, action: str | None) -> Steps[Accepted]:
        return self._other(_shown_call(decision_id, action), _accepted)

    def _looked_up(self, decision_id: str) -> Steps[Logged]:
        return self._other(Call("GET", f"/v1/decisions/{_quoted(decision_id)}"), _logged)

    def _flushed(self, seconds: float) -> Steps[int]:
        until = self._clock() + seconds
        while self.waiting and (yield from self._report(self.patience.other_timeout, until, self.patience.retries)):
            pass
        return self.waiting

    def _closed(self, seconds: float) -> Steps[None]:
        yield from self._flushed(seconds)
        with self._lock:
            if self._reports:
                self._reported["lost"] += len(self._reports)
                self._reports.clear()

    def _other(self, call: Call, read: _Read[T]) -> Steps[T]:
        """All but a single decision."""
        return self._asked(call, read, self.patience.other_timeout, self._clock() + self.patience.other_deadline)

    def _asked(self, call: Call, read: _Read[T], timeout: float, until: float) -> Steps[T]:
        """An answer; and while there are any, the service is told of reports."""
        found = yield from self._tried(call, read, timeout, until, self.patience.retries)
        for _ in range(REPORTS):
            if not self.waiting or not (yield from self._report(timeout, until, 0)):
                break
        return found

    def _tried(self, call: Call, read: _Read[T], timeout: float, until: float, retries: int) -> Steps[T]:
        """An answer at one of some tries, each the same request."""
        for retry in range(retries + 1):
            outcome = yield Send(call, min(timeout, until - self._clock()))
            if isinstance(outcome, Got) and outcome.status == 200:
                try:
                    return read(outcome.body)
                except (msgspec.MsgspecError, ValueError) as error:
                    outcome = Missed("failed", f"found an answer that cannot be read: {error}")
            assert outcome is not None
            why = missed(outcome) if isinstance(outcome, Got) else outcome
            wait = max(why.wait, pause(self.patience, retry, self._random()))
            if retry == retries or self._clock() + wait >= until:
                break
            yield Wait(wait)
            if self._clock() >= until:
                break
        raise UnavailableError(why.reason, f"found {why.detail}; expected an answer in time, the last of {retry + 1} tries")

    def _by_default(self, point: str, request: DecisionRequest, error: UnavailableError) -> Decided:
        """What the client does itself. Raises the error where no default is known, or it is not eligible."""
        action = self._defaults.get(point)
        with self._lock:
            self._unserved[point, error.reason] += 1
        offered = request.actions or ()
        if action is None or (offered and not any(one.id == action and one.eligible is not False for one in offered)):
            raise error
        told = {name: getattr(request, name) for name in DecisionRequest.__struct_fields__}
        body = _encode(UnservedRequest(**told, action=action, reason=error.reason))
        id_ = str(request.decision_id)
        self._keep(Report(Call("POST", f"/v1/{_quoted(point)}/unserved", body), _shown_call(id_, action)))
        return Decided(id_, action, reason=error.reason)

    def _by_default_or_not(self, point: str, request: DecisionRequest, error: UnavailableError) -> Decided | ClientError:
        try:
            return self._by_default(point, request, error)
        except UnavailableError as same:
            return same

    def _report(self, timeout: float, until: float, retries: int) -> Steps[bool]:
        """Tell the service of what waits longest; whether it could be told. It waits on where that is given up halfway."""
        with self._lock:
            if not self._reports or self._clock() >= until:
                return False
            report = self._reports.popleft()
        back: Report | None = report
        try:
            accepted = yield from self._tried(report.call, _accepted, timeout, until, retries)
            back = None
            self._count(accepted.state if report.instead else "shown")
        except RefusedError as error:
            back = Report(report.instead) if error.code == "conflict" and report.instead else None
            if back is None:
                self._count("refused")
        except UnavailableError:
            return False
        finally:
            if back is not None:
                self._keep(back, first=True)
        return True

    def _keep(self, report: Report, *, first: bool = False) -> None:
        with self._lock:
            if len(self._reports) >= self.patience.most_waiting:
                self._reported["lost"] += 1
            elif first:
                self._reports.appendleft(report)
            else:
                self._reports.append(report)

    def _count(self, what: str) -> None:
        with self._lock:
            self._reported[what] += 1


def _or_unset(value: T | None) -> T | UnsetType:
    """A field that is left out where there is nothing to say; an empty text is said, and refused."""
    return UNSET if value is None else value


def _quoted(text: str) -> str:
    """A text as one part of a path: `.` and `..` are ones, too, unless they are quoted."""
    return quote(text, safe="").replace(".", "%2E")


def _with_id(request: DecisionRequest) -> DecisionRequest:
    """A request whose every try is the same one."""
    if request.decision_id is not UNSET and request.decision_id is not None:
        return request
    return msgspec.structs.replace(request, decision_id=uuid7(time.time_ns()))


def _shown_call(decision_id: str, action: str | None) -> Call:
    return Call("POST", f"/v1/decisions/{_quoted(decision_id)}/shown", _encode(ShownRequest(action=action)))


def _served(answer: DecisionAnswer) -> Decided:
    return Decided(
        answer.decision_id, answer.action, True, answer.propensity, answer.propensities, answer.policy, answer.kind, answer.token
    )


def _decisions(asked: int, body: bytes) -> list[DecisionAnswer | RefusedError]:
    return _each(msgspec.json.decode(body, type=_Decisions).decisions, _answer, asked)


def _outcomes(asked: int, body: bytes) -> list[Accepted | RefusedError]:
    return _each(msgspec.json.decode(body, type=_Rewards).rewards, _accepted, asked)


def _each(found: Sequence[msgspec.Raw], read: _Read[T], asked: int) -> list[T | RefusedError]:
    """What became of each of a batch. Raises ValueError where they are not as many as were asked."""
    if len(found) != asked:
        raise ValueError(f"found {len(found)} answers; expected {asked}")
    return [_one(bytes(one), read) for one in found]


def _one(raw: bytes, read: _Read[T]) -> T | RefusedError:
    try:
        return read(raw)
    except msgspec.ValidationError:
        problem = _problem(raw)
        return RefusedError(problem.status, problem.type.rpartition(":")[2], problem.detail)
