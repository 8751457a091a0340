"""The fleet: states, drains, failures and accounts of workers, on a cluster of paper."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import structlog

from pilotlight.core.autoscaling import ScaleReason
from pilotlight.domain.key import hash_secret
from pilotlight.domain.worker import Address, Failure, Registration, Stage, WorkerState
from pilotlight.errors import ClusterError, StoreError
from pilotlight.gateway.slots import Ask
from pilotlight.ports.fleet import StageReport

ASK = Ask(1)

REGISTRATION = Registration(engine=Address(url="unix:/engine"), max_concurrency=30)
READY = StageReport(stage=Stage.READY, registration=REGISTRATION)


async def ready_worker(world):
    worker = await world.fleet.start(world.endpoints["e"])
    await world.fleet.reported(worker.id, READY)
    return worker.id


async def test_a_worker_is_on_record_before_its_process_and_ready_once_it_registers(world):
    world.deploy()
    worker = await world.fleet.start(world.endpoints["e"])
    assert [(w.state, w.process is not None) for w in await world.store.workers()] == [("starting", True)]
    await world.fleet.reported(worker.id, StageReport(stage=Stage.IMPORTING))
    await world.fleet.reported(worker.id, READY)
    assert world.fleet.worker(worker.id).state is WorkerState.READY
    assert world.slots.worker(worker.id).capacity == 2, "the endpoint's concurrency bounds the worker's own"
    await world.settle()
    (start,) = await world.store.starts()
    assert [name for name, _ in start.stages] == ["decision", "placement", "spawned", "importing", "ready"]
    assert start.outcome == "ready"


async def test_only_the_workers_own_credential_opens_its_routes(world):
    world.deploy()
    worker = await world.fleet.start(world.endpoints["e"])
    secret = world.cluster.running[worker.id][0].env["SECRET"]
    assert world.fleet.authenticate("e", worker.id, hash_secret(secret)).id == worker.id
    assert world.fleet.authenticate("other", worker.id, hash_secret(secret)) is None
    assert world.fleet.authenticate("e", worker.id, hash_secret(secret + "x")) is None
    assert world.fleet.authenticate("e", "unknown", hash_secret(secret)) is None
    assert secret not in repr(world.cluster.running[worker.id][0])


async def test_the_first_take_makes_a_job_worker_ready(world):
    """worker-protocol.md §6.1."""
    world.deploy(concurrency=8)
    worker = await world.fleet.start(world.endpoints["e"])
    await world.fleet.took(worker.id, slots=4)
    assert world.fleet.worker(worker.id).state is WorkerState.READY
    assert world.slots.reserve_jobs(worker.id, 9) == 4


async def test_a_busy_worker_is_told_to_end_only_when_its_last_slot_is_free(world):
    world.deploy()
    worker_id = await ready_worker(world)
    taken = world.slots.admit("e", ASK)[1]
    await world.fleet.drain(worker_id, reason="test")
    assert world.fleet.worker(worker_id).state is WorkerState.DRAINING
    assert ("terminate", worker_id) not in world.cluster.log
    world.slots.release_request(taken, ASK)
    world.fleet.slots_idle("e")
    await world.settle()
    assert ("terminate", worker_id) in world.cluster.log
    world.cluster.end(worker_id)
    await world.settle()
    (record,) = await world.store.workers(living=False)
    assert (record.state, record.failure, record.ended_ms) == (WorkerState.STOPPED, None, world.clock.now)
    assert world.fleet.health("e").failures == 0


async def test_usage_intervals_touch_and_cover_the_life_of_a_worker(world):
    world.deploy()
    begin = world.clock.now
    worker = await world.fleet.start(world.endpoints["e"])
    world.clock.now += 2000
    await world.fleet.reported(worker.id, READY)
    world.clock.now += 60_000
    world.fleet.meter()
    world.clock.now += 500
    await world.fleet.drain(worker.id, reason="test")
    world.clock.now += 300
    world.cluster.end(worker.id)
    await world.settle()
    usage = await world.store.usage()
    assert [(each.state, each.duration_ms) for each in usage] == [
        ("starting", 2000), ("ready", 60_000), ("ready", 500), ("stopping", 300),
    ]  # fmt: skip
    assert all(a.end_ms == b.start_ms for a, b in itertools.pairwise(usage))
    assert (usage[0].start_ms, usage[-1].end_ms) == (begin, world.clock.now)


async def test_three_failed_starts_pause_the_endpoint_with_the_reason(world):
    world.deploy()
    failure = Failure(
        kind="unknown_architecture", cause="Model architectures ['X'] are not supported", advice="choose"
    )
    for number in (1, 2, 3):
        assert world.fleet.health("e").retry_ms is None
        worker = await world.fleet.start(world.endpoints["e"])
        await world.fleet.reported(worker.id, StageReport(stage=Stage.FAILED, failure=failure))
        world.cluster.end(worker.id, 1)
        await world.settle()
        assert world.fleet.health("e").failures == number
    health = world.fleet.health("e")
    assert (health.failure, health.retry_ms) == (failure, world.clock.now + 30_000)
    world.slots.on_demand = world.autoscaler.wake
    waiting = asyncio.create_task(world.slots.hold("e", ASK, timeout_s=5))
    await asyncio.sleep(0)
    decision = await world.autoscaler.look("e")
    assert decision.reason is ScaleReason.BACKING_OFF
    assert world.given_up == [("e", world.clock.now + 30_000)]
    waiting.cancel()
    world.clock.now += 30_001
    assert (await world.autoscaler.look("e")).reason is not ScaleReason.BACKING_OFF
    await asyncio.gather(waiting, return_exceptions=True)


async def test_the_pause_doubles_and_ends_with_a_worker_that_becomes_ready(world):
    world.deploy()
    pauses = []
    for _ in range(5):
        worker = await world.fleet.start(world.endpoints["e"])
        world.cluster.end(worker.id, 1)
        await world.settle()
        retry_ms = world.fleet.health("e").retry_ms
        pauses.append(retry_ms and retry_ms - world.clock.now)
    assert pauses == [None, None, 30_000, 60_000, 120_000]
    await ready_worker(world)
    assert world.fleet.health("e").retry_ms is None


async def test_a_worker_that_dies_by_itself_is_failed_and_its_work_lost(world):
    world.deploy()
    worker_id = await ready_worker(world)
    world.cluster.end(worker_id, -11)
    await world.settle()
    assert world.listener.lost == [(worker_id, "worker ended with signal 11 in stage ready")]
    assert world.fleet.worker(worker_id) is None
    assert world.slots.worker(worker_id) is None


async def test_no_room_is_said_and_is_not_a_failed_start(world):
    world.deploy()
    world.memory = 1024**3
    with pytest.raises(ClusterError, match="GiB"):
        await world.fleet.start(world.endpoints["e"])
    health = world.fleet.health("e")
    assert health.failures == 0
    assert "GiB" in health.throttled


async def test_a_process_that_cannot_be_spawned_is_a_failed_start(world):
    world.deploy()
    world.cluster.refuse = "no such program"
    with pytest.raises(ClusterError):
        await world.fleet.start(world.endpoints["e"])
    assert world.fleet.health("e").failures == 1
    assert [w.state for w in await world.store.workers(living=False)] == ["failed"]


@pytest.mark.parametrize(("running", "charged"), [(True, [4000, 1000]), (False, [4000])])
async def test_leftovers_of_an_earlier_life_are_swept_and_accounted_for(world, running, charged):
    """Until they were found running; one that had ended meanwhile, until it was last known to live."""
    world.deploy()
    worker = await world.fleet.start(world.endpoints["e"])
    world.clock.now += 4000
    world.fleet.meter()
    await world.settle()
    world.clock.now += 1000
    later = type(world)(clock=world.clock, store=world.store)
    later.cluster.leftovers = {worker.id} if running else set()
    await later.fleet.recover()
    assert ("sweep", (worker.id,)) in later.cluster.log
    assert [each.duration_ms for each in await world.store.usage()] == charged
    assert await world.store.workers() == []
    (ended,) = await world.store.workers(living=False)
    assert ended.ended_ms - ended.created_ms == sum(charged)
    world.cluster.running.clear()


async def test_close_leaves_no_worker_and_starts_no_other(world):
    world.deploy()
    await ready_worker(world)
    await world.fleet.start(world.endpoints["e"])
    await world.fleet.close()
    assert world.cluster.running == {}
    with pytest.raises(ClusterError, match="stopping"):
        await world.fleet.start(world.endpoints["e"])


async def test_a_report_does_not_lengthen_the_grace_of_a_worker_that_was_told_to_end(world):
    """The worker program reports `draining` right after SIGTERM; that once disarmed the SIGKILL behind it."""
    world.deploy()
    worker_id = await ready_worker(world)
    await world.fleet.drain(worker_id, reason="test")
    deadline = world.fleet._live[worker_id].deadline
    await world.fleet.reported(worker_id, StageReport(stage=Stage.DRAINING))
    assert world.fleet._live[worker_id].deadline is deadline
    assert not deadline.cancelled()


@pytest.mark.parametrize("stage", [Stage.FAILED, Stage.DRAINING])
async def test_a_worker_that_fails_or_leaves_gets_no_more_requests(world, stage):
    world.deploy()
    worker_id = await ready_worker(world)
    await world.fleet.reported(worker_id, StageReport(stage=stage))
    assert world.slots.admit("e", ASK)[1] is None
    assert world.fleet._live[worker_id].deadline is not None


async def test_a_worker_drained_while_it_is_being_spawned_is_told_to_end(world):
    world.deploy()
    spawned, go_on = asyncio.Event(), asyncio.Event()
    start = world.cluster.start

    async def slow_start(spec, on_exit):
        spawned.set()
        await go_on.wait()
        return await start(spec, on_exit)

    world.cluster.start = slow_start
    starting = asyncio.create_task(world.fleet.start(world.endpoints["e"]))
    await spawned.wait()
    (worker,) = world.fleet.workers("e")
    await world.fleet.drain(worker.id, reason="deleted")
    go_on.set()
    await starting
    assert world.cluster.log[-1] == ("terminate", worker.id)
    assert world.fleet._live[worker.id].deadline is not None


async def test_a_store_that_cannot_write_neither_keeps_workers_alive_nor_loses_usage(world, monkeypatch):
    world.deploy()
    worker_id = await ready_worker(world)

    async def refuse(*_):
        raise StoreError("disk full")

    put, add = world.store.put_worker, world.store.add_usage
    monkeypatch.setattr(world.store, "put_worker", refuse)
    monkeypatch.setattr(world.store, "add_usage", refuse)
    world.clock.now += 1000
    await world.fleet.drain(worker_id, reason="test")
    assert ("terminate", worker_id) in world.cluster.log
    world.clock.now += 500
    world.cluster.end(worker_id)
    await world.settle()
    assert await world.store.usage() == []
    monkeypatch.setattr(world.store, "put_worker", put)
    monkeypatch.setattr(world.store, "add_usage", add)
    world.fleet.meter()
    await world.settle()
    assert [each.duration_ms for each in await world.store.usage()] == [1000, 500]


async def test_a_start_that_cannot_be_recorded_is_a_warning_and_no_defect(world, monkeypatch):
    async def refuse(*_):
        raise StoreError("the server is gone")

    monkeypatch.setattr(world.store, "put_start", refuse)
    world.deploy()
    with structlog.testing.capture_logs() as lines:
        await ready_worker(world)
        worker = await world.fleet.start(world.endpoints["e"])
        world.cluster.end(worker.id)
        await world.settle()
    told = [(line["event"], line["log_level"]) for line in lines if line["log_level"] != "info"]
    assert told.count(("start_not_recorded", "warning")) == 2
    assert all(level == "warning" for _, level in told)


async def test_old_crashes_are_forgotten(world):
    world.deploy()
    world.cluster.end(await ready_worker(world), -9)
    await world.settle()
    assert world.fleet.health("e").failures == 1
    world.clock.now += 600_001
    assert world.fleet.health("e").failures == 0
    await ready_worker(world)
    assert world.fleet.health("e").failure is None
