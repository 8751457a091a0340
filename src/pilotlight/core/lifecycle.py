"""The life of a job and of a worker, as tables.

Stores call `apply` inside their own exclusion (a transaction, a lock): they load a job, ask here what
an event does to it, and write what comes back. Nothing else may change a job's state. The legal
changes of status are `JOB_TRANSITIONS`; everything not in the table is refused or changes nothing.

    IN_QUEUE ──taken──► IN_PROGRESS ──result──► COMPLETED | FAILED
       ▲  │                 │
       │  │ cancelled,      │ cancelled, execution timeout, time to live,
       │  │ time to live    │ lost with no retry left
       │  ▼                 ▼
       │  CANCELLED | TIMED_OUT | FAILED
       └── lost or interrupted, retry left
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from pilotlight.domain.job import Job, JobStatus
from pilotlight.domain.worker import WorkerState

JOB_TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.IN_QUEUE: frozenset(
        {JobStatus.IN_PROGRESS, JobStatus.CANCELLED, JobStatus.TIMED_OUT, JobStatus.FAILED}
    ),
    JobStatus.IN_PROGRESS: frozenset(
        {
            JobStatus.IN_QUEUE,
            JobStatus.COMPLETED,
            JobStatus.FAILED,
            JobStatus.CANCELLED,
            JobStatus.TIMED_OUT,
        }
    ),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
    JobStatus.TIMED_OUT: frozenset(),
}

WORKER_TRANSITIONS: dict[WorkerState, frozenset[WorkerState]] = {
    WorkerState.STARTING: frozenset(
        {WorkerState.READY, WorkerState.DRAINING, WorkerState.STOPPING, WorkerState.FAILED}
    ),
    WorkerState.READY: frozenset(
        {WorkerState.DRAINING, WorkerState.FROZEN, WorkerState.STOPPING, WorkerState.FAILED}
    ),
    WorkerState.DRAINING: frozenset({WorkerState.STOPPING, WorkerState.STOPPED, WorkerState.FAILED}),
    WorkerState.FROZEN: frozenset({WorkerState.READY, WorkerState.STOPPING, WorkerState.FAILED}),
    WorkerState.STOPPING: frozenset({WorkerState.STOPPED, WorkerState.FAILED}),
    WorkerState.STOPPED: frozenset(),
    WorkerState.FAILED: frozenset(),
}

EXECUTION_TIMEOUT_ERROR = "executionTimeout exceeded"
"""The text clients match on (serverless-api.md §2.10)."""

RETRIES_MAX = 1
"""Re-dispatches after a lost worker (serverless-api.md §12 item 17)."""


class InvalidTransitionError(AssertionError):
    """A programmer's error: a state change that the table does not allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A worker took the job."""

    worker_id: str
    now_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """The worker has shown that it holds the job (worker-protocol.md §5)."""

    worker_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """The worker posted a progress value; `output` is raw JSON."""

    worker_id: str
    output: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPosted:
    """A final result arrived: raw JSON `output`, `error` text, or both (serverless-api.md §2.9).

    `retryable` is the worker's word that the failure was the engine's and not the request's.
    """

    worker_id: str
    now_ms: int
    output: bytes | None = None
    error: str | None = None
    retryable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """The attempt cannot finish any more: worker dead, hand-out never confirmed, result lost."""

    worker_id: str
    now_ms: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformInterrupted:
    """We ended the attempt ourselves, by a restart of the gateway; uses up no retry."""

    now_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The client cancelled."""

    now_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionTimedOut:
    """The attempt ran longer than allowed."""

    now_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TtlReached:
    """The job's time to live is over."""

    now_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRefused:
    """The endpoint cannot serve: it was deleted while the job waited."""

    now_ms: int
    reason: str


JobEvent = (
    Taken
    | Confirmed
    | Progressed
    | ResultPosted
    | WorkerLost
    | PlatformInterrupted
    | Cancelled
    | ExecutionTimedOut
    | TtlReached
    | StartRefused
)


