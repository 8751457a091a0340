"""The unmodified `runpod` package against our routes: as a worker, as a client, and both together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from pilotlight.core.worker_environment import worker_environment

WORKER = """
import asyncio, os, sys
import runpod

async def handler(job):
    value = job["input"]
    match value.get("do"):
        case "raise": raise ValueError("boom")
        case "set": return {1, 2}
        case "nan": return float("nan")
        case "error": return {"error": "user level", "detail": 42}
        case "sleep": await asyncio.sleep(value["seconds"])
        case "exit": os._exit(3)
        case "progress":
            runpod.serverless.progress_update(job, "half")
            await asyncio.sleep(value["seconds"])
        case "refresh": return {"refresh_worker": True, "ok": 1}
    return {"echo": value, "keys": sorted(job)}

async def words(job):
    for word in job["input"]["words"]:
        yield word
        await asyncio.sleep(0.01)

kind = sys.argv[1]
config = {"handler": handler}
if kind == "words":
    config = {"handler": words, "return_aggregate_stream": True}
if kind == "four":
    config["concurrency_modifier"] = lambda _: 4
runpod.serverless.start(config)
"""

CLIENT = """
import json, sys
import runpod
runpod.api_key = "rpa_RUNNER"
endpoint = runpod.Endpoint("ep1")
"""


def clean_environment(**more):
    kept = {
        name: value
        for name, value in os.environ.items()
        if "RUNPOD" not in name and "PROXY" not in name.upper()
    }
    return kept | {"HOME": "/nonexistent"} | more


@contextlib.asynccontextmanager
async def runpod_worker(platform, tmp_path, kind="async", worker_id="w1"):
    """A worker process using the library; its environment is what a cluster would give it."""
    secret = platform.fleet.add(worker_id)
    script = tmp_path / "handler.py"
    script.write_text(WORKER)
    environment = worker_environment(platform.base, "ep1", worker_id, secret, ping_interval_ms=1000)
    # Every worker has a directory of its own, as the protocol asks for (worker-protocol.md §11).
    folder = tmp_path / worker_id
    folder.mkdir()
    with (tmp_path / f"{worker_id}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(script),
            kind,
            env=clean_environment(**environment),
            cwd=folder,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def runpod_client(platform, code):
    """What a program with the library's client prints, as JSON."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CLIENT + code,
        env=clean_environment(RUNPOD_ENDPOINT_BASE_URL=f"{platform.base}/v2"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return json.loads(output)


async def finished(platform, job_id):
    """The job once it is terminal."""
    answer = await platform.call("GET", f"/status-sync/{job_id}?wait=50000")
    return answer.json()


async def test_client_and_worker_together(make_platform, tmp_path: Path):
    """Endpoint.run, run_sync, status, output, cancel, health (serverless-api.md §9)."""
    async with make_platform(sqlite=True) as platform, runpod_worker(platform, tmp_path):
        printed = await runpod_client(
            platform,
            """
result = endpoint.run_sync({"input": {"prompt": "hi"}}, timeout=40)
job = endpoint.run({"input": {"prompt": "later"}})
output = job.output(timeout=40)
slow = endpoint.run({"input": {"do": "sleep", "seconds": 600}})
first = slow.status()
cancelled = slow.cancel()
print(json.dumps({
    "sync": result, "output": output, "status": job.status(), "first": first,
    "cancelled": cancelled, "after": slow.status(), "health": endpoint.health(),
}))
""",
        )
        assert printed["sync"] == {"echo": {"prompt": "hi"}, "keys": ["id", "input"]}
        assert (printed["output"]["echo"], printed["status"]) == ({"prompt": "later"}, "COMPLETED")
        assert printed["first"] in {"IN_QUEUE", "IN_PROGRESS"}
        assert (printed["cancelled"]["status"], printed["after"]) == ("CANCELLED", "CANCELLED")
        assert printed["health"]["jobs"]["completed"] == 2
        assert printed["health"]["workers"].keys() == {
            "idle", "initializing", "ready", "running", "throttled", "unhealthy",
        }  # fmt: skip
        # The stop signal worked: the one slot takes the next job.
        job_id = await platform.run({"input": {"prompt": "next"}})
        assert (await finished(platform, job_id))["status"] == "COMPLETED"
        assert len(platform.records) == 4


async def test_streaming_client_and_generator_worker(make_platform, tmp_path: Path):
    """Job.stream yields every value in order; the aggregate is the final output.

    serverless-api.md §4.6, §2.8.
    """
    async with make_platform() as platform, runpod_worker(platform, tmp_path, "words"):
        printed = await runpod_client(
            platform,
            """
job = endpoint.run({"input": {"words": ["one", {"two": 2}, "drei"]}})
print(json.dumps({"stream": list(job.stream()), "output": job.output(), "status": job.status()}))
""",
        )
        assert printed["stream"] == ["one", {"two": 2}, "drei"]
        assert printed["output"] == ["one", {"two": 2}, "drei"]
        assert printed["status"] == "COMPLETED"


async def test_client_errors_are_the_ones_it_knows(platform):
    """serverless-api.md §2.14: RuntimeError on 401, HTTPError on other refusals."""
    printed = await runpod_client(
        platform,
        """
seen = []
for key, name in (("rpa_WRONG", "ep1"), ("rpa_RUNNER", "ep2"), ("rpa_RUNNER", "ep9")):
    try:
        runpod.Endpoint(name, api_key=key).run({"input": {"a": 1}})
    except Exception as error:
        seen.append([type(error).__name__, str(error)[:3]])
print(json.dumps(seen))
""",
    )
    assert [name for name, _ in printed] == ["RuntimeError", "HTTPError", "HTTPError"]
    assert [text for _, text in printed[1:]] == ["403", "404"]


@pytest.mark.parametrize(
    ("do", "status", "error"),
    [
        ("raise", "FAILED", "boom"),
        ("error", "FAILED", "user level"),
        ("nan", "COMPLETED", None),
        ("set", "FAILED", "worker produced no result"),
    ],
)
async def test_what_handlers_do(make_platform, tmp_path: Path, do, status, error):
    """worker-protocol.md §15 scenario 2, on one worker each."""
    async with make_platform() as platform, runpod_worker(platform, tmp_path):
        job = await finished(platform, await platform.run({"input": {"do": do}}))
        assert job["status"] == status, job
        assert (error in job["error"]) if error else job["output"] is None
        assert "retries" not in job


async def test_four_slots_run_side_by_side(make_platform, tmp_path: Path):
    """worker-protocol.md §15 scenario 19: batches are filled, all results arrive."""
    async with make_platform() as platform:
        ids = [await platform.run({"input": {"do": "sleep", "seconds": 0.2, "n": n}}) for n in range(6)]
        async with runpod_worker(platform, tmp_path, "four"):
            jobs = [await finished(platform, job_id) for job_id in ids]
        assert [job["output"]["echo"]["n"] for job in jobs] == list(range(6))
        assert platform.slots.worker("w1").capacity == 4
        assert platform.slots.worker("w1").jobs == 0


async def test_worker_that_dies_and_the_retry_elsewhere(make_platform, tmp_path: Path):
    """worker-protocol.md §15 scenarios 9, 10: requeued once; poison jobs end FAILED."""
    async with make_platform() as platform:
        poison = await platform.run({"input": {"do": "exit"}})
        for number in range(2):
            async with runpod_worker(platform, tmp_path, worker_id=f"w{number}") as process:
                assert await process.wait() == 3
                await platform.fleet.end(f"w{number}", "exit status 3")
        job = await platform.status(poison)
        assert (job["status"], job["error"]) == ("FAILED", "job timed out after 1 retries")


async def test_drain_of_an_idle_worker(make_platform, tmp_path: Path):
    """worker-protocol.md §6.3: mark, signal, answer the polls; the worker ends with 0 and takes nothing."""
    async with make_platform() as platform, runpod_worker(platform, tmp_path) as process:
        await platform.fleet.changed.wait()
        await platform.fleet.drain("w1", reason="scale down")
        job_id = await platform.run()
        process.send_signal(signal.SIGTERM)
        platform.service.release_polls("w1")
        assert await process.wait() == 0
        assert (await platform.status(job_id))["status"] == "IN_QUEUE"


async def test_drain_of_a_busy_worker_keeps_its_result(make_platform, tmp_path: Path):
    """worker-protocol.md §15 scenario 11."""
    async with make_platform() as platform, runpod_worker(platform, tmp_path) as process:
        job_id = await platform.run({"input": {"do": "progress", "seconds": 1}})
        while (await platform.status(job_id)).get("output") != "half":
            with platform.service._ledger.signals.watch(job_id) as changed:
                if (await platform.status(job_id)).get("output") != "half":
                    await changed.wait()
        await platform.fleet.drain("w1", reason="scale down")
        process.send_signal(signal.SIGTERM)
        platform.service.release_polls("w1")
        assert (await finished(platform, job_id))["status"] == "COMPLETED"
        assert await process.wait() == 0


async def test_refresh_drains_the_worker(make_platform, tmp_path: Path):
    """worker-protocol.md §15 scenario 15."""
    async with make_platform() as platform, runpod_worker(platform, tmp_path):
        job_id = await platform.run({"input": {"do": "refresh"}})
        assert (await finished(platform, job_id))["output"] == {"ok": 1}
        await platform.fleet.changed.wait()
        while not platform.fleet.drained:
            platform.fleet.changed.clear()
            await platform.fleet.changed.wait()
        assert platform.fleet.drained[0][0] == "w1"
