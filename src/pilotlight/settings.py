"""Everything that can be tuned, in one place.

A setting is `PILOTLIGHT_<SECTION>__<NAME>` in the environment or `[section] name = …` in
`pilotlight.toml` (in the data folder, or the file named by `PILOTLIGHT_CONFIG`). The environment wins.
Unknown keys and bad values end the start with a message that names them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from pilotlight.errors import SettingsError

HOME_VARIABLE = "PILOTLIGHT_HOME"
CONFIG_VARIABLE = "PILOTLIGHT_CONFIG"

Positive = Annotated[int, Field(gt=0)]
HoldSeconds = Annotated[int, Field(gt=0, le=60)]
"""Hold of a poll: workers hang up after 90 s, and what is handed out in that moment may be lost."""
NotNegative = Annotated[int, Field(ge=0)]


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{path} is no absolute folder")
    return path


AbsoluteFolder = Annotated[Path, AfterValidator(_absolute)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ServerSettings(_Section):
    """Where the gateway listens."""

    host: str = "127.0.0.1"
    """Interface; anything but loopback is a deliberate choice: without `tls_cert`, nothing is encrypted."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8400
    """TCP port; 0 takes a free one (printed at start)."""
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that share the port. With 1 the gateway is one process; with more it has so many others that
    serve the data path, and does all the rest itself (docs/guides/operations.md)."""
    tls_cert: Path | None = None
    """PEM file with the certificate for TLS, followed by those that it is vouched for by; `tls_key` goes with
    it. None means plain HTTP (docs/guides/operations.md)."""
    tls_key: Path | None = None
    """PEM file with its private key, without a passphrase."""
    public_url: str | None = None
    """Base URL under which clients reach us, for URLs in answers; None derives it from host and port."""
    secret_key_file: Path | None = None
    """File with the installation's secret, which signs webhooks and seals credentials; made when missing.
    None means `secret.key` in the data folder. Gateways that share a store must share this file's content."""
    huge_pages: bool = True
    """Whether the gateway puts its memory into huge pages where the kernel has them, so that requests and
    events cost the processor less (docs/guides/operations.md)."""
    shutdown_s: Positive = 8
    """Seconds given to requests and workers when the gateway is told to stop, before everything is killed."""

    @model_validator(mode="after")
    def _certificate_with_key(self) -> ServerSettings:
        if (self.tls_cert is None) is not (self.tls_key is None):
            given, missing = ("tls_cert", "tls_key") if self.tls_key is None else ("tls_key", "tls_cert")
            raise ValueError(f"{given} is set without {missing}: set both for TLS, or none")
        return self


class LimitSettings(_Section):
    """Bounds on what is accepted and held."""

    hold_s: Positive = 300
    """How long a request waits for a worker before it is answered 503."""
    hold_requests: Positive = 1000
    """Requests held per endpoint; one more is answered 429."""
    hold_bytes: Positive = 64 * 1024 * 1024
    """Bytes of bodies held per endpoint; beyond that 429."""
    body_bytes: Positive = 20 * 1024 * 1024
    """Largest body on /openai and /runsync (serverless-api.md §2.13)."""
    body_s: Positive = 120
    """How long a client may take to send a body."""
    run_body_bytes: Positive = 10 * 1024 * 1024
    """Largest body on /run."""
    result_bytes: Positive = 10 * 1024 * 1024
    """Largest result of an asynchronous job; a larger one fails the job."""
    sync_result_bytes: Positive = 20 * 1024 * 1024
    """Largest result of a synchronous job."""
    chunk_bytes: Positive = 1024 * 1024
    """Largest stream chunk."""
    worker_body_bytes: Positive = 64 * 1024 * 1024
    """Largest body read from a worker, so that an oversize result can be told from a broken one."""
    queue_jobs: Positive = 1_000_000
    """Jobs queued per endpoint; one more is answered 429."""
    queue_bytes: Positive = 8 * 1024 * 1024 * 1024
    """Bytes of inputs queued per endpoint; beyond that 429."""
    stream_bytes: Positive = 256 * 1024 * 1024
    """Bytes of a job's stream chunks that wait for a reader; one more chunk fails the job. Of what was read,
    about as much is kept for readers with a cursor."""
    batches: Positive = 10
    """Batches of an endpoint that may be under way at once (serverless-api.md §2.16)."""
    batch_requests: Positive = 5_000
    """Requests in one batch."""
    batch_queued: Positive = 50_000
    """Requests of batches queued per endpoint."""
    batch_body_bytes: Positive = 10 * 1024 * 1024
    """Largest body that adds requests to a batch."""
    continuation_bytes: Positive = 1024 * 1024
    """Bytes kept of a stream in case its worker dies; one that was longer ends with an error event then."""
    profile: Annotated[str, Field(pattern="^(none|runpod)$")] = "none"
    """Rate limits: none, or those of RunPod (serverless-api.md §2.2, §2.14), with its limit on queues."""
    upstream_idle_s: Positive = 60
    """Idle upstream connections are closed after this; below the engine's 75 s."""
    upstream_read_s: Positive = 3600
    """Longest silence of an engine that owes an answer."""
    data_path_s: Positive = 3600
    """Longest duration of one request on the data path."""


