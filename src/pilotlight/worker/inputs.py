"""From a job's `input` to the one request sent to the engine (`vllm-worker.md` §1.1 to §1.10).

Pure. `plan_request` is a dispatch table over the input families; each family is one small function that
returns an `UpstreamRequest` or raises `InputError`. What vLLM validates itself (ranges) is left to vLLM; this
module catches what vLLM would ignore or misread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from pilotlight.core.openai_routes import EMPTY_GET_ROUTES, RouteKind, check_route
from pilotlight.worker.batching import EVERY_EVENT, BatchSizes
from pilotlight.worker.errors import InputError
from pilotlight.worker.rewrite import rewrite_body

CHAT_ROUTE: Final = "/v1/chat/completions"
COMPLETION_ROUTE: Final = "/v1/completions"
NAMED_EVENT_ROUTES: Final = ("/v1/responses", "/v1/messages")

ACCEPTED_KEYS: Final = "openai_input, openai_route, route, messages or prompt"

NATIVE_DEFAULTS: Final[Mapping[str, Any]] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sent explicitly: vLLM fills absent fields from its generation config, the contract does not (§1.6)."""

KEPT_NULLS: Final = frozenset({"max_tokens", "stop", "stop_token_ids", "seed"})
"""Parameters whose null means something; every other null counts as absent (§1.6 rule 3)."""

UNUSABLE: Final = frozenset(
    {
        "detokenize",
        "output_kind",
        "extra_args",
        "flat_logprobs",
        "watermarking",
        "logits_processors",
        "logits_processor",
    }
)
"""Parameters that cannot be expressed over HTTP; refused by name (§1.5)."""

LIFTED_KEYS: Final = frozenset(
    {
        "n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p",
        "top_k", "min_p", "use_beam_search", "length_penalty", "early_stopping", "stop", "stop_token_ids",
        "ignore_eos", "max_tokens", "skip_special_tokens", "spaces_between_special_tokens", "min_tokens",
        "truncate_prompt_tokens", "include_stop_str_in_output", "seed", "logit_bias", "logprobs",
        "prompt_logprobs", "bad_words", "allowed_token_ids", "structured_outputs", "response_format", "echo",
        "add_generation_prompt", "continue_final_message", "chat_template", "tools", "tool_choice",
        "parallel_tool_calls", "chat_template_kwargs", "documents", "reasoning_effort", "include_reasoning",
        "priority", "cache_salt", "request_id", "model", "guided_decoding", "guided_json", "guided_regex",
        "guided_choice", "guided_grammar", "guided_whitespace_pattern", "guided_decoding_backend",
    }
    | UNUSABLE
)  # fmt: skip
"""Sampling keys that count when they stand beside `prompt` instead of inside `sampling_params` (§1.8)."""


class StreamFormat(StrEnum):
    """How the items of a streamed job look."""

    TOKENS = "tokens"
    SSE = "sse"
    CHUNKS = "chunks"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSettings:
    """What the worker's environment says about inputs.

    Attributes:
        batch: Sizes of streamed items where the request names none (§2.3).
        max_tokens: Native default; None = the rest of the context (`DEFAULT_MAX_TOKENS=auto`).
        native_stream_format: `tokens` or `sse` (§3.5).
        raw_openai_output: Streamed OpenAI items are strings of events, not lists of parsed chunks (§3.6).
        documented_defaults: Send the documented sampling defaults, not the model's (§1.6).
        allow_admin_routes: Let jobs reach routes that change engine state (§1.10).
    """

    batch: BatchSizes = field(default_factory=BatchSizes)
    max_tokens: int | None = 16
    native_stream_format: StreamFormat = StreamFormat.TOKENS
    raw_openai_output: bool = True
    documented_defaults: bool = True
    allow_admin_routes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamRequest:
    """One HTTP request to the engine and how to shape its answer.

    Attributes:
        method: HTTP method.
        target: Path and query.
        body: JSON body; None = no body.
        native: Shape the answer as §3.4 and §3.5 say; otherwise pass it through (§3.6).
        chat: Native only: the answer is a chat completion.
        stream: The engine was asked to stream.
        stream_format: Shape of streamed items.
        batch: Sizes of streamed items.
        choice_count: Native only: sequences the answer has (`n` times the number of prompts).
        sequences_per_prompt: Native only: `n`.
    """

    method: str
    target: str
    body: dict[str, Any] | None = None
    native: bool = False
    chat: bool = False
    stream: bool = False
    stream_format: StreamFormat = StreamFormat.SSE
    batch: BatchSizes = EVERY_EVENT
    choice_count: int = 1
    sequences_per_prompt: int = 1


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
        raise InputError(f"input must be a JSON object with {ACCEPTED_KEYS}, not {_kind(job_input)}")
    openai_input = job_input.get("openai_input")
    if openai_input is not None and not isinstance(openai_input, dict):
        raise InputError(f"openai_input must be an object, not {_kind(openai_input)}", param="openai_input")
    if openai_input or job_input.get("openai_route") is not None:
        return _plan_openai(job_input, openai_input or {}, settings)
    if job_input.get("route") is not None:
        return _plan_route(job_input, settings)
    if job_input.get("messages") is not None:
        return _plan_native(job_input, "messages", settings, job_id)
    if job_input.get("prompt") is not None:
        return _plan_native(job_input, "prompt", settings, job_id)
    raise InputError(f"input must contain one of {ACCEPTED_KEYS}")


