"""What the management API accepts and answers, as pydantic models: validation and OpenAPI from one place.

Everything a request can get wrong by itself is caught here. What depends on the machine, the engine or
other endpoints is checked in `checks` and `service`.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from pilotlight.core.worker_environment import CHOOSABLE_VARIABLES

NAME_LENGTH_MAX = 191
MODEL_LENGTH_MAX = 1024
ENV_NAMES_MAX = 200
ENV_VALUE_BYTES_MAX = 32 * 1024
ENV_BYTES_MAX = 256 * 1024
"""All names and values together; far below what the kernel lets a process inherit."""

MASK = "********"
"""Shown instead of a secret. Sent back in a revision, it means: keep what is stored."""

COMMAND_ARGUMENTS_MAX = 1000
COMMAND_BYTES_MAX = 64 * 1024
"""A program and its arguments together; half of what the kernel takes for one argument."""

MEMORY_BYTES_MAX = 1 << 50

EXECUTION_TIMEOUT_MS_MIN = 5_000
EXECUTION_TIMEOUT_MS_MAX = 7 * 86_400_000
WORKERS_LIMIT = 1000
CONCURRENCY_LIMIT = 1000

_ENV_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_OWNED_PREFIXES = ("RUNPOD_", "PILOTLIGHT_")
_OWNED_NAMES = frozenset({"VLLM_API_KEY", "CUDA_VISIBLE_DEVICES"})
_SECRET_WORDS = frozenset(
    {
        "TOKEN",
        "SECRET",
        "SECRETS",
        "CREDENTIAL",
        "CREDENTIALS",
        "KEY",
        "KEYS",
        "APIKEY",
        "AUTH",
        "AUTHORIZATION",
    }
    | {"DSN", "PWD"}
)
_USER_IN_URL = re.compile(r"://[^/\s@]+@")
_IMAGE = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::\d{1,5})?/)?"
    r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*"
    r"(?::\w[\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
_VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def looks_secret(name: str, value: str = "") -> bool:
    """Whether a variable's value must not be shown: its name says so, or it is a URL with a user in it.

    Words count whole: HF_TOKEN is a secret, TOKENIZER and MAX_NUM_BATCHED_TOKENS are none. Only of PASS the
    beginning counts, for PASSWORD, PASSWD and PASSPHRASE. Rather one too many is hidden: a hidden value can
    be sent back in a revision as it is shown.
    """
    words = name.split("_")
    named = not _SECRET_WORDS.isdisjoint(words) or any(word.startswith("PASS") for word in words)
    return named or _USER_IN_URL.search(value) is not None


def _check_text(value: str) -> str:
    if _CONTROL.search(value) or value != value.strip() or not value:
        raise ValueError("must not be empty, begin or end with blanks, or hold control characters")
    return value


def _check_env(env: dict[str, str]) -> dict[str, str]:
    if len(env) > ENV_NAMES_MAX:
        raise ValueError(f"{len(env)} variables; at most {ENV_NAMES_MAX} are allowed")
    total = 0
    for name, value in env.items():
        size = len(value.encode())
        total += len(name) + size
        if not _ENV_NAME.fullmatch(name):
            raise ValueError(
                f"{name[:80]!r} is no variable's name: capital letters, digits and _, no digit first"
            )
        owned = name in _OWNED_NAMES or name.startswith(_OWNED_PREFIXES)
        if owned and name not in CHOOSABLE_VARIABLES:
            raise ValueError(f"{name} is set by the platform and cannot be chosen")
        if size > ENV_VALUE_BYTES_MAX:
            raise ValueError(f"{name} has {size} bytes; at most {ENV_VALUE_BYTES_MAX} are allowed")
        if "\0" in value:
            raise ValueError(f"{name} holds a zero byte, which no environment can carry")
    if total > ENV_BYTES_MAX:
        raise ValueError(f"all variables together have {total} bytes; at most {ENV_BYTES_MAX} are allowed")
    return env


def _check_command(command: list[str]) -> list[str]:
    if any("\0" in argument for argument in command):
        raise ValueError("an argument holds a zero byte, which no program can be given")
    if not command[0].strip():
        raise ValueError("the first item names the program and must not be empty")
    total = sum(len(argument.encode()) for argument in command)
    if total > COMMAND_BYTES_MAX:
        raise ValueError(f"the command has {total} bytes; at most {COMMAND_BYTES_MAX} are allowed")
    return command


def _check_image(image: str) -> str:
    if not _IMAGE.fullmatch(image):
        raise ValueError(f"{image[:100]!r} is no image; write [registry/]name[:tag] or name@sha256:digest")
    return image


def _check_source(source: str) -> str:
    if not source.startswith("/") and not _VOLUME_NAME.fullmatch(source):
        raise ValueError(f"{source[:100]!r} is neither an absolute folder nor the name of a volume")
    return source


def _check_target(target: str) -> str:
    if not target.startswith("/") or ".." in target.split("/") or not target.strip("/"):
        raise ValueError(f"{target[:100]!r} is no absolute folder of a container below its root")
    return target.rstrip("/")


def _check_engine_url(url: str) -> str:
    parts = urlsplit(url)
    try:
        port_is_legal = parts.port is None or parts.port > 0
    except ValueError:
        port_is_legal = False
    if parts.scheme == "https":
        raise ValueError(
            "engines are reached by plain HTTP; put a local proxy in front of one that speaks TLS"
        )
    if parts.scheme != "http" or not parts.hostname or not port_is_legal:
        raise ValueError(f"{_without_credentials(url)!r} is not of the form http://host:port")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user name or password")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"{url!r} must be a base URL, without path or query")
    return f"{parts.scheme}://{parts.netloc}"


def _without_credentials(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//…@", url)[:200]


Name = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH_MAX), AfterValidator(_check_text)]
Model = Annotated[str, Field(min_length=1, max_length=MODEL_LENGTH_MAX), AfterValidator(_check_text)]
Environment = Annotated[dict[str, str], AfterValidator(_check_env)]
EngineUrl = Annotated[str, Field(max_length=500), AfterValidator(_check_engine_url)]
Workers = Annotated[int, Field(ge=0, le=WORKERS_LIMIT)]
IdleTimeout = Annotated[int, Field(ge=1, le=3600)]
Concurrency = Annotated[int, Field(ge=1, le=CONCURRENCY_LIMIT)]
Scaler = Literal["QUEUE_DELAY", "REQUEST_COUNT"]
ScalerValue = Annotated[float, Field(gt=0, le=100_000, allow_inf_nan=False)]
ExecutionTimeout = Annotated[int, Field(ge=EXECUTION_TIMEOUT_MS_MIN, le=EXECUTION_TIMEOUT_MS_MAX)]
GpuCount = Annotated[int, Field(ge=0, le=64)]
Routing = Literal["auto", "least_loaded", "session", "prefix"]
Kind = Literal["vllm", "queue", "load-balancer"]
Command = Annotated[
    list[str], Field(min_length=1, max_length=COMMAND_ARGUMENTS_MAX), AfterValidator(_check_command)
]
MemoryBytes = Annotated[int, Field(ge=1, le=MEMORY_BYTES_MAX)]
ShmBytes = Annotated[int, Field(ge=1 << 16, le=MEMORY_BYTES_MAX)]
ImageReference = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_check_image)]
EngineVersion = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_check_text)]
RegistryUser = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH_MAX), AfterValidator(_check_text)]
RegistryPassword = Annotated[SecretStr, Field(min_length=1, max_length=16 * 1024)]


def check_scaler(scaler: str, value: float) -> None:
    """Return when a scaler's value is legal for its kind (serverless-api.md §5.1), else raise ValueError."""
    if scaler == "QUEUE_DELAY" and value < 0.5:
        raise ValueError(f"scaler_value is {value:g}; QUEUE_DELAY takes seconds, at least 0.5")
    if scaler == "REQUEST_COUNT" and (value < 1 or value != int(value)):
        raise ValueError(f"scaler_value is {value:g}; REQUEST_COUNT takes a whole number, at least 1")


