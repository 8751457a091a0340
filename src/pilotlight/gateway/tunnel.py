"""WebSockets through the gateway: a handshake that is looked at, then bytes that are not.

Uvicorn hands a connection that asks for a WebSocket to the class given as its `ws` protocol; that is
`WebSocketTunnel`. It makes an ASGI scope of the request and calls the application, which finds the tunnel in
the scope's `extensions` and either refuses or connects it to a worker. Frames, extensions and subprotocols
are between client and worker, so the gateway needs no WebSocket library and adds no limits of one: frames of
any size pass in pieces, and no more of them is kept than the connections' buffers.

The load balancer and `gateway.realtime` use it alike: inside `attended`, a worker is found and `carry` joins
the two.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote

import httptools
import structlog

from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address
from pilotlight.gateway.exchange import Exchange
from pilotlight.gateway.handover import Origin
from pilotlight.gateway.upstream import UpstreamError, dial

_log = structlog.get_logger()

TUNNEL = "pilotlight.tunnel"
"""Key in the scope's `extensions` under which the tunnel of a WebSocket request is found."""

_HEAD_MAX = 64 * 1024
_EARLY_MAX = 64 * 1024
"""Sent by a client before the answer to its handshake; an honest one sends nothing."""

_LINGER_S = 5.0
"""How long a closed connection may take to send what was written to it, before it is cut."""

_STALL_S = 60.0
"""How long a side may take nothing of what is written to it; the end of the other is not seen meanwhile."""

_BAD_HANDSHAKE = b'{"error":"a WebSocket handshake is a GET without a body and with Sec-WebSocket-Key"}'
_BAD_TARGET = b'{"error":"the target of the request is not a URL"}'
_JSON = [(b"content-type", b"application/json")]


