"""Uvicorn's HTTP protocol with three ways past ASGI, whose `send` and `receive` cost more than most answers.

Whole answers (`gateway.asgi.Response`) are one write instead of two, without a walk over headers that were
made a moment ago by ourselves; and whoever holds a request open is told when its client goes, without a task
that waits for it.

A request that needs no parser (`gateway.repeated`) is offered to the application's `serve_whole`, without a
scope, events and the bookkeeping of a body that is still to come. And what the application's `call_road`
wants for itself is served by callbacks (`gateway.call`).

An application that has no use for ASGI offers `hand_over` instead: connections leave with the first request
that it does not serve by callbacks (`gateway.handover`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import unquote

import httptools

from pilotlight.gateway.asgi import Response
from pilotlight.gateway.call import CallRoad, ClientCall
from pilotlight.gateway.connection import Connection
from pilotlight.gateway.cycle import AsgiCycle, Flow
from pilotlight.gateway.head import Head, Lane, lane_of
from pilotlight.gateway.http_rules import (
    BROKEN,
    CHUNK_OVERHEAD,
    HEAD_TOO_LARGE,
    OVERHEAD_TOO_LARGE,
    TARGET,
    Fault,
    content_length,
    fault_of,
)
from pilotlight.gateway.repeated import KnownFields, WholeRequest

_ELSEWHERE = Fault(421, "the request is served by another process")
"""No fault of anybody's; but nothing more is read, like after one."""

_HEAD_MAX = 64 * 1024
"""Received of a head, or of a trailer, before it is refused: the parser keeps it whole until its end."""

HEAD_S = 30.0
"""Longest wait for the end of a head, from its first byte."""

FIRST_BYTE_S = 660.0
"""Longest life of a connection on which no byte ever came.

A worker that blocks its event loop connects, runs handlers for minutes, and only then posts its result, which
is lost if the connection is gone (worker-protocol.md §10.5). Its library gives up after 600 s."""

_LATER_MAX = 64 * 1024
"""Kept of what a client sends before its turn has come; nothing is read beyond."""

_EMPTY_LINE = b"\r\n\r\n"

_LANE_MISSES_MAX = 8
"""Heads in a row that were learnt for nothing, after which a connection's heads are not learnt any more."""

EXTENSION = "pilotlight.client_stream"
"""Key in the scope's `extensions` under which the `ClientStream` of the connection is found."""


class ClientStream:
    """The client's connection: to see whether it stands."""

    __slots__ = ("_flow", "_transport")

    def __init__(self, transport: asyncio.Transport, flow: Flow) -> None:
        self._transport = transport
        self._flow = flow

    @property
    def open(self) -> bool:
        """Whether the connection stands, as far as we know: the client has not closed it."""
        return not (self._transport.is_closing() or self._flow.ended)


ServeWhole = Callable[
    [WholeRequest, ClientStream, Callable[[], "asyncio.Future[None]"]], Response | Awaitable[Response] | None
]
"""Answers a request, or begins to; None leaves it to ASGI. It is given the request, its connection, and what
makes a future that is done when the client goes. An application offers this as its method `serve_whole`."""


FindRoad = Callable[[bytes, list[tuple[bytes, bytes]]], tuple[CallRoad, bytes, bytes] | None]
"""Who serves a request by callbacks, given its target and headers, with its path and query as the target has
them; None leaves it to ASGI. An application offers this as its method `call_road`."""

HandOver = Callable[[Connection, bytes], None]
"""Takes a connection away, with what was received and not served: the head of a request that is neither a
call nor refused by the rules of HTTP, and all that came after it. An application offers this as its method
`hand_over`, and has nothing for ASGI then."""


