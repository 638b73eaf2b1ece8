"""`propel demo --live`: two days of payments against a real service, a night between them, and the second day beside its forecast.

Everything goes through the processes and commands that an operator uses: `propel serve`, clients over HTTP, `propel nightly`,
`propel promote`, `propel log`. A day of the simulated world lasts some seconds, and the decision point's window with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bandits.simulators.payments import DAY, Payments, World
from bandits.simulators.payments import POINT as DECISION_POINT
from ope.data import InputError
from ope.intervals import normal_quantile
from serving.client import AsyncClient, read_defaults
from serving.setup import Made, initialise
from serving.simulated import PATIENCE, POINT, Driven, drive, noting

PROPEL = (sys.executable, "-P", "-m", "propel")
"""-P: a folder called propel where the demo was started is not taken for it."""

SECOND = 1e-4
"""Seconds that a second of the world takes: a day lasts 8.64."""

SETTINGS = f"""\
# Settings of the demo: windows are seconds here, so that a day's rewards are complete at once.
tenant = "default"
decision_points = ["{POINT}.toml"]

[serve]
port = {{port}}
data = "data"

[certificate]
salts = "data/salts.toml"

[join]
lookback_days = 2

[train]
days = 2

[evaluate]
windows = [2]
"""


@dataclass(frozen=True, slots=True)
class Day:
    """One day, as its client saw it."""

    since: dt.datetime
    until: dt.datetime
    driven: Driven
    true: float
    """Share that the policies of the day authorise of its payments, which only the world knows."""


@dataclass(frozen=True, slots=True)
class Live:
    """What the demo found."""

    first: Day
    promotion: dict[str, Any]
    """As `propel promote --json` says it."""
    second: Day
    replay: dict[str, Any]
    audit: dict[str, Any]
    seconds: dict[str, float]
    """That each part took."""


def run_live(out: Path, console: Console, *, payments: int = 10_000, seed: int = 0, second: float = SECOND) -> int:
    """Run it all, and print what came of it; 0 where the winner was promoted, and 3 where a guard rail said no."""
    folder = out / "live"
    clear(folder)
    made = prepare(folder, second)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with _told_to_end(), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Starting", total=None)

        def show(what: str, done: int = 0, total: int | None = None) -> None:
            progress.update(task, description=what, completed=done, total=total)

        found = live(made, folder, payments, seed, second, show)
    (folder / "live.json").write_text(json.dumps(to_record(found), indent=2) + "\n")
    console.print(table(found))
    for line in lines(found):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"\nAll of it is in {folder}: settings, log, lake, registry, reports, live.json.", soft_wrap=True)
    return 0 if found.promotion["promoted"] else 3


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """SIGTERM ends the demo as an exception does: its service ends, too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def clear(folder: Path) -> None:
    """Delete what an earlier demo made. Raises InputError for a folder that holds something else."""
    if not folder.exists():
        return
    if not (folder / f"{POINT}.toml").is_file() or not (folder / "propel.toml").is_file():
        raise InputError(f"{folder}: found something that no earlier demo made; expected a folder of its own: give another --out")
    shutil.rmtree(folder)


def window(second: float) -> float:
    """Seconds after a decision within which its result comes: those of a day, and some for the way."""
    return round(1.1 * DAY * second + 0.5, 1)


