"""The description of the hot routes, from the structs that read and write them."""

from __future__ import annotations

from typing import Any

import msgspec

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
)

ROUTES: tuple[tuple[str, str, str, str, type | None, type, tuple[str, ...]], ...] = (
    ("post", "/v1/{decision_point}/decisions", "Decide", "decide", DecisionRequest, DecisionAnswer, ("unknown-decision-point",)),
    (
        "post", "/v1/{decision_point}/decisions:batch", "Decide on several requests", "decide", DecisionBatchRequest,
        DecisionAnswer, ("unknown-decision-point",),
    ),
    ("post", "/v1/rewards", "Report a reward", "reward", RewardRequest, Accepted, ()),
    ("post", "/v1/rewards:batch", "Report several rewards", "reward", RewardBatchRequest, Accepted, ()),
    ("post", "/v1/decisions/{decision_id}/shown", "Report what was shown", "reward", ShownRequest, Accepted, ()),
    ("get", "/v1/decisions/{decision_id}", "Look a decision up", "read", None, Logged, ("unknown-decision",)),
)  # fmt: skip
"""Method, path, what it does, scope, request, answer (of one, where the path is that of a batch), further problems."""

LISTS = {"decisions:batch": "decisions", "rewards:batch": "rewards"}
"""What a batch's answers are listed under."""

EVERYWHERE = ("malformed", "unauthorized", "forbidden", "invalid", "overloaded", "too-large", "conflict")


def described(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document with the hot routes in it."""
    kinds = [kind for *_, asks, answers, _ in ROUTES for kind in (asks, answers) if kind is not None]
    schemas, components = msgspec.json.schema_components([*kinds, Problem], ref_template="#/components/schemas/{name}")
    by_kind = dict(zip([*kinds, Problem], schemas, strict=True))
    paths = document.setdefault("paths", {})
    for method, path, summary, scope, asks, answers, more in ROUTES:
        names = [part.strip("{}").split(":")[0] for part in path.replace("}:batch", "}").split("/") if part.startswith("{")]
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": summary.lower().replace(" ", "_"),
            "description": f"Needs a key with the scope `{scope}`.",
            "security": [{"key": []}],
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
            ],
            "responses": {
                "200": {
                    "description": "Done.",
                    "content": {"application/json": {"schema": _answered(path, by_kind[answers], by_kind[Problem])}},
                },
                **_problems((*EVERYWHERE, *more), by_kind[Problem]),
            },
        }
        if asks is not None:
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": by_kind[asks]}}}
            operation["parameters"].append(
                {
                    "name": "Propel-Deadline-Ms", "in": "header", "required": False,
                    "schema": {"type": "number", "minimum": 0},
                    "description": "Milliseconds after which an answer is of no use: then nothing is decided, and it is 503.",
                }
            )  # fmt: skip
        paths.setdefault(path, {})[method] = operation
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _answered(path: str, answer: dict[str, Any], problem: dict[str, Any]) -> dict[str, Any]:
    """What a route answers: a batch with as many as were asked, each an answer or a problem."""
    name = LISTS.get(path.rsplit("/", 1)[1])
    if name is None:
        return answer
    items = {"type": "array", "items": {"anyOf": [answer, problem]}}
    return {"type": "object", "required": [name], "properties": {name: items}, "additionalProperties": False}


def _problems(names: tuple[str, ...], schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(str(PROBLEMS[name][0]), []).append(f"{name}: {PROBLEMS[name][1]}.")
    return {
        status: {"description": " ".join(told), "content": {MEDIA_TYPE.decode(): {"schema": schema}}}
        for status, told in found.items()
    }
