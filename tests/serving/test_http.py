"""The service over HTTP, a real process: what each route answers, every error, ids that come again, and who may do what."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bandits.events import Decision, Reward
from bandits.log.port import Kind, decision_key
from bandits.sampling import TOTAL
from serving import wire
from serving.problems import MEDIA_TYPE, PROBLEMS
from serving.setup import POINT, keys_of, remove_key
from tests.serving.points import ROUTES, ROUTES_POINT, SETS, SETS_POINT, promote, route_request, set_request
from tests.serving.server import Answer, Server, exchange, make, running, within

KEYS: dict[str, str] = {}
"""Further keys of the service of this page, by what they are."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("http") / "service"
    config, key = make(folder, points={"ad-load": POINT, "sets": SETS, "routes": ROUTES})
    KEYS["sets"], KEYS["routes"] = promote(folder / "registry", SETS_POINT), promote(folder / "registry", ROUTES_POINT)
    made = Server(config, key, 0, None)  # type: ignore[arg-type]
    for scope in ("decide", "reward", "read"):
        KEYS[scope] = made.new_key(scope)
    KEYS["expired"] = made.new_key(expires="2026-01-01")
    KEYS["other"] = made.new_key(tenant="other")
    KEYS["ending"] = made.new_key()
    with running(config, key) as one:
        yield one


def problem(answer: Answer, name: str, *words: str) -> None:
    """Check an error (RFC 9457)."""
    status, title = PROBLEMS[name]
    assert (answer.status, answer.headers["content-type"]) == (status, MEDIA_TYPE.decode()), answer.body
    found = answer.json
    detail = found.pop("detail")
    assert found == {"type": f"urn:propel:problem:{name}", "title": title, "status": status}
    for word in ("found", *words):
        assert word in detail


def reward(id_: str, value: Any = 1.0, **more: Any) -> dict[str, Any]:
    return {"decision_id": id_, "name": "value", "value": value} | more


def test_a_decision_is_answered_with_its_exact_propensities(server: Server) -> None:
    rng = np.random.default_rng(0)
    for point, body, policy, size in (
        ("ad-load", {"context": {}}, "uniform@builtin", 5),
        ("sets", set_request(rng), KEYS["sets"], 20),
        ("routes", route_request("a", "c"), KEYS["routes"], 2),
    ):
        answer = server.decide(body, point=point)
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        found = msgspec.json.decode(answer.body, type=wire.DecisionAnswer)  # no field more, none less
        assert (found.policy, found.kind, len(found.propensities)) == (policy, "sampled", size)
        assert found.propensity == found.propensities[found.action]
        assert sum(found.propensities.values()) == 1.0
        assert all((p * TOTAL).is_integer() for p in found.propensities.values())


def test_a_repeat_gets_the_same_bytes_and_another_request_409(server: Server) -> None:
    body = {"decision_id": "again", "unit": "u1", "context": {"device": "phone"}}
    first = server.decide(body)
    assert first.status == 200
    reordered = b'{"context": {"device":"phone"}, "unit":"u1",\n"decision_id":"again"}'
    for again in (server.decide(body), server.decide(reordered)):
        assert (again.status, again.body) == (200, first.body)
    for change in ({"unit": "u2"}, {"session": "s"}, {"parent": "p"}, {"context": {}}, {"actions": [{"id": "ads-1"}]}):
        problem(server.decide(body | change), "conflict", "another request under this decision_id")
    problem(server.decide(route_request("a", decision_id="again"), point="routes"), "conflict")
    assert sum(one.key == decision_key("default", "again") for one in server.stored()) == 1


def test_a_repeat_in_a_batch_or_from_one_gets_the_same_answer(server: Server) -> None:
    whole = set_request(np.random.default_rng(1), 3, decision_id="either way") | {"context": {f"x{i}": i for i in range(10)}}
    first = server.decide(whole, point="sets")
    answer = server.ask("POST", "/v1/sets/decisions:batch", {"decisions": [whole, whole]})
    assert answer.json["decisions"] == [first.json, first.json]


def test_forty_at_once_under_one_id_are_one_decision(server: Server) -> None:
    with ThreadPoolExecutor(10) as pool:
        bodies = {one.body for one in pool.map(lambda _: server.decide({"decision_id": "storm", "context": {}}), range(40))}
    assert len(bodies) == 1
    assert sum(one.key == decision_key("default", "storm") for one in server.stored()) == 1


