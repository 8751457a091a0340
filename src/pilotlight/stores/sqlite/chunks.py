"""Operations on stream chunks: functions of a transaction, called by `store` through its threads.

Chunks stay until their job is pruned or queued again; reading moves the place up to which a job's chunks
were returned, and deletes nothing.
"""

from __future__ import annotations

from dataclasses import replace

from pilotlight.domain.job import Job, JobStatus
from pilotlight.ports.store import Chunk, ChunkFate
from pilotlight.stores import common
from pilotlight.stores.rows import job_of
from pilotlight.stores.sqlite.changes import SEQ, load
from pilotlight.stores.sqlite.threads import Transaction

_CHUNKS_READ = 32
"""Position of `chunks_read` in `job_records`."""


def append(
    transaction: Transaction,
    job_id: str,
    worker_id: str,
    body: bytes,
    attempt: int | None,
    now_ms: int,
    limit_bytes: int,
) -> ChunkFate:
    """Store a chunk if the worker holds the job and there is room."""
    row = transaction.execute("job_for_chunk", (job_id,)).fetchone()
    if row is None:
        raise common.job_not_found(job_id)
    seq, status, holder, running, unread_bytes, sequence = row
    if status != JobStatus.IN_PROGRESS.value or holder != worker_id or attempt not in {None, running}:
        return ChunkFate.OTHER_ATTEMPT
    if unread_bytes + len(body) > limit_bytes:
        return ChunkFate.FULL
    transaction.execute("count_chunk", (now_ms, len(body), seq))
    transaction.execute("insert_chunk", (seq, running, sequence, body))
    return ChunkFate.STORED


def drain(
    transaction: Transaction, job_id: str, limit_bytes: int, cursor: int | None
) -> tuple[Job, list[Chunk]]:
    """Chunks that were not returned before, or those from `cursor` on, and the job in the same moment."""
    row = load(transaction, job_id)
    job, seq = job_of(row), row[SEQ]
    start = row[_CHUNKS_READ] if cursor is None else cursor
    found: list[Chunk] = []
    size = 0
    for sequence, body in transaction.execute("chunks", (seq, job.attempt, start)):
        if found and size + len(body) > limit_bytes:
            break
        size += len(body)
        found.append(Chunk(sequence=sequence, body=body))
    if not found:
        return job, []
    if cursor is None:
        transaction.execute("mark_read", (found[-1].sequence + 1, size, seq))
    elif not job.chunk_read:
        transaction.execute("mark_seen", (seq,))
    return replace(job, chunk_read=True), found


def waiting(transaction: Transaction, job_id: str, cursor: int | None) -> bool:
    """Whether there are chunks not returned before, or any from `cursor` on."""
    return bool(transaction.execute("has_chunks", (job_id, cursor)).fetchone()[0])