def check_workers(workers_min: int, workers_max: int) -> None:
    """Return when both counts agree, else raise ValueError."""
    if workers_min > workers_max:
        raise ValueError(f"min is {workers_min}, but must not be above max, which is {workers_max}")


CONTAINER_FIELDS = frozenset({"volumes", "shm_bytes", "registry_user", "registry_password"})
"""What says how the workers of an image run."""


def foreign_fields(kind: str, *, contained: bool) -> AbstractSet[str]:
    """The fields that belong to other kinds of endpoint.

    Args:
        kind: The kind.
        contained: Whether its workers are containers, whose need of memory is the owner's to say.
    """
    if kind != "vllm":
        return {"model", "engine_url", "engine_version"}
    return {"command", "engine_version"} if contained else {"command", "memory_bytes"}


def check_kind(kind: str, sent: AbstractSet[str]) -> None:
    """Return when the fields sent belong to the kind of endpoint and say what its workers run.

    Args:
        kind: The kind.
        sent: Names of the fields that have a value.

    Raises:
        ValueError: One is missing, or belongs to another kind.
    """
    if "image" not in sent and (foreign := sorted(sent & CONTAINER_FIELDS)):
        raise ValueError(f"{foreign[0]} belongs to an image, but there is none")
    if ("registry_user" in sent) != ("registry_password" in sent):
        raise ValueError("registry_user and registry_password belong together")
    if kind == "vllm":
        if "image" in sent and "engine_url" in sent:
            raise ValueError("image and engine_url exclude each other")
        if "engine_version" in sent and sent & {"image", "engine_url"}:
            raise ValueError("engine_version belongs to an engine of this installation")
        if foreign := sorted(sent & foreign_fields(kind, contained="image" in sent)):
            raise ValueError(f"{foreign[0]} belongs to the kinds queue and load-balancer, but kind is vllm")
        if not sent & {"model", "engine_url", "image"}:
            raise ValueError("one of model, image and engine_url is needed")
        return
    if foreign := sorted(sent & foreign_fields(kind, contained="image" in sent)):
        raise ValueError(f"{foreign[0]} belongs to the kind vllm, but kind is {kind}")
    if not sent & {"command", "image"}:
        raise ValueError(f"command or image is needed with kind {kind}: the program that a worker is")