class JobSettings(_Section):
    """Life of jobs in the queue (serverless-api.md §2.11)."""

    ttl_ms: Positive = 86_400_000
    """Default life from submission to the end of the run."""
    retention_ms: Positive = 1_800_000
    """How long the result of an asynchronous job stays readable."""
    sync_retention_ms: Positive = 60_000
    """How long the result of a synchronous job stays readable (up to 300 s with a longer wait)."""
    take_hold_s: HoldSeconds = 25
    """Hold of an empty take, 60 at most (worker-protocol.md §8)."""
    stop_hold_s: HoldSeconds = 15
    """Hold of an empty stop poll, 60 at most."""
    confirm_s: Positive = 6
    """A hand-out not confirmed by then is lost; where it is not set, two heartbeat periods and 2 s
    (worker-protocol.md §8)."""
    ping_interval_ms: Annotated[int, Field(ge=1000)] = 2000
    """Heartbeat period given to workers."""
    retries_max: Annotated[int, Field(ge=0, le=5)] = 1
    """Re-dispatches of a job whose worker was lost (serverless-api.md §12 item 17)."""
    batch_retention_ms: Positive = 7 * 86_400_000
    """How long the result of a request in a batch stays readable."""
    ttl_tombstone: bool = True
    """Keep a TIMED_OUT record of a job whose time ended in the queue; else it is gone (§12 item 3)."""

    @model_validator(mode="after")
    def _confirm_by_heartbeats(self) -> JobSettings:
        if "confirm_s" not in self.model_fields_set:
            # Frozen for everybody else; here it is still being made.
            object.__setattr__(self, "confirm_s", -(-2 * self.ping_interval_ms // 1000) + 2)
        return self


class WebhookSettings(_Section):
    """Sending webhooks (serverless-api.md §2.12)."""

    allow_private: bool = False
    """Send to private, loopback and link-local addresses, too."""
    timeout_s: Positive = 10
    """Longest time for one try."""
    retry_delays_s: tuple[Positive, ...] = (10, 10)
    """Pauses before the second and each further try, from the beginning of the one before; after the last
    try a delivery is a dead letter."""
    concurrency: Positive = 16
    """Deliveries under way at once; a single host gets a quarter of them."""


class UploadSettings(_Section):
    """Storing results that are too large in the bucket that a job's `s3Config` names."""

    allow_private: bool = False
    """Upload to buckets at private, loopback and link-local addresses, too; apart from webhooks, because a
    bucket in one's own network is common and its address is given together with a key."""
    timeout_s: Positive = 60
    """Longest time for one result; the worker that posts it waits meanwhile."""


class WorkerSettings(_Section):
    """Starting and ending workers."""

    start_timeout_s: Positive = 420
    """A start without a stage report for this long has failed (RUNPOD_INIT_TIMEOUT)."""
    stop_grace_s: Positive = 5
    """From SIGTERM to SIGKILL for a worker without work."""
    drain_max_s: Positive = 600
    """Longest time a busy worker is given to finish its jobs."""
    start_failures_max: Positive = 3
    """Consecutive failed starts after which an endpoint backs off."""
    backoff_s: Positive = 30
    """First pause after that; doubles with each further failure."""
    backoff_max_s: Positive = 600
    """Longest pause."""
    memory_reserve_bytes: NotNegative = 1024 * 1024 * 1024
    """Host memory never given to workers."""
    memory_default_bytes: Positive = 3 * 1024 * 1024 * 1024
    """Memory reserved for a worker whose need is unknown."""
    log_bytes: Positive = 10 * 1024 * 1024
    """Size at which a worker's log is rotated; one older file is kept."""
    history_s: Positive = 7 * 86_400
    """How long ended workers and their logs are remembered."""
    frozen_memory_bytes: NotNegative | None = None
    """Host memory that all frozen workers together may hold; None means half of the host's. The one that was
    used least recently ends first."""
    frozen_gpu_memory_bytes: NotNegative | None = 4 * 1024 * 1024 * 1024
    """Memory that frozen workers may still hold on one GPU, of what sleeping engines do not give back; None
    means any amount."""
    frozen_age_s: Positive = 21_600
    """How long a worker stays frozen at most."""
    frozen_pressure: Annotated[float, Field(gt=0, le=100)] = 10.0
    """Share of the last ten seconds in which something waited for memory (`some avg10` of
    /proc/pressure/memory), in percent, from which on frozen workers are ended one by one. They also go when
    less than `memory_reserve_bytes` is available."""
    thaw_timeout_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """How long a frozen worker may take for a sign of life before it is ended and another one is started."""


class LoadBalancerSettings(_Section):
    """Requests to workers that serve HTTP themselves (serverless-api.md §3)."""

    wait_s: Positive = 120
    """How long a request waits for a routable worker."""
    pinned_wait_s: Positive = 300
    """How long a request waits for the one worker it is pinned to."""
    request_s: Positive = 330
    """Longest duration of one request, from the moment it has a worker to the end of the answer."""
    websocket_s: Positive = 86_400
    """Longest life of a WebSocket."""
    body_bytes: Positive = 30 * 1024 * 1024
    """Largest body of a request."""
    response_bytes: Positive = 30 * 1024 * 1024
    """Largest body of an answer; a longer one is cut."""
    check_interval_ms: Positive = 1000
    """Pause between two health checks of a routable worker; until then it is asked five times as often."""
    check_timeout_s: Positive = 5
    """How long an answer to a health check is waited for."""
    unhealthy_s: Positive = 480
    """A worker that was unhealthy for so long is ended."""
    initializing_s: Positive = 3600
    """A worker that answered 204 for so long is ended."""


class ContainerSettings(_Section):
    """Workers that are containers of Docker or Podman."""

    url: str = ""
    """Socket of the container engine, such as `unix:///run/podman/podman.sock`; empty takes DOCKER_HOST, else
    the first of the usual sockets that can be used."""
    network: Annotated[str, Field(min_length=1)] = "host"
    """Network of containers: `host`, so that they reach us on the loopback interface, or the name of one of
    the engine's networks; then `gateway_url` is needed, and ports of HTTP workers are published on the
    loopback interface."""
    gateway_url: str = ""
    """Base URL at which containers reach us; empty means that of workers which are processes."""
    gpu_driver: Literal["auto", "nvidia", "cdi"] = "auto"
    """How GPUs are asked for: `nvidia` (Docker with NVIDIA's runtime), `cdi` (devices named
    `nvidia.com/gpu=0`), or `auto`, which is `cdi` with Podman."""
    shm_bytes: Positive = 1024 * 1024 * 1024
    """Size of `/dev/shm` where an endpoint names none; only what is used of it takes memory."""
    call_timeout_s: Positive = 60
    """How long an answer of the container engine is waited for; fetching images is not bounded by it."""
    volume_roots: tuple[AbsoluteFolder, ...] = ()
    """Folders below which everything may be given to containers as a volume, beside the folder `volumes` in
    the data folder; `/` allows all. Named volumes are always allowed."""

    @model_validator(mode="after")
    def _reachable(self) -> ContainerSettings:
        if self.network != "host" and not self.gateway_url:
            raise ValueError(
                f"network is {self.network!r}, from which loopback is out of reach: set gateway_url, too"
            )
        return self


class EngineSettings(_Section):
    """Where the engine lives."""

    home: Path | None = None
    """The engine's virtual environment; None looks beside our own for `.venv-engine`."""
    homes: dict[str, Path] = {}
    """Virtual environments of further engines, by version; an endpoint asks for one by ENGINE_VERSION."""
    command: tuple[str, ...] = ()
    """Program that replaces vLLM's server (another engine with the same flags); empty means vLLM."""


class LauncherSettings(_Section):
    """Launchers: processes that have imported the engine already, of which engines are forked."""

    enabled: bool = True
    """Keep launchers; without them every engine imports for itself."""
    max: Positive = 2
    """How many at once; each takes about 0.6 GB, most of which its engines share. One serves all endpoints
    that agree in engine and in the variables which count while it is imported; the one that was wanted least
    recently ends first."""
    preload: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], ...] = ()
    """Classes of models, such as `Qwen3ForCausalLM`, that launchers import besides those of the endpoints
    there are."""


