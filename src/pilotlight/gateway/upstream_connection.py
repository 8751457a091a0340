"""One HTTP/1.1 connection to an engine or a listener, and on it one answer at a time.

`gateway.upstream` opens and keeps them. Responses are parsed by httptools for their head and framing; bodies
are handed on as they come and never decoded. An answer is read either by callbacks (`begin`, then `take`
whenever `arrived` is called; the data path) or by waiting (`send`, `wait_head`, `read`; the load balancer).
Reading is paused when the reader falls behind, so a slow client slows the engine and does not fill our
memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import httptools

from pilotlight.alarms import Alarm, alarm_at
from pilotlight.domain.worker import Address
from pilotlight.gateway.head import Lane, lane_of
from pilotlight.gateway.writing import outbox_of, write_now

if TYPE_CHECKING:
    from pilotlight.gateway.passage import Passage
    from pilotlight.gateway.upstream import UpstreamPool

_BUFFER_HIGH = 256 * 1024
_HEAD_MAX = 64 * 1024
_LANE_STATUS = 200
_LANE_MISSES_MAX = 8
"""Heads in a row that were learnt for nothing, after which a connection's heads are not learnt any more."""

_CLOSED = "connection closed by the engine"
_UNASKED = "the engine sent more than it announced"


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


class AnswerHead:
    """Status line and header fields of an answer.

    Attributes:
        status: HTTP status.
        fields: Header fields, names in lower case, in order.
        content_type: Of the body; b"" where nothing says.
        length: Of the body; None where it is chunked, or ends with the connection. Of a head that repeats it
            is that of the first answer.
        memo: What the data path has made of it.
    """

    __slots__ = ("content_type", "fields", "length", "memo", "status")

    def __init__(self, status: int, fields: list[tuple[bytes, bytes]]) -> None:
        values = dict(fields)
        length = values.get(b"content-length")
        self.status = status
        self.fields = fields
        self.content_type = values.get(b"content-type", b"")
        self.length = None if length is None else int(length)
        self.memo: bytes | None = None


