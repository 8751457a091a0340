"""The worker program on a platform that is not ours: only the variables of worker-protocol.md §2.1, only its routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pilotlight.testing.protocol_server import PlatformStub

from .conftest import WorkerProcess, cached_model

TAKEN_IN_ANY_CASE = ("PATH", "HOME")


@pytest.fixture(params=[True, False], ids=["with-batches", "without-batches"])
async def runpod(request: pytest.FixtureRequest) -> AsyncIterator[PlatformStub]:
    """A platform that knows neither state reports nor `job-done-batch`, and perhaps no `job-take-batch` (404)."""
    stub = PlatformStub(worker_id=f"rp{os.getpid()}x{id(request):x}"[:24], take_batches=request.param)
    await stub.start()
    yield stub
    await stub.stop()


@pytest.fixture
async def worker(runpod: PlatformStub, tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    cached_model(tmp_path / "hub")
    environment = {
        **{name: os.environ[name] for name in TAKEN_IN_ANY_CASE if name in os.environ},
        **runpod.runpod_environment(),
        "MODEL_NAME": "org/model",
        # The three that stand in for vLLM, for its cache, and for a user's job that takes its time.
        "PILOTLIGHT_ENGINE_COMMAND": json.dumps([sys.executable, "-m", "pilotlight.testing.fake_engine"]),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "FAKE_ENGINE_HOLD_FILE": str(tmp_path / "go"),
        "FAKE_ENGINE_RECORD": str(tmp_path / "engine.jsonl"),
    }
    assert not [name for name in environment if name.startswith("PILOTLIGHT_WORKER_")]
    with (tmp_path / "worker.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pilotlight.worker",
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    yield WorkerProcess(process, runpod, tmp_path, Path(tempfile.gettempdir()))
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def test_it_serves_streams_cancels_and_drains(
    worker: WorkerProcess, runpod: PlatformStub, tmp_path: Path
) -> None:
    """The whole of it, in one life.

    1. A native job is answered, an OpenAI job fails with its envelope.
    2. A stream arrives chunk by chunk while it runs; heartbeats name it.
    3. Another one is cancelled: the engine sees it, and nothing is posted.
    4. SIGTERM with a stream in hand: it is finished, nothing new is taken, exit code 0.
    """
    await runpod.submit("whole", {"prompt": "one two three"})
    (item,) = (await runpod.result("whole"))["output"]
    assert item["choices"][0]["tokens"] == ["one two three"]
    await runpod.submit("bad", {"openai_input": {"model": "other", "messages": []}})
    assert json.loads((await runpod.result("bad"))["error"])["error"]["code"] == 404

    stream: dict[str, Any] = {"prompt": "count to 4", "stream": True, "max_batch_size": 1}
    await runpod.submit("stream", stream)
    await runpod.until(lambda: bool(runpod.chunks["stream"]))
    await runpod.submit("cancelled", stream)
    await runpod.until(lambda: any({"stream", "cancelled"} <= set(ids) for ids in runpod.pings))
    assert "stream" not in runpod.results
    await runpod.cancel("cancelled")
    await worker.until_recorded("aborted")
    await runpod.until(lambda: runpod.pings[-1] == ["stream"])

    worker.process.terminate()
    async with asyncio.timeout(10):
        while not worker.events("worker.ending"):
            await asyncio.sleep(0.01)
    await runpod.begin_drain()
    await runpod.submit("late", {"prompt": "x"})
    (tmp_path / "go").touch()
    result = await runpod.result("stream")
    assert [item["choices"][0]["tokens"] for item in result["output"]] == [[" 1"], [" 2"], [" 3"], [" 4"]]
    assert runpod.chunks["stream"] == result["output"]
    assert await worker.exit_code() == 0
    assert set(runpod.results) == {"whole", "bad", "stream"}
    assert worker.engine_processes() == {}
    assert {record.kind for record in runpod.requests} == {"take", "stop", "ping", "done", "stream"}
    assert {record.headers["Authorization"] for record in runpod.requests} == {runpod.key}


@pytest.mark.parametrize("runpod", [False], indirect=True)
async def test_without_batches_jobs_are_taken_one_by_one(
    worker: WorkerProcess, runpod: PlatformStub, tmp_path: Path
) -> None:
    """worker-protocol.md §3.1, §3.2: a 404 once, and several jobs at a time all the same."""
    (tmp_path / "go").touch()
    for number in range(5):
        await runpod.submit(f"j{number}", {"prompt": "a b"})
    for number in range(5):
        assert "output" in await runpod.result(f"j{number}")
    await runpod.begin_drain()
    worker.process.terminate()
    assert await worker.exit_code() == 0
    assert len(worker.events("platform.no_batches")) == 1
    assert all("batch_size" not in record.query for record in runpod.of_kind("take"))
