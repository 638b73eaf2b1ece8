"""Who is let in: what cannot be answered in time is refused before anything is sampled, and no longer than there is reason."""

from __future__ import annotations

import asyncio
import fcntl
import threading
import time
from pathlib import Path

import pytest

from bandits.log.port import Done, Entry, Outcome
from bandits.policy import UNIFORM, Uniform
from bandits.sampling import Salt
from serving.access import Scope, Secret
from serving.decide import Served
from serving.metrics import Metrics
from serving.problems import ProblemError
from serving.requests import asked
from serving.service import RESERVED, Service
from serving.settings import Serve
from tests.serving.points import AD_LOAD
from tests.serving.server import make, running, within

LIMITS = Serve(most_waiting=100, most_waiting_megabytes=1, longest_wait_seconds=0.5, most_lag_milliseconds=50.0)


class Pressed:
    """A log that says how pressed it is, and stores at once what it takes."""

    full, failed, last_group = False, None, 0

    def __init__(self) -> None:
        self.waiting, self.expected_wait = (0, 0), 0.0
        self.taken: list[Entry] = []

    def submit_all(self, entries: list[tuple[Entry, Done]]) -> None:
        for entry, done in entries:
            self.taken.append(entry)
            done(Outcome("stored", entry.answer))


def service(log: Pressed) -> Service:
    served = {AD_LOAD.name: Served(AD_LOAD, Uniform(), UNIFORM)}
    return Service(served, log, Salt(1, bytes(32)), Secret(bytes(32)), LIMITS, Metrics({}))  # type: ignore[arg-type]


def is_let_in(made: Service, needs: Scope, said: str) -> bool:
    try:
        made.admit(None, needs)
    except ProblemError as refused:
        problem = refused
    else:
        return True
    assert (problem.status, problem.retry_after) == (503, 1)
    assert said in problem.detail
    return False


@pytest.mark.parametrize(
    ("pressure", "limit", "said"),
    [("entries", 100, "entries waiting"), ("bytes", 2**20, "bytes waiting"), ("wait", 0.5, "seconds until"), ("lag", 50, "behind")],
)
def test_events_have_a_share_of_every_limit_for_themselves(pressure: str, limit: float, said: str) -> None:
    for share, lets_in in ((0.99 - RESERVED, {"decide", "reward", "read"}), (0.99, {"reward", "read"}), (1.0, {"read"})):
        log = Pressed()
        made = service(log)
        amount = share * limit
        log.waiting = (round(amount) if pressure == "entries" else 0, round(amount) if pressure == "bytes" else 0)
        log.expected_wait = amount if pressure == "wait" else 0.0
        made.lag = amount / 1000 if pressure == "lag" else 0.0
        scopes: tuple[Scope, ...] = ("decide", "reward", "read")
        assert {needs for needs in scopes if is_let_in(made, needs, said)} == lets_in


def test_a_batch_whose_turn_comes_too_late_is_refused_whole() -> None:
    """Nothing of it is decided on or stored, and it counts among what waits until it is told so."""

    async def story() -> None:
        log = Pressed()
        made = service(log)
        requests = [asked(b'{"context":{}}')] * 60
        point = made.served["ad-load"]
        async with made._turn:  # another batch has its turn
            late = asyncio.create_task(made.decide_all(requests, "shop", point, time.perf_counter() + 0.02))
            patient = asyncio.create_task(made.decide_all(requests[:45], "shop", point))
            await asyncio.sleep(0.05)
            assert not is_let_in(made, "decide", "found 105 entries waiting; expected less than 90")
        with pytest.raises(ProblemError, match="0 ms left"):
            await late
        assert len(await patient) == len(log.taken) == 45
        assert is_let_in(made, "decide", "")

    asyncio.run(story())


def test_a_moment_in_which_the_disk_hung_is_forgotten(tmp_path: Path) -> None:
    """Requests with a deadline are refused by what commits took before, and only a commit can show that they are quick again."""
    made = make(tmp_path / "hung")
    with running(*made) as server:
        within(5, lambda: server.decide(headers={"Propel-Deadline-Ms": "50"}).status == 200)
        with (tmp_path / "hung" / "data" / "log" / "writer.lock").open("a") as turns:
            fcntl.flock(turns, fcntl.LOCK_EX)
            waiting = threading.Thread(target=server.decide)
            waiting.start()
            time.sleep(1.5)
            fcntl.flock(turns, fcntl.LOCK_UN)
        waiting.join()
        assert server.decide(headers={"Propel-Deadline-Ms": "50"}).status == 503
        within(3, lambda: server.decide(headers={"Propel-Deadline-Ms": "50"}).status == 200)
        assert {server.decide(headers={"Propel-Deadline-Ms": "50"}).status for _ in range(20)} == {200}
