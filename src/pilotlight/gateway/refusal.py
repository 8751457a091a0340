"""A request that the data path does not serve, in the shape of OpenAI's errors, and of Anthropic's."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pilotlight.core.openai_routes import speaks_anthropic
from pilotlight.domain.usage import Outcome

_REASON_MAX = 500
"""Characters that are quoted of an answer in no shape that is known."""

_TYPES = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}


def openai_body(
    status: int, message: str, *, type: str, code: str | int | None = None, param: str | None = None
) -> bytes:  # the parameter is called what OpenAI's field is called
    """OpenAI's error object, encoded; `code` defaults to the HTTP status, as vLLM has it."""
    error = {"message": message, "type": type, "param": param, "code": status if code is None else code}
    return msgspec.json.encode({"error": error})


def anthropic_body(message: str, *, type: str) -> bytes:
    """Anthropic's error object, encoded."""
    return msgspec.json.encode({"type": "error", "error": {"type": type, "message": message}})


def error_object(route: str, status: int, body: bytes) -> bytes:
    """An engine's answer of status 400 and above as an error object on one line.

    One in the route's own shape stays as it is; of anything else its words are taken.

    Args:
        route: Path of the engine's route.
        status: HTTP status of the answer.
        body: The answer, in whatever form.
    """
    anthropic = speaks_anthropic(route)
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        fields = None
    match fields:
        case {"error": {"message": str()}} if anthropic is (fields.get("type") == "error"):
            return msgspec.json.format(body, indent=-1)
        case {"error": {"message": str(said)}} | {"message": str(said)} | {"detail": str(said)}:
            message = said
        case _:
            message = body.decode("utf-8", "replace").strip()
    return RequestRefusedError(status, message[:_REASON_MAX] or f"the engine answered {status}").body_for(
        route
    )


class RequestRefusedError(Exception):
    """Raised where a request ends before an answer began; becomes the HTTP answer.

    Args:
        status: HTTP status.
        message: One sentence for the caller.
        type: OpenAI error type; by default the one that goes with the status.
        code: OpenAI error code.
        retry_after_s: Seconds for a Retry-After header.
        outcome: For the request log.
        headers: More headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "",
        code: str | None = None,
        retry_after_s: int | None = None,
        outcome: Outcome = Outcome.REJECTED,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.code = code
        self.outcome = outcome
        self.headers = list(headers)
        if retry_after_s is not None:
            self.headers.append((b"retry-after", b"%d" % retry_after_s))

    def body(self) -> bytes:
        """The encoded error object."""
        return openai_body(self.status, str(self), type=self.type, code=self.code)

    def anthropic_body(self) -> bytes:
        """The same for a client of Anthropic's API, whose types are few."""
        return anthropic_body(str(self), type="api_error" if self.status >= 500 else self.type)

    def body_for(self, route: str) -> bytes:
        """The one that clients of this route of the engine read (vllm-worker.md §3.7)."""
        return self.anthropic_body() if speaks_anthropic(route) else self.body()
