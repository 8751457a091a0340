"""Uvicorn's HTTP protocol with one door more: the chunks of a stream may go straight to the connection.

ASGI's `send` is a coroutine. For a streamed token that means waking a task, walking down to its innermost
await and back, and a dictionary, which together cost more than reading and writing the token. The data
path sends the head and the end of an answer by ASGI like everybody else, and writes the chunks in between
from the callback in which they arrive.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

EXTENSION = "pilotlight.client_stream"
"""Key in the scope's `extensions` under which the `ClientStream` of the connection is found."""


class ClientStream:
    """The client's connection while an answer without a length is being sent on it."""

    __slots__ = ("_flow", "_transport")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl) -> None:
        self._transport = transport
        self._flow = flow

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
    """One client connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember where chunks go (asyncio)."""
        super().connection_made(transport)
        assert self.flow is not None
        self._extensions: dict[str, Any] = {EXTENSION: ClientStream(transport, self.flow)}

    def on_message_begin(self) -> None:
        """Offer it to the request that begins (httptools)."""
        super().on_message_begin()
        self.scope["extensions"] = self._extensions
