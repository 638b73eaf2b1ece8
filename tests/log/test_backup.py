"""Backups of a log that is written to, damaged or rotated, and killed ones: all that was acknowledged before is in them, whole."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from bandits.backup import Saved, Source, back_up, read_manifest, restore
from bandits.log.files import head_file, log_files, reading, writing
from bandits.log.keys import open_keys, unindexed
from bandits.log.port import Entry, Kind, Outcome, decision_key
from bandits.log.segments import find, gaps, records, segment
from bandits.log.sqlite import SqliteLog
from bandits.registry import Registry
from ope.data import InputError
from serving.setup import initialise
from tests.serving.points import AD_LOAD, golden, linear, promote
from tests.serving.server import within

SMALL = 40_000
"""Bytes at which files are sealed here: some tens of entries."""


def entry_of(name: str) -> Entry:
    said = name.encode()
    return Entry(Kind.DECISION, decision_key("shop", name), b"asked " + said, b"decided " + said * 40, b"told " + said)


def source_of(folder: Path) -> Source:
    return Source(folder / "propel.toml", ("ad-load.toml",), "registry", "data")


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """A folder from which a service starts; nothing is logged yet."""
    return initialise(tmp_path / "shop").config.parent


@contextmanager
def log_of(folder: Path, rotate_bytes: int = SMALL) -> Iterator[SqliteLog]:
    log = SqliteLog(folder / "data" / "log", rotate_bytes=rotate_bytes, reserve=1)
    try:
        yield log
    finally:
        log.close()


def write(folder: Path, names: list[str], rotate_bytes: int = SMALL) -> None:
    """Log entries, some together, and end."""
    with log_of(folder, rotate_bytes) as log:
        for start in range(0, len(names), 10):
            log.append([entry_of(name) for name in names[start : start + 10]])


@contextmanager
def ended(thread: threading.Thread, ending: threading.Event) -> Iterator[None]:
    """A thread that runs meanwhile."""
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    """Everything below a folder that a service keeps."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bad(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as raised:
        call()
    return str(raised.value)


def test_what_is_restored_is_what_was_saved(service: Path, tmp_path: Path) -> None:
    names = [f"{number}" for number in range(100)]
    write(service, names)
    promote(service / "registry", AD_LOAD)
    made = back_up(source_of(service), tmp_path / "backup", clock=lambda: 1_700_000_000 * 10**9)
    done = restore(tmp_path / "backup", tmp_path / "new")
    assert done.wrong == ()
    assert done.config == tmp_path / "new" / "propel.toml"
    assert made.manifest.made_at == "2023-11-14T22:13:20+00:00"
    before, after = contents(service), contents(tmp_path / "new")
    assert {name: raw for name, raw in after.items() if "/log/" not in name and "sqlite" not in name} == {
        name: raw for name, raw in before.items() if "/log/" not in name and "sqlite" not in name and "lock" not in name
    }
    logs = [log_files(folder / "data" / "log") for folder in (service, tmp_path / "new")]
    assert [one for path in logs[0] for one in records(path)] == [one for path in logs[1] for one in records(path)]
    assert Registry(tmp_path / "new" / "registry").ledger() == Registry(service / "registry").ledger()
    assert len(logs[1]) > 2
    for name in ("data/secret.key", "data/salts.toml", "data/keys.toml", "registry/signing.key"):
        assert stat.S_IMODE((tmp_path / "new" / name).stat().st_mode) == 0o600
    for folder in (tmp_path / "backup", tmp_path / "backup" / "files", tmp_path / "new", tmp_path / "new" / "data"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "backup").rglob("*") if path.is_file()} == {0o600}


