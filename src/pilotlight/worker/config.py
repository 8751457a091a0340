"""What the worker program reads from its environment, parsed and checked once at the start.

`WorkerConfig.from_environment` is pure over a mapping, so the whole contract of variables is tested without a
process. The RUNPOD_* variables follow `worker-protocol.md` §2.1, the rest `vllm-worker.md` §4.9.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import msgspec

from pilotlight.core.storage import storage_environment
from pilotlight.core.worker_environment import FLASHBOOT_VARIABLE, HTTP_HOST_VARIABLE, LAUNCHER_VARIABLE
from pilotlight.domain.worker import WORKER_COOKIE
from pilotlight.engines.flags import clean_value, without_prefix
from pilotlight.engines.flags.variables import PREFIX_FORM, describe
from pilotlight.worker.errors import ConfigError
from pilotlight.worker.input_settings import InputSettings
from pilotlight.worker.variables import read_boolean, read_choice, read_number

_TAKE = "/job-take/"
_PORT_MAX = 65_535
SOCKET_PATH_BYTES_MAX = 107
"""Longest path of a Unix socket on Linux."""

_EVERY_INTERFACE = "0.0.0.0"  # noqa: S104 - what a container needs; on a shared machine the platform says better

_HIDDEN_PREFIXES = ("RUNPOD_", "PILOTLIGHT_", "DOCKERHUB_", "BUCKET_", PREFIX_FORM)
_HIDDEN = frozenset(
    {
        "VLLM_API_KEY", "VLLM_PORT", "VLLM_EXTRA_ARGS", "VLLM_CONFIG_FILE", "VLLM_STARTUP_TIMEOUT",
        "VLLM_BASE_URL", "VLLM_VERSION", "VLLM_NIGHTLY", "VLLM_INTERNAL_PORT", "VLLM_ATTENTION_BACKEND",
    }
)  # fmt: skip
"""Variables the engine must not see: secrets, and VLLM_* names it does not know (`vllm-worker.md` §4.4)."""


@dataclass(frozen=True, slots=True)
class PlatformUrls:
    """The platform's URLs for this worker, by `worker-protocol.md` §2.1.

    Attributes:
        take: Single take; holds a query.
        batch: Batch take.
        stop: Stop channel; None where the take URL has no `/job-take/`.
        output: Result template with `$ID` for the job; None drops results.
        stream: Chunk template with `$ID`; None drops chunks.
        ping: Heartbeat; None switches heartbeats off.
    """

    take: str
    batch: str
    stop: str | None
    output: str | None
    stream: str | None
    ping: str | None

    @classmethod
    def from_environment(cls, env: Mapping[str, str], worker_id: str) -> PlatformUrls:
        """The URLs with the worker's id filled in; raises ConfigError without a take URL."""
        take = env.get("RUNPOD_WEBHOOK_GET_JOB", "").strip()
        if not take.startswith(("http://", "https://")):
            # Such a URL holds the worker's credential, so it is not shown.
            problem = "begins with neither http:// nor https://" if take else "is not set"
            raise ConfigError(f"RUNPOD_WEBHOOK_GET_JOB must be the URL to take jobs from; it {problem}")
        take = take.replace("$ID", quote(worker_id, safe=""))

        def posted(name: str) -> str | None:
            return env[name].replace("$RUNPOD_POD_ID", quote(worker_id, safe="")) if env.get(name) else None

        authorised = bool(env.get("RUNPOD_AI_API_KEY")) and bool(env.get("RUNPOD_POD_ID"))
        return cls(
            take=take,
            batch=take.replace(_TAKE, "/job-take-batch/"),
            stop=take.replace(_TAKE, "/job-stop/") if _TAKE in take else None,
            output=posted("RUNPOD_WEBHOOK_POST_OUTPUT"),
            stream=posted("RUNPOD_WEBHOOK_POST_STREAM"),
            ping=posted("RUNPOD_WEBHOOK_PING") if authorised else None,
        )


