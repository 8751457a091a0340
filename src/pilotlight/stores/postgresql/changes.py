"""Changes of jobs inside a transaction: lock, `core.lifecycle.apply`, write back with one statement.

Jobs are locked in the order of their ids, counters (of endpoints, then of batches) afterwards and in order,
so transactions of ours do not wait for each other in circles but in the rarest cases, which are tried again.
Counters are split into rows by the connection that writes (`pg_backend_pid() % 32`), so that transactions
that commit at the same time each have a row of their own; their sum is exact at every committed moment.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec.structs import replace

from pilotlight.core.lifecycle import Applied, Confirmed, JobEvent, Progressed, Taken
from pilotlight.domain.job import Job
from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.stores import common
from pilotlight.stores.common import CounterChange
from pilotlight.stores.postgresql.database import Transaction
from pilotlight.stores.rows import job_of

COUNTERS = ("queued", "queued_low", "queued_bytes", "in_progress", "completed", "failed", "retried")
"""Of an endpoint, as `CounterChange` names them and `write_jobs` takes them."""

_BATCH_COUNTERS = ("queued", "in_progress", "completed", "failed", "cancelled")

_WEBHOOKS_BYTES = 8 * 1024 * 1024
"""Bytes of jobs whose deliveries are written at once; PostgreSQL takes no message of a gigabyte."""

_NEVER_REQUEUE = (Taken, Confirmed, Progressed)


@dataclass(slots=True)
class _Entry:
    """A locked job: as it was, as it is now, and whether its chunks have gone."""

    seq: int
    before: Job
    now: Job
    writer: int
    requeued: bool = False


@dataclass(slots=True)
class Changes:
    """Locked jobs and what becomes of them; nothing is written before `write`."""

    entries: dict[str, _Entry] = field(default_factory=dict)
    cancelled_batches: frozenset[str] = frozenset()
    _counters: dict[str, CounterChange] = field(default_factory=dict)
    _batches: dict[str, dict[str, int]] = field(default_factory=dict)
    _ended: dict[int, list[Job]] = field(default_factory=dict)

    def add(self, row: Any) -> Job:
        """A job that has been locked, from a row that begins like `job_records`."""
        job = job_of(row)
        self.entries[job.id] = _Entry(row[27], job, job, row["writer"])
        return job

    def apply(self, job_id: str, event: JobEvent) -> Applied | None:
        """Apply an event to a locked job; None when there is none of that id."""
        entry = self.entries.get(job_id)
        if entry is None:
            return None
        batch_cancelled = entry.now.batch_id in self.cancelled_batches
        applied = common.apply(entry.now, event, batch_cancelled=batch_cancelled)
        if not applied.changed:
            return applied
        after = applied.after
        entry.now = after
        entry.requeued |= applied.requeued
        self._counters.setdefault(after.endpoint_id, CounterChange()).move(applied.before, after)
        if after.batch_id is not None and applied.before.status is not after.status:
            counters = self._batches.setdefault(after.batch_id, dict.fromkeys(_BATCH_COUNTERS, 0))
            counters[common.batch_counter(applied.before.status)] -= 1
            counters[common.batch_counter(after.status)] += 1
        if applied.finished and after.webhook is not None:
            self._ended.setdefault(entry.seq, []).append(after)
        return applied

    def replace(self, job: Job) -> None:
        """Put another record of a locked job in its place: not a change of state."""
        self.entries[job.id].now = job

    async def write(self, transaction: Transaction) -> None:
        """Write what has changed, with counters and webhooks."""
        changed = [entry for entry in self.entries.values() if entry.now is not entry.before]
        if not changed:
            return
        ours = secrets.randbits(62) + 1
        await transaction.run("write_jobs", *_columns(changed), *self._counter_columns(), ours)
        requeued = [entry.seq for entry in changed if entry.requeued]
        if requeued:
            await transaction.run("delete_chunks", requeued)
        if self._ended:
            await self._leave_webhooks(transaction)
        if self._batches:
            columns = [[change[name] for change in self._batches.values()] for name in _BATCH_COUNTERS]
            await transaction.run("change_batch_counters", list(self._batches), *columns)
        earlier = {entry.seq: entry.writer for entry in changed}

        async def happened(later: Transaction) -> bool | None:
            # Others may have changed some of them since, or all: one that nobody else has touched tells.
            writers = [(row[0], row[1]) for row in await later.rows("writers", list(earlier))]
            if any(writer == ours for _, writer in writers):
                return True
            return False if any(writer == earlier[seq] for seq, writer in writers) else None

        transaction.happened = happened

    async def _leave_webhooks(self, transaction: Transaction) -> None:
        await leave_webhooks(transaction, [(seq, job) for seq, jobs in self._ended.items() for job in jobs])

    def _counter_columns(self) -> list[list[Any]]:
        counted = [(name, change) for name, change in self._counters.items() if change != CounterChange()]
        columns: list[list[Any]] = [[name for name, _ in counted]]
        return columns + [[getattr(change, name) for _, change in counted] for name in COUNTERS]


async def lock(transaction: Transaction, events: Iterable[tuple[str, JobEvent]]) -> Changes:
    """Lock the jobs that some events speak of, and learn what applying those events needs."""
    changes = Changes()
    requeueing: set[str] = set()
    by_job: dict[str, list[JobEvent]] = {}
    for job_id, event in events:
        by_job.setdefault(job_id, []).append(event)
    for row in await transaction.rows("lock_jobs", list(by_job)):
        job = changes.add(row)
        if job.batch_id is not None and not all(
            isinstance(event, _NEVER_REQUEUE) for event in by_job[job.id]
        ):
            requeueing.add(job.batch_id)
    if requeueing:
        rows = await transaction.rows("lock_cancelled_batches", sorted(requeueing))
        changes.cancelled_batches = frozenset(row[0] for row in rows if row[1] is not None)
    return changes


async def apply_events(
    transaction: Transaction, events: Sequence[tuple[str, JobEvent]]
) -> list[Applied | None]:
    """Apply events in their order and write what came of it."""
    changes = await lock(transaction, events)
    applied = [changes.apply(job_id, event) for job_id, event in events]
    await changes.write(transaction)
    return applied


async def take(
    transaction: Transaction,
    endpoint_id: str,
    worker_id: str,
    count: int,
    now_ms: int,
    without: frozenset[str],
) -> list[Job]:
    """Pick the next jobs in the order of service, but for some, and hand them to a worker."""
    rows = await transaction.rows("next_jobs", endpoint_id, now_ms, max(0, count), list(without))
    changes = Changes()
    event = Taken(worker_id=worker_id, now_ms=now_ms)
    taken: list[Job] = []
    for row in rows:
        applied = changes.apply(changes.add(row).id, event)
        assert applied is not None
        taken.append(replace(applied.after, input=row["input"]))
    await changes.write(transaction)
    return taken


async def put_webhooks(transaction: Transaction, deliveries: Sequence[WebhookDelivery]) -> None:
    """Insert or replace deliveries."""
    names = (
        "id", "job_id", "endpoint_id", "url", "host", "body", "created_ms", "tries", "next_ms", "last_status",
        "last_error",
    )  # fmt: skip
    await transaction.run(
        "put_webhooks", *([getattr(delivery, name) for delivery in deliveries] for name in names)
    )


async def leave_webhooks(transaction: Transaction, ended: Sequence[tuple[int, Job]]) -> None:
    """Leave deliveries for ended jobs, given with their `seq`; as many at once as fit into a message."""
    while ended:
        number = size = 0
        for _, job in ended:
            size += job.input_bytes + len(job.output or b"")
            if number and size > _WEBHOOKS_BYTES:
                break
            number += 1
        part, ended = ended[:number], ended[number:]
        inputs = {row[0]: row[1] for row in await transaction.rows("inputs", list({seq for seq, _ in part}))}
        await put_webhooks(transaction, [common.webhook_delivery(job, inputs[seq]) for seq, job in part])


_WRITTEN = (
    "queued_ms", "expires_ms", "retention_ms", "attempt", "retries", "worker_id", "started_ms",
    "confirmed_ms", "first_output_ms", "chunk_read", "finished_ms", "output", "error", "s3_config",
)  # fmt: skip


def _columns(entries: Sequence[_Entry]) -> list[list[Any]]:
    """The arrays that `write_jobs` takes."""
    return [
        [entry.seq for entry in entries],
        [entry.now.status.value for entry in entries],
        *([getattr(entry.now, name) for entry in entries] for name in _WRITTEN),
        [
            msgspec.json.encode(entry.now.attempts).decode() if entry.now.attempts else None
            for entry in entries
        ],
        [entry.requeued for entry in entries],
    ]
