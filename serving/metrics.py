"""Numbers for Prometheus, counted in plain integers on the way of a request and put into words when asked.

Several workers share an address, and a scrape reaches any of them: each leaves its counts in a folder every second, and whichever
is asked adds up those of all. A worker keeps a place in the folder, locked for as long as it lives; whoever takes the place of one
that died goes on counting from what was left there, so that no count ever falls.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Seconds."""

EMPTY = [0] * (len(BOUNDS) + 1)


class Counts(msgspec.Struct):
    """What one process counted."""

    requests: dict[str, int] = {}
    """By route and status."""
    seconds: dict[str, float] = {}
    """By route, in all."""
    buckets: dict[str, list[int]] = {}
    """By route: requests that took up to each of `BOUNDS`, and longer."""
    decisions: dict[str, int] = {}
    """By decision point and policy."""
    events: dict[str, int] = {}
    """By kind and what became of them."""
    reloads: dict[str, int] = {}
    """By decision point and what became of them."""
    gauges: dict[str, float] = {}
    """By name, or by name and labels."""


class Metrics:
    """Counts of this process, and those that others left in `folder`: the processes that are forked after this was made.

    `gauges`: further numbers by name and help, asked for when they are wanted; of several workers the largest is told.
    `labelled`: the same by name, help and names of labels, with as many numbers as there are labels to tell apart.
    """

    def __init__(
        self,
        gauges: Mapping[str, tuple[str, Callable[[], float]]],
        folder: Path | None = None,
        labelled: Mapping[str, tuple[str, Sequence[str], Callable[[], Mapping[tuple[str, ...], float]]]] | None = None,
    ) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.decisions: Counter[tuple[str, str]] = Counter()
        self.events: Counter[tuple[str, str]] = Counter()
        self.reloads: Counter[tuple[str, str]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self._gauges, self._labelled, self._folder = gauges, labelled or {}, folder
        self._run = secrets.token_hex(8)  # what earlier runs left is under other names, and does not count
        self._place: Path | None = None
        self._before = Counts()  # what was counted at this place by those that died
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self.requests[route, status] += 1
        counts = self._buckets.get(route)
        if counts is None:
            counts, self._seconds[route] = self._buckets.setdefault(route, EMPTY.copy()), 0.0
        counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds[route] += seconds

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        with contextlib.suppress(OSError):  # a full disk costs the others' view, not the answer
            self.leave()  # what is told is on file, and outlives this process
        return generate_latest(self._registry)

    def leave(self) -> None:
        """Put this process's counts where others find them."""
        if self._folder is None:
            return
        if self._place is None:
            self._place = self._take_place(self._folder)
            self._before = _left(self._place, living=False)
        new = self._place.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(self._counts()))
        new.rename(self._place)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for."""
        all_ = _sum([self._counts(), *self._others()])
        yield _counter("propel_requests", "Requests answered.", ["route", "status"], all_.requests)
        seconds = HistogramMetricFamily("propel_request_seconds", "Time from reading a request to its answer.", labels=["route"])
        for route, counts in all_.buckets.items():
            buckets = zip((*map(str, BOUNDS), "+Inf"), accumulate(counts), strict=True)
            seconds.add_metric([route], list(buckets), all_.seconds[route])
        yield seconds
        yield _counter("propel_decisions", "Decisions stored.", ["decision_point", "policy"], all_.decisions)
        yield _counter("propel_events", "Entries, and what became of them.", ["kind", "state"], all_.events)
        yield _counter("propel_policy_reloads", "Policies taken or refused.", ["decision_point", "state"], all_.reloads)
        for name, (help_, _) in self._gauges.items():
            yield GaugeMetricFamily(name, help_, value=all_.gauges[name])
        for name, (help_, labels, _) in self._labelled.items():
            family = GaugeMetricFamily(name, help_, labels=labels)
            for key, value in all_.gauges.items():
                if key.startswith(f"{name}\0"):
                    family.add_metric(key.split("\0")[1:], value)
            yield family

    def _counts(self) -> Counts:
        """What was counted here, and at this place before."""
        requests = {f"{route}\0{status}": count for (route, status), count in self.requests.items()}
        decisions = {f"{point}\0{policy}": count for (point, policy), count in self.decisions.items()}
        events = {f"{kind}\0{state}": count for (kind, state), count in self.events.items()}
        reloads = {f"{point}\0{state}": count for (point, state), count in self.reloads.items()}
        gauges = {name: float(value()) for name, (_, value) in self._gauges.items()}
        for name, (_, _, values) in self._labelled.items():
            gauges |= {"\0".join((name, *labels)): value for labels, value in values().items()}
        return _sum([self._before, Counts(requests, self._seconds, self._buckets, decisions, events, reloads, gauges)])

    def _take_place(self, folder: Path) -> Path:
        """The first place that no living process holds; what earlier runs left is cleared away."""
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if not path.name.startswith(self._run) and not _is_held(path):
                path.unlink(missing_ok=True)
        places = (folder / f"{self._run}-{at}.json" for at in count())
        return next(place for place in places if _hold(place))

    def _others(self) -> list[Counts]:
        """What other processes of this run have left, the dead ones among them."""
        paths = [] if self._folder is None else self._folder.glob(f"{self._run}-*.json")
        return [_left(path, living=_is_held(path)) for path in paths if path != self._place]


def _hold(place: Path) -> bool:
    """Lock a place, unless another holds it. The lock is never closed: it ends with the process, however that ends."""
    lock = os.open(place.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    return True


def _is_held(place: Path) -> bool:
    """Whether the process of a place lives. Numbers of processes are used again; locks end with their process."""
    try:
        with place.with_suffix(".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _left(place: Path, *, living: bool) -> Counts:
    """What was left at a place; of a process that died only what adds up, since its gauges say nothing any more."""
    try:
        found = msgspec.json.decode(place.read_bytes(), type=Counts)
    except OSError:  # nothing so far
        return Counts()
    return found if living else msgspec.structs.replace(found, gauges={})


def _sum(counted: Iterable[Counts]) -> Counts:
    """Counts added up; of each gauge the largest."""
    total = Counts()
    for one in counted:
        for name in ("requests", "seconds", "decisions", "events", "reloads"):
            sums = getattr(total, name)
            for key, value in getattr(one, name).items():
                sums[key] = sums.get(key, 0) + value
        for route, buckets in one.buckets.items():
            total.buckets[route] = [a + b for a, b in zip(total.buckets.get(route, EMPTY), buckets, strict=True)]
        for name, gauge in one.gauges.items():
            total.gauges[name] = max(total.gauges.get(name, gauge), gauge)
    return total


def _counter(name: str, help_: str, labels: list[str], counted: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_, labels=labels)
    for key, value in counted.items():
        family.add_metric(key.split("\0"), value)
    return family
