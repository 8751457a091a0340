"""From a job's `input` to the one request sent to the engine (`vllm-worker.md` §1.1, §1.9, §1.10).

Pure. `plan_request` is a dispatch table over the input families; each family is one small function that
returns an `UpstreamRequest` or raises `InputError`. Prompts and messages are planned in `native`. What vLLM
validates itself (ranges) is left to vLLM; the worker catches what vLLM would ignore or misread.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from pilotlight.core.openai_routes import (
    RouteDecision,
    RouteKind,
    check_route,
    speaks_anthropic,
    usual_method,
)
from pilotlight.worker.batching import EVERY_EVENT, batch_sizes, names_batch_sizes
from pilotlight.worker.errors import InputError
from pilotlight.worker.fields import kind_of, read_object
from pilotlight.worker.input_settings import InputSettings, StreamFormat
from pilotlight.worker.native import plan_native
from pilotlight.worker.rewrite import translate_body
from pilotlight.worker.upstream import CHAT_ROUTE, UpstreamRequest

NAMED_EVENT_ROUTES: Final = ("/v1/responses", "/v1/messages")

ACCEPTED_KEYS: Final = "openai_input, openai_route, route, messages or prompt"

_EMPTY: Final[tuple[Any, ...]] = (None, "", {})


def plan_request(job_input: object, settings: InputSettings, *, job_id: str | None = None) -> UpstreamRequest:
    """The request that answers a job; the first matching family wins (§1.1).

    Args:
        job_input: The job's `input`, parsed JSON.
        settings: Defaults of this worker.
        job_id: Becomes the engine's request id of a native job, so that all logs share one key.

    Raises:
        InputError: The input cannot be served; carries the status and type of the envelope (§1.11).
    """
    if not isinstance(job_input, dict):
        raise InputError(f"input must be a JSON object with {ACCEPTED_KEYS}, not {kind_of(job_input)}")
    family = _family(job_input)
    if family == "openai_route":
        return _plan_openai(job_input, settings)
    if family == "route":
        return _plan_route(job_input, settings)
    if job_input.get("messages") is not None:
        return plan_native(job_input, "messages", settings, job_id)
    if job_input.get("prompt") is not None:
        return plan_native(job_input, "prompt", settings, job_id)
    raise InputError(f"input must contain one of {ACCEPTED_KEYS}")


def is_anthropic(job_input: object) -> bool:
    """Whether errors of this job take the form of `/v1/messages` (§3.7): by the route it goes to."""
    if not isinstance(job_input, dict):
        return False
    family = _family(job_input)
    route = job_input.get(family) if family is not None else None
    return isinstance(route, str) and speaks_anthropic(route)


def _family(job_input: dict[str, Any]) -> str | None:
    """The field that names the route of a job; None for native ones and for those that cannot be served."""
    if job_input.get("openai_input") not in _EMPTY or _present(job_input, "openai_route"):
        return "openai_route"
    return "route" if _present(job_input, "route") else None


def _present(job_input: dict[str, Any], key: str) -> bool:
    """Whether a field says anything; forms of clients leave it empty."""
    value = job_input.get(key)
    return value is not None and value != ""


def _plan_openai(job_input: dict[str, Any], settings: InputSettings) -> UpstreamRequest:
    body = (read_object(job_input, "openai_input") if _present(job_input, "openai_input") else None) or {}
    route = _route(job_input, "openai_route") if _present(job_input, "openai_route") else CHAT_ROUTE
    if body or usual_method(route) == "POST":
        return _pass_through(job_input, "POST", route, body, settings)
    return _pass_through(job_input, "GET", route, None, settings)


def _plan_route(job_input: dict[str, Any], settings: InputSettings) -> UpstreamRequest:
    route = _route(job_input, "route")
    body = read_object(job_input, "body")
    method = job_input.get("method")
    if method is None:
        method = "GET" if body is None else "POST"
        if not body and usual_method(route) == "GET":
            method, body = "GET", None
    if not isinstance(method, str):
        raise InputError(f"method must be a string, not {kind_of(method)}", param="method")
    return _pass_through(job_input, method.upper(), route, body, settings)


def _pass_through(
    job_input: dict[str, Any], method: str, route: str, body: dict[str, Any] | None, settings: InputSettings
) -> UpstreamRequest:
    decision = check_route(method, route, allow_admin=settings.allow_admin_routes)
    if not decision.allowed:
        raise InputError(decision.message, status=decision.status, error_type=decision.error_type)
    batch = batch_sizes(job_input, settings.batch)
    if decision.path.startswith(NAMED_EVENT_ROUTES) and not names_batch_sizes(job_input):
        batch = EVERY_EVENT
    request = UpstreamRequest(
        method=method,
        target=decision.target,
        stream_format=StreamFormat.SSE if settings.raw_openai_output else StreamFormat.CHUNKS,
        batch=batch,
        flush_seconds=settings.flush_seconds,
    )
    return (
        request if body is None else _with_body(request, decision, body, strict=settings.strict_passthrough)
    )


def _with_body(
    request: UpstreamRequest, decision: RouteDecision, body: dict[str, Any], *, strict: bool
) -> UpstreamRequest:
    translation = translate_body(decision.path, body, strict=strict)
    return replace(
        request,
        body=translation.body,
        form=decision.kind is RouteKind.MULTIPART,
        stream=translation.body.get("stream") is True,
        selection=translation.selection,
        ignored=translation.ignored,
    )


def _route(job_input: dict[str, Any], key: str) -> str:
    route = job_input[key]
    if not isinstance(route, str):
        raise InputError(f"{key} must be a string, not {kind_of(route)}", param=key)
    return route
