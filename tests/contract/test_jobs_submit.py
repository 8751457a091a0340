"""`JobStore.submit`, on every implementation: ids, repetitions, announcements, whatever text comes in."""

from __future__ import annotations

import asyncio
import threading

import pytest
from msgspec.structs import replace

from pilotlight.core.lifecycle import Cancelled, PlatformInterrupted, Progressed, Retried
from pilotlight.domain.job import Idempotency, JobCounts, JobStatus, QueueDemand
from pilotlight.errors import ConflictError, NotFoundError

E1, E2 = "endpoint1", "endpoint2"
HOSTILE = 'it\'s "quoted" \\ %s :name $1 ? -- ; DROP TABLE jobs; \x00 \x01 \r\n é 漢 😀 \u202e end'


def same(key: str = "again", fingerprint: bytes = b"1") -> Idempotency:
    return Idempotency(key=key, fingerprint=fingerprint)


class TestSubmit:
    async def test_a_submitted_job_reads_back_as_it_was(self, store, new_job) -> None:
        """But for its input, which only a take returns (`JobStore.job`)."""
        job = new_job(
            "sync-1",
            key_id="key",
            sync=True,
            low_priority=True,
            input=b'{ "raw" :  "\xc3\xa9\\u0000" }',
            retries_max=5,
            webhook="https://example.com/hook?a=1&b='",
            s3_config=bytes(range(256)),
            batch_id=None,
        )
        assert replace(await store.submit(job), input=b"") == replace(job, input=b"")
        assert await store.job("sync-1") == replace(job, input=b"")
        [taken] = await store.take(E1, "w1", count=1, now_ms=2_000)
        assert (taken.input, taken.input_bytes, taken.s3_config) == (job.input, len(job.input), job.s3_config)

    async def test_an_id_is_used_once(self, store, queue, new_job) -> None:
        await queue.submit("a")
        with pytest.raises(ConflictError, match="job a"):
            await store.submit(new_job("a", input=b"other", endpoint_id=E2))
        [taken] = await store.take(E1, "w1", count=2, now_ms=2_000)
        assert taken.input == b'{"prompt": "hi"}'
        assert (await store.counts(E2)) == JobCounts()

    async def test_an_id_is_used_once_under_concurrency(self, store, new_job) -> None:
        results = await asyncio.gather(
            *(store.submit(new_job("a")) for _ in range(20)), return_exceptions=True
        )
        assert sum(isinstance(result, ConflictError) for result in results) == 19
        assert (await store.counts(E1)).queued == 1

    async def test_a_conflict_does_not_concern_those_submitted_at_the_same_time(self, store, new_job) -> None:
        """Commits are grouped; one bad submission must not take its neighbours with it."""
        await store.submit(new_job("taken"))
        ids = [("taken" if number % 10 == 5 else f"j{number}") for number in range(100)]
        results = await asyncio.gather(*(store.submit(new_job(each)) for each in ids), return_exceptions=True)
        assert [isinstance(result, ConflictError) for result in results] == [each == "taken" for each in ids]
        assert (await store.counts(E1)).queued == 91

    async def test_large_inputs_and_outputs_survive_unchanged(self, store, queue) -> None:
        body = bytes(range(256)) * 8_192
        await queue.submit("a", input=body)
        [taken] = await store.take(E1, "w1", count=1, now_ms=1)
        assert taken.input == body
        await queue.finish("a", output=body[::-1])
        assert (await store.job("a")).output == body[::-1]

    async def test_reading_never_returns_the_input(self, store, queue, new_job) -> None:
        """`Job.input` is "" in a job read for anything but running it; its size stays known."""
        await queue.running("a", execution_timeout_ms=1)
        [page] = await store.jobs(E1)
        [run] = await store.running()
        [due] = await store.due(now_ms=10**9)
        applied = await queue.lose("a")
        for job in (page, run, due, applied.before, applied.after, await store.job("a")):
            assert (job.input, job.input_bytes) == (b"", 16)


class TestAnnounce:
    async def test_a_take_called_at_the_announcement_finds_the_job(self, store, new_job) -> None:
        """1. A worker waits for work. 2. The announcement wakes it. 3. Its take gets the job."""
        loop, takes = asyncio.get_running_loop(), []

        def announce() -> None:
            assert threading.current_thread() is threading.main_thread()
            takes.append(loop.create_task(store.take(E1, "w1", count=9, now_ms=2_000)))

        await store.submit(new_job("a"), announce=announce)
        [take] = takes
        [job] = await take
        assert (job.id, job.status, job.input) == ("a", JobStatus.IN_PROGRESS, b'{"prompt": "hi"}')

    async def test_every_announcement_is_worth_one_job(self, store, new_job) -> None:
        """200 submissions at once, each announcement followed by a take of one: all are handed out, once."""
        loop, takes = asyncio.get_running_loop(), []

        def announce() -> None:
            takes.append(loop.create_task(store.take(E1, f"w{len(takes)}", count=1, now_ms=2_000)))

        await asyncio.gather(*(store.submit(new_job(f"j{n}"), announce=announce) for n in range(200)))
        taken = [job.id for jobs in await asyncio.gather(*takes) for job in jobs]
        assert sorted(taken) == sorted(f"j{n}" for n in range(200))
        assert await store.counts(E1) == JobCounts(in_progress=200)

    async def test_it_was_called_when_submit_returns(self, store, new_job) -> None:
        called = []
        await store.submit(new_job("a"), announce=lambda: called.append(1))
        assert called == [1]

    async def test_a_take_returns_only_what_will_outlive_a_crash(self, store, queue, new_job) -> None:
        """A job handed out at its announcement is known to every later read."""
        loop, takes = asyncio.get_running_loop(), []

        def announce() -> None:
            takes.append(loop.create_task(store.take(E1, "w1", count=1, now_ms=2_000)))

        submitting = loop.create_task(store.submit(new_job("a"), announce=announce))
        while not takes:
            await asyncio.sleep(0)
        await takes[0]
        assert (await store.job("a")).worker_id == "w1"
        await submitting