class Effect(StrEnum):
    """What became of an event."""

    CHANGED = "changed"
    IGNORED_TERMINAL = "ignored_terminal"
    IGNORED_OTHER_ATTEMPT = "ignored_other_attempt"
    IGNORED_STATE = "ignored_state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The answer to one event.

    Attributes:
        before: The job as it was.
        after: The job as it is now; the same object when nothing changed.
        effect: Whether the event counted, and if not, why.
    """

    before: Job
    after: Job
    effect: Effect

    @property
    def changed(self) -> bool:
        """Whether the job is different now."""
        return self.effect is Effect.CHANGED

    @property
    def requeued(self) -> bool:
        """Whether the job went back to the queue."""
        return (
            self.changed
            and self.before.status is JobStatus.IN_PROGRESS
            and self.after.status is JobStatus.IN_QUEUE
        )

    @property
    def finished(self) -> bool:
        """Whether this event made the job terminal."""
        return self.changed and self.after.status.terminal

    @property
    def freed_worker_id(self) -> str | None:
        """The worker whose slot this event freed, if any."""
        if (
            self.changed
            and self.before.status is JobStatus.IN_PROGRESS
            and self.after.status is not JobStatus.IN_PROGRESS
        ):
            return self.before.worker_id
        return None


def apply(job: Job, event: JobEvent) -> Applied:
    """What an event does to a job. Pure; events that come late or twice change nothing.

    Args:
        job: The job as the store has it.
        event: What happened.

    Returns:
        The job after the event and whether it counted.
    """
    if job.status.terminal:
        return Applied(before=job, after=job, effect=Effect.IGNORED_TERMINAL)
    after = _next(job, event)
    if isinstance(after, Effect):
        return Applied(before=job, after=job, effect=after)
    if after.status is not job.status and after.status not in JOB_TRANSITIONS[job.status]:
        raise InvalidTransitionError(f"job {job.id}: {job.status} -> {after.status} by {event}")
    return Applied(before=job, after=after, effect=Effect.CHANGED)


def _next(job: Job, event: JobEvent) -> Job | Effect:
    running = job.status is JobStatus.IN_PROGRESS
    match event:
        case Taken(worker_id=worker_id, now_ms=now):
            if running:
                return Effect.IGNORED_STATE
            return replace(
                job,
                status=JobStatus.IN_PROGRESS,
                attempt=job.attempt + 1,
                worker_id=worker_id,
                started_ms=now,
                confirmed=False,
                output=None,
                error=None,
            )
        case Confirmed(worker_id=worker_id):
            if not running or job.confirmed:
                return Effect.IGNORED_STATE
            return (
                replace(job, confirmed=True) if job.worker_id == worker_id else Effect.IGNORED_OTHER_ATTEMPT
            )
        case Progressed(worker_id=worker_id, output=output):
            if not running:
                return Effect.IGNORED_STATE
            if job.worker_id != worker_id:
                return Effect.IGNORED_OTHER_ATTEMPT
            return replace(job, output=output, confirmed=True)
        case ResultPosted():
            return _after_result(job, event)
        case WorkerLost(worker_id=worker_id, now_ms=now, reason=reason):
            if not running:
                return Effect.IGNORED_STATE
            if job.worker_id != worker_id:
                return Effect.IGNORED_OTHER_ATTEMPT
            return _after_loss(job, now, reason)
        case PlatformInterrupted(now_ms=now):
            if not running:
                return Effect.IGNORED_STATE
            if job.chunk_read:
                return _finish(
                    job, JobStatus.FAILED, now, error=_CUT_STREAM.format(reason="gateway restarted")
                )
            return _requeue(job, now, retries=job.retries)
        case Cancelled(now_ms=now):
            return _finish(job, JobStatus.CANCELLED, now)
        case ExecutionTimedOut(now_ms=now):
            if not running:
                return Effect.IGNORED_STATE
            return _finish(job, JobStatus.FAILED, now, error=EXECUTION_TIMEOUT_ERROR)
        case TtlReached(now_ms=now):
            return _finish(job, JobStatus.TIMED_OUT, now, error="job exceeded its time to live")
        case StartRefused(now_ms=now, reason=reason):
            return _finish(job, JobStatus.FAILED, now, error=reason)


_CUT_STREAM = "{reason} after part of the stream had been delivered; not retried"


def _after_result(job: Job, event: ResultPosted) -> Job | Effect:
    if job.status is not JobStatus.IN_PROGRESS:
        return Effect.IGNORED_STATE
    # An attempt that was requeued may still finish first: the first final wins (worker-protocol.md §7.2).
    # It cannot be told from the running one by worker alone, so only the worker of record counts.
    if job.worker_id != event.worker_id:
        return Effect.IGNORED_OTHER_ATTEMPT
    if event.error is None:
        return _finish(job, JobStatus.COMPLETED, event.now_ms, output=event.output)
    if event.retryable and not job.chunk_read and job.retries < RETRIES_MAX:
        return _requeue(job, event.now_ms, retries=job.retries + 1)
    return _finish(job, JobStatus.FAILED, event.now_ms, output=event.output, error=event.error)


def _after_loss(job: Job, now_ms: int, reason: str) -> Job:
    if job.chunk_read:
        return _finish(job, JobStatus.FAILED, now_ms, error=_CUT_STREAM.format(reason=reason))
    if job.retries >= RETRIES_MAX:
        return _finish(job, JobStatus.FAILED, now_ms, error=f"job timed out after {job.retries} retries")
    return _requeue(job, now_ms, retries=job.retries + 1)


def _requeue(job: Job, now_ms: int, *, retries: int) -> Job:
    # delayTime is recomputed from the requeue (serverless-api.md §2.9).
    return replace(
        job,
        status=JobStatus.IN_QUEUE,
        queued_ms=now_ms,
        retries=retries,
        started_ms=None,
        confirmed=False,
        output=None,
        error=None,
    )


def _finish(
    job: Job, status: JobStatus, now_ms: int, *, output: bytes | None = None, error: str | None = None
) -> Job:
    return replace(job, status=status, finished_ms=now_ms, output=output, error=error)


def check_worker_transition(before: WorkerState, after: WorkerState) -> None:
    """Return when a worker may go from one state to the other, else raise with both names."""
    if after not in WORKER_TRANSITIONS[before]:
        legal = ", ".join(sorted(WORKER_TRANSITIONS[before])) or "nothing"
        raise InvalidTransitionError(f"worker {before} -> {after}; legal: {legal}")
