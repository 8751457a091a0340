"""A client's connection: sends any bytes, and reads answers piece by piece, strictly, by h11."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

import h11

from ..wire import BareConnection, parser_of_answer  # noqa: TID252

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


class Connection(BareConnection):
    """One connection, for one request after another."""

    wait_s = WAIT_S

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._parser = h11.Connection(h11.CLIENT)
        self._pending = b""
        self.usable = True

    async def head(self, method: str = "POST") -> Head:
        """The head of the next answer.

        Raises:
            BrokenAnswerError: There is none.
            h11.RemoteProtocolError: It is no HTTP.
        """
        self._parser = parser_of_answer(method)
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
                    data = await self._loop.sock_recv(self.sock, size)
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
        super().close()
