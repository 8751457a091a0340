"""The request log's writer: rows are collected in memory and written in batches, off the hot path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from pilotlight.domain.usage import Outcome, RequestRecord
from pilotlight.errors import StoreError
from pilotlight.loops.tasks import Endless
from pilotlight.ports.store import RequestLog

_log = structlog.get_logger()

_INTERVAL_S = 1.0
_BATCH_MAX = 200
"""Rows written at a time: results and takes wait meanwhile, where one thread does all the writing."""

_PENDING_MAX = 100_000
"""Rows kept while the store cannot write; beyond it the oldest are dropped, counted and reported."""


class RequestRecorder:
    """Takes one row per request and writes them about once a second.

    Args:
        store: Where rows go.
        on_answer: Called once a worker has answered a request: with its id, and the moments in ms at which
            the request arrived and the answer began.
    """

    def __init__(
        self, store: RequestLog, *, on_answer: Callable[[str, int, int], None] = lambda *_: None
    ) -> None:
        self._store = store
        self.on_answer = on_answer
        self._pending: list[RequestRecord] = []
        self._dropped = 0
        self._loop = Endless(self._run, "request-recorder")

    def record(self, record: RequestRecord) -> None:
        """Take a row; never blocks."""
        self._pending.append(record)
        if record.worker_id and record.outcome is Outcome.OK:
            # What comes in one piece begins when it is there.
            first_ms = record.duration_ms if record.first_token_ms is None else record.first_token_ms
            self.on_answer(record.worker_id, record.arrival_ms, record.arrival_ms + first_ms)
        if len(self._pending) > _PENDING_MAX:
            del self._pending[: _PENDING_MAX // 10]
            self._dropped += _PENDING_MAX // 10

    def start(self) -> None:
        """Begin to write."""
        self._loop.start()

    async def stop(self) -> None:
        """Write what is left and end."""
        await self._loop.stop()
        await self.flush()

    async def flush(self) -> None:
        """Write everything taken so far."""
        while self._pending:
            batch = self._pending[:_BATCH_MAX]
            try:
                await self._store.add_requests(batch)
            except StoreError as error:
                _log.warning("request_log_write_failed", error=str(error), pending=len(self._pending))
                return
            except Exception:  # noqa: BLE001 - a row that cannot be written must not stop the others
                await self._write_singly(batch)
                continue
            del self._pending[: len(batch)]
        if self._dropped:
            _log.warning("request_log_rows_dropped", rows=self._dropped)
            self._dropped = 0

    async def _write_singly(self, batch: list[RequestRecord]) -> None:
        """Write rows of which one is refused; it alone is lost."""
        for row in batch:
            try:
                await self._store.add_requests([row])
            except StoreError:
                return
            except Exception:  # noqa: BLE001 - see above
                _log.exception("request_log_row_refused", request_id=row.id)
            self._pending.remove(row)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self.flush()
