"""Runs nights, ingests and compactions that are harmed at a system call: a parent that loaded everything forks a child for each.

Lines on standard input, `FOLDER WORK CALL WHEN [SIGNAL]`: WORK is the date of a night, `ingest` or `compact`; its child gets the
signal, by default SIGKILL, at its WHEN-th CALL; `- 0`: never. `count 0`: never, but count its calls. A child that SIGSTOP stopped
is told of at once, and goes on after one more line. Answers with JSON: the child's exit status, negative for a signal, null for one
that is stopped, and how many calls of each kind one of its threads made at most.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.log.compact import compact
from pipelines.nightly.ingest import ingest
from pipelines.nightly.lake import alone, open_lake
from pipelines.nightly.log_source import sources_of
from pipelines.nightly.run import nightly
from pipelines.nightly.settings import Settings, read_settings
from tests.faults.harm import attached, most_calls

CALLS = "write,pwrite64,fsync,fdatasync,ftruncate,rename,unlink,pread64"
"""What changes a disk, or makes a change last; and what reads a log."""

LATER = 2**62
"""When compactions are made, in nanoseconds: all files are old, and all notes alike."""


def take(settings: Settings) -> None:
    """What a night begins with: all that is new goes into the lake, in one commit."""
    lake = open_lake(settings)
    with alone(lake):
        lake.sweep()
        snapshot = lake.snapshot()
        found = ingest(settings, lake, snapshot, sources_of(settings, lake, snapshot))
        lake.commit(found.entries, lambda entry: entry.place in found.dropped)


def do(work: str, settings: Settings) -> None:
    """A night, an ingest or a compaction."""
    if work == "ingest":
        take(settings)
    elif work == "compact":
        compact(settings, older_than_days=0, clock=lambda: LATER)
    else:
        nightly(dt.date.fromisoformat(work), settings)


def forked(folder: Path, work: str) -> int:
    """A child that stops itself, and works once it is continued."""
    child = os.fork()
    if child:
        os.waitpid(child, os.WUNTRACED)
        return child
    try:
        os.kill(os.getpid(), signal.SIGSTOP)
        do(work, read_settings(folder / "propel.toml"))
        os._exit(0)
    finally:
        os._exit(1)


def traced(child: int, call: str, when: int, sent: str, log: Path) -> subprocess.Popen[str]:
    """strace on a child, ready to harm it, or to count its calls."""
    what = [f"--trace={CALLS}"] if call == "count" else [f"--trace={call}", f"--inject={call}:signal={sent}:when={when}"]
    return attached(child, what, log)


def waited(child: int) -> int:
    """How a child ended, or that it is stopped."""
    return os.waitpid(child, os.WUNTRACED)[1]


def tell(status: int | None, calls: dict[str, int]) -> None:
    """Answer a line."""
    sys.stdout.write(json.dumps({"status": status, "calls": calls}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Answer every line."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "calls"
        for line in sys.stdin:
            folder, work, call, when, *sent = line.split()
            child = forked(Path(folder), work)
            tracer = None if call == "-" else traced(child, call, int(when), sent[0] if sent else "SIGKILL", log)
            os.kill(child, signal.SIGCONT)
            status, told = waited(child), False
            while os.WIFSTOPPED(status):
                if not told:
                    tell(None, {})
                    sys.stdin.readline()
                told = True  # each of its threads has a call of that number, and stops all of them
                os.kill(child, signal.SIGCONT)
                status = waited(child)
            if tracer is not None:
                tracer.communicate()
            tell(os.waitstatus_to_exitcode(status), most_calls(log, CALLS.split(",")) if call == "count" else {})


class Parent:
    """The parent, as its tests see it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.killed_nights"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder: Path, work: str, call: str = "-", when: int = 0) -> tuple[int, dict[str, int]]:
        """Exit status of a piece of work, and the calls of each kind where they were counted."""
        answer = self._ask(f"{folder} {work} {call} {when}")
        return answer["status"], answer["calls"]

    @contextmanager
    def halfway(self, folder: Path, work: str, call: str, when: int) -> Iterator[bool]:
        """A piece of work that stands still at a call meanwhile, and ends well; False: it had ended before."""
        stopped = self._ask(f"{folder} {work} {call} {when} SIGSTOP")["status"] is None
        try:
            yield stopped
        finally:
            if stopped:
                status = self._ask("")["status"]
        assert not stopped or status == 0

    def close(self) -> None:
        """End the parent."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def parents() -> Iterator[Parent]:
    """For a fixture."""
    one = Parent()
    yield one
    one.close()


if __name__ == "__main__":
    main()
