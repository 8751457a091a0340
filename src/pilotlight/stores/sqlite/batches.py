"""Operations on batches: functions of a transaction, called by `store` through its threads.

Counters of requests are changed where jobs are changed, in `changes`, and added up for a whole group; so
each operation here that reads them writes what was added up first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pilotlight.core.lifecycle import Applied, Cancelled
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.job import Job
from pilotlight.stores import common
from pilotlight.stores.rows import job_of
from pilotlight.stores.sqlite.changes import JobChanges, known_of
from pilotlight.stores.sqlite.threads import Transaction


def add(transaction: Transaction, batch: Batch, drafts: Sequence[BatchDraft]) -> None:
    """Store a new draft with its first requests."""
    _check_new(transaction, drafts)
    cursor = transaction.execute(
        "insert_batch",
        (
            batch.id,
            batch.endpoint_id,
            batch.key_id,
            batch.name,
            batch.finalized_ms,
            batch.cancel_ms,
            len(drafts),
            sum(len(draft.input) for draft in drafts),
            batch.queued,
            batch.in_progress,
            batch.completed,
            batch.failed,
            batch.cancelled,
            batch.created_ms,
        ),
    )
    if cursor.rowcount == 0:
        raise common.id_taken("batch", batch.id)
    assert cursor.lastrowid is not None
    _insert_drafts(transaction, cursor.lastrowid, drafts)


def add_requests(transaction: Transaction, batch_id: str, drafts: Sequence[BatchDraft]) -> Batch:
    """Append requests to a draft."""
    seq, _ = _draft(transaction, batch_id)
    _check_new(transaction, drafts)
    _insert_drafts(transaction, seq, drafts)
    return _resize(transaction, batch_id, seq)


def remove_request(transaction: Transaction, batch_id: str, request_id: str) -> Batch:
    """Take a request out of a draft."""
    seq, _ = _draft(transaction, batch_id)
    if transaction.execute("delete_draft", (request_id, seq)).rowcount == 0:
        raise common.request_not_found(request_id)
    return _resize(transaction, batch_id, seq)


def rename(transaction: Transaction, batch_id: str, name: str) -> Batch:
    """Give a draft another name."""
    seq, _ = _draft(transaction, batch_id)
    transaction.execute("rename_batch", (name, seq))
    return get(transaction, batch_id)


def finalize(transaction: Transaction, batch_id: str, template: Job) -> Batch:
    """Queue the requests of a draft."""
    seq, before = _draft(transaction, batch_id)
    used = transaction.execute("draft_id_used", (seq,)).fetchone()
    if used is not None:
        raise common.id_taken("job", used[0])
    transaction.execute(
        "queue_drafts",
        (
            seq,
            template.endpoint_id,
            template.key_id,
            template.status.value,
            template.sync,
            template.low_priority,
            template.created_ms,
            template.queued_ms,
            template.expires_ms,
            template.execution_timeout_ms,
            template.retention_ms,
            template.retries_max,
            template.webhook,
            template.s3_config,
            batch_id,
            transaction.purges(template.endpoint_id),
        ),
    )
    transaction.queued_elsewhere()
    transaction.execute("queue_draft_inputs", (seq,))
    transaction.execute("delete_drafts", (seq,))
    transaction.execute("finalize_batch", (template.created_ms, seq))
    counters = transaction.counters(template.endpoint_id)
    counters.queued_bytes += before.input_bytes
    if template.low_priority:
        counters.queued_low += before.total
    else:
        counters.queued += before.total
    return get(transaction, batch_id)


def cancel(transaction: Transaction, batch_id: str, now_ms: int) -> tuple[Batch, list[Applied]]:
    """Cancel the queued requests of a batch for good."""
    seq, batch = _find(transaction, batch_id)
    if not batch.active or batch.cancel_ms is not None:
        return batch, []
    changes = JobChanges(transaction, known_of(transaction.execute("queued_requests", (batch_id,))))
    ended = changes.apply_all(Cancelled(now_ms=now_ms))
    changes.write()
    transaction.execute("cancel_batch", (now_ms, seq))
    return get(transaction, batch_id), ended


def get(transaction: Transaction, batch_id: str) -> Batch:
    """One batch."""
    return _find(transaction, batch_id)[1]


def newest(transaction: Transaction, endpoint_id: str, limit: int) -> list[Batch]:
    """The batches of an endpoint, newest first."""
    return [_batch(row) for row in transaction.execute("batches", (endpoint_id, max(0, limit)))]


def requests(transaction: Transaction, batch_id: str, offset: int, limit: int) -> list[Job | BatchDraft]:
    """A page of the requests of a batch: drafts, or jobs."""
    seq, batch = _find(transaction, batch_id)
    place = (max(0, limit), max(0, offset))
    if batch.finalized_ms is None:
        rows = transaction.execute("drafts", (seq, *place))
        return [BatchDraft(id=row[0], input=row[1]) for row in rows]
    return [job_of(row) for row in transaction.execute("batch_jobs", (batch_id, *place))]


def prune(transaction: Transaction, ended_before_ms: int, limit: int) -> int:
    """Forget batches that ended and have no jobs left, and drafts of deleted endpoints, in slices."""
    transaction.flush()
    transaction.execute("prune_drafts", (max(0, limit),))
    return transaction.execute("prune_batches", (ended_before_ms, max(0, limit))).rowcount


def _find(transaction: Transaction, batch_id: str) -> tuple[int, Batch]:
    transaction.flush()
    row = transaction.execute("batch", (batch_id,)).fetchone()
    if row is None:
        raise common.batch_not_found(batch_id)
    return row[0], _batch(row)


def _draft(transaction: Transaction, batch_id: str) -> tuple[int, Batch]:
    seq, batch = _find(transaction, batch_id)
    common.check_draft(batch)
    return seq, batch


def _check_new(transaction: Transaction, drafts: Sequence[BatchDraft]) -> None:
    seen: set[str] = set()
    for draft in drafts:
        if draft.id in seen or transaction.execute("request_id_used", (draft.id,)).fetchone()[0]:
            raise common.id_taken("batch request", draft.id)
        seen.add(draft.id)


def _insert_drafts(transaction: Transaction, seq: int, drafts: Sequence[BatchDraft]) -> None:
    transaction.executemany("insert_draft", [(draft.id, seq, draft.input) for draft in drafts])


def _resize(transaction: Transaction, batch_id: str, seq: int) -> Batch:
    transaction.execute("resize_batch", (seq,))
    return get(transaction, batch_id)


def _batch(row: tuple[Any, ...]) -> Batch:
    return Batch(
        id=row[1],
        endpoint_id=row[2],
        key_id=row[3],
        name=row[4],
        finalized_ms=row[5],
        cancel_ms=row[6],
        total=row[7],
        input_bytes=row[8],
        queued=row[9],
        in_progress=row[10],
        completed=row[11],
        failed=row[12],
        cancelled=row[13],
        created_ms=row[14],
    )
