"""The life of a job and of a worker, as tables.

Stores call `apply` inside their own exclusion (a transaction, a lock): they load a job, ask here what
an event does to it, and write what comes back. Nothing else may change a job's state. `JOB_TRANSITIONS`
says where each event may lead from each status; an event that has no entry for a status changes nothing,
so what comes late, twice or out of order is harmless by construction.

    IN_QUEUE ──taken──► IN_PROGRESS ──result──► COMPLETED | FAILED
     ▲ ▲ │                  │
     │ │ │ cancelled,       │ cancelled, execution timeout, time to live,
     │ │ │ time to live     │ lost with no retry left
     │ │ ▼                  ▼
     │ │ CANCELLED | TIMED_OUT | FAILED
     │ └── lost or interrupted, retry left
     └──── retried by the client (FAILED, TIMED_OUT)

A hand-out is a lease. Its token is (worker, attempt): an event that names another attempt than the running
one is refused. Workers of the reference protocol know no attempts (worker-protocol.md §1 rule 20); there the
gateway, which remembers what it handed to whom, names the attempt for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from pilotlight.domain.job import ATTEMPTS_KEPT, WIPED, Attempt, Job, JobStatus
from pilotlight.domain.worker import WorkerState

EXECUTION_TIMEOUT_ERROR = "executionTimeout exceeded"
"""The text clients match on (serverless-api.md §2.10)."""

TTL_ERROR = "job exceeded its time to live"


class InvalidTransitionError(AssertionError):
    """A programmer's error: a state change that the table does not allow."""


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """A worker took the job."""

    worker_id: str
    now_ms: int


class Confirmed(msgspec.Struct, frozen=True, kw_only=True):
    """The worker has shown that it holds the job (worker-protocol.md §5)."""

    worker_id: str
    now_ms: int
    attempt: int | None = None


class Progressed(msgspec.Struct, frozen=True, kw_only=True):
    """The worker posted a progress value; `output` is raw JSON."""

    worker_id: str
    now_ms: int
    output: bytes | None
    attempt: int | None = None


class ResultPosted(msgspec.Struct, frozen=True, kw_only=True):
    """A final result arrived: raw JSON `output`, `error` text, or both (serverless-api.md §2.9).

    `retryable` is the worker's word that the failure was the engine's and not the request's.
    """

    worker_id: str
    now_ms: int
    output: bytes | None = None
    error: str | None = None
    retryable: bool = False
    attempt: int | None = None


class WorkerLost(msgspec.Struct, frozen=True, kw_only=True):
    """The attempt cannot finish any more: worker dead, hand-out never confirmed, result lost."""

    worker_id: str
    now_ms: int
    reason: str
    attempt: int | None = None


class PlatformInterrupted(msgspec.Struct, frozen=True, kw_only=True):
    """We ended the attempt ourselves (restart, worker hung up before it got the job); uses up no retry."""

    now_ms: int
    reason: str = "gateway restarted"
    worker_id: str | None = None
    attempt: int | None = None


class Cancelled(msgspec.Struct, frozen=True, kw_only=True):
    """The client cancelled."""

    now_ms: int


class ExecutionTimedOut(msgspec.Struct, frozen=True, kw_only=True):
    """The attempt ran longer than allowed."""

    now_ms: int
    attempt: int | None = None


class TtlReached(msgspec.Struct, frozen=True, kw_only=True):
    """The job's time to live is over; `reason` says why no worker had it by then, "" where one had."""

    now_ms: int
    reason: str = ""


class Retried(msgspec.Struct, frozen=True, kw_only=True):
    """The client wants a job that failed to run again, with a new time to live (serverless-api.md §2.15)."""

    now_ms: int
    expires_ms: int


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
    | Retried
)

_QUEUED, _RUNNING = JobStatus.IN_QUEUE, JobStatus.IN_PROGRESS
_COMPLETED, _FAILED = JobStatus.COMPLETED, JobStatus.FAILED
_CANCELLED, _TIMED_OUT = JobStatus.CANCELLED, JobStatus.TIMED_OUT

