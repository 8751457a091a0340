"""The HTTP client with which the worker program speaks to the platform.

Takes and results are most of what a worker with short jobs does, and the general client costs several times
as much per request as the platform does to answer it. This one does what the protocol needs: HTTP/1.1 with
keep-alive, plain or TLS, whole answers, redirects. No proxies, cookies, compression or streaming.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final, cast
from urllib.parse import urljoin, urlsplit

import httptools

CONNECT_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 15.0
"""A connection that was idle for longer may be closed by the other side at any moment (§10.5)."""

_ANSWER_BYTES_MAX: Final = 512 * 1024 * 1024
"""Longest answer read; a full batch of the largest inputs is far below."""

_REDIRECTS_MAX: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 307, 308})


class AnswerTimeoutError(Exception):
    """The connection stands, but no whole answer came in time."""


class _StaleError(ConnectionError):
    """A connection that had been used before broke without a byte of an answer."""


class HttpClient:
    """Requests to any origin, over connections that are kept for `IDLE_SECONDS`.

    Args:
        headers: Sent with every request; `Authorization` only to the server that is asked, not to one that a
            redirect names.
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        lines = {name.lower(): f"{name}: {_checked(value)}\r\n" for name, value in headers.items()}
        self._headers = "".join(lines.values())
        self._open_headers = "".join(line for name, line in lines.items() if name != "authorization")
        self._origins: dict[str, _Origin] = {}

    async def close(self) -> None:
        """Closes all connections; requests under way fail."""
        for origin in self._origins.values():
            origin.close()

    async def request(
        self, method: str, url: str, *, content_type: str, body: bytes | None = None, seconds: float
    ) -> tuple[int, bytes]:
        """Status and body of the answer.

        Args:
            method: In capitals.
            url: Absolute and encoded.
            content_type: Of the body; sent without one, too, as the protocol has it.
            body: What to send.
            seconds: How long the answer may take once there is a connection.

        Raises:
            AnswerTimeoutError: No answer in time.
            OSError: No connection, or it broke, or the answer is no HTTP.
        """
        first: _Origin | None = None
        for _ in range(_REDIRECTS_MAX):
            origin, target = self._split(url)
            first = first or origin
            # The worker's key is for the server that was asked, and nobody whom that one names.
            headers = self._headers if origin is first else self._open_headers
            head = f"{method} {target} HTTP/1.1\r\nHost: {origin.host}\r\n{headers}"
            if body is not None:
                head += f"Content-Length: {len(body)}\r\n"
            data = f"{head}Content-Type: {content_type}\r\n\r\n".encode("latin-1") + (body or b"")
            try:
                answer = await origin.exchange(data, seconds)
            except _StaleError:
                # Its end of the connection had been closed while it was idle; posts are known by their ids.
                answer = await origin.exchange(data, seconds, fresh=True)
            if answer.status not in _REDIRECTS or not answer.location:
                return answer.status, bytes(answer.body)
            url = urljoin(url, answer.location)
        raise ConnectionError(f"more than {_REDIRECTS_MAX} redirects")

    def _split(self, url: str) -> tuple[_Origin, str]:
        end = url.find("/", url.index("://") + 3)
        name, target = (url, "/") if end < 0 else (url[:end], url[end:])
        origin = self._origins.get(name)
        if origin is None:
            origin = self._origins[name] = _Origin(name)
        return origin, target


class _Origin:
    """One scheme, host and port, and the idle connections to it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._name = parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self.host = parts.netloc.rpartition("@")[2]
        self._context: ssl.SSLContext | None = None
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()

    def close(self) -> None:
        for connection in [*self._all]:
            connection.close()
        self._idle.clear()

    async def exchange(self, data: bytes, seconds: float, *, fresh: bool = False) -> _Connection:
        """Send a request; returns the connection with its whole answer, which stays until the next one."""
        connection = None if fresh else self._reusable()
        if connection is None:
            connection = await self._connect()
        try:
            await connection.exchange(data, seconds)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return connection

    def _reusable(self) -> _Connection | None:
        oldest = asyncio.get_running_loop().time() - IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.open and connection.used_at > oldest:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if self._secure and self._context is None:
            self._context = await loop.run_in_executor(None, ssl.create_default_context)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._all.discard), self._name, self._port, ssl=self._context
                )
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {CONNECT_SECONDS:g} s") from error
        self._all.add(connection)
        return connection


class _Connection(asyncio.Protocol):
    """One connection: one request at a time, and the last answer.

    Attributes:
        status: Of the last answer.
        body: Of the last answer.
        location: Its header Location, "" without one.
        reusable: Whether the next request may be sent here.
        used_at: When the last answer was complete, on the loop's clock.
    """

    def __init__(self, lost: Callable[[_Connection], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._waiter: asyncio.Future[None] | None = None
        self._exchanges = 0
        self._started = False
        self.status = 0
        self.body = bytearray()
        self.location = ""
        self.reusable = False
        self.used_at = 0.0

    @property
    def open(self) -> bool:
        """Whether both ends still have it open, as far as known."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Close it at once; idempotent."""
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, data: bytes, seconds: float) -> None:
        """Send a request and wait for the whole answer."""
        if self._transport is None or self._transport.is_closing():
            raise _StaleError("the connection is closed")
        self._parser = httptools.HttpResponseParser(self)
        self._waiter = self._loop.create_future()
        self._started = self.reusable = False
        self.body = bytearray()
        self.location = ""
        self._exchanges += 1
        self._transport.write(data)
        timer = self._loop.call_later(seconds, self._fail, AnswerTimeoutError(f"no answer in {seconds:g} s"))
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        # Transports of other event loops do not inherit from asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._waiter is None:
            # Nothing was asked: whatever this is, the next answer could not be told from it.
            self.close()
            return
        self._started = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the answer is no HTTP: {error}"))
            self.close()

    def eof_received(self) -> bool:
        """See `asyncio.Protocol`."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self._lost(self)
        stale = self._exchanges > 1 and not self._started
        kind = _StaleError if stale else ConnectionError
        self._fail(kind(f"the connection broke: {exc or 'closed by the other side'}"))

    def _fail(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if len(name) == 8 and name.lower() == b"location":
            self.location = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self.body += body
        if len(self.body) > _ANSWER_BYTES_MAX:
            self._fail(ConnectionError(f"the answer has more than {_ANSWER_BYTES_MAX} bytes"))
            self.close()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()
        if self.status < 200:
            return  # An interim answer; the real one follows on the same connection.
        self.reusable = self._parser.should_keep_alive()
        self.used_at = self._loop.time()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _checked(value: str) -> str:
    if "\r" in value or "\n" in value:
        raise ValueError("a header must not contain a line break")
    return value
