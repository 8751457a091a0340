"""Pooled HTTP/1.1 connections to engines and listeners, on Unix sockets or TCP.

The data path and the load balancer call it. Responses are parsed by httptools for their head and
framing; bodies are handed on as they come and never decoded. Reading is paused when the reader falls
behind, so a slow client slows the engine and does not fill our memory. Idle connections are closed well
before the engine closes them, and a request whose reused connection turns out to be dead is sent once
more on a new one, provided that no byte of an answer had come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import cast
from urllib.parse import urlsplit

import httptools

from pilotlight.domain.worker import Address

_BUFFER_HIGH = 256 * 1024
_BUFFER_LOW = 64 * 1024
_CONNECT_TIMEOUT_S = 5.0
_IDLE_MAX_PER_ADDRESS = 512
_HEAD_MAX = 64 * 1024
_CLOSED = "connection closed by the engine"


class UpstreamError(Exception):
    """The engine could not be reached, or its connection broke.

    Attributes:
        answered: Whether any byte of the answer had arrived.
        sent: Whether the request may have reached the engine.
        timed_out: Whether the engine was silent for too long.
    """

    def __init__(
        self, message: str, *, answered: bool = False, sent: bool = True, timed_out: bool = False
    ) -> None:
        super().__init__(message)
        self.answered = answered
        self.sent = sent
        self.timed_out = timed_out


class UpstreamResponse(asyncio.Protocol):
    """One connection, and on it one answer at a time: `status` and `headers`, then `read()` until None."""

    def __init__(self, pool: UpstreamPool, address: Address, *, head_only: bool = False) -> None:
        self._pool = pool
        self._address = address
        self._head_only = head_only
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._head_size = 0
        self._pent = 0
        self._begun = False
        self._head_complete = False
        self._unframed = False
        self._complete = False
        self._keep_alive = False
        self._paused = False
        self._idle = False
        self._broken: str | None = None
        self._timed_out = False
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._sink_error: Exception | None = None
        self._silence_s = 0.0
        self._blocked = False

    @property
    def alive(self) -> bool:
        """Whether another request may be sent on this connection."""
        return self._broken is None and self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport (asyncio)."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake the reader with what is left (asyncio)."""
        if exc is None and self._head_complete and self._unframed:
            # An answer with neither length nor chunks ends with its connection.
            self._complete = True
        self._broken = self._broken or (str(exc) if exc else _CLOSED)
        self._pool.forget(self._address, self)
        self._set_timer(None)
        self._writable.set()
        self._wake()

    def pause_writing(self) -> None:
        """Note that the engine reads more slowly than we write (asyncio)."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Go on (asyncio)."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Feed the parser (asyncio)."""
        if self._complete or self._idle:
            self._abort("the engine sent more than it announced")
            return
        self._begun = True
        # The parser keeps an unfinished header, or a trailer, for as long as it grows.
        self._pent += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._abort(f"the engine's answer is not HTTP: {error}")
            return
        if self._pent > _HEAD_MAX and not self._complete:
            self._abort("the engine's answer is not HTTP: headers too large")
            return
        if self._sink is not None:
            self._fill_sink()
            if self._complete or self._blocked or self._sink_error is not None:
                self._wake()
            return
        if self._buffered > _BUFFER_HIGH and not self._paused and self._transport is not None:
            self._transport.pause_reading()
            self._paused = True
        self._wake()

    def eof_received(self) -> bool:
        """Close on the engine's end of file (asyncio)."""
        return False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header (httptools)."""
        self._head_size += len(name) + len(value)
        if self._head_size > _HEAD_MAX:
            raise httptools.HttpParserError("headers too large")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Publish the head, except of 1xx answers (httptools)."""
        status = self._parser.get_status_code()
        if status < 200:
            self.headers.clear()
            return
        self.status = status
        self._pent = 0
        self._head_complete = True
        self._unframed = not any(
            name in {b"content-length", b"transfer-encoding"} for name, _ in self.headers
        )
        if self._head_only:
            self._complete = True

    def on_body(self, body: bytes) -> None:
        """Collect a piece of the body (httptools)."""
        self._chunks.append(body)
        self._pent = 0
        self._buffered += len(body)

    def on_message_complete(self) -> None:
        """Note the end of the answer (httptools)."""
        if self._head_complete:
            self._complete = True
            # httptools knows this only now; afterwards it always says no.
            self._keep_alive = self._parser.should_keep_alive()

    def send(self, data: bytes) -> None:
        """Write a whole request.

        Raises:
            UpstreamError: The connection is broken; nothing was written.
        """
        if self._transport is None or not self.alive:
            raise UpstreamError(self._broken or _CLOSED, sent=False)
        self._idle = False
        self._transport.write(data)

    async def write(self, data: bytes) -> None:
        """Write a piece of a request; returns when more may be written.

        Raises:
            UpstreamError: The connection is broken; an answer may have come all the same.
        """
        if self._transport is None or not self.alive:
            raise UpstreamError(self._broken or _CLOSED, answered=self._begun)
        self._transport.write(data)
        await self._writable.wait()

    async def head(self, timeout_s: float) -> None:
        """Wait until `status` and `headers` are known.

        Raises:
            UpstreamError: The connection broke, or nothing came in time.
        """
        while not self._head_complete:
            await self._arrival(timeout_s)

    async def read(self, timeout_s: float) -> bytes | None:
        """What has arrived of the body since the last call; None at its end.

        Raises:
            UpstreamError: The connection broke before the end, or nothing came in time.
        """
        while not self._chunks and not self._complete:
            await self._arrival(timeout_s)
        if not self._chunks:
            return None
        data = self._take()
        self._resume()
        return data

    async def pass_to(self, sink: Callable[[bytes], bool], timeout_s: float) -> bool:
        """Hand the body on as it arrives, from within the callback in which it does.

        Args:
            sink: Takes a piece; False asks for a pause, and no more is read until the next call.
            timeout_s: Longest silence.

        Returns:
            True at the end of the body, False when `sink` asked for a pause.

        Raises:
            UpstreamError: The connection broke before the end, or nothing came in time.
        """
        self._sink, self._silence_s, self._blocked = sink, timeout_s, False
        try:
            self._fill_sink()
            if not self._blocked:
                self._resume()
            while not self._blocked:
                if self._sink_error is not None:
                    raise self._sink_error
                if self._complete:
                    return True
                await self._arrival(timeout_s)
            return False
        finally:
            self._sink = None

    def _take(self) -> bytes:
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        return data

    def _fill_sink(self) -> None:
        if not self._chunks or self._sink is None:
            return
        self._deadline = asyncio.get_running_loop().time() + self._silence_s
        try:
            self._blocked = not self._sink(self._take())
        except Exception as error:  # noqa: BLE001 - raised again where the sink's owner waits
            self._sink_error = error
        if self._blocked and not self._paused and self._transport is not None:
            self._transport.pause_reading()
            self._paused = True

    def _resume(self) -> None:
        if self._paused and self._transport is not None:
            self._transport.resume_reading()
            self._paused = False

    def release(self) -> None:
        """Give the connection back to the pool, or close it when the answer was not read to its end.

        Closing is what makes the engine abort a generation whose client has gone.
        """
        keep = self._complete and not self._chunks and self.alive and self._keep_alive
        if keep:
            self._reset()
            self._idle = True
            self._pool.give_back(self._address, self)
        else:
            self.close()

    def close(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _abort(self, reason: str) -> None:
        self._broken = reason
        self.close()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _arrival(self, timeout_s: float) -> None:
        """Wait until something has happened on the connection.

        Raises:
            UpstreamError: The connection is broken, or nothing came in time.
        """
        if self._broken is not None:
            raise UpstreamError(self._broken, answered=self._begun, timed_out=self._timed_out)
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        self._deadline = loop.time() + timeout_s
        # One timer for the connection's life, moved on when it rings early: arming one for every event of
        # a stream would cost more than passing the event on.
        if self._timer is None or self._timer.when() > self._deadline:
            self._set_timer(self._deadline)
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _set_timer(self, moment: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if moment is None else asyncio.get_running_loop().call_at(moment, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._waiter is None:
            return
        now = asyncio.get_running_loop().time()
        if now < self._deadline:
            self._set_timer(self._deadline)
            return
        self._timed_out = True
        self._abort("the engine sent nothing in time")


class UpstreamPool:
    """Connections by address, the most recently used first.

    Args:
        idle_s: Idle connections are closed after this many seconds.
    """

    def __init__(self, *, idle_s: float) -> None:
        self._idle_s = idle_s
        self._idle: dict[str, deque[tuple[float, UpstreamResponse]]] = {}

    async def request(
        self,
        address: Address,
        method: str,
        path: str,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes,
        *,
        timeout_s: float,
    ) -> UpstreamResponse:
        """Send one request and wait for the head of its answer; the caller must `release()` it.

        Args:
            address: Where to.
            method: HTTP method.
            path: Path and query, already encoded.
            headers: Names in lower case; host, length and key are added here.
            body: The whole body.
            timeout_s: Longest wait for the head.

        Raises:
            UpstreamError: Not reachable, or broken before the head.
        """
        return await self.exchange(
            address, _request_bytes(address, method, path, headers, body), timeout_s=timeout_s
        )

    async def exchange(self, address: Address, data: bytes, *, timeout_s: float) -> UpstreamResponse:
        """Send the bytes of one request and wait for the head of its answer; the caller must `release()` it.

        The bytes are sent a second time, on a new connection, when the first was an old one and ended without
        a byte of an answer; never a third time, and never after a new connection.

        Raises:
            UpstreamError: Not reachable, or broken before the head.
        """
        response = self._take_idle(address)
        if response is not None:
            response.send(data)
            try:
                await response.head(timeout_s)
            except UpstreamError as error:
                if error.answered or error.timed_out:
                    raise
                # The engine closed an idle connection in the moment in which we used it. Its others may be as
                # old: the second and last time goes over a new one.
            except BaseException:
                response.close()
                raise
            else:
                return response
        response = await self.connect(address)
        try:
            response.send(data)
            await response.head(timeout_s)
        except BaseException:
            response.close()
            raise
        return response

    def give_back(self, address: Address, response: UpstreamResponse) -> None:
        """Keep a connection for the next request."""
        idle = self._idle.setdefault(address.url, deque())
        if len(idle) >= _IDLE_MAX_PER_ADDRESS:
            response.close()
            return
        now = asyncio.get_running_loop().time()
        idle.append((now, response))
        while idle and now - idle[0][0] > self._idle_s:
            idle.popleft()[1].close()

    def forget(self, address: Address, response: UpstreamResponse) -> None:
        """Drop a connection that was closed while idle."""
        idle = self._idle.get(address.url)
        if idle:
            self._idle[address.url] = deque(item for item in idle if item[1] is not response)

    def drop(self, urls: Sequence[str]) -> None:
        """Close the idle connections to these addresses; their worker has ended or is stopped in place."""
        for url in urls:
            for _, response in self._idle.pop(url, ()):
                response.close()

    def close(self) -> None:
        """Close all idle connections."""
        self.drop(list(self._idle))

    def _take_idle(self, address: Address) -> UpstreamResponse | None:
        idle = self._idle.get(address.url)
        now = asyncio.get_running_loop().time()
        while idle:
            since, response = idle.pop()
            if response.alive and now - since <= self._idle_s:
                return response
            response.close()
        return None

    async def connect(self, address: Address, *, head_only: bool = False) -> UpstreamResponse:
        """A new connection, whose owner writes a request on it and must `release()` it.

        Args:
            address: Where to.
            head_only: Whether the answer has no body whatever its head says, as to HEAD.

        Raises:
            UpstreamError: Not reachable.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                if address.url.startswith("unix:"):
                    _, protocol = await loop.create_unix_connection(
                        lambda: UpstreamResponse(self, address, head_only=head_only),
                        address.url.removeprefix("unix:"),
                    )
                else:
                    host, port = _host_port(address.url)
                    _, protocol = await loop.create_connection(
                        lambda: UpstreamResponse(self, address, head_only=head_only), host, port
                    )
        except TimeoutError as error:
            raise UpstreamError(
                f"the engine did not accept a connection within {_CONNECT_TIMEOUT_S:g} s", sent=False
            ) from error
        except OSError as error:
            raise UpstreamError(f"the engine cannot be reached: {error.strerror}", sent=False) from error
        return protocol


def _host_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80


def _base_path(url: str) -> str:
    return "" if url.startswith("unix:") else urlsplit(url).path.strip("/")


def _request_bytes(
    address: Address, method: str, path: str, headers: Iterable[tuple[bytes, bytes]], body: bytes
) -> bytes:
    base = _base_path(address.url)
    host = b"localhost" if address.url.startswith("unix:") else urlsplit(address.url).netloc.encode()
    lines = [f"{method} {'/' + base if base else ''}{path} HTTP/1.1".encode("latin-1"), b"host: " + host]
    lines += [name + b": " + value for name, value in headers]
    if address.key:
        lines.append(b"authorization: Bearer " + address.key.encode())
    if body or method == "POST":
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
