"""Jobs that the SQLite store answers from memory: always those of the last commit, and never too many.

Every kind of change is tried by the machine of tests/property, too, which compares after each step.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from pilotlight.core.lifecycle import Cancelled, Confirmed, ResultPosted, WorkerLost
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.job import Attempt, Job, JobStatus
from pilotlight.errors import ConflictError, NotFoundError, StoreError
from pilotlight.stores import SqliteStore
from pilotlight.stores.sqlite import jobs
from pilotlight.stores.sqlite.known import JobShelf, Known, KnownInputs, KnownJobs
from pilotlight.stores.sqlite.threads import DatabaseThread, Transaction

NewJob = Callable[..., Job]
E1 = "endpoint1"


def written(job: Job, seq: int) -> dict[str, Known | None]:
    """What a transaction says that wrote one job."""
    return {job.id: (job, seq)}


class TestKnownJobs:
    def test_what_is_said_counts_at_once_for_the_writer_and_for_readers_from_the_commit_on(
        self, new_job: NewJob
    ) -> None:
        known, job = KnownJobs(), new_job("a", input=b"")
        known.put(job, 1)
        assert (known.get("a"), known._committed.get("a")) == ((job, 1), None)
        known.commit()
        known.drop("a")
        assert (known.get("a"), known._committed.get("a")) == (None, (job, 1))
        known.commit()
        assert (known.get("a"), known._committed.get("a")) == (None, None)

    def test_a_rollback_leaves_it_as_it_was(self, new_job: NewJob) -> None:
        known, job = KnownJobs(), new_job("a", input=b"")
        known.put(job, 1)
        known.commit()
        known.put(replace(job, retries=9), 1)
        known.clear()
        known.put(new_job("b", input=b""), 2)
        known.roll_back()
        known.commit()
        assert (known.get("a"), known.get("b")) == ((job, 1), None)

    def test_after_a_clearing_only_what_is_said_later_is_known(self, new_job: NewJob) -> None:
        known = KnownJobs()
        for seq, job_id in enumerate("abc"):
            known.put(new_job(job_id, input=b""), seq)
        known.commit()
        known.put(new_job("b", 5, input=b""), 1)
        known.clear()
        known.put(new_job("c", 6, input=b""), 2)
        assert [known.get(job_id) is None for job_id in "abc"] == [True, True, False]
        known.commit()
        assert [known._committed.get(job_id) is None for job_id in "abc"] == [True, True, False]


class TestShelf:
    def test_so_many_are_kept_and_those_written_last(self, new_job: NewJob) -> None:
        known = JobShelf(count_max=3)
        for seq, job_id in enumerate(["a", "b", "c", "a", "d"]):
            known.take_over((False, written(new_job(job_id, input=b""), seq)))
        assert [known.get(job_id) is not None for job_id in "abcd"] == [True, False, True, True]

    def test_so_many_bytes_are_kept(self, new_job: NewJob) -> None:
        """1. Outputs count. 2. So do all other texts, and the story. 3. What a job held is given back when it is
        written anew or dropped, so that the bound stays what it is."""
        known = JobShelf(bytes_max=100_000)
        for seq in range(20):
            known.take_over((False, written(new_job(str(seq), input=b"", output=b"x" * 19_000), seq)))
        assert [seq for seq in range(20) if known.get(str(seq))] == [15, 16, 17, 18, 19]
        ended = Attempt(
            number=1,
            worker_id="w",
            queued_ms=1,
            started_ms=1,
            confirmed_ms=1,
            first_output_ms=None,
            ended_ms=2,
            reason="x" * 500,
        )
        texts: dict[str, Any] = {"error": "x" * 9_000, "webhook": "x" * 7_000, "s3_config": b"x" * 600}
        known.take_over((False, written(new_job("long", input=b"", attempts=(ended,) * 3, **texts), 20)))
        assert known.get("16") is not None
        assert known.get("15") is None
        known.take_over((False, dict.fromkeys([*map(str, range(20)), "long"])))
        assert known._bytes == 0

    def test_a_very_large_one_is_not_kept_and_takes_nobodys_place(self, new_job: NewJob) -> None:
        known = JobShelf(bytes_max=3_000_000)
        for seq, job_id in enumerate("ab"):
            known.take_over((False, written(new_job(job_id, input=b""), seq)))
        known.take_over((False, written(new_job("a", input=b"", output=b"x" * 2_000_000), 0)))
        assert (known.get("a"), known.get("b") is None) == (None, False)


class TestKnownInputs:
    def test_an_input_is_kept_until_it_is_taken(self) -> None:
        known = KnownInputs()
        known.put("a", b"1")
        known.put("a", b"22")
        assert (known.take("a"), known.take("a")) == (b"22", None)
        assert known._bytes == 0
        known.put("b", b"")
        assert known.take("b") == b""
        known.put("c", b"3")
        known.clear()
        assert (known.take("c"), known._bytes) == (None, 0)

    def test_so_many_bytes_are_kept(self) -> None:
        """1. Those kept longest go. 2. What is very large does not come in, nor does what it had before stay."""
        known = KnownInputs(bytes_max=1_000_000)
        for number in range(20):
            known.put(str(number), b"x" * 99_800)
        assert [number for number in range(20) if known.take(str(number)) is not None] == list(range(10, 20))
        known.put("a", b"1")
        known.put("a", b"x" * 500_000)
        assert known.take("a") is None


def count_reads(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets longer with each operation of the reader."""
    reads: list[int] = []
    call = DatabaseThread.submit

    def submit(self: DatabaseThread, *arguments: Any, **options: Any) -> Any:
        if self is store._reader:
            reads.append(1)
        return call(self, *arguments, **options)

    monkeypatch.setattr(DatabaseThread, "submit", submit)
    return reads


