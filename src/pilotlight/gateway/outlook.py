"""What can be told to those who wait for a worker: how its start goes, and when to come again.

Both roads ask here, for the comments on held streams (`gateway.heartbeats`) and for Retry-After.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from pilotlight.core.admission import Admission, AdmissionReason
from pilotlight.core.estimates import remaining_ms
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.worker import Rung, Stage, Worker, WorkerState
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet

StartEstimate = Callable[[str], int | None]
"""Milliseconds that the next start of an endpoint's workers will probably take; None while nobody knows."""

NextRung = Callable[[str], Rung | None]
"""The rung from which an endpoint's next worker will come up; None while nobody knows."""


class Outlook:
    """Looks ahead, from the workers there are and from how long starts have taken before.

    Args:
        fleet: Workers, and why there is none.
        clock: Time.
        estimate: Gives how long a start takes.
        rung: Gives from where it comes up.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        clock: Clock,
        estimate: StartEstimate = lambda _: None,
        rung: NextRung = lambda _: None,
    ) -> None:
        self._fleet = fleet
        self._clock = clock
        self._estimate = estimate
        self._rung = rung

    def ready(self, endpoint_id: str) -> bool:
        """Whether the endpoint has a worker that is ready, busy or not."""
        return any(worker.state is WorkerState.READY for worker in self._fleet.workers(endpoint_id))

    def start_s(self, endpoint: Endpoint) -> int | None:
        """Seconds until another worker is probably ready, rounded up and at least 1.

        None when nobody knows: nothing starts, or is going to, or a start takes longer than they usually do.
        """
        workers = self._fleet.workers(endpoint.id)
        left_ms = self._left_ms(endpoint, workers)
        return None if left_ms is None else max(1, -(-left_ms // 1000))

    def retry_after_s(self, endpoint: Endpoint, shed: Admission) -> int:
        """When a request that found no place to wait should come again, in seconds.

        While an endpoint backs off, its own time counts where it is longer: nothing starts before.
        """
        start_s = self.start_s(endpoint) or 0
        said_s = shed.retry_after_s or 1
        return max(said_s, start_s) if shed.reason is AdmissionReason.UNHEALTHY else start_s or said_s

    def comment(self, endpoint: Endpoint, waited_ms: int) -> bytes:
        """A comment of a stream of events (SSE) for a request that waits: no client takes it for data.

        `elapsed_s` is how long the request has waited, `estimate_s` how long it will have waited in all.

        Args:
            endpoint: Whose worker it waits for.
            waited_ms: How long so far.
        """
        workers = self._fleet.workers(endpoint.id)
        starting = _starting(workers)
        waits = starting is None and any(worker.state is WorkerState.READY for worker in workers)
        words = [
            ": pilotlight waiting" if waits else ": pilotlight starting",
            f"stage={self._stage(endpoint, starting, waits)}",
            f"elapsed_s={waited_ms / 1000:.1f}",
        ]
        left_ms = self._left_ms(endpoint, workers)
        if left_ms is not None:
            words.append(f"estimate_s={(waited_ms + left_ms) / 1000:.1f}")
        rung = None if waits else self._rung(endpoint.id)
        if rung is not None:
            words.append(f"rung={rung}")
        return " ".join(words).encode() + b"\n\n"

    def _stage(self, endpoint: Endpoint, starting: Worker | None, waits: bool) -> str:
        if starting is not None:
            return starting.stage
        if waits:
            return "ready"
        if endpoint.workers_max == 0:
            return "paused"
        return "placement" if self._fleet.health(endpoint.id).throttled else "decision"

    def _left_ms(self, endpoint: Endpoint, workers: Sequence[Worker]) -> int | None:
        starting = _starting(workers)
        if starting is None:
            nothing_comes = endpoint.workers_max == 0 or self._fleet.health(endpoint.id).throttled
            if nothing_comes or any(worker.state is WorkerState.READY for worker in workers):
                return None
        estimate_ms = self._estimate(endpoint.id)
        if starting is None:
            return estimate_ms
        if starting.stage is Stage.DOWNLOADING:
            return None
        # What a start fetches is not in the estimate.
        fetched_ms = sum(
            end_ms - begin_ms
            for (stage, begin_ms), (_, end_ms) in pairwise(self._fleet.stages(starting.id))
            if stage == Stage.DOWNLOADING
        )
        return remaining_ms(estimate_ms, self._clock.now_ms() - starting.state_ms - fetched_ms)


def _starting(workers: Sequence[Worker]) -> Worker | None:
    """The worker whose start has gone on for longest."""
    return next((worker for worker in workers if worker.state is WorkerState.STARTING), None)
