"""The shortest way of an event through the gateway: from an engine's connection straight to its client's."""

from __future__ import annotations

import asyncio

from pilotlight.gateway.cycle import Flow
from pilotlight.gateway.events import is_plain_chunk
from pilotlight.gateway.writing import write_to_client


class Passage:
    """Passes on pieces of a stream that are one chunk with one plain event, as they come.

    Each of hundreds of streams has its events far apart, and others have had the processor's caches
    meanwhile: an event costs mostly the fetching of what is looked at. So what is needed is here, and it is
    little.

    Args:
        transport: Of the client's connection.
        descriptor: Of its socket; None where only the transport may write, as with TLS.
        flow: Whether the client reads slowly.

    Attributes:
        events: How many were passed on.
    """

    __slots__ = ("_descriptor", "_flow", "_transport", "events")

    def __init__(self, transport: asyncio.Transport, descriptor: int | None, flow: Flow) -> None:
        self._transport = transport
        self._descriptor = descriptor
        self._flow = flow
        self.events = 0

    def pass_on(self, piece: bytes) -> bool | None:
        """Pass a piece on if it is one plain event; None if it is not.

        Args:
            piece: Of a chunked body; begins where a chunk and an event do.

        Returns:
            Whether more may come; False when the client reads slowly.
        """
        if not is_plain_chunk(piece):
            return None
        self.events += 1
        return write_to_client(self._transport, self._descriptor, self._flow, piece)
