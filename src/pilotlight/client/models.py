"""Shapes of the gateway's answers, as the client hands them out.

They are plain dictionaries with declared keys: what the gateway sends is what a caller sees, so an answer
with further keys loses nothing on its way to `--json`.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Failure(TypedDict):
    """Why a start failed."""

    kind: str
    cause: str
    advice: str


class Endpoint(TypedDict):
    """One endpoint as `/pilotlight/v1/endpoints` shows it; secrets in `env` are masked."""

    id: str
    name: str
    status: str
    model: str
    version: int
    kind: str
    command: list[str]
    memory_bytes: int
    image: str | None
    volumes: list[dict[str, Any]]
    shm_bytes: int
    registry_user: str
    url: str
    openai_url: str
    served_names: list[str]
    min: int
    max: int
    idle_timeout_s: int
    concurrency: int
    flashboot: bool
    routing: str
    scaler: str
    scaler_value: float
    execution_timeout_ms: int
    env: dict[str, str]
    engine_url: str | None
    engine_version: str | None
    gpu_count: int
    created_at: str
    updated_at: str
    workers: dict[str, int]
    failure: Failure | None
    retry_at: str | None
    next_rung: str | None
    start_estimate_ms: dict[str, int | None]


class DownloadProgress(TypedDict):
    """How much of a model a starting worker has; the total is None while nobody knows it."""

    done_bytes: int
    total_bytes: int | None


class Worker(TypedDict):
    """One worker: RunPod's keys (serverless-api.md §7.4) and our own."""

    id: str
    status: str | None
    isStale: bool
    version: int
    gpuCount: int
    uptimeSeconds: int
    startedAt: str | None
    state: str
    stage: str
    progress: DownloadProgress | None
    failure: Failure | None
    memory_bytes: int
    pid: int | None
    occupied: int
    capacity: int


class LogLine(TypedDict):
    """One line of a worker's log; `id` is where a reader may resume."""

    id: str
    ts: str
    source: str
    line: str


class StartStage(TypedDict):
    """One step of a start: when it was reached."""

    stage: str
    at_ms: int
    after_ms: int


class Start(TypedDict):
    """One start of a worker; times count from the decision and are None where that was not reached."""

    worker_id: str
    version: int
    rung: str
    outcome: str
    started_at: str
    ready_after_ms: int | None
    first_token_after_ms: int | None
    memory_bytes: int | None
    note: str
    stages: list[StartStage]
    failure: Failure | None


class Launcher(TypedDict):
    """A process that has imported the engine, of which engines are forked."""

    fingerprint: str
    engine_version: str
    state: str
    problem: str
    pid: int | None
    memory_bytes: int | None
    ready_s: float | None
    launches: int
    engines: int
    endpoints: list[str]
    log: str


class Key(TypedDict):
    """An API key; `key` is the secret and comes only with its creation."""

    id: str
    name: str
    status: str
    scope: str
    endpoints: list[str]
    heartbeat_s: NotRequired[float | None]
    priority: NotRequired[str]
    requests_per_minute: NotRequired[int | None]
    tokens_per_minute: NotRequired[int | None]
    concurrent_max: NotRequired[int | None]
    created_at: str
    key: NotRequired[str]


class UsageTotal(TypedDict):
    """Time that the workers of an endpoint spent in one state."""

    endpoint_id: str
    state: str
    duration_ms: int


class Usage(TypedDict):
    """Closed usage intervals and their sums."""

    intervals: list[dict[str, Any]]
    totals: list[UsageTotal]


class Job(TypedDict):
    """A job (serverless-api.md §2.9); keys that do not apply are missing."""

    id: str
    status: str
    delayTime: NotRequired[int]
    executionTime: NotRequired[int]
    output: NotRequired[Any]
    error: NotRequired[str]
    workerId: NotRequired[str]
    retries: NotRequired[int]


class JobEvent(TypedDict):
    """One thing that happened to a job; `at` is RFC 3339."""

    event: str
    at: str
    attempt: NotRequired[int]
    workerId: NotRequired[str]
    reason: NotRequired[str]


class Waiting(TypedDict):
    """Why a job is in the queue."""

    reason: str
    detail: str
    ahead: int


class JobStory(Job):
    """A job with what has happened to it and, while it is queued, why it waits."""

    timeline: list[JobEvent]
    waiting: NotRequired[Waiting]


class JobRow(TypedDict):
    """A job in a list of jobs (serverless-api.md §2.15)."""

    id: str
    status: str
    createdAt: str
    completedAt: NotRequired[str]
    delayTime: NotRequired[int]
    executionTime: NotRequired[int]
    workerId: NotRequired[str]
    retries: int


class JobPage(TypedDict):
    """Jobs, newest first, and where to go on; None at the end."""

    requests: list[JobRow]
    cursor: str | None


class Purged(TypedDict):
    """What a purge removed."""

    removed: int
    status: str


class Chunks(TypedDict):
    """What one read of a job's stream gave (serverless-api.md §2.8)."""

    status: str
    stream: list[dict[str, Any]]


class Progress(TypedDict):
    """Where a deployment is; `done` and `total` are bytes."""

    stage: str
    message: str
    done: int | None
    total: int | None


FINAL_STATES = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
"""States that a job does not leave on its own (serverless-api.md §2.10)."""