async def stored(store: SqliteStore, job_id: str) -> Job:
    """The job as the database has it."""
    return await store._reader.call(lambda transaction: jobs.job(transaction, job_id))


async def forget(store: SqliteStore) -> None:
    """Make the store know no job."""
    await store._writer.call(lambda transaction: transaction.jobs.clear())


@asynccontextmanager
async def held(thread: DatabaseThread) -> AsyncIterator[None]:
    """Holds a thread inside an operation that has read something, in a group with what was asked for before."""
    entered, leave = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def block(transaction: Transaction) -> None:
        transaction.execute("job", ("",)).fetchall()
        loop.call_soon_threadsafe(entered.set)
        leave.wait()

    blocked = thread.submit(block)
    await entered.wait()
    try:
        yield
    finally:
        leave.set()
        await blocked


class TestReads:
    async def test_what_was_written_a_moment_ago_needs_no_reader(
        self, sqlite_store: SqliteStore, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """1. After every change. 2. Without the input. 3. With what the database has."""
        reads = count_reads(sqlite_store, monkeypatch)
        submitted = await sqlite_store.submit(new_job("a", webhook="https://x.example/"))
        assert await sqlite_store.job("a") == replace(submitted, input=b"")
        [taken] = await sqlite_store.take(E1, "w1", count=1, now_ms=2_000)
        assert await sqlite_store.job("a") == replace(taken, input=b"")
        for event in (
            Confirmed(worker_id="w1", now_ms=2_100),
            ResultPosted(worker_id="w1", now_ms=3_000, output=b"1"),
        ):
            applied = await sqlite_store.apply("a", event)
            assert await sqlite_store.job("a") is applied.after
        await sqlite_store.shorten("a", now_ms=3_000, ttl_ms=5_000)
        assert (await sqlite_store.job("a")).retention_ms == 5_000
        assert not reads
        assert await sqlite_store.job("a") == await stored(sqlite_store, "a")

    async def test_chunks_confirm_a_job_and_reading_them_is_remembered(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        await sqlite_store.submit(new_job("a"))
        await sqlite_store.take(E1, "w1", count=1, now_ms=2_000)
        for moment in (2_100, 2_200):
            await sqlite_store.append_chunk("a", "w1", b"1", attempt=1, now_ms=moment, limit_bytes=100)
            job = await sqlite_store.job("a")
            assert (job.confirmed_ms, job.first_output_ms, job.chunk_read) == (2_100, 2_100, False)
        await sqlite_store.drain_chunks("a", limit_bytes=100)
        assert (await sqlite_store.job("a")).chunk_read
        assert await sqlite_store.job("a") == await stored(sqlite_store, "a")

    async def test_what_is_gone_is_gone(self, sqlite_store: SqliteStore, new_job: NewJob) -> None:
        """1. Pruned. 2. Purged, while a job that runs stays."""
        for job_id in ("pruned", "runs", "purged"):
            await sqlite_store.submit(new_job(job_id))
        await sqlite_store.apply("pruned", Cancelled(now_ms=2_000))
        assert await sqlite_store.prune_jobs(now_ms=3_000_000) == 1
        with pytest.raises(NotFoundError):
            await sqlite_store.job("pruned")
        await sqlite_store.take(E1, "w1", count=1, now_ms=2_000)
        assert await sqlite_store.purge(E1, now_ms=2_000) == 1
        with pytest.raises(NotFoundError):
            await sqlite_store.job("purged")
        assert (await sqlite_store.job("runs")).status is JobStatus.IN_PROGRESS

    async def test_a_purge_and_a_submission_in_one_group(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        await sqlite_store.submit(new_job("before"))
        async with held(sqlite_store._writer):
            purged = asyncio.create_task(sqlite_store.purge(E1, now_ms=2_000))
            submitted = asyncio.create_task(sqlite_store.submit(new_job("after")))
            await asyncio.sleep(0)
        assert await purged == 1
        await submitted
        assert (await sqlite_store.job("after")).id == "after"
        with pytest.raises(NotFoundError):
            await sqlite_store.job("before")

    async def test_changes_of_many_jobs(self, sqlite_store: SqliteStore, new_job: NewJob) -> None:
        """1. Requests of a batch that is cancelled. 2. All jobs of an endpoint."""
        batch = Batch(id="b", endpoint_id=E1, created_ms=1_000)
        await sqlite_store.add_batch(
            batch, [BatchDraft(id="r1", input=b"1"), BatchDraft(id="r2", input=b"2")]
        )
        await sqlite_store.finalize_batch("b", new_job("", batch_id="b"))
        await sqlite_store.submit(new_job("a"))
        assert await sqlite_store.take(E1, "w1", count=2, now_ms=2_000)
        await sqlite_store.cancel_batch("b", now_ms=3_000)
        await sqlite_store.cancel_all(E1, Cancelled(now_ms=4_000))
        for job_id in ("r1", "r2", "a"):
            assert (await sqlite_store.job(job_id)).status is JobStatus.CANCELLED
            assert sqlite_store._known.get(job_id) is not None
            assert await sqlite_store.job(job_id) == await stored(sqlite_store, job_id)

    async def test_jobs_get_numbers_after_those_of_a_batch(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        await sqlite_store.submit(new_job("a"))
        await sqlite_store.add_batch(
            Batch(id="b", endpoint_id=E1, created_ms=1_000), [BatchDraft(id="r", input=b"1")]
        )
        await sqlite_store.finalize_batch("b", new_job("", batch_id="b"))
        await sqlite_store.submit(new_job("z"))
        assert [job.id for job in await sqlite_store.take(E1, "w1", count=3, now_ms=2_000)] == ["a", "z", "r"]

    async def test_a_closed_store_answers_nothing(self, sqlite_store: SqliteStore, new_job: NewJob) -> None:
        await sqlite_store.submit(new_job("a"))
        await sqlite_store.close()
        with pytest.raises(StoreError, match="closed"):
            await sqlite_store.job("a")


class TestInputs:
    async def take(self, store: SqliteStore, count: int = 1) -> list[tuple[str, bytes]]:
        taken = await store.take(E1, "w1", count=count, now_ms=2_000)
        return [(job.id, job.input) for job in taken]

    async def test_a_job_is_handed_out_with_its_input_wherever_that_is(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. Known, forgotten and too large ones in one take. 2. A second hand-out."""
        await sqlite_store.submit(new_job("a", input=b"0"))
        await sqlite_store._writer.call(lambda transaction: transaction.inputs.clear())
        await sqlite_store.submit(new_job("b", input=b"1"))
        await sqlite_store.submit(new_job("c", input=b"2" * 300_000))
        known = await sqlite_store._writer.call(lambda transaction: list(transaction.inputs._inputs))
        assert known == ["b"]
        expected = [("a", b"0"), ("b", b"1"), ("c", b"2" * 300_000)]
        assert await self.take(sqlite_store, 3) == expected
        for job_id in "abc":
            await sqlite_store.apply(job_id, WorkerLost(worker_id="w1", now_ms=2_000, reason="gone"))
        assert await self.take(sqlite_store, 3) == expected

    async def test_a_refused_submission_leaves_no_input(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        await sqlite_store.submit(new_job("a", input=b"first"))
        with pytest.raises(ConflictError):
            await sqlite_store.submit(new_job("a", input=b"second"))
        assert await self.take(sqlite_store) == [("a", b"first")]

    async def test_an_id_that_comes_again_has_its_own_input(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. A job is purged. 2. A request of a batch has its id."""
        await sqlite_store.submit(new_job("a", input=b"job"))
        await sqlite_store.purge(E1, now_ms=2_000)
        await sqlite_store.delete_purged(now_ms=2_000)
        await sqlite_store.add_batch(
            Batch(id="b", endpoint_id=E1, created_ms=1_000), [BatchDraft(id="a", input=b"request")]
        )
        await sqlite_store.finalize_batch("b", new_job("", batch_id="b"))
        assert await self.take(sqlite_store) == [("a", b"request")]


class TestCommits:
    async def test_nobody_sees_what_is_not_committed(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. A change is made, its group goes on. 2. Until the commit the job is as it was."""
        await sqlite_store.submit(new_job("a"))
        async with held(sqlite_store._writer):
            cancelling = asyncio.create_task(sqlite_store.apply("a", Cancelled(now_ms=2_000)))
            await asyncio.sleep(0)
            holding = held(sqlite_store._writer)
            entering = asyncio.create_task(holding.__aenter__())
            await asyncio.sleep(0)
        await entering
        assert (await sqlite_store.job("a")).status is JobStatus.IN_QUEUE
        await holding.__aexit__(None, None, None)
        await cancelling
        assert (await sqlite_store.job("a")).status is JobStatus.CANCELLED

    async def test_a_group_that_failed_changed_nothing(
        self, sqlite_store: SqliteStore, new_job: NewJob
    ) -> None:
        """1. A change, a purge and a submission, and the disk fails. 2. All is as before, and goes on."""

        def fail(_: Transaction) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        await sqlite_store.submit(new_job("runs"))
        await sqlite_store.take(E1, "w1", count=1, now_ms=2_000)
        await sqlite_store.submit(new_job("a"))
        async with held(sqlite_store._writer):
            calls: list[asyncio.Task[Any]] = [
                asyncio.create_task(sqlite_store.apply("runs", Cancelled(now_ms=2_000))),
                asyncio.create_task(sqlite_store.purge(E1, now_ms=2_000)),
                asyncio.create_task(sqlite_store.submit(new_job("b"))),
                asyncio.create_task(sqlite_store._writer.call(fail)),
            ]
            await asyncio.sleep(0)
        for call in calls:
            with pytest.raises(StoreError, match="disk I/O error"):
                await call
        assert (await sqlite_store.job("runs")).status is JobStatus.IN_PROGRESS
        assert (await sqlite_store.job("a")).status is JobStatus.IN_QUEUE
        with pytest.raises(NotFoundError):
            await sqlite_store.job("b")
        await sqlite_store.submit(new_job("b"))
        assert [job.id for job in await sqlite_store.take(E1, "w1", count=2, now_ms=2_000)] == ["a", "b"]
        assert await sqlite_store.purge(E1, now_ms=2_000) == 0

    async def test_a_read_that_a_write_overtook_leaves_nothing_behind(
        self, sqlite_store: SqliteStore, new_job: NewJob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """1. A cold read waits in a transaction of the reader that began before a change. 2. It finds the job as it
        was then. 3. Whoever asks next finds the change, cold or not."""
        await sqlite_store.submit(new_job("a"))
        await forget(sqlite_store)
        async with held(sqlite_store._reader):
            holding = held(sqlite_store._reader)
            entering = asyncio.create_task(holding.__aenter__())
            await asyncio.sleep(0)
            cold = asyncio.create_task(sqlite_store.job("a"))
            await asyncio.sleep(0)
        await entering
        await sqlite_store.apply("a", Cancelled(now_ms=2_000))
        assert (await sqlite_store.job("a")).status is JobStatus.CANCELLED
        await holding.__aexit__(None, None, None)
        assert (await cold).status is JobStatus.IN_QUEUE
        reads = count_reads(sqlite_store, monkeypatch)
        assert (await sqlite_store.job("a")).status is JobStatus.CANCELLED
        assert not reads
        await forget(sqlite_store)
        assert (await sqlite_store.job("a")).status is JobStatus.CANCELLED
        assert reads
