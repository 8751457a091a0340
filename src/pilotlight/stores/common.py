"""Rules that every store shares, so that they cannot drift apart: order, counting, events, messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from msgspec.structs import replace

from pilotlight.core.job_object import webhook_body
from pilotlight.core.lifecycle import Applied, Cancelled, JobEvent
from pilotlight.core.lifecycle import apply as apply_event
from pilotlight.domain.batch import Batch, BatchDraft, BatchStatus
from pilotlight.domain.job import ATTEMPTS_KEPT, Idempotency, Job, JobStatus, Lane
from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.errors import ConflictError, NotFoundError

OVERDUE_COUNT_MAX = 10_000
"""Overdue jobs are counted up to here: enough to ask for every worker there can be, and cheap to count."""

STARTS_KEPT = 10_000
"""Start records kept; older ones are dropped as new ones come, so that nothing has to prune them."""

DEAD_WEBHOOKS_KEPT = 1_000
"""Dead letters kept; older ones are dropped as new ones come."""

AHEAD_COUNT_MAX = 10_000
"""Jobs ahead of a queued one are counted up to here."""

FAILURES = frozenset({JobStatus.FAILED, JobStatus.TIMED_OUT})
"""Terminal states that `/health` counts as failed; a cancellation is nobody's failure."""


@dataclass(slots=True)
class CounterChange:
    """By how much the counters of one endpoint change."""

    queued: int = 0
    queued_low: int = 0
    queued_bytes: int = 0
    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    retried: int = 0

    def move(self, before: Job | None, after: Job) -> None:
        """Count a job's way from one state to another; `before` is None for a new one."""
        if before is not None:
            if before.status is after.status:
                return
            self._stand(before, -1)
            # A retry by the client begins a new count of re-dispatches and is one itself.
            self.retried += 1 if before.status.terminal else after.retries - before.retries
        if after.status is JobStatus.COMPLETED:
            self.completed += 1
        elif after.status in FAILURES:
            self.failed += 1
        else:
            self._stand(after, 1)

    def _stand(self, job: Job, sign: int) -> None:
        status = job.status
        if status is JobStatus.IN_QUEUE:
            self.queued_bytes += sign * job.input_bytes
            if job.low_priority:
                self.queued_low += sign
            else:
                self.queued += sign
        elif status is JobStatus.IN_PROGRESS:
            self.in_progress += sign


def holds(job: Job, worker_id: str, attempt: int | None) -> bool:
    """Whether the running attempt of a job is that worker's, and the given one where one is given."""
    return (
        job.status is JobStatus.IN_PROGRESS and job.worker_id == worker_id and attempt in {None, job.attempt}
    )


def after_shortening(job: Job, *, now_ms: int, ttl_ms: int) -> Job:
    """The job with at most `ttl_ms` of life from now on.

    A living job loses time to live, an ended one retention; neither ever gains any.
    """
    end_ms = now_ms + max(0, ttl_ms)
    if job.finished_ms is None:
        return replace(job, expires_ms=min(job.expires_ms, end_ms))
    return replace(job, retention_ms=min(job.retention_ms, max(0, end_ms - job.finished_ms)))


def after_chunk(job: Job, now_ms: int) -> Job:
    """The running job after a stream chunk of its attempt, which confirms it."""
    if job.confirmed_ms is not None and job.first_output_ms is not None:
        return job
    return replace(
        job,
        confirmed_ms=now_ms if job.confirmed_ms is None else job.confirmed_ms,
        first_output_ms=now_ms if job.first_output_ms is None else job.first_output_ms,
    )


def deadline_ms(job: Job) -> int:
    """When the job's time is over: to live, to run, or, once ended, to stay readable."""
    if job.finished_ms is not None:
        return job.finished_ms + job.retention_ms
    if job.status is JobStatus.IN_PROGRESS and job.started_ms is not None:
        return min(job.expires_ms, job.started_ms + job.execution_timeout_ms)
    return job.expires_ms


def forgotten(job: Job, now_ms: int) -> bool:
    """Whether the record of a job has ended, even if it has not been pruned yet."""
    return job.finished_ms is not None and deadline_ms(job) <= now_ms


_LANES = {lane: number for number, lane in enumerate(Lane)}


def rank(job: Job) -> int:
    """Class of a queued job; lower is served first (serverless-api.md §12 item 34).

    Twice the number of its lane, plus one for a job that was never handed out.
    """
    return 2 * _LANES[job.lane] + (job.attempt == 0)


def place(job: Job) -> int:
    """What orders queued jobs of one rank, before the order of their submission, which alone orders new ones.

    The clock does not: it may be set back, and then what waits would be passed by.
    """
    return 0 if job.attempt == 0 else job.queued_ms