def prepare(folder: Path, second: float = SECOND) -> Made:
    """A folder from which the service starts on a free port, with the payments' decision point."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = initialise(folder, port)
    (folder / "ad-load.toml").unlink()
    (folder / f"{POINT}.toml").write_text(DECISION_POINT.replace(f"window_seconds = {DAY}", f"window_seconds = {window(second)}"))
    made.config.write_text(SETTINGS.format(port=port))
    return made


def live(made: Made, folder: Path, payments: int, seed: int, second: float, show: Callable[..., None]) -> Live:
    """Both days, and the night between them. `show` is told what is being worked on."""
    world, rng, seconds = World.draw(seed), np.random.default_rng([seed, 1]), dict[str, float]()

    @contextlib.contextmanager
    def part(name: str, what: str) -> Iterator[None]:
        show(what)
        started = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - started, 1)

    with serving(made, folder):
        with part("day 1", "Day 1: payments are routed evenly"):
            first = a_day(made, folder, world.payments(payments, rng), world, rng, second, partial(show, "Day 1: payments"))
        with part("night", "Night: ingest, join, certify, train, evaluate, select, report"):
            report = command(folder, "nightly", "--from", _text(first.since), "--to", _text(first.until))["report"]["snapshot_id"]
        with part("promotion", "Promoting the winner"):
            (promotion,) = command(folder, "promote", "--report", report)
            if promotion["promoted"]:
                wait_for_policy(made, promotion["policy"])
        with part("day 2", "Day 2: payments are routed by the winner"):
            tomorrow = world.drifted(rng, 0.0)
            then = a_day(made, folder, tomorrow.payments(payments, rng), tomorrow, rng, second, partial(show, "Day 2: payments"))
    with part("replay", "Replaying every decision"):
        replay, audit = command(folder, "log", "replay"), command(folder, "log", "audit", "--ledger", str(folder / "ledger.jsonl"))
    return Live(first, promotion, then, replay, audit, seconds)


@contextlib.contextmanager
def serving(made: Made, folder: Path) -> Iterator[None]:
    """The service, in a process of its own, ready; ended afterwards. Raises InputError where it does not start or end well."""
    with (folder / "serve.log").open("wb") as told:
        process = subprocess.Popen([*PROPEL, "serve", "--config", str(made.config)], stderr=told)  # noqa: S603
    try:
        until = time.monotonic() + 60
        while get(made, "/readyz")[0] != 200:
            if process.poll() is not None or time.monotonic() > until:
                said = (folder / "serve.log").read_text(errors="replace").strip().splitlines()[-1:]
                raise InputError(
                    f"the service is not ready (status {process.poll()}: {''.join(said)[:300]}); expected it within 60 s: "
                    f"see {folder / 'serve.log'}"
                )
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.returncode:
        raise InputError(f"the service ended with status {process.returncode}; expected 0: see {folder / 'serve.log'}")


def a_day(
    made: Made,
    folder: Path,
    payments: Payments,
    world: World,
    rng: np.random.Generator,
    second: float,
    progress: Callable[[int, int], object],
) -> Day:
    """A day's payments, until the windows of all of them are closed."""

    async def driven() -> Driven:
        async with AsyncClient(made.url, made.key, read_defaults([folder / f"{POINT}.toml"]), PATIENCE) as client:
            return await drive(client, world, payments, rng, second=second, ledger=ledger, progress=progress)

    since = dt.datetime.now(dt.UTC)
    with noting(folder / "ledger.jsonl") as ledger:
        found = asyncio.run(driven())
    time.sleep(max(0.0, found.last + window(second) + 0.1 - time.monotonic()))
    return Day(since, dt.datetime.now(dt.UTC), found, found.true(world, payments))


def command(folder: Path, *words: str) -> Any:
    """What a command of `propel` prints as JSON. Raises InputError where it fails; to find something to say is no failure."""
    line = [*PROPEL, *words, "--config", str(folder / "propel.toml"), "--json"]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)  # noqa: S603
    if ran.returncode not in (0, 3):
        raise InputError(f"propel {' '.join(words)} ended with status {ran.returncode}: {ran.stderr.strip()[-2000:]}")
    return json.loads(ran.stdout)


def wait_for_policy(made: Made, policy: str) -> None:
    """Until the service decides by it. Raises InputError where it does not within 10 s."""
    until = time.monotonic() + 10
    while f'policy="{policy}"'.encode() not in get(made, "/metrics")[1]:
        if time.monotonic() > until:
            raise InputError(f"found the service without {policy} 10 s after its promotion; expected it served: see its log")
        time.sleep(0.1)


