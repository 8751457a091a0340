"""Stream chunks (serverless-api.md §2.8), on every implementation: once, in order, bounded, of one attempt."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from pilotlight.core.lifecycle import (
    STREAM_BEGUN,
    Cancelled,
    ExecutionTimedOut,
    PlatformInterrupted,
    Retried,
)
from pilotlight.domain.job import JobStatus
from pilotlight.errors import NotFoundError
from pilotlight.ports.store import ChunkFate

E1 = "endpoint1"
STORED, OTHER, FULL = ChunkFate.STORED, ChunkFate.OTHER_ATTEMPT, ChunkFate.FULL


class TestPosting:
    async def test_a_chunk_confirms_the_job_and_marks_its_first_output(self, store, queue) -> None:
        await queue.running("a")
        assert await queue.chunk("a", now_ms=2_100) is STORED
        assert await queue.chunk("a", now_ms=2_200) is STORED
        job = await store.job("a")
        assert (job.confirmed_ms, job.first_output_ms) == (2_100, 2_100)

    async def test_only_of_the_running_attempt(self, store, queue) -> None:
        await queue.submit("a")
        assert await queue.chunk("a", b"too early") is OTHER
        await queue.take("w1")
        assert await queue.chunk("a", b"not its job", "w2") is OTHER
        assert await queue.chunk("a", b"of another attempt", attempt=2) is OTHER
        assert await queue.chunk("a", b"of this one", attempt=1) is STORED
        await queue.finish("a")
        assert await queue.chunk("a", b"too late") is OTHER
        assert await queue.read("a") == [b"of this one"]
        assert (await store.job("a")).confirmed_ms == 2_400

    @pytest.mark.parametrize("event", [Cancelled(now_ms=3_000), ExecutionTimedOut(now_ms=3_000)])
    async def test_none_after_the_end_was_acknowledged(self, store, queue, event) -> None:
        """serverless-api.md §2.8: those that arrived before stay readable, none that came later ever is."""
        await queue.running("a")
        await queue.chunk("a", b"before")
        await store.apply("a", event)
        assert await queue.chunk("a", b"after") is OTHER
        assert await queue.read("a") == [b"before"]
        assert await queue.read("a", cursor=0) == [b"before"]

    async def test_of_an_unknown_job(self, queue, store) -> None:
        with pytest.raises(NotFoundError, match="nobody"):
            await queue.chunk("nobody")
        with pytest.raises(NotFoundError, match="nobody"):
            await store.drain_chunks("nobody", limit_bytes=1)
        assert not await store.has_chunks("nobody")
        assert not await store.has_chunks("nobody", cursor=0)

    async def test_any_bytes(self, queue) -> None:
        await queue.running("a")
        bodies = [b"", bytes(range(256)), b'{"output": "\\u0000"}', b"\xff" * 1_000_000]
        for body in bodies:
            assert await queue.chunk("a", body, limit=10_000_000) is STORED
        assert await queue.read("a", limit=10_000_000) == bodies


class TestBound:
    """Slow readers must not grow what is kept without bound."""

    async def test_full_when_unread_chunks_would_exceed_the_limit(self, queue) -> None:
        await queue.running("a")
        assert await queue.chunk("a", b"x" * 60, limit=100) is STORED
        assert await queue.chunk("a", b"y" * 41, limit=100) is FULL
        assert await queue.chunk("a", b"z" * 40, limit=100) is STORED
        assert await queue.chunk("a", b"1", limit=100) is FULL
        assert await queue.read("a") == [b"x" * 60, b"z" * 40]

    async def test_what_was_read_no_longer_counts(self, queue) -> None:
        await queue.running("a")
        assert await queue.chunk("a", b"x" * 100, limit=100) is STORED
        assert await queue.read("a") == [b"x" * 100]
        assert await queue.chunk("a", b"y" * 100, limit=100) is STORED
        assert await queue.chunk("a", b"z", limit=100) is FULL
        assert await queue.read("a") == [b"y" * 100]

    async def test_a_chunk_that_alone_exceeds_it(self, queue, store) -> None:
        await queue.running("a")
        assert await queue.chunk("a", b"x" * 101, limit=100) is FULL
        assert not await store.has_chunks("a")

    async def test_a_full_stream_is_still_of_the_attempt(self, queue) -> None:
        await queue.running("a")
        assert await queue.chunk("a", b"x" * 101, "w2", limit=100) is OTHER

    async def test_a_new_attempt_begins_empty(self, queue) -> None:
        await queue.running("a")
        assert await queue.chunk("a", b"x" * 100, limit=100) is STORED
        await queue.lose("a")
        await queue.take("w2")
        assert await queue.chunk("a", b"y" * 100, "w2", limit=100) is STORED

    async def test_posted_at_the_same_time_they_share_the_limit(self, queue) -> None:
        await queue.running("a")
        fates = await asyncio.gather(*(queue.chunk("a", b"x" * 10, limit=100) for _ in range(50)))
        assert (fates.count(STORED), fates.count(FULL)) == (10, 40)
        assert await queue.read("a") == [b"x" * 10] * 10


class TestTrimming:
    """A long stream that is read all the time must not grow what is kept without bound, either."""

    async def test_only_what_was_read_and_the_oldest_first(self, queue, store) -> None:
        await queue.running("a")
        for number in range(6):
            await queue.chunk("a", b"%d" % number)
        assert await store.trim_chunks("a") == 0
        assert await queue.read("a", limit=4, cursor=0) == [b"0", b"1", b"2", b"3"]
        assert await store.trim_chunks("a") == 0
        assert await queue.read("a", limit=4) == [b"0", b"1", b"2", b"3"]
        assert await store.trim_chunks("a", limit=0) == 0
        assert await store.trim_chunks("a", limit=1) == 1
        assert await queue.read("a", cursor=0) == [b"1", b"2", b"3", b"4", b"5"]
        assert [await store.trim_chunks("a", limit=2) for _ in range(3)] == [2, 1, 0]
        assert await queue.read("a", cursor=0) == [b"4", b"5"]
        await queue.chunk("a", b"6")
        assert await queue.read("a") == [b"4", b"5", b"6"]
        assert await store.trim_chunks("a") == 3
        assert not await store.has_chunks("a", cursor=0)

    async def test_the_bound_on_what_nobody_read_stays(self, queue, store) -> None:
        await queue.running("a")
        assert await queue.chunk("a", b"x" * 60, limit=100) is STORED
        await queue.read("a")
        assert await queue.chunk("a", b"y" * 60, limit=100) is STORED
        assert await store.trim_chunks("a") == 1
        assert await queue.chunk("a", b"z" * 41, limit=100) is FULL
        assert await queue.chunk("a", b"z" * 40, limit=100) is STORED

    async def test_other_jobs_and_later_attempts_keep_theirs(self, queue, store) -> None:
        await queue.running("a", "b")
        for job_id in ("a", "b"):
            await queue.chunk(job_id)
            await queue.read(job_id)
        await queue.fail("a")
        await store.apply("a", Retried(now_ms=4_000, expires_ms=10**9))
        await queue.take("w2", now_ms=5_000)
        await queue.chunk("a", b"again", "w2")
        assert await store.trim_chunks("a") == 0
        assert await store.trim_chunks("nobody") == 0
        assert await queue.read("a", cursor=0) == [b"again"]
        assert await queue.read("b", cursor=0) == [b"x"]


class TestReading:
    async def test_once_and_in_order(self, store, queue) -> None:
        await queue.running("a")
        for number in range(3):
            await queue.chunk("a", b"%d" % number)
        assert await store.has_chunks("a")
        job, chunks = await store.drain_chunks("a", limit_bytes=1_000)
        assert [chunk.body for chunk in chunks] == [b"0", b"1", b"2"]
        sequences = [chunk.sequence for chunk in chunks]
        assert sequences == sorted(set(sequences))
        assert job == await store.job("a")
        assert not await store.has_chunks("a")
        assert await queue.read("a") == []
        await queue.chunk("a", b"3")
        _, later = await store.drain_chunks("a", limit_bytes=1_000)
        assert later[0].sequence > chunks[-1].sequence

    async def test_the_order_of_posts_that_wait_for_each_other(self, queue) -> None:
        await queue.running("a")
        for number in range(120):
            await queue.chunk("a", b"%03d" % number)
        assert await queue.read("a") == [b"%03d" % number for number in range(120)]

    async def test_about_so_many_bytes_but_at_least_one(self, queue) -> None:
        await queue.running("a")
        for body in (b"x" * 100, b"y" * 30, b"z" * 30):
            await queue.chunk("a", body)
        sizes = []
        while drained := await queue.read("a", limit=60):
            sizes.append([len(body) for body in drained])
        assert sizes == [[100], [30, 30]]

    async def test_returning_a_chunk_marks_the_job_as_read(self, store, queue) -> None:
        await queue.running("a")
        job, _ = await store.drain_chunks("a", limit_bytes=10)
        assert not job.chunk_read
        await queue.chunk("a")
        assert not (await store.job("a")).chunk_read
        job, _ = await store.drain_chunks("a", limit_bytes=10)
        assert job.chunk_read
        assert (await store.job("a")).chunk_read

    @pytest.mark.parametrize("event", ["lost", "interrupted"])
    @pytest.mark.parametrize("cursor", [None, 0])
    async def test_a_job_whose_stream_was_read_is_queued_again_and_its_stream_begins_anew(
        self, store, queue, event, cursor
    ) -> None:
        """worker-protocol.md §7.2, serverless-api.md §2.10: what the first attempt said is shown to nobody."""
        await queue.running("a")
        for body in (b"read", b"unread"):
            await queue.chunk("a", body)
        assert await queue.read("a", limit=1, cursor=cursor) == [b"read"]
        if event == "lost":
            await queue.lose("a")
        else:
            await store.apply("a", PlatformInterrupted(now_ms=2_500))
        job = await store.job("a")
        assert (job.status, job.retries, job.chunk_read) == (JobStatus.IN_QUEUE, event == "lost", False)
        assert [attempt.reason.endswith(STREAM_BEGUN) for attempt in job.attempts] == [True]
        assert not await store.has_chunks("a")
        assert not await store.has_chunks("a", cursor=0)
        await queue.take("w2")
        assert not (await store.job("a")).chunk_read
        for body in (b"1", b"2"):
            await queue.chunk("a", body, "w2")
        assert await queue.read("a", cursor=0) == [b"1", b"2"]
        assert await queue.read("a") == [b"1", b"2"]

    async def test_the_second_loss_fails_a_job_whose_stream_was_read(self, queue) -> None:
        """serverless-api.md §2.10: with the text that clients match on."""
        await queue.running("a")
        for worker in ("w1", "w2"):
            await queue.chunk("a", b"x", worker)
            assert await queue.read("a") == [b"x"]
            lost = await queue.lose("a", worker)
            await queue.take("w2")
        assert (lost.after.status, lost.after.error) == (JobStatus.FAILED, "job timed out after 1 retries")

    async def test_unread_chunks_are_dropped_by_a_requeue(self, store, queue) -> None:
        for event in ("lost", "interrupted"):
            await queue.running(event)
            await queue.chunk(event, b"of the first attempt")
        await queue.lose("lost")
        await store.apply("interrupted", PlatformInterrupted(now_ms=2_500))
        for job_id in ("lost", "interrupted"):
            assert not await store.has_chunks(job_id)
            assert not await store.has_chunks(job_id, cursor=0)
            assert await queue.take("w2") == [job_id]
            await queue.chunk(job_id, b"of the second", "w2")
            assert await queue.read(job_id) == [b"of the second"]

    async def test_chunks_outlive_every_end(self, store, queue) -> None:
        await queue.running("cancelled", "done", "failed")
        for job_id in ("cancelled", "done", "failed"):
            await queue.chunk(job_id)
        await store.apply("cancelled", Cancelled(now_ms=3_000))
        await queue.finish("done")
        await queue.fail("failed")
        for job_id in ("cancelled", "done", "failed"):
            job, chunks = await store.drain_chunks(job_id, limit_bytes=100)
            assert job.status.terminal
            assert [chunk.body for chunk in chunks] == [b"x"]
            job, chunks = await store.drain_chunks(job_id, limit_bytes=100)
            assert (job.status.terminal, list(chunks)) == (True, [])

    async def test_a_retry_by_the_client_begins_a_new_stream(self, store, queue) -> None:
        """`JobStore.apply`: when the job goes back to the queue its chunks are dropped."""
        await queue.running("a")
        await queue.chunk("a", b"old, read")
        assert await queue.read("a") == [b"old, read"]
        await queue.chunk("a", b"old, unread")
        await queue.fail("a")
        await store.apply("a", Retried(now_ms=4_000, expires_ms=10**9))
        assert await queue.read("a") == []
        await queue.take("w2", now_ms=5_000)
        for body in (b"1", b"2"):
            await queue.chunk("a", body, "w2")
        assert await queue.read("a", cursor=0) == [b"1", b"2"]
        assert await queue.read("a") == [b"1", b"2"]

    async def test_two_readers_split_the_chunks(self, queue) -> None:
        """serverless-api.md §2.8: reads are destructive, and each chunk is returned to one of them."""
        await queue.running("a")
        for number in range(50):
            await queue.chunk("a", b"%02d" % number)
        drained = await asyncio.gather(*(queue.read("a", limit=10) for _ in range(10)))
        bodies = [body for some in drained for body in some]
        assert sorted(bodies) == [b"%02d" % number for number in range(50)]

    async def test_posts_and_reads_at_the_same_time_lose_nothing(self, queue) -> None:
        await queue.running("a")

        async def post() -> None:
            for number in range(100):
                assert await queue.chunk("a", b"%03d" % number) is STORED
                await asyncio.sleep(0)

        posting = asyncio.create_task(post())
        read: list[bytes] = []
        while len(read) < 100:
            read += await queue.read("a", limit=20)
            await asyncio.sleep(0)
        await posting
        assert read == [b"%03d" % number for number in range(100)]


class TestReturning:
    """A reader that left before it had its answer loses nothing (serverless-api.md §2.8, §13 item 8)."""

    async def drained(self, store, queue, *bodies: bytes, limit: int = 1_000) -> list:
        """What one drain returns of a running job with these chunks."""
        await queue.running("a")
        for body in bodies:
            await queue.chunk("a", body)
        _, chunks = await store.drain_chunks("a", limit_bytes=limit)
        return chunks

    async def test_the_next_drain_returns_them_again_in_order(self, store, queue) -> None:
        chunks = await self.drained(store, queue, b"0", b"1", b"2")
        await queue.chunk("a", b"3")
        await store.return_chunks("a", chunks, attempt=1)
        assert await store.has_chunks("a")
        _, again = await store.drain_chunks("a", limit_bytes=1_000)
        assert again[:3] == chunks
        assert [chunk.body for chunk in again] == [b"0", b"1", b"2", b"3"]
        assert not await store.has_chunks("a")
        assert await queue.read("a") == []

    async def test_what_was_drained_before_stays_drained(self, store, queue) -> None:
        first = await self.drained(store, queue, b"0", b"1", b"2", limit=1)
        assert [chunk.body for chunk in first] == [b"0"]
        _, rest = await store.drain_chunks("a", limit_bytes=1_000)
        await store.return_chunks("a", rest, attempt=1)
        assert await queue.read("a") == [b"1", b"2"]

    async def test_nothing_happens_when_others_have_drained_more_meanwhile(self, store, queue) -> None:
        """Their reader would get the later ones a second time, and before the earlier ones."""
        chunks = await self.drained(store, queue, b"0", b"1")
        await queue.chunk("a", b"2")
        assert await queue.read("a") == [b"2"]
        await store.return_chunks("a", chunks, attempt=1)
        assert not await store.has_chunks("a")
        await queue.chunk("a", b"3")
        assert await queue.read("a") == [b"3"]

    async def test_twice_is_once(self, store, queue) -> None:
        chunks = await self.drained(store, queue, b"0", b"1")
        for _ in range(2):
            await store.return_chunks("a", chunks, attempt=1)
        assert await queue.read("a") == [b"0", b"1"]

    @pytest.mark.parametrize("end", ["lost", "interrupted", "retried"])
    async def test_nothing_happens_when_the_attempt_is_over(self, store, queue, end) -> None:
        """In the queue, with the next worker, and while that one streams as much again."""
        chunks = await self.drained(store, queue, b"old")
        if end == "lost":
            await queue.lose("a")
        elif end == "interrupted":
            await store.apply("a", PlatformInterrupted(now_ms=2_500))
        else:
            await queue.fail("a")
            await store.apply("a", Retried(now_ms=4_000, expires_ms=10**9))
        await store.return_chunks("a", chunks, attempt=1)
        assert not await store.has_chunks("a")
        await queue.take("w2", now_ms=5_000)
        await store.return_chunks("a", chunks, attempt=1)
        assert not await store.has_chunks("a")
        await queue.chunk("a", b"new", "w2")
        assert await queue.read("a") == [b"new"]
        await store.return_chunks("a", chunks, attempt=1)
        assert not await store.has_chunks("a")

    async def test_after_the_end_of_the_job(self, store, queue) -> None:
        """Its last chunks are as good as any: the next reader gets them with the terminal status."""
        chunks = await self.drained(store, queue, b"0", b"1")
        await queue.finish("a")
        await store.return_chunks("a", chunks, attempt=1)
        job, again = await store.drain_chunks("a", limit_bytes=1_000)
        assert (job.status, list(again)) == (JobStatus.COMPLETED, chunks)

    async def test_of_an_unknown_job(self, store, queue) -> None:
        chunks = await self.drained(store, queue, b"0")
        await store.return_chunks("nobody", chunks, attempt=1)
        assert not await store.has_chunks("nobody")
        assert not await store.has_chunks("a")

    async def test_they_count_as_unread_again(self, store, queue) -> None:
        """`limit_bytes` of `append_chunk`: what waits for a reader is bounded, however often it is returned."""
        chunks = await self.drained(store, queue, b"x" * 60)
        assert await queue.chunk("a", b"y" * 30, limit=100) is STORED
        await store.return_chunks("a", chunks, attempt=1)
        assert await queue.chunk("a", b"z" * 11, limit=100) is FULL
        assert await queue.chunk("a", b"z" * 10, limit=100) is STORED
        assert await queue.read("a") == [b"x" * 60, b"y" * 30, b"z" * 10]
        assert await queue.chunk("a", b"z" * 100, limit=100) is STORED

    async def test_what_was_trimmed_stays_gone(self, store, queue) -> None:
        chunks = await self.drained(store, queue, b"x" * 60, b"y" * 30)
        assert await store.trim_chunks("a", limit=1) == 1
        await store.return_chunks("a", chunks, attempt=1)
        assert await queue.chunk("a", b"z" * 71, limit=100) is FULL
        assert await queue.chunk("a", b"z" * 70, limit=100) is STORED
        assert await queue.read("a") == [b"y" * 30, b"z" * 70]

    async def test_others_miss_nothing_and_get_all_in_order(self, store, queue) -> None:
        """Every second reader leaves before its answer."""
        await queue.running("a")
        for number in range(60):
            await queue.chunk("a", b"%02d" % number)
        read: list[bytes] = []
        for leaves in itertools.cycle((True, False)):
            job, chunks = await store.drain_chunks("a", limit_bytes=6)
            if not chunks:
                break
            if leaves:
                await store.return_chunks("a", chunks, attempt=job.attempt)
            else:
                read += [chunk.body for chunk in chunks]
        assert read == [b"%02d" % number for number in range(60)]


class TestCursor:
    async def test_reads_from_there_and_remembers_nothing(self, store, queue) -> None:
        await queue.running("a")
        for number in range(4):
            await queue.chunk("a", b"%d" % number)
        _, chunks = await store.drain_chunks("a", limit_bytes=1_000, cursor=0)
        assert [chunk.body for chunk in chunks] == [b"0", b"1", b"2", b"3"]
        third = chunks[2].sequence
        assert await queue.read("a", cursor=third) == [b"2", b"3"]
        assert await queue.read("a", cursor=third) == [b"2", b"3"]
        assert await queue.read("a", limit=1, cursor=third) == [b"2"]
        assert await queue.read("a", cursor=chunks[3].sequence + 1) == []
        assert await queue.read("a") == [b"0", b"1", b"2", b"3"]

    async def test_has_chunks_from_there(self, store, queue) -> None:
        await queue.running("a")
        assert not await store.has_chunks("a", cursor=0)
        await queue.chunk("a")
        _, [chunk] = await store.drain_chunks("a", limit_bytes=1_000, cursor=0)
        assert await store.has_chunks("a", cursor=chunk.sequence)
        assert not await store.has_chunks("a", cursor=chunk.sequence + 1)
        assert await store.has_chunks("a")

    async def test_it_marks_the_job_as_read(self, store, queue) -> None:
        await queue.running("a")
        job, _ = await store.drain_chunks("a", limit_bytes=10, cursor=0)
        assert not job.chunk_read
        await queue.chunk("a")
        job, _ = await store.drain_chunks("a", limit_bytes=10, cursor=0)
        assert job.chunk_read
        assert (await store.job("a")).chunk_read

    async def test_several_readers_see_everything(self, queue) -> None:
        await queue.running("a")
        for number in range(20):
            await queue.chunk("a", b"%02d" % number)
        readers = await asyncio.gather(*(queue.read("a", cursor=0) for _ in range(5)))
        assert readers == [[b"%02d" % number for number in range(20)]] * 5

    async def test_a_large_one_is_no_error(self, queue) -> None:
        await queue.running("a")
        await queue.chunk("a")
        assert await queue.read("a", cursor=2**31 - 1) == []
