"""Lists and counters of the queue, on every implementation: `/health`, `/requests`, what the scaler sees."""

from __future__ import annotations

import asyncio
import random

from pilotlight.core.lifecycle import Cancelled, PlatformInterrupted, Retried, TtlReached
from pilotlight.domain.job import JobCounts, JobStatus, QueueDemand

E1, E2 = "endpoint1", "endpoint2"
INPUT_BYTES = len(b'{"prompt": "hi"}')


def ids(jobs) -> list[str]:
    return [job.id for job in jobs]


class TestLists:
    async def test_pages_newest_first_by_created_and_id(self, store, queue) -> None:
        for job_id, at in (("a", 1), ("c", 2), ("b", 2), ("d", 3)):
            await queue.submit(job_id, at=at)
        await queue.submit("other", at=2, endpoint_id=E2)
        assert ids(await store.jobs(E1)) == ["d", "c", "b", "a"]
        page = await store.jobs(E1, limit=2)
        assert ids(page) == ["d", "c"]
        page = await store.jobs(E1, before=(page[-1].created_ms, page[-1].id), limit=2)
        assert ids(page) == ["b", "a"]
        assert ids(await store.jobs(E1, before=(1, "a"))) == []
        assert ids(await store.jobs(E1, limit=0)) == []

    async def test_pages_of_one_state(self, store, queue) -> None:
        for number in range(6):
            await queue.submit(f"j{number}", at=number)
        await queue.take(count=3)
        assert ids(await store.jobs(E1, status=JobStatus.IN_PROGRESS)) == ["j2", "j1", "j0"]
        assert ids(await store.jobs(E1, status=JobStatus.IN_PROGRESS, before=(2, "j2"), limit=1)) == ["j1"]
        assert ids(await store.jobs(E1, status=JobStatus.IN_QUEUE)) == ["j5", "j4", "j3"]
        assert ids(await store.jobs(E1, status=JobStatus.FAILED)) == []

    async def test_pages_carry_neither_input_nor_output(self, store, queue) -> None:
        await queue.running("done", "failed")
        await queue.finish("done")
        await queue.finish("failed", error="bad", output=b"1")
        assert [(job.input, job.output) for job in await store.jobs(E1)] == [(b"", None)] * 2
        assert [job.status for job in await store.jobs(E1)] == [JobStatus.FAILED, JobStatus.COMPLETED]

    async def test_running_of_one_worker_or_of_all_in_the_order_of_submission(self, store, queue) -> None:
        await queue.submit("j0", at=5, low_priority=True)
        await queue.submit("j1", "j2", at=5)
        await queue.submit("other", at=1, endpoint_id=E2)
        assert await queue.take("w1", count=3) == ["j1", "j2", "j0"]
        await queue.running("last", worker="w2", at=1)
        await queue.take("w3", endpoint=E2)
        assert ids(await store.running(worker_id="w1")) == ["j0", "j1", "j2"]
        assert ids(await store.running()) == ["j0", "j1", "j2", "other", "last"]
        assert ids(await store.running(worker_id="nobody")) == []
        await queue.finish("j1")
        assert ids(await store.running(worker_id="w1")) == ["j0", "j2"]

    async def test_due_are_living_jobs_past_ttl_or_execution_timeout(self, store, queue) -> None:
        await queue.submit("running", at=1, execution_timeout_ms=500)
        await queue.submit("done", at=2, expires_ms=2_100)
        assert await queue.take(count=2, now_ms=2_000) == ["running", "done"]
        await queue.finish("done", now_ms=2_050)
        await queue.submit("waiting", at=3, expires_ms=2_400)
        await queue.submit("fine", at=4)
        assert ids(await store.due(now_ms=2_399)) == []
        assert ids(await store.due(now_ms=2_400)) == ["waiting"]
        assert ids(await store.due(now_ms=2_499)) == ["waiting"]
        assert ids(await store.due(now_ms=2_500)) == ["waiting", "running"]
        assert ids(await store.due(now_ms=2_500, limit=1)) == ["waiting"]

    async def test_due_counts_the_execution_of_the_present_attempt(self, store, queue) -> None:
        await queue.running("a", now_ms=1_000, execution_timeout_ms=500)
        await store.apply("a", PlatformInterrupted(now_ms=1_400))
        assert ids(await store.due(now_ms=5_000)) == []
        await queue.take(now_ms=2_000)
        assert ids(await store.due(now_ms=2_499)) == []
        assert ids(await store.due(now_ms=2_500)) == ["a"]

    async def test_a_running_job_is_due_by_its_time_to_live(self, store, queue) -> None:
        await queue.running("a", expires_ms=2_600)
        assert ids(await store.due(now_ms=2_600)) == ["a"]


