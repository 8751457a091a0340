"""Random lives of random jobs, on every store, against a model written independently of the core.

After every step: no job is lost, no terminal state ever changes, and the counters are the truth.
Restarts close and reopen the store, after which running jobs are interrupted by the platform, as a
gateway does when it starts.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pilotlight.core.lifecycle import (
    Cancelled,
    Effect,
    ExecutionTimedOut,
    PlatformInterrupted,
    ResultPosted,
    TtlReached,
    WorkerLost,
)
from pilotlight.domain.job import Job, JobCounts, JobStatus, QueueDemand
from pilotlight.errors import NotFoundError
from pilotlight.ports.store import Store
from pilotlight.stores import MemoryStore, open_sqlite_store

ENDPOINTS = ("e1", "e2")
WORKERS = ("w1", "w2", "w3")
EXECUTION_MS = 50
RETENTION_MS = 80

endpoints = st.sampled_from(ENDPOINTS)
workers = st.sampled_from(WORKERS)
picks = st.integers(0, 10_000)


@dataclass
class ModelJob:
    """What ought to be true of one job."""

    id: str
    number: int
    endpoint: str
    low: bool
    queued: int
    expires: int
    status: str = "IN_QUEUE"
    attempts: int = 0
    retries: int = 0
    worker: str | None = None
    started: int = 0
    read: bool = False
    finished: int = 0
    chunks: int = 0

    @property
    def living(self) -> bool:
        return self.status in {"IN_QUEUE", "IN_PROGRESS"}

    @property
    def order(self) -> tuple[bool, bool, int, int]:
        return (self.low, self.attempts == 0, self.queued, self.number)


class StoreMachine(RuleBasedStateMachine):
    """Steps every store has to survive; subclasses say how one is opened and restarted."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.jobs: dict[str, ModelJob] = {}
        self.ended: dict[str, Job] = {}
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

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.run(self.store.close())
        self.runner.close()

    # The model's own rules.

    def finish(self, job: ModelJob, status: str) -> None:
        job.status, job.finished = status, self.now
        self.totals[job.endpoint]["completed"] += status == "COMPLETED"
        self.totals[job.endpoint]["failed"] += status in {"FAILED", "TIMED_OUT"}

    def retry_or_fail(self, job: ModelJob, *, free: bool = False) -> None:
        if job.read or (job.retries >= 1 and not free):
            self.finish(job, "FAILED")
            return
        job.status, job.queued, job.chunks = "IN_QUEUE", self.now, 0
        if not free:
            job.retries += 1
            self.totals[job.endpoint]["retried"] += 1

    def pick(self, number: int, *, running: bool = False) -> ModelJob:
        jobs = [job for job in self.jobs.values() if job.status == "IN_PROGRESS" or not running]
        return jobs[number % len(jobs)]

    def any_running(self) -> bool:
        return any(job.status == "IN_PROGRESS" for job in self.jobs.values())

    # Steps.

    @initialize()
    def start(self) -> None:
        self.store = self.run(self.open())

    @rule(ms=st.integers(1, 60))
    def time_passes(self, ms: int) -> None:
        self.now += ms

    @rule(endpoint=endpoints, low=st.booleans(), ttl=st.integers(20, 400), count=st.integers(1, 4))
    def submit(self, endpoint: str, low: bool, ttl: int, count: int) -> None:
        new = []
        for _ in range(count):
            self.number += 1
            job = ModelJob(f"j{self.number}", self.number, endpoint, low, self.now, expires=self.now + ttl)
            self.jobs[job.id] = job
            new.append(
                Job(
                    id=job.id,
                    endpoint_id=endpoint,
                    input=job.id.encode(),
                    low_priority=low,
                    created_ms=self.now,
                    queued_ms=self.now,
                    expires_ms=job.expires,
                    execution_timeout_ms=EXECUTION_MS,
                    retention_ms=RETENTION_MS,
                )
            )

        async def together() -> None:
            # Tasks start in order, and so do the submissions.
            await asyncio.gather(*(self.store.submit(job) for job in new))

        self.run(together())

    @rule(endpoint=endpoints, worker=workers, count=st.integers(0, 4))
    def take(self, endpoint: str, worker: str, count: int) -> None:
        queued = [
            job
            for job in self.jobs.values()
            if job.endpoint == endpoint and job.status == "IN_QUEUE" and job.expires > self.now
        ]
        expected = sorted(queued, key=lambda job: job.order)[:count]
        taken = self.run(self.store.take(endpoint, worker, count=count, now_ms=self.now))
        assert [job.id for job in taken] == [job.id for job in expected]
        for job in expected:
            job.status, job.worker, job.started = "IN_PROGRESS", worker, self.now
            job.attempts += 1

    @precondition(lambda self: self.jobs)
    @rule(number=picks, worker=workers, kind=st.sampled_from(["ok", "error", "retryable"]))
    def any_result(self, number: int, worker: str, kind: str) -> None:
        self.result(self.pick(number), worker, kind)

    @precondition(any_running)
    @rule(number=picks, kind=st.sampled_from(["ok", "error", "retryable"]))
    def right_result(self, number: int, kind: str) -> None:
        job = self.pick(number, running=True)
        assert job.worker is not None
        self.result(job, job.worker, kind)

    def result(self, job: ModelJob, worker: str, kind: str) -> None:
        event = ResultPosted(
            worker_id=worker,
            now_ms=self.now,
            output=b"1" if kind == "ok" else None,
            error=None if kind == "ok" else kind,
            retryable=kind == "retryable",
        )
        applied = self.run(self.store.apply(job.id, event))
        counts = job.status == "IN_PROGRESS" and job.worker == worker
        assert (applied.effect is Effect.CHANGED) == counts
        if not counts:
            return
        if kind == "ok":
            self.finish(job, "COMPLETED")
        elif kind == "error":
            self.finish(job, "FAILED")
        else:
            self.retry_or_fail(job)

    @rule(worker=workers)
    def lose_worker(self, worker: str) -> None:
        lost = [job for job in self.jobs.values() if job.status == "IN_PROGRESS" and job.worker == worker]
        running = self.run(self.store.running(worker_id=worker))
        assert [job.id for job in running] == [job.id for job in lost]
        for job in lost:
            self.run(self.store.apply(job.id, WorkerLost(worker_id=worker, now_ms=self.now, reason="gone")))
            self.retry_or_fail(job)

    @precondition(lambda self: self.jobs)
    @rule(number=picks, worker=workers)
    def chunk(self, number: int, worker: str) -> None:
        job = self.pick(number)
        accepted = self.run(self.store.append_chunk(job.id, worker, b"chunk"))
        assert accepted == (job.status == "IN_PROGRESS" and job.worker == worker)
        job.chunks += accepted

    @precondition(any_running)
    @rule(number=picks)
    def right_chunk(self, number: int) -> None:
        job = self.pick(number, running=True)
        assert self.run(self.store.append_chunk(job.id, job.worker or "", b"chunk"))
        job.chunks += 1

    @precondition(lambda self: self.jobs)
    @rule(number=picks)
    def read_stream(self, number: int) -> None:
        job = self.pick(number)
        stored, chunks = self.run(self.store.drain_chunks(job.id, limit_bytes=1_000_000))
        assert len(chunks) == job.chunks
        assert stored.status == job.status
        job.read = job.read or bool(chunks)
        job.chunks = 0
        if job.id in self.ended:
            self.ended[job.id] = stored

    @precondition(lambda self: self.jobs)
    @rule(number=picks)
    def cancel(self, number: int) -> None:
        job = self.pick(number)
        applied = self.run(self.store.apply(job.id, Cancelled(now_ms=self.now)))
        assert applied.changed == job.living
        if job.living:
            self.finish(job, "CANCELLED")

    @rule()
    def reap(self) -> None:
        due = self.run(self.store.due(now_ms=self.now))
        overdue = {
            job.id
            for job in self.jobs.values()
            if job.living
            and (
                job.expires <= self.now
                or (job.status == "IN_PROGRESS" and job.started + EXECUTION_MS <= self.now)
            )
        }
        assert {job.id for job in due} == overdue
        for each in due:
            job = self.jobs[each.id]
            expired = job.expires <= self.now
            event = TtlReached(now_ms=self.now) if expired else ExecutionTimedOut(now_ms=self.now)
            assert self.run(self.store.apply(job.id, event)).finished
            self.finish(job, "TIMED_OUT" if expired else "FAILED")

    @rule()
    def prune(self) -> None:
        old = [
            job.id for job in self.jobs.values() if not job.living and job.finished + RETENTION_MS <= self.now
        ]
        assert self.run(self.store.prune_jobs(now_ms=self.now)) == len(old)
        for job_id in old:
            del self.jobs[job_id]
            self.ended.pop(job_id, None)
            with pytest.raises(NotFoundError):
                self.run(self.store.job(job_id))

    @rule()
    def restart(self) -> None:
        self.store = self.run(self.reopen())
        running = self.run(self.store.running())
        assert [job.id for job in running] == [
            job.id for job in self.jobs.values() if job.status == "IN_PROGRESS"
        ]
        for each in running:
            self.run(self.store.apply(each.id, PlatformInterrupted(now_ms=self.now)))
            self.retry_or_fail(self.jobs[each.id], free=True)

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
            assert job.input == job_id.encode()
            assert (job.attempt, job.retries, job.chunk_read) == (model.attempts, model.retries, model.read)
            if job.status.terminal:
                assert self.ended.setdefault(job_id, job) == job

    @invariant()
    def counters_equal_the_truth(self) -> None:
        if not hasattr(self, "store"):
            return
        for endpoint in ENDPOINTS:
            mine = [job for job in self.jobs.values() if job.endpoint == endpoint]
            waiting = [job for job in mine if job.status == "IN_QUEUE"]
            since = [job.queued for job in waiting if not job.low]
            running = sum(job.status == "IN_PROGRESS" for job in mine)
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
                oldest_ms=min(since, default=None),
                overdue=sum(moment < self.now - 30 for moment in since),
                in_progress=running,
            )
            assert all(job.status is JobStatus.IN_PROGRESS for job in self.run(self.store.running()))


class MemoryMachine(StoreMachine):
    """The in-memory twin; a restart keeps it, for it has nothing to come back from."""

    async def open(self) -> Store:
        return MemoryStore()

    async def reopen(self) -> Store:
        return self.store


class SqliteMachine(StoreMachine):
    """SQLite, closed and opened again by a restart."""

    async def open(self) -> Store:
        self.folder = Path(tempfile.mkdtemp(prefix="store-machine-"))
        return await open_sqlite_store(self.folder)

    async def reopen(self) -> Store:
        await self.store.close()
        return await open_sqlite_store(self.folder)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


# On a developer's machine every run tries something new; in CI a run is repeatable.
PROFILE = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)

TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = PROFILE
TestSqliteMachine = SqliteMachine.TestCase
TestSqliteMachine.settings = settings(PROFILE, max_examples=25)