def _plan_openai(job_input: dict[str, Any], body: dict[str, Any], settings: InputSettings) -> UpstreamRequest:
    route = job_input.get("openai_route") or CHAT_ROUTE
    _check_route_type(route, "openai_route")
    if body or route.partition("?")[0] not in EMPTY_GET_ROUTES:
        return _pass_through(job_input, "POST", route, body, settings)
    return _pass_through(job_input, "GET", route, None, settings)


def _plan_route(job_input: dict[str, Any], settings: InputSettings) -> UpstreamRequest:
    route = job_input["route"]
    _check_route_type(route, "route")
    body = job_input.get("body")
    if body is not None and not isinstance(body, dict):
        raise InputError(f"body must be an object, not {_kind(body)}", param="body")
    method = job_input.get("method")
    if method is None:
        method = "GET" if body is None else "POST"
    if not isinstance(method, str):
        raise InputError(f"method must be a string, not {_kind(method)}", param="method")
    return _pass_through(job_input, method.upper(), route, body, settings)


def _pass_through(
    job_input: dict[str, Any], method: str, route: str, body: dict[str, Any] | None, settings: InputSettings
) -> UpstreamRequest:
    decision = check_route(method, route, allow_admin=settings.allow_admin_routes)
    if not decision.allowed:
        raise InputError(decision.message, status=decision.status, error_type=decision.error_type)
    if decision.kind is RouteKind.MULTIPART:
        raise InputError(
            f"{decision.path} takes a form with a file, which a job cannot carry; call it directly"
        )
    asked = any(job_input.get(key) for key in _BATCH_KEYS)
    batch = _batch_sizes(job_input, settings.batch)
    if not asked and decision.path.startswith(NAMED_EVENT_ROUTES):
        batch = EVERY_EVENT
    body = None if body is None else rewrite_body(body)
    return UpstreamRequest(
        method=method,
        target=decision.target,
        body=body,
        stream=bool(body) and body is not None and body.get("stream") is True,
        stream_format=StreamFormat.SSE if settings.raw_openai_output else StreamFormat.CHUNKS,
        batch=batch,
    )


def _plan_native(
    job_input: dict[str, Any], source: str, settings: InputSettings, job_id: str | None
) -> UpstreamRequest:
    chat, content, prompts = _native_content(job_input, source)
    stream = _boolean(job_input, "stream")
    body = _native_parameters(job_input, settings, chat=chat)
    n = body.get("n", 1)
    sequences = n if isinstance(n, int) and n >= 1 else 1
    body["messages" if chat else "prompt"] = content
    body.pop("prompt" if chat else "messages", None)
    body["stream"] = stream
    body.pop("stream_options", None)
    if stream:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    if job_id is not None:
        body.setdefault("request_id", job_id)
    return UpstreamRequest(
        method="POST",
        target=CHAT_ROUTE if chat else COMPLETION_ROUTE,
        body=rewrite_body(body),
        native=True,
        chat=chat,
        stream=stream,
        stream_format=_stream_format(job_input, settings),
        batch=_batch_sizes(job_input, settings.batch),
        choice_count=sequences * prompts,
        sequences_per_prompt=sequences,
    )


