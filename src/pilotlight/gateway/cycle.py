"""One request that is served by ASGI, and what ASGI may do to its connection.

Uvicorn's cycle with three differences. It writes nothing to a client that has left, which uvloop answers with
an exception. It ends a connection on which the rest of a refused body would have to be read, and tells the
client so. And it offers more than ASGI in the scope's `extensions`: see `extensions`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn._types import ASGI3Application, ASGISendEvent
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pilotlight.gateway.asgi import ANSWER, BREAK_OFF, GONE
from pilotlight.gateway.http_rules import content_length

if TYPE_CHECKING:
    from pilotlight.gateway.connection import Connection

READ_ON_MAX = 64 * 1024
"""A refused body up to this length is read to its end, so that the connection can go on."""

_REQUEST_TIMEOUT = 408


class Flow(FlowControl):
    """Reading and writing of a connection.

    Attributes:
        full: Whether more requests wait for their turn than are kept; nothing is read then.
        ended: Whether the connection is over but for a client that still sends: nothing more is written.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self.full = False
        self.ended = False

    def pause_reading(self) -> None:
        """Read no more for now."""
        if not self._transport.is_closing():
            super().pause_reading()

    def resume_reading(self) -> None:
        """Read on, unless more waits than is kept."""
        if self.read_paused and not self.full and not self._transport.is_closing():
            super().resume_reading()


class Outlet:
    """What a cycle takes for its transport."""

    __slots__ = ("_protocol",)

    def __init__(self, protocol: Connection) -> None:
        self._protocol = protocol

    def is_closing(self) -> bool:
        """Whether nothing is written any more."""
        return self._protocol.transport.is_closing() or self._protocol.flow.ended

    def write(self, data: bytes) -> None:
        """Write, where there is still somebody to read it."""
        if not self.is_closing():
            self._protocol.transport.write(data)

    def close(self) -> None:
        """Close once everything has been written."""
        self._protocol.end_connection()


class AsgiCycle(RequestResponseCycle):
    """One request and its answer; made with its head, before its body.

    Args:
        protocol: The connection.
        scope: Of the request (ASGI).
        http_11: Whether the client speaks HTTP/1.1.
    """

    def __init__(self, protocol: Connection, scope: Any, *, http_11: bool) -> None:
        super().__init__(
            scope=scope,
            transport=Outlet(protocol),  # type: ignore[arg-type]
            flow=protocol.flow,
            logger=protocol.logger,
            access_logger=protocol.access_logger,
            access_log=protocol.access_log,
            default_headers=protocol.server_state.default_headers,
            message_event=asyncio.Event(),
            # RFC 9110 §10.1.1: an older client is told nothing in between.
            expect_100_continue=protocol.expect_100_continue and http_11,
            keep_alive=http_11 and protocol.parser.should_keep_alive(),
            on_response=protocol.cycle_ended,
        )
        self._protocol = protocol
        scope["extensions"] = {
            **protocol.extensions,
            ANSWER: self.answer,
            BREAK_OFF: self.break_off,
            GONE: protocol.gone_future,
        }

    async def run_asgi(self, app: ASGI3Application) -> None:
        """Have the application serve the request, and leave nothing for the garbage collector."""
        try:
            await super().run_asgi(app)
        finally:
            # Two of them are methods of this object, which has the scope.
            self.scope.pop("extensions", None)

    async def send(self, message: ASGISendEvent) -> None:
        """Take an event of the answer (ASGI)."""
        if not self.response_started and message["type"] == "http.response.start":
            self.decide_end(message["status"])
        await super().send(message)

    def decide_end(self, status: int) -> None:
        """Make this the last answer of the connection where the rest of the body is not worth reading."""
        if self.more_body and self.keep_alive:
            # A client that waits to be told to go on might mean anything by what it sends next.
            short = not self._is_chunked() and content_length(self.scope["headers"]) <= READ_ON_MAX
            self.keep_alive = short and not self.waiting_for_100_continue and status != _REQUEST_TIMEOUT

    def _is_chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.scope["headers"])

    def answer(self, head: bytes, body: bytes) -> bool:
        """Send a whole answer (`gateway.asgi.Answer`), in the steps of `RequestResponseCycle.send`."""
        if self.response_started or self.flow.write_paused or self.scope["method"] == "HEAD":
            return False
        if self.disconnected:
            return True
        self.decide_end(int(head[9:12]))
        self.response_started = True
        self.waiting_for_100_continue = False
        end = self._protocol.end_of_head(keep_alive=self.keep_alive)
        self.transport.write(b"".join((head, end, body)))
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True

    def break_off(self) -> None:
        """Close the connection, so that the client cannot take the part it has for the whole."""
        self.lost()
        self._protocol.transport.close()

    def lost(self) -> None:
        """The connection is lost, or of no use any more."""
        self.disconnected = True
        self.message_event.set()
