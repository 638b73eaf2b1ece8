"""Cost of six estimators with bootstrap intervals: `python -m benchmarks.ope --rounds 1000000 --actions 10`.

Prints one JSON line per figure. Arrays are made by a child process, saved as .npy and loaded before the clock starts;
memory is the peak above what is resident after imports, the arrays included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ARRAYS = ("action", "reward", "propensity", "pi", "q")
SIX = ("IPS", "SNIPS", "DM", "DR", "Switch-DR", "DRos")


def generate(rounds: int, actions: int, folder: Path) -> None:
    """A log with bounded weights, saved array by array."""
    rng = np.random.default_rng(0)
    step = 100_000
    shapes = {"action": (rounds,), "reward": (rounds,), "propensity": (rounds,), "pi": (rounds, actions), "q": (rounds, actions)}
    files: dict[str, Any] = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.int64 if name == "action" else np.float64, shape)
        for name, shape in shapes.items()
    }
    for start in range(0, rounds, step):
        rows = slice(start, min(start + step, rounds))
        n = rows.stop - rows.start
        logging, target = (_softmax(rng.normal(size=(n, actions))) for _ in range(2))
        action = (rng.random((n, 1)) > np.cumsum(logging, axis=1)[:, :-1]).sum(axis=1)
        q = rng.uniform(size=(n, actions))
        files["action"][rows], files["pi"][rows], files["q"][rows] = action, target, q
        files["propensity"][rows] = logging[np.arange(n), action]
        files["reward"][rows] = rng.random(n) < q[np.arange(n), action]


def _softmax(scores: Any) -> Any:
    weights = np.exp(scores)
    return weights / weights.sum(axis=1, keepdims=True)


def peak_mib() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(figure: str, work: Callable[[], object], repeats: int, base_mib: float, **more: float) -> None:
    """Run `work` several times and print the figure's medians as one JSON line."""
    cpu, wall = [], []
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        work()
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    record = {"figure": figure, "cpu_s": round(statistics.median(cpu), 3), "wall_s": round(statistics.median(wall), 3)}
    print(json.dumps(record | {"peak_rss_mib": round(peak_mib() - base_mib, 1)} | more), flush=True)


def run(folder: Path, repeats: int) -> None:
    """Load the arrays and time the evaluation."""
    from ope import Bootstrap, LoggedData, evaluate

    def six(a: Any) -> object:
        log = LoggedData(a["action"], a["reward"], a["propensity"])
        return evaluate(log, a["pi"], a["q"], estimators=SIX, interval=Bootstrap(resamples=1000))

    two_rows = {"action": np.array([0, 1]), "reward": np.ones(2), "propensity": np.full(2, 0.5)}
    six(two_rows | {"pi": np.full((2, 2), 0.5), "q": np.ones((2, 2))})  # what is imported lazily is imported now
    base = resident_mib()
    arrays = {name: np.load(folder / f"{name}.npy") for name in ARRAYS}
    inputs = round(sum(array.nbytes for array in arrays.values()) / 2**20, 1)
    rounds, actions = arrays["pi"].shape
    measure("six estimators", lambda: six(arrays), repeats, base, inputs_mib=inputs, rounds=rounds, actions=actions)


def main() -> None:
    """Generate in one process, measure in another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1_000_000)
    parser.add_argument("--actions", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="the figure is the median of this many runs")
    parser.add_argument("--arrays", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arrays:
        run(options.arrays, options.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(options.rounds, options.actions, Path(folder))
        command = [sys.executable, "-m", "benchmarks.ope", "--arrays", folder, "--repeats", str(options.repeats)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
