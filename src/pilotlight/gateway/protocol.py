"""Uvicorn's HTTP protocol with two doors more, past ASGI's `send`, straight to the connection.

ASGI's `send` is a coroutine. For a streamed token that means waking a task, walking down to its innermost
await and back, and a dictionary, which together cost more than reading and writing the token. The data
path sends the head and the end of an answer by ASGI like everybody else, and writes the chunks in between
from the callback in which they arrive.

The second door is for whole answers (`gateway.asgi.Response`): one write instead of two, and no walk over
headers that were made a moment ago by ourselves. And whoever holds a request open is told when its client
goes, without a task that waits for it.
"""

from __future__ import annotations

import asyncio
from functools import partial

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pilotlight.gateway.asgi import ANSWER, GONE

_HEAD_MAX = 64 * 1024
"""Received of a head, or of a trailer, before it is refused: the parser keeps it whole until its end."""

HEAD_S = 30.0
"""Longest wait for the end of a head, from the opening of a connection or the head's first byte."""

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b'content-length: 35\r\nconnection: close\r\n\r\n{"error":"request head too large"}\n'
)

EXTENSION = "pilotlight.client_stream"
"""Key in the scope's `extensions` under which the `ClientStream` of the connection is found."""


class ClientStream:
    """The client's connection: to write an answer without a length to it, and to see whether it stands."""

    __slots__ = ("_flow", "_transport")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow

    @property
    def open(self) -> bool:
        """Whether the connection stands, as far as we know: the client has not closed it."""
        return not self._transport.is_closing()

    def write(self, data: bytes) -> bool:
        """Write one chunk of the body; False when the client reads slowly and `drain` is due.

        Args:
            data: Not empty; an empty chunk would end the body.
        """
        if self._transport.is_closing():
            return True  # The client has gone; whoever watches it will end the stream.
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return not self._flow.write_paused

    async def drain(self) -> None:
        """Wait until the client has read enough for more to be written."""
        await self._flow.drain()


class GatewayProtocol(HttpToolsProtocol):
    """One client connection; a head that is too large or too slow ends it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember where chunks go (asyncio)."""
        super().connection_made(transport)
        assert self.flow is not None
        self._stream = ClientStream(transport, self.flow)
        self._gone: asyncio.Future[None] | None = None
        self._pent = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(HEAD_S, self._end)

    def data_received(self, data: bytes) -> None:
        """Feed the parser (asyncio)."""
        # Set back by whatever the parser lets go of, so that it counts what the parser keeps.
        self._pent += len(data)
        super().data_received(data)
        if self._pent > _HEAD_MAX:
            self._end(_TOO_LARGE)
        elif self._in_head and self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_S, self._end)

    def on_message_begin(self) -> None:
        """Begin to count (httptools)."""
        super().on_message_begin()
        self._pent, self._in_head = 0, True

    def on_body(self, body: bytes) -> None:
        """Count anew (httptools)."""
        self._pent = 0
        super().on_body(body)

    def _end(self, answer: bytes = b"") -> None:
        """Close the connection, with an answer where none is being made."""
        if answer and (self.cycle is None or self.cycle.response_complete):
            self.transport.write(answer)
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever watches (asyncio)."""
        super().connection_lost(exc)
        self._stop_head_timer()
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def on_headers_complete(self) -> None:
        """Offer what is ours to the request that begins; its task has not run yet (httptools)."""
        super().on_headers_complete()
        self._pent, self._in_head = 0, False
        self._stop_head_timer()
        self.scope["extensions"] = {
            EXTENSION: self._stream,  # type: ignore[dict-item]
            ANSWER: partial(_answer, self.cycle),  # type: ignore[dict-item]
            GONE: self._gone_future,  # type: ignore[dict-item]
        }

    def _gone_future(self) -> asyncio.Future[None]:
        """Done once the connection is lost, which is only noticed while it is read."""
        self.flow.resume_reading()
        if self._gone is None:
            self._gone = self.loop.create_future()
            if self.cycle.disconnected:
                self._gone.set_result(None)
        return self._gone


class _CommonHeaders:
    """Headers of every answer, such as Date, in the form in which they are sent; Uvicorn renews them."""

    def __init__(self) -> None:
        self._source: object = None
        self._encoded = b""

    def encoded(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The headers, encoded once for each list that Uvicorn makes (one a second)."""
        if headers is not self._source:
            self._encoded = b"".join(b"%b: %b\r\n" % header for header in headers)
            self._source = headers
        return self._encoded


_common = _CommonHeaders()


def _answer(cycle: RequestResponseCycle, head: bytes, body: bytes) -> bool:
    """Send a whole answer (`gateway.asgi.Answer`), in the steps of `RequestResponseCycle.send`."""
    if cycle.response_started or cycle.flow.write_paused or cycle.scope["method"] == "HEAD":
        return False
    if cycle.disconnected:
        return True
    cycle.response_started = True
    cycle.waiting_for_100_continue = False
    end = b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n"
    cycle.transport.write(b"".join((head, _common.encoded(cycle.default_headers), end, body)))
    cycle.response_complete = True
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    return True
