"""Ends of jobs in numbers, on every implementation: deletion of an endpoint, purge, retention, close."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from pilotlight.core.lifecycle import Cancelled, Retried, TtlReached
from pilotlight.domain.job import JobCounts, JobStatus, QueueDemand
from pilotlight.errors import NotFoundError, StoreError

E1, E2 = "endpoint1", "endpoint2"


class TestCancelAll:
    async def test_every_living_job_of_the_endpoint_in_portions(self, store, queue, new_job) -> None:
        """Oldest first, up to `limit` a call, until it returns nothing."""
        await asyncio.gather(*(store.submit(new_job(f"j{number}", number)) for number in range(1_100)))
        await queue.submit("other", endpoint_id=E2)
        assert await queue.take(count=3) == ["j0", "j1", "j2"]
        await queue.finish("j0")
        portions = []
        while applied := await store.cancel_all(E1, Cancelled(now_ms=4_000), limit=500):
            portions.append(applied)
        assert [len(each) for each in portions] == [500, 500, 99]
        everything = [applied for portion in portions for applied in portion]
        assert [applied.after.id for applied in everything] == [f"j{number}" for number in range(1, 1_100)]
        assert {applied.after.status for applied in everything} == {JobStatus.CANCELLED}
        assert [applied.after.id for applied in everything if applied.freed_worker_id == "w1"] == ["j1", "j2"]
        assert {applied.after.input for applied in everything} == {b""}
        assert await store.counts(E1) == JobCounts(completed=1)
        assert await queue.status("other") is JobStatus.IN_QUEUE

    async def test_submissions_at_the_same_time_are_ended_or_queued(self, store, queue, new_job) -> None:
        await queue.submit(*(f"old{n}" for n in range(20)))
        applied, *_ = await asyncio.gather(
            store.cancel_all(E1, Cancelled(now_ms=4_000)),
            *(store.submit(new_job(f"new{n}")) for n in range(50)),
        )
        ended = {each.after.id for each in applied}
        assert {f"old{n}" for n in range(20)} <= ended
        assert (await store.counts(E1)).queued == 70 - len(ended)

    async def test_other_events_serve_too(self, store, queue) -> None:
        await queue.running("a")
        await queue.submit("b")
        applied = await store.cancel_all(E1, TtlReached(now_ms=4_000))
        assert [each.after.status for each in applied] == [JobStatus.TIMED_OUT] * 2
        assert await store.counts(E1) == JobCounts(failed=2)


class TestPurge:
    """serverless-api.md §2.15, `/purge-queue`."""

    async def test_queued_jobs_are_gone_running_ones_continue(self, store, queue) -> None:
        await queue.running("running")
        await queue.submit("a", "b")
        await queue.submit("low", low_priority=True)
        await queue.submit("other", endpoint_id=E2)
        await queue.batch("req_1", "req_2")
        assert await store.purge(E1, now_ms=5_000) == 5
        assert await store.purge(E1, now_ms=5_000) == 0
        assert await store.counts(E1) == JobCounts(in_progress=1)
        assert await queue.take(count=9) == []
        assert (await queue.finish("running")).changed
        assert await queue.take(endpoint=E2) == ["other"]

    async def test_purged_jobs_are_unknown_to_every_call(self, store, queue) -> None:
        """Before and after `delete_purged`."""
        await queue.submit("a", expires_ms=4_000, webhook="https://example.com/")
        await store.purge(E1, now_ms=5_000)
        for _ in range(2):
            for call in (
                store.job("a"),
                store.apply("a", Cancelled(now_ms=6_000)),
                store.ahead("a"),
                store.shorten("a", now_ms=6_000, ttl_ms=1),
                store.drain_chunks("a", limit_bytes=1),
                queue.chunk("a"),
            ):
                with pytest.raises(NotFoundError):
                    await call
            assert not await store.has_chunks("a")
            assert list(await store.apply_many([("a", Cancelled(now_ms=6_000))])) == [None]
            assert list(await store.jobs(E1)) == []
            assert list(await store.jobs(E1, status=JobStatus.IN_QUEUE)) == []
            assert list(await store.due(now_ms=10**12)) == []
            assert list(await store.cancel_all(E1, Cancelled(now_ms=6_000))) == []
            assert await store.prune_jobs(now_ms=10**12) == 0
            assert await store.demand(E1, overdue_before_ms=10**12) == QueueDemand()
            assert await store.counts(E1) == JobCounts()
            await store.delete_purged(now_ms=6_000)

    async def test_delete_purged_in_portions(self, store, queue, new_job) -> None:
        await asyncio.gather(*(store.submit(new_job(f"j{number}")) for number in range(250)))
        assert await store.delete_purged(now_ms=4_000) == 0
        assert await store.purge(E1, now_ms=5_000) == 250
        deleted = []
        while count := await store.delete_purged(now_ms=6_000, limit=100):
            deleted.append(count)
        assert deleted == [100, 100, 50]
        assert await store.counts(E1) == JobCounts()
        assert list(await queue.webhooks()) == []

    @pytest.mark.parametrize("at", [1, 5_000, 9_000])
    async def test_jobs_submitted_later_are_not_concerned(self, store, queue, at: int) -> None:
        """Whatever their clock says: a submission may have read it before the purge did."""
        await queue.submit("a", at=2_000)
        assert await store.purge(E1, now_ms=5_000) == 1
        await queue.submit("b", at=at)
        assert await queue.status("b") is JobStatus.IN_QUEUE
        await store.delete_purged(now_ms=5_000)
        assert await store.counts(E1) == JobCounts(queued=1)
        assert await queue.take(count=9, now_ms=9_000) == ["b"]

    @pytest.mark.parametrize("now_ms", [2_500, 5_000])
    async def test_jobs_queued_again_later_are_not_concerned(self, store, queue, now_ms: int) -> None:
        await queue.running("lost", "failed")
        await queue.fail("failed")
        assert await store.purge(E1, now_ms=5_000) == 0
        await queue.lose("lost", now_ms=now_ms)
        await store.apply("failed", Retried(now_ms=5_000, expires_ms=10**9))
        await store.delete_purged(now_ms=5_000)
        assert sorted(await queue.take(count=9, now_ms=6_000)) == ["failed", "lost"]

    async def test_purged_again_and_again(self, store, queue) -> None:
        for number in range(5):
            await queue.submit(f"a{number}", f"b{number}")
            assert await store.purge(E1, now_ms=5_000) == 2
            await queue.submit(f"c{number}")
            assert await queue.take(count=9) == [f"c{number}"]
        await store.delete_purged(now_ms=6_000)
        assert await store.counts(E1) == JobCounts(in_progress=5)

    async def test_requeued_jobs_are_purged_with_their_story(self, store, queue) -> None:
        await queue.running("a")
        await queue.lose("a")
        assert await store.purge(E1, now_ms=5_000) == 1
        with pytest.raises(NotFoundError):
            await store.job("a")
        assert await store.counts(E1) == JobCounts(retried=1)

    async def test_thousands_while_takes_and_submissions_go_on(self, store, queue, new_job) -> None:
        """Each job is either purged or handed out or queued, never two of these, never none."""
        early = [f"early{number}" for number in range(3_000)]
        await asyncio.gather(*(store.submit(new_job(job_id)) for job_id in early))
        taken: list[str] = []
        submitted: list[str] = []

        async def work(number: int) -> None:
            for _ in range(25):
                taken.extend(await queue.take(f"w{number}", count=3))

        async def submit(number: int) -> None:
            for each in range(25):
                job = await store.submit(new_job(f"late{number}-{each}"))
                submitted.append(job.id)

        async def purge() -> int:
            removed = await store.purge(E1, now_ms=2_000)
            while await store.delete_purged(now_ms=2_000, limit=500):
                pass
            return removed

        removed, *_ = await asyncio.gather(
            purge(), *(work(number) for number in range(4)), *(submit(number) for number in range(4))
        )
        assert len(taken) == len(set(taken))
        counts = await store.counts(E1)
        assert counts.in_progress == len(taken)
        assert removed + len(taken) + counts.queued == len(early) + len(submitted)
        rest = await queue.take("last", count=10_000)
        assert len(rest) == counts.queued
        assert not set(rest) & set(taken)
        assert set(rest) | set(taken) == {job.id for job in await store.jobs(E1, limit=10_000)}


class TestRetention:
    async def test_prune_deletes_ended_jobs_past_retention(self, store, queue) -> None:
        """serverless-api.md §2.11."""
        for job_id, retention in (("short", 100), ("long", 1_000), ("living", 1)):
            await queue.running(job_id, retention_ms=retention, expires_ms=2_500)
        await queue.chunk("short")
        await queue.finish("short")
        await queue.finish("long")
        assert await store.prune_jobs(now_ms=3_099) == 0
        assert await store.prune_jobs(now_ms=3_100) == 1
        with pytest.raises(NotFoundError):
            await store.job("short")
        assert not await store.has_chunks("short")
        assert await store.prune_jobs(now_ms=10**12) == 1
        assert await queue.status("living") is JobStatus.IN_PROGRESS

    async def test_prune_deletes_at_most_so_many(self, store, queue) -> None:
        for number in range(5):
            await queue.submit(f"j{number}")
            await store.apply(f"j{number}", Cancelled(now_ms=2_000))
        assert await store.prune_jobs(now_ms=10**12, limit=3) == 3
        assert await store.prune_jobs(now_ms=10**12, limit=3) == 2

    async def test_an_id_is_free_again_after_pruning(self, store, queue) -> None:
        await queue.running("a", endpoint_id=E1)
        await queue.chunk("a", b"old")
        await store.apply("a", Cancelled(now_ms=2_000))
        await store.prune_jobs(now_ms=10**12)
        await queue.running("a")
        await queue.chunk("a", b"new")
        assert await queue.read("a") == [b"new"]

    async def test_shorten_an_ended_job(self, store, queue) -> None:
        """serverless-api.md §2.6: the record may only live shorter."""
        await queue.running("a", retention_ms=10_000)
        await queue.finish("a", now_ms=3_000)
        await store.shorten("a", now_ms=4_000, ttl_ms=2_000)
        assert (await store.job("a")).retention_ms == 3_000
        await store.shorten("a", now_ms=4_000, ttl_ms=60_000)
        assert (await store.job("a")).retention_ms == 3_000
        assert await store.prune_jobs(now_ms=5_999) == 0
        assert await store.prune_jobs(now_ms=6_000) == 1

    async def test_shorten_a_living_job(self, store, queue, new_job) -> None:
        job = new_job("a", expires_ms=50_000)
        await store.submit(job)
        job = replace(job, input=b"")
        await store.shorten("a", now_ms=4_000, ttl_ms=60_000)
        assert await store.job("a") == job
        await store.shorten("a", now_ms=4_000, ttl_ms=2_000)
        assert await store.job("a") == replace(job, expires_ms=6_000)
        assert [each.id for each in await store.due(now_ms=6_000)] == ["a"]
        assert await queue.take(now_ms=6_000) == []

    async def test_shorten_a_running_job(self, store, queue) -> None:
        await queue.running("a")
        await store.shorten("a", now_ms=4_000, ttl_ms=2_000)
        assert list(await store.due(now_ms=5_999)) == []
        assert [each.id for each in await store.due(now_ms=6_000)] == ["a"]


class TestClose:
    async def test_close_is_idempotent_and_final(self, store, queue, new_job) -> None:
        await queue.submit("a")
        await asyncio.gather(store.close(), store.close())
        await store.close()
        with pytest.raises(StoreError, match="closed"):
            await store.submit(new_job("b"))
        with pytest.raises(StoreError, match="closed"):
            await store.job("a")
        with pytest.raises(StoreError, match="closed"):
            await store.take(E1, "w1", count=1, now_ms=1)

    async def test_what_was_accepted_is_finished(self, store, new_job) -> None:
        submissions = [asyncio.create_task(store.submit(new_job(f"j{number}"))) for number in range(50)]
        await asyncio.sleep(0)
        await store.close()
        results = await asyncio.gather(*submissions, return_exceptions=True)
        assert all(not isinstance(each, BaseException) or isinstance(each, StoreError) for each in results)


async def test_one_gateway_leads(store) -> None:
    lost: list[int] = []
    assert await store.lead(lambda: lost.append(1)) is True
    assert lost == []
