"""The queue of the in-memory twin: jobs with their chunks, and batches."""

from __future__ import annotations

import contextlib
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from msgspec import structs

from pilotlight.core.lifecycle import Applied, Cancelled, JobEvent, Taken
from pilotlight.domain.batch import Batch, BatchDraft, BatchStatus
from pilotlight.domain.job import Idempotency, Job, JobCounts, JobStatus, QueueDemand
from pilotlight.errors import NotFoundError
from pilotlight.ports.store import Chunk, ChunkFate
from pilotlight.stores import common
from pilotlight.stores.memory.webhooks import MemoryWebhooks


@dataclass(slots=True, eq=False)
class _JobEntry:
    """A job without its input, with what the store keeps beside it.

    Attributes:
        job: The record.
        input: What the client sent.
        order: Number of the submission.
        chunks: Of the current attempt, read ones included.
        next_sequence: Of the next chunk; counts on through all attempts.
        read_to: Chunks below this sequence were returned to a reader.
        idempotency: Where it is remembered, if it is.
    """

    job: Job
    input: bytes
    order: int
    chunks: list[Chunk] = field(default_factory=list)
    next_sequence: int = 0
    read_to: int = 0
    idempotency: tuple[str, str, str] | None = None

    @property
    def place(self) -> tuple[int, int, int]:
        """Where it stands in the order of service."""
        return common.rank(self.job), common.place(self.job), self.order


@dataclass(slots=True)
class _Totals:
    completed: int = 0
    failed: int = 0
    retried: int = 0


@dataclass(slots=True, eq=False)
class _BatchEntry:
    """A batch with its requests as long as they are drafts; once jobs, they are entries among the others."""

    batch: Batch
    drafts: dict[str, BatchDraft]


