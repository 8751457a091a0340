"""The story of a job: what has happened to it, and, while it waits, why.

`GET /status/{id}?timeline=true` shows both; `pilotlight status --timeline` draws them. Pure functions of the
job's record and of a snapshot of its endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pilotlight.core.lifecycle import RETRIED_BY_CLIENT
from pilotlight.domain.job import Attempt, Job, Lane
from pilotlight.domain.worker import WorkerState


class Moment(StrEnum):
    """What a timeline tells of."""

    QUEUED = "queued"
    LEASED = "leased"
    STARTED = "started"
    FIRST_OUTPUT = "first_output"
    REQUEUED = "requeued"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEvent:
    """One thing that happened to a job.

    Attributes:
        event: What.
        at_ms: When.
        attempt: Number of the hand-out it belongs to; None before the first.
        worker_id: Who had the job then.
        reason: Why it was queued again, or how it ended.
    """

    event: Moment
    at_ms: int
    attempt: int | None = None
    worker_id: str | None = None
    reason: str | None = None


_REASON_MAX = 500
"""Characters of an error shown in a timeline; the whole one is in the job."""


def timeline(job: Job) -> list[TimelineEvent]:
    """What has happened to a job, in order.

    A job remembers its latest attempts only (`ATTEMPTS_KEPT`), and the last retry by its client; of others
    nothing is told but that it was queued first.
    """
    events = [TimelineEvent(event=Moment.QUEUED, at_ms=job.created_ms)]
    for position, attempt in enumerate(job.attempts):
        events += _hand_out(attempt.number, attempt.worker_id, attempt)
        number = attempt.number or None
        if attempt.reason.startswith(RETRIED_BY_CLIENT):
            events.append(
                TimelineEvent(
                    event=Moment.FINISHED,
                    at_ms=attempt.ended_ms,
                    attempt=number,
                    worker_id=attempt.worker_id,
                    reason=attempt.reason.removeprefix(RETRIED_BY_CLIENT).strip(),
                )
            )
            following = job.attempts[position + 1 :]
            retried_ms = following[0].queued_ms if following else job.queued_ms
            events.append(
                TimelineEvent(event=Moment.REQUEUED, at_ms=retried_ms, reason="retried by the client")
            )
        else:
            events.append(
                TimelineEvent(
                    event=Moment.REQUEUED,
                    at_ms=attempt.ended_ms,
                    attempt=number,
                    worker_id=attempt.worker_id,
                    reason=attempt.reason,
                )
            )
    events += _hand_out(job.attempt, job.worker_id, job)
    if job.finished_ms is not None:
        ran = job.started_ms is not None
        reason = f"{job.status}: {job.error}" if job.error else str(job.status)
        events.append(
            TimelineEvent(
                event=Moment.FINISHED,
                at_ms=job.finished_ms,
                attempt=job.attempt if ran else None,
                worker_id=job.worker_id if ran else None,
                reason=reason[:_REASON_MAX],
            )
        )
    return events


def _hand_out(number: int, worker_id: str | None, times: Job | Attempt) -> list[TimelineEvent]:
    """The moments of one hand-out; none when there was none."""
    moments = (
        (Moment.LEASED, times.started_ms),
        (Moment.STARTED, times.confirmed_ms),
        (Moment.FIRST_OUTPUT, times.first_output_ms),
    )
    return [
        TimelineEvent(event=event, at_ms=at_ms, attempt=number, worker_id=worker_id)
        for event, at_ms in moments
        if at_ms is not None
    ]


class WaitReason(StrEnum):
    """Why a job is still in the queue."""

    PAUSED = "paused"
    BACKING_OFF = "backing_off"
    STARTING = "starting"
    NO_CAPACITY = "no_capacity"
    LOW_PRIORITY = "low_priority"
    NO_WORKER = "no_worker"
    DRAINING = "draining"
    BEHIND_NORMAL = "behind_normal_priority"
    BUSY = "busy"
    WITHHELD = "withheld"
    POSITION = "position"
    NEXT = "next"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSight:
    """A living worker, as far as it matters to a job that waits.

    Attributes:
        id: Who.
        state: Where it stands.
        stage: Step of its start.
        stage_ms: Since when it has been at that step.
        occupied: Slots in use.
        free: Slots free.
        withholds: Whether it must not be given the job, because it may still hold an earlier attempt of it.
    """

    id: str
    state: WorkerState
    stage: str
    stage_ms: int
    occupied: int = 0
    free: int = 0
    withholds: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitSnapshot:
    """What a queued job's wait depends on.

    Attributes:
        lane: Its class.
        ahead: Jobs to be served before it, counted up to 10,000.
        normal_ahead: Jobs waiting that are not low priority.
        workers_max: Upper bound of workers.
        workers: Living ones, oldest first.
        failures: Consecutive failed starts.
        failure: Why the last of them failed; "" when unknown.
        retry_ms: Until when no worker is started.
        throttled: Why a wanted worker could not be placed.
    """

    lane: Lane
    ahead: int
    normal_ahead: int
    workers_max: int
    workers: Sequence[WorkerSight]
    failures: int = 0
    failure: str = ""
    retry_ms: int | None = None
    throttled: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Why a job waits, for programs and for people."""

    reason: WaitReason
    detail: str
    ahead: int


