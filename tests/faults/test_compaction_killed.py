"""T8: compaction killed at any of its storage calls, and beside a log that is written to: each record is somewhere, and once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import pytest

from bandits.log.files import COMPACTED, log_files
from bandits.log.files import writing as connected
from bandits.log.keys import open_keys, unindexed
from bandits.log.port import Stored
from bandits.log.segments import find, gaps, records
from bandits.log.sqlite import SqliteLog
from pipelines.log.audit import audit
from pipelines.log.compact import compact, noted
from pipelines.log.held import TABLES
from pipelines.nightly.lake import CURRENT, open_lake
from pipelines.nightly.settings import Settings
from tests.faults.killed_nights import Parent, parents, take
from tests.faults.live_server import show
from tests.faults.steady_writer import entry_of, repeated
from tests.log.test_contract import wait_until
from tests.nightly.events import records as rows
from tests.nightly.events import reward, settings, shown
from tests.nightly.logged import append, entries

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")

FULL = "PROPEL_KILLS" in os.environ
CALLS = ("write", "pwrite64", "fsync", "fdatasync", "ftruncate", "rename", "unlink")

FEW = {"pwrite64": 1, "fsync": 1, "rename": 1, "unlink": 3}
"""Kills at each kind of call, where not every call is met."""

OURS = [entry_of(f"d{at:02d}", at) for at in range(40)]
THEIRS = [entry_of(f"t{at:02d}", at, "other") for at in range(10)]
LATEST = [entry_of("latest", 99)]

Number = tuple[str, int]

serving = pytest.fixture(scope="module")(parents)


def lakes(folder: Path) -> list[Settings]:
    """Settings of both tenants; what the folder's file says is those of the first."""
    return [settings(folder, tenant=tenant, more="[lake]\nbuckets = 2\n") for tenant in ("other", "tenant")][::-1]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of two sealed files, all in the lakes of two tenants, and one that is written to."""
    folder = tmp_path_factory.mktemp("before") / "folder"
    later = entries([], [reward(f"d{at:02d}", at / 100, at=at + 30) for at in range(30)], [shown("d01", "a", at=9)])
    aside = entries([], [reward("nobody", at=5), reward("d01", 0.5, at=40)], quarantined=[reward("d02", 9.0, at=40)])
    groups = (iter(OURS[:20]), iter([*OURS[20:], *THEIRS, *later, *aside]), iter(LATEST))
    config = lakes(folder)[0]
    append(config.log, *groups, apart=True)
    for each in lakes(folder):
        take(each)
    return folder


def in_log(folder: Path) -> dict[Number, Stored]:
    """What the files hold."""
    return {(one.log_id, one.row): one for path in log_files(folder) for one in records(path)}


def in_lakes(folder: Path) -> Counter[Number]:
    """How often the lists of the lakes name each record."""
    found = Counter[Number]()
    for lake in map(open_lake, lakes(folder)):
        for table in TABLES:
            found.update((row["log_id"], row["log_row"]) for row in rows(lake, lake.snapshot().find(table)))
    return found


def check(folder: Path, every: Mapping[Number, Stored]) -> None:
    """Each record is in a file as it was written, or in a lake, where it is once; nothing is there that nobody appended."""
    log = lakes(folder)[0].log
    left, held = in_log(log), in_lakes(folder)
    assert left.keys() | held.keys() == every.keys()
    assert set(held.values()) == {1}
    assert all(every[number] == one for number, one in left.items())
    assert [gaps(path) for path in log_files(log)] == [[]] * len(log_files(log))
    assert all(find(log, one.key) in (one, None) for one in list(every.values())[::7])
    found = audit(lakes(folder)[0])
    assert (found.appends, found.missing, found.findings) == (len(every), 0, [])


def answers_as_before(log: Path) -> bool:
    """Whether a log that is opened there knows every decision, and answers it as the first time."""
    with closing(SqliteLog(log, reserve=1)) as one:
        return repeated(one, *OURS, *THEIRS, *LATEST)


def end(folder: Path) -> dict[str, object]:
    """What is left of a compaction: files and what lies beside those that are gone, the note, the lake."""
    log = folder / "data" / "log"
    files = [path.name for path in log_files(log)]
    return {
        "files": files,
        "beside": sorted(path.name for path in log.glob("log-*") if not path.name.startswith(tuple(name[:12] for name in files))),
        "note": (log / COMPACTED).read_bytes(),
        "lake": (open_lake(lakes(folder)[0]).folder / CURRENT).read_bytes(),
    }


@needs_strace
def test_a_killed_compaction_loses_and_doubles_nothing_and_is_finished_by_the_next(
    serving: Parent, before: Path, tmp_path: Path
) -> None:
    every = in_log(lakes(before)[0].log)
    assert len(every) == 40 + 10 + 30 + 1 + 3 + 1
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    shutil.copytree(before, undisturbed)
    status, calls = serving.run(undisturbed, "compact", "count")
    assert status == 0
    expected = end(undisturbed)
    assert (expected["files"], expected["beside"]) == (["log-00000003.sqlite"], [])
    check(undisturbed, every)
    points = [(call, when) for call in CALLS for when in range(1, calls[call] + 1)]
    if not FULL:
        points = [(call, 1 + (2 * at + 1) * calls[call] // (2 * n)) for call, n in FEW.items() for at in range(n)]
    for call, when in points:
        shutil.copytree(before, killed)
        status, _ = serving.run(killed, "compact", call, when)
        assert status == -signal.SIGKILL, f"not killed at {call} {when}"
        check(killed, every)
        assert answers_as_before(lakes(killed)[0].log)
        assert serving.run(killed, "compact")[0] == 0, f"does not go on after {call} {when}"
        assert end(killed) == expected
        assert answers_as_before(lakes(killed)[0].log)
        shutil.rmtree(killed)
    show(f"T8: {len(points)} kills, {len(every)} records, 0 lost, 0 twice; calls {calls}")


@contextmanager
def writing(log: Path, ledger: Path) -> Iterator[None]:
    """A process that appends meanwhile, and ends well."""
    process = subprocess.Popen([sys.executable, "-m", "tests.faults.steady_writer", str(log), str(ledger)])
    try:
        yield
        process.terminate()
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def sealed_and_indexed(log: Path) -> int:
    """Files that may go."""
    if not log_files(log):
        return 0
    with closing(open_keys(log)) as keys:
        return len(log_files(log)) - 1 - len(unindexed(keys, log))


@needs_strace
def test_compaction_beside_a_log_that_is_written_to_loses_nothing(serving: Parent, tmp_path: Path) -> None:
    """Ingest, a compaction that is killed, and one that is not, again and again, while files fill and repeats are asked for."""
    config, ledger = lakes(tmp_path)[0], tmp_path / "ledger"
    points = [("rename", 1), ("unlink", 3), ("fsync", 4), ("unlink", 6), ("unlink", 1), ("write", 2)]
    every: dict[Number, Stored] = {}
    kills = 0
    with writing(config.log, ledger):
        for call, when in points * 2 if FULL else points[:2]:
            wait_until(lambda: sealed_and_indexed(config.log) >= 2)
            take(config)
            every |= in_log(config.log)
            kills += serving.run(tmp_path, "compact", call, when)[0] == -signal.SIGKILL
            assert serving.run(tmp_path, "compact")[0] == 0
    every |= in_log(config.log)
    take(config)
    names = ledger.read_text().split()
    lake = open_lake(config)
    assert sorted(row["decision_id"] for row in rows(lake, lake.snapshot().find("decisions"))) == sorted(names)
    check(tmp_path, every)
    assert len(every) == len(names)
    assert len(noted(config.log)) >= 2
    began = time.monotonic()
    with closing(SqliteLog(config.log, reserve=1)) as log:
        assert repeated(log, *(entry_of(name, int(name.removeprefix("live-"))) for name in names))
    show(
        f"T8 beside a writer: {kills} kills, {len(noted(config.log))} files compacted, {len(names)} records, 0 lost, 0 twice; "
        f"all asked for again in {time.monotonic() - began:.1f} s"
    )
    assert kills


@pytest.mark.parametrize("wrote", [False, True])
def test_a_process_that_was_idle_while_its_file_was_compacted_goes_on_in_the_newest(wrote: bool, tmp_path: Path) -> None:
    """Not in one whose number is used up: the index and the note say of it what is true of another. `wrote`: at all, before."""
    config = lakes(tmp_path)[0]
    with closing(SqliteLog(config.log, reserve=1)) as idle, closing(SqliteLog(config.log, reserve=1, rotate_bytes=1)) as busy:
        if wrote:
            idle.append([entry_of("early")])
        for one in OURS[:4]:
            busy.append([one])
        take(config)
        (first, *_), files = log_files(config.log), set(log_files(config.log))

        def gone() -> bool:
            compact(config, older_than_days=0)
            return not first.exists()

        wait_until(gone)
        used_up = files - set(log_files(config.log))
        assert idle.append([entry_of("late")])[0].state == "stored"
        assert repeated(idle, *OURS[:4])
        assert not used_up & set(log_files(config.log))
    compact(config, older_than_days=0)
    assert find(config.log, entry_of("late").key) is not None
    assert audit(config, attempted=["late"], acknowledged=["late"]).findings == []


def test_a_file_that_is_gone_does_not_come_back_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(apsw.CantOpenError):
        connected(tmp_path / "log-00000001.sqlite")
    assert not list(tmp_path.iterdir())
