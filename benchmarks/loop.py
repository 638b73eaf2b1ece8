"""The log beside the lake: `python -m benchmarks.loop [--decisions 200000] [--folder DIR]`.

Decisions of the ad-load schema (5 actions, 16 features), one half by uniform, the other by a promoted softmax, and a reward for
82.5 % of them, made by the service's own functions and stored by its own log. Then, each in a process of its own: ingest in MB of
records per CPU second, beside the floor of reading the same rows; replay of every action (L1) and of every share (L2) in decisions
per CPU second; an audit, and one more after a row was deleted by hand. One JSON line per figure. A log in `--folder` is used again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = 'tenant = "feed"\ndecision_points = ["ads.toml"]\n[lake]\nbuckets = 4\n'

CHUNK = 1000
"""Decisions of a batch."""


def write_log(folder: Path, decisions: int) -> None:
    """A folder of settings, registry and log."""
    import msgspec

    from bandits.batch import DecisionBatch
    from bandits.decision_point import parse_decision_point
    from bandits.events import Decision, Reward, digest
    from bandits.log.port import Entry, Kind, decision_key, reward_key
    from bandits.log.sqlite import SqliteLog
    from bandits.policy import UNIFORM, Floor, Softmax, Uniform
    from bandits.registry import Registry
    from bandits.scorers import Linear
    from pipelines.nightly.simulated import ARRIVING, FEATURES, FLOOR, LOADS, POINT, SALT
    from serving.decide import Decider, Served, answer, decide_all
    from serving.requests import asked_many

    if (folder / "propel.toml").exists():
        return
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "salts.toml").write_text(f'{SALT.epoch} = "{SALT.key.hex()}"\n')
    (folder / "ads.toml").write_text(POINT)
    point, rng = parse_decision_point(POINT), np.random.default_rng(0)
    registry = Registry(folder / "registry")
    policy = Floor(Softmax(Linear(rng.normal(size=5), rng.normal(size=(FEATURES, 5)) / 2, np.empty(0)), 1.0), FLOOR)
    golden = DecisionBatch.of(rng.normal(size=(8, FEATURES)), np.ones((8, len(LOADS)), dtype=np.bool_))
    artifact = registry.load(registry.register(policy, point, name="softmax", golden=golden))
    registry.promote(artifact.digest, who="benchmark", why="to be replayed")
    by = Decider(SALT, lambda tenant, unit: unit, time.time_ns)
    encode = msgspec.json.Encoder().encode
    log = SqliteLog(folder / "data" / "log", reserve=1 << 20)
    for start in range(0, decisions, CHUNK):
        half = Served(point, Uniform(), UNIFORM) if start < decisions // 2 else Served(point, artifact.policy, artifact.reference)
        contexts = np.round(rng.normal(size=(CHUNK, FEATURES)), 3).tolist()
        units = rng.integers(0, decisions // 4 + 1, CHUNK).tolist()
        requests = [
            {"context": {f"x{i}": value for i, value in enumerate(context)}, "unit": f"user-{unit}"}
            for context, unit in zip(contexts, units, strict=True)
        ]
        made = [
            one
            for some in (requests[at : at + 100] for at in range(0, CHUNK, 100))
            for one in decide_all(asked_many(encode({"decisions": some}), half.plain), "feed", half, by)
            if isinstance(one, Decision)
        ]
        log.append(
            [
                Entry(
                    Kind.DECISION, decision_key("feed", one.decision_id), one.request_hash, encode(one),
                    encode(answer(one, "t" * 22)), fresh=True,
                )
                for one in made
            ]
        )  # fmt: skip
        values = np.round(rng.random(len(made)), 4).tolist()
        rewards = [
            Reward(
                tenant="feed", decision_id=one.decision_id, name="value", observed_at_ns=time.time_ns(),
                received_at_ns=time.time_ns(), value=value,
            )
            for one, value in zip(made, values, strict=True) if rng.random() < ARRIVING
        ]  # fmt: skip
        log.append(
            [
                Entry(Kind.REWARD, reward_key("feed", one.decision_id, "value", ""), digest(str(one.value).encode()), encode(one))
                for one in rewards
            ]
        )
    deadline = time.monotonic() + 120
    while log.folder.joinpath("keys.sqlite-wal").exists() and not _indexed(log.folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    log.close()
    (folder / "propel.toml").write_text(SETTINGS)  # last: with it the folder is whole


def _indexed(folder: Path) -> bool:
    from contextlib import closing

    from bandits.log.keys import open_keys, unindexed

    with closing(open_keys(folder)) as keys:
        return not unindexed(keys, folder)


def read(folder: Path) -> dict[str, Any]:
    """The floor: every row out of SQLite, and nothing else."""
    from contextlib import closing

    from bandits.log.files import log_files, reading

    started, size = time.process_time(), 0
    for path in log_files(folder / "data" / "log"):
        with closing(reading(path)) as connection:
            for (record,) in connection.execute("SELECT record FROM entries"):
                size += len(record)
    return _rate(size, time.process_time() - started)


def ingest(folder: Path) -> dict[str, Any]:
    """All of the log into an empty lake."""
    from contextlib import closing

    from bandits.log.files import log_files, reading
    from pipelines.nightly.ingest import ingest as ingest_all
    from pipelines.nightly.lake import open_lake
    from pipelines.nightly.log_source import sources_of
    from pipelines.nightly.settings import read_settings

    records = stored = 0
    for path in log_files(folder / "data" / "log"):
        with closing(reading(path)) as connection:
            sums: Any = connection.execute(
                "SELECT sum(length(record)), sum(length(key) + length(content) + length(record) + length(answer)) FROM entries"
            ).get
            records, stored = records + sums[0], stored + sums[1]
    shutil.rmtree(folder / "lake", ignore_errors=True)
    settings = read_settings(folder / "propel.toml")
    lake = open_lake(settings)
    lake.folder.mkdir(parents=True)
    started = time.process_time()
    found = ingest_all(settings, lake, lake.snapshot(), sources_of(settings, lake, lake.snapshot()))
    lake.commit(found.entries)
    seconds = time.process_time() - started
    return {"counts": dict(found.counts)} | _rate(records, seconds) | {"stored_mb_per_cpu_s": round(stored / seconds / 1e6, 1)}


def _rate(size: int, seconds: float) -> dict[str, Any]:
    return {"record_mb": round(size / 1e6, 1), "cpu_s": round(seconds, 2), "mb_per_cpu_s": round(size / seconds / 1e6, 1)}


def replay(folder: Path, level: int) -> dict[str, Any]:
    """Every decision again."""
    from bandits.log.files import log_files
    from bandits.log.replay import judges
    from bandits.log.replay import replay as replay_all
    from bandits.registry import Registry
    from bandits.salts import read_salts
    from pipelines.nightly.settings import read_settings

    settings = read_settings(folder / "propel.toml")
    salts, files = read_salts(folder / "data" / "salts.toml"), log_files(settings.log)
    by = judges(Registry(folder / "registry"), settings.points) if level == 2 else None
    started = time.process_time()
    found = replay_all(files, salts, by)
    seconds = time.process_time() - started
    shares = {} if level == 1 else {"shares": f"{100 * found.vectors / found.sampled:.3f} %"}
    return {
        "decisions": found.decisions, "actions": f"{100 * found.actions / found.sampled:.3f} %", **shares, "wrong": found.wrong,
        "cpu_s": round(seconds, 2), "decisions_per_cpu_s": round(found.decisions / seconds),
    }  # fmt: skip


def audit(folder: Path) -> dict[str, Any]:
    """Counts and findings."""
    from pipelines.log.audit import audit as audit_log
    from pipelines.nightly.settings import read_settings

    started = time.process_time()
    found = audit_log(read_settings(folder / "propel.toml"))
    return {
        "records": found.appends, "missing": found.missing, "orphans": found.orphans, "findings": found.findings,
        "cpu_s": round(time.process_time() - started, 2),
    }  # fmt: skip


def delete_one(folder: Path) -> dict[str, Any]:
    """An audit with one row deleted by hand, in a copy of the middle file."""
    from contextlib import closing

    from bandits.log.files import log_files, writing

    files = log_files(folder / "data" / "log")
    path = files[len(files) // 2]
    saved = {one: one.read_bytes() for one in path.parent.glob(f"{path.name}*")}
    try:
        with closing(writing(path)) as connection:
            connection.execute("DELETE FROM entries WHERE row = (SELECT max(row) / 2 FROM entries)")
        return audit(folder)
    finally:
        for one, content in saved.items():
            one.write_bytes(content)


FIGURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "read": read,
    "ingest": ingest,
    "replay, actions": lambda folder: replay(folder, 1),
    "replay, actions and shares": lambda folder: replay(folder, 2),
    "audit": audit,
    "audit, one row deleted": delete_one,
}


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--decisions", type=int, default=200_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--figure", choices=list(FIGURES))
    asked = parser.parse_args()
    if asked.figure:
        print(json.dumps({"figure": asked.figure} | FIGURES[asked.figure](asked.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch) / "loop"
        write_log(folder, asked.decisions)
        for figure in FIGURES:
            subprocess.run([sys.executable, "-m", "benchmarks.loop", "--figure", figure, "--folder", str(folder)], check=True)


if __name__ == "__main__":
    main()
