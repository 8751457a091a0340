"""What a call of the gateway can raise, and how answers become errors.

Beside `InvalidInputError` (400, 422), `NotFoundError` (404) and `ConflictError` (409) from the common tree:

PilotlightError
├── AccessError               the key is missing, unknown or may not do this (401, 403)
├── BusyError                 not now: full, starting, shut down (429, 503); says when to try again
├── GatewayUnreachableError   nothing listens at the URL, or the connection broke
├── GatewayError              the gateway failed (other 5xx) or something else answers at its URL
└── StreamError               an answer that had begun ended with an error, or was cut
"""

from __future__ import annotations

import json
from typing import Any

import httpx

from pilotlight.errors import ConflictError, InvalidInputError, NotFoundError, PilotlightError

EXCERPT_CHARS = 200
"""How much of an answer that is not ours an error message quotes."""


class AccessError(PilotlightError):
    """A key that is missing, unknown, or may not do what was asked."""


class BusyError(PilotlightError):
    """A request that was turned away for now.

    Args:
        message: What the gateway says.
        status: 429 or 503.
        retry_after_s: Seconds after which another attempt makes sense; None where the gateway does not say.
    """

    def __init__(self, message: str, *, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class GatewayUnreachableError(PilotlightError):
    """A URL at which no gateway answers; the message says what to do."""


class GatewayError(PilotlightError):
    """An answer that is no answer: a fault of the gateway, or something else behind its URL."""


class StreamError(PilotlightError):
    """A streamed answer that ended with an error event or without its end."""


def describe_problem(body: bytes, status: int) -> str:
    """The reason that an error body gives, in one line.

    Understands problem documents (serverless-api.md §7.1), `{"error", "detail"}` of the job API (§2.14) and
    OpenAI's error object; quotes the beginning of anything else.
    """
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    if isinstance(content, dict):
        text = _reason(content)
        if text:
            return text
    excerpt = body.decode("utf-8", errors="replace").strip()[:EXCERPT_CHARS]
    return f"HTTP {status}: {excerpt}" if excerpt else f"HTTP {status}"


def _reason(content: dict[str, Any]) -> str:
    error = content.get("error")
    if isinstance(error, dict):
        error = error.get("message")
    text = content.get("detail") or error or content.get("message") or content.get("title") or ""
    if not isinstance(text, str):
        text = json.dumps(text)
    details = content.get("errors")
    if isinstance(details, list) and details:
        text = f"{text.rstrip('.')}: " + "; ".join(str(item) for item in details)
    return text


def error_for(
    status: int, message: str, *, retry_after: str | None = None, key_source: str = ""
) -> PilotlightError:
    """The error that an HTTP status stands for.

    Args:
        status: 400 or higher.
        message: The gateway's reason.
        retry_after: The header of that name, if there was one.
        key_source: Where the key came from, for the message of a refused key.
    """
    if status in {401, 403}:
        hint = f" (the key is from {key_source})" if key_source else ""
        return AccessError(f"{message}{hint}")
    if status == 404:
        return NotFoundError(message)
    if status == 409:
        return ConflictError(message)
    if status in {429, 503}:
        seconds = _seconds(retry_after)
        hint = f" (try again in {seconds:g} s)" if seconds is not None else ""
        return BusyError(f"{message}{hint}", status=status, retry_after_s=seconds)
    if 400 <= status < 500:
        return InvalidInputError(message)
    return GatewayError(message)


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value is not None else None
    except ValueError:
        return None


def error_of(response: httpx.Response, *, key_source: str = "") -> PilotlightError:
    """The error that a whole answer with a status of 400 or higher stands for."""
    return error_for(
        response.status_code,
        describe_problem(response.content, response.status_code),
        retry_after=response.headers.get("retry-after"),
        key_source=key_source,
    )
