"""The face of the PostgreSQL store: each method of the port as a transaction, with the news it is worth.

`bootstrap` opens one and closes it. The contract of every method is in `ports.store`; what stands
here is only what is particular to PostgreSQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from pilotlight.core.lifecycle import Applied, JobEvent, PlatformInterrupted, Progressed, ResultPosted
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.job import Idempotency, Job, JobCounts, JobStatus, QueueDemand
from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.errors import StoreError
from pilotlight.ports.store import Chunk, ChunkFate, StoreListener
from pilotlight.stores import common
from pilotlight.stores.folder import FolderLock
from pilotlight.stores.postgresql import batches, changes, jobs, webhooks
from pilotlight.stores.postgresql.connections import check_url, create_pool, public_url
from pilotlight.stores.postgresql.database import Begin, Database, Transaction
from pilotlight.stores.postgresql.group import Group
from pilotlight.stores.postgresql.lead import Lead
from pilotlight.stores.postgresql.migrate import migrate
from pilotlight.stores.postgresql.news import News
from pilotlight.stores.postgresql.registry import PostgresqlRegistry

T = TypeVar("T")

CONNECTIONS = 10
"""Of one gateway, besides one for news and one for the lead."""

_READERS = 2
"""Of those, kept free of transactions."""

_APPLY_LANES = 2
"""Groups of events under way at once: one is prepared while the other is committed."""

_RACES_MAX = 5
"""Times a submission is looked at again because an equal one was faster."""

_Events = tuple[tuple[str, JobEvent], ...]


async def open_postgresql_store(
    url: str, *, folder: Path | None = None, connections: int = CONNECTIONS
) -> PostgresqlStore:
    """The store in a PostgreSQL database, migrated and open; other gateways may have it open, too.

    Args:
        url: `postgresql://user:password@host:port/database`, with options that libpq knows.
        folder: A data folder to hold as long as the store is open, for what is not in the database.
        connections: Connections for calls.

    Raises:
        SettingsError: The url is none.
        DataFolderError: The database comes from a newer version, or the folder is in use or not writable.
        StoreError: The server cannot be reached, refuses us, or is not fit; nothing was changed.
    """
    check_url(url)
    async with contextlib.AsyncExitStack() as undo:
        if folder is not None:
            lock = FolderLock(folder)
            lock.acquire()
            undo.callback(lock.release)
        pool = await create_pool(url, size=connections)
        database = Database(pool, writers=max(1, connections - _READERS))
        undo.push_async_callback(database.close)
        await migrate(database, public_url(url))
        return PostgresqlStore(database, News(url), Lead(url), undo.pop_all())
    raise AssertionError


class PostgresqlStore(PostgresqlRegistry):
    """A `Store` in a PostgreSQL database, made by `open_postgresql_store`. Use it on the loop that opened it.

    A call that is cancelled happens all the same, unseen; jobs that a cancelled `take` has picked go back to
    the head of the queue without using up their retry.

    Args:
        database: Connections and transactions.
        news: Tells other gateways of changes.
        lead: Which gateway leads.
        release: Closes the database and gives up what else was taken to open it.
    """

    def __init__(
        self, database: Database, news: News, lead: Lead, release: contextlib.AsyncExitStack
    ) -> None:
        super().__init__(database, news)
        self._release = release
        self._lead = lead
        self._submits: Group[Job, bool] = Group(database, self._insert, new_work=True)
        self._events: Group[_Events, list[Applied | None]] = Group(
            database, self._apply_group, lanes=_APPLY_LANES
        )

    def listen(self, listener: StoreListener) -> None:
        """See `Store.listen`."""
        self._news.listen(listener)

    async def lead(self, lost: Callable[[], None]) -> bool:
        """See `Store.lead`."""
        return await self._lead.take(lost)

    async def close(self) -> None:
        """See `Store.close`."""
        await self._database.close()
        await self._news.close()
        await self._lead.close()
        await self._release.aclose()

    # Jobs

    async def submit(
        self,
        job: Job,
        *,
        idempotency: Idempotency | None = None,
        announce: Callable[[], None] | None = None,
    ) -> Job:
        """See `JobStore.submit`."""
        assert job.status is JobStatus.IN_QUEUE
        job = replace(job, input_bytes=len(job.input))
        if idempotency is None:
            stored = self._submits.add(job, size=len(job.input))
            # The job is announced even when the caller has gone meanwhile.
            stored.add_done_callback(functools.partial(self._announce, job, announce))
            if not await asyncio.shield(stored):
                raise common.id_taken("job", job.id)
            return job
        return await self._database.apart(
            self._submit_once(job, idempotency, announce), size=len(job.input), new_work=True
        )

    def _announce(self, job: Job, announce: Callable[[], None] | None, stored: asyncio.Future[bool]) -> None:
        if stored.exception() is None and stored.result():
            self._news.queue_grew(job.endpoint_id)
            if announce is not None:
                announce()

    async def _insert(self, group: Sequence[Job]) -> Sequence[bool | Exception]:
        # An id that is in the group twice is stored once, for the first of the two.
        first = {job.id: job for job in reversed(group)}
        new = [job for job in group if first[job.id] is job]
        stored = await self._database.transact(
            lambda transaction: jobs.insert(transaction, new), begin=Begin.JOBS
        )
        return [job.id in stored and first[job.id] is job for job in group]

    async def _submit_once(
        self, job: Job, idempotency: Idempotency, announce: Callable[[], None] | None
    ) -> Job:
        for _ in range(_RACES_MAX):
            try:
                stored = await self._database.transact(
                    lambda transaction: jobs.submit_once(transaction, job, idempotency), begin=Begin.JOBS
                )
            except jobs.RacedError:
                continue
            if stored.id == job.id:
                self._news.queue_grew(job.endpoint_id)
                if announce is not None:
                    announce()
            return stored
        raise StoreError("equal submissions keep each other from being stored; try again")

    async def earlier(self, job: Job, idempotency: Idempotency) -> Job | None:
        """See `JobStore.earlier`."""
        return await self._database.read(lambda transaction: jobs.earlier(transaction, job, idempotency))

    async def take(
        self,
        endpoint_id: str,
        worker_id: str,
        *,
        count: int,
        now_ms: int,
        without: frozenset[str] = frozenset(),
    ) -> Sequence[Job]:
        """See `JobStore.take`."""
        task = self._database.spawn(
            self._database.transact(
                lambda transaction: changes.take(transaction, endpoint_id, worker_id, count, now_ms, without),
                begin=Begin.JOBS,
            )
        )
        try:
            taken = await asyncio.shield(task)
        except asyncio.CancelledError:
            # Refused, they stay handed out and unconfirmed.
            with contextlib.suppress(StoreError):
                self._database.spawn(self._give_back(task, now_ms))
            raise
        self._news.jobs_changed(job.id for job in taken)
        return taken

    async def _give_back(self, task: asyncio.Task[list[Job]], now_ms: int) -> None:
        """Requeue what was taken for a caller who has gone, unless something else happened to it since."""
        try:
            events = tuple(
                (
                    job.id,
                    PlatformInterrupted(now_ms=now_ms, worker_id=job.worker_id, attempt=job.attempt),
                )
                for job in await task
            )
            if events:
                applied = await self._database.transact(
                    lambda transaction: changes.apply_events(transaction, events), begin=Begin.JOBS
                )
                self._tell(each for each in applied if each is not None)
        except StoreError:
            # They stay handed out and unconfirmed, and whoever leads interrupts them.
            return

    async def apply(self, job_id: str, event: JobEvent) -> Applied:
        """See `JobStore.apply`."""
        [applied] = await self.apply_many([(job_id, event)])
        if applied is None:
            raise common.job_not_found(job_id)
        return applied

    async def apply_many(self, events: Sequence[tuple[str, JobEvent]]) -> Sequence[Applied | None]:
        """See `JobStore.apply_many`."""
        outputs = (event.output for _, event in events if isinstance(event, ResultPosted | Progressed))
        size = sum(len(output or b"") for output in outputs)
        return await asyncio.shield(self._events.add(tuple(events), size=size))

    async def _apply_group(self, group: Sequence[_Events]) -> Sequence[list[Applied | None] | Exception]:
        applied = await self._apply_events([event for events in group for event in events])
        answers: list[list[Applied | None] | Exception] = []
        for events in group:
            answers.append(applied[: len(events)])
            applied = applied[len(events) :]
        return answers

    async def _apply_events(self, events: Sequence[tuple[str, JobEvent]]) -> list[Applied | None]:
        applied = await self._database.transact(
            lambda transaction: changes.apply_events(transaction, events), begin=Begin.JOBS
        )
        self._tell(each for each in applied if each is not None)
        return applied

    def _tell(self, applied: Iterable[Applied]) -> None:
        """Let other gateways know what was committed."""
        changed = [each for each in applied if each.changed]
        if changed:
            self._news.jobs_changed(each.after.id for each in changed)
            for endpoint_id in {each.after.endpoint_id for each in changed if each.requeued}:
                self._news.queue_grew(endpoint_id)

    async def job(self, job_id: str) -> Job:
        """See `JobStore.job`."""
        return await self._database.read(lambda transaction: jobs.find(transaction, job_id))

    def job_at_hand(self, job_id: str) -> Job | None:  # noqa: ARG002 - another gateway may have changed any job
        """See `JobStore.job_at_hand`."""
        return None

    async def jobs(
        self,
        endpoint_id: str,
        *,
        status: JobStatus | None = None,
        before: tuple[int, str] | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """See `JobStore.jobs`."""
        return await self._database.read(
            lambda transaction: jobs.page(transaction, endpoint_id, status, before, limit)
        )

    async def append_chunk(
        self, job_id: str, worker_id: str, body: bytes, *, attempt: int | None, now_ms: int, limit_bytes: int
    ) -> ChunkFate:
        """See `JobStore.append_chunk`."""
        fate = await self._database.change(
            lambda transaction: jobs.append_chunk(
                transaction, job_id, worker_id, body, attempt, now_ms, limit_bytes
            ),
            ChunkFate.STORED,
            size=len(body),
        )
        if fate is ChunkFate.STORED:
            self._news.jobs_changed([job_id])
        return fate

    async def drain_chunks(
        self, job_id: str, *, limit_bytes: int, cursor: int | None = None
    ) -> tuple[Job, Sequence[Chunk]]:
        """See `JobStore.drain_chunks`."""
        # Most readers come too early: they learn it without locking the job.
        job, news = await self._database.read(lambda transaction: jobs.peek(transaction, job_id, cursor))
        if not news:
            return job, []
        return await self._database.write(
            lambda transaction: jobs.drain(transaction, job_id, limit_bytes, cursor), begin=Begin.JOBS
        )

    async def return_chunks(self, job_id: str, returned: Sequence[Chunk], *, attempt: int) -> None:
        """See `JobStore.return_chunks`."""
        await self._database.write(
            lambda transaction: jobs.give_back_chunks(transaction, job_id, returned, attempt),
            begin=Begin.JOBS,
        )

    async def has_chunks(self, job_id: str, *, cursor: int | None = None) -> bool:
        """See `JobStore.has_chunks`."""
        return await self._database.read(lambda transaction: jobs.has_chunks(transaction, job_id, cursor))

    async def trim_chunks(self, job_id: str, *, limit: int = 1000) -> int:
        """See `JobStore.trim_chunks`."""
        return await self._change(lambda transaction: jobs.trim(transaction, job_id, limit))

    async def demand(self, endpoint_id: str, *, overdue_before_ms: int) -> QueueDemand:
        """See `JobStore.demand`."""
        return await self._database.read(
            lambda transaction: jobs.demand(transaction, endpoint_id, overdue_before_ms)
        )

    async def ahead(self, job_id: str) -> int:
        """See `JobStore.ahead`."""
        return await self._database.read(lambda transaction: jobs.ahead(transaction, job_id))

    async def counts(self, endpoint_id: str) -> JobCounts:
        """See `JobStore.counts`."""
        return await self._database.read(lambda transaction: jobs.counts(transaction, endpoint_id))

    async def running(self, *, worker_id: str | None = None) -> Sequence[Job]:
        """See `JobStore.running`."""
        return await self._database.read(lambda transaction: jobs.running(transaction, worker_id))

    async def due(self, *, now_ms: int, limit: int = 1000) -> Sequence[Job]:
        """See `JobStore.due`."""
        return await self._database.read(lambda transaction: jobs.due(transaction, now_ms, limit))

    async def cancel_all(self, endpoint_id: str, event: JobEvent, *, limit: int = 500) -> Sequence[Applied]:
        """See `JobStore.cancel_all`."""
        applied = await self._change(
            lambda transaction: jobs.cancel_some(transaction, endpoint_id, event, limit)
        )
        self._tell(applied)
        return applied

    async def purge(self, endpoint_id: str, *, now_ms: int) -> int:  # noqa: ARG002 - they end when deleted
        """See `JobStore.purge`."""
        return await self._database.write(
            lambda transaction: jobs.purge(transaction, endpoint_id), begin=Begin.PURGE
        )

    async def delete_purged(self, *, now_ms: int, limit: int = 1000) -> int:
        """See `JobStore.delete_purged`."""
        return await self._change(lambda transaction: jobs.delete_purged(transaction, now_ms, limit))

    async def shorten(self, job_id: str, *, now_ms: int, ttl_ms: int) -> None:
        """See `JobStore.shorten`."""
        await self._change(lambda transaction: jobs.shorten(transaction, job_id, now_ms, ttl_ms))

    async def prune_jobs(self, *, now_ms: int, limit: int = 1000) -> int:
        """See `JobStore.prune_jobs`."""
        return await self._change(lambda transaction: jobs.prune(transaction, now_ms, limit))

    async def _change(self, work: Callable[[Transaction], Coroutine[Any, Any, T]]) -> T:
        return await self._database.write(work, begin=Begin.JOBS)

    # Batches

    async def add_batch(self, batch: Batch, drafts: Sequence[BatchDraft]) -> None:
        """See `BatchStore.add_batch`."""
        await self._database.write(
            lambda transaction: batches.add(transaction, batch, drafts),
            begin=Begin.JOBS,
            size=common.draft_bytes(drafts),
            new_work=True,
        )

    async def add_batch_requests(self, batch_id: str, drafts: Sequence[BatchDraft]) -> Batch:
        """See `BatchStore.add_batch_requests`."""
        return await self._database.write(
            lambda transaction: batches.add_requests(transaction, batch_id, drafts),
            begin=Begin.JOBS,
            size=common.draft_bytes(drafts),
            new_work=True,
        )

    async def remove_batch_request(self, batch_id: str, request_id: str) -> Batch:
        """See `BatchStore.remove_batch_request`."""
        return await self._change(
            lambda transaction: batches.remove_request(transaction, batch_id, request_id)
        )

    async def rename_batch(self, batch_id: str, name: str) -> Batch:
        """See `BatchStore.rename_batch`."""
        return await self._change(lambda transaction: batches.rename(transaction, batch_id, name))

    async def finalize_batch(self, batch_id: str, template: Job) -> Batch:
        """See `BatchStore.finalize_batch`."""
        batch = await self._change(lambda transaction: batches.finalize(transaction, batch_id, template))
        self._news.queue_grew(batch.endpoint_id)
        return batch

    async def cancel_batch(self, batch_id: str, *, now_ms: int) -> tuple[Batch, Sequence[Applied]]:
        """See `BatchStore.cancel_batch`."""
        batch, applied = await self._change(lambda transaction: batches.cancel(transaction, batch_id, now_ms))
        self._tell(applied)
        return batch, applied

    async def batch(self, batch_id: str) -> Batch:
        """See `BatchStore.batch`."""
        return await self._database.read(lambda transaction: batches.find(transaction, batch_id))

    async def batches(self, endpoint_id: str, *, limit: int = 1000) -> Sequence[Batch]:
        """See `BatchStore.batches`."""
        return await self._database.read(lambda transaction: batches.newest(transaction, endpoint_id, limit))

    async def batch_requests(self, batch_id: str, *, offset: int, limit: int) -> Sequence[Job | BatchDraft]:
        """See `BatchStore.batch_requests`."""
        return await self._database.read(
            lambda transaction: batches.requests(transaction, batch_id, offset, limit)
        )

    async def prune_batches(self, *, ended_before_ms: int, limit: int = 100) -> int:
        """See `BatchStore.prune_batches`."""
        return await self._change(lambda transaction: batches.prune(transaction, ended_before_ms, limit))

    # Webhooks

    async def due_webhooks(
        self,
        *,
        now_ms: int,
        limit: int = 100,
        skip_ids: Collection[str] = (),
        skip_hosts: Collection[str] = (),
    ) -> Sequence[WebhookDelivery]:
        """See `WebhookStore.due_webhooks`."""
        return await self._database.read(
            lambda transaction: webhooks.due(transaction, now_ms, limit, skip_ids, skip_hosts)
        )

    async def next_webhook_ms(self) -> int | None:
        """See `WebhookStore.next_webhook_ms`."""
        return await self._database.read(webhooks.next_ms)

    async def put_webhook(self, delivery: WebhookDelivery) -> None:
        """See `WebhookStore.put_webhook`."""
        # One dead letter after the other: each sees those it has to make room for.
        begin = Begin.DEAD_LETTER if delivery.next_ms is None else Begin.PLAIN
        await self._database.write(lambda transaction: webhooks.put(transaction, delivery), begin=begin)

    async def delete_webhook(self, delivery_id: str) -> None:
        """See `WebhookStore.delete_webhook`."""
        await self._database.write(lambda transaction: webhooks.delete(transaction, delivery_id))

    async def webhook(self, delivery_id: str) -> WebhookDelivery:
        """See `WebhookStore.webhook`."""
        return await self._database.read(lambda transaction: webhooks.find(transaction, delivery_id))

    async def trim_webhooks(self, *, host_bytes: int, all_bytes: int, before_ms: int) -> int:
        """See `WebhookStore.trim_webhooks`."""
        return await self._database.write(
            lambda transaction: webhooks.trim(transaction, host_bytes, all_bytes, before_ms)
        )

    async def dead_webhooks(
        self, *, endpoint_id: str | None = None, limit: int = 100
    ) -> Sequence[WebhookDelivery]:
        """See `WebhookStore.dead_webhooks`."""
        return await self._database.read(lambda transaction: webhooks.dead(transaction, endpoint_id, limit))
