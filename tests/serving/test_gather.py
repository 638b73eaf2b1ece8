"""Groups on their way to the log: each entry told once, groups few and large where the loop is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from bandits.log.port import Done, Entry, Kind, LogUnavailableError, Outcome
from serving.gather import IDLE, LOADED, PATIENCE, Gathering

Told = list[tuple[int, Outcome | Exception]]


class HeldLog:
    """Takes groups, and settles each when told to."""

    full, failed, last_group, waiting, expected_wait = False, None, 0, (0, 0), 0.001

    def __init__(self) -> None:
        self.groups: list[list[tuple[Entry, Done]]] = []
        self.closed = False

    def submit_all(self, entries: list[tuple[Entry, Done]]) -> None:
        self.groups.append(entries)

    def settle(self, group: int, outcome: Outcome | Exception | None = None) -> None:
        for entry, done in self.groups[group]:
            done(outcome or Outcome("stored", entry.answer))

    def close(self) -> None:
        self.closed = True


def entry(number: int) -> Entry:
    return Entry(Kind.DECISION, b"key %d" % number, b"content", b"record", b"answer %d" % number)


def run(story: Callable[[Gathering, HeldLog, Callable[[int], None], Told], Awaitable[None]]) -> None:
    """Tell a story on a loop: what is submitted by number, and what each was told."""

    async def told() -> None:
        log, found = HeldLog(), Told()
        gathering = Gathering(log, asyncio.get_running_loop())  # type: ignore[arg-type]
        await story(gathering, log, lambda number: gathering.submit(entry(number), lambda one: found.append((number, one))), found)

    asyncio.run(told())


def numbers(log: HeldLog) -> list[list[int]]:
    return [[int(one.key.split()[1]) for one, _ in group] for group in log.groups]


def test_an_idle_loop_sends_each_at_once() -> None:
    async def story(gathering: Gathering, log: HeldLog, submit: Callable[[int], None], found: Told) -> None:
        for number in range(3):
            submit(number)
        assert numbers(log) == [[0], [1], [2]]
        for group in range(3):
            log.settle(group)
        assert found == [(number, Outcome("stored", b"answer %d" % number)) for number in range(3)]

    run(story)


def test_a_loaded_loop_waits_for_others_but_not_for_long() -> None:
    async def story(gathering: Gathering, log: HeldLog, submit: Callable[[int], None], found: Told) -> None:
        loop = asyncio.get_running_loop()
        gathering.adapt(1.0)
        submit(0)
        began = loop.time()
        submit(1)
        submit(2)
        assert numbers(log) == [[0]]
        assert gathering.waiting == (2, 2 * entry(0).size)
        assert 0.001 < gathering.expected_wait <= 0.001 + PATIENCE  # the log's own, and what is left of the wait
        while len(log.groups) == 1:
            await asyncio.sleep(0)
        assert loop.time() - began > PATIENCE - 0.0015  # timers count in milliseconds
        assert numbers(log) == [[0], [1, 2]]
        assert gathering.waiting == (0, 0)
        await asyncio.sleep(2 * PATIENCE)
        submit(3)  # the last group is long gone
        assert numbers(log) == [[0], [1, 2], [3]]

    run(story)


@pytest.mark.parametrize(("busy", "share"), [(0.0, 0.0), (IDLE, 0.0), ((IDLE + LOADED) / 2, 0.5), (LOADED, 1.0), (1.0, 1.0)])
def test_the_wait_grows_with_how_busy_the_loop_is(busy: float, share: float) -> None:
    async def story(gathering: Gathering, log: HeldLog, submit: Callable[[int], None], found: Told) -> None:
        gathering.adapt(busy)
        submit(0)
        assert gathering.expected_wait == pytest.approx(0.001 + share * PATIENCE, abs=0.0005)

    run(story)


def test_a_refused_group_is_told_and_the_next_one_goes() -> None:
    async def story(gathering: Gathering, log: HeldLog, submit: Callable[[int], None], found: Told) -> None:
        refused = LogUnavailableError("found no room; expected some")
        submit(0)
        submit(1)
        log.settle(0, refused)
        log.settle(1, refused)
        assert found == [(0, refused), (1, refused)]
        submit(2)
        assert numbers(log) == [[0], [1], [2]]

    run(story)


def test_what_waits_is_handed_on_at_the_end() -> None:
    async def story(gathering: Gathering, log: HeldLog, submit: Callable[[int], None], found: Told) -> None:
        gathering.adapt(1.0)
        submit(0)
        submit(1)  # a timer runs
        gathering.close()
        assert log.closed
        assert numbers(log) == [[0], [1]]
        await asyncio.sleep(2 * PATIENCE)
        assert numbers(log) == [[0], [1]]

    run(story)
