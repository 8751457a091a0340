"""The body of a request on its way to a worker: read ahead a little, counted, framed, never kept whole."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from pilotlight.gateway.asgi import Receive
from pilotlight.gateway.load_balancer.head import Framing
from pilotlight.gateway.upstream import UpstreamError, UpstreamResponse

_AHEAD_BYTES = 256 * 1024
"""Read ahead of a worker that is slow, or still starting."""


class BodyTooLargeError(Exception):
    """The body turned out to be larger than it may be."""


class ClientBody:
    """Reads the client's events from the first to the last, and so notices when it goes away.

    Args:
        receive: The events (ASGI).
        framing: What the head says of the body.
        limit: Largest body, in bytes.
        on_gone: Called once when the client has gone.

    Attributes:
        exists: Whether there is one to be sent.
        gone: Whether the client has gone.
        sent: Whether a worker has been sent the whole of it.
    """

    def __init__(
        self, receive: Receive, framing: Framing, *, limit: int, on_gone: Callable[[], object]
    ) -> None:
        self._receive = receive
        self._limit = limit
        self._chunked = framing.chunked
        self._on_gone = on_gone
        self._pieces: deque[bytes] = deque()
        self._ahead = 0
        self._size = 0
        self._complete = False
        self._too_large = False
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.exists = framing.has_body
        self.gone = False
        self.sent = False

    def start(self) -> None:
        """Begin to read."""
        self._task = asyncio.create_task(self._read(), name="read-body")

    def leave(self) -> None:
        """Care no more whether the client goes away: its answer is complete."""
        self._on_gone = _nothing

    async def stop(self) -> None:
        """Read no more."""
        self.leave()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            # What it ended with has a traceback that leads back here: a circle.
            self._task = None

    async def send_to(self, response: UpstreamResponse) -> None:
        """Write the whole body to a worker; returns also when that has closed its side.

        Raises:
            BodyTooLargeError: More than the limit; the worker has got what came before.
        """
        try:
            while True:
                while not self._pieces and not self._complete and not self._too_large:
                    self._changed.clear()
                    await self._changed.wait()
                if self._too_large:
                    raise BodyTooLargeError
                if not self._pieces:
                    break
                piece = self._pieces.popleft()
                self._ahead -= len(piece)
                self._changed.set()
                await response.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
            if self._chunked:
                await response.write(b"0\r\n\r\n")
            self.sent = True
        except UpstreamError:
            # It may have answered before it closed; whoever reads the answer sees what became of it.
            return

    async def _read(self) -> None:
        while True:
            while self._ahead > _AHEAD_BYTES:
                self._changed.clear()
                await self._changed.wait()
            event = await self._receive()
            if event["type"] == "http.disconnect":
                self.gone = self._on_gone is not _nothing
                self._on_gone()
                return
            piece: bytes = event.get("body", b"")
            if piece and not self._complete:
                self._size += len(piece)
                if self._size > self._limit:
                    self._too_large = True
                    self._changed.set()
                    return
                self._pieces.append(piece)
                self._ahead += len(piece)
            if not event.get("more_body", False):
                self._complete = True
            self._changed.set()


def _nothing() -> None:
    """Do nothing."""
