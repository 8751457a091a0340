"""Workers: one supervised engine with its devices, and how it is told apart from other processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

WORKER_COOKIE = "PILOTLIGHT_WORKER_ID"
"""Environment variable carried by every process of a worker, so that all can be found and ended."""


class WorkerState(StrEnum):
    """States of a worker. `core.lifecycle.WORKER_TRANSITIONS` is the table of legal changes."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FROZEN = "frozen"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether no process of it exists any more."""
        return self in {WorkerState.STOPPED, WorkerState.FAILED}


class Stage(StrEnum):
    """Steps of a start as the worker program reports them, or as health checks find them."""

    STARTING = "starting"
    DOWNLOADING = "downloading"
    IMPORTING = "importing"
    LOADING_WEIGHTS = "loading_weights"
    WARMING_UP = "warming_up"
    INITIALIZING = "initializing"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"
    FAILED = "failed"


class Rung(StrEnum):
    """From where on the warm ladder a worker came up, best first (docs/guides/waking-up.md)."""

    FROZEN = "frozen"
    LAUNCHABLE = "launchable"
    COLD = "cold"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadProgress:
    """How much of a model has arrived.

    Attributes:
        done_bytes: So much.
        total_bytes: Of so much; None while nobody knows.
    """

    done_bytes: int
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A process told apart from a later one with the same number.

    Attributes:
        pid: Process id; also the id of the process group and session it leads.
        started_ticks: Field 22 of /proc/PID/stat: start time in clock ticks since boot.
        boot_id: /proc/sys/kernel/random/boot_id at that time.
    """

    pid: int
    started_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a worker failed, in words for its owner.

    Attributes:
        kind: Machine-readable class, such as `out_of_memory` or `unknown_architecture`.
        cause: The engine's own line.
        advice: What to do about it.
        line: The last line that a program which is not ours wrote; "" for none. For administrators only: it
            may hold anything.
    """

    kind: str
    cause: str
    advice: str = ""
    line: str = ""

    @property
    def sentence(self) -> str:
        """All of it that a caller may read, in one line: for errors of jobs and of requests."""
        return f"{self.cause} ({self.kind}: {self.advice})" if self.advice else self.cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What is recorded of one worker, living or ended.

    Attributes:
        id: 14 lower-case letters and digits.
        endpoint_id: Whom it serves.
        version: Revision it was started from.
        state: Where it stands.
        stage: Last step reported by the worker program.
        progress: How far a download is; None in other stages. Not stored, as the next report brings it anew.
        key_hash: SHA-256 of its per-worker credential, hex.
        devices: Indices of the GPUs assigned to it.
        memory_bytes: Host memory reserved for it.
        process: The worker program's process, once spawned.
        failure: Set when it failed.
        created_ms: When the decision to start it was recorded.
        ready_ms: When it first became ready.
        state_ms: Since when it is in `state`.
        ended_ms: When its last process was gone.
    """

    id: str
    endpoint_id: str
    version: int
    state: WorkerState = WorkerState.STARTING
    stage: Stage = Stage.STARTING
    progress: DownloadProgress | None = None
    key_hash: str = ""
    devices: tuple[int, ...] = ()
    memory_bytes: int = 0
    process: ProcessIdentity | None = None
    failure: Failure | None = None
    created_ms: int = 0
    ready_ms: int | None = None
    state_ms: int = 0
    ended_ms: int | None = None

    @property
    def out_of_rotation(self) -> bool:
        """Whether it was ready and a health check took it out of use again."""
        return self.state is WorkerState.READY and self.stage in {Stage.UNHEALTHY, Stage.INITIALIZING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server listens and the key it asks for.

    Attributes:
        url: `unix:/path/of/socket` or `http://host:port`.
        key: Bearer key; "" where none is asked.
    """

    url: str
    key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What a ready worker told the platform about itself.

    Attributes:
        engine: The engine's own HTTP server.
        listener: The worker program's HTTP listener, which rewrites bodies; None where there is none.
        models: Names the engine serves.
        max_concurrency: Requests and jobs it takes at a time.
        versions: Software versions by name.
    """

    engine: Address
    listener: Address | None = None
    models: tuple[str, ...] = ()
    max_concurrency: int = 1
    versions: dict[str, str] = field(default_factory=dict)
