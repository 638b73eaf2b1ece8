"""T7: files of a log that were cut, flipped, zeroed or mixed up: nothing altered is believed, and every loss is told.

Mutants are read and opened by a process of their own, some at a time, so that one that ends the interpreter would be seen:
`python -m tests.faults.test_log_damage LOG SCRATCH FIRST LAST` prints what is wrong with each mutant, as JSON.
"""

from __future__ import annotations

import json
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from bandits.log.files import bytes_of, head_file, log_files
from bandits.log.keys import is_indexed, open_keys
from bandits.log.port import Entry, LogFailedError, LogUnavailableError, Outcome, Stored
from bandits.log.segments import DamagedError, find, gaps, records, segment
from bandits.log.sqlite import SqliteLog
from ope.data import InputError
from tests.faults.log_writer import entry_of

Truth = dict[str, dict[int, Stored]]
"""Of each file and row, what was written."""

FULL = "PROPEL_KILLS" in os.environ
MUTANTS = 1000 if FULL else 100
CHUNK = 50
"""Mutants of one process."""

PAGE, SECTOR = 8192, 512
ROWS = 60
"""Entries of a file: some 90 KB, so that two files have leaves, inner pages, an index and overflow pages, all small in number."""

TARGETS = [("log-00000001.sqlite", 3), ("log-00000002.sqlite", 3), ("log-00000002.sqlite-wal", 3), ("keys.sqlite", 1)]
"""What is damaged, and how often: a sealed file, the newest, its tail, and the index."""


def size_of(number: int) -> int:
    """Bytes of a record; every tenth is larger than two pages."""
    return 20_000 if number % 10 == 9 else 700


def names(file: int) -> list[str]:
    """Ids of a file's entries."""
    return [f"{file}-{number}" for number in range(ROWS)]


def known(name: str) -> Entry:
    """The entry of an id, with the answer that it was stored with."""
    return entry_of(name, answer=f"answer of {name}".encode() * 3, size=size_of(int(name.split("-")[1])))


def build(folder: Path) -> None:
    """A log of a sealed, indexed file and a newest one, of which half is in its write-ahead log; copied while it is open."""
    source = folder.with_name("source")
    log = SqliteLog(source, reserve=1)
    log.append([known(name) for name in names(1)])
    log.rotate_bytes = 0  # the next group begins the second file, the ones after it stay there
    log.append([known(names(2)[0])])
    log.rotate_bytes = 1 << 30
    log.append([known(name) for name in names(2)[1:30]])
    log.close()
    log = SqliteLog(source, reserve=1)  # what was written is in the file; what comes is in its write-ahead log
    for start in range(30, ROWS, 5):
        log.append([known(name) for name in names(2)[start : start + 5]])
    keys = open_keys(source)
    deadline = time.monotonic() + 10
    while not is_indexed(keys, 1) and time.monotonic() < deadline:
        os.sched_yield()
    assert is_indexed(keys, 1)
    keys.close()
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*-shm", "reserve"))
    log.close()


