"""How answers reach a client, and how its connection ends; `gateway.protocol` reads what the client sends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pilotlight.gateway.cycle import AsgiCycle, Flow
from pilotlight.gateway.passage import Passage
from pilotlight.gateway.writing import outbox_of, write_to_client

if TYPE_CHECKING:
    from pilotlight.gateway.call import ClientCall

LINGER_S = 2.0
"""How long a client may go on to send what nobody reads, as nginx's `lingering_timeout`, shortened."""

STALL_S = 60.0
"""How long a client may read nothing of what waits for it, as nginx's `send_timeout`."""

_REST_S = 30.0
"""Longest wait for the rest of a body whose request has been answered."""


class Connection(HttpToolsProtocol):
    """One half of a client connection; `gateway.protocol` is the other.

    Attributes:
        extensions: What every ASGI scope of this connection offers.
    """

    flow: Flow
    extensions: dict[str, object]
    _timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _gone: asyncio.Future[None] | None = None
    _call: ClientCall | None = None
    """The request that is served by callbacks."""
    _serving: asyncio.Task[None] | None = None
    """What answers a request without parser and ASGI, and has to wait for something."""
    _in_message = False
    """Whether a request has begun and not come completely."""
    _later = b""
    """What has come after it."""
    _last = False
    _idle_since_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember where answers go (asyncio)."""
        super().connection_made(transport)
        self.flow = Flow(transport)
        plain = transport.get_extra_info("sslcontext") is None
        self._descriptor = transport.get_extra_info("socket").fileno() if plain else None
        self._outbox = outbox_of(self.loop)

    def advance(self) -> None:
        """Let the next request have its turn, if there is one and it may."""
        raise NotImplementedError

    def send(self, data: bytes) -> bool:
        """Write to the client; False when it reads slowly."""
        return write_to_client(self.transport, self._descriptor, self.flow, data)

    def passage(self) -> Passage:
        """What writes plain events to the client."""
        return Passage(self.transport, self._descriptor, self.flow)

    def send_last(self, data: bytes) -> None:
        """Write the last of an answer: with all else that this turn of the event loop writes."""
        if not self.transport.is_closing():
            self._outbox.write(self.transport, self._descriptor, data)

    def end_of_head(self, *, keep_alive: bool) -> bytes:
        """The headers of every answer, and the empty line."""
        common = _common.encoded(self.server_state.default_headers)
        if not keep_alive:
            return common + b"connection: close\r\n\r\n"
        return common + b"\r\n"

    # The end of a request, and of the connection.

    def call_ended(self, call: ClientCall) -> None:
        """Go on after a request that was served by callbacks, or end."""
        self._call = None
        if not call.keep_alive:
            self.end_connection()
        elif self._later or self._in_message or self.flow.read_paused or self.timeout_keep_alive_task is None:
            self.cycle_ended()
        else:
            self.server_state.total_requests += 1
            self._idle_since_s = self.loop.time()

    def cycle_ended(self) -> None:
        """Go on after an answer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing() or self.flow.ended:
            return
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._watch_idleness(self.timeout_keep_alive)
        if self._in_message and self._timer is None:
            # The rest of a refused body.
            self._timer = self.loop.call_later(_REST_S, self._end)
        self.flow.resume_reading()
        self.advance()

    def end_connection(self) -> None:
        """Close once everything has been written; what more may come is read by nobody."""
        if self.transport.is_closing() or self.flow.ended:
            return
        self._outbox.flush(self.transport)
        if self._in_message or self._later:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """End a connection on which more is coming; closed at once it would be reset, and the answer lost."""
        self._later, self.flow.full, self.flow.ended = b"", False, True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._stop_timer()
        self._timer = self.loop.call_later(LINGER_S, self._end)

    def _end(self) -> None:
        self._outbox.flush(self.transport)
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_idleness(self, delay_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(delay_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that was idle for so long; it may have been used since (Uvicorn)."""
        left_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self._serving is not None or self._in_message or self._timer is not None:
            left_s = self.timeout_keep_alive
        if left_s > 0:
            self._watch_idleness(left_s)
        else:
            super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        """Close once what is being answered is answered (Uvicorn)."""
        self._outbox.flush(self.transport)
        if self._serving is None:
            super().shutdown()
        self._last = True

    def pause_writing(self) -> None:
        """Let who writes wait, and see whether the client reads at all (asyncio)."""
        super().pause_writing()
        self._watch_reading()

    def _watch_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALL_S, self._look_at_reading, unread)

    def _look_at_reading(self, unread: int) -> None:
        """End a connection whose client has read nothing; whoever serves it is told that it has gone."""
        if self.transport.get_write_buffer_size() < unread:
            self._watch_reading()
        else:
            self.transport.abort()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def resume_writing(self) -> None:
        """Tell who waits for it (asyncio)."""
        super().resume_writing()
        self._stop_stall_timer()
        if self._call is not None:
            self._call.ready()
        self.advance()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever watches (asyncio)."""
        super().connection_lost(exc)
        self._stop_timer()
        self._stop_stall_timer()
        self._unset_keepalive_if_required()
        self._tell_gone()

    def _tell_gone(self) -> None:
        """Nothing that is being answered on this connection is of use any more."""
        call, self._call = self._call, None
        if call is not None:
            call.lost()
        elif isinstance(self.cycle, AsgiCycle) and not self.cycle.response_complete:
            self.cycle.lost()
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def gone_future(self) -> asyncio.Future[None]:
        """Done once the connection is lost, which is only noticed while it is read."""
        self.flow.resume_reading()
        if self._gone is None:
            self._gone = self.loop.create_future()
            if self.transport.is_closing() or self.flow.ended:
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
