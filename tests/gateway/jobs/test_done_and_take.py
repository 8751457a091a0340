"""The next jobs with the answer to results: `job-done-batch?take=N`, our addition to worker-protocol.md §3.4."""

from __future__ import annotations

import asyncio
import json

import pytest

from pilotlight.domain.worker import WorkerState
from pilotlight.errors import StoreError


async def taken(platform, count, worker="w1"):
    """Ids of jobs that a worker has in its hands."""
    ids = [await platform.run({"input": {"n": n}}) for n in range(count)]
    assert [job["id"] for job in (await platform.take(worker, batch=count)).json()] == ids
    return ids


async def post(platform, ids, take, *, body=None, worker="w1"):
    items = [{"id": job_id, "isStream": True, "body": body or {"output": 1}} for job_id in ids]
    return await platform.ask(
        "POST",
        f"/job-done-batch/{worker}?gpu=x&take={take}",
        worker=worker,
        content=json.dumps(items).encode(),
    )


@pytest.mark.parametrize("sqlite", [False, True])
async def test_the_next_job_comes_with_the_answer(make_platform, sqlite):
    async with make_platform(sqlite=sqlite) as platform:
        platform.fleet.add(capacity=1)
        (first,) = await taken(platform, 1)
        second = await platform.run({"input": {"n": 2}})
        answer = await post(platform, [first], 1)
        assert answer.json() == {
            "results": [{"id": first, "status": 200}],
            "jobs": [{"id": second, "input": {"n": 2}}],
        }
        assert (await platform.status(first))["status"] == "COMPLETED"
        assert (await platform.status(second))["status"] == "IN_PROGRESS"
        assert platform.slots.worker("w1").jobs == 1
        # Nothing is queued: it does not wait.
        assert (await post(platform, [second], 1)).json()["jobs"] == []
        assert platform.slots.worker("w1").jobs == 0
        # And what comes now is not lost.
        third = await platform.run()
        assert (await platform.take()).json()["id"] == third


async def test_no_more_than_slots_are_free(platform):
    """Neither more than are free once the results are in, nor more than were asked for."""
    platform.fleet.add(capacity=4)
    ids = await taken(platform, 3)
    queued = [await platform.run() for _ in range(6)]
    answer = (await post(platform, [ids[0], ids[0], "unknown"], 1000)).json()
    assert [job["id"] for job in answer["jobs"]] == queued[:2]
    answer = (await post(platform, ids[1:], 1)).json()
    assert [job["id"] for job in answer["jobs"]] == queued[2:3]
    assert platform.slots.worker("w1").jobs == 3
    assert (await post(platform, queued[:1], 0)).json()["jobs"] == []


@pytest.mark.parametrize("text", ["-1", "1.5", "1001", "x"])
async def test_a_number_that_is_none(platform, text):
    platform.fleet.add(capacity=1)
    (job_id,) = await taken(platform, 1)
    answer = await post(platform, [job_id], text)
    assert answer.status_code == 400
    assert "take must be an integer between 0 and 1000" in answer.json()["error"]
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"


async def test_results_and_take_reach_the_store_together(platform):
    """The take is asked for before the results are stored, so that one commit can hold both."""
    platform.fleet.add(capacity=1)
    (first,) = await taken(platform, 1)
    second = await platform.run()
    calls, take_of_store, apply_of_store = [], platform.store.take, platform.store.apply_many
    asked = asyncio.Event()

    async def take(*arguments, **named):
        calls.append("take")
        asked.set()
        return await take_of_store(*arguments, **named)

    async def apply_many(events):
        calls.append("results")
        await asyncio.wait_for(asked.wait(), 20)
        return await apply_of_store(events)

    platform.store.take, platform.store.apply_many = take, apply_many
    assert [job["id"] for job in (await post(platform, [first], 1)).json()["jobs"]] == [second]
    assert calls == ["results", "take"]


