"""Rules that every store shares, so that they cannot drift apart: order, counting, fencing, messages."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pilotlight.domain.job import Job, JobStatus
from pilotlight.errors import ConflictError, NotFoundError

OVERDUE_COUNT_MAX = 10_000
"""Overdue jobs are counted up to here: enough to ask for every worker there can be, and cheap to count."""

STARTS_KEPT = 10_000
"""Start records kept; older ones are dropped as new ones come, so that nothing has to prune them."""

CANCEL_SLICE = 500
"""Jobs that `cancel_all` ends in one go, so that other callers get their turn in between."""

FAILURES = frozenset({JobStatus.FAILED, JobStatus.TIMED_OUT})
"""Terminal states that `/health` counts as failed; a cancellation is nobody's failure."""


@dataclass(slots=True)
class CounterChange:
    """By how much the counters of one endpoint change."""

    queued: int = 0
    queued_low: int = 0
    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    retried: int = 0

    def move(self, before: Job | None, after: Job) -> None:
        """Count a job's way from one state to another; `before` is None for a new one."""
        if before is not None:
            self._stand(before, -1)
            self.retried += after.retries - before.retries
        self._stand(after, 1)
        if before is None or before.status is not after.status:
            self.completed += after.status is JobStatus.COMPLETED
            self.failed += after.status in FAILURES

    def _stand(self, job: Job, sign: int) -> None:
        if job.status is JobStatus.IN_QUEUE:
            if job.low_priority:
                self.queued_low += sign
            else:
                self.queued += sign
        elif job.status is JobStatus.IN_PROGRESS:
            self.in_progress += sign


def holds(job: Job, worker_id: str) -> bool:
    """Whether the running attempt of a job belongs to that worker."""
    return job.status is JobStatus.IN_PROGRESS and job.worker_id == worker_id


def after_shortening(job: Job, *, now_ms: int, ttl_ms: int) -> Job:
    """The job with at most `ttl_ms` of life from now on.

    A living job loses time to live, an ended one retention; neither ever gains any.
    """
    end_ms = now_ms + max(0, ttl_ms)
    if job.finished_ms is None:
        return replace(job, expires_ms=min(job.expires_ms, end_ms))
    return replace(job, retention_ms=min(job.retention_ms, max(0, end_ms - job.finished_ms)))


def deadline_ms(job: Job) -> int:
    """When the job's time is over: to live, to run, or, once ended, to stay readable."""
    if job.finished_ms is not None:
        return job.finished_ms + job.retention_ms
    if job.status is JobStatus.IN_PROGRESS and job.started_ms is not None:
        return min(job.expires_ms, job.started_ms + job.execution_timeout_ms)
    return job.expires_ms


def rank(job: Job) -> int:
    """Class of a queued job; lower is served first (serverless-api.md §12 item 34).

    0 normal and handed out before, 1 normal, 2 low priority and handed out before, 3 low priority.
    """
    return 2 * job.low_priority + (job.attempt == 0 and job.retries == 0)


def job_not_found(job_id: str) -> NotFoundError:
    """The error for a job that is unknown or has been pruned."""
    return NotFoundError(f"job not found: {job_id}")


def endpoint_not_found(endpoint_id: str) -> NotFoundError:
    """The error for an endpoint that is unknown or deleted."""
    return NotFoundError(f"endpoint not found: {endpoint_id}")


def key_not_found(key_id: str) -> NotFoundError:
    """The error for an unknown key."""
    return NotFoundError(f"API key not found: {key_id}")


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
