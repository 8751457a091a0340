"""A request of a client that is served by callbacks instead of ASGI, and the way its answer goes back.

ASGI costs a task, a few futures and a dictionary per event, which together are more than all the rest of
passing a request on. `gateway.protocol` makes a `ClientCall` of a request that the application's `call_road`
wants (the data path does), tells its handler what comes from the client, and gives calls of one connection
their turns. To Uvicorn, which does everything else for the connection, a call looks like one of its own
request-response cycles.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pilotlight.gateway.cycle import READ_ON_MAX
from pilotlight.gateway.head import Head
from pilotlight.gateway.passage import Passage

if TYPE_CHECKING:
    from pilotlight.gateway.connection import Connection


class CallHandler(Protocol):
    """Who serves a call; told of everything that happens to it, until it has ended the answer."""

    def body_received(self, data: bytes) -> None:
        """A piece of the body has come."""
        ...

    def body_complete(self) -> None:
        """The body is whole; also called where there is none."""
        ...

    def body_whole(self, body: bytes) -> None:
        """The body has come in one piece: `body_received` and `body_complete` at once."""
        ...

    def body_late(self) -> None:
        """The body is not whole after `ClientCall.body_s` seconds."""
        ...

    def client_ready(self) -> None:
        """The client has read enough for more to be written, after a `write` that returned False."""
        ...

    def client_gone(self) -> None:
        """The connection is lost; nothing can be answered any more."""
        ...


class CallRoad(Protocol):
    """Who serves calls."""

    def serve(self, call: ClientCall) -> CallHandler:
        """Begin to serve a call, whose head has come; the body has not."""
        ...

    def is_current(self, head: Head) -> bool:
        """Whether another request with this head is to be served here without asking `call_road` again."""
        ...


class ClientCall(RequestResponseCycle):
    """One request and its answer.

    Args:
        protocol: The connection.
        road: Who serves it.
        head: The head of the request.

    Attributes:
        loop: The event loop.
        content_length: Of the body, as it was announced; 0 for chunks, and where the body has come already.
        keep_alive: Whether the connection is used again after the answer.
        body_s: Longest wait for the end of the body; set by the handler.
        response_complete: The answer is complete, or given up.
    """

    # Most calls never change most of these.
    message_event = asyncio.Event()
    """Set by Uvicorn when the connection is lost. Nobody waits for it; handlers are told."""
    response_started = False
    response_complete = False
    disconnected = False
    body_s = 0.0
    content_length = 0
    _handler: CallHandler | None = None
    _body_complete = False
    _asked_to_proceed = False
    _chunked = False
    _body_timer: asyncio.TimerHandle | None = None

    def __init__(self, protocol: Connection, road: CallRoad, head: Head) -> None:
        self._protocol = protocol
        self.road = road
        self.head = head
        self.keep_alive = head.keep_alive
        self.loop = protocol.loop

    # From the protocol.

    def begin(self) -> None:
        """Serve it; its body comes by `feed` and `feed_end`."""
        self._handler = self.road.serve(self)
        if self.response_complete:
            self._handler = None

    def begin_whole(self, body: bytes) -> None:
        """The same for a call that has come in one piece."""
        self._body_complete = True
        self._handler = handler = self.road.serve(self)
        if self.response_complete:
            self._handler = None
        else:
            handler.body_whole(body)

    def feed(self, data: bytes) -> None:
        """Take a piece of the body."""
        if self._handler is not None:
            self._handler.body_received(data)

    def feed_end(self) -> None:
        """The body is whole."""
        self._body_complete = True
        self._stop_body_timer()
        if self._handler is not None:
            self._handler.body_complete()

    def watch_body(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bound the time until the body is whole, where it is not; begins with the first call of this."""
        if not self._body_complete and self._body_timer is None and self._handler is not None:
            self._body_timer = loop.call_later(self.body_s, self._late)

    def _late(self) -> None:
        if self._handler is not None:
            self.keep_alive = False
            self._handler.body_late()

    def lost(self) -> None:
        """The connection is lost."""
        self._stop_body_timer()
        self.disconnected = self.response_complete = True
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.client_gone()

    def ready(self) -> None:
        """The client reads again."""
        if self._handler is not None:
            self._handler.client_ready()

    # From the handler.

    @property
    def writable(self) -> bool:
        """Whether the client has read what was written."""
        return not self._protocol.flow.write_paused

    def proceed(self) -> None:
        """Ask a client that waits for it to send the body."""
        if self.head.expects:
            self._asked_to_proceed = True
            self._protocol.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def answer(self, head: bytes, body: bytes) -> None:
        """Send a whole answer.

        Args:
            head: Status line and headers with Content-Length, each with its line break.
            body: The body; left out for HEAD.
        """
        self.response_started = True
        end = self._end_of_head()
        self._protocol.send_last(head + end if self.head.method == "HEAD" else b"".join((head, end, body)))
        self._complete()

    def start(self, head: bytes, *, framed: bool) -> None:
        """Send the head of an answer that comes in pieces.

        Args:
            head: Status line and headers, each with its line break.
            framed: Whether it has a Content-Length, or no body; without one the body is chunked, or ends with
                the connection for HTTP/1.0.
        """
        self.response_started = True
        self._chunked = not framed and self.head.http_11
        if self._chunked:
            head += b"transfer-encoding: chunked\r\n"
        elif not framed:
            self.keep_alive = False
        self._protocol.send(head + self._end_of_head())

    def write(self, data: bytes) -> bool:
        """Send a piece of the body; False when the client reads slowly: wait for `client_ready` then.

        Args:
            data: Not empty.
        """
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        return self._protocol.send(data)

    def passage(self) -> Passage | None:
        """Does the same for pieces that are framed as chunks already; None if the body is not chunked.

        Only after `start`.
        """
        return self._protocol.passage() if self._chunked else None

    def end(self, data: bytes = b"") -> None:
        """Complete the answer, with a last piece of its body."""
        if self._chunked:
            last = b"0\r\n\r\n"
            self._protocol.send(b"%x\r\n%b\r\n%b" % (len(data), data, last) if data else last)
        elif data:
            self._protocol.send(data)
        self._complete()

    def break_off(self) -> None:
        """Close the connection, so that the client cannot take the part it has for the whole."""
        self.keep_alive = False
        self._complete()

    def _end_of_head(self) -> bytes:
        if not self._body_complete:
            # A client that waits to be told to go on might mean anything by what it sends next, and a long
            # body is not worth reading for the sake of a connection.
            waits = self.head.expects and not self._asked_to_proceed
            if waits or not self._little_is_left():
                self.keep_alive = False
        return self._protocol.end_of_head(keep_alive=self.keep_alive)

    def _little_is_left(self) -> bool:
        """Whether the body is short, or there is none."""
        return self.content_length <= READ_ON_MAX and b"transfer-encoding" not in self.head.headers

    def _complete(self) -> None:
        self.response_complete = True
        self._stop_body_timer()
        self._handler = None
        self._protocol.call_ended(self)

    def _stop_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
