"""Operations on batches: functions of a transaction, called by `store`.

Whoever changes a batch locks its row first; whoever sends one of its jobs back to the queue shares that
lock, so that a cancellation either sees the job in the queue or is seen by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from pilotlight.core.lifecycle import Applied, Cancelled
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.job import Job
from pilotlight.stores import common
from pilotlight.stores.postgresql import jobs
from pilotlight.stores.postgresql.changes import Changes
from pilotlight.stores.postgresql.database import Transaction
from pilotlight.stores.rows import job_of

_SLICE_BYTES = 8 * 1024 * 1024
"""Inputs that a finalization has in memory at a time."""


async def add(transaction: Transaction, batch: Batch, drafts: Sequence[BatchDraft]) -> None:
    """Store a new draft with its first requests."""
    row = (batch.id, batch.endpoint_id, batch.key_id, batch.name, batch.created_ms)
    if not await transaction.run("insert_batch", *row):
        raise common.id_taken("batch", batch.id)
    await _append(transaction, batch.id, drafts)


async def add_requests(transaction: Transaction, batch_id: str, drafts: Sequence[BatchDraft]) -> Batch:
    """Append requests to a draft."""
    await _lock_draft(transaction, batch_id)
    await _append(transaction, batch_id, drafts)
    return await find(transaction, batch_id)


async def _append(transaction: Transaction, batch_id: str, drafts: Sequence[BatchDraft]) -> None:
    ids, inputs = [draft.id for draft in drafts], [draft.input for draft in drafts]
    stored = {row[0] for row in await transaction.rows("insert_drafts", batch_id, ids, inputs)}
    taken = {row[0] for row in await transaction.rows("existing_jobs", ids)}
    for draft_id in ids:
        if draft_id not in stored or draft_id in taken:
            raise common.id_taken("batch request", draft_id)
        stored.discard(draft_id)
    await transaction.run("resize_batch", batch_id, len(drafts), sum(map(len, inputs)))


async def remove_request(transaction: Transaction, batch_id: str, request_id: str) -> Batch:
    """Take a request out of a draft."""
    await _lock_draft(transaction, batch_id)
    size = await transaction.value("delete_draft", batch_id, request_id)
    if size is None:
        raise common.request_not_found(request_id)
    await transaction.run("resize_batch", batch_id, -1, -size)
    return await find(transaction, batch_id)


async def rename(transaction: Transaction, batch_id: str, name: str) -> Batch:
    """Give a draft another name."""
    await _lock_draft(transaction, batch_id)
    await transaction.run("rename_batch", batch_id, name)
    return await find(transaction, batch_id)


async def finalize(transaction: Transaction, batch_id: str, template: Job) -> Batch:
    """Queue the requests of a draft as jobs, slice by slice in one transaction."""
    await _lock_draft(transaction, batch_id)
    position, number = -1, 0
    last: list[Job] = []
    while rows := await transaction.rows("drafts_after", batch_id, position, _SLICE_BYTES):
        last = [
            replace(
                template, id=row["id"], input=row["input"], input_bytes=len(row["input"]), batch_id=batch_id
            )
            for row in rows
        ]
        stored = await jobs.insert(transaction, last)
        for job in last:
            if job.id not in stored:
                raise common.id_taken("job", job.id)
        position, number = rows[-1]["seq"], number + len(rows)
    if number:
        await transaction.run("change_batch_counters", [batch_id], [number], [0], [0], [0], [0])
    await transaction.run("delete_drafts", batch_id)
    await transaction.run("finalize_batch", batch_id, template.created_ms)

    async def happened(later: Transaction) -> bool:
        return (await find(later, batch_id)).finalized_ms is not None

    transaction.happened = happened
    return await find(transaction, batch_id)


async def cancel(transaction: Transaction, batch_id: str, now_ms: int) -> tuple[Batch, list[Applied]]:
    """Cancel the queued requests of a batch for good."""
    # Jobs before batches, as everywhere. Once the batch is locked nothing of it is queued again, so what was
    # queued again in between is found then.
    rows = {row["seq"]: row for row in await transaction.rows("queued_jobs_of_batch", batch_id)}
    batch = await _lock(transaction, batch_id)
    if not batch.active or batch.cancel_ms is not None:
        return batch, []
    await transaction.run("mark_batch_cancelled", batch_id, now_ms)
    rows |= {row["seq"]: row for row in await transaction.rows("queued_jobs_of_batch", batch_id)}
    changes = Changes()
    ids = [changes.add(rows[seq]).id for seq in sorted(rows)]
    applied = [changes.apply(job_id, Cancelled(now_ms=now_ms)) for job_id in ids]
    await changes.write(transaction)
    return await find(transaction, batch_id), [each for each in applied if each is not None]


async def find(transaction: Transaction, batch_id: str) -> Batch:
    """One batch."""
    row = await transaction.row("batch", batch_id)
    if row is None:
        raise common.batch_not_found(batch_id)
    return _batch(row)


async def newest(transaction: Transaction, endpoint_id: str, limit: int) -> list[Batch]:
    """Batches of an endpoint, newest first."""
    return [_batch(row) for row in await transaction.rows("batches", endpoint_id, max(0, limit))]


async def requests(
    transaction: Transaction, batch_id: str, offset: int, limit: int
) -> list[Job | BatchDraft]:
    """A page of the requests of a batch."""
    batch = await find(transaction, batch_id)
    page = (batch_id, max(0, offset), max(0, limit))
    if batch.finalized_ms is None:
        return [BatchDraft(id=row[0], input=row[1]) for row in await transaction.rows("draft_page", *page)]
    return [job_of(row) for row in await transaction.rows("request_page", *page)]


async def prune(transaction: Transaction, ended_before_ms: int, limit: int) -> int:
    """Forget batches of which nothing is left, and drafts of deleted endpoints, in slices."""
    await transaction.run("prune_drafts", max(0, limit))
    old = [row[0] for row in await transaction.rows("old_batches", ended_before_ms, max(0, limit))]
    return await transaction.run("delete_batches", old)


async def _lock(transaction: Transaction, batch_id: str) -> Batch:
    await transaction.run("lock_batch", batch_id)
    return await find(transaction, batch_id)


async def _lock_draft(transaction: Transaction, batch_id: str) -> None:
    common.check_draft(await _lock(transaction, batch_id))


def _batch(row: Any) -> Batch:
    return Batch(**dict(row))
