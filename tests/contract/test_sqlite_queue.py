"""What a long queue costs on SQLite: query plans, the mark of a purge, groups of alike operations."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from pilotlight.core.lifecycle import Cancelled, Confirmed, ResultPosted, Retried, WorkerLost
from pilotlight.domain.job import Idempotency, Job, JobCounts, JobStatus
from pilotlight.errors import ConflictError, NotFoundError
from pilotlight.stores import SqliteStore
from pilotlight.stores.sqlite.migrations.script import upgrade
from pilotlight.stores.sqlite.sql import QUERIES
from pilotlight.stores.sqlite.threads import Transaction

NewJob = Callable[..., Job]
E1 = "endpoint1"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    """A database with the newest schema and nothing in it."""
    path = tmp_path_factory.mktemp("plans") / "new.db"
    upgrade(path)
    connection = sqlite3.connect(path)
    yield connection
    connection.close()


@asynccontextmanager
async def one_group(store: SqliteStore) -> AsyncIterator[None]:
    """Holds the writer; what is asked for meanwhile becomes one group."""
    entered, leave = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def block(_: Transaction) -> None:
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(leave.wait(), loop).result()

    blocked = store._writer.submit(block)
    await entered.wait()
    try:
        yield
    finally:
        await asyncio.sleep(0)
        leave.set()
        await blocked


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("next_jobs", r"jobs USING INDEX jobs_queue \(endpoint_id=\? AND purges=\?\)"),
        ("queued_jobs", r"jobs USING INDEX jobs_queue \(endpoint_id=\? AND purges=\? AND rank=\?\)"),
        ("purged_jobs", r"jobs USING INDEX jobs_queue \(endpoint_id=\? AND purges<\?\)"),
        ("count_ahead", r"jobs USING INDEX jobs_queue \(endpoint_id=\? AND purges=\? AND \(rank,"),
        ("queue_age", r"jobs USING INDEX jobs_queue \(endpoint_id=\? AND purges=\? AND rank=\?\)"),
        ("due_jobs", r"jobs USING INDEX jobs_due \(deadline_ms<\?\)"),
        ("old_jobs", r"jobs USING INDEX jobs_ended \(deadline_ms<\?\)"),
        ("newest_jobs", r"jobs USING INDEX jobs_listed \(endpoint_id=\? AND status=\?\)"),
        (
            "newest_jobs_before",
            r"jobs USING INDEX jobs_listed \(endpoint_id=\? AND status=\? AND created_ms<\?\)",
        ),
        ("jobs_by_id", r"jobs USING INDEX sqlite_autoindex_jobs_1 \(id=\?\)"),
        ("running_jobs_of_worker", r"jobs USING INDEX jobs_running \(worker_id=\?\)"),
        ("running_jobs", r"jobs USING INDEX jobs_running"),
        ("running_jobs_of_endpoint", r"jobs USING INDEX jobs_running"),
        ("queued_requests", r"jobs USING INDEX jobs_batch \(batch_id=\?\)"),
        ("batch_jobs", r"jobs USING INDEX jobs_batch \(batch_id=\?\)"),
        ("due_webhooks", r"webhooks USING INDEX webhooks_due \(next_ms>\? AND next_ms<\?\)"),
    ],
)
def test_the_queue_is_served_by_its_indices(database: sqlite3.Connection, query: str, index: str) -> None:
    """No scan of all jobs and no sorting, however many there are; only what runs is sorted, and, in lists, what
    was created in the same millisecond."""
    places = len(set(re.findall(r"\?\d", QUERIES[query]))) or QUERIES[query].count("?")
    plan = database.execute(f"EXPLAIN QUERY PLAN {QUERIES[query]}", [None] * places).fetchall()
    steps = [str(step[3]) for step in plan]
    assert any(re.search(index, step) for step in steps), steps
    assert "SCAN jobs" not in steps
    if query not in {"running_jobs", "running_jobs_of_endpoint"}:
        assert not [step for step in steps if "TEMP B-TREE FOR ORDER BY" in step], steps


class TestPurge:
    async def test_a_purged_queue_is_empty_at_once_however_long(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. 3,000 jobs, 3 of them running, 2 low. 2. The purge changes no row of theirs. 3. They are freed
        slice by slice, inputs and keys with them."""
        await asyncio.gather(
            *(
                sqlite_store.submit(
                    new_job(f"j{number}", number, low_priority=number > 2_997),
                    idempotency=Idempotency(key=f"k{number}", fingerprint=b"f"),
                )
                for number in range(3_000)
            )
        )
        await sqlite_store.take(E1, "w1", count=3, now_ms=5_000)
        before = await sqlite_store._writer.call(lambda t: t._connection.total_changes)
        assert await sqlite_store.purge(E1, now_ms=5_000) == 2_997
        assert await sqlite_store._writer.call(lambda t: t._connection.total_changes) - before < 10
        assert await sqlite_store.counts(E1) == JobCounts(in_progress=3)
        assert [job.id for job in await sqlite_store.jobs(E1, limit=9)] == ["j2", "j1", "j0"]
        assert await sqlite_store.take(E1, "w1", count=9, now_ms=5_000) == []
        assert await sqlite_store.purge(E1, now_ms=5_000) == 0
        with pytest.raises(NotFoundError):
            await sqlite_store.apply("j9", Cancelled(now_ms=6_000))
        slices = [await sqlite_store.delete_purged(now_ms=6_000, limit=1_000) for _ in range(4)]
        assert slices == [1_000, 1_000, 997, 0]
        for table in ("jobs", "job_inputs", "idempotency"):
            query = f"SELECT count(*) FROM {table}"
            [count] = await sqlite_store._writer.call(lambda t, q=query: t._connection.execute(q).fetchone())
            assert count == 3

    async def test_jobs_queued_after_a_purge_live_on(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """Those submitted, requeued and retried in the same millisecond, too."""
        for name in ("lost", "failed", "purged"):
            await sqlite_store.submit(new_job(name))
        await sqlite_store.take(E1, "w1", count=2, now_ms=2_000)
        await sqlite_store.apply("failed", ResultPosted(worker_id="w1", now_ms=2_000, error="no"))
        assert await sqlite_store.purge(E1, now_ms=2_000) == 1
        await sqlite_store.submit(new_job("new", 1_000))
        await sqlite_store.apply("lost", WorkerLost(worker_id="w1", now_ms=2_000, reason="gone"))
        await sqlite_store.apply("failed", Retried(now_ms=2_000, expires_ms=10**9))
        assert await sqlite_store.delete_purged(now_ms=2_000) == 1
        taken = await sqlite_store.take(E1, "w1", count=9, now_ms=2_000)
        assert {job.id for job in taken} == {"lost", "failed", "new"}

    async def test_a_purge_knows_what_was_submitted_in_its_own_group(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. One group: two submits, a purge, a submit. 2. Only the last job is left."""
        async with one_group(sqlite_store):
            before = [asyncio.create_task(sqlite_store.submit(new_job(name))) for name in ("a", "b")]
            await asyncio.sleep(0)
            purge = asyncio.create_task(sqlite_store.purge(E1, now_ms=1_000))
            await asyncio.sleep(0)
            after = asyncio.create_task(sqlite_store.submit(new_job("c")))
        await asyncio.gather(*before, after)
        assert await purge == 2
        assert [job.id for job in await sqlite_store.jobs(E1)] == ["c"]
        assert await sqlite_store.counts(E1) == JobCounts(queued=1)


class TestGroups:
    async def test_a_take_finds_what_was_announced_before_it(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. Announced means: asked of the writer. 2. A take asked for then is in the same group."""
        takes: list[asyncio.Task[object]] = []

        def announce() -> None:
            takes.append(asyncio.create_task(sqlite_store.take(E1, "w1", count=1, now_ms=2_000)))

        async with one_group(sqlite_store):
            submits = [
                asyncio.create_task(sqlite_store.submit(new_job(name), announce=announce)) for name in "abc"
            ]
            await asyncio.sleep(0)
        taken = [job.id for jobs in await asyncio.gather(*takes) for job in jobs]
        assert taken == ["a", "b", "c"]
        await asyncio.gather(*submits)

    async def test_submissions_of_one_group_know_each_other(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """The same key and the same id twice in one group: one job, told to all."""
        same, other = Idempotency(key="k", fingerprint=b"1"), Idempotency(key="k", fingerprint=b"2")
        async with one_group(sqlite_store):
            tasks = [
                asyncio.create_task(sqlite_store.submit(new_job(name), idempotency=idempotency))
                for name, idempotency in (("a", same), ("b", same), ("c", other), ("a", None), ("d", None))
            ]
            await asyncio.sleep(0)
        first, repeated, mistaken, taken, last = await asyncio.gather(*tasks, return_exceptions=True)
        assert (first.id, repeated, last.id) == ("a", replace(first, input=b""), "d")
        assert isinstance(mistaken, ConflictError)
        assert isinstance(taken, ConflictError)
        assert {job.id for job in await sqlite_store.jobs(E1)} == {"a", "d"}
        assert await sqlite_store.counts(E1) == JobCounts(queued=2)

    async def test_many_events_for_one_job_in_one_group_add_up(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. Confirmed, lost, cancelled, in one commit. 2. The record tells all of it."""
        await sqlite_store.submit(new_job("a"))
        await sqlite_store.take(E1, "w1", count=1, now_ms=2_000)
        events = [
            ("a", Confirmed(worker_id="w1", now_ms=2_100)),
            ("nobody", Cancelled(now_ms=1)),
            ("a", WorkerLost(worker_id="w1", now_ms=2_200, reason="gone")),
            ("a", Cancelled(now_ms=2_300)),
        ]
        confirmed, nobody, lost, cancelled = await sqlite_store.apply_many(events)
        assert nobody is None
        assert (confirmed.changed, lost.requeued, cancelled.finished) == (True, True, True)
        stored = await sqlite_store.job("a")
        assert stored == cancelled.after
        assert (stored.status, stored.attempts[0].confirmed_ms) == (JobStatus.CANCELLED, 2_100)

    async def test_a_bulk_that_fails_is_repeated_one_by_one(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. One of three submissions cannot be stored. 2. The others are, and only that one is refused."""
        async with one_group(sqlite_store):
            bad = replace(new_job("bad"), created_ms="no moment")
            jobs = [new_job("a"), bad, new_job("b")]
            tasks = [asyncio.create_task(sqlite_store.submit(job)) for job in jobs]
            await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, Job) for result in results] == [True, False, True]
        assert await sqlite_store.counts(E1) == JobCounts(queued=2)
