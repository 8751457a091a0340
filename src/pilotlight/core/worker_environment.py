"""The variables by which a worker finds the platform (worker-protocol.md §2.1)."""

from __future__ import annotations

from urllib.parse import quote_plus, urlsplit

STATE_URL_VARIABLE = "PILOTLIGHT_WORKER_STATE_URL"
"""Where our own worker program reports its stages; unset on other platforms."""


def worker_environment(
    base_url: str,
    endpoint_id: str,
    worker_id: str,
    secret: str,
    *,
    ping_interval_ms: int,
    gpu: str = "cpu",
    host_name: str = "localhost",
) -> dict[str, str]:
    """The environment that makes any program using RunPod's Python library a worker of ours.

    Args:
        base_url: Our origin as the worker reaches it, such as `http://127.0.0.1:8400`.
        endpoint_id: Whom it serves.
        worker_id: Who it is.
        secret: Its own credential, good for its own callbacks only.
        ping_interval_ms: Heartbeat period, at least 1000.
        gpu: Kind of device; it also supplies the query that the library appends to without looking.
        host_name: Name of its machine, for error reports.

    Returns:
        Variables to add to the worker's environment. `NO_PROXY` must be joined with a value the user
        has set; every other one wins over the user's.
    """
    base = base_url.rstrip("/")
    prefix, query = f"{base}/v2/{endpoint_id}", f"gpu={quote_plus(gpu)}"
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
