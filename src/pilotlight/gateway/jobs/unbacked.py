"""Jobs that the store says a worker has, and that no worker was ever given; driven by the reaper.

A take whose commit happened but whose answer was lost leaves such a job, as does a hand-out that could not be
given back while the store was away. Nobody would confirm, lose or end it before its execution timeout.
"""

from __future__ import annotations

from pilotlight.core.lifecycle import PlatformInterrupted
from pilotlight.domain.job import Job
from pilotlight.errors import NotFoundError
from pilotlight.gateway.jobs.ledger import Ledger

_LOOK_NS = 5_000_000_000
"""Between two looks; each asks the store for all running jobs."""

_GRACE_NS = 10_000_000_000
"""How long a job must have been without a hand-out: longer than what is under way takes to be settled."""


class Unbacked:
    """Queues jobs again that run nowhere; their retry is untouched.

    Args:
        ledger: Jobs and hand-outs.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._looked_ns: int | None = None
        self._since_ns: dict[tuple[str, int], int] = {}

    async def interrupt(self) -> None:
        """Look, every few seconds, and queue again what has been without a hand-out for long.

        Raises:
            StoreError: The rest is left to the next look.
        """
        ledger = self._ledger
        now_ns = ledger.clock.monotonic_ns()
        if self._looked_ns is not None and now_ns - self._looked_ns < _LOOK_NS:
            return
        self._looked_ns = now_ns
        jobs = [job for job in await ledger.store.running() if not self._backed(job)]
        self._since_ns = {
            (job.id, job.attempt): self._since_ns.get((job.id, job.attempt), now_ns) for job in jobs
        }
        for job in jobs:
            if now_ns - self._since_ns[job.id, job.attempt] < _GRACE_NS or ledger.suspended or ledger.closing:
                continue
            event = PlatformInterrupted(
                now_ms=ledger.clock.now_ms(),
                reason="the job did not reach its worker",
                worker_id=job.worker_id,
                attempt=job.attempt,
            )
            try:
                await ledger.apply(job.id, event)
            except NotFoundError:
                continue

    def _backed(self, job: Job) -> bool:
        """Whether its worker has it, or a take for that worker is under way."""
        link = self._ledger.links.get(job.worker_id or "")
        if link is None:
            return False
        hand_out = link.hand_outs.get(job.id)
        return link.asking > 0 or (hand_out is not None and hand_out.attempt == job.attempt)
