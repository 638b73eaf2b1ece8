"""T24: whatever is sent, over HTTP or not even that, gets an answer that was described, or a closed connection."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.server import Server, exchange, make, running

EXAMPLES = 300 if "PROPEL_KILLS" in os.environ else 20
"""Of each operation, half of them against its schema; 300 are what T24 asks for."""

HOSTILE = 2000 if "PROPEL_KILLS" in os.environ else 150
"""Mutations of a good request over a raw socket."""

SEED = 24

CHECKS: list[Any] = [status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(*make(tmp_path_factory.mktemp("fuzz") / "service")) as one:
        yield one


OPERATIONS = [
    ("POST", "/v1/{decision_point}/decisions"),
    ("POST", "/v1/{decision_point}/decisions:batch"),
    ("POST", "/v1/{decision_point}/unserved"),
    ("POST", "/v1/rewards"),
    ("POST", "/v1/rewards:batch"),
    ("POST", "/v1/decisions/{decision_id}/shown"),
    ("GET", "/v1/decisions/{decision_id}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["by the schema", "against it"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[f"{method} {path}" for method, path in OPERATIONS])
def test_answers_are_those_described(server: Server, method: str, path: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path][method]
    if mode is GenerationMode.NEGATIVE and not path.startswith("/v1"):
        return  # takes nothing that could be wrong
    found: Counter[int] = Counter()
    fixed = {"decision_point": "ad-load"} if "{decision_point}" in path else None

    @settings(
        max_examples=EXAMPLES // 2, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(mode, path_parameters=fixed))
    def run(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE:
            _name_what_is_known(case.body)
        response = case.call(headers={"Authorization": f"Bearer {server.key}"})
        found[response.status_code] += 1
        assert response.status_code < 500 or response.status_code == 503
        refused = mode is GenerationMode.POSITIVE or response.status_code == 413  # which that check does not know as a refusal
        case.validate_response(response, checks=CHECKS if refused else [*CHECKS, negative_data_rejection])

    run()
    print(f"T24 {method} {path}, {mode.value}, derandomised: {dict(found)}")  # noqa: T201
    if mode is GenerationMode.POSITIVE and (method == "POST" or not path.startswith("/v1")):
        assert found[200] > 0
    assert sum(found.values()) >= (EXAMPLES // 4 if "{" in path or method == "POST" else 1)  # the others take nothing


def _name_what_is_known(body: Any) -> None:
    """Names and ranges of rewards, and actions, are those of the decision points, which the schema does not know."""
    for one in body.get("rewards", [body]) if isinstance(body, dict) else []:
        if isinstance(one, dict) and {"name", "value"} <= one.keys():
            one |= {"name": "value", "value": 0.5}
        elif isinstance(one, dict) and {"context", "action"} <= one.keys():
            one["action"] = "ads-0"


def _good(server: Server) -> bytes:
    body = b'{"decision_id":"d","context":{"minutes_in_session":1.5},"actions":[{"id":"ads-1"}]}'
    head = f"POST /v1/ad-load/decisions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {server.key}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _corpus(server: Server) -> list[bytes]:
    """What is known to upset servers."""
    key = server.key.encode()
    head = b"HTTP/1.1\r\nConnection: close\r\nAuthorization: Bearer " + key + b"\r\n"
    paths = [
        b"*",
        b"//",
        b"/%",
        b"/%00",
        b"/\xff\xfe",
        b"/v1/%2e%2e/decisions",
        b"/v1/" + b"a" * 70_000,
        b"http://[::1/x",
        b"/v1/\r",
    ]
    paths += [
        b"/v1/decisions/%ff%fe",
        b"/v1/decisions/%0a",
        b"/v1/decisions/%f0%9f%8e%88",
        b"/v1/decisions/?a=%zz",
        b"/v1/decisions/%ed%a0%80",
    ]
    found = [
        method + b" " + path + b" " + head + b"\r\n" for path in paths for method in (b"GET", b"POST", b"FOO", b"CONNECT", b"HEAD")
    ]
    hosts = (b"[", b"a:b", b"\xff", b"", b"x" * 5000, b"a b", b"[::1]:99999999", b"\x00")
    found += [b"GET /nothing HTTP/1.1\r\nConnection: close\r\nHost: " + host + b"\r\n\r\n" for host in hosts]
    more = [
        b"Content-Length: -1",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 99999999999999999999999",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3",
        b"Expect: 100-continue\r\nContent-Length: 0",
        b"Propel-Deadline-Ms: \xff",
        b"Upgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13",
        b"Upgrade: h2c\r\nHTTP2-Settings: x",
        b"a:" + b"b" * 100_000,
        b"Authorization: \xff\xfe",
        b"Authorization: Bearer",
        b"Authorization: Bearer " + b"x" * 50_000,
        b": empty",
        b"no colon",
        b"X: a\x00b",
        b" folded",
    ]
    found += [b"POST /v1/ad-load/decisions " + head + one + b"\r\n\r\nffffffffffffffffff\r\n" for one in more]
    tls, http2 = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    return [*found, tls, http2, b"\r\n\r\n\r\n", b"\0" * 1000, b"GET / HTTP/0.9\r\n\r\n", b"GET /\r\n\r\n", os.urandom(1000)]


def _statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


def test_hostile_bytes_get_2xx_4xx_or_a_closed_connection(server: Server) -> None:
    found: Counter[int] = Counter()
    for raw in _corpus(server):
        statuses = _statuses(exchange(server.port, raw, seconds=0.1))
        assert not [status for status in statuses if not (200 <= status < 300 or 400 <= status < 500 or status == 100)], raw[:200]
        found.update(statuses)
    print(f"T24 hostile corpus: {dict(found)}")  # noqa: T201
    assert server.decide().status == 200


def test_mutated_requests_get_2xx_4xx_or_a_closed_connection(server: Server) -> None:
    rng, good = random.Random(SEED), _good(server)
    pieces = [b"\r\n", b"\0", b"\xff", b'"', b"\\u0000", b"{", b"[" * 900, b"NaN", b":", b" ", b"%", b"1e999", b'"a":1,"a":2,']
    found: Counter[int] = Counter()
    for _ in range(HOSTILE):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.choice((0, 1, 4))] = rng.choice([*pieces, bytes([rng.randrange(256)])])
        statuses = _statuses(exchange(server.port, bytes(raw), seconds=0.05))
        assert not [status for status in statuses if not (200 <= status < 300 or 400 <= status < 500)], bytes(raw)
        found.update(statuses)
    print(f"T24 seed {SEED}: {HOSTILE} mutations of a request: {dict(found)}")  # noqa: T201
    assert server.decide().status == 200
    assert "Traceback" not in server.errors()
