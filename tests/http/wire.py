"""A client made of a bare socket: sends any bytes at all, and reads answers strictly, by h11."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11

from ..wire import BareConnection, parser_of_answer  # noqa: TID252

WAIT_S = 10
"""Bound of every wait; nothing is asserted about how much of it is used."""


class ClosedError(Exception):
    """The server ended the connection where an answer was due."""


@dataclass(frozen=True)
class Answer:
    """One final response."""

    status: int
    version: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    interim: list[int]
    closes: bool

    def all(self, name: str) -> list[str]:
        return [value.decode("latin-1") for known, value in self.headers if known == name.encode()]

    def json(self) -> Any:
        return json.loads(self.body)


async def until(look: Callable[[], Any], what: str) -> Any:
    """What `look` returns as soon as it is true."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not (found := look()):
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_S} s: {what}") from None
    return found


class Wire(BareConnection):
    """One connection to the server."""

    wait_s = WAIT_S

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.pending = b""
        self.ended = False

    async def pieces(self, *data: bytes) -> None:
        """Send each piece after the server had its turn with the one before."""
        for piece in data:
            await self.send(piece)
            for _ in range(3):
                await asyncio.sleep(0)

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    async def receive(self) -> bytes:
        """What comes next, b"" at the end."""
        try:
            async with asyncio.timeout(WAIT_S):
                data = await self._loop.sock_recv(self.sock, 65536)
        except ConnectionError:
            data = b""
        except TimeoutError:
            raise AssertionError(f"silence for {WAIT_S} s; so far: {self.pending[:500]!r}") from None
        self.ended = not data
        self.pending += data
        return data

    async def rest(self) -> bytes:
        """Everything until the server ends the connection."""
        while await self.receive():
            pass
        return self.pending

    async def has(self, text: bytes) -> None:
        """Return when this has come."""
        while text not in self.pending:
            assert await self.receive(), f"ended without {text!r}: {self.pending!r}"

    async def answer(self, method: str = "POST") -> Answer:
        """The next answer.

        Raises:
            ClosedError: The server closed instead.
            h11.RemoteProtocolError: It is no correct answer.
        """
        parser = parser_of_answer(method)
        data, self.pending = self.pending, b""
        if data:
            parser.receive_data(data)
        head, body, interim, raw = None, bytearray(), [], data[:1000]
        while True:
            part = parser.next_event()
            if part is h11.NEED_DATA:
                data = b"" if self.ended else await self.receive()
                self.pending = b""
                raw = (raw + data)[:1000]
                if not raw and not data:
                    raise ClosedError
                parser.receive_data(data)
            elif isinstance(part, h11.InformationalResponse):
                interim.append(part.status_code)
            elif isinstance(part, h11.Response):
                head = part
            elif isinstance(part, h11.Data):
                body += part.data
            elif isinstance(part, h11.EndOfMessage):
                break
            else:
                raise AssertionError(f"the answer is cut: {raw[:500]!r}")
        assert head is not None
        self.pending = bytes(parser.trailing_data[0])
        return Answer(
            status=head.status_code,
            version=head.http_version.decode(),
            headers=list(head.headers),
            body=bytes(body),
            interim=interim,
            closes=parser.their_state is not h11.DONE,
        )

    async def last(self, method: str = "POST") -> Answer | None:
        """The only answer before the server ends the connection; None if it ends without one."""
        try:
            found = await self.answer(method)
        except ClosedError:
            return None
        assert not await self.rest(), f"more than one answer: {self.pending[:500]!r}"
        return found
