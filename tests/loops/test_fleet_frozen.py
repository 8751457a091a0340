"""Workers that are stopped in place and go on: what the fleet asks, says and writes, and what may cross it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pilotlight.core.placement import Gpu
from pilotlight.domain.endpoint import EndpointKind, Revision
from pilotlight.domain.worker import Address, Failure, Registration, Stage, WorkerState
from pilotlight.errors import ClusterError, StoreError
from pilotlight.gateway.slots import Ask
from pilotlight.ports.door import DoorError, DoorRefusedError, Kept, Refusal
from pilotlight.ports.fleet import StageReport

from .conftest import GIB

ASK = Ask(1)

OURS = Registration(
    engine=Address(url="unix:/engine"), listener=Address(url="unix:/listener"), max_concurrency=30
)
SERVER = Registration(engine=Address(url="http://127.0.0.1:1"), max_concurrency=30)


async def ready(world, registration=OURS, **changes):
    """A worker of our own program, ready."""
    world.deploy(**changes)
    worker = await world.fleet.start(world.endpoints["e"])
    await world.fleet.reported(worker.id, StageReport(stage=Stage.READY, registration=registration))
    return worker.id


async def frozen(world, **changes):
    worker_id = await ready(world, **changes)
    assert await world.fleet.freeze(worker_id, reason="idle_timeout")
    return worker_id


def state(world, worker_id):
    return world.fleet.worker(worker_id).state


async def ended(world, worker_id):
    await world.settle()
    assert world.fleet.worker(worker_id) is None
    return await world.store.worker(worker_id)


def gpus(count):
    return tuple(Gpu(index=index, name="x", memory_bytes=80 * GIB) for index in range(count))


def on_gpus(count=1, **changes):
    revision = Revision(endpoint_id="e", version=1, model="m", memory_bytes=GIB, gpu_count=count)
    return {"revision": revision} | changes


async def test_a_frozen_worker_has_no_slots_and_comes_back_with_them(world):
    worker_id = await frozen(world)
    assert state(world, worker_id) is WorkerState.FROZEN
    assert world.slots.admit("e", ASK)[1] is None
    await world.settle()
    assert (await world.store.worker(worker_id)).state is WorkerState.FROZEN
    assert await world.fleet.thaw(worker_id)
    assert (state(world, worker_id), world.slots.worker(worker_id).free) == (WorkerState.READY, 2)
    assert world.door.log == [("freeze", "unix:/listener"), ("thaw", "unix:/listener")]
    assert [entry for entry in world.cluster.log if entry[0] in {"freeze", "thaw"}] == []
    assert await world.fleet.thaw(worker_id), "one that is ready already"
    assert len(world.door.log) == 2


async def test_a_thaw_is_a_start_of_its_own_and_frozen_time_a_usage_of_its_own(world):
    worker_id = await frozen(world)
    world.clock.now += 7000
    world.fleet.meter()
    world.clock.now += 500
    world.door.go_on.clear()
    world.door.asked.clear()
    thaw = asyncio.create_task(world.fleet.thaw(worker_id))
    await world.door.asked.wait()
    world.clock.now += 20
    world.door.go_on.set()
    assert await thaw
    await world.settle()
    starts = {start.rung: start for start in await world.store.starts()}
    start = starts["frozen"]
    assert [name for name, _ in start.stages] == ["decision", "ready"]
    assert (start.stages[1][1] - start.stages[0][1], start.outcome, start.memory_bytes) == (20, "ready", GIB)
    usage = await world.store.usage()
    assert [(each.state, each.duration_ms) for each in usage] == [("frozen", 7000), ("frozen", 520)]


async def test_neither_a_freeze_nor_a_thaw_waits_for_the_store(world, monkeypatch):
    """Somebody waits, and nothing hangs on the record: after a crash a frozen worker is ended anyway. What is
    written in the end is what is true then."""
    worker_id = await ready(world)
    put, may_write, written = world.store.put_worker, asyncio.Event(), []

    async def slow(worker):
        await may_write.wait()
        written.append(worker.state)
        await put(worker)

    monkeypatch.setattr(world.store, "put_worker", slow)
    assert await world.fleet.freeze(worker_id, reason="test")
    held = asyncio.create_task(world.slots.hold("e", ASK, timeout_s=60))
    assert await world.fleet.thaw(worker_id)
    assert (await held).worker_id == worker_id
    assert written == []
    may_write.set()
    await world.settle()
    assert written[-1] is WorkerState.READY
    assert (await world.store.worker(worker_id)).state is WorkerState.READY


async def test_what_is_written_late_does_not_undo_the_end(world, monkeypatch):
    """An id may even be in use again by then."""
    worker_id = await ready(world)
    put, may_write = world.store.put_worker, asyncio.Event()

    async def slow(worker):
        if worker.state is WorkerState.FROZEN:
            await may_write.wait()
        await put(worker)

    monkeypatch.setattr(world.store, "put_worker", slow)
    await world.fleet.freeze(worker_id, reason="test")
    await asyncio.sleep(0)
    await world.fleet.kill(worker_id, reason="test")
    await asyncio.sleep(0)
    may_write.set()
    await world.settle()
    assert (await world.store.worker(worker_id)).state is WorkerState.STOPPED


async def test_a_request_that_comes_in_the_middle_of_a_freeze_is_served_after_it(world):
    worker_id = await ready(world)
    world.door.go_on.clear()
    freeze = asyncio.create_task(world.fleet.freeze(worker_id, reason="idle_timeout"))
    await world.door.asked.wait()
    held = asyncio.create_task(world.slots.hold("e", ASK, timeout_s=60))
    thaw = asyncio.create_task(world.fleet.thaw(worker_id))
    await asyncio.sleep(0)
    assert world.door.log == [("freeze", "unix:/listener")], "the thaw waits for the freeze"
    assert world.fleet.frozen() == [], "nobody may end it for its memory now"
    world.door.go_on.set()
    assert await freeze
    assert await thaw
    assert (await held).worker_id == worker_id


async def test_a_busy_worker_is_not_frozen(world):
    worker_id = await ready(world)
    slots = world.slots.admit("e", ASK)[1]
    assert not await world.fleet.freeze(worker_id, reason="test")
    world.slots.release_request(slots, ASK)
    world.listener.rest = False
    assert not world.fleet.freezable(worker_id), "it has something that no slot counts"
    assert (state(world, worker_id), world.door.log) == (WorkerState.READY, [])


@pytest.mark.parametrize("refusal", list(Refusal))
async def test_a_worker_program_that_refuses_goes_on(world, refusal):
    worker_id = await ready(world)
    world.door.answers["freeze"] = DoorRefusedError("not now", refusal)
    assert not await world.fleet.freeze(worker_id, reason="test")
    assert (state(world, worker_id), world.slots.worker(worker_id).free) == (WorkerState.READY, 2)
    assert world.fleet.freezable(worker_id) is (refusal is Refusal.BUSY), (
        "what cannot work is not tried again"
    )


async def test_a_worker_of_which_nobody_knows_whether_it_is_frozen_is_ended(world):
    worker_id = await ready(world)
    world.door.answers["freeze"] = DoorError("no answer")
    assert not await world.fleet.freeze(worker_id, reason="test")
    record = await ended(world, worker_id)
    assert record.state is WorkerState.STOPPED
    assert world.fleet.health("e").failures == 0


async def test_a_worker_that_does_not_come_back_is_ended_and_does_not_count_as_a_failed_start(world):
    worker_id = await frozen(world)
    woken = []
    world.fleet.on_change = woken.append
    world.door.answers["thaw"] = DoorError("the engine does not answer")
    assert not await world.fleet.thaw(worker_id)
    record = await ended(world, worker_id)
    assert (record.state, record.failure.kind) == (WorkerState.FAILED, "thaw_failed")
    assert woken, "another rung is needed"
    health = world.fleet.health("e")
    assert (health.failures, health.retry_ms) == (0, None)
    starts = {start.rung: start for start in await world.store.starts()}
    assert (starts["frozen"].outcome, starts["frozen"].failure.kind) == ("failed", "thaw_failed")


async def test_how_long_a_freeze_and_a_thaw_may_take(world):
    worker_id = await frozen(world)
    assert world.door.timeout_s == pytest.approx(10), "whoever waits for a thaw waits for that, too"
    await world.fleet.thaw(worker_id)
    assert world.door.timeout_s == pytest.approx(1.5)


@pytest.mark.parametrize("registration", [OURS, None])
async def test_a_freeze_that_breaks_leaves_no_worker_that_nobody_wakes_or_ends(world, registration):
    """For instance: no descriptor is left to look into /proc with."""
    kind = EndpointKind.QUEUE if registration is None else EndpointKind.VLLM
    worker_id = await ready(world, registration, kind=kind)
    world.cluster.unstoppable = world.door.answers["freeze"] = OSError("too many open files")
    assert not await world.fleet.freeze(worker_id, reason="test")
    assert (await ended(world, worker_id)).state is WorkerState.STOPPED


async def test_neither_does_a_thaw_that_breaks(world):
    worker_id = await frozen(world)
    world.door.answers["thaw"] = OSError("too many open files")
    assert not await world.fleet.thaw(worker_id)
    record = await ended(world, worker_id)
    assert (record.state, record.failure.kind) == (WorkerState.FAILED, "thaw_failed")


async def test_an_engine_that_slept_may_take_longer_to_bring_its_weights_back(world):
    world.gpus = gpus(1)
    world.door.answers["freeze"] = Kept(memory_bytes=20 * GIB, slept=True)
    world.cluster.gpu_bytes = GIB
    worker_id = await frozen(world, **on_gpus())
    assert world.door.timeout_s == pytest.approx(70)
    (view,) = world.fleet.frozen()
    assert (view.memory_bytes, view.gpu_memory_bytes, view.devices) == (20 * GIB, GIB, (0,))
    await world.fleet.thaw(worker_id)
    assert world.door.timeout_s == pytest.approx(61.5)


@pytest.mark.parametrize("way", ["drain", "kill", "dismiss", "close", "evict"])
async def test_a_frozen_worker_that_is_told_to_end_is_killed_as_it_is(world, way):
    """Deleted endpoints, new revisions and lowered maxima drain. It could not hear SIGTERM."""
    worker_id = await frozen(world)
    world.clock.now += 100
    match way:
        case "drain":
            await world.fleet.drain(worker_id, reason="new_revision")
            assert state(world, worker_id) is WorkerState.STOPPING, "nobody wakes it any more"
        case "kill":
            await world.fleet.kill(worker_id, reason="test")
        case "dismiss":
            await world.fleet.dismiss(reason="the lead is lost")
        case "close":
            await world.fleet.close()
        case _:
            await world.fleet.evict(worker_id, reason="age")
    assert not await world.fleet.thaw(worker_id)
    record = await ended(world, worker_id)
    assert (record.state, record.failure) == (WorkerState.STOPPED, None)
    assert way == "close" or ("kill", worker_id) in world.cluster.log, "the cluster closes with everything"
    usage = await world.store.usage()
    assert sum(each.duration_ms for each in usage if each.state is WorkerState.FROZEN) == 100


@pytest.mark.parametrize("what", ["freeze", "thaw"])
@pytest.mark.parametrize("end", ["drain", "kill", "dismiss", "close", "exit"])
async def test_an_end_does_not_wait_for_a_freeze_or_thaw(world, what, end):
    worker_id = await (ready(world) if what == "freeze" else frozen(world))
    world.door.go_on.clear()
    world.door.asked.clear()
    act = world.fleet.thaw(worker_id) if what == "thaw" else world.fleet.freeze(worker_id, reason="test")
    acting = asyncio.create_task(act)
    await world.door.asked.wait()
    ending = None
    match end:
        case "drain":
            await world.fleet.drain(worker_id, reason="endpoint deleted")
        case "kill":
            await world.fleet.kill(worker_id, reason="test")
        case "dismiss":
            await world.fleet.dismiss(reason="the lead is lost")
        case "close":
            ending = asyncio.create_task(world.fleet.close())
        case _:
            world.cluster.end(worker_id, -9)
    while world.fleet.worker(worker_id) is not None:
        await asyncio.sleep(0)
    world.door.answers[what] = DoorError("connection closed by the engine")
    world.door.go_on.set()
    assert not await acting
    if ending is not None:
        await ending
    record = await ended(world, worker_id)
    assert record.state is (WorkerState.FAILED if end == "exit" else WorkerState.STOPPED)
    assert world.slots.worker(worker_id) is None
    assert world.fleet.health("e").failures == 0


async def test_a_freeze_or_thaw_goes_on_when_its_caller_is_cancelled(world):
    worker_id = await ready(world)
    world.door.go_on.clear()
    freeze = asyncio.create_task(world.fleet.freeze(worker_id, reason="test"))
    await world.door.asked.wait()
    freeze.cancel()
    await asyncio.gather(freeze, return_exceptions=True)
    world.door.go_on.set()
    await world.settle()
    assert len(world.fleet.frozen()) == 1


async def test_nothing_is_frozen_or_thawed_while_the_fleet_ends(world):
    worker_id = await ready(world)
    world.fleet._refusal = "the gateway is stopping"
    assert not world.fleet.freezable(worker_id)
    assert not await world.fleet.freeze(worker_id, reason="test")
    assert not await world.fleet.thaw(worker_id)


async def test_an_engine_that_dies_frozen_is_told_and_forgiven(world):
    """Its worker program is awake and says so; a start that ended well is no reason to pause."""
    worker_id = await frozen(world)
    failure = Failure(kind="engine_exited", cause="killed")
    await world.fleet.reported(worker_id, StageReport(stage=Stage.FAILED, failure=failure))
    assert not await world.fleet.thaw(worker_id)
    world.cluster.end(worker_id, 1)
    record = await ended(world, worker_id)
    assert (record.state, record.failure) == (WorkerState.FAILED, failure)
    assert world.fleet.health("e").failures == 0


async def test_a_worker_program_that_woke_by_itself_is_ready(world):
    worker_id = await frozen(world)
    report = StageReport(stage=Stage.READY, registration=OURS, detail={"thawed_by": "request"})
    await world.fleet.reported(worker_id, report)
    assert (state(world, worker_id), world.slots.worker(worker_id).free) == (WorkerState.READY, 2)
    assert world.fleet.frozen() == []


async def test_a_worker_program_that_says_again_that_it_is_ready_stays_frozen(world):
    """It does so whenever it had not reached us for a while."""
    worker_id = await frozen(world)
    await world.fleet.reported(worker_id, StageReport(stage=Stage.READY, registration=OURS))
    assert (state(world, worker_id), world.slots.worker(worker_id).free) == (WorkerState.FROZEN, 0)


async def test_a_changed_bound_reaches_a_frozen_worker_when_it_is_thawed(world):
    worker_id = await frozen(world)
    world.fleet.resize(replace(world.endpoints["e"], concurrency=5))
    assert world.slots.worker(worker_id).free == 0
    await world.fleet.thaw(worker_id)
    assert world.slots.worker(worker_id).free == 5


async def test_a_store_that_cannot_write_keeps_nobody_waiting(world, monkeypatch):
    async def refuse(_):
        raise StoreError("disk full")

    worker_id = await ready(world)
    monkeypatch.setattr(world.store, "put_worker", refuse)
    assert await world.fleet.freeze(worker_id, reason="test")
    assert await world.fleet.thaw(worker_id)


# Programs that are not ours.


async def test_of_a_foreign_worker_all_is_stopped_and_its_polls_are_not_trusted(world):
    """worker-protocol.md §6.6."""
    worker_id = await ready(world, None, kind=EndpointKind.QUEUE)
    assert await world.fleet.freeze(worker_id, reason="test")
    assert world.cluster.log[-1] == ("freeze", worker_id)
    assert await world.fleet.thaw(worker_id)
    assert world.cluster.log[-1] == ("thaw", worker_id)
    assert (world.listener.thaws, world.door.log) == ([(worker_id, True)], [])


async def test_a_foreign_worker_that_cannot_be_stopped_goes_on_and_is_not_tried_again(world):
    worker_id = await ready(world, None, kind=EndpointKind.QUEUE)
    world.cluster.unstoppable = ClusterError("rootless engines cannot pause")
    assert not await world.fleet.freeze(worker_id, reason="test")
    assert (state(world, worker_id), world.slots.worker(worker_id).free) == (WorkerState.READY, 1)
    assert not world.fleet.freezable(worker_id)


@pytest.mark.parametrize("answer", [None, DoorError("GET /ping was answered 500")])
async def test_a_server_has_to_answer_its_health_check_after_a_thaw(world, answer):
    worker_id = await ready(world, SERVER, kind=EndpointKind.LOAD_BALANCER)
    assert await world.fleet.freeze(worker_id, reason="test")
    world.door.answers["look"] = answer
    assert await world.fleet.thaw(worker_id) is (answer is None)
    assert world.door.log == [("look", "http://127.0.0.1:1")]
    await world.settle()


async def test_a_resumed_worker_that_is_frozen_is_thawed(world):
    worker_id = await ready(world, SERVER, kind=EndpointKind.LOAD_BALANCER)
    await world.fleet.freeze(worker_id, reason="test")
    assert (await world.fleet.resume(world.endpoints["e"], worker_id)).state is WorkerState.READY
    assert world.cluster.log.count(("start", worker_id)) == 1


async def test_a_frozen_worker_is_no_obstacle_to_resuming_another_one(world):
    """It does not count as a worker; the autoscaler ends it when the maximum is passed."""
    endpoint = world.deploy(kind=EndpointKind.LOAD_BALANCER, workers_max=1)
    first = await ready(world, SERVER, kind=EndpointKind.LOAD_BALANCER, workers_max=1)
    await world.fleet.drain(first, reason="idle_timeout")
    world.cluster.end(first)
    await world.settle()
    second = await ready(world, SERVER, kind=EndpointKind.LOAD_BALANCER, workers_max=1)
    with pytest.raises(ClusterError, match="may have 1 workers"):
        await world.fleet.resume(endpoint, first)
    await world.fleet.freeze(second, reason="test")
    assert (await world.fleet.resume(endpoint, first)).id == first
    assert (await world.autoscaler.look("e")).drain == (second,)


async def test_memory_that_nobody_can_look_into_counts_as_promised(world):
    """Containers of another user, say; else no budget would ever end them."""
    world.cluster.kept_bytes = 0
    revision = Revision(endpoint_id="e", version=1, model="m", memory_bytes=3 * GIB)
    worker_id = await ready(world, None, kind=EndpointKind.QUEUE, revision=revision)
    await world.fleet.freeze(worker_id, reason="test")
    assert [view.memory_bytes for view in world.fleet.frozen()] == [3 * GIB]


# Room.


async def test_one_that_cannot_be_ended_holds_up_neither_other_ends_nor_starts(world, monkeypatch):
    """A container whose engine does not answer, say."""
    monkeypatch.setattr("pilotlight.loops.fleet._GONE_S", 0.01)
    stuck, other = await frozen(world), await frozen(world)
    world.cluster.unkillable = {stuck}
    async with asyncio.timeout(10):
        await world.fleet.evict(stuck, reason="age")
        await world.fleet.evict(other, reason="age")
    assert state(world, stuck) is WorkerState.STOPPING
    assert world.fleet.worker(other) is None
    assert world.fleet.frozen() == []
    world.memory = 4 * GIB
    world.cluster.unkillable = set()
    await ended(world, stuck)
    needed = await frozen(world)
    world.cluster.unkillable = {needed}
    world.deploy(revision=Revision(endpoint_id="e", version=1, model="m", memory_bytes=int(2.5 * GIB)))
    async with asyncio.timeout(10):
        worker = await world.fleet.start(world.endpoints["e"])
    assert worker.id in world.cluster.running


async def test_a_frozen_worker_that_is_being_ended_needs_no_more_room_than_before(world):
    """Others would be refused what was theirs a moment ago, and would be tried again seconds later."""
    world.memory = 6 * GIB
    revision = Revision(endpoint_id="e", version=1, model="m", memory_bytes=3 * GIB)
    worker_id = await frozen(world, revision=revision)
    world.cluster.unkillable = {worker_id}
    await world.fleet.drain(worker_id, reason="test")
    assert state(world, worker_id) is WorkerState.STOPPING
    await world.fleet.start(world.endpoints["e"])


async def test_a_thaw_ends_what_is_said_of_missing_room(world):
    world.gpus = gpus(1)
    world.door.answers["freeze"] = Kept(memory_bytes=GIB, slept=True)
    worker_id = await frozen(world, **on_gpus())
    with pytest.raises(ClusterError):
        world.deploy(**on_gpus(2))
        await world.fleet.start(world.endpoints["e"])
    assert world.fleet.health("e").throttled
    await world.fleet.thaw(worker_id)
    assert world.fleet.health("e").throttled is None


async def test_gpus_of_a_frozen_worker_are_given_away_and_then_it_cannot_come_back(world):
    world.gpus = gpus(1)
    world.door.answers["freeze"] = Kept(memory_bytes=GIB, slept=True)
    worker_id = await frozen(world, **on_gpus())
    other = await world.fleet.start(world.endpoints["e"])
    assert other.devices == (0,)
    assert not await world.fleet.thaw(worker_id)
    assert (await ended(world, worker_id)).state is WorkerState.STOPPED
    assert ("thaw", "unix:/listener") not in world.door.log


async def test_a_frozen_worker_that_left_too_much_on_a_gpu_ends_when_it_is_given_away(world):
    """The new engine would find it too full, end, and be tried again in vain."""
    world.gpus = gpus(1)
    world.door.answers["freeze"] = Kept(memory_bytes=GIB, slept=True)
    world.cluster.gpu_bytes = 5 * GIB
    worker_id = await frozen(world, **on_gpus())
    other = await world.fleet.start(world.endpoints["e"])
    assert world.cluster.log[-2:] == [("kill", worker_id), ("start", other.id)]


async def test_gpus_of_a_worker_that_is_being_thawed_are_its_own(world):
    world.gpus = gpus(1)
    world.door.answers["freeze"] = Kept(memory_bytes=GIB, slept=True)
    worker_id = await frozen(world, **on_gpus())
    world.door.go_on.clear()
    world.door.asked.clear()
    thaw = asyncio.create_task(world.fleet.thaw(worker_id))
    await world.door.asked.wait()
    with pytest.raises(ClusterError, match="GPU"):
        await world.fleet.start(world.endpoints["e"])
    await world.fleet.evict(worker_id, reason="age")
    world.door.go_on.set()
    assert await thaw


@pytest.mark.parametrize("registration", [OURS, SERVER])
async def test_a_worker_that_would_keep_the_memory_of_its_gpus_is_not_kept(world, registration):
    world.gpus = gpus(1)
    worker_id = await ready(world, registration, **on_gpus())
    assert world.fleet.freezable(worker_id) is (registration is OURS)
    assert not await world.fleet.freeze(worker_id, reason="test")
    await world.settle()
    assert (world.fleet.worker(worker_id) is None) is (registration is OURS)


async def test_frozen_workers_end_for_one_that_finds_no_room(world):
    """The least recently used first, and no more than needed; the new one is started when they are gone."""
    world.memory = 4 * GIB
    revision = Revision(endpoint_id="e", version=1, model="m", memory_bytes=GIB)
    first = await frozen(world, revision=revision)
    world.clock.now += 1
    second = await frozen(world, revision=revision)
    world.deploy(revision=replace(revision, memory_bytes=2 * GIB))
    worker = await world.fleet.start(world.endpoints["e"])
    order = [entry for entry in world.cluster.log if entry in {("kill", first), ("start", worker.id)}]
    assert order == [("kill", first), ("start", worker.id)]
    assert state(world, second) is WorkerState.FROZEN
    assert (await ended(world, first)).state is WorkerState.STOPPED
    with pytest.raises(ClusterError):
        world.deploy(revision=replace(revision, memory_bytes=4 * GIB))
        await world.fleet.start(world.endpoints["e"])
    assert state(world, second) is WorkerState.FROZEN, "its end would not be enough"