def get(made: Made, path: str) -> tuple[int, bytes]:
    """Status and body; 0 where nobody answers."""
    host, port = made.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def prediction(found: Live, level: float = 0.95) -> tuple[float, float] | None:
    """Where the second day's mean was to lie: forecast and second day both vary."""
    estimate = found.promotion["estimate"]
    if estimate is None or estimate["value"] is None or estimate["stderr"] is None:
        return None
    half = normal_quantile(level) * float(np.hypot(estimate["stderr"], found.second.driven.stderr))
    return estimate["value"] - half, estimate["value"] + half


def table(found: Live) -> Table:
    """Day 1, the forecast, and day 2 beside it."""
    first, second, estimate, ends = found.first, found.second, found.promotion["estimate"], prediction(found)
    promoted = found.promotion["promoted"]
    shown = Table("", "authorised", "95 % interval", "truly")
    shown.add_row(f"day 1: {_policies(first.driven)}", *_mean(first.driven), f"{first.true:.4f}")
    if promoted and estimate is not None and ends is not None:
        shown.add_row("day 2, as it was forecast", f"{estimate['value']:.4f}", f"{ends[0]:.4f} to {ends[1]:.4f} (prediction)", "")
    shown.add_row(f"day 2: {_policies(second.driven)}", *_mean(second.driven), f"{second.true:.4f}", end_section=True)
    if promoted and (change := found.promotion["difference"]) is not None:
        shown.add_row("day 2 less day 1, as it was forecast", *_interval(change["value"], change["low"], change["high"], "+"), "")
    gain = second.driven.rate - first.driven.rate
    half = normal_quantile(0.95) * float(np.hypot(first.driven.stderr, second.driven.stderr))
    shown.add_row("day 2 less day 1", *_interval(gain, gain - half, gain + half, "+"), f"{second.true - first.true:+.4f}")
    return shown


def lines(found: Live) -> list[str]:
    """What the demo found, in sentences."""
    promoted, ends, replayed, audit = found.promotion["promoted"], prediction(found), found.replay["replayed"], found.audit
    said = "promoted: its certificate passed, and the lower bound of its difference on fold B is above the tolerance."
    text = [f"The night's winner was {said if promoted else 'not promoted: ' + ' '.join(found.promotion['reasons'])}"]
    if promoted and ends is not None:
        inside = ends[0] <= found.second.driven.rate <= ends[1]
        text.append(f"Day 2 lies {'inside' if inside else 'outside'} the 95 % prediction interval that was made before it.")
    return [
        *text,
        f"{found.replay['sampled']:,} decisions replay: {100 * replayed['actions']:.3f} % of the actions, "
        f"{100 * replayed['shares']:.3f} % of the share vectors.",
        f"{audit['attempts']:,} attempts; in the log {audit['decisions']:,} decisions and {audit['rewards']:,} rewards, "
        f"{audit['missing']} missing, {audit['orphans']} orphans.",
        "Seconds: " + ", ".join(f"{name} {taken:g}" for name, taken in found.seconds.items()) + ".",
    ]


def to_record(found: Live) -> dict[str, Any]:
    """Ready for JSON."""
    days = {
        name: {
            "since": _text(day.since), "until": _text(day.until), "payments": len(day.driven.served),
            "served": sum(day.driven.served), "authorised": day.driven.rate, "stderr": day.driven.stderr, "true": day.true,
            "seconds": round(day.driven.seconds, 1),
        }
        for name, day in (("day 1", found.first), ("day 2", found.second))
    }  # fmt: skip
    return days | {
        "promotion": found.promotion, "prediction": prediction(found), "replay": found.replay, "audit": found.audit,
        "seconds": found.seconds,
    }  # fmt: skip


def _policies(driven: Driven) -> str:
    """Who decided, without the digest."""
    return ", ".join(sorted({name.partition("@")[0].split("-20")[0] for name in driven.policy}))


def _mean(driven: Driven) -> tuple[str, str]:
    half = normal_quantile(0.95) * driven.stderr
    return _interval(driven.rate, driven.rate - half, driven.rate + half)


def _interval(value: float, low: float, high: float, sign: str = "") -> tuple[str, str]:
    return f"{value:{sign}.4f}", f"{low:{sign}.4f} to {high:{sign}.4f}"


def _text(moment: dt.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