def test_batches_answer_each_for_itself_in_order(server: Server) -> None:
    ids = [f"b{i}" for i in range(1000)]
    for many in (ids[:1], ids):  # the first is a repeat the second time
        answer = server.ask(
            "POST", "/v1/ad-load/decisions:batch", {"decisions": [{"decision_id": one, "context": {}} for one in many]}
        )
        assert answer.status == 200
        assert [one["decision_id"] for one in answer.json["decisions"]] == many
        rewards = server.ask("POST", "/v1/rewards:batch", {"rewards": [reward(one) for one in many]})
        states = [one["state"] for one in rewards.json["rewards"]]
        assert states == ["stored"] if len(many) == 1 else states == ["repeated"] + ["stored"] * 999
    for path, name in (("/v1/ad-load/decisions:batch", "decisions"), ("/v1/rewards:batch", "rewards")):
        items = [{"context": {}} if name == "decisions" else reward("x")] * 1001
        assert server.ask("POST", path, {name: items}).status == 422
        assert server.ask("POST", path, {name: []}).status == 422


def test_one_bad_item_of_a_batch_is_a_problem_of_its_own(server: Server) -> None:
    items = [
        {"context": {}},
        {"context": {"device": 1}},
        {"context": {}, "decision_id": "twice"},
        {"context": {}, "decision_id": "twice"},
    ]
    items.append({"context": {"device": "phone"}, "decision_id": "twice"})
    answer = server.ask("POST", "/v1/ad-load/decisions:batch", {"decisions": items})
    good, bad, first, second, other = answer.json["decisions"]
    assert answer.status == 200
    assert (bad["type"], bad["status"]) == ("urn:propel:problem:invalid", 422)
    assert first == second != good
    assert other["type"] == "urn:propel:problem:conflict"
    rewards = [reward("twice"), reward("twice", 2.0), reward("twice", name="other"), reward("twice", token="x")]
    states = server.ask("POST", "/v1/rewards:batch", {"rewards": rewards}).json["rewards"]
    assert states[0] == {"decision_id": "twice", "state": "stored"}
    assert [one["status"] for one in states[1:]] == [422, 422, 403]


def test_rewards_are_stored_once_and_conflicts_are_kept(server: Server) -> None:
    decision = server.decide({"decision_id": "rewarded", "context": {}}).json
    body = reward("rewarded", 0.5, token=decision["token"], event_id="e1", observed_at="2026-11-22T10:00:00.5+01:00")
    states = [server.ask("POST", "/v1/rewards", body) for _ in range(2)]
    assert [one.json for one in states] == [{"decision_id": "rewarded", "state": one} for one in ("stored", "repeated")]
    problem(server.ask("POST", "/v1/rewards", body | {"value": 0.25}), "conflict", "another value under this event_id")
    assert server.ask("POST", "/v1/rewards", body | {"event_id": "e2", "value": 0.25}).status == 200
    kept = _rewards(server, "rewarded")
    assert sorted((one.event_id, one.value) for _, one in kept) == [("e1", 0.25), ("e1", 0.5), ("e2", 0.25)]
    assert {kind for kind, _ in kept} == {Kind.REWARD}
    assert [one.observed_at_ns for _, one in kept if one.value == 0.5] == [1_795_338_000_500_000_000]


def test_a_reward_of_an_unknown_decision_is_kept(server: Server) -> None:
    assert server.ask("POST", "/v1/rewards", reward("orphan")).json["state"] == "stored"
    assert [kind for kind, _ in _rewards(server, "orphan")] == [Kind.REWARD]


@pytest.mark.parametrize("token", ["wrong", "é", "x" * 128, ""])
def test_a_wrong_token_is_refused_and_kept_apart(server: Server, token: str) -> None:
    id_ = f"forged-{len(token)}-{token[:1]}"
    server.decide({"decision_id": id_, "context": {}})
    problem(server.ask("POST", "/v1/rewards", reward(id_, token=token)), "wrong-token", "kept, not learned from")
    assert [kind for kind, _ in _rewards(server, id_)] == [Kind.QUARANTINED]
    assert server.ask("POST", "/v1/rewards", reward(id_)).json["state"] == "stored"  # a forger cannot take an honest reward's place


