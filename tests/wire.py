"""What clients that are made of a bare socket have in common; see `tests/http/wire.py` and `tests/soak/wire.py`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import ClassVar, Self

import h11


class BareConnection:
    """One connection to a server on this machine: sends any bytes, and leaves as it likes.

    Attributes:
        wait_s: Bound of every wait.
        sock: The socket.
    """

    wait_s: ClassVar[float]

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, port: int, *, receive_bytes: int = 0) -> Self:
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
            async with asyncio.timeout(cls.wait_s):
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def send(self, data: bytes) -> None:
        """Send all of it; a server that has answered and gone may not want the rest."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(self.wait_s):
                await self._loop.sock_sendall(self.sock, data)

    def close(self) -> None:
        """Leave."""
        self.sock.close()

    def reset(self) -> None:
        """Leave without a farewell."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


def parser_of_answer(method: str) -> h11.Connection:
    """What reads the answer to a request with this method, strictly."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
    parser.send(h11.EndOfMessage())
    return parser
