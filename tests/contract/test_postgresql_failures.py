"""The database server dies and comes back: nothing acknowledged is lost, nothing is half done, all goes on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import pytest

from pilotlight.core.lifecycle import Cancelled, PlatformInterrupted, ResultPosted
from pilotlight.domain.batch import Batch
from pilotlight.domain.job import Idempotency, Job, JobStatus
from pilotlight.errors import NotFoundError, StoreError
from pilotlight.ports.store import ChunkFate, Store
from pilotlight.stores import open_postgresql_store
from pilotlight.stores.postgresql import database
from pilotlight.stores.postgresql.database import Database
from pilotlight.stores.postgresql.sql import QUERIES

from ..postgresql import PASSWORD, PostgresqlServer, postgresql_server  # noqa: TID252
from .test_postgresql_sharing import Recorder

NewJob = Callable[..., Job]
E1 = "endpoint1"
TIMEOUT_S = 60


@pytest.fixture
def mortal() -> Iterator[PostgresqlServer]:
    """A server that a test may kill."""
    with postgresql_server() as server:
        yield server


async def working(store: Store) -> None:
    """Returns when the store works again."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                await store.counts(E1)
            except StoreError:
                await asyncio.sleep(0.05)
            else:
                return


async def test_calls_fail_while_the_server_is_away_and_work_afterwards(
    mortal: PostgresqlServer, new_job: NewJob
) -> None:
    store = await open_postgresql_store(mortal.url())
    ours, lost = Recorder(), asyncio.Event()
    store.listen(ours)
    assert await store.lead(lost.set)
    await store.submit(new_job("before"))
    await ours.until(lambda: ours.resyncs > 0)
    await asyncio.to_thread(mortal.kill)
    for call in (
        store.submit(new_job("meanwhile")),
        store.take(E1, "w", count=1, now_ms=2_000),
        store.apply("before", Cancelled(now_ms=2_000)),
        store.job("before"),
    ):
        with pytest.raises(StoreError) as caught:
            await call
        assert PASSWORD not in str(caught.value)
    await asyncio.wait_for(lost.wait(), TIMEOUT_S)
    resyncs = ours.resyncs
    await asyncio.to_thread(mortal.start)
    await working(store)
    assert (await store.job("before")).status is JobStatus.IN_QUEUE
    with pytest.raises(NotFoundError):
        await store.job("meanwhile")
    await ours.until(lambda: ours.resyncs > resyncs)
    assert await store.lead(lost.set)
    [taken] = await store.take(E1, "w", count=1, now_ms=3_000)
    assert taken.id == "before"
    await store.close()


async def test_a_server_killed_in_mid_work_loses_nothing_acknowledged(
    mortal: PostgresqlServer, new_job: NewJob
) -> None:
    """serverless-api.md §1: what was answered is there, once, and its counters are the truth."""
    store = await open_postgresql_store(mortal.url())
    acknowledged: dict[str, JobStatus] = {}
    refused, enough = asyncio.Event(), asyncio.Event()

    async def client(name: int) -> None:
        # One whose commit turns out to have happened is never refused, and goes on.
        for number in itertools.takewhile(lambda _: not enough.is_set(), itertools.count()):
            job_id = f"{name}-{number}"
            try:
                await store.submit(new_job(job_id))
                acknowledged[job_id] = JobStatus.IN_QUEUE
                for job in await store.take(E1, f"w{name}", count=2, now_ms=2_000):
                    acknowledged[job.id] = JobStatus.IN_PROGRESS
                    event = ResultPosted(worker_id=f"w{name}", now_ms=2_001, output=b"1", attempt=job.attempt)
                    applied = await store.apply(job.id, event)
                    assert applied.changed
                    acknowledged[job.id] = JobStatus.COMPLETED
            except StoreError:
                refused.set()
                return

    clients = [asyncio.create_task(client(name)) for name in range(16)]
    async with asyncio.timeout(TIMEOUT_S):
        while len(acknowledged) < 300:
            await asyncio.sleep(0.01)
    await asyncio.to_thread(mortal.kill)
    await refused.wait()
    await asyncio.to_thread(mortal.start)
    enough.set()
    await asyncio.gather(*clients)
    await working(store)
    for job_id, status in acknowledged.items():
        found = (await store.job(job_id)).status
        assert found is status or (status is not JobStatus.COMPLETED and found is not JobStatus.FAILED)
    jobs = await store.jobs(E1, limit=1_000_000)
    counts = await store.counts(E1)
    statuses = [job.status for job in jobs]
    assert (counts.queued, counts.in_progress, counts.completed) == (
        statuses.count(JobStatus.IN_QUEUE),
        statuses.count(JobStatus.IN_PROGRESS),
        statuses.count(JobStatus.COMPLETED),
    )
    await store.close()


