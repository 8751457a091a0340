"""Uvicorn's HTTP protocol with two doors more, past ASGI's `send`, straight to the connection.

ASGI's `send` is a coroutine. For a streamed token that means waking a task, walking down to its innermost
await and back, and a dictionary, which together cost more than reading and writing the token. The data
path sends the head and the end of an answer by ASGI like everybody else, and writes the chunks in between
from the callback in which they arrive.

The second door is for whole answers (`gateway.asgi.Response`): one write instead of two, and no walk over
headers that were made a moment ago by ourselves. And whoever holds a request open is told when its client
goes, without a task that waits for it.

And there is a way past all of it: a request that needs no parser (`gateway.repeated`) is offered to the
application's `serve_whole`, without a scope, events and the bookkeeping of a body that is still to come.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from functools import partial

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pilotlight.gateway.asgi import ANSWER, GONE, Response
from pilotlight.gateway.repeated import KnownFields, WholeRequest

_HEAD_MAX = 64 * 1024
"""Received of a head, or of a trailer, before it is refused: the parser keeps it whole until its end."""

HEAD_S = 30.0
"""Longest wait for the end of a head, from its first byte."""

FIRST_BYTE_S = 660.0
"""Longest life of a connection on which no byte ever came.

A worker that blocks its event loop connects, runs handlers for minutes, and only then posts its result, which
is lost if the connection is gone (worker-protocol.md §10.5). Its library gives up after 600 s."""

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


ServeWhole = Callable[
    [WholeRequest, ClientStream, Callable[[], "asyncio.Future[None]"]], Response | Awaitable[Response] | None
]
"""Answers a request, or begins to; None leaves it to ASGI. It is given the request, its connection, and what
makes a future that is done when the client goes. An application offers this as its method `serve_whole`."""


class GatewayProtocol(HttpToolsProtocol):
    """One client connection; a head that is too large or too slow ends it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember where chunks go (asyncio)."""
        super().connection_made(transport)
        assert self.flow is not None
        self._stream = ClientStream(transport, self.flow)
        self._gone: asyncio.Future[None] | None = None
        self._pent = 0
        self._messages = 0
        self._in_head = False
        self._in_message = False
        self._begun = False
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(FIRST_BYTE_S, self._end)
        plain = transport.get_extra_info("sslcontext") is None
        self._descriptor = transport.get_extra_info("socket").fileno() if plain else None
        # Requests that are answered without parser and ASGI, one at a time.
        self._serve: ServeWhole | None = getattr(self.app, "serve_whole", None)
        self._known = KnownFields()
        self._serving: asyncio.Task[None] | None = None
        self._later = b""
        self._last = False
        self._idle_since_s = 0.0

    def data_received(self, data: bytes) -> None:
        """Answer a request that needs no parser, or feed the parser (asyncio)."""
        if self._serving is not None:
            self._later += data
            if len(self._later) > _HEAD_MAX:
                self.flow.pause_reading()
            return
        between = not self._in_message and (self.cycle is None or self.cycle.response_complete)
        # A client that does not read what it asks for waits until it has, in the parser's pipeline.
        if between and self._serve is not None and not self.flow.write_paused:
            request = self._known.read(data)
            if request is not None:
                self._stop_head_timer()
            answering = None if request is None else self._serve(request, self._stream, self._gone_future)
            if isinstance(answering, Response):
                self._write_whole(answering)
                return
            if answering is not None:
                self._serving = self.loop.create_task(self._answer_whole(answering))
                self.tasks.add(self._serving)
                return
        # Set back by whatever the parser lets go of, so that it counts what the parser keeps.
        self._pent += len(data)
        messages = self._messages
        if not self._begun:
            self._begun = True
            self._stop_head_timer()
        super().data_received(data)
        if self._pent > _HEAD_MAX:
            self._end(_TOO_LARGE)
        elif self._in_head or (between and self._messages == messages):
            # Empty lines before a head begin no message, and end the wait for the next one all the same.
            if self._head_timer is None and not self.transport.is_closing():
                self._head_timer = self.loop.call_later(HEAD_S, self._end)
        elif between and self._messages == messages + 1 and self._stays_open():
            # It began with this data, and nothing else did.
            self._known.learn(data, self.headers)

    def _stays_open(self) -> bool:
        """Whether the request that was parsed last leaves the connection open, by the rules of HTTP/1.1."""
        kept = self.cycle is not None and self.cycle.keep_alive and not self.transport.is_closing()
        return kept and self.scope["http_version"] == "1.1"

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
        if self._later:
            data, self._later = self._later, b""
            self.flow.resume_reading()
            self.data_received(data)

    def _write_whole(self, response: Response) -> None:
        if self.transport.is_closing():
            return
        end = b"connection: close\r\n\r\n" if self._last else b"\r\n"
        common = _common.encoded(self.server_state.default_headers)
        self._send(b"".join((response.head(), common, end, response.body)))
        self.server_state.total_requests += 1
        if self._last:
            self.transport.close()
            return
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._watch_idleness(self.timeout_keep_alive)

    def _send(self, data: bytes) -> None:
        """Write to a connection that is not closing, by a system call that lets other threads run.

        The transport keeps the interpreter while the kernel hands the bytes over and wakes the receiver,
        which is a third of what a job costs the event loop, and the store's writer waits for it. Measured:
        an eighth less time of the processor per job.
        """
        if self._descriptor is not None and not self.transport.get_write_buffer_size():
            # What does not fit, or cannot be sent at all, is the transport's to deal with.
            with contextlib.suppress(OSError):
                data = data[os.write(self._descriptor, data) :]
        if data:
            self.transport.write(data)

    def _watch_idleness(self, delay_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(delay_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that was idle for so long; it may have been used since (Uvicorn)."""
        left_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        if self._serving is not None:
            left_s = self.timeout_keep_alive
        if left_s > 0:
            self._watch_idleness(left_s)
        else:
            super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        """Close once what is being answered is answered (Uvicorn)."""
        if self._serving is None:
            super().shutdown()
        self._last = True

    def on_message_begin(self) -> None:
        """Begin to count (httptools)."""
        super().on_message_begin()
        self._messages += 1
        self._pent, self._in_head, self._in_message = 0, True, True

    def on_message_complete(self) -> None:
        """Be ready for the next (httptools)."""
        super().on_message_complete()
        self._in_message = False

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
        self._unset_keepalive_if_required()
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
            if self.transport.is_closing():
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
