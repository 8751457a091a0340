"""Operations on jobs other than changes of state: functions of a transaction, called by `store`."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from msgspec.structs import replace

from pilotlight.core.lifecycle import Applied, Cancelled, JobEvent
from pilotlight.domain.job import Idempotency, Job, JobCounts, JobStatus, QueueDemand
from pilotlight.ports.store import Chunk, ChunkFate
from pilotlight.stores import common
from pilotlight.stores.postgresql.changes import (
    Changes,
    apply_events,
    leave_webhooks,
    lock,
)
from pilotlight.stores.postgresql.database import Transaction
from pilotlight.stores.rows import job_of

_PAGES = {
    (False, False): "jobs_newest",
    (False, True): "jobs_newest_before",
    (True, False): "jobs_newest_by_status",
    (True, True): "jobs_newest_by_status_before",
}
"""The query for a page of jobs: in one state only, from a position on."""

_SEQUENCE_MAX = 2**31 - 1
"""The greatest number a chunk can have; a client may ask for a greater one."""

_NEW = (
    "id", "endpoint_id", "key_id", "input", "sync", "low_priority", "created_ms", "queued_ms", "expires_ms",
    "execution_timeout_ms", "retention_ms", "attempt", "retries", "retries_max", "webhook", "s3_config",
    "batch_id",
)  # fmt: skip


class RacedError(Exception):
    """Another transaction has remembered the same idempotency key meanwhile: look again."""


async def insert(transaction: Transaction, jobs: Sequence[Job]) -> dict[str, int]:
    """Queue new jobs, in order; those stored, with their `seq`. The others' ids exist already."""
    rows = await transaction.rows("insert_jobs", *([getattr(job, name) for job in jobs] for name in _NEW))
    stored = {row[0]: row[1] for row in rows}

    async def happened(later: Transaction) -> bool:
        return len(await later.rows("existing_jobs", list(stored))) == len(stored)

    transaction.happened = happened
    return stored


async def submit_once(transaction: Transaction, job: Job, idempotency: Idempotency) -> Job:
    """Queue a new job and remember it, or find the one of an earlier submission."""
    known = await earlier(transaction, job, idempotency)
    if known is not None:
        return known
    place = (job.endpoint_id, job.key_id, idempotency.key)
    await transaction.run("forget_submission", *place, job.created_ms)
    stored = await insert(transaction, [job])
    if job.id not in stored:
        raise common.id_taken("job", job.id)
    if not await transaction.run("remember", *place, idempotency.fingerprint, stored[job.id]):
        raise RacedError
    return job


async def earlier(transaction: Transaction, job: Job, idempotency: Idempotency) -> Job | None:
    """The job that a submission would find."""
    place = (job.endpoint_id, job.key_id, idempotency.key)
    row = await transaction.row("remembered", *place, job.created_ms)
    if row is None:
        return None
    common.check_fingerprint(idempotency, row["fingerprint"])
    return job_of(row)


async def find(transaction: Transaction, job_id: str) -> Job:
    """One job."""
    row = await transaction.row("job", job_id)
    if row is None:
        raise common.job_not_found(job_id)
    return job_of(row)


async def page(
    transaction: Transaction,
    endpoint_id: str,
    status: JobStatus | None,
    before: tuple[int, str] | None,
    limit: int,
) -> list[Job]:
    """A page of jobs, newest first."""
    query = _PAGES[status is not None, before is not None]
    state = () if status is None else (status.value,)
    rows = await transaction.rows(query, endpoint_id, max(0, limit), *state, *(before or ()))
    return [job_of(row) for row in rows]


async def append_chunk(
    transaction: Transaction,
    job_id: str,
    worker_id: str,
    body: bytes,
    attempt: int | None,
    now_ms: int,
    limit_bytes: int,
) -> ChunkFate:
    """Store a chunk with a single statement, which is a transaction of its own."""
    ours = secrets.randbits(62) + 1

    async def happened(later: Transaction) -> bool:
        seq = await later.value("hold_job", job_id)
        return seq is not None and bool(await later.value("chunk_of", seq, ours))

    transaction.happened = happened
    if await transaction.run("append_chunk", job_id, worker_id, attempt, now_ms, body, limit_bytes, ours):
        return ChunkFate.STORED
    transaction.happened = None
    job = await find(transaction, job_id)
    return ChunkFate.FULL if common.holds(job, worker_id, attempt) else ChunkFate.OTHER_ATTEMPT


async def peek(transaction: Transaction, job_id: str, cursor: int | None) -> tuple[Job, bool]:
    """A job, and whether it has chunks for a reader."""
    row = await transaction.row("job_with_news", job_id, _sequence(cursor))
    if row is None:
        raise common.job_not_found(job_id)
    return job_of(row), row["news"]


async def has_chunks(transaction: Transaction, job_id: str, cursor: int | None) -> bool:
    """Whether a job has chunks for a reader; an unknown one has none."""
    row = await transaction.row("job_with_news", job_id, _sequence(cursor))
    return row is not None and row["news"]


async def trim(transaction: Transaction, job_id: str, limit: int) -> int:
    """Forget chunks that were drained."""
    return await transaction.run("trim_chunks", job_id, max(0, limit))


