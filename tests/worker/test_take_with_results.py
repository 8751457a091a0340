"""The worker's loop against a platform that hands out jobs with the answer to results: `job-done-batch?take=N`."""

from __future__ import annotations

import asyncio
import io
import sys

import pytest

from pilotlight.testing.protocol_server import PlatformStub, Refusal
from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.jobs import JobLoop
from pilotlight.worker.log import LogSink
from pilotlight.worker.platform import Platform


class Runner:
    """Answers at once, or when `gate` opens."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self, job, post_chunk):
        await self.gate.wait()
        return [job.payload["input"]]


@pytest.fixture
async def platform():
    stub = PlatformStub(batches=True)
    await stub.start()
    yield stub
    await stub.stop()


@pytest.fixture
async def start(platform):
    """Starts a loop with so many slots; its client is closed after the test."""
    log, clients = LogSink(io.BytesIO()), []

    def started(slots, runner):
        variables = {**platform.environment(), "MODEL_NAME": "m", "MAX_CONCURRENCY": str(slots)}
        config = WorkerConfig.from_environment(variables, python=sys.executable)
        client = Platform(config, log, lambda: None)
        loop = JobLoop(config, client, runner, log, lambda error: None)
        clients.extend([loop, client])
        loop.start()
        return loop

    yield started
    for client in clients:
        await client.close()
    log.close()


def queries(platform, kind):
    return [record.query for record in platform.of_kind(kind)]


async def test_one_take_and_then_results_bring_the_next_job(start, platform):
    for number in range(5):
        await platform.submit(f"j{number}", number)
    start(1, Runner())
    for number in range(5):
        assert await platform.result(f"j{number}") == {"output": [number]}
    assert [query["take"] for query in queries(platform, "done-batch")] == ["1"] * 5
    # The last answer brought none, so it waits for the next one as ever.
    await platform.until(lambda: len(queries(platform, "take")) == 2)
    await platform.submit("later", "x")
    assert await platform.result("later") == {"output": ["x"]}


async def test_an_open_take_gets_what_there_is(start, platform):
    """With free slots a take is open all the time; results ask for nothing then."""
    await platform.submit("a", 1)
    loop = start(2, runner := Runner())
    runner.gate.clear()
    await platform.until(lambda: len(queries(platform, "take")) == 2)
    runner.gate.set()
    assert await platform.result("a") == {"output": [1]}
    await platform.until(lambda: not loop.running)
    assert queries(platform, "done-batch") == []


async def test_a_worker_that_drains_asks_for_none(start, platform):
    runner = Runner()
    runner.gate.clear()
    loop = start(1, runner)
    await platform.submit("a", 1)
    await platform.submit("b", 2)
    await platform.until(lambda: ["a"] in platform.pings)
    draining = asyncio.create_task(loop.drain())
    await asyncio.sleep(0)
    runner.gate.set()
    await draining
    assert platform.results == {"a": {"output": [1]}}
    assert [job["id"] for job in platform.queue] == ["b"]


async def test_a_repetition_asks_for_none(start, platform):
    """What the first try asked for may be on its way."""
    platform.refusals["done-batch"] = Refusal(503, 1)
    await platform.submit("a", 1)
    start(1, Runner())
    assert await platform.result("a") == {"output": [1]}
    assert ["take" in query for query in queries(platform, "done-batch")] == [True, False]
