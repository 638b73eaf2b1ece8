"""What the service does, whatever it is asked through: decide, take rewards and what was shown, and look decisions up."""

from __future__ import annotations

import asyncio
import datetime as dt
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
from msgspec import UNSET

from bandits.decision_point import RewardRule
from bandits.events import Decision, Reward, Shown, check_id, digest
from bandits.log.port import (
    Entry,
    Kind,
    LogFailedError,
    LogUnavailableError,
    Outcome,
    decision_key,
    reward_key,
    shown_key,
)
from bandits.sampling import TOTAL, Salt
from ope.data import InputError
from serving.access import Scope, Secret
from serving.decide import Decider, Served, answer, decide, decide_all
from serving.gather import Gathering
from serving.metrics import Metrics
from serving.problems import ProblemError
from serving.requests import Asked, canonical
from serving.settings import Serve
from serving.wire import UNSERVED, Accepted, ActionOfRecord, Logged, RewardRequest, ShownRequest, UnservedRequest

encode = msgspec.json.Encoder().encode

DAMAGED = "found a damaged record of this event; expected a whole one: not kept, and whether it is the same cannot be told"

EXPIRED = "found a decision_id that was used before the retry window; expected an id of its own"

LOG_FULL = "found no room in the log, or no turn to write; expected some: nothing was stored, try again later"

LOG_FAILED = "found a write that the disk did not confirm; expected one that it does: nothing is acknowledged until a new start"

RESERVED = 0.1
"""Share of every limit that only events may use: rewards, what was shown, and what was not served."""

CHUNK = 25
"""Decisions of a batch that are made without looking at anything else."""


