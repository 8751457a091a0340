"""What the worker program reads from its environment, parsed and checked once at the start.

`WorkerConfig.from_environment` is pure over a mapping, so the whole contract of variables is tested without a
process. The RUNPOD_* variables follow `worker-protocol.md` §2.1, the rest `vllm-worker.md` §4.9.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import msgspec

from pilotlight.domain.worker import WORKER_COOKIE
from pilotlight.engines.vllm_flags import clean_value, parse_boolean
from pilotlight.worker.batching import BatchSizes
from pilotlight.worker.errors import ConfigError
from pilotlight.worker.inputs import InputSettings, StreamFormat

_TAKE = "/job-take/"

_HIDDEN_PREFIXES = ("RUNPOD_", "PILOTLIGHT_")
_HIDDEN = frozenset(
    {
        "VLLM_API_KEY", "VLLM_EXTRA_ARGS", "VLLM_CONFIG_FILE", "VLLM_STARTUP_TIMEOUT", "VLLM_BASE_URL",
        "VLLM_VERSION", "VLLM_NIGHTLY", "VLLM_INTERNAL_PORT", "VLLM_ATTENTION_BACKEND",
        "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY",
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
            raise ConfigError(f"RUNPOD_WEBHOOK_GET_JOB must be the URL to take jobs from, not {take!r}")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything the worker program was told.

    Attributes:
        worker_id: `RUNPOD_POD_ID`.
        platform_key: `RUNPOD_AI_API_KEY`, sent raw.
        urls: Where to take jobs and post results.
        ping_seconds: Heartbeat interval (`RUNPOD_PING_INTERVAL`, milliseconds there).
        state_url: `PILOTLIGHT_WORKER_STATE_URL`; None = no reports, as on RunPod.
        engine_python: Interpreter of the engine's environment.
        engine_home: Folder with the engine's manifest; None where there is none.
        engine_command: Replaces `python -m vllm…` (`PILOTLIGHT_ENGINE_COMMAND`, a JSON list).
        run_folder: For the two sockets (`PILOTLIGHT_WORKER_RUN_DIR`); None = a fresh temporary one.
        model_name: `MODEL_NAME`.
        max_concurrency: Jobs at a time.
        drain_seconds: How long running jobs may finish after SIGTERM.
        startup_seconds: How long the engine may take to become healthy.
        request_seconds: How long one job may take.
        platform_lost_seconds: The platform may be unreachable for so long before the worker ends itself; only
            where there is a state URL (`PLATFORM_LOST_TIMEOUT`).
        inputs: Defaults of job inputs.
        environment: The variables the engine and its flags are made of.
    """

    worker_id: str
    platform_key: str = field(repr=False)
    urls: PlatformUrls
    ping_seconds: float = 2.0
    state_url: str | None = None
    engine_python: str
    engine_home: Path | None = None
    engine_command: tuple[str, ...] | None = None
    run_folder: Path | None = None
    model_name: str
    max_concurrency: int = 30
    drain_seconds: float = 30.0
    startup_seconds: float = 1200.0
    request_seconds: float = 3600.0
    platform_lost_seconds: float = 60.0
    inputs: InputSettings = field(default_factory=InputSettings)
    environment: Mapping[str, str] = field(repr=False)

    @classmethod
    def from_environment(cls, env: Mapping[str, str], *, python: str) -> WorkerConfig:
        """The configuration, or ConfigError naming the variable, its value and what is legal.

        Args:
            env: The process environment.
            python: Interpreter to start the engine with where `PILOTLIGHT_ENGINE_HOME` names none.
        """
        worker_id = clean_value(env.get("RUNPOD_POD_ID")) or f"local-{os.getpid()}"
        model = clean_value(env.get("MODEL_NAME"))
        if model is None:
            raise ConfigError("MODEL_NAME is not set: a hub id, a folder, or pilotlight/ember")
        home = clean_value(env.get("PILOTLIGHT_ENGINE_HOME"))
        run_folder = clean_value(env.get("PILOTLIGHT_WORKER_RUN_DIR"))
        return cls(
            worker_id=worker_id,
            platform_key=env.get("RUNPOD_AI_API_KEY", ""),
            urls=PlatformUrls.from_environment(env, worker_id),
            ping_seconds=_number(env, "RUNPOD_PING_INTERVAL", 2000, minimum=100) / 1000,
            state_url=clean_value(env.get("PILOTLIGHT_WORKER_STATE_URL")),
            engine_python=str(Path(home) / "bin" / "python") if home else python,
            engine_home=Path(home) if home else Path(python).parent.parent,
            engine_command=_command(env),
            run_folder=Path(run_folder) if run_folder else None,
            model_name=model,
            max_concurrency=int(_number(env, "MAX_CONCURRENCY", 30, minimum=1)),
            drain_seconds=_number(env, "DRAIN_TIMEOUT", 30, minimum=0),
            startup_seconds=_number(env, "VLLM_STARTUP_TIMEOUT", 1200, minimum=0.1),
            request_seconds=_number(env, "REQUEST_TIMEOUT", 3600, minimum=0.1),
            platform_lost_seconds=_number(env, "PLATFORM_LOST_TIMEOUT", 60, minimum=1),
            inputs=_input_settings(env),
            environment=dict(env),
        )


