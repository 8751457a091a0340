"""Error answers of the job road, and the one place where errors become HTTP statuses there.

Job routes, worker protocol and the app's fallback answers use `native_error` (serverless-api.md §2.14);
`native_error_of` maps the error tree of `pilotlight.errors`. OpenAI routes have `gateway.refusal`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import structlog

from pilotlight.errors import (
    ClusterError,
    ConflictError,
    InvalidInputError,
    NotFoundError,
    PilotlightError,
    StoreError,
)
from pilotlight.gateway.asgi import JSON, Response

_log = structlog.get_logger()

PAYLOAD_TOO_LARGE = "payload_too_large"
"""Value of `code` with an oversize body; the status is 400 because old clients test for it (§2.13)."""

JOB_NOT_FOUND = "job not found"
"""What clients are told of a job that is unknown, expired or another endpoint's (§2.14)."""

RETRY_AFTER_STORE_S = 2
"""Arbitrary: a busy disk has usually recovered by then."""


class PayloadTooLargeError(InvalidInputError):
    """A request body over its limit."""


class BodyTimeoutError(InvalidInputError):
    """A request body that took too long to arrive."""


class UnauthorizedError(PilotlightError):
    """No key, or one that nobody knows."""

    def __init__(self) -> None:
        super().__init__("unauthorized")


class AccessDeniedError(PilotlightError):
    """A valid key whose scope does not reach."""

    def __init__(self) -> None:
        super().__init__("access denied")


class RateLimitedError(PilotlightError):
    """A client that asks for more than it may have at this moment.

    Args:
        message: One sentence for the caller.
        retry_after_s: When to try again.
    """

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(RateLimitedError):
    """An endpoint's queue holds as many jobs as it may."""


def native_error(
    status: int, text: str, headers: Mapping[str, str] | None = None, *, code: str | None = None
) -> Response:
    """An error in the contract's own shape, `{"error", "detail"}` and never a `status` key (§2.14).

    A 401 names the way to say who one is (RFC 9110 §15.5.2).

    Args:
        status: HTTP status.
        text: One sentence for the caller.
        headers: More headers, such as Retry-After or Allow.
        code: Machine-readable word, where the contract names one.
    """
    body = {"error": text, "detail": text}
    if code is not None:
        body["code"] = code
    if status == 401:
        headers = {"WWW-Authenticate": "Bearer", **(headers or {})}
    return Response(msgspec.json.encode(body), status_code=status, headers=headers, media_type=JSON)


def native_error_of(error: PilotlightError) -> Response:
    """The answer for an error of our own tree; what is nobody's fault but ours is a 500 without details."""
    text = str(error)
    match error:
        case PayloadTooLargeError():
            return native_error(400, text, code=PAYLOAD_TOO_LARGE)
        case BodyTimeoutError():
            return native_error(408, text)
        case InvalidInputError():
            return native_error(400, text)
        case UnauthorizedError():
            return native_error(401, text)
        case AccessDeniedError():
            return native_error(403, text)
        case NotFoundError():
            return native_error(404, text)
        case ConflictError():
            return native_error(409, text)
        case RateLimitedError(retry_after_s=seconds):
            return native_error(429, text, {"Retry-After": str(seconds)})
        case StoreError() | ClusterError():
            return native_error(503, text, {"Retry-After": str(RETRY_AFTER_STORE_S)})
        case _:
            _log.error("unexpected_error", kind=type(error).__name__, error=text)
            return native_error(500, "internal server error")
