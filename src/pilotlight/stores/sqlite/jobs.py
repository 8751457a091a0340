"""Operations on the queue: functions of a transaction, called by `store` through its threads.

What may go wrong is found before the first write. A purged job stays in its table until `delete_purged`,
but the views hide it and no operation but that one sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from msgspec.structs import replace

from pilotlight.core.lifecycle import Applied, Cancelled, JobEvent, PlatformInterrupted, Taken
from pilotlight.domain.job import Idempotency, Job, JobCounts, JobStatus, QueueDemand
from pilotlight.errors import PilotlightError
from pilotlight.stores import common
from pilotlight.stores.rows import job_of
from pilotlight.stores.sqlite.changes import SEQ, JobChanges, Row, find, json_list, known_of, load, notify
from pilotlight.stores.sqlite.known import Known
from pilotlight.stores.sqlite.threads import Bulk, Transaction

_CREATED, _RANK = 7, 28
"""Positions in `job_records`."""

_FINGERPRINT = 34
"""Position of what `remembered` has behind `job_records`."""

_RANKS = range(6)

Submission = tuple[Job, Idempotency | None]
TakeOrder = tuple[str, str, int, int, frozenset[str]]
"""Endpoint, worker, number, moment, jobs to pass by: see `JobStore.take`."""

Events = Sequence[tuple[str, JobEvent]]


def submit_many(transaction: Transaction, items: Sequence[Submission]) -> list[Job | PilotlightError]:
    """Store new jobs with their inputs and count them, or find those of earlier, equal submissions."""
    answers: list[Job | PilotlightError] = []
    fresh: list[int] = []
    keys: dict[tuple[str, str, str], Submission] = {}
    for number, (job, idempotency) in enumerate(items):
        assert job.status is JobStatus.IN_QUEUE
        earlier = None
        if idempotency is not None:
            earlier = _earlier(transaction, job, idempotency, keys)
        answers.append(job if earlier is None else earlier)
        if earlier is None:
            fresh.append(number)
    refused = _insert(transaction, [items[number] for number in fresh])
    for index in refused:
        answers[fresh[index]] = common.id_taken("job", items[fresh[index]][0].id)
    return answers


def earlier(transaction: Transaction, job: Job, idempotency: Idempotency) -> Job | None:
    """The job that a submission would find."""
    place = (job.endpoint_id, job.key_id, idempotency.key)
    row = transaction.execute("remembered", place).fetchone()
    if row is None or common.forgotten(found := job_of(row), job.created_ms):
        return None
    common.check_fingerprint(idempotency, row[_FINGERPRINT])
    return found


def _earlier(
    transaction: Transaction,
    job: Job,
    idempotency: Idempotency,
    keys: dict[tuple[str, str, str], Submission],
) -> Job | PilotlightError | None:
    """The job of an earlier submission under the same key, in `keys` or stored; a refusal; or neither."""
    place = (job.endpoint_id, job.key_id, idempotency.key)
    try:
        found = earlier(transaction, job, idempotency)
        if found is not None:
            return found
        if place not in keys:
            keys[place] = (job, idempotency)
            return None
        first, remembered = keys[place]
        assert remembered is not None
        common.check_fingerprint(idempotency, remembered.fingerprint)
        return replace(first, input=b"")
    except PilotlightError as error:
        return error


def _insert(transaction: Transaction, items: Sequence[Submission]) -> list[int]:
    """Insert new jobs; returns the positions of those whose id exists."""
    if not items:
        return []
    seqs = transaction.next_seqs(len(items))
    rows = [
        (
            seq,
            job.id,
            job.endpoint_id,
            job.key_id,
            job.input_bytes,
            1 if job.sync else 0,
            1 if job.low_priority else 0,
            job.created_ms,
            job.queued_ms,
            job.expires_ms,
            job.execution_timeout_ms,
            job.retention_ms,
            job.attempt,
            job.retries,
            job.retries_max,
            job.webhook,
            job.s3_config,
            job.batch_id,
            transaction.purges(job.endpoint_id),
        )
        for seq, (job, _) in zip(seqs, items, strict=True)
    ]
    refused: list[int] = []
    inserted = list(zip(seqs, items, strict=True))
    if transaction.write_rows("insert_job", rows) < len(items):
        present = {row[0] for row in transaction.execute("inserted", (seqs[0],))}
        refused = [index for index, seq in enumerate(seqs) if seq not in present]
        inserted = [(seq, item) for seq, item in inserted if seq in present]
    size = sum(job.input_bytes for _, (job, _) in inserted)
    transaction.write_rows("insert_input", [(seq, job.input) for seq, (job, _) in inserted], size=size)
    for seq, (job, idempotency) in inserted:
        transaction.counters(job.endpoint_id).move(None, job)
        transaction.jobs.put(replace(job, input=b""), seq)
        transaction.inputs.put(job.id, job.input)
        if idempotency is not None:
            place = (job.endpoint_id, job.key_id, idempotency.key)
            transaction.execute("remember", (*place, idempotency.fingerprint, seq))
    return refused


def take_many(transaction: Transaction, orders: Sequence[TakeOrder]) -> list[list[Job]]:
    """Pick the next jobs in the order of service for each taker, the first taker first."""
    queues: dict[str, list[str]] = {}
    for endpoint_id, *_ in orders:
        if endpoint_id not in queues:
            alike = [order for order in orders if order[0] == endpoint_id]
            count = sum(max(0, order[2]) + len(order[4]) for order in alike)
            place = (endpoint_id, transaction.purges(endpoint_id), max(order[3] for order in alike), count)
            queues[endpoint_id] = msgspec.json.decode(transaction.execute("next_jobs", place).fetchone()[0])
    shares: list[list[str]] = []
    for endpoint_id, _, count, _, without in orders:
        queue = queues[endpoint_id]
        mine = [job_id for job_id in queue if job_id not in without][: max(0, count)]
        shares.append(mine)
        taken_ids = set(mine)
        queues[endpoint_id] = [job_id for job_id in queue if job_id not in taken_ids]
    found = find(transaction, [job_id for mine in shares for job_id in mine])
    inputs = _inputs(transaction, found)
    answers: list[list[Job]] = []
    rows: list[Row] = []
    for (_, worker_id, _, now_ms, _), mine in zip(orders, shares, strict=True):
        event = Taken(worker_id=worker_id, now_ms=now_ms)
        taken = JobChanges(transaction, [found[job_id] for job_id in mine]).apply_all(event)
        answers.append([replace(applied.after, input=inputs[applied.after.id]) for applied in taken])
        rows += [(worker_id, now_ms, found[job_id][1]) for job_id in mine]
    if rows:
        transaction.write_rows("take_job", rows)
    return answers


def _inputs(transaction: Transaction, found: Mapping[str, Known]) -> dict[str, bytes]:
    """The inputs of jobs that are about to be handed out."""
    inputs: dict[str, bytes] = {}
    missing: dict[int, str] = {}
    for job_id, (_, seq) in found.items():
        body = transaction.inputs.take(job_id)
        if body is None:
            missing[seq] = job_id
        else:
            inputs[job_id] = body
    if missing:
        for seq, body in transaction.execute("inputs", (json_list(list(missing)),)).fetchall():
            inputs[missing[seq]] = body
    return inputs


def give_back(transaction: Transaction, jobs: Sequence[Job], now_ms: int) -> None:
    """Requeue jobs whose taker went away before it learned of them, unless something else happened since."""
    found = find(transaction, [job.id for job in jobs])
    untouched = [
        found[job.id] for job in jobs if job.id in found and replace(job, input=b"") == found[job.id][0]
    ]
    changes = JobChanges(transaction, untouched)
    changes.apply_all(PlatformInterrupted(now_ms=now_ms, reason="worker hung up"))
    changes.write()


def apply_lists(transaction: Transaction, lists: Sequence[Events]) -> list[list[Applied | None]]:
    """Apply lists of events to jobs; None for those that are unknown."""
    job_ids = {job_id: None for events in lists for job_id, _ in events}
    changes = JobChanges(transaction, find(transaction, job_ids).values())
    answers = [[changes.apply(job_id, event) for job_id, event in events] for events in lists]
    changes.write()
    return answers


def job(transaction: Transaction, job_id: str) -> Job:
    """One job."""
    return job_of(load(transaction, job_id))


def jobs(
    transaction: Transaction,
    endpoint_id: str,
    status: JobStatus | None,
    before: tuple[int, str] | None,
    limit: int,
) -> list[Job]:
    """A page of jobs, newest first, put together from the newest of each state."""
    rows: list[Row] = []
    for state in JobStatus if status is None else (status,):
        if before is None:
            place: tuple[object, ...] = (endpoint_id, state.value, max(0, limit))
            rows += transaction.execute("newest_jobs", place)
        else:
            place = (endpoint_id, state.value, *before, max(0, limit))
            rows += transaction.execute("newest_jobs_before", place)
    rows.sort(key=lambda row: (row[_CREATED], row[0]), reverse=True)
    return [job_of(row) for row in rows[: max(0, limit)]]


def demand(transaction: Transaction, endpoint_id: str, overdue_before_ms: int) -> QueueDemand:
    """The queue as the scaler sees it, from counters and the ends of the index."""
    row = transaction.execute("counters", (endpoint_id,)).fetchone()
    if row is None:
        return QueueDemand()
    queued, queued_low, queued_bytes, in_progress, *_, purges = row
    oldest_ms, overdue = None, 0
    if queued:
        oldest_ms, overdue = transaction.execute(
            "queue_age", (endpoint_id, purges, overdue_before_ms, common.OVERDUE_COUNT_MAX)
        ).fetchone()
    return QueueDemand(
        queued=queued,
        queued_low=queued_low,
        queued_bytes=queued_bytes,
        oldest_ms=oldest_ms,
        overdue=overdue,
        in_progress=in_progress,
    )


def ahead(transaction: Transaction, job_id: str) -> int:
    """How many jobs are served before a queued one."""
    row = load(transaction, job_id)
    found = job_of(row)
    if found.status is not JobStatus.IN_QUEUE:
        return 0
    place = (transaction.purges(found.endpoint_id), row[_RANK], common.place(found), row[SEQ])
    answer: int = transaction.execute(
        "count_ahead", (found.endpoint_id, *place, common.AHEAD_COUNT_MAX)
    ).fetchone()[0]
    return answer


def counts(transaction: Transaction, endpoint_id: str) -> JobCounts:
    """The counters of `/health`."""
    row = transaction.execute("counters", (endpoint_id,)).fetchone()
    if row is None:
        return JobCounts()
    queued, queued_low, _, in_progress, completed, failed, retried, _ = row
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
    return [job_of(row) for row in rows]


def due(transaction: Transaction, now_ms: int, limit: int) -> list[Job]:
    """Living jobs whose time is over."""
    return [job_of(row) for row in transaction.execute("due_jobs", (now_ms, max(0, limit)))]


def cancel_some(transaction: Transaction, endpoint_id: str, event: JobEvent, limit: int) -> list[Applied]:
    """Apply an event to the oldest living jobs of an endpoint."""
    rows = transaction.execute("running_jobs_of_endpoint", (endpoint_id,)).fetchall()
    purges = transaction.purges(endpoint_id)
    for rank in _RANKS:
        rows += transaction.execute("queued_jobs", (endpoint_id, purges, rank, max(0, limit))).fetchall()
    rows.sort(key=lambda row: (row[_CREATED], row[SEQ]))
    changes = JobChanges(transaction, known_of(rows[: max(0, limit)]))
    ended = changes.apply_all(event)
    changes.write()
    return ended


def purge(transaction: Transaction, endpoint_id: str) -> int:
    """Mark the whole queue of an endpoint as purged."""
    transaction.flush()
    row = transaction.execute("counters", (endpoint_id,)).fetchone()
    number: int = 0 if row is None else row[0] + row[1]
    if number:
        transaction.purge(endpoint_id)
    return number


def delete_purged(transaction: Transaction, now_ms: int, limit: int) -> int:
    """Delete purged jobs, and leave deliveries behind for those that had a webhook."""
    deleted = 0
    for endpoint_id, purges in transaction.execute("purged_queues").fetchall():
        rows = transaction.execute("purged_jobs", (endpoint_id, purges, max(0, limit) - deleted)).fetchall()
        for seq, webhook in rows:
            if webhook is not None:
                record = transaction.execute("purged_job", (seq,)).fetchone()
                event = Cancelled(now_ms=now_ms)
                ended = common.apply(job_of(record), event, batch_cancelled=False).after
                notify(transaction, seq, ended)
        transaction.execute("delete_jobs", (json_list([seq for seq, _ in rows]),))
        deleted += len(rows)
    return deleted


def shorten(transaction: Transaction, job_id: str, now_ms: int, ttl_ms: int) -> None:
    """Shorten the life of a job's record."""
    row = load(transaction, job_id)
    before = job_of(row)
    after = common.after_shortening(before, now_ms=now_ms, ttl_ms=ttl_ms)
    if after != before:
        transaction.execute("shorten_job", (after.expires_ms, after.retention_ms, row[SEQ]))
        transaction.jobs.put(after, row[SEQ])


def prune(transaction: Transaction, now_ms: int, limit: int) -> int:
    """Forget ended jobs past their retention."""
    seqs, job_ids = transaction.execute("old_jobs", (now_ms, max(0, limit))).fetchone()
    for job_id in msgspec.json.decode(job_ids):
        transaction.jobs.drop(job_id)
    return transaction.execute("delete_jobs", (seqs,)).rowcount


SUBMIT: Bulk[Submission, Job] = Bulk(0, submit_many)
APPLY: Bulk[Events, list[Applied | None]] = Bulk(2, apply_lists)
TAKE: Bulk[TakeOrder, list[Job]] = Bulk(3, take_many)
"""What comes often, with `chunks.APPEND`. Takes are last, so that they find what was queued with them."""
