"""The little of ASGI that the bare data path needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import Any

from pilotlight.gateway.refusal import RequestRefusedError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


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