def test_another_decisions_token_is_a_wrong_one(server: Server) -> None:
    token = server.decide({"decision_id": "mine", "context": {}}).json["token"]
    server.decide({"decision_id": "yours", "context": {}})
    problem(server.ask("POST", "/v1/rewards", reward("yours", token=token)), "wrong-token")


BAD_REWARDS: dict[str, tuple[bytes | dict[str, Any], str, str]] = {
    "unknown name": (reward("r", name="clicks"), "invalid", "found 'clicks'; expected one of paid, value"),
    "too large": (reward("r", 1.5), "invalid", "found 1.5; expected a number within [0, 1]"),
    "negative": (reward("r", -0.1), "invalid", "found -0.1"),
    "NaN": (b'{"decision_id":"r","name":"value","value":NaN}', "malformed", "invalid"),
    "1e999": (b'{"decision_id":"r","name":"value","value":1e999}', "invalid", "out of range"),
    "a text": (reward("r", "1"), "invalid", "Expected `float`"),
    "a boolean": (reward("r", True), "invalid", "Expected `float`"),
    "no decision": ({"name": "value", "value": 1}, "invalid", "decision_id"),
    "unprintable": (reward("r", event_id="a\nb"), "invalid", "event_id"),
    "a time without zone": (reward("r", observed_at="2026-11-22T10:00:00"), "invalid", "observed_at"),
    "a time too early": (reward("r", observed_at="1969-12-31T23:59:59Z"), "invalid", "observed_at: found 1969"),
    "a time too late": (reward("r", observed_at="9999-12-31T23:59:59Z"), "invalid", "observed_at: found 9999"),
    "unknown field": (reward("r", extra=1), "invalid", "extra"),
    "twice": (b'{"decision_id":"r","name":"value","value":1,"value":0}', "malformed", "a key twice"),
}


@pytest.mark.parametrize(("body", "name", "said"), BAD_REWARDS.values(), ids=BAD_REWARDS)
def test_a_bad_reward_is_refused_and_not_stored(server: Server, body: Any, name: str, said: str) -> None:
    before = len(_rewards(server, "r"))
    answer = server.ask("POST", "/v1/rewards", body)
    assert (answer.status, answer.json["type"]) == (PROBLEMS[name][0], f"urn:propel:problem:{name}")
    assert said in answer.json["detail"]
    assert len(_rewards(server, "r")) == before == 0


def test_what_was_shown_is_stored_once_and_conflicts_are_kept(server: Server) -> None:
    server.decide({"decision_id": "shown", "context": {}})
    path = "/v1/decisions/shown/shown"
    states = [server.ask("POST", path, {"action": "ads-1"}).json for _ in range(2)]
    assert states == [{"decision_id": "shown", "state": one} for one in ("stored", "repeated")]
    problem(server.ask("POST", path, {"action": None}), "conflict", "another action shown before")
    assert server.ask("POST", "/v1/decisions/not%20shown/shown", {"action": None}).json["decision_id"] == "not shown"
    assert server.ask("POST", "/v1/decisions/a%2Fb%2Fshown/shown", {"action": "x"}).json["decision_id"] == "a/b/shown"
    for body in ({}, {"action": 1}, {"action": "x" * 129}, {"action": "a\nb"}, b'{"action":null,"action":"a"}'):
        assert server.ask("POST", path, body).status in (400, 422)


