"""The whole loop in one process, over many worlds: decide, log, ingest, learn, forecast, serve the winner, and see what it earns.

`python -m tests.verify.closed_loop --runs 200` asks in how many of them the second day's mean lies inside the prediction interval
that was made of the first. Every finished run is kept, so that one which was stopped goes on.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import struct
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bandits.decision_point import DecisionPoint
from bandits.events import Decision, Reward, digest
from bandits.log.port import Entry, Kind, decision_key, reward_key
from bandits.log.sqlite import SqliteLog
from bandits.policy import UNIFORM, Policy, Uniform
from bandits.registry import Registry
from bandits.sampling import Salt
from bandits.simulators.payments import ACTIONS, POINT, Payments, World, results
from ope.data import FloatArray, IntArray
from pipelines.nightly.mart import read_mart
from pipelines.nightly.promote import promote
from pipelines.nightly.run import nightly
from pipelines.nightly.settings import Settings, day_start_ns, read_settings
from serving.decide import Decider, Served, decide_all
from serving.requests import asked_many

DAYS = (dt.date(2026, 11, 2), dt.date(2026, 11, 3))
PAYMENTS = 5_000
"""A day."""

CARDS = 50_000

SALT = Salt(1, b"a salt of thirty-two bytes here.")

SETTINGS = """
tenant = "shop"
decision_points = ["payments.toml"]
[join]
cutoff_hours = 25.0
lookback_days = 1
[certificate]
salts = "data/salts.toml"
[train]
days = 1
learners = ["DR", "oracle-softmax"]
[evaluate]
windows = [1]
"""

encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Outcome:
    """One run."""

    seed: int
    policy: str
    """That was served on day 2."""
    promoted: bool
    """Whether the guard rails would have let it pass."""
    forecast: float
    forecast_stderr: float
    day1: float
    day2: float
    day2_stderr: float
    true: float
    """Share that the policy authorises of day 2's payments, which only the world knows."""

    @property
    def z(self) -> float:
        """Distance of day 2 from its forecast, in standard errors of both."""
        return (self.day2 - self.forecast) / math.hypot(self.forecast_stderr, self.day2_stderr)


def run(seed: int, folder: Path, payments: int = PAYMENTS) -> Outcome | None:
    """Two days of one world without drift; None where the first day left no candidate worth a test."""
    settings = prepare(folder)
    (point,) = settings.points
    world, rng = World.draw(seed), np.random.default_rng([seed, 1])
    day1, _ = live_a_day(world, point, Uniform(), UNIFORM, DAYS[0], folder, rng, payments)
    night = nightly(DAYS[0], settings)
    (found,) = promote(read_mart(folder / "reports", settings.tenant, Path(night.report).name), settings, dry_run=True)
    if found.digest is None or found.estimate is None or found.estimate["value"] is None:
        return None
    artifact = Registry(folder / "registry").load(found.digest)
    day2, true = live_a_day(world, point, artifact.policy, artifact.reference, DAYS[1], folder, rng, payments)
    return Outcome(
        seed, found.estimate["policy"], found.promoted, found.estimate["value"], found.estimate["stderr"], float(day1.mean()),
        float(day2.mean()), float(day2.std(ddof=1) / np.sqrt(len(day2))), true,
    )  # fmt: skip


def prepare(folder: Path) -> Settings:
    """A folder as the service and the night share it."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "salts.toml").write_text(f'{SALT.epoch} = "{SALT.key.hex()}"\n')
    (folder / "payments.toml").write_text(POINT)
    (folder / "propel.toml").write_text(SETTINGS)
    return read_settings(folder / "propel.toml")


def live_a_day(
    world: World, point: DecisionPoint, policy: Policy, reference: str, day: dt.date, folder: Path, rng: np.random.Generator, n: int
) -> tuple[FloatArray, float]:
    """What each of a day's payments brought (n,), and what the policy is truly worth on them; all of it is in the log."""
    payments = world.payments(n, rng)
    times = np.sort(rng.integers(0, 86_400 * 10**9, n)) + day_start_ns(day)
    decisions = decided(payments, times, point, policy, reference, rng)
    action = np.array([ACTIONS.index(one.actions[one.chosen]) for one in decisions])
    came = results(world, payments, action, rng)
    log = SqliteLog(folder / "data" / "log", reserve=1 << 20)
    log.append([_decision_entry(one) for one in decisions])
    log.append(
        [
            _reward_entry(one, bool(good), int(after * 1e9))
            for one, good, after in zip(decisions, came.authorised, came.after, strict=True)
        ]
    )
    log.close()
    vectors = np.zeros((n, len(ACTIONS)))
    for row, one in enumerate(decisions):
        vectors[row, [ACTIONS.index(name) for name in one.actions]] = one.share_vector() / 2**31
    return came.authorised.astype(np.float64), world.value(payments, vectors)


