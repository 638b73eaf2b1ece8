"""What is promoted serves within seconds, and what is damaged does not: then the last good policy goes on, and says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bandits.policy import UNIFORM
from bandits.registry import Registry
from bandits.safe import freeze_safe
from ope.data import InputError
from serving.reload import EVERY, PAUSE, Promoted, Reload, Standing, unpromoted
from serving.settings import read_settings
from tests.serving.points import AD_LOAD, PLAIN_POINT, golden, linear, promote
from tests.serving.recomputed import recomputed
from tests.serving.server import Server, make, running, within

SECONDS = 20.0
"""How long anything may take before a test fails. An operator is promised 5 on a machine that has time for it."""

ASKED = {"context": {"minutes_in_session": 3.0, "device": "phone"}}

STALE = {"status": "ok", "stale": ["ad-load"]}

WHO = {"who": "ops", "why": "tests"}


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of four policies, none of them served."""
    registry = Registry(tmp_path_factory.mktemp("nights") / "registry")
    for seed in range(4):
        registry.register(linear(AD_LOAD, seed), AD_LOAD, name="night", golden=golden(AD_LOAD))
    return registry.folder


def copied(nights: Path, folder: Path) -> tuple[Registry, list[str]]:
    """One of the same, and its digests."""
    shutil.copytree(nights, folder.with_name("copy"))
    folder.with_name("copy").rename(folder)  # whole at once: a service may be watching
    registry = Registry(folder)
    return registry, list(registry.listed())


def serves(server: Server, digest: str, name: str = "night") -> bool:
    """Whether this alone decides, over connections of their own, so that every worker is asked. What is shed says nothing."""
    answers = [answer.json for answer in (server.decide(ASKED) for _ in range(12)) if answer.status == 200]
    return {answer["policy"] for answer in answers} == {reference(digest, name)}


def reference(digest: str, name: str = "night") -> str:
    return f"{name}@{digest[:32]}"


def number(server: Server, name: str, **labels: str) -> float:
    """A sample of the metrics; 0 where there is none."""
    families = text_string_to_metric_families(server.ask("GET", "/metrics", key=None).body.decode())
    samples = [one for family in families for one in family.samples if one.name == name]
    return sum(one.value for one in samples if labels.items() <= one.labels.items())


def failing(server: Server) -> bool:
    return number(server, "propel_policy_reload_failed", decision_point="ad-load") == 1


def lines(server: Server, event: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, server.errors().splitlines()) if line["event"] == event]


def flip(registry: Registry, digest: str) -> None:
    """One bit of a policy, or the same bit back."""
    path = registry.path(digest) / "policy.json"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@contextmanager
def unseen(server: Server) -> Iterator[None]:
    """The server looks again only after what happens here."""
    os.kill(server.process.pid, signal.SIGSTOP)
    yield
    os.kill(server.process.pid, signal.SIGCONT)


def test_promotion_rollback_and_freeze_are_followed_within_seconds_by_every_worker(nights: Path, tmp_path: Path) -> None:
    config, key = make(tmp_path / "shop")
    config.write_text(config.read_text().replace("workers = 1", "workers = 2"))
    with running(config, key) as server:
        assert {server.decide(ASKED).json["policy"] for _ in range(3)} == {UNIFORM}
        registry, (first, second, *_) = copied(nights, config.parent / "registry")  # made after the start
        for digest in (first, second):
            registry.promote(digest, **WHO)
            within(SECONDS, lambda digest=digest: serves(server, digest))
        registry.rollback("ad-load", **WHO)
        within(SECONDS, lambda: serves(server, first))
        within(SECONDS, lambda: number(server, "propel_policy_reloads_total", state="loaded") == 6)
        assert number(server, "propel_policy_info", policy=reference(first)) == 1
        promotion, _ = freeze_safe(registry, AD_LOAD, **WHO)
        safe = str(promotion.to_digest)
        within(SECONDS, lambda: serves(server, safe, "safe"))
        told = server.decide(ASKED).json["propensities"]
        assert told == pytest.approx({action: 0.92 if action == "ads-2" else 0.02 for action in told}, abs=1e-8)  # a floor of 0.1
        registry.freeze("ad-load", **WHO, frozen=False)
        registry.rollback("ad-load", **WHO)
        within(SECONDS, lambda: serves(server, first))
        os.kill(lines(server, "serving")[0]["process"], signal.SIGKILL)
        within(SECONDS, lambda: len(lines(server, "serving")) == 3)
        assert lines(server, "serving")[2]["points"] == {"ad-load": reference(first)}  # from its first decision on
        named = {UNIFORM, reference(first), reference(second), reference(safe, "safe")}
        assert recomputed(server.stored(), registry, AD_LOAD) == named


