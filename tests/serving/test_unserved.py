"""Decisions that no answer reached: told once, kept beside the others, and never taken for ones that were sampled."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.routing import Route

from bandits.events import Decision, Reward, Shown, digest
from bandits.log.files import log_files
from bandits.log.port import Kind, Stored, decision_key
from bandits.log.segments import records
from bandits.sampling import TOTAL
from serving.access import Access, Scope, Secret
from serving.client import Action, DecisionRequest, Patience
from serving.http import routes
from serving.setup import add_key, initialise
from tests.faults import live_server
from tests.serving.misbehaving import CLIENTS, client_of, drops, forwards, loses, misbehaving
from tests.serving.points import ROUTES as ROUTES_POINT
from tests.serving.points import route_request
from tests.serving.server import Answer, Server, make, running
from tests.serving.test_admission import Pressed, service

AD_LOAD = {"ad-load": "ads-2"}

ROUTED = {"routes": "b"}

KEYS: dict[tuple[Scope, ...], str] = {}
"""Further keys of the service, by their scopes."""

QUICK = Patience(timeout=2.0, deadline=2.0, other_timeout=2.0, other_deadline=4.0, retries=0)


@pytest.fixture(params=CLIENTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config, key = make(tmp_path_factory.mktemp("unserved") / "service", points={"routes": ROUTES_POINT})
    for scopes in (("decide",), ("reward", "read")):
        KEYS[scopes] = add_key(config.parent / "data", "default", scopes)
    with running(config, key) as one:
        yield one


def told(server: Server, body: dict[str, Any], **more: Any) -> Answer:
    """Report a decision that was not served."""
    return server.ask("POST", "/v1/routes/unserved", body, **more)


def entry(server: Server, decision_id: str) -> Stored:
    """The one decision of that id in the log."""
    (found,) = [one for one in server.stored() if one.key == decision_key("default", decision_id)]
    return found


def offered(*names: str) -> list[Action]:
    """Actions of the decision point `routes`."""
    return [Action(**one) for one in route_request(*names)["actions"]]


def decision(stored: Stored) -> Decision:
    return msgspec.json.decode(stored.record, type=Decision)


def events(server: Server) -> dict[str, float]:
    """What became of reports, as the metrics tell it."""
    lines = server.ask("GET", "/metrics", key=None).body.decode().splitlines()
    found = [line.split("}") for line in lines if line.startswith('propel_events_total{kind="unserved"')]
    return {labels.split('state="')[1].rstrip('"'): float(value) for labels, value in found}


def test_a_report_is_a_decision_that_was_not_sampled(server: Server) -> None:
    """Its action has all 2^31 shares among those that were eligible, what was not is excluded, and the reason is in the body."""
    request = route_request("c", "b", "a") | {"decision_id": "told", "unit": "user-7", "session": "s", "parent": "p"}
    request["actions"][0] |= {"eligible": False, "reason": "capped"}
    before = events(server)
    for state in ("stored", "repeated"):
        answer = told(server, request | {"action": "b", "reason": "timeout"})
        assert (answer.status, answer.json) == (200, {"decision_id": "told", "state": state})
    stored = entry(server, "told")
    made = decision(stored)
    assert stored.kind is Kind.DECISION
    assert (made.kind, made.policy, made.propensity, made.decision_point) == ("fallback", "default@client", 1.0, "routes")
    assert (made.actions, made.chosen, struct.unpack("<2I", made.shares)) == (("a", "b"), 1, (0, TOTAL))
    assert made.excluded == (("c", "capped"), ("d", "not offered"))
    assert (made.session, made.parent, made.unit not in ("user-7", "told")) == ("s", "p", True)
    body = json.loads(bytes(made.body))
    assert (body["context"], len(body["actions"]), body["reason"]) == ({"amount": 1.5}, 2, "timeout")
    made.check_body()
    logged = server.ask("GET", "/v1/decisions/told").json
    assert (logged["kind"], logged["action"], logged["propensity"]) == ("fallback", "b", 1.0)
    assert {state: count - before.get(state, 0) for state, count in events(server).items()} == {"stored": 1, "repeated": 1}
    assert b'propel_decisions_total{decision_point="routes",policy="default@client"}' in server.ask("GET", "/metrics").body


def test_its_rewards_and_what_was_shown_belong_to_it(server: Server) -> None:
    assert told(server, route_request("a", "b", decision_id="rewarded", action="a")).status == 200
    reward = {"decision_id": "rewarded", "name": "paid", "value": 1.0}
    assert server.ask("POST", "/v1/rewards", reward).json["state"] == "stored"
    assert server.ask("POST", "/v1/decisions/rewarded/shown", {"action": "a"}).json["state"] == "stored"
    kinds = {one.kind: one.record for one in server.stored() if b"rewarded" in one.key}
    assert msgspec.json.decode(kinds[Kind.REWARD], type=Reward).decision_id == decision(entry(server, "rewarded")).decision_id
    assert msgspec.json.decode(kinds[Kind.SHOWN], type=Shown).action == "a"


def test_an_id_is_one_decision_whichever_came_first(server: Server) -> None:
    """The hash of what was asked differs between a request and its report, and between reports of two actions."""
    request = route_request("a", "b", decision_id="served")
    sampled = server.decide(request, point="routes").json
    refused = told(server, request | {"action": sampled["action"]})
    assert (refused.status, refused.json["type"]) == (409, "urn:propel:problem:conflict")
    assert "report what was shown" in refused.json["detail"]
    assert decision(entry(server, "served")).kind == "sampled"

    request = route_request("a", "b", decision_id="reported")
    assert told(server, request | {"action": "a"}).status == 200
    assert server.decide(request, point="routes").status == 409
    assert told(server, request | {"action": "b"}).status == 409
    assert told(server, request | {"action": "a", "reason": "another"}).json["state"] == "repeated"
    hashes = {decision(entry(server, id_)).request_hash for id_ in ("served", "reported")}
    assert len(hashes) == 2
    sampled_hash = decision(entry(server, "served")).request_hash
    assert told(server, route_request("a", "b", decision_id="same", action="b")).status == 200
    assert decision(entry(server, "same")).request_hash == digest(b"unserved\0b\0" + sampled_hash)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"action": "c"}, "action: found 'c'; expected one of the 2 that were eligible"),
        ({"action": "elsewhere"}, "action: found 'elsewhere'"),
        ({"decision_id": ""}, "decision_id"),
        ({"decision_id": None}, "decision_id"),
        ({"reason": "r" * 129}, "reason"),
        ({"propensity": 1.0}, "propensity"),
        ({"context": {"amounts": 1.0}}, "context feature 'amount"),
    ],
    ids=str,
)
def test_what_cannot_have_been_is_refused(server: Server, change: dict[str, Any], said: str) -> None:
    answer = told(server, route_request("a", "b", decision_id="never", action="a") | change)
    assert (answer.status, said in answer.json["detail"]) == (422, True)
    without = {name: value for name, value in route_request("a", action="a").items() if name != "decision_id"}
    assert told(server, without).status == 422


def test_a_key_that_decides_may_report_and_no_other(server: Server) -> None:
    body = route_request("a", "b", decision_id="scoped", action="a")
    answers = {scopes: told(server, body, key=key).status for scopes, key in KEYS.items()}
    assert answers == {("decide",): 200, ("reward", "read"): 403}
    assert told(server, body, key=None).status == 401
    assert server.ask("POST", "/v1/elsewhere/unserved", body).json["type"].endswith("unknown-decision-point")


def test_reports_are_let_in_as_events_are(tmp_path: Path) -> None:
    """What an overload left unserved is not shed with what overloads: limits keep a share for events."""
    made = initialise(tmp_path / "pressed", 1)
    secret = Secret.read(made.config.parent / "data" / "secret.key")
    log, access = Pressed(), Access(secret, made.config.parent / "data" / "keys.toml")
    pressed = replace(service(log), secret=secret)
    body = {"decision_id": "d", "context": {}}

    def status(route: Route, body: dict[str, Any]) -> int:
        """What a route answers."""
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message: Any) -> None:
            sent.append(message)

        head = [(b"authorization", f"Bearer {made.key}".encode())]
        asyncio.run(route.endpoint({"headers": head, "path_params": {"decision_point": "ad-load"}}, receive, send))
        return int(sent[0]["status"])

    by_path = {route.path: route for route in routes(pressed, access)}
    for waiting, decided, reported in ((80, 200, 200), (95, 503, 200), (100, 503, 503)):
        log.waiting = (waiting, 0)
        assert status(by_path["/v1/{decision_point}/decisions:batch"], {"decisions": [body]}) == decided
        assert status(by_path["/v1/{decision_point}/unserved"], body | {"action": "ads-2"}) == reported


def test_what_was_not_served_is_reported_with_the_next_call(server: Server, kind: str) -> None:
    with misbehaving(drops, forwards(server)) as odd, client_of(kind, odd.url, server.key, ROUTED, QUICK) as client:
        made = client.decide("routes", {"amount": 1.5}, actions=offered("a", "b"), unit="user-7")
        assert (made.served, made.action, client.waiting) == (False, "b", 1)
        assert client.decide("routes", {"amount": 1.5}, actions=offered("a", "b")).served
        assert (client.waiting, client.reported, client.unserved) == (0, {"stored": 1}, {("routes", "unreachable"): 1})
    found = decision(entry(server, made.decision_id))
    assert (found.kind, found.actions[found.chosen], json.loads(bytes(found.body))["reason"]) == ("fallback", "b", "unreachable")


def test_where_only_the_answer_was_lost_the_default_is_what_was_shown(server: Server, kind: str) -> None:
    """The log holds what was sampled, with its propensity; the client did something else, and says so."""
    with misbehaving(loses(server), forwards(server)) as odd, client_of(kind, odd.url, server.key, ROUTED, QUICK) as client:
        made = client.decide("routes", {"amount": 1.0}, actions=offered("a", "b", "c"))
        assert (made.served, made.action) == (False, "b")
        assert client.flush() == 0
        assert client.reported == {"shown": 1}
    found = decision(entry(server, made.decision_id))
    assert (found.kind, found.propensity < 1) == ("sampled", True)
    (shown,) = [one.record for one in server.stored() if one.kind is Kind.SHOWN and made.decision_id.encode() in one.key]
    assert msgspec.json.decode(shown, type=Shown).action == "b"


def test_a_lost_answer_that_is_asked_for_again_is_the_first_one(server: Server, kind: str) -> None:
    patience = Patience(timeout=2.0, deadline=4.0, retries=1, backoff=0.0)
    with misbehaving(loses(server), forwards(server)) as odd, client_of(kind, odd.url, server.key, ROUTED, patience) as client:
        made = client.decide("routes", {"amount": 2.0}, actions=offered("a", "b"))
        assert (made.served, len(odd.seen), len({one.body for one in odd.seen})) == (True, 2, 1)
        assert made.propensity == decision(entry(server, made.decision_id)).propensity


def test_an_outage_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    """The process is killed, decisions go on by default, it comes back: all of them are in the log, each as what it was."""
    made = live_server.make(tmp_path / "outage")
    with ExitStack() as ending:
        clients = [ending.enter_context(client_of(kind, made.url, made.key, AD_LOAD, QUICK)) for kind in CLIENTS]
        with live_server.start(made) as server:
            decided = [one.decide("ad-load", {}) for one in clients for _ in range(3)]
            server.kill()
            decided += [one.decide("ad-load", {}) for one in clients for _ in range(3)]
            lost = [one.decide_batch("ad-load", [DecisionRequest(context={})] * 2) for one in clients]
        decided += [one for some in lost for one in some]
        assert [one.served for one in decided] == [True] * 6 + [False] * 10
        with live_server.start(made) as server:
            for client, (first, _) in zip(clients, lost, strict=True):
                assert client.waiting == 5
                assert client.reward(first.decision_id, "value", 0.5).state == "stored"
                assert client.waiting == 3
                client.close()
                assert client.reported == {"stored": 5}
            assert server.end()[0] == 0
    stored = [one for path in log_files(live_server.log_of(made)) for one in records(path)]
    found = [decision(one) for one in stored if one.kind is Kind.DECISION]
    assert {one.decision_id: one.kind for one in found} == {one.decision_id: one.kind for one in decided}
    assert sum(one.kind == "fallback" for one in found) == 10
    rewards = [msgspec.json.decode(one.record, type=Reward).decision_id for one in stored if one.kind is Kind.REWARD]
    assert rewards == [first.decision_id for first, _ in lost]
