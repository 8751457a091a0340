"""The variables by which a worker finds the platform (worker-protocol.md §2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote_plus, urlsplit

STATE_URL_VARIABLE = "PILOTLIGHT_WORKER_STATE_URL"
"""Where our own worker program reports its stages; unset on other platforms."""

RUN_FOLDER_VARIABLE = "PILOTLIGHT_WORKER_RUN_DIR"
"""Where our own worker program has its sockets; unset on other platforms."""

HTTP_HOST_VARIABLE = "PILOTLIGHT_HTTP_HOST"
"""The address that our worker program listens on in direct HTTP mode; unset in containers, for every one."""

LAUNCHER_VARIABLE = "PILOTLIGHT_LAUNCHER"
"""Path of the socket of a launcher that our worker program may ask to fork its engine; unset without one."""

FLASHBOOT_VARIABLE = "PILOTLIGHT_FLASHBOOT"
"""Set to `1` for our worker program where the platform may keep its engine frozen."""

DATA_CENTER = "LOCAL"
"""The id of the one data center there is: the owner's machines."""


def worker_environment(
    base_url: str,
    endpoint_id: str,
    worker_id: str,
    secret: str,
    *,
    ping_interval_ms: int,
    gpu_type: str | None = None,
    gpu_count: int = 0,
    cpu_count: int = 1,
    host_name: str = "localhost",
) -> dict[str, str]:
    """The environment that makes any program using RunPod's Python library a worker of ours.

    Args:
        base_url: Our origin as the worker reaches it, such as `http://127.0.0.1:8400`.
        endpoint_id: Whom it serves.
        worker_id: Who it is.
        secret: Its own credential, good for its own callbacks only.
        ping_interval_ms: Heartbeat period, at least 1000.
        gpu_type: Product name of its GPUs; None where it has none.
        gpu_count: How many it has.
        cpu_count: Processors that it may use.
        host_name: Name of its machine, for error reports.

    Returns:
        Variables to add to the worker's environment, as `join_environment` does it.
    """
    base = base_url.rstrip("/")
    # There has to be a query: the library appends to it without looking.
    prefix, query = f"{base}/v2/{endpoint_id}", f"gpu={quote_plus(gpu_type or 'cpu')}"
    return {
        "RUNPOD_WEBHOOK_GET_JOB": f"{prefix}/job-take/$ID?{query}",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{prefix}/job-done/$RUNPOD_POD_ID/$ID?{query}",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{prefix}/job-stream/$RUNPOD_POD_ID/$ID?{query}",
        "RUNPOD_WEBHOOK_PING": f"{prefix}/ping/$RUNPOD_POD_ID?{query}",
        "RUNPOD_PING_INTERVAL": str(ping_interval_ms),
        "RUNPOD_AI_API_KEY": secret,
        "RUNPOD_POD_ID": worker_id,
        "RUNPOD_POD_HOSTNAME": host_name,
        "RUNPOD_ENDPOINT_ID": endpoint_id,
        "RUNPOD_DC_ID": DATA_CENTER,
        "RUNPOD_CPU_COUNT": str(cpu_count),
        "RUNPOD_GPU_COUNT": str(gpu_count),
        **({"RUNPOD_GPU_TYPE_ID": gpu_type} if gpu_type else {}),
        "RUNPOD_LOG_LEVEL": "INFO",
        # The library's own checks need open internet and read the host's memory, not the worker's share.
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        # The client half of the library: a handler that calls other endpoints stays inside.
        "RUNPOD_ENDPOINT_BASE_URL": f"{base}/v2",
        "RUNPOD_API_BASE_URL": base,
        # Heartbeats honour HTTP_PROXY while takes and posts do not; behind a proxy they would be lost.
        "NO_PROXY": urlsplit(base).hostname or "",
        STATE_URL_VARIABLE: f"{base}/pilotlight/v1/worker-state/{endpoint_id}/{worker_id}",
    }


CHOOSABLE_VARIABLES = frozenset(
    {
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS",
        "RUNPOD_API_KEY",
        "RUNPOD_BINARY_GPU_TEST_PATH",
        "RUNPOD_DEBUG_LEVEL",
        "RUNPOD_GPU_BENCHMARK_TIMEOUT",
        "RUNPOD_GPU_MAX_ERROR_MESSAGES",
        "RUNPOD_GPU_TEST_TIMEOUT",
        "RUNPOD_LOG_LEVEL",
        "RUNPOD_MAX_DOWNLOAD_BYTES",
        "RUNPOD_MIN_CUDA_VERSION",
        "RUNPOD_MIN_DISK_PERCENT",
        "RUNPOD_MIN_MEMORY_GB",
        "RUNPOD_NETWORK_CHECK_TIMEOUT",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS",
        "RUNPOD_SKIP_GPU_CHECK",
    }
)
"""Variables of the library that a user may set (worker-protocol.md §2.2); all other RUNPOD_* are ours."""

_JOB_VARIABLES = frozenset({"RUNPOD_AI_API_KEY", "RUNPOD_PING_INTERVAL", STATE_URL_VARIABLE})
"""What only workers that take jobs need, beside the templates of URLs."""

_LOG_LEVELS = frozenset({"RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"})


def join_environment(
    chosen: Mapping[str, str], platform: Mapping[str, str], inherited: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a worker: what the user chose, and what the platform sets.

    The platform wins, except for `CHOOSABLE_VARIABLES`; of `NO_PROXY` all are kept, in both spellings,
    because programs differ in which one they read first.

    Args:
        chosen: The endpoint's variables.
        platform: From `worker_environment`, and whatever else must be there.
        inherited: The gateway's own environment, of which workers inherit the proxies.
    """
    kept = {name: value for name, value in chosen.items() if name in CHOOSABLE_VARIABLES}
    joined = {**chosen, **platform, **kept}
    if not _LOG_LEVELS.isdisjoint(kept):
        # The library reads RUNPOD_LOG_LEVEL first, which would hide the user's RUNPOD_DEBUG_LEVEL.
        for name in _LOG_LEVELS - kept.keys():
            joined.pop(name, None)
    sources = (inherited or {}, chosen, platform)
    lists = [source.get(name, "") for source in sources for name in ("NO_PROXY", "no_proxy")]
    hosts = [host.strip() for each in lists for host in each.split(",")]
    joined["NO_PROXY"] = joined["no_proxy"] = ",".join(dict.fromkeys(filter(None, hosts)))
    return joined


def is_own_program(command: Sequence[str]) -> bool:
    """Whether a command is our own worker program: `pilotlight worker` or `python -m pilotlight.worker`."""
    program, *arguments = command or ("",)
    if program.rpartition("/")[2] == "pilotlight":
        return arguments == ["worker"]
    return arguments in (["-m", "pilotlight.worker"], ["-m", "pilotlight", "worker"])


def without_jobs(platform: Mapping[str, str]) -> dict[str, str]:
    """The platform's variables for a worker that takes no jobs: no addresses to poll, no credential."""
    return {
        name: value
        for name, value in platform.items()
        if name not in _JOB_VARIABLES and not name.startswith("RUNPOD_WEBHOOK_")
    }
