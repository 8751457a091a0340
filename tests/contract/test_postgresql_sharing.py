"""Two gateways' stores on one PostgreSQL: work passes from one to the other, news arrive, one of them leads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from msgspec.structs import replace

from pilotlight.core.lifecycle import Cancelled, PlatformInterrupted, ResultPosted, WorkerLost
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.job import Idempotency, Job, JobCounts, JobStatus
from pilotlight.domain.key import ApiKey, Scope
from pilotlight.errors import ConflictError, StoreError
from pilotlight.ports.store import ChunkFate, Store
from pilotlight.stores import open_postgresql_store
from pilotlight.stores.postgresql import changes
from pilotlight.stores.postgresql import news as news_module

NewJob = Callable[..., Job]
E1 = "endpoint1"
TIMEOUT_S = 30


class Recorder:
    """A listener that remembers what it was told."""

    def __init__(self) -> None:
        self.jobs: list[str] = []
        self.queues: list[str] = []
        self.configuration = 0
        self.resyncs = 0
        self._told = asyncio.Event()

    def jobs_changed(self, job_ids: Sequence[str]) -> None:
        self.jobs += job_ids
        self._told.set()

    def queues_grew(self, endpoint_ids: Sequence[str]) -> None:
        self.queues += endpoint_ids
        self._told.set()

    def configuration_changed(self) -> None:
        self.configuration += 1
        self._told.set()

    def resync(self) -> None:
        self.resyncs += 1
        self._told.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._told.clear()
                await self._told.wait()


@pytest.fixture
async def pair(postgresql_url: str) -> AsyncIterator[tuple[Store, Store]]:
    first, second = await open_postgresql_store(postgresql_url), await open_postgresql_store(postgresql_url)
    yield first, second
    await first.close()
    await second.close()


async def listening(store: Store) -> Recorder:
    """A listener whose connection listens already, as its first resync tells."""
    recorder = Recorder()
    store.listen(recorder)
    await recorder.until(lambda: recorder.resyncs > 0)
    return recorder


async def test_a_job_goes_through_both(pair: tuple[Store, Store], new_job: NewJob) -> None:
    """Submitted to one, taken through the other, streamed from the first."""
    first, second = pair
    await first.submit(new_job("a"))
    [taken] = await second.take(E1, "w", count=1, now_ms=2_000)
    assert taken == replace(await first.job("a"), input=new_job("a").input)
    for number in range(3):
        body = b'{"output": %d}' % number
        assert (
            await second.append_chunk("a", "w", body, attempt=1, now_ms=2_001, limit_bytes=1_000)
            is ChunkFate.STORED
        )
    job, chunks = await first.drain_chunks("a", limit_bytes=1_000)
    assert [chunk.body for chunk in chunks] == [b'{"output": 0}', b'{"output": 1}', b'{"output": 2}']
    assert job.status is JobStatus.IN_PROGRESS
    await second.apply("a", ResultPosted(worker_id="w", now_ms=2_002, output=b"[]", attempt=1))
    assert (await first.drain_chunks("a", limit_bytes=1_000)) == (await second.job("a"), [])
    assert await first.counts(E1) == await second.counts(E1) == JobCounts(completed=1)


async def test_every_job_is_handed_out_once(pair: tuple[Store, Store], new_job: NewJob) -> None:
    first, second = pair
    await asyncio.gather(*(first.submit(new_job(f"job{number:03}")) for number in range(200)))
    taken: list[str] = []

    async def drain(store: Store, worker: str) -> None:
        while (await store.counts(E1)).queued:
            taken.extend(job.id for job in await store.take(E1, worker, count=3, now_ms=2_000))

    await asyncio.gather(*(drain(store, f"w{number}") for number, store in enumerate(pair * 4)))
    assert sorted(taken) == [f"job{number:03}" for number in range(200)]
    assert await second.counts(E1) == JobCounts(in_progress=200)


async def test_counters_are_exact_whoever_changes(pair: tuple[Store, Store], new_job: NewJob) -> None:
    """Submits, cancellations, losses and purges at the same time; at the end the sums are the truth."""
    first, second = pair
    await asyncio.gather(*(pair[number % 2].submit(new_job(f"j{number}")) for number in range(120)))

    async def worker(store: Store, name: str) -> None:
        for _ in range(6):
            for job in await store.take(E1, name, count=4, now_ms=2_000):
                await store.apply(job.id, WorkerLost(worker_id=name, now_ms=2_001, reason="gone"))

    async def cancel(store: Store, begin: int) -> None:
        ids = [f"j{number}" for number in range(begin, begin + 30)]
        await store.apply_many([(job_id, Cancelled(now_ms=2_002)) for job_id in ids])
        await store.apply_many([(job_id, PlatformInterrupted(now_ms=2_003)) for job_id in reversed(ids)])

    await asyncio.gather(
        *(worker(store, f"w{number}") for number, store in enumerate(pair * 2)),
        cancel(first, 0),
        cancel(second, 15),
        second.purge(E1, now_ms=2_004),
        *(first.submit(new_job(f"late{number}")) for number in range(20)),
    )
    while await first.delete_purged(now_ms=3_000):
        pass
    jobs = await second.jobs(E1, limit=1_000)
    counts = await first.counts(E1)
    assert counts.queued == sum(job.status is JobStatus.IN_QUEUE for job in jobs)
    assert counts.in_progress == sum(job.status is JobStatus.IN_PROGRESS for job in jobs)
    assert counts.failed == sum(job.status is JobStatus.FAILED for job in jobs)
    demand = await second.demand(E1, overdue_before_ms=0)
    assert demand.queued_bytes == sum(job.input_bytes for job in jobs if job.status is JobStatus.IN_QUEUE)


async def test_equal_submissions_through_both_make_one_job(
    pair: tuple[Store, Store], new_job: NewJob
) -> None:
    equal = Idempotency(key="k", fingerprint=b"f")
    answers = await asyncio.gather(
        *(pair[number % 2].submit(new_job(f"j{number}"), idempotency=equal) for number in range(20))
    )
    assert len({job.id for job in answers}) == 1
    assert (await pair[0].counts(E1)).queued == 1
    with pytest.raises(ConflictError, match="Idempotency-Key 'k'"):
        await pair[1].submit(new_job("other"), idempotency=replace(equal, fingerprint=b"g"))


async def test_a_cancelled_batch_and_requests_that_go_back(
    pair: tuple[Store, Store], new_job: NewJob
) -> None:
    """One gateway cancels while the other loses workers: nothing waits for ever, nothing is queued again."""
    for number in range(8):
        batch_id = f"batch_{number}"
        ids = [f"req_{number}_{request}" for request in range(12)]
        drafts = [BatchDraft(id=each, input=b"{}") for each in ids]
        await pair[0].add_batch(Batch(id=batch_id, endpoint_id=E1, created_ms=1_000), drafts)
        await pair[1].finalize_batch(batch_id, new_job("", batch_id=batch_id))
        taken = [job.id for job in await pair[0].take(E1, "w", count=9, now_ms=2_000)]
        lost = WorkerLost(worker_id="w", now_ms=2_001, reason="gone")
        await asyncio.gather(
            *(pair[request % 2].apply_many([(job_id, lost)]) for request, job_id in enumerate(taken)),
            pair[1].cancel_batch(batch_id, now_ms=2_002),
        )
        batch = await pair[0].batch(batch_id)
        assert (batch.queued, batch.in_progress, batch.cancelled) == (0, 0, 12)
    assert (await pair[1].counts(E1)).queued == 0


async def test_deliveries_are_written_a_few_at_a_time(
    pair: tuple[Store, Store], new_job: NewJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many large bodies in one message would be more than the server takes."""
    monkeypatch.setattr(changes, "_WEBHOOKS_BYTES", 250)
    put, sizes = changes.put_webhooks, []

    async def counting(transaction, deliveries) -> None:
        sizes.append(len(deliveries))
        await put(transaction, deliveries)

    monkeypatch.setattr(changes, "put_webhooks", counting)
    store = pair[0]
    for endpoint_id in (E1, "purged"):
        for number in range(5):
            values = {"endpoint_id": endpoint_id, "webhook": "https://example.com/", "input": b"1" * 100}
            await store.submit(new_job(f"{endpoint_id}-{number}", **values))
    assert len(await store.cancel_all(E1, Cancelled(now_ms=2_000))) == 5
    await store.purge("purged", now_ms=2_000)
    assert await store.delete_purged(now_ms=2_000) == 5
    assert len(await store.due_webhooks(now_ms=10**15)) == 10
    assert sizes == [2, 2, 1] * 2


