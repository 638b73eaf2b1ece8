"""Doors in and long logs: `python -m benchmarks.logs [--lines 200000] [--rows 20000000] [--folder DIR]`.

DSJSON lines of about 1 KB are read, validated and imported, and read by VW's own parser where it is installed; a Parquet log is
evaluated beside a bare DuckDB scan of the same columns. One JSON line per figure; each in a process of its own, whose peak memory
is printed. A log in `--folder` is kept and used again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVALUATIONS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "one probability a row": ("scalar", ["action", "reward", "propensity", "scalar"], {}),
    "four probabilities a row": ("policy", ["action", "reward", "propensity", "policy"], {}),
    "four probabilities, bootstrap": ("policy", ["action", "reward", "propensity", "policy"], {"bootstrap": True}),
    "four probabilities, clusters": ("policy", ["action", "reward", "propensity", "policy", "user"], {"cluster": "user"}),
    "four probabilities, DM and DR": ("policy", ["action", "reward", "propensity", "policy", "x", "y"], {"context": ("x", "y")}),
}


def write_lines(path: Path, lines: int) -> float:
    """DSJSON as VW's decision service logs it: four drinks of a catalogue of forty with three features each. Mean bytes a line."""
    rng = random.Random(0)
    drinks = [
        {
            "_tag": f"Drink {j}",
            "i": {"constant": 1, "id": f"Drink {j}"},
            "j": [{"type": rng.choice(["hot", "cold"]), "origin": rng.choice(["kenya", "brazil", "ethiopia"]), "roast": "dark"}],
        }
        for j in range(40)
    ]
    size = 0
    with path.open("wb") as file:
        for i in range(lines):
            order = rng.sample(range(1, 5), 4)
            best = rng.random() < 0.85
            vector = [0.85, 0.05, 0.05, 0.05] if best else [0.05, 0.85, 0.05, 0.05]
            reward = float(rng.random() < 0.3)
            line = {
                "_label_cost": -reward,
                "_label_probability": vector[0],
                "_label_Action": order[0],
                "_labelIndex": order[0] - 1,
                "o": [{"v": reward, "EventId": f"{i:032x}", "ActionTaken": False}],
                "Timestamp": f"2021-02-04T16:{i // 60 % 60:02}:{i % 60:02}.2460000Z",
                "Version": "1",
                "EventId": f"{i:032x}",
                "a": order,
                "c": {
                    "FromUrl": [{"timeofday": rng.choice(["Morning", "Evening"]), "weather": "Sunny", "visits": rng.randrange(90)}],
                    "_multi": rng.sample(drinks, 4),
                },
                "p": vector,
                "VWState": {"m": "ff0744c1aa494e1ab39ba0c78d048146/550c12cbd3aa47f09fbed3387fb9c6ec"},
                "_original_label_cost": -reward,
            }
            size += file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    return size / lines


def read_and_validate(path: Path) -> int:
    """Every line a decision, or an error."""
    from pipelines.importers.dsjson import read_line

    with path.open("rb") as file:
        return sum(len(read_line(line)[2]) for line in file)


def whole_import(path: Path) -> int:
    """What `propel import` does."""
    from pipelines.importers.events import Naming
    from pipelines.imports import import_log

    folder = path.with_suffix(".imported")
    shutil.rmtree(folder, ignore_errors=True)
    return import_log(path, folder, Naming()).decisions


def vw_parser(path: Path) -> int:
    """VW's own parser, through its Python binding; 0 where it is not installed."""
    try:
        import vowpalwabbit
    except ModuleNotFoundError:
        return 0
    vw = vowpalwabbit.Workspace("--cb_explore_adf --dsjson --chain_hash --quiet")
    count = 0
    for line in path.read_text().splitlines():
        vw.finish_example(vw.parse(line))
        count += 1
    return count


