"""Cost of the service: `python -m benchmarks.serve [--seconds 5]`. One JSON line per figure; ratios are of one run.

CPU per request of the server's own process, closed loop, 32 connections, one worker: the bare constant endpoint and the pydantic
echo beside ours, turn and turn about. Then latency at a constant rate beside the disk's own fdatasync. The load comes from a
process of its own, on what the server leaves of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONNECTIONS = 32
ACTIONS, FEATURES, CONTEXT = 20, 4, 10

POINT = f"""
name = "feed"
exploration_floor = 0.02
actions = {{per_request = true}}
[[rewards]]
name = "click"
low = 0.0
high = 1.0
window_seconds = 3600.0
[features]
context = [{",".join(f'{{type = "number", name = "x{i}"}}' for i in range(CONTEXT))}]
action = [{",".join(f'{{type = "number", name = "f{i}"}}' for i in range(FEATURES))}]
"""


def body() -> bytes:
    """A request of 20 actions with 4 features each, and 10 numbers of context."""
    import numpy as np

    rng = np.random.default_rng(0)

    def numbers(prefix: str, count: int) -> dict[str, float]:
        return {f"{prefix}{i}": round(float(rng.normal()), 4) for i in range(count)}

    actions = [{"id": f"item-{j:03d}", "features": numbers("f", FEATURES)} for j in range(ACTIONS)]
    return json.dumps({"unit": "user-12345", "context": numbers("x", CONTEXT), "actions": actions}).encode()


# Peers, each an application of a process of its own


def constant() -> Any:
    """The least that FastAPI does: a constant."""
    from fastapi import FastAPI

    app = FastAPI()

    @app.post("/constant")
    async def answer() -> dict[str, str]:
        return {"action": "item-000"}

    return app


def echo() -> Any:
    """FastAPI with a pydantic model of the same body, sent back."""
    from fastapi import FastAPI
    from pydantic import create_model

    action = create_model("Action", id=(str, ...), features=(dict[str, float], ...))
    kind = create_model("Request", unit=(str, ...), context=(dict[str, float], ...), actions=(list[action], ...))  # type: ignore[valid-type]
    app = FastAPI()

    async def answer(request: Any) -> Any:
        return request

    answer.__annotations__ = {"request": kind, "return": kind}
    app.post("/echo")(answer)
    return app


@dataclass(frozen=True)
class Target:
    """A server that is measured."""

    url: tuple[str, int]
    path: str
    key: str
    processes: tuple[int, ...]

    def request(self, content: bytes) -> bytes:
        """A request's bytes."""
        lines = [
            f"POST {self.path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {self.key}", "Content-Type: application/json",
            f"Content-Length: {len(content)}",
        ]  # fmt: skip
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content

    def cpu(self) -> float:
        """CPU seconds of its processes so far."""
        total = 0
        for process in self.processes:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")


# Load


async def _client(target: Target, content: bytes, until: float, counts: list[int], bad: list[int]) -> None:
    reader, writer = await asyncio.open_connection(*target.url)
    request = target.request(content)
    while time.monotonic() < until:
        writer.write(request)
        if await _answer(reader) == 200:
            counts[0] += 1
        else:
            bad[0] += 1
    writer.close()


