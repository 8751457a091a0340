"""The face of the SQLite store: each method of the port, handed to the writer or to the reader.

`bootstrap` opens one and closes it. The contract of every method is in `ports.store`; what stands
here is only what is particular to SQLite.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from msgspec.structs import replace

from pilotlight.core.lifecycle import Applied, JobEvent, Progressed, ResultPosted
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.job import Idempotency, Job, JobCounts, JobStatus, QueueDemand
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import RequestRecord, StartRecord, UsageInterval
from pilotlight.domain.webhook import WebhookDelivery
from pilotlight.domain.worker import Worker
from pilotlight.errors import StoreError
from pilotlight.ports.store import Chunk, ChunkFate, StoreListener
from pilotlight.stores import common
from pilotlight.stores.folder import DATABASE_FILE, FolderLock, create_database_file
from pilotlight.stores.sqlite import batches, chunks, endpoints, jobs, request_log, webhooks
from pilotlight.stores.sqlite import records as logs
from pilotlight.stores.sqlite.known import JobShelf, Knowledge
from pilotlight.stores.sqlite.migrate import SYNCHRONOUS, connect_reader, connect_writer
from pilotlight.stores.sqlite.threads import DatabaseThread


async def open_sqlite_store(folder: Path, *, synchronous: str = "FULL") -> SqliteStore:
    """The store in a data folder, migrated and open, owned by this process until it is closed.

    Args:
        folder: The data folder; made when missing, readable by its owner only.
        synchronous: SQLite's setting of that name, one of `SYNCHRONOUS`.

    Raises:
        DataFolderError: The folder is in use or not writable, or its database is unusable or of a
            newer version; nothing was changed.
    """
    if synchronous not in SYNCHRONOUS:
        raise ValueError(f"synchronous is {synchronous!r}; legal: {', '.join(SYNCHRONOUS)}")
    lock = FolderLock(folder)

    def connect() -> sqlite3.Connection:
        lock.acquire()
        return connect_writer(create_database_file(folder), synchronous=synchronous)

    known = JobShelf()
    writer = DatabaseThread(
        "store-writer",
        connect,
        begin="BEGIN IMMEDIATE",
        knowledge=Knowledge(),
        publish=known.take_over,
        release=lock.release,
    )
    await writer.start()
    reader = DatabaseThread("store-reader", lambda: connect_reader(folder / DATABASE_FILE), begin="BEGIN")
    try:
        await reader.start()
    except BaseException:
        writer.stop()
        await writer.join()
        raise
    return SqliteStore(writer, reader, known)


class SqliteStore:
    """A `Store` in a SQLite database, made by `open_sqlite_store`. Use it on the loop that opened it.

    A call that is cancelled has happened or not, as chance will have it, but never half; jobs that a
    cancelled `take` had already picked go back to the head of the queue without using up their retry.

    Args:
        writer: The thread with the writing connection, started.
        reader: The thread with the reading connection, started.
        known: Jobs as of the writer's last answer.
    """

    def __init__(self, writer: DatabaseThread, reader: DatabaseThread, known: JobShelf) -> None:
        self._writer = writer
        self._reader = reader
        self._known = known
        self._closing: asyncio.Task[None] | None = None
        self._returning: set[asyncio.Task[None]] = set()
        self._requests_cut_off: Sequence[RequestRecord] = ()

    async def close(self) -> None:
        """See `Store.close`."""
        if self._closing is None:
            self._writer.stop()
            self._reader.stop()
            self._closing = asyncio.create_task(self._close(), name="store-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._returning:
            await asyncio.wait(self._returning)
        # The reader first: the last connection to be closed folds the log into the database, and only
        # the writer's can write.
        await self._reader.join()
        await self._writer.join()

    def listen(self, listener: StoreListener) -> None:
        """See `Store.listen`: the folder has one owner, so there are no others who could change anything."""

    async def lead(self, lost: Callable[[], None]) -> bool:  # noqa: ARG002 - nobody takes it away
        """See `Store.lead`: the folder's lock was taken when the store was opened."""
        return True

    # Endpoints

    async def add_endpoint(self, endpoint: Endpoint) -> None:
        """See `EndpointStore.add_endpoint`."""
        await self._writer.call(lambda transaction: endpoints.add_endpoint(transaction, endpoint))

    async def update_endpoint(self, endpoint: Endpoint) -> None:
        """See `EndpointStore.update_endpoint`."""
        await self._writer.call(lambda transaction: endpoints.update_endpoint(transaction, endpoint))

    async def delete_endpoint(self, endpoint_id: str, *, now_ms: int) -> None:
        """See `EndpointStore.delete_endpoint`."""
        await self._writer.call(
            lambda transaction: endpoints.delete_endpoint(transaction, endpoint_id, now_ms)
        )

    async def endpoints(self) -> Sequence[Endpoint]:
        """See `EndpointStore.endpoints`."""
        return await self._reader.call(endpoints.endpoints)

    async def revisions(self, endpoint_id: str) -> Sequence[Revision]:
        """See `EndpointStore.revisions`."""
        return await self._reader.call(lambda transaction: endpoints.revisions(transaction, endpoint_id))

    # Keys

    async def add_key(self, key: ApiKey) -> None:
        """See `KeyStore.add_key`."""
        await self._writer.call(lambda transaction: endpoints.add_key(transaction, key))

    async def update_key(self, key: ApiKey) -> None:
        """See `KeyStore.update_key`."""
        await self._writer.call(lambda transaction: endpoints.update_key(transaction, key))

    async def delete_key(self, key_id: str) -> None:
        """See `KeyStore.delete_key`."""
        await self._writer.call(lambda transaction: endpoints.delete_key(transaction, key_id))

    async def keys(self) -> Sequence[ApiKey]:
        """See `KeyStore.keys`."""
        return await self._reader.call(endpoints.keys)

    # Workers

    async def put_worker(self, worker: Worker) -> None:
        """See `WorkerStore.put_worker`."""
        await self._writer.call(lambda transaction: endpoints.put_worker(transaction, worker))

    async def worker(self, worker_id: str) -> Worker | None:
        """See `WorkerStore.worker`."""
        return await self._reader.call(lambda transaction: endpoints.worker(transaction, worker_id))

    async def workers(self, *, endpoint_id: str | None = None, living: bool = True) -> Sequence[Worker]:
        """See `WorkerStore.workers`."""
        return await self._reader.call(
            lambda transaction: endpoints.workers(transaction, endpoint_id, living)
        )

    async def prune_workers(self, *, ended_before_ms: int) -> int:
        """See `WorkerStore.prune_workers`."""
        return await self._writer.call(
            lambda transaction: endpoints.prune_workers(transaction, ended_before_ms)
        )

    # Jobs

    async def submit(
        self,
        job: Job,
        *,
        idempotency: Idempotency | None = None,
        announce: Callable[[], None] | None = None,
    ) -> Job:
        """See `JobStore.submit`."""
        if job.input_bytes != len(job.input):
            job = replace(job, input_bytes=len(job.input))
        submission = self._writer.submit_item(
            jobs.SUBMIT, (job, idempotency), size=len(job.input), new_work=True
        )
        if announce is not None:
            # The writer keeps the order: a take asked for from now on comes after this, in the same
            # group or a later one, and is answered after the commit of both.
            announce()
        stored: Job = await submission.future
        return stored

    async def earlier(self, job: Job, idempotency: Idempotency) -> Job | None:
        """See `JobStore.earlier`."""
        return await self._reader.call(lambda transaction: jobs.earlier(transaction, job, idempotency))

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
        if self._returning:
            # What callers who have gone had picked is to be found by whoever asks after them.
            await asyncio.wait(self._returning)
        order = self._writer.submit_item(jobs.TAKE, (endpoint_id, worker_id, count, now_ms, without))
        try:
            taken: Sequence[Job] = await order.future
        except asyncio.CancelledError:
            if (picked := self._writer.withdraw(order)) is not None:
                returning = asyncio.create_task(self._give_back(picked, now_ms), name="store-give-back")
                self._returning.add(returning)
                returning.add_done_callback(self._returning.discard)
            raise
        return taken

    async def _give_back(self, future: asyncio.Future[list[Job]], now_ms: int) -> None:
        # A StoreError means: nothing was taken, or the store is closing; then they stay handed out, and are
        # interrupted when the next process starts.
        with contextlib.suppress(StoreError):
            if taken := await future:
                await self._writer.call(lambda transaction: jobs.give_back(transaction, taken, now_ms))

    async def apply(self, job_id: str, event: JobEvent) -> Applied:
        """See `JobStore.apply`."""
        answers = await self.apply_many([(job_id, event)])
        applied = answers[0]
        if applied is None:
            raise common.job_not_found(job_id)
        return applied

    async def apply_many(self, events: Sequence[tuple[str, JobEvent]]) -> Sequence[Applied | None]:
        """See `JobStore.apply_many`."""
        size = sum(_size(event) for _, event in events)
        answers: Sequence[Applied | None] = await self._writer.submit_item(
            jobs.APPLY, events, size=size
        ).future
        return answers

    async def job(self, job_id: str) -> Job:
        """See `JobStore.job`."""
        # Most reads are of jobs written a moment ago; a hop to the reader takes thirty times as long.
        known = self.job_at_hand(job_id)
        if known is not None:
            return known
        return await self._reader.call(lambda transaction: jobs.job(transaction, job_id))

    def job_at_hand(self, job_id: str) -> Job | None:
        """See `JobStore.job_at_hand`."""
        known = self._known.get(job_id) if self._closing is None else None
        return None if known is None else known[0]

    async def jobs(
        self,
        endpoint_id: str,
        *,
        status: JobStatus | None = None,
        before: tuple[int, str] | None = None,
        limit: int = 50,
    ) -> Sequence[Job]:
        """See `JobStore.jobs`."""
        return await self._reader.call(
            lambda transaction: jobs.jobs(transaction, endpoint_id, status, before, limit)
        )

    async def append_chunk(
        self, job_id: str, worker_id: str, body: bytes, *, attempt: int | None, now_ms: int, limit_bytes: int
    ) -> ChunkFate:
        """See `JobStore.append_chunk`."""
        posting = (job_id, worker_id, body, attempt, now_ms, limit_bytes)
        fate: ChunkFate = await self._writer.submit_item(chunks.APPEND, posting, size=len(body)).future
        return fate

    async def drain_chunks(
        self, job_id: str, *, limit_bytes: int, cursor: int | None = None
    ) -> tuple[Job, Sequence[Chunk]]:
        """See `JobStore.drain_chunks`."""
        return await self._writer.call(
            lambda transaction: chunks.drain(transaction, job_id, limit_bytes, cursor)
        )

    async def return_chunks(self, job_id: str, returned: Sequence[Chunk], *, attempt: int) -> None:
        """See `JobStore.return_chunks`."""
        await self._writer.call(lambda transaction: chunks.give_back(transaction, job_id, returned, attempt))

    async def has_chunks(self, job_id: str, *, cursor: int | None = None) -> bool:
        """See `JobStore.has_chunks`."""
        return await self._reader.call(lambda transaction: chunks.waiting(transaction, job_id, cursor))

    async def trim_chunks(self, job_id: str, *, limit: int = 1000) -> int:
        """See `JobStore.trim_chunks`."""
        return await self._writer.call(lambda transaction: chunks.trim(transaction, job_id, limit))

    async def demand(self, endpoint_id: str, *, overdue_before_ms: int) -> QueueDemand:
        """See `JobStore.demand`."""
        return await self._reader.call(
            lambda transaction: jobs.demand(transaction, endpoint_id, overdue_before_ms)
        )

    async def ahead(self, job_id: str) -> int:
        """See `JobStore.ahead`."""
        return await self._reader.call(lambda transaction: jobs.ahead(transaction, job_id))

    async def counts(self, endpoint_id: str) -> JobCounts:
        """See `JobStore.counts`."""
        return await self._reader.call(lambda transaction: jobs.counts(transaction, endpoint_id))

    async def running(self, *, worker_id: str | None = None) -> Sequence[Job]:
        """See `JobStore.running`."""
        return await self._reader.call(lambda transaction: jobs.running(transaction, worker_id))

    async def due(self, *, now_ms: int, limit: int = 1000) -> Sequence[Job]:
        """See `JobStore.due`."""
        return await self._reader.call(lambda transaction: jobs.due(transaction, now_ms, limit))

    async def cancel_all(self, endpoint_id: str, event: JobEvent, *, limit: int = 500) -> Sequence[Applied]:
        """See `JobStore.cancel_all`."""
        return await self._writer.call(
            lambda transaction: jobs.cancel_some(transaction, endpoint_id, event, limit)
        )

    async def purge(self, endpoint_id: str, *, now_ms: int) -> int:  # noqa: ARG002 - they end when deleted
        """See `JobStore.purge`."""
        return await self._writer.call(lambda transaction: jobs.purge(transaction, endpoint_id))

    async def delete_purged(self, *, now_ms: int, limit: int = 1000) -> int:
        """See `JobStore.delete_purged`."""
        return await self._writer.call(lambda transaction: jobs.delete_purged(transaction, now_ms, limit))

    async def shorten(self, job_id: str, *, now_ms: int, ttl_ms: int) -> None:
        """See `JobStore.shorten`."""
        await self._writer.call(lambda transaction: jobs.shorten(transaction, job_id, now_ms, ttl_ms))

    async def prune_jobs(self, *, now_ms: int, limit: int = 1000) -> int:
        """See `JobStore.prune_jobs`."""
        return await self._writer.call(lambda transaction: jobs.prune(transaction, now_ms, limit))

    # Batches

    async def add_batch(self, batch: Batch, drafts: Sequence[BatchDraft]) -> None:
        """See `BatchStore.add_batch`."""
        await self._writer.call(
            lambda transaction: batches.add(transaction, batch, drafts),
            size=common.draft_bytes(drafts),
            new_work=True,
        )

    async def add_batch_requests(self, batch_id: str, drafts: Sequence[BatchDraft]) -> Batch:
        """See `BatchStore.add_batch_requests`."""
        return await self._writer.call(
            lambda transaction: batches.add_requests(transaction, batch_id, drafts),
            size=common.draft_bytes(drafts),
            new_work=True,
        )

    async def remove_batch_request(self, batch_id: str, request_id: str) -> Batch:
        """See `BatchStore.remove_batch_request`."""
        return await self._writer.call(
            lambda transaction: batches.remove_request(transaction, batch_id, request_id)
        )

    async def rename_batch(self, batch_id: str, name: str) -> Batch:
        """See `BatchStore.rename_batch`."""
        return await self._writer.call(lambda transaction: batches.rename(transaction, batch_id, name))

    async def finalize_batch(self, batch_id: str, template: Job) -> Batch:
        """See `BatchStore.finalize_batch`."""
        return await self._writer.call(lambda transaction: batches.finalize(transaction, batch_id, template))

    async def cancel_batch(self, batch_id: str, *, now_ms: int) -> tuple[Batch, Sequence[Applied]]:
        """See `BatchStore.cancel_batch`."""
        return await self._writer.call(lambda transaction: batches.cancel(transaction, batch_id, now_ms))

    async def batch(self, batch_id: str) -> Batch:
        """See `BatchStore.batch`."""
        return await self._reader.call(lambda transaction: batches.get(transaction, batch_id))

    async def batches(self, endpoint_id: str, *, limit: int = 1000) -> Sequence[Batch]:
        """See `BatchStore.batches`."""
        return await self._reader.call(lambda transaction: batches.newest(transaction, endpoint_id, limit))

    async def batch_requests(self, batch_id: str, *, offset: int, limit: int) -> Sequence[Job | BatchDraft]:
        """See `BatchStore.batch_requests`."""
        return await self._reader.call(
            lambda transaction: batches.requests(transaction, batch_id, offset, limit)
        )

    async def prune_batches(self, *, ended_before_ms: int, limit: int = 100) -> int:
        """See `BatchStore.prune_batches`."""
        return await self._writer.call(lambda transaction: batches.prune(transaction, ended_before_ms, limit))

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
        ids, hosts = list(skip_ids), list(skip_hosts)
        return await self._reader.call(
            lambda transaction: webhooks.due(transaction, now_ms, limit, ids, hosts)
        )

    async def next_webhook_ms(self) -> int | None:
        """See `WebhookStore.next_webhook_ms`."""
        return await self._reader.call(webhooks.next_ms)

    async def put_webhook(self, delivery: WebhookDelivery) -> None:
        """See `WebhookStore.put_webhook`."""
        await self._writer.call(
            lambda transaction: webhooks.put(transaction, delivery), size=len(delivery.body)
        )

    async def delete_webhook(self, delivery_id: str) -> None:
        """See `WebhookStore.delete_webhook`."""
        await self._writer.call(lambda transaction: webhooks.delete(transaction, delivery_id))

    async def webhook(self, delivery_id: str) -> WebhookDelivery:
        """See `WebhookStore.webhook`."""
        return await self._reader.call(lambda transaction: webhooks.get(transaction, delivery_id))

    async def dead_webhooks(
        self, *, endpoint_id: str | None = None, limit: int = 100
    ) -> Sequence[WebhookDelivery]:
        """See `WebhookStore.dead_webhooks`."""
        return await self._reader.call(lambda transaction: webhooks.dead(transaction, endpoint_id, limit))

    async def trim_webhooks(self, *, host_bytes: int, all_bytes: int, before_ms: int) -> int:
        """See `WebhookStore.trim_webhooks`."""
        return await self._writer.call(
            lambda transaction: webhooks.trim(transaction, host_bytes, all_bytes, before_ms)
        )

    # Usage, requests, starts

    async def add_usage(self, intervals: Sequence[UsageInterval]) -> None:
        """See `UsageStore.add_usage`."""
        await self._writer.call(lambda transaction: logs.add_usage(transaction, intervals))

    async def usage(
        self, *, endpoint_id: str | None = None, worker_id: str | None = None, since_ms: int = 0
    ) -> Sequence[UsageInterval]:
        """See `UsageStore.usage`."""
        return await self._reader.call(
            lambda transaction: logs.usage(transaction, endpoint_id, worker_id, since_ms)
        )

    async def add_requests(self, records: Sequence[RequestRecord]) -> None:
        """See `RequestLog.add_requests`."""
        last = self._requests_cut_off
        try:
            await self._writer.call(lambda transaction: request_log.add_requests(transaction, records, last))
        except asyncio.CancelledError:
            # It may happen all the same, and be asked for again by who cannot know.
            self._requests_cut_off = (*last, *records)
            raise
        self._requests_cut_off = ()

    async def requests(self, *, endpoint_id: str | None = None, limit: int = 100) -> Sequence[RequestRecord]:
        """See `RequestLog.requests`."""
        return await self._reader.call(
            lambda transaction: request_log.requests(transaction, endpoint_id, limit)
        )

    async def prune_requests(self, *, keep: int) -> int:
        """See `RequestLog.prune_requests`."""
        return await self._writer.call(lambda transaction: request_log.prune_requests(transaction, keep))

    async def put_start(self, record: StartRecord) -> None:
        """See `StartLog.put_start`."""
        await self._writer.call(lambda transaction: logs.put_start(transaction, record))

    async def starts(self, *, endpoint_id: str | None = None, limit: int = 50) -> Sequence[StartRecord]:
        """See `StartLog.starts`."""
        return await self._reader.call(lambda transaction: logs.starts(transaction, endpoint_id, limit))


_WITH_OUTPUT = (ResultPosted, Progressed)


def _size(event: JobEvent) -> int:
    output = event.output if isinstance(event, _WITH_OUTPUT) else None
    return 0 if output is None else len(output)