def _input_settings(env: Mapping[str, str]) -> InputSettings:
    stream_format = (clean_value(env.get("NATIVE_STREAM_FORMAT")) or "tokens").lower()
    if stream_format not in {"tokens", "sse"}:
        raise ConfigError(f"NATIVE_STREAM_FORMAT must be 'tokens' or 'sse', not {stream_format!r}")
    defaults = (clean_value(env.get("NATIVE_SAMPLING_DEFAULTS")) or "documented").lower()
    if defaults not in {"documented", "model"}:
        raise ConfigError(f"NATIVE_SAMPLING_DEFAULTS must be 'documented' or 'model', not {defaults!r}")
    automatic = (clean_value(env.get("DEFAULT_MAX_TOKENS")) or "").lower() == "auto"
    return InputSettings(
        batch=BatchSizes(
            int(_number(env, "DEFAULT_BATCH_SIZE", 50, minimum=1)),
            int(
                _number(
                    env, "DEFAULT_MIN_BATCH_SIZE", _number(env, "MIN_BATCH_SIZE", 1, minimum=0), minimum=0
                )
            ),
            _number(
                env,
                "DEFAULT_BATCH_SIZE_GROWTH_FACTOR",
                _number(env, "BATCH_SIZE_GROWTH_FACTOR", 3, minimum=0),
                minimum=0,
            ),
        ),
        max_tokens=None if automatic else int(_number(env, "DEFAULT_MAX_TOKENS", 16, minimum=1)),
        native_stream_format=StreamFormat(stream_format),
        raw_openai_output=_boolean(env, "RAW_OPENAI_OUTPUT", default=True),
        documented_defaults=defaults == "documented",
        allow_admin_routes=_boolean(env, "ALLOW_ADMIN_ROUTES", default=False),
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
        platform: `cpu` or `cuda`; "" if unknown, then CPU settings are made, which a GPU build ignores.
    """
    child = {
        name: value
        for name, value in env.items()
        if not name.startswith(_HIDDEN_PREFIXES) and name not in _HIDDEN
    }
    if not child.get("VLLM_PORT", "0").isdigit():
        del child["VLLM_PORT"]
    if "HUGGING_FACE_HUB_TOKEN" in child:
        child.setdefault("HF_TOKEN", child["HUGGING_FACE_HUB_TOKEN"])
    if platform != "cuda":
        child.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if offline:
        child.setdefault("HF_HUB_OFFLINE", "1")
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


def _number(env: Mapping[str, str], name: str, default: float, *, minimum: float) -> float:
    text = clean_value(env.get(name))
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not minimum <= value < 1e9:
        raise ConfigError(f"{name} must be a number of at least {minimum:g}, not {text!r}")
    return value


def _boolean(env: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = clean_value(env.get(name))
    if text is None:
        return default
    value = parse_boolean(text)
    if value is None:
        raise ConfigError(f"{name} must be true or false, not {text!r}")
    return value