class _LostCommit:
    """Stands for a connection that dies just after, or just before, its commit reached the server."""

    def __init__(self, *, committed: bool) -> None:
        self.committed = committed
        self.hits = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        execute = asyncpg.Connection.execute
        cut = self

        async def cutting(connection, query: str, *values, **options):
            if query == "COMMIT" and not cut.hits:
                cut.hits += 1
                if cut.committed:
                    await execute(connection, query)
                connection.terminate()
                raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
            return await execute(connection, query, *values, **options)

        monkeypatch.setattr(asyncpg.Connection, "execute", cutting)


@pytest.mark.parametrize("committed", [True, False])
class TestACommitWhoseAnswerIsLost:
    async def test_submit(
        self, postgresql_url: str, new_job: NewJob, monkeypatch: pytest.MonkeyPatch, committed: bool
    ) -> None:
        store = await open_postgresql_store(postgresql_url)
        _LostCommit(committed=committed).install(monkeypatch)
        if committed:
            assert (await store.submit(new_job("a"))).id == "a"
        else:
            with pytest.raises(StoreError, match="nothing was changed"):
                await store.submit(new_job("a"))
        assert (await store.counts(E1)).queued == int(committed)
        await store.close()

    async def test_apply(
        self, postgresql_url: str, new_job: NewJob, monkeypatch: pytest.MonkeyPatch, committed: bool
    ) -> None:
        store = await open_postgresql_store(postgresql_url)
        await store.submit(new_job("a"))
        [job] = await store.take(E1, "w", count=1, now_ms=2_000)
        _LostCommit(committed=committed).install(monkeypatch)
        event = ResultPosted(worker_id="w", now_ms=2_001, output=b"1", attempt=1)
        if committed:
            assert (await store.apply(job.id, event)).finished
        else:
            with pytest.raises(StoreError, match="nothing was changed"):
                await store.apply(job.id, event)
            assert (await store.apply(job.id, event)).finished
        assert (await store.counts(E1)).completed == 1
        await store.close()

    async def test_apply_of_what_others_changed_since(
        self, postgresql_url: str, new_job: NewJob, monkeypatch: pytest.MonkeyPatch, committed: bool
    ) -> None:
        """Two jobs in one group; before anybody asks, another gateway changes one of them."""
        store, other = (
            await open_postgresql_store(postgresql_url),
            await open_postgresql_store(postgresql_url),
        )
        await store.submit(new_job("a"))
        await store.submit(new_job("b"))
        resolve = Database._resolve

        async def later(*arguments):
            await other.apply("a", PlatformInterrupted(now_ms=2_002))
            await resolve(*arguments)

        monkeypatch.setattr(Database, "_resolve", later)
        _LostCommit(committed=committed).install(monkeypatch)
        taking = store.take(E1, "w", count=2, now_ms=2_000)
        if committed:
            assert [job.id for job in await taking] == ["a", "b"]
        else:
            with pytest.raises(StoreError, match="nothing was changed"):
                await taking
        await store.close()
        await other.close()

    async def test_drain(
        self, postgresql_url: str, new_job: NewJob, monkeypatch: pytest.MonkeyPatch, committed: bool
    ) -> None:
        """serverless-api.md §2.8: a chunk is delivered once, and is not lost with the connection."""
        store = await open_postgresql_store(postgresql_url)
        await store.submit(new_job("a"))
        await store.take(E1, "w", count=1, now_ms=2_000)
        await store.append_chunk("a", "w", b"1", attempt=1, now_ms=2_001, limit_bytes=100)
        _LostCommit(committed=committed).install(monkeypatch)
        if not committed:
            with pytest.raises(StoreError, match="nothing was changed"):
                await store.drain_chunks("a", limit_bytes=100)
        _, chunks = await store.drain_chunks("a", limit_bytes=100)
        assert [chunk.body for chunk in chunks] == [b"1"]
        await store.close()

    async def test_append_chunk(
        self, postgresql_url: str, new_job: NewJob, monkeypatch: pytest.MonkeyPatch, committed: bool
    ) -> None:
        """What is reported as not stored may be sent again, and must not be there twice."""
        store = await open_postgresql_store(postgresql_url)
        await store.submit(new_job("a"))
        await store.take(E1, "w", count=1, now_ms=2_000)
        execute, hits = asyncpg.Connection.execute, []

        async def cutting(connection, query: str, *values, **options):
            if query == QUERIES["append_chunk"] and not hits:
                hits.append(query)
                if committed:
                    await execute(connection, query, *values, **options)
                connection.terminate()
                raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
            return await execute(connection, query, *values, **options)

        monkeypatch.setattr(asyncpg.Connection, "execute", cutting)
        appending = store.append_chunk("a", "w", b"1", attempt=1, now_ms=2_001, limit_bytes=100)
        if committed:
            assert await appending is ChunkFate.STORED
        else:
            with pytest.raises(StoreError, match="nothing was changed"):
                await appending
        _, chunks = await store.drain_chunks("a", limit_bytes=100)
        assert len(chunks) == int(committed)
        await store.close()


