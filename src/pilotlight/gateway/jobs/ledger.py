"""The one place through which the gateway changes a job, and what must follow each change.

That is: the slot given back, the worker told to stop, waiters woken, the request log's row written, the
autoscaler woken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence

import structlog

from pilotlight.core.lifecycle import (
    RETRIED_BY_CLIENT,
    Applied,
    Cancelled,
    Confirmed,
    ExecutionTimedOut,
    JobEvent,
    PlatformInterrupted,
    Progressed,
    ResultPosted,
    TtlReached,
    WorkerLost,
)
from pilotlight.domain.job import Job, JobStatus
from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.domain.worker import Worker
from pilotlight.errors import NotFoundError
from pilotlight.gateway.jobs.dispatcher import Dispatcher
from pilotlight.gateway.jobs.links import HandOut, WorkerLink
from pilotlight.gateway.jobs.results import usage_of
from pilotlight.gateway.jobs.tally import JobTally
from pilotlight.gateway.jobs.waiting import Signals
from pilotlight.gateway.slots import SlotTable
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet
from pilotlight.ports.store import JobStore
from pilotlight.settings import JobSettings

_log = structlog.get_logger()

_ENDS_THE_RUN = (Cancelled, ExecutionTimedOut, TtlReached)
"""Events by which a job ends although its worker goes on with it."""

_OF_A_WORKER = (Confirmed, Progressed, ResultPosted, WorkerLost, PlatformInterrupted)
"""Events that tell what became of a job at a worker."""

_OUTCOMES = {
    JobStatus.COMPLETED: Outcome.OK,
    JobStatus.FAILED: Outcome.FAILED,
    JobStatus.CANCELLED: Outcome.CANCELLED,
    JobStatus.TIMED_OUT: Outcome.TIMED_OUT,
}


class Ledger:
    """Applies events to jobs and does the bookkeeping; shared by the two sides of `JobService`.

    Args:
        store: The queue.
        slots: Job slots are given back here.
        fleet: Which workers live.
        clock: Time.
        settings: Periods.
        lives: Whether there is still an endpoint of this id.
        record: Takes the row of the request log.
        wake: Wakes the autoscaler of an endpoint.
        ended: Told of the endpoint of each job that had run and has ended.
        webhook_due: Told that a job has ended whose webhook the store now holds.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        slots: SlotTable,
        fleet: Fleet,
        clock: Clock,
        settings: JobSettings,
        lives: Callable[[str], bool],
        record: Callable[[RequestRecord], None],
        wake: Callable[[str], None],
        ended: Callable[[str], None],
        webhook_due: Callable[[], None],
    ) -> None:
        self.store = store
        self.slots = slots
        self.fleet = fleet
        self.clock = clock
        self.settings = settings
        self.record = record
        self.wake = wake
        self.ended = ended
        self.webhook_due = webhook_due
        self.signals = Signals()
        self.tally = JobTally()
        self.links: dict[str, WorkerLink] = {}
        self.closing = False
        self.suspended = False
        self.dispatcher = Dispatcher(
            store=store,
            slots=slots,
            fleet=fleet,
            clock=clock,
            lives=lives,
            apply=self.apply,
            started=self.signals.notify,
            spawn=self.spawn,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    def link_of(self, worker: Worker) -> WorkerLink | None:
        """What is known of a living worker; None when it has ended meanwhile."""
        link = self.links.get(worker.id)
        if link is None and self.fleet.worker(worker.id) is not None:
            link = self.links[worker.id] = WorkerLink(worker.id, worker.endpoint_id)
            if self.closing or self.suspended:
                link.release()
        return link

    async def apply(self, job_id: str, event: JobEvent) -> Applied:
        """Change a job and do what follows from it.

        Raises:
            NotFoundError: Unknown or expired job.
            StoreError: Nothing was changed.
        """
        try:
            applied = await self.store.apply(job_id, event)
        except NotFoundError:
            self._forget(job_id, event)
            raise
        self.settle(applied, event)
        return applied

    async def apply_many(self, events: Sequence[tuple[str, JobEvent]]) -> Sequence[Applied | None]:
        """Change several jobs in one go and do what follows; None for a job that is not known.

        Raises:
            StoreError: Nothing was changed.
        """
        changes = await self.store.apply_many(events) if events else []
        for (job_id, event), applied in zip(events, changes, strict=True):
            if applied is not None:
                self.settle(applied, event)
            else:
                self._forget(job_id, event)
        return changes

    def settle(self, applied: Applied, event: JobEvent) -> None:
        """Do what follows from a change that the store has committed."""
        if not applied.changed:
            return
        before, after = applied.before, applied.after
        hand_out = self._free(applied, event) if applied.freed_worker_id else None
        if applied.finished:
            self.tally.ended(after, type(event).__name__)
            self.record(_row(after, hand_out))
            if applied.freed_worker_id is not None:
                self.ended(after.endpoint_id)
            if after.webhook is not None:
                self.webhook_due()
        self.signals.notify(after.id)
        if applied.requeued:
            _log.info(
                "job_requeued",
                job_id=after.id,
                endpoint_id=after.endpoint_id,
                worker_id=before.worker_id,
                reason=type(event).__name__,
                retries=after.retries,
            )
            self.dispatcher.arrived(after.endpoint_id)
        if applied.requeued or applied.finished:
            self.wake(after.endpoint_id)

    def stop_deadline_ns(self) -> int:
        """Until when a worker must have let go of a job it is told to stop now: two heartbeats."""
        return self.clock.monotonic_ns() + 2 * self.settings.ping_interval_ms * 1_000_000

    def spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        """Run something in the background; `close` waits for it."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def suspend(self) -> None:
        """Hand out nothing more until `resume`, and answer all takes: the lead is another gateway's."""
        self.suspended = True
        self.dispatcher.close()
        for link in self.links.values():
            link.release()

    def resume(self) -> None:
        """Hand out again: the lead is ours."""
        self.suspended = False
        if not self.closing:
            self.dispatcher.reopen()

    def begin_close(self) -> None:
        """Hand out nothing more and answer clients that wait; open polls of workers stay open. Idempotent."""
        self.closing = True
        self.dispatcher.close()
        self.signals.notify_all()

    async def close(self) -> None:
        """As `begin_close`, then answer all polls and return when nothing is under way."""
        self.begin_close()
        for link in self.links.values():
            link.release()
        while self._tasks:
            await asyncio.wait(self._tasks)
        self.tally.close()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("background_task_failed", task=task.get_name(), exc_info=error)

    def _forget(self, job_id: str, event: JobEvent) -> None:
        """Free the slot of a job whose record is gone: no change of it ever will."""
        if not isinstance(event, _OF_A_WORKER) or event.worker_id is None:
            return
        link = self.links.get(event.worker_id)
        hand_out = link.hand_outs.get(job_id) if link is not None else None
        if link is not None and hand_out is not None and event.attempt in {None, hand_out.attempt}:
            del link.hand_outs[job_id]
            self.slots.release_jobs(link.worker_id)

    def _free(self, applied: Applied, event: JobEvent) -> HandOut | None:
        before = applied.before
        worker_id = applied.freed_worker_id
        assert worker_id is not None
        link = self.links.get(worker_id)
        hand_out = None
        if link is not None:
            # A later attempt may be in the same hands already.
            held = link.hand_outs.get(before.id)
            if held is not None and held.attempt == before.attempt:
                hand_out = link.hand_outs.pop(before.id)
            elif link.asking:
                link.ended_early.add((before.id, before.attempt))
            if isinstance(event, _ENDS_THE_RUN):
                link.stop(before.id, deadline_ns=self.stop_deadline_ns())
            delivered = isinstance(event, ResultPosted) and applied.finished
            if hand_out is not None and not (delivered or isinstance(event, PlatformInterrupted)):
                # It may hold the job for a while, or find it in its socket.
                link.keep_from(hand_out)
            if applied.after.status is JobStatus.COMPLETED:
                link.listed.discard(before.id)
            if held is None and not link.asking:
                # It was given back when the job was seen to have ended elsewhere.
                return None
        self.slots.release_jobs(worker_id)
        return hand_out


def _row(job: Job, hand_out: HandOut | None) -> RequestRecord:
    finished_ms = job.finished_ms if job.finished_ms is not None else job.created_ms
    usage = usage_of(job.output) if job.output is not None else None
    if usage is None and hand_out is not None and hand_out.usage_chunk is not None:
        usage = usage_of(hand_out.usage_chunk)
    first_ms = hand_out.first_chunk_ms if hand_out is not None else None
    retried = bool(job.attempts) and any(
        attempt.reason.startswith(RETRIED_BY_CLIENT) for attempt in job.attempts
    )
    return RequestRecord(
        # The log has one row per id, and a job that its client retried ends once more.
        id=f"{job.id}.{job.attempt}" if retried else job.id,
        road=Road.JOB,
        endpoint_id=job.endpoint_id,
        key_id=job.key_id,
        worker_id=job.worker_id or "",
        route="/runsync" if job.sync else "/run",
        status=200,
        outcome=_OUTCOMES[job.status],
        arrival_ms=job.created_ms,
        wait_ms=job.delay_ms if job.delay_ms is not None else max(0, finished_ms - job.queued_ms),
        first_token_ms=None if first_ms is None else max(0, first_ms - job.created_ms),
        duration_ms=max(0, finished_ms - job.created_ms),
        tokens_in=usage[0] if usage else None,
        tokens_out=usage[1] if usage else None,
    )
