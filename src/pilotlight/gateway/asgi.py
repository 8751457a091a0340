"""The little of ASGI that data path and job road need."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any

from pilotlight.gateway.refusal import RequestRefusedError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

JSON = "application/json"


ANSWER = "pilotlight.answer"
"""Key in the scope's `extensions` under which a server offers to take a whole answer at once."""

GONE = "pilotlight.gone"
"""Key in the scope's `extensions` under which a server offers a future, done once the client has gone."""

BREAK_OFF = "pilotlight.break_off"
"""Key in the scope's `extensions` under which a server offers to end the connection in the middle of an
answer by a call without arguments, so that the client cannot take the part it has for the whole."""

Answer = Callable[[bytes, bytes], bool]
"""Takes status line with headers, and body; False when the answer has to go by `send` instead."""

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_JSON_200 = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"


class Response:
    """A whole answer, sent at once; made and called like Starlette's, and an ASGI application like it.

    Args:
        content: The body.
        status_code: HTTP status.
        headers: Beside Content-Type and Content-Length.
        media_type: Content-Type; None leaves it out.
    """

    __slots__ = ("body", "headers", "media_type", "status_code")

    def __init__(
        self,
        content: bytes = b"",
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = None,
    ) -> None:
        self.body = content
        self.status_code = status_code
        self.headers = headers
        self.media_type = media_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI
        """Send it (ASGI)."""
        answer: Answer | None = (scope.get("extensions") or {}).get(ANSWER)
        if answer is not None and answer(self.head(), self.body):
            return
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self._raw_headers()}
        )
        await send({"type": "http.response.body", "body": self.body})

    def _raw_headers(self) -> list[tuple[bytes, bytes]]:
        raw = []
        if self.media_type is not None:
            raw.append((b"content-type", self.media_type.encode("latin-1")))
        if self.status_code != 204:
            raw.append((b"content-length", b"%d" % len(self.body)))
        for name, value in (self.headers or {}).items():
            raw.append((name.lower().encode("latin-1"), value.encode("latin-1")))
        return raw

    def head(self) -> bytes:
        """Status line and headers, as they are sent, without the empty line that ends them."""
        if self.status_code == 200 and not self.headers and self.media_type == JSON:
            return _JSON_200 % len(self.body)
        head = _STATUS_LINES[self.status_code]
        if self.media_type is not None:
            head += b"content-type: %b\r\n" % self.media_type.encode("latin-1")
        if self.status_code != 204:
            head += b"content-length: %d\r\n" % len(self.body)
        if not self.headers:
            return head
        for name, value in self.headers.items():
            if "\n" in value or "\r" in value:
                raise ValueError(f"header {name!r} has a line break in its value: {value!r}")
            head += f"{name}: {value}\r\n".encode("latin-1")
        return head


class Headers:
    """Request headers by lower-case name; of repeated ones the last counts."""

    __slots__ = ("_values",)

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._values = dict(raw)

    def get(self, name: bytes, default: bytes = b"") -> bytes:
        """One value."""
        return self._values.get(name, default)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All (name, value)."""
        return iter(self._values.items())


class ClientGoneError(Exception):
    """The client closed its connection before its request was complete."""


async def read_body(headers: Headers, receive: Receive, *, limit: int) -> bytes:
    """The whole request body.

    Raises:
        RequestRefusedError: 413 when it is larger than `limit` bytes, before it has been read.
        ClientGoneError: The client went away.
    """
    too_large = RequestRefusedError(
        413, f"request body exceeds {limit} bytes", type="invalid_request_error", code="payload_too_large"
    )
    announced = headers.get(b"content-length")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def wait_disconnect(receive: Receive) -> None:
    """Return when the client has gone; call it only after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(
    send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Send a whole JSON answer."""
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
