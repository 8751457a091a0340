"""The autoscaler's shell: what wakes it, what it does, what it does when the world refuses."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.core.autoscaling import ScaleReason
from pilotlight.domain.worker import Address, Registration, Stage, WorkerState
from pilotlight.gateway.slots import Ask
from pilotlight.ports.fleet import StageReport

ASK = Ask(1)

READY = StageReport(
    stage=Stage.READY, registration=Registration(engine=Address(url="unix:/engine"), max_concurrency=30)
)


async def started(world, count=1):
    """Return once that many workers have been started."""
    async with asyncio.timeout(10):
        while len(world.cluster.running) < count:
            await asyncio.sleep(0)


async def test_a_request_that_begins_to_wait_starts_a_worker_without_a_tick(world):
    world.deploy()
    world.slots.on_demand = world.autoscaler.note_held
    world.autoscaler.start()
    waiting = asyncio.create_task(world.slots.hold("e", ASK, timeout_s=10))
    await started(world)
    (worker,) = world.fleet.workers("e")
    await world.fleet.reported(worker.id, READY)
    world.slots.release_request(await waiting, ASK)


async def test_zero_to_one_to_zero_to_one(world):
    world.deploy(idle_timeout_ms=5000, flashboot=False)
    for _ in range(2):
        waiting = asyncio.create_task(world.slots.hold("e", ASK, timeout_s=10))
        await asyncio.sleep(0)
        assert (await world.autoscaler.look("e")).reason is ScaleReason.FIRST_REQUEST
        (worker,) = world.fleet.workers("e")
        await world.fleet.reported(worker.id, READY)
        world.slots.release_request(await waiting, ASK)
        world.clock.now += 4999
        assert (await world.autoscaler.look("e")).next_ms == world.clock.now + 1
        world.clock.now += 1
        assert (await world.autoscaler.look("e")).reason is ScaleReason.IDLE_TIMEOUT
        assert world.fleet.worker(worker.id).state is WorkerState.STOPPING
        world.cluster.end(worker.id)
        await world.settle()
        assert world.fleet.workers("e") == []


async def test_a_worker_whose_engine_shows_strain_has_no_slots_to_wait_for(world):
    """As configured it would have 29 of 30 free, for which everybody could wait."""
    world.deploy()
    waiting = asyncio.create_task(world.slots.hold("e", ASK, timeout_s=10))
    await asyncio.sleep(0)
    await world.autoscaler.look("e")
    (worker,) = world.fleet.workers("e")
    await world.fleet.reported(worker.id, READY)
    await waiting
    world.slots.limit_worker(worker.id, 1)
    held = asyncio.create_task(world.slots.hold("e", ASK, timeout_s=10))
    await asyncio.sleep(0)
    world.clock.now += 4001
    decision = await world.autoscaler.look("e")
    assert (decision.start, decision.reason) == (1, ScaleReason.QUEUE_DELAY)
    held.cancel()


async def test_zero_to_one_to_frozen_to_one(world):
    world.deploy(idle_timeout_ms=5000)
    world.slots.on_demand = world.autoscaler.note_held
    world.fleet.on_change = world.autoscaler.wake
    world.autoscaler.start()
    waiting = asyncio.create_task(world.slots.hold("e", ASK, timeout_s=10))
    await started(world)
    (worker,) = world.fleet.workers("e")
    await world.fleet.reported(worker.id, READY)
    world.slots.release_request(await waiting, ASK)
    for _ in range(2):
        world.clock.now += 5000
        await world.autoscaler.look("e")
        async with asyncio.timeout(10):
            while world.fleet.worker(worker.id).state is not WorkerState.FROZEN:
                await asyncio.sleep(0)
        world.slots.release_request(await world.slots.hold("e", ASK, timeout_s=10), ASK)
        assert world.fleet.worker(worker.id).state is WorkerState.READY
    assert len(world.cluster.running) == 1


async def test_no_room_is_tried_again_later(world):
    world.deploy(workers_min=1)
    world.memory = 1
    await world.autoscaler.look("e")
    assert world.cluster.running == {}
    assert "e" in world.autoscaler._timers


async def test_a_fixed_engine_and_an_unknown_endpoint_are_left_alone(world):
    assert await world.autoscaler.look("gone") is None


async def test_the_workers_of_a_deleted_endpoint_are_drained(world):
    worker = await world.fleet.start(world.deploy())
    await world.fleet.reported(worker.id, READY)
    request = await world.slots.hold("e", ASK, timeout_s=10)
    del world.endpoints["e"]
    assert await world.autoscaler.look("e") is None
    assert world.fleet.worker(worker.id).state is WorkerState.DRAINING
    world.slots.release_request(request, ASK)
    world.fleet.slots_idle("e")
    await world.settle()
    world.cluster.end(worker.id, 0)
    await world.settle()
    assert world.listener.lost == [(worker.id, "endpoint deleted")]


async def look_while_it_is_deleted(world):
    """A look that has found the endpoint, and reads its load while it is deleted."""
    with pytest.MonkeyPatch.context() as patch:
        demand = world.store.demand

        async def deleted_meanwhile(*arguments, **options):
            del world.endpoints["e"]
            return await demand(*arguments, **options)

        patch.setattr(world.store, "demand", deleted_meanwhile)
        await world.autoscaler.look("e")


async def test_a_worker_that_is_started_while_its_endpoint_is_deleted_ends(world):
    world.deploy(workers_min=1)
    world.fleet.on_change = world.autoscaler.wake
    world.autoscaler.start()
    await look_while_it_is_deleted(world)
    (worker,) = world.fleet.workers("e")
    await world.fleet.reported(worker.id, READY)
    async with asyncio.timeout(10):
        while world.fleet.worker(worker.id).state is not WorkerState.STOPPING:
            await asyncio.sleep(0)


async def test_nothing_is_kept_of_a_deleted_endpoint(world):
    """Its workers end after it, and so does a look that was under way, which would have it back off."""
    world.deploy(workers_min=1)
    world.fleet.on_change = world.autoscaler.wake
    world.autoscaler.start()
    world.cluster.refuse = "broken"
    for _ in range(3):
        await world.autoscaler.look("e")
    assert world.fleet.health("e").retry_ms
    await world.autoscaler.look("e")
    assert len(world.given_up) == 1
    await look_while_it_is_deleted(world)
    assert len(world.given_up) == 1
    await world.autoscaler.look("e")
    assert world.fleet._failures._records == {}
    world.cluster.refuse = None
    deleted = world.deploy()
    await world.fleet.start(deleted)
    del world.endpoints["e"]
    world.cluster.end(next(iter(world.cluster.running)), 1)
    async with asyncio.timeout(10):
        while world.fleet._failures._records:
            await asyncio.sleep(0)
    await world.settle()
    assert not world.fleet.health("e").failures


async def test_who_wakes_it_while_it_is_stopped_leaves_nothing_behind(world):
    """A gateway that follows is told of all jobs of all endpoints."""
    world.autoscaler.wake("e")
    world.autoscaler.start()
    world.autoscaler.wake("e")
    await world.autoscaler.stop()
    world.autoscaler.wake("e")
    assert not world.autoscaler._dirty


async def test_min_workers_start_without_a_request(world):
    world.deploy(workers_min=2)
    assert (await world.autoscaler.look("e")).reason is ScaleReason.BELOW_MINIMUM
    assert len(world.cluster.running) == 2


async def test_many_wakes_become_few_looks_and_the_last_one_is_not_forgotten(world):
    """Thousands of jobs a second wake it thousands of times."""
    world.deploy()
    looks, demand, woken = [], world.store.demand, 0

    async def counted(*arguments, **options):
        looks.append(woken)
        return await demand(*arguments, **options)

    world.store.demand = counted
    world.autoscaler.start()
    while woken < 1000:
        woken += 1
        world.autoscaler.wake("e")
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        while world.autoscaler._resting or looks[-1] != woken:
            await asyncio.sleep(0.001)
    assert looks[0] <= 2, "the first one is at once"
    assert len(looks) < 500


async def test_a_worker_that_becomes_idle_during_a_look_is_looked_at_again(world):
    """1. A look has read that the worker is busy, and waits for the store. 2. The worker becomes idle while the
    timer of an earlier look is still set. 3. The look ends and takes that timer away: without another look,
    nobody would ever end the worker."""
    world.deploy(idle_timeout_ms=1000)
    waiting = asyncio.create_task(world.slots.hold("e", ASK, timeout_s=10))
    await asyncio.sleep(0)
    await world.autoscaler.look("e")
    (worker,) = world.fleet.workers("e")
    await world.fleet.reported(worker.id, READY)
    slots = await waiting
    reading, go_on = asyncio.Event(), asyncio.Event()
    demand = world.store.demand

    async def slow_demand(*arguments, **options):
        reading.set()
        await go_on.wait()
        return await demand(*arguments, **options)

    world.store.demand = slow_demand
    world.autoscaler._look_again("e", world.clock.now + 500)
    world.autoscaler.start()
    world.autoscaler.wake("e")
    await reading.wait()
    world.slots.release_request(slots, ASK)
    world.autoscaler.note_idle("e")
    assert "e" in world.autoscaler._dirty
    go_on.set()
