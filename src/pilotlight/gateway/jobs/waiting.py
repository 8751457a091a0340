"""Waiting for something to happen to a job, without polling and without losing a wake-up.

A waiter registers first, then reads the store, then waits: whatever is committed after its read wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from pilotlight.gateway.asgi import GONE, Receive, Scope, wait_disconnect

Gone = asyncio.Future[None]
"""Done as soon as the client of a request has closed its connection."""


class Signals:
    """One-to-many notifications by key, and by group of keys; in process, on one event loop."""

    def __init__(self) -> None:
        self._watches: dict[str, set[asyncio.Event]] = {}
        self._groups: dict[str, set[asyncio.Event]] = {}

    @contextlib.contextmanager
    def watch(self, key: str, *, group: str = "") -> Iterator[asyncio.Event]:
        """An event that is set at each `notify` of that key; the watcher clears it before it reads."""
        event = asyncio.Event()
        places = ((self._watches, key), (self._groups, group))
        for table, name in places:
            table.setdefault(name, set()).add(event)
        try:
            yield event
        finally:
            for table, name in places:
                table[name].discard(event)
                if not table[name]:
                    del table[name]

    def notify(self, key: str) -> None:
        """Wake everybody who watches that key."""
        for event in self._watches.get(key, ()):
            event.set()

    def notify_group(self, group: str) -> None:
        """Wake everybody who watches a key of that group."""
        for event in self._groups.get(group, ()):
            event.set()

    def keys(self) -> list[str]:
        """The keys that somebody watches."""
        return [*self._watches]

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


class watched:  # noqa: N801 - used like a function, `async with watched(scope, receive) as gone`
    """A future that is done when the client has closed its connection; enter after reading the body.

    Where the server offers to tell (`gateway.protocol`), nothing runs meanwhile. Elsewhere a task waits: for
    a request without a body Uvicorn's first `receive` returns the empty body and only the second waits,
    so one result says nothing yet.

    Args:
        scope: The request (ASGI).
        receive: Its incoming events.
    """

    __slots__ = ("_receive", "_scope", "_task")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._scope = scope
        self._receive = receive
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Gone:
        """The future."""
        offered: Callable[[], Gone] | None = (self._scope.get("extensions") or {}).get(GONE)
        if offered is not None:
            return offered()
        self._task = asyncio.create_task(wait_disconnect(self._receive), name="client-gone")
        return self._task

    async def __aexit__(self, *_: object) -> None:
        """Wait no longer."""
        if self._task is not None:
            self._task.cancel()
