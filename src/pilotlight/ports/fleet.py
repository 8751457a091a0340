"""The owner of all living workers, as the gateway sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.worker import DownloadProgress, Failure, Registration, Stage, Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What a worker program posted to its state URL.

    Attributes:
        stage: The step it has reached.
        detail: Free facts about the step, for people.
        progress: With `Stage.DOWNLOADING`: a sign of life when it differs from the last one.
        failure: Set with `Stage.FAILED`.
        registration: Where its servers are; from the moment they are known.
    """

    stage: Stage
    detail: Mapping[str, object] = field(default_factory=dict)
    progress: DownloadProgress | None = None
    failure: Failure | None = None
    registration: Registration | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether an endpoint can start workers.

    Attributes:
        failures: Consecutive failed starts.
        failure: Why the last of them failed.
        retry_ms: Until when no worker is started; None when starts are allowed.
        throttled: Why a wanted worker could not be placed; None when nothing is missing.
    """

    failures: int = 0
    failure: Failure | None = None
    retry_ms: int | None = None
    throttled: str | None = None


class Fleet(Protocol):
    """Owns every living worker: the only writer of their state."""

    def worker(self, worker_id: str) -> Worker | None:
        """One living worker; None when unknown or ended."""
        ...

    def workers(self, endpoint_id: str) -> Sequence[Worker]:
        """The endpoint's living workers, oldest first."""
        ...

    def authenticate(self, endpoint_id: str, worker_id: str, secret_hash: str) -> Worker | None:
        """The living worker whose credential this is; None when anything does not match."""
        ...

    def stages(self, worker_id: str) -> Sequence[tuple[str, int]]:
        """Steps of a living worker's start so far, each with its moment in ms; empty when unknown."""
        ...

    def health(self, endpoint_id: str) -> Health:
        """The endpoint's recent starts."""
        ...

    async def reported(self, worker_id: str, report: StageReport) -> None:
        """Take a stage report of a living worker; reports after its end are ignored."""
        ...

    async def took(self, worker_id: str, *, slots: int) -> None:
        """Note a take; the first makes the worker ready for jobs (worker-protocol.md §6.1).

        Args:
            worker_id: Who asked.
            slots: Jobs it asked for; the capacity of a worker that never registered one.
        """
        ...

    async def resume(self, endpoint: Endpoint, worker_id: str) -> Worker:
        """Start a worker that was scaled down once more, under its own id.

        Raises:
            NotFoundError: The endpoint had no such worker, or it did not end by being scaled down.
            ClusterError: No room for it, or its process could not be spawned.
        """
        ...

    async def thaw(self, worker_id: str) -> bool:
        """Let a frozen worker go on; returns whether it takes work now.

        One that is ready already does. One that did not come back in time is being ended when this says no,
        and so is one whose GPUs are in use by others; of one that is unknown or ending there is no hope.
        """
        ...

    async def drain(self, worker_id: str, *, reason: str, grace_s: float = 0) -> None:
        """Hand out nothing more to the worker and let it finish and end, at once if it is frozen; idempotent.

        Args:
            worker_id: Which.
            reason: For its record.
            grace_s: From SIGTERM to SIGKILL at least; it may be more.
        """
        ...

    async def kill(self, worker_id: str, *, reason: str) -> None:
        """End the worker at once; returns when it is gone; idempotent."""
        ...


class WorkerListener(Protocol):
    """Told by the fleet what it may do with a worker: the slot table and the job queue."""

    def spawned(self, worker: Worker, endpoint: Endpoint) -> None:
        """Its process runs."""
        ...

    def opened(self, worker: Worker, registration: Registration | None, capacity: int) -> None:
        """The worker takes work from now on; called again when its capacity or addresses change."""
        ...

    def withdrawn(self, worker: Worker) -> None:
        """Give it nothing more, for the time being or because it is to end when it has nothing in hand."""
        ...

    def at_rest(self, worker_id: str) -> bool:
        """Whether it has nothing in hand, also nothing that it should have let go of."""
        ...

    def frozen(self, worker: Worker) -> None:
        """It is about to be stopped in place: give it nothing, keep no connections to it, and ask it nothing.

        It will be opened again, or it ends.
        """
        ...

    def thawed(self, worker: Worker, endpoint: Endpoint, *, whole: bool) -> None:
        """It goes on where it was stopped, and is about to be opened.

        Args:
            worker: Which.
            endpoint: Whose, with the revision it was started from.
            whole: Whether all of it had been stopped, so that the polls it had open are not to be used
                (worker-protocol.md §6.6).
        """
        ...

    def closed(self, worker: Worker) -> None:
        """Give it nothing more; it has been told to end, so its open polls are to be answered now (§6.3)."""
        ...

    def occupied(self, worker_id: str) -> int:
        """Slots of it in use."""
        ...

    async def ended(self, worker: Worker, reason: str) -> None:
        """No process of it is left; whatever it still held is lost."""
        ...
