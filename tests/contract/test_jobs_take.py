"""`JobStore.take` and `ahead`, on every implementation: order, lanes, one owner per job."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from msgspec.structs import replace

from pilotlight.core.lifecycle import PlatformInterrupted, Retried
from pilotlight.domain.job import JobCounts, JobStatus
from pilotlight.errors import NotFoundError

E1, E2 = "endpoint1", "endpoint2"


class TestTake:
    async def test_first_in_first_out(self, queue) -> None:
        for job_id, at in (("a", 10), ("b", 20), ("b2", 20), ("c", 30)):
            await queue.submit(job_id, at=at)
        assert await queue.take(count=3) == ["a", "b", "b2"]
        assert await queue.take(count=3) == ["c"]
        assert await queue.take(count=3) == []

    async def test_a_clock_that_is_set_back_lets_nobody_pass(self, queue, store) -> None:
        """Submission orders what was never handed out, not the clock: set back, it would starve what waits."""
        for job_id, at in (("a", 1_000_000), ("b", 2_000_000), ("c", 500), ("d", 1_500_000), ("e", 400)):
            await queue.submit(job_id, at=at)
        await queue.batch("req_1", at=300)
        await queue.batch("req_2", id="batch_2", at=200)
        order = ["a", "b", "c", "d", "e", "req_1", "req_2"]
        assert [await store.ahead(job_id) for job_id in order] == [0, 1, 2, 3, 4, 5, 6]
        demand = await store.demand(E1, overdue_before_ms=501)
        assert (demand.oldest_ms, demand.overdue) == (200, 4)
        assert await queue.take(count=2, now_ms=2_000_000) == ["a", "b"]
        await queue.lose("b", now_ms=450)
        assert await store.ahead("c") == 1
        assert await queue.take(count=99, now_ms=600) == ["b", *order[2:]]

    async def test_a_taken_job_is_in_progress(self, store, queue) -> None:
        await queue.submit("a")
        [job] = await store.take(E1, "w1", count=1, now_ms=2_000)
        assert replace(job, input=b"") == await store.job("a")
        assert (job.status, job.worker_id, job.attempt) == (JobStatus.IN_PROGRESS, "w1", 1)
        assert (job.started_ms, job.delay_ms, job.confirmed_ms) == (2_000, 1_000, None)

    async def test_every_attempt_gets_the_input(self, store, queue) -> None:
        await queue.running("a", input=b"[1]")
        await queue.lose("a")
        [again] = await store.take(E1, "w2", count=1, now_ms=2_600)
        assert (again.input, again.attempt, again.worker_id, again.queued_ms) == (b"[1]", 2, "w2", 2_500)
        assert [each.worker_id for each in again.attempts] == ["w1"]

    async def test_a_retry_by_the_client_gets_the_input(self, store, queue) -> None:
        """serverless-api.md §2.15: same id and input."""
        await queue.running("a", input=b"[1]")
        await queue.fail("a")
        await store.apply("a", Retried(now_ms=4_000, expires_ms=10**9))
        [again] = await store.take(E1, "w2", count=1, now_ms=5_000)
        assert (again.input, again.expires_ms) == (b"[1]", 10**9)

    async def test_expired_jobs_are_not_handed_out(self, queue) -> None:
        await queue.submit("gone", at=1, expires_ms=100)
        await queue.submit("alive", at=2, expires_ms=101)
        assert await queue.take(count=2, now_ms=100) == ["alive"]
        assert await queue.status("gone") is JobStatus.IN_QUEUE

    async def test_many_expired_jobs_hide_nothing(self, queue) -> None:
        await asyncio.gather(*(queue.submit(f"gone{n}", at=1, expires_ms=100) for n in range(300)))
        await queue.submit("alive", at=2)
        assert await queue.take(count=2, now_ms=100) == ["alive"]

    async def test_only_jobs_of_the_endpoint(self, queue) -> None:
        await queue.submit("a", endpoint_id=E2)
        assert await queue.take(count=5) == []
        assert await queue.take("w9", count=5, endpoint=E2) == ["a"]

    @pytest.mark.parametrize("count", [0, -1])
    async def test_nothing_asked_nothing_taken(self, queue, count: int) -> None:
        await queue.submit("a")
        assert await queue.take(count=count) == []

    async def test_more_asked_than_there_is(self, queue) -> None:
        await queue.submit("a", "b")
        assert await queue.take(count=1_000_000) == ["a", "b"]

    async def test_every_job_is_handed_out_once_to_32_takers(self, store, queue, new_job) -> None:
        """1. 300 jobs. 2. 32 workers take one to three at a time until none is left. 3. No id twice."""
        await asyncio.gather(*(store.submit(new_job(f"j{number}", number)) for number in range(300)))

        async def work(number: int) -> list[str]:
            mine: list[str] = []
            while taken := await queue.take(f"w{number}", count=1 + number % 3):
                mine += taken
            return mine

        taken = await asyncio.gather(*(work(number) for number in range(32)))
        everything = [job_id for mine in taken for job_id in mine]
        assert len(everything) == len(set(everything)) == 300
        assert (await store.counts(E1)).in_progress == 300
        for number, mine in enumerate(taken):
            running = await store.running(worker_id=f"w{number}")
            assert sorted(job.id for job in running) == sorted(mine)


class TestLanes:
    """serverless-api.md §12 item 34 and §2.16; `domain.job.Lane`."""

    async def test_normal_then_batch_then_low_priority(self, queue) -> None:
        await queue.submit("low", at=1, low_priority=True)
        await queue.batch("req_1", "req_2", at=2)
        await queue.submit("normal", at=3)
        assert await queue.take(count=9) == ["normal", "req_1", "req_2", "low"]

    async def test_a_low_priority_batch_is_low_priority(self, queue) -> None:
        await queue.batch("req_1", at=1, low_priority=True)
        await queue.batch("req_2", at=2, id="batch_2")
        assert await queue.take(count=9) == ["req_2", "req_1"]

    async def test_one_take_reaches_over_lanes(self, queue) -> None:
        await queue.submit("low", at=1, low_priority=True)
        await queue.submit("normal", at=2)
        assert await queue.take(count=2) == ["normal", "low"]

    async def test_a_requeued_job_goes_first_in_its_lane(self, store, queue) -> None:
        """Ahead of older jobs, but never ahead of a better class."""
        await queue.submit("low1", at=1, low_priority=True)
        assert await queue.take() == ["low1"]
        await queue.lose("low1", now_ms=50)
        await queue.submit("n1", "n2", "n3", at=10)
        await queue.submit("low2", at=2, low_priority=True)
        assert await queue.take(count=2) == ["n1", "n2"]
        await queue.lose("n2", now_ms=60)
        await store.apply("n1", PlatformInterrupted(now_ms=61))
        assert await queue.take(count=9) == ["n2", "n1", "n3", "low1", "low2"]

    async def test_a_requeued_request_of_a_batch_waits_for_single_jobs(self, queue) -> None:
        await queue.batch("req_1", "req_2", "req_3", at=1)
        assert await queue.take(count=2) == ["req_1", "req_2"]
        await queue.lose("req_2")
        await queue.submit("single", at=9)
        assert await queue.take(count=9) == ["single", "req_2", "req_3"]

    async def test_a_job_retried_by_the_client_goes_first(self, store, queue) -> None:
        await queue.running("a")
        await queue.fail("a")
        await queue.submit("b", at=10)
        await store.apply("a", Retried(now_ms=4_000, expires_ms=10**9))
        assert await queue.take(count=2, now_ms=5_000) == ["a", "b"]


class TestAhead:
    async def test_how_many_are_served_before(self, queue, store) -> None:
        await queue.submit("low", at=1, low_priority=True)
        await queue.batch("req_1", "req_2", at=1)
        await queue.submit("a", "b", "c", at=5)
        await queue.submit("other", endpoint_id=E2, at=1)
        order = ["a", "b", "c", "req_1", "req_2", "low"]
        assert [await store.ahead(job_id) for job_id in order] == [0, 1, 2, 3, 4, 5]
        assert await store.ahead("other") == 0
        assert await queue.take(count=9) == order

    async def test_a_requeued_job_is_ahead(self, queue, store) -> None:
        await queue.submit("a", "b", at=5)
        assert await queue.take() == ["a"]
        assert await store.ahead("b") == 0
        await queue.lose("a")
        assert (await store.ahead("a"), await store.ahead("b")) == (0, 1)

    async def test_nobody_is_ahead_of_what_is_not_queued(self, queue, store) -> None:
        await queue.submit("a", "b", at=5)
        await queue.take(count=2)
        await queue.finish("b")
        assert (await store.ahead("a"), await store.ahead("b")) == (0, 0)
        with pytest.raises(NotFoundError):
            await store.ahead("nobody")

    async def test_purged_ones_are_not_ahead(self, queue, store) -> None:
        await asyncio.gather(*(queue.submit(f"j{n}") for n in range(50)))
        await store.purge(E1, now_ms=2_000)
        await queue.submit("a", at=2_000)
        assert await store.ahead("a") == 0


class TestCancelledTake:
    async def test_nothing_is_handed_out_to_somebody_who_hung_up(self, queue, store) -> None:
        """Takes are cancelled after ever more turns of the loop; what they had picked is queued again, retry
        untouched, and is found by the next take."""
        await queue.submit(*(f"j{number}" for number in range(30)))
        received: list[str] = []
        for turns in range(60):
            task = asyncio.create_task(store.take(E1, f"w{turns}", count=2, now_ms=2_000))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                received += [job.id for job in await task]
        # The end of a cancelled take may come a little after its caller has gone.
        deadline = asyncio.get_running_loop().time() + 20
        while (await store.counts(E1)).in_progress != len(received):
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)
        assert len(received) == len(set(received))
        rest = await queue.take("last", count=99)
        assert sorted(received + rest) == sorted(f"j{number}" for number in range(30))
        for job_id in rest:
            job = await store.job(job_id)
            assert (job.retries, job.worker_id) == (0, "last")
        assert await store.counts(E1) == JobCounts(in_progress=30)

    async def test_a_cancelled_submission_happened_or_not(self, queue, store, new_job) -> None:
        """A call whose caller is cancelled has happened completely or not at all."""
        for turns in range(40):
            task = asyncio.create_task(store.submit(new_job(f"j{turns}")))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await store.submit(new_job("last"))
        listed = {job.id for job in await store.jobs(E1, limit=1_000)}
        assert (await store.counts(E1)).queued == len(listed)
        assert set(await queue.take(count=99)) == listed
