"""The server killed at any instant, stopped, and told to end: nothing that was acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving.setup import Made
from tests.faults import load_client
from tests.faults.audit import Attempt, Figures, attempts, audit
from tests.faults.live_server import KILLS, Live, load, log_of, make, show, start, traced

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")

SEED = int(os.environ.get("PROPEL_SEED", "7"))

READY = 3.0
"""Seconds from the start of a server to its first decision: what an operator is promised."""

CLOSED = 0.1
"""Seconds within which the system closes the connections of a process that was killed."""

TRIALS = min(KILLS, 30) or 1
"""Kills of each kind."""


@contextmanager
def driven(live: Live, ledger: Path, **options: object) -> Iterator[None]:
    """A client beside whatever happens, until it ended by itself."""
    client = load_client.start(port=live.port, key=live.made.key, ledger=str(ledger), **options)
    try:
        wait_for(lambda: len(answered(ledger)) >= 10)
        yield
        assert client.wait(timeout=60) == 0
    finally:
        if client.poll() is None:
            client.kill()
            client.wait()


def wait_for(met: object, seconds: float = 20.0) -> None:
    """Wait until something holds."""
    began = time.monotonic()
    while not met():  # type: ignore[operator]
        assert time.monotonic() - began < seconds
        time.sleep(0.01)


def answered(*ledgers: Path) -> list[Attempt]:
    return [one for one in attempts(*ledgers) if one.status == 200]


def started_again(made: Made) -> Live:
    """A server that started. One that was not ready in time has a second chance, since the machine may be busy."""
    live = start(made)
    if live.ready_seconds > READY:
        show(f"ready only after {live.ready_seconds:.2f} s, {load()}: once more")
        live.kill()
        live = start(made)
    return live


def ask_again(live: Live, ledger: Path, folder: Path, name: str, last: int | None = None) -> Path:
    """Send everything again that a client sent, or the `last` and what got no answer, as clients do; the new ledger."""
    requests, again = folder / f"{name}.requests", folder / f"{name}.jsonl"
    sent = list(attempts(ledger))
    old = sent if last is None else [one for one in sent if one.status != 200] + sent[-last:]
    bodies = {one.name: one.body for one in old}
    requests.write_text("".join(json.dumps(item) + "\n" for item in bodies.items()))
    batch = len(json.loads(old[0].body).get("decisions", "1"))
    load_client.run(
        port=live.port, key=live.made.key, ledger=str(again), connections=16, again=str(requests), batch=batch, tries=10
    )
    assert {one.name for one in answered(again)} == bodies.keys()
    return again


def check(made: Made, *ledgers: Path) -> Figures:
    return audit(log_of(made), *ledgers)


@pytest.mark.parametrize("workers", [1, 2])
def test_no_decision_is_lost_or_doubled_when_the_server_is_killed_at_a_random_time(workers: int, tmp_path: Path) -> None:
    """T2: kill -9 of all processes, where there are two that serve of one of them before, at 200 requests a second."""
    dice = random.Random(SEED + workers)
    made = make(tmp_path / "server", workers=workers)
    ledgers: list[Path] = []
    slowest, cut, kills = 0.0, 0, 0
    for trial in range(TRIALS):
        ledgers.append(tmp_path / f"{trial}.jsonl")
        with started_again(made) as live:
            slowest = max(slowest, live.ready_seconds)
            if trial:
                ledgers.append(ask_again(live, ledgers[-2], tmp_path, f"again{trial}", 50))
            wait_for(lambda live=live: len(live.workers) == workers)
            ledger = tmp_path / f"{trial}.jsonl"
            with driven(live, ledger, name=f"t{trial}", rate=200.0, seconds=1.2, connections=16, batch=1 + trial % 2 * 4):
                killed = []
                if workers == 2:
                    victim = dice.choice(live.workers)
                    time.sleep(dice.uniform(0.0, 0.4))
                    killed.append((time.monotonic(), os.kill(victim, signal.SIGKILL), time.monotonic()))
                time.sleep(dice.uniform(0.0, 0.5))
                killed.append((time.monotonic(), live.kill(), time.monotonic()))
        assert killed[-1][1] == -signal.SIGKILL
        kills += len(killed)
        sent = list(attempts(ledger))
        failed = [one for one in sent if one.status == 0 and one.sent < killed[-1][0]]
        for began, _, ended in killed:
            met = [one for one in failed if one.sent < ended + CLOSED and (one.got or began) >= began]
            failed = [one for one in failed if one not in met]
            cut += len(met)
            assert len(met) <= 16, "more requests failed than were under way"
        assert failed == [], "some failed that no kill met"
        assert {one.status for one in sent} <= {0, 200}
        check(made, *ledgers)
    with started_again(made) as live:
        slowest = max(slowest, live.ready_seconds)
        ledgers.append(ask_again(live, ledger, tmp_path, "again"))
    figures = check(made, *ledgers)
    show(f"T2 seed {SEED} workers {workers}: {figures}; {kills} kills, {cut} cut, ready <= {slowest:.2f} s, {load()}")
    assert slowest <= READY


def test_no_decision_is_lost_or_torn_when_the_server_is_killed_at_a_write(tmp_path: Path) -> None:
    """T1: SIGKILL at the Nth storage call of the thread that commits, with batches, of which all or nothing is there."""
    dice = random.Random(SEED)
    made = make(tmp_path / "server", rotate_megabytes=1)
    ledgers: list[Path] = []
    slowest = 0.0
    points = max(2, TRIALS)
    for point in range(points):
        call = ("pwrite64", "fdatasync")[point % 2]
        when = dice.randint(20, 400 if call == "pwrite64" else 50)  # a commit is one fdatasync and some eight writes
        with started_again(made) as live:
            slowest = max(slowest, live.ready_seconds)
            if point:
                ledgers.append(ask_again(live, ledgers[-1], tmp_path, f"again{point}", 50))
            ledgers.append(tmp_path / f"{point}.jsonl")
            with traced(live.process.pid, f"{call}:signal=SIGKILL:when={when}"):
                load_client.run(
                    port=live.port,
                    key=made.key,
                    ledger=str(ledgers[-1]),
                    name=f"p{point}",
                    rate=100.0,
                    seconds=1.2,
                    batch=5,
                    pad=128,
                )
                assert live.process.wait(timeout=5) == -signal.SIGKILL, f"not killed at {call} {when}"
        check(made, *ledgers)
    with started_again(made) as live:
        slowest = max(slowest, live.ready_seconds)
        ledgers.append(ask_again(live, ledgers[-1], tmp_path, "again"))
    show(f"T1 seed {SEED}: {check(made, *ledgers)}; {points} kills, ready <= {slowest:.2f} s, {load()}")
    assert slowest <= READY


@pytest.mark.parametrize("writes", range(1, 24, 2) if KILLS else [9])
def test_a_server_that_is_killed_while_it_begins_a_file_leaves_a_log_that_reads_whole(writes: int, tmp_path: Path) -> None:
    """T1 at the writes of a rotation, which the committer makes once a file is due: nothing is missing, of the new file either."""
    made = make(tmp_path / "server", rotate_seconds=0.3)
    ledgers = [tmp_path / "before.jsonl", tmp_path / "after.jsonl"]
    with start(made) as live:
        load_client.run(port=live.port, key=made.key, ledger=str(ledgers[0]), name="a", connections=1, seconds=0.2)
        time.sleep(0.3)  # the file is due
        with traced(live.process.pid, f"pwrite64:signal=SIGKILL:when={writes}"):
            load_client.run(port=live.port, key=made.key, ledger=str(ledgers[1]), name="b", connections=1, seconds=0.4)
            assert live.process.wait(timeout=5) == -signal.SIGKILL
    check(made, *ledgers)
    with start(made) as live:
        check(made, *ledgers, ask_again(live, ledgers[1], tmp_path, "again"))


def test_a_server_whose_first_process_alone_was_killed_starts_again(tmp_path: Path) -> None:
    """kill -9 of what supervises two workers: they must not go on and hold the port."""
    made = make(tmp_path / "server", workers=2)
    with start(made) as live:
        wait_for(lambda: len(live.workers) == 2)
        orphans = live.workers
        os.kill(live.process.pid, signal.SIGKILL)
        live.process.wait()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), 3.0)
        with started_again(made) as again:
            assert again.ready_seconds <= READY


@pytest.mark.parametrize("workers", [1, 2] if KILLS else [1])
def test_a_server_that_is_told_to_end_under_load_finishes_what_it_has(workers: int, tmp_path: Path) -> None:
    """T10: SIGTERM under load; within 10 s, with status 0, nothing lost, and no request that was taken is cut off."""
    made = make(tmp_path / "server", workers=workers)
    ledgers: list[Path] = []
    statuses, slowest = [], 0.0
    for trial in range(10 if KILLS else 1):
        ledgers.append(tmp_path / f"{trial}.jsonl")
        with start(made) as live, driven(live, ledgers[-1], name=f"e{trial}", rate=200.0, seconds=1.0, connections=16):
            told = time.monotonic()
            status, seconds = live.end()
            statuses.append(status)
            slowest = max(slowest, seconds)
        taken = [one for one in attempts(ledgers[-1]) if one.sent < told]
        assert [one for one in taken if one.status != 200] == [], "a request that was under way was not answered"
    figures = check(made, *ledgers)
    show(f"T10 workers {workers}: {figures}; {len(statuses)} ends, <= {slowest:.2f} s, statuses {set(statuses)}, {load()}")
    assert slowest <= 10.0
    assert set(statuses) == {0}


@pytest.mark.parametrize("workers", [1, 2] if KILLS else [2])
def test_a_server_that_was_stopped_for_a_while_decides_nothing_twice(workers: int, tmp_path: Path) -> None:
    """T9: SIGSTOP and SIGCONT of all processes; clients give up waiting and send the same ids again, and again."""
    made, ledger = make(tmp_path / "server", workers=workers), tmp_path / "ledger.jsonl"
    pause = 5.0 if KILLS else 1.0
    with start(made) as live:
        with driven(live, ledger, rate=100.0, seconds=pause + 1, connections=16, timeout=0.3, tries=60):
            live.signal_all(signal.SIGSTOP)
            time.sleep(pause)  # that it is stopped for so long is the fault
            live.signal_all(signal.SIGCONT)
        again = ask_again(live, ledger, tmp_path, "again")
    sent = list(attempts(ledger))
    repeated = len(sent) - len({one.name for one in sent})
    figures = check(made, ledger, again)
    show(f"T9 workers {workers}: {figures}; stopped {pause} s, {repeated} sent again")
    assert repeated >= 16, "nobody had to wait"
    assert figures.acknowledged == figures.attempted
