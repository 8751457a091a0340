"""The fleet and workers that are any command: what it asks of them, and what it does not."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.domain.endpoint import EndpointKind, Revision
from pilotlight.domain.worker import Address, Registration, Stage, WorkerState
from pilotlight.errors import ClusterError, NotFoundError
from pilotlight.management.views import failure_view
from pilotlight.ports.fleet import StageReport

ROUTABLE = StageReport(
    stage=Stage.READY, registration=Registration(engine=Address(url="http://127.0.0.1:1"), max_concurrency=2)
)


def deploy(world, kind=EndpointKind.QUEUE, **changes):
    revision = Revision(endpoint_id="e", version=1, model="", command=("prog", "arg"), memory_bytes=1)
    return world.deploy(kind=kind, revision=revision, **changes)


async def test_the_endpoints_command_is_run_in_folders_of_its_own(world):
    worker = await world.fleet.start(deploy(world))
    spec = world.cluster.running[worker.id][0]
    assert (spec.command, spec.private_folders) == (("prog", "arg"), True)


async def test_our_own_program_needs_neither(world):
    worker = await world.fleet.start(world.deploy())
    spec = world.cluster.running[worker.id][0]
    assert (spec.command, spec.private_folders) == (("worker",), False)


async def test_it_needs_neither_as_a_load_balancing_worker(world):
    """With the user's home it finds the launcher of other endpoints."""
    revision = Revision(endpoint_id="e", version=1, model="", command=("/venv/bin/pilotlight", "worker"))
    worker = await world.fleet.start(world.deploy(kind=EndpointKind.LOAD_BALANCER, revision=revision))
    assert not world.cluster.running[worker.id][0].private_folders


async def test_a_learned_capacity_follows_the_endpoints_bound(world):
    endpoint = deploy(world, concurrency=2)
    worker = await world.fleet.start(endpoint)
    await world.fleet.took(worker.id, slots=4)
    assert world.fleet.worker(worker.id).stage is Stage.READY
    assert world.fleet.capacity(worker.id) == 2
    world.fleet.resize(deploy(world, concurrency=8))
    assert world.fleet.capacity(worker.id) == 4


async def test_an_idle_worker_is_signalled_before_its_polls_are_answered(world):
    """worker-protocol.md §6.3, steps 2 and 3."""
    worker = await world.fleet.start(deploy(world))
    await world.fleet.took(worker.id, slots=1)
    world.listener.closed = lambda worker: world.cluster.log.append(("polls answered", worker.id))
    await world.fleet.drain(worker.id, reason="test")
    assert world.cluster.log[-2:] == [("terminate", worker.id), ("polls answered", worker.id)]


async def test_a_busy_worker_is_signalled_when_its_jobs_are_done(world):
    """Releases of the library before 1.7 end at once when signalled, and their job with them
    (worker-protocol.md §11)."""
    worker = await world.fleet.start(deploy(world))
    await world.fleet.took(worker.id, slots=1)
    assert world.slots.reserve_jobs(worker.id, 1) == 1
    await world.fleet.drain(worker.id, reason="test")
    assert world.slots.reserve_jobs(worker.id, 1) == 0
    assert ("terminate", worker.id) not in world.cluster.log
    world.slots.release_jobs(worker.id)
    world.fleet.slots_idle("e")
    await world.settle()
    assert world.cluster.log[-1] == ("terminate", worker.id)


@pytest.mark.parametrize(("wanted_s", "given_s"), [(0, 5), (10, 10)])
async def test_the_time_from_signal_to_kill_may_be_asked_for(world, wanted_s, given_s):
    """worker-protocol.md §8: 5 s for an idle worker, 10 s for one that asked to be replaced (`stopPod`)."""
    worker = await world.fleet.start(deploy(world))
    await world.fleet.took(worker.id, slots=1)
    assert world.slots.reserve_jobs(worker.id, 1) == 1
    await world.fleet.drain(worker.id, reason="test", grace_s=wanted_s)
    world.slots.release_jobs(worker.id)
    signalled_s = asyncio.get_running_loop().time()
    world.fleet.slots_idle("e")
    await world.settle()
    assert world.cluster.log[-1] == ("terminate", worker.id)
    left_s = world.fleet._live[worker.id].deadline.when() - signalled_s
    took_s = asyncio.get_running_loop().time() - signalled_s
    assert given_s <= left_s <= given_s + took_s


async def test_an_end_in_silence_is_explained_by_the_last_line(world):
    async def last_line(worker_id):
        return "ModuleNotFoundError: No module named 'torch'"

    world.fleet._last_line = last_line
    worker = await world.fleet.start(deploy(world))
    world.cluster.end(worker.id, 1)
    await world.settle()
    failure = world.fleet.health("e").failure
    assert failure.cause == "worker ended with exit status 1 in stage starting", "callers may read this"
    assert failure.line == "ModuleNotFoundError: No module named 'torch'"
    assert failure_view(failure).cause == f"{failure.cause}: {failure.line}", "administrators read this"
    assert failure.advice == "see `pilotlight logs e`"


