"""What several workers counted: told alike by each, and never less than before, whoever dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics import Metrics
from tests.serving.server import SECONDS, Server, make, running

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # workers are forked, too

FORK = multiprocessing.get_context("fork")

DECISIONS = "propel_decisions_total"


def told(text: bytes) -> dict[str, float]:
    """Samples added up over their labels, by name."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for one in family.samples:
            if one.labels.get("le", "+Inf") == "+Inf":
                found[one.name] = found.get(one.name, 0.0) + one.value
    return found


def samples(text: bytes, name: str) -> dict[tuple[str, ...], float]:
    """Samples of one name by their labels."""
    families = text_string_to_metric_families(text.decode())
    return {tuple(one.labels.values()): one.value for family in families for one in family.samples if one.name == name}


@contextmanager
def worker(metrics: Metrics, decisions: int, waiting: float = 0.0) -> Iterator[Callable[[], None]]:
    """A process that has counted and left that, and waits; and what kills it."""
    left, done = FORK.Event(), FORK.Event()

    def work() -> None:
        count(metrics, decisions)
        metrics._gauges = {"propel_waiting": ("Waiting.", lambda: waiting)}
        metrics.leave()
        left.set()
        done.wait(SECONDS)

    process = FORK.Process(target=work)
    process.start()
    assert left.wait(SECONDS)

    def kill() -> None:
        process.kill()
        process.join()

    try:
        yield kill
    finally:
        kill()


def count(metrics: Metrics, decisions: int) -> None:
    for _ in range(decisions):
        metrics.observe("/v1", 200, 0.003)
    metrics.decisions["ad-load", "uniform@builtin"] += decisions
    metrics.events["decision", "stored"] += decisions


def fresh(folder: Path | None) -> Metrics:
    return Metrics({"propel_waiting": ("Waiting.", lambda: 1.0)}, folder)


def test_workers_tell_the_sum_and_the_largest_gauge(tmp_path: Path) -> None:
    metrics = fresh(tmp_path / "metrics")
    with worker(metrics, 20, waiting=7.0), worker(metrics, 30, waiting=3.0):
        count(metrics, 10)
        found = told(metrics.text())
        assert found[DECISIONS] == found["propel_requests_total"] == found["propel_events_total"] == 60
        assert found["propel_request_seconds_bucket"] == found["propel_request_seconds_count"] == 60
        assert found["propel_request_seconds_sum"] == pytest.approx(60 * 0.003)
        assert found["propel_waiting"] == 7


def test_gauges_with_labels_are_told_of_every_worker_that_lives(tmp_path: Path) -> None:
    serves = ["first", "second"]
    labelled = {"propel_policy_info": ("Serves.", ("decision_point", "policy"), lambda: {("ad-load", serves[0]): 1.0})}
    metrics = Metrics({"propel_waiting": ("Waiting.", lambda: 1.0)}, tmp_path / "metrics", labelled)
    with worker(metrics, 1) as kill:
        serves.reverse()  # here alone: the worker is a process of its own
        assert samples(metrics.text(), "propel_policy_info") == {("ad-load", "first"): 1, ("ad-load", "second"): 1}
        kill()
        assert samples(metrics.text(), "propel_policy_info") == {("ad-load", "second"): 1}


def test_what_a_dead_worker_counted_stays_and_its_gauges_go(tmp_path: Path) -> None:
    metrics = fresh(tmp_path / "metrics")
    with worker(metrics, 37, waiting=7.0) as kill:
        count(metrics, 23)
        assert told(metrics.text())[DECISIONS] == 60
        kill()
        found = told(metrics.text())
        assert (found[DECISIONS], found["propel_request_seconds_count"], found["propel_waiting"]) == (60, 60, 1)


def test_who_comes_after_a_dead_worker_goes_on_counting_in_its_place(tmp_path: Path) -> None:
    metrics = fresh(tmp_path / "metrics")
    with worker(metrics, 100):
        for turn in range(1, 6):  # one that dies again and again
            with worker(metrics, 10, waiting=7.0):
                found = told(generate_latest(metrics._registry))  # without a place of its own, which would be handed down
                assert (found[DECISIONS], found["propel_waiting"]) == (100 + 10 * turn, 7)
    assert told(metrics.text())[DECISIONS] == 150
    assert len(list((tmp_path / "metrics").glob("*.json"))) == 2  # as many as run at once, however many died


def test_what_was_told_outlives_whoever_told_it(tmp_path: Path) -> None:
    metrics = fresh(tmp_path / "metrics")
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        metrics.leave()  # as it does every second; then it counts, and is asked before the next one
        count(metrics, 5)
        os.write(writer, metrics.text())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert told(os.read(reader, 1 << 16))[DECISIONS] == 5
    assert told(metrics.text())[DECISIONS] == 5


def test_a_run_does_not_count_what_earlier_ones_left_and_clears_it_away(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    (folder / "1.json").write_text("not even counts")  # nor of a process that happens to run: here that with the number 1
    with worker(fresh(folder), 40):
        pass
    metrics = fresh(folder)
    count(metrics, 2)
    assert told(metrics.text())[DECISIONS] == 2
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {metrics._run}


def test_a_run_leaves_alone_what_another_that_lives_left(tmp_path: Path) -> None:
    one, other = fresh(tmp_path / "metrics"), fresh(tmp_path / "metrics")
    with worker(one, 40), worker(other, 2):
        assert told(one.text())[DECISIONS] == 40
        assert told(other.text())[DECISIONS] == 2


def test_one_worker_leaves_nothing_anywhere_and_a_full_disk_costs_no_answer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for metrics in (fresh(None), fresh(tmp_path / "file")):  # the second cannot be a folder
        count(metrics, 3)
        assert told(metrics.text())[DECISIONS] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_count_falls_when_one_of_two_workers_is_killed(tmp_path: Path) -> None:
    config, key = make(tmp_path / "two")
    config.write_text(config.read_text().replace("workers = 1", "workers = 2"))
    with running(config, key) as server:
        wait(lambda: len(started(server)) == 2)
        for _ in range(60):
            assert server.decide().status == 200
        wait(lambda: asked(server) == 60)  # each knows within a second what the other counted
        os.kill(started(server)[0], signal.SIGKILL)
        seen = []
        while len(started(server)) < 3:  # until another is in its place
            with suppress(OSError, HTTPException):  # was on its way to the one that died
                seen.append(asked(server))
        seen += [asked(server) for _ in range(10)]
        assert set(seen) == {60}


def started(server: Server) -> list[int]:
    """The workers, those that died among them."""
    lines = [json.loads(line) for line in server.errors().splitlines() if line.startswith("{")]
    return [line["process"] for line in lines if line["event"] == "serving"]


def asked(server: Server) -> float:
    return told(server.ask("GET", "/metrics", key=None).body).get(DECISIONS, 0.0)


def wait(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)
