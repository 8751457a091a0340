"""Jobs on their way to a worker: wake-ups before the commit, old libraries, ids that must not come twice.

A bare § is one of worker-protocol.md (§3.2, §5 to §7, §11); serverless-api.md §4.2 has the outline.
"""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.domain.worker import WorkerState
from pilotlight.errors import StoreError


@pytest.mark.parametrize("sqlite", [False, True])
async def test_submission_that_fails_after_it_was_announced(make_platform, sqlite):
    """The take that it caused finds nothing and stays parked; the next submission reaches it at once."""
    async with make_platform(sqlite=sqlite) as platform:
        platform.fleet.add(capacity=1)
        take = asyncio.create_task(platform.take())
        await platform.parked()
        submit_of_store = platform.store.submit

        async def full(job, *, idempotency=None, announce=None):
            if announce is not None:
                announce()
            raise StoreError("disk full")

        platform.store.submit = full
        for _ in range(3):
            assert (await platform.call("POST", "/run", json={"input": 1})).status_code == 503
        platform.store.submit = submit_of_store
        job_id = await platform.run()
        assert (await take).json()["id"] == job_id
        assert platform.slots.worker("w1").jobs == 1


@pytest.mark.parametrize("sqlite", [False, True])
async def test_no_wake_up_is_lost(make_platform, sqlite):
    """Bursts of submissions against workers that ask, hang up and ask again: every job is handed out."""
    async with make_platform(sqlite=sqlite) as platform:
        for number in range(3):
            platform.fleet.add(f"w{number}", capacity=2)
        got = []

        async def work(number):
            worker = f"w{number}"
            while len(got) < 60:
                # Every third take is given up by its worker at once.
                take = asyncio.create_task(platform.take(worker, batch=2, holding=True))
                if len(got) % 3 == number:
                    await asyncio.sleep(0)
                    take.cancel()
                done, _ = await asyncio.wait({take}, timeout=20)
                if take in done and not take.cancelled() and take.result().status_code == 200:
                    for job in take.result().json():
                        got.append(job["id"])
                        await platform.done(job["id"], {"output": 1}, worker)

        async def submit():
            return [await platform.run() for _ in range(10)]

        workers = [asyncio.create_task(work(number)) for number in range(3)]
        sent = [job_id for ids in await asyncio.gather(*(submit() for _ in range(6))) for job_id in ids]
        for job_id in sent:
            answer = await platform.call("GET", f"/status-sync/{job_id}?wait=30000")
            assert answer.json()["status"] == "COMPLETED"
        assert set(got) == set(sent)
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)


