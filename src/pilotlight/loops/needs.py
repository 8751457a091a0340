"""What a worker of an endpoint needs, and what the cluster is told to start; pure, called by the fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pilotlight.core.placement import Resources
from pilotlight.core.worker_environment import is_own_program
from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.worker import Worker
from pilotlight.ports.cluster import WorkerSpec


def resources_of(endpoint: Endpoint, *, memory_default_bytes: int) -> Resources:
    """What is reserved for one worker.

    Args:
        endpoint: Whose.
        memory_default_bytes: Taken where the need is unknown.
    """
    revision = endpoint.revision
    return Resources(gpu_count=revision.gpu_count, memory_bytes=revision.memory_bytes or memory_default_bytes)


def worker_spec(
    worker: Worker, endpoint: Endpoint, *, env: Mapping[str, str], program: Sequence[str]
) -> WorkerSpec:
    """What to start.

    Args:
        worker: The worker, as recorded.
        endpoint: Whose, with the revision it is started from.
        env: Its environment.
        program: Our own worker program, for processes without a command of their own; an image knows its own.
    """
    revision = endpoint.revision
    return WorkerSpec(
        worker_id=worker.id,
        endpoint_id=endpoint.id,
        env=env,
        command=revision.command or (() if revision.container is not None else program),
        devices=worker.devices,
        # Our own program leaves nothing there, and only with the user's home it finds a launcher.
        private_folders=endpoint.kind is not EndpointKind.VLLM and not is_own_program(revision.command),
        container=revision.container,
        memory_bytes=revision.memory_bytes,
    )
