"""Many submitters, workers, hang-ups and cancellations at once: no job is lost, doubled or left behind."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from pilotlight.domain.job import JobStatus
from pilotlight.gateway.jobs.waiting import Signals, happened


async def work(platform, worker_id, seed, runs):
    """A worker that hangs up now and then; returns only when it is cancelled."""
    chance = random.Random(seed)
    desk = platform.service.workers
    worker = platform.fleet.worker(worker_id)
    while True:
        gone = asyncio.get_running_loop().create_future()
        if chance.random() < 0.3:
            asyncio.get_running_loop().call_later(chance.random() / 200, gone.set_result, None)
        jobs = await desk.take(worker, count=chance.randint(1, 4), holding=True, gone=gone)
        while jobs and chance.random() < 0.7:
            runs += [job.id for job in jobs]
            items = [(job.id, json.dumps({"output": job.id}).encode(), False) for job in jobs]
            jobs = await desk.results_and_take(
                worker, items, count=chance.randint(1, 4), gone=gone, connection=None
            )
        for job in jobs:
            runs.append(job.id)
            await asyncio.sleep(0)
            await desk.result(worker, job.id, json.dumps({"output": job.id}).encode(), 10, final_stream=False)
        if not gone.done():
            gone.cancel()
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sqlite", [False, True])
async def test_every_job_runs_once(make_platform, seed, sqlite):
    async with make_platform(sqlite=sqlite) as platform:
        chance = random.Random(seed)
        runs: list[str] = []
        workers = []
        for number in range(4):
            platform.fleet.add(f"w{number}", capacity=3)
            workers.append(asyncio.create_task(work(platform, f"w{number}", f"{seed}-{number}", runs)))
        ids, cancelled = [], set()
        for number in range(150):
            body = json.dumps({"input": number}).encode()
            job = (await platform.service.submit(platform.endpoint, platform.key, body, sync=False)).job
            ids.append(job.id)
            if chance.random() < 0.2:
                job = await platform.service.cancel("ep1", chance.choice(ids))
                if job.status is JobStatus.CANCELLED:
                    cancelled.add(job.id)
        jobs = [await platform.service.wait("ep1", job_id, timeout_s=40) for job_id in ids]
        # The store may show a result a moment before the gateway has done what follows from it.
        while len(platform.records) < len(ids):
            await asyncio.sleep(0)
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)
        assert {job.status for job in jobs} <= {JobStatus.COMPLETED, JobStatus.CANCELLED}
        assert {job.id for job in jobs if job.status is JobStatus.CANCELLED} == cancelled
        finished = [job_id for job_id in runs if job_id not in cancelled]
        assert sorted(finished) == sorted(job.id for job in jobs if job.status is JobStatus.COMPLETED)
        assert all(job.retries == 0 for job in jobs)
        assert len(platform.records) == len(ids)
        assert [platform.slots.worker(f"w{number}").jobs for number in range(4)] == [0] * 4


async def test_nothing_is_kept_of_a_deleted_endpoint(make_platform):
    """1. A take is open, and room in the queue is taken, when the endpoint is deleted. 2. The worker asks again, and
    one asks for the first time. 3. News of jobs comes late. What came after the deletion began a line anew, which
    nobody ever took away."""
    async with make_platform() as platform:
        service, endpoint, loop = platform.service, platform.endpoint, asyncio.get_running_loop()
        dispatcher, rooms = service._ledger.dispatcher, service.bounds._rooms
        for worker_id in ("w1", "w2"):
            platform.fleet.add(worker_id, capacity=1)
        gone = loop.create_future()

        def take(worker_id):
            worker = platform.fleet.worker(worker_id)
            return asyncio.create_task(service.workers.take(worker, count=1, holding=True, gone=gone))

        parked = take("w1")
        await platform.parked()
        async with service.bounds.room(endpoint, jobs=1, size=1):
            await platform.store.delete_endpoint("ep1", now_ms=2)
            await platform.directory.refresh()
            await service.endpoint_deleted("ep1")
            assert await parked == []
            again = take("w1")
            assert await take("w2") == [], "one that was not told yet is answered at once"
            await platform.parked()
            assert not again.done(), "one that was told waits for a moment, as it would only ask again"
            dispatcher.arrived("ep1")
            platform.slots.on_free("ep1")
            service.bounds.ended("ep1")
            worker = platform.fleet.worker("w1")
            assert (
                await service.workers.results_and_take(worker, [], count=1, gone=gone, connection=None) == []
            )
            gone.set_result(None)
            assert await again == []
        async with service.bounds.room(endpoint, jobs=1, size=1):
            pass
        assert (dispatcher._lines, rooms) == ({}, {})


async def test_signals_wake_those_who_watch_and_nobody_else():
    signals = Signals()
    loop = asyncio.get_running_loop()
    with signals.watch("a") as first, signals.watch("a") as second, signals.watch("b", group="g") as other:
        signals.notify("a")
        assert (first.is_set(), second.is_set(), other.is_set()) == (True, True, False)
        assert await happened(first, deadline=loop.time())
        assert not await happened(other, deadline=loop.time() + 0.001)
        gone = loop.create_future()
        gone.set_result(None)
        assert not await happened(other, deadline=loop.time() + 60, gone=gone)
        first.clear()
        signals.notify_group("g")
        assert (first.is_set(), other.is_set()) == (False, True)
        other.clear()
        signals.notify_all()
        assert other.is_set()
    signals.notify("a")
    signals.notify_group("g")
    assert not signals._watches
    assert not signals._groups
