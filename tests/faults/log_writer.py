"""Writes a decision log in a process of its own, and each acknowledged id into a ledger, so that it can be killed and audited.

`append FOLDER LEDGER NAME GROUPS [ROTATE_BYTES [SHARED]]` writes and ends. `server` answers lines
`FOLDER LEDGER NAME GROUPS ROTATE_BYTES CALL PATH WHEN` with JSON: a forked child writes, and is killed at its WHEN-th CALL (on the
file PATH, or on any where it is `-`); CALL `-`: never; `count`: never, but its calls are counted; `eio`: fdatasync fails from its
WHEN-th on. Calls are counted by thread; the answer has the child's exit status and the calls of the thread that made most of them.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bandits.events import digest
from bandits.log.port import Entry, Kind, LogFailedError, Outcome, decision_key
from bandits.log.sqlite import SqliteLog
from tests.faults.harm import attached, most_calls

CALLS = "pwrite64,fdatasync,fsync,ftruncate,unlink,rename"
"""What changes a disk, or makes a change last."""

IN_FLIGHT = 3
"""Groups that wait at once, so that some share a transaction and some do not."""

FAILED = 3
"""Exit status where the disk did not confirm a write."""


def entry_of(name: str, *, answer: bytes | None = None, said: str = "", kept: bool = False, size: int = 300) -> Entry:
    """A decision. `said`: what was asked, so that another text conflicts. The answer is drawn where none is given."""
    key = decision_key("shop", name)
    record = (digest(key + said.encode()) * (size // 16 + 1))[:size]
    return Entry(
        Kind.DECISION, key, digest(said.encode()), record, secrets.token_bytes(40) if answer is None else answer, kept=kept
    )


def group_names(name: str, number: int) -> list[str]:
    """Ids of a writer's group: from one to five."""
    return [f"{name}-{number}-{at}" for at in range(1 + number % 5)]


def read_ledger(path: Path) -> dict[str, bytes]:
    """Acknowledged ids and their answers; each was told once."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = {name: bytes.fromhex(answer) for name, answer in (line.split() for line in lines)}
    assert len(found) == len(lines)
    return found


def write(folder: Path, ledger: Path, name: str, groups: int, rotate_bytes: int, shared: int = 0) -> int:
    """Write groups, and ids named `shared-N` that others write too. Exit status."""
    descriptor = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    room, left = threading.Semaphore(IN_FLIGHT), threading.Semaphore(0)
    failures: list[LogFailedError] = []
    log = SqliteLog(folder, rotate_bytes=rotate_bytes, reserve=1, on_failure=failures.append)

    def send(names: list[str]) -> None:
        waiting = Counter(names)
        room.acquire()

        def told(one: str, outcome: Outcome | Exception) -> None:
            if isinstance(outcome, Outcome):
                assert outcome.state in ("stored", "repeated"), outcome
                os.write(descriptor, f"{one} {outcome.answer.hex()}\n".encode())
            waiting.subtract([one])
            if not +waiting:
                room.release()
                left.release()

        log.submit_all([(entry_of(one), lambda outcome, one=one: told(one, outcome)) for one in names])  # type: ignore[misc]

    for number in range(groups):
        send(group_names(name, number))
    for number in range(shared):
        send([f"shared-{number}"])
    for _ in range(groups + shared):
        left.acquire()
    log.close()
    os.close(descriptor)
    assert len(failures) == (log.failed is not None)
    return FAILED if failures else 0


def forked(arguments: list[str]) -> int:
    """A child that stops itself, and writes once it is continued."""
    folder, ledger, name, groups, rotate = arguments
    child = os.fork()
    if child:
        os.waitpid(child, os.WUNTRACED)
        return child
    try:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(write(Path(folder), Path(ledger), name, int(groups), int(rotate)))
    finally:
        os._exit(1)


def traced(child: int, call: str, path: str, when: str, log: Path) -> subprocess.Popen[str]:
    """strace on a child, ready to harm it, or to count its calls."""
    what = [f"--trace={call}", f"--inject={call}:signal=SIGKILL:when={when}"]
    if call == "count":
        what = [f"--trace={CALLS}"]
    elif call == "eio":
        what = ["--trace=fdatasync,write", f"--inject=fdatasync:error=EIO:when={when}+"]
    if path != "-":
        what += [f"--trace-path={path}"]
    return attached(child, what, log)


def serve() -> None:
    """Answer every line."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "calls"
        for line in sys.stdin:
            *arguments, call, path, when = line.split()
            log.unlink(missing_ok=True)
            child = forked(arguments)
            tracer = None if call == "-" else traced(child, call, path, when, log)
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
            if tracer is not None:
                tracer.communicate()
            found = {
                "status": os.waitstatus_to_exitcode(status),
                "calls": most_calls(log, CALLS.split(",")) if call == "count" else {},
                "trace": log.read_text() if call == "eio" else "",
            }
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()


class Writers:
    """The parent of writers that are killed: it has loaded everything, so that each starts at once."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.log_writer", "server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, folder: Path, groups: int, rotate_bytes: int, call: str = "-", path: str = "-", when: int = 0
    ) -> tuple[int, dict[str, int], str]:
        """Exit status, calls and trace of a writer of `w` groups; its ledger is beside the folder."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        ledger = folder.with_suffix(".ledger")
        self.process.stdin.write(f"{folder} {ledger} w {groups} {rotate_bytes} {call} {path} {when}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["calls"], answer["trace"]

    def close(self) -> None:
        """End the parent."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def writers() -> Iterator[Writers]:
    """For a fixture."""
    one = Writers()
    yield one
    one.close()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve()
    else:
        at, book, who, *numbers = sys.argv[2:]
        sys.exit(write(Path(at), Path(book), who, *(int(number) for number in numbers)))