def apply(job: Job, event: JobEvent, *, batch_cancelled: bool) -> Applied:
    """What an event does to a job, and to a request of a batch that has been cancelled.

    Such a request is not queued again: what would send it back ends it (serverless-api.md §2.16).
    """
    applied = apply_event(job, event)
    if batch_cancelled and applied.requeued:
        return apply_event(job, Cancelled(now_ms=event.now_ms))
    return applied


def webhook_delivery(job: Job, job_input: bytes) -> WebhookDelivery:
    """What is to be told of a job that has just become terminal; due at once.

    Args:
        job: The job, which has a webhook, in its terminal state.
        job_input: Its input.
    """
    assert job.webhook is not None
    assert job.finished_ms is not None
    return WebhookDelivery(
        id=_webhook_id(job),
        job_id=job.id,
        endpoint_id=job.endpoint_id,
        url=job.webhook,
        body=webhook_body(job, job_input),
        created_ms=job.finished_ms,
        next_ms=job.finished_ms,
    )


def _webhook_id(job: Job) -> str:
    """`{job id}.{attempt}`, and more when the job ends again without having been handed out again."""
    repeats = 0
    for ended in reversed(job.attempts):
        if ended.number != job.attempt:
            break
        repeats += 1
    if not repeats:
        return f"{job.id}.{job.attempt}"
    if repeats < ATTEMPTS_KEPT:
        return f"{job.id}.{job.attempt}.{repeats}"
    return f"{job.id}.{job.attempt}.{repeats}.{job.queued_ms}"


def check_fingerprint(idempotency: Idempotency, fingerprint: bytes) -> None:
    """Return when a repeated submission equals the first one, whose fingerprint is given.

    Raises:
        ConflictError: It does not.
    """
    if idempotency.fingerprint != fingerprint:
        raise ConflictError(
            f"Idempotency-Key {idempotency.key!r} was used for another submission; repeat that one unchanged,"
            " or use a new key"
        )


def draft_bytes(drafts: Iterable[BatchDraft]) -> int:
    """Bytes of the inputs of some requests together."""
    return sum(len(draft.input) for draft in drafts)


def check_draft(batch: Batch) -> None:
    """Return when a batch may still be changed, else raise ConflictError (serverless-api.md §2.16)."""
    if batch.status is not BatchStatus.DRAFT:
        raise ConflictError("batch is not in DRAFT")


_BATCH_COUNTERS = {
    JobStatus.IN_QUEUE: "queued",
    JobStatus.IN_PROGRESS: "in_progress",
    JobStatus.COMPLETED: "completed",
    JobStatus.FAILED: "failed",
    JobStatus.TIMED_OUT: "failed",
    JobStatus.CANCELLED: "cancelled",
}


def batch_counter(status: JobStatus) -> str:
    """The field of `Batch` that counts requests in that state."""
    return _BATCH_COUNTERS[status]


def job_not_found(job_id: str) -> NotFoundError:
    """The error for a job that is unknown or has been pruned."""
    return NotFoundError(f"job not found: {job_id}")


def endpoint_not_found(endpoint_id: str) -> NotFoundError:
    """The error for an endpoint that is unknown or deleted."""
    return NotFoundError(f"endpoint not found: {endpoint_id}")


def key_not_found(key_id: str) -> NotFoundError:
    """The error for an unknown key."""
    return NotFoundError(f"API key not found: {key_id}")


def batch_not_found(batch_id: str) -> NotFoundError:
    """The error for a batch that is unknown or has been pruned."""
    return NotFoundError(f"batch not found: {batch_id}")


def request_not_found(request_id: str) -> NotFoundError:
    """The error for a request that is not in a batch."""
    return NotFoundError(f"batch request not found: {request_id}")


WEBHOOK_GIVEN_UP = "given up: too old, or too many bytes were kept for its host"
"""`last_error` of a delivery that was still to be tried when it lost its body."""


def webhook_not_found(delivery_id: str) -> NotFoundError:
    """The error for a delivery that is unknown, done or dropped."""
    return NotFoundError(f"webhook delivery not found: {delivery_id}")


def id_taken(kind: str, value: str) -> ConflictError:
    """The error for an identifier that was used before."""
    return ConflictError(f"{kind} {value} exists already")


def name_taken(name: str) -> ConflictError:
    """The error for the name of another living endpoint."""
    return ConflictError(
        f"an endpoint named {name!r} exists already; names are unique among living endpoints"
    )


def wrong_version(endpoint_id: str, version: int, current: int) -> ConflictError:
    """The error for a revision that neither is the current one nor follows it."""
    return ConflictError(
        f"endpoint {endpoint_id}: version {version} does not follow version {current};"
        f" legal: {current} unchanged, or {current + 1}"
    )
