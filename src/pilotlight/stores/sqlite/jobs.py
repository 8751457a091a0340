"""Operations on the queue: functions of a transaction, called by `store` through its threads.

Every change of state goes load, `core.lifecycle.apply`, write, inside one transaction of the one
writer; that is the exclusion the port promises. What may go wrong is found before the first write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pilotlight.core import lifecycle
from pilotlight.core.lifecycle import Applied, JobEvent, PlatformInterrupted, Taken
from pilotlight.domain.job import Job, JobCounts, JobStatus, QueueDemand
from pilotlight.ports.store import Chunk
from pilotlight.stores import common
from pilotlight.stores.sqlite.threads import Transaction

_SEQ = 21
"""Position of `seq` in `job_records`, after the fields of `Job`."""

_PAGES = {
    (False, False): "jobs_newest",
    (False, True): "jobs_newest_before",
    (True, False): "jobs_newest_by_status",
    (True, True): "jobs_newest_by_status_before",
}
"""The query for a page of jobs: in one state only, from a position on."""


def submit(transaction: Transaction, job: Job) -> None:
    """Store a new job with its input and count it."""
    assert job.status is JobStatus.IN_QUEUE
    cursor = transaction.execute(
        "insert_job",
        (
            job.id,
            job.endpoint_id,
            job.key_id,
            job.status.value,
            job.sync,
            job.low_priority,
            job.created_ms,
            job.queued_ms,
            job.expires_ms,
            job.execution_timeout_ms,
            job.retention_ms,
            job.attempt,
            job.retries,
            job.worker_id,
            job.started_ms,
            job.confirmed,
            job.chunk_read,
            job.finished_ms,
            job.output,
            job.error,
        ),
    )
    if cursor.rowcount == 0:
        raise common.id_taken("job", job.id)
    transaction.execute("insert_job_input", (cursor.lastrowid, job.input))
    transaction.counters(job.endpoint_id).move(None, job)


def take(transaction: Transaction, endpoint_id: str, worker_id: str, count: int, now_ms: int) -> list[Job]:
    """Pick the next jobs in the order of service and hand them to a worker."""
    rows = transaction.execute("next_jobs", (endpoint_id, now_ms, max(0, count))).fetchall()
    event = Taken(worker_id=worker_id, now_ms=now_ms)
    return [_apply(transaction, row, event).after for row in rows]


def give_back(transaction: Transaction, jobs: Sequence[Job], now_ms: int) -> None:
    """Requeue jobs whose taker went away before it learned of them, unless something else happened since."""
    for taken in jobs:
        row = transaction.execute("job", (taken.id,)).fetchone()
        if row is not None and _job(row) == taken:
            _apply(transaction, row, PlatformInterrupted(now_ms=now_ms))


def apply(transaction: Transaction, job_id: str, event: JobEvent) -> Applied:
    """Apply one event to one job."""
    return _apply(transaction, _row(transaction, job_id), event)


def job(transaction: Transaction, job_id: str) -> Job:
    """One job."""
    return _job(_row(transaction, job_id))


def jobs(
    transaction: Transaction,
    endpoint_id: str,
    status: JobStatus | None,
    before: tuple[int, str] | None,
    limit: int,
) -> list[Job]:
    """A page of jobs, newest first."""
    query = _PAGES[status is not None, before is not None]
    state = () if status is None else (status.value,)
    rows = transaction.execute(query, (endpoint_id, *state, *(before or ()), max(0, limit)))
    return [_job(row) for row in rows]


def append_chunk(transaction: Transaction, job_id: str, worker_id: str, body: bytes) -> bool:
    """Store a chunk if the worker holds the job; its input is not read for that."""
    row = transaction.execute("job_for_chunk", (job_id,)).fetchone()
    if row is None:
        raise common.job_not_found(job_id)
    seq, status, holder, sequence = row
    if status != JobStatus.IN_PROGRESS.value or holder != worker_id:
        return False
    transaction.execute("count_chunk", (seq,))
    transaction.execute("insert_chunk", (seq, sequence, body))
    return True


def drain_chunks(transaction: Transaction, job_id: str, limit_bytes: int) -> tuple[Job, list[Chunk]]:
    """Take waiting chunks away and mark the job as read."""
    row = _row(transaction, job_id)
    current, seq = _job(row), row[_SEQ]
    chunks: list[Chunk] = []
    size = 0
    for sequence, body in transaction.execute("chunks", (seq,)):
        size += len(body)
        if chunks and size > limit_bytes:
            break
        chunks.append(Chunk(sequence=sequence, body=body))
    if not chunks:
        return current, []
    transaction.execute("delete_chunks_through", (seq, chunks[-1].sequence))
    if not current.chunk_read:
        current = replace(current, chunk_read=True)
        _write(transaction, seq, current)
    return current, chunks


def has_chunks(transaction: Transaction, job_id: str) -> bool:
    """Whether chunks wait for a reader."""
    return bool(transaction.execute("has_chunks", (job_id,)).fetchone()[0])


def demand(transaction: Transaction, endpoint_id: str, overdue_before_ms: int) -> QueueDemand:
    """The queue as the scaler sees it, from counters and the ends of the index."""
    row = transaction.execute("counters", (endpoint_id,)).fetchone()
    if row is None:
        return QueueDemand()
    queued, queued_low, in_progress = row[:3]
    oldest_ms, overdue = None, 0
    if queued:
        oldest_ms = transaction.execute("oldest_queued", (endpoint_id,)).fetchone()[0]
        overdue = transaction.execute(
            "count_overdue", (endpoint_id, overdue_before_ms, common.OVERDUE_COUNT_MAX)
        ).fetchone()[0]
    return QueueDemand(
        queued=queued, queued_low=queued_low, oldest_ms=oldest_ms, overdue=overdue, in_progress=in_progress
    )


def counts(transaction: Transaction, endpoint_id: str) -> JobCounts:
    """The counters of `/health`."""
    row = transaction.execute("counters", (endpoint_id,)).fetchone()
    if row is None:
        return JobCounts()
    queued, queued_low, in_progress, completed, failed, retried = row
    return JobCounts(
        queued=queued + queued_low,
        in_progress=in_progress,
        completed=completed,
        failed=failed,
        retried=retried,
    )


def running(transaction: Transaction, worker_id: str | None) -> list[Job]:
    """Jobs handed out, of one worker or of all."""
    if worker_id is None:
        rows = transaction.execute("running_jobs")
    else:
        rows = transaction.execute("running_jobs_of_worker", (worker_id,))
    return [_job(row) for row in rows]


def due(transaction: Transaction, now_ms: int, limit: int) -> list[Job]:
    """Living jobs whose time is over."""
    return [_job(row) for row in transaction.execute("due_jobs", (now_ms, max(0, limit)))]


def cancel_some(
    transaction: Transaction, endpoint_id: str, event: JobEvent, after: tuple[int, str]
) -> list[Applied]:
    """Apply an event to the next living jobs of an endpoint after a position; empty behind the last."""
    rows = transaction.execute("living_jobs", (endpoint_id, *after, common.CANCEL_SLICE)).fetchall()
    return [_apply(transaction, row, event) for row in rows]


def shorten(transaction: Transaction, job_id: str, now_ms: int, ttl_ms: int) -> None:
    """Shorten the life of a job's record."""
    row = _row(transaction, job_id)
    before = _job(row)
    after = common.after_shortening(before, now_ms=now_ms, ttl_ms=ttl_ms)
    if after != before:
        _write(transaction, row[_SEQ], after)


