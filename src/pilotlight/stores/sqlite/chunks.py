"""Operations on stream chunks: functions of a transaction, called by `store` through its threads.

Chunks stay until their job is pruned or queued again, or until they are trimmed; reading moves the place up
to which a job's chunks were returned, and deletes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from pilotlight.domain.job import Job, JobStatus
from pilotlight.errors import PilotlightError
from pilotlight.ports.store import Chunk, ChunkFate
from pilotlight.stores import common
from pilotlight.stores.rows import job_of
from pilotlight.stores.sqlite.changes import SEQ, load
from pilotlight.stores.sqlite.threads import Bulk, Transaction

_CHUNKS_READ = 32
"""Position of `chunks_read` in `job_records`."""


Posting = tuple[str, str, bytes, int | None, int, int]
"""Job, worker, body, attempt, moment, limit of unread bytes: see `JobStore.append_chunk`."""


def append_many(transaction: Transaction, postings: Sequence[Posting]) -> list[ChunkFate | PilotlightError]:
    """Store chunks whose workers hold their jobs, if there is room."""
    return [_append(transaction, *posting) for posting in postings]


def _append(
    transaction: Transaction,
    job_id: str,
    worker_id: str,
    body: bytes,
    attempt: int | None,
    now_ms: int,
    limit_bytes: int,
) -> ChunkFate | PilotlightError:
    row = transaction.execute("job_for_chunk", (job_id,)).fetchone()
    if row is None:
        return common.job_not_found(job_id)
    seq, status, holder, running, unread_bytes, sequence = row
    if status != JobStatus.IN_PROGRESS.value or holder != worker_id or attempt not in {None, running}:
        return ChunkFate.OTHER_ATTEMPT
    if unread_bytes + len(body) > limit_bytes:
        return ChunkFate.FULL
    transaction.execute("count_chunk", (now_ms, len(body), seq))
    transaction.execute("insert_chunk", (seq, running, sequence, body))
    known = transaction.jobs.get(job_id)
    if known is not None:
        transaction.jobs.put(common.after_chunk(known[0], now_ms), seq)
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
    seen = replace(job, chunk_read=True)
    transaction.jobs.put(seen, seq)
    return seen, found


def give_back(transaction: Transaction, job_id: str, returned: Sequence[Chunk], attempt: int) -> None:
    """Let chunks that a drain returned be returned again, unless more were since."""
    first, end = returned[0].sequence, returned[-1].sequence + 1
    transaction.execute("mark_unread", (first, job_id, attempt, end))


def trim(transaction: Transaction, job_id: str, limit: int) -> int:
    """Forget chunks that were returned."""
    return transaction.execute("trim_chunks", (job_id, max(0, limit))).rowcount


def waiting(transaction: Transaction, job_id: str, cursor: int | None) -> bool:
    """Whether there are chunks not returned before, or any from `cursor` on."""
    return bool(transaction.execute("has_chunks", (job_id, cursor)).fetchone()[0])


APPEND: Bulk[Posting, ChunkFate] = Bulk(1, append_many)
"""Before the events of a group, one of which may be the end of the job."""
