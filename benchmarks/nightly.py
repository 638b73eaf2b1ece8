"""A whole night: `python -m benchmarks.nightly [--decisions 2000000] [--folder DIR]`.

The ad-load schema (5 actions, 16 features), rewards for 82.5 % of the decisions, 4 candidates, 16 buckets: ingest to report, at the
size given and at twice of it, each in a process of its own whose peak memory is printed; then the join beside DuckDB's bare join of
the same columns. One JSON line per figure. Events in `--folder` are kept and used again.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DATE = dt.date(2026, 11, 22)
PIECE = 500_000
"""Decisions that are simulated together; each piece is a folder in the inbox."""

SETTINGS = """
tenant = "feed"
decision_points = ["ads.toml"]
[lake]
buckets = 16
[join]
cutoff_hours = 1.0
lookback_days = 1
[train]
learners = ["IPS", "DR", "oracle-softmax (trees)"]
days = 1
[evaluate]
windows = [1]
"""
"""Three learners and uniform."""


def write_events(folder: Path, decisions: int) -> None:
    """An inbox of a day's events."""
    from pipelines.nightly.simulated import POINT, simulate_day

    if (folder / "propel.toml").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ads.toml").write_text(POINT)
    for seed in range(-(-decisions // PIECE)):
        simulate_day(DATE, min(PIECE, decisions - seed * PIECE), seed=seed).write(folder / "inbox" / f"{seed:02d}")
    (folder / "propel.toml").write_text(SETTINGS)


def night(folder: Path) -> dict[str, Any]:
    """Ingest to report, on an empty lake."""
    from pipelines.nightly.run import nightly
    from pipelines.nightly.settings import read_settings

    for made in ("lake", "reports", "registry"):
        shutil.rmtree(folder / made, ignore_errors=True)
    wall, cpu = time.perf_counter(), time.process_time()
    run = nightly(DATE, read_settings(folder / "propel.toml"))
    steps = {one.step: {"seconds": one.seconds, "read_mb": round(one.bytes_read / 1e6, 1)} for one in run.steps}
    return {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1), "steps": steps}


def join(folder: Path, threads: int) -> dict[str, Any]:
    """join.sql on every partition, read from the lake; as many at a time as there are threads."""
    import duckdb

    from pipelines.nightly.join import OBSERVED, outcome, relations
    from pipelines.nightly.lake import Entry, open_lake
    from pipelines.nightly.settings import Night, read_settings

    settings = read_settings(folder / "propel.toml")
    lake = open_lake(settings)
    snapshot, rule = lake.snapshot(), settings.points[0].rewards[0]
    for entry in snapshot.entries:
        lake.checked(entry)
    cutoff = Night.of(DATE, settings).cutoff_ns
    wall, cpu = time.perf_counter(), time.process_time()

    def of(decisions: Entry, rewards: Entry) -> int:
        with database.cursor() as cursor:
            read = lake.read(decisions, ["decision_id", "decided_at_ns"])
            for name, table in relations(read, lake.read(rewards, OBSERVED)).items():
                cursor.register(name, table)
            return len(outcome(cursor, rule, cutoff)["value.value"])

    with duckdb.connect(config={"threads": 1}) as database, ThreadPoolExecutor(threads) as pool:
        rows = sum(pool.map(of, snapshot.find("decisions"), snapshot.find("rewards")))
    return {"rows": rows, "wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}


def bare(folder: Path, threads: int) -> dict[str, Any]:
    """A left join of the same columns by DuckDB, of all files at once, to Arrow."""
    import duckdb

    from pipelines.nightly.lake import open_lake
    from pipelines.nightly.settings import read_settings

    lake = open_lake(read_settings(folder / "propel.toml"))
    files = {name: [str(lake.folder / entry.path) for entry in lake.snapshot().find(name)] for name in ("decisions", "rewards")}
    wall, cpu = time.perf_counter(), time.process_time()
    database = duckdb.connect(config={"threads": threads})
    found = database.sql(
        "select d.decision_id, d.decided_at_ns, r.name, r.observed_at_ns, r.value, r.event, r.version "
        "from read_parquet($decisions) d left join read_parquet($rewards) r on r.attributed_id = d.decision_id",
        params=files,
    ).to_arrow_table()
    return {"rows": found.num_rows, "wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}


def ask(job: str, folder: Path) -> dict[str, Any]:
    """A figure from a process of its own, with its peak memory."""
    command = [sys.executable, "-m", "benchmarks.nightly", "--folder", str(folder), "--job", job]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(answer.splitlines()[-1]))


def child(job: str, folder: Path) -> None:
    """Run one job and print what it found."""
    import resource

    name, _, threads = job.partition(":")
    if threads:
        import pyarrow as pa

        pa.set_cpu_count(int(threads))
    found = {"join": join, "bare": bare}[name](folder, int(threads)) if threads else night(folder)
    print(json.dumps(found | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))


def main() -> None:
    """Simulate the events, then measure every figure in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="the joins are the median of this many runs")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        child(options.job, options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        home, nights = options.folder or Path(temporary), []
        for times in (1, 2):
            folder = home / f"{times}"
            write_events(folder, times * options.decisions)
            nights.append(ask("night", folder))
            print(json.dumps({"figure": f"night, {times * options.decisions:,} decisions"} | nights[-1]), flush=True)
        growth = {clock: round(nights[1][clock] / nights[0][clock], 2) for clock in ("wall_s", "cpu_s")}
        print(json.dumps({"figure": "night, twice the rows", "ratio": growth}), flush=True)
        for threads in (1, 2):
            found = {}
            for job in ("join", "bare"):
                runs = sorted((ask(f"{job}:{threads}", home / "1") for _ in range(options.repeats)), key=lambda run: run["wall_s"])
                found[job] = runs[len(runs) // 2]
                print(json.dumps({"figure": job, "threads": threads} | found[job]), flush=True)
            ratios = {clock: round(found["join"][clock] / found["bare"][clock], 2) for clock in ("wall_s", "cpu_s")}
            print(json.dumps({"figure": "join beside a bare join", "threads": threads, "ratio": ratios}), flush=True)


if __name__ == "__main__":
    main()