class StoreSettings(_Section):
    """What is kept and for how long."""

    url: str = ""
    """`postgresql://user:password@host/database` of a PostgreSQL that several gateways may share; empty means
    SQLite in the data folder."""
    request_log_rows: Positive = 1_000_000
    """Rows kept in the request log; the oldest go first."""
    synchronous: Annotated[str, Field(pattern="^(FULL|NORMAL)$")] = "FULL"
    """SQLite's durability: NORMAL may lose acknowledged work at power failure."""


class LogSettings(_Section):
    """The gateway's own log."""

    level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"
    """Lowest level written."""
    json_lines: bool = False
    """One JSON object per line instead of text for people."""


class MetricsSettings(_Section):
    """What Prometheus reads at `/metrics` (docs/guides/observability.md)."""

    open: bool = False
    """Answer everybody; else `/metrics` asks for an admin key."""


class AccessLogSettings(_Section):
    """One line of JSON for each request (docs/guides/observability.md)."""

    target: Literal["file", "stderr", "off"] = "file"
    """Where lines go: `access/access.log` in the data folder, stderr with the own log, or nowhere."""
    file_bytes: Annotated[int, Field(ge=1024 * 1024)] = 10 * 1024 * 1024
    """Size at which the file is rotated."""
    older_files: Annotated[int, Field(ge=1, le=1000)] = 4
    """Files kept that were rotated out; the oldest goes first."""