async def drain(
    transaction: Transaction, job_id: str, limit_bytes: int, cursor: int | None
) -> tuple[Job, list[Chunk]]:
    """Read chunks and remember how far, unless a reader remembers that itself."""
    rows = await transaction.rows("lock_jobs", [job_id])
    if not rows:
        raise common.job_not_found(job_id)
    row, job = rows[0], job_of(rows[0])
    number = _sequence(cursor)
    start = row["chunks_read"] if number is None else number
    found = await transaction.rows("chunks", row["seq"], job.attempt, start, limit_bytes)
    if not found:
        return job, []
    if cursor is None:
        size = sum(len(body) for _, body in found)
        await transaction.run("mark_drained", row["seq"], found[-1][0] + 1, size)
    elif not job.chunk_read:
        await transaction.run("mark_read", row["seq"])
    last = found[-1][0]

    async def happened(later: Transaction) -> bool:
        # What another reader has drained since includes what was drained here.
        now = await later.row("chunks_read", row["seq"])
        return now is not None and now["chunk_read"] and (cursor is not None or now["chunks_read"] > last)

    transaction.happened = happened
    chunks = [Chunk(sequence=sequence, body=body) for sequence, body in found]
    return replace(job, chunk_read=True), chunks


async def give_back_chunks(
    transaction: Transaction, job_id: str, returned: Sequence[Chunk], attempt: int
) -> None:
    """Let chunks that a drain returned be returned again, unless more were since."""
    first, end = returned[0].sequence, returned[-1].sequence + 1
    await transaction.run("mark_unread", first, job_id, attempt, end)


def _sequence(cursor: int | None) -> int | None:
    return None if cursor is None else max(0, min(cursor, _SEQUENCE_MAX))


async def demand(transaction: Transaction, endpoint_id: str, overdue_before_ms: int) -> QueueDemand:
    """The queue as the scaler sees it, from counters and the ends of the index."""
    row = await transaction.row("demand", endpoint_id, overdue_before_ms, common.OVERDUE_COUNT_MAX)
    return QueueDemand(**dict(row))


async def counts(transaction: Transaction, endpoint_id: str) -> JobCounts:
    """The counters of `/health`."""
    return JobCounts(**dict(await transaction.row("counts", endpoint_id)))


async def ahead(transaction: Transaction, job_id: str) -> int:
    """How many jobs are to be served before a queued one."""
    row = await transaction.row("place", job_id)
    if row is None:
        raise common.job_not_found(job_id)
    endpoint_id, status, *place = row
    if status != JobStatus.IN_QUEUE.value:
        return 0
    number: int = await transaction.value("count_ahead", endpoint_id, *place, common.AHEAD_COUNT_MAX)
    return number


async def running(transaction: Transaction, worker_id: str | None) -> list[Job]:
    """Jobs handed out, of one worker or of all."""
    if worker_id is None:
        rows = await transaction.rows("running_jobs")
    else:
        rows = await transaction.rows("running_jobs_of_worker", worker_id)
    return [job_of(row) for row in rows]


async def due(transaction: Transaction, now_ms: int, limit: int) -> list[Job]:
    """Living jobs whose time is over."""
    return [job_of(row) for row in await transaction.rows("due_jobs", now_ms, max(0, limit))]


async def cancel_some(
    transaction: Transaction, endpoint_id: str, event: JobEvent, limit: int
) -> list[Applied]:
    """Apply an event to the oldest living jobs of an endpoint."""
    rows = await transaction.rows("living_jobs", endpoint_id, max(0, limit))
    applied = await apply_events(transaction, [(row[0], event) for row in rows])
    return [each for each in applied if each is not None]


async def purge(transaction: Transaction, endpoint_id: str) -> int:
    """Begin a new life of a queue, with the queue lock to ourselves; how many jobs were left behind."""
    queued, queued_low, queued_bytes = await transaction.row("count_queued", endpoint_id)
    if not queued + queued_low:
        return 0
    await transaction.run("begin_epoch", endpoint_id)
    await transaction.run("uncount_queued", endpoint_id, queued, queued_low, queued_bytes)
    await transaction.run("cancel_queued_of_batches", endpoint_id)
    return int(queued + queued_low)


async def delete_purged(transaction: Transaction, now_ms: int, limit: int) -> int:
    """Delete purged jobs, and leave webhooks of those that have one."""
    rows = await transaction.rows("purged_jobs", max(0, limit))
    if not rows:
        return 0
    ended: list[tuple[int, Job]] = []
    for row in rows:
        job = job_of(row)
        if job.webhook is not None:
            after = common.apply(job, Cancelled(now_ms=now_ms), batch_cancelled=False).after
            ended.append((row["seq"], after))
    await leave_webhooks(transaction, ended)
    return await transaction.run("delete_jobs", [row["seq"] for row in rows])


async def shorten(transaction: Transaction, job_id: str, now_ms: int, ttl_ms: int) -> None:
    """Shorten the life of a job's record."""
    changes: Changes = await lock(transaction, [(job_id, Cancelled(now_ms=now_ms))])
    if job_id not in changes.entries:
        raise common.job_not_found(job_id)
    job = changes.entries[job_id].now
    after = common.after_shortening(job, now_ms=now_ms, ttl_ms=ttl_ms)
    if after != job:
        changes.replace(after)
        await changes.write(transaction)


async def prune(transaction: Transaction, now_ms: int, limit: int) -> int:
    """Forget ended jobs past their retention."""
    return await transaction.run("prune_jobs", now_ms, max(0, limit))