def explain_wait(snapshot: WaitSnapshot, now_ms: int) -> Wait:
    """The first thing that must change before a queued job can run.

    1. The endpoint is paused. 2. No worker is up: it backs off, one starts, none fits, none is wanted, or the
    last is leaving. 3. Workers are up: others come first, all slots are in use, or who has one free must not
    have it. 4. Nothing: it is next.

    Args:
        snapshot: The endpoint at this moment.
        now_ms: The moment.
    """
    reason, detail = _why(snapshot, now_ms)
    return Wait(reason=reason, detail=detail, ahead=snapshot.ahead)


def _why(snapshot: WaitSnapshot, now_ms: int) -> tuple[WaitReason, str]:
    up = [worker for worker in snapshot.workers if worker.state is WorkerState.READY]
    if not up and snapshot.workers_max == 0:
        return WaitReason.PAUSED, "the endpoint is paused: its workersMax is 0"
    if not up:
        return _why_none_up(snapshot, now_ms)
    if snapshot.lane is Lane.LOW and snapshot.normal_ahead:
        return WaitReason.BEHIND_NORMAL, (
            f"it has low priority, and {_jobs(snapshot.normal_ahead)} of normal priority must be served first"
        )
    free = sum(worker.free for worker in up)
    if free <= 0:
        occupied = sum(worker.occupied for worker in up)
        slots = "the only slot is" if occupied == 1 else f"all {occupied} slots of {_workers(len(up))} are"
        return WaitReason.BUSY, f"{slots} in use{_before(snapshot)}"
    if all(worker.withholds for worker in up if worker.free > 0):
        return (
            WaitReason.WITHHELD,
            "the only workers with a free slot may still hold an earlier attempt of it",
        )
    if snapshot.ahead:
        return WaitReason.POSITION, f"{_jobs(snapshot.ahead)} must be served before it"
    return WaitReason.NEXT, "it is next: a worker with a free slot takes it as soon as it asks for work"


def _why_none_up(snapshot: WaitSnapshot, now_ms: int) -> tuple[WaitReason, str]:
    starting = [worker for worker in snapshot.workers if worker.state is WorkerState.STARTING]
    if not starting and snapshot.retry_ms is not None and snapshot.retry_ms > now_ms:
        cause = f": {snapshot.failure}" if snapshot.failure else ""
        return WaitReason.BACKING_OFF, (
            f"no worker could be started ({_count(snapshot.failures, 'failed start')} in a row){cause}; "
            f"the next try is in {_seconds(snapshot.retry_ms - now_ms)}"
        )
    if starting:
        first = starting[0]
        others = f", and {len(starting) - 1} more" if len(starting) > 1 else ""
        return WaitReason.STARTING, (
            f"worker {first.id} is starting: at stage {first.stage} "
            f"for {_seconds(now_ms - first.stage_ms)}{others}"
        )
    if snapshot.throttled is not None:
        return WaitReason.NO_CAPACITY, f"no room for a worker: {snapshot.throttled}"
    if snapshot.lane is Lane.LOW and not snapshot.normal_ahead:
        return WaitReason.LOW_PRIORITY, "no worker is up, and jobs of low priority start none"
    # A frozen one only waits to be woken.
    leaving = [worker for worker in snapshot.workers if worker.state is not WorkerState.FROZEN]
    if leaving:
        return WaitReason.DRAINING, f"{_workers(len(leaving))} finishing other work before the end"
    return WaitReason.NO_WORKER, "no worker is up; one is about to be started"


def _before(snapshot: WaitSnapshot) -> str:
    return f", and {_jobs(snapshot.ahead)} must be served before it" if snapshot.ahead else ""


def _jobs(count: int) -> str:
    return _count(count, "job")


def _workers(count: int) -> str:
    return _count(count, "worker")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _seconds(milliseconds: int) -> str:
    return f"{max(0, milliseconds) / 1000:.0f} s"