@dataclass(slots=True)
class Service:
    """Everything that a request needs, made once."""

    served: Mapping[str, Served]
    log: Gathering
    salt: Salt
    secret: Secret
    limits: Serve
    metrics: Metrics
    clock: Callable[[], int] = time.time_ns
    lag: float = 0.0
    """Seconds by which the event loop comes late."""
    decider: Decider = field(init=False)
    _batched: int = field(init=False, default=0)
    """Decisions of batches that are not with the log yet."""
    _turn: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    rules: Mapping[str, Sequence[RewardRule]] = field(init=False)
    """Rewards by name, of whichever decision points have one."""

    def __post_init__(self) -> None:
        self.decider = Decider(self.salt, self.secret.unit, self.clock)
        found: dict[str, list[RewardRule]] = {}
        for one in self.served.values():
            for rule in one.point.rewards:
                found.setdefault(rule.name, []).append(rule)
        self.rules = found

    def point(self, name: str) -> Served:
        """A decision point. Raises ProblemError for another name."""
        found = self.served.get(name)
        if found is None:
            raise ProblemError("unknown-decision-point", f"found {name!r}; expected one of {', '.join(sorted(self.served))}")
        return found

    def admit(self, until: float | None, needs: Scope) -> None:
        """Raise ProblemError where an answer could not be given in time: before anything is sampled.

        `until`: when the answer is of no use any more, as `time.perf_counter` counts. What only reads waits for nothing. Events
        keep a share of all limits for themselves: a decision that is refused costs a default, a reward that is refused is lost.
        """
        if needs == "read":
            return
        log, limits = self.log, self.limits
        if log.failed is not None:
            raise ProblemError("log-failed", LOG_FAILED)
        self._in_time(until)
        entries, size = log.waiting
        share = 1.0 if needs == "reward" else 1.0 - RESERVED
        for found, most, what in (
            (entries + self._batched, limits.most_waiting, "entries waiting"),
            (size, limits.most_waiting_megabytes << 20, "bytes waiting"),
            (log.expected_wait, limits.longest_wait_seconds, "seconds until the disk could confirm"),
            (self.lag * 1000, limits.most_lag_milliseconds, "milliseconds by which the service is behind"),
        ):
            if found >= share * most:
                raise ProblemError(
                    "overloaded", f"found {found:.6g} {what}; expected less than {share * most:g}: try again later", retry_after=1
                )

    def _in_time(self, until: float | None) -> None:
        """Raise ProblemError where the disk could not confirm in time."""
        if until is None:
            return
        left, wait = until - time.perf_counter(), self.lag + self.log.expected_wait
        if wait > left:
            raise ProblemError(
                "deadline-passed",
                f"found {max(0.0, left) * 1000:.0f} ms left; expected at least {wait * 1000:.0f} until the disk could confirm: "
                "nothing was decided",
            )

    async def decide(self, asked: Asked, tenant: str, served: Served) -> bytes:
        """The answer to a request, durable. Raises ProblemError."""
        told = asyncio.get_running_loop().create_future()
        try:
            made = decide(asked, tenant, served, self.decider)
        except InputError as error:
            raise ProblemError("invalid", str(error)) from None
        self.log.submit(self._entry(asked, made), partial(_resolve, told))
        return self._decided(await told, served)

    async def decide_all(self, many: Sequence[Asked], tenant: str, served: Served, until: float | None = None) -> list[bytes]:
        """The answer, or the problem, of each request of a batch. Raises ProblemError where none was stored."""
        found: list[Entry | ProblemError] = []
        self._batched += len(many)
        try:
            async with self._turn:  # batches take turns, some decisions at a time, so that others are not kept waiting
                for start in range(0, len(many), CHUNK):
                    self._in_time(until)
                    some = many[start : start + CHUNK]
                    for asked, made in zip(some, decide_all(some, tenant, served, self.decider), strict=True):
                        found.append(self._entry(asked, made) if isinstance(made, Decision) else ProblemError("invalid", str(made)))
                    await asyncio.sleep(0)
                self._in_time(until)  # nothing of it is stored yet
        finally:
            self._batched -= len(many)
        outcomes = iter(await self._stored([one for one in found if isinstance(one, Entry)]))
        answers = []
        for one in found:
            try:
                if isinstance(one, ProblemError):
                    raise one
                answers.append(self._decided(next(outcomes), served))
            except ProblemError as problem:
                answers.append(problem.encoded())
        return answers

    def _entry(self, asked: Asked, made: Decision) -> Entry:
        """A decision as the log takes it."""
        told = encode(answer(made, self.secret.token(made.tenant, made.decision_id)))
        return Entry(
            Kind.DECISION,
            decision_key(made.tenant, made.decision_id),
            made.request_hash,
            encode(made),
            told,
            not asked.request.decision_id,
        )

    def _decided(self, outcome: Outcome, served: Served) -> bytes:
        self.metrics.events["decision", outcome.state] += 1
        if outcome.state == "stored":
            self.metrics.decisions[served.point.name, served.reference] += 1
        elif outcome.state == "conflict":
            raise ProblemError(
                "conflict", "found another request under this decision_id; expected the same one, or an id of its own"
            )
        elif outcome.state == "expired":
            raise ProblemError("expired", EXPIRED)
        return outcome.answer

    async def reward(self, request: RewardRequest, tenant: str) -> Accepted:
        """Store a reward. Raises ProblemError."""
        (found,) = await self.rewards([request], tenant)
        if isinstance(found, ProblemError):
            raise found
        return found

    async def rewards(self, requests: Sequence[RewardRequest], tenant: str) -> list[Accepted | ProblemError]:
        """Store rewards; what became of each."""
        entries: list[Entry | ProblemError] = []
        for request in requests:
            try:
                entries.append(self._reward_entry(request, tenant))
            except ProblemError as problem:
                entries.append(problem)
        outcomes = iter(await self._stored([entry for entry in entries if isinstance(entry, Entry)]))
        answers: list[Accepted | ProblemError] = []
        for request, entry in zip(requests, entries, strict=True):
            if isinstance(entry, ProblemError):
                answers.append(entry)
                continue
            state = next(outcomes).state
            kind = entry.kind.name.lower()
            self.metrics.events[kind, state] += 1
            if entry.kind is Kind.QUARANTINED:
                answers.append(
                    ProblemError(
                        "wrong-token", "found a token of another decision; expected that of its answer: kept, not learned from"
                    )
                )
            elif state == "expired":
                answers.append(ProblemError("expired", DAMAGED))
            elif state == "conflict":
                answers.append(
                    ProblemError(
                        "conflict", "found another value under this event_id; kept: the decision point's rule says which counts"
                    )
                )
            else:
                answers.append(Accepted(decision_id=request.decision_id, state=state))
        return answers

    def _reward_entry(self, request: RewardRequest, tenant: str) -> Entry:
        rules = self.rules.get(request.name)
        if rules is None:
            raise ProblemError("invalid", f"name: found {request.name!r}; expected one of {', '.join(sorted(self.rules))}")
        if not any(rule.least <= request.value <= rule.high for rule in rules):
            ranges = " or ".join(f"[{rule.least:g}, {rule.high:g}]" for rule in rules)
            raise ProblemError("invalid", f"value: found {request.value:g}; expected a number within {ranges}")
        now = self.clock()
        event = "" if request.event_id is UNSET else request.event_id
        try:
            made = Reward(
                tenant=tenant, decision_id=request.decision_id, name=request.name, event_id=event,
                observed_at_ns=now if not request.observed_at else _nanoseconds(request.observed_at),
                received_at_ns=now, value=request.value,
            )  # fmt: skip
        except ValueError as error:
            raise ProblemError("invalid", str(error)) from None
        key, content = reward_key(tenant, request.decision_id, request.name, event), digest(struct.pack("<d", request.value + 0.0))
        token = request.token
        if token is not UNSET and token is not None and not self.secret.is_token(token, tenant, request.decision_id):
            return Entry(Kind.QUARANTINED, b"q" + key[1:], content, encode(made), kept=True)
        return Entry(Kind.REWARD, key, content, encode(made), kept=True)

    async def shown(self, decision_id: str, request: ShownRequest, tenant: str) -> Accepted:
        """Store what was shown. Raises ProblemError."""
        now = self.clock()
        try:
            made = Shown(tenant=tenant, decision_id=decision_id, action=request.action, observed_at_ns=now, received_at_ns=now)
        except ValueError as error:
            raise ProblemError("invalid", str(error)) from None
        entry = Entry(Kind.SHOWN, shown_key(tenant, decision_id), digest(encode(request.action)), encode(made), kept=True)
        ((state, _),) = await self._stored([entry])
        self.metrics.events["shown", state] += 1
        if state == "expired":
            raise ProblemError("expired", DAMAGED)
        if state == "conflict":
            raise ProblemError("conflict", "found another action shown before; kept: the certificate counts both")
        return Accepted(decision_id=decision_id, state=state)

    async def unserved(self, request: UnservedRequest, tenant: str, served: Served) -> Accepted:
        """Store a decision that no answer reached, so that its rewards have something to belong to. Raises ProblemError.

        It is a decision of kind `fallback`, which nothing is learned from, under the id of the request: where that was decided on
        and only the answer was lost, the log holds what was sampled, and this is a conflict.
        """
        try:
            made = by_default(decide(canonical(request), tenant, served, self.decider), request)
        except InputError as error:
            raise ProblemError("invalid", str(error)) from None
        entry = Entry(Kind.DECISION, decision_key(tenant, made.decision_id), made.request_hash, encode(made))
        ((state, _),) = await self._stored([entry])
        self.metrics.events["unserved", state] += 1
        if state == "conflict":
            raise ProblemError(
                "conflict",
                "found another decision under this decision_id; expected none: report what was shown of the one there is",
            )
        if state == "expired":
            raise ProblemError("expired", EXPIRED)
        if state == "stored":
            self.metrics.decisions[served.point.name, UNSERVED] += 1
        return Accepted(decision_id=made.decision_id, state=state)

    async def _stored(self, entries: Sequence[Entry]) -> list[Outcome]:
        """What became of entries that share a transaction. Raises ProblemError where none of them could be stored."""
        if not entries:
            return []
        told, outcomes = asyncio.get_running_loop().create_future(), list[Outcome]()

        def tell(outcome: Outcome | Exception) -> None:
            if isinstance(outcome, Exception):
                _resolve(told, outcome)
                return
            outcomes.append(outcome)
            if len(outcomes) == len(entries):
                _resolve(told, outcome)

        self.log.submit_all([(entry, tell) for entry in entries])
        await told
        return outcomes

    def look_up(self, decision_id: str, tenant: str) -> Logged:
        """A decision as it is stored. Raises ProblemError where there is none."""
        try:
            check_id("decision_id", decision_id)
        except InputError as error:
            raise ProblemError("invalid", str(error)) from None
        found = self.log.find(decision_key(tenant, decision_id))
        if found is None:
            raise ProblemError("unknown-decision", f"found no decision {decision_id!r}; expected one of this service's log")
        made = msgspec.json.decode(found.record, type=Decision)
        shares = struct.unpack(f"<{len(made.actions)}I", made.shares)
        return Logged(
            decision_id=made.decision_id, decision_point=made.decision_point, tenant=made.tenant, unit=made.unit,
            decided_at=dt.datetime.fromtimestamp(made.decided_at_ns / 1e9, dt.UTC).isoformat(),
            session=made.session, parent=made.parent, policy=made.policy, kind=made.kind, seed_epoch=made.seed_epoch,
            action=made.actions[made.chosen], propensity=made.propensity,
            actions=[
                ActionOfRecord(id=action, share=share, propensity=share / TOTAL)
                for action, share in zip(made.actions, shares, strict=True)
            ],
            excluded=list(made.excluded), body=made.body, request_hash=made.request_hash.hex(), log_id=found.log_id, row=found.row,
        )  # fmt: skip


