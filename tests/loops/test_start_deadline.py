"""How long a worker may take to start: 420 s without a sign of life (serverless-api.md §5.4), on the test's clock."""

from __future__ import annotations

import asyncio

import pytest

from pilotlight.domain.worker import Address, DownloadProgress, Registration, Stage, WorkerState
from pilotlight.ports.fleet import StageReport

LIMIT_S = 420
READY = StageReport(stage=Stage.READY, registration=Registration(engine=Address(url="unix:/engine")))


class LoopTime:
    """The event loop's time, which moves when told to."""

    def __init__(self, world, monkeypatch):
        self._world = world
        self._now = asyncio.get_running_loop().time()
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self._now)

    async def pass_by(self, seconds):
        """Let time pass, and all that was due happen."""
        self._now += seconds
        self._world.clock.now += int(seconds * 1000)
        # One turn in which the timer is found to be due, one in which its callback runs.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await self._world.settle()


@pytest.fixture
async def time(world, monkeypatch):
    return LoopTime(world, monkeypatch)


async def starting(world):
    world.deploy()
    return (await world.fleet.start(world.endpoints["e"])).id


async def test_a_silent_start_ends_at_the_limit(world, time):
    worker_id = await starting(world)
    await time.pass_by(LIMIT_S - 1)
    assert world.fleet.worker(worker_id).state is WorkerState.STARTING
    await time.pass_by(2)
    assert world.fleet.worker(worker_id) is None
    failure = world.fleet.health("e").failure
    assert failure.kind == "timeout"
    assert "no progress for 420 s in stage starting" in failure.cause
    assert failure.advice


@pytest.mark.parametrize("stage", [Stage.IMPORTING, Stage.LOADING_WEIGHTS, Stage.WARMING_UP])
async def test_each_new_stage_restarts_the_limit(world, time, stage):
    worker_id = await starting(world)
    await time.pass_by(LIMIT_S - 1)
    await world.fleet.reported(worker_id, StageReport(stage=stage))
    await time.pass_by(LIMIT_S - 1)
    assert world.fleet.worker(worker_id).stage is stage
    await time.pass_by(2)
    assert world.fleet.worker(worker_id) is None
    assert f"in stage {stage}" in world.fleet.health("e").failure.cause


async def test_a_download_may_take_hours_while_it_moves(world, time):
    """Progress within one stage is a sign of life, too, and is shown; its end is no report at all."""
    worker_id = await starting(world)
    for done in range(20):
        progress = DownloadProgress(done_bytes=done, total_bytes=20)
        await world.fleet.reported(worker_id, StageReport(stage=Stage.DOWNLOADING, progress=progress))
        assert world.fleet.worker(worker_id).progress == progress
        await time.pass_by(LIMIT_S - 1)
    assert world.fleet.worker(worker_id).state is WorkerState.STARTING
    await time.pass_by(2)
    assert world.fleet.worker(worker_id) is None
    (start,) = await world.store.starts()
    assert [name for name, _ in start.stages] == ["decision", "placement", "spawned", "downloading", "failed"]


@pytest.mark.parametrize("progress", [DownloadProgress(done_bytes=7, total_bytes=20), None])
async def test_a_download_that_stands_still_ends_at_the_limit(world, time, progress):
    """Also where it says so every second, or that it waits for another one, which keeps its progress in sight."""
    worker_id = await starting(world)
    first = DownloadProgress(done_bytes=7, total_bytes=20)
    await world.fleet.reported(worker_id, StageReport(stage=Stage.DOWNLOADING, progress=first))
    for _ in range(LIMIT_S - 1):
        await time.pass_by(1)
        await world.fleet.reported(worker_id, StageReport(stage=Stage.DOWNLOADING, progress=progress))
    assert world.fleet.worker(worker_id).progress == first
    await time.pass_by(2)
    assert world.fleet.worker(worker_id) is None
    assert "in stage downloading" in world.fleet.health("e").failure.cause


async def test_a_worker_that_waits_for_another_download_lives_while_that_moves(world, time):
    """It reports the bytes that the other one has, between sentences that it waits."""
    worker_id = await starting(world)
    for done in range(20):
        progress = DownloadProgress(done_bytes=done, total_bytes=20)
        await world.fleet.reported(worker_id, StageReport(stage=Stage.DOWNLOADING))
        await world.fleet.reported(worker_id, StageReport(stage=Stage.DOWNLOADING, progress=progress))
        await time.pass_by(LIMIT_S - 1)
    assert world.fleet.worker(worker_id).state is WorkerState.STARTING


async def test_a_report_that_says_nothing_new_does_not_restart_the_limit(world, time):
    worker_id = await starting(world)
    await world.fleet.reported(worker_id, StageReport(stage=Stage.IMPORTING))
    await time.pass_by(LIMIT_S - 1)
    await world.fleet.reported(worker_id, StageReport(stage=Stage.IMPORTING))
    await time.pass_by(2)
    assert world.fleet.worker(worker_id) is None


async def test_progress_is_forgotten_with_its_stage(world, time):
    worker_id = await starting(world)
    progress = DownloadProgress(done_bytes=1)
    await world.fleet.reported(worker_id, StageReport(stage=Stage.DOWNLOADING, progress=progress))
    await world.fleet.reported(worker_id, StageReport(stage=Stage.IMPORTING))
    assert world.fleet.worker(worker_id).progress is None


async def test_a_worker_that_is_ready_has_no_limit(world, time):
    worker_id = await starting(world)
    await world.fleet.reported(worker_id, READY)
    await time.pass_by(100 * LIMIT_S)
    assert world.fleet.worker(worker_id).state is WorkerState.READY
