"""Plans native jobs: a `prompt` or `messages` with `sampling_params` (`vllm-worker.md` §1.2 to §1.8).

Pure. Called by `inputs`. A text becomes a call of `/v1/completions`; a chat one of `/v1/chat/completions`, or
with `NATIVE_CHAT_MODE=raw` one of `/tokenize`, which applies the template, and then a completion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pilotlight.worker.batching import batch_sizes
from pilotlight.worker.errors import InputError
from pilotlight.worker.fields import as_integer, is_integer, kind_of, read_boolean, read_object
from pilotlight.worker.input_settings import ChatMode, InputSettings, StreamFormat
from pilotlight.worker.parameters import (
    DOCUMENTED_DEFAULTS,
    KEPT_NULLS,
    KNOWN,
    LIFTED,
    NOT_SAMPLING,
    UNUSABLE,
    Ignored,
    find_ignored,
    suggestion,
)
from pilotlight.worker.rewrite import ignored_guided, rewrite_guided
from pilotlight.worker.selection import count_prompts, plan_selection, settle_beams
from pilotlight.worker.upstream import CHAT_ROUTE, COMPLETION_ROUTE, UpstreamRequest

_TEMPLATE_FIELDS: Final = (
    "model", "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template",
    "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "tools",
)  # fmt: skip
"""What `/tokenize` takes of a chat."""

_CHAT_ONLY_FIELDS: Final = (
    *(name for name in _TEMPLATE_FIELDS if name != "model"),
    "documents", "reasoning_effort", "include_reasoning", "tool_choice", "parallel_tool_calls",
)  # fmt: skip
"""What a completion could not make sense of."""


def plan_native(
    job_input: dict[str, Any], source: str, settings: InputSettings, job_id: str | None
) -> UpstreamRequest:
    """The request for a native job.

    Args:
        job_input: The job's `input`.
        source: Which of its fields holds the text: `prompt` or `messages`.
        settings: Defaults of this worker.
        job_id: Becomes the engine's request id unless the job names one.

    Raises:
        InputError: A field or parameter cannot be used.
    """
    conversation, content = _content(job_input, source)
    raw = conversation and settings.native_chat_mode is ChatMode.RAW and _is_text(content)
    chat = conversation and not raw
    stream = read_boolean(job_input, "stream")
    asked = _asked(job_input, settings)
    given = {name: value for name, value in asked.items() if name not in NOT_SAMPLING}
    ignored = [*find_ignored(asked, chat=conversation), *ignored_guided(given)]
    body, doubled = _parameters(given, settings, chat=chat)
    body, idle = settle_beams(rewrite_guided(body), max_logprobs=settings.max_logprobs)
    n = body["n"]
    sequences = n if is_integer(n) and n >= 1 else 1
    prompts = 1 if conversation else count_prompts(content)
    body, selection = plan_selection(body, chat=chat, streamed=stream)
    template = None
    if raw:
        body, template = _split_template(body, content)
    else:
        body["messages" if chat else "prompt"] = content
    body["stream"] = stream and selection is None
    if body["stream"]:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    if job_id is not None:
        body.setdefault("request_id", job_id)
    return UpstreamRequest(
        method="POST",
        target=CHAT_ROUTE if chat else COMPLETION_ROUTE,
        body=body,
        template=template,
        # Without a number the completions route stops after 16 tokens; the chat route takes what is left.
        whole_context=not chat and body.get("max_tokens") is None,
        native=True,
        chat=chat,
        as_chat=raw,
        stream=body["stream"],
        stream_format=_stream_format(job_input, settings),
        batch=batch_sizes(job_input, settings.batch),
        flush_seconds=settings.flush_seconds,
        selection=selection,
        choice_count=sequences * prompts,
        sequences_per_prompt=sequences,
        ignored=(*ignored, *doubled, *idle),
    )


def _content(job_input: dict[str, Any], source: str) -> tuple[bool, Any]:
    """Whether the job is a conversation, and its messages or prompt (§1.3)."""
    value = job_input[source]
    template = read_boolean(job_input, "apply_chat_template")
    if isinstance(value, str):
        if not value:
            raise InputError(f"{source} must not be empty", param=source)
        if template and source == "prompt":
            return True, [{"role": "user", "content": value}]
        return False, value
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{source} must be a string or a list of messages, not {kind_of(value)}", param=source
        )
    if all(isinstance(part, dict) for part in value):
        return True, value
    if source == "prompt" and not template and _is_prompt_list(value):
        return False, value
    if source == "prompt" and template:
        raise InputError(
            "apply_chat_template needs prompt to be one string or a list of messages", param=source
        )
    raise InputError(
        f"{source} must be a string or a list of messages; its list mixes or holds other types", param=source
    )


def _is_prompt_list(value: list[Any]) -> bool:
    """Texts, token ids, or lists of token ids."""
    if all(isinstance(part, str) for part in value) or all(is_integer(part) for part in value):
        return True
    return all(isinstance(part, list) and part and all(map(is_integer, part)) for part in value)


def _is_text(messages: list[dict[str, Any]]) -> bool:
    """Whether a conversation can be told in tokens: a completion would lose its pictures and sound."""
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else ()
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            return False
    return True


def _asked(job_input: dict[str, Any], settings: InputSettings) -> dict[str, Any]:
    """What the caller asked for: top-level keys, then `sampling_params`, which win (§1.6 rules 2 and 3)."""
    sampling = read_object(job_input, "sampling_params") or {}
    if settings.strict_parameters:
        for name in sampling:
            if name not in KNOWN:
                raise InputError(
                    f"{name[:80]!r} is not a sampling parameter{suggestion(name)}", param=name[:80]
                )
    asked: dict[str, Any] = {}
    for source in ({name: job_input[name] for name in LIFTED if name in job_input}, sampling):
        asked |= {name: value for name, value in source.items() if value is not None or name in KEPT_NULLS}
    for name in asked:
        if name in UNUSABLE:
            raise InputError(f"{name} cannot be used: it has no form over HTTP", param=name)
    return asked


def _parameters(
    given: Mapping[str, Any], settings: InputSettings, *, chat: bool
) -> tuple[dict[str, Any], list[Ignored]]:
    """Sampling parameters in the engine's words: defaults, what was asked for, and `logprobs` (§1.6).

    Returns:
        The parameters, and those without effect because another one says the same.
    """
    body: dict[str, Any] = dict(DOCUMENTED_DEFAULTS) if settings.documented_defaults else {}
    body |= {"max_tokens": settings.max_tokens, "n": 1, **given}
    # The newer of two names for one thing, known to the chat route only, where it wins.
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    # The two exclude each other, and adding is the default.
    if body.get("continue_final_message"):
        body.setdefault("add_generation_prompt", False)
    # The engine reads 2.0 and "2" as 2, and the answer's shape depends on it.
    n = as_integer(body["n"])
    if n is not None:
        body["n"] = n
    logprobs = body.get("logprobs")
    if chat and is_integer(logprobs):
        body["logprobs"] = True
        body.setdefault("top_logprobs", logprobs)
    return (body, []) if chat else _text_logprobs(body)


def _text_logprobs(body: dict[str, Any]) -> tuple[dict[str, Any], list[Ignored]]:
    """A text's parameters, with a chat's `logprobs` and `top_logprobs` as the one number that says both."""
    logprobs, count = body.get("logprobs"), body.get("top_logprobs")
    rest = {name: value for name, value in body.items() if name not in {"logprobs", "top_logprobs"}}
    if logprobs is True:
        return {**rest, "logprobs": count or 0}, []
    if logprobs is None and count:
        return {**rest, "logprobs": count}, []
    if logprobs is not None and logprobs is not False:
        rest["logprobs"] = logprobs
    said = logprobs is not None and count
    return rest, [Ignored("top_logprobs", f"has no effect with logprobs: {logprobs!r:.20}")] if said else []


def _split_template(
    body: dict[str, Any], messages: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the completion gets, and what `/tokenize` gets: the messages and all that shapes the template."""
    template = {name: body[name] for name in _TEMPLATE_FIELDS if name in body} | {"messages": messages}
    # As vLLM's own chat route hands them to the template.
    extra: dict[str, Any] = {name: body[name] for name in ("documents", "reasoning_effort") if name in body}
    chosen = read_object(body, "chat_template_kwargs") or {}
    if "reasoning_effort" in extra and "enable_thinking" not in chosen:
        extra["enable_thinking"] = extra["reasoning_effort"] != "none"
    if extra:
        template["chat_template_kwargs"] = {**chosen, **extra}
    rest = {name: value for name, value in body.items() if name not in _CHAT_ONLY_FIELDS}
    return rest, template


def _stream_format(job_input: dict[str, Any], settings: InputSettings) -> StreamFormat:
    value = job_input.get("stream_format")
    if value is None:
        return settings.native_stream_format
    if value in ("tokens", "sse"):
        return StreamFormat(value)
    raise InputError(f"stream_format must be 'tokens' or 'sse', not {value!r:.80}", param="stream_format")
