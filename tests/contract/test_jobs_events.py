"""`JobStore.apply` and `apply_many`, on every implementation: the table of `core.lifecycle`, kept in a store."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from pilotlight.core.lifecycle import (
    Cancelled,
    Confirmed,
    Effect,
    ExecutionTimedOut,
    PlatformInterrupted,
    Progressed,
    ResultPosted,
    Retried,
    Taken,
    TtlReached,
    WorkerLost,
)
from pilotlight.domain.job import ATTEMPTS_KEPT, WIPED, Attempt, JobCounts, JobStatus
from pilotlight.errors import NotFoundError

E1, E2 = "endpoint1", "endpoint2"


class TestApply:
    async def test_the_answer_tells_before_after_and_effect(self, store, queue) -> None:
        await queue.submit("a")
        [taken] = await store.take(E1, "w1", count=1, now_ms=2_000)
        applied = await queue.finish("a")
        assert applied.before == replace(taken, input=b"")
        assert applied.after == await store.job("a")
        assert (applied.effect, applied.finished, applied.freed_worker_id) == (Effect.CHANGED, True, "w1")
        assert (applied.after.status, applied.after.output) == (JobStatus.COMPLETED, b'"done"')
        assert applied.after.finished_ms == 3_000

    async def test_a_job_at_hand_is_the_job(self, store, queue) -> None:
        """A store may have nothing at hand, but never anything else than what `job` gives."""
        assert store.job_at_hand("a") is None
        await queue.submit("a")
        assert store.job_at_hand("a") in {None, await store.job("a")}
        await store.take(E1, "w1", count=1, now_ms=2_000)
        assert store.job_at_hand("a") in {None, await store.job("a")}
        applied = await queue.finish("a")
        assert store.job_at_hand("a") in {None, applied.after}

    async def test_unknown_jobs(self, store) -> None:
        with pytest.raises(NotFoundError, match="nobody"):
            await store.apply("nobody", Cancelled(now_ms=1))

    async def test_a_second_or_late_result_is_ignored(self, store, queue) -> None:
        await queue.running("a")
        first = await queue.finish("a")
        late = await queue.finish("a", now_ms=4_000, error="late")
        assert late.effect is Effect.IGNORED_TERMINAL
        assert late.after == first.after == await store.job("a")
        assert await store.counts(E1) == JobCounts(completed=1)

    async def test_two_results_at_the_same_time_are_one(self, store, queue) -> None:
        await queue.running("a", webhook="https://example.com/")
        results = await asyncio.gather(*(queue.finish("a", output=b"%d" % n) for n in range(50)))
        [counted] = [each for each in results if each.changed]
        assert {each.effect for each in results if not each.changed} == {Effect.IGNORED_TERMINAL}
        assert (await store.job("a")).output == counted.after.output
        assert await store.counts(E1) == JobCounts(completed=1)
        assert len(await queue.webhooks()) == 1

    async def test_a_result_against_a_cancel(self, store, queue) -> None:
        """serverless-api.md §2.15: whichever comes first counts, and what it answered stays true."""
        ids = [f"j{number}" for number in range(40)]
        await queue.running(*ids)
        calls = [queue.finish(job_id) for job_id in ids]
        calls += [store.apply(job_id, Cancelled(now_ms=3_000)) for job_id in ids]
        answers = await asyncio.gather(*calls)
        for number, job_id in enumerate(ids):
            result, cancel = answers[number], answers[number + len(ids)]
            assert result.changed != cancel.changed
            job = await store.job(job_id)
            assert job.status is (JobStatus.COMPLETED if result.changed else JobStatus.CANCELLED)
            assert (job.output is None) == cancel.changed

    async def test_a_result_of_another_worker_is_ignored(self, queue) -> None:
        await queue.running("a")
        await queue.lose("a")
        assert (await queue.finish("a", "w1")).effect is Effect.IGNORED_STATE
        await queue.take("w2", now_ms=2_600)
        assert (await queue.finish("a", "w1")).effect is Effect.IGNORED_OTHER_ATTEMPT
        assert (await queue.finish("a", "w2")).effect is Effect.CHANGED

    async def test_a_result_of_an_earlier_attempt_of_the_same_worker_is_ignored(self, queue) -> None:
        """worker-protocol.md §1 rule 20: the gateway names the attempt."""
        await queue.running("a")
        await queue.lose("a")
        await queue.take("w1", now_ms=2_600)
        assert (await queue.finish("a", attempt=1)).effect is Effect.IGNORED_OTHER_ATTEMPT
        assert (await queue.finish("a", attempt=2)).effect is Effect.CHANGED

    async def test_a_lost_worker_requeues_once_then_fails(self, store, queue) -> None:
        """serverless-api.md §2.10."""
        await queue.running("a")
        first = await queue.lose("a")
        assert first.requeued
        assert (first.after.retries, first.after.queued_ms) == (1, 2_500)
        await queue.take(now_ms=2_600)
        second = await queue.lose("a", now_ms=2_700)
        assert (second.after.status, second.after.error) == (
            JobStatus.FAILED,
            "job timed out after 1 retries",
        )
        assert await store.counts(E1) == JobCounts(failed=1, retried=1)

    @pytest.mark.parametrize("maximum", [0, 5])
    async def test_as_many_retries_as_the_job_says(self, store, queue, maximum: int) -> None:
        await queue.submit("a", retries_max=maximum)
        for _ in range(maximum):
            await queue.take()
            assert (await queue.lose("a")).requeued
        await queue.take()
        assert (await queue.lose("a")).after.error == f"job timed out after {maximum} retries"
        assert await store.counts(E1) == JobCounts(failed=1, retried=maximum)

    async def test_a_retryable_error_requeues_once_then_fails(self, store, queue) -> None:
        error = ResultPosted(worker_id="w1", now_ms=2_500, error="engine died", retryable=True)
        await queue.running("a")
        assert (await store.apply("a", error)).requeued
        await queue.take(now_ms=2_600)
        assert (await store.apply("a", error)).after.status is JobStatus.FAILED
        assert (await store.job("a")).error == "engine died"

    async def test_an_interruption_by_the_platform_uses_up_no_retry(self, store, queue) -> None:
        await queue.submit("a")
        for number in range(3):
            await queue.take(now_ms=2_000 + number)
            applied = await store.apply("a", PlatformInterrupted(now_ms=2_001 + number))
            assert applied.requeued
            assert applied.after.retries == 0
        assert (await store.job("a")).attempt == 3
        assert await store.counts(E1) == JobCounts(queued=1)

    async def test_cancelling_a_queued_and_a_running_job(self, store, queue) -> None:
        await queue.running("running", at=1)
        await queue.submit("queued", at=2)
        for job_id, worker in (("running", "w1"), ("queued", None)):
            applied = await store.apply(job_id, Cancelled(now_ms=3_000))
            assert applied.after.status is JobStatus.CANCELLED
            assert applied.freed_worker_id == worker
        assert await queue.take() == []
        assert (await queue.finish("running")).effect is Effect.IGNORED_TERMINAL
        assert await store.counts(E1) == JobCounts()

    async def test_progress_and_confirmation(self, store, queue) -> None:
        await queue.running("a")
        await store.apply("a", Confirmed(worker_id="w1", now_ms=2_100))
        assert (await store.job("a")).confirmed_ms == 2_100
        await store.apply("a", Progressed(worker_id="w1", now_ms=2_200, output=b'"42 %"'))
        assert (await store.job("a")).output == b'"42 %"'
        assert (await store.job("a")).confirmed_ms == 2_100

    async def test_timeouts(self, store, queue) -> None:
        await queue.running("slow", at=1)
        await queue.submit("old", at=2)
        slow = await store.apply("slow", ExecutionTimedOut(now_ms=5_000))
        assert (slow.after.status, slow.after.error) == (JobStatus.FAILED, "executionTimeout exceeded")
        old = await store.apply("old", TtlReached(now_ms=5_000))
        assert old.after.status is JobStatus.TIMED_OUT
        assert await store.counts(E1) == JobCounts(failed=2)

    async def test_a_taken_event_hands_out_one_job(self, store, queue) -> None:
        await queue.submit("a", "b")
        applied = await store.apply("b", Taken(worker_id="w1", now_ms=2_000))
        assert applied.after.status is JobStatus.IN_PROGRESS
        assert await queue.take(count=9) == ["a"]


class TestRetry:
    """serverless-api.md §2.15, `/retry`."""

    async def test_back_to_the_queue_with_nothing_left_of_the_end(self, store, queue) -> None:
        await queue.running("a")
        await queue.lose("a")
        await queue.take(now_ms=2_600)
        await queue.finish("a", error="bad", output=b"1")
        applied = await store.apply("a", Retried(now_ms=5_000, expires_ms=99_000))
        assert applied.requeued
        job = await store.job("a")
        assert job == applied.after
        assert (job.status, job.queued_ms, job.expires_ms) == (JobStatus.IN_QUEUE, 5_000, 99_000)
        assert (job.output, job.error, job.finished_ms, job.retries) == (None, None, None, 0)
        assert await store.counts(E1) == JobCounts(queued=1, failed=1, retried=2)

    async def test_it_is_due_by_its_new_time_to_live_and_not_pruned_by_its_old_end(
        self, store, queue
    ) -> None:
        await queue.running("a", retention_ms=10, expires_ms=3_500)
        await queue.fail("a")
        await store.apply("a", Retried(now_ms=3_005, expires_ms=99_000))
        assert await store.prune_jobs(now_ms=50_000) == 0
        assert list(await store.due(now_ms=98_999)) == []
        assert [job.id for job in await store.due(now_ms=99_000)] == ["a"]

    async def test_only_once(self, store, queue) -> None:
        await queue.running("a")
        await queue.fail("a")
        event = Retried(now_ms=5_000, expires_ms=99_000)
        answers = await asyncio.gather(*(store.apply("a", event) for _ in range(10)))
        assert sum(each.changed for each in answers) == 1
        assert await store.counts(E1) == JobCounts(queued=1, failed=1, retried=1)

    @pytest.mark.parametrize("end", ["completed", "cancelled", "queued", "running"])
    async def test_not_from_elsewhere(self, store, queue, end: str) -> None:
        await queue.submit("a")
        if end in {"completed", "running"}:
            await queue.take()
        if end == "completed":
            await queue.finish("a")
        if end == "cancelled":
            await store.apply("a", Cancelled(now_ms=3_000))
        before = await store.job("a")
        assert not (await store.apply("a", Retried(now_ms=5_000, expires_ms=99_000))).changed
        assert await store.job("a") == before

    async def test_a_job_that_timed_out_in_the_queue(self, store, queue) -> None:
        await queue.submit("a")
        await store.apply("a", TtlReached(now_ms=4_000))
        assert (await store.apply("a", Retried(now_ms=5_000, expires_ms=99_000))).requeued
        [attempt] = (await store.job("a")).attempts
        assert (attempt.worker_id, attempt.started_ms, attempt.ended_ms) == (None, None, 4_000)
        assert await queue.take(now_ms=6_000) == ["a"]


class TestSecrets:
    async def test_s3_config_is_wiped_by_every_end_and_kept_by_a_requeue(self, store, queue) -> None:
        ids = ["done", "failed", "cancelled", "late", "slow"]
        await queue.running(*ids, "requeued", s3_config=b"\x00sealed")
        await queue.finish("done")
        await queue.fail("failed")
        await store.apply("cancelled", Cancelled(now_ms=3_000))
        await store.apply("late", TtlReached(now_ms=3_000))
        await store.apply("slow", ExecutionTimedOut(now_ms=3_000))
        await queue.lose("requeued")
        assert [(await store.job(job_id)).s3_config for job_id in ids] == [WIPED] * len(ids)
        [again] = await store.take(E1, "w1", count=1, now_ms=4_000)
        assert again.s3_config == b"\x00sealed"
        refused = await store.apply("failed", Retried(now_ms=5_000, expires_ms=99_000))
        assert refused.effect is Effect.IGNORED_WIPED

    async def test_none_stays_none(self, store, queue) -> None:
        await queue.running("a")
        await queue.finish("a")
        assert (await store.job("a")).s3_config is None


class TestStory:
    async def test_every_ended_attempt_is_told(self, store, queue) -> None:
        await queue.running("a")
        await store.apply("a", Confirmed(worker_id="w1", now_ms=2_100))
        await queue.chunk("a", now_ms=2_200)
        await queue.lose("a")
        await queue.take("w2", now_ms=2_600)
        await store.apply("a", PlatformInterrupted(now_ms=2_700, reason="gateway restarted"))
        first, second = (await store.job("a")).attempts
        assert first == Attempt(
            number=1,
            worker_id="w1",
            queued_ms=1_000,
            started_ms=2_000,
            confirmed_ms=2_100,
            first_output_ms=2_200,
            ended_ms=2_500,
            reason="gone",
        )
        assert (second.number, second.worker_id, second.queued_ms) == (2, "w2", 2_500)
        assert (second.confirmed_ms, second.first_output_ms) == (None, None)

    async def test_it_is_bounded(self, store, queue) -> None:
        await queue.submit("a")
        for number in range(ATTEMPTS_KEPT + 5):
            await queue.take()
            await store.apply("a", PlatformInterrupted(now_ms=3_000 + number))
        story = (await store.job("a")).attempts
        assert [each.number for each in story] == list(range(6, ATTEMPTS_KEPT + 6))
        [listed] = await store.jobs(E1)
        assert listed.attempts == story


class TestApplyMany:
    async def test_in_order_and_none_for_the_unknown(self, store, queue) -> None:
        await queue.running("a", "b", "c")
        answers = await store.apply_many(
            [
                ("b", ResultPosted(worker_id="w1", now_ms=3_000, output=b"1")),
                ("nobody", ResultPosted(worker_id="w1", now_ms=3_000, output=b"1")),
                ("a", WorkerLost(worker_id="w1", now_ms=3_000, reason="gone")),
                ("c", ResultPosted(worker_id="w2", now_ms=3_000, output=b"1")),
            ]
        )
        assert answers[1] is None
        assert [each and (each.after.id, each.effect) for each in answers] == [
            ("b", Effect.CHANGED),
            None,
            ("a", Effect.CHANGED),
            ("c", Effect.IGNORED_OTHER_ATTEMPT),
        ]
        assert await store.counts(E1) == JobCounts(queued=1, in_progress=1, completed=1, retried=1)
        assert answers[0].after == await store.job("b")

    async def test_several_events_of_one_job_see_each_other(self, store, queue) -> None:
        await queue.running("a")
        answers = await store.apply_many(
            [
                ("a", Progressed(worker_id="w1", now_ms=2_100, output=b"50")),
                ("a", ResultPosted(worker_id="w1", now_ms=2_200, output=b"1")),
                ("a", ResultPosted(worker_id="w1", now_ms=2_300, output=b"2")),
                ("a", Cancelled(now_ms=2_400)),
            ]
        )
        assert [each.effect for each in answers] == [
            Effect.CHANGED,
            Effect.CHANGED,
            Effect.IGNORED_TERMINAL,
            Effect.IGNORED_TERMINAL,
        ]
        assert answers[1].before == answers[0].after
        assert (await store.job("a")).output == b"1"
        assert await store.counts(E1) == JobCounts(completed=1)

    async def test_of_several_endpoints(self, store, queue) -> None:
        await queue.submit("a")
        await queue.submit("b", endpoint_id=E2)
        await store.apply_many([("a", Cancelled(now_ms=3_000)), ("b", TtlReached(now_ms=3_000))])
        assert await store.counts(E1) == JobCounts()
        assert await store.counts(E2) == JobCounts(failed=1)

    async def test_none_at_all(self, store) -> None:
        assert list(await store.apply_many([])) == []

    async def test_of_the_same_jobs_in_opposite_orders_at_the_same_time(self, store, queue) -> None:
        """Nothing locks up, and every job ends once."""
        ids = [f"j{number}" for number in range(30)]
        await queue.running(*ids)
        orders = [ids, ids[::-1], ids[15:] + ids[:15], ids[::2] + ids[1::2]]
        answers = await asyncio.gather(
            *(
                store.apply_many(
                    [(each, ResultPosted(worker_id="w1", now_ms=3_000, output=b"1")) for each in order]
                )
                for order in orders * 3
            )
        )
        ended = [each.after.id for answer in answers for each in answer if each.changed]
        assert sorted(ended) == sorted(ids)
        assert await store.counts(E1) == JobCounts(completed=30)