def test_a_decision_is_looked_up_as_it_is_stored(server: Server) -> None:
    body = route_request("d", "b", decision_id="looked/up", unit="maria", session="s1", parent="p1")
    body["actions"][0] |= {"eligible": False, "reason": "broken"}
    told = server.decide(body, point="routes").json
    for path in ("/v1/decisions/looked%2Fup", "/v1/decisions/looked/up"):
        answer = server.ask("GET", path, key=KEYS["read"])
        found = msgspec.json.decode(answer.body, type=wire.Logged)
        assert (found.decision_id, found.decision_point, found.session, found.parent) == ("looked/up", "routes", "s1", "p1")
        assert (found.action, found.propensity, found.policy) == (told["action"], told["propensity"], told["policy"])
        assert {one.id: one.propensity for one in found.actions} == told["propensities"]
        assert found.excluded == [("d", "broken"), ("a", "not offered"), ("c", "not offered")]
        assert msgspec.json.decode(found.body)["context"] == {"amount": 1.5}
        assert b"maria" not in answer.body
    for path in ("/v1/decisions/nobody", "/v1/decisions/looked", "/v1/decisions/looked/up/shown"):
        problem(server.ask("GET", path), "unknown-decision")
    problem(server.ask("GET", f"/v1/decisions/{'x' * 129}"), "invalid", "decision_id")
    stored = next(one for one in server.stored() if one.key == decision_key("default", "looked/up"))
    record = msgspec.json.decode(stored.record, type=Decision)
    assert (stored.log_id, stored.row, record.request_hash.hex()) == (found.log_id, found.row, found.request_hash)


def test_two_tenants_with_one_id_do_not_meet(server: Server) -> None:
    ours = server.decide({"decision_id": "same", "context": {}}).json
    theirs = server.decide({"decision_id": "same", "context": {"device": "phone"}}, key=KEYS["other"])
    assert theirs.status == 200
    assert theirs.json["token"] != ours["token"]
    problem(server.ask("POST", "/v1/rewards", reward("same", token=ours["token"]), key=KEYS["other"]), "wrong-token")
    server.decide({"decision_id": "ours alone", "context": {}})
    problem(server.ask("GET", "/v1/decisions/ours%20alone", key=KEYS["other"]), "unknown-decision")
    assert server.ask("GET", "/v1/decisions/same", key=KEYS["other"]).json["tenant"] == "other"


ROUTES_AND_SCOPES: list[tuple[str, str, Any, str]] = [
    ("POST", "/v1/ad-load/decisions", {"context": {}}, "decide"),
    ("POST", "/v1/ad-load/decisions:batch", {"decisions": [{"context": {}}]}, "decide"),
    ("POST", "/v1/rewards", reward("scope"), "reward"),
    ("POST", "/v1/rewards:batch", {"rewards": [reward("scope")]}, "reward"),
    ("POST", "/v1/decisions/scope/shown", {"action": None}, "reward"),
    ("GET", "/v1/decisions/scope", None, "read"),
]


@pytest.mark.parametrize(("method", "path", "body", "scope"), ROUTES_AND_SCOPES, ids=[path for _, path, *_ in ROUTES_AND_SCOPES])
def test_every_route_needs_a_good_key_with_its_scope(server: Server, method: str, path: str, body: Any, scope: str) -> None:
    server.decide({"decision_id": "scope", "context": {}})
    assert server.ask(method, path, body, key=KEYS[scope]).status == 200
    for other in {"decide", "reward", "read"} - {scope}:
        problem(server.ask(method, path, body, key=KEYS[other]), "forbidden", f"the scopes {other}; expected {scope}")
    answer = server.ask(method, path, body, key=None)
    problem(answer, "unauthorized", "found no key")
    assert answer.headers["www-authenticate"] == "Bearer"
    wrong = server.key[:-1] + ("a" if server.key[-1] != "a" else "b")
    for key in ("garbage", wrong, server.key + "a", server.key[:40], "propel_" + "0" * 12 + server.key[19:], "é" * 30, " "):
        problem(server.ask(method, path, body, key=key), "unauthorized")
    problem(server.ask(method, path, body, key=KEYS["expired"]), "unauthorized", "expired on 2026-01-01")
    problem(server.ask(method, path, body, key=None, headers={"Authorization": f"Basic {server.key}"}), "unauthorized")


def test_keys_that_come_and_go_are_followed_within_five_seconds(server: Server) -> None:
    added = server.new_key("decide")
    prefix = KEYS["ending"].split("_")[1]
    assert server.decide(key=KEYS["ending"]).status == 200
    assert remove_key(server.data, prefix).prefix == prefix
    assert prefix not in [key.prefix for key in keys_of(server.data)]
    within(5, lambda: server.decide(key=added).status == 200)
    within(5, lambda: server.decide(key=KEYS["ending"]).status == 401)
    assert server.decide().status == 200


