"""Steps a second of the offline methods: `python -m benchmarks.rl_control [--steps N] [--search] [--device cuda] [--json]`.

Batches of 256 from 100,000 transitions of HalfCheetah's sizes, two hidden layers of 256; on one thread. d3rlpy's TD3+BC runs beside
ours where it is installed, turn and turn about. CPU seconds, medians; a step includes drawing its batch. With `--device cuda` steps
one by one, as graphs, compiled, and both, in seconds that pass; data are there before, and only the end of a round is waited for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch

from rl_core.families.offline import OfflineMethod, Transitions
from rl_core.methods.iql import IQL
from rl_core.models.mlp import Sizes
from rl_core.registry import FAMILIES
from rl_core.support import nearest_pairs
from rl_core.trainers.captured import Captured, compiled
from rl_core.trainers.offline import OfflineSchedule, OfflineTrainer

ROWS, OBS, ACTION, BATCH = 100_000, 17, 6, 256
SIZES = Sizes(OBS, ACTION)
BAR = 1.6
GPU_BAR = 10.0
"""Steps as graphs or compiled, over steps one by one."""
ROUNDS = 7
PARENT = "TD3BC"
"""What others are compared with."""


def transitions(rows: int = ROWS) -> Transitions:
    """Numbers at random: what they are costs nothing more or less."""
    rng = np.random.default_rng(0)
    columns = (rng.normal(size=(rows, OBS)), np.tanh(rng.normal(size=(rows, ACTION))), rng.normal(size=rows),
               rng.normal(size=(rows, OBS)), np.zeros(rows), (np.arange(rows) % 1000 == 999).astype(float))  # fmt: skip
    return Transitions(*(torch.as_tensor(column, dtype=torch.float32) for column in columns))


def peer(data: Transitions) -> Callable[[], object]:
    """A step of d3rlpy's TD3+BC, its batch drawn from its own buffer."""
    import_module("structlog").configure(wrapper_class=import_module("structlog").make_filtering_bound_logger(logging.ERROR))
    d3rlpy = import_module("d3rlpy")
    columns = (data.obs, data.action, data.reward, data.terminated, data.truncated)
    held = d3rlpy.dataset.MDPDataset(*(column.numpy() for column in columns))
    made: Any = d3rlpy.algos.TD3PlusBCConfig(batch_size=BATCH).create(device="cpu:0")
    made.build_with_dataset(held)
    return lambda: made.update(held.sample_transition_batch(BATCH))


def floor_flops() -> float:
    """Of a step of TD3+BC: products alone, every second step the actor's."""
    inner, actor, critic = SIZES.width**2, OBS * SIZES.width + SIZES.width * ACTION, (OBS + ACTION) * SIZES.width + SIZES.width
    target = (inner + actor) + 2 * (inner + critic)
    learned = 2 * (inner + critic) * 2 + 2 * (inner + SIZES.width)  # forward, weights, and back to the first layer
    act = 2 * (inner + actor) + (inner + SIZES.width * ACTION) + (inner + critic) + (inner + SIZES.width + ACTION * SIZES.width)
    return 2 * BATCH * (target + learned + act / 2)