class TestDemand:
    async def test_nothing_known_is_all_zero(self, store) -> None:
        assert await store.counts("unknown") == JobCounts()
        assert await store.demand("unknown", overdue_before_ms=9) == QueueDemand()

    async def test_counters_and_demand_equal_the_truth(self, store, queue) -> None:
        for number in range(10):
            await queue.submit(f"n{number}", at=10 * number)
        for number in range(4):
            await queue.submit(f"l{number}", at=1, low_priority=True)
        await queue.take(count=5)
        await queue.finish("n0")
        await queue.finish("n1", error="no")
        await queue.lose("n2", now_ms=2_600)
        await store.apply("n3", Cancelled(now_ms=2_600))
        assert await store.counts(E1) == JobCounts(queued=10, in_progress=1, completed=1, failed=1, retried=1)
        assert await store.demand(E1, overdue_before_ms=71) == QueueDemand(
            queued=6, queued_low=4, queued_bytes=10 * INPUT_BYTES, oldest_ms=50, overdue=3, in_progress=1
        )

    async def test_bytes_of_both_classes_go_with_their_jobs(self, store, queue) -> None:
        await queue.submit("a", input=b"x" * 1_000)
        await queue.submit("b", input=b"x" * 50, low_priority=True)
        assert (await store.demand(E1, overdue_before_ms=0)).queued_bytes == 1_050
        await queue.take()
        assert (await store.demand(E1, overdue_before_ms=0)).queued_bytes == 50
        await queue.lose("a")
        assert (await store.demand(E1, overdue_before_ms=0)).queued_bytes == 1_050
        await store.apply("a", TtlReached(now_ms=3_000))
        await store.purge(E1, now_ms=3_000)
        assert (await store.demand(E1, overdue_before_ms=0)).queued_bytes == 0

    async def test_overdue_is_strictly_earlier(self, store, queue) -> None:
        await queue.submit("a", at=100)
        assert (await store.demand(E1, overdue_before_ms=100)).overdue == 0
        assert (await store.demand(E1, overdue_before_ms=101)).overdue == 1

    async def test_a_requeued_job_waits_since_its_requeue(self, store, queue) -> None:
        await queue.running("a", at=100)
        await queue.lose("a")
        demand = await store.demand(E1, overdue_before_ms=2_500)
        assert (demand.oldest_ms, demand.overdue) == (2_500, 0)

    async def test_the_oldest_need_not_be_the_next(self, store, queue) -> None:
        """A requeued job is served first, and has waited the least."""
        await queue.submit("a", "b", at=100)
        await queue.take()
        await queue.lose("a")
        assert (await store.demand(E1, overdue_before_ms=0)).oldest_ms == 100

    async def test_low_priority_jobs_are_neither_oldest_nor_overdue(self, store, queue) -> None:
        await queue.submit("a", at=100, low_priority=True)
        assert await store.demand(E1, overdue_before_ms=9_999) == QueueDemand(
            queued_low=1, queued_bytes=INPUT_BYTES
        )

    async def test_requests_of_batches_need_workers_like_others(self, store, queue) -> None:
        await queue.batch("req_1", "req_2", at=100)
        demand = await store.demand(E1, overdue_before_ms=9_999)
        assert (demand.queued, demand.queued_low, demand.oldest_ms, demand.overdue) == (2, 0, 100, 2)

    async def test_jobs_past_their_time_count_until_an_event_ends_them(self, store, queue) -> None:
        await queue.submit("a", at=100, expires_ms=200)
        assert await queue.take(now_ms=300) == []
        assert (await store.demand(E1, overdue_before_ms=0)).queued == 1
        await store.apply("a", TtlReached(now_ms=300))
        assert await store.demand(E1, overdue_before_ms=0) == QueueDemand()


