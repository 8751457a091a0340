"""The face of the SQLite store: each method of the port, handed to the writer or to the reader.

`bootstrap` opens one and closes it. The contract of every method is in `ports.store`; what stands
here is only what is particular to SQLite.
"""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from pilotlight.core.lifecycle import Applied, JobEvent, Progressed, ResultPosted
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.job import Job, JobCounts, JobStatus, QueueDemand
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import RequestRecord, StartRecord, UsageInterval
from pilotlight.domain.worker import Worker
from pilotlight.errors import StoreError
from pilotlight.ports.store import Chunk
from pilotlight.stores.sqlite import endpoints, jobs
from pilotlight.stores.sqlite import records as logs
from pilotlight.stores.sqlite.folder import DATABASE_FILE, FolderLock, create_database_file
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

    writer = DatabaseThread("store-writer", connect, begin="BEGIN IMMEDIATE", release=lock.release)
    await writer.start()
    reader = DatabaseThread("store-reader", lambda: connect_reader(folder / DATABASE_FILE), begin="BEGIN")
    try:
        await reader.start()
    except BaseException:
        writer.stop()
        await writer.join()
        raise
    return SqliteStore(writer, reader)


class SqliteStore:
    """A `Store` in a SQLite database, made by `open_sqlite_store`. Use it on the loop that opened it.

    A call that is cancelled has happened or not, as chance will have it, but never half; jobs that a
    cancelled `take` had already picked go back to the head of the queue without using up their retry.

    Args:
        writer: The thread with the writing connection, started.
        reader: The thread with the reading connection, started.
    """

    def __init__(self, writer: DatabaseThread, reader: DatabaseThread) -> None:
        self._writer = writer
        self._reader = reader
        self._closing: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """See `Store.close`."""
        if self._closing is None:
            self._writer.stop()
            self._reader.stop()
            self._closing = asyncio.create_task(self._close(), name="store-close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        # The reader first: the last connection to be closed folds the log into the database, and only
        # the writer's can write.
        await self._reader.join()
        await self._writer.join()

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

    async def submit(self, job: Job) -> None:
        """See `JobStore.submit`."""
        await self._writer.call(lambda transaction: jobs.submit(transaction, job), size=len(job.input))

    async def take(self, endpoint_id: str, worker_id: str, *, count: int, now_ms: int) -> Sequence[Job]:
        """See `JobStore.take`."""
        future = self._writer.submit(
            lambda transaction: jobs.take(transaction, endpoint_id, worker_id, count, now_ms)
        )
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: self._give_back(done, now_ms))
            raise

    def _give_back(self, future: asyncio.Future[list[Job]], now_ms: int) -> None:
        if future.cancelled() or future.exception() is not None or not future.result():
            return
        taken = future.result()
        try:
            self._writer.submit(lambda transaction: jobs.give_back(transaction, taken, now_ms))
        except StoreError:
            # Closing: they stay handed out, and are interrupted when the next process starts.
            return

    async def apply(self, job_id: str, event: JobEvent) -> Applied:
        """See `JobStore.apply`."""
        output = event.output if isinstance(event, ResultPosted | Progressed) else None
        return await self._writer.call(
            lambda transaction: jobs.apply(transaction, job_id, event), size=len(output or b"")
        )

    async def job(self, job_id: str) -> Job:
        """See `JobStore.job`."""
        return await self._reader.call(lambda transaction: jobs.job(transaction, job_id))

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

    async def append_chunk(self, job_id: str, worker_id: str, body: bytes) -> bool:
        """See `JobStore.append_chunk`."""
        return await self._writer.call(
            lambda transaction: jobs.append_chunk(transaction, job_id, worker_id, body), size=len(body)
        )

    async def drain_chunks(self, job_id: str, *, limit_bytes: int) -> tuple[Job, Sequence[Chunk]]:
        """See `JobStore.drain_chunks`."""
        return await self._writer.call(
            lambda transaction: jobs.drain_chunks(transaction, job_id, limit_bytes)
        )

    async def has_chunks(self, job_id: str) -> bool:
        """See `JobStore.has_chunks`."""
        return await self._reader.call(lambda transaction: jobs.has_chunks(transaction, job_id))

    async def demand(self, endpoint_id: str, *, overdue_before_ms: int) -> QueueDemand:
        """See `JobStore.demand`."""
        return await self._reader.call(
            lambda transaction: jobs.demand(transaction, endpoint_id, overdue_before_ms)
        )

    async def counts(self, endpoint_id: str) -> JobCounts:
        """See `JobStore.counts`."""
        return await self._reader.call(lambda transaction: jobs.counts(transaction, endpoint_id))

    async def running(self, *, worker_id: str | None = None) -> Sequence[Job]:
        """See `JobStore.running`."""
        return await self._reader.call(lambda transaction: jobs.running(transaction, worker_id))

    async def due(self, *, now_ms: int, limit: int = 1000) -> Sequence[Job]:
        """See `JobStore.due`."""
        return await self._reader.call(lambda transaction: jobs.due(transaction, now_ms, limit))

    async def cancel_all(self, endpoint_id: str, event: JobEvent) -> Sequence[Applied]:
        """See `JobStore.cancel_all`."""
        ended: list[Applied] = []
        after = (-(2**63), "")
        while some := await self._writer.call(
            functools.partial(jobs.cancel_some, endpoint_id=endpoint_id, event=event, after=after)
        ):
            ended.extend(some)
            after = (some[-1].after.created_ms, some[-1].after.id)
        return ended

    async def shorten(self, job_id: str, *, now_ms: int, ttl_ms: int) -> None:
        """See `JobStore.shorten`."""
        await self._writer.call(lambda transaction: jobs.shorten(transaction, job_id, now_ms, ttl_ms))

    async def prune_jobs(self, *, now_ms: int, limit: int = 1000) -> int:
        """See `JobStore.prune_jobs`."""
        return await self._writer.call(lambda transaction: jobs.prune(transaction, now_ms, limit))

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
        await self._writer.call(lambda transaction: logs.add_requests(transaction, records))

    async def requests(self, *, endpoint_id: str | None = None, limit: int = 100) -> Sequence[RequestRecord]:
        """See `RequestLog.requests`."""
        return await self._reader.call(lambda transaction: logs.requests(transaction, endpoint_id, limit))

    async def prune_requests(self, *, keep: int) -> int:
        """See `RequestLog.prune_requests`."""
        return await self._writer.call(lambda transaction: logs.prune_requests(transaction, keep))

    async def put_start(self, record: StartRecord) -> None:
        """See `StartLog.put_start`."""
        await self._writer.call(lambda transaction: logs.put_start(transaction, record))

    async def starts(self, *, endpoint_id: str | None = None, limit: int = 50) -> Sequence[StartRecord]:
        """See `StartLog.starts`."""
        return await self._reader.call(lambda transaction: logs.starts(transaction, endpoint_id, limit))
