"""The job road: clients submit, wait, read and cancel here; workers speak to `JobService.workers`.

Made once by `bootstrap`. The fleet reports ended workers, the reaper drives what is due, and everything
that waits is woken by in-process signals.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence

import structlog

from pilotlight.core.lifecycle import (
    Cancelled,
    ExecutionTimedOut,
    JobEvent,
    PlatformInterrupted,
    TtlReached,
    WorkerLost,
)
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.ids import job_id as make_job_id
from pilotlight.domain.job import Job, JobCounts, JobStatus
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.domain.worker import Failure, Stage, Worker, WorkerState
from pilotlight.errors import InvalidInputError, NotFoundError, StoreError
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.errors import QueueFullError
from pilotlight.gateway.jobs.desk import WorkerDesk
from pilotlight.gateway.jobs.ledger import Ledger
from pilotlight.gateway.jobs.links import WorkerLink
from pilotlight.gateway.jobs.submission import parse_submission
from pilotlight.gateway.jobs.waiting import Gone, happened
from pilotlight.gateway.slots import SlotTable
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet, StageReport
from pilotlight.ports.store import JobStore
from pilotlight.settings import Settings

_log = structlog.get_logger()

JOB_NOT_FOUND = "job not found"

_RETRY_AFTER_FULL_S = 5
"""Arbitrary: long enough not to hammer, short enough to notice a freed queue."""

_STREAM_BYTES = 8 * 1024 * 1024
"""Chunks put into one answer of `/stream`."""

_SYNC_RETENTION_MAX_MS = 300_000
"""Longest retention of a synchronous job's result (serverless-api.md §2.11)."""

_STATUS_TTL_MIN_MS = 1_000
"""Lowest `ttl` of `/status` (§2.6)."""

_CANCELLED_STREAM_MS = 60_000
"""Python's stream loop never ends on CANCELLED by itself; after this long it is told 404 (§2.8)."""

_CANCELLED_STREAMS_MAX = 10_000

_LOOK_PAUSE_NS = 5_000_000_000
"""A longer pause between two rounds of the reaper means that this process was suspended."""

_ALIVE = frozenset({WorkerState.READY, WorkerState.DRAINING})
"""States in which a worker program polls and sends heartbeats."""