async def test_one_bad_value_harms_nobody_else(postgresql_url: str, new_job: NewJob) -> None:
    """A number that no column can hold comes in the same group as good jobs."""
    store = await open_postgresql_store(postgresql_url)
    # The first goes alone, the others wait for it together.
    jobs = [new_job("first"), new_job("good"), new_job("bad", retries_max=2**40), new_job("fine")]
    answers = await asyncio.gather(*(store.submit(job) for job in jobs), return_exceptions=True)
    assert [isinstance(answer, StoreError) for answer in answers] == [False, False, True, False]
    assert str(2**40) not in str(answers[2])
    await store.close()


async def test_what_is_refused_is_not_done_later(
    postgresql_url: str, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_postgresql_store(postgresql_url)
    with monkeypatch.context() as patch:
        patch.setattr(database, "PENDING_MAX", 0)
        with pytest.raises(StoreError, match="overloaded"):
            await store.submit(new_job("refused"))
    await store.submit(new_job("taken"))
    assert [job.id for job in await store.jobs(E1)] == ["taken"]
    await store.close()


async def _held(postgresql_url: str) -> Any:
    """A connection that keeps all changes of jobs waiting."""
    other = await asyncpg.connect(postgresql_url)
    await other.execute("BEGIN; SELECT pg_advisory_xact_lock(1886220396, 1)")
    return other


async def test_overloaded_it_refuses_new_work_first(
    postgresql_url: str, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What finishes accepted work has more room: refusing it would do the work twice."""
    store = await open_postgresql_store(postgresql_url)
    await store.submit(new_job("a"))
    await store.take(E1, "w", count=1, now_ms=2_000)
    other = await _held(postgresql_url)
    monkeypatch.setattr(database, "PENDING_MAX", 5)
    # The runner of the group is a call itself.
    waiting = [asyncio.create_task(store.submit(new_job(f"w{number}"))) for number in range(4)]
    await asyncio.sleep(0)
    for refused in (
        store.submit(new_job("refused")),
        store.submit(new_job("refused"), idempotency=Idempotency(key="k", fingerprint=b"f")),
        store.add_batch(Batch(id="b", endpoint_id=E1, created_ms=1), []),
        store.job("a"),
    ):
        with pytest.raises(StoreError, match="overloaded: 5 calls"):
            await refused
    done = asyncio.create_task(store.apply("a", ResultPosted(worker_id="w", now_ms=2_001, output=b"1")))
    await asyncio.sleep(0)
    await other.close()
    assert (await done).finished
    await asyncio.gather(*waiting)
    # Nothing is counted any more of what is over.
    for number in range(20):
        await store.submit(new_job(f"x{number}"))
    await store.close()


async def test_overloaded_by_bytes(
    postgresql_url: str, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_postgresql_store(postgresql_url)
    await store.submit(new_job("a"))
    await store.take(E1, "w", count=1, now_ms=2_000)
    other = await _held(postgresql_url)
    monkeypatch.setattr(database, "PENDING_BYTES_MAX", 1_000)
    waiting = asyncio.create_task(store.submit(new_job("w", input=b"x" * 900)))
    await asyncio.sleep(0)
    with pytest.raises(StoreError, match="overloaded"):
        await store.submit(new_job("refused", input=b"x" * 200))

    def result(size: int) -> ResultPosted:
        return ResultPosted(worker_id="w", now_ms=2_001, output=b"1" * size)

    done = asyncio.create_task(store.apply("a", result(200)))
    await asyncio.sleep(0)
    with pytest.raises(StoreError, match="overloaded"):
        await store.apply("a", result(1_000))
    await other.close()
    assert (await done).finished
    await waiting
    await store.close()


async def test_a_purge_lets_others_work_while_it_waits(postgresql_url: str, new_job: NewJob) -> None:
    """A transaction of somebody's lasts long; the purge waits for it, submissions do not wait for the purge."""
    store = await open_postgresql_store(postgresql_url)
    await store.submit(new_job("a"))
    other = await asyncpg.connect(postgresql_url)
    await other.execute(database.Begin.JOBS.value)
    purge = asyncio.create_task(store.purge(E1, now_ms=2_000))
    async with asyncio.timeout(TIMEOUT_S):
        while not await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.01)
        await store.submit(new_job("b"))
    assert not purge.done()
    await other.execute("COMMIT")
    await other.close()
    assert await purge == 2
    await store.close()


async def test_deadlocks_are_tried_again(postgresql_url: str, new_job: NewJob) -> None:
    """Somebody else's transaction holds one job and wants the other; PostgreSQL ends one of the two."""
    store = await open_postgresql_store(postgresql_url)
    await asyncio.gather(store.submit(new_job("a")), store.submit(new_job("b")))
    other = await asyncpg.connect(postgresql_url)
    await other.execute("SET deadlock_timeout = '10s'")
    await other.execute("BEGIN")
    await other.execute("SELECT 1 FROM jobs WHERE id = 'b' FOR UPDATE")
    both = asyncio.create_task(
        store.apply_many([("b", Cancelled(now_ms=2_000)), ("a", Cancelled(now_ms=2_000))])
    )
    async with asyncio.timeout(TIMEOUT_S):
        while not await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.01)
        # It holds a, for jobs are locked in the order of their ids, and gives it up for this one.
        await other.execute("SELECT 1 FROM jobs WHERE id = 'a' FOR UPDATE")
    await other.execute("COMMIT")
    await other.close()
    assert [applied is not None and applied.finished for applied in await both] == [True, True]
    await store.close()


async def test_closing_finishes_what_was_accepted(postgresql_url: str, new_job: NewJob) -> None:
    store = await open_postgresql_store(postgresql_url)
    submits = [asyncio.create_task(store.submit(new_job(f"j{number}"))) for number in range(50)]
    await asyncio.sleep(0)
    await store.close()
    await store.close()
    await asyncio.gather(*submits)
    with pytest.raises(StoreError, match="closed"):
        await store.counts(E1)
    again = await open_postgresql_store(postgresql_url)
    assert (await again.counts(E1)).queued == 50
    await again.close()
