"""The job road: clients submit, wait, read and cancel here; workers speak to `JobService.workers`.

Made once by `bootstrap`. The fleet reports ended workers, the reaper drives what is due (`upkeep`), and
everything that waits is woken by in-process signals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from pilotlight.core.explain import Wait, explain_wait
from pilotlight.core.lifecycle import (
    Applied,
    Cancelled,
    Effect,
    JobEvent,
    PlatformInterrupted,
    Retried,
    ttl_window_ms,
)
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.ids import job_id as make_job_id
from pilotlight.domain.job import Idempotency, Job, JobCounts, JobStatus
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.errors import InvalidInputError, NotFoundError
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.errors import JOB_NOT_FOUND, QueueFullError
from pilotlight.gateway.jobs.batches import BatchService
from pilotlight.gateway.jobs.bounds import QueueBounds
from pilotlight.gateway.jobs.buckets import Buckets
from pilotlight.gateway.jobs.desk import WorkerDesk
from pilotlight.gateway.jobs.ledger import Ledger
from pilotlight.gateway.jobs.rates import RateTable
from pilotlight.gateway.jobs.readers import StreamReaders
from pilotlight.gateway.jobs.sight import Sight
from pilotlight.gateway.jobs.submission import (
    ID,
    TTL_MS,
    Submission,
    check_takes_jobs,
    fingerprint_of,
    parse_submission,
)
from pilotlight.gateway.jobs.upkeep import Upkeep
from pilotlight.gateway.jobs.waiting import Gone, happened
from pilotlight.gateway.slots import SlotTable
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet
from pilotlight.ports.store import BatchStore, JobStore
from pilotlight.settings import Settings

_SYNC_RETENTION_MAX_MS = 300_000
"""Longest retention of a synchronous job's result (serverless-api.md §2.11)."""

_STATUS_TTL_MIN_MS = 1_000
"""Lowest `ttl` of `/status` (§2.6)."""

_RECOVERED_SLICE = 200
"""Jobs given back in one go at the start."""

_CANCELLED_SLICES = 4
"""Slices of 500 jobs that the deletion of an endpoint cancels one by one: some tenths of a second."""

_RETRYABLE = frozenset({JobStatus.FAILED, JobStatus.TIMED_OUT})


class Submitted(msgspec.Struct, frozen=True):
    """The answer to a submission.

    Attributes:
        job: The job; for a repetition the one of the first submission, as it stands.
        replayed: Whether it was a repetition (`Idempotency-Key`).
    """

    job: Job
    replayed: bool