class _Side(asyncio.Protocol):
    """One of the two connections; the other one is not read while this one cannot be written.

    Attributes:
        transport: Once connected.
        other: The other side, from before anything is written to either.
        blocked: Whether this one takes no more for now.
        waits: Whether it must not be read for a reason of its own.
        lost: Set once it is closed.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None
        self.blocked = False
        self.waits = False
        self.lost = asyncio.Event()
        self._timers: list[asyncio.TimerHandle] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.lost.set()
        self._cancel_timers()

    def pause_writing(self) -> None:
        self.blocked = True
        self._abort_in(_STALL_S)
        if self.other is not None:
            self.other.adjust_reading()

    def resume_writing(self) -> None:
        self.blocked = False
        self._cancel_timers()
        if self.transport is not None and self.transport.is_closing():
            self._abort_in(_LINGER_S)
        if self.other is not None:
            self.other.adjust_reading()

    def adjust_reading(self) -> None:
        """Read this side, or do not, as both sides need it now."""
        if self.transport is None:
            return
        stop = self.waits or (self.other is not None and self.other.blocked)
        # uvloop minds being told what it does already.
        with contextlib.suppress(RuntimeError):
            if stop:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Close once everything written has been sent, or has not been taken for a while."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
            if not self.lost.is_set():
                self._abort_in(_LINGER_S)

    def _abort_in(self, seconds: float) -> None:
        assert self.transport is not None
        self._timers.append(asyncio.get_running_loop().call_later(seconds, self.transport.abort))

    def _cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()


class _Worker(_Side):
    """The connection to the worker: the head of its answer is collected, the rest passed on."""

    def __init__(self) -> None:
        super().__init__()
        self._head: bytes | None = b""
        self.head: asyncio.Future[tuple[bytes, bytes]] = asyncio.get_running_loop().create_future()
        self.on_data: Callable[[bytes], None] | None = None

    def data_received(self, data: bytes) -> None:
        if self._head is None:
            if self.on_data is not None:
                self.on_data(data)
            return
        self._head += data
        head, end, rest = self._head.partition(b"\r\n\r\n")
        if end:
            self._head = None
            # Until the head has been passed on there is nobody who would take the rest.
            self.waits = True
            self.adjust_reading()
            if not self.head.done():
                self.head.set_result((head, rest))
        elif len(self._head) > _HEAD_MAX:
            self._fail("the worker's answer to the handshake is too long")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._fail("the worker closed the connection during the handshake")

    def _fail(self, message: str) -> None:
        if not self.head.done():
            self.head.set_exception(UpstreamError(message))
        if self.transport is not None:
            self.transport.abort()


@dataclass(frozen=True, slots=True)
class Handshake:
    """What a worker answered to a handshake; nothing of it has been passed on.

    Attributes:
        status: HTTP status; 101 for a WebSocket.
        head: Status line and headers, without the empty line.
        rest: What has come after the head.
        worker: The connection.
    """

    status: int
    head: bytes
    rest: bytes
    worker: _Worker

    @property
    def accepted(self) -> bool:
        """Whether the worker speaks WebSocket from here on."""
        return self.status == HTTPStatus.SWITCHING_PROTOCOLS

    def named(self, name: bytes) -> bool:
        """Whether there is a header of this name (in lower case)."""
        return any(line.partition(b":")[0].lower() == name for line in self.head.split(b"\r\n")[1:])


class WebSocketTunnel(_Side):
    """The client's connection; Uvicorn makes one for each WebSocket request.

    Args:
        config: Uvicorn's, which knows the application.
        server_state: Uvicorn's, which knows all connections and tasks.
        app_state: Unused; part of Uvicorn's call.
        origin: Where the client is, if this is a copy of its connection.

    Attributes:
        answered: Whether the client has got an answer to its handshake.
        gone: Whether the client has closed its connection.
        on_gone: Called when it does.
    """

    def __init__(
        self,
        config: Any,
        server_state: Any,
        app_state: Any = None,  # noqa: ARG002
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        self._origin = origin
        self._app = config.loaded_app
        self._connections: set[Any] = server_state.connections
        self._tasks: set[asyncio.Task[None]] = server_state.tasks
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._early = b""
        self._called = False
        self.answered = False
        self._joined = False
        self.gone = False
        self.on_gone: Callable[[], object] | None = None

    # Uvicorn and asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be known to the server (asyncio)."""
        super().connection_made(transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application (asyncio)."""
        self._connections.discard(self)
        super().connection_lost(exc)
        self.gone = True
        if self.other is not None:
            self.other.close()
        elif self.on_gone is not None:
            self.on_gone()

    def shutdown(self) -> None:
        """End: the server is told to stop (Uvicorn)."""
        self.close()

    def data_received(self, data: bytes) -> None:
        """Take the head of the request, which comes whole, and afterwards frames (asyncio)."""
        if self._called:
            if self._joined and self.other is not None:
                self.other.write(data)
            elif self.answered:
                return  # No WebSocket: what a client still says is for nobody.
            elif len(self._early) + len(data) > _EARLY_MAX:
                self.close()
            else:
                self._early += data
            return
        self._called = True
        with contextlib.suppress(httptools.HttpParserUpgrade):
            self._parser.feed_data(data)
        task = asyncio.get_running_loop().create_task(self._call(), name="websocket")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def on_url(self, url: bytes) -> None:
        """Collect the target (httptools)."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header (httptools)."""
        self._headers.append((name.lower(), value))

    def _is_handshake(self) -> bool:
        """Whether this is one (RFC 6455 §4.1), which a worker cannot take for any other request."""
        given = dict(self._headers)
        bodiless = b"transfer-encoding" not in given and given.get(b"content-length", b"0").strip() == b"0"
        return self._parser.get_method() == b"GET" and bodiless and bool(given.get(b"sec-websocket-key"))

    def _is_secured(self) -> bool:
        assert self.transport is not None
        if self._origin is not None:
            return self._origin.scheme == "https"
        return self.transport.get_extra_info("sslcontext") is not None

    async def _call(self) -> None:
        assert self.transport is not None
        try:
            target = httptools.parse_url(self._url)
        except httptools.HttpParserError:
            self.refuse(400, _BAD_TARGET, _JSON)
            return
        if not self._is_handshake():
            self.refuse(400, _BAD_HANDSHAKE, _JSON)
            return
        path, origin = target.path or b"/", self._origin
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "wss" if self._is_secured() else "ws",
            "path": unquote(path.decode("latin-1")),
            "raw_path": path,
            "query_string": target.query or b"",
            "headers": self._headers,
            "client": self.transport.get_extra_info("peername") if origin is None else origin.client,
            "server": self.transport.get_extra_info("sockname") if origin is None else origin.server,
            "extensions": {TUNNEL: self},
        }
        try:
            await self._app(scope, _never_receive, _never_send)
        except Exception:  # noqa: BLE001 - the end of a task: nobody above could know
            _log.exception("websocket_failed")
        if not self.answered:
            self.refuse(500, b'{"error":"internal server error"}', _JSON)

    # The application.

    def refuse(self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Answer the handshake with an error and close; only close when it has been answered already."""
        if not self.answered:
            self.answered = True
            lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
            lines += [name + b": " + value for name, value in headers if name != b"content-length"]
            lines += [b"content-length: %d" % len(body), b"connection: close"]
            self.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self.close()

    @contextlib.asynccontextmanager
    async def ask(self, address: Address, head: bytes, *, timeout_s: float) -> AsyncIterator[Handshake]:
        """The answer of a worker to a handshake; its connection is closed when the block ends.

        Args:
            address: Where the worker listens.
            head: The request as the worker gets it.
            timeout_s: Longest wait for the answer.

        Raises:
            UpstreamError: The worker cannot be reached, or gave no answer.
        """
        worker = await dial(address, _Worker)
        try:
            worker.write(head)
            try:
                async with asyncio.timeout(timeout_s):
                    answer, rest = await worker.head
            except TimeoutError as error:
                raise UpstreamError("no answer to the handshake in time", timed_out=True) from error
            yield Handshake(_status_of(answer), answer, rest, worker)
        finally:
            self.other = None
            worker.other = None
            worker.close()

    async def relay(
        self, handshake: Handshake, own: Iterable[tuple[bytes, bytes]], *, answer_s: float, answer_bytes: int
    ) -> None:
        """Pass a worker's answer on, and then everything both ways until either side closes.

        An answer other than 101 is passed on within the limits of any answer, and ends the connection;
        nothing more of the client's reaches the worker then.

        Args:
            handshake: The answer.
            own: Our headers in it, with names in lower case; they replace the worker's.
            answer_s: Longest duration of an answer that is not 101.
            answer_bytes: Largest body of one that is not 101.
        """
        worker = handshake.worker
        self.answered = True
        # Before the first write, which may find the client slow already.
        worker.other, self.other = self, worker
        if handshake.accepted:
            self.write(_passed(handshake.head, own) + handshake.rest)
            worker.on_data, self._joined = self.write, True
            if self._early:
                worker.write(self._early)
        else:
            # Nothing says when such an answer ends but the answer itself.
            end = _AnswerEnd(worker.close, self.write, limit=answer_bytes)
            self.write(_passed(handshake.head, own, closing=True))
            worker.on_data = end.feed
            end.begin(handshake.head + b"\r\n\r\n")
            end.feed(handshake.rest)
        self._early, worker.waits = b"", False
        worker.adjust_reading()
        async with asyncio.timeout(None if handshake.accepted else answer_s):
            await worker.lost.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelBounds:
    """Bounds of one WebSocket.

    Attributes:
        life_s: Longest life, in seconds.
        answer_s: Longest wait for the answer to the handshake, and longest duration of one that is not 101.
        answer_bytes: Largest body of one that is not 101.
    """

    life_s: float
    answer_s: float
    answer_bytes: int


@contextlib.contextmanager
def attended(tunnel: WebSocketTunnel, exchange: Exchange) -> Iterator[None]:
    """Serve a client in the block for as long as it is there; that it has gone ends the block, and is noted.

    A tunnel that has been answered is closed at the end of the block.
    """
    task = asyncio.current_task()
    assert task is not None
    tunnel.on_gone = task.cancel
    try:
        yield
    except asyncio.CancelledError:
        if not tunnel.gone:
            raise
        task.uncancel()
        exchange.outcome = Outcome.DISCONNECTED
    finally:
        tunnel.on_gone = None
        if tunnel.answered:
            tunnel.close()


async def carry(
    exchange: Exchange,
    tunnel: WebSocketTunnel,
    address: Address,
    head: bytes,
    own: Callable[[Handshake], Sequence[tuple[bytes, bytes]]],
    bounds: TunnelBounds,
) -> None:
    """Join a client and a worker until either leaves, or for as long as may be; notes what became of it.

    Args:
        exchange: Gets status and outcome.
        tunnel: The client.
        address: Where the worker listens.
        head: The handshake as the worker gets it.
        own: Our headers in the answer. What it raises is raised here, before anything has been passed on.
        bounds: How long and how much.

    Raises:
        UpstreamError: The worker cannot be reached, or gave no answer.
    """
    try:
        async with (
            asyncio.timeout(bounds.life_s),
            tunnel.ask(address, head, timeout_s=bounds.answer_s) as handshake,
        ):
            headers = own(handshake)
            exchange.status, exchange.head_sent = handshake.status, True
            await tunnel.relay(handshake, headers, answer_s=bounds.answer_s, answer_bytes=bounds.answer_bytes)
    except TimeoutError as error:
        if not tunnel.answered:
            raise UpstreamError("no answer to the handshake in time", timed_out=True) from error
        exchange.outcome = Outcome.TIMED_OUT
        return
    if exchange.status >= 500:
        exchange.outcome = Outcome.FAILED
    else:
        exchange.outcome = Outcome.OK if handshake.accepted else Outcome.REJECTED


class _AnswerEnd:
    """Passes the body of an answer on as it comes, and notices its end.

    Args:
        on_end: Called at the end, or when it is too large.
        write: Takes the bytes.
        limit: Largest body, with its framing, in bytes.
    """

    def __init__(self, on_end: Callable[[], None], write: Callable[[bytes], None], *, limit: int) -> None:
        self._on_end = on_end
        self._write = write
        self._left = limit
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    def begin(self, head: bytes) -> None:
        """Take the head, which has been passed on."""
        self._parse(head)

    def feed(self, data: bytes) -> None:
        """Pass a piece on, unless the answer has ended before it."""
        if self._parser is None or not data:
            return
        self._left -= len(data)
        if self._left < 0:
            self._parser = None
            self._on_end()
            return
        self._write(data)
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._parser = None
            self._on_end()

    def on_message_complete(self) -> None:
        """End (httptools)."""
        self._parser = None
        self._on_end()


def _status_of(head: bytes) -> int:
    words = head.split(b"\r\n", 1)[0].split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise UpstreamError("the worker's answer to the handshake is not HTTP")
    return int(words[1])


def _passed(head: bytes, own: Iterable[tuple[bytes, bytes]], *, closing: bool = False) -> bytes:
    """A worker's head as the client gets it, with the empty line.

    Args:
        head: Status line and headers.
        own: Our headers; they replace the worker's.
        closing: Whether the connection is closed after the answer, and this has to be said.
    """
    own = [*own, (b"connection", b"close")] if closing else list(own)
    left_out = {name for name, _ in own} | ({b"keep-alive"} if closing else set())
    status, *lines = head.split(b"\r\n")
    kept = [line for line in lines if line.partition(b":")[0].lower() not in left_out]
    return b"\r\n".join([status, *kept, *(b"%b: %b" % header for header in own), b"", b""])


async def _never_receive() -> dict[str, Any]:
    raise RuntimeError("a tunnelled WebSocket has no ASGI events")


async def _never_send(event: object) -> None:
    raise RuntimeError(f"a tunnelled WebSocket has no ASGI events: {event!r:.100}")