async def test_health_checks_take_a_worker_out_of_rotation_and_back(world):
    """serverless-api.md §3."""
    endpoint = deploy(world, EndpointKind.LOAD_BALANCER)
    worker = await world.fleet.start(endpoint)
    await world.fleet.reported(worker.id, StageReport(stage=Stage.INITIALIZING))
    assert world.fleet.worker(worker.id).state is WorkerState.STARTING
    await world.fleet.reported(worker.id, ROUTABLE)
    assert world.slots.worker(worker.id).free == 2
    await world.fleet.reported(worker.id, StageReport(stage=Stage.UNHEALTHY))
    assert (world.fleet.worker(worker.id).state, world.slots.worker(worker.id).free) == (
        WorkerState.READY,
        0,
    )
    world.fleet.resize(endpoint)
    assert world.slots.worker(worker.id).free == 0, "a changed bound does not bring it back"
    await world.fleet.reported(worker.id, ROUTABLE)
    assert world.slots.worker(worker.id).free == 2
    await world.settle()
    (start,) = await world.store.starts()
    assert [name for name, _ in start.stages] == ["decision", "placement", "spawned", "initializing", "ready"]


async def test_only_its_checks_decide_how_long_a_load_balancing_start_may_take(world):
    """serverless-api.md §3 gives it 8 minutes, more than the boot deadline of workers that take jobs."""
    worker = await world.fleet.start(deploy(world, EndpointKind.LOAD_BALANCER))
    assert world.fleet._live[worker.id].deadline is None
    other = await world.fleet.start(deploy(world, EndpointKind.QUEUE))
    assert world.fleet._live[other.id].deadline is not None


async def test_a_worker_that_was_scaled_down_is_resumed_under_its_id(world):
    endpoint = deploy(world, EndpointKind.LOAD_BALANCER)
    worker = await world.fleet.start(endpoint)
    await world.fleet.reported(worker.id, ROUTABLE)
    world.clock.now += 1000
    assert (await world.fleet.resume(endpoint, worker.id)).state is WorkerState.READY, "it lives"
    await world.fleet.drain(worker.id, reason="idle_timeout")
    world.cluster.end(worker.id)
    await world.settle()
    world.clock.now += 60_000
    again = await world.fleet.resume(endpoint, worker.id)
    assert (again.id, again.state) == (worker.id, WorkerState.STARTING)
    assert again.key_hash != worker.key_hash
    world.clock.now += 500
    world.fleet.meter()
    await world.settle()
    usage = await world.store.usage(worker_id=worker.id)
    assert len({each.sequence for each in usage}) == len(usage)
    assert sum(each.duration_ms for each in usage) == 1500


async def test_a_worker_whose_end_is_still_being_recorded_is_resumed_after_that(world, monkeypatch):
    """Its process is gone and no list shows it, so a caller may well ask for it at this moment."""
    endpoint = deploy(world, EndpointKind.LOAD_BALANCER)
    worker = await world.fleet.start(endpoint)
    await world.fleet.reported(worker.id, ROUTABLE)
    await world.fleet.drain(worker.id, reason="idle_timeout")
    put, may_write = world.store.put_worker, asyncio.Event()

    async def slow(record):
        if record.state is WorkerState.STOPPED:
            await may_write.wait()
        await put(record)

    monkeypatch.setattr(world.store, "put_worker", slow)
    world.cluster.end(worker.id)
    assert world.fleet.worker(worker.id) is None
    resuming = asyncio.create_task(world.fleet.resume(endpoint, worker.id))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not resuming.done()
    may_write.set()
    assert (await resuming).state is WorkerState.STARTING
    assert (await world.store.worker(worker.id)).state is WorkerState.STARTING


async def test_what_failed_or_never_was_is_not_resumed(world):
    endpoint = deploy(world, EndpointKind.LOAD_BALANCER)
    worker = await world.fleet.start(endpoint)
    world.cluster.end(worker.id, 1)
    await world.settle()
    for worker_id in (worker.id, "never"):
        with pytest.raises(NotFoundError):
            await world.fleet.resume(endpoint, worker_id)
    assert world.cluster.running == {}


async def test_two_who_resume_at_once_start_one(world):
    endpoint = deploy(world, EndpointKind.LOAD_BALANCER)
    worker = await world.fleet.start(endpoint)
    await world.fleet.reported(worker.id, ROUTABLE)
    await world.fleet.drain(worker.id, reason="idle_timeout")
    world.cluster.end(worker.id)
    await world.settle()
    first, second = await asyncio.gather(
        world.fleet.resume(endpoint, worker.id), world.fleet.resume(endpoint, worker.id)
    )
    assert first.id == second.id == worker.id
    assert len([entry for entry in world.cluster.log if entry == ("start", worker.id)]) == 2


async def stopped(world, endpoint):
    worker = await world.fleet.start(endpoint)
    await world.fleet.reported(worker.id, ROUTABLE)
    await world.fleet.drain(worker.id, reason="idle_timeout")
    world.cluster.end(worker.id)
    await world.settle()
    return worker.id