def by_default(made: Decision, request: UnservedRequest) -> Decision:
    """The decision that a client made itself, from what would have been decided: its action, with certainty.

    `request_hash` is that of the request, hashed once more behind the word `unserved` and the action: no repeat of the request
    that was not answered, and none of a report of another action. Raises InputError for an action that was not eligible.
    """
    if request.action not in made.actions:
        raise InputError(f"action: found {request.action!r}; expected one of the {len(made.actions)} that were eligible")
    chosen = made.actions.index(request.action)
    shares = [TOTAL if at == chosen else 0 for at in range(len(made.actions))]
    body = bytes(made.body)
    if request.reason is not UNSET:
        body = body[:-1] + b',"reason":' + encode(request.reason) + b"}"
    return msgspec.structs.replace(
        made, kind="fallback", policy=UNSERVED, chosen=chosen, propensity=1.0, shares=struct.pack(f"<{len(shares)}I", *shares),
        body=msgspec.Raw(body), body_hash=digest(body),
        request_hash=digest(b"unserved\0" + request.action.encode() + b"\0" + made.request_hash),
    )  # fmt: skip


def _resolve(told: asyncio.Future[Outcome], outcome: Outcome | Exception) -> None:
    """Tell a request what became of its entry, unless nobody waits for it any more."""
    if told.done():
        return
    if isinstance(outcome, LogFailedError):
        told.set_exception(ProblemError("log-failed", LOG_FAILED))
    elif isinstance(outcome, LogUnavailableError):
        told.set_exception(ProblemError("log-full", LOG_FULL, retry_after=1))
    elif isinstance(outcome, Exception):
        told.set_exception(outcome)
    else:
        told.set_result(outcome)


def _nanoseconds(time_: dt.datetime) -> int:
    """Nanoseconds since 1970. Raises ValueError where they do not fit into 64 bits."""
    found = (time_ - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1) * 1000
    if not 0 <= found < 2**63:
        raise ValueError(f"observed_at: found {time_.isoformat()}; expected a time from 1970 to 2262")
    return found
