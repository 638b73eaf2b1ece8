"""Both clients alike: what they ask again and what not, for how long, and what stands in for an answer that does not come."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ope.data import InputError
from serving.client import (
    Action,
    AsyncClient,
    Client,
    DecisionRequest,
    Patience,
    RefusedError,
    RewardRequest,
    UnavailableError,
    read_defaults,
)
from tests.serving.misbehaving import (
    CLIENTS,
    FakeTime,
    client_of,
    cuts,
    drips,
    drops,
    forwards,
    hangs,
    misbehaving,
    says,
)
from tests.serving.server import Server, make, running

DEFAULTS = {"ad-load": "ads-2"}

QUICK = Patience(timeout=0.2, deadline=0.4, other_timeout=0.2, other_deadline=0.4, retries=0)

CONTEXT = {"device": "phone", "minutes_in_session": 4.5}

ANSWER = {
    "decision_id": "d", "action": "ads-1", "propensity": 0.5, "propensities": {"ads-0": 0.5, "ads-1": 0.5}, "policy": "p@1",
    "kind": "sampled", "token": "t",
}  # fmt: skip


@pytest.fixture(params=CLIENTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(*make(tmp_path_factory.mktemp("client") / "service")) as one:
        yield one


def test_everything_that_the_service_does(server: Server, kind: str) -> None:
    with client_of(kind, server.url, server.key, DEFAULTS) as client:
        made = client.decide("ad-load", CONTEXT, unit="user-7", session="s", parent="p")
        assert (made.served, made.kind, made.policy, made.reason) == (True, "sampled", "uniform@builtin", None)
        assert made.propensity == made.propensities[made.action]
        assert sum(made.propensities.values()) == 1
        assert client.decide("ad-load", CONTEXT, unit="user-7", session="s", parent="p", decision_id=made.decision_id) == made

        when = datetime(2026, 1, 31, 12, tzinfo=UTC)
        for state in ("stored", "repeated"):
            assert client.reward(made.decision_id, "value", 0.25, token=made.token, observed_at=when).state == state
        assert client.reward(made.decision_id, "value", 0.5, event_id="second").state == "stored"
        assert client.shown(made.decision_id, None).state == "stored"

        logged = client.look_up(made.decision_id)
        assert (logged.action, logged.session, logged.parent, logged.kind) == (made.action, "s", "p", "sampled")
        assert (client.unserved, client.reported, client.waiting) == ({}, {}, 0)


def test_batches_tell_each_what_became_of_it(server: Server, kind: str) -> None:
    offered = (Action(id="ads-1"), Action(id="ads-4", eligible=False, reason="capped"), Action(id="ads-2"))
    requests = [DecisionRequest(context=CONTEXT, actions=offered), DecisionRequest(context={"devise": "phone"})]
    with client_of(kind, server.url, server.key, DEFAULTS) as client:
        made, refused = client.decide_batch("ad-load", requests)
        assert set(made.propensities) == {"ads-1", "ads-2"}
        assert (refused.status, refused.code) == (422, "invalid")
        rewards = [RewardRequest(decision_id=made.decision_id, name="value", value=value) for value in (0.5, 7.0)]
        stored, refused = client.rewards(rewards)
        assert (stored.state, refused.code) == ("stored", "invalid")


def test_what_is_refused_is_an_error_and_not_asked_again(server: Server, kind: str) -> None:
    with client_of(kind, server.url, server.key, DEFAULTS) as client:
        client.decide("ad-load", {}, decision_id=f"taken-{kind}")
        for status, code, ask in (
            (409, "conflict", lambda: client.decide("ad-load", {}, unit="other", decision_id=f"taken-{kind}")),
            (422, "invalid", lambda: client.decide("ad-load", {"devise": "phone"})),
            (422, "invalid", lambda: client.decide("ad-load", {}, unit="")),
            (422, "invalid", lambda: client.decide("ad-load", {}, decision_id="")),
            (404, "unknown-decision-point", lambda: client.decide("adload", {})),
            (404, "unknown-decision", lambda: client.look_up("nothing")),
            (403, "wrong-token", lambda: client.reward(f"taken-{kind}", "value", 0.5, token="x")),
            (422, "invalid", lambda: client.reward(f"taken-{kind}", "value", float("nan"))),
        ):
            with pytest.raises(RefusedError) as refused:
                ask()
            assert (refused.value.status, refused.value.code) == (status, code)
    with client_of(kind, server.url, "propel_other", DEFAULTS) as client, pytest.raises(RefusedError, match="401 unauthorized"):
        client.decide("ad-load", {})
    for status in (301, 400, 404, 413):
        with misbehaving(says(status, b"<html>", Location="/")) as odd, client_of(kind, odd.url, defaults=DEFAULTS) as client:
            with pytest.raises(RefusedError, match=f"{status}: <html>"):
                client.decide("ad-load", {})
            assert len(odd.seen) == 1


@pytest.mark.parametrize("id_", ["a/b", "..", "é ?#%2F%", "shown", "\N{BALLOON}"])
def test_any_id_can_be_looked_up(server: Server, kind: str, id_: str) -> None:
    with client_of(kind, server.url, server.key) as client:
        made = client.decide("ad-load", {}, decision_id=id_)
        assert client.shown(id_, made.action).decision_id == id_
        assert client.look_up(id_).decision_id == id_


def test_a_retry_is_the_same_request_with_less_time_left(server: Server, kind: str) -> None:
    """Connections dropped, answers cut, unreadable or not there in time, statuses that may pass: none of them ends a decision."""
    plan = [drops, says(503), hangs, cuts, says(429), says(500, b"<html>"), says(502), says(504), says(200, b"no JSON")]
    patience = Patience(timeout=0.15, deadline=20.0, retries=len(plan))
    times = FakeTime()
    with misbehaving(*plan, forwards(server)) as odd, client_of(kind, odd.url, server.key, patience=patience, time=times) as client:
        made = client.decide("ad-load", CONTEXT, unit="user-7")
        assert (made.served, len(odd.seen), len({one.body for one in odd.seen})) == (True, len(plan) + 1, 1)
        assert odd.seen[0].json["decision_id"] == made.decision_id
        assert len(times.slept) == len(plan)
        assert {one.deadline for one in odd.seen} == {150.0}
        assert client.look_up(made.decision_id).action == made.action


def test_time_is_bounded_whatever_a_try_costs(kind: str) -> None:
    """Tries of 0.3 s and waits of up to 0.16 s: the fourth try begins with 0.1 s left, and no fifth begins."""
    times = FakeTime()

    def slow(handler: Any, body: bytes) -> None:
        times.now += min(0.3, odd.seen[-1].deadline / 1000)
        says(503)(handler, body)

    patience = Patience(timeout=0.3, deadline=1.14, retries=100, backoff=0.02, longest_backoff=0.16)
    more: dict[str, Any] = {"time": times, "random": lambda: 0.999}
    with misbehaving(slow) as odd, client_of(kind, odd.url, "k", DEFAULTS, patience, **more) as client:
        made = client.decide("ad-load", {})
        assert times.now - 1000 <= 1.14
        assert times.slept == pytest.approx([0.999 * 0.02, 0.999 * 0.04, 0.999 * 0.08])
        assert [one.deadline for one in odd.seen[:4]] == pytest.approx([300, 300, 300, 100.14], abs=0.01)
        assert (made.served, made.reason, len(odd.seen)) == (False, "overloaded", 4)


def test_waits_are_uniform_below_a_doubling_bound(kind: str) -> None:
    """Full jitter: of 60 decisions the waits before each retry stay below their bound, and their mean is half of it."""
    times, rng = FakeTime(), random.Random(7)
    patience = Patience(deadline=1000.0, retries=3, backoff=0.1, longest_backoff=0.3)
    more: dict[str, Any] = {"time": times, "random": rng.random}
    with misbehaving(says(503)) as odd, client_of(kind, odd.url, "k", DEFAULTS, patience, **more) as client:
        for _ in range(60):
            client.decide("ad-load", {})
        client.close(0)
    for retry, bound in enumerate((0.1, 0.2, 0.3)):
        waits = times.slept[retry::3]
        assert max(waits) < bound
        assert abs(sum(waits) / 60 - bound / 2) < 4 * bound / (12 * 60) ** 0.5  # four standard errors


@pytest.mark.parametrize(
    ("said", "slept", "tries"), [("2", [2.0], 2), ("60", [], 1), ("soon", [0.05], 2), ("", [0.05], 2), ("-1", [0.05], 2)]
)
def test_retry_after_is_kept_or_not_waited_for(kind: str, said: str, slept: list[float], tries: int) -> None:
    """What asks for more time than there is, is not asked again."""
    times = FakeTime()
    with misbehaving(says(503, Retry_After=said), says(200, json.dumps(ANSWER).encode())) as odd:
        patience = Patience(deadline=10.0, backoff=0.1)
        with client_of(kind, odd.url, "k", DEFAULTS, patience, time=times, random=lambda: 0.5) as client:
            assert client.decide("ad-load", {}).served == (tries == 2)
            assert (times.slept, len(odd.seen)) == (slept, tries)


@pytest.mark.parametrize(
    ("behaves", "reason"),
    [(hangs, "timeout"), (drips, "timeout"), (drops, "unreachable"), (cuts, "unreachable"), (says(503), "overloaded"),
     (says(500), "failed"), (says(200, b"[]"), "failed")],
)  # fmt: skip
def test_the_default_stands_in_and_is_counted(kind: str, behaves: Any, reason: str) -> None:
    with misbehaving(behaves) as odd, client_of(kind, odd.url, "k", DEFAULTS, QUICK) as client:
        began = time.monotonic()
        made = client.decide("ad-load", CONTEXT, decision_id="mine")
        assert time.monotonic() - began < 2  # 0.2 s, on a machine that does other things
        assert (made.decision_id, made.action, made.served, made.propensity, made.kind, made.reason) == (
            "mine", "ads-2", False, None, "fallback", reason,
        )  # fmt: skip
        first, second = client.decide_batch("ad-load", [DecisionRequest(context={}), DecisionRequest(context={})])
        assert (first.action, first.reason, first.decision_id != second.decision_id) == ("ads-2", reason, True)
        assert (client.unserved, client.waiting) == ({("ad-load", reason): 3}, 3)


def test_what_has_no_default_is_an_error(kind: str) -> None:
    with misbehaving(says(503)) as odd, client_of(kind, odd.url, "k", DEFAULTS, QUICK) as client:
        for ask in (
            lambda: client.reward("d", "value", 0.5),
            lambda: client.rewards([RewardRequest(decision_id="d", name="value", value=0.5)]),
            lambda: client.shown("d", "ads-1"),
            lambda: client.look_up("d"),
        ):
            with pytest.raises(UnavailableError, match="overloaded: found 503") as unavailable:
                ask()
            assert unavailable.value.reason == "overloaded"
        assert (client.unserved, client.waiting) == ({}, 0)


def test_without_a_default_that_is_eligible_there_is_an_error(kind: str) -> None:
    barred = (Action(id="ads-2", eligible=False), Action(id="ads-1"))
    with misbehaving(drops) as odd, client_of(kind, odd.url, "k", DEFAULTS, QUICK) as client:
        for ask in (
            lambda: client.decide("other", {}),
            lambda: client.decide("ad-load", {}, actions=barred),
            lambda: client.decide("ad-load", {}, actions=[Action(id="ads-1")]),
        ):
            with pytest.raises(UnavailableError, match="unreachable"):
                ask()
        served, error = client.decide_batch("ad-load", [DecisionRequest(context={}), DecisionRequest(context={}, actions=barred)])
        assert (served.action, type(error), client.waiting) == ("ads-2", UnavailableError, 1)
        assert client.unserved == {("other", "unreachable"): 1, ("ad-load", "unreachable"): 4}


def test_reports_that_find_no_room_are_counted_as_lost(kind: str) -> None:
    patience = Patience(timeout=0.2, deadline=0.4, retries=0, most_waiting=2)
    with misbehaving(drops) as odd:
        client = client_of(kind, odd.url, "k", DEFAULTS, patience)
        with client:
            for _ in range(5):
                client.decide("ad-load", {})
            assert (client.waiting, client.reported) == (2, {"lost": 3})
            assert client.flush(0.2) == 2
        assert (client.waiting, client.reported) == (0, {"lost": 5})


def test_a_call_takes_few_reports_with_it_and_a_failing_one_harms_nothing(kind: str) -> None:
    """Two reports at most go with a call, in their order; one that fails waits on, and the answer is given."""
    good = says(200, json.dumps(ANSWER).encode())
    kept = says(200, b'{"decision_id":"d","state":"stored"}')
    with misbehaving(drops, drops, drops, good, kept, kept, good, drops, good, says(422)) as odd:
        with client_of(kind, odd.url, "k", DEFAULTS, QUICK) as client:
            ids = [client.decide("ad-load", {}).decision_id for _ in range(3)]
            assert client.decide("ad-load", {}).served
            assert (client.waiting, client.reported) == (1, {"stored": 2})
            assert client.decide("ad-load", {}).served
            assert (client.waiting, client.reported) == (1, {"stored": 2})
            assert client.decide("ad-load", {}).served
            assert (client.waiting, client.reported) == (0, {"stored": 2, "refused": 1})
        reports = [one.json["decision_id"] for one in odd.seen if one.path == "/v1/ad-load/unserved"]
        assert reports == [ids[0], ids[1], ids[2], ids[2]]


def test_an_answer_may_say_more_than_is_known(kind: str) -> None:
    with misbehaving(says(200, json.dumps(ANSWER | {"new": {"field": 1}}).encode())) as odd, client_of(kind, odd.url) as client:
        assert client.decide("ad-load", {}).action == "ads-1"


def test_a_batch_with_too_few_answers_is_none(kind: str) -> None:
    with misbehaving(says(200, b'{"decisions":[]}')) as odd, client_of(kind, odd.url, "k", DEFAULTS, QUICK) as client:
        (made,) = client.decide_batch("ad-load", [DecisionRequest(context={})])
        assert (made.served, made.reason) == (False, "failed")


def test_threads_share_a_client(server: Server) -> None:
    """Each of 160 decisions once, each with its own answer; 20 reports that any of eight threads may send, each once."""
    with misbehaving(*[drops] * 20, forwards(server)) as odd:
        patience = Patience(timeout=5.0, deadline=5.0, retries=0)
        with Client(odd.url, server.key, DEFAULTS, patience) as client:
            lost = [client.decide("ad-load", {}).decision_id for _ in range(20)]
            found: dict[str, str] = {}

            def work(name: int) -> None:
                for at in range(20):
                    made = client.decide("ad-load", {}, unit=f"user-{name}", decision_id=f"thread-{name}-{at}")
                    found[made.decision_id] = made.action

            threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
            assert (len(found), client.waiting, client.reported) == (160, 0, {"stored": 20})
            assert all(client.look_up(id_).action == action for id_, action in list(found.items())[::16])
    reported = [one.json["decision_id"] for one in odd.seen if one.path.endswith("/unserved")]
    assert sorted(reported) == sorted(lost)


def test_a_report_survives_that_its_call_is_given_up() -> None:
    async def story(url: str) -> None:
        patience = Patience(timeout=5.0, deadline=10.0, retries=0)
        async with AsyncClient(url, "k", DEFAULTS, patience) as client:
            made = await client.decide("ad-load", {})
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.decide("ad-load", {})
            assert (made.served, client.waiting, client.reported) == (False, 1, {})
            await client.close(0.01)

    with misbehaving(drops, says(200, json.dumps(ANSWER).encode()), hangs) as odd:
        asyncio.run(story(odd.url))
        assert [one.path.rpartition("/")[2] for one in odd.seen[:3]] == ["decisions", "decisions", "unserved"]


def test_defaults_are_those_of_the_decision_points(server: Server, tmp_path: Path) -> None:
    point = server.config.parent / "ad-load.toml"
    assert read_defaults([point]) == DEFAULTS
    without = tmp_path / "without.toml"
    without.write_text(point.read_text().replace("default_action", "# default_action"))
    with pytest.raises(InputError, match=r"without\.toml: found no default_action"):
        read_defaults([without])


def test_what_cannot_be_is_said_at_once() -> None:
    for url in ("127.0.0.1:8347", "ftp://x", "http://", "http://x:port"):
        with pytest.raises(InputError, match="url: found"):
            Client(url, "k")
    for key in ("", "a\nb", "é"):
        with pytest.raises(InputError, match="key: found"):
            Client("http://x", key)
    for wrong in ({"timeout": 0.0}, {"deadline": float("nan")}, {"retries": -1}, {"other_timeout": 1e9}):
        with pytest.raises(InputError, match="found"):
            Patience(**wrong)


def test_nothing_of_the_service_is_imported() -> None:
    code = "import sys, serving.client; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert {"httpx2", "msgspec"} <= loaded
    assert not loaded & {
        "fastapi", "starlette", "uvicorn", "apsw", "lightgbm", "cryptography", "structlog", "prometheus_client", "scipy", "sklearn",
        "polars", "torch",
    }  # fmt: skip