class UpstreamResponse(asyncio.Protocol):
    """One connection, and on it one answer at a time: `status` and `headers`, then `read()` until None."""

    # The first five are what every event needs, next to each other in memory (`gateway.passage` says why).
    __slots__ = (  # noqa: RUF023
        "_between_chunks", "_passage", "_deadline", "_loop", "_silence_s",
        "_arrived", "_begun", "_broken", "_buffered", "_chunks", "_complete", "_descriptor", "_fields",
        "_head_only", "_head_size", "_idle", "_keep_alive", "_lane", "_lane_misses", "_outbox", "_parser",
        "_paused", "_pent", "_pool", "_timed_out", "_timer", "_transport", "_unframed", "_waiter",
        "_writable", "address", "head",
    )  # fmt: skip

    def __init__(self, pool: UpstreamPool, address: Address, *, head_only: bool = False) -> None:
        self._pool = pool
        self.address = address
        self._head_only = head_only
        self._loop = asyncio.get_running_loop()
        self._outbox = outbox_of(self._loop)
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport | None = None
        self._timer: Alarm | None = None
        self._deadline = 0.0
        self._descriptor: int | None = None
        self._lane: Lane[AnswerHead] | None = None
        self._lane_misses = 0
        self._parser = httptools.HttpResponseParser(self)
        self._reset()

    def _reset(self) -> None:
        self._fields: list[tuple[bytes, bytes]] = []
        self.head: AnswerHead | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._head_size = 0
        self._pent = 0
        self._begun = False
        self._unframed = False
        self._complete = False
        self._keep_alive = False
        self._paused = False
        self._idle = False
        self._broken: str | None = None
        self._timed_out = False
        self._waiter: asyncio.Future[None] | None = None
        self._arrived: Callable[[], None] | None = None
        self._passage: Passage | None = None
        self._silence_s = 0.0
        self._between_chunks = False

    @property
    def alive(self) -> bool:
        """Whether another request may be sent on this connection."""
        return self._broken is None and self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport (asyncio)."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._descriptor = transport.get_extra_info("socket").fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake the reader with what is left (asyncio)."""
        if exc is None and self.head is not None and self._unframed:
            # An answer with neither length nor chunks ends with its connection.
            self._complete = True
        self._broken = self._broken or (str(exc) if exc else _CLOSED)
        self._pool.forget(self.address, self)
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
        if self._between_chunks and self._passage is not None:
            passed = self._passage.pass_on(data)
            if passed is not None:
                self._deadline = self._loop.time() + self._silence_s
                if not passed:
                    self.pause()
                return
        if self._complete or self._idle:
            self._abort(_UNASKED)
            return
        first = not self._begun
        self._begun = True
        if first and self._lane is not None and not self._head_only:
            body = self._lane.read(data)
            if body is not None and len(data) == sum(body):
                self._take_whole(self._lane.head, data[body[0] :])
                return
        # The parser keeps an unfinished header, or a trailer, for as long as it grows.
        self._pent += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # What is wrong behind an answer does not touch it.
            self._abort(_UNASKED if self._complete else f"the engine's answer is not HTTP: {error}")
            return
        except httptools.HttpParserUpgrade:
            self._abort("the engine switched to another protocol, which nobody had asked for")
            return
        if self._pent > _HEAD_MAX and not self._complete:
            self._abort("the engine's answer is not HTTP: headers too large")
            return
        if self._between_chunks and not data.endswith(b"\r\n"):
            # The parser holds the beginning of the next chunk's length.
            self._between_chunks = False
        if first and self._keep_alive and self._complete and self._lane_misses < _LANE_MISSES_MAX:
            self._learn_lane(data)
        if self._arrived is None and self._buffered > _BUFFER_HIGH:
            self.pause()
        self._wake()

    def _take_whole(self, head: AnswerHead, body: bytes) -> None:
        """An answer that has come in one piece, and whose head is known."""
        self._lane_misses = 0
        self.head = head
        if body:
            self._chunks.append(body)
            self._buffered = len(body)
        self._complete = self._keep_alive = True
        self._wake()

    def _learn_lane(self, data: bytes) -> None:
        """Remember the head of an answer that has come in one piece."""
        self._lane_misses += 1
        assert self.head is not None
        if self.head.status == _LANE_STATUS:
            self._lane = lane_of(data, self.head.fields, self.head)

    def eof_received(self) -> bool:
        """Close on the engine's end of file (asyncio)."""
        return False

    def on_message_begin(self) -> None:
        """End the parsing at a second answer, which nobody has asked for (httptools)."""
        if self._complete:
            raise httptools.HttpParserError(_UNASKED)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header (httptools)."""
        self._head_size += len(name) + len(value)
        if self._head_size > _HEAD_MAX:
            raise httptools.HttpParserError("headers too large")
        self._fields.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Publish the head, except of 1xx answers (httptools)."""
        status = self._parser.get_status_code()
        if status < 200:
            self._fields.clear()
            return
        self.head = AnswerHead(status, self._fields)
        self._pent = 0
        self._unframed = not any(
            name in {b"content-length", b"transfer-encoding"} for name, _ in self._fields
        )
        if self._head_only:
            self._complete = True

    def on_body(self, body: bytes) -> None:
        """Collect a piece of the body (httptools)."""
        self._chunks.append(body)
        self._pent = 0
        self._buffered += len(body)

    def on_chunk_header(self) -> None:
        """Note that a chunk has begun (httptools)."""
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        """Note that a chunk has ended (httptools)."""
        self._between_chunks = True

    def on_message_complete(self) -> None:
        """Note the end of the answer (httptools)."""
        if self.head is not None:
            self._complete = True
            # httptools knows this only now; afterwards it always says no.
            self._keep_alive = self._parser.should_keep_alive()

    @property
    def status(self) -> int:
        """HTTP status of the answer; 0 until it is known."""
        return 0 if self.head is None else self.head.status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Header fields of the answer, names in lower case."""
        return self._fields if self.head is None else self.head.fields

    @property
    def complete(self) -> bool:
        """Whether the answer has ended; some of it may still have to be taken."""
        return self._complete

    @property
    def error(self) -> UpstreamError | None:
        """Why nothing more will come of an answer that is not complete."""
        if self._broken is None or self._complete:
            return None
        return UpstreamError(self._broken, answered=self._begun, timed_out=self._timed_out)

    def begin(self, data: bytes, arrived: Callable[[], None], *, silence_s: float) -> None:
        """Write a whole request, with all else of this turn of the event loop, and have its answer told.

        Args:
            data: The request.
            arrived: Called when something has come or the connection is lost, until `release`.
            silence_s: Longest time without anything coming; the connection is broken then.

        Raises:
            UpstreamError: The connection is broken; nothing was written.
        """
        self._outbox.write(self._taken(), self._descriptor, data)
        self._arrived, self._silence_s = arrived, silence_s
        self._expect_in(silence_s)

    def pass_chunks(self, passage: Passage | None) -> None:
        """Offer pieces of a chunked body as they come before they are parsed, or do so no more.

        Args:
            passage: Given pieces that begin where a chunk does, once everything before has been taken; must
                not raise. What it does not take is parsed, and `arrived` told.
        """
        self._passage = passage

    def take(self) -> bytes:
        """What has come of the body since the last call; b"" for nothing."""
        return self._take() if self._chunks else b""

    def pause(self) -> None:
        """Read nothing more until `resume`; the engine is slowed down once its connection is full."""
        if not self._paused and self._transport is not None:
            self._transport.pause_reading()
            self._paused = True

    def resume(self) -> None:
        """Read again."""
        if self._paused and self._transport is not None:
            self._transport.resume_reading()
            self._paused = False
            if self._arrived is not None:
                self._expect_in(self._silence_s)

    def send(self, data: bytes) -> None:
        """Write a whole request.

        Raises:
            UpstreamError: The connection is broken; nothing was written.
        """
        write_now(self._taken(), self._descriptor, data)

    def _taken(self) -> asyncio.Transport:
        """Where a request is to be written.

        Raises:
            UpstreamError: The connection is broken.
        """
        if self._transport is None or not self.alive:
            raise UpstreamError(self._broken or _CLOSED, sent=False)
        self._idle = False
        return self._transport

    async def write(self, data: bytes) -> None:
        """Write a piece of a request; returns when more may be written.

        Raises:
            UpstreamError: The connection is broken; an answer may have come all the same.
        """
        if self._transport is None or not self.alive:
            raise UpstreamError(self._broken or _CLOSED, answered=self._begun)
        self._transport.write(data)
        await self._writable.wait()

    async def wait_head(self, timeout_s: float) -> None:
        """Wait until `head` is known.

        Raises:
            UpstreamError: The connection broke, or nothing came in time.
        """
        while self.head is None:
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
        self.resume()
        return data

    def _take(self) -> bytes:
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._buffered = 0
        return data

    def release(self) -> None:
        """Give the connection back to the pool, or close it when the answer was not read to its end.

        Closing is what makes the engine abort a generation whose client has gone.
        """
        keep = self._complete and not self._chunks and self.alive and self._keep_alive
        if keep:
            self._reset()
            self._idle = True
            self._pool.give_back(self.address, self)
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
        if self._arrived is not None:
            self._deadline = self._loop.time() + self._silence_s
            self._arrived()
            return
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _arrival(self, timeout_s: float) -> None:
        """Wait until something has happened on the connection.

        Raises:
            UpstreamError: The connection is broken, or nothing came in time.
        """
        if self._broken is not None:
            raise UpstreamError(self._broken, answered=self._begun, timed_out=self._timed_out)
        self._waiter = self._loop.create_future()
        self._expect_in(timeout_s)
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _expect_in(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds
        # One timer for the connection's life, moved on when it rings early: arming one for every event of
        # a stream would cost more than passing the event on.
        if self._timer is None or self._timer.moment_s > self._deadline:
            self._set_timer(self._deadline)

    def _set_timer(self, moment: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if moment is None else alarm_at(moment, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if (self._waiter is None and self._arrived is None) or self._paused:
            return
        now = self._loop.time()
        if now < self._deadline:
            self._set_timer(self._deadline)
            return
        self._timed_out = True
        self._abort("the engine sent nothing in time")
