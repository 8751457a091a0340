"""Health checks of load-balancing workers (serverless-api.md §3): what is asked, told, and given up."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.domain.endpoint import EndpointKind, Revision
from pilotlight.domain.worker import Address, DownloadProgress, Stage, WorkerState
from pilotlight.gateway.slots import Ask
from pilotlight.loops.health_checks import CheckOutcome, HealthChecker
from pilotlight.ports.fleet import StageReport
from pilotlight.settings import LoadBalancerSettings

ASK = Ask(1)


class Checked:
    """A worker whose answers come from a list; the last one is repeated."""

    def __init__(self, world, answers, **settings):
        self.world = world
        self.answers = list(answers)
        self.asked = []
        self.enough = asyncio.Event()
        self.checker = HealthChecker(
            check=self.check,
            address=lambda worker_id: Address(url=f"http://{worker_id}"),
            busy=lambda _: False,
            fleet=world.fleet,
            clock=world.clock,
            settings=LoadBalancerSettings(check_interval_ms=1, **settings),
        )
        world.listener.spawned = self.checker.watch
        world.listener.ended, ended = self.ended, world.listener.ended
        self._ended = ended

    async def check(self, address, path):
        self.asked.append((address.url, path))
        self.world.clock.now += 1000
        status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if len(self.answers) == 1 and len(self.asked) > 20:
            self.enough.set()
        return CheckOutcome(status=status, silent=False, detail=f"status {status}")

    async def ended(self, worker, reason):
        self.checker.forget(worker.id)
        await self._ended(worker, reason)

    async def start(self):
        revision = Revision(
            endpoint_id="e", version=1, model="", command=("p",), env={"HEALTH_CHECK_PATH": "/up"}
        )
        endpoint = self.world.deploy(kind=EndpointKind.LOAD_BALANCER, revision=revision)
        return (await self.world.fleet.start(endpoint)).id


async def gone(world, worker_id):
    async with asyncio.timeout(20):
        while world.fleet.worker(worker_id) is not None:
            await asyncio.sleep(0)
    await world.settle()


async def test_a_worker_becomes_ready_with_its_first_200(world):
    checked = Checked(world, [None, None, 204, 200])
    worker_id = await checked.start()
    async with asyncio.timeout(20):
        await checked.enough.wait()
    assert world.fleet.worker(worker_id).state is WorkerState.READY
    assert checked.asked[0] == (f"http://{worker_id}", "/up")
    assert world.slots.worker(worker_id).registration.engine.url == f"http://{worker_id}"
    await checked.checker.stop()


async def test_a_worker_whose_port_never_answers_is_ended(world):
    """§3: terminated after 8 min."""
    checked = Checked(world, [None])
    worker_id = await checked.start()
    begin = world.clock.now
    await gone(world, worker_id)
    assert world.clock.now - begin >= 480_000
    failure = world.fleet.health("e").failure
    assert (failure.kind, failure.cause) == ("unhealthy", "unhealthy for 480 s: status None")
    assert "GET /up" in failure.advice
    await checked.checker.stop()


async def test_a_worker_whose_image_is_being_fetched_has_its_time_after_that(world):
    """A pull that takes longer than a server may; but one that stands still is given up like a silent server."""
    checked = Checked(world, [None])
    worker_id = await checked.start()
    begin, reports = world.clock.now, 30
    for number in range(reports):
        progress = DownloadProgress(done_bytes=number, total_bytes=None)
        await world.fleet.reported(worker_id, StageReport(stage=Stage.DOWNLOADING, progress=progress))
        seen, world.clock.now = len(checked.asked), world.clock.now + 60_000
        async with asyncio.timeout(20):
            # A check under way may have begun before; the second has not.
            while len(checked.asked) < seen + 2:
                await asyncio.sleep(0)
    assert world.fleet.worker(worker_id) is not None
    await gone(world, worker_id)
    assert world.clock.now - begin >= reports * 60_000 + 400_000
    await checked.checker.stop()


async def test_a_fetched_image_does_not_leave_a_worker_without_a_deadline(world):
    checked = Checked(world, [None])
    worker_id = await checked.start()
    progress = DownloadProgress(done_bytes=1, total_bytes=None)
    await world.fleet.reported(worker_id, StageReport(stage=Stage.DOWNLOADING, progress=progress))
    await world.fleet.reported(worker_id, StageReport(stage=Stage.STARTING))
    assert world.fleet.worker(worker_id).stage is Stage.STARTING
    await gone(world, worker_id)
    assert world.fleet.health("e").failure.kind == "unhealthy"
    await checked.checker.stop()


async def test_a_worker_that_initializes_has_longer_but_not_for_ever(world):
    checked = Checked(world, [204], initializing_s=1000)
    worker_id = await checked.start()
    begin = world.clock.now
    await gone(world, worker_id)
    assert world.clock.now - begin >= 1_000_000
    assert world.fleet.health("e").failure.kind == "timeout"
    await checked.checker.stop()


async def test_a_worker_that_says_now_this_now_that_is_ended_too(world):
    checked = Checked(world, [204, 503] * 1000, initializing_s=1000)
    worker_id = await checked.start()
    begin = world.clock.now
    await gone(world, worker_id)
    assert world.clock.now - begin >= 1_000_000
    assert world.fleet.health("e").failure.kind == "timeout"
    await checked.checker.stop()


@pytest.mark.parametrize("status", [204, 503])
async def test_a_worker_out_of_rotation_does_not_count_as_healthy(world, status):
    checked = Checked(world, [200, status])
    worker_id = await checked.start()
    async with asyncio.timeout(20):
        await checked.enough.wait()
    assert world.fleet.worker(worker_id).state is WorkerState.READY
    assert world.fleet.worker(worker_id).out_of_rotation
    await checked.checker.stop()


async def test_a_ready_worker_that_stays_unhealthy_is_ended_as_crashed(world):
    checked = Checked(world, [200, 500], unhealthy_s=100)
    worker_id = await checked.start()
    await gone(world, worker_id)
    (record,) = await world.store.workers(living=False)
    assert (record.state, record.failure.kind) == (WorkerState.FAILED, "unhealthy")
    assert record.ready_ms is not None
    await checked.checker.stop()


async def test_a_worker_out_of_rotation_shows_it(world):
    checked = Checked(world, [200, 500])
    worker_id = await checked.start()
    async with asyncio.timeout(20):
        await checked.enough.wait()
    worker = world.fleet.worker(worker_id)
    assert (worker.state, worker.stage) == (WorkerState.READY, Stage.UNHEALTHY)
    assert world.slots.admit("e", ASK)[1] is None
    await checked.checker.stop()


async def test_a_draining_worker_is_asked_no_more(world):
    checked = Checked(world, [200])
    worker_id = await checked.start()
    async with asyncio.timeout(20):
        await checked.enough.wait()
    task = checked.checker._tasks[worker_id]
    await world.fleet.drain(worker_id, reason="test")
    await asyncio.wait_for(task, 20)
    await checked.checker.stop()
