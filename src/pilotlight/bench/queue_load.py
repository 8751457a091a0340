"""What the parts of `pilotlight bench queue` share: how much is measured, endpoints, and clients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pilotlight.bench.errors import BenchError
from pilotlight.bench.installation import Installation
from pilotlight.bench.processes import Bench, environment, python_module
from pilotlight.bench.queue_peers import PEERS

PILOTLIGHT = "pilotlight"

_WORKER_MEMORY = 64 * 1024 * 1024
_READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """How much is measured.

    Attributes:
        seconds: Of each measurement.
        rounds: How often everything is repeated.
        connections: Of the clients.
        batch: Jobs per take and per post of results.
        polling_workers: Worker processes for the fixed schedule, so many that one is polling at any time.
        batch_workers: Worker processes that take so many at a time.
        single_workers: Worker processes that take one at a time.
        window: Jobs that a client has under way at most.
        rate: Submissions per second of the fixed schedule.
        deep: Jobs in the deep queue; 0 leaves that part out.
        shallow_per_s: Jobs in the queue that the deep one is compared with, per second of the measurement:
            as many as may be taken in it.
        peers: Which other queues are measured.
    """

    seconds: int = 5
    rounds: int = 3
    connections: int = 64
    batch: int = 16
    polling_workers: int = 4
    batch_workers: int = 4
    single_workers: int = 8
    window: int = 256
    rate: int = 200
    deep: int = 1_000_000
    shallow_per_s: int = 10_000
    peers: tuple[str, ...] = PEERS


def queue_endpoint(
    installation: Installation, name: str, command: list[str], *, workers: int, slots: int = 1
) -> str:
    """The id of a new endpoint whose workers are this command; so many, always, with so many slots each."""
    return installation.deploy(
        name=name,
        kind="queue",
        command=command,
        memory_bytes=_WORKER_MEMORY,
        concurrency=slots,
        min=workers,
        max=workers,
    )


def wait_ready(installation: Installation, endpoint_id: str, count: int) -> None:
    """Return when so many workers of an endpoint take jobs."""

    def ready() -> bool:
        workers = installation.client.workers(endpoint_id)
        return sum(worker["state"] == "ready" for worker in workers) >= count

    installation.wait(f"{count} workers of endpoint {endpoint_id} to be ready", ready, timeout_s=_READY_S)


def ask_clients(
    bench: Bench, mode: str, port: int, endpoint_id: str, key: str, seconds: int, *arguments: int
) -> dict[str, Any]:
    """What `bench.harness.job_clients` measured; a job that failed is an error.

    Raises:
        BenchError: With what was answered instead.
    """
    out = bench.run(
        f"{mode} clients",
        python_module("pilotlight.bench.harness.job_clients", mode, port, endpoint_id, seconds, *arguments),
        env=environment(KEY=key),
        timeout_s=120 + 10 * seconds,
    )
    seen: dict[str, Any] = json.loads(out)
    if seen["failed"]:
        raise BenchError(f"{mode}: {seen['failed']} jobs failed: {'; '.join(seen['failures'])}")
    return seen
