"""Endpoints and their immutable revisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

RESERVED_ENDPOINT_IDS = frozenset(
    {
        "serverless", "pods", "templates", "network-volumes", "registries", "catalog", "billing",
        "clusters", "account", "openapi.json", "docs", "health", "graphql", "batch",
    }
)  # fmt: skip
"""Roots of REST v2 that share the prefix `/v2/` with endpoint ids (serverless-api.md §1)."""

MODEL_VARIABLE = "MODEL_NAME"
"""The environment variable by which a worker learns its model (vllm-worker.md §4.9)."""

ENGINE_VERSION_VARIABLE = "ENGINE_VERSION"
"""The environment variable by which an endpoint asks for one of several engines that are installed."""


class EndpointKind(StrEnum):
    """What the workers of an endpoint are; never changes after the endpoint was made."""

    VLLM = "vllm"
    QUEUE = "queue"
    LOAD_BALANCER = "load-balancer"


class ScalerType(StrEnum):
    """RunPod's two scaling rules (serverless-api.md §5.2)."""

    QUEUE_DELAY = "QUEUE_DELAY"
    REQUEST_COUNT = "REQUEST_COUNT"


class Routing(StrEnum):
    """How the worker of a request is chosen (`core.routing`)."""

    AUTO = "auto"
    LEAST_LOADED = "least_loaded"
    SESSION = "session"
    PREFIX = "prefix"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """What a container sees of the machine.

    Attributes:
        source: An absolute folder, or the name of a volume that the container engine keeps.
        target: Where the container sees it.
        read_only: Whether it can only read there.
    """

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """How the workers of a revision run as containers.

    Attributes:
        image: The image's reference as its owner named it.
        volumes: What they see of the machine, beside their image.
        shm_bytes: Size of `/dev/shm`; 0 means the installation's default.
        registry_user: Who fetches the image; "" for anybody.
        registry_password: His password or token, sealed for the endpoint's id.
    """

    image: str
    volumes: tuple[Volume, ...] = ()
    shm_bytes: int = 0
    registry_user: str = ""
    registry_password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """One immutable version of what an endpoint's workers run.

    Attributes:
        endpoint_id: The endpoint it belongs to.
        version: 1 for the first, then counting up.
        model: `pilotlight/ember`, a Hugging Face id, or an absolute folder; "" for other kinds than vllm.
        command: Program and arguments that a worker of the other kinds is; empty for vllm. In a container the
            arguments for its image, empty for the image's own.
        env: The worker's environment as the user may see it; holds MODEL_NAME.
        engine_url: Base URL of a fixed engine that we do not start (`http://host:port`), or None.
        gpu_count: Devices per worker; 0 means the worker runs on the CPU.
        memory_bytes: Host memory one worker is expected to take; 0 means unknown.
        created_ms: When it was made.
        container: Set where workers are containers instead of processes.
    """

    endpoint_id: str
    version: int
    model: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    engine_url: str | None = None
    gpu_count: int = 0
    memory_bytes: int = 0
    created_ms: int = 0
    container: Container | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The addressable deployment. These settings change in place; a new revision replaces workers.

    Attributes:
        id: 14 lower-case letters and digits, never one of `RESERVED_ENDPOINT_IDS`.
        name: Up to 191 characters; unique among the living endpoints of an installation.
        kind: What its workers are.
        revision: The current revision.
        workers_min: Workers kept although idle.
        workers_max: Upper bound; 0 pauses the endpoint (requests queue, nothing starts).
        idle_timeout_ms: How long a worker above `workers_min` stays without work.
        scaler: Which rule scales it.
        scaler_value: Seconds of queue delay, or requests per worker.
        execution_timeout_ms: Running time allowed to one attempt of a job.
        concurrency: Requests and jobs one worker serves at a time.
        flashboot: Whether its last workers may be kept frozen.
        routing: How the worker of a request is chosen.
        created_ms: When it was made.
        updated_ms: When it last changed.
    """

    id: str
    name: str
    revision: Revision
    kind: EndpointKind = EndpointKind.VLLM
    workers_min: int = 0
    workers_max: int = 3
    idle_timeout_ms: int = 60_000
    scaler: ScalerType = ScalerType.QUEUE_DELAY
    scaler_value: float = 4.0
    execution_timeout_ms: int = 600_000
    concurrency: int = 30
    flashboot: bool = True
    routing: Routing = Routing.AUTO
    created_ms: int = 0
    updated_ms: int = 0

    @property
    def served_names(self) -> tuple[str, ...]:
        """Model names clients may use, the first being the one vLLM answers with."""
        override = self.revision.env.get("OPENAI_SERVED_MODEL_NAME_OVERRIDE") or self.revision.env.get(
            "SERVED_MODEL_NAME", ""
        )
        names = [name.strip() for name in override.split(",") if name.strip()]
        return tuple(dict.fromkeys(name for name in [*names, self.revision.model] if name))
