"""The description of the service: its schemas are the structs, its problems those of the routes, its patterns what is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import pytest

from serving import wire
from serving.problems import PROBLEMS
from tests.serving.server import Server, make, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(*make(tmp_path_factory.mktemp("openapi") / "service")) as one:
        yield one


def test_the_description_is_valid_and_its_schemas_are_the_structs(server: Server) -> None:
    document = server.ask("GET", "/openapi.json", key=None).json
    kinds = [
        wire.DecisionRequest, wire.DecisionBatchRequest, wire.DecisionAnswer, wire.RewardRequest, wire.RewardBatchRequest,
        wire.ShownRequest, wire.UnservedRequest, wire.Accepted, wire.Problem, wire.Logged,
    ]  # fmt: skip
    _, expected = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    assert document["openapi"].startswith("3.1")
    schemas = {name: document["components"]["schemas"][name] for name in expected}
    assert _without_printable(schemas) == expected
    assert msgspec.json.encode(schemas).count(b'"Printable') == 14  # ids of requests, event_id
    for name in expected:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator.check_schema(schema)
    answer = server.decide().json
    jsonschema.validate(answer, {"$ref": "#/components/schemas/DecisionAnswer", "components": document["components"]})
    assert {path for path in document["paths"] if path.startswith("/v1")} == {
        "/v1/{decision_point}/decisions", "/v1/{decision_point}/decisions:batch", "/v1/rewards", "/v1/rewards:batch",
        "/v1/decisions/{decision_id}/shown", "/v1/{decision_point}/unserved", "/v1/decisions/{decision_id}",
    }  # fmt: skip
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "200" in operation["responses"]


def _without_printable(schema: Any) -> Any:
    """A schema without what it says about printable texts beside the structs."""
    if isinstance(schema, dict):
        extra = {"pattern", "description"} if schema.get("description", "").startswith("Printable") else set()
        return {name: _without_printable(value) for name, value in schema.items() if name not in extra}
    return [_without_printable(value) for value in schema] if isinstance(schema, list) else schema


def test_every_problem_of_a_route_is_described_there(server: Server) -> None:
    paths = server.ask("GET", "/openapi.json", key=None).json["paths"]

    def names(path: str, method: str) -> set[str]:
        answers = paths[path][method]["responses"].items()
        return {
            name
            for name, (status, _) in PROBLEMS.items()
            for at, one in answers
            if at == str(status) and f"{name}:" in one["description"]
        }

    every = {"malformed", "unauthorized", "forbidden", "too-large", "head-too-large", "invalid", "internal", "overloaded"}
    stored = every | {"deadline-passed", "log-full", "log-failed"}
    assert {(path, method): names(path, method) for path in paths if path.startswith("/v1") for method in paths[path]} == {
        ("/v1/{decision_point}/decisions", "post"): stored | {"unknown-decision-point", "conflict", "expired"},
        ("/v1/{decision_point}/decisions:batch", "post"): stored | {"unknown-decision-point"},
        ("/v1/rewards", "post"): stored | {"wrong-token", "conflict", "expired"},
        ("/v1/rewards:batch", "post"): stored,
        ("/v1/decisions/{decision_id}/shown", "post"): stored | {"conflict", "expired"},
        ("/v1/{decision_point}/unserved", "post"): stored | {"unknown-decision-point", "conflict", "expired"},
        ("/v1/decisions/{decision_id}", "get"): every | {"unknown-decision"},
    }
    responses = paths["/v1/rewards"]["post"]["responses"]
    assert {status: list(one["headers"]) for status, one in responses.items() if "headers" in one} == {
        "401": ["WWW-Authenticate"], "503": ["Retry-After"],
    }  # fmt: skip


def test_the_deadline_is_described_as_it_is_read(server: Server) -> None:
    parameters = server.ask("GET", "/openapi.json", key=None).json["paths"]["/v1/{decision_point}/decisions"]["post"]["parameters"]
    (schema,) = [one["schema"] for one in parameters if one["in"] == "header"]
    for given, good in (("50", 1), ("2500.5", 1), ("999999999", 1), ("1234567890", 0), ("1e4", 0), ("-1", 0), (".5", 0), ("5.", 0)):
        assert jsonschema.Draft202012Validator(schema).is_valid(given) == good
        assert (server.decide(headers={"Propel-Deadline-Ms": given}).status == 200) == good


def test_what_the_pattern_of_ids_refuses_is_refused(server: Server) -> None:
    document = server.ask("GET", "/openapi.json", key=None).json
    schema = {"$ref": "#/components/schemas/DecisionRequest", "components": document["components"]}
    for id_, good in (("a b", 1), ("é", 1), ("🎈", 1), ("a\nb", 0), ("\x7f", 0), ("\x9f", 0), ("", 0), ("x" * 129, 0)):
        body = {"decision_id": id_, "context": {}}
        assert jsonschema.Draft202012Validator(schema).is_valid(body) == good
        assert (server.decide(body).status == 200) == good