class TestIdempotency:
    async def test_a_repetition_finds_the_job_of_the_first(self, store, new_job) -> None:
        first = await store.submit(new_job("a"), idempotency=same())
        again = await store.submit(new_job("b"), idempotency=same())
        assert again.id == first.id == "a"
        assert (await store.counts(E1)).queued == 1
        with pytest.raises(NotFoundError):
            await store.job("b")

    async def test_it_finds_it_in_whatever_state_it_is(self, store, queue, new_job) -> None:
        await store.submit(new_job("a"), idempotency=same())
        await queue.take()
        assert (await store.submit(new_job("b"), idempotency=same())).status is JobStatus.IN_PROGRESS
        await queue.finish("a")
        again = await store.submit(new_job("c"), idempotency=same())
        assert (again.id, again.status, again.output) == ("a", JobStatus.COMPLETED, b'"done"')
        assert await queue.take() == []

    async def test_something_else_under_the_same_key_is_refused(self, store, new_job) -> None:
        await store.submit(new_job("a"), idempotency=same())
        with pytest.raises(ConflictError):
            await store.submit(new_job("b"), idempotency=same(fingerprint=b"2"))
        assert await store.counts(E1) == JobCounts(queued=1)

    async def test_a_key_belongs_to_an_endpoint_and_an_api_key(self, store, new_job) -> None:
        for job in (
            new_job("a", key_id="k1"),
            new_job("b", key_id="k2"),
            new_job("c", key_id="k1", endpoint_id=E2),
            new_job("d"),
        ):
            assert (await store.submit(job, idempotency=same())).id == job.id
        assert (await store.submit(new_job("e", key_id="k2"), idempotency=same())).id == "b"

    async def test_other_keys_are_other_jobs(self, store, new_job) -> None:
        for number, key in enumerate(("x", "X", "x ", HOSTILE.replace("\x00", ""), "y" * 255)):
            assert (await store.submit(new_job(f"j{number}"), idempotency=same(key))).id == f"j{number}"
            assert (await store.submit(new_job("other"), idempotency=same(key))).id == f"j{number}"

    async def test_repetitions_submitted_at_the_same_time_are_one_job(self, store, new_job) -> None:
        found = await asyncio.gather(
            *(store.submit(new_job(f"j{n}"), idempotency=same(f"key{n % 10}")) for n in range(200))
        )
        assert len({job.id for job in found}) == 10
        assert len({(job.id, n % 10) for n, job in enumerate(found)}) == 10
        assert await store.counts(E1) == JobCounts(queued=10)

    async def test_two_at_a_time_that_share_no_commit_are_one_job(self, store, new_job) -> None:
        """Each of two transactions finds nothing, waits for the other, and must not go by what it saw before."""
        for n in range(40):
            a, b = await asyncio.gather(
                store.submit(new_job(f"a{n}"), idempotency=same(f"key{n}")),
                store.submit(new_job(f"b{n}"), idempotency=same(f"key{n}")),
            )
            assert a.id == b.id
        assert await store.counts(E1) == JobCounts(queued=40)

    async def test_it_is_remembered_as_long_as_the_record_lives(self, store, queue, new_job) -> None:
        await store.submit(new_job("a"), idempotency=same())
        await queue.take()
        await queue.finish("a")
        assert await store.prune_jobs(now_ms=10**12) == 1
        assert (await store.submit(new_job("b"), idempotency=same(fingerprint=b"2"))).id == "b"

    async def test_a_record_past_its_retention_makes_room_before_it_is_pruned(
        self, store, queue, new_job
    ) -> None:
        """serverless-api.md §2.4: a repetition finds the record, and there is none any more."""
        await store.submit(new_job("a", retention_ms=1_000), idempotency=same())
        await queue.take()
        await queue.finish("a", now_ms=3_000)
        assert (await store.submit(new_job("b", 3_999), idempotency=same())).id == "a"
        later = (new_job(job_id, 4_000) for job_id in ("c", "d"))
        stored = await asyncio.gather(
            *(store.submit(job, idempotency=same(fingerprint=b"2")) for job in later)
        )
        assert [job.id for job in stored] == ["c", "c"]
        assert await store.prune_jobs(now_ms=4_000) == 1
        assert (await store.submit(new_job("e", 4_001), idempotency=same(fingerprint=b"2"))).id == "c"
        assert await store.counts(E1) == JobCounts(queued=1, completed=1)
        assert await store.purge(E1, now_ms=5_000) == 1
        assert (await store.submit(new_job("f", 5_001), idempotency=same())).id == "f"

    async def test_what_a_submission_would_find(self, store, queue, new_job) -> None:
        assert await store.earlier(new_job("b"), same()) is None
        await store.submit(new_job("a", retention_ms=1_000), idempotency=same())
        assert await store.earlier(new_job("b"), same()) == await store.job("a")
        assert await store.earlier(new_job("b"), same("other")) is None
        assert await store.earlier(new_job("b", key_id="k2"), same()) is None
        with pytest.raises(ConflictError, match="again"):
            await store.earlier(new_job("b"), same(fingerprint=b"2"))
        await queue.take()
        await queue.finish("a", now_ms=3_000)
        assert await store.earlier(new_job("b", 4_000), same(fingerprint=b"2")) is None

    async def test_a_purge_ends_the_record(self, store, new_job) -> None:
        """From the return of `purge` on its jobs are unknown to every call."""
        await store.submit(new_job("a"), idempotency=same())
        assert await store.purge(E1, now_ms=2_000) == 1
        assert (await store.submit(new_job("b"), idempotency=same())).id == "b"
        await store.delete_purged(now_ms=3_000)
        assert (await store.submit(new_job("c"), idempotency=same())).id == "b"

    async def test_a_retried_job_keeps_its_key(self, store, queue, new_job) -> None:
        await store.submit(new_job("a"), idempotency=same())
        await queue.take()
        await queue.fail("a")
        assert (await store.apply("a", Retried(now_ms=4_000, expires_ms=10**9))).requeued
        assert (await store.submit(new_job("b"), idempotency=same())).id == "a"


