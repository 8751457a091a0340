"""Fixtures for the worker program: a platform stub, and worker processes with a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pilotlight.models.catalog import builtin_folder
from pilotlight.testing.protocol_server import PlatformStub
from pilotlight.worker.engine import find_processes


class WorkerProcess:
    """A worker program of a test, with its platform, its log and what its fake engine recorded."""

    def __init__(
        self, process: asyncio.subprocess.Process, platform: PlatformStub, folder: Path, run: Path
    ) -> None:
        self.process = process
        self.platform = platform
        self.folder = folder
        self.run = run

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ready(self) -> dict[str, Any]:
        return await self.platform.stage("ready")

    async def exit_code(self, seconds: float = 20.0) -> int:
        try:
            async with asyncio.timeout(seconds):
                return await self.process.wait()
        except TimeoutError:
            # It writes where it hangs.
            self.process.send_signal(signal.SIGABRT)
            await self.process.wait()
            pytest.fail(f"the worker did not end within {seconds} s:\n{self.log()}")

    def log(self) -> str:
        return (self.folder / "worker.log").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith('{"ts"')]
        return [line for line in lines if line["event"] == name]

    def recorded(self, what: str) -> list[dict[str, Any]]:
        path = self.folder / "engine.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for line in lines if (entry := json.loads(line))["what"] == what]

    async def until_recorded(self, what: str, seconds: float = 10.0) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            while not self.recorded(what):
                await asyncio.sleep(0.01)
        return self.recorded(what)[-1]

    async def until_event(self, name: str, seconds: float = 10.0) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            while not self.events(name):
                await asyncio.sleep(0.01)
        return self.events(name)[-1]

    @property
    def engine_pid(self) -> int:
        return int(self.recorded("start")[0]["pid"])

    def engine_processes(self) -> dict[int, bool]:
        """Living processes of the engine: its session, and whatever carries its key."""
        if not self.recorded("start"):
            return {}
        registration = next((state for state in self.platform.states if "engine" in state), None)
        key = registration["engine"]["key"] if registration else "no key was ever reported"
        return find_processes(self.engine_pid, key, reaped=self.process.returncode is not None)

    def listener(self, report: dict[str, Any]) -> aiohttp.ClientSession:
        """A client for the worker's own listener."""
        return _client(report["listener"])

    def engine(self, report: dict[str, Any]) -> aiohttp.ClientSession:
        return _client(report["engine"])


def _client(door: dict[str, str]) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        "http://worker",
        connector=aiohttp.UnixConnector(door["address"].removeprefix("unix:")),
        headers={"Authorization": f"Bearer {door['key']}"},
    )


def cached_model(cache: Path, name: str = "org/model") -> Path:
    """The snapshot of a model in a hub cache (vllm-worker.md §5.2), made of the built-in one's files."""
    folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / ("1" * 40)
    folder.mkdir(parents=True)
    for file in builtin_folder().iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture
async def platform() -> AsyncIterator[PlatformStub]:
    # Its own id: clusters under test end every process that carries the cookie of a worker they know.
    stub = PlatformStub(worker_id=f"w{uuid.uuid4().hex[:13]}")
    await stub.start()
    yield stub
    await stub.stop()


@pytest.fixture
async def start_worker(platform: PlatformStub, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts a worker program with the fake engine; ended with everything it started after the test."""
    started: list[WorkerProcess] = []
    # Socket paths are limited to 107 bytes, which tmp_path may exceed.
    run = Path(tempfile.mkdtemp(prefix="pl-"))

    cached_model(tmp_path / "hub")

    async def start(*program: str, **variables: str) -> WorkerProcess:
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            **platform.environment(),
            "MODEL_NAME": "org/model",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "PILOTLIGHT_ENGINE_COMMAND": json.dumps([sys.executable, "-m", "pilotlight.testing.fake_engine"]),
            "PILOTLIGHT_WORKER_RUN_DIR": str(run),
            "FAKE_ENGINE_RECORD": str(tmp_path / "engine.jsonl"),
            **variables,
        }
        environment = {name: value for name, value in environment.items() if value != "-"}
        with (tmp_path / "worker.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-X", "faulthandler", *(program or ("-m", "pilotlight.worker")),
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        worker = WorkerProcess(process, platform, tmp_path, run)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        if worker.process.returncode is None:
            worker.process.kill()
            await worker.process.wait()
        for entry in worker.recorded("start"):
            # The number may have passed to a stranger; the path of this test's record has not.
            with contextlib.suppress(OSError):
                if str(tmp_path).encode() in Path(f"/proc/{entry['pid']}/environ").read_bytes():
                    os.killpg(entry["pid"], signal.SIGKILL)
    shutil.rmtree(run, ignore_errors=True)