def check_kind_scaler(kind: str, scaler: str) -> None:
    """Return when the kind can be scaled by this rule (serverless-api.md §3), else raise ValueError."""
    if kind == "load-balancer" and scaler != "REQUEST_COUNT":
        raise ValueError(f"scaler is {scaler}; an endpoint of kind load-balancer takes REQUEST_COUNT only")


def _unset(body: BaseModel) -> AbstractSet[str]:
    return {name for name in body.model_fields_set if getattr(body, name) is None}


class Body(BaseModel):
    """What a request sends: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class VolumeBody(Body):
    """What a container sees of the machine."""

    source: Annotated[str, Field(max_length=4096), AfterValidator(_check_text), AfterValidator(_check_source)]
    """An absolute folder of the gateway's machine, or the name of a volume that the container engine has."""
    target: Annotated[str, Field(max_length=4096), AfterValidator(_check_text), AfterValidator(_check_target)]
    """Where the container sees it, such as /runpod-volume."""
    read_only: bool = False
    """Whether it can only read there."""


Volumes = Annotated[list[VolumeBody], Field(max_length=32)]


class CreateEndpoint(Body):
    """A new endpoint, made from a model, from an engine that runs already, or from any command."""

    kind: Kind = "vllm"
    """What its workers are; never changes: our vLLM worker, any program that speaks the worker protocol, or
    any HTTP server."""
    command: Command | None = None
    """Program and arguments of a worker, for the kinds queue and load-balancer; no shell reads them."""
    memory_bytes: MemoryBytes | None = None
    """Memory reserved for a worker, for the same kinds and for images; left out, the installation's default.
    A container is given no more."""
    image: ImageReference | None = None
    """Container image that a worker is, of any kind; with it, command is arguments for the image, and model
    may be left out where the image names the one it holds."""
    volumes: Volumes = []
    """What a container sees of the machine; a network volume belongs at /runpod-volume."""
    shm_bytes: ShmBytes | None = None
    """Size of a container's /dev/shm; left out, the installation's default."""
    registry_user: RegistryUser | None = None
    """Who fetches the image from its registry; left out, anybody."""
    registry_password: RegistryPassword | None = None
    """The user's password or token; stored sealed and never shown."""
    model: Model | None = None
    """`pilotlight/ember`, a folder, or a Hugging Face id; with `engine_url` the name that engine serves."""
    name: Name | None = None
    """Unique among the endpoints; left out, it is made from the model's name."""
    min: Workers = 0
    """Workers kept although idle."""
    max: Workers = 3
    """Upper bound of workers; 0 pauses the endpoint."""
    idle_timeout_s: IdleTimeout = 60
    """Seconds for which a worker above `min` stays without work."""
    concurrency: Concurrency = 30
    """Requests and jobs one worker serves at a time."""
    flashboot: bool = True
    """Whether its last workers may be kept frozen."""
    routing: Routing = "auto"
    """How the worker of a request is chosen."""
    env: Environment = {}
    """The workers' environment; names of the engine's options in capitals set them."""
    engine_url: EngineUrl | None = None
    """Base URL of a fixed engine, which is used instead of workers of our own."""
    engine_version: EngineVersion | None = None
    """Which of the installed engines; left out, the usual one. The same as ENGINE_VERSION in env."""
    scaler: Scaler = "QUEUE_DELAY"
    """Which rule scales it."""
    scaler_value: ScalerValue = 4
    """Seconds of queue delay, or requests per worker."""
    execution_timeout_ms: ExecutionTimeout = 600_000
    """Milliseconds one attempt of a job may run."""
    gpu_count: GpuCount | None = None
    """GPUs per worker; left out, the engine's need: one per tensor-parallel rank, none on a CPU engine."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_kind(self.kind, self.model_fields_set - _unset(self))
        check_workers(self.min, self.max)
        check_scaler(self.scaler_of_kind, self.scaler_value)
        check_kind_scaler(self.kind, self.scaler_of_kind)
        return self

    @property
    def scaler_of_kind(self) -> Scaler:
        """The scaler asked for; left out, the one of the kind."""
        named = "scaler" in self.model_fields_set
        return "REQUEST_COUNT" if self.kind == "load-balancer" and not named else self.scaler


class ReviseEndpoint(Body):
    """A change of an endpoint: only the fields that are sent change."""

    kind: Kind = "vllm"
    """Never changes; sent, it must be what the endpoint is."""
    command: Command = []
    """Makes a new revision, also with the same command, whose files may have changed."""
    memory_bytes: MemoryBytes | None = None
    """Memory reserved for a worker; null goes back to the installation's default."""
    image: ImageReference = ""
    """Makes a new revision, also with the same image; workers that were processes become containers."""
    volumes: Volumes = []
    """Replaces the volumes."""
    shm_bytes: ShmBytes | None = None
    """Size of a container's /dev/shm; null goes back to the installation's default."""
    registry_user: RegistryUser | None = None
    """Who fetches the image, with registry_password; null for anybody."""
    registry_password: RegistryPassword | None = None
    """The user's password or token."""
    model: Model = ""
    """Makes a new revision, also with the same model, whose files may have changed."""
    name: Name = ""
    """Unique among the endpoints."""
    min: Workers = 0
    """Workers kept although idle."""
    max: Workers = 0
    """Upper bound of workers; 0 pauses the endpoint."""
    idle_timeout_s: IdleTimeout = 60
    """Seconds for which a worker above `min` stays without work."""
    concurrency: Concurrency = 30
    """Requests and jobs one worker serves at a time."""
    flashboot: bool = True
    """Whether its last workers may be kept frozen."""
    routing: Routing = "auto"
    """How the worker of a request is chosen."""
    env: Environment = {}
    """Replaces the environment; a value shown as ******** may be sent back and stays as it is."""
    engine_url: EngineUrl | None = None
    """Base URL of a fixed engine; null goes back to workers of our own."""
    engine_version: EngineVersion | None = None
    """Which of the installed engines; null goes back to the usual one."""
    scaler: Scaler = "QUEUE_DELAY"
    """Which rule scales it."""
    scaler_value: ScalerValue = 4
    """Seconds of queue delay, or requests per worker."""
    execution_timeout_ms: ExecutionTimeout = 600_000
    """Milliseconds one attempt of a job may run."""
    gpu_count: GpuCount | None = None
    """GPUs per worker; null lets the engine's need decide."""


