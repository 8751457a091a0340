"""What is remembered: endpoints, keys, workers, jobs, usage, requests, starts.

All methods may raise `StoreError` (disk full, database gone); then nothing of the call was done.
A write has reached the disk when its method returns, and every later read sees it. A call whose
caller is cancelled has happened completely or not at all. Every implementation passes the suite in
`tests/contract`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pilotlight.core.lifecycle import Applied, JobEvent
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.job import Job, JobCounts, JobStatus, QueueDemand
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import RequestRecord, StartRecord, UsageInterval
from pilotlight.domain.worker import Worker


class EndpointStore(Protocol):
    """Endpoints and their revisions."""

    async def add_endpoint(self, endpoint: Endpoint) -> None:
        """Store a new endpoint and its first revision.

        Raises:
            ConflictError: A living endpoint has that name, or the id was used before.
        """
        ...

    async def update_endpoint(self, endpoint: Endpoint) -> None:
        """Replace an endpoint's settings; a revision with a new version is added, never changed.

        Raises:
            NotFoundError: No living endpoint has that id.
            ConflictError: Another living endpoint has that name, the version is not current or current + 1,
                or the revision differs from the current one under the same version.
        """
        ...

    async def delete_endpoint(self, endpoint_id: str, *, now_ms: int) -> None:
        """Mark as deleted; its name becomes free, its id never does. NotFoundError when not living."""
        ...

    async def endpoints(self) -> Sequence[Endpoint]:
        """All living endpoints, oldest first."""
        ...

    async def revisions(self, endpoint_id: str) -> Sequence[Revision]:
        """All revisions of an endpoint, living or deleted, newest first; empty when unknown."""
        ...


class KeyStore(Protocol):
    """API keys, by hash."""

    async def add_key(self, key: ApiKey) -> None:
        """Store a new key. ConflictError when the id or hash exists."""
        ...

    async def delete_key(self, key_id: str) -> None:
        """Forget a key. NotFoundError when unknown."""
        ...

    async def keys(self) -> Sequence[ApiKey]:
        """All keys, oldest first."""
        ...


class WorkerStore(Protocol):
    """Workers, living and (for a bounded time) ended ones."""

    async def put_worker(self, worker: Worker) -> None:
        """Insert or replace one worker's record."""
        ...

    async def workers(self, *, endpoint_id: str | None = None, living: bool = True) -> Sequence[Worker]:
        """Workers oldest first: living ones, or (living=False) also those ended."""
        ...

    async def prune_workers(self, *, ended_before_ms: int) -> int:
        """Forget workers that ended earlier than that; returns how many."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One streamed value of a job: raw JSON of the object the worker posted (`{"output": …}`)."""

    sequence: int
    body: bytes


