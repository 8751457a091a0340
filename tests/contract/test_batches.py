"""`BatchStore` (serverless-api.md §2.16), on every implementation: drafts, jobs, counters, cancellation."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.core.lifecycle import Cancelled, PlatformInterrupted, Retried, TtlReached
from pilotlight.domain.batch import Batch, BatchDraft, BatchStatus
from pilotlight.domain.job import Job, JobCounts, JobStatus
from pilotlight.errors import ConflictError, NotFoundError

E1, E2 = "endpoint1", "endpoint2"


def batch(id: str = "batch_1", at: int = 1_000, **changes: object) -> Batch:
    return Batch(**{"id": id, "endpoint_id": E1, "created_ms": at, **changes})


def drafts(*ids: str) -> list[BatchDraft]:
    return [BatchDraft(id=each, input=b'{"n": "%s"}' % each.encode()) for each in ids]


def counters(stored: Batch) -> tuple[int, ...]:
    return (
        stored.total,
        stored.queued,
        stored.in_progress,
        stored.completed,
        stored.failed,
        stored.cancelled,
    )


async def page(store, offset: int = 0, limit: int = 50, id: str = "batch_1") -> list[Job | BatchDraft]:
    return list(await store.batch_requests(id, offset=offset, limit=limit))


class TestDrafts:
    async def test_a_draft_reads_back(self, store) -> None:
        await store.add_batch(batch(key_id="k", name='Émile\'s "batch"'), drafts("req_b", "req_a"))
        stored = await store.batch("batch_1")
        assert (stored.key_id, stored.name, stored.created_ms) == ("k", 'Émile\'s "batch"', 1_000)
        assert stored.status is BatchStatus.DRAFT
        assert counters(stored) == (2, 0, 0, 0, 0, 0)
        assert await page(store) == drafts("req_b", "req_a")

    async def test_its_requests_do_not_run(self, store, queue) -> None:
        await store.add_batch(batch(), drafts("req_a"))
        assert await queue.take() == []
        assert await store.counts(E1) == JobCounts()
        with pytest.raises(NotFoundError):
            await store.job("req_a")

    async def test_an_empty_one(self, store, queue) -> None:
        await store.add_batch(batch(), [])
        assert await page(store) == []
        assert counters(await store.batch("batch_1")) == (0,) * 6

    async def test_ids_are_used_once(self, store) -> None:
        await store.add_batch(batch(), drafts("req_a"))
        with pytest.raises(ConflictError):
            await store.add_batch(batch(), drafts("req_b"))
        with pytest.raises(ConflictError):
            await store.add_batch(batch("batch_2"), drafts("req_c", "req_a"))
        with pytest.raises(NotFoundError):
            await store.batch("batch_2")
        with pytest.raises(ConflictError):
            await store.add_batch_requests("batch_1", drafts("req_d", "req_a"))
        assert await page(store) == drafts("req_a")

    async def test_requests_are_appended_in_their_order(self, store) -> None:
        await store.add_batch(batch(), drafts("req_c"))
        assert (await store.add_batch_requests("batch_1", drafts("req_b", "req_a"))).total == 3
        assert await page(store) == drafts("req_c", "req_b", "req_a")
        assert await page(store, offset=1, limit=1) == drafts("req_b")
        assert await page(store, offset=3) == []
        assert await page(store, limit=0) == []

    async def test_appended_from_many_sides_none_is_lost(self, store) -> None:
        await store.add_batch(batch(), [])
        await asyncio.gather(
            *(
                store.add_batch_requests("batch_1", drafts(f"req_{n}_1", f"req_{n}_2", f"req_{n}_3"))
                for n in range(40)
            )
        )
        stored = [each.id for each in await page(store, limit=1_000)]
        assert len(stored) == len(set(stored)) == (await store.batch("batch_1")).total == 120
        for first in range(0, 120, 3):
            assert [each[-1] for each in stored[first : first + 3]] == ["1", "2", "3"]

    async def test_a_request_is_taken_out(self, store) -> None:
        await store.add_batch(batch(), drafts("req_a", "req_b", "req_c"))
        await store.add_batch(batch("batch_2"), drafts("req_x"))
        assert (await store.remove_batch_request("batch_1", "req_b")).total == 2
        assert await page(store) == drafts("req_a", "req_c")
        for unknown in ("req_b", "req_x", "nobody"):
            with pytest.raises(NotFoundError):
                await store.remove_batch_request("batch_1", unknown)
        assert (await store.batch("batch_1")).total == 2

    async def test_it_is_renamed(self, store) -> None:
        await store.add_batch(batch(name="old"), [])
        assert (await store.rename_batch("batch_1", "new 名")).name == "new 名"
        assert (await store.batch("batch_1")).name == "new 名"
        assert "after" in (await store.rename_batch("batch_1", "before \x00 after")).name

    async def test_unknown_ones(self, store, new_job) -> None:
        for call in (
            store.batch("nobody"),
            store.add_batch_requests("nobody", []),
            store.remove_batch_request("nobody", "req_a"),
            store.rename_batch("nobody", "x"),
            store.finalize_batch("nobody", new_job("", batch_id="nobody")),
            store.cancel_batch("nobody", now_ms=1),
            store.batch_requests("nobody", offset=0, limit=1),
        ):
            with pytest.raises(NotFoundError):
                await call

    async def test_they_are_listed_newest_first(self, store) -> None:
        for number in (2, 1, 3):
            await store.add_batch(batch(f"batch_{number}", number), [])
        await store.add_batch(batch("other", endpoint_id=E2), [])
        assert [each.id for each in await store.batches(E1)] == ["batch_3", "batch_2", "batch_1"]
        assert [each.id for each in await store.batches(E1, limit=2)] == ["batch_3", "batch_2"]
        assert list(await store.batches("unknown")) == []


class TestFinalized:
    async def test_its_requests_become_jobs_in_their_order(self, store, queue, new_job) -> None:
        await store.add_batch(batch(), drafts("req_c", "req_b", "req_a"))
        template = new_job(
            "", 5_000, batch_id="batch_1", key_id="k", execution_timeout_ms=77, retention_ms=88, retries_max=3
        )
        stored = await store.finalize_batch("batch_1", template)
        assert (stored.status, stored.finalized_ms) == (BatchStatus.FINALIZED, 5_000)
        assert counters(stored) == (3, 3, 0, 0, 0, 0)
        assert await store.batch("batch_1") == stored
        jobs = await store.take(E1, "w1", count=9, now_ms=6_000)
        assert [(job.id, job.input) for job in jobs] == [
            (each.id, each.input) for each in drafts("req_c", "req_b", "req_a")
        ]
        for job in jobs:
            assert (job.batch_id, job.key_id, job.endpoint_id) == ("batch_1", "k", E1)
            assert (job.execution_timeout_ms, job.retention_ms, job.retries_max) == (77, 88, 3)
            assert (job.created_ms, job.queued_ms, job.expires_ms) == (5_000, 5_000, template.expires_ms)
            assert job.input_bytes == len(job.input)

    async def test_only_a_draft_changes(self, store, queue, new_job) -> None:
        """serverless-api.md §2.16: modifying anything else is a conflict."""
        await queue.batch("req_a")
        template = new_job("", batch_id="batch_1")
        for call in (
            store.add_batch_requests("batch_1", drafts("req_b")),
            store.remove_batch_request("batch_1", "req_a"),
            store.rename_batch("batch_1", "x"),
            store.finalize_batch("batch_1", template),
        ):
            with pytest.raises(ConflictError):
                await call
        assert await queue.take(count=9) == ["req_a"]

    async def test_all_or_none_when_an_id_is_taken(self, store, queue, new_job) -> None:
        await store.add_batch(batch(), drafts("req_a", "req_b"))
        await queue.submit("req_b")
        with pytest.raises(ConflictError):
            await store.finalize_batch("batch_1", new_job("", batch_id="batch_1"))
        assert (await store.batch("batch_1")).status is BatchStatus.DRAFT
        assert await store.counts(E1) == JobCounts(queued=1)
        assert await page(store) == drafts("req_a", "req_b")

    async def test_finalized_twice_at_the_same_time_once(self, store, queue, new_job) -> None:
        await store.add_batch(batch(), drafts(*(f"req_{n}" for n in range(20))))
        template = new_job("", batch_id="batch_1")
        results = await asyncio.gather(
            *(store.finalize_batch("batch_1", template) for _ in range(5)), return_exceptions=True
        )
        assert sum(isinstance(each, ConflictError) for each in results) == 4
        assert len(await queue.take(count=99)) == 20

    async def test_five_thousand(self, store, queue) -> None:
        stored = await queue.batch(*(f"req_{n:04d}" for n in range(5_000)))
        assert counters(stored) == (5_000, 5_000, 0, 0, 0, 0)
        assert await queue.take(count=3) == ["req_0000", "req_0001", "req_0002"]
        assert [each.id for each in await page(store, offset=4_998)] == ["req_4998", "req_4999"]
        assert (await store.counts(E1)).queued == 4_997

    async def test_counters_follow_every_event(self, store, queue) -> None:
        ids = [f"req_{number}" for number in range(8)]
        await queue.batch(*ids)
        assert await queue.take(count=6) == ids[:6]
        assert counters(await store.batch("batch_1")) == (8, 2, 6, 0, 0, 0)
        await queue.finish("req_0")
        await queue.fail("req_1")
        await queue.lose("req_2")
        await store.apply("req_3", TtlReached(now_ms=3_000))
        await store.apply("req_4", Cancelled(now_ms=3_000))
        await store.apply("req_7", Cancelled(now_ms=3_000))
        stored = await store.batch("batch_1")
        assert counters(stored) == (8, 2, 1, 1, 2, 2)
        assert (stored.status, stored.active) == (BatchStatus.FINALIZED, True)
        await store.apply("req_1", Retried(now_ms=4_000, expires_ms=10**9))
        assert counters(await store.batch("batch_1")) == (8, 3, 1, 1, 1, 2)
        await queue.take(count=9, now_ms=5_000)
        await asyncio.gather(*(queue.finish(each) for each in ("req_1", "req_2", "req_5", "req_6")))
        stored = await store.batch("batch_1")
        assert counters(stored) == (8, 0, 0, 5, 1, 2)
        assert (stored.status, stored.active) == (BatchStatus.FINALIZED, False)

    async def test_its_requests_are_listed_with_outputs(self, store, queue) -> None:
        await queue.batch("req_a", "req_b", "req_c")
        await queue.take(count=2)
        await queue.finish("req_a", output=b'{"embedding":[0.12]}')
        await queue.fail("req_b")
        first, second, third = await page(store)
        assert (first.id, first.status, first.output, first.input) == (
            "req_a",
            JobStatus.COMPLETED,
            b'{"embedding":[0.12]}',
            b"",
        )
        assert (second.id, second.error, second.started_ms, second.finished_ms) == (
            "req_b",
            "no",
            2_000,
            3_000,
        )
        assert (third.id, third.status) == ("req_c", JobStatus.IN_QUEUE)

    async def test_counters_outlive_pruned_jobs(self, store, queue) -> None:
        await queue.batch("req_a", "req_b")
        await queue.take()
        await queue.finish("req_a")
        assert await store.prune_jobs(now_ms=10**12) == 1
        assert counters(await store.batch("batch_1")) == (2, 1, 0, 1, 0, 0)
        assert [each.id for each in await page(store)] == ["req_b"]

    async def test_a_purge_leaves_nothing_of_it_to_be_done(self, store, queue) -> None:
        await queue.batch("req_a", "req_b", "req_c")
        await queue.take()
        assert await store.purge(E1, now_ms=3_000) == 2
        stored = await store.batch("batch_1")
        assert (stored.queued, stored.in_progress, stored.cancelled) == (0, 1, 2)
        await queue.finish("req_a")
        assert not (await store.batch("batch_1")).active
        await store.delete_purged(now_ms=4_000)
        assert counters(await store.batch("batch_1")) == (3, 0, 0, 1, 0, 2)
        assert [each.id for each in await page(store)] == ["req_a"]


class TestCancelled:
    async def test_queued_requests_end_at_once_running_ones_finish(self, store, queue) -> None:
        await queue.batch("req_a", "req_b", "req_c", "req_d")
        await queue.take(count=2)
        stored, applied = await store.cancel_batch("batch_1", now_ms=3_000)
        assert sorted(each.after.id for each in applied) == ["req_c", "req_d"]
        assert {each.after.status for each in applied} == {JobStatus.CANCELLED}
        assert (stored.status, stored.cancel_ms) == (BatchStatus.FINALIZED, 3_000)
        assert counters(stored) == (4, 0, 2, 0, 0, 2)
        assert await queue.take(count=9) == []
        await queue.finish("req_a")
        assert (await store.batch("batch_1")).status is BatchStatus.FINALIZED
        await queue.fail("req_b")
        stored = await store.batch("batch_1")
        assert (stored.status, counters(stored)) == (BatchStatus.CANCELLED, (4, 0, 0, 1, 1, 2))

    async def test_what_would_go_back_to_the_queue_is_cancelled(self, store, queue) -> None:
        """`JobStore.apply`: a request of a cancelled batch is not queued again."""
        ids = ["req_lost", "req_interrupted", "req_retryable"]
        await queue.batch(*ids, webhook="https://example.com/")
        await queue.take(count=3)
        await store.cancel_batch("batch_1", now_ms=2_200)
        lost = await queue.lose("req_lost")
        interrupted = await store.apply("req_interrupted", PlatformInterrupted(now_ms=2_600))
        retryable = await queue.finish("req_retryable", error="died", retryable=True)
        for job_id, applied in zip(ids, (lost, interrupted, retryable), strict=True):
            assert (applied.after.status, applied.finished) == (JobStatus.CANCELLED, True)
            assert applied.freed_worker_id == "w1"
            assert await store.job(job_id) == applied.after
        stored = await store.batch("batch_1")
        assert (stored.status, counters(stored)) == (BatchStatus.CANCELLED, (3, 0, 0, 0, 0, 3))
        assert await store.counts(E1) == JobCounts()
        assert sorted(each.job_id for each in await queue.webhooks()) == sorted(ids)

    async def test_a_draft_and_an_ended_one(self, store, queue, new_job) -> None:
        await store.add_batch(batch(), drafts("req_a"))
        stored, applied = await store.cancel_batch("batch_1", now_ms=3_000)
        assert (stored.status, list(applied)) == (BatchStatus.CANCELLED, [])
        assert not stored.active
        with pytest.raises(ConflictError):
            await store.finalize_batch("batch_1", new_job("", batch_id="batch_1"))
        with pytest.raises(ConflictError):
            await store.add_batch_requests("batch_1", drafts("req_z"))
        await queue.batch("req_b", id="batch_2")
        await queue.take()
        await queue.finish("req_b")
        stored, applied = await store.cancel_batch("batch_2", now_ms=4_000)
        assert (stored.status, stored.cancel_ms, list(applied)) == (BatchStatus.FINALIZED, None, [])
        assert (await store.job("req_b")).status is JobStatus.COMPLETED

    async def test_twice(self, store, queue) -> None:
        await queue.batch("req_a")
        first, _ = await store.cancel_batch("batch_1", now_ms=3_000)
        second, applied = await store.cancel_batch("batch_1", now_ms=9_000)
        assert (second, list(applied)) == (first, [])

    async def test_against_takes(self, store, queue) -> None:
        """Each request is either handed out or cancelled."""
        ids = [f"req_{number}" for number in range(100)]
        await queue.batch(*ids)
        (_, applied), *takes = await asyncio.gather(
            store.cancel_batch("batch_1", now_ms=3_000), *(queue.take(f"w{n}", count=4) for n in range(15))
        )
        taken = [job_id for each in takes for job_id in each]
        assert sorted(taken + [each.after.id for each in applied]) == sorted(ids)
        stored = await store.batch("batch_1")
        assert (stored.in_progress, stored.cancelled) == (len(taken), len(applied))

    async def test_another_batch_goes_on(self, store, queue) -> None:
        await queue.batch("req_a")
        await queue.batch("req_b", id="batch_2")
        await store.cancel_batch("batch_1", now_ms=3_000)
        assert await queue.take(count=9) == ["req_b"]
        assert (await queue.lose("req_b")).requeued


class TestPrune:
    async def test_ended_ones_without_jobs_are_forgotten(self, store, queue) -> None:
        await queue.batch("req_done", id="batch_done", at=1)
        await queue.batch("req_running", id="batch_running", at=2)
        await store.add_batch(batch("batch_draft", 3), drafts("req_draft"))
        await store.add_batch(batch("batch_cancelled", 4), drafts("req_never"))
        await store.cancel_batch("batch_cancelled", now_ms=10)
        assert await queue.take(count=2) == ["req_done", "req_running"]
        await queue.finish("req_done")
        assert await store.prune_batches(ended_before_ms=1) == 0
        await store.prune_batches(ended_before_ms=10**12)
        assert await store.batch("batch_done")  # Its job can still be read.
        await store.prune_jobs(now_ms=10**12)
        await store.prune_batches(ended_before_ms=10**12)
        with pytest.raises(NotFoundError):
            await store.batch("batch_done")
        with pytest.raises(NotFoundError):
            await store.batch("batch_cancelled")
        assert sorted(each.id for each in await store.batches(E1)) == ["batch_draft", "batch_running"]
        assert await page(store, id="batch_draft") == drafts("req_draft")

    async def test_how_many_and_at_most_so_many(self, store) -> None:
        for number in range(5):
            await store.add_batch(batch(f"batch_{number}", number), [])
            await store.cancel_batch(f"batch_{number}", now_ms=10)
        assert await store.prune_batches(ended_before_ms=3, limit=2) == 2
        assert await store.prune_batches(ended_before_ms=3, limit=2) == 1
        assert await store.prune_batches(ended_before_ms=3) == 0
        assert len(await store.batches(E1)) == 2

    async def test_drafts_of_deleted_endpoints_are_forgotten(self, store, queue, new_endpoint) -> None:
        """Nobody can finalize or read them any more; a draft of a living endpoint waits for ever."""
        for endpoint in ("endpoint1", "endpoint2"):
            await store.add_endpoint(new_endpoint(endpoint))
            drafts = [BatchDraft(id=f"{endpoint}_{n}", input=b"{}") for n in range(3)]
            await store.add_batch(Batch(id=f"of_{endpoint}", endpoint_id=endpoint, created_ms=1), drafts)
            await store.add_batch(Batch(id=f"empty_{endpoint}", endpoint_id=endpoint, created_ms=1), [])
        await queue.batch("req_1", id="queued", at=1)
        await store.delete_endpoint("endpoint1", now_ms=2)
        forgotten = [await store.prune_batches(ended_before_ms=1, limit=2) for _ in range(4)]
        assert sum(forgotten) == 2
        assert [batch.id for batch in await store.batches("endpoint1")] == ["queued"]
        assert {batch.total for batch in await store.batches("endpoint2")} == {3, 0}
        assert len(await store.batch_requests("of_endpoint2", offset=0, limit=9)) == 3
