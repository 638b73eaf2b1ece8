"""Clocks that jump, and clients that ask again and again: one decision for each id, in the order in which they were made."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from bandits.ids import uuid7
from bandits.log.files import log_files
from serving.setup import Made
from tests.faults import load_client
from tests.faults.audit import attempts, audit
from tests.faults.live_server import KILLS, Live, load, log_of, make, show, sockets, start, status_of
from tests.faults.test_server_killed import ask_again, wait_for
from tests.serving.points import AD_LOAD, promote

SHIFTED = """\
import os, time

def shifted(real, one):
    def now():
        with open(os.environ["CLOCK_SHIFT"]) as file:
            return real() + int(file.read() or 0) * one
    return now

time.time, time.time_ns = shifted(time.time, 1), shifted(time.time_ns, 10**9)
"""
"""A `sitecustomize` that puts the wall clock of a server wrong by the seconds in a file, before anything else is loaded. The
monotonic clock stays. (libfaketime shifts the timed waits of threads along, so that a Python process stalls for seconds.)"""

HOUR, MONTH = 3600, 30 * 86_400

IDS = 1000 if KILLS else 100

COPIES = 5


def samples(text: str) -> dict[str, float]:
    """Values of Prometheus' format by name and labels."""
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in text.splitlines() if line[:1] != "#")}


def test_ids_order_and_durations_survive_a_clock_that_jumps(tmp_path: Path) -> None:
    """T15: an hour back, 30 days on, and back again, while requests come in; ids are the service's own."""
    made, shift = make(tmp_path / "server"), tmp_path / "shift"
    shift.write_text(str(-HOUR))
    (tmp_path / "sitecustomize.py").write_text(SHIFTED)
    fake = {"PYTHONPATH": str(tmp_path), "CLOCK_SHIFT": str(shift)}
    own, named = tmp_path / "own.jsonl", tmp_path / "named.jsonl"
    seconds = 12.0 if KILLS else 1.2
    with start(made, environment=fake) as live:
        load_client.run(port=live.port, key=made.key, ledger=str(named), connections=2, rate=50.0, seconds=0.5)
        client = load_client.start(
            port=live.port, key=made.key, ledger=str(own), connections=4, seconds=seconds, batch=50, named=False
        )
        for number, jump in enumerate((MONTH, -HOUR, 0), start=1):
            wait_for(lambda number=number: own.stat().st_size > 150_000 * number or client.poll() is not None)
            assert client.poll() is None, "the jump came too late"
            shift.write_text(str(jump))
        assert client.wait(timeout=60) == 0
        again = ask_again(live, named, tmp_path, "again")
        told = samples(status_of(made, "/metrics", seconds=5)[1].decode())
    figures = audit(log_of(made), own, named, again)
    days = [int(name.replace("-", "")[:12], 16) / 86_400_000 for name in figures.chosen if not name.startswith("t-")]
    assert 30.0 < max(days) - min(days) < 30.1, "the clock did not jump"
    orders = ordered(own, figures.places)
    below = [name for name, value in told.items() if value < 0]
    whole = told['propel_request_seconds_sum{route="/v1/{decision_point}/decisions:batch"}']
    show(f"T15: {figures}; {orders} pairs in order, {len(below)} negative numbers, requests took {whole:.1f} s in all, {load()}")
    assert below == []
    assert 0 < whole <= 4 * (seconds + 10)  # four connections: a jump of an hour or 30 days would show


def ordered(ledger: Path, places: dict[str, tuple[int, int]]) -> int:
    """How many pairs of answers that followed one another on a connection stand in that order in the log, which all must."""
    rows: dict[int, list[tuple[int, int]]] = {}
    for one in sorted(attempts(ledger), key=lambda one: one.sent):
        if one.status == 200:
            found = [places[made["decision_id"]] for made in json.loads(one.answer)["decisions"]]
            rows.setdefault(one.connection, []).extend(found)
    pairs = [pair for some in rows.values() for pair in itertools.pairwise(some)]
    assert all(first < second for first, second in pairs)
    return len(pairs)


def test_ids_of_one_millisecond_do_not_collide() -> None:
    """T15: a clock that stands still is the worst that can happen to them."""
    many = 10**6 if KILLS else 10**5
    assert len({uuid7(1_790_000_000_000_000_000) for _ in range(many)}) == many


def storm(live: Live, folder: Path, name: str, bodies: Iterable[tuple[str, str]]) -> Path:
    """Every request five times at once, over connections to both workers; the ledger."""
    requests, ledger = folder / f"{name}.requests", folder / f"{name}.jsonl"
    requests.write_text("".join(json.dumps(item) + "\n" for item in bodies))
    wait_for(lambda: len(live.workers) == 2)
    before = {pid: sockets(pid) for pid in live.workers}
    client = load_client.start(
        port=live.port, key=live.made.key, ledger=str(ledger), connections=6 * COPIES, again=str(requests), copies=COPIES, tries=5
    )
    wait_for(lambda: client.poll() is not None or all(sockets(pid) > count for pid, count in before.items()))
    assert client.poll() is None, "one worker got all connections"
    assert client.wait(timeout=60) == 0
    return ledger


def serving(made: Made) -> set[str]:
    """What serves, of all workers."""
    families = text_string_to_metric_families(status_of(made, "/metrics", seconds=5)[1].decode())
    return {one.labels["policy"] for family in families for one in family.samples if one.name == "propel_policy_info"}


def test_a_storm_of_retries_gets_one_answer_for_each_id(tmp_path: Path) -> None:
    """T16: five at once over two workers, with a reload, a restart and a new file between; the same bytes, and 409 for another."""
    made = make(tmp_path / "server", workers=2, rotate_megabytes=1)
    bodies = {f"s-{number}": load_client.request_body(f"s-{number}", pad=128) for number in range(IDS)}
    other = {name: body.replace('"minutes_in_session": ', '"minutes_in_session": 1') for name, body in bodies.items()}
    with start(made) as live:
        ledgers = [storm(live, tmp_path, "first", bodies.items())]
        reference = promote(made.config.parent / "registry", AD_LOAD)
        wait_for(lambda: serving(made) == {reference})  # which would choose otherwise
        ledgers.append(storm(live, tmp_path, "reloaded", bodies.items()))
        assert live.kill() == -signal.SIGKILL
    with start(made) as live:
        ledgers.append(storm(live, tmp_path, "restarted", bodies.items()))
        ledgers.append(tmp_path / "filler.jsonl")
        load_client.run(
            port=live.port, key=made.key, ledger=str(ledgers[-1]), name="fill", connections=4, batch=100, pad=128, seconds=0.3
        )
        assert len(log_files(log_of(made))) >= 2, "no new file"
        ledgers.append(storm(live, tmp_path, "rotated", bodies.items()))
        altered = list(attempts(storm(live, tmp_path, "altered", other.items())))
    figures = audit(log_of(made), *ledgers)
    sent = [one for ledger in ledgers for one in attempts(ledger) if one.name in bodies]
    show(f"T16: {figures}; {len(sent)} times {IDS} ids, {len(altered)} altered, {load()}")
    assert {one.status for one in sent} == {200}
    assert len(sent) == 4 * COPIES * IDS
    assert len({(one.name, one.answer) for one in sent}) == IDS
    assert len(altered) == COPIES * IDS
    assert {one.status for one in altered} == {409}