class TestNews:
    async def test_others_are_told(self, pair: tuple[Store, Store], new_job: NewJob) -> None:
        first, second = pair
        theirs = await listening(second)
        await first.submit(new_job("a"))
        await theirs.until(lambda: E1 in theirs.queues)
        await first.take(E1, "w", count=1, now_ms=2_000)
        await theirs.until(lambda: "a" in theirs.jobs)
        theirs.jobs.clear()
        await first.append_chunk("a", "w", b"{}", attempt=1, now_ms=2_001, limit_bytes=100)
        await theirs.until(lambda: "a" in theirs.jobs)
        await first.add_key(ApiKey(id="k", name="k", scope=Scope.ADMIN, hash="h"))
        await theirs.until(lambda: theirs.configuration > 0)

    async def test_nobody_is_told_of_its_own_changes(
        self, pair: tuple[Store, Store], new_job: NewJob
    ) -> None:
        first, second = pair
        ours, theirs = await listening(first), await listening(second)
        await first.submit(new_job("a"))
        await first.apply("a", Cancelled(now_ms=2_000))
        await theirs.until(lambda: "a" in theirs.jobs)
        # What the other says afterwards has come through the same channel.
        await second.add_key(ApiKey(id="k", name="k", scope=Scope.ADMIN, hash="h"))
        await ours.until(lambda: ours.configuration > 0)
        assert (ours.jobs, ours.queues) == ([], [])

    async def test_many_changes_come_in_few_messages(
        self, pair: tuple[Store, Store], new_job: NewJob
    ) -> None:
        """More ids than fit into one message: they are split, and none is missing."""
        first, second = pair
        theirs = await listening(second)
        ids = [f"job-with-a-rather-long-name-{number:05}" for number in range(600)]
        await asyncio.gather(*(first.submit(new_job(job_id)) for job_id in ids))
        await first.apply_many([(job_id, Cancelled(now_ms=2_000)) for job_id in ids])
        await theirs.until(lambda: set(ids) <= set(theirs.jobs))

    async def test_too_many_changes_become_a_resync(
        self, pair: tuple[Store, Store], new_job: NewJob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(news_module, "_GATHERED_MAX", 10)
        first, second = pair
        theirs = await listening(second)
        before = theirs.resyncs
        ids = [f"j{number}" for number in range(50)]
        await asyncio.gather(*(first.submit(new_job(job_id)) for job_id in ids))
        await first.apply_many([(job_id, Cancelled(now_ms=2_000)) for job_id in ids])
        await theirs.until(lambda: theirs.resyncs > before)

    async def test_a_resync_comes_every_now_and_then(
        self, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(news_module, "RESYNC_S", 0.05)
        store = await open_postgresql_store(postgresql_url)
        ours = await listening(store)
        await ours.until(lambda: ours.resyncs >= 3)
        await store.close()


class TestLead:
    async def test_one_leads_until_it_closes(self, postgresql_url: str) -> None:
        first, second = (
            await open_postgresql_store(postgresql_url),
            await open_postgresql_store(postgresql_url),
        )
        lost: list[str] = []
        assert await first.lead(lambda: lost.append("first"))
        assert await first.lead(lambda: lost.append("first"))
        assert not await second.lead(lambda: lost.append("second"))
        await first.close()
        assert await second.lead(lambda: lost.append("second"))
        await second.close()
        assert lost == []
        with pytest.raises(StoreError, match="closed"):
            await second.lead(lambda: None)


async def test_a_cancelled_take_gives_its_jobs_back(pair: tuple[Store, Store], new_job: NewJob) -> None:
    first, second = pair
    await first.submit(new_job("a"))
    task = asyncio.create_task(first.take(E1, "w", count=1, now_ms=2_000))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(TIMEOUT_S):
        while not (taken := await second.take(E1, "w2", count=1, now_ms=2_001)):
            await asyncio.sleep(0.01)
    assert [(job.id, job.retries) for job in taken] == [("a", 0)]