def mutate(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A damage, and what is left by it."""
    image, kind = bytearray(content), draw.choice(["cut", "flip", "flips", "zero", "swap"])
    at = draw.randrange(len(image))
    if kind == "cut":
        return kind, bytes(image[:at])
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else 8):
            image[at] ^= 1 << draw.randrange(8)
            at = draw.randrange(len(image))
    elif kind == "zero":
        start = at // SECTOR * SECTOR
        image[start : start + SECTOR] = bytes(len(image[start : start + SECTOR]))
    else:
        first, second = sorted(draw.sample(range(max(2, len(image) // PAGE)), 2))
        one, two = image[first * PAGE : (first + 1) * PAGE], image[second * PAGE : (second + 1) * PAGE]
        if len(one) == len(two):
            image[first * PAGE : (first + 1) * PAGE], image[second * PAGE : (second + 1) * PAGE] = two, one
    return kind, bytes(image)


def read_all(path: Path, wrong: Counter[str]) -> tuple[dict[int, Stored], bool]:
    """What can be read of a file, and whether it is said that there is more."""
    found: dict[int, Stored] = {}
    try:
        for one in records(path):
            wrong["read twice"] += one.row in found
            found[one.row] = one
    except DamagedError:
        return found, True
    except Exception as error:
        wrong[f"records raised {error!r}"] += 1
    return found, False


def covered(path: Path, rows: set[int], wrong: Counter[str], what: str) -> None:
    """Rows that cannot be read are among the gaps, or the file is said to be damaged."""
    try:
        told = gaps(path)
        segment(path)
    except DamagedError:
        return
    except Exception as error:
        wrong[f"gaps raised {error!r}"] += 1
        return
    wrong[what] += sum(not any(first <= row <= last for first, last in told) for row in rows)


def check_readers(folder: Path, truth: Truth, draw: random.Random, wrong: Counter[str]) -> dict[str, set[int]]:
    """Read everything; which rows of which file are lost."""
    lost = {}
    for name, written in truth.items():
        found, said = read_all(folder / name, wrong)
        wrong["altered records"] += sum(written.get(row) != one for row, one in found.items())
        lost[name] = set(written) - set(found)
        if not said:
            covered(folder / name, lost[name], wrong, "losses untold")
    for one in draw.sample([one for written in truth.values() for one in written.values()], 6):
        try:
            there = find(folder, one.key)
        except DamagedError:
            continue
        except Exception as error:
            wrong[f"find raised {error!r}"] += 1
            continue
        wrong["altered finds"] += there is not None and there != one
    return lost


def told(log: SqliteLog, entry: Entry) -> Outcome | Exception | None:
    """What became of an entry; None where nobody ever tells."""
    results: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
    log.submit(entry, results.put)
    try:
        return results.get(timeout=3.0)
    except queue.Empty:
        return None


def check_writer(
    folder: Path, truth: Truth, lost: dict[str, set[int]], index: bool, draw: random.Random, wrong: Counter[str]
) -> bool:
    """Open a log on a mutant, repeat some entries and store another. Whether it works. `index`: whether that is damaged."""
    try:
        log = SqliteLog(folder, reserve=1)
    except InputError:
        return False
    except Exception as error:
        wrong[f"opening raised {error!r}"] += 1
        return False
    works = True
    for name in [*draw.sample(names(1), 4), *draw.sample(names(2), 4), "new"]:
        outcome = told(log, known(name) if name != "new" else entry_of(name))
        if not isinstance(outcome, Outcome):
            works = False
            if not isinstance(outcome, (LogFailedError, LogUnavailableError)):
                wrong["nobody tells" if outcome is None else f"told {outcome!r}"] += 1
                break
        elif name == "new":
            wrong["a new entry is not stored"] += outcome.state != "stored"
        else:
            row, file = 1 + int(name.split("-")[1]), f"log-{int(name[0]):08d}.sqlite"
            what = "stored twice" if outcome.state == "stored" else "repeats answered otherwise"
            right = outcome == Outcome("repeated", known(name).answer)
            safe = ("stored", "expired") if row in lost[file] else ("expired",) if index else ()
            wrong[what] += not (right or outcome.state in safe)
    log.close()
    for name, rows in lost.items():  # some may be readable again: a checkpoint has written their pages anew
        found, said = read_all(folder / name, wrong)
        wrong["altered records"] += sum(truth[name].get(row) != one for row, one in found.items() if row <= ROWS)
        if not said:
            covered(folder / name, rows - set(found), wrong, "losses forgotten by the writer")
    return works


def check(base: Path, folder: Path, seed: int) -> dict[str, object]:
    """Make a mutant and say what is wrong with it."""
    draw, wrong = random.Random(seed), Counter[str]()
    shutil.copytree(base, folder)
    target = folder / draw.choices([name for name, _ in TARGETS], [weight for _, weight in TARGETS])[0]
    kind, content = mutate(target.read_bytes(), draw)
    target.write_bytes(content)
    if target.name != "keys.sqlite" and draw.random() < 0.5:
        for path in folder.glob("keys.sqlite*"):  # the sealed file is looked into itself
            path.unlink()
    truth = {
        path.name: {row: Stored(LOG_IDS[path.name], row, *known(name)[:5]) for row, name in enumerate(names(file), 1)}
        for file, path in enumerate(log_files(base), 1)
    }
    threading.excepthook = lambda args: wrong.update({f"a thread ended with {args.exc_value!r}": 1})
    lost = check_readers(folder, truth, draw, wrong)
    index = target.name == "keys.sqlite"
    works = check_writer(folder, truth, lost, index, draw, wrong)
    if index:  # what vanished from it leaves no trace: its keys are stored again
        wrong.pop("stored twice", None)
    shutil.rmtree(folder)
    found = {what: count for what, count in wrong.items() if count}
    return {"seed": seed, "damage": f"{kind} {target.name}", "lost": sum(map(len, lost.values())), "works": works, "wrong": found}


LOG_IDS: dict[str, str] = {}


def main(arguments: Sequence[str]) -> None:
    """Check the mutants of some seeds."""
    base, scratch = Path(arguments[0]), Path(arguments[1])
    LOG_IDS.update(json.loads((base.with_name("ids")).read_text()))
    for seed in range(int(arguments[2]), int(arguments[3])):
        sys.stdout.write(json.dumps(check(base, scratch / f"mutant-{seed}", seed)) + "\n")
        sys.stdout.flush()
    os._exit(0)  # a log that is damaged may have left threads that wait


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What is wrong with each."""
    folder = tmp_path_factory.mktemp("damage")
    base = folder / "log"
    build(base)
    assert bytes_of(base / "log-00000002.sqlite") > (base / "log-00000002.sqlite").stat().st_size  # its tail is there
    assert head_file(base / "log-00000002.sqlite").exists()
    (folder / "ids").write_text(json.dumps({path.name: segment(path).log_id for path in log_files(base)}))
    for path in base.glob("*-shm"):
        path.unlink()
    found = []
    for first in range(0, MUTANTS, CHUNK):
        command = [sys.executable, "-m", "tests.faults.test_log_damage", str(base), str(folder), str(first), str(first + CHUNK)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, (first, done.stdout.splitlines()[-1:], done.stderr[-2000:])
        found += [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == MUTANTS
    return found


def test_damage_is_told_and_nothing_altered_is_believed(mutants: list[dict[str, object]]) -> None:
    wrong = [mutant for mutant in mutants if mutant["wrong"]]
    harmed = sum(mutant["lost"] != 0 for mutant in mutants)
    total: Counter[str] = Counter()
    for mutant in wrong:
        total.update(mutant["wrong"])  # type: ignore[call-overload]
    works = sum(bool(mutant["works"]) for mutant in mutants)
    print(f"T7: seeds 0 to {MUTANTS - 1}, {harmed} with losses, {works} written on, wrong: {dict(total)}")  # noqa: T201
    assert harmed > MUTANTS // 5  # the rest hit free space, pages that a tail replaces, or the index
    assert wrong == []


if __name__ == "__main__":
    main(sys.argv[1:])
