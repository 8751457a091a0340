"""The in-memory twin of the stores: the same contract in plain dictionaries, nothing on disk.

Used by tests, by the simulator, and as the readable statement of what the SQL of the others must do.
No method awaits anything, so each is atomic on the event loop and cannot be cancelled half-way. The
counters of the queue are counted from the jobs themselves, as a check on stores that keep them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pilotlight.core import lifecycle
from pilotlight.core.lifecycle import Applied, JobEvent, Taken
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.job import Job, JobCounts, JobStatus, QueueDemand
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import RequestRecord, StartRecord, UsageInterval
from pilotlight.domain.worker import Worker
from pilotlight.errors import StoreError
from pilotlight.ports.store import Chunk
from pilotlight.stores import common


@dataclass(slots=True)
class _JobEntry:
    """A job with what the store keeps beside it: `order` is the number of the submission."""

    job: Job
    order: int
    chunks: list[Chunk] = field(default_factory=list)
    next_sequence: int = 0


@dataclass(slots=True)
class _Totals:
    completed: int = 0
    failed: int = 0
    retried: int = 0


class MemoryStore:
    """A `Store` that forgets everything with the process."""

    def __init__(self) -> None:
        self._closed = False
        self._endpoints: dict[str, Endpoint] = {}
        self._revisions: dict[str, list[Revision]] = {}
        self._keys: dict[str, ApiKey] = {}
        self._workers: dict[str, Worker] = {}
        self._jobs: dict[str, _JobEntry] = {}
        self._queued: dict[str, dict[str, _JobEntry]] = {}
        self._totals: dict[str, _Totals] = {}
        self._submissions = 0
        self._usage: dict[tuple[str, int], UsageInterval] = {}
        self._requests: dict[str, RequestRecord] = {}
        self._starts: dict[str, StartRecord] = {}

    async def close(self) -> None:
        """Refuse everything from now on; idempotent."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed")

    # Endpoints

    async def add_endpoint(self, endpoint: Endpoint) -> None:
        """See `EndpointStore.add_endpoint`."""
        self._check_open()
        if endpoint.id in self._revisions:
            raise common.id_taken("endpoint", endpoint.id)
        self._check_name(endpoint)
        self._endpoints[endpoint.id] = endpoint
        self._revisions[endpoint.id] = [endpoint.revision]

    async def update_endpoint(self, endpoint: Endpoint) -> None:
        """See `EndpointStore.update_endpoint`."""
        self._check_open()
        stored = self._endpoints.get(endpoint.id)
        if stored is None:
            raise common.endpoint_not_found(endpoint.id)
        self._check_name(endpoint)
        current, revision = stored.revision, endpoint.revision
        if revision.version == current.version + 1:
            self._revisions[endpoint.id].append(revision)
        elif revision != current:
            raise common.wrong_version(endpoint.id, revision.version, current.version)
        self._endpoints[endpoint.id] = endpoint

    def _check_name(self, endpoint: Endpoint) -> None:
        if any(other.name == endpoint.name and other.id != endpoint.id for other in self._endpoints.values()):
            raise common.name_taken(endpoint.name)

    async def delete_endpoint(self, endpoint_id: str, *, now_ms: int) -> None:  # noqa: ARG002 - kept by SQL stores
        """See `EndpointStore.delete_endpoint`."""
        self._check_open()
        if self._endpoints.pop(endpoint_id, None) is None:
            raise common.endpoint_not_found(endpoint_id)

    async def endpoints(self) -> Sequence[Endpoint]:
        """See `EndpointStore.endpoints`."""
        self._check_open()
        return sorted(self._endpoints.values(), key=lambda endpoint: endpoint.created_ms)

    async def revisions(self, endpoint_id: str) -> Sequence[Revision]:
        """See `EndpointStore.revisions`."""
        self._check_open()
        return list(reversed(self._revisions.get(endpoint_id, [])))

    # Keys

    async def add_key(self, key: ApiKey) -> None:
        """See `KeyStore.add_key`."""
        self._check_open()
        if key.id in self._keys or any(other.hash == key.hash for other in self._keys.values()):
            raise common.id_taken("API key", key.id)
        self._keys[key.id] = key

    async def delete_key(self, key_id: str) -> None:
        """See `KeyStore.delete_key`."""
        self._check_open()
        if self._keys.pop(key_id, None) is None:
            raise common.key_not_found(key_id)

    async def keys(self) -> Sequence[ApiKey]:
        """See `KeyStore.keys`."""
        self._check_open()
        return sorted(self._keys.values(), key=lambda key: key.created_ms)

    # Workers

    async def put_worker(self, worker: Worker) -> None:
        """See `WorkerStore.put_worker`."""
        self._check_open()
        self._workers[worker.id] = worker

    async def workers(self, *, endpoint_id: str | None = None, living: bool = True) -> Sequence[Worker]:
        """See `WorkerStore.workers`."""
        self._check_open()
        found = (
            worker
            for worker in self._workers.values()
            if endpoint_id in {None, worker.endpoint_id} and not (living and worker.state.ended)
        )
        return sorted(found, key=lambda worker: worker.created_ms)

    async def prune_workers(self, *, ended_before_ms: int) -> int:
        """See `WorkerStore.prune_workers`."""
        self._check_open()
        old = [
            worker.id
            for worker in self._workers.values()
            if worker.ended_ms is not None and worker.ended_ms < ended_before_ms
        ]
        for worker_id in old:
            del self._workers[worker_id]
        return len(old)

    # Jobs

    async def submit(self, job: Job) -> None:
        """See `JobStore.submit`."""
        self._check_open()
        assert job.status is JobStatus.IN_QUEUE
        if job.id in self._jobs:
            raise common.id_taken("job", job.id)
        self._submissions += 1
        entry = _JobEntry(job, self._submissions)
        self._jobs[job.id] = entry
        self._queued.setdefault(job.endpoint_id, {})[job.id] = entry

    async def take(self, endpoint_id: str, worker_id: str, *, count: int, now_ms: int) -> Sequence[Job]:
        """See `JobStore.take`."""
        self._check_open()
        waiting = (
            entry for entry in self._queued.get(endpoint_id, {}).values() if entry.job.expires_ms > now_ms
        )
        picked = heapq.nsmallest(
            max(0, count),
            waiting,
            key=lambda entry: (common.rank(entry.job), entry.job.queued_ms, entry.order),
        )
        event = Taken(worker_id=worker_id, now_ms=now_ms)
        return [self._apply(entry, event).after for entry in picked]

    async def apply(self, job_id: str, event: JobEvent) -> Applied:
        """See `JobStore.apply`."""
        self._check_open()
        return self._apply(self._entry(job_id), event)

    def _apply(self, entry: _JobEntry, event: JobEvent) -> Applied:
        applied = lifecycle.apply(entry.job, event)
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
        totals = self._totals.setdefault(after.endpoint_id, _Totals())
        totals.retried += after.retries - before.retries
        if applied.finished:
            totals.completed += after.status is JobStatus.COMPLETED
            totals.failed += after.status in common.FAILURES
        return applied

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
        return sorted(found, key=lambda job: (job.created_ms, job.id), reverse=True)[: max(0, limit)]

    async def append_chunk(self, job_id: str, worker_id: str, body: bytes) -> bool:
        """See `JobStore.append_chunk`."""
        self._check_open()
        entry = self._entry(job_id)
        if not common.holds(entry.job, worker_id):
            return False
        entry.job = replace(entry.job, confirmed=True)
        entry.chunks.append(Chunk(sequence=entry.next_sequence, body=body))
        entry.next_sequence += 1
        return True

    async def drain_chunks(self, job_id: str, *, limit_bytes: int) -> tuple[Job, Sequence[Chunk]]:
        """See `JobStore.drain_chunks`."""
        self._check_open()
        entry = self._entry(job_id)
        size, number = 0, 0
        for chunk in entry.chunks:
            size += len(chunk.body)
            if number and size > limit_bytes:
                break
            number += 1
        drained, entry.chunks = entry.chunks[:number], entry.chunks[number:]
        if drained:
            entry.job = replace(entry.job, chunk_read=True)
        return entry.job, drained

    async def has_chunks(self, job_id: str) -> bool:
        """See `JobStore.has_chunks`."""
        self._check_open()
        entry = self._jobs.get(job_id)
        return entry is not None and bool(entry.chunks)

    async def demand(self, endpoint_id: str, *, overdue_before_ms: int) -> QueueDemand:
        """See `JobStore.demand`."""
        self._check_open()
        queued = [entry.job for entry in self._queued.get(endpoint_id, {}).values()]
        since = [job.queued_ms for job in queued if not job.low_priority]
        return QueueDemand(
            queued=len(since),
            queued_low=len(queued) - len(since),
            oldest_ms=min(since, default=None),
            overdue=min(common.OVERDUE_COUNT_MAX, sum(moment < overdue_before_ms for moment in since)),
            in_progress=sum(job.endpoint_id == endpoint_id for job in self._running()),
        )

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

    async def due(self, *, now_ms: int, limit: int = 1000) -> Sequence[Job]:
        """See `JobStore.due`."""
        self._check_open()
        return [entry.job for entry in self._past_deadline(now_ms, limit, terminal=False)]

    async def cancel_all(self, endpoint_id: str, event: JobEvent) -> Sequence[Applied]:
        """See `JobStore.cancel_all`."""
        self._check_open()
        living = [
            entry
            for entry in self._jobs.values()
            if entry.job.endpoint_id == endpoint_id and not entry.job.status.terminal
        ]
        return [self._apply(entry, event) for entry in living]

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
            del self._jobs[entry.job.id]
        return len(gone)

    def _past_deadline(self, now_ms: int, limit: int, *, terminal: bool) -> list[_JobEntry]:
        past = (
            entry
            for entry in self._jobs.values()
            if entry.job.status.terminal is terminal and common.deadline_ms(entry.job) <= now_ms
        )
        return heapq.nsmallest(
            max(0, limit), past, key=lambda entry: (common.deadline_ms(entry.job), entry.order)
        )

    # Usage, requests, starts

    async def add_usage(self, intervals: Sequence[UsageInterval]) -> None:
        """See `UsageStore.add_usage`."""
        self._check_open()
        for interval in intervals:
            self._usage.setdefault((interval.worker_id, interval.sequence), interval)

    async def usage(
        self, *, endpoint_id: str | None = None, worker_id: str | None = None, since_ms: int = 0
    ) -> Sequence[UsageInterval]:
        """See `UsageStore.usage`."""
        self._check_open()
        found = (
            interval
            for interval in self._usage.values()
            if endpoint_id in {None, interval.endpoint_id}
            and worker_id in {None, interval.worker_id}
            and interval.end_ms > since_ms
        )
        return sorted(found, key=lambda interval: (interval.start_ms, interval.worker_id, interval.sequence))

    async def add_requests(self, records: Sequence[RequestRecord]) -> None:
        """See `RequestLog.add_requests`."""
        self._check_open()
        for record in records:
            self._requests.setdefault(record.id, record)

    async def requests(self, *, endpoint_id: str | None = None, limit: int = 100) -> Sequence[RequestRecord]:
        """See `RequestLog.requests`."""
        self._check_open()
        found = [record for record in self._newest_requests() if endpoint_id in {None, record.endpoint_id}]
        return found[: max(0, limit)]

    async def prune_requests(self, *, keep: int) -> int:
        """See `RequestLog.prune_requests`."""
        self._check_open()
        old = self._newest_requests()[max(0, keep) :]
        for record in old:
            del self._requests[record.id]
        return len(old)

    def _newest_requests(self) -> list[RequestRecord]:
        # Stored later is newer, where two arrived in one millisecond.
        latest_first = reversed(self._requests.values())
        return sorted(latest_first, key=lambda record: -record.arrival_ms)

    async def put_start(self, record: StartRecord) -> None:
        """See `StartLog.put_start`."""
        self._check_open()
        self._starts[record.worker_id] = record
        if len(self._starts) > common.STARTS_KEPT:
            del self._starts[next(iter(self._starts))]

    async def starts(self, *, endpoint_id: str | None = None, limit: int = 50) -> Sequence[StartRecord]:
        """See `StartLog.starts`."""
        self._check_open()
        found = [
            record for record in reversed(self._starts.values()) if endpoint_id in {None, record.endpoint_id}
        ]
        found.sort(key=_decided_ms, reverse=True)
        return found[: max(0, limit)]


def _decided_ms(record: StartRecord) -> int:
    return record.stages[0][1] if record.stages else 0
