"""Appends decisions to a log, and asks for old ones again, until SIGTERM: what ingests and compactions happen beside.

`FOLDER LEDGER`: each id goes into the ledger once it is acknowledged. It ends with an error where a repeat is not answered as the
first time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from itertools import count
from pathlib import Path

from bandits.log.port import Entry, Outcome
from bandits.log.sqlite import SqliteLog
from tests.nightly.events import decision
from tests.nightly.logged import entries

ROTATE = 150_000
"""Bytes of a file: pages of 8 KiB make that some sixty decisions."""


def entry_of(name: str, at: int = 0, tenant: str = "tenant") -> Entry:
    """A decision whose answer is its own."""
    (one,) = entries([decision(name, at=at, tenant=tenant, unit=f"u{at % 40}", chosen=at % 3)])
    return one._replace(answer=f"answer to {name}".encode(), fresh=False)


def repeated(log: SqliteLog, *asked: Entry) -> bool:
    """Whether all are known, and answered as the first time."""
    outcomes = log.append([one._replace(answer=b"another") for one in asked])
    return outcomes == [Outcome("repeated", one.answer) for one in asked]


def write(folder: Path, ledger: Path) -> None:
    """Append until told to end."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    log = SqliteLog(folder, rotate_bytes=ROTATE, reserve=1)
    with ledger.open("ab", buffering=0) as file:
        for number in count():
            if ended.is_set():
                break
            name = f"live-{number}"
            assert log.append([entry_of(name, number)])[0].state == "stored"
            file.write(name.encode() + b"\n")
            assert repeated(log, *(entry_of(f"live-{one}", one) for one in {0, number // 2, number}))
    log.close()


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
    sys.exit(os.EX_OK)