def _native_content(job_input: dict[str, Any], source: str) -> tuple[bool, Any, int]:
    """Whether the job is a chat, its messages or prompt, and how many prompts it holds (§1.3)."""
    value = job_input[source]
    template = _boolean(job_input, "apply_chat_template")
    if isinstance(value, str):
        if not value:
            raise InputError(f"{source} must not be empty", param=source)
        if template and source == "prompt":
            return True, [{"role": "user", "content": value}], 1
        return False, value, 1
    if not isinstance(value, list) or not value:
        raise InputError(f"{source} must be a string or a list of messages, not {_kind(value)}", param=source)
    if all(isinstance(part, dict) for part in value):
        return True, value, 1
    if source == "prompt" and not template:
        if all(isinstance(part, str) for part in value):
            return False, value, len(value)
        if all(_is_int(part) for part in value):
            return False, value, 1
        if all(isinstance(part, list) and part and all(_is_int(token) for token in part) for part in value):
            return False, value, len(value)
    if source == "prompt" and template:
        raise InputError(
            "apply_chat_template needs prompt to be one string or a list of messages", param=source
        )
    raise InputError(
        f"{source} must be a string or a list of messages; its list mixes or holds other types", param=source
    )


def _native_parameters(job_input: dict[str, Any], settings: InputSettings, *, chat: bool) -> dict[str, Any]:
    """Sampling parameters for the engine: defaults, then top-level keys, then `sampling_params` (§1.6)."""
    given = job_input.get("sampling_params")
    if given is not None and not isinstance(given, dict):
        raise InputError(f"sampling_params must be an object, not {_kind(given)}", param="sampling_params")
    body: dict[str, Any] = dict(NATIVE_DEFAULTS) if settings.documented_defaults else {}
    body |= {"max_tokens": settings.max_tokens, "n": 1}
    lifted = {key: job_input[key] for key in LIFTED_KEYS if key in job_input}
    for key, value in (lifted | (given or {})).items():
        if value is None and key not in KEPT_NULLS:
            continue
        if key in UNUSABLE:
            raise InputError(f"{key} cannot be used: it has no form over HTTP", param=key)
        body[key] = value
    _settle_best_of(body)
    # Upstream's beam search always runs exhaustively; no value of early_stopping changes that (§1.7).
    body.pop("early_stopping", None)
    logprobs = body.get("logprobs")
    if chat and _is_int(logprobs):
        body["logprobs"] = True
        body.setdefault("top_logprobs", logprobs)
    return body


def _settle_best_of(body: dict[str, Any]) -> None:
    """Drops a `best_of` that asks for nothing; refuses one that vLLM would silently ignore."""
    best_of = body.pop("best_of", None)
    if best_of is None or best_of == body.get("n", 1):
        return
    raise InputError(
        f"best_of {best_of!r} is not supported: it must equal n, which is {body.get('n', 1)!r}",
        param="best_of",
    )


_BATCH_KEYS: Final = ("max_batch_size", "batch_size", "min_batch_size", "batch_size_growth_factor")


def _batch_sizes(job_input: dict[str, Any], default: BatchSizes) -> BatchSizes:
    """Item sizes: request value if truthy, else the worker's default (§1.2, §2.3)."""
    maximum = _number(job_input, "max_batch_size") or _number(job_input, "batch_size")
    minimum = _number(job_input, "min_batch_size")
    growth = _number(job_input, "batch_size_growth_factor")
    return BatchSizes(
        max(1, int(maximum)) if maximum else default.maximum,
        max(1, int(minimum)) if minimum else default.minimum,
        growth or default.growth,
    )


def _number(job_input: dict[str, Any], key: str) -> float:
    """A number that is not negative; 0 for absent, null and zero. Numeric strings count."""
    value = job_input.get(key)
    if value is None:
        return 0.0
    number = None
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = None
    # The second comparison also refuses NaN and infinity, which JSON readers let through as text.
    if number is None or not 0 <= number < 1e9:
        raise InputError(f"{key} must be a number that is not negative, not {value!r:.80}", param=key)
    return number


def _boolean(job_input: dict[str, Any], key: str) -> bool:
    value = job_input.get(key)
    if value is None or value is False or value is True:
        return bool(value)
    if isinstance(value, str) and value.lower() in {"true", "false", "1", "0"}:
        return value.lower() in {"true", "1"}
    if _is_int(value) and value in {0, 1}:
        return bool(value)
    raise InputError(f"{key} must be true or false, not {value!r:.80}", param=key)


def _stream_format(job_input: dict[str, Any], settings: InputSettings) -> StreamFormat:
    value = job_input.get("stream_format")
    if value is None:
        return settings.native_stream_format
    if value in ("tokens", "sse"):
        return StreamFormat(value)
    raise InputError(f"stream_format must be 'tokens' or 'sse', not {value!r:.80}", param="stream_format")


def _check_route_type(route: object, key: str) -> None:
    if not isinstance(route, str):
        raise InputError(f"{key} must be a string, not {_kind(route)}", param=key)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    """JSON's name for a value's type, for messages."""
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {names[type(value)].split()[-1]}"
    return names.get(type(value), "a number")