def rates(sides: Mapping[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """Steps a CPU second of each, medians of alternated rounds."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, step in sides.items():
            started = time.process_time()
            for _ in range(steps):
                step()
            if turn:  # the first warms up
                found[name].append(steps / (time.process_time() - started))
    return {name: statistics.median(values) for name, values in found.items()}


def product_rate(size: int = 256) -> float:
    """Operations a second of a product as large as those of a step."""
    a, seconds = torch.rand(size, size), list[float]()
    for _ in range(50):
        started = time.process_time()
        for _ in range(20):
            a @ a
        seconds.append((time.process_time() - started) / 20)
    return 2 * size**3 / statistics.median(seconds)


def search_seconds(rows: int = 1_000_000, queries: int = BATCH) -> dict[str, float]:
    """CPU milliseconds of 256 searches among a million pairs, by engine, in 4 and 23 dimensions; the tree's building apart."""
    found, rng = dict[str, float](), torch.Generator().manual_seed(0)
    for obs, action in ((3, 1), (OBS, ACTION)):
        points = torch.randn(rows, obs, generator=rng), torch.rand(rows, action, generator=rng)
        asked = torch.randn(queries, obs, generator=rng), torch.rand(queries, action, generator=rng)
        distances = {}
        for engine in ("tree", "tiles"):
            started = time.process_time()
            support = nearest_pairs(*points, 2.0, search=engine)
            built = time.process_time() - started
            started = time.process_time()
            distances[engine] = support.distance(*asked)
            found[f"{engine}, {obs + action} dimensions"] = 1e3 * (time.process_time() - started)
            if engine == "tree":
                found[f"building the tree, {obs + action} dimensions"] = 1e3 * built
        torch.testing.assert_close(distances["tree"], distances["tiles"], atol=1e-5, rtol=1e-5)
    return found


def on_gpu(method: OfflineMethod, data: Transitions, steps: int) -> dict[str, float]:
    """Steps a second of each way to take them, medians of alternated rounds."""
    torch.compiler.reset()  # it keeps few variants of a function

    def fresh() -> OfflineTrainer:
        return OfflineTrainer(method, data, OfflineSchedule(), device="cuda")

    sides = {
        "eager": fresh().advance, "captured": Captured(fresh()).advance, "compiled": compiled(fresh()).advance,
        "both": Captured(compiled(fresh())).advance,
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, advance in sides.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            advance(steps)
            torch.cuda.synchronize()
            if turn:  # the first warms up, compiles and captures
                found[name].append(steps / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in found.items()}


def gpu_table(steps: int, as_json: bool) -> None:
    """All methods on a GPU; learning rates stay what they are, as graphs ask."""
    data, found = transitions(), dict[str, dict[str, float]]()
    for kind in FAMILIES["offline"]:
        method = IQL(cosine=False) if kind is IQL else kind()
        found[kind.__name__] = one = on_gpu(method, data, steps)
        if not as_json:
            told = ", ".join(f"{name} {rate:,.0f} ({rate / one['eager']:.1f})" for name, rate in one.items())
            print(f"{kind.__name__:>8} steps a second, and over eager ones: {told}; bar {GPU_BAR:g}", flush=True)
    if as_json:
        print(json.dumps({"gpu_steps_per_s": found, "gpu_bar": GPU_BAR, "gpu": torch.cuda.get_device_name()}))


def main() -> None:
    """All figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="of each side in each round; 60 on a CPU, 2,000 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what the steps are taken on")
    parser.add_argument("--search", action="store_true", help="also time the search for nearest pairs among a million")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    options = parser.parse_args()
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device: found cuda where PyTorch finds no GPU; expected cpu")
        gpu_table(options.steps or 2000, options.json)
        return
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    data = transitions()
    trainers = {method.__name__: OfflineTrainer(method(), data, OfflineSchedule()) for method in FAMILIES["offline"]}
    sides: dict[str, Callable[[], object]] = {name: trainer.advance for name, trainer in trainers.items()}
    if importlib.util.find_spec("d3rlpy"):
        sides = {"d3rlpy's TD3+BC": peer(data)} | sides
    found = rates(sides, options.steps or 60)
    floor, beside = product_rate() / floor_flops(), found.get("d3rlpy's TD3+BC")
    searched = search_seconds() if options.search else {}
    if options.json:
        print(json.dumps({"steps_per_cpu_s": found, "floor_td3bc": floor, "bar": BAR, "search_cpu_ms": searched}))
        return
    for name, rate in found.items():
        ratio = "" if beside is None else f"  {rate / beside:5.2f} of d3rlpy's"
        print(f"{name:>18} {rate:7.1f} steps a CPU s  {rate / found[PARENT]:5.2f} of {PARENT}{ratio}")
    print(f"TD3+BC's floor: {floor:.0f} steps a CPU s, of which {found[PARENT] / floor:.0%} are reached; bar {BAR} of d3rlpy's")
    if beside is None:
        print("d3rlpy is not installed: ours alone. For the ratio: `pip install d3rlpy==2.8.1`")
    for name, cost in searched.items():
        print(f"{name}: {cost:,.0f} CPU ms")


if __name__ == "__main__":
    main()
