"""How a job is read, changed and written; used by the operations on jobs, chunks and batches.

Every change of state goes load, `core.lifecycle.apply`, write, inside one transaction of the one
writer; that is the exclusion the port promises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from pilotlight.core.lifecycle import Applied, JobEvent
from pilotlight.domain.job import Job, JobStatus
from pilotlight.stores import common
from pilotlight.stores.rows import job_of
from pilotlight.stores.sqlite import webhooks
from pilotlight.stores.sqlite.known import Known
from pilotlight.stores.sqlite.threads import Transaction

Row = tuple[Any, ...]

SEQ = 27
"""Position of `seq` in `job_records`, after the fields of `Job` but the input."""


class JobChanges:
    """Events applied to several jobs, and written together.

    Args:
        transaction: Where.
        found: The jobs and their numbers.
    """

    def __init__(self, transaction: Transaction, found: Iterable[Known]) -> None:
        self._transaction = transaction
        self._known = {known[0].id: known for known in found}
        self._changed: dict[str, Job] = {}

    def apply(self, job_id: str, event: JobEvent) -> Applied | None:
        """Apply one event and all that follows from it; None when the job is unknown.

        The record itself is written by `write`.
        """
        known = self._known.get(job_id)
        if known is None:
            return None
        job, seq = known
        transaction = self._transaction
        applied = common.apply(job, event, batch_cancelled=False)
        if applied.requeued and job.batch_id is not None and _batch_cancelled(transaction, job.batch_id):
            applied = common.apply(job, event, batch_cancelled=True)
        if not applied.changed:
            return applied
        after = applied.after
        self._changed.setdefault(job_id, job)
        self._known[job_id] = (after, seq)
        transaction.jobs.put(after, seq)
        transaction.counters(after.endpoint_id).move(job, after)
        if job.batch_id is not None:
            counters = transaction.batch_counters(job.batch_id)
            counters[common.batch_counter(job.status)] -= 1
            counters[common.batch_counter(after.status)] += 1
        if applied.requeued and transaction.execute("drop_chunks", (seq,)).rowcount:
            transaction.execute("restart_chunks", (seq,))
        if after.webhook is not None and applied.finished:
            notify(transaction, seq, after)
        return applied

    def apply_all(self, event: JobEvent) -> list[Applied]:
        """Apply one event to each of the jobs."""
        return [applied for job_id in list(self._known) if (applied := self.apply(job_id, event))]

    def write(self) -> None:
        """Write what the events changed."""
        touched: list[Row] = []
        finished: list[Row] = []
        others: list[Row] = []
        size = 0
        for job_id, before in self._changed.items():
            after, seq = self._known[job_id]
            size += 0 if after.output is None else len(after.output)
            if before.status is not JobStatus.IN_PROGRESS or after.attempts is not before.attempts:
                others.append(_update(after, seq, self._transaction.purges(after.endpoint_id)))
            elif after.finished_ms is None:
                touched.append((after.confirmed_ms, after.output, seq))
            else:
                finished.append(
                    (
                        after.status.value,
                        after.confirmed_ms,
                        after.finished_ms,
                        after.output,
                        after.error,
                        after.s3_config,
                        seq,
                    )
                )
        for query, rows in (("touch_job", touched), ("finish_job", finished), ("update_job", others)):
            if rows:
                self._transaction.write_rows(query, rows, size=size)


def find(transaction: Transaction, job_ids: Iterable[str]) -> dict[str, Known]:
    """Those jobs that there are, as the writer knows them or the database has them."""
    found: dict[str, Known] = {}
    missing: list[str] = []
    for job_id in job_ids:
        known = transaction.jobs.get(job_id)
        if known is None:
            missing.append(job_id)
        else:
            found[job_id] = known
    if len(missing) == 1:
        rows = transaction.execute("job", missing).fetchall()
    elif missing:
        rows = transaction.execute("jobs_by_id", (json_list(missing),)).fetchall()
    else:
        rows = []
    for known in known_of(rows):
        found[known[0].id] = known
        transaction.jobs.put(*known)
    return found


def known_of(rows: Iterable[Row]) -> list[Known]:
    """The jobs of records, with their numbers."""
    return [(job_of(row), row[SEQ]) for row in rows]


def json_list(values: Sequence[str] | Sequence[int]) -> str:
    """What `json_each` makes a table of."""
    return msgspec.json.encode(values).decode()


def load(transaction: Transaction, job_id: str) -> Row:
    """The record of a job; NotFoundError when it is unknown."""
    row: Row | None = transaction.execute("job", (job_id,)).fetchone()
    if row is None:
        raise common.job_not_found(job_id)
    return row


def notify(transaction: Transaction, seq: int, ended: Job) -> None:
    """Store the delivery of the webhook of a job that has just ended."""
    body = transaction.execute("input", (seq,)).fetchone()[0]
    webhooks.put(transaction, common.webhook_delivery(ended, body))


def _update(job: Job, seq: int, purges: int) -> Row:
    """What `update_job` writes: everything of a job that an event can change."""
    return (
        job.status.value,
        job.queued_ms,
        job.expires_ms,
        job.attempt,
        job.retries,
        job.worker_id,
        job.started_ms,
        job.confirmed_ms,
        job.first_output_ms,
        1 if job.chunk_read else 0,
        job.finished_ms,
        job.output,
        job.error,
        job.s3_config,
        msgspec.json.encode(job.attempts).decode() if job.attempts else None,
        # What ends in the queue needs none, what is queued again has to outlive the purges before.
        purges,
        seq,
    )


def _batch_cancelled(transaction: Transaction, batch_id: str) -> bool:
    row = transaction.execute("batch_cancelled", (batch_id,)).fetchone()
    return row is not None and bool(row[0])