class QueueStore(JobStore, BatchStore, Protocol):
    """What the job road remembers."""


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
        buckets: Seals what only workers may see (`s3Config`), and stores results that are too large.
        webhook_due: Called when a job has ended whose webhook the store now holds.
        note: Adds a line to the log of a worker.
        start_s: Seconds until an endpoint has a worker; None while nobody knows.

    Attributes:
        workers: The side that workers speak to.
        batches: What can be done with batches.
        streams: What readers of streams ask.
        bounds: What may wait in a queue; batches ask here, too.
        rates: Counts requests where the profile `runpod` limits them; None where nothing does.
    """

    def __init__(
        self,
        *,
        store: QueueStore,
        slots: SlotTable,
        fleet: Fleet,
        directory: Directory,
        clock: Clock,
        settings: Settings,
        entropy: Callable[[int], bytes],
        record: Callable[[RequestRecord], None],
        wake: Callable[[str], None],
        buckets: Buckets,
        webhook_due: Callable[[], None] = lambda: None,
        note: Callable[[str, str], object] = lambda *_: None,
        start_s: Callable[[Endpoint], int | None] = lambda _: None,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._directory = directory
        self._clock = clock
        self._settings = settings
        self._entropy = entropy
        self._record = record
        self._wake = wake
        self._buckets = buckets
        self.bounds = QueueBounds(store, clock, settings.limits, lives=self._lives, start_s=start_s)
        self.rates = RateTable(clock, fleet) if settings.limits.profile == "runpod" else None
        self._ledger = Ledger(
            store=store,
            slots=slots,
            fleet=fleet,
            clock=clock,
            settings=settings.jobs,
            lives=self._lives,
            record=record,
            wake=wake,
            ended=self.bounds.ended,
            webhook_due=webhook_due,
        )
        self.workers = WorkerDesk(
            self._ledger, directory, settings.limits, entropy=entropy, buckets=buckets, note=note
        )
        self.batches = BatchService(
            store=store,
            ledger=self._ledger,
            clock=clock,
            settings=settings,
            entropy=entropy,
            bounds=self.bounds,
            wake=wake,
        )
        self._sight = Sight(store, slots, fleet, self._ledger.links)
        self._upkeep = Upkeep(self._ledger, self._gone)
        self.streams = StreamReaders(self._ledger, find=self.job, forgotten=self._gone)

    # Clients

    async def submit(
        self,
        endpoint: Endpoint,
        key: ApiKey,
        body: bytes,
        *,
        sync: bool,
        wait_ms: int = 0,
        idempotency_key: str | None = None,
    ) -> Submitted:
        """Check a submission and queue it; the job is durable when this returns.

        Args:
            endpoint: Whom it calls.
            key: Who calls.
            body: The request's body, within its limit.
            sync: Whether it came by `/runsync`.
            wait_ms: How long that caller waits; prolongs the retention of the result (§2.11).
            idempotency_key: Makes a repetition of the same request find the same job.

        Raises:
            InvalidInputError: Names what is wrong with the body.
            ConflictError: The idempotency key came with another body or route before.
            QueueFullError: The endpoint's queue is full.
            StoreError: Nothing was queued.
        """
        submission = parse_submission(body)
        idempotency = None
        if idempotency_key is not None:
            fingerprint = fingerprint_of("runsync" if sync else "run", body)
            idempotency = Idempotency(key=idempotency_key, fingerprint=fingerprint)
        return await self._enqueue(endpoint, key, submission, sync, wait_ms, idempotency)

    async def enqueue(
        self, endpoint: Endpoint, key: ApiKey, submission: Submission, *, sync: bool, wait_ms: int = 0
    ) -> Job:
        """Queue a submission that was checked, or made by us; as `submit`."""
        return (await self._enqueue(endpoint, key, submission, sync, wait_ms, None)).job

    async def _enqueue(
        self,
        endpoint: Endpoint,
        key: ApiKey,
        submission: Submission,
        sync: bool,
        wait_ms: int,
        idempotency: Idempotency | None,
    ) -> Submitted:
        check_takes_jobs(endpoint)
        job = self._new_job(endpoint, key, submission, sync, wait_ms)
        try:
            async with self.bounds.room(endpoint, jobs=1, size=job.input_bytes):
                stored = await self._store.submit(
                    job,
                    idempotency=idempotency,
                    announce=lambda: self._ledger.dispatcher.arrived(endpoint.id),
                )
        except QueueFullError:
            # A repetition needs no room: what it asks about is in the queue, or has been.
            earlier = None if idempotency is None else await self._store.earlier(job, idempotency)
            if earlier is None:
                raise
            return Submitted(earlier, replayed=True)
        if not self._lives(endpoint.id):
            # Deleted in between: its other jobs were cancelled before this one was there.
            await self.endpoint_deleted(endpoint.id)
        self._wake(endpoint.id)
        return Submitted(stored, replayed=stored.id != job.id)

    def _new_job(
        self, endpoint: Endpoint, key: ApiKey, submission: Submission, sync: bool, wait_ms: int
    ) -> Job:
        now_ms = self._clock.now_ms()
        jobs = self._settings.jobs
        retention_ms = (
            max(jobs.sync_retention_ms, min(wait_ms, _SYNC_RETENTION_MAX_MS)) if sync else jobs.retention_ms
        )
        job_id = make_job_id(self._entropy(16), sync=sync, created_ms=now_ms)
        secrets = submission.s3_config
        return Job(
            id=job_id,
            endpoint_id=endpoint.id,
            key_id=key.id,
            input=submission.input,
            input_bytes=len(submission.input),
            sync=sync,
            low_priority=submission.low_priority,
            created_ms=now_ms,
            queued_ms=now_ms,
            expires_ms=now_ms + (submission.ttl_ms or jobs.ttl_ms),
            execution_timeout_ms=submission.execution_timeout_ms or endpoint.execution_timeout_ms,
            retention_ms=retention_ms,
            retries_max=jobs.retries_max,
            webhook=submission.webhook,
            s3_config=None if secrets is None else self._buckets.seal(job_id, secrets),
        )

    def refused(self, endpoint_id: str, key: ApiKey, *, sync: bool, status: int, full: bool = False) -> None:
        """Leave a row in the request log for a submission that became no job; `full`: for want of room."""
        self._record(
            RequestRecord(
                id=make_job_id(self._entropy(16), sync=sync, created_ms=self._clock.now_ms()),
                road=Road.JOB,
                endpoint_id=endpoint_id,
                key_id=key.id,
                route="/runsync" if sync else "/run",
                status=status,
                outcome=Outcome.SHED if full else Outcome.REJECTED,
                arrival_ms=self._clock.now_ms(),
            )
        )

    async def job(self, endpoint_id: str, job_id: str) -> Job:
        """One job of an endpoint. NotFoundError when unknown, expired or another endpoint's."""
        if not ID.fullmatch(job_id):
            raise NotFoundError(JOB_NOT_FOUND)
        try:
            job = await self._store.job(job_id)
        except NotFoundError:
            raise NotFoundError(JOB_NOT_FOUND) from None
        if job.endpoint_id != endpoint_id or self._gone(job):
            raise NotFoundError(JOB_NOT_FOUND)
        return job

    def job_at_hand(self, endpoint_id: str, job_id: str) -> Job | None:
        """The job as `job` would give it, where that takes no waiting; else None, also for an unknown one."""
        job = self._store.job_at_hand(job_id)
        return None if job is None or job.endpoint_id != endpoint_id or self._gone(job) else job

    async def jobs(
        self, endpoint_id: str, *, status: JobStatus | None, before: tuple[int, str] | None, limit: int
    ) -> tuple[Sequence[Job], tuple[int, str] | None]:
        """Jobs of an endpoint, newest first, and the position from which to go on (§2.15).

        Jobs that were submitted meanwhile move nothing. A page may hold fewer than `limit` where records have
        just expired; only the position tells whether there are more.

        Args:
            endpoint_id: Whose.
            status: Only those; None for all.
            before: Position that an earlier page gave.
            limit: Most jobs on the page.
        """
        found = await self._store.jobs(endpoint_id, status=status, before=before, limit=limit + 1)
        page = found[:limit]
        position = (page[-1].created_ms, page[-1].id) if len(found) > limit else None
        return [job for job in page if not self._gone(job)], position

    async def waiting(self, endpoint: Endpoint, job: Job) -> Wait | None:
        """Why a job is in the queue; None when it is not."""
        if job.status is not JobStatus.IN_QUEUE:
            return None
        return explain_wait(await self._sight.of(endpoint, job), self._clock.now_ms())

    async def shorten(self, endpoint_id: str, job_id: str, *, ttl_ms: int) -> None:
        """Let the record live at most `ttl_ms` from now (§2.6)."""
        await self.job(endpoint_id, job_id)
        try:
            await self._store.shorten(
                job_id, now_ms=self._clock.now_ms(), ttl_ms=max(_STATUS_TTL_MIN_MS, ttl_ms)
            )
        except NotFoundError:
            raise NotFoundError(JOB_NOT_FOUND) from None

    async def wait(self, endpoint_id: str, job_id: str, *, timeout_s: float, gone: Gone | None = None) -> Job:
        """The job as soon as it is terminal, or as it is when the time is over or the client gone."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        ledger = self._ledger
        with ledger.signals.watch(job_id, group=endpoint_id) as changed:
            while True:
                changed.clear()
                job = await self.job(endpoint_id, job_id)
                if job.status.terminal or ledger.closing:
                    return job
                if not await happened(changed, deadline=deadline, gone=gone):
                    return job

    async def cancel(self, endpoint_id: str, job_id: str) -> Job:
        """Cancel a job; one that is terminal stays as it is (§2.15). A running one's worker is told."""
        await self.job(endpoint_id, job_id)
        return (await self._apply(job_id, Cancelled(now_ms=self._clock.now_ms()))).after

    async def retry(self, endpoint: Endpoint, job_id: str) -> Job:
        """Queue a job that failed again, with its id, its input and a new time to live (§2.10, §2.15).

        It gets as long a time to live as it has had.

        Raises:
            InvalidInputError: It did not fail, or its s3Config is gone.
            NotFoundError: Unknown job.
            QueueFullError: The queue is full.
        """
        job = await self.job(endpoint.id, job_id)
        if job.status not in _RETRYABLE:
            raise _not_retryable(job)
        now_ms = self._clock.now_ms()
        lowest, highest = TTL_MS
        window_ms = max(lowest, min(highest, ttl_window_ms(job)))
        async with self.bounds.room(endpoint, jobs=1, size=job.input_bytes):
            applied = await self._apply(job_id, Retried(now_ms=now_ms, expires_ms=now_ms + window_ms))
        if applied.effect is Effect.IGNORED_WIPED:
            raise InvalidInputError(
                "job cannot be retried: its s3Config was deleted when it ended; submit it again"
            )
        if not applied.changed:
            raise _not_retryable(applied.after)
        return applied.after

    async def purge(self, endpoint_id: str) -> int:
        """Remove what is queued and return how many jobs that were; running ones go on (§2.15)."""
        removed = await self._store.purge(endpoint_id, now_ms=self._clock.now_ms())
        self.bounds.forget(endpoint_id)
        # Whoever waits for one of them learns that it is gone; which ones they were nobody listed.
        self._ledger.signals.notify_group(endpoint_id)
        self._wake(endpoint_id)
        return removed

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

    def at_rest(self, worker_id: str) -> bool:
        """Whether a worker holds no job as far as we know, also none that it should have let go of."""
        link = self._ledger.links.get(worker_id)
        return link is None or link.at_rest

    def thawed(self, worker_id: str) -> None:
        """A worker goes on that had been stopped as a whole: what it had open then is answered, with nothing.

        Call it before its slots are opened.
        """
        link = self._ledger.links.get(worker_id)
        if link is not None:
            link.thaw(self._clock.monotonic_ns())

    async def worker_ended(self, worker_id: str, reason: str) -> None:
        """Requeue or fail what a worker had in hand; its last process is gone."""
        await self._upkeep.worker_ended(worker_id, reason)

    async def endpoint_deleted(self, endpoint_id: str) -> None:
        """Cancel all jobs of a deleted endpoint (serverless-api.md §12 item 41).

        Where more are queued than can be cancelled while a caller waits, the rest is purged: unknown at once,
        and their webhooks are told CANCELLED as the reaper comes to them.
        """
        event = Cancelled(now_ms=self._clock.now_ms())
        slices = 0
        while ended := await self._store.cancel_all(endpoint_id, event):
            for applied in ended:
                self._ledger.settle(applied, event)
            slices += 1
            if slices == _CANCELLED_SLICES:
                await self.purge(endpoint_id)
        self._ledger.dispatcher.drop_endpoint(endpoint_id)
        self.bounds.drop_endpoint(endpoint_id)

    # Start and end of the gateway

    async def recover(self) -> int:
        """Give the jobs that an earlier life of the gateway had handed out back to the queue.

        Call it before the first request, when no worker of that life is left.

        Returns:
            How many there were.
        """
        running = await self._store.running()
        event = PlatformInterrupted(now_ms=self._clock.now_ms())
        for start in range(0, len(running), _RECOVERED_SLICE):
            jobs = running[start : start + _RECOVERED_SLICE]
            await self._ledger.apply_many([(job.id, event) for job in jobs])
        for endpoint in self._directory.endpoints():
            self._wake(endpoint.id)
        return len(running)

    def begin_close(self) -> None:
        """Hand out nothing more, and answer clients that wait.

        Call it before the workers are ended, so that their jobs go back without using up a retry. Their polls
        stay open until they have been told to end (`release_polls`): one that is answered before that asks
        again, and its end has to wait for the answer (worker-protocol.md §6.3).
        """
        self._ledger.begin_close()

    async def close(self) -> None:
        """Answer every poll that is still open; returns when all is settled.

        Call it after the workers have ended, and before the store is closed.
        """
        await self._ledger.close()

    @property
    def ledger(self) -> Ledger:
        """Where jobs are changed, for the news of other gateways."""
        return self._ledger

    @property
    def closing(self) -> bool:
        """Whether `begin_close` was called."""
        return self._ledger.closing

    # The reaper

    async def end_overdue(self) -> None:
        """End jobs whose time to live or execution timeout has passed."""
        await self._upkeep.end_overdue()

    async def lose_unconfirmed(self) -> None:
        """Requeue hand-outs that their worker has not shown to hold in time (worker-protocol.md §8)."""
        await self._upkeep.lose_unconfirmed()

    async def kill_stuck(self) -> None:
        """End workers that hang, or go on with a stopped job and nothing else (worker-protocol.md §8)."""
        await self._upkeep.kill_stuck()

    def _lives(self, endpoint_id: str) -> bool:
        """Whether there is still an endpoint of this id."""
        return self._directory.endpoint(endpoint_id) is not None

    def _gone(self, job: Job) -> bool:
        """Whether an ended job is unknown to clients, although its record may be there for a moment more.

        Its retention is over, or its time to live ended while it ran, or, where the operator wants no
        tombstones, while it waited (§12 items 3, 4). Requests of a batch stay with their batch.
        """
        if job.finished_ms is None:
            return False
        if job.finished_ms + job.retention_ms <= self._clock.now_ms():
            return True
        if job.status is not JobStatus.TIMED_OUT or job.batch_id is not None:
            return False
        return job.started_ms is not None or not self._settings.jobs.ttl_tombstone

    async def _apply(self, job_id: str, event: JobEvent) -> Applied:
        try:
            return await self._ledger.apply(job_id, event)
        except NotFoundError:
            raise NotFoundError(JOB_NOT_FOUND) from None


def _not_retryable(job: Job) -> InvalidInputError:
    return InvalidInputError(f"job cannot be retried in status {job.status}")
