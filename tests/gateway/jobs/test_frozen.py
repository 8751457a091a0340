"""The worker protocol with workers that stand still for a while (worker-protocol.md §6.6)."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.domain.worker import WorkerState


def link_of(platform, worker="w1"):
    return platform.service._ledger.links[worker]


async def open_polls(platform):
    """A take and a stop poll that stay open."""
    take = asyncio.create_task(platform.take())
    await platform.parked()
    stop = asyncio.create_task(platform.ask("GET", "/job-stop/w1?gpu=x"))
    while not link_of(platform).stop_polls:
        await asyncio.sleep(0.001)
    return take, stop


def freeze(platform):
    platform.fleet.become("w1", WorkerState.FROZEN)
    platform.slots.close_worker("w1", for_good=False)


def thaw(platform, *, whole):
    """As the fleet and its listener do it."""
    platform.fleet.become("w1", WorkerState.READY)
    if whole:
        platform.service.thawed("w1")
    platform.slots.open_worker("ep1", "w1", capacity=1, registration=None)
    platform.service.slots_freed("ep1")


async def test_no_job_is_written_into_a_poll_that_was_open_during_a_freeze(platform):
    """1. A worker is stopped with a take and a stop poll open. 2. A job comes, and stays queued. 3. After the thaw
    both polls get 204. 4. The next take gets the job."""
    platform.fleet.add(capacity=1)
    take, stop = await open_polls(platform)
    freeze(platform)
    job_id = await platform.run()
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"
    assert not take.done()
    thaw(platform, whole=True)
    assert (await take).status_code == (await stop).status_code == 204
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"
    assert (await platform.take()).json()["id"] == job_id


async def test_the_poll_of_a_worker_program_that_stayed_awake_is_used(platform):
    platform.fleet.add(capacity=1)
    take, stop = await open_polls(platform)
    freeze(platform)
    job_id = await platform.run()
    thaw(platform, whole=False)
    assert (await take).json()["id"] == job_id
    stop.cancel()


async def test_a_take_that_comes_while_its_worker_is_frozen_gets_nothing_and_waits(platform):
    """Our own worker program goes on asking, and somebody may let a foreign one go on."""
    platform.fleet.add(capacity=1)
    await platform.ping()
    freeze(platform)
    take = asyncio.create_task(platform.take())
    await platform.parked()
    job_id = await platform.run()
    assert (await platform.status(job_id))["status"] == "IN_QUEUE"
    thaw(platform, whole=False)
    assert (await take).json()["id"] == job_id


async def test_no_sign_of_life_is_expected_of_a_frozen_worker_and_again_after_its_thaw(platform):
    platform.clock.freeze()
    platform.fleet.add(capacity=1)
    await platform.ping()
    take, stop = await open_polls(platform)
    stop.cancel()
    await asyncio.wait({stop})
    while link_of(platform).stop_broken_ns is None:
        await asyncio.sleep(0.001)
    freeze(platform)
    await platform.pass_time(100)
    thaw(platform, whole=True)
    assert (await take).status_code == 204
    await platform.pass_time(3)
    assert platform.fleet.killed == []
    # It stays as mute as it was.
    platform.fleet.changed.clear()
    await platform.pass_time(30)
    await platform.fleet.changed.wait()
    assert [worker_id for worker_id, _ in platform.fleet.killed] == ["w1"]


@pytest.mark.parametrize("released", [False, True])
async def test_a_worker_that_goes_on_with_an_ended_job_is_not_at_rest(platform, released):
    """No slot counts it any more, and it would go on with the job after the thaw."""
    assert platform.service.at_rest("unknown")
    platform.fleet.add(capacity=1)
    job_id = await platform.run()
    assert (await platform.take()).json()["id"] == job_id
    assert not platform.service.at_rest("w1")
    await platform.ping(job_id)
    await platform.call("POST", f"/cancel/{job_id}")
    assert platform.slots.worker("w1").occupied == 0
    await platform.ping(*([] if released else [job_id]))
    assert platform.service.at_rest("w1") is released
