"""What is remembered: endpoints, keys, workers, jobs, batches, webhooks, usage, requests, starts.

All methods may raise `StoreError` (disk full, database gone); then nothing of the call was done.
A write has reached the disk when its method returns, and every later read sees it. A call whose
caller is cancelled has happened completely or not at all. Every implementation passes the suite in
`tests/contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec

from pilotlight.core.lifecycle import Applied, JobEvent
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.job import Idempotency, Job, JobCounts, JobStatus, QueueDemand
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import RequestRecord, StartRecord, UsageInterval
from pilotlight.domain.webhook import WebhookDelivery
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

    async def update_key(self, key: ApiKey) -> None:
        """Replace a key's name, heartbeats, priority and limits. NotFoundError when unknown."""
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

    async def worker(self, worker_id: str) -> Worker | None:
        """One worker, living or ended; None when unknown."""
        ...

    async def workers(self, *, endpoint_id: str | None = None, living: bool = True) -> Sequence[Worker]:
        """Workers oldest first: living ones, or (living=False) also those ended."""
        ...

    async def prune_workers(self, *, ended_before_ms: int) -> int:
        """Forget workers that ended earlier than that; returns how many."""
        ...


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One streamed value of a job: raw JSON of the object the worker posted (`{"output": …}`)."""

    sequence: int
    body: bytes


class ChunkFate(StrEnum):
    """What became of a posted stream chunk."""

    STORED = "stored"
    OTHER_ATTEMPT = "other_attempt"
    FULL = "full"


class JobStore(Protocol):
    """The queue. State changes go through `core.lifecycle.apply`, inside the store's own exclusion.

    A change by which a job with a webhook becomes terminal stores a `WebhookDelivery` with it
    (`core.job_object.webhook_body`; due at once), in the same transaction.
    """

    async def submit(
        self,
        job: Job,
        *,
        idempotency: Idempotency | None = None,
        announce: Callable[[], None] | None = None,
    ) -> Job:
        """Store a new job in IN_QUEUE and return it, or return the job of an earlier, equal submission.

        Args:
            job: The job, with its input.
            idempotency: Remembered for as long as the job's record lives, until the end of its retention;
                means something together with the endpoint and the API key of the job.
            announce: Called once, on the event loop, as soon as a `take` that is called from then on will
                find the job. That may be before it is durable, as long as such a take returns no earlier;
                for a repetition it may be left out.

        Raises:
            ConflictError: The id exists, or the idempotency key was used with another fingerprint.
        """
        ...

    async def earlier(self, job: Job, idempotency: Idempotency) -> Job | None:
        """The job that `submit` would return instead of storing this one; None when it would store it.

        Raises:
            ConflictError: The idempotency key was used with another fingerprint.
        """
        ...

    async def take(
        self,
        endpoint_id: str,
        worker_id: str,
        *,
        count: int,
        now_ms: int,
        without: frozenset[str] = frozenset(),
    ) -> Sequence[Job]:
        """Hand out up to `count` jobs with their inputs, lane by lane (`Job.lane`), none expired.

        Within a lane those handed out before come first, by `queued_ms`, then the others in the order of
        their submission, whatever the clock said (serverless-api.md §12 item 34). Jobs of the ids in
        `without` are passed by.
        When the caller is cancelled meanwhile, jobs already picked go back to the queue as by
        `PlatformInterrupted`.
        """
        ...

    async def apply(self, job_id: str, event: JobEvent) -> Applied:
        """Apply one event and return before, after and effect; neither job has its input.

        When the job goes back to the queue its chunks are dropped; when it becomes CANCELLED they stay. A
        request of a cancelled batch that would go back to the queue is cancelled instead.

        Raises:
            NotFoundError: Unknown, pruned or purged job.
        """
        ...

    async def apply_many(self, events: Sequence[tuple[str, JobEvent]]) -> Sequence[Applied | None]:
        """Apply events to several jobs in one go, in order; None for a job that is not known."""
        ...

    async def job(self, job_id: str) -> Job:
        """One job without its input. NotFoundError when unknown, pruned or purged."""
        ...

    def job_at_hand(self, job_id: str) -> Job | None:
        """The same, for a job that is in memory; None for any other, whether it exists or not."""
        ...

    async def jobs(
        self,
        endpoint_id: str,
        *,
        status: JobStatus | None = None,
        before: tuple[int, str] | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """Jobs newest first, by (created_ms, id), strictly before the given position.

        Without inputs and outputs.
        """
        ...

    async def append_chunk(
        self, job_id: str, worker_id: str, body: bytes, *, attempt: int | None, now_ms: int, limit_bytes: int
    ) -> ChunkFate:
        """Add a stream chunk of the running attempt; nothing is stored unless the answer is STORED.

        Also confirms the job, and marks its first output. FULL when the chunks of the job that nobody has
        read would exceed `limit_bytes`. NotFoundError when unknown.
        """
        ...

    async def drain_chunks(
        self, job_id: str, *, limit_bytes: int, cursor: int | None = None
    ) -> tuple[Job, Sequence[Chunk]]:
        """Chunks not returned before, in order, up to about `limit_bytes` (at least one).

        Each is returned once: the last one returned is remembered, and returning any sets `chunk_read`. With
        a `cursor` the chunks from that sequence on are read instead, but for those that were trimmed, and
        nothing is remembered but `chunk_read`. The job (without its input) is the state in the same moment,
        so a terminal status with an empty list means the stream is complete.
        """
        ...

    async def return_chunks(self, job_id: str, returned: Sequence[Chunk], *, attempt: int) -> None:
        """Take chunks back that were drained for a reader who has gone: the next drain returns them again.

        Nothing happens when others have drained more meanwhile, when the attempt is over, or when the job is
        unknown; those that were trimmed stay gone.

        Args:
            job_id: Of which job.
            returned: All that one drain returned; not empty.
            attempt: Of the job that came with them.
        """
        ...

    async def has_chunks(self, job_id: str, *, cursor: int | None = None) -> bool:
        """Whether there are chunks not returned before, or any from `cursor` on."""
        ...

    async def trim_chunks(self, job_id: str, *, limit: int = 1000) -> int:
        """Forget up to `limit` chunks that were returned before, the oldest first; returns how many."""
        ...

    async def demand(self, endpoint_id: str, *, overdue_before_ms: int) -> QueueDemand:
        """The queue as the scaler sees it; jobs queued earlier than `overdue_before_ms` are overdue.

        Overdue ones are counted up to 10,000, and not much more than that are looked at, so that a long queue
        costs no more than a short one. Jobs
        past their time to live count until an event ends them; purged ones do not.
        """
        ...

    async def ahead(self, job_id: str) -> int:
        """How many jobs of its endpoint are to be served before a queued one, counted up to 10,000.

        0 for a job that is not queued. NotFoundError when unknown.
        """
        ...

    async def counts(self, endpoint_id: str) -> JobCounts:
        """The counters of `/health`; completed, failed and retried survive pruning.

        Failed are FAILED and TIMED_OUT; retried is the number of re-dispatches that used up a retry, plus
        the retries that clients asked for.
        """
        ...

    async def running(self, *, worker_id: str | None = None) -> Sequence[Job]:
        """Jobs IN_PROGRESS without inputs, of one worker or of all, in the order of their submission."""
        ...

    async def due(self, *, now_ms: int, limit: int = 1000) -> Sequence[Job]:
        """Living jobs without inputs whose ttl or execution timeout has passed, the longest overdue first."""
        ...

    async def cancel_all(self, endpoint_id: str, event: JobEvent, *, limit: int = 500) -> Sequence[Applied]:
        """Apply an event to up to `limit` living jobs of an endpoint (its deletion), oldest first.

        Call it until it returns nothing.
        """
        ...

    async def purge(self, endpoint_id: str, *, now_ms: int) -> int:
        """Remove all queued jobs of an endpoint and return how many (serverless-api.md §2.15).

        From its return on they are unknown to every call, however many they are; `delete_purged` frees their
        space. Jobs submitted or queued again later are not concerned.
        """
        ...

    async def delete_purged(self, *, now_ms: int, limit: int = 1000) -> int:
        """Delete purged jobs, leaving CANCELLED webhooks behind; returns how many, 0 when none are left."""
        ...

    async def shorten(self, job_id: str, *, now_ms: int, ttl_ms: int) -> None:
        """Let the record live at most `ttl_ms` from now; never longer than before (serverless-api.md §2.6).

        Shortens the time to live of a living job and the retention of an ended one.
        """
        ...

    async def prune_jobs(self, *, now_ms: int, limit: int = 1000) -> int:
        """Delete terminal jobs past their retention, with their chunks; returns how many."""
        ...


class BatchStore(Protocol):
    """Batches (serverless-api.md §2.16). Their requests are jobs from `finalize_batch` on."""

    async def add_batch(self, batch: Batch, drafts: Sequence[BatchDraft]) -> None:
        """Store a new draft with its first requests. ConflictError when an id exists."""
        ...

    async def add_batch_requests(self, batch_id: str, drafts: Sequence[BatchDraft]) -> Batch:
        """Append requests to a draft; returns the batch after it.

        Raises:
            NotFoundError: Unknown batch.
            ConflictError: Not a draft, or an id exists.
        """
        ...

    async def remove_batch_request(self, batch_id: str, request_id: str) -> Batch:
        """Take a request out of a draft. NotFoundError when unknown, ConflictError when not a draft."""
        ...

    async def rename_batch(self, batch_id: str, name: str) -> Batch:
        """Give it another name. NotFoundError when unknown, ConflictError when not a draft."""
        ...

    async def finalize_batch(self, batch_id: str, template: Job) -> Batch:
        """Queue the requests of a draft as jobs, in their order, all or none.

        Args:
            batch_id: Which.
            template: The job each becomes, but for `id`, `input` and `input_bytes`; its `created_ms` is the
                moment.

        Raises:
            NotFoundError: Unknown batch.
            ConflictError: Not a draft.
        """
        ...

    async def cancel_batch(self, batch_id: str, *, now_ms: int) -> tuple[Batch, Sequence[Applied]]:
        """Cancel its queued requests for good; running ones finish. Drafts and ended ones are legal, too.

        Returns the batch and what became of the requests that were queued.
        """
        ...

    async def batch(self, batch_id: str) -> Batch:
        """One batch. NotFoundError when unknown or pruned."""
        ...

    async def batches(self, endpoint_id: str, *, limit: int = 1000) -> Sequence[Batch]:
        """Batches of an endpoint, newest first."""
        ...

    async def batch_requests(self, batch_id: str, *, offset: int, limit: int) -> Sequence[Job | BatchDraft]:
        """A page of its requests in their order: drafts, or jobs without inputs but with outputs."""
        ...

    async def prune_batches(self, *, ended_before_ms: int, limit: int = 100) -> int:
        """Forget batches that are not active and none of whose jobs is left, created before that moment.

        Besides, whatever their age, drafts of deleted endpoints: they lose up to `limit` requests per call,
        and are forgotten once they have none.
        """
        ...


class WebhookStore(Protocol):
    """Webhook deliveries: due ones, and dead letters."""

    async def due_webhooks(
        self,
        *,
        now_ms: int,
        limit: int = 100,
        skip_ids: Collection[str] = (),
        skip_hosts: Collection[str] = (),
    ) -> Sequence[WebhookDelivery]:
        """Deliveries whose next try is due, the longest due first.

        Args:
            now_ms: The moment.
            limit: How many at most.
            skip_ids: Deliveries left out: those under way.
            skip_hosts: Hosts (`WebhookDelivery.host`) left out: those that have enough under way.
        """
        ...

    async def next_webhook_ms(self) -> int | None:
        """When the next try of any delivery is due; None when there is none."""
        ...

    async def put_webhook(self, delivery: WebhookDelivery) -> None:
        """Replace a delivery; `next_ms` None makes it a dead letter, of which the newest 1,000 are kept."""
        ...

    async def delete_webhook(self, delivery_id: str) -> None:
        """Forget a delivery; nothing happens when it is unknown."""
        ...

    async def webhook(self, delivery_id: str) -> WebhookDelivery:
        """One delivery. NotFoundError when unknown."""
        ...

    async def dead_webhooks(
        self, *, endpoint_id: str | None = None, limit: int = 100
    ) -> Sequence[WebhookDelivery]:
        """Dead letters, newest first by `created_ms`, without bodies; `size` says how large they are."""
        ...

    async def trim_webhooks(self, *, host_bytes: int, all_bytes: int, before_ms: int) -> int:
        """Give up the oldest deliveries: they become dead letters whose body is empty.

        What waits and what is dead count apart, each against both bounds.

        Args:
            host_bytes: Bytes of bodies kept for one host.
            all_bytes: Bytes of bodies kept in all.
            before_ms: Those created before lose their body whatever their size.

        Returns:
            How many have lost their body.
        """
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
        """Append a batch of requests, each of which ends once.

        A batch whose appending failed or was cancelled may be appended again, alone or with others before the
        next: none of its records is then there twice.
        """
        ...

    async def requests(self, *, endpoint_id: str | None = None, limit: int = 100) -> Sequence[RequestRecord]:
        """Newest first by arrival."""
        ...

    async def prune_requests(self, *, keep: int) -> int:
        """Delete the oldest beyond `keep` records; returns how many.

        Oldest by arrival, but for those that lasted: a store may go by what was appended together.
        """
        ...


class StartLog(Protocol):
    """Every start of a worker with its stages."""

    async def put_start(self, record: StartRecord) -> None:
        """Insert or replace the record of one start; the newest 10,000 are kept."""
        ...

    async def starts(self, *, endpoint_id: str | None = None, limit: int = 50) -> Sequence[StartRecord]:
        """Newest first by the moment of the first stage."""
        ...


class StoreListener(Protocol):
    """Told what other gateways have changed in a store that is shared, on the event loop, soon after it.

    News may be late, double or, rarely, missing; `resync` says so, and comes every few seconds, too.
    """

    def jobs_changed(self, job_ids: Sequence[str]) -> None:
        """Jobs changed their state or got chunks."""
        ...

    def queues_grew(self, endpoint_ids: Sequence[str]) -> None:
        """Jobs were queued."""
        ...

    def configuration_changed(self) -> None:
        """Endpoints or keys changed."""
        ...

    def resync(self) -> None:
        """Anything may have changed: look again."""
        ...


class Store(
    EndpointStore,
    KeyStore,
    WorkerStore,
    JobStore,
    BatchStore,
    WebhookStore,
    UsageStore,
    RequestLog,
    StartLog,
    Protocol,
):
    """Everything one installation remembers; opened once, by `bootstrap`."""

    def listen(self, listener: StoreListener) -> None:
        """Tell what others change from now on; at most one listener. Stores of one process never tell."""
        ...

    async def lead(self, lost: Callable[[], None]) -> bool:
        """Become the one gateway that starts workers and keeps time, if no other one is.

        Stores of one process always answer True. With a shared one the lead lasts until `close`, or until it
        is lost together with the connection that holds it: then `lost` is called, once.
        """
        ...

    async def close(self) -> None:
        """Finish what was accepted and release everything; idempotent."""
        ...
