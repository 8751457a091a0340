"""What is kept of a job's stream is bounded (`limits.stream_bytes`; serverless-api.md §2.8)."""

from __future__ import annotations

import pytest


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