class FailureView(BaseModel):
    """Why starts of an endpoint's workers fail."""

    kind: str
    cause: str
    advice: str


class EndpointView(BaseModel):
    """An endpoint and how it is."""

    id: str
    name: str
    status: Literal["paused", "unhealthy", "idle", "starting", "ready"]
    model: str
    version: int
    kind: Literal["vllm", "engine_url", "queue", "load-balancer"]
    command: list[str]
    memory_bytes: int
    image: str | None
    volumes: list[VolumeBody]
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
    routing: Routing
    scaler: Scaler
    scaler_value: float
    execution_timeout_ms: int
    env: dict[str, str]
    engine_url: str | None
    engine_version: str | None
    gpu_count: int
    created_at: str
    updated_at: str
    workers: dict[str, int]
    failure: FailureView | None
    retry_at: str | None
    next_rung: Literal["frozen", "launchable", "cold", "plain"] | None
    start_estimate_ms: dict[str, int | None]


class EndpointList(BaseModel):
    """All endpoints, oldest first."""

    endpoints: list[EndpointView]


class StageView(BaseModel):
    """One step of a start."""

    stage: str
    at_ms: int
    after_ms: int


class StartView(BaseModel):
    """One start of a worker, stage by stage, and what became of it.

    `ready_after_ms` and `first_token_after_ms` count from the decision; null where that was not reached.
    """

    worker_id: str
    version: int
    rung: str
    outcome: str
    started_at: str
    ready_after_ms: int | None
    first_token_after_ms: int | None
    memory_bytes: int | None
    note: str
    stages: list[StageView]
    failure: FailureView | None