JOB_TRANSITIONS: Mapping[tuple[JobStatus, type[JobEvent]], frozenset[JobStatus]] = MappingProxyType(
    {
        (_QUEUED, Taken): frozenset({_RUNNING}),
        (_QUEUED, Cancelled): frozenset({_CANCELLED}),
        (_QUEUED, TtlReached): frozenset({_TIMED_OUT}),
        (_RUNNING, Confirmed): frozenset({_RUNNING}),
        (_RUNNING, Progressed): frozenset({_RUNNING}),
        (_RUNNING, ResultPosted): frozenset({_COMPLETED, _FAILED, _QUEUED}),
        (_RUNNING, WorkerLost): frozenset({_QUEUED, _FAILED}),
        (_RUNNING, PlatformInterrupted): frozenset({_QUEUED}),
        (_RUNNING, Cancelled): frozenset({_CANCELLED}),
        (_RUNNING, ExecutionTimedOut): frozenset({_FAILED}),
        (_RUNNING, TtlReached): frozenset({_TIMED_OUT}),
        (_FAILED, Retried): frozenset({_QUEUED}),
        (_TIMED_OUT, Retried): frozenset({_QUEUED}),
    }
)
"""Where an event may lead from a status; what is not here changes nothing."""


def transition_table() -> str:
    """`JOB_TRANSITIONS` as a Markdown table, one row per status and event."""
    rows = ["| from | event | to |", "|---|---|---|"]
    for (status, event), targets in JOB_TRANSITIONS.items():
        rows.append(f"| {status} | {event.__name__} | {', '.join(sorted(targets))} |")
    return "\n".join(rows)


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


class Effect(StrEnum):
    """What became of an event."""

    CHANGED = "changed"
    IGNORED_TERMINAL = "ignored_terminal"
    IGNORED_OTHER_ATTEMPT = "ignored_other_attempt"
    IGNORED_STATE = "ignored_state"
    IGNORED_WIPED = "ignored_wiped"
    """A retry of a job whose s3Config has been deleted: it would run, and have nowhere to put its result."""


_CHANGED = Effect.CHANGED


class Applied(msgspec.Struct, frozen=True, kw_only=True):
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
        return self.effect is _CHANGED

    @property
    def requeued(self) -> bool:
        """Whether the job went back to the queue."""
        return self.effect is _CHANGED and self.after.status is _QUEUED

    @property
    def finished(self) -> bool:
        """Whether this event made the job terminal."""
        return self.effect is _CHANGED and self.after.status.terminal

    @property
    def freed_worker_id(self) -> str | None:
        """The worker whose slot this event freed, if any."""
        if self.effect is _CHANGED and self.before.status is _RUNNING and self.after.status is not _RUNNING:
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
    targets = JOB_TRANSITIONS.get((job.status, type(event)))
    if targets is None:
        effect = Effect.IGNORED_TERMINAL if job.status.terminal else Effect.IGNORED_STATE
        return Applied(before=job, after=job, effect=effect)
    if job.status is _RUNNING and not _holds(job, event):
        return Applied(before=job, after=job, effect=Effect.IGNORED_OTHER_ATTEMPT)
    after = _next(job, event)
    if isinstance(after, Effect):
        return Applied(before=job, after=job, effect=after)
    if after.status not in targets:
        raise InvalidTransitionError(f"job {job.id}: {job.status} -> {after.status} by {event}")
    return Applied(before=job, after=after, effect=_CHANGED)


def _holds(job: Job, event: JobEvent) -> bool:
    """Whether an event speaks of the running attempt; one that names neither worker nor attempt does."""
    worker_id, attempt = getattr(event, "worker_id", None), getattr(event, "attempt", None)
    return (worker_id is None or worker_id == job.worker_id) and (attempt is None or attempt == job.attempt)


def _next(job: Job, event: JobEvent) -> Job | Effect:
    """The job after an event that `JOB_TRANSITIONS` has for its status, and that speaks of its attempt."""
    match event:
        case Taken(worker_id=worker_id, now_ms=now):
            return replace(
                job,
                status=JobStatus.IN_PROGRESS,
                attempt=job.attempt + 1,
                worker_id=worker_id,
                started_ms=now,
                confirmed_ms=None,
                first_output_ms=None,
                output=None,
                error=None,
            )
        case Confirmed(now_ms=now):
            return Effect.IGNORED_STATE if job.confirmed_ms is not None else replace(job, confirmed_ms=now)
        case Progressed(now_ms=now, output=output):
            confirmed_ms = now if job.confirmed_ms is None else job.confirmed_ms
            return replace(job, output=output, confirmed_ms=confirmed_ms)
        case ResultPosted():
            return _after_result(job, event)
        case WorkerLost(now_ms=now, reason=reason):
            return _after_loss(job, now, reason)
        case PlatformInterrupted(now_ms=now, reason=reason):
            return _requeue(job, now, reason, retries=job.retries)
        case Cancelled(now_ms=now):
            return _finish(job, JobStatus.CANCELLED, now)
        case ExecutionTimedOut(now_ms=now):
            return _finish(job, JobStatus.FAILED, now, error=EXECUTION_TIMEOUT_ERROR)
        case TtlReached(now_ms=now, reason=reason):
            error = f"{TTL_ERROR}: {reason}" if reason else TTL_ERROR
            return _finish(job, JobStatus.TIMED_OUT, now, error=error)
        case Retried():
            return _after_retry(job, event)