def _limited(server: Server, head: bytes, part: bytes, most: int) -> tuple[bytes, int]:
    """What came back, and the bytes of a body that never ends that were sent until then."""
    request = (
        b"POST /v1/ad-load/decisions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + server.key.encode() + b"\r\n" + head + b"\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
        one.sendall(request)
        sent = 0
        while sent <= most + len(part):
            one.sendall(part)
            sent += len(part)
        found = one.recv(65536)
        while not found.endswith(b"}"):  # head and body may come apart
            part = one.recv(65536)
            assert part, found
            found += part
        return found, sent


@pytest.mark.parametrize("chunked", [False, True], ids=["of known length", "chunked"])
def test_a_body_too_large_is_refused_before_it_ends(server: Server, chunked: bool) -> None:
    part = b"4000\r\n" + b" " * 0x4000 + b"\r\n" if chunked else b" " * 0x4000
    head = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: 100000000\r\n"
    found, sent = _limited(server, head, part, 256 * 1024)
    assert found.startswith(b"HTTP/1.1 413 ")
    assert sent < 300_000  # of the hundred million that were announced, or of no end
    assert b"urn:propel:problem:too-large" in found


def test_the_largest_body_is_read_and_one_byte_more_is_not(server: Server) -> None:
    for size, status in ((256 * 1024, 200), (256 * 1024 + 1, 413)):
        assert server.decide(b'{"context":{}' + b" " * (size - 14) + b"}").status == status
    head = b'{"decisions":[{"context":{}}]'
    for size, status in ((4096 * 1024, 200), (4096 * 1024 + 1, 413)):  # of a batch, 16 times as large
        assert server.ask("POST", "/v1/ad-load/decisions:batch", head + b" " * (size - len(head) - 1) + b"}").status == status


def test_ids_that_cannot_be_are_refused_with_a_reason(server: Server) -> None:
    for id_ in ("%0A", "a%0Ab", "a%04", "%C2%91"):
        problem(server.ask("GET", f"/v1/decisions/{id_}"), "invalid", "expected 1 to 128 printable characters")
        problem(
            server.ask("POST", f"/v1/decisions/{id_}/shown", {"action": None}), "invalid", "expected 1 to 128 printable characters"
        )


def test_a_deadline_that_has_passed_decides_nothing(server: Server) -> None:
    before = len(server.stored())
    for method, path, body, _ in ROUTES_AND_SCOPES[:5]:
        problem(server.ask(method, path, body, headers={"Propel-Deadline-Ms": "0"}), "deadline-passed", "nothing was decided")
    assert len(server.stored()) == before
    for given in ("10000", "2500.5"):
        assert server.decide(headers={"Propel-Deadline-Ms": given}).status == 200
    for given in ("soon", "-1", "nan", "inf", "", "1e4", "1_0", "5 ms"):
        problem(server.decide(headers={"Propel-Deadline-Ms": given}), "invalid", f"Propel-Deadline-Ms: found '{given}'; expected")


def test_errors_of_requests_say_what_was_found(server: Server) -> None:
    problem(server.decide(point="other"), "unknown-decision-point", "'other'", "ad-load, routes, sets")
    problem(server.decide(b"{"), "malformed")
    problem(server.decide({"context": {"device": 3}}), "invalid", "feature 'device': found 3")
    problem(server.decide({"context": {}, "actions": [{"id": "ads-7"}]}), "invalid", "'ads-7'")
    problem(server.decide({"context": {"amount": 1.0}}, point="routes"), "invalid", "expected each with its features")
    problem(server.decide(set_request(np.random.default_rng(0), 51), point="sets"), "invalid", "found 51; expected at most 50")
    answer = server.decide({"context": {}, "extra": 1})
    assert (answer.status, "extra" in answer.json["detail"]) == (422, True)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/ad-load/decisions", ["POST"]),
        ("DELETE", "/v1/decisions/x", ["GET", "HEAD"]),
        ("DELETE", "/v1/decisions/x/shown", ["GET", "HEAD", "POST"]),  # GET looks up the decision "x/shown"
        ("PUT", "/v1/rewards", ["POST"]),
        ("POST", "/healthz", ["GET", "HEAD"]),
        ("PATCH", "/metrics", ["GET"]),
    ],
)
def test_another_method_is_405_and_the_right_one_is_named(server: Server, method: str, path: str, allowed: list[str]) -> None:
    answer = server.ask(method, path)
    problem(answer, "method-not-allowed", f"found {method}; expected {' or '.join(allowed)}")
    assert answer.headers["allow"] == ", ".join(allowed)


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v2/ad-load/decisions", "/v1/ad-load/decisions/more", "/v1/rewards/", "/healthz/", "//", "/v1//decisions/"],
)
def test_an_unknown_path_is_404_and_nobody_is_sent_elsewhere(server: Server, path: str) -> None:
    for method in ("GET", "POST"):
        problem(server.ask(method, path, headers={"Host": "evil.example"}), "not-found")