def test_a_restored_log_goes_on_under_another_id(service: Path, tmp_path: Path) -> None:
    """Rows of one log id are taken into the lake once: a number given again under it would be lost there."""
    names = [f"{number}" for number in range(25)]
    with log_of(service, rotate_bytes=1 << 30) as log:
        log.append([entry_of(name) for name in names])
        back_up(source_of(service), tmp_path / "backup")
        log.append([entry_of("later")])
        restore(tmp_path / "backup", tmp_path / "new")
        (path,) = log_files(service / "data" / "log")
        (copy,) = log_files(tmp_path / "new" / "data" / "log")
        assert (segment(path).sealed, segment(path).last_row) == (False, 26)
        assert (segment(copy).sealed, segment(copy).last_row, segment(copy).log_id) == (True, 25, segment(path).log_id)
        assert head_file(copy).read_bytes() == (25).to_bytes(8, "little")
    with log_of(tmp_path / "new", rotate_bytes=1 << 30) as log:
        assert log.append([entry_of(name) for name in names]) == [Outcome("repeated", entry_of(name).answer) for name in names]
        assert log.append([entry_of("3")._replace(content=b"else")]) == [Outcome("conflict", b"")]
        assert log.append([entry_of("later")])[0].state == "stored"  # it was acknowledged after the backup: that much is lost
    copy, new = log_files(tmp_path / "new" / "data" / "log")
    assert [(one.row, one.key) for one in records(new)] == [(1, decision_key("shop", "later"))]
    assert segment(new).log_id not in (segment(copy).log_id, segment(path).log_id)
    assert gaps(copy) == gaps(new) == []


def test_backups_of_a_log_that_is_written_to_and_rotated(service: Path, tmp_path: Path) -> None:
    acknowledged: list[str] = []
    ending = threading.Event()

    def write_on(log: SqliteLog) -> None:
        while not ending.is_set():
            some = [f"{len(acknowledged) + at}" for at in range(7)]
            assert {told.state for told in log.append([entry_of(name) for name in some])} == {"stored"}
            acknowledged.extend(some)

    with log_of(service, 10 * SMALL) as log, ended(threading.Thread(target=write_on, args=[log]), ending):
        for number in range(3):
            while len(acknowledged) < 500 * (number + 1):
                time.sleep(0.01)
            before = list(acknowledged)
            made = back_up(source_of(service), tmp_path / "backup")
            shutil.copytree(tmp_path / "backup", tmp_path / f"backup{number}")
            assert restore(tmp_path / f"backup{number}", tmp_path / f"new{number}").wrong == ()
            logged = tmp_path / f"new{number}" / "data" / "log"
            saved = {one.key for path in log_files(logged) for one in records(path)}
            assert {decision_key("shop", name) for name in before} <= saved
            with log_of(tmp_path / f"new{number}") as again:  # an index that knew more than the files would say "repeated" below
                told = {name: again.append([entry_of(name)])[0].state for name in before[-20:] + acknowledged[-20:]}
                expected = {name: "repeated" if decision_key("shop", name) in saved else "stored" for name in told}
                assert told == expected
                again.append([entry_of(f"new-{at}") for at in range(100)])
                assert again.append([entry_of("new-0")])[0].state == "repeated"
            assert all(find(logged, decision_key("shop", name)) is not None for name in told)
            assert not [path for path in log_files(logged) if gaps(path)]
            files = [one for one in made.manifest.files if "/log-" in one.path and one.path.endswith(".sqlite")]
            assert {one.gaps for one in files} == {()}
    assert len(log_files(service / "data" / "log")) > 4


def test_the_index_of_a_backup_knows_nothing_that_its_files_lack(service: Path, tmp_path: Path) -> None:
    """The log is rotated, and its keys are indexed, after the last file was copied and before the index is."""
    logged = service / "data" / "log"
    write(service, [f"{number}" for number in range(30)], rotate_bytes=1 << 30)
    told = list[int]()

    def go_on(done: int, total: int) -> None:
        told.append(done)
        if len(told) == 2:  # the secret, and the one file so far
            write(service, [f"later-{number}" for number in range(200)], rotate_bytes=1 << 30)
            write(service, [f"last-{number}" for number in range(100)])
            with closing(reading(logged / "keys.sqlite")) as keys:
                assert keys.execute("SELECT count(*) FROM keys WHERE file = 1").get == 230

    back_up(source_of(service), tmp_path / "backup", progress=go_on)
    assert len(log_files(logged)) > 2
    restore(tmp_path / "backup", tmp_path / "new")
    with closing(reading(tmp_path / "new" / "data" / "log" / "keys.sqlite")) as keys:
        assert keys.execute("SELECT (SELECT count(*) FROM keys), (SELECT count(*) FROM files)").get == (0, 0)
    write(tmp_path / "new", [f"later-{number}" for number in range(200)])
    assert sum(1 for path in log_files(tmp_path / "new" / "data" / "log") for _ in records(path)) == 230


