"""Errors that the service answers with: one class, one name each, RFC 9457."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

import msgspec

from serving.wire import Problem

MEDIA_TYPE = b"application/problem+json"

PROBLEMS: Mapping[str, tuple[int, str]] = {
    "malformed": (400, "The request is no HTTP, or its body not the JSON that this route takes"),
    "unauthorized": (401, "No key, or one that is not known or not valid any more"),
    "forbidden": (403, "The key lacks the scope of this route"),
    "wrong-token": (403, "The token is not that of the decision"),
    "unknown-decision-point": (404, "There is no decision point of that name"),
    "unknown-decision": (404, "There is no decision of that id"),
    "not-found": (404, "There is nothing here"),
    "method-not-allowed": (405, "This route takes another method"),
    "conflict": (409, "The same id came with another content before"),
    "expired": (409, "The id was used longer ago than repeats are answered"),
    "too-large": (413, "The body is larger than this service reads"),
    "invalid": (422, "The request cannot be decided on, or the event cannot be taken, as it stands"),
    "head-too-large": (431, "The headers are larger than this service reads"),
    "internal": (500, "The service has a fault"),
    "deadline-passed": (503, "The answer would come after the deadline"),
    "overloaded": (503, "More is waiting than can be answered in time"),
    "log-full": (503, "The disk is full: nothing can be stored"),
    "log-failed": (503, "The disk did not confirm a write: the service is ending"),
}
"""Status and title by name. The name is the last part of a problem's `type`."""


class ProblemError(Exception):
    """Ends a request with a problem."""

    def __init__(self, name: str, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.name, self.detail, self.retry_after = name, detail, retry_after

    @property
    def status(self) -> int:
        """HTTP status."""
        return PROBLEMS[self.name][0]

    @property
    def body(self) -> Problem:
        """What the answer holds."""
        status, title = PROBLEMS[self.name]
        return Problem(type=f"urn:propel:problem:{self.name}", title=title, status=status, detail=self.detail)

    def encoded(self) -> bytes:
        """The answer's bytes."""
        return msgspec.json.encode(self.body)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of the answer."""
        found = [(b"content-type", MEDIA_TYPE)]
        if self.retry_after is not None:
            found.append((b"retry-after", str(self.retry_after).encode()))
        if self.status == HTTPStatus.UNAUTHORIZED:
            found.append((b"www-authenticate", b"Bearer"))
        return found