def test_balancers_may_ask_for_the_head_alone(server: Server) -> None:
    for path in ("/healthz", "/readyz"):
        answer, whole = server.ask("HEAD", path, key=None), server.ask("GET", path, key=None)
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", str(len(whole.body)))


def test_health_readiness_and_metrics_need_no_key(server: Server) -> None:
    assert server.ask("GET", "/healthz", key=None).json == {"status": "ok"}
    assert server.ask("GET", "/readyz", key=None).json == {"status": "ok"}
    server.decide(point="nowhere")
    families = {one.name: one for one in text_string_to_metric_families(server.ask("GET", "/metrics", key=None).body.decode())}
    counted = {(one.labels["route"], one.labels["status"]): one.value for one in families["propel_requests"].samples}
    assert counted["/v1/{decision_point}/decisions", "404"] >= 1
    before = counted["/v1/{decision_point}/decisions", "200"]
    server.decide()
    families = {one.name: one for one in text_string_to_metric_families(server.ask("GET", "/metrics", key=None).body.decode())}
    counted = {(one.labels["route"], one.labels["status"]): one.value for one in families["propel_requests"].samples}
    assert counted["/v1/{decision_point}/decisions", "200"] == before + 1
    assert {"propel_request_seconds", "propel_decisions", "propel_events", "propel_log_waiting", "propel_loop_lag_seconds"} <= set(
        families
    )
    assert families["propel_log_full"].samples[0].value == 0


def test_a_connection_serves_many_requests_and_ends_at_garbage(server: Server) -> None:
    body = b'{"context":{}}'
    one = b"POST /v1/ad-load/decisions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" % (
        server.key.encode(), len(body), body,
    )  # fmt: skip
    last = one.replace(b"Host: x", b"Host: x\r\nConnection: close")
    assert exchange(server.port, one + one + last).count(b"HTTP/1.1 200 ") == 3  # pipelined
    for garbage in (b"\0\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        found = exchange(server.port, one + garbage)
        statuses = [int(part[:3]) for part in found.split(b"HTTP/1.1 ")[1:]]
        assert all(status < 500 for status in statuses)
        assert len(statuses) <= 2
    assert server.decide().status == 200


def test_an_id_is_refused_after_the_retry_window(tmp_path: Path) -> None:
    settings = "retry_days = 1e-9\nrotate_seconds = 0.001"  # 86 microseconds: forgotten as soon as its file is sealed
    with running(*make(tmp_path / "short", serve=settings)) as short:
        body = {"decision_id": "old", "context": {}}
        first = short.decide(body)

        def forgotten() -> bool:
            short.decide()  # a file is sealed by the next entry
            again = short.decide(body)
            assert again.status == 409 or again.body == first.body  # never a new draw
            return again.status == 409

        within(5, forgotten)
        problem(short.decide(body), "expired", "before the retry window")


def test_an_overloaded_service_says_when_to_come_back(tmp_path: Path) -> None:
    with running(*make(tmp_path / "busy", serve="most_lag_milliseconds = 1e-12")) as busy:  # any lag is too much
        within(5, lambda: busy.decide().status == 503)
        answer = busy.decide()
        problem(answer, "overloaded", "try again later")
        assert answer.headers["retry-after"] == "1"
        assert busy.ask("GET", "/readyz", key=None).status == 200


def _rewards(server: Server, id_: str) -> list[tuple[Kind, Reward]]:
    """Rewards in the log of a decision, those kept apart among them."""
    found = [one for one in server.stored() if one.kind in (Kind.REWARD, Kind.QUARANTINED)]
    return [(one.kind, made) for one in found if (made := msgspec.json.decode(one.record, type=Reward)).decision_id == id_]
