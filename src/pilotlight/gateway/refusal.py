"""A request that the data path does not serve, in the shape of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pilotlight.domain.usage import Outcome

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
