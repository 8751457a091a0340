"""Passes the fleet's news on to everything in the gateway that deals with workers; `bootstrap` makes one."""

from __future__ import annotations

from pilotlight.clusters.ports import PortBook
from pilotlight.clusters.run_folder import RunFolder
from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.worker import Registration, Worker, WorkerState
from pilotlight.gateway.jobs import JobService
from pilotlight.gateway.slots import SlotTable
from pilotlight.gateway.upstream import UpstreamPool
from pilotlight.loops.health_checks import HealthChecker


class FleetListener:
    """Implements the port `WorkerListener`.

    Args:
        slots: Gives out no slots of workers that are gone.
        pool: Connections to workers, dropped with them.
        run_folder: Sockets of workers, removed with them.
        ports: Ports of workers, given back with them.

    Attributes:
        jobs: Answers polls, and learns what is lost; set once it exists.
        balanced: Connections of the load balancer, dropped like the others; set once it exists.
        checker: Follows the health of load-balancing workers; set once it exists.
    """

    def __init__(self, slots: SlotTable, pool: UpstreamPool, run_folder: RunFolder, ports: PortBook) -> None:
        self._slots = slots
        self._pool = pool
        self._run_folder = run_folder
        self._ports = ports
        self.jobs: JobService | None = None
        self.balanced: UpstreamPool | None = None
        self.checker: HealthChecker | None = None

    def spawned(self, worker: Worker, endpoint: Endpoint) -> None:
        """Begin to ask for its health, where it answers."""
        if self.checker is not None and endpoint.kind is EndpointKind.LOAD_BALANCER:
            self.checker.watch(worker, endpoint)

    def opened(self, worker: Worker, registration: Registration | None, capacity: int) -> None:
        """Open its slots; jobs may go there, too."""
        self._slots.open_worker(worker.endpoint_id, worker.id, capacity=capacity, registration=registration)
        if self.jobs is not None:
            self.jobs.slots_freed(worker.endpoint_id)

    def withdrawn(self, worker: Worker) -> None:
        """Close its slots, for good only if it is going to end."""
        ending = worker.state not in {WorkerState.STARTING, WorkerState.READY, WorkerState.FROZEN}
        self._slots.close_worker(worker.id, for_good=ending)

    def at_rest(self, worker_id: str) -> bool:
        """Whether it has nothing in hand."""
        return not self.occupied(worker_id) and (self.jobs is None or self.jobs.at_rest(worker_id))

    def frozen(self, worker: Worker) -> None:
        """Close its slots, drop its connections, ask for its health no more."""
        self._slots.close_worker(worker.id, for_good=False)
        self._drop_connections(worker.id)
        if self.checker is not None:
            self.checker.forget(worker.id)

    def thawed(self, worker: Worker, endpoint: Endpoint, *, whole: bool) -> None:
        """Ask for its health again, and answer the polls that stood still with it."""
        if whole and self.jobs is not None:
            self.jobs.thawed(worker.id)
        self.spawned(worker, endpoint)

    def closed(self, worker: Worker) -> None:
        """Close its slots and answer its polls."""
        self._slots.close_worker(worker.id)
        if self.jobs is not None:
            self.jobs.release_polls(worker.id)

    def occupied(self, worker_id: str) -> int:
        """Slots of it in use."""
        slots = self._slots.worker(worker_id)
        return 0 if slots is None else slots.occupied

    async def ended(self, worker: Worker, reason: str) -> None:
        """Forget it, and lose what it still had."""
        self._drop_connections(worker.id)
        # First the slots: a slot that a lost job gives back must not go to a held request.
        self._slots.drop_worker(worker.id)
        if self.jobs is not None:
            await self.jobs.worker_ended(worker.id, reason)
        self._run_folder.remove(worker.id)
        self._ports.release(worker.id)
        if self.checker is not None:
            self.checker.forget(worker.id)

    def _drop_connections(self, worker_id: str) -> None:
        slots = self._slots.worker(worker_id)
        if slots is not None and slots.registration is not None:
            addresses = [slots.registration.engine, slots.registration.listener]
            urls = [address.url for address in addresses if address is not None]
            self._pool.drop(urls)
            if self.balanced is not None:
                self.balanced.drop(urls)
