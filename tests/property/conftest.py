"""The machine of `test_store_machine.py`: steps that happen to a store, and a model that is written
independently of the core and says what ought to be true after each of them.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pilotlight.core.lifecycle import (
    Cancelled,
    Effect,
    ExecutionTimedOut,
    PlatformInterrupted,
    ResultPosted,
    Retried,
    TtlReached,
    WorkerLost,
)
from pilotlight.domain.batch import Batch, BatchDraft
from pilotlight.domain.job import Idempotency, Job, JobCounts, QueueDemand
from pilotlight.errors import ConflictError, NotFoundError
from pilotlight.ports.store import Chunk, ChunkFate, Store

ENDPOINTS = ("e1", "e2")
WORKERS = ("w1", "w2", "w3")
EXECUTION_MS = 50
RETENTION_MS = 80
UNREAD_BYTES = 20
EVER = 10**15

endpoints = st.sampled_from(ENDPOINTS)
workers = st.sampled_from(WORKERS)
kinds = st.sampled_from(["ok", "error", "retryable"])
picks = st.integers(0, 10_000)
tokens = st.sampled_from(["right", "right", "unnamed", "late", "stranger"])
bodies = st.binary(min_size=1, max_size=9)
happenings = st.lists(st.tuples(tokens, kinds | bodies), max_size=4)
readings = st.lists(
    bodies | st.sampled_from(["read", "read", "read", "peek", "leave", "late", "lose"]), max_size=12
)


@dataclass
class ModelJob:
    """What ought to be true of one job."""

    id: str
    number: int
    endpoint: str
    lane: int
    queued: int
    expires: int
    retries_max: int = 1
    webhook: bool = False
    batch: str | None = None
    status: str = "IN_QUEUE"
    attempts: int = 0
    retries: int = 0
    worker: str | None = None
    started: int = 0
    finished: int = 0
    retention: int = RETENTION_MS
    read: bool = False
    unread: list[bytes] = field(default_factory=list)
    cursor: int = 0

    @property
    def living(self) -> bool:
        return self.status in {"IN_QUEUE", "IN_PROGRESS"}

    @property
    def running(self) -> bool:
        return self.status == "IN_PROGRESS"

    @property
    def order(self) -> tuple[int, bool, int, int]:
        return (self.lane, self.attempts == 0, self.queued if self.attempts else 0, self.number)


@dataclass(frozen=True)
class Drained:
    """What one reader got of a stream."""

    job_id: str
    attempt: int
    chunks: tuple[Chunk, ...]


@dataclass
class ModelBatch:
    """What ought to be true of one batch."""

    endpoint: str
    ids: list[str]
    finalized: bool = False
    cancelled: bool = False
    ends: Counter[str] = field(default_factory=Counter)


class StoreMachine(RuleBasedStateMachine):
    """Steps every store has to survive; subclasses say how one is opened, restarted and killed."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.jobs: dict[str, ModelJob] = {}
        self.ended: dict[str, Job] = {}
        self.drained: list[Drained] = []
        self.purged: list[ModelJob] = []
        self.batches: dict[str, ModelBatch] = {}
        self.keys: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.webhooks: Counter[tuple[str, str]] = Counter()
        self.totals: dict[str, Counter[str]] = {endpoint: Counter() for endpoint in ENDPOINTS}
        self.number = 0
        self.now = 1_000
        self.store: Store

    def run(self, awaitable: Any) -> Any:
        return self.runner.run(awaitable)

    async def open(self) -> Store:
        raise NotImplementedError

    async def reopen(self) -> Store:
        raise NotImplementedError

    async def kill(self) -> Store:
        return await self.reopen()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.run(self.store.close())
        self.runner.close()

    # The model's own rules.

    def finish(self, job: ModelJob, status: str) -> None:
        job.status, job.finished = status, self.now
        ended = {"COMPLETED": "completed", "CANCELLED": "cancelled"}.get(status, "failed")
        self.totals[job.endpoint][ended] += 1
        self.webhooks[job.id, status] += job.webhook
        if job.batch is not None:
            self.batches[job.batch].ends[ended] += 1

    def requeue_or_fail(self, job: ModelJob, *, free: bool = False) -> None:
        if job.retries >= job.retries_max and not free:
            self.finish(job, "FAILED")
        elif job.batch is not None and self.batches[job.batch].cancelled:
            self.finish(job, "CANCELLED")
        else:
            self.requeue(job)
            job.retries += not free
            self.totals[job.endpoint]["retried"] += not free

    def requeue(self, job: ModelJob) -> None:
        job.status, job.queued, job.unread, job.cursor = "IN_QUEUE", self.now, [], 0
        job.read = False

    def forget(self, job: ModelJob) -> None:
        del self.jobs[job.id]
        self.ended.pop(job.id, None)
        self.keys = {key: entry for key, entry in self.keys.items() if entry[0] != job.id}

    def forgotten(self, job: ModelJob) -> bool:
        return not job.living and job.finished + job.retention <= self.now

    def pick(self, number: int, *, running: bool = False) -> ModelJob:
        jobs = [job for job in self.jobs.values() if job.running or not running]
        return jobs[number % len(jobs)]

    def named(self, job: ModelJob, token: str) -> tuple[str, int | None]:
        """Worker and attempt that a running job's event names."""
        assert job.worker is not None
        attempt = {"unnamed": None, "late": job.attempts - 1}.get(token, job.attempts)
        return ("w0" if token == "stranger" else job.worker), attempt

    def any_running(self) -> bool:
        return any(job.running for job in self.jobs.values())

    def any_failed(self) -> bool:
        return any(job.status in {"FAILED", "TIMED_OUT"} for job in self.jobs.values())

    def new(self, endpoint: str, lane: int, ttl: int, **more: Any) -> ModelJob:
        self.number += 1
        return ModelJob(
            f"j{self.number}", self.number, endpoint, lane, self.now, expires=self.now + ttl, **more
        )

    def record(self, job: ModelJob) -> Job:
        return Job(
            id=job.id,
            endpoint_id=job.endpoint,
            input=json.dumps(job.id).encode(),
            input_bytes=len(job.id) + 2,
            low_priority=job.lane == 2,
            created_ms=self.now,
            queued_ms=self.now,
            expires_ms=job.expires,
            execution_timeout_ms=EXECUTION_MS,
            retention_ms=RETENTION_MS,
            retries_max=job.retries_max,
            webhook="https://example.com/" if job.webhook else None,
            batch_id=job.batch,
        )

    # Steps.

    @initialize()
    def start(self) -> None:
        self.store = self.run(self.open())

    @rule(ms=st.integers(1, 60))
    def time_passes(self, ms: int) -> None:
        self.now += ms

    @rule(
        endpoint=endpoints,
        lane=st.sampled_from([0, 0, 2]),
        ttl=st.integers(20, 400),
        count=st.integers(1, 6),
        webhook=st.booleans(),
        retries_max=st.integers(0, 2),
    )
    def submit(self, endpoint: str, lane: int, ttl: int, count: int, webhook: bool, retries_max: int) -> None:
        for _ in range(count):
            job = self.new(endpoint, lane, ttl, webhook=webhook, retries_max=retries_max)
            self.jobs[job.id] = job
            self.run(self.store.submit(self.record(job)))

    @rule(
        endpoint=endpoints, key=st.sampled_from(["k1", "k2"]), fingerprint=st.sampled_from([b"1", b"1", b"2"])
    )
    def submit_twice_at_once(self, endpoint: str, key: str, fingerprint: bytes) -> None:
        """With an idempotency key: one job, or the one of before, or a conflict."""
        first, second = self.new(endpoint, 0, 300), self.new(endpoint, 0, 300)
        again = Idempotency(key=key, fingerprint=fingerprint)

        async def both() -> list[Any]:
            calls = [self.store.submit(self.record(job), idempotency=again) for job in (first, second)]
            return await asyncio.gather(*calls, return_exceptions=True)

        answers = self.run(both())
        known = self.keys.get((endpoint, key))
        if known is not None and self.forgotten(self.jobs[known[0]]):
            known = None
        if known is not None and known[1] != fingerprint:
            assert all(isinstance(answer, ConflictError) for answer in answers), answers
            return
        [job_id] = {answer.id for answer in answers}
        if known is not None:
            assert job_id == known[0]
            return
        job = first if job_id == first.id else second
        assert job_id == job.id
        self.jobs[job.id] = job
        self.keys[endpoint, key] = (job.id, fingerprint)

    @rule(endpoint=endpoints, worker=workers, count=st.integers(0, 6))
    def take(self, endpoint: str, worker: str, count: int) -> None:
        queued = [
            job
            for job in self.jobs.values()
            if job.endpoint == endpoint and job.status == "IN_QUEUE" and job.expires > self.now
        ]
        expected = sorted(queued, key=lambda job: job.order)[:count]
        ahead = [self.run(self.store.ahead(job.id)) for job in expected]
        taken = self.run(self.store.take(endpoint, worker, count=count, now_ms=self.now))
        assert [job.id for job in taken] == [job.id for job in expected]
        assert [job.input for job in taken] == [json.dumps(job.id).encode() for job in expected]
        # Those past their time to live stand in the queue until an event ends them.
        assert all(here >= number for number, here in enumerate(ahead))
        for job in expected:
            job.status, job.worker, job.started = "IN_PROGRESS", worker, self.now
            job.attempts += 1

    @rule(endpoint=endpoints, worker=workers, count=st.integers(1, 3), events=happenings)
    def work(self, endpoint: str, worker: str, count: int, events: list[tuple[str, Any]]) -> None:
        """What most lives are made of, in one step: submitted, taken, chunks and results of right and wrong senders."""
        self.submit(endpoint, 0, 300, count, webhook=True, retries_max=1)
        self.take(endpoint, worker, count)
        for number, (token, what) in enumerate(events):
            if not self.any_running():
                break
            job = self.pick(number, running=True)
            sender, attempt = self.named(job, token)
            if isinstance(what, bytes):
                self.chunk(job, sender, attempt, what)
            else:
                self.result(job, sender, attempt, what)

    @precondition(lambda self: self.jobs)
    @rule(number=picks, worker=workers, kind=kinds)
    def result_for_any_job(self, number: int, worker: str, kind: str) -> None:
        self.result(self.pick(number), worker, None, kind)

    @precondition(any_running)
    @rule(number=picks, kind=kinds, token=tokens)
    def result_of_a_running_job(self, number: int, kind: str, token: str) -> None:
        job = self.pick(number, running=True)
        self.result(job, *self.named(job, token), kind)

    def result(self, job: ModelJob, worker: str, attempt: int | None, kind: str) -> None:
        event = ResultPosted(
            worker_id=worker,
            now_ms=self.now,
            output=b"1" if kind == "ok" else None,
            error=None if kind == "ok" else kind,
            retryable=kind == "retryable",
            attempt=attempt,
        )
        # Twice in one go: the second changes nothing, whatever the first did.
        applied, again = self.run(self.store.apply_many([(job.id, event)] * 2))
        counts = job.running and job.worker == worker and attempt in {None, job.attempts}
        assert (applied.effect is Effect.CHANGED) == counts
        assert again.effect is not Effect.CHANGED
        if not counts:
            return
        if kind == "ok":
            self.finish(job, "COMPLETED")
        elif kind == "error":
            self.finish(job, "FAILED")
        else:
            self.requeue_or_fail(job)

    @rule(worker=workers)
    def lose_worker(self, worker: str) -> None:
        lost = [job for job in self.jobs.values() if job.running and job.worker == worker]
        running = self.run(self.store.running(worker_id=worker))
        assert [job.id for job in running] == [job.id for job in lost]
        for job in lost:
            self.run(self.store.apply(job.id, WorkerLost(worker_id=worker, now_ms=self.now, reason="gone")))
            self.requeue_or_fail(job)

    @precondition(lambda self: self.jobs)
    @rule(number=picks, worker=workers, body=bodies)
    def chunk_for_any_job(self, number: int, worker: str, body: bytes) -> None:
        self.chunk(self.pick(number), worker, None, body)

    @precondition(any_running)
    @rule(number=picks, some=st.lists(bodies, min_size=1, max_size=4), token=tokens)
    def chunks_of_a_running_job(self, number: int, some: list[bytes], token: str) -> None:
        job = self.pick(number, running=True)
        for body in some:
            self.chunk(job, *self.named(job, token), body)

    def chunk(self, job: ModelJob, worker: str, attempt: int | None, body: bytes) -> None:
        fate = self.run(
            self.store.append_chunk(
                job.id, worker, body, attempt=attempt, now_ms=self.now, limit_bytes=UNREAD_BYTES
            )
        )
        if not (job.running and job.worker == worker and attempt in {None, job.attempts}):
            assert fate is ChunkFate.OTHER_ATTEMPT
        elif sum(map(len, job.unread)) + len(body) > UNREAD_BYTES:
            assert fate is ChunkFate.FULL
        else:
            assert fate is ChunkFate.STORED
            job.unread.append(body)

    @precondition(lambda self: self.jobs)
    @rule(number=picks, remember=st.booleans())
    def read_stream(self, number: int, remember: bool) -> None:
        self.read(self.pick(number), remember=remember)

    def read(self, job: ModelJob, *, remember: bool) -> None:
        cursor = None if remember else job.cursor
        assert self.run(self.store.has_chunks(job.id, cursor=cursor)) == bool(job.unread)
        stored, chunks = self.run(self.store.drain_chunks(job.id, limit_bytes=1_000_000, cursor=cursor))
        assert [chunk.body for chunk in chunks] == job.unread
        assert stored.status == job.status
        job.read = job.read or bool(chunks)
        if remember:
            job.unread = []
            if chunks:
                job.cursor = chunks[-1].sequence + 1
                self.drained.append(Drained(job.id, stored.attempt, tuple(chunks)))
        if job.id in self.ended:
            self.ended[job.id] = stored

    @precondition(any_running)
    @rule(number=picks, steps=readings)
    def stream(self, number: int, steps: list[Any]) -> None:
        """Chunks of one job, readers that stay or leave, and losses of its worker, close to each other."""
        job = self.pick(number, running=True)
        for step in steps:
            match step:
                case "read" | "peek":
                    self.read(job, remember=step == "read")
                case "leave":
                    self.read(job, remember=True)
                    self.return_chunks(0)
                case "late":
                    self.return_chunks(1)
                case "lose" if job.worker is not None:
                    self.lose_worker(job.worker)
                    self.take(job.endpoint, job.worker, len(self.jobs))
                case bytes() if job.running:
                    self.chunk(job, *self.named(job, "right"), step)

    @precondition(lambda self: self.drained)
    @rule(number=picks)
    def return_chunks(self, number: int) -> None:
        """A reader has gone, perhaps long ago; only if nobody has read on is what it got unread again."""
        if not self.drained:
            return
        drained = self.drained[-1 - number % len(self.drained)]
        self.run(self.store.return_chunks(drained.job_id, drained.chunks, attempt=drained.attempt))
        job = self.jobs.get(drained.job_id)
        if job is None or job.attempts != drained.attempt or job.cursor != drained.chunks[-1].sequence + 1:
            return
        job.cursor = drained.chunks[0].sequence
        job.unread = [*(chunk.body for chunk in drained.chunks), *job.unread]

    @precondition(lambda self: self.jobs)
    @rule(number=picks)
    def cancel(self, number: int) -> None:
        job = self.pick(number)
        applied = self.run(self.store.apply(job.id, Cancelled(now_ms=self.now)))
        assert applied.changed == job.living
        if job.living:
            self.finish(job, "CANCELLED")

    @precondition(any_failed)
    @rule(number=picks, ttl=st.integers(20, 400))
    def retry(self, number: int, ttl: int) -> None:
        failed = [job for job in self.jobs.values() if job.status in {"FAILED", "TIMED_OUT"}]
        job = failed[number % len(failed)]
        if job.batch is not None and self.batches[job.batch].cancelled:
            return
        event = Retried(now_ms=self.now, expires_ms=self.now + ttl)
        assert self.run(self.store.apply(job.id, event)).requeued
        if job.batch is not None:
            self.batches[job.batch].ends["failed"] -= 1
        self.requeue(job)
        job.expires, job.retries = self.now + ttl, 0
        self.totals[job.endpoint]["retried"] += 1
        del self.ended[job.id]

    @rule()
    def reap(self) -> None:
        due = self.run(self.store.due(now_ms=self.now))
        overdue = {
            job.id
            for job in self.jobs.values()
            if job.living
            and (job.expires <= self.now or (job.running and job.started + EXECUTION_MS <= self.now))
        }
        assert {job.id for job in due} == overdue
        for each in due:
            job = self.jobs[each.id]
            expired = job.expires <= self.now
            event = TtlReached(now_ms=self.now) if expired else ExecutionTimedOut(now_ms=self.now)
            assert self.run(self.store.apply(job.id, event)).finished
            self.finish(job, "TIMED_OUT" if expired else "FAILED")

    @precondition(lambda self: self.jobs)
    @rule(number=picks, ttl=st.integers(0, 60))
    def shorten(self, number: int, ttl: int) -> None:
        job = self.pick(number)
        self.run(self.store.shorten(job.id, now_ms=self.now, ttl_ms=ttl))
        if job.living:
            job.expires = min(job.expires, self.now + ttl)
        else:
            job.retention = min(job.retention, max(0, self.now + ttl - job.finished))
            self.ended[job.id] = msgspec.structs.replace(self.ended[job.id], retention_ms=job.retention)

    @rule(endpoint=endpoints)
    def purge(self, endpoint: str) -> None:
        queued = [job for job in self.jobs.values() if job.endpoint == endpoint and job.status == "IN_QUEUE"]
        assert self.run(self.store.purge(endpoint, now_ms=self.now)) == len(queued)
        for job in queued:
            self.forget(job)
            self.purged.append(job)
            if job.batch is not None:
                self.batches[job.batch].ends["cancelled"] += 1
            with pytest.raises(NotFoundError):
                self.run(self.store.job(job.id))

    @rule()
    def delete_purged(self) -> None:
        deleted = 0
        while count := self.run(self.store.delete_purged(now_ms=self.now, limit=3)):
            deleted += count
        assert deleted == len(self.purged)
        for job in self.purged:
            self.webhooks[job.id, "CANCELLED"] += job.webhook
        self.purged = []

    @rule()
    def prune(self) -> None:
        old = [
            job for job in self.jobs.values() if not job.living and job.finished + job.retention <= self.now
        ]
        assert self.run(self.store.prune_jobs(now_ms=self.now)) == len(old)
        for job in old:
            self.forget(job)
            with pytest.raises(NotFoundError):
                self.run(self.store.job(job.id))

    @rule()
    def deliver_webhooks(self) -> None:
        for delivery in self.run(self.store.due_webhooks(now_ms=self.now, limit=2)):
            self.run(self.store.delete_webhook(delivery.id))
            self.webhooks[delivery.job_id, json.loads(delivery.body)["status"]] -= 1

    @rule(endpoint=endpoints, count=st.integers(0, 3), more=st.integers(0, 2))
    def new_batch(self, endpoint: str, count: int, more: int) -> None:
        batch_id = f"batch_{len(self.batches) + 1}"
        ids = []
        for _ in range(count + more):
            self.number += 1
            ids.append(f"j{self.number}")
        drafts = [BatchDraft(id=job_id, input=json.dumps(job_id).encode()) for job_id in ids]
        record = Batch(id=batch_id, endpoint_id=endpoint, created_ms=self.now)
        self.run(self.store.add_batch(record, drafts[:count]))
        self.run(self.store.add_batch_requests(batch_id, drafts[count:]))
        self.batches[batch_id] = ModelBatch(endpoint, ids)

    @precondition(lambda self: self.batches)
    @rule(number=picks, webhook=st.booleans(), low=st.booleans())
    def finalize_batch(self, number: int, webhook: bool, low: bool) -> None:
        batch_id = list(self.batches)[number % len(self.batches)]
        batch = self.batches[batch_id]
        template = ModelJob(
            "", 0, batch.endpoint, 2 if low else 1, self.now, self.now + 300, webhook=webhook, batch=batch_id
        )
        call = self.store.finalize_batch(batch_id, self.record(template))
        if batch.finalized or batch.cancelled:
            with pytest.raises(ConflictError):
                self.run(call)
            return
        self.run(call)
        batch.finalized = True
        for job_id in batch.ids:
            self.number += 1
            self.jobs[job_id] = replace(template, id=job_id, number=self.number, unread=[])

    @precondition(lambda self: self.batches)
    @rule(number=picks)
    def cancel_batch(self, number: int) -> None:
        batch_id = list(self.batches)[number % len(self.batches)]
        batch = self.batches[batch_id]
        _, applied = self.run(self.store.cancel_batch(batch_id, now_ms=self.now))
        # One of which nothing is to be done any more stays what it is.
        living = any(job.living for job in self.jobs.values() if job.batch == batch_id)
        batch.cancelled = batch.cancelled or living or not batch.finalized
        queued = [job for job in self.jobs.values() if job.batch == batch_id and job.status == "IN_QUEUE"]
        assert {each.after.id for each in applied} == {job.id for job in queued}
        for job in queued:
            self.finish(job, "CANCELLED")

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        self.store = self.run(self.kill() if killed else self.reopen())
        running = self.run(self.store.running())
        assert [job.id for job in running] == [
            job.id for job in sorted(self.jobs.values(), key=lambda job: job.number) if job.running
        ]
        for each in running:
            self.run(self.store.apply(each.id, PlatformInterrupted(now_ms=self.now)))
            self.requeue_or_fail(self.jobs[each.id], free=True)

    # What always holds.

    @invariant()
    def no_job_is_lost_or_ends_twice(self) -> None:
        if not hasattr(self, "store"):
            return
        stored = {
            job.id: job for endpoint in ENDPOINTS for job in self.run(self.store.jobs(endpoint, limit=10_000))
        }
        assert {job_id: job.status.value for job_id, job in stored.items()} == {
            job.id: job.status for job in self.jobs.values()
        }
        for job_id, job in stored.items():
            model = self.jobs[job_id]
            assert (job.attempt, job.retries, job.chunk_read) == (model.attempts, model.retries, model.read)
            if job.status.terminal:
                if job_id not in self.ended:
                    self.ended[job_id] = self.run(self.store.job(job_id))
                assert job == msgspec.structs.replace(self.ended[job_id], output=None)

    @invariant()
    def every_end_has_one_webhook(self) -> None:
        if not hasattr(self, "store"):
            return
        made = self.run(self.store.due_webhooks(now_ms=EVER, limit=100_000))
        assert len({each.id for each in made}) == len(made)
        assert Counter((each.job_id, json.loads(each.body)["status"]) for each in made) == +self.webhooks

    @invariant()
    def counters_equal_the_truth(self) -> None:
        if not hasattr(self, "store"):
            return
        for endpoint in ENDPOINTS:
            mine = [job for job in self.jobs.values() if job.endpoint == endpoint]
            waiting = [job for job in mine if job.status == "IN_QUEUE"]
            since = [job.queued for job in waiting if job.lane != 2]
            running = sum(job.running for job in mine)
            totals = self.totals[endpoint]
            assert self.run(self.store.counts(endpoint)) == JobCounts(
                queued=len(waiting),
                in_progress=running,
                completed=totals["completed"],
                failed=totals["failed"],
                retried=totals["retried"],
            )
            assert self.run(self.store.demand(endpoint, overdue_before_ms=self.now - 30)) == QueueDemand(
                queued=len(since),
                queued_low=len(waiting) - len(since),
                queued_bytes=sum(len(job.id) + 2 for job in waiting),
                oldest_ms=min(since, default=None),
                overdue=sum(moment < self.now - 30 for moment in since),
                in_progress=running,
            )

    @invariant()
    def batches_add_up(self) -> None:
        for batch_id, model in self.batches.items():
            stored = self.run(self.store.batch(batch_id))
            mine = [job for job in self.jobs.values() if job.batch == batch_id]
            assert stored.total == len(model.ids)
            assert (stored.finalized_ms is not None) == model.finalized
            assert (stored.cancel_ms is not None) == model.cancelled
            if model.finalized:
                assert (stored.queued, stored.in_progress) == (
                    sum(job.status == "IN_QUEUE" for job in mine),
                    sum(job.running for job in mine),
                )
                ends = {"completed": stored.completed, "failed": stored.failed, "cancelled": stored.cancelled}
                assert Counter(ends) == model.ends
                assert stored.total == stored.queued + stored.in_progress + sum(ends.values())


@pytest.fixture
def store_machine() -> type[StoreMachine]:
    """The machine, to be told how its store is opened and restarted."""
    return StoreMachine