class TestTotals:
    async def test_they_survive_pruning(self, store, queue) -> None:
        await queue.running("a", "b")
        await queue.lose("a")
        await queue.take()
        await queue.finish("a")
        await queue.fail("b")
        assert await store.prune_jobs(now_ms=10**12) == 2
        assert await store.counts(E1) == JobCounts(completed=1, failed=1, retried=1)

    async def test_a_retry_by_the_client_counts_as_one(self, store, queue) -> None:
        """serverless-api.md §2.15; the failure it began with stays counted."""
        await queue.running("a")
        await queue.fail("a")
        await store.apply("a", Retried(now_ms=4_000, expires_ms=10**9))
        assert await store.counts(E1) == JobCounts(queued=1, failed=1, retried=1)
        await queue.take(now_ms=5_000)
        await queue.finish("a", now_ms=6_000)
        assert await store.counts(E1) == JobCounts(completed=1, failed=1, retried=1)

    async def test_cancellations_are_nobodys_failure(self, store, queue) -> None:
        await queue.submit("a")
        await store.apply("a", Cancelled(now_ms=2_000))
        assert await store.counts(E1) == JobCounts()


class TestConcurrency:
    async def test_hundreds_of_everything_at_once(self, store, queue, new_job) -> None:
        """1. 400 submissions and 8 workers at the same time, each taking, finishing, failing, losing, and clients
        that cancel and retry. 2. Afterwards counters, demand and lists say the same, and every job is somewhere."""
        total = 400
        submitted: set[str] = set()

        async def submit(number: int) -> None:
            await asyncio.sleep(0)
            job = await store.submit(
                new_job(f"j{number}", number, low_priority=number % 5 == 0, retries_max=number % 3)
            )
            submitted.add(job.id)

        async def work(number: int) -> None:
            choice = random.Random(number)
            idle = 0
            while idle < 20:
                taken = await queue.take(f"w{number}", count=choice.randint(1, 8))
                idle = 0 if taken else idle + 1
                for job_id in taken:
                    act = choice.choice([queue.finish, queue.finish, queue.fail, queue.lose])
                    await act(job_id, f"w{number}")
                await asyncio.sleep(0)

        async def disturb(seed: int) -> None:
            choice = random.Random(seed)
            for _ in range(60):
                if submitted:
                    job_id = choice.choice(sorted(submitted))
                    event = choice.choice([Cancelled(now_ms=4_000), Retried(now_ms=4_000, expires_ms=10**9)])
                    await store.apply(job_id, event)
                await store.counts(E1)
                await asyncio.sleep(0)

        await asyncio.gather(
            *(submit(number) for number in range(total)),
            *(work(number) for number in range(8)),
            *(disturb(seed) for seed in range(4)),
        )
        jobs = await store.jobs(E1, limit=10_000)
        assert {job.id for job in jobs} == {f"j{number}" for number in range(total)}
        states = [job.status for job in jobs]
        counts = await store.counts(E1)
        demand = await store.demand(E1, overdue_before_ms=0)
        waiting = [job for job in jobs if job.status is JobStatus.IN_QUEUE]
        low = sum(job.low_priority for job in waiting)
        assert (counts.queued, counts.in_progress) == (len(waiting), states.count(JobStatus.IN_PROGRESS))
        assert (demand.queued, demand.queued_low) == (len(waiting) - low, low)
        assert demand.queued_bytes == sum(job.input_bytes for job in waiting)
        # Every retry by a client began with a failure or a timeout that stays counted.
        ended_now = states.count(JobStatus.FAILED)
        asked = sum(
            sum(attempt.reason.startswith("retried after") for attempt in job.attempts) for job in jobs
        )
        lost = sum(sum(attempt.reason == "gone" for attempt in job.attempts) for job in jobs)
        assert counts.completed == states.count(JobStatus.COMPLETED)
        assert counts.failed == ended_now + asked
        assert counts.retried == asked + lost
