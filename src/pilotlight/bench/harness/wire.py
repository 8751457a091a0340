"""HTTP/1.1 on a raw socket with as little work per byte as Python allows; shared by the load generators."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import Callable, Mapping
from typing import Any, cast

import httptools

ANSWER_S = 300.0
"""Longest wait for one answer; a hung proxy ends the load generator instead of the evening."""


class ConnectionLostError(Exception):
    """The peer closed the connection inside an answer."""


def allow_descriptors(wanted: int) -> int:
    """Raise the limit of this process's open files to `wanted`, or as far as it may go; the limit then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def request_bytes(
    path: str, body: dict[str, Any], *, key: str | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """A POST of this JSON body.

    Args:
        path: Where to.
        body: What.
        key: API key; None takes that of the environment variable KEY.
        headers: More headers.
    """
    content = json.dumps(body, separators=(",", ":")).encode()
    key = os.environ.get("KEY", "none") if key is None else key
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n{more}"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode("ascii") + content


class Connection(asyncio.Protocol):
    """A connection that carries one request at a time; make it with `connect`."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._parser: Any = None
        self._on_body: Callable[[bytes], None] = lambda _: None
        self._done: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionLostError(str(exc or "closed by the peer")))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Called by the parser, chunked framing removed; a piece may end inside an event."""
        self._on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._done is not None and not self._done.done():
            self._done.set_result(self._parser.get_status_code())

    async def ask(self, request: bytes, on_body: Callable[[bytes], None], *, rest: bytes = b"") -> int:
        """Send a request, hand over its answer's body piece by piece; its status once it is complete.

        Args:
            request: The request, or its head.
            on_body: Gets the pieces of the answer's body.
            rest: What is left of the request, in a write of its own (which is one also for the kernel only
                with asyncio's own event loop; uvloop's joins them).

        Raises:
            ConnectionLostError: The peer closed before that.
            TimeoutError: It was not complete within `ANSWER_S`.
        """
        if self._transport is None:
            raise ConnectionLostError("closed by the peer")
        self._parser, self._on_body = httptools.HttpResponseParser(self), on_body
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        if rest:
            self._transport.write(rest)
        return await asyncio.wait_for(self._done, ANSWER_S)

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()


async def connect(port: int) -> Connection:
    """A connection to this port of loopback."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection
