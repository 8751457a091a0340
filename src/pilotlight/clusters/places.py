"""Workers with an image run as containers, all others as processes; `bootstrap` makes one `Places`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from pilotlight.clusters.containers import ContainerCluster
from pilotlight.clusters.local import LocalCluster
from pilotlight.domain.worker import ProcessIdentity
from pilotlight.ports.cluster import WorkerExit, WorkerSpec


class Places:
    """Both clusters of this machine as one; implements `ports.Cluster`.

    Args:
        processes: Has the logs of all workers.
        containers: Writes into the same logs.
    """

    def __init__(self, processes: LocalCluster, containers: ContainerCluster) -> None:
        self._processes = processes
        self._containers = containers

    async def start(self, spec: WorkerSpec, on_exit: Callable[[WorkerExit], None]) -> ProcessIdentity | None:
        """Start a worker where it belongs; see the port."""
        if spec.container is not None:
            return await self._containers.start(spec, on_exit)
        return await self._processes.start(spec, on_exit)

    async def terminate(self, worker_id: str) -> None:
        """Ask a worker to end; see the port. Whoever does not know it does nothing."""
        await self._processes.terminate(worker_id)
        await self._containers.terminate(worker_id)

    async def kill(self, worker_id: str) -> None:
        """End a worker; see the port."""
        await self._processes.kill(worker_id)
        await self._containers.kill(worker_id)

    async def freeze(self, worker_id: str) -> int:
        """Stop a worker in place; see the port."""
        if self._containers.has(worker_id):
            return await self._containers.freeze(worker_id)
        return await self._processes.freeze(worker_id)

    async def gpu_memory(self, worker_id: str, devices: Sequence[int]) -> int:
        """Memory on GPUs; see the port."""
        if self._containers.has(worker_id):
            return await self._containers.gpu_memory(worker_id, devices)
        return await self._processes.gpu_memory(worker_id, devices)

    async def thaw(self, worker_id: str) -> None:
        """Let a frozen worker go on; see the port."""
        if self._containers.has(worker_id):
            await self._containers.thaw(worker_id)
        else:
            await self._processes.thaw(worker_id)

    async def sweep(self, workers: Mapping[str, ProcessIdentity | None]) -> Sequence[str]:
        """End leftovers, containers first: their processes are this machine's as well; see the port."""
        contained = await self._containers.sweep(workers)
        return sorted({*contained, *await self._processes.sweep(workers)})

    async def close(self) -> None:
        """End all workers, of both kinds at the same time, then the logs; see the port."""
        # Each to its end, whatever becomes of the other: until then they write into the logs.
        ends = await asyncio.gather(
            self._containers.close(), self._processes.end_all(), return_exceptions=True
        )
        await self._processes.close()
        for problem in ends:
            if problem is not None:
                raise problem