class TestHostileText:
    async def test_texts_of_workers_and_clients_are_kept(self, store, queue, new_job) -> None:
        """PostgreSQL's text knows no NUL; it may be replaced, nothing else may happen to it."""
        allowed = {HOSTILE, HOSTILE.replace("\x00", "\ufffd")}
        url = "https://example.com/" + HOSTILE.replace("\x00", "")
        await queue.running("a", "b", "c", key_id="k'\"", webhook=url)
        failed = await queue.finish("a", error=HOSTILE)
        await queue.finish("b", error=HOSTILE, retryable=True)
        await store.apply("c", PlatformInterrupted(now_ms=3_000, reason=HOSTILE))
        assert failed.after.error in allowed
        assert (await store.job("a")).error in allowed
        assert (await store.job("a")).webhook == url
        for job_id in ("b", "c"):
            [attempt] = (await store.job(job_id)).attempts
            assert attempt.reason in allowed

    async def test_long_texts(self, store, queue) -> None:
        text = "é" * 1_000_000
        await queue.running("a", webhook="https://example.com/" + "x" * 4_000)
        await queue.finish("a", error=text, output=b'"' + b"y" * 1_000_000 + b'"')
        assert (await store.job("a")).error == text
        [webhook] = await queue.webhooks()
        assert text.encode() in webhook.body

    @pytest.mark.parametrize("unknown", [HOSTILE, "", "%", "a\x00", "A", " a", "a" * 5_000])
    async def test_ids_that_nobody_made_are_unknown(self, store, queue, unknown: str) -> None:
        await queue.submit("a")
        for call in (
            store.job(unknown),
            store.apply(unknown, Cancelled(now_ms=1)),
            store.ahead(unknown),
            store.shorten(unknown, now_ms=1, ttl_ms=1),
            store.drain_chunks(unknown, limit_bytes=1),
            queue.chunk(unknown),
        ):
            with pytest.raises(NotFoundError):
                await call
        assert not await store.has_chunks(unknown)
        assert list(await store.apply_many([(unknown, Cancelled(now_ms=1))])) == [None]
        assert await store.counts(unknown) == JobCounts()
        assert await store.demand(unknown, overdue_before_ms=9) == QueueDemand()
        assert list(await store.jobs(unknown)) == []
        assert list(await store.take(unknown, "w1", count=1, now_ms=1)) == []
        assert list(await store.running(worker_id=unknown)) == []
        assert await store.purge(unknown, now_ms=1) == 0
        assert list(await store.cancel_all(unknown, Cancelled(now_ms=1))) == []
        with pytest.raises(NotFoundError):
            await store.batch(unknown)
        with pytest.raises(NotFoundError):
            await store.webhook(unknown)
        assert await queue.status("a") is JobStatus.IN_QUEUE

    async def test_progress_of_any_bytes(self, store, queue) -> None:
        await queue.running("a")
        body = b'"\\u0000 \\ud800 \xf0\x9f\x98\x80"'
        await store.apply("a", Progressed(worker_id="w1", now_ms=2_100, output=body))
        assert (await store.job("a")).output == body