def test_a_damaged_artifact_does_not_serve_and_what_served_goes_on(nights: Path, tmp_path: Path) -> None:
    config, key = make(tmp_path / "shop")
    registry, (first, second, *_) = copied(nights, config.parent / "registry")
    registry.promote(first, **WHO)
    with running(config, key) as server:
        with unseen(server):
            registry.promote(second, **WHO)
            flip(registry, second)
        within(SECONDS, lambda: failing(server))
        ready = server.ask("GET", "/readyz", key=None)
        assert (ready.status, ready.json) == (200, STALE)
        assert serves(server, first)
        (line,) = lines(server, "promoted policy does not serve")
        assert (line["level"], line["decision_point"], line["promoted"]) == ("error", "ad-load", second)
        assert (line["serves"], "digest check: found policy.json" in line["error"]) == (reference(first), True)
        flip(registry, second)
        registry.rollback("ad-load", **WHO)  # back to what serves: nothing is wrong any more
        within(SECONDS, lambda: not failing(server))
        registry.promote(second, **WHO)
        within(SECONDS, lambda: serves(server, second))
        assert server.ask("GET", "/readyz", key=None).json == {"status": "ok"}

        hidden = registry.folder / "hidden"
        (registry.folder / "control.sqlite").rename(hidden)
        within(SECONDS, lambda: failing(server))
        assert serves(server, second)
        assert not (registry.folder / "control.sqlite").exists(), "the service made another registry"
        hidden.rename(registry.folder / "control.sqlite")
        within(SECONDS, lambda: not failing(server))
        assert len(lines(server, "promoted policy does not serve")) == 2
        assert number(server, "propel_policy_reloads_total", state="failed") == 2
        assert recomputed(server.stored(), registry, AD_LOAD) == {reference(first), reference(second)}

    flip(registry, second)
    with running(config, key) as server:  # a start, too, falls back to what served before
        assert serves(server, first)
        assert server.ask("GET", "/readyz", key=None).json == STALE
        assert failing(server)
        assert lines(server, "promoted policy does not serve")[2]["promoted"] == second


def test_what_failed_is_tried_again_after_a_pause_or_when_another_is_promoted(nights: Path, tmp_path: Path) -> None:
    registry, (first, second, third, _) = copied(nights, tmp_path / "registry")
    now = [0.0]
    promoted = Promoted(registry, clock=lambda: now[0])
    served = promoted.next(unpromoted(AD_LOAD), first)
    assert promoted.next(served, first) is served
    flip(registry, second)
    failed = promoted.next(served, second)
    assert (failed.served, failed.digest) == (served.served, first)
    assert failed.failed is not None
    assert (failed.failed.digest, failed.failed.again) == (second, PAUSE)
    flip(registry, second)
    now[0] = PAUSE - EVERY
    assert promoted.next(failed, second) is failed
    assert promoted.next(failed, third).digest == third
    assert promoted.next(failed, first) == served
    now[0] = PAUSE
    assert promoted.next(failed, second).digest == second


def test_what_was_promoted_and_is_not_any_more_goes_on_with_an_alarm(nights: Path, tmp_path: Path) -> None:
    registry, (first, *_) = copied(nights, tmp_path / "registry")
    promoted = Promoted(registry)
    served = promoted.next(unpromoted(AD_LOAD), first)
    lost = promoted.next(served, None)
    assert (lost.served, lost.digest) == (served.served, first)
    assert lost.failed is not None
    assert "found nothing promoted any more" in lost.failed.said
    assert promoted.next(lost, None) is lost
    assert promoted.next(lost, first) == served


def test_a_policy_of_another_decision_point_does_not_serve(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    other = registry.register(linear(PLAIN_POINT), PLAIN_POINT, name="plain", golden=golden(PLAIN_POINT))
    failed = Promoted(registry).next(unpromoted(AD_LOAD), other).failed
    assert failed is not None
    assert "decision point 'ad-load': found a promoted policy plain@" in failed.said


def test_a_start_takes_the_newest_that_served_before_and_still_loads(nights: Path, tmp_path: Path) -> None:
    registry, digests = copied(nights, tmp_path / "registry")
    for digest in digests:
        registry.promote(digest, **WHO)
    registry.rollback("ad-load", **WHO)  # the fourth was not good: nothing goes back to it
    for damaged in digests[2], digests[1]:
        flip(registry, damaged)
    first: Standing = Promoted(registry).first(AD_LOAD)
    assert first.digest == digests[0]
    assert first.failed is not None
    assert first.failed.digest == digests[2]
    flip(registry, digests[0])
    with pytest.raises(InputError, match=rf"{digests[2]}: digest check: found policy.json"):  # of what is promoted
        Promoted(registry).first(AD_LOAD)


def test_a_start_with_nothing_promoted_is_uniform(nights: Path, tmp_path: Path) -> None:
    config, _ = make(tmp_path / "shop")
    assert [one.reference for one in Reload(read_settings(config)).served.values()] == [UNIFORM]
    copied(nights, config.parent / "registry")
    reload = Reload(read_settings(config))
    assert ([one.reference for one in reload.served.values()], reload.stale) == ([UNIFORM], [])
    promote(config.parent / "registry", AD_LOAD)
    assert [one.reference.partition("@")[0] for one in Reload(read_settings(config)).served.values()] == ["linear"]