class JobStore(Protocol):
    """The queue. State changes go through `core.lifecycle.apply`, inside the store's own exclusion."""

    async def submit(self, job: Job) -> None:
        """Store a new job in IN_QUEUE. ConflictError when the id exists."""
        ...

    async def take(self, endpoint_id: str, worker_id: str, *, count: int, now_ms: int) -> Sequence[Job]:
        """Hand out up to `count` jobs, FIFO by `queued_ms`, normal before low priority, none expired.

        A retried job (`retries > 0` or attempt > 0) goes to the head of its class
        (serverless-api.md §12 item 34). When the caller is cancelled meanwhile, jobs already picked go
        back to the queue as by `PlatformInterrupted`.
        """
        ...

    async def apply(self, job_id: str, event: JobEvent) -> Applied:
        """Apply one event and return before, after and effect.

        When the job goes back to the queue or becomes CANCELLED, chunks of the ended attempt that
        nobody has read are dropped for a requeue and kept for a cancellation.

        Raises:
            NotFoundError: Unknown or expired job.
        """
        ...

    async def job(self, job_id: str) -> Job:
        """One job. NotFoundError when unknown or pruned."""
        ...

    async def jobs(
        self,
        endpoint_id: str,
        *,
        status: JobStatus | None = None,
        before: tuple[int, str] | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """Jobs newest first, by (created_ms, id), strictly before the given position."""
        ...

    async def append_chunk(self, job_id: str, worker_id: str, body: bytes) -> bool:
        """Add a stream chunk of the running attempt; False (and nothing stored) for another attempt.

        Also marks the job confirmed. NotFoundError when unknown.
        """
        ...

    async def drain_chunks(self, job_id: str, *, limit_bytes: int) -> tuple[Job, Sequence[Chunk]]:
        """Take chunks not returned before, in order, up to about `limit_bytes` (at least one).

        Destructive: a chunk is returned once. Returning any sets `chunk_read`. The job is the state
        in the same moment, so a terminal status with an empty list means the stream is complete.
        """
        ...

    async def has_chunks(self, job_id: str) -> bool:
        """Whether chunks wait for a reader."""
        ...

    async def demand(self, endpoint_id: str, *, overdue_before_ms: int) -> QueueDemand:
        """The queue as the scaler sees it; jobs queued earlier than `overdue_before_ms` are overdue.

        Overdue ones are counted up to 10,000, so that a long queue costs no more than a short one. Jobs
        past their time to live count until an event ends them.
        """
        ...

    async def counts(self, endpoint_id: str) -> JobCounts:
        """The counters of `/health`; completed, failed and retried survive pruning.

        Failed are FAILED and TIMED_OUT; retried is the number of re-dispatches that used up a retry.
        """
        ...

    async def running(self, *, worker_id: str | None = None) -> Sequence[Job]:
        """Jobs IN_PROGRESS, of one worker or of all, in the order of their submission."""
        ...

    async def due(self, *, now_ms: int, limit: int = 1000) -> Sequence[Job]:
        """Non-terminal jobs whose ttl or execution timeout has passed, the longest overdue first."""
        ...

    async def cancel_all(self, endpoint_id: str, event: JobEvent) -> Sequence[Applied]:
        """Apply an event to every non-terminal job of an endpoint (its deletion).

        Jobs are ended slice by slice, so that other callers get their turn; after a `StoreError` some may
        have ended and calling again ends the rest.
        """
        ...

    async def shorten(self, job_id: str, *, now_ms: int, ttl_ms: int) -> None:
        """Let the record live at most `ttl_ms` from now; never longer than before (serverless-api.md §2.6).

        Shortens the time to live of a living job and the retention of an ended one.
        """
        ...

    async def prune_jobs(self, *, now_ms: int, limit: int = 1000) -> int:
        """Delete terminal jobs past their retention, with their chunks; returns how many."""
        ...


class UsageStore(Protocol):
    """Append-only usage intervals."""

    async def add_usage(self, intervals: Sequence[UsageInterval]) -> None:
        """Append; an interval whose (worker_id, sequence) exists is skipped."""
        ...

    async def usage(
        self, *, endpoint_id: str | None = None, worker_id: str | None = None, since_ms: int = 0
    ) -> Sequence[UsageInterval]:
        """Intervals that end after `since_ms`, by (start_ms, worker_id, sequence)."""
        ...


class RequestLog(Protocol):
    """One row per request, bounded."""

    async def add_requests(self, records: Sequence[RequestRecord]) -> None:
        """Append a batch; a record whose id exists is skipped."""
        ...

    async def requests(self, *, endpoint_id: str | None = None, limit: int = 100) -> Sequence[RequestRecord]:
        """Newest first by arrival."""
        ...

    async def prune_requests(self, *, keep: int) -> int:
        """Delete the oldest beyond `keep` rows; returns how many."""
        ...


class StartLog(Protocol):
    """Every start of a worker with its stages."""

    async def put_start(self, record: StartRecord) -> None:
        """Insert or replace the record of one worker; the newest 10,000 are kept."""
        ...

    async def starts(self, *, endpoint_id: str | None = None, limit: int = 50) -> Sequence[StartRecord]:
        """Newest first by the moment of the first stage."""
        ...


class Store(EndpointStore, KeyStore, WorkerStore, JobStore, UsageStore, RequestLog, StartLog, Protocol):
    """Everything one installation remembers; opened once, by `bootstrap`."""

    async def close(self) -> None:
        """Finish what was accepted and release everything; idempotent."""
        ...
