"""How endpoints, workers and keys look from outside: pure functions from records to answers.

No secret passes here: values of variables whose names look secret are masked, and keys are stored as hashes
only.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from msgspec import structs

from pilotlight.core.health_check import health_path
from pilotlight.core.placement import HostResources
from pilotlight.core.worker_counts import ServiceStatus, count_workers, service_status
from pilotlight.core.worker_environment import DATA_CENTER
from pilotlight.domain.endpoint import ENGINE_VERSION_VARIABLE, Container, Endpoint, EndpointKind, ScalerType
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import RequestRecord, StartRecord, UsageInterval
from pilotlight.domain.worker import Failure, Rung, Worker, WorkerState
from pilotlight.management.key_schemas import KeyView
from pilotlight.management.schemas import (
    MASK,
    EndpointView,
    FailureView,
    IntervalView,
    RequestView,
    StageView,
    StartView,
    UsageTotal,
    UsageView,
    VolumeBody,
    looks_secret,
)
from pilotlight.ports.fleet import Health

IMAGE = "pilotlight/vllm"
"""What a model endpoint shows where REST v2 wants a container image."""

COMMAND_IMAGE = "pilotlight/command"
"""The same for an endpoint whose workers are any command, which REST v2 shows as `args`."""

ENGINE_URL_IMAGE = "pilotlight/engine-url"
"""The same for an endpoint of a fixed engine."""

CPU_FLAVOR = "cpu3g"
GPU_POOL = "LOCAL"
DISK_GB = 10
"""REST v2 wants a container disk; process workers have none, so the service's own default is shown."""


class StartEstimates(Protocol):
    """How long starts take, as learned from earlier ones."""

    def next_rung(self, endpoint_id: str) -> Rung | None:
        """From where the endpoint's next worker will come; None where there will be none of ours."""
        ...

    def all_ms(self, endpoint_id: str) -> Mapping[Rung, int | None]:
        """How long a start from each rung will take, in ms; None where nobody can know."""
        ...


class SlotCount(Protocol):
    """The slots of one ready worker."""

    @property
    def occupied(self) -> int:
        """Slots in use, requests and jobs together."""
        ...

    @property
    def capacity(self) -> int:
        """Slots in all."""
        ...