@pytest.mark.parametrize("state", [WorkerState.DRAINING, WorkerState.STOPPING])
async def test_a_worker_that_is_to_end_gets_none(platform, state):
    platform.fleet.add(capacity=1)
    (first,) = await taken(platform, 1)
    second = await platform.run()
    platform.fleet.become("w1", state)
    assert (await post(platform, [first], 1)).json()["jobs"] == []
    assert (await platform.status(first))["status"] == "COMPLETED"
    assert (await platform.status(second))["status"] == "IN_QUEUE"


async def test_a_gateway_that_stops_hands_out_none(platform):
    platform.fleet.add(capacity=1)
    (first,) = await taken(platform, 1)
    second = await platform.run()
    await platform.service.close()
    assert (await post(platform, [first], 1)).json()["jobs"] == []
    assert (await platform.status(second))["status"] == "IN_QUEUE"


async def test_a_job_that_failed_at_a_worker_does_not_come_back_to_it(platform):
    """It could not tell the attempts apart (worker-protocol.md §3.2); another worker gets it."""
    platform.fleet.add("w1", capacity=1)
    (job_id,) = await taken(platform, 1)
    error = json.dumps({"error": {"message": "gone", "retryable": True}})
    assert (await post(platform, [job_id], 1, body={"error": error})).json()["jobs"] == []
    platform.fleet.add("w2", capacity=1)
    assert (await platform.take("w2")).json()["id"] == job_id


async def test_results_that_cannot_be_stored(platform):
    """503, nothing of them is stored, and the job that was taken goes back with its retry."""
    platform.fleet.add(capacity=1)
    (first,) = await taken(platform, 1)
    second = await platform.run()
    apply_of_store = platform.store.apply_many

    async def broken(_):
        raise StoreError("disk full")

    platform.store.apply_many = broken
    assert (await post(platform, [first], 1)).status_code == 503
    platform.store.apply_many = apply_of_store
    assert (await platform.status(first))["status"] == "IN_PROGRESS"
    platform.fleet.add("w2", capacity=1)
    assert (await platform.take("w2")).json()["id"] == second
    assert "retries" not in await platform.status(second)
    assert platform.slots.worker("w1").jobs == 1


async def test_a_take_that_fails_costs_no_result(platform):
    platform.fleet.add(capacity=1)
    (first,) = await taken(platform, 1)
    second = await platform.run()
    take_of_store = platform.store.take

    async def broken(*_, **__):
        raise StoreError("disk full")

    platform.store.take = broken
    answer = await post(platform, [first], 1)
    platform.store.take = take_of_store
    assert answer.json() == {"results": [{"id": first, "status": 200}], "jobs": []}
    assert (await platform.status(first))["status"] == "COMPLETED"
    assert (await platform.take()).json()["id"] == second
    assert platform.slots.worker("w1").jobs == 1


async def test_jobs_of_a_worker_that_hangs_up_go_back(platform):
    """Its results count; the jobs on their way to it keep their retry."""
    platform.fleet.add(capacity=1)
    (first,) = await taken(platform, 1)
    second = await platform.run()
    take_of_store = platform.store.take
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow(*arguments, **named):
        asked.set()
        await go_on.wait()
        return await take_of_store(*arguments, **named)

    platform.store.take = slow
    posting = asyncio.create_task(post(platform, [first], 1))
    await asked.wait()
    posting.cancel()
    await asyncio.wait({posting})
    link = platform.service.ledger.links["w1"]
    platform.store.take = take_of_store
    while link.hand_outs[first].posts if first in link.hand_outs else False:
        await asyncio.sleep(0.001)
    go_on.set()
    platform.fleet.add("w2", capacity=1)
    job = (await platform.take("w2")).json()
    assert job["id"] == second
    assert (await platform.status(first))["status"] == "COMPLETED"
    assert "retries" not in await platform.status(second)
    assert platform.slots.worker("w1").jobs == 0