async def test_all_who_resume_at_once_share_one_process_whoever_leaves(world):
    """serverless-api.md §3: the loser of the race must not take the winner's worker off the books."""
    endpoint = deploy(world, EndpointKind.LOAD_BALANCER)
    worker_id = await stopped(world, endpoint)
    put, reached, go_on = world.store.put_worker, asyncio.Event(), asyncio.Event()

    async def slow(worker):
        reached.set()
        await go_on.wait()
        await put(worker)

    world.store.put_worker = slow
    first = asyncio.create_task(world.fleet.resume(endpoint, worker_id))
    second = asyncio.create_task(world.fleet.resume(endpoint, worker_id))
    await reached.wait()
    with pytest.raises(ClusterError, match="lives already"):
        await world.fleet.start(endpoint, worker_id=worker_id)
    first.cancel()
    go_on.set()
    assert (await second).id == worker_id
    assert world.fleet.worker(worker_id) is not None
    assert world.cluster.log.count(("start", worker_id)) == 2
    assert world.fleet.health("e").failures == 0


@pytest.mark.parametrize("most", [0, 1])
async def test_a_resumed_worker_counts_against_the_endpoints_most(world, most):
    endpoint = deploy(world, EndpointKind.LOAD_BALANCER, workers_max=most)
    worker_id = await stopped(world, endpoint)
    for _ in range(most):
        await world.fleet.start(endpoint)
    with pytest.raises(ClusterError, match=f"may have {most} workers"):
        await world.fleet.resume(endpoint, worker_id)
    assert world.fleet.worker(worker_id) is None


async def test_nobody_is_resumed_while_starts_pause(world):
    endpoint = deploy(world, EndpointKind.LOAD_BALANCER)
    worker_id = await stopped(world, endpoint)
    for _ in range(3):
        failed = await world.fleet.start(endpoint)
        world.cluster.end(failed.id, 1)
        await world.settle()
    with pytest.raises(ClusterError, match="pause"):
        await world.fleet.resume(endpoint, worker_id)
    world.clock.now = world.fleet.health("e").retry_ms
    assert (await world.fleet.resume(endpoint, worker_id)).id == worker_id


@pytest.mark.parametrize("end", ["kill", "dismiss", "cancel"])
async def test_a_worker_that_is_ended_before_its_process_gets_none(world, end):
    endpoint = deploy(world)
    put, reached, go_on = world.store.put_worker, asyncio.Event(), asyncio.Event()

    async def slow(worker):
        reached.set()
        await go_on.wait()
        await put(worker)

    world.store.put_worker = slow
    starting = asyncio.create_task(world.fleet.start(endpoint))
    await reached.wait()
    (worker,) = world.fleet.workers("e")
    match end:
        case "kill":
            await world.fleet.kill(worker.id, reason="test")
        case "dismiss":
            await world.fleet.dismiss(reason="the lead is lost")
        case _:
            starting.cancel()
    go_on.set()
    with pytest.raises((ClusterError, asyncio.CancelledError)):
        await starting
    await world.settle()
    assert ("start", worker.id) not in world.cluster.log
    assert (world.fleet.workers("e"), world.fleet.health("e").failures) == ([], 0)
    assert (await world.store.worker(worker.id)).state is WorkerState.STOPPED


async def test_nothing_starts_from_dismissal_to_recovery(world):
    endpoint = deploy(world)
    await world.fleet.dismiss(reason="the lead is lost")
    with pytest.raises(ClusterError, match="the lead is lost"):
        await world.fleet.start(endpoint)
    await world.fleet.recover()
    await world.fleet.start(endpoint)


async def test_a_busy_worker_whose_time_is_over_is_signalled_before_it_is_killed(world):
    """worker-protocol.md §6.3: SIGTERM and answered polls, then the grace, then SIGKILL."""
    worker = await world.fleet.start(deploy(world))
    await world.fleet.took(worker.id, slots=1)
    assert world.slots.reserve_jobs(worker.id, 1) == 1
    world.listener.closed = lambda worker: world.cluster.log.append(("polls answered", worker.id))
    await world.fleet.drain(worker.id, reason="test")
    live = world.fleet._live[worker.id]
    live.deadline._callback(live)
    await world.settle()
    assert world.cluster.log[-2:] == [("terminate", worker.id), ("polls answered", worker.id)]
    assert live.worker.state is WorkerState.STOPPING
    live.deadline._callback(live)
    await world.settle()
    assert ("kill", worker.id) in world.cluster.log


async def test_a_raised_bound_reaches_a_load_balancing_worker_that_lives(world):
    worker = await world.fleet.start(deploy(world, EndpointKind.LOAD_BALANCER, concurrency=2))
    many = Registration(engine=Address(url="http://127.0.0.1:1"), max_concurrency=1_000_000)
    await world.fleet.reported(worker.id, StageReport(stage=Stage.READY, registration=many))
    assert world.fleet.capacity(worker.id) == 2
    world.fleet.resize(deploy(world, EndpointKind.LOAD_BALANCER, concurrency=5))
    assert world.fleet.capacity(worker.id) == 5