def _after_result(job: Job, event: ResultPosted) -> Job:
    if event.error is None:
        return _finish(job, JobStatus.COMPLETED, event.now_ms, output=event.output)
    if event.retryable and job.retries < job.retries_max:
        return _requeue(job, event.now_ms, event.error, retries=job.retries + 1)
    return _finish(job, JobStatus.FAILED, event.now_ms, output=event.output, error=event.error)


def _after_loss(job: Job, now_ms: int, reason: str) -> Job:
    if job.retries >= job.retries_max:
        # The text clients match on (serverless-api.md §2.10); the story is in the attempts.
        return _finish(job, JobStatus.FAILED, now_ms, error=f"job timed out after {job.retries} retries")
    return _requeue(job, now_ms, reason, retries=job.retries + 1)


RETRIED_BY_CLIENT = "retried after"
"""How the reason of an attempt begins that a client's retry followed; the rest is how it had ended."""


def _after_retry(job: Job, event: Retried) -> Job | Effect:
    if job.s3_config == WIPED:
        return Effect.IGNORED_WIPED
    reason = f"{RETRIED_BY_CLIENT} {job.status}: {job.error or 'no reason'}"
    again = _requeue(replace(job, chunk_read=False), event.now_ms, reason, retries=0)
    return replace(again, expires_ms=event.expires_ms, finished_ms=None)


def ttl_window_ms(job: Job) -> int:
    """How long a time to live the job has had, from its submission or the last retry by its client."""
    begun_ms = job.created_ms
    # When each attempt was queued, and the current one: after a retry, the moment of that.
    queued_ms = [*(attempt.queued_ms for attempt in job.attempts), job.queued_ms]
    for attempt, next_queued_ms in zip(job.attempts, queued_ms[1:], strict=True):
        if attempt.reason.startswith(RETRIED_BY_CLIENT):
            begun_ms = next_queued_ms
    return job.expires_ms - begun_ms


STREAM_BEGUN = "; its stream had been read and begins anew"
"""What the reason of an attempt ends with whose chunks had reached a reader (worker-protocol.md §7.2)."""

_REASON_MAX = 500
"""Characters of a reason kept in the story of a job."""


def _requeue(job: Job, now_ms: int, reason: str, *, retries: int) -> Job:
    ended = Attempt(
        number=job.attempt,
        worker_id=job.worker_id,
        queued_ms=job.queued_ms,
        started_ms=job.started_ms,
        confirmed_ms=job.confirmed_ms,
        first_output_ms=job.first_output_ms,
        ended_ms=now_ms if job.finished_ms is None else job.finished_ms,
        reason=reason[:_REASON_MAX] + (STREAM_BEGUN if job.chunk_read else ""),
    )
    # delayTime is recomputed from the requeue (serverless-api.md §2.9).
    return replace(
        job,
        status=JobStatus.IN_QUEUE,
        queued_ms=now_ms,
        retries=retries,
        worker_id=None,
        started_ms=None,
        confirmed_ms=None,
        first_output_ms=None,
        chunk_read=False,
        output=None,
        error=None,
        attempts=_kept((*job.attempts, ended)),
    )


def _kept(attempts: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
    """Of one attempt more than may be kept all but the oldest that can be spared.

    A client's last retry cannot, nor what follows it: from that moment the time to live counts.
    """
    if len(attempts) <= ATTEMPTS_KEPT:
        return attempts
    retries = [n for n, attempt in enumerate(attempts) if attempt.reason.startswith(RETRIED_BY_CLIENT)]
    spared = 2 if retries and retries[-1] == 0 else 0
    return attempts[:spared] + attempts[spared + 1 :]


def _finish(
    job: Job, status: JobStatus, now_ms: int, *, output: bytes | None = None, error: str | None = None
) -> Job:
    return replace(
        job,
        status=status,
        finished_ms=now_ms,
        output=output,
        error=error,
        s3_config=None if job.s3_config is None else WIPED,
    )


def check_worker_transition(before: WorkerState, after: WorkerState) -> None:
    """Return when a worker may go from one state to the other, else raise with both names."""
    if after not in WORKER_TRANSITIONS[before]:
        legal = ", ".join(sorted(WORKER_TRANSITIONS[before])) or "nothing"
        raise InvalidTransitionError(f"worker {before} -> {after}; legal: {legal}")
