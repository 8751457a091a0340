"""What a queued job's wait depends on, gathered from queue, slots and fleet for `core.explain`."""

from __future__ import annotations

from collections.abc import Mapping

from pilotlight.core.explain import WaitSnapshot, WorkerSight
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.job import Job
from pilotlight.domain.worker import Worker
from pilotlight.errors import NotFoundError
from pilotlight.gateway.jobs.links import WorkerLink
from pilotlight.gateway.slots import SlotTable
from pilotlight.ports.fleet import Fleet
from pilotlight.ports.store import JobStore


class Sight:
    """Reads; changes nothing.

    Args:
        store: The queue.
        slots: What workers are busy with.
        fleet: Living workers, and whether more can be started.
        links: What is known of each worker.
    """

    def __init__(
        self, store: JobStore, slots: SlotTable, fleet: Fleet, links: Mapping[str, WorkerLink]
    ) -> None:
        self._store = store
        self._slots = slots
        self._fleet = fleet
        self._links = links

    async def of(self, endpoint: Endpoint, job: Job) -> WaitSnapshot:
        """The endpoint as it matters to a queued job of it."""
        demand = await self._store.demand(endpoint.id, overdue_before_ms=0)
        try:
            ahead = await self._store.ahead(job.id)
        except NotFoundError:
            ahead = 0
        health = self._fleet.health(endpoint.id)
        return WaitSnapshot(
            lane=job.lane,
            ahead=ahead,
            normal_ahead=demand.queued if job.low_priority else 0,
            workers_max=endpoint.workers_max,
            workers=[self._worker(worker, job.id) for worker in self._fleet.workers(endpoint.id)],
            failures=health.failures,
            failure=health.failure.cause if health.failure else "",
            retry_ms=health.retry_ms,
            throttled=health.throttled,
        )

    def _worker(self, worker: Worker, job_id: str) -> WorkerSight:
        slots = self._slots.worker(worker.id)
        link = self._links.get(worker.id)
        stages = self._fleet.stages(worker.id)
        return WorkerSight(
            id=worker.id,
            state=worker.state,
            stage=worker.stage,
            stage_ms=stages[-1][1] if stages else worker.created_ms,
            occupied=slots.occupied if slots else 0,
            free=slots.free if slots else 0,
            withholds=link is not None and job_id in link.withheld(),
        )
