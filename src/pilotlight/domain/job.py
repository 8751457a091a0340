"""Jobs of the queue: one record per job, changed only by `core.lifecycle.apply`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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
        return self not in {JobStatus.IN_QUEUE, JobStatus.IN_PROGRESS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One queued unit of work.

    Attributes:
        id: `{uuid}-u1`, or `sync-{uuid}-u1` for a synchronous one (serverless-api.md §1).
        endpoint_id: Where it was submitted.
        key_id: The API key that submitted it; "" when unknown.
        input: Raw JSON, delivered to the worker unchanged.
        status: Where it stands.
        sync: Submitted by /runsync; decides retention and size limits.
        low_priority: Served only when no normal job waits.
        created_ms: Submission.
        queued_ms: Submission or last requeue; FIFO order within a priority class goes by it.
        expires_ms: End of its time to live, queue and run together.
        execution_timeout_ms: Running time allowed to one attempt.
        retention_ms: How long the record stays readable after the terminal state.
        attempt: Number of hand-outs so far.
        retries: Re-dispatches that used up the retry (lost worker, retryable error).
        worker_id: Worker of the (last) attempt.
        started_ms: When the (last) attempt was handed out.
        confirmed: Whether the worker has shown that it holds the job (ping, chunk, progress).
        chunk_read: Whether a stream chunk has reached a reader.
        finished_ms: When it became terminal.
        output: Raw JSON: result, or the latest progress while running.
        error: Error text, stored untouched.
    """

    id: str
    endpoint_id: str
    key_id: str = ""
    input: bytes
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
    worker_id: str | None = None
    started_ms: int | None = None
    confirmed: bool = False
    chunk_read: bool = False
    finished_ms: int | None = None
    output: bytes | None = None
    error: str | None = None

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
        queued: Normal-priority jobs waiting.
        queued_low: Low-priority jobs waiting.
        oldest_ms: Since when the oldest normal job waits; None with an empty queue.
        overdue: Normal jobs that have waited longer than the threshold asked for.
        in_progress: Jobs handed out.
    """

    queued: int = 0
    queued_low: int = 0
    oldest_ms: int | None = None
    overdue: int = 0
    in_progress: int = 0
