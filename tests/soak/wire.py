"""A client's connection: sends any bytes, and reads answers piece by piece, strictly, by h11."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass

import h11

WAIT_S = 60.0
"""Longest silence of a server that owes something; everything in a soak is answered much sooner."""


class BrokenAnswerError(Exception):
    """The connection ended where more was due."""


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer."""

    status: int
    headers: dict[str, str]

    @property
    def streams(self) -> bool:
        """Whether events follow."""
        return self.headers.get("content-type", "").startswith("text/event-stream")


class Connection:
    """One connection, for one request after another."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._parser = h11.Connection(h11.CLIENT)
        self._pending = b""
        self.usable = True

    @classmethod
    async def open(cls, port: int, *, receive_bytes: int = 0) -> Connection:
        """Connect.

        Args:
            port: Of the server.
            receive_bytes: Room for what was not read yet; 0 leaves it to the system.
        """
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            async with asyncio.timeout(WAIT_S):
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def send(self, data: bytes) -> None:
        """Send all of it; a server that has answered and gone may not want the rest."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(WAIT_S):
                await self._loop.sock_sendall(self._sock, data)

    async def head(self, method: str = "POST") -> Head:
        """The head of the next answer.

        Raises:
            BrokenAnswerError: There is none.
            h11.RemoteProtocolError: It is no HTTP.
        """
        self._parser = h11.Connection(h11.CLIENT)
        self._parser.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
        self._parser.send(h11.EndOfMessage())
        if self._pending:
            self._parser.receive_data(self._pending)
            self._pending = b""
        while True:
            part = await self._part(65536)
            if isinstance(part, h11.Response):
                headers = {name.decode(): value.decode("latin-1") for name, value in part.headers}
                return Head(part.status_code, headers)
            if not isinstance(part, h11.InformationalResponse):
                raise BrokenAnswerError(f"{part} instead of an answer")

    async def piece(self, size: int = 65536) -> tuple[bytes, bool] | None:
        """The next piece of the body, and whether a chunk ends with it; None at the end.

        Raises:
            BrokenAnswerError: It ends too soon.
        """
        try:
            part = await self._part(size)
        except h11.RemoteProtocolError as error:
            raise BrokenAnswerError(str(error)) from error
        if isinstance(part, h11.Data):
            return bytes(part.data), part.chunk_end
        if not isinstance(part, h11.EndOfMessage):
            raise BrokenAnswerError(f"{part} instead of a body")
        self._pending = bytes(self._parser.trailing_data[0])
        self.usable = self._parser.their_state is h11.DONE
        return None

    async def body(self) -> bytes:
        """All of the body. BrokenAnswerError, if it ends too soon."""
        parts = []
        while (piece := await self.piece()) is not None:
            parts.append(piece[0])
        return b"".join(parts)

    async def _part(self, size: int) -> object:
        while (part := self._parser.next_event()) is h11.NEED_DATA:
            try:
                async with asyncio.timeout(WAIT_S):
                    data = await self._loop.sock_recv(self._sock, size)
            except ConnectionError as error:
                raise BrokenAnswerError(str(error)) from error
            except TimeoutError:
                raise BrokenAnswerError(f"silence for {WAIT_S:g} s") from None
            if not data and self._parser.their_state is h11.SEND_RESPONSE:
                raise BrokenAnswerError("closed instead of an answer")
            self._parser.receive_data(data)
        return part

    @property
    def excess(self) -> bytes:
        """What came behind the last answer; something only if more was asked for."""
        return self._pending

    def close(self) -> None:
        """Leave."""
        self.usable = False
        self._sock.close()

    def reset(self) -> None:
        """Leave without a farewell."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()