def prune(transaction: Transaction, now_ms: int, limit: int) -> int:
    """Forget ended jobs past their retention."""
    return transaction.execute("prune_jobs", (now_ms, max(0, limit))).rowcount


def _row(transaction: Transaction, job_id: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = transaction.execute("job", (job_id,)).fetchone()
    if row is None:
        raise common.job_not_found(job_id)
    return row


def _apply(transaction: Transaction, row: tuple[Any, ...], event: JobEvent) -> Applied:
    applied = lifecycle.apply(_job(row), event)
    if not applied.changed:
        return applied
    _write(transaction, row[_SEQ], applied.after)
    if applied.requeued:
        transaction.execute("delete_chunks", (row[_SEQ],))
    transaction.counters(applied.after.endpoint_id).move(applied.before, applied.after)
    return applied


def _write(transaction: Transaction, seq: int, job: Job) -> None:
    transaction.execute(
        "update_job",
        (
            job.status.value,
            job.queued_ms,
            job.expires_ms,
            job.retention_ms,
            job.attempt,
            job.retries,
            job.worker_id,
            job.started_ms,
            job.confirmed,
            job.chunk_read,
            job.finished_ms,
            job.output,
            job.error,
            seq,
        ),
    )


def _job(row: tuple[Any, ...]) -> Job:
    return Job(
        id=row[0],
        endpoint_id=row[1],
        key_id=row[2],
        input=row[3],
        status=JobStatus(row[4]),
        sync=bool(row[5]),
        low_priority=bool(row[6]),
        created_ms=row[7],
        queued_ms=row[8],
        expires_ms=row[9],
        execution_timeout_ms=row[10],
        retention_ms=row[11],
        attempt=row[12],
        retries=row[13],
        worker_id=row[14],
        started_ms=row[15],
        confirmed=bool(row[16]),
        chunk_read=bool(row[17]),
        finished_ms=row[18],
        output=row[19],
        error=row[20],
    )
