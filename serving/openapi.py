"""The description of the hot routes, from their table, the structs that read and write them, and the names of their problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from bandits.events import Id
from serving import http
from serving.problems import MEDIA_TYPE, PROBLEMS
from serving.wire import (
    Accepted,
    DecisionAnswer,
    DecisionBatchRequest,
    DecisionRequest,
    Logged,
    Problem,
    RewardBatchRequest,
    RewardRequest,
    ShownRequest,
    UnservedRequest,
)


class What(NamedTuple):
    """What a route does."""

    summary: str
    asks: type | None
    answers: type
    """Of one, where the route is that of a batch."""
    problems: tuple[str, ...]
    """Beside those of all routes; of a batch those of the whole."""


ROUTES: Mapping[http.Answer, What] = {
    http.decisions: What("Decide", DecisionRequest, DecisionAnswer, ("unknown-decision-point", "conflict", "expired")),
    http.decision_batch: What("Decide on several requests", DecisionBatchRequest, DecisionAnswer, ("unknown-decision-point",)),
    http.rewards: What("Report a reward", RewardRequest, Accepted, ("wrong-token", "conflict", "expired")),
    http.reward_batch: What("Report several rewards", RewardBatchRequest, Accepted, ()),
    http.shown: What("Report what was shown", ShownRequest, Accepted, ("conflict", "expired")),
    http.unserved: What(
        "Report an unserved decision", UnservedRequest, Accepted, ("unknown-decision-point", "conflict", "expired")
    ),
    http.look_up: What("Look a decision up", None, Logged, ("unknown-decision",)),
}

LISTS = {"decisions:batch": "decisions", "rewards:batch": "rewards"}
"""What a batch's answers are listed under."""

EVERYWHERE = ("malformed", "unauthorized", "forbidden", "too-large", "invalid", "head-too-large", "internal", "overloaded")

STORED = ("deadline-passed", "log-full", "log-failed")
"""Problems of all routes that store something."""

ID = msgspec.json.schema(Id)

PRINTABLE = {
    "pattern": r"^[^\u0000-\u001F\u007F-\u009F]*$",
    "description": "Printable: no control or format characters, no separators but the space, nothing unassigned.",
}
"""What `check_id` asks for, beside a length; the pattern says as much of it as patterns can."""

DEADLINE = {
    "name": "Propel-Deadline-Ms", "in": "header", "required": False,
    "schema": {"type": "string", "pattern": f"^{http.MILLISECONDS.pattern.decode()}$"},
    "description": "Milliseconds after which an answer is of no use: then nothing is decided, and it is 503.",
}  # fmt: skip

HEADERS: Mapping[str, dict[str, Any]] = {
    "401": {"WWW-Authenticate": {"schema": {"type": "string", "const": "Bearer"}}},
    "503": {
        "Retry-After": {
            "schema": {"type": "string", "pattern": "^[0-9]+$"},
            "description": "Seconds, where it is worth another try: with `overloaded` and `log-full`.",
        }
    },
}
"""Of problems, by status."""


def described(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document with the hot routes in it."""
    kinds = [kind for what in ROUTES.values() for kind in (what.asks, what.answers) if kind is not None]
    schemas, components = msgspec.json.schema_components([*kinds, Problem], ref_template="#/components/schemas/{name}")
    by_kind = dict(zip([*kinds, Problem], schemas, strict=True))
    paths = document.setdefault("paths", {})
    for method, route, answer, scope, _ in http.ROUTES:
        path = route.replace(":id", "")
        paths.setdefault(path, {})[method.lower()] = _operation(path, ROUTES[answer], scope, by_kind)
    components["RewardRequest"]["properties"]["event_id"] |= PRINTABLE
    document.setdefault("components", {}).setdefault("schemas", {}).update(_with_printable_ids(components))
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _operation(path: str, what: What, scope: str, by_kind: Mapping[type, dict[str, Any]]) -> dict[str, Any]:
    names = [part.partition("}")[0] for part in path.split("{")[1:]]
    answered = _answered(path, by_kind[what.answers], by_kind[Problem])
    problems = (*EVERYWHERE, *(() if what.asks is None else STORED), *what.problems)
    operation: dict[str, Any] = {
        "summary": what.summary,
        "operationId": what.summary.lower().replace(" ", "_"),
        "description": f"Needs a key with the scope `{scope}`.",
        "security": [{"key": []}],
        "parameters": [{"name": name, "in": "path", "required": True, "schema": ID | PRINTABLE} for name in names],
        "responses": {
            "200": {"description": "Done.", "content": {"application/json": {"schema": answered}}},
            **_problems(problems, by_kind[Problem]),
        },
    }
    if what.asks is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": by_kind[what.asks]}}}
        operation["parameters"].append(DEADLINE)
    return operation


def _answered(path: str, answer: dict[str, Any], problem: dict[str, Any]) -> dict[str, Any]:
    """What a route answers: a batch with as many as were asked, each an answer or a problem."""
    name = LISTS.get(path.rsplit("/", 1)[1])
    if name is None:
        return answer
    items = {"type": "array", "items": {"anyOf": [answer, problem]}}
    return {"type": "object", "required": [name], "properties": {name: items}, "additionalProperties": False}


def _problems(names: tuple[str, ...], schema: dict[str, Any]) -> dict[str, Any]:
    """Answers by status."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(str(PROBLEMS[name][0]), []).append(f"{name}: {PROBLEMS[name][1]}.")
    return {
        status: {"description": " ".join(told), "content": {MEDIA_TYPE.decode(): {"schema": schema}}}
        | ({"headers": HEADERS[status]} if status in HEADERS else {})
        for status, told in found.items()
    }


def _with_printable_ids(schema: Any) -> Any:
    """A schema in which every id says that it is to be printable."""
    if schema == ID:
        return ID | PRINTABLE
    if isinstance(schema, dict):
        return {name: _with_printable_ids(value) for name, value in schema.items()}
    return [_with_printable_ids(value) for value in schema] if isinstance(schema, list) else schema
