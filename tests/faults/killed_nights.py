"""Runs nights that are killed at a given system call: a parent that has loaded everything forks a child for each of them.

Lines on standard input, `FOLDER DATE CALL WHEN`: kill the child at its WHEN-th CALL; `- 0`: never. `count 0`: never, but count its
calls. Answers with JSON: the child's exit status, negative for a signal, and how many calls of each kind one of its threads made at
most.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from pipelines.nightly.run import nightly
from pipelines.nightly.settings import read_settings
from tests.faults.harm import attached, most_calls

CALLS = "write,fsync,rename"
"""What changes a disk, or makes a change last."""


def night(folder: Path, date: dt.date) -> int:
    """A forked child that stops itself, and runs a night once it is continued."""
    child = os.fork()
    if child:
        os.waitpid(child, os.WUNTRACED)
        return child
    try:
        os.kill(os.getpid(), signal.SIGSTOP)
        nightly(date, read_settings(folder / "propel.toml"))
        os._exit(0)
    finally:
        os._exit(1)


def traced(child: int, call: str, when: int, log: Path) -> subprocess.Popen[str]:
    """strace on a child, ready to kill it, or to count its calls."""
    what = [f"--trace={CALLS}"] if call == "count" else [f"--trace={call}", f"--inject={call}:signal=SIGKILL:when={when}"]
    return attached(child, what, log)


def main() -> None:
    """Answer every line."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "calls"
        for line in sys.stdin:
            folder, date, call, when = line.split()
            child = night(Path(folder), dt.date.fromisoformat(date))
            tracer = None if call == "-" else traced(child, call, int(when), log)
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
            if tracer is not None:
                tracer.communicate()
            calls = most_calls(log, CALLS.split(",")) if call == "count" else {}
            sys.stdout.write(json.dumps({"status": os.waitstatus_to_exitcode(status), "calls": calls}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