class JobService:
    """Everything that can be done with jobs.

    Args:
        store: The queue.
        slots: Slots of the workers, shared with the data path.
        fleet: Living workers.
        directory: Endpoints and keys.
        clock: Time.
        settings: Periods and limits.
        entropy: Random bytes, for job ids.
        record: Takes the row of the request log.
        wake: Wakes the autoscaler of an endpoint.

    Attributes:
        workers: The side that workers speak to.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        slots: SlotTable,
        fleet: Fleet,
        directory: Directory,
        clock: Clock,
        settings: Settings,
        entropy: Callable[[int], bytes],
        record: Callable[[RequestRecord], None],
        wake: Callable[[str], None],
    ) -> None:
        self._store = store
        self._slots = slots
        self._fleet = fleet
        self._directory = directory
        self._clock = clock
        self._settings = settings
        self._entropy = entropy
        self._record = record
        self._wake = wake
        self._ledger = Ledger(
            store=store,
            slots=slots,
            fleet=fleet,
            clock=clock,
            settings=settings.jobs,
            record=record,
            wake=wake,
        )
        self.workers = WorkerDesk(self._ledger, settings.limits, entropy)
        self._room: dict[str, int] = {}
        self._cancelled_streams: OrderedDict[str, int] = OrderedDict()
        self._unsettled: dict[str, str] = {}
        self._looked_ns = clock.monotonic_ns()

    # Clients

    async def submit(
        self, endpoint: Endpoint, key: ApiKey, body: bytes, *, sync: bool, wait_ms: int = 0
    ) -> Job:
        """Check a submission and queue it; the job is durable when this returns.

        Args:
            endpoint: Whom it calls.
            key: Who calls.
            body: The request's body, within its limit.
            sync: Whether it came by `/runsync`.
            wait_ms: How long that caller waits; prolongs the retention of the result (§2.11).

        Raises:
            InvalidInputError: Names what is wrong with the body.
            QueueFullError: The endpoint's queue is full.
            StoreError: Nothing was queued.
        """
        if endpoint.revision.engine_url is not None:
            raise InvalidInputError(
                f"endpoint {endpoint.id} has a fixed engine and no workers that take jobs; "
                "use its /openai routes"
            )
        submission = parse_submission(body)
        await self._make_room(endpoint.id)
        now_ms = self._clock.now_ms()
        jobs = self._settings.jobs
        retention_ms = (
            max(jobs.sync_retention_ms, min(wait_ms, _SYNC_RETENTION_MAX_MS)) if sync else jobs.retention_ms
        )
        job = Job(
            id=make_job_id(self._entropy(16), sync=sync),
            endpoint_id=endpoint.id,
            key_id=key.id,
            input=submission.input,
            sync=sync,
            low_priority=submission.low_priority,
            created_ms=now_ms,
            queued_ms=now_ms,
            expires_ms=now_ms + (submission.ttl_ms or jobs.ttl_ms),
            execution_timeout_ms=submission.execution_timeout_ms or endpoint.execution_timeout_ms,
            retention_ms=retention_ms,
        )
        await self._store.submit(job)
        if self._directory.endpoint(endpoint.id) is None:
            # Deleted in between: its other jobs were cancelled before this one was there.
            await self.endpoint_deleted(endpoint.id)
        self._ledger.dispatcher.arrived(endpoint.id)
        self._wake(endpoint.id)
        return job

    def refused(self, endpoint_id: str, key: ApiKey, *, sync: bool, status: int) -> None:
        """Leave a row in the request log for a submission that became no job."""
        self._record(
            RequestRecord(
                id=make_job_id(self._entropy(16), sync=sync),
                road=Road.JOB,
                endpoint_id=endpoint_id,
                key_id=key.id,
                route="/runsync" if sync else "/run",
                status=status,
                outcome=Outcome.SHED if status == 429 else Outcome.REJECTED,
                arrival_ms=self._clock.now_ms(),
            )
        )

    async def job(self, endpoint_id: str, job_id: str) -> Job:
        """One job of an endpoint. NotFoundError when unknown, expired or another endpoint's."""
        try:
            job = await self._store.job(job_id)
        except NotFoundError:
            raise NotFoundError(JOB_NOT_FOUND) from None
        # The record may outlive its time by the period of the reaper.
        expired = job.finished_ms is not None and job.finished_ms + job.retention_ms <= self._clock.now_ms()
        if job.endpoint_id != endpoint_id or expired:
            raise NotFoundError(JOB_NOT_FOUND)
        return job

    async def shorten(self, endpoint_id: str, job_id: str, *, ttl_ms: int) -> None:
        """Let the record live at most `ttl_ms` from now (§2.6)."""
        await self.job(endpoint_id, job_id)
        await self._store.shorten(job_id, now_ms=self._clock.now_ms(), ttl_ms=max(_STATUS_TTL_MIN_MS, ttl_ms))

    async def wait(self, endpoint_id: str, job_id: str, *, timeout_s: float, gone: Gone | None = None) -> Job:
        """The job as soon as it is terminal, or as it is when the time is over or the client gone."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        ledger = self._ledger
        with ledger.signals.watch(job_id) as changed:
            while True:
                changed.clear()
                job = await self.job(endpoint_id, job_id)
                if job.status.terminal or ledger.closing:
                    return job
                if not await happened(changed, deadline=deadline, gone=gone):
                    return job

    async def stream(
        self, endpoint_id: str, job_id: str, *, hold_s: float, gone: Gone | None = None
    ) -> tuple[JobStatus, Sequence[bytes]]:
        """Chunks not returned before, waiting for some, for a change of state, or for `hold_s` (§2.8).

        Returns:
            The status and the chunks' raw JSON. The status is terminal only together with the last of
            the chunks: while more remain than fit into one answer it is IN_PROGRESS.

        Raises:
            NotFoundError: Unknown job, or a cancelled one whose reader does not stop by itself.
        """
        deadline = asyncio.get_running_loop().time() + hold_s
        ledger = self._ledger
        first = (await self.job(endpoint_id, job_id)).status
        with ledger.signals.watch(job_id) as changed:
            while True:
                changed.clear()
                if gone is not None and gone.done():
                    return first, []
                job, chunks = await self._store.drain_chunks(job_id, limit_bytes=_STREAM_BYTES)
                if job.status.terminal:
                    more = bool(chunks) and await self._store.has_chunks(job_id)
                    self._check_cancelled_stream(job, empty=not chunks)
                    status = JobStatus.IN_PROGRESS if more else job.status
                    return status, [chunk.body for chunk in chunks]
                if chunks or job.status is not first or ledger.closing:
                    return job.status, [chunk.body for chunk in chunks]
                if not await happened(changed, deadline=deadline, gone=gone):
                    return job.status, []

    async def cancel(self, endpoint_id: str, job_id: str) -> Job:
        """Cancel a job; one that is terminal stays as it is (§2.15). A running one's worker is told."""
        await self.job(endpoint_id, job_id)
        return (await self._ledger.apply(job_id, Cancelled(now_ms=self._clock.now_ms()))).after

    async def counts(self, endpoint_id: str) -> JobCounts:
        """The queue's counters."""
        return await self._store.counts(endpoint_id)

    # Fleet and slots

    def slots_freed(self, endpoint_id: str) -> None:
        """A slot became free: parked takes may be served. Connect to `SlotTable.on_free`."""
        self._ledger.dispatcher.serve(endpoint_id)

    def release_polls(self, worker_id: str) -> None:
        """Answer a worker's open polls: it has been told to end (worker-protocol.md §6.3 step 3).

        Call it after the signal has been delivered; what it polls afterwards is answered within a second.
        """
        worker = self._fleet.worker(worker_id)
        link = self._ledger.link_of(worker) if worker else self._ledger.links.get(worker_id)
        if link is not None:
            link.release()

    async def worker_ended(self, worker_id: str, reason: str) -> None:
        """Requeue or fail what a worker had in hand; its last process is gone."""
        link = self._ledger.links.pop(worker_id, None)
        if link is not None:
            link.release()
        self._unsettled[worker_id] = reason
        try:
            await self._settle_ended(worker_id)
        except StoreError as error:
            # The reaper tries again: nothing else would ever end these attempts.
            _log.warning("worker_end_not_settled", worker_id=worker_id, error=str(error))

    async def endpoint_deleted(self, endpoint_id: str) -> None:
        """Cancel all jobs of a deleted endpoint (serverless-api.md §12 item 41)."""
        event = Cancelled(now_ms=self._clock.now_ms())
        for applied in await self._store.cancel_all(endpoint_id, event):
            self._ledger.settle(applied, event)
        self._ledger.dispatcher.drop_endpoint(endpoint_id)
        self._room.pop(endpoint_id, None)

    # Start and end of the gateway

    async def recover(self) -> int:
        """Give the jobs that an earlier life of the gateway had handed out back to the queue.

        Call it before the first request, when no worker of that life is left.

        Returns:
            How many there were.
        """
        running = await self._store.running()
        for job in running:
            await self._ledger.apply(job.id, PlatformInterrupted(now_ms=self._clock.now_ms()))
        for endpoint in self._directory.endpoints():
            self._wake(endpoint.id)
        return len(running)

    async def close(self) -> None:
        """Answer every parked poll and wait, hand out nothing more; returns when all is settled.

        Call it before the workers are ended, so that their jobs go back without using up a retry, and
        before the store is closed.
        """
        await self._ledger.close()

    @property
    def closing(self) -> bool:
        """Whether `close` has begun."""
        return self._ledger.closing

    # The reaper

    async def end_overdue(self) -> None:
        """End jobs whose time to live or execution timeout has passed."""
        now_ms = self._clock.now_ms()
        for job in await self._store.due(now_ms=now_ms):
            expired = job.expires_ms <= now_ms
            event: JobEvent = TtlReached(now_ms=now_ms) if expired else ExecutionTimedOut(now_ms=now_ms)
            try:
                applied = await self._ledger.apply(job.id, event)
                if expired and applied.changed and applied.before.status is JobStatus.IN_PROGRESS:
                    # Queued jobs leave a record behind, running ones are gone at once (§12 items 3, 4).
                    await self._store.shorten(job.id, now_ms=now_ms, ttl_ms=0)
            except NotFoundError:
                continue

    async def lose_unconfirmed(self) -> None:
        """Requeue hand-outs that their worker has not shown to hold in time (worker-protocol.md §8)."""
        oldest_ns = self._clock.monotonic_ns() - self._settings.jobs.confirm_s * 1_000_000_000
        for link in [*self._ledger.links.values()]:
            for hand_out in [*link.hand_outs.values()]:
                if hand_out.confirmed or hand_out.posts or hand_out.at_ns > oldest_ns:
                    continue
                reason = f"hand-out not confirmed within {self._settings.jobs.confirm_s} s"
                event = WorkerLost(worker_id=link.worker_id, now_ms=self._clock.now_ms(), reason=reason)
                try:
                    await self._ledger.apply(hand_out.job_id, event)
                except NotFoundError:
                    link.hand_outs.pop(hand_out.job_id, None)
                    continue
                # Should it have arrived after all, the work would be done twice.
                link.stop(hand_out.job_id, deadline_ns=self._ledger.stop_deadline_ns())
        for worker_id in [*self._unsettled]:
            await self._settle_ended(worker_id)

    async def kill_stuck(self) -> None:
        """End workers that hang, or go on with a stopped job and nothing else (worker-protocol.md §8)."""
        now_ns = self._clock.monotonic_ns()
        self._kill_silent(now_ns)
        for link in [*self._ledger.links.values()]:
            held = [
                job_id
                for job_id, deadline_ns in link.stopping.items()
                if deadline_ns <= now_ns and job_id in link.listed
            ]
            if held and not link.retiring and not self._has_other_work(link):
                link.retiring = True
                _log.warning("worker_stuck", worker_id=link.worker_id, job_id=held[0])
                reason = f"it goes on with job {held[0]}, which has ended"
                self._ledger.spawn(self._fleet.kill(link.worker_id, reason=reason), f"kill-{link.worker_id}")

    def _kill_silent(self, now_ns: int) -> None:
        """End workers that give no sign of life; their jobs are lost with them and run elsewhere."""
        interrupted = now_ns - self._looked_ns > _LOOK_PAUSE_NS
        self._looked_ns = now_ns
        missing_ns = 3 * self._settings.jobs.ping_interval_ms * 1_000_000 + 6_000_000_000
        for link in [*self._ledger.links.values()]:
            if interrupted and link.pinged_ns is not None:
                # It was us who stood still; what they sent meanwhile is yet to be read.
                link.pinged_ns = now_ns
            worker = self._fleet.worker(link.worker_id)
            if (
                worker is None
                or worker.state not in _ALIVE
                or not link.silent(now_ns, pings_missing_ns=missing_ns)
            ):
                continue
            link.pinged_ns, link.retiring = None, True
            self._ledger.spawn(self._end_silent(worker, missing_ns // 1_000_000_000), f"kill-{worker.id}")

    async def _end_silent(self, worker: Worker, seconds: int) -> None:
        cause = f"the worker program hangs: no sign of life for {seconds} s"
        _log.warning("worker_silent", worker_id=worker.id, endpoint_id=worker.endpoint_id)
        failure = Failure(kind="hung", cause=cause, advice="See the worker's log.")
        await self._fleet.reported(worker.id, StageReport(stage=Stage.FAILED, failure=failure))
        await self._fleet.kill(worker.id, reason=cause)

    def _has_other_work(self, link: WorkerLink) -> bool:
        slots = self._slots.worker(link.worker_id)
        return bool(link.hand_outs) or (slots is not None and slots.requests > 0)

    async def _settle_ended(self, worker_id: str) -> None:
        reason = self._unsettled[worker_id]
        for job in await self._store.running(worker_id=worker_id):
            now_ms = self._clock.now_ms()
            event: JobEvent = WorkerLost(worker_id=worker_id, now_ms=now_ms, reason=reason)
            if self._ledger.closing:
                # The gateway ends and took its workers with it: not the job's fault.
                event = PlatformInterrupted(now_ms=now_ms)
            try:
                await self._ledger.apply(job.id, event)
            except NotFoundError:
                continue
        self._unsettled.pop(worker_id, None)

    async def _make_room(self, endpoint_id: str) -> None:
        """Return when one more job may be queued.

        The number of free places is asked of the store once and counted down; jobs that leave the queue
        only make it larger, so the store is asked again only when it has come down to nothing.
        """
        if self._room.get(endpoint_id, 0) <= 0:
            demand = await self._store.demand(endpoint_id, overdue_before_ms=0)
            bound = self._settings.limits.queue_jobs
            self._room[endpoint_id] = bound - demand.queued - demand.queued_low
        if self._room[endpoint_id] <= 0:
            raise QueueFullError(
                f"rate limit exceeded: the queue of endpoint {endpoint_id} is full "
                f"({self._settings.limits.queue_jobs} jobs)",
                retry_after_s=_RETRY_AFTER_FULL_S,
            )
        self._room[endpoint_id] -= 1

    def _check_cancelled_stream(self, job: Job, *, empty: bool) -> None:
        if job.status is not JobStatus.CANCELLED or not empty:
            return
        now_ms = self._clock.now_ms()
        since_ms = self._cancelled_streams.setdefault(job.id, now_ms)
        if now_ms - since_ms >= _CANCELLED_STREAM_MS:
            raise NotFoundError(JOB_NOT_FOUND)
        if len(self._cancelled_streams) > _CANCELLED_STREAMS_MAX:
            self._cancelled_streams.popitem(last=False)
