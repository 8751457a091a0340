"""What the fleet writes down of workers and starts; a store that cannot write holds up nobody's life."""

from __future__ import annotations

from typing import Protocol

import structlog

from pilotlight.domain.usage import StartRecord
from pilotlight.domain.worker import Worker
from pilotlight.errors import StoreError
from pilotlight.loops.living import Living
from pilotlight.ports.store import StartLog, WorkerStore

_log = structlog.get_logger()


class _Store(WorkerStore, StartLog, Protocol):
    """Where it is written."""


class Records:
    """Writes; a failure is a warning.

    Args:
        store: Where to.
    """

    def __init__(self, store: _Store) -> None:
        self._store = store

    async def put(self, worker: Worker) -> None:
        """Record a worker. What must happen to it happens also while the store cannot write."""
        try:
            await self._store.put_worker(worker)
        except StoreError as error:
            _log.warning("worker_not_recorded", worker=worker.id, state=worker.state, error=str(error))

    async def put_current(self, live: Living) -> None:
        """Record a worker as it is when its turn comes, so that the last word is the latest."""
        async with live.recording:
            await self.put(live.worker)

    async def put_start(self, start: StartRecord) -> None:
        """Record how a start ended, which is only for people to look at."""
        try:
            await self._store.put_start(start)
        except StoreError as error:
            _log.warning(
                "start_not_recorded", worker=start.worker_id, outcome=start.outcome, error=str(error)
            )