async def test_several_open_takes_of_one_worker(make_platform):
    """worker-protocol.md §11, 1.6.x: one take while idle, one per slot while busy; its slots follow."""
    async with make_platform() as platform:
        platform.fleet.add()
        first = await platform.run()
        assert (await platform.take()).json()["id"] == first
        assert platform.slots.worker("w1").capacity == 1
        takes = [asyncio.create_task(platform.take(holding=True)) for _ in range(3)]
        await platform.parked(3)
        assert platform.slots.worker("w1").capacity == 3
        ids = [await platform.run() for _ in range(2)]
        done, _ = await asyncio.wait(takes, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 2:
            more, _ = await asyncio.wait(set(takes) - done, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        assert {task.result().json()["id"] for task in done} == set(ids)
        # The last one hangs up; a take that crosses the answers on their way closes nothing.
        for take in takes:
            take.cancel()
        await asyncio.wait(takes)
        await platform.parked(0)
        crossing = asyncio.create_task(platform.take(holding=False))
        await platform.parked()
        statuses = {(await platform.status(job_id))["status"] for job_id in (first, *ids)}
        assert statuses == {"IN_PROGRESS"}
        crossing.cancel()
        await asyncio.wait({crossing})


async def test_slots_follow_the_takes(platform):
    """§6.2: an idle take shows all slots; a busy one never fewer than are known."""
    platform.fleet.add()
    job_id = await platform.run()
    await platform.take(batch=4)
    assert platform.slots.worker("w1").capacity == 4
    await platform.take(batch=2, holding=True)
    assert platform.slots.worker("w1").capacity == 4
    await platform.done(job_id, {"output": 1})
    await platform.take(batch=2)
    assert platform.slots.worker("w1").capacity == 2


async def test_id_that_the_worker_still_lists(platform):
    """§3.2: after a retry by its client a job is not given to the worker that still runs it."""
    platform.fleet.add("w1", capacity=2)
    platform.fleet.add("w2", capacity=1)
    job_id = await platform.run()
    await platform.take("w1")
    await platform.ping(job_id)
    platform.clock.advance(700)
    await platform.service.end_overdue()
    assert (await platform.call("POST", f"/retry/{job_id}")).json()["status"] == "IN_QUEUE"
    await platform.ping(job_id)
    assert (await platform.take("w1", holding=True)).status_code == 204
    assert (await platform.take("w2")).json()["id"] == job_id


async def test_result_of_a_worker_that_lost_the_job(platform):
    """§7.2: it changes nothing, also while the job is queued again or runs elsewhere.

    The contract would let the first result win; with leases it is the lease that counts.
    """
    platform.fleet.add("w1", capacity=1)
    platform.fleet.add("w2", capacity=1)
    job_id = await platform.run()
    await platform.take("w1")
    await platform.pass_time(7)
    assert (await platform.done(job_id, {"output": "late"}, "w1")).status_code == 200
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"
    assert (await platform.take("w2")).json()["id"] == job_id
    assert (await platform.done(job_id, {"output": "late"}, "w1")).status_code == 200
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.done(job_id, {"output": "right"}, "w2")
    assert (await platform.status(job_id))["output"] == "right"


async def test_second_attempt_at_the_same_worker(platform):
    """A result carries the attempt that it was handed out as, so that the store can tell."""
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    seen = []
    apply_of_store = platform.store.apply

    async def noting(job_id, event):
        seen.append(event)
        return await apply_of_store(job_id, event)

    platform.store.apply = noting
    await platform.take()
    await platform.done(job_id, {"error": '{"error": {"retryable": true}}'})
    await platform.take()
    await platform.done(job_id, {"output": 1})
    assert [event.attempt for event in seen] == [1, 2]
    assert (await platform.status(job_id))["output"] == 1


async def test_main_process_that_is_gone(platform):
    """§6.5: its stop poll was closed by its end and does not come back, though heartbeats go on."""
    platform.fleet.add(capacity=1)
    platform.fleet.become("w1", WorkerState.READY)
    job_id = await platform.run()
    await platform.take()
    poll = asyncio.create_task(platform.ask("GET", "/job-stop/w1?gpu=x"))
    link = platform.service._ledger.links["w1"]
    while not link.stop_polls:
        await asyncio.sleep(0.001)
    poll.cancel()
    await asyncio.wait({poll})
    while link.stop_polls:
        await asyncio.sleep(0.001)
    await platform.ping(job_id)
    platform.clock.advance(2)
    await platform.service.kill_stuck()
    assert platform.fleet.killed == []
    platform.clock.advance(2)
    await platform.ping(job_id)
    await platform.service.kill_stuck()
    await platform.fleet.changed.wait()
    assert "stop poll broke" in platform.fleet.killed[0][1]
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"


async def test_stop_poll_that_comes_back(platform):
    """§6.5: the client hangs up after 90 s and asks again at once."""
    platform.fleet.add(capacity=1)
    poll = asyncio.create_task(platform.ask("GET", "/job-stop/w1?gpu=x"))
    while not (link := platform.service._ledger.links.get("w1")) or not link.stop_polls:
        await asyncio.sleep(0.001)
    poll.cancel()
    await asyncio.wait({poll})
    while link.stop_broken_ns is None:
        await asyncio.sleep(0.001)
    assert (await platform.ask("GET", "/job-stop/w1?gpu=x")).status_code == 204
    platform.clock.advance(4)
    await platform.service.kill_stuck()
    assert platform.fleet.killed == []


async def test_defect_of_ours_is_no_storm(platform):
    """§9: anything but 429 would make the worker ask again at once."""
    platform.fleet.add(capacity=1)

    async def defective(*_, **__):
        raise RuntimeError("a defect")

    platform.fleet.took = defective
    assert (await platform.take()).status_code == 429
