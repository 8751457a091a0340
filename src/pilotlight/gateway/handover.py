"""Connections that change the process which serves them, with several processes on one port.

A front (`gateway.fronts`) serves the data path. When a client asks for anything else, its whole connection
goes to the process that has everything, the owner, from the head of that request on and until it ends.
`gateway.protocol` stops reading there and calls the application's `hand_over`, which is that of a `Door`: it
sends the descriptor of the connection, and what had been read of it. A `Reception` takes both in on the other
side, and from then on the front has nothing to do with the client any more.

Two connections cannot change hands: one with TLS, whose keys are the front's, and one on which an earlier
answer waits to be sent. There the front goes on between the client and one end of a pair of sockets, and
hands over the other end (`_Client`, `_Owner`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import msgspec
import structlog

from pilotlight.gateway.connection import LINGER_S, Connection
from pilotlight.gateway.protocol import GatewayProtocol

_log = structlog.get_logger()

_FRAME_MAX = 32 * 1024
"""Bytes in one message of a door; the system's default for what waits on a socket is several times that."""

_FIRST, _LAST = 1, 2
"""Bits of the first byte of a message: whether a connection begins with it, and ends. The last one brings the
descriptor."""

_FAREWELL_S = 60.0
"""How long a client may take to read what is left when its connection has ended on the other side."""


class Origin(msgspec.Struct, frozen=True, array_like=True):
    """Where a client is, of whose connection only a copy is handed over.

    Attributes:
        client: Its address and port.
        server: Ours, as it called them.
        scheme: "http" or "https".
    """

    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    scheme: str


class Handed(msgspec.Struct, frozen=True, array_like=True):
    """What goes with a connection.

    Attributes:
        data: What was received and has not been served: the head of a request, and what came after it.
        origin: Of a copy; None for the client's own connection, which tells itself.
    """

    data: bytes
    origin: Origin | None = None


class HandedProtocol(GatewayProtocol):
    """A connection that another process began to read.

    Args:
        handed: What came with it.
        **server: What every connection of the server is given.
    """

    def __init__(self, handed: Handed, **server: Any) -> None:
        super().__init__(**server)
        self._handed: Handed | None = handed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Go on where the other one stopped reading (asyncio)."""
        super().connection_made(transport)
        origin = None if self._handed is None else self._handed.origin
        if origin is not None:
            self.client, self.server = origin.client, origin.server
            self.scheme = "https" if origin.scheme == "https" else "http"
            tunnel = cast("Any", self.ws_protocol_class)
            self.ws_protocol_class = cast("Any", partial(tunnel, origin=origin))
        # Only once the transport reads, which it begins after this, it can be told to pause.
        self.loop.call_soon(self._take_up)

    def data_received(self, data: bytes) -> None:
        """Take what comes now after what had come (asyncio)."""
        self._take_up()
        super().data_received(data)

    def _take_up(self) -> None:
        handed, self._handed = self._handed, None
        if handed is not None and not self.transport.is_closing():
            super().data_received(handed.data)


class Door:
    """Hands connections over to the process at the other end of a socket.

    Args:
        sock: One end of a pair of sockets that keep messages apart (SOCK_SEQPACKET).
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[bytes, int | None]] = deque()
        self._copies: set[asyncio.Task[None]] = set()

    def hand_over(self, connection: Connection, data: bytes) -> None:
        """Give a connection away, with what was received of it; its protocol is told of nothing any more.

        It ends where that is not possible, because too many files are open or the other process is gone.
        """
        transport = connection.transport
        plain = transport.get_extra_info("sslcontext") is None
        try:
            if plain and not transport.get_write_buffer_size():
                self._give_away(transport, data)
            else:
                self._give_copy(connection, data)
        except OSError as error:
            _log.warning("connection_not_handed_over", problem=error.strerror)
            transport.abort()

    def _give_away(self, transport: asyncio.Transport, data: bytes) -> None:
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
        # To close one of two descriptors says nothing to the client.
        transport.set_protocol(asyncio.Protocol())
        transport.abort()
        self._post(Handed(data), descriptor)

    def _give_copy(self, connection: Connection, data: bytes) -> None:
        ours, theirs = socket.socketpair()
        client = _Client(connection)
        task = self._loop.create_task(client.join(ours), name="join a connection with its copy")
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)
        origin = Origin(connection.client, connection.server, connection.scheme or "http")
        self._post(Handed(data, origin), theirs.detach())

    def _post(self, handed: Handed, descriptor: int) -> None:
        data, idle = msgspec.msgpack.encode(handed), not self._waiting
        for at in range(0, len(data), _FRAME_MAX):
            last = at + _FRAME_MAX >= len(data)
            place = (0 if at else _FIRST) | (_LAST if last else 0)
            frame = bytes((place,)) + data[at : at + _FRAME_MAX]
            self._waiting.append((frame, descriptor if last else None))
        if idle:
            self._send()

    def _send(self) -> None:
        """Send what waits, as far as the other side takes it."""
        while self._waiting:
            frame, descriptor = self._waiting[0]
            try:
                socket.send_fds(self._sock, [frame], [] if descriptor is None else [descriptor])
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._send)
                return
            except OSError as error:
                _log.warning("connection_not_handed_over", problem=error.strerror)
            del self._waiting[0]
            if descriptor is not None:
                os.close(descriptor)
        self._loop.remove_writer(self._sock)