class GatewayProtocol(Connection):
    """One client connection, on which one request at a time is read and answered.

    What a client sends before its turn has come is kept as it is, up to a bound, and read all the while, as
    only then it is noticed that a client has gone. A head that is too large or too slow ends the connection.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember where chunks go (asyncio)."""
        super().connection_made(transport)
        self._stream = ClientStream(transport, self.flow)
        self.extensions = {EXTENSION: self._stream}
        self._timer = self.loop.call_later(FIRST_BYTE_S, self._end)
        self._begun = False
        # Requests that are answered without parser and ASGI.
        self._serve: ServeWhole | None = getattr(self.app, "serve_whole", None)
        self._known = KnownFields()
        # Requests that are served by callbacks.
        self._call_road: FindRoad | None = getattr(self.app, "call_road", None)
        self._hand_over: HandOver | None = getattr(self.app, "hand_over", None)
        self._lane: tuple[CallRoad, Lane[Head]] | None = None
        self._lane_misses = 0
        self._lane_left = 0
        # The message that is being read.
        self._in_body = False
        self._is_whole = False
        self._messages = 0
        self._head = b""
        self._tail = b""
        self._pent = 0
        self._left = 0
        self._fault: Fault | None = None
        self._again = False

    # What comes from the client.

    def data_received(self, data: bytes) -> None:
        """Take a piece of a message, or begin the next one, or keep it until its turn has come (asyncio)."""
        if self.flow.ended:
            return
        if self._in_message:
            if self._lane_left:
                self._take_body(data)
            else:
                self._parse(data)
        elif self._later or not self._is_free():
            self._keep(data)
        else:
            self._begin(data)

    def _is_free(self) -> bool:
        """Whether nothing is being read or answered, and the client has read what it got."""
        cycle = self.cycle
        return not (
            self._in_message
            or (cycle is not None and not cycle.response_complete)
            or self._serving is not None
            or self.flow.write_paused
        )

    def _keep(self, data: bytes) -> None:
        """Keep what belongs to later requests."""
        self._later += data
        if len(self._later) > _LATER_MAX:
            self.flow.full = True
            self.flow.pause_reading()
        self.advance()

    def advance(self) -> None:
        """Let the next request have its turn, after everybody else had theirs."""
        if self._later and self._is_free():
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if not self._later or not self._is_free() or self.transport.is_closing():
            return
        data, self._later = self._later, b""
        self._begin(data)
        if self.flow.full and len(self._later) <= _LATER_MAX:
            self.flow.full = False
            self.flow.resume_reading()

    def _begin(self, data: bytes) -> None:
        """Begin a request, without the parser if it is one of those that need none."""
        if self._lane is not None:
            road, lane = self._lane
            body = lane.read(data)
            if body is not None and road.is_current(lane.head):
                self._enter_lane(road, lane.head, data, *body)
                return
        if self._serve is not None:
            request = self._known.read(data)
            if request is not None:
                self._stop_timer()
            answering = None if request is None else self._serve(request, self._stream, self.gone_future)
            if isinstance(answering, Response):
                self._write_whole(answering)
                return
            if answering is not None:
                self._serving = self.loop.create_task(self._answer_whole(answering))
                self.tasks.add(self._serving)
                return
        self._parse(data)

    # Requests whose head is known.

    def _enter_lane(self, road: CallRoad, head: Head, data: bytes, at: int, length: int) -> None:
        """Begin a request whose head is known, with what of its body has come."""
        self._stop_timer()
        self._lane_misses = 0
        self.cycle = self._call = call = ClientCall(self, road, head)
        end = at + length
        if len(data) == end:
            call.begin_whole(data[at:])
        elif len(data) > end:
            self._keep(data[end:])
            call.begin_whole(data[at:end])
        else:
            call.content_length = self._lane_left = length
            self._in_message = True
            call.begin()
            self._take_body(data[at:])
            call.watch_body(self.loop)

    def _take_body(self, data: bytes) -> None:
        """Hand on what belongs to the body of a request whose head was known."""
        call = self.cycle
        assert isinstance(call, ClientCall)
        rest = b""
        if len(data) > self._lane_left:
            data, rest = data[: self._lane_left], data[self._lane_left :]
        self._lane_left -= len(data)
        if data:
            call.feed(data)
        if self.flow.ended:
            return
        if not self._lane_left:
            self._end_of_message()
            call.feed_end()
            if rest:
                self._keep(rest)

    async def _answer_whole(self, answering: Awaitable[Response]) -> None:
        """Answer one request; whatever came meanwhile has its turn then."""
        try:
            response = await answering
            if self.flow.write_paused:
                await self.flow.drain()
        finally:
            assert self._serving is not None
            self.tasks.discard(self._serving)
            self._serving = None
        self._write_whole(response)
        self.advance()

    def _write_whole(self, response: Response) -> None:
        if self.transport.is_closing():
            return
        self.send_last(
            b"".join((response.head(), self.end_of_head(keep_alive=not self._last), response.body))
        )
        self.server_state.total_requests += 1
        if self._last:
            self.end_connection()
            return
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._watch_idleness(self.timeout_keep_alive)

    # The parser.

    def _parse(self, data: bytes) -> None:
        """Feed the parser up to the end of a message."""
        fresh, messages = not self._in_message, self._messages
        if not self._begun:
            self._begun = True
            self._stop_timer()
        self._is_whole = False
        at = 0
        while at < len(data) and not self._is_whole:
            begin, at = at, self._end_of_piece(data, at)
            piece = data[begin:at]
            self._tail = b"" if self._left else (self._tail + piece[-3:])[-3:]
            self._pent += len(piece)
            if not self._in_body:
                self._head += piece
            if not self._feed(piece):
                if self._fault is _ELSEWHERE:
                    self._leave(data[at:])
                return
        if self._is_whole:
            self._tail = b""
        elif not self._in_body:
            # Empty lines before a head begin no message, and end the wait for the next one all the same.
            if self._timer is None:
                self._timer = self.loop.call_later(HEAD_S, self._end)
            return
        self._learn(data, begins=fresh and self._messages == messages + 1)
        if at < len(data):
            self._keep(data[at:])

    def _end_of_piece(self, data: bytes, at: int) -> int:
        """How much may be fed at once, so that no two messages are: to where a message may end.

        That is the end of a body whose length is known, else an empty line, which ends a head and the last
        chunk. The parser takes no other line ends.
        """
        if self._left:
            return min(len(data), at + self._left)
        if not at and self._tail:
            seam = (self._tail + data[:3]).find(_EMPTY_LINE)
            if seam >= 0:
                return seam + len(_EMPTY_LINE) - len(self._tail)
        found = data.find(_EMPTY_LINE, at)
        return len(data) if found < 0 else found + len(_EMPTY_LINE)

    def _feed(self, piece: bytes) -> bool:
        """Give the parser a piece; False when the connection goes on without it."""
        fault: Fault | None = None
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserError:
            fault = BROKEN
        except httptools.HttpParserUpgrade:
            if self._again:
                return self._feed_again()
            if self._fault is None and self._hand_over is not None:
                self._fault = _ELSEWHERE
            elif self._fault is None:
                self._stop_timer()
                self._unset_keepalive_if_required()
                self.handle_websocket_upgrade()
                return False
        fault = self._fault or fault
        if fault is None and self._pent > _HEAD_MAX:
            fault = OVERHEAD_TOO_LARGE if self._in_body else HEAD_TOO_LARGE
        if fault is not None:
            if fault is _ELSEWHERE:
                return False
            self._refuse(fault)
        return not self.flow.ended

    def _feed_again(self) -> bool:
        """Read a head anew without its Upgrade, which is not taken (RFC 9110 §7.8).

        The parser would take the body for something else.
        """
        self._again = self._in_message = self._is_whole = False
        self.parser = httptools.HttpRequestParser(self)
        line = self._head.lstrip(b"\r\n").partition(b"\r\n")[0]
        kept = [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        self._head = b"\r\n".join((line, *kept, b"", b""))
        return self._feed(self._head)

    def _refuse(self, fault: Fault) -> None:
        """End a connection of which nothing more can be understood, with an answer where none has begun."""
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        silent = self._in_body and (not answering or cycle.response_started)
        if answering:
            self._tell_gone()
        if self.transport.is_closing() or self.flow.ended:
            return
        if silent:
            self.transport.close()
            return
        self.transport.write(fault.answer(self.end_of_head(keep_alive=False)))
        self._linger()

    def _leave(self, rest: bytes) -> None:
        """Hand the connection over, with the head that was read last and what came after it."""
        assert self._hand_over is not None
        self._stop_timer()
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        self.flow.full = False
        self.flow.resume_reading()
        self.parser = None  # type: ignore[assignment]
        self._hand_over(self, self._head + rest)

    def _learn(self, data: bytes, *, begins: bool) -> None:
        """Remember a head, of a request that began with this data; bound the wait for the body of any."""
        call = self.cycle
        if type(call) is not ClientCall:
            if begins and self._stays_open():
                self._known.learn(data, self.headers)
            return
        call.watch_body(self.loop)
        if begins and self._lane_misses < _LANE_MISSES_MAX:
            self._lane_misses += 1
            head = call.head
            lane = lane_of(data, head.fields, head) if head.http_11 and head.keep_alive else None
            self._lane = None if lane is None else (call.road, lane)

    def _stays_open(self) -> bool:
        """Whether the request that was parsed last leaves the connection open, by the rules of HTTP/1.1."""
        cycle = self.cycle
        kept = type(cycle) is AsgiCycle and cycle.keep_alive and not self.transport.is_closing()
        return kept and self.scope["http_version"] == "1.1"

    def on_message_begin(self) -> None:
        """Begin to count (httptools)."""
        if self._is_whole:
            # The parser has found an end of the message where there can be none.
            self._fault = self._fault or BROKEN
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._messages += 1
        self._in_message = True

    def on_headers_complete(self) -> None:
        """Begin to serve a request (httptools)."""
        self._stop_timer()
        parser, fields = self.parser, self.headers
        version = parser.get_http_version()
        fault = fault_of(self._head, parser.get_method(), self.url, version, fields)
        if self._pent > _HEAD_MAX:
            fault = HEAD_TOO_LARGE
        self._fault = self._fault or fault
        if self._fault is not None:
            return
        if parser.should_upgrade():
            self._again = not self._should_upgrade()
            return
        self._pent, self._in_body = 0, True
        self._left = content_length(fields)
        try:
            found = None if self._call_road is None else self._call_road(self.url, fields)
            if found is not None:
                self._begin_call(*found, http_11=version == "1.1")
            elif self._hand_over is None:
                self._begin_cycle(version)
            else:
                self._fault = _ELSEWHERE
        except (httptools.HttpParserError, UnicodeDecodeError):
            self._fault, self._in_body = TARGET, False

    def _begin_call(self, road: CallRoad, path: bytes, query: bytes, *, http_11: bool) -> None:
        """Begin a request that is served by callbacks."""
        head = Head(
            method=self.parser.get_method().decode("ascii"),
            path=path,
            query=query,
            fields=self.headers,
            http_11=http_11,
            keep_alive=http_11 and self.parser.should_keep_alive(),
            expects=http_11 and self.expect_100_continue,
        )
        self.cycle = self._call = call = ClientCall(self, road, head)
        call.content_length = self._left
        call.begin()

    def _begin_cycle(self, version: str) -> None:
        """Begin a request that is served by ASGI; its task has not run yet."""
        target = httptools.parse_url(self.url)
        raw_path = target.path or b"/"
        self.scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,  # type: ignore[typeddict-item]
            "method": self.parser.get_method().decode("ascii"),
            "root_path": self.root_path,
            "path": self.root_path + unquote(raw_path.decode("ascii")),
            "raw_path": self.root_path.encode("ascii") + raw_path,
            "query_string": target.query or b"",
            "headers": self.headers,
            "state": self.app_state.copy(),
        }
        self.cycle = AsgiCycle(self, self.scope, http_11=version == "1.1")
        self._start_asgi_task(self.cycle, self.app)

    def on_body(self, body: bytes) -> None:
        """Hand it on, and what is left is what is kept of the framing (httptools)."""
        self._pent = max(0, self._pent - len(body) - CHUNK_OVERHEAD)
        if self._left:
            self._left -= len(body)
        cycle = self.cycle
        if self._fault is not None:
            return
        if type(cycle) is ClientCall:
            cycle.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Be ready for the next (httptools)."""
        self._is_whole = True
        if self._fault is not None or self.flow.ended or self.parser.should_upgrade():
            return
        self._end_of_message()
        if type(self.cycle) is ClientCall:
            self.cycle.feed_end()
        else:
            super().on_message_complete()

    def _end_of_message(self) -> None:
        self._in_message = self._in_body = False
        self._head, self._pent = b"", 0
        if self._timer is not None:
            # A refused body that was still to come.
            self._stop_timer()
            self._idle_since_s = self.loop.time()

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection on (Uvicorn)."""
        method = self.parser.get_method().decode("ascii")
        self.scope = {"method": method, "headers": self.headers}  # type: ignore[typeddict-item]
        super().handle_websocket_upgrade()
