"""Numbers for Prometheus, counted in plain integers on the way of a request and put into words when asked.

Several workers share an address, and a scrape reaches any of them: each leaves its counts in a folder every second, and whichever
is asked adds up those of all that run.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Seconds."""


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
    gauges: dict[str, float] = {}


class Metrics:
    """Counts of this process, and those that others left in `folder`.

    `gauges`: further numbers by name and help, asked for when they are wanted; of several workers the largest is told.
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]], folder: Path | None = None) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.decisions: Counter[tuple[str, str]] = Counter()
        self.events: Counter[tuple[str, str]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self._gauges, self._folder = gauges, folder
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self.requests[route, status] += 1
        counts = self._buckets.get(route)
        if counts is None:
            counts, self._seconds[route] = self._buckets.setdefault(route, [0] * (len(BOUNDS) + 1)), 0.0
        counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds[route] += seconds

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self._registry)

    def leave(self) -> None:
        """Put this process's counts where others find them."""
        if self._folder is not None:
            self._folder.mkdir(exist_ok=True)
            new = self._folder / f"{os.getpid()}.new"
            new.write_bytes(msgspec.json.encode(self._counts()))
            new.rename(self._folder / f"{os.getpid()}.json")

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for."""
        all_ = [self._counts(), *self._others()]
        yield _counter("propel_requests", "Requests answered.", ["route", "status"], [one.requests for one in all_])
        seconds = HistogramMetricFamily("propel_request_seconds", "Time from reading a request to its answer.", labels=["route"])
        for route in {route: None for one in all_ for route in one.buckets}:
            total, buckets = 0, []
            for at, bound in enumerate((*map(str, BOUNDS), "+Inf")):
                total += sum(one.buckets[route][at] for one in all_ if route in one.buckets)
                buckets.append((bound, total))
            seconds.add_metric([route], buckets, sum(one.seconds.get(route, 0.0) for one in all_))
        yield seconds
        yield _counter("propel_decisions", "Decisions stored.", ["decision_point", "policy"], [one.decisions for one in all_])
        yield _counter("propel_events", "Entries, and what became of them.", ["kind", "state"], [one.events for one in all_])
        for name, (help_, _) in self._gauges.items():
            yield GaugeMetricFamily(name, help_, value=max(one.gauges.get(name, 0.0) for one in all_))

    def _counts(self) -> Counts:
        requests = {f"{route}\0{status}": count for (route, status), count in self.requests.items()}
        decisions = {f"{point}\0{policy}": count for (point, policy), count in self.decisions.items()}
        events = {f"{kind}\0{state}": count for (kind, state), count in self.events.items()}
        gauges = {name: float(value()) for name, (_, value) in self._gauges.items()}
        return Counts(requests, dict(self._seconds), dict(self._buckets), decisions, events, gauges)

    def _others(self) -> list[Counts]:
        """What other processes that still run have left; what the others left is cleared away."""
        found = []
        for path in [] if self._folder is None else self._folder.glob("*.json"):
            if path.stem == str(os.getpid()):
                continue
            try:
                os.kill(int(path.stem), 0)
                found.append(msgspec.json.decode(path.read_bytes(), type=Counts))
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except (OSError, ValueError):  # gone meanwhile, or not ours
                continue
        return found


def _counter(name: str, help_: str, labels: list[str], counted: list[dict[str, int]]) -> CounterMetricFamily:
    family, total = CounterMetricFamily(name, help_, labels=labels), Counter[str]()
    for one in counted:
        total.update(one)
    for key, count in total.items():
        family.add_metric(key.split("\0"), count)
    return family