async def _answer(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    length = int(lower.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
    await reader.readexactly(length)
    return int(head[9:12])


async def closed(target: Target, content: bytes, seconds: float, connections: int = CONNECTIONS) -> dict[str, float]:
    """As many requests as the server takes; requests a second, and CPU microseconds of each."""
    counts, bad = [0], [0]
    await asyncio.gather(*(_client(target, content, time.monotonic() + 0.5, [0], [0]) for _ in range(connections)))
    before, started = target.cpu(), time.monotonic()
    await asyncio.gather(*(_client(target, content, started + seconds, counts, bad) for _ in range(connections)))
    took = time.monotonic() - started
    return {"rps": counts[0] / took, "cpu_us": (target.cpu() - before) / max(1, counts[0]) * 1e6, "other_answers": bad[0]}


async def opened(target: Target, content: bytes, rate: float, seconds: float) -> dict[str, float]:
    """Requests at a constant rate, however long the answers take; milliseconds from when each was due."""
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    connections = [await asyncio.open_connection(*target.url) for _ in range(CONNECTIONS * 4)]
    for one in connections:
        free.put_nowait(one)
    request, waits, bad = target.request(content), list[float](), 0

    async def ask(due: float) -> None:
        nonlocal bad
        reader, writer = await free.get()
        writer.write(request)
        status = await _answer(reader)
        waits.append((time.monotonic() - due) * 1000)
        bad += status != 200
        free.put_nowait((reader, writer))

    started, tasks = time.monotonic(), []
    for number in range(int(rate * seconds)):
        due = started + number / rate
        if (ahead := due - time.monotonic()) > 0:
            await asyncio.sleep(ahead)
        tasks.append(asyncio.create_task(ask(due)))
    await asyncio.gather(*tasks)
    for _, writer in connections:
        writer.close()
    waits.sort()
    return {"rate": rate, "p50_ms": waits[len(waits) // 2], "p99_ms": waits[int(len(waits) * 0.99)], "other_answers": bad}


# Servers


@contextmanager
def peer(name: str) -> Iterator[Target]:
    """One of the peers."""
    port = _free_port()
    options = f"port={port}, loop='uvloop', http='httptools', access_log=False, log_level='error'"
    code = f"import uvicorn; from benchmarks import serve; uvicorn.run(serve.{name}(), {options})"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        _wait(port)
        yield Target(("127.0.0.1", port), f"/{name}", "none", (process.pid,))
    finally:
        process.terminate()
        process.wait()


@contextmanager
def propel(folder: Path, kind: str = "linear", workers: int = 1, path: str = "decisions") -> Iterator[Target]:
    """Our service, with a promoted policy."""
    port = _free_port()
    key = _set_up(folder, kind, port, workers)
    process = subprocess.Popen(
        [sys.executable, "-m", "propel", "serve", "--config", str(folder / "propel.toml")], stderr=subprocess.DEVNULL
    )
    try:
        _wait(port)
        time.sleep(1.0 if workers > 1 else 0.0)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Target(("127.0.0.1", port), f"/v1/feed/{path}", key, (process.pid, *map(int, children)))
    finally:
        process.terminate()
        process.wait()


def _set_up(folder: Path, kind: str, port: int, workers: int) -> str:
    import numpy as np

    from bandits.batch import DecisionBatch
    from bandits.decision_point import parse_decision_point
    from bandits.policy import Floor, Softmax
    from bandits.registry import Registry
    from bandits.scorers import Linear, Scorer, Trees
    from serving.setup import initialise

    made = initialise(folder, port)
    (folder / "feed.toml").write_text(POINT)
    text = made.config.read_text().replace("ad-load.toml", "feed.toml").replace("workers = 1", f"workers = {workers}")
    made.config.write_text(text)
    point, rng = parse_decision_point(POINT), np.random.default_rng(0)
    scorer: Scorer = Linear(np.zeros(1), np.empty((0, 0)), rng.normal(size=FEATURES))
    if kind == "trees":
        import lightgbm

        x = rng.normal(size=(20_000, 1 + CONTEXT + FEATURES))
        x[:, 0] = rng.integers(0, ACTIONS, len(x))
        settings = {"objective": "regression", "num_leaves": 31, "num_threads": 1, "verbosity": -1}
        trained = lightgbm.train(settings, lightgbm.Dataset(x, x[:, 1] * x[:, 11] + rng.normal(size=len(x))), 100)
        scorer = Trees(trained.model_to_string())
    golden = DecisionBatch.of(np.zeros((1, CONTEXT)), np.ones((1, ACTIONS), dtype=np.bool_), np.zeros((1, ACTIONS, FEATURES)))
    registry = Registry(folder / "registry")
    digest = registry.register(Floor(Softmax(scorer), 0.02), point, name=kind, golden=golden)
    registry.promote(digest, who="benchmark", why="it is measured")
    return made.key


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait(port: int) -> None:
    for _ in range(200):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


class Disk(threading.Thread):
    """Times fdatasync of small writes beside whatever runs, on the same disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.took, self.running = folder, list[float](), True

    def run(self) -> None:
        """Write, sync, wait a little."""
        with (self.folder / "probe").open("wb", buffering=0) as file:
            while self.running:
                file.write(b"x" * 4096)
                started = time.perf_counter()
                os.fdatasync(file.fileno())
                self.took.append((time.perf_counter() - started) * 1000)
                time.sleep(0.02)

    def quantile(self, q: float) -> float:
        """Milliseconds."""
        return sorted(self.took)[int(len(self.took) * q)]


# Figures


def show(figure: str, **numbers: Any) -> None:
    """One figure as one JSON line."""
    print(json.dumps({"figure": figure} | {k: round(v, 3) if isinstance(v, float) else v for k, v in numbers.items()}), flush=True)


def costs(folder: Path, seconds: float, rounds: int) -> float:
    """CPU of each request, turn and turn about; the linear policy's requests a second."""
    one = body()
    many = b'{"decisions":[' + b",".join([one] * 100) + b"]}"
    found: dict[str, list[dict[str, float]]] = {}
    with (
        peer("constant") as bare, peer("echo") as same, propel(folder / "linear") as linear,
        propel(folder / "trees", "trees") as trees, propel(folder / "batch", path="decisions:batch") as batch,
        propel(folder / "two", workers=2) as two,
    ):  # fmt: skip
        targets: Sequence[tuple[str, Target, bytes]] = (
            ("constant", bare, one), ("pydantic echo", same, one), ("linear policy", linear, one), ("100 trees", trees, one),
            ("batch of 100", batch, many), ("two workers", two, one),
        )  # fmt: skip
        for _ in range(rounds):
            for name, target, content in targets:
                found.setdefault(name, []).append(asyncio.run(closed(target, content, seconds)))
    middle = {name: {what: statistics.median(run[what] for run in runs) for what in runs[0]} for name, runs in found.items()}
    for name, numbers in middle.items():
        show(name, **numbers)
    cpu = {name: numbers["cpu_us"] for name, numbers in middle.items()}
    show("linear policy / constant", ratio=cpu["linear policy"] / cpu["constant"], bar=2.6)
    show("linear policy / pydantic echo", ratio=cpu["linear policy"] / cpu["pydantic echo"], bar=1.2)
    show("100 trees / constant", ratio=cpu["100 trees"] / cpu["constant"], bar=4.2)
    show("decisions per CPU second, batch / single", ratio=100 * cpu["linear policy"] / cpu["batch of 100"], least=2.5)
    show("two workers / one", ratio=cpu["two workers"] / cpu["linear policy"], bar=1.25)
    return middle["linear policy"]["rps"]


def latency(folder: Path, peak: float, seconds: float) -> None:
    """p99 of acknowledged decisions at 20 % and 60 % of the peak, beside that of the disk in the same seconds."""
    for share, times in ((0.2, 2.5), (0.6, 4.0)):
        with propel(folder / f"at {share}") as target:
            asyncio.run(opened(target, body(), 50, 1))
            disk = Disk(folder)
            disk.start()
            found = asyncio.run(opened(target, body(), share * peak, seconds))
            disk.running = False
            disk.join()
        p50, p99 = disk.quantile(0.5), disk.quantile(0.99)
        show(f"latency at {share:.0%} of peak", **found, fdatasync_p50_ms=p50, fdatasync_p99_ms=p99, bar_ms=times * p99 + 3)


def main() -> None:
    """All figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        peak = costs(folder, options.seconds, options.rounds)
        latency(folder, peak, 3 * options.seconds)


if __name__ == "__main__":
    main()
