"""More than the server can do: it goes on doing nearly what it can, refuses the rest, and is itself again soon."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults import load_client
from tests.faults.audit import Attempt, attempts, audit, waits
from tests.faults.live_server import KILLS, Live, load, log_of, make, resident, show, start

SECONDS = 10.0 if KILLS else 1.0

CONNECTIONS = 32


class Phase(NamedTuple):
    """What came of a load."""

    ledger: Path
    sent: list[Attempt]
    goodput: float
    """Decisions acknowledged a second."""

    @property
    def refused(self) -> list[Attempt]:
        return [one for one in self.sent if one.status == 503]


def phase(live: Live, folder: Path, name: str, seconds: float = SECONDS, **options: object) -> Phase:
    """A load, and what came of it. Clients go away after a second, as those of a feed do."""
    ledger = folder / f"{name}.jsonl"
    load_client.run(port=live.port, key=live.made.key, ledger=str(ledger), name=name, seconds=seconds, timeout=1.0, **options)
    sent = list(attempts(ledger))
    began = min(one.due for one in sent)
    good = [one for one in sent if one.status == 200 and one.got is not None and one.got <= began + seconds]
    assert {one.status for one in sent} <= {0, 200, 503}
    return Phase(ledger, sent, len(good) / seconds)


def test_an_overloaded_server_still_does_most_of_what_it_can(tmp_path: Path) -> None:
    """T27: 1.5 times its peak, open loop: at least 60 % of it; three times the connections: 80 %; after 2 s as before.

    `make faults` asks for the shares; anywhere nothing is lost or doubled, the rest is refused, and it recovers.
    """
    for trial in (1, 2):  # criteria of time: once more on a busy machine
        folder = tmp_path / str(trial)
        folder.mkdir()
        made = make(folder / "server")
        with start(made) as live:
            phase(live, folder, "warm", 0.5, connections=CONNECTIONS)
            peak = phase(live, folder, "peak", connections=CONNECTIONS)
            before = resident(live.process.pid)
            wide = phase(live, folder, "wide", connections=3 * CONNECTIONS)
            best = max(peak.goodput, wide.goodput)
            over = phase(live, folder, "over", connections=600, rate=1.5 * best)
            after = phase(live, folder, "after", 2.4, connections=CONNECTIONS, rate=0.2 * peak.goodput)
            grown = resident(live.process.pid) - before
        figures = audit(log_of(made), *folder.glob("*.jsonl"))
        settled = [one for one in after.sent if one.due >= after.sent[0].due + 2.0]
        slow = waits(settled, 0.99)
        quick = sorted([(one.got or 0) - one.sent for one in over.refused] or [0.0])[int(0.99 * len(over.refused))]
        show(
            f"T27: {figures}; peak {peak.goodput:.0f}/s; 3x connections {wide.goodput / peak.goodput:.0%}; "
            f"1.5x open loop {over.goodput / best:.0%}, {len(over.refused)} of {len(over.sent)} refused, "
            f"p99 from sending to refusal {quick * 1000:.0f} ms; p99 2 s later {slow * 1000:.0f} ms; "
            f"memory +{grown / 2**20:.0f} MiB, {load()}"
        )
        assert {one.status for one in settled} == {200}
        assert grown <= 64 << 20  # what 600 connections and their requests may hold
        if not KILLS:
            return  # shares of the peak are for a machine without other tests
        if wide.goodput >= 0.8 * peak.goodput and over.goodput >= 0.6 * best and slow <= 0.1:
            return
    pytest.fail("twice below the criterion")