class Reception:
    """Takes connections in that come through a `Door`.

    Args:
        sock: The other end of the door's pair.
        adopt: Serves a connection.
    """

    def __init__(self, sock: socket.socket, adopt: Callable[[socket.socket, Handed], None]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._adopt = adopt
        self._pending = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._read)

    def close(self) -> None:
        """Take no more in; idempotent."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _read(self) -> None:
        try:
            frame, descriptors, _, _ = socket.recv_fds(self._sock, 1 + _FRAME_MAX, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            frame, descriptors = b"", []
        if not frame:
            self.close()
            return
        self._pending = frame[1:] if frame[0] & _FIRST else self._pending + frame[1:]
        if not frame[0] & _LAST:
            return
        data, self._pending = self._pending, b""
        if not descriptors:
            # The system gives none where too many files are open, and has closed the connection then.
            _log.warning("connection_not_taken_over", problem="too many open files")
            return
        sock = socket.socket(fileno=descriptors[0])
        sock.setblocking(False)
        self._adopt(sock, msgspec.msgpack.decode(data, type=Handed))


class _Client(asyncio.Protocol):
    """The client's side of a connection of which the other process has a copy.

    Each side is read while the other one takes what is written to it. Time is up to the other process, until
    it has ended the copy.
    """

    def __init__(self, connection: Connection) -> None:
        self.transport = connection.transport
        self._connections = connection.server_state.connections
        self._connections.add(cast("Any", self))
        self._owner: _Owner | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._gone = False
        self.transport.pause_reading()
        self.transport.set_protocol(self)

    async def join(self, ours: socket.socket) -> None:
        """Begin to pass things on, between the client and this end of the pair."""
        loop = asyncio.get_running_loop()
        try:
            _, self._owner = await loop.create_unix_connection(lambda: _Owner(self), sock=ours)
        except OSError as error:
            _log.warning("connection_not_handed_over", problem=error.strerror)
            ours.close()
            self.transport.abort()
            return
        if self._gone:
            self._owner.leave()
        else:
            self.adjust_reading(read=True)

    def adjust_reading(self, *, read: bool) -> None:
        """Read the client from now on, or not."""
        _adjust_reading(self.transport, read=read)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._owner is not None:
            self._owner.write(data)

    def eof_received(self) -> bool:
        """See asyncio; the answer may still come."""
        if self._owner is None or not self.transport.can_write_eof():
            return False
        self._owner.write_eof()
        return True

    def pause_writing(self) -> None:
        """See asyncio."""
        if self._owner is not None:
            self._owner.adjust_reading(read=False)

    def resume_writing(self) -> None:
        """See asyncio."""
        if self._owner is not None:
            self._owner.adjust_reading(read=True)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """See asyncio."""
        self._gone = True
        self._connections.discard(cast("Any", self))
        for timer in self._timers:
            timer.cancel()
        if self._owner is not None:
            self._owner.leave()

    def finish(self, *, half: bool) -> None:
        """Close once everything has been read by the client, as the other process has closed its end.

        Args:
            half: Whether that would have gone on reading, so that a client which still sends is not reset.
        """
        if self._timers or self.transport.is_closing():
            return
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_later(_FAREWELL_S, self.transport.abort))
        self.adjust_reading(read=True)
        if not half:
            self.transport.close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timers.append(loop.call_later(LINGER_S, self.transport.close))

    def shutdown(self) -> None:
        """Nothing: the other process ends its connections itself (Uvicorn)."""


class _Owner(asyncio.Protocol):
    """The other side, whose far end the other process has."""

    def __init__(self, client: _Client) -> None:
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.Transport", transport)

    def write(self, data: bytes) -> None:
        """Pass on what the client sends; nothing once nobody would read it."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def write_eof(self) -> None:
        """Pass on that no more will come."""
        if not self._transport.is_closing():
            self._transport.write_eof()

    def leave(self) -> None:
        """The client has gone."""
        self._transport.abort()

    def adjust_reading(self, *, read: bool) -> None:
        """Read the other process from now on, or not."""
        _adjust_reading(self._transport, read=read)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if not self._client.transport.is_closing():
            self._client.transport.write(data)

    def eof_received(self) -> None:
        """See asyncio; whatever the client goes on to say is for nobody."""
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), 0)
        # Only one that is closed altogether has hung up.
        half = not any(event & select.POLLHUP for _, event in poll.poll(0))
        self._client.finish(half=half)

    def pause_writing(self) -> None:
        """See asyncio."""
        self._client.adjust_reading(read=False)

    def resume_writing(self) -> None:
        """See asyncio."""
        self._client.adjust_reading(read=True)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """See asyncio."""
        self._client.finish(half=False)


def _adjust_reading(transport: asyncio.Transport, *, read: bool) -> None:
    if transport.is_closing():
        return
    # uvloop minds being told what it does already.
    with contextlib.suppress(RuntimeError):
        if read:
            transport.resume_reading()
        else:
            transport.pause_reading()
