"""Policies that change, and artifacts that are not what they should be, under a server that runs: it serves on, and knows what."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from bandits.artifact import FORMATS, MANIFEST, SIGNATURE
from bandits.decision_point import Actions, DecisionPoint, RewardRule
from bandits.log.files import log_files
from bandits.log.segments import records
from bandits.policy import Floor, Thompson
from bandits.posteriors import BetaBernoulli
from bandits.registry import Registry
from serving.setup import Made
from tests.bandits.test_registry import execute
from tests.faults import load_client
from tests.faults.audit import attempts, audit, waits
from tests.faults.live_server import KILLS, Live, load, log_of, make, resident, show, start, status_of
from tests.faults.test_artifacts import KEY, SCHEMA, SIGNED, TRICKS, mutant, put, signed, write
from tests.faults.test_server_killed import answered, wait_for
from tests.serving.points import AD_LOAD, golden, linear
from tests.serving.recomputed import recomputed
from tests.serving.server import Server

Trick = Callable[[Path], Path]
"""Makes something else of an artifact; where it lies then."""

POINTS = 20 if KILLS else 4

MUTANTS = 1000 if KILLS else 6
"""Of bytes, beside all the others."""

RELOADS = 200 if KILLS else 5

RATE = 300.0

DRAWS = 50_000
"""Of a policy of 2 MB: 5 actions, 8 bytes each."""


def metric(made: Made, name: str, **labels: str) -> float:
    """Samples of a name and these labels, added up."""
    families = text_string_to_metric_families(status_of(made, "/metrics", seconds=20)[1].decode())
    samples = [one for family in families for one in family.samples if one.name == name]
    return sum(one.value for one in samples if labels.items() <= one.labels.items())


# T22


def of_bytes(number: int) -> Trick:
    def make_it(path: Path) -> Path:
        contents = {name: (path / name).read_bytes() for name in (MANIFEST, SIGNATURE, *FORMATS)}
        put(path, contents | mutant(contents, number, np.random.default_rng(number)))
        return path

    return make_it


def of_path(trick: Callable[[Path], object]) -> Trick:
    def make_it(path: Path) -> Path:
        trick(path)
        return path

    return make_it


def of_content(change: Callable[[Path], dict[str, bytes]]) -> Trick:
    return lambda path: signed(path, **change(path))


def all_tricks() -> list[Trick]:
    """Every mutant there is; without time for all, some of every kind. One that never answers costs the child a minute."""
    paths = [of_path(trick) for trick, _ in TRICKS.values()]
    quick = ("a pickle", "a gigabyte", "an unknown kind", "other answers")
    contents = [of_content(change) for name, change in SIGNED.items() if KILLS or name in quick]
    return [*map(of_bytes, range(MUTANTS)), *paths, *contents]


def with_points(made: Made, count: int) -> list[DecisionPoint]:
    """Give a server other decision points, and a registry whose key is that of the mutants."""
    reward = RewardRule(name="paid", low=0.0, high=1.0, window_seconds=60.0)
    points = [
        DecisionPoint(name=f"route-{at}", actions=Actions(catalogue=tuple("abcd")), rewards=(reward,), features=SCHEMA)
        for at in range(count)
    ]
    features = "".join(f'[[features.context]]\ntype = "number"\nname = "{one.name}"\n' for one in SCHEMA.context)
    rewards = '[[rewards]]\nname = "paid"\nlow = 0.0\nhigh = 1.0\nwindow_seconds = 60.0\n'
    for point in points:
        text = f'name = "{point.name}"\n[actions]\ncatalogue = ["a", "b", "c", "d"]\n{rewards}{features}'
        (made.config.parent / f"{point.name}.toml").write_text(text)
    names = json.dumps([f"{point.name}.toml" for point in points])
    made.config.write_text(made.config.read_text().replace('["ad-load.toml"]', names))
    folder = made.config.parent / "registry"
    folder.mkdir()
    (folder / "signing.key").write_bytes(KEY.private_bytes_raw())
    (folder / "signing.key").chmod(0o600)
    return points


def listed(registry: Registry, path: Path, point: str) -> str:
    """An artifact that is listed, whatever it holds; its digest."""
    execute(registry, f"INSERT OR IGNORE INTO artifacts VALUES ('{path.name}', '{point}', 0)")
    return path.name


def point_at(registry: Registry, digests: dict[str, str]) -> None:
    """Move pointers as nothing but a hand in the database could: every check is left to whoever loads."""
    cases = " ".join(f"WHEN '{point}' THEN '{digest}'" for point, digest in digests.items())
    names = ", ".join(f"'{point}'" for point in digests)
    execute(registry, f"UPDATE pointers SET digest = CASE decision_point {cases} END WHERE decision_point IN ({names})")


def test_no_mutant_of_a_promoted_artifact_serves_and_what_served_goes_on(tmp_path: Path) -> None:
    """T22: mutants in the place of what is promoted, at several decision points at once, while the server runs."""
    made = make(tmp_path / "server", most_lag_milliseconds=5000.0)
    points = with_points(made, POINTS)
    registry, artifacts = Registry(made.config.parent / "registry"), made.config.parent / "registry" / "artifacts"
    good: dict[str, str] = {}
    for point in points:
        good[point.name] = listed(registry, write(artifacts, decision_point=point.name), point.name)
        registry.promote(good[point.name], who="tests", why="good")
    tricks = all_tricks()
    with start(made) as live:
        server, refused = Server(made.config, made.key, live.port, live.process), 0
        for number in range(0, len(tricks), POINTS):
            promoted: dict[str, str] = {}
            for point, trick in zip(points, tricks[number : number + POINTS], strict=False):
                # another one each time: what failed is not tried again at once
                path = write(artifacts, "trees", decision_point=point.name, snapshot={"turn": number})
                promoted[point.name] = listed(registry, trick(path), point.name)
            point_at(registry, promoted)
            refused += len(promoted)
            wait_for(lambda refused=refused: metric(made, "propel_policy_reloads_total", state="failed") >= refused, 150.0)
            told = json.loads(status_of(made, "/readyz", seconds=20)[1])
            assert set(told["stale"]) >= promoted.keys()
            name = points[number // POINTS % POINTS].name
            answer = server.decide({"context": {feature.name: 0.5 for feature in SCHEMA.context}}, point=name)
            assert (answer.status, answer.json["policy"]) == (200, f"night@{good[name][:32]}")
        assert metric(made, "propel_policy_reloads_total", state="loaded") == 0
        point_at(registry, good)
        wait_for(lambda: metric(made, "propel_policy_reload_failed") == 0)
        assert live.process.poll() is None
        stored = [one for path in log_files(log_of(made)) for one in records(path)]
    show(f"T22: {refused} mutants refused, 0 loaded, {len(stored)} decisions by what served, {load()}")
    assert logged(live, "promoted policy does not serve") == refused
    assert logged(live, "serving") == 1
    assert not Path("/tmp/propel-pickle-ran").exists()


def logged(live: Live, event: str) -> int:
    """How often the server said something."""
    return sum(json.loads(line)["event"] == event for line in live.told.read_text().splitlines())


# T23


@contextmanager
def driven(live: Live, ledger: Path) -> Iterator[None]:
    """A client that asks at the rate for as long as it takes."""
    client = load_client.start(
        port=live.port, key=live.made.key, ledger=str(ledger), name=ledger.stem, connections=32, rate=RATE, seconds=3600.0
    )
    try:
        wait_for(lambda: len(answered(ledger)) >= 10)
        yield
        assert client.poll() is None
    finally:
        client.kill()
        client.wait()


def reloaded(live: Live, folder: Path, name: str) -> float:
    """Policies that change as fast as the server takes them, under load: p99 in parts of that without changes."""
    registry = Registry(live.made.config.parent / "registry")
    digests = [registry.register(linear(AD_LOAD, seed), AD_LOAD, name=name, golden=golden(AD_LOAD)) for seed in (0, 1)]
    before, during = folder / f"{name}-before.jsonl", folder / f"{name}-during.jsonl"
    load_client.run(
        port=live.port, key=live.made.key, ledger=str(before), name=before.stem, connections=32, rate=RATE,
        seconds=30.0 if KILLS else 1.0,
    )  # fmt: skip
    with driven(live, during):
        for turn in range(RELOADS):
            digest = digests[turn % 2]
            registry.promote(digest, who="tests", why="another")
            wait_for(lambda digest=digest: metric(live.made, "propel_policy_info", policy=f"{name}@{digest[:32]}") == 1)
    sent = [one for ledger in (before, during) for one in attempts(ledger)]
    assert {one.status for one in sent if one.got is not None} == {200}, "a request failed"
    calm, busy = waits(attempts(before), 0.99), waits((one for one in attempts(during) if one.got is not None), 0.99)
    show(f"T23: {len(sent)} requests, {RELOADS} reloads; p99 {calm * 1000:.1f} ms without, {busy * 1000:.1f} ms with, {load()}")
    return busy / calm


def test_policies_that_change_under_load_fail_no_request_and_decide_as_their_names_say(tmp_path: Path) -> None:
    """T23: each decision's shares are those of the artifact it names. How long answers take has a second chance."""
    shed = {} if KILLS else {"most_lag_milliseconds": 5000.0}  # a machine that runs other tests may be late
    made = make(tmp_path / "server", **shed)
    with start(made) as live:
        ratio = reloaded(live, tmp_path, "first")
        if KILLS and ratio > 2:
            show(f"p99 grew by a factor of {ratio:.2f}: once more")
            ratio = reloaded(live, tmp_path, "second")
        assert live.process.poll() is None
        assert metric(made, "propel_policy_reloads_total", state="failed") == 0
    audit(log_of(made), *sorted(tmp_path.glob("*.jsonl")))
    stored = [one for path in log_files(log_of(made)) for one in records(path)]
    named = recomputed(stored, Registry(made.config.parent / "registry"), AD_LOAD)
    assert len(named) >= 3, "not every policy decided"
    if KILLS:
        assert ratio <= 2


def test_policies_that_were_replaced_leave_no_memory_behind(tmp_path: Path) -> None:
    """Each policy holds 2 MB: none is kept for longer than until the next one but one serves."""
    made = make(tmp_path / "server")
    registry, sizes = Registry(made.config.parent / "registry"), list[int]()
    beliefs = [Floor(Thompson(BetaBernoulli.prior(5), DRAWS, seed), AD_LOAD.exploration_floor) for seed in (0, 1)]
    digests = [registry.register(belief, AD_LOAD, name="belief", golden=golden(AD_LOAD, rows=1)) for belief in beliefs]
    registry.promote(digests[0], who="tests", why="first")
    with start(made) as live:
        for turn in range(1, 1 + (200 if KILLS else 5)):
            point_at(registry, {AD_LOAD.name: digests[turn % 2]})
            wait_for(lambda turn=turn: metric(made, "propel_policy_reloads_total", state="loaded") == turn)
            sizes.append(resident(live.process.pid))
    grown = (sizes[-1] - sizes[1]) / 2**20
    show(f"{len(sizes)} reloads of 2 MB: grown by {grown:.1f} MB")
    assert grown < 4
