"""Answers of the job routes as JSON; outputs are copied as bytes and never parsed again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pilotlight.domain.job import Job, JobCounts, JobStatus
from pilotlight.domain.worker import WorkerState


def submitted_view(job: Job) -> bytes:
    """The answer of `/run` (serverless-api.md §2.4)."""
    return msgspec.json.encode({"id": job.id, "status": job.status})


def job_view(job: Job) -> bytes:
    """The job object; keys that do not apply are left out (serverless-api.md §2.9)."""
    view: dict[str, object] = {"id": job.id, "status": job.status}
    if job.delay_ms is not None:
        view["delayTime"] = job.delay_ms
        view["workerId"] = job.worker_id
    if job.status.terminal and job.execution_ms is not None:
        view["executionTime"] = job.execution_ms
    if job.output is not None:
        view["output"] = msgspec.Raw(job.output)
    if job.error is not None:
        view["error"] = job.error
    if job.retries:
        view["retries"] = job.retries
    return msgspec.json.encode(view)


def cancelled_view(job: Job) -> bytes:
    """The answer of `/cancel` (serverless-api.md §2.15)."""
    view: dict[str, object] = {"id": job.id, "status": job.status}
    if job.delay_ms is not None:
        view["delayTime"] = job.delay_ms
    if job.status.terminal and job.execution_ms is not None:
        view["executionTime"] = job.execution_ms
    return msgspec.json.encode(view)


def stream_view(status: JobStatus, chunks: Sequence[bytes]) -> bytes:
    """The answer of `/stream`: always exactly `status` and a list (serverless-api.md §2.8)."""
    return msgspec.json.encode({"status": status, "stream": [msgspec.Raw(chunk) for chunk in chunks]})


def taken_view(jobs: Sequence[Job], *, single: bool) -> bytes:
    """Jobs as a worker expects them (worker-protocol.md §3.1, §3.2)."""
    items = [{"id": job.id, "input": msgspec.Raw(job.input)} for job in jobs]
    return msgspec.json.encode(items[0] if single and len(items) == 1 else items)


def health_view(
    counts: JobCounts,
    *,
    held: int,
    in_flight: int,
    workers: Sequence[tuple[WorkerState, int, int]],
    unhealthy: int,
    throttled: bool,
) -> bytes:
    """The eleven counters of `/health` (serverless-api.md §2.15).

    Args:
        counts: The queue's counters.
        held: Requests on the data path that wait for a worker; they are in the queue, too.
        in_flight: Requests on the data path being served.
        workers: State, occupied slots and free slots of each living worker.
        unhealthy: Consecutive starts that failed.
        throttled: Whether a wanted worker could not be placed.
    """
    up = [(occupied, free) for state, occupied, free in workers if state is WorkerState.READY]
    draining = sum(state is WorkerState.DRAINING for state, _, _ in workers)
    return msgspec.json.encode(
        {
            "jobs": {
                "completed": counts.completed,
                "failed": counts.failed,
                "inProgress": counts.in_progress + in_flight,
                "inQueue": counts.queued + held,
                "retried": counts.retried,
            },
            "workers": {
                "idle": sum(occupied == 0 for occupied, _ in up),
                "initializing": sum(state is WorkerState.STARTING for state, _, _ in workers),
                "ready": sum(free > 0 for _, free in up),
                "running": sum(occupied > 0 for occupied, _ in up) + draining,
                "throttled": int(throttled),
                "unhealthy": unhealthy,
            },
        }
    )
