"""The queue: every sentence of `ports.store.JobStore`, on every implementation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from pilotlight.core.lifecycle import (
    Applied,
    Cancelled,
    Confirmed,
    Effect,
    ExecutionTimedOut,
    PlatformInterrupted,
    Progressed,
    ResultPosted,
    StartRefused,
    TtlReached,
    WorkerLost,
)
from pilotlight.domain.job import Job, JobCounts, JobStatus, QueueDemand
from pilotlight.errors import ConflictError, NotFoundError, StoreError
from pilotlight.ports.store import Store

NewJob = Callable[..., Job]
E1, E2 = "endpoint1", "endpoint2"


def ids(jobs: Sequence[Job]) -> list[str]:
    return [job.id for job in jobs]


async def take(store: Store, worker: str = "w1", count: int = 1, now_ms: int = 2_000) -> list[str]:
    return ids(await store.take(E1, worker, count=count, now_ms=now_ms))


async def finish(store: Store, job_id: str, worker: str = "w1", now_ms: int = 3_000) -> Applied:
    return await store.apply(job_id, ResultPosted(worker_id=worker, now_ms=now_ms, output=b'"done"'))


class TestSubmit:
    async def test_a_submitted_job_reads_back_as_it_was(self, store: Store, new_job: NewJob) -> None:
        job = new_job(
            "sync-1", key_id="key", sync=True, low_priority=True, input=b'{ "raw" :  "\xc3\xa9\\u0000" }'
        )
        await store.submit(job)
        assert await store.job("sync-1") == job

    async def test_an_id_is_used_once(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        with pytest.raises(ConflictError, match="job a"):
            await store.submit(new_job("a", input=b"other", endpoint_id=E2))
        assert (await store.job("a")).input == b'{"prompt": "hi"}'
        assert (await store.counts(E1)).queued == 1
        assert (await store.counts(E2)).queued == 0

    async def test_an_id_is_used_once_under_concurrency(self, store: Store, new_job: NewJob) -> None:
        results = await asyncio.gather(
            *(store.submit(new_job("a")) for _ in range(20)), return_exceptions=True
        )
        assert sum(result is None for result in results) == 1
        assert all(result is None or isinstance(result, ConflictError) for result in results)
        assert (await store.counts(E1)).queued == 1

    async def test_large_inputs_and_outputs_survive_unchanged(self, store: Store, new_job: NewJob) -> None:
        body = bytes(range(256)) * 8_192
        await store.submit(new_job("a", input=body))
        [taken] = await store.take(E1, "w1", count=1, now_ms=1)
        assert taken.input == body
        await store.apply("a", ResultPosted(worker_id="w1", now_ms=2, output=body[::-1]))
        assert (await store.job("a")).output == body[::-1]


class TestTake:
    async def test_first_in_first_out_by_queued_ms(self, store: Store, new_job: NewJob) -> None:
        for job_id, at in (("c", 30), ("a", 10), ("b", 20), ("b2", 20)):
            await store.submit(new_job(job_id, at))
        assert await take(store, count=3) == ["a", "b", "b2"]
        assert await take(store, count=3) == ["c"]
        assert await take(store, count=3) == []

    async def test_a_taken_job_is_in_progress(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        [job] = await store.take(E1, "w1", count=1, now_ms=2_000)
        assert job == await store.job("a")
        assert (job.status, job.worker_id, job.started_ms, job.attempt) == (
            JobStatus.IN_PROGRESS,
            "w1",
            2_000,
            1,
        )
        assert not job.confirmed
        assert job.delay_ms == 1_000

    async def test_normal_before_low_priority(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("low", 1, low_priority=True))
        await store.submit(new_job("normal", 2))
        assert await take(store, count=2) == ["normal", "low"]

    async def test_a_retried_job_goes_to_the_head_of_its_class(self, store: Store, new_job: NewJob) -> None:
        """serverless-api.md §12 item 34: ahead of older jobs, but never ahead of a better class."""
        await store.submit(new_job("low1", 1, low_priority=True))
        assert await take(store) == ["low1"]
        await store.apply("low1", WorkerLost(worker_id="w1", now_ms=50, reason="gone"))
        for job_id in ("n1", "n2", "n3"):
            await store.submit(new_job(job_id, 10))
        await store.submit(new_job("low2", 2, low_priority=True))
        assert await take(store, count=2) == ["n1", "n2"]
        await store.apply("n2", WorkerLost(worker_id="w1", now_ms=60, reason="gone"))
        await store.apply("n1", PlatformInterrupted(now_ms=61))
        assert await take(store, count=9) == ["n2", "n1", "n3", "low1", "low2"]

    async def test_expired_jobs_are_not_handed_out(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("gone", 1, expires_ms=100))
        await store.submit(new_job("alive", 2, expires_ms=101))
        assert await take(store, count=2, now_ms=100) == ["alive"]
        assert (await store.job("gone")).status is JobStatus.IN_QUEUE

    async def test_only_jobs_of_the_endpoint(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a", endpoint_id=E2))
        assert await take(store, count=5) == []
        assert ids(await store.take(E2, "w9", count=5, now_ms=1)) == ["a"]

    @pytest.mark.parametrize("count", [0, -1])
    async def test_nothing_asked_nothing_taken(self, store: Store, new_job: NewJob, count: int) -> None:
        await store.submit(new_job("a"))
        assert await take(store, count=count) == []

    async def test_every_job_is_handed_out_once_to_32_takers(self, store: Store, new_job: NewJob) -> None:
        """1. 300 jobs. 2. 32 workers take one to three at a time until none is left. 3. No id twice."""
        await asyncio.gather(*(store.submit(new_job(f"j{number}", number)) for number in range(300)))

        async def work(number: int) -> list[str]:
            mine: list[str] = []
            while taken := await take(store, f"w{number}", count=1 + number % 3):
                mine += taken
            return mine

        taken = await asyncio.gather(*(work(number) for number in range(32)))
        everything = [job_id for mine in taken for job_id in mine]
        assert len(everything) == len(set(everything)) == 300
        assert (await store.counts(E1)).in_progress == 300
        for number, mine in enumerate(taken):
            assert sorted(ids(await store.running(worker_id=f"w{number}"))) == sorted(mine)


class TestApply:
    async def test_the_answer_tells_before_after_and_effect(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        [taken] = await store.take(E1, "w1", count=1, now_ms=2_000)
        applied = await finish(store, "a")
        assert applied.before == taken
        assert applied.after == await store.job("a")
        assert applied.effect is Effect.CHANGED
        assert applied.finished
        assert applied.freed_worker_id == "w1"
        assert (applied.after.status, applied.after.output, applied.after.finished_ms) == (
            JobStatus.COMPLETED,
            b'"done"',
            3_000,
        )

    async def test_unknown_jobs(self, store: Store) -> None:
        with pytest.raises(NotFoundError, match="nobody"):
            await store.apply("nobody", Cancelled(now_ms=1))
        with pytest.raises(NotFoundError, match="nobody"):
            await store.job("nobody")
        with pytest.raises(NotFoundError, match="nobody"):
            await store.append_chunk("nobody", "w1", b"x")
        with pytest.raises(NotFoundError, match="nobody"):
            await store.drain_chunks("nobody", limit_bytes=1)
        with pytest.raises(NotFoundError, match="nobody"):
            await store.shorten("nobody", now_ms=1, ttl_ms=1)
        assert not await store.has_chunks("nobody")

    async def test_a_second_or_late_result_is_ignored(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store)
        first = await finish(store, "a")
        late = await store.apply("a", ResultPosted(worker_id="w1", now_ms=4_000, error="late"))
        assert late.effect is Effect.IGNORED_TERMINAL
        assert late.after == first.after == await store.job("a")
        assert await store.counts(E1) == JobCounts(completed=1)

    async def test_a_result_of_another_worker_is_ignored(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store, "w1")
        await store.apply("a", WorkerLost(worker_id="w1", now_ms=2_500, reason="gone"))
        assert (await finish(store, "a", "w1")).effect is Effect.IGNORED_STATE
        await take(store, "w2", now_ms=2_600)
        assert (await finish(store, "a", "w1")).effect is Effect.IGNORED_OTHER_ATTEMPT
        assert (await finish(store, "a", "w2")).effect is Effect.CHANGED

    async def test_a_lost_worker_requeues_once_then_fails(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store)
        first = await store.apply("a", WorkerLost(worker_id="w1", now_ms=2_500, reason="gone"))
        assert first.requeued
        assert (first.after.retries, first.after.queued_ms) == (1, 2_500)
        await take(store, now_ms=2_600)
        second = await store.apply("a", WorkerLost(worker_id="w1", now_ms=2_700, reason="gone"))
        assert (second.after.status, second.after.error) == (
            JobStatus.FAILED,
            "job timed out after 1 retries",
        )
        assert await store.counts(E1) == JobCounts(failed=1, retried=1)

    async def test_a_retryable_error_requeues_once_then_fails(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        error = ResultPosted(worker_id="w1", now_ms=2_500, error="engine died", retryable=True)
        await take(store)
        assert (await store.apply("a", error)).requeued
        await take(store, now_ms=2_600)
        assert (await store.apply("a", error)).after.status is JobStatus.FAILED
        assert (await store.job("a")).error == "engine died"

    async def test_an_interruption_by_the_platform_uses_up_no_retry(
        self, store: Store, new_job: NewJob
    ) -> None:
        await store.submit(new_job("a"))
        for number in range(3):
            await take(store, now_ms=2_000 + number)
            applied = await store.apply("a", PlatformInterrupted(now_ms=2_001 + number))
            assert applied.requeued
            assert applied.after.retries == 0
        assert (await store.job("a")).attempt == 3
        assert await store.counts(E1) == JobCounts(queued=1)

    async def test_cancelling_a_queued_and_a_running_job(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("running", 1))
        await store.submit(new_job("queued", 2))
        await take(store)
        for job_id, worker in (("running", "w1"), ("queued", None)):
            applied = await store.apply(job_id, Cancelled(now_ms=3_000))
            assert applied.after.status is JobStatus.CANCELLED
            assert applied.freed_worker_id == worker
        assert await take(store) == []
        assert (await finish(store, "running")).effect is Effect.IGNORED_TERMINAL
        assert await store.counts(E1) == JobCounts()

    async def test_progress_and_confirmation(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store)
        await store.apply("a", Confirmed(worker_id="w1"))
        assert (await store.job("a")).confirmed
        await store.apply("a", Progressed(worker_id="w1", output=b'"42 %"'))
        assert (await store.job("a")).output == b'"42 %"'

    async def test_timeouts(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("slow", 1))
        await store.submit(new_job("old", 2))
        await take(store)
        slow = await store.apply("slow", ExecutionTimedOut(now_ms=5_000))
        assert (slow.after.status, slow.after.error) == (JobStatus.FAILED, "executionTimeout exceeded")
        old = await store.apply("old", TtlReached(now_ms=5_000))
        assert old.after.status is JobStatus.TIMED_OUT
        assert await store.counts(E1) == JobCounts(failed=2)


class TestLists:
    async def test_pages_newest_first_by_created_and_id(self, store: Store, new_job: NewJob) -> None:
        for job_id, at in (("a", 1), ("c", 2), ("b", 2), ("d", 3)):
            await store.submit(new_job(job_id, at))
        await store.submit(new_job("other", 2, endpoint_id=E2))
        assert ids(await store.jobs(E1)) == ["d", "c", "b", "a"]
        page = await store.jobs(E1, limit=2)
        assert ids(page) == ["d", "c"]
        page = await store.jobs(E1, before=(page[-1].created_ms, page[-1].id), limit=2)
        assert ids(page) == ["b", "a"]
        assert ids(await store.jobs(E1, before=(1, "a"))) == []
        assert ids(await store.jobs(E1, limit=0)) == []

    async def test_pages_of_one_state(self, store: Store, new_job: NewJob) -> None:
        for number in range(6):
            await store.submit(new_job(f"j{number}", number))
        await take(store, count=3)
        assert ids(await store.jobs(E1, status=JobStatus.IN_PROGRESS)) == ["j2", "j1", "j0"]
        assert ids(await store.jobs(E1, status=JobStatus.IN_PROGRESS, before=(2, "j2"), limit=1)) == ["j1"]
        assert ids(await store.jobs(E1, status=JobStatus.FAILED)) == []

    async def test_running_of_one_worker_or_of_all(self, store: Store, new_job: NewJob) -> None:
        for number in range(4):
            await store.submit(new_job(f"j{number}", number))
        await store.submit(new_job("other", 9, endpoint_id=E2))
        await take(store, "w1", count=2)
        await take(store, "w2")
        await store.take(E2, "w3", count=1, now_ms=1)
        assert ids(await store.running(worker_id="w1")) == ["j0", "j1"]
        assert ids(await store.running()) == ["j0", "j1", "j2", "other"]
        assert ids(await store.running(worker_id="nobody")) == []

    async def test_due_are_living_jobs_past_ttl_or_execution_timeout(
        self, store: Store, new_job: NewJob
    ) -> None:
        await store.submit(new_job("running", 1, execution_timeout_ms=500))
        await store.submit(new_job("done", 2, expires_ms=2_100))
        assert await take(store, count=2, now_ms=2_000) == ["running", "done"]
        await finish(store, "done", now_ms=2_050)
        await store.submit(new_job("waiting", 3, expires_ms=2_400))
        await store.submit(new_job("fine", 4))
        assert ids(await store.due(now_ms=2_399)) == []
        assert ids(await store.due(now_ms=2_400)) == ["waiting"]
        assert ids(await store.due(now_ms=2_499)) == ["waiting"]
        assert ids(await store.due(now_ms=2_500)) == ["waiting", "running"]
        assert ids(await store.due(now_ms=2_500, limit=1)) == ["waiting"]

    async def test_due_counts_the_execution_of_the_present_attempt(
        self, store: Store, new_job: NewJob
    ) -> None:
        await store.submit(new_job("a", 1, execution_timeout_ms=500))
        await take(store, now_ms=1_000)
        await store.apply("a", PlatformInterrupted(now_ms=1_400))
        assert ids(await store.due(now_ms=5_000)) == []
        await take(store, now_ms=2_000)
        assert ids(await store.due(now_ms=2_499)) == []
        assert ids(await store.due(now_ms=2_500)) == ["a"]


class TestChunks:
    async def test_chunks_come_back_once_and_in_order(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store)
        for number in range(3):
            assert await store.append_chunk("a", "w1", b"%d" % number)
        assert await store.has_chunks("a")
        job, chunks = await store.drain_chunks("a", limit_bytes=1_000)
        assert [chunk.body for chunk in chunks] == [b"0", b"1", b"2"]
        assert [chunk.sequence for chunk in chunks] == sorted(chunk.sequence for chunk in chunks)
        assert job == await store.job("a")
        assert not await store.has_chunks("a")
        assert await store.drain_chunks("a", limit_bytes=1_000) == (job, [])
        assert await store.append_chunk("a", "w1", b"3")
        _, later = await store.drain_chunks("a", limit_bytes=1_000)
        assert later[0].sequence > chunks[-1].sequence

    async def test_a_chunk_confirms_the_job(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store)
        await store.append_chunk("a", "w1", b"x")
        assert (await store.job("a")).confirmed

    async def test_returning_a_chunk_marks_the_job_as_read(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store)
        job, _ = await store.drain_chunks("a", limit_bytes=10)
        assert not job.chunk_read
        await store.append_chunk("a", "w1", b"x")
        assert not (await store.job("a")).chunk_read
        job, _ = await store.drain_chunks("a", limit_bytes=10)
        assert job.chunk_read
        assert (await store.job("a")).chunk_read

    async def test_about_so_many_bytes_but_at_least_one(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store)
        for body in (b"x" * 100, b"y" * 30, b"z" * 30):
            await store.append_chunk("a", "w1", body)
        sizes = []
        while drained := (await store.drain_chunks("a", limit_bytes=60))[1]:
            sizes.append([len(chunk.body) for chunk in drained])
        assert sizes == [[100], [30, 30]]

    async def test_chunks_of_another_attempt_are_refused(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        assert not await store.append_chunk("a", "w1", b"too early")
        await take(store, "w1")
        assert not await store.append_chunk("a", "w2", b"not its job")
        await finish(store, "a")
        assert not await store.append_chunk("a", "w1", b"too late")
        assert not await store.has_chunks("a")

    async def test_unread_chunks_are_dropped_by_a_requeue(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store, "w1")
        await store.append_chunk("a", "w1", b"of the first attempt")
        await store.apply("a", WorkerLost(worker_id="w1", now_ms=2_500, reason="gone"))
        assert not await store.has_chunks("a")
        await take(store, "w2")
        await store.append_chunk("a", "w2", b"of the second")
        _, chunks = await store.drain_chunks("a", limit_bytes=100)
        assert [chunk.body for chunk in chunks] == [b"of the second"]

    async def test_unread_chunks_outlive_cancellation_and_result(self, store: Store, new_job: NewJob) -> None:
        for job_id in ("cancelled", "done"):
            await store.submit(new_job(job_id))
            await take(store)
            await store.append_chunk(job_id, "w1", b"x")
        await store.apply("cancelled", Cancelled(now_ms=3_000))
        await finish(store, "done")
        for job_id, status in (("cancelled", JobStatus.CANCELLED), ("done", JobStatus.COMPLETED)):
            job, chunks = await store.drain_chunks(job_id, limit_bytes=100)
            assert job.status is status
            assert [chunk.body for chunk in chunks] == [b"x"]

    async def test_a_job_whose_stream_was_read_is_not_retried(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store)
        await store.append_chunk("a", "w1", b"x")
        await store.drain_chunks("a", limit_bytes=100)
        applied = await store.apply("a", WorkerLost(worker_id="w1", now_ms=2_500, reason="gone"))
        assert applied.after.status is JobStatus.FAILED

    async def test_two_readers_split_the_chunks(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store)
        for number in range(50):
            await store.append_chunk("a", "w1", b"%02d" % number)
        drained = await asyncio.gather(*(store.drain_chunks("a", limit_bytes=10) for _ in range(10)))
        bodies = [chunk.body for _, chunks in drained for chunk in chunks]
        assert sorted(bodies) == [b"%02d" % number for number in range(50)]


class TestCounting:
    async def test_nothing_known_is_all_zero(self, store: Store) -> None:
        assert await store.counts("unknown") == JobCounts()
        assert await store.demand("unknown", overdue_before_ms=9) == QueueDemand()

    async def test_counters_and_demand_equal_the_truth(self, store: Store, new_job: NewJob) -> None:
        for number in range(10):
            await store.submit(new_job(f"n{number}", 10 * number))
        for number in range(4):
            await store.submit(new_job(f"l{number}", 1, low_priority=True))
        await take(store, count=5)
        await finish(store, "n0")
        await store.apply("n1", ResultPosted(worker_id="w1", now_ms=2_500, error="no"))
        await store.apply("n2", WorkerLost(worker_id="w1", now_ms=2_600, reason="gone"))
        await store.apply("n3", Cancelled(now_ms=2_600))
        assert await store.counts(E1) == JobCounts(queued=10, in_progress=1, completed=1, failed=1, retried=1)
        assert await store.demand(E1, overdue_before_ms=71) == QueueDemand(
            queued=6, queued_low=4, oldest_ms=50, overdue=3, in_progress=1
        )

    async def test_overdue_is_strictly_earlier(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a", 100))
        assert (await store.demand(E1, overdue_before_ms=100)).overdue == 0
        assert (await store.demand(E1, overdue_before_ms=101)).overdue == 1

    async def test_a_requeued_job_waits_since_its_requeue(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a", 100))
        await take(store)
        await store.apply("a", WorkerLost(worker_id="w1", now_ms=2_500, reason="gone"))
        assert (await store.demand(E1, overdue_before_ms=2_500)).oldest_ms == 2_500

    async def test_low_priority_jobs_are_neither_oldest_nor_overdue(
        self, store: Store, new_job: NewJob
    ) -> None:
        await store.submit(new_job("a", 100, low_priority=True))
        assert await store.demand(E1, overdue_before_ms=9_999) == QueueDemand(queued_low=1)

    async def test_totals_survive_pruning(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await take(store)
        await store.apply("a", WorkerLost(worker_id="w1", now_ms=2_500, reason="gone"))
        await take(store)
        await finish(store, "a")
        assert await store.prune_jobs(now_ms=10**12) == 1
        assert await store.counts(E1) == JobCounts(completed=1, retried=1)


class TestEnds:
    async def test_cancel_all_ends_every_living_job_of_the_endpoint(
        self, store: Store, new_job: NewJob
    ) -> None:
        await asyncio.gather(*(store.submit(new_job(f"j{number}", number % 7)) for number in range(1_100)))
        await store.submit(new_job("other", endpoint_id=E2))
        done, *_running = await take(store, count=3)
        await finish(store, done)
        applied = await store.cancel_all(E1, StartRefused(now_ms=4_000, reason="endpoint deleted"))
        assert len(applied) == 1_099
        assert {each.after.status for each in applied} == {JobStatus.FAILED}
        assert sum(each.freed_worker_id == "w1" for each in applied) == 2
        assert done not in {each.after.id for each in applied}
        assert await store.counts(E1) == JobCounts(completed=1, failed=1_099)
        assert (await store.job("other")).status is JobStatus.IN_QUEUE
        assert list(await store.cancel_all(E1, Cancelled(now_ms=5_000))) == []

    async def test_prune_deletes_ended_jobs_past_retention(self, store: Store, new_job: NewJob) -> None:
        for job_id, retention in (("short", 100), ("long", 1_000), ("living", 1)):
            await store.submit(new_job(job_id, retention_ms=retention, expires_ms=2_500))
        await take(store, count=3)
        await store.append_chunk("short", "w1", b"x")
        await finish(store, "short")
        await finish(store, "long")
        assert await store.prune_jobs(now_ms=3_099) == 0
        assert await store.prune_jobs(now_ms=3_100) == 1
        with pytest.raises(NotFoundError):
            await store.job("short")
        assert not await store.has_chunks("short")
        assert await store.prune_jobs(now_ms=10**12) == 1
        assert (await store.job("living")).status is JobStatus.IN_PROGRESS

    async def test_prune_deletes_at_most_so_many(self, store: Store, new_job: NewJob) -> None:
        for number in range(5):
            await store.submit(new_job(f"j{number}"))
            await store.apply(f"j{number}", Cancelled(now_ms=2_000))
        assert await store.prune_jobs(now_ms=10**12, limit=3) == 3
        assert await store.prune_jobs(now_ms=10**12, limit=3) == 2

    async def test_an_id_is_free_again_after_pruning(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await store.apply("a", Cancelled(now_ms=2_000))
        await store.prune_jobs(now_ms=10**12)
        await store.submit(new_job("a"))
        assert await take(store) == ["a"]

    async def test_shorten_an_ended_job(self, store: Store, new_job: NewJob) -> None:
        """serverless-api.md §2.6: the record may only live shorter."""
        await store.submit(new_job("a", retention_ms=10_000))
        await take(store)
        await finish(store, "a", now_ms=3_000)
        await store.shorten("a", now_ms=4_000, ttl_ms=2_000)
        assert (await store.job("a")).retention_ms == 3_000
        await store.shorten("a", now_ms=4_000, ttl_ms=60_000)
        assert (await store.job("a")).retention_ms == 3_000
        assert await store.prune_jobs(now_ms=5_999) == 0
        assert await store.prune_jobs(now_ms=6_000) == 1

    async def test_shorten_a_living_job(self, store: Store, new_job: NewJob) -> None:
        job = new_job("a", expires_ms=50_000)
        await store.submit(job)
        await store.shorten("a", now_ms=4_000, ttl_ms=60_000)
        assert await store.job("a") == job
        await store.shorten("a", now_ms=4_000, ttl_ms=2_000)
        assert await store.job("a") == replace(job, expires_ms=6_000)
        assert ids(await store.due(now_ms=6_000)) == ["a"]
        assert await take(store, now_ms=6_000) == []


class TestClose:
    async def test_close_is_idempotent_and_final(self, store: Store, new_job: NewJob) -> None:
        await store.submit(new_job("a"))
        await asyncio.gather(store.close(), store.close())
        await store.close()
        with pytest.raises(StoreError, match="closed"):
            await store.submit(new_job("b"))
        with pytest.raises(StoreError, match="closed"):
            await store.job("a")
