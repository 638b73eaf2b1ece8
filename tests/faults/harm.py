"""What faults are made with: strace on a process that runs, and a disk that is soon full."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def attached(process: int, options: Sequence[str], notes: Path) -> subprocess.Popen[str]:
    """strace at work on a process and its threads; their calls are noted, and counted from here on."""
    tracer = subprocess.Popen(["strace", "-f", "-o", str(notes), *options, "-p", str(process)], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    while line := tracer.stderr.readline():
        if "attached" in line:  # paths that were resolved are told first
            return tracer
    raise AssertionError(f"strace did not attach to {process}")


def most_calls(notes: Path, calls: Sequence[str]) -> dict[str, int]:
    """Of each kind, those of the thread that made most of them."""
    counts = Counter(re.findall(r"^(\d+)\s+(\w+)\(", notes.read_text(), re.MULTILINE))
    return {call: max((n for (_, made), n in counts.items() if made == call), default=0) for call in calls}


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # an error that is kept may keep a file open
