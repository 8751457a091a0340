"""What is kept of a stream is bounded (`limits.stream_bytes`), and nothing of it is lost (serverless-api.md §2.8)."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from .conftest import ENDPOINT


@pytest.fixture(params=["memory", "sqlite"])
async def platform(make_platform, request):
    """One whose streams hold 1,000 bytes, with a worker."""
    limits = {"stream_bytes": 1_000}
    async with make_platform(limits=limits, sqlite=request.param == "sqlite") as made:
        made.fleet.add(capacity=1)
        yield made


async def running(platform):
    job_id = await platform.run()
    assert (await platform.take()).json()["id"] == job_id
    return job_id


async def read(platform, job_id, query=""):
    answer = (await platform.call("GET", f"/stream/{job_id}{query}")).json()
    return [chunk["output"] for chunk in answer["stream"]]


async def test_a_stream_that_nobody_reads_fails_its_job(platform):
    job_id = await running(platform)
    for _ in range(10):
        assert (await platform.chunk(job_id, "x" * 100)).status_code == 200
    job = await platform.status(job_id)
    assert job["status"] == "FAILED"
    assert "nobody reads the stream" in job["error"]
    assert len(await read(platform, job_id)) == 8


async def test_of_a_long_stream_that_is_read_the_oldest_is_forgotten(platform):
    """Every chunk reaches its reader; for readers with a cursor about the bound is kept."""
    job_id = await running(platform)
    got = []
    for number in range(100):
        await platform.chunk(job_id, f"{number:0100}")
        got += await read(platform, job_id)
    assert [int(value) for value in got] == list(range(100))
    kept = [int(value) for value in await read(platform, job_id, "?cursor=0")]
    assert kept == list(range(100 - len(kept), 100))
    assert len(kept) <= 2 * 9
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"


async def test_what_waits_for_its_reader_is_never_forgotten(platform):
    job_id = await running(platform)
    for number in range(8):
        await platform.chunk(job_id, f"{number:0100}")
    got = await read(platform, job_id)
    for number in range(8, 15):
        await platform.chunk(job_id, f"{number:0100}")
    got += await read(platform, job_id)
    assert [int(value) for value in got] == list(range(15))


# Readers that leave


@contextlib.contextmanager
def leaving(platform, operation="drain_chunks"):
    """A reader whose client is gone as soon as the store has answered; yields what tells so."""
    gone = asyncio.get_running_loop().create_future()
    original = getattr(platform.store, operation)

    async def then_gone(*arguments, **named):
        found = await original(*arguments, **named)
        if not gone.done():
            gone.set_result(None)
        return found

    setattr(platform.store, operation, then_gone)
    try:
        yield gone
    finally:
        setattr(platform.store, operation, original)


async def leave(platform, job_id, operation="drain_chunks"):
    """Read, and be gone before the answer."""
    with leaving(platform, operation) as gone:
        await platform.service.streams.read(ENDPOINT, job_id, hold_s=0, gone=gone)
        assert gone.done()


async def test_a_reader_that_leaves_before_its_answer_loses_nothing(platform):
    """§2.8: prefer losing nothing. However often it happens, and with what came meanwhile, in order."""
    job_id = await running(platform)
    for number in range(3):
        await platform.chunk(job_id, f"a{number}")
        await leave(platform, job_id)
    assert await read(platform, job_id) == ["a0", "a1", "a2"]
    assert await read(platform, job_id, "?wait=1000") == []


@pytest.mark.parametrize("operation", ["drain_chunks", "has_chunks"])
async def test_a_reader_that_leaves_before_the_last_answer_loses_nothing(platform, operation):
    """§2.8: a terminal status comes with every remaining chunk, also at the second try."""
    job_id = await running(platform)
    await platform.chunk(job_id, "a")
    await platform.done(job_id, {"output": []}, stream=True)
    await leave(platform, job_id, operation)
    answer = (await platform.call("GET", f"/stream/{job_id}")).json()
    assert answer == {"status": "COMPLETED", "stream": [{"output": "a"}]}


async def test_a_reader_that_leaves_a_cancelled_stream_has_not_seen_its_end(platform):
    """§2.8: 404 follows 60 s after an empty CANCELLED answer; it had none, and there are chunks left."""
    job_id = await running(platform)
    await platform.chunk(job_id, "a")
    await platform.call("POST", f"/cancel/{job_id}")
    await leave(platform, job_id)
    platform.clock.advance(61)
    answer = await platform.call("GET", f"/stream/{job_id}")
    assert (answer.status_code, answer.json()) == (200, {"status": "CANCELLED", "stream": [{"output": "a"}]})


async def test_another_reader_that_waits_gets_what_one_left_behind(platform):
    """§2.8: at once, and not after its hold, though there was nothing when it looked."""
    job_id = await running(platform)
    await platform.chunk(job_id, "a")
    gone = asyncio.get_running_loop().create_future()
    drain, looked, others = platform.store.drain_chunks, asyncio.Event(), []

    async def drain_beside_another(*arguments, **named):
        found = await drain(*arguments, **named)
        if found[1] and not gone.done():
            others.append(asyncio.create_task(platform.call("GET", f"/stream/{job_id}?wait=300000")))
            await looked.wait()
            gone.set_result(None)
        looked.set()
        return found

    platform.store.drain_chunks = drain_beside_another
    await platform.service.streams.read(ENDPOINT, job_id, hold_s=0, gone=gone)
    assert (await others[0]).json()["stream"] == [{"output": "a"}]


async def test_what_one_left_behind_counts_as_unread(platform):
    """`limits.stream_bytes`: readers that come and leave do not make room."""
    job_id = await running(platform)
    for number in range(8):
        await platform.chunk(job_id, f"{number:0100}")
        await leave(platform, job_id)
    assert (await platform.status(job_id))["status"] == "IN_PROGRESS"
    await platform.chunk(job_id, "x" * 100)
    job = await platform.status(job_id)
    assert (job["status"], "nobody reads the stream" in job["error"]) == ("FAILED", True)
    assert [int(value) for value in await read(platform, job_id)] == list(range(8))


async def test_a_reader_that_leaves_when_its_worker_is_lost_gets_the_new_stream(platform):
    """worker-protocol.md §7.2: nothing of the first attempt comes back into the second."""
    platform.fleet.add("w2", capacity=1)
    job_id = await running(platform)
    await platform.chunk(job_id, "old")
    drain = platform.store.drain_chunks

    async def lost_meanwhile(*arguments, **named):
        platform.store.drain_chunks = drain
        found = await drain(*arguments, **named)
        await platform.fleet.end("w1")
        await platform.take("w2")
        await platform.chunk(job_id, "new", "w2")
        gone.set_result(None)
        return found

    platform.store.drain_chunks = lost_meanwhile
    gone = asyncio.get_running_loop().create_future()
    await platform.service.streams.read(ENDPOINT, job_id, hold_s=0, gone=gone)
    assert await read(platform, job_id) == ["new"]
    assert await read(platform, job_id, "?wait=1000") == []
