"""The leanest HTTP client there is room for: one request per connection at a time, an answer per callback.

Of an answer it reads status and body, whose length must be announced. Used by the load generators of
`pilotlight bench queue`, which share one core and must not be what is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

OnAnswer = Callable[[int, bytes], None]
"""Takes status and body; status 0 says that the connection was lost."""

_LENGTH = b"content-length: "


class LeanConnection(asyncio.Protocol):
    """A connection to one port of loopback; make it with `lean_connect`."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._on_answer: OnAnswer | None = None
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """See `asyncio.Protocol`."""
        self._transport = None
        self._answer(0, b"")

    def send(self, request: bytes, on_answer: OnAnswer) -> None:
        """Send a request; `on_answer` is called once."""
        assert self._on_answer is None, "one request at a time"
        self._on_answer = on_answer
        if self._transport is None:
            self._answer(0, b"")
        else:
            self._transport.write(request)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a request."""
        future: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()

        def take(status: int, body: bytes) -> None:
            if not future.done():
                future.set_result((status, body))

        self.send(request, take)
        return await future

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._seen:
            data = self._seen + data
        end = data.find(b"\r\n\r\n")
        if end >= 0:
            status = int(data[9:12])
            begin = end + 4
            at = data.find(_LENGTH, 0, end)
            if at >= 0:
                at += len(_LENGTH)
                length = int(data[at : data.index(b"\r", at)])
                if len(data) >= begin + length:
                    self._answer(status, data[begin : begin + length])
                    return
            elif status == 204:
                self._answer(status, b"")
                return
            else:
                self._answer(0, b"")
                return
        self._seen = data

    def close(self) -> None:
        """Close the connection."""
        self._on_answer = None
        if self._transport is not None:
            self._transport.close()

    def _answer(self, status: int, body: bytes) -> None:
        self._seen = b""
        on_answer, self._on_answer = self._on_answer, None
        if on_answer is not None:
            on_answer(status, body)


async def lean_connect(port: int) -> LeanConnection:
    """A connection to this port of loopback."""
    _, connection = await asyncio.get_running_loop().create_connection(LeanConnection, "127.0.0.1", port)
    return connection


def lean_request(method: str, path: str, key: str, body: bytes | None = None) -> bytes:
    """The bytes of a request with a key; POSTs have a body, maybe an empty one."""
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
    if body is not None:
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode("ascii") + b"\r\n" + (body or b"")


def target_of(url: str) -> tuple[int, str]:
    """Port, and path with query, of an HTTP URL on loopback."""
    parts = urlsplit(url)
    return parts.port or 80, f"{parts.path}?{parts.query}" if parts.query else parts.path