class StartList(BaseModel):
    """Starts, newest first."""

    starts: list[StartView]


class IntervalView(BaseModel):
    """A closed span of a worker's life in one state."""

    worker_id: str
    sequence: int
    endpoint_id: str
    version: int
    state: str
    devices: int
    start_ms: int
    end_ms: int
    duration_ms: int


class UsageTotal(BaseModel):
    """All intervals of one endpoint in one state."""

    endpoint_id: str
    state: str
    duration_ms: int


class UsageView(BaseModel):
    """Usage intervals and their sums."""

    intervals: list[IntervalView]
    totals: list[UsageTotal]


class RequestView(BaseModel):
    """One row of the request log."""

    id: str
    road: str
    endpoint_id: str
    key_id: str
    worker_id: str
    route: str
    status: int
    outcome: str
    arrival_ms: int
    wait_ms: int
    first_token_ms: int | None
    duration_ms: int
    tokens_in: int | None
    tokens_out: int | None
    estimated: bool


class RequestList(BaseModel):
    """Requests, newest first."""

    requests: list[RequestView]


class StatusView(BaseModel):
    """The installation at a glance."""

    version: str
    url: str
    home: str
    engine: dict[str, Any]
    host: dict[str, Any]
    endpoints: int
    workers: int


class Problem(BaseModel):
    """An error by RFC 9457, as serverless-api.md §7.1 has it."""

    title: str
    status: int
    detail: str
    errors: list[str] | None = None
