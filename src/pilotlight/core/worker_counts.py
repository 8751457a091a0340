"""Workers in the words of RunPod's API, for `/health` and `workers.summary`, which have to agree.

One worker has one status; the counters of an endpoint are counted from those (serverless-api.md §2.15, §5.4,
§13 item 13).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum

from pilotlight.domain.worker import Worker, WorkerState


class ServiceStatus(StrEnum):
    """The statuses of REST v2; `/health` has a counter for each, in lower case."""

    RUNNING = "RUNNING"
    IDLE = "IDLE"
    INITIALIZING = "INITIALIZING"
    THROTTLED = "THROTTLED"
    UNHEALTHY = "UNHEALTHY"


_BY_STATE: Mapping[WorkerState, ServiceStatus] = {
    WorkerState.STARTING: ServiceStatus.INITIALIZING,
    WorkerState.READY: ServiceStatus.IDLE,
    WorkerState.DRAINING: ServiceStatus.RUNNING,
    WorkerState.FAILED: ServiceStatus.UNHEALTHY,
}


def service_status(worker: Worker, *, occupied: int) -> ServiceStatus | None:
    """The status of a worker; None for one that is not shown: frozen, stopping or stopped.

    Args:
        worker: The worker.
        occupied: Slots of it in use.
    """
    if worker.out_of_rotation:
        return ServiceStatus(worker.stage.upper())
    status = _BY_STATE.get(worker.state)
    return ServiceStatus.RUNNING if occupied and status is ServiceStatus.IDLE else status


def count_workers(
    statuses: Iterable[ServiceStatus | None], *, failed_starts: int, throttled: bool
) -> dict[str, int]:
    """How many workers of an endpoint have which status.

    Args:
        statuses: Of its living workers.
        failed_starts: Consecutive starts that failed. Their workers are gone, but the endpoint is not well.
        throttled: Whether a wanted worker could not be placed.

    Returns:
        A count for each status, by its name in lower case.
    """
    counts = Counter(status for status in statuses if status is not None)
    counts[ServiceStatus.UNHEALTHY] = max(counts[ServiceStatus.UNHEALTHY], failed_starts)
    counts[ServiceStatus.THROTTLED] += throttled
    return {status.lower(): counts[status] for status in ServiceStatus}
