"""Numbers for Prometheus, counted in plain integers on the way of a request and put into words when asked."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Seconds."""


class Metrics:
    """Requests by route and status, how long they took, decisions by policy, events by what became of them.

    `gauges`: further numbers by name and help, asked for when they are wanted.
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.decisions: Counter[tuple[str, str]] = Counter()
        self.events: Counter[tuple[str, str]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: Counter[str] = Counter()
        self._gauges = gauges
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self.requests[route, status] += 1
        counts = self._buckets.get(route)
        if counts is None:
            counts = self._buckets[route] = [0] * (len(BOUNDS) + 1)
        counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds[route] += seconds  # type: ignore[assignment]

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for."""
        requests = CounterMetricFamily("propel_requests", "Requests answered.", labels=["route", "status"])
        for (route, status), count in self.requests.items():
            requests.add_metric([route, str(status)], count)
        yield requests
        seconds = HistogramMetricFamily("propel_request_seconds", "Time from reading a request to its answer.", labels=["route"])
        for route, counts in self._buckets.items():
            total, buckets = 0, []
            for bound, count in zip([*map(str, BOUNDS), "+Inf"], counts, strict=True):
                total += count
                buckets.append((bound, total))
            seconds.add_metric([route], buckets, self._seconds[route])
        yield seconds
        decisions = CounterMetricFamily("propel_decisions", "Decisions stored.", labels=["decision_point", "policy"])
        for (point, policy), count in self.decisions.items():
            decisions.add_metric([point, policy], count)
        yield decisions
        events = CounterMetricFamily("propel_events", "Entries by kind and what became of them.", labels=["kind", "state"])
        for (kind, state), count in self.events.items():
            events.add_metric([kind, state], count)
        yield events
        for name, (help_, value) in self._gauges.items():
            yield GaugeMetricFamily(name, help_, value=value())
