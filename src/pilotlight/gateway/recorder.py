"""What becomes of the row of each request, off the hot path: rows are collected and passed on in batches.

`record` appends and returns. From there two tasks carry on. One tells the observers (metrics, access log,
traces; `gateway.observability`), in slices that hold up nobody. The other writes the request log into the
store, which may be slow or away while observers go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from pilotlight.domain.usage import Outcome, RequestRecord
from pilotlight.errors import StoreError
from pilotlight.loops.tasks import Endless
from pilotlight.ports.store import RequestLog

_log = structlog.get_logger()

_INTERVAL_S = 1.0
_BATCH_MAX = 1000
"""Rows written at a time: results and takes wait meanwhile, where one thread does all the writing."""

_SLICE = 100
"""Rows that observers are told of at a time: about half a millisecond, in which requests wait."""

_PENDING_MAX = 100_000
"""Rows kept while the store cannot write; beyond it the oldest are dropped, counted and reported."""


class Observer(Protocol):
    """Told of every request that has ended. Lives on the event loop."""

    def note(self, rows: Sequence[RequestRecord]) -> None:
        """Take rows; never blocks, never raises."""
        ...

    async def close(self) -> None:
        """Finish with what was taken; within seconds, whatever the world outside does."""
        ...


class RequestRecorder:
    """Takes one row per request, writes it about once a second, and tells observers of it.

    Args:
        store: Where rows go, but for those of strangers, who could push out everybody else's.
        on_answer: Called once a worker has answered a request: with its id, and the moments in ms at which
            the request arrived and the answer began.
    """

    def __init__(
        self, store: RequestLog, *, on_answer: Callable[[str, int, int], None] = lambda *_: None
    ) -> None:
        self._store = store
        self.on_answer = on_answer
        self._observers: list[Observer] = []
        self._fresh: list[RequestRecord] = []
        self._pending: list[RequestRecord] = []
        self._unreported = 0
        self.rows_dropped = 0
        self._writing = Endless(self._write_on, "request-recorder")
        self._telling = Endless(self._tell_on, "request-observers")

    def observe(self, observer: Observer) -> None:
        """Tell one more of every row from now on, and close it in the end."""
        self._observers.append(observer)

    @property
    def rows_pending(self) -> int:
        """Rows that wait to be written."""
        return len(self._pending)

    def record(self, record: RequestRecord) -> None:
        """Take a row; never blocks."""
        if record.worker_id and record.outcome is Outcome.OK:
            # What comes in one piece begins when it is there.
            first_ms = record.duration_ms if record.first_token_ms is None else record.first_token_ms
            self.on_answer(record.worker_id, record.arrival_ms, record.arrival_ms + first_ms)
        self._fresh.append(record)
        if record.key_id:
            self._pending.append(record)
            if len(self._pending) > _PENDING_MAX:
                del self._pending[: _PENDING_MAX // 10]
                self._unreported += _PENDING_MAX // 10
                self.rows_dropped += _PENDING_MAX // 10

    def start(self) -> None:
        """Begin to write."""
        self._writing.start()
        self._telling.start()

    async def stop(self) -> None:
        """Write what is left and end."""
        await self._telling.stop()
        await self._writing.stop()
        await self.tell()
        for observer in self._observers:
            await observer.close()
        await self.flush()

    async def tell(self) -> None:
        """Tell observers of everything taken so far."""
        fresh, self._fresh = self._fresh, []
        for start in range(0, len(fresh), _SLICE):
            if start:
                await asyncio.sleep(0)
            rows = fresh[start : start + _SLICE]
            for observer in self._observers:
                try:
                    observer.note(rows)
                except Exception:  # noqa: BLE001 - nobody would be told of anything any more
                    _log.exception("request_observer_failed", rows=len(rows))

    async def flush(self) -> None:
        """Write everything taken so far; what comes meanwhile waits for the next time, to be many again."""
        count = len(self._pending)
        while count and self._pending:
            left = self._pending[: min(count, _BATCH_MAX)]
            del self._pending[: len(left)]
            count -= len(left)
            try:
                await self._store.add_requests(left)
                left = []
            except StoreError as error:
                pending = len(self._pending) + len(left)
                _log.warning("request_log_write_failed", error=str(error), pending=pending)
                return
            except Exception:  # noqa: BLE001 - a row that cannot be written must not stop the others
                await self._write_singly(left)
            finally:
                self._pending[:0] = left
        if self._unreported:
            _log.warning("request_log_rows_dropped", rows=self._unreported)
            self._unreported = 0

    async def _write_singly(self, rows: list[RequestRecord]) -> None:
        """Write rows of which one is refused; it alone is lost. Those that are written are taken out."""
        while rows:
            try:
                await self._store.add_requests(rows[:1])
            except StoreError:
                return
            except Exception:  # noqa: BLE001 - see above
                _log.exception("request_log_row_refused", request_id=rows[0].id)
            del rows[0]

    async def _write_on(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self.flush()

    async def _tell_on(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self.tell()
