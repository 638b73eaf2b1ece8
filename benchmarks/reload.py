"""Cost of reloads: `python -m benchmarks.reload [--seconds 10]`. One JSON line per figure.

CPU per request of all the server's processes, those that try an artifact among them, closed loop, 32 connections, one worker: with
another policy promoted every 5 s beside none, turn and turn about. The ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bandits.batch import DecisionBatch
from bandits.decision_point import parse_decision_point
from bandits.policy import Floor, Softmax
from bandits.registry import Registry
from bandits.scorers import Linear
from benchmarks.serve import ACTIONS, CONTEXT, FEATURES, POINT, Target, body, closed, propel, show

EVERY = 5.0
"""Seconds between two promotions."""

BAR = 1.10


@dataclass(frozen=True)
class Whole(Target):
    """A server with whatever its processes started and waited for."""

    def cpu(self) -> float:
        """CPU seconds so far."""
        total = 0
        for process in self.processes:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            total += sum(map(int, fields[11:15]))
        return total / os.sysconf("SC_CLK_TCK")


def registered(registry: Registry) -> list[str]:
    """Two policies of the decision point."""
    point, rng = parse_decision_point(POINT), np.random.default_rng(1)
    golden = DecisionBatch.of(np.zeros((1, CONTEXT)), np.ones((1, ACTIONS), dtype=np.bool_), np.zeros((1, ACTIONS, FEATURES)))
    policies = [Floor(Softmax(Linear(np.zeros(1), np.empty((0, 0)), rng.normal(size=FEATURES))), 0.02) for _ in range(2)]
    return [registry.register(policy, point, name="another", golden=golden) for policy in policies]


async def promotions(registry: Registry, digests: list[str], seconds: float) -> int:
    """Promote one after the other; the last one early enough to be taken before the measurement ends. How many."""
    await asyncio.sleep(0.5)  # until what is measured begins
    count = int(seconds // EVERY)
    for _ in range(count):
        digests.reverse()
        await asyncio.to_thread(registry.promote, digests[0], who="benchmark", why="it is measured")
        await asyncio.sleep(EVERY - 0.5)
    return count


async def measured(target: Target, registry: Registry, digests: list[str], seconds: float, *, reload: bool) -> dict[str, float]:
    """Figures of a load, with promotions beside it or without."""
    content = body()
    if not reload:
        return await closed(target, content, seconds)
    found, count = await asyncio.gather(closed(target, content, seconds), promotions(registry, digests, seconds))
    return found | {"promotions": count}


def main() -> None:
    """All figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement, at least 5")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ratios = list[float]()
    with tempfile.TemporaryDirectory(dir=".") as temporary, propel(Path(temporary) / "server") as server:
        target = Whole(server.url, server.path, server.key, server.processes)
        registry = Registry(Path(temporary) / "server" / "registry")
        digests = registered(registry)
        for _ in range(options.rounds):
            none, some = (
                asyncio.run(measured(target, registry, digests, options.seconds, reload=reload)) for reload in (False, True)
            )
            show("no reload", **none)
            show("a reload every 5 s", **some)
            ratios.append(some["cpu_us"] / none["cpu_us"])
    show("CPU per request, a reload every 5 s / none", ratio=statistics.median(ratios), bar=BAR)


if __name__ == "__main__":
    main()
