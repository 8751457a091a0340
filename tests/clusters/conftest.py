"""Both event loops, a cluster that is closed after each test, and ways to wait for real processes."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pilotlight.clusters.local import LocalCluster
from pilotlight.clusters.processes import identify, is_alive
from pilotlight.domain.worker import ProcessIdentity
from pilotlight.ports.cluster import WorkerExit, WorkerSpec

from ..timeouts import UvLoop  # noqa: TID252

MISBEHAVE = Path(__file__).with_name("misbehave.py")


class Workers:
    """Starts misbehaving workers on a cluster and remembers their ends."""

    def __init__(self, cluster: LocalCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.exits: list[WorkerExit] = []
        self._numbers = itertools.count()
        self._ended: dict[str, asyncio.Event] = {}
        # Random, because the tests of several sessions may look through the same /proc.
        self._prefix = secrets.token_hex(5)

    def new_id(self) -> str:
        return f"{self._prefix}{next(self._numbers):04d}"

    def spec(self, *steps: str, **fields) -> WorkerSpec:
        fields = {
            "worker_id": self.new_id(),
            "endpoint_id": "ep",
            "env": {},
            "command": [sys.executable, "-S", str(MISBEHAVE), *steps],
        } | fields
        return WorkerSpec(**fields)

    async def start(self, spec: WorkerSpec) -> ProcessIdentity:
        self._ended[spec.worker_id] = asyncio.Event()
        return await self.cluster.start(spec, self._on_exit)

    async def start_ready(self, *steps: str, **fields) -> tuple[str, list[ProcessIdentity]]:
        """Start a worker, wait until it has taken all steps; its id and all its processes, main first."""
        pids = self.folder / f"{self.new_id()}.pids"
        spec = self.spec(*steps, f"pids={pids}", **fields)
        await self.start(spec)
        await self.line(spec.worker_id, "ready")
        identities = [identify(int(pid)) for pid in pids.read_text().split()]
        assert None not in identities
        return spec.worker_id, identities

    async def line(self, worker_id: str, text: str) -> None:
        """Return when the worker has written this line."""
        async for line in self.cluster.logs.follow(worker_id, 0):
            if line.text == text:
                return
        pytest.fail(f"the log of {worker_id} ended without {text!r}")

    async def ended(self, worker_id: str) -> WorkerExit:
        await self._ended[worker_id].wait()
        return next(end for end in self.exits if end.worker_id == worker_id)

    def _on_exit(self, end: WorkerExit) -> None:
        self.exits.append(end)
        self._ended[end.worker_id].set()


def count_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def none_alive(identities: list[ProcessIdentity]) -> bool:
    return not any(is_alive(identity) for identity in identities)


def pytest_asyncio_loop_factories(config, item):
    return {"asyncio": asyncio.new_event_loop, "uvloop": UvLoop}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    cluster = LocalCluster(tmp_path / "logs", log_bytes=100_000, base_env=os.environ, close_grace_s=0.2)
    yield cluster
    await cluster.close()


@pytest.fixture
def workers(cluster: LocalCluster, tmp_path: Path) -> Workers:
    return Workers(cluster, tmp_path)
