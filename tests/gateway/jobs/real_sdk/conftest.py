"""Unmodified releases of RunPod's packages against our routes, as processes of their own.

`lab` is a gateway with any number of endpoints that starts workers of any release and writes down every
request that it gets. The environments come from `tools/clients.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pilotlight.core.worker_environment import worker_environment
from pilotlight.domain.endpoint import Endpoint, Revision
from pilotlight.engines.environments import SetupError
from pilotlight.gateway.asgi import ANSWER

ROOT = Path(__file__).resolve().parents[4]
PROGRAM = Path(__file__).with_name("worker_program.py")

WAIT_S = 120
"""Bound of every wait; nothing is asserted about how much of it is used."""

CURRENT = "1.12"
"""The release in our own environment."""


def client_tool() -> Any:
    """`tools/clients.py` as a module."""
    spec = importlib.util.spec_from_file_location("pilotlight_tool_clients", ROOT / "tools" / "clients.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment_of(name: str) -> Path:
    """The folder of one client's environment; where it cannot be built a test fails in CI, else is skipped."""
    try:
        return Path(client_tool().ensure(name))
    except (SetupError, OSError) as error:
        if os.environ.get("CI"):
            pytest.fail(f"the environment {name} cannot be built: {error}")
        pytest.skip(f"the environment {name} cannot be built: {error}")


def python_of(release: str) -> str:
    """The interpreter that has a release of the `runpod` package."""
    return sys.executable if release == CURRENT else str(environment_of(f"runpod-{release}") / "bin/python")


def clean_environment(**more: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if "RUNPOD" not in name and "PROXY" not in name.upper()
    }
    return kept | {"HOME": "/nonexistent"} | more


@dataclass
class Seen:
    """One request that the gateway got."""

    at: float
    method: str
    verb: str
    ids: tuple[str, ...]
    query: str
    body: bytearray = field(default_factory=bytearray)
    status: int = 0