class TracingSettings(_Section):
    """Traces by OpenTelemetry (docs/guides/observability.md)."""

    enabled: bool = False
    """Send a span for each request. Needs the extra `tracing`; where spans go, how many, and under which name
    say OpenTelemetry's own variables, such as OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_TRACES_SAMPLER."""


def default_home() -> Path:
    """The data folder: PILOTLIGHT_HOME, else the user's data folder of the platform."""
    value = os.environ.get(HOME_VARIABLE)
    return Path(value).expanduser().resolve() if value else Path(platformdirs.user_data_dir("pilotlight"))


class Settings(BaseSettings):
    """All settings, validated together; frozen."""

    model_config = SettingsConfigDict(
        env_prefix="PILOTLIGHT_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
    )

    home: Annotated[Path, AfterValidator(lambda path: path.expanduser().resolve())] = Field(
        default_factory=default_home
    )
    server: ServerSettings = ServerSettings()
    limits: LimitSettings = LimitSettings()
    jobs: JobSettings = JobSettings()
    webhooks: WebhookSettings = WebhookSettings()
    uploads: UploadSettings = UploadSettings()
    workers: WorkerSettings = WorkerSettings()
    load_balancer: LoadBalancerSettings = LoadBalancerSettings()
    engine: EngineSettings = EngineSettings()
    launchers: LauncherSettings = LauncherSettings()
    containers: ContainerSettings = ContainerSettings()
    store: StoreSettings = StoreSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    access_log: AccessLogSettings = AccessLogSettings()
    tracing: TracingSettings = TracingSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then `pilotlight.toml`."""
        named = os.environ.get(CONFIG_VARIABLE)
        path = Path(named) if named else default_home() / "pilotlight.toml"
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=path)

    @property
    def engine_home(self) -> Path:
        """The engine's virtual environment; it may not exist."""
        return self.engine.home or Path(sys.prefix).parent / ".venv-engine"

    @property
    def volume_roots(self) -> tuple[Path, ...]:
        """Folders below which everything may be given to containers; they may not exist."""
        return self.home / "volumes", *self.containers.volume_roots

    def engine_home_of(self, version: str | None) -> Path:
        """The virtual environment of an engine by its version; the usual one's where it is not listed."""
        return self.engine.homes.get(version or "", self.engine_home)


def load_settings(**overrides: object) -> Settings:
    """Read settings from everywhere and validate them.

    Args:
        overrides: Sections by name that win over environment and file.

    Raises:
        SettingsError: Names each bad or unknown setting, its value and what is legal.
    """
    _check_variables(os.environ)
    named = os.environ.get(CONFIG_VARIABLE)
    if named and not Path(named).is_file():
        raise SettingsError(f"{CONFIG_VARIABLE}={named}: no such file")
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc'])} = {item.get('input')!r}: {item['msg']}"
            for item in error.errors(include_url=False)
        ]
        raise SettingsError("bad settings: " + "; ".join(lines)) from error
    except ValueError as error:
        raise SettingsError(f"bad settings file: {error}") from error
    except OSError as error:
        raise SettingsError(
            f"settings file {error.filename} cannot be read: {error.strerror};"
            f" give this user the right to read it, or set {HOME_VARIABLE} to another folder"
        ) from error


def _check_variables(environ: Mapping[str, str]) -> None:
    """Refuse what looks like a setting and is none, and an empty data folder."""
    if environ.get(HOME_VARIABLE) == "":
        raise SettingsError(f"{HOME_VARIABLE} is empty; name a folder or unset it")
    sections = {name.upper() for name in Settings.model_fields}
    for name in environ:
        section, found, _ = name.removeprefix("PILOTLIGHT_").partition("__")
        if name.startswith("PILOTLIGHT_") and found and section not in sections:
            known = ", ".join(sorted(section.lower() for section in sections - {"HOME"}))
            raise SettingsError(f"{name}: there is no section {section.lower()!r}; sections are {known}")