NO_URLS = PlatformUrls(take="", batch="", stop=None, output=None, stream=None, ping=None)
"""Of a worker that takes no jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectSettings:
    """Where a worker in direct HTTP mode listens (`vllm-worker.md` §7.1).

    Attributes:
        host: Address to bind (`PILOTLIGHT_HTTP_HOST`); every interface where it is unset, as in a container.
        port: For requests.
        health_port: For health checks; may be the same.
        health_path: What health checks ask for.
    """

    host: str
    port: int
    health_port: int
    health_path: str

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> DirectSettings | None:
        """The settings of `WORKER_MODE=http`; None for `queue`, the default."""
        if read_choice(env, "WORKER_MODE", ("queue", "http")) == "queue":
            return None
        port = _port(env, "PORT", 80)
        path = clean_value(env.get("HEALTH_CHECK_PATH")) or "/ping"
        if not path.startswith("/"):
            raise ConfigError(f"HEALTH_CHECK_PATH must be a path such as /ping, not {path!r}")
        return cls(
            host=clean_value(env.get(HTTP_HOST_VARIABLE)) or _EVERY_INTERFACE,
            port=port,
            health_port=_port(env, "PORT_HEALTH", port),
            health_path=path,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything the worker program was told.

    Attributes:
        worker_id: `RUNPOD_POD_ID`.
        platform_key: `RUNPOD_AI_API_KEY`, sent raw.
        urls: Where to take jobs and post results; empty in direct HTTP mode.
        direct: Where to listen in direct HTTP mode, in which no jobs are taken (`WORKER_MODE=http`); None in
            queue mode.
        ping_seconds: Heartbeat interval (`RUNPOD_PING_INTERVAL`, milliseconds there).
        state_url: `PILOTLIGHT_WORKER_STATE_URL`; None = no reports, as on RunPod.
        engine_python: Interpreter of the engine's environment.
        engine_home: Folder with the engine's manifest; None where there is none.
        engine_command: Replaces `python -m vllm…` (`PILOTLIGHT_ENGINE_COMMAND`, a JSON list).
        launcher: Socket of a process that has imported the engine and forks it (`PILOTLIGHT_LAUNCHER`); None
            where the platform keeps none.
        run_folder: For the two sockets (`PILOTLIGHT_WORKER_RUN_DIR`); None = a fresh temporary one.
        model_name: `MODEL_NAME`.
        max_concurrency: Jobs at a time.
        automatic_concurrency: As many as the engine says it has memory for (`MAX_CONCURRENCY=auto`);
            `max_concurrency` holds where it does not say.
        drain_seconds: How long running jobs may finish after SIGTERM.
        startup_seconds: How long the engine may take to become healthy.
        request_seconds: How long one job may take.
        platform_lost_seconds: The platform may be unreachable for so long before the worker ends itself; only
            where there is a state URL (`PLATFORM_LOST_TIMEOUT`).
        flashboot: The worker will be frozen when it idles (`PILOTLIGHT_FLASHBOOT`), so its engine is started
            with what that needs.
        sleep_level: How deep an engine on a GPU sleeps while it is frozen (`FLASHBOOT_SLEEP_LEVEL`): 1 keeps
            the weights in main memory, 2 forgets them.
        inputs: Defaults of job inputs.
        environment: The variables the engine and its flags are made of.
    """

    worker_id: str
    platform_key: str = field(repr=False)
    urls: PlatformUrls
    direct: DirectSettings | None = None
    ping_seconds: float = 2.0
    state_url: str | None = None
    engine_python: str
    engine_home: Path | None = None
    engine_command: tuple[str, ...] | None = None
    launcher: Path | None = None
    run_folder: Path | None = None
    model_name: str
    max_concurrency: int = 30
    automatic_concurrency: bool = False
    drain_seconds: float = 30.0
    startup_seconds: float = 1200.0
    request_seconds: float = 3600.0
    platform_lost_seconds: float = 60.0
    flashboot: bool = False
    sleep_level: int = 1
    inputs: InputSettings = field(default_factory=InputSettings)
    environment: Mapping[str, str] = field(repr=False)

    @classmethod
    def from_environment(
        cls, env: Mapping[str, str], *, python: str, fallback_model: str | None = None
    ) -> WorkerConfig:
        """The configuration, or ConfigError naming the variable, its value and what is legal.

        Args:
            env: The process environment.
            python: Interpreter to start the engine with where `PILOTLIGHT_ENGINE_HOME` names none.
            fallback_model: What to serve where `MODEL_NAME` is unset: what an image or a file says.
        """
        env = without_prefix(env)
        worker_id = clean_value(env.get("RUNPOD_POD_ID")) or f"local-{os.getpid()}"
        model = clean_value(env.get("MODEL_NAME")) or fallback_model
        if model is None:
            # vLLM alone would quietly serve a model of its own choice (`vllm-worker.md` §4.1).
            raise ConfigError("MODEL_NAME is not set: a hub id, a folder, or pilotlight/ember")
        automatic = (clean_value(env.get("MAX_CONCURRENCY")) or "").lower() == "auto"
        direct = DirectSettings.from_environment(env)
        home = clean_value(env.get("PILOTLIGHT_ENGINE_HOME"))
        run_folder = clean_value(env.get("PILOTLIGHT_WORKER_RUN_DIR"))
        launcher = clean_value(env.get(LAUNCHER_VARIABLE))
        return cls(
            worker_id=worker_id,
            platform_key=env.get("RUNPOD_AI_API_KEY", ""),
            urls=NO_URLS if direct is not None else PlatformUrls.from_environment(env, worker_id),
            direct=direct,
            ping_seconds=read_number(env, "RUNPOD_PING_INTERVAL", 2000, minimum=100) / 1000,
            state_url=clean_value(env.get("PILOTLIGHT_WORKER_STATE_URL")),
            engine_python=str(Path(home) / "bin" / "python") if home else python,
            engine_home=Path(home) if home else Path(python).parent.parent,
            engine_command=_command(env),
            launcher=Path(launcher) if launcher else None,
            run_folder=_run_folder(run_folder) if run_folder else None,
            model_name=model,
            max_concurrency=30 if automatic else _whole(env, "MAX_CONCURRENCY", 30),
            automatic_concurrency=automatic,
            drain_seconds=read_number(env, "DRAIN_TIMEOUT", 30, minimum=0),
            startup_seconds=read_number(env, "VLLM_STARTUP_TIMEOUT", 1200, minimum=0.1),
            request_seconds=read_number(env, "REQUEST_TIMEOUT", 3600, minimum=0.1),
            platform_lost_seconds=read_number(env, "PLATFORM_LOST_TIMEOUT", 60, minimum=1),
            flashboot=read_boolean(env, FLASHBOOT_VARIABLE, default=False),
            sleep_level=int(read_choice(env, "FLASHBOOT_SLEEP_LEVEL", ("1", "2"))),
            inputs=InputSettings.from_environment(env),
            environment={**env, "MODEL_NAME": model},
        )