def test_files_that_are_compacted_meanwhile(service: Path, tmp_path: Path) -> None:
    """A number that a note names is deleted: those of files that are in the backup, or will be made anew, must not be in it."""
    write(service, [f"{number}" for number in range(100)])
    logged = service / "data" / "log"
    first, second, third, *_ = log_files(logged)
    told = list[int]()

    def compact(*paths: Path) -> None:
        with (logged / "compacted.jsonl").open("a") as note:
            note.writelines(json.dumps({"file": int(path.stem[4:]), "log_id": segment(path).log_id}) + "\n" for path in paths)
        for path in paths:
            path.unlink()
            head_file(path).unlink()

    def go_on(done: int, total: int) -> None:
        told.append(done)
        if len(told) == 3:  # the secret, the second file and its head
            write(service, [f"later-{number}" for number in range(200)])
            compact(second, third, *log_files(logged)[-4:-1])

    compact(first)
    made = back_up(source_of(service), tmp_path / "backup", progress=go_on).manifest
    assert not [one for one in made.files if one.path.endswith(third.name)]
    restore(tmp_path / "backup", tmp_path / "new")
    copied = tmp_path / "new" / "data" / "log"
    assert [json.loads(line)["file"] for line in (copied / "compacted.jsonl").read_text().splitlines()] == [1, 3]
    assert log_files(copied)[0].name == second.name
    with log_of(tmp_path / "new") as log:
        asked = [entry_of(f"{number}") for number in range(100)]
        assert log.append(asked) == [Outcome("repeated", one.answer) for one in asked]
    (logged / "compacted.jsonl").write_text("{\n")
    assert "compacted.jsonl: found" in bad(lambda: back_up(source_of(service), tmp_path / "backup"))


def test_a_log_of_which_all_but_an_empty_file_is_compacted(service: Path, tmp_path: Path) -> None:
    """Its next file must not have a number that the index and the note know."""
    logged = service / "data" / "log"
    log = SqliteLog(logged, rotate_seconds=0.01, reserve=1)
    log.append([entry_of("one")])
    within(10, lambda: len(log_files(logged)) == 2)  # sealed while nobody writes
    with closing(open_keys(logged)) as keys:
        within(10, lambda: not unindexed(keys, logged))
    log.close()
    (logged / "compacted.jsonl").write_text('{"file": 1}\n')
    log_files(logged)[0].unlink()
    back_up(source_of(service), tmp_path / "backup")
    assert restore(tmp_path / "backup", tmp_path / "new").wrong == ()
    with log_of(tmp_path / "new") as log:
        assert log.append([entry_of("one"), entry_of("two")]) == [
            Outcome("repeated", entry_of("one").answer), Outcome("stored", entry_of("two").answer)
        ]  # fmt: skip
    found = [segment(path) for path in log_files(tmp_path / "new" / "data" / "log")]
    assert [(one.path.name, one.sealed, one.last_row) for one in found] == [
        ("log-00000002.sqlite", True, 0), ("log-00000003.sqlite", False, 1)
    ]  # fmt: skip
    assert found[0].log_id == segment(log_files(logged)[0]).log_id


def test_a_second_backup_copies_what_is_new(service: Path, tmp_path: Path) -> None:
    names = [f"{number}" for number in range(200)]
    write(service, names[:100])
    first = back_up(source_of(service), tmp_path / "backup")
    assert first.copied == sum({one.sha256: one.size for one in first.manifest.files}.values())
    files = tmp_path / "backup" / "files"
    before = {path.name: path.stat().st_ino for path in files.iterdir()}
    write(service, names[100:])
    second = back_up(source_of(service), tmp_path / "backup")
    after = {path.name: path.stat().st_ino for path in files.iterdir()}
    listed = {one.sha256: one.size for one in second.manifest.files}
    assert after.keys() == listed.keys()
    assert second.copied == sum(size for name, size in listed.items() if name not in before)
    sealed = {one.path: one for one in first.manifest.files if one.log_id}
    assert len(sealed) > 2
    assert sealed.items() <= {one.path: one for one in second.manifest.files}.items()
    assert {before[one.sha256] for one in sealed.values()} <= set(after.values())  # the same files, not such as are equal
    third = back_up(source_of(service), tmp_path / "backup")
    assert third.manifest.files == second.manifest.files
    assert third.copied == 0


