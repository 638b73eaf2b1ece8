"""What every decision log does, wherever it keeps its entries: one run over the log in memory and the log on SQLite."""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bandits.log.files import log_files
from bandits.log.keys import open_keys, unindexed
from bandits.log.memory import MemoryLog
from bandits.log.port import DecisionLog, Entry, Kind, Outcome, Stored, beside, check_of, decision_key, reward_key, shown_key
from bandits.log.segments import gaps, records
from bandits.log.sqlite import DAY_NS, SqliteLog
from tests.faults.log_writer import entry_of

BEGIN = 1_700_000_000 * 10**9


class Bench:
    """A log, its clock, and what is in it."""

    def __init__(self, where: str, folder: Path) -> None:
        self.now, self.folder = BEGIN, folder
        self.sqlite = where == "sqlite"
        self.log: DecisionLog = SqliteLog(folder, clock=self.clock, reserve=1) if self.sqlite else MemoryLog(self.clock)

    def clock(self) -> int:
        """The time, as a test sets it."""
        return self.now

    def stored(self) -> list[Stored]:
        """All entries, in order."""
        if isinstance(self.log, MemoryLog):
            return list(self.log.entries)
        return [one for path in log_files(self.folder) for one in records(path)]

    def pass_window(self) -> None:
        """Let the retry window of all that is stored pass. On SQLite it begins when the file was sealed and indexed."""
        if isinstance(self.log, SqliteLog):
            keys = open_keys(self.folder)
            self.log.rotate_bytes = 0  # the next group seals what there is
            self.log.append([entry_of("seals")])
            self.log.rotate_bytes = 1 << 30
            wait_until(lambda: not unindexed(keys, self.folder))
            self.now += 8 * DAY_NS
            self.log.append([entry_of("seals by age")])  # and once that is indexed, the keeper forgets
            left = "SELECT count(*) FROM keys WHERE content != x'' AND key < x'65'"
            wait_until(lambda: not unindexed(keys, self.folder) and keys.execute(left).get == 1)
            keys.close()
        else:
            self.now += 8 * DAY_NS


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for another thread, whose end is not told."""
    ended = threading.Event()
    for _ in range(int(seconds * 200)):
        if holds():
            return
        ended.wait(0.005)
    raise AssertionError(f"did not come about within {seconds} s")


@pytest.fixture(params=["memory", "sqlite"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    one = Bench(request.param, tmp_path / "log")
    yield one
    one.log.close()


def test_an_entry_is_stored_and_answered(bench: Bench) -> None:
    entry = entry_of("a", answer=b"first answer")
    assert bench.log.append([entry]) == [Outcome("stored", b"first answer")]
    (found,) = bench.stored()
    assert found[1:] == (1, Kind.DECISION, entry.key, entry.content, entry.record, entry.answer)
    assert bench.log.find(entry.key) == found
    assert bench.log.find(decision_key("shop", "b")) is None
    assert bench.log.waiting == (0, 0)
    assert bench.log.expected_wait >= 0


def test_the_same_again_gets_the_first_answer_byte_for_byte(bench: Bench) -> None:
    bench.log.append([entry_of("a", answer=bytes(range(256)))])
    for _ in range(3):
        assert bench.log.append([entry_of("a", answer=b"another draw")]) == [Outcome("repeated", bytes(range(256)))]
    assert len(bench.stored()) == 1


def test_other_content_under_a_key_is_a_conflict_and_not_stored(bench: Bench) -> None:
    bench.log.append([entry_of("a", answer=b"first")])
    assert bench.log.append([entry_of("a", said="else")]) == [Outcome("conflict", b"")]
    assert [one.answer for one in bench.stored()] == [b"first"]
    assert bench.log.append([entry_of("a")]) == [Outcome("repeated", b"first")]


def test_a_conflict_that_is_kept_is_stored_beside_the_first_once(bench: Bench) -> None:
    first, other, third = entry_of("a"), entry_of("a", said="else", kept=True), entry_of("a", said="third", kept=True)
    bench.log.append([first])
    for _ in range(2):
        assert bench.log.append([other, third, other]) == [Outcome("conflict", b"")] * 3
    assert [one.key for one in bench.stored()] == [first.key, beside(other).key, beside(third).key]
    assert bench.log.find(beside(other).key) == bench.stored()[1]
    assert bench.log.append([first])[0] == Outcome("repeated", first.answer)


def test_duplicates_within_a_group_are_told_apart(bench: Bench) -> None:
    group = [entry_of("a", answer=b"1"), entry_of("b"), entry_of("a", answer=b"2"), entry_of("a", said="else"), entry_of("c")]
    states = bench.log.append(group)
    assert [one.state for one in states] == ["stored", "stored", "repeated", "conflict", "stored"]
    assert states[2].answer == b"1"
    assert [one.row for one in bench.stored()] == [1, 2, 3]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_large_group_is_stored_in_order(bench: Bench, fresh: bool) -> None:
    group = [
        entry_of(f"{number}")._replace(fresh=fresh) for number in range(1_000)
    ]  # above what a transaction takes, uneven in chunks
    assert bench.log.append([]) == []
    assert {one.state for one in bench.log.append(group)} == {"stored"}
    assert [(one.row, one.key) for one in bench.stored()] == [(row, entry.key) for row, entry in enumerate(group, 1)]
    assert bench.log.append(group) == [Outcome("repeated", entry.answer) for entry in group]


def test_kinds_of_a_decision_have_keys_of_their_own(bench: Bench) -> None:
    keys = [
        decision_key("shop", "a"), decision_key("sho", "pa"), shown_key("shop", "a"), reward_key("shop", "a", "paid", ""),
        reward_key("shop", "a", "pai", "d"), reward_key("shop", "a", "paid", "1"),
    ]  # fmt: skip
    kinds = [Kind.DECISION, Kind.DECISION, Kind.SHOWN, Kind.REWARD, Kind.REWARD, Kind.QUARANTINED]
    entries = [Entry(kind, key, b"c", b"", b"") for kind, key in zip(kinds, keys, strict=True)]
    assert {one.state for one in bench.log.append(entries)} == {"stored"}
    assert [one.kind for one in bench.stored()] == kinds
    assert len({check_of(entry) for entry in entries}) == len(entries)


def test_threads_that_send_the_same_get_one_answer(bench: Bench) -> None:
    """On SQLite two threads wait for their own; the log in memory is one thread's."""
    if isinstance(bench.log, MemoryLog):
        found = [outcome for _ in range(2) for outcome in bench.log.append([entry_of(f"{number}") for number in range(100)])]
    else:
        results: list[list[Outcome]] = [[], []]
        start = threading.Barrier(2)

        def send(into: list[Outcome]) -> None:
            start.wait()
            for number in range(100):
                into += bench.log.append([entry_of(f"{number}")])

        threads = [threading.Thread(target=send, args=(into,)) for into in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = results[0] + results[1]
    assert sorted(one.state for one in found) == ["repeated"] * 100 + ["stored"] * 100
    assert [one.answer for one in found[:100]] == [one.answer for one in found[100:]]
    assert len({one.key for one in bench.stored()}) == len(bench.stored()) == 100


def test_each_of_many_submitted_is_told_once(bench: Bench) -> None:
    told: queue.SimpleQueue[tuple[int, Outcome | Exception]] = queue.SimpleQueue()
    for number in range(2_000):
        bench.log.submit(entry_of(f"{number % 1_500}"), lambda outcome, number=number: told.put((number, outcome)))  # type: ignore[misc]
    found = dict(told.get(timeout=10) for _ in range(2_000))
    assert told.empty()
    states = [found[number].state for number in range(2_000)]  # type: ignore[union-attr]
    assert states == ["stored"] * 1_500 + ["repeated"] * 500
    assert [one.row for one in bench.stored()] == list(range(1, 1_501))
    wait_until(lambda: bench.log.waiting == (0, 0))


def test_rewards_are_known_for_good(bench: Bench) -> None:
    """A repeat of a reward may come after any time, and is then no other reward."""
    reward = Entry(Kind.REWARD, reward_key("shop", "a", "paid", "e"), b"0.5", b"half", kept=True)
    bench.log.append([entry_of("a"), reward])
    bench.pass_window()
    before = len(bench.stored())
    assert bench.log.append([reward])[0].state == "repeated"
    assert len(bench.stored()) == before
    other = reward._replace(content=b"0.9", record=b"more")
    assert [bench.log.append([other])[0].state for _ in range(2)] == ["conflict", "conflict"]
    assert [one.record for one in bench.stored()[before:]] == [b"more"]  # kept beside the first, once


def test_after_the_retry_window_a_key_is_known_and_never_stored_anew(bench: Bench) -> None:
    entry = entry_of("a")
    bench.log.append([entry])
    bench.now += 6 * DAY_NS
    assert bench.log.append([entry]) == [Outcome("repeated", entry.answer)]
    bench.pass_window()
    before = len(bench.stored())
    for again in (entry, entry_of("a", said="else"), entry_of("a", said="else", kept=True), entry._replace(fresh=False)):
        assert bench.log.append([again]) == [Outcome("expired", b"")]
    assert len(bench.stored()) == before
    assert bench.log.find(entry.key) == bench.stored()[0]  # what was logged stays readable
    assert bench.log.append([entry_of("b")])[0].state == "stored"


class Model:
    """The contract in a dict."""

    def __init__(self) -> None:
        self.kept: dict[bytes, Entry] = {}

    def store(self, entry: Entry) -> Outcome:
        first = self.kept.setdefault(entry.key, entry)
        if first is entry:
            return Outcome("stored", entry.answer)
        if first.content == entry.content:
            return Outcome("repeated", first.answer)
        if entry.kept:
            self.kept.setdefault(beside(entry).key, beside(entry))
        return Outcome("conflict", b"")


entries = st.builds(
    entry_of,
    st.sampled_from("abcdef"),
    said=st.sampled_from(["", "else"]),
    kept=st.booleans(),
    answer=st.binary(min_size=1, max_size=3),
)
steps = st.lists(st.one_of(st.lists(entries, min_size=1, max_size=8), st.sampled_from(["restart", "rotate"])), max_size=12)


@pytest.mark.parametrize("where", ["memory", "sqlite"])
@settings(max_examples=50)
@given(steps=steps)
def test_any_sequence_does_what_a_dict_does(where: str, steps: list[list[Entry] | str]) -> None:
    folder = Path(tempfile.mkdtemp())
    bench, model = Bench(where, folder), Model()
    try:
        for step in steps:
            if isinstance(step, list):
                assert bench.log.append(step) == [model.store(entry) for entry in step]
            elif isinstance(bench.log, SqliteLog) and step == "restart":
                bench.log.close()
                bench.log = SqliteLog(folder, clock=bench.clock, reserve=1)
            elif isinstance(bench.log, SqliteLog):
                bench.now += 2 * 3600 * 10**9  # older than an hour: the next group begins a file
        found = bench.stored()
        # in whatever order: what contradicts is kept once its group is stored
        assert sorted((one.key, one.content, one.record, one.answer) for one in found) == sorted(
            e[1:5] for e in model.kept.values()
        )
        assert [bench.log.find(one.key) for one in found] == found
        assert not [gap for path in log_files(folder) for gap in gaps(path)]
    finally:
        bench.log.close()
        shutil.rmtree(folder)