def engine_environment(
    env: Mapping[str, str], *, worker_id: str, engine_key: str, offline: bool, platform: str
) -> dict[str, str]:
    """The engine's environment: the worker's without secrets, plus what the engine needs (§4.4).

    Args:
        env: The worker's own environment.
        worker_id: Goes into the cookie by which every process of this worker is found.
        engine_key: Key the engine will ask for; passed here and never on the command line.
        offline: The model is local: keep the hub library from asking the network.
        platform: `cpu` or `cuda`; "" if unknown, then the cache of a CPU build is bounded here, since no
            option may be passed. Where it is known, an option does that, over which this variable would win.
    """
    child = {
        name: value
        for name, value in env.items()
        if not name.startswith(_HIDDEN_PREFIXES) and name not in _HIDDEN and not _is_unset(name, value)
    }
    child |= storage_environment(child, volume_present=False)
    if "HF_XET_HIGH_PERFORMANCE" in child:
        child.pop("HF_HUB_ENABLE_HF_TRANSFER", None)
    if not platform:
        child.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if offline:
        child.setdefault("HF_HUB_OFFLINE", "1")
        child.setdefault("TRANSFORMERS_OFFLINE", "1")
    return child | {
        "VLLM_API_KEY": engine_key,
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        # Without this, setproctitle writes process titles over the memory that /proc/PID/environ shows, and
        # the cookie below could not be read back.
        "SPT_NOENV": "1",
        WORKER_COOKIE: worker_id,
    }


def planned_environment(
    config: WorkerConfig, variables: Mapping[str, str], *, engine_key: str, offline: bool, platform: str
) -> dict[str, str]:
    """The complete environment of a worker's engine.

    The gateway asks this, too, to learn which launcher such an engine can be forked from, so nothing may be
    added to an engine's environment elsewhere.

    Args:
        config: What the worker was told.
        variables: Its environment, with folders in the place of repositories where they are known.
        engine_key: As for `engine_environment`, as are the others.
        offline: As there.
        platform: As there.
    """
    # vLLM's own patience with its processes is 600 s; the worker's is what counts.
    defaults = {"VLLM_ENGINE_READY_TIMEOUT_S": str(math.ceil(config.startup_seconds))}
    if config.flashboot and platform == "cuda":
        # The routes that put it to sleep and wake it up; callers cannot reach them (core/openai_routes.py).
        defaults["VLLM_SERVER_DEV_MODE"] = "1"
    return engine_environment(
        {**defaults, **variables},
        worker_id=config.worker_id,
        engine_key=engine_key,
        offline=offline,
        platform=platform,
    )


def _is_unset(name: str, value: str) -> bool:
    """Whether a variable that we or the engine know says "unset"; vLLM would read `None` as a number."""
    return clean_value(value) is None and describe(name) is not None


def _run_folder(name: str) -> Path:
    longest = f"{name}/engine.sock"
    if len(os.fsencode(longest)) > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"PILOTLIGHT_WORKER_RUN_DIR is too long: {longest} exceeds {SOCKET_PATH_BYTES_MAX} bytes"
        )
    return Path(name)


def _whole(env: Mapping[str, str], name: str, default: int) -> int:
    number = read_number(env, name, default, minimum=1)
    if number != int(number):
        raise ConfigError(f"{name} must be a whole number, not {env[name]!r}")
    return int(number)


def _port(env: Mapping[str, str], name: str, default: int) -> int:
    port = _whole(env, name, default)
    if port > _PORT_MAX:
        raise ConfigError(f"{name} must be a port from 1 to {_PORT_MAX}, not {env[name]!r}")
    return port


def _command(env: Mapping[str, str]) -> tuple[str, ...] | None:
    text = clean_value(env.get("PILOTLIGHT_ENGINE_COMMAND"))
    if text is None:
        return None
    try:
        command = msgspec.json.decode(text, type=list[str])
    except msgspec.DecodeError as error:
        raise ConfigError(f"PILOTLIGHT_ENGINE_COMMAND must be a JSON list of strings: {error}") from error
    if not command:
        raise ConfigError("PILOTLIGHT_ENGINE_COMMAND must not be an empty list")
    return tuple(command)
