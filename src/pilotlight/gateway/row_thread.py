"""Rows of ended requests on their way to something that may block: a disk, a pipe, a library.

Used by access log and traces. The event loop only appends; one thread works, and what it cannot keep up with
is given up and counted, never waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import structlog

from pilotlight.domain.usage import RequestRecord

_log = structlog.get_logger()

_ROWS_MAX = 20_000
"""Rows that wait, about 10 MB; seconds of the most that one gateway serves."""

_CLOSE_S = 2.0
"""How long the last rows are waited for when the gateway ends."""


@dataclass(frozen=True, slots=True)
class _End:
    """Ends the thread, which then tells who waits for that."""

    loop: asyncio.AbstractEventLoop
    ended: asyncio.Event


class RowThread:
    """Calls something with all rows, in a thread. Lives on the event loop.

    Args:
        work: What is called with rows, oldest first, as many as were noted at a time; what it raises is
            logged, and its rows are given up.
        name: Of the thread, and of the rows in the log.
    """

    def __init__(self, work: Callable[[Sequence[RequestRecord]], None], *, name: str) -> None:
        self._work = work
        self._name = name
        self._queue: SimpleQueue[Sequence[RequestRecord] | _End] = SimpleQueue()
        self._running = False
        # Each is changed by one thread only: the first two by the event loop.
        self._given = 0
        self._refused = 0
        self._taken = 0
        self._failed = 0

    @property
    def rows_dropped(self) -> int:
        """Rows given up so far."""
        return self._refused + self._failed

    def note(self, rows: Sequence[RequestRecord]) -> None:
        """Take rows; never blocks."""
        if not rows:
            return
        if self._given - self._taken + len(rows) > _ROWS_MAX:
            self._refused += len(rows)
            return
        self._given += len(rows)
        self._queue.put(rows)
        if not self._running:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
            self._running = True

    async def close(self) -> bool:
        """Wait until all is done, for two seconds at most; returns whether it is, and the thread has ended.

        A later row starts another.
        """
        if not self._running:
            return True
        ended = asyncio.Event()
        self._running = False
        self._queue.put(_End(asyncio.get_running_loop(), ended))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await ended.wait()
        return ended.is_set()

    def _run(self) -> None:
        """The thread."""
        failing = False
        while True:
            item = self._queue.get()
            if isinstance(item, _End):
                # Whoever did not wait may have closed the loop.
                with contextlib.suppress(RuntimeError):
                    item.loop.call_soon_threadsafe(item.ended.set)
                return
            try:
                self._work(item)
            except Exception as error:  # noqa: BLE001 - whatever it was, the next rows may fare better
                self._failed += len(item)
                if not failing:
                    _log.warning("rows_dropped", of=self._name, error=repr(error), rows=len(item))
                failing = True
            else:
                failing = False
            self._taken += len(item)
