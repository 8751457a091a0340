"""Jobs of the queue: one record per job, changed only by `core.lifecycle.apply`.

What is made several times per job served is a `msgspec.Struct`: a frozen dataclass of as many fields takes
seven times as long to make, and ten times as long to copy with `msgspec.structs.replace`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import msgspec


class JobStatus(StrEnum):
    """The six states a client can see (serverless-api.md §2.10)."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def terminal(self) -> bool:
        """Whether no result can change any more."""
        return self is not JobStatus.IN_QUEUE and self is not JobStatus.IN_PROGRESS

    # That of `Enum` is written in Python, and every look into a table by status would call it.
    __hash__ = str.__hash__


class Lane(StrEnum):
    """The classes of a queue, the first to be served first."""

    NORMAL = "normal"
    BATCH = "batch"
    LOW = "low"


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One ended hand-out of a job that was queued again afterwards.

    Attributes:
        number: 1 for the first.
        worker_id: Who had it; None when the job ended without having been handed out.
        queued_ms: Since when it had waited.
        started_ms: When it was handed out.
        confirmed_ms: When the worker showed that it held it.
        first_output_ms: When the first stream chunk arrived.
        ended_ms: When the attempt ended.
        reason: Why, in words.
    """

    number: int
    worker_id: str | None
    queued_ms: int
    started_ms: int | None
    confirmed_ms: int | None
    first_output_ms: int | None
    ended_ms: int
    reason: str


ATTEMPTS_KEPT = 20
"""Ended attempts a job remembers; more than any retry limit allows, interruptions by us aside."""


class Job(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One queued unit of work. Refers to nothing that could refer to it, so the collector may pass it by.

    Attributes:
        id: `{uuid}-u1`, `sync-{uuid}-u1` for a synchronous one, `req_…` for one of a batch
            (serverless-api.md §1).
        endpoint_id: Where it was submitted.
        key_id: The API key that submitted it; "" when unknown.
        input: Raw JSON, delivered to the worker unchanged; "" in a job read for anything but running it.
        input_bytes: Its length.
        status: Where it stands.
        sync: Submitted by /runsync; decides retention and size limits.
        low_priority: Served only when no normal job waits.
        created_ms: Submission.
        queued_ms: Submission or last requeue; orders requeued jobs (`JobStore.take`).
        expires_ms: End of its time to live, queue and run together.
        execution_timeout_ms: Running time allowed to one attempt.
        retention_ms: How long the record stays readable after the terminal state.
        attempt: Number of hand-outs so far.
        retries: Re-dispatches that used up a retry (lost worker, retryable error).
        retries_max: How many of those it may have.
        worker_id: Worker of the (last) attempt.
        started_ms: When the (last) attempt was handed out.
        confirmed_ms: When the worker first showed that it holds the job (ping, chunk, progress).
        first_output_ms: When the first stream chunk of the attempt arrived.
        chunk_read: Whether a stream chunk of the current attempt has reached a reader.
        finished_ms: When it became terminal.
        output: Raw JSON: result, or the latest progress while running.
        error: Error text, stored untouched.
        webhook: Whom to tell when it is terminal (serverless-api.md §2.12).
        s3_config: Where the worker may put large results, sealed; None when none was given, `WIPED` once
            the job was terminal.
        batch_id: The batch it belongs to (serverless-api.md §2.16).
        attempts: The attempts before the current one, oldest first, at most `ATTEMPTS_KEPT`.
    """

    id: str
    endpoint_id: str
    key_id: str = ""
    input: bytes = b""
    input_bytes: int = 0
    status: JobStatus = JobStatus.IN_QUEUE
    sync: bool = False
    low_priority: bool = False
    created_ms: int
    queued_ms: int
    expires_ms: int
    execution_timeout_ms: int
    retention_ms: int
    attempt: int = 0
    retries: int = 0
    retries_max: int = 1
    worker_id: str | None = None
    started_ms: int | None = None
    confirmed_ms: int | None = None
    first_output_ms: int | None = None
    chunk_read: bool = False
    finished_ms: int | None = None
    output: bytes | None = None
    error: str | None = None
    webhook: str | None = None
    s3_config: bytes | None = None
    batch_id: str | None = None
    attempts: tuple[Attempt, ...] = ()

    @property
    def lane(self) -> Lane:
        """Its class in the queue: batches yield to single jobs, low priority yields to both."""
        if self.low_priority:
            return Lane.LOW
        return Lane.NORMAL if self.batch_id is None else Lane.BATCH

    @property
    def delay_ms(self) -> int | None:
        """Wait until the current attempt started; None until a worker took the job (§2.9)."""
        return None if self.started_ms is None else max(0, self.started_ms - self.queued_ms)

    @property
    def execution_ms(self) -> int | None:
        """Running time of the last attempt; None unless terminal after having run (§2.9)."""
        if self.started_ms is None or self.finished_ms is None:
            return None
        return max(0, self.finished_ms - self.started_ms)


WIPED = b""
"""`Job.s3_config` after the terminal state: there was one, and it is gone."""


class Idempotency(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a repeated submission find the job of the first one.

    Attributes:
        key: The client's `Idempotency-Key`; means something together with endpoint and API key only.
        fingerprint: Hash of what was submitted, to tell a repetition from a mistake.
    """

    key: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCounts:
    """The five job counters of `/health` (serverless-api.md §2.15); three are totals since creation."""

    queued: int = 0
    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    retried: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueDemand:
    """What the scaler needs to know of an endpoint's queue at one moment.

    Attributes:
        queued: Jobs waiting that are not low priority.
        queued_low: Low-priority jobs waiting.
        queued_bytes: Inputs of both together.
        oldest_ms: Since when the oldest of the former waits; None with none.
        overdue: Those of the former that have waited longer than the threshold asked for.
        in_progress: Jobs handed out.
    """

    queued: int = 0
    queued_low: int = 0
    queued_bytes: int = 0
    oldest_ms: int | None = None
    overdue: int = 0
    in_progress: int = 0
