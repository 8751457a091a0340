"""The stores under test, one fixture for all implementations, and builders of what goes into them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pilotlight import stores
from pilotlight.core.lifecycle import Applied, ResultPosted, WorkerLost
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.domain.job import Job, JobStatus
from pilotlight.ports.store import ChunkFate, Store
from pilotlight.stores import MemoryStore, SqliteStore, open_sqlite_store

STORES = ("memory", "sqlite", "postgresql")


@pytest.fixture(scope="session")
def suite_url(postgresql: Any) -> str:
    """A database that all tests share, one after the other."""
    return str(postgresql.new_database())


@pytest.fixture
def emptied_url(postgresql: Any, suite_url: str) -> str:
    """The same, without a row."""
    postgresql.empty_database(suite_url)
    return suite_url


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    opened: Store
    if request.param == "memory":
        opened = MemoryStore()
    elif request.param == "sqlite":
        opened = await open_sqlite_store(tmp_path / "home")
    else:
        opened = await stores.open_postgresql_store(request.getfixturevalue("emptied_url"))
    yield opened
    await opened.close()


@pytest.fixture
async def sqlite_store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await open_sqlite_store(tmp_path / "home")
    yield opened
    await opened.close()


def build_job(id: str = "job", at: int = 1_000, **changes: Any) -> Job:
    """A job submitted at moment `at`, with distant deadlines unless told otherwise."""
    values: dict[str, Any] = {
        "id": id,
        "endpoint_id": "endpoint1",
        "input": b'{"prompt": "hi"}',
        "created_ms": at,
        "queued_ms": at,
        "expires_ms": at + 86_400_000,
        "execution_timeout_ms": 600_000,
        "retention_ms": 1_800_000,
        **changes,
    }
    return Job(**{"input_bytes": len(values["input"]), **values})


@pytest.fixture
def new_job() -> Callable[..., Job]:
    """Makes a job."""
    return build_job


class Queue:
    """Short words for what most tests do to the queue of a store; moments are milliseconds."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def submit(self, *ids: str, at: int = 1_000, **changes: Any) -> None:
        """Submit jobs one after the other."""
        for job_id in ids:
            await self.store.submit(build_job(job_id, at, **changes))

    async def take(
        self, worker: str = "w1", count: int = 1, now_ms: int = 2_000, endpoint: str = "endpoint1"
    ) -> list[str]:
        """Ids of the jobs taken."""
        return [job.id for job in await self.store.take(endpoint, worker, count=count, now_ms=now_ms)]

    async def running(self, *ids: str, worker: str = "w1", now_ms: int = 2_000, **changes: Any) -> None:
        """Submit jobs and have them taken."""
        for job_id in ids:
            await self.submit(job_id, **changes)
            assert await self.take(worker, now_ms=now_ms) == [job_id]

    async def finish(self, job_id: str, worker: str = "w1", now_ms: int = 3_000, **more: Any) -> Applied:
        """Post a result; a good one unless told otherwise."""
        result = {"output": b'"done"'} if "error" not in more else {}
        return await self.store.apply(
            job_id, ResultPosted(worker_id=worker, now_ms=now_ms, **{**result, **more})
        )

    async def fail(self, job_id: str, worker: str = "w1", now_ms: int = 3_000) -> Applied:
        """Post an error."""
        return await self.finish(job_id, worker, now_ms, error="no")

    async def lose(self, job_id: str, worker: str = "w1", now_ms: int = 2_500) -> Applied:
        """Report its worker lost."""
        return await self.store.apply(job_id, WorkerLost(worker_id=worker, now_ms=now_ms, reason="gone"))

    async def chunk(
        self,
        job_id: str,
        body: bytes = b"x",
        worker: str = "w1",
        *,
        attempt: int | None = None,
        now_ms: int = 2_400,
        limit: int = 1_000_000,
    ) -> ChunkFate:
        """Post a stream chunk."""
        return await self.store.append_chunk(
            job_id, worker, body, attempt=attempt, now_ms=now_ms, limit_bytes=limit
        )

    async def read(self, job_id: str, limit: int = 1_000_000, cursor: int | None = None) -> list[bytes]:
        """Bodies of chunks."""
        _, chunks = await self.store.drain_chunks(job_id, limit_bytes=limit, cursor=cursor)
        return [chunk.body for chunk in chunks]

    async def status(self, job_id: str) -> JobStatus:
        """Where a job stands."""
        return (await self.store.job(job_id)).status

    async def webhooks(self, now_ms: int = 10**15) -> Sequence[Any]:
        """All deliveries that will ever be due."""
        return await self.store.due_webhooks(now_ms=now_ms, limit=100_000)

    async def batch(self, *ids: str, id: str = "batch_1", at: int = 1_000, **changes: Any) -> Batch:
        """A finalized batch."""
        drafts = [BatchDraft(id=each, input=b'{"n": "%s"}' % each.encode()) for each in ids]
        await self.store.add_batch(Batch(id=id, endpoint_id="endpoint1", created_ms=at), drafts)
        return await self.store.finalize_batch(id, build_job("", at, batch_id=id, **changes))


@pytest.fixture
def queue(store: Store) -> Queue:
    """Short words for the store under test."""
    return Queue(store)


@pytest.fixture
def new_endpoint() -> Callable[..., Endpoint]:
    """An endpoint with its first revision, unless told otherwise."""

    def build(id: str = "endpoint1", **changes: Any) -> Endpoint:
        revision = Revision(
            endpoint_id=id,
            version=1,
            model="pilotlight/ember",
            env={"MODEL_NAME": "pilotlight/ember", "ENFORCE_EAGER": "true"},
            gpu_count=2,
            memory_bytes=3 * 2**30,
            created_ms=10,
        )
        values: dict[str, Any] = {"id": id, "name": f"name of {id}", "revision": revision}
        return Endpoint(**{**values, **changes})

    return build
