"""What must happen to jobs because time has passed or a worker has ended; driven by the reaper and the fleet.

Deadlines, hand-outs that nobody confirmed, workers that will not let go of a job, and jobs of workers that
are gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import structlog

from pilotlight.core.lifecycle import ExecutionTimedOut, JobEvent, PlatformInterrupted, TtlReached, WorkerLost
from pilotlight.domain.job import Job, JobStatus
from pilotlight.domain.worker import Failure, Stage, Worker, WorkerState
from pilotlight.errors import NotFoundError, StoreError
from pilotlight.gateway.jobs.ledger import Ledger
from pilotlight.gateway.jobs.links import WorkerLink
from pilotlight.gateway.jobs.unbacked import Unbacked
from pilotlight.ports.fleet import StageReport

_log = structlog.get_logger()

_LOOK_PAUSE_NS = 5_000_000_000
"""A longer pause between two rounds of the reaper means that this process was suspended."""

_PATIENCE_NS = 30_000_000_000
"""How long a worker may go on with an ended job before it gets no more work, so that it can be ended.

Arbitrary: long enough for a handler that is about to return, short enough that one which never will is not
kept alive by the other work of its worker."""

_ALIVE = frozenset({WorkerState.READY, WorkerState.DRAINING})
"""States in which a worker program polls and sends heartbeats."""


_OVERDUE_SLICE = 200
_OVERDUE_SLICES_MAX = 20
"""Jobs ended in one go, and how often that is done in one round: a million that expire together must hold up
neither the store nor what else the reaper has to do."""


class Upkeep:
    """Ends what is over.

    Args:
        ledger: Jobs and bookkeeping.
        gone: Whether an ended job is to be unknown at once, so that its record may go.
    """

    def __init__(self, ledger: Ledger, gone: Callable[[Job], bool]) -> None:
        self._ledger = ledger
        self._gone = gone
        self._unsettled: dict[str, str] = {}
        self._ending: set[str] = set()
        self._unbacked = Unbacked(ledger)
        self._looked_ns = ledger.clock.monotonic_ns()
        self._resumed_ns = 0

    async def end_overdue(self) -> None:
        """End jobs whose time to live or execution timeout has passed."""
        ledger = self._ledger
        now_ms = ledger.clock.now_ms()
        for _ in range(_OVERDUE_SLICES_MAX):
            due = await ledger.store.due(now_ms=now_ms, limit=_OVERDUE_SLICE)
            changes = await ledger.apply_many([(job.id, self._end_of(job, now_ms)) for job in due])
            for applied in changes:
                if applied is not None and applied.finished and self._gone(applied.after):
                    with contextlib.suppress(NotFoundError):
                        await ledger.store.shorten(applied.after.id, now_ms=now_ms, ttl_ms=0)
            if len(due) < _OVERDUE_SLICE:
                return

    async def lose_unconfirmed(self) -> None:
        """Requeue hand-outs that their worker has not shown to hold in time (worker-protocol.md §8)."""
        ledger = self._ledger
        confirm_s = ledger.settings.confirm_s
        now_ns = self._look()
        oldest_ns = now_ns - confirm_s * 1_000_000_000
        for link in [*ledger.links.values()]:
            for hand_out in [*link.hand_outs.values()]:
                held = hand_out.confirmed or hand_out.received or hand_out.posts or link.bodies
                since_ns = max(hand_out.at_ns, self._resumed_ns)
                if held or hand_out.returning or since_ns > oldest_ns:
                    continue
                pinged_ns = link.pinged_ns
                if pinged_ns is not None and pinged_ns < since_ns and now_ns - since_ns <= self._missing_ns:
                    # Heartbeats that were sent before it say nothing of it (L3), and there may be more.
                    continue
                event = WorkerLost(
                    worker_id=link.worker_id,
                    now_ms=ledger.clock.now_ms(),
                    reason=f"hand-out not confirmed within {confirm_s} s",
                    attempt=hand_out.attempt,
                )
                try:
                    await ledger.apply(hand_out.job_id, event)
                except NotFoundError:
                    continue
                # Should it have arrived after all, the work would be done twice.
                link.stop(hand_out.job_id, deadline_ns=ledger.stop_deadline_ns())
        for worker_id in [*self._unsettled]:
            await self._settle_ended(worker_id)
        await self._unbacked.interrupt()

    async def kill_stuck(self) -> None:
        """End workers that hang, or go on with a stopped job and nothing else (worker-protocol.md §8)."""
        ledger = self._ledger
        now_ns = self._look()
        # What was sent while we stood still is yet to be read.
        settled = now_ns - self._resumed_ns > _LOOK_PAUSE_NS
        self._ending &= ledger.links.keys()
        self._kill_silent(now_ns)
        for link in [*ledger.links.values()]:
            if link.worker_id in self._ending:
                continue
            if settled and link.orphaned(now_ns) and not link.released:
                self._kill_orphaned(link)
            else:
                self._kill_holding(link, now_ns)

    def _kill_holding(self, link: WorkerLink, now_ns: int) -> None:
        """End a worker that goes on with a job it should have let go of, once it has nothing else to do."""
        held = [
            (deadline_ns, job_id)
            for job_id, deadline_ns in link.stopping.items()
            if deadline_ns <= now_ns and (job_id in link.listed or link.mute(now_ns))
        ]
        if not held:
            return
        deadline_ns, job_id = min(held)
        if self._has_other_work(link):
            if not link.retiring and deadline_ns + _PATIENCE_NS <= now_ns:
                link.retiring = True
                # Its slots must not count as free, and the fleet has to start another one in its place.
                reason = f"it goes on with job {job_id}, which has ended"
                drain = self._ledger.fleet.drain(link.worker_id, reason=reason)
                self._ledger.spawn(drain, f"drain-{link.worker_id}")
            return
        link.retiring = True
        self._ending.add(link.worker_id)
        _log.warning("worker_stuck", worker_id=link.worker_id, job_id=job_id)
        reason = f"it goes on with job {job_id}, which has ended"
        self._ledger.spawn(self._ledger.fleet.kill(link.worker_id, reason=reason), f"kill-{link.worker_id}")

    def _kill_orphaned(self, link: WorkerLink) -> None:
        """End what is left of a worker whose main process has died (worker-protocol.md §6.5)."""
        worker = self._ledger.fleet.worker(link.worker_id)
        if worker is None or worker.state not in _ALIVE:
            return
        link.retiring = True
        self._ending.add(link.worker_id)
        cause = "its main process is gone: its stop poll broke and did not come back"
        self._ledger.spawn(self._end_broken(worker, "crashed", cause), f"kill-{worker.id}")

    async def worker_ended(self, worker_id: str, reason: str) -> None:
        """Requeue or fail what a worker had in hand; its last process is gone."""
        link = self._ledger.links.pop(worker_id, None)
        if link is not None:
            link.release()
            self._ledger.dispatcher.end_wait(link)
        self._unsettled[worker_id] = reason
        try:
            await self._settle_ended(worker_id)
        except StoreError as error:
            # The reaper tries again: nothing else would ever end these attempts.
            _log.warning("worker_end_not_settled", worker_id=worker_id, error=str(error))

    async def _settle_ended(self, worker_id: str) -> None:
        ledger = self._ledger
        reason = self._unsettled.get(worker_id)
        if reason is None:
            return
        for job in await ledger.store.running(worker_id=worker_id):
            now_ms = ledger.clock.now_ms()
            event: JobEvent = WorkerLost(worker_id=worker_id, now_ms=now_ms, reason=reason)
            if ledger.closing or ledger.suspended:
                # The gateway ends, or has lost the lead, and took its workers with it: not the job's fault.
                event = PlatformInterrupted(now_ms=now_ms)
            try:
                await ledger.apply(job.id, event)
            except NotFoundError:
                continue
        self._unsettled.pop(worker_id, None)

    def _look(self) -> int:
        """Now, monotonic; takes note when this process has stood still since the last look."""
        now_ns = self._ledger.clock.monotonic_ns()
        if now_ns - self._looked_ns > _LOOK_PAUSE_NS:
            self._resumed_ns = now_ns
        self._looked_ns = now_ns
        return now_ns

    @property
    def _missing_ns(self) -> int:
        """After how long heartbeats are missing (worker-protocol.md §8)."""
        return 3 * self._ledger.settings.ping_interval_ms * 1_000_000 + 6_000_000_000

    def _kill_silent(self, now_ns: int) -> None:
        """End workers that give no sign of life; their jobs are lost with them and run elsewhere."""
        ledger, missing_ns = self._ledger, self._missing_ns
        for link in [*ledger.links.values()]:
            worker = ledger.fleet.worker(link.worker_id)
            if link.worker_id in self._ending or worker is None or worker.state not in _ALIVE:
                continue
            if not link.silent(now_ns, pings_missing_ns=missing_ns, since_ns=self._resumed_ns):
                continue
            link.retiring = True
            self._ending.add(link.worker_id)
            cause = f"the worker program hangs: no sign of life for {missing_ns // 1_000_000_000} s"
            ledger.spawn(self._end_broken(worker, "hung", cause), f"kill-{worker.id}")

    async def _end_broken(self, worker: Worker, kind: str, cause: str) -> None:
        _log.warning("worker_broken", worker_id=worker.id, endpoint_id=worker.endpoint_id, cause=cause)
        failure = Failure(kind=kind, cause=cause, advice="See the worker's log.")
        await self._ledger.fleet.reported(worker.id, StageReport(stage=Stage.FAILED, failure=failure))
        await self._ledger.fleet.kill(worker.id, reason=cause)

    def _has_other_work(self, link: WorkerLink) -> bool:
        slots = self._ledger.slots.worker(link.worker_id)
        return bool(link.hand_outs) or (slots is not None and slots.requests > 0)

    def _end_of(self, job: Job, now_ms: int) -> JobEvent:
        """How a job ends that is overdue."""
        if job.expires_ms > now_ms:
            return ExecutionTimedOut(now_ms=now_ms, attempt=job.attempt)
        if job.status is not JobStatus.IN_QUEUE:
            return TtlReached(now_ms=now_ms)
        health = self._ledger.fleet.health(job.endpoint_id)
        reason = health.throttled or ""
        if health.failures and health.failure is not None:
            reason = f"no worker could be started: {health.failure.sentence}"
        return TtlReached(now_ms=now_ms, reason=reason)