@dataclass
class Process:
    """A worker's process; it leads a group of its own, as in a container."""

    worker_id: str
    process: asyncio.subprocess.Process
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill_group(self, number: signal.Signals = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def exit_code(self) -> int:
        async with asyncio.timeout(WAIT_S):
            return await self.process.wait()


class Lab:
    """A gateway and the workers of its endpoints."""

    def __init__(self, platform: Any, folder: Path, stack: contextlib.AsyncExitStack) -> None:
        self.platform = platform
        self.folder = folder
        self.seen: list[Seen] = []
        self._stack = stack
        self._arrived = asyncio.Event()
        self._number = 0

    async def record(self, scope: Any, receive: Any, send: Any) -> None:
        """The gateway's ASGI application, with notes."""
        segments = [part for part in scope["path"].split("/") if part]
        seen = Seen(
            at=time.monotonic(),
            method=scope["method"],
            verb=segments[2] if len(segments) > 2 else "",
            ids=tuple(segments[3:]),
            query=scope["query_string"].decode(),
        )
        self.seen.append(seen)
        self._arrived.set()

        async def noting_receive() -> Any:
            message = await receive()
            seen.body += message.get("body", b"")[:10_000]
            return message

        async def noting_send(message: Any) -> None:
            seen.status = message.get("status", seen.status)
            await send(message)

        # The answer has to pass by here, not around.
        extensions = {name: value for name, value in scope["extensions"].items() if name != ANSWER}
        quiet = {**scope, "extensions": extensions}
        await self._app(quiet, noting_receive, noting_send)

    def listen(self) -> None:
        """Put the recorder in front of the application, which is served already."""
        road = self.platform.app
        kind = type(road)
        self._app = kind.__call__.__get__(road)
        record = self.record

        async def recorded(_: Any, scope: Any, receive: Any, send: Any) -> None:
            await record(scope, receive, send)

        # Without `serve_whole`, all requests take the road that is recorded.
        parts = {"__slots__": (), "__call__": recorded, "serve_whole": None}
        road.__class__ = type("RecordedRoad", (kind,), parts)

    def requests(self, verb: str, *ids: str) -> list[Seen]:
        """Requests of one kind, of a worker and a job where given."""
        return [seen for seen in self.seen if seen.verb == verb and seen.ids[: len(ids)] == ids]

    async def until(self, look: Callable[[], Any]) -> Any:
        """What `look` returns as soon as it is true; looked at with every request that arrives."""
        async with asyncio.timeout(WAIT_S):
            while not (found := look()):
                self._arrived.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), 0.05)
            return found

    async def endpoint(self, endpoint_id: str) -> str:
        """One more endpoint."""
        if self.platform.directory.endpoint(endpoint_id) is None:
            revision = Revision(endpoint_id=endpoint_id, version=1, model="m")
            await self.platform.store.add_endpoint(
                Endpoint(id=endpoint_id, name=endpoint_id, revision=revision)
            )
            await self.platform.directory.refresh()
        return endpoint_id

    async def worker(
        self,
        kind: str = "async",
        *,
        release: str = CURRENT,
        concurrency: int = 1,
        endpoint: str = "ep1",
        secret: str | None = None,
        **variables: str,
    ) -> Process:
        """Start a worker process; it is ended with the test."""
        self._number += 1
        worker_id = f"w{self._number}"
        own = self.platform.fleet.add(worker_id, endpoint_id=endpoint)
        # Every worker has a directory of its own, as the protocol asks for (worker-protocol.md §11).
        folder = self.folder / worker_id
        folder.mkdir()
        ours = worker_environment(
            self.platform.base, endpoint, worker_id, secret or own, ping_interval_ms=1000
        )
        log = self.folder / f"{worker_id}.log"
        with log.open("wb") as stream:
            process = await asyncio.create_subprocess_exec(
                python_of(release),
                str(PROGRAM),
                kind,
                str(concurrency),
                env=clean_environment(**ours) | variables,
                cwd=folder,
                stdout=stream,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        worker = Process(worker_id, process, log)
        self._stack.push_async_callback(self._end, worker)
        return worker

    async def _end(self, worker: Process) -> None:
        worker.kill_group()
        await worker.process.wait()

    async def ready(self, *workers: Process) -> None:
        """Return when each has asked for a job."""
        for worker in workers:
            await self.until(
                lambda worker=worker: (
                    self.requests("job-take", worker.worker_id)
                    or self.requests("job-take-batch", worker.worker_id)
                )
            )

    async def run(self, body: Any, endpoint: str = "ep1") -> str:
        """Submit a job; its id."""
        answer = await self.platform.call("POST", "/run", endpoint=endpoint, json={"input": body})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    async def finished(self, job_id: str, endpoint: str = "ep1") -> dict[str, Any]:
        """The job object once it is terminal."""
        job: dict[str, Any] = {}
        for _ in range(6):
            answer = await self.platform.call("GET", f"/status-sync/{job_id}?wait=20000", endpoint=endpoint)
            job = dict(answer.json())
            if job.get("status") not in {"IN_QUEUE", "IN_PROGRESS"}:
                return job
        raise AssertionError(f"not finished: {job}")

    async def result(self, body: Any, endpoint: str = "ep1") -> dict[str, Any]:
        """Submit and wait."""
        return await self.finished(await self.run(body, endpoint), endpoint)

    def gate(self, name: str) -> Gate:
        """A way to hold a handler up."""
        return Gate(self.folder / name)


@dataclass(frozen=True)
class Gate:
    """A handler that `wait`s for it runs until it is opened."""

    path: Path

    @property
    def input(self) -> dict[str, str]:
        return {"do": "wait", "release": str(self.path)}

    def open(self) -> None:
        self.path.touch()

    @property
    def started(self) -> list[str]:
        """Workers on which a handler has begun to wait, in order."""
        marks = Path(f"{self.path}.started")
        return marks.read_text().split() if marks.exists() else []


@pytest.fixture
def make_lab(make_platform: Any, tmp_path: Path) -> Callable[..., Any]:
    @contextlib.asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[Lab]:
        settings.setdefault("jobs", {"take_hold_s": 2, "stop_hold_s": 2, "ping_interval_ms": 1000})
        async with make_platform(**settings) as platform, contextlib.AsyncExitStack() as stack:
            made = Lab(platform, tmp_path, stack)
            made.listen()
            yield made

    return make


@pytest.fixture
async def lab(make_lab: Any) -> AsyncIterator[Lab]:
    async with make_lab() as made:
        yield made


@pytest.fixture
def run_client() -> Callable[..., Any]:
    """What a program with one of the client libraries prints as JSON."""

    async def run(*command: str, **variables: str) -> Any:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=clean_environment(**variables),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            output, errors = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        assert process.returncode == 0, errors.decode()
        return json.loads(output.splitlines()[-1])

    return run


@pytest.fixture
def python_client() -> Callable[[str], str]:
    """The interpreter that has a release of the Python client."""
    return python_of


@pytest.fixture
def node_folder() -> Path:
    """Where npm's `runpod-sdk` is installed."""
    return environment_of("runpod-sdk")


@pytest.fixture
def node() -> str:
    """The program `node`."""
    found = shutil.which("node")
    if found is None:
        pytest.fail("node is missing") if os.environ.get("CI") else pytest.skip("node is missing")
    return found