def timestamp(moment_ms: int) -> str:
    """A moment by RFC 3339, in UTC, to the second."""
    return datetime.fromtimestamp(moment_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """An environment fit to be shown."""
    return {name: MASK if value and looks_secret(name, value) else value for name, value in env.items()}


def endpoint_status(
    endpoint: Endpoint, workers: Sequence[Worker], health: Health, *, failures_max: int
) -> Literal["paused", "unhealthy", "idle", "starting", "ready"]:
    """How an endpoint is, in one word.

    Args:
        endpoint: The endpoint.
        workers: Its living workers.
        health: Its recent starts.
        failures_max: Failed starts after which it counts as unhealthy.
    """
    states = {worker.state for worker in workers}
    if endpoint.workers_max == 0:
        return "paused"
    # A fixed engine is nobody's worker; whether it answers is seen by those who call it.
    if WorkerState.READY in states or endpoint.revision.engine_url is not None:
        return "ready"
    if health.retry_ms is not None or health.failures >= failures_max:
        return "unhealthy"
    return "starting" if WorkerState.STARTING in states else "idle"


def endpoint_url(endpoint: Endpoint, base_url: str) -> str:
    """The base URL under which callers reach an endpoint."""
    road = "lb" if endpoint.kind is EndpointKind.LOAD_BALANCER else "v2"
    return f"{base_url}/{road}/{endpoint.id}"


def endpoint_view(
    endpoint: Endpoint,
    workers: Sequence[Worker],
    health: Health,
    estimates: StartEstimates,
    *,
    base_url: str,
    failures_max: int,
) -> EndpointView:
    """An endpoint as `/pilotlight/v1` shows it."""
    next_rung = estimates.next_rung(endpoint.id)
    revision = endpoint.revision
    balanced = endpoint.kind is EndpointKind.LOAD_BALANCER
    counts = Counter(str(worker.state) for worker in workers)
    return EndpointView(
        id=endpoint.id,
        name=endpoint.name,
        status=endpoint_status(endpoint, workers, health, failures_max=failures_max),
        model=revision.model,
        version=revision.version,
        kind=endpoint.kind.value if revision.engine_url is None else "engine_url",
        command=list(revision.command),
        memory_bytes=revision.memory_bytes,
        **_container_view(revision.container),
        url=endpoint_url(endpoint, base_url),
        openai_url="" if balanced else f"{base_url}/v2/{endpoint.id}/openai/v1",
        served_names=list(endpoint.served_names),
        min=endpoint.workers_min,
        max=endpoint.workers_max,
        idle_timeout_s=endpoint.idle_timeout_ms // 1000,
        concurrency=endpoint.concurrency,
        flashboot=endpoint.flashboot,
        routing=endpoint.routing.value,
        scaler=endpoint.scaler.value,
        scaler_value=endpoint.scaler_value,
        execution_timeout_ms=endpoint.execution_timeout_ms,
        env=masked(revision.env),
        engine_url=revision.engine_url,
        engine_version=revision.env.get(ENGINE_VERSION_VARIABLE),
        gpu_count=revision.gpu_count,
        created_at=timestamp(endpoint.created_ms),
        updated_at=timestamp(endpoint.updated_ms),
        workers=dict(counts),
        failure=failure_view(health.failure),
        retry_at=None if health.retry_ms is None else timestamp(health.retry_ms),
        next_rung=None if next_rung is None else next_rung.value,
        start_estimate_ms={rung.value: ms for rung, ms in estimates.all_ms(endpoint.id).items()},
    )


def _container_view(container: Container | None) -> dict[str, Any]:
    """How workers run as containers; the password of a registry is not even masked."""
    volumes = container.volumes if container is not None else ()
    return {
        "image": None if container is None else container.image,
        "volumes": [VolumeBody(**asdict(volume)) for volume in volumes],
        "shm_bytes": 0 if container is None else container.shm_bytes,
        "registry_user": "" if container is None else container.registry_user,
    }


def failure_view(failure: Failure | None) -> FailureView | None:
    """A failure as administrators see it, with the last line of the program; None for none."""
    if failure is None:
        return None
    cause = f"{failure.cause}: {failure.line}" if failure.line else failure.cause
    return FailureView(kind=failure.kind, cause=cause, advice=failure.advice)


def key_view(key: ApiKey) -> KeyView:
    """A key without its secret."""
    return KeyView(
        id=key.id,
        name=key.name,
        status="active",
        scope=key.scope.value,
        endpoints=sorted(key.endpoint_ids),
        heartbeat_s=key.heartbeat_s,
        priority=key.priority.value,
        requests_per_minute=key.requests_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        concurrent_max=key.concurrent_max,
        created_at=timestamp(key.created_ms),
    )


def start_view(record: StartRecord) -> StartView:
    """A start with the time each stage began, absolute and after the decision, and why it failed."""
    first = record.decided_ms
    return StartView(
        worker_id=record.worker_id,
        version=record.version,
        rung=record.rung,
        outcome=record.outcome,
        started_at=timestamp(first),
        ready_after_ms=record.after_ms("ready"),
        first_token_after_ms=record.after_ms("first_token"),
        memory_bytes=record.memory_bytes,
        note=record.note,
        stages=[
            StageView(stage=stage, at_ms=at_ms, after_ms=at_ms - first) for stage, at_ms in record.stages
        ],
        failure=failure_view(record.failure),
    )


def usage_view(intervals: Sequence[UsageInterval]) -> UsageView:
    """Usage intervals and their sums by endpoint and state."""
    totals: Counter[tuple[str, str]] = Counter()
    for interval in intervals:
        totals[interval.endpoint_id, str(interval.state)] += interval.duration_ms
    return UsageView(
        intervals=[
            IntervalView(
                **(asdict(interval) | {"state": str(interval.state)}), duration_ms=interval.duration_ms
            )
            for interval in intervals
        ],
        totals=[
            UsageTotal(endpoint_id=endpoint_id, state=state, duration_ms=duration)
            for (endpoint_id, state), duration in sorted(totals.items())
        ],
    )


def request_view(record: RequestRecord) -> RequestView:
    """One row of the request log."""
    return RequestView(
        **(structs.asdict(record) | {"road": str(record.road), "outcome": str(record.outcome)})
    )


def host_view(host: HostResources) -> dict[str, Any]:
    """What the host has."""
    return asdict(host) | {"gpus": [asdict(gpu) for gpu in host.gpus]}


def v2_endpoint(endpoint: Endpoint, *, base_url: str, cpus: int, host: HostResources) -> dict[str, Any]:
    """An endpoint in the shape of REST v2 (serverless-api.md §7.3).

    Args:
        endpoint: The endpoint.
        base_url: Under which clients reach us.
        cpus: Processors of this host, which a CPU worker may all use.
        host: What this host has.
    """
    revision = endpoint.revision
    workers: dict[str, int] = {"min": endpoint.workers_min, "max": endpoint.workers_max}
    scaling: dict[str, Any] = {"type": endpoint.scaler.value}
    if endpoint.scaler is ScalerType.QUEUE_DELAY:
        workers["idleTimeout"] = endpoint.idle_timeout_ms // 1000
        scaling["queueDelay"] = _plain(endpoint.scaler_value)
    else:
        # The service knows no idle timeout beside this scaler and refuses it as input (§7.3).
        scaling["requestCount"] = int(endpoint.scaler_value)
    body: dict[str, Any] = {
        "id": endpoint.id,
        "name": endpoint.name,
        "type": "LOAD_BALANCER" if endpoint.kind is EndpointKind.LOAD_BALANCER else "QUEUE",
        "requestUrls": _request_urls(endpoint, base_url),
        "image": _image(endpoint),
        "args": shlex.join(revision.command),
        "disk": DISK_GB,
        "ports": [],
        "env": masked(revision.env),
        "registry": None,
    }
    if revision.gpu_count:
        body["gpu"] = {
            "pools": [GPU_POOL],
            "count": revision.gpu_count,
            "allowedCudaVersions": [],
            "minCudaVersion": None,
        }
    else:
        memory_gb = max(1, round(host.memory_bytes_total / 2**30))
        body["gpu"] = None
        body["cpu"] = [{"id": CPU_FLAVOR, "vcpuCount": cpus, "memory": memory_gb}]
    return body | {
        "workers": workers,
        "scaling": scaling,
        "dataCenterIds": [DATA_CENTER],
        "networkVolumes": [],
        "timeout": endpoint.execution_timeout_ms,
        "flashboot": "FLASHBOOT" if endpoint.flashboot else "OFF",
        "createdAt": timestamp(endpoint.created_ms),
    }


def _request_urls(endpoint: Endpoint, base_url: str) -> dict[str, str]:
    url = endpoint_url(endpoint, base_url)
    if endpoint.kind is EndpointKind.LOAD_BALANCER:
        return {"base": url, "health": url + health_path(endpoint.revision.env)}
    return {
        "run": f"{url}/run",
        "runSync": f"{url}/runsync",
        "status": f"{url}/status/{{job_id}}",
        "stream": f"{url}/stream/{{job_id}}",
        "cancel": f"{url}/cancel/{{job_id}}",
        "retry": f"{url}/retry/{{job_id}}",
        "purgeQueue": f"{url}/purge-queue",
        "health": f"{url}/health",
    }


def v2_workers(
    endpoint: Endpoint,
    workers: Sequence[Worker],
    slots: Mapping[str, SlotCount],
    health: Health,
    *,
    now_ms: int,
    host: HostResources,
) -> dict[str, Any]:
    """The workers of an endpoint in the shape of REST v2 (serverless-api.md §7.4), with our own keys added.

    Args:
        endpoint: The endpoint.
        workers: Its living workers.
        slots: By worker id, of those that have any.
        health: Its recent starts.
        now_ms: Now.
        host: What this host has, for the names of GPUs.
    """
    occupied = {worker_id: count.occupied for worker_id, count in slots.items()}
    statuses = [service_status(worker, occupied=occupied.get(worker.id, 0)) for worker in workers]
    listed = [
        _v2_worker(endpoint, worker, status, slots.get(worker.id), now_ms=now_ms, host=host)
        for worker, status in zip(workers, statuses, strict=True)
        if status is not None
    ]
    summary = count_workers(statuses, failed_starts=health.failures, throttled=health.throttled is not None)
    return {
        "workers": listed,
        "summary": summary | {"total": len(listed)},
        "endpointVersion": endpoint.revision.version,
    }


def living_workers(
    endpoint: Endpoint,
    workers: Sequence[Worker],
    slots: Mapping[str, SlotCount],
    *,
    now_ms: int,
    host: HostResources,
) -> dict[str, Any]:
    """All living workers of an endpoint, also those that are frozen or leaving, which REST v2 does not know.

    Args:
        endpoint: The endpoint.
        workers: Its living workers.
        slots: By worker id, of those that have any.
        now_ms: Now.
        host: What this host has, for the names of GPUs.
    """
    return {
        "workers": [
            _v2_worker(
                endpoint,
                worker,
                service_status(worker, occupied=count.occupied if (count := slots.get(worker.id)) else 0),
                slots.get(worker.id),
                now_ms=now_ms,
                host=host,
            )
            for worker in workers
        ]
    }


def _v2_worker(
    endpoint: Endpoint,
    worker: Worker,
    status: ServiceStatus | None,
    slots: SlotCount | None,
    *,
    now_ms: int,
    host: HostResources,
) -> dict[str, Any]:
    failure = failure_view(worker.failure)
    names = {gpu.index: gpu.name for gpu in host.gpus}
    return {
        "id": worker.id,
        "status": status,
        "isStale": worker.version != endpoint.revision.version,
        "version": worker.version,
        "gpuCount": len(worker.devices),
        "image": _image(endpoint),
        "uptimeSeconds": max(0, now_ms - worker.created_ms) // 1000,
        "gpuTypeId": names.get(worker.devices[0]) if worker.devices else None,
        "dataCenterId": DATA_CENTER,
        "startedAt": timestamp(worker.created_ms),
        "state": worker.state.value,
        "stage": worker.stage.value,
        "progress": None if worker.progress is None else asdict(worker.progress),
        "failure": failure.model_dump() if failure else None,
        "memory_bytes": worker.memory_bytes,
        "pid": worker.process.pid if worker.process else None,
        "occupied": slots.occupied if slots else 0,
        "capacity": slots.capacity if slots else endpoint.concurrency,
    }


def _image(endpoint: Endpoint) -> str:
    if endpoint.revision.container is not None:
        return endpoint.revision.container.image
    if endpoint.kind is not EndpointKind.VLLM:
        return COMMAND_IMAGE
    return IMAGE if endpoint.revision.engine_url is None else ENGINE_URL_IMAGE


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value