def test_damage_is_named_and_nothing_is_restored(service: Path, tmp_path: Path) -> None:
    write(service, [f"{number}" for number in range(30)])
    promote(service / "registry", AD_LOAD)
    folder = tmp_path / "backup"
    manifest = back_up(source_of(service), folder).manifest
    rng = np.random.default_rng(0)
    for one in (*manifest.files, None):
        path = folder / "manifest.json" if one is None else folder / "files" / one.sha256
        whole = path.read_bytes()
        at, bit = rng.integers(len(whole)), rng.integers(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        told = bad(lambda: restore(folder, tmp_path / "new"))
        assert (one.path if one else "manifest.json") in told
        path.unlink()
        told = bad(lambda: restore(folder, tmp_path / "new"))
        assert (one.path if one else "manifest.json") in told
        path.write_bytes(whole)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["backup", "shop"]
    assert restore(folder, tmp_path / "new").wrong == ()


def test_a_damaged_file_does_not_replace_its_good_copy(service: Path, tmp_path: Path) -> None:
    write(service, [f"{number}" for number in range(100)])
    first = back_up(source_of(service), tmp_path / "backup").manifest
    oldest, second = log_files(service / "data" / "log")[:2]
    whole = oldest.read_bytes()
    oldest.write_bytes(bytes(4096) + whole[4096:])
    again = {one.path: one for one in back_up(source_of(service), tmp_path / "backup").manifest.files}
    kept = next(one for one in first.files if one.path.endswith(oldest.name))
    assert again[kept.path] == kept
    assert (tmp_path / "backup" / "files" / kept.sha256).read_bytes() == whole

    with closing(writing(second)) as damaged:  # and where there is no good copy, what there is is kept, and told
        damaged.execute("UPDATE entries SET record = x'00' WHERE row IN (3, 4)")
        damaged.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    made = back_up(source_of(service), tmp_path / "other").manifest
    told = {one.path.rpartition("/")[2]: one.gaps for one in made.files if one.gaps}
    assert told.pop(oldest.name)[0][0] == 1
    assert told == {second.name: ((3, 4),)}
    wrong = restore(tmp_path / "other", tmp_path / "new").wrong
    assert [each.partition(": ")[2] for each in wrong][1:] == ["found rows 3 to 4 damaged or missing"]


def test_an_artifact_that_is_pruned_meanwhile(service: Path, tmp_path: Path) -> None:
    registry = Registry(service / "registry")
    doomed, served = (registry.register(linear(AD_LOAD, seed), AD_LOAD, name="linear", golden=golden(AD_LOAD)) for seed in (0, 1))
    registry.promote(served, who="tests", why="first")
    pipe = min(registry.path(doomed), registry.path(served)) / "manifest.json"  # the first that is copied waits here for the prune
    raw = pipe.read_bytes()
    if pipe.parent.name == served:
        pipe = registry.path(doomed) / "manifest.json"
        raw = pipe.read_bytes()
    pipe.unlink()
    os.mkfifo(pipe)

    def prune() -> None:
        with pipe.open("wb") as waiting:  # open as soon as it is being read: the ledger that lists it is copied
            assert registry.prune(keep=0) == [doomed]
            waiting.write(raw)

    thread = threading.Thread(target=prune)
    thread.start()
    made = back_up(source_of(service), tmp_path / "backup").manifest
    thread.join()
    assert {one.path.split("/")[2] for one in made.files if "/artifacts/" in one.path} == {served}
    assert restore(tmp_path / "backup", tmp_path / "new").wrong == ()
    assert list(Registry(tmp_path / "new" / "registry").listed()) == [served]


def test_an_artifact_that_is_lost_is_told(service: Path, tmp_path: Path) -> None:
    promote(service / "registry", AD_LOAD)
    (path,) = (service / "registry" / "artifacts").glob("*/arrays.npz")
    path.unlink()
    assert str(path) in bad(lambda: back_up(source_of(service), tmp_path / "backup"))


def test_what_is_refused(service: Path, tmp_path: Path) -> None:
    source = source_of(service)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("other")
    assert "other.txt, which is not of a backup" in bad(lambda: back_up(source, tmp_path / "full"))
    back_up(source, tmp_path / "backup")
    assert "found something there" in bad(lambda: restore(tmp_path / "backup", tmp_path / "full"))
    assert "found something there" in bad(lambda: restore(tmp_path / "backup", tmp_path / "full" / "other.txt"))
    assert "manifest.json: No such file" in bad(lambda: restore(tmp_path / "full", tmp_path / "new"))
    other = initialise(tmp_path / "other").config.parent
    assert "another data/secret.key" in bad(lambda: back_up(source_of(other), tmp_path / "backup"))
    for data in (str(service / "data"), "../shop/data"):
        moved = Source(source.settings, source.decision_points, source.registry, data)
        assert "serve.data: found" in bad(lambda moved=moved: back_up(moved, tmp_path / "backup"))  # type: ignore[misc]
    (tmp_path / "empty").mkdir()
    assert restore(tmp_path / "backup", tmp_path / "empty").wrong == ()


def test_data_behind_a_link_is_saved(service: Path, tmp_path: Path) -> None:
    (service / "data").rename(tmp_path / "disk")
    (service / "data").symlink_to(tmp_path / "disk")
    write(service, ["one"])
    back_up(source_of(service), tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "new")
    assert not (tmp_path / "new" / "data").is_symlink()
    assert find(tmp_path / "new" / "data" / "log", decision_key("shop", "one")) is not None


KILLED = """
import json, os, signal, sys
from pathlib import Path
from bandits.backup import Source, back_up

source = Source(Path(sys.argv[1]) / "propel.toml", ("ad-load.toml",), "registry", "data")
CHANGES = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir")

def run(folder, kill_at):
    seen = 0
    def hook(event, given):
        nonlocal seen
        if event in CHANGES and folder in str(given[0]):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    back_up(source, Path(folder))
    return seen

for line in sys.stdin:
    folder, kill_at = json.loads(line)
    out, into = os.pipe()
    if (child := os.fork()) == 0:
        os.write(into, b"%d" % run(folder, kill_at))
        os._exit(0)
    os.close(into)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, int(os.read(out, 20) or 0)]), flush=True)
    os.close(out)
"""
"""Makes backups in children that kill themselves when they are about to change the folder for the nth time."""


def test_a_killed_backup_leaves_the_one_before_whole(service: Path, tmp_path: Path) -> None:
    write(service, [f"{number}" for number in range(30)])
    first = back_up(source_of(service), tmp_path / "first").manifest
    write(service, [f"{number}" for number in range(30, 60)])
    command = [sys.executable, "-c", KILLED, str(service)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin is not None
        assert killer.stdout is not None

        def killed(folder: Path, at: int) -> tuple[int, int]:
            assert killer.stdin is not None
            assert killer.stdout is not None
            shutil.copytree(tmp_path / "first", folder)
            killer.stdin.write(json.dumps([str(folder), at]) + "\n")
            killer.stdin.flush()
            status, seen = json.loads(killer.stdout.readline())
            return status, seen

        status, changes = killed(tmp_path / "whole", 0)
        assert status == 0
        whole = read_manifest(tmp_path / "whole").files
        found = list[tuple[Saved, ...]]()
        for at in sorted({*range(1, changes, max(1, changes // 8)), *range(changes - 4, changes + 1)}):
            folder = tmp_path / f"killed{at}"
            assert killed(folder, at)[0] == -9
            found.append(read_manifest(folder).files)
            assert found[-1] in (first.files, whole)
            restored = restore(folder, tmp_path / f"new{at}")
            assert restored.wrong == ()
            again = back_up(source_of(service), folder).manifest
            assert again.files == whole
            assert {each.name for each in (folder / "files").iterdir()} == {one.sha256 for one in whole}
            assert {each.name for each in folder.iterdir()} == {"files", "lock", "manifest.json"}
    assert {first.files, whole} == set(found)  # kills before the manifest was replaced, and after
