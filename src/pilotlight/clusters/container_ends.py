"""How the end of a container is told; pure, called by `clusters.containers`."""

from __future__ import annotations

from pilotlight.clusters.container_engine import PullError, UnreachableError
from pilotlight.domain.worker import Failure
from pilotlight.errors import PilotlightError
from pilotlight.ports.cluster import WorkerSpec


def failure_of(error: PilotlightError, spec: WorkerSpec) -> Failure:
    """Why a worker could not become or stay a container, with what helps."""
    assert spec.container is not None, spec.worker_id
    if isinstance(error, UnreachableError):
        return Failure(
            kind="engine_unreachable",
            cause=str(error),
            advice="start Docker or `podman system service`, or set containers.url",
        )
    if isinstance(error, PullError):
        advice = "check the image's name, and registry_user and registry_password where it is private"
        return Failure(kind="image_missing", cause=str(error), advice=advice)
    return Failure(
        kind="container_failed",
        cause=f"container of {spec.container.image}: {error}",
        advice="check the endpoint's command, volumes and GPUs",
    )


def out_of_memory(spec: WorkerSpec) -> Failure:
    """Of a container that was killed from outside, most likely for its memory."""
    limit = f"its limit of {spec.memory_bytes} bytes" if spec.memory_bytes else "the machine has"
    return Failure(
        kind="out_of_memory",
        cause=f"the container was killed: it needed more memory than {limit}, or somebody killed it",
        advice="raise the endpoint's memory_bytes, or find out who kills containers",
    )


def describe_end(code: int | None, *, ran: bool) -> str:
    """The last line of its log.

    Args:
        code: Its exit status, -N for signal N; None when unknown.
        ran: Whether it was ever started.
    """
    if code is None:
        return "ended; the container engine does not know how" if ran else "ended before it ran"
    return f"exited with status {code}" if code >= 0 else f"ended by signal {-code}"
