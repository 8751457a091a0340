"""Comments on a stream that waits for its worker, so that its caller sees a life in it (per key, opt-in).

A held request gets its status and headers before anybody knows its answer. What goes wrong afterwards can
only be told by an event, so that clients do not try again by themselves: that is the price, and why keys ask
for it. Only routes that answer a request for a stream with one are given comments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from pilotlight.gateway.asgi import Send

STREAMED_ROUTES: Final = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
)
"""Routes whose answer is a stream of events when `stream` asks for it; others answer as they always do."""

AT_ONCE: Final = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
"""Headers by which proxies pass a stream on as it comes."""

STREAM_HEADERS: Final = ((b"content-type", b"text/event-stream"), *AT_ONCE)
"""Headers of a stream of events that we begin ourselves."""


class Heartbeats:
    """The beginning of one stream: its head, then a comment each period, until it is stopped.

    A client that does not read gets no more than its connection holds: a comment is made when the one before
    it has gone out.

    Args:
        send: Takes the outgoing events (ASGI); nobody else may use it from `start` until `stop` has returned.
        comment: Makes a comment, as whole lines with an empty one after them.
        period_s: From one comment to the next.
        headers: Beside those of every stream.

    Attributes:
        begun: Whether the head has been sent, with 200, so that what follows is a stream of events.
    """

    def __init__(
        self,
        send: Send,
        comment: Callable[[], bytes],
        *,
        period_s: float,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        self._send = send
        self._comment = comment
        self._period_s = period_s
        self._headers = headers
        self._task: asyncio.Task[None] | None = None
        self.begun = False

    def start(self, *, after_s: float = 0) -> None:
        """Send the head and the first comment once this wait has begun, and go on; idempotent.

        Args:
            after_s: Say nothing before.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._beat(after_s), name="heartbeats")

    async def stop(self) -> None:
        """Send nothing more; returns when nothing is on its way. Harmless when nothing was started."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    async def _beat(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        head = [*STREAM_HEADERS, *self._headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})
        self.begun = True
        while True:
            await self._send({"type": "http.response.body", "body": self._comment(), "more_body": True})
            await asyncio.sleep(self._period_s)
