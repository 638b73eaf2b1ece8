"""The simulated payments as a client of a real service: each is asked about over HTTP, and its result reported when it comes."""

from __future__ import annotations

import asyncio
import heapq
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from bandits.simulators.payments import ACTIONS, Payments, World, results
from ope.data import FloatArray, InputError
from serving.client import Action, AsyncClient, Decided, Patience, RefusedError, RewardRequest

POINT, REWARD = "payments", "authorised"

CARDS = 50_000
"""That pay, each as likely as another."""

TOGETHER = 16
"""Payments that wait for their route at one moment."""

SLICE = 256
"""Payments whose results are drawn together."""

MOST = 100
"""Rewards of one request."""

PATIENCE = Patience(timeout=5.0, deadline=15.0)
"""Nobody waits for these payments: a machine that is busy makes them slow, and not unserved."""

PLACES = {action: place for place, action in enumerate(ACTIONS)}


@dataclass(slots=True)
class Driven:
    """What came of n payments."""

    decision_id: list[str] = field(default_factory=list)
    served: list[bool] = field(default_factory=list)
    policy: list[str] = field(default_factory=list)
    authorised: list[bool] = field(default_factory=list)
    vectors: list[FloatArray] = field(default_factory=list)
    """Probabilities (12,) that each was routed with; all on the default where it was not served."""
    rewards_lost: int = 0
    """Results that the service refused."""
    seconds: float = 0.0
    last: float = 0.0
    """When the last of them was decided on, as `time.monotonic` counts."""

    @property
    def rate(self) -> float:
        """Share authorised."""
        return float(np.mean(self.authorised))

    @property
    def stderr(self) -> float:
        """Of that share."""
        return float(np.std(self.authorised, ddof=1) / np.sqrt(len(self.authorised)))

    def true(self, world: World, payments: Payments) -> float:
        """Share that the policies which decided would authorise of these payments, on average over their draws."""
        return world.value(payments, np.stack(self.vectors))


def simulated(
    url: str, key: str, payments: int, seed: int, drift: float, second: float, ledger: TextIO | None = None
) -> tuple[Driven, float]:
    """A stretch of payments of one world, and the share that the policies which decided truly authorise of them.

    Raises ClientError where the service refuses, or does not answer.
    """
    world, rng = World.draw(seed), np.random.default_rng([seed, 2])
    world = world.drifted(rng, drift)
    some = world.payments(payments, rng)

    async def driven() -> Driven:
        async with AsyncClient(url, key, patience=PATIENCE) as client:
            return await drive(client, world, some, rng, second=second, ledger=ledger)

    found = asyncio.run(driven())
    return found, found.true(world, some)


def noting(ledger: Path) -> TextIO:
    """A file that `propel log audit --ledger` reads, to append to. Raises InputError where there can be none."""
    try:
        return ledger.open("a", buffering=1)
    except OSError as error:
        raise InputError(f"{ledger}: {error.strerror}; expected a file that can be written to: name another") from None


async def drive(
    client: AsyncClient,
    world: World,
    payments: Payments,
    rng: np.random.Generator,
    *,
    second: float = 1.0,
    ledger: TextIO | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Driven:
    """Route every payment as the service says, and report its result when it is known.

    `second`: seconds that a second of the world takes. `ledger`: where decisions are noted as they come, and whether they were
    served. Returns once every result is reported.
    """
    driven, started = Driven(), time.monotonic()
    coming: list[tuple[float, int, RewardRequest]] = []
    decided_all = asyncio.Event()
    reporting = asyncio.create_task(_report(client, coming, decided_all, driven))
    cards = rng.integers(0, CARDS, len(payments))
    contexts, eligible = payments.contexts(), payments.eligible
    turns = asyncio.Semaphore(TOGETHER)

    async def decide(row: int) -> Decided:
        async with turns:
            actions = [Action(id=name) for name, may in zip(ACTIONS, eligible[row].tolist(), strict=True) if may]
            return await client.decide(POINT, contexts[row], actions=actions, unit=f"card-{cards[row]}")

    try:
        for start in range(0, len(payments), SLICE):
            rows = range(start, min(start + SLICE, len(payments)))
            found = await asyncio.gather(*map(decide, rows))
            action = np.array([PLACES[one.action] for one in found])
            came = results(world, payments.take(np.array(rows)), action, rng, second=second)
            now = driven.last = time.monotonic()
            for one, good, after in zip(found, came.authorised.tolist(), came.after.tolist(), strict=True):
                _keep(driven, one, good)
                if ledger is not None:
                    ledger.write(json.dumps({"decision_id": one.decision_id, "acknowledged": one.served}) + "\n")
                reward = RewardRequest(decision_id=one.decision_id, token=one.token, name=REWARD, value=float(good))
                heapq.heappush(coming, (now + after, len(driven.served), reward))
            progress(len(driven.served), len(payments))
    finally:
        decided_all.set()
        await reporting
    driven.seconds = time.monotonic() - started
    return driven


def _keep(driven: Driven, one: Decided, authorised: bool) -> None:
    vector = np.zeros(len(ACTIONS))
    for action, propensity in (one.propensities or {one.action: 1.0}).items():
        vector[PLACES[action]] = propensity
    driven.decision_id.append(one.decision_id)
    driven.served.append(one.served)
    driven.policy.append(one.policy)
    driven.authorised.append(authorised)
    driven.vectors.append(vector)


async def _report(
    client: AsyncClient, coming: list[tuple[float, int, RewardRequest]], decided_all: asyncio.Event, driven: Driven
) -> None:
    """Report results as they come, until all are."""
    while coming or not decided_all.is_set():
        due: list[RewardRequest] = []
        while coming and coming[0][0] <= time.monotonic() and len(due) < MOST:
            due.append(heapq.heappop(coming)[2])
        if due:
            driven.rewards_lost += sum(isinstance(one, RefusedError) for one in await client.rewards(due))
        else:
            await asyncio.sleep(0.02)