def decided(
    payments: Payments, times: IntArray, point: DecisionPoint, policy: Policy, reference: str, rng: np.random.Generator
) -> list[Decision]:
    """The service's decisions on requests as they would come over the wire, at those times (n,)."""
    clock = iter(times.tolist())
    served, by = Served(point, policy, reference), Decider(SALT, lambda tenant, unit: unit, lambda: next(clock))
    cards = rng.integers(0, CARDS, len(payments))
    requests = [
        {
            "decision_id": f"payment-{time}",  # not a random one: so a seed draws the same actions every time
            "context": context,
            "unit": f"card-{card}",
            "actions": [{"id": name} for name, may in zip(ACTIONS, row, strict=True) if may],
        }
        for time, context, card, row in zip(times.tolist(), payments.contexts(), cards, payments.eligible.tolist(), strict=True)
    ]
    found: list[Decision] = []
    for start in range(0, len(requests), 100):
        asked = asked_many(encode({"decisions": requests[start : start + 100]}), served.plain)
        for one in decide_all(asked, "shop", served, by):
            assert isinstance(one, Decision), one
            found.append(one)
    return found


def _decision_entry(made: Decision) -> Entry:
    return Entry(Kind.DECISION, decision_key(made.tenant, made.decision_id), made.request_hash, encode(made), b"{}", fresh=True)


def _reward_entry(made: Decision, authorised: bool, after_ns: int) -> Entry:
    at, value = made.decided_at_ns + after_ns, float(authorised)
    reward = Reward(
        tenant=made.tenant, decision_id=made.decision_id, name="authorised", observed_at_ns=at, received_at_ns=at, value=value
    )
    key = reward_key(made.tenant, made.decision_id, "authorised", "")
    return Entry(Kind.REWARD, key, digest(struct.pack("<d", value)), encode(reward))


def outcome_of(seed: int, payments: int = PAYMENTS) -> dict[str, Any]:
    """A run as it is kept."""
    with tempfile.TemporaryDirectory() as folder:
        found = run(seed, Path(folder) / "loop", payments)
    return {"seed": seed} if found is None else asdict(found)


def main() -> int:
    """Make the runs that are not there yet, and say in how many of all of them the forecast held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--kept", type=Path, default=Path(".verify/closed_loop.jsonl"))
    asked = parser.parse_args()
    asked.kept.parent.mkdir(parents=True, exist_ok=True)
    done = {line["seed"]: line for line in map(json.loads, asked.kept.read_text().splitlines() if asked.kept.exists() else ())}
    left = [seed for seed in range(asked.runs) if seed not in done]
    with ProcessPoolExecutor(os.cpu_count()) as processes, asked.kept.open("a") as kept:
        for line in processes.map(outcome_of, left):
            kept.write(json.dumps(line) + "\n")
            kept.flush()
            done[line["seed"]] = line
            sys.stderr.write(f"\r{len(done)} of {asked.runs} runs")
    found = [Outcome(**line) for seed, line in done.items() if seed < asked.runs and len(line) > 1]
    z = np.array([one.z for one in found])
    inside = float((np.abs(z) <= 1.959964).mean())
    promoted, day1, day2 = (np.mean([getattr(one, name) for one in found]) for name in ("promoted", "day1", "day2"))
    sys.stdout.write(
        f"\n{len(found)} of {asked.runs} runs had a candidate worth a test; day 2 inside its forecast's 95 % prediction interval "
        f"in {inside:.1%} (expected: at least 90 %)\nmean z {z.mean():+.2f}, sd {z.std():.2f}; {promoted:.0%} passed every guard "
        f"rail; authorised on day 1 {day1:.4f}, on day 2 {day2:.4f}\n"
    )
    return 0 if inside >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