class MemoryQueue(MemoryWebhooks):
    """The ports of the queue: `JobStore` and `BatchStore`."""

    def __init__(self) -> None:
        super().__init__()
        self._jobs: dict[str, _JobEntry] = {}
        self._queued: dict[str, dict[str, _JobEntry]] = {}
        self._purged: deque[_JobEntry] = deque()
        self._totals: dict[str, _Totals] = {}
        self._submissions = 0
        self._remembered: dict[tuple[str, str, str], tuple[bytes, str]] = {}
        self._batches: dict[str, _BatchEntry] = {}

    # Jobs

    async def submit(
        self,
        job: Job,
        *,
        idempotency: Idempotency | None = None,
        announce: Callable[[], None] | None = None,
    ) -> Job:
        """See `JobStore.submit`."""
        self._check_open()
        if idempotency is not None and (found := self._earlier(job, idempotency)) is not None:
            return found
        if job.id in self._jobs:
            raise common.id_taken("job", job.id)
        job = structs.replace(job, input_bytes=len(job.input))
        entry = self._add(job)
        if idempotency is not None:
            entry.idempotency = (job.endpoint_id, job.key_id, idempotency.key)
            self._remembered[entry.idempotency] = (idempotency.fingerprint, job.id)
        if announce is not None:
            announce()
        return job

    async def earlier(self, job: Job, idempotency: Idempotency) -> Job | None:
        """See `JobStore.earlier`."""
        self._check_open()
        return self._earlier(job, idempotency)

    def _earlier(self, job: Job, idempotency: Idempotency) -> Job | None:
        fingerprint, job_id = self._remembered.get((job.endpoint_id, job.key_id, idempotency.key), (b"", ""))
        if not job_id or common.forgotten(self._entry(job_id).job, job.created_ms):
            return None
        common.check_fingerprint(idempotency, fingerprint)
        return self._entry(job_id).job

    def job_at_hand(self, job_id: str) -> Job | None:
        """See `JobStore.job_at_hand`."""
        with contextlib.suppress(NotFoundError):
            return self._entry(job_id).job
        return None

    def _add(self, job: Job) -> _JobEntry:
        assert job.status is JobStatus.IN_QUEUE
        self._submissions += 1
        entry = _JobEntry(structs.replace(job, input=b""), job.input, self._submissions)
        self._jobs[job.id] = entry
        self._queued.setdefault(job.endpoint_id, {})[job.id] = entry
        return entry

    async def take(
        self,
        endpoint_id: str,
        worker_id: str,
        *,
        count: int,
        now_ms: int,
        without: frozenset[str] = frozenset(),
    ) -> Sequence[Job]:
        """See `JobStore.take`."""
        self._check_open()
        waiting = (
            entry
            for entry in self._queued.get(endpoint_id, {}).values()
            if entry.job.expires_ms > now_ms and entry.job.id not in without
        )
        picked = heapq.nsmallest(max(0, count), waiting, key=lambda entry: entry.place)
        event = Taken(worker_id=worker_id, now_ms=now_ms)
        return [structs.replace(self._apply(entry, event).after, input=entry.input) for entry in picked]

    async def apply(self, job_id: str, event: JobEvent) -> Applied:
        """See `JobStore.apply`."""
        self._check_open()
        return self._apply(self._entry(job_id), event)

    async def apply_many(self, events: Sequence[tuple[str, JobEvent]]) -> Sequence[Applied | None]:
        """See `JobStore.apply_many`."""
        self._check_open()
        found = ((self._jobs.get(job_id), event) for job_id, event in events)
        return [None if entry is None else self._apply(entry, event) for entry, event in found]

    def _apply(self, entry: _JobEntry, event: JobEvent) -> Applied:
        batch = self._batches.get(entry.job.batch_id or "")
        cancelled = batch is not None and batch.batch.cancel_ms is not None
        applied = common.apply(entry.job, event, batch_cancelled=cancelled)
        if not applied.changed:
            return applied
        before, after = applied.before, applied.after
        entry.job = after
        queued = self._queued.setdefault(after.endpoint_id, {})
        if after.status is JobStatus.IN_QUEUE:
            queued[after.id] = entry
        else:
            queued.pop(after.id, None)
        if applied.requeued:
            entry.chunks.clear()
            entry.read_to = entry.next_sequence
        if batch is not None:
            batch.batch = _moved(batch.batch, before.status, after.status)
        self._count(applied)
        if applied.finished and after.webhook is not None:
            delivery = common.webhook_delivery(after, entry.input)
            self._webhooks[delivery.id] = delivery
        return applied

    def _count(self, applied: Applied) -> None:
        before, after = applied.before, applied.after
        totals = self._totals.setdefault(after.endpoint_id, _Totals())
        totals.retried += 1 if before.status.terminal else after.retries - before.retries
        if applied.finished:
            totals.completed += after.status is JobStatus.COMPLETED
            totals.failed += after.status in common.FAILURES

    def _entry(self, job_id: str) -> _JobEntry:
        entry = self._jobs.get(job_id)
        if entry is None:
            raise common.job_not_found(job_id)
        return entry

    async def job(self, job_id: str) -> Job:
        """See `JobStore.job`."""
        self._check_open()
        return self._entry(job_id).job

    async def jobs(
        self,
        endpoint_id: str,
        *,
        status: JobStatus | None = None,
        before: tuple[int, str] | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """See `JobStore.jobs`."""
        self._check_open()
        found = (
            entry.job
            for entry in self._jobs.values()
            if entry.job.endpoint_id == endpoint_id
            and status in {None, entry.job.status}
            and (before is None or (entry.job.created_ms, entry.job.id) < before)
        )
        newest = sorted(found, key=lambda job: (job.created_ms, job.id), reverse=True)
        return [structs.replace(job, output=None) for job in newest[: max(0, limit)]]

    # Chunks

    async def append_chunk(
        self, job_id: str, worker_id: str, body: bytes, *, attempt: int | None, now_ms: int, limit_bytes: int
    ) -> ChunkFate:
        """See `JobStore.append_chunk`."""
        self._check_open()
        entry = self._entry(job_id)
        job = entry.job
        if not common.holds(job, worker_id, attempt):
            return ChunkFate.OTHER_ATTEMPT
        unread = sum(len(chunk.body) for chunk in entry.chunks if chunk.sequence >= entry.read_to)
        if unread + len(body) > limit_bytes:
            return ChunkFate.FULL
        entry.job = common.after_chunk(job, now_ms)
        entry.chunks.append(Chunk(sequence=entry.next_sequence, body=body))
        entry.next_sequence += 1
        return ChunkFate.STORED

    async def drain_chunks(
        self, job_id: str, *, limit_bytes: int, cursor: int | None = None
    ) -> tuple[Job, Sequence[Chunk]]:
        """See `JobStore.drain_chunks`."""
        self._check_open()
        entry = self._entry(job_id)
        start = entry.read_to if cursor is None else cursor
        found: list[Chunk] = []
        size = 0
        for chunk in entry.chunks:
            if chunk.sequence < start:
                continue
            size += len(chunk.body)
            if found and size > limit_bytes:
                break
            found.append(chunk)
        if found:
            entry.job = structs.replace(entry.job, chunk_read=True)
            if cursor is None:
                entry.read_to = found[-1].sequence + 1
        return entry.job, found

    async def return_chunks(self, job_id: str, returned: Sequence[Chunk], *, attempt: int) -> None:
        """See `JobStore.return_chunks`."""
        self._check_open()
        entry = self._jobs.get(job_id)
        if entry and entry.job.attempt == attempt and entry.read_to == returned[-1].sequence + 1:
            entry.read_to = returned[0].sequence

    async def has_chunks(self, job_id: str, *, cursor: int | None = None) -> bool:
        """See `JobStore.has_chunks`."""
        self._check_open()
        entry = self._jobs.get(job_id)
        if entry is None or not entry.chunks:
            return False
        return entry.chunks[-1].sequence >= (entry.read_to if cursor is None else cursor)

    async def trim_chunks(self, job_id: str, *, limit: int = 1000) -> int:
        """See `JobStore.trim_chunks`."""
        self._check_open()
        entry = self._jobs.get(job_id)
        if entry is None:
            return 0
        number = min(max(0, limit), sum(chunk.sequence < entry.read_to for chunk in entry.chunks))
        del entry.chunks[:number]
        return number

    # Counts and lists

    async def demand(self, endpoint_id: str, *, overdue_before_ms: int) -> QueueDemand:
        """See `JobStore.demand`."""
        self._check_open()
        queued = [entry.job for entry in self._queued.get(endpoint_id, {}).values()]
        since = [job.queued_ms for job in queued if not job.low_priority]
        return QueueDemand(
            queued=len(since),
            queued_low=len(queued) - len(since),
            queued_bytes=sum(job.input_bytes for job in queued),
            oldest_ms=min(since, default=None),
            overdue=min(common.OVERDUE_COUNT_MAX, sum(moment < overdue_before_ms for moment in since)),
            in_progress=sum(job.endpoint_id == endpoint_id for job in self._running()),
        )

    async def ahead(self, job_id: str) -> int:
        """See `JobStore.ahead`."""
        self._check_open()
        mine = self._entry(job_id)
        if mine.job.status is not JobStatus.IN_QUEUE:
            return 0
        others = self._queued[mine.job.endpoint_id].values()
        return min(common.AHEAD_COUNT_MAX, sum(entry.place < mine.place for entry in others))

    async def counts(self, endpoint_id: str) -> JobCounts:
        """See `JobStore.counts`."""
        self._check_open()
        totals = self._totals.get(endpoint_id, _Totals())
        return JobCounts(
            queued=len(self._queued.get(endpoint_id, {})),
            in_progress=sum(job.endpoint_id == endpoint_id for job in self._running()),
            completed=totals.completed,
            failed=totals.failed,
            retried=totals.retried,
        )

    async def running(self, *, worker_id: str | None = None) -> Sequence[Job]:
        """See `JobStore.running`."""
        self._check_open()
        return [job for job in self._running() if worker_id in {None, job.worker_id}]

    def _running(self) -> Iterable[Job]:
        return (entry.job for entry in self._jobs.values() if entry.job.status is JobStatus.IN_PROGRESS)

    # Ends of jobs

    async def due(self, *, now_ms: int, limit: int = 1000) -> Sequence[Job]:
        """See `JobStore.due`."""
        self._check_open()
        return [entry.job for entry in self._past_deadline(now_ms, limit, terminal=False)]

    async def cancel_all(self, endpoint_id: str, event: JobEvent, *, limit: int = 500) -> Sequence[Applied]:
        """See `JobStore.cancel_all`."""
        self._check_open()
        living = [
            entry
            for entry in self._jobs.values()
            if entry.job.endpoint_id == endpoint_id and not entry.job.status.terminal
        ]
        living.sort(key=lambda entry: (entry.job.created_ms, entry.order))
        return [self._apply(entry, event) for entry in living[: max(0, limit)]]

    async def purge(self, endpoint_id: str, *, now_ms: int) -> int:  # noqa: ARG002 - they end when deleted
        """See `JobStore.purge`."""
        self._check_open()
        gone = self._queued.pop(endpoint_id, {})
        for entry in gone.values():
            self._forget(entry)
            batch = self._batches.get(entry.job.batch_id or "")
            if batch is not None:
                batch.batch = _moved(batch.batch, JobStatus.IN_QUEUE, JobStatus.CANCELLED)
        self._purged.extend(gone.values())
        return len(gone)

    async def delete_purged(self, *, now_ms: int, limit: int = 1000) -> int:
        """See `JobStore.delete_purged`."""
        self._check_open()
        number = min(max(0, limit), len(self._purged))
        for _ in range(number):
            entry = self._purged.popleft()
            if entry.job.webhook is not None:
                ended = common.apply(entry.job, Cancelled(now_ms=now_ms), batch_cancelled=False).after
                delivery = common.webhook_delivery(ended, entry.input)
                self._webhooks[delivery.id] = delivery
        return number

    async def shorten(self, job_id: str, *, now_ms: int, ttl_ms: int) -> None:
        """See `JobStore.shorten`."""
        self._check_open()
        entry = self._entry(job_id)
        entry.job = common.after_shortening(entry.job, now_ms=now_ms, ttl_ms=ttl_ms)

    async def prune_jobs(self, *, now_ms: int, limit: int = 1000) -> int:
        """See `JobStore.prune_jobs`."""
        self._check_open()
        gone = self._past_deadline(now_ms, limit, terminal=True)
        for entry in gone:
            self._forget(entry)
        return len(gone)

    def _forget(self, entry: _JobEntry) -> None:
        del self._jobs[entry.job.id]
        place = entry.idempotency
        # Another job may have it by now.
        if place is not None and self._remembered.get(place, (b"", ""))[1] == entry.job.id:
            del self._remembered[place]

    def _past_deadline(self, now_ms: int, limit: int, *, terminal: bool) -> list[_JobEntry]:
        past = (
            entry
            for entry in self._jobs.values()
            if entry.job.status.terminal is terminal and common.deadline_ms(entry.job) <= now_ms
        )
        return heapq.nsmallest(
            max(0, limit), past, key=lambda entry: (common.deadline_ms(entry.job), entry.order)
        )

    # Batches

    async def add_batch(self, batch: Batch, drafts: Sequence[BatchDraft]) -> None:
        """See `BatchStore.add_batch`."""
        self._check_open()
        if batch.id in self._batches:
            raise common.id_taken("batch", batch.id)
        self._check_new(drafts)
        self._batches[batch.id] = _BatchEntry(_sized(batch, drafts), {draft.id: draft for draft in drafts})

    async def add_batch_requests(self, batch_id: str, drafts: Sequence[BatchDraft]) -> Batch:
        """See `BatchStore.add_batch_requests`."""
        entry = self._draft(batch_id)
        self._check_new(drafts)
        entry.drafts |= {draft.id: draft for draft in drafts}
        return self._resized(entry)

    async def remove_batch_request(self, batch_id: str, request_id: str) -> Batch:
        """See `BatchStore.remove_batch_request`."""
        entry = self._draft(batch_id)
        if entry.drafts.pop(request_id, None) is None:
            raise common.request_not_found(request_id)
        return self._resized(entry)

    async def rename_batch(self, batch_id: str, name: str) -> Batch:
        """See `BatchStore.rename_batch`."""
        entry = self._draft(batch_id)
        entry.batch = replace(entry.batch, name=name)
        return entry.batch

    async def finalize_batch(self, batch_id: str, template: Job) -> Batch:
        """See `BatchStore.finalize_batch`."""
        entry = self._draft(batch_id)
        for draft_id in entry.drafts:
            if draft_id in self._jobs:
                raise common.id_taken("job", draft_id)
        for draft in entry.drafts.values():
            job = structs.replace(template, id=draft.id, input=draft.input, input_bytes=len(draft.input))
            self._add(structs.replace(job, batch_id=batch_id))
        entry.drafts = {}
        entry.batch = replace(entry.batch, finalized_ms=template.created_ms, queued=entry.batch.total)
        return entry.batch

    async def cancel_batch(self, batch_id: str, *, now_ms: int) -> tuple[Batch, Sequence[Applied]]:
        """See `BatchStore.cancel_batch`."""
        entry = self._batch(batch_id)
        if not entry.batch.active or entry.batch.cancel_ms is not None:
            return entry.batch, []
        queued = [job for job in self._jobs_of(batch_id) if job.job.status is JobStatus.IN_QUEUE]
        ended = [self._apply(job, Cancelled(now_ms=now_ms)) for job in queued]
        entry.batch = replace(entry.batch, cancel_ms=now_ms)
        return entry.batch, ended

    async def batch(self, batch_id: str) -> Batch:
        """See `BatchStore.batch`."""
        return self._batch(batch_id).batch

    async def batches(self, endpoint_id: str, *, limit: int = 1000) -> Sequence[Batch]:
        """See `BatchStore.batches`."""
        self._check_open()
        latest = (entry.batch for entry in reversed(self._batches.values()))
        found = [batch for batch in latest if batch.endpoint_id == endpoint_id]
        return sorted(found, key=lambda batch: -batch.created_ms)[: max(0, limit)]

    async def batch_requests(self, batch_id: str, *, offset: int, limit: int) -> Sequence[Job | BatchDraft]:
        """See `BatchStore.batch_requests`."""
        entry = self._batch(batch_id)
        requests: list[Job | BatchDraft] = [*entry.drafts.values()]
        requests += [job.job for job in self._jobs_of(batch_id)]
        start = max(0, offset)
        return requests[start : start + max(0, limit)]

    async def prune_batches(self, *, ended_before_ms: int, limit: int = 100) -> int:
        """See `BatchStore.prune_batches`."""
        self._check_open()
        alive = {entry.job.batch_id for entry in self._jobs.values()}
        old = [
            batch_id
            for batch_id, entry in self._batches.items()
            if entry.batch.created_ms < ended_before_ms and not entry.batch.active and batch_id not in alive
        ]
        orphans = [
            batch_id
            for batch_id, entry in self._batches.items()
            if entry.batch.status is BatchStatus.DRAFT and self._deleted(entry.batch.endpoint_id)
        ]
        for batch_id in orphans:
            self._batches[batch_id].drafts.clear()
        old += orphans
        for batch_id in old[: max(0, limit)]:
            del self._batches[batch_id]
        return len(old[: max(0, limit)])

    def _batch(self, batch_id: str) -> _BatchEntry:
        self._check_open()
        entry = self._batches.get(batch_id)
        if entry is None:
            raise common.batch_not_found(batch_id)
        return entry

    def _draft(self, batch_id: str) -> _BatchEntry:
        entry = self._batch(batch_id)
        common.check_draft(entry.batch)
        return entry

    def _check_new(self, drafts: Sequence[BatchDraft]) -> None:
        taken = {draft_id for entry in self._batches.values() for draft_id in entry.drafts}
        for draft in drafts:
            if draft.id in taken or draft.id in self._jobs:
                raise common.id_taken("batch request", draft.id)
            taken.add(draft.id)

    def _jobs_of(self, batch_id: str) -> list[_JobEntry]:
        return [entry for entry in self._jobs.values() if entry.job.batch_id == batch_id]

    @staticmethod
    def _resized(entry: _BatchEntry) -> Batch:
        entry.batch = _sized(entry.batch, entry.drafts.values())
        return entry.batch


def _moved(batch: Batch, before: JobStatus, after: JobStatus) -> Batch:
    """A batch after one of its requests went from one state to another."""
    source, target = common.batch_counter(before), common.batch_counter(after)
    less = replace(batch, **{source: getattr(batch, source) - 1})
    return replace(less, **{target: getattr(less, target) + 1})


def _sized(batch: Batch, drafts: Iterable[BatchDraft]) -> Batch:
    sizes = [len(draft.input) for draft in drafts]
    return replace(batch, total=len(sizes), input_bytes=sum(sizes))
