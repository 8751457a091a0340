"""Where workers run. One implementation per kind of place: local processes, containers, Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pilotlight.domain.endpoint import Container
from pilotlight.domain.worker import Failure, ProcessIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What to start.

    Attributes:
        worker_id: Also the value of the cookie in every process of the worker.
        endpoint_id: For log files and listings.
        env: The complete environment added to the cluster's base; holds secrets, never logged.
        command: Program and arguments; in a container the arguments for its image, empty for the image's own.
        devices: Indices of the GPUs it may see; empty on a host without GPUs.
        private_folders: Whether it begins in an empty folder of its own and has another one as its home;
            both are removed with it, so that no worker finds what an earlier one left. Containers always do.
        container: How it runs as a container; None for a process.
        memory_bytes: What a container may use at most; 0 means no limit.
    """

    worker_id: str
    endpoint_id: str
    env: Mapping[str, str] = field(repr=False)
    command: Sequence[str]
    devices: tuple[int, ...] = ()
    private_folders: bool = False
    container: Container | None = None
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExit:
    """The end of a worker's main process.

    Attributes:
        worker_id: Whose.
        code: Exit status; negative is the signal that ended it; None when it was not our child, or never ran.
        failure: Why it ended, where the cluster knows better than its exit status tells.
    """

    worker_id: str
    code: int | None
    failure: Failure | None = None


class Cluster(Protocol):
    """Starts and ends workers completely. One object owns all workers of this installation."""

    async def start(self, spec: WorkerSpec, on_exit: Callable[[WorkerExit], None]) -> ProcessIdentity | None:
        """Start a worker and return at once, with its process; None where others keep it, as with containers.

        Args:
            spec: What to start.
            on_exit: Called once on the event loop after the worker's main process has ended and every
                other process of the worker has been ended too.

        Raises:
            ClusterError: It could not be started; nothing of it runs.
        """
        ...

    async def terminate(self, worker_id: str) -> None:
        """Ask the worker to drain and end (SIGTERM to its main process); returns at once, idempotent."""
        ...

    async def kill(self, worker_id: str) -> None:
        """End every process of the worker now; returns when none is left. Idempotent."""
        ...

    async def freeze(self, worker_id: str) -> int:
        """Stop every process of the worker in place; returns the bytes of memory that they keep.

        Nothing of it runs when this returns, also nothing that was being started at that moment. Memory that
        processes share is counted in parts.

        Raises:
            ClusterError: The worker is not there, or could not be stopped whole; then all of it goes on.
        """
        ...

    async def gpu_memory(self, worker_id: str, devices: Sequence[int]) -> int:
        """The most bytes that the worker's processes hold on one of some GPUs.

        0 where the driver does not tell, and for a worker that is not there.
        """
        ...

    async def thaw(self, worker_id: str) -> None:
        """Let the processes of a frozen worker go on where they were stopped.

        Raises:
            ClusterError: The worker is not there, or cannot go on.
        """
        ...

    async def sweep(self, workers: Mapping[str, ProcessIdentity | None]) -> Sequence[str]:
        """End leftovers of an earlier life of this installation.

        Args:
            workers: Worker ids with the process recorded for each, if any. A process that merely has
                the same number, but another start time or boot, is left alone.

        Returns:
            Ids of workers of which something was still running; nothing of them is left.
        """
        ...

    async def close(self) -> None:
        """End all workers and release everything; returns when no process is left."""
        ...