def write_log(path: Path, rows: int) -> None:
    """Decisions among four actions, two features, a user for every five of them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ope.simulate import World, sample_actions, softmax

    rng, world, step = np.random.default_rng(0), World.random(d=2, k=4, seed=3), 1_000_000
    writer = None
    for start in range(0, rows, step):
        n = min(step, rows - start)
        index, context = np.arange(n), world.contexts(n, rng)
        logging, target = softmax(context @ world.coefficient), softmax(2.5 * context @ world.coefficient)
        action = sample_actions(logging, rng)
        lists = pa.ListArray.from_arrays(pa.array(np.arange(0, 4 * n + 1, 4, dtype=np.int32)), pa.array(target.ravel()))
        columns = {
            "action": action.astype(np.int32),
            "reward": (rng.random(n) < world.q(context)[index, action]).astype(np.int8),
            "propensity": logging[index, action],
            "scalar": target[index, action],
            "policy": lists,
            "x": context[:, 0],
            "y": context[:, 1],
            "user": rng.integers(0, max(1, rows // 5), n),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()


def scan(path: Path, columns: list[str]) -> None:
    """Read every value of the columns, and do nothing but add them up."""
    import duckdb

    sums = ", ".join(f"sum(list_sum({name}))" if name == "policy" else f"sum({name})" for name in columns)
    duckdb.connect().read_parquet(str(path)).aggregate(sums).fetchall()


def evaluation(path: Path, policy: str, settings: dict[str, Any]) -> None:
    """What `propel ope` does."""
    from ope.intervals import Bootstrap, Normal
    from pipelines.evaluate import evaluate_file
    from pipelines.frame import ColumnMap

    columns = ColumnMap(cluster=settings.get("cluster"), context=tuple(settings.get("context", ())))
    evaluate_file(path, policy, columns, interval=Bootstrap() if settings.get("bootstrap") else Normal())


def timed(work: Callable[[], Any], warm: Callable[[], Any]) -> dict[str, Any]:
    """CPU and wall seconds of work, after what it imports has been imported by a small copy of it; and the peak memory of all."""
    warm()
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    record = {"cpu_s": round(time.process_time() - cpu, 2), "wall_s": round(time.perf_counter() - wall, 2)}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = round(int(status["VmHWM"].split()[0]) / 1024)
    return record | {"peak_mib": peak} | ({"count": found} if isinstance(found, int) else {})


def child(job: str, folder: Path) -> None:
    """One figure."""
    few, lines, little, log = (folder / name for name in ("few.dsjson", "lines.dsjson", "little.parquet", "log.parquet"))
    readers: dict[str, Callable[[Path], int]] = {"read": read_and_validate, "import": whole_import, "vw": vw_parser}
    if job in readers:
        print(json.dumps(timed(lambda: readers[job](lines), lambda: readers[job](few))))
        return
    kind, name = job.split(":")
    policy, columns, settings = EVALUATIONS[name]
    if kind == "scan":
        print(json.dumps(timed(lambda: scan(log, columns), lambda: scan(little, columns))))
    else:
        print(json.dumps(timed(lambda: evaluation(log, policy, settings), lambda: evaluation(little, policy, settings))))


def ask(job: str, folder: Path, repeats: int) -> dict[str, Any]:
    """The median run of some, by CPU time, of a figure."""
    command = [sys.executable, "-m", "benchmarks.logs", "--folder", str(folder), "--job", job]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(repeats)]
    return dict(sorted(runs, key=lambda run: run["cpu_s"])[len(runs) // 2])


def main() -> None:
    """Write the inputs, then measure every figure in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="each figure is the median of this many runs")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        child(options.job, options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bytes_a_line = write_lines(folder / "lines.dsjson", options.lines)
        write_lines(folder / "few.dsjson", 100)
        for job in ("read", "import", "vw"):
            found = ask(job, folder, options.repeats)
            if found["count"]:
                rate = round(found["count"] / found["cpu_s"])
                print(json.dumps({"figure": f"dsjson, {job}", "bytes": round(bytes_a_line), "per_cpu_s": rate} | found), flush=True)
        write_log(folder / "little.parquet", 10_000)
        if not (folder / "log.parquet").exists():
            write_log(folder / "log.parquet", options.rows)
        for name in EVALUATIONS:
            bare, ours = (ask(f"{kind}:{name}", folder, options.repeats) for kind in ("scan", "ope"))
            ratios = {f"{clock}_ratio": round(ours[f"{clock}_s"] / bare[f"{clock}_s"], 2) for clock in ("cpu", "wall")}
            print(json.dumps({"figure": name, "scan": bare} | ours | ratios), flush=True)


if __name__ == "__main__":
    main()
