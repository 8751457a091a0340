"""Starts a worker that was scaled down once more, under its own id; used by the fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from pilotlight.core.freezing import FrozenView
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.worker import Worker, WorkerState
from pilotlight.errors import ClusterError, NotFoundError
from pilotlight.loops.account import UsageAccount
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Health
from pilotlight.ports.store import UsageStore, WorkerStore

_log = structlog.get_logger()


class ResumingFleet(Protocol):
    """The fleet, as far as it is needed here."""

    def worker(self, worker_id: str) -> Worker | None:
        """One living worker."""
        ...

    def workers(self, endpoint_id: str) -> Sequence[Worker]:
        """The endpoint's living workers."""
        ...

    def frozen(self) -> Sequence[FrozenView]:
        """The workers that are frozen and nobody is waking."""
        ...

    def health(self, endpoint_id: str) -> Health:
        """The endpoint's recent starts."""
        ...

    async def start(self, endpoint: Endpoint, *, worker_id: str, usage_sequence: int) -> Worker:
        """Start one worker under an id that it had before."""
        ...

    async def thaw(self, worker_id: str) -> bool:
        """Let a frozen worker go on."""
        ...

    async def recorded(self, worker_id: str) -> None:
        """Return when the end of a worker whose process is gone is on record."""
        ...


class _Store(WorkerStore, UsageStore, Protocol):
    """What it reads."""


class Resuming:
    """Resumes workers, each once at a time.

    Args:
        fleet: Starts them.
        store: Remembers those that have ended.
        account: Usage that is not yet written down.
        clock: Time.
    """

    def __init__(self, fleet: ResumingFleet, store: _Store, account: UsageAccount, clock: Clock) -> None:
        self._fleet = fleet
        self._store = store
        self._account = account
        self._clock = clock
        self._under_way: dict[tuple[str, str], asyncio.Task[Worker]] = {}

    @property
    def tasks(self) -> Sequence[asyncio.Task[Worker]]:
        """What is under way."""
        return list(self._under_way.values())

    async def resume(self, endpoint: Endpoint, worker_id: str) -> Worker:
        """See `Fleet.resume`.

        All who ask for one worker at a time wait for one start, which goes on when they have left.
        """
        living = self._fleet.worker(worker_id)
        if living is not None and living.state is not WorkerState.FROZEN:
            return living
        place = (endpoint.id, worker_id)
        task = self._under_way.get(place)
        if task is None:
            task = asyncio.create_task(self._resume(endpoint, worker_id), name=f"resume-{worker_id}")
            self._under_way[place] = task
            task.add_done_callback(lambda done: self._resumed(place, done))
        return await asyncio.shield(task)

    def _resumed(self, place: tuple[str, str], task: asyncio.Task[Worker]) -> None:
        del self._under_way[place]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.info("worker_not_resumed", endpoint=place[0], worker=place[1], error=str(error))

    async def _resume(self, endpoint: Endpoint, worker_id: str) -> Worker:
        if await self._fleet.thaw(worker_id) and (thawed := self._fleet.worker(worker_id)) is not None:
            return thawed
        await self._fleet.recorded(worker_id)
        await self._account.flush()
        past = await self._store.worker(worker_id)
        if past is None or past.endpoint_id != endpoint.id or past.state is not WorkerState.STOPPED:
            raise NotFoundError(f"endpoint {endpoint.id} has no worker {worker_id} that could be resumed")
        usage = await self._store.usage(worker_id=worker_id)
        sequence = max((interval.sequence for interval in usage), default=0)
        living = self._fleet.worker(worker_id)
        if living is not None:
            return living
        # From here until the worker counts as living nothing awaits, so that no bound is passed by two.
        # Frozen ones are no part of that; those that are too many beside it end with the autoscaler's look.
        asleep = {view.id for view in self._fleet.frozen()}
        workers = [worker for worker in self._fleet.workers(endpoint.id) if worker.id not in asleep]
        if len(workers) >= endpoint.workers_max:
            raise ClusterError(
                f"endpoint {endpoint.id} may have {endpoint.workers_max} workers, not one more"
            )
        retry_ms = self._fleet.health(endpoint.id).retry_ms
        if retry_ms is not None and retry_ms > self._clock.now_ms():
            raise ClusterError(f"endpoint {endpoint.id} starts no worker until its pause is over")
        return await self._fleet.start(endpoint, worker_id=worker_id, usage_sequence=sequence)
