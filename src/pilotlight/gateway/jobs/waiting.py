"""Waiting for something to happen to a job, without polling and without losing a wake-up.

A waiter registers first, then reads the store, then waits: whatever is committed after its read wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

from pilotlight.gateway.asgi import Receive, wait_disconnect

Gone = asyncio.Future[None]
"""Done as soon as the client of a request has closed its connection."""


class Signals:
    """One-to-many notifications by key; in process, on one event loop."""

    def __init__(self) -> None:
        self._watches: dict[str, set[asyncio.Event]] = {}

    @contextlib.contextmanager
    def watch(self, key: str) -> Iterator[asyncio.Event]:
        """An event that is set at each `notify` of that key; the watcher clears it before it reads."""
        event = asyncio.Event()
        self._watches.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            watches = self._watches[key]
            watches.discard(event)
            if not watches:
                del self._watches[key]

    def notify(self, key: str) -> None:
        """Wake everybody who watches that key."""
        for event in self._watches.get(key, ()):
            event.set()

    def notify_all(self) -> None:
        """Wake everybody."""
        for key in self._watches:
            self.notify(key)


async def happened(event: asyncio.Event, *, deadline: float, gone: Gone | None = None) -> bool:
    """Wait until an event is set, a moment has come or the client has gone.

    Args:
        event: What is waited for.
        deadline: Moment on the event loop's clock.
        gone: Ends the wait early.

    Returns:
        Whether the event is set.
    """
    if event.is_set():
        return True
    timeout = deadline - asyncio.get_running_loop().time()
    if timeout <= 0:
        return False
    waiter = asyncio.ensure_future(event.wait())
    try:
        futures: set[asyncio.Future[Any]] = {waiter} if gone is None else {waiter, gone}
        await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
    return event.is_set()


@contextlib.asynccontextmanager
async def watched(receive: Receive) -> AsyncIterator[Gone]:
    """A future that is done when the client has closed its connection; enter after reading the body.

    For a request without a body Uvicorn's first `receive` returns the empty body and only the second
    waits, so one result says nothing yet.
    """
    task = asyncio.create_task(wait_disconnect(receive), name="client-gone")
    try:
        yield task
    finally:
        task.cancel()
