"""Ingest beside a service that runs: killed at any call, or the service killed meanwhile; the lake has each record once."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bandits.log.files import log_files
from bandits.log.port import Kind
from bandits.log.replay import judges, replay
from bandits.log.segments import records
from bandits.salts import read_salts
from pipelines.log.audit import audit
from pipelines.log.compact import compact
from pipelines.log.held import TABLES
from pipelines.nightly.lake import open_lake
from pipelines.nightly.settings import read_settings
from serving.setup import Made
from tests.faults import load_client
from tests.faults.audit import attempts
from tests.faults.killed_nights import Parent, parents, take
from tests.faults.live_server import KILLS, Live, make, port_of, show, start
from tests.nightly.events import records as rows

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")

SEED = int(os.environ.get("PROPEL_SEED", "7"))

TRIALS = min(KILLS, 30) or 3
"""Kills of an ingest."""

CALLS = ("write", "fsync", "rename", "pread64")
"""Where an ingest is killed, or stands still: what makes the lake, and what reads the log."""

MOMENTS = [("pread64", 0.3), ("write", 0.2), ("pread64", 0.9), ("fsync", 0.5), ("rename", 0.9), ("pread64", 0.6)]
"""Where an ingest is when the service is killed: calls, and how far through them."""

BATCH = 50
"""Rewards of a request."""

serving = pytest.fixture(scope="module")(parents)


@dataclass
class Clients:
    """What asks for decisions until it is told to end, and what rewards those that were answered."""

    made: Made
    ledger: Path
    rewarded: dict[str, float] = field(default_factory=dict)
    """Rewards that were acknowledged."""
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def answers(self) -> dict[str, str]:
        """Decisions that were acknowledged, and their answers."""
        return {one.name: one.answer for one in attempts(self.ledger) if one.status == 200}

    def reward(self) -> None:
        """Reward what was answered, each until it is acknowledged."""
        waiting, begun = list[str](), ""
        with self.ledger.open() as ledger:
            while not (self.ended.is_set() and not waiting):
                *lines, begun = (begun + ledger.read()).split("\n")
                waiting += [note[1] for note in map(json.loads, lines) if note[0] == "r" and note[5] == 200]
                some, waiting = waiting[:BATCH], waiting[BATCH:]
                if not some or not self._send(some):
                    waiting += some
                    time.sleep(0.05)

    def _send(self, names: Sequence[str]) -> bool:
        """Whether all of some were acknowledged."""
        rewards = [{"decision_id": name, "name": "value", "value": value_of(name)} for name in names]
        connection = http.client.HTTPConnection("127.0.0.1", port_of(self.made), timeout=5)
        try:
            head = {"Authorization": f"Bearer {self.made.key}"}
            connection.request("POST", "/v1/rewards:batch", json.dumps({"rewards": rewards}), head)
            answer = connection.getresponse()
            told = json.loads(answer.read())
        except (OSError, http.client.HTTPException):
            return False  # the service is killed, or starts
        finally:
            connection.close()
        if answer.status != 200:
            return False
        stored = [one.get("state") in ("stored", "repeated") for one in told["rewards"]]
        self.rewarded |= {name: value_of(name) for name, good in zip(names, stored, strict=True) if good}
        return all(stored)


def value_of(name: str) -> float:
    """The reward of a decision."""
    return sum(name.encode()) % 101 / 100


@contextmanager
def clients(made: Made, folder: Path) -> Iterator[Clients]:
    """A hundred decisions a second, and their rewards, whatever comes back."""
    one = Clients(made, folder / "ledger.jsonl")
    process = load_client.start(port=port_of(made), key=made.key, ledger=str(one.ledger), rate=100.0, seconds=3600.0, timeout=5.0)
    thread = threading.Thread(target=one.reward)
    thread.start()
    try:
        wait_for(lambda: len(one.rewarded) >= BATCH)
        yield one
    finally:
        process.kill()
        process.wait()
        one.ended.set()
        thread.join()


def wait_for(met: object, seconds: float = 30.0) -> None:
    """Wait until something holds."""
    began = time.monotonic()
    while not met():  # type: ignore[operator]
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


def counted(serving: Parent, made: Made) -> dict[str, int]:
    """Calls of an ingest that nothing disturbs."""
    status, calls = serving.run(made.config.parent, "ingest", "count")
    assert status == 0
    return calls


def check(made: Made, found: Clients) -> str:
    """The lake has every record of the log once, all that was acknowledged among it, as it was answered; all replays. Figures."""
    settings = read_settings(made.config)
    logged = [one for path in log_files(settings.log) for one in records(path)]
    lake = open_lake(settings)
    snapshot = lake.snapshot()
    held = {table: rows(lake, snapshot.find(table)) for table in TABLES}
    numbers = Counter((row["log_id"], row["log_row"]) for some in held.values() for row in some)
    assert numbers.keys() == {(one.log_id, one.row) for one in logged}
    assert set(numbers.values()) == {1}
    chosen = {row["decision_id"]: row["actions"][row["chosen"]] for row in held["decisions"]}
    assert len(chosen) == len(held["decisions"]) == sum(one.kind is Kind.DECISION for one in logged)
    answers = found.answers
    assert {name: json.loads(answer)["action"] for name, answer in answers.items()}.items() <= chosen.items()
    values = {row["decision_id"]: row["value"] for row in held["rewards"]}
    assert len(values) == len(held["rewards"])
    assert found.rewarded.items() <= values.items()
    assert not held["orphan_rewards"]
    audited = audit(settings, attempted={one.name for one in attempts(found.ledger)}, acknowledged=answers)
    assert (audited.appends, audited.missing, audited.findings) == (len(logged), 0, [])
    salts = read_salts(settings.log.parent / "salts.toml")
    again = replay(log_files(settings.log), salts, judges(None, settings.points))
    assert (again.sampled, again.actions, again.vectors) == (len(chosen),) * 3, again.wrong
    return (
        f"{len(logged)} records in {len(log_files(settings.log))} files, {len(answers)} decisions and {len(found.rewarded)} "
        "rewards acknowledged, 0 lost, 0 twice; all replay"
    )


def compact_and_ask_again(live: Live, found: Clients, folder: Path) -> str:
    """Compact beside the service: it answers as before, and the audit has no findings. Figures."""
    settings = read_settings(live.made.config)
    before = audit(settings)
    wait_for(lambda: bool(compact(settings, older_than_days=0).deleted))
    answers = found.answers
    some = list(answers)[:: max(1, len(answers) // 300)]
    requests, ledger = folder / "again.requests", folder / "again.jsonl"
    requests.write_text("".join(json.dumps([name, load_client.request_body(name)]) + "\n" for name in some))
    load_client.run(port=live.port, key=live.made.key, ledger=str(ledger), again=str(requests))
    assert {one.name: one.answer for one in attempts(ledger)} == {name: answers[name] for name in some}
    after = audit(settings, attempted=answers, acknowledged=answers)
    assert (after.appends, after.missing, after.findings) == (before.appends, 0, [])
    return f"{after.compacted} records compacted, {len(some)} answered as before"


@pytest.mark.parametrize("workers", [1, 2] if KILLS else [2])
def test_ingests_that_are_killed_beside_a_service_end_with_every_record_once(serving: Parent, workers: int, tmp_path: Path) -> None:
    """And T17: all of it replays; then it is compacted, and the service answers as before."""
    dice = random.Random(SEED + workers)
    made = make(tmp_path / "server", workers=workers, rotate_seconds=1.0)
    killed = Counter[str]()
    with start(made) as live:
        with clients(made, tmp_path) as found:
            calls = counted(serving, made)
            for trial in range(TRIALS):
                call = CALLS[trial % len(CALLS)]
                # how much there is to be ingested depends on chance: the last calls may not come about
                status, _ = serving.run(made.config.parent, "ingest", call, dice.randint(1, max(1, calls[call] // 2)))
                assert status in (-signal.SIGKILL, 0)
                killed[call] += status == -signal.SIGKILL
                if trial % 5 == 4:  # so that some ingests find much, and some find little
                    assert serving.run(made.config.parent, "ingest")[0] == 0
        take(read_settings(made.config))
        told = check(made, found)
        show(f"ingest killed, {workers} workers: {killed.total()} kills {dict(killed)}; {told}; "
             f"{compact_and_ask_again(live, found, tmp_path)}")  # fmt: skip
    assert killed.total() >= TRIALS // 2


@pytest.mark.parametrize("workers", [1, 2] if KILLS else [1])
def test_a_service_that_is_killed_while_an_ingest_runs_leaves_every_record_once(
    serving: Parent, workers: int, tmp_path: Path
) -> None:
    """The ingest stands still at a call while the service is killed, starts again and goes on; then the ingest goes on, too."""
    made = make(tmp_path / "server", workers=workers, rotate_seconds=1.0)
    folder, halfway = made.config.parent, 0
    live = start(made)
    try:
        with clients(made, tmp_path) as found:
            calls = counted(serving, made)
            for call, share in MOMENTS if KILLS else MOMENTS[:1]:
                before = len(found.rewarded)
                wait_for(lambda before=before: len(found.rewarded) >= before + BATCH)
                with serving.halfway(folder, "ingest", call, max(1, int(calls[call] * share))) as stopped:
                    halfway += stopped
                    assert live.kill() == -signal.SIGKILL
                    live = start(made)
                    after = len(found.rewarded)
                    wait_for(lambda after=after: len(found.rewarded) > after)
                assert serving.run(folder, "ingest")[0] == 0
        take(read_settings(made.config))
        told = check(made, found)
        show(f"service killed beside {halfway} ingests, {workers} workers: {told}; {compact_and_ask_again(live, found, tmp_path)}")
    finally:
        live.kill()
    assert halfway >= 1
