"""Shapes of what a job yields: items and errors as `vllm-worker.md` §3.4 to §3.7 say.

Pure. `jobs` feeds engine answers in and posts what comes out. A shaper has two methods: `feed(event)` returns
the items that event completes, `close()` returns what is left at the end of the stream.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Final, Protocol

import msgspec

from pilotlight.worker.batching import BatchSchedule
from pilotlight.worker.errors import InputError
from pilotlight.worker.inputs import StreamFormat, UpstreamRequest
from pilotlight.worker.sse import DONE, SseEvent

Item = Any
"""One value yielded by a job: any JSON."""

_ERROR_TYPES: Final[Mapping[int, str]] = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowed",
    413: "PayloadTooLarge",
    429: "TooManyRequests",
    503: "ServiceUnavailable",
    504: "TimeoutError",
}


def error_text(
    status: int,
    message: str,
    *,
    error_type: str | None = None,
    param: str | None = None,
    retryable: bool = False,
    anthropic: bool = False,
) -> str:
    """The JSON text that a failed job carries as its `error` (§3.7).

    Args:
        status: HTTP status for callers who see this through an HTTP route; goes into `code`.
        message: One sentence for people.
        error_type: OpenAI error type; derived from `status` if None.
        param: Offending field.
        retryable: Another worker may succeed with the same job.
        anthropic: Use the form of `/v1/messages`.
    """
    kind = error_type or _ERROR_TYPES.get(status, "InternalServerError")
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": status}
    if anthropic:
        error = {"type": kind, "message": message, "code": status}
    error["retryable"] = retryable
    envelope = {"type": "error", "error": error} if anthropic else {"error": error}
    return _dump(envelope)


def input_error_text(error: InputError, *, anthropic: bool = False) -> str:
    """The error of a job whose input cannot be served."""
    return error_text(
        error.status, error.message, error_type=error.error_type, param=error.param, anthropic=anthropic
    )


def upstream_error_text(status: int, body: bytes, *, anthropic: bool = False) -> str:
    """The error of a job that the engine refused: its own envelope plus `retryable`, never prose around it.

    Args:
        status: HTTP status of the engine's answer.
        body: Its body, any bytes.
        anthropic: Use the form of `/v1/messages` where the engine sent no envelope.
    """
    envelope = _load(body)
    if isinstance(envelope, dict) and isinstance(envelope.get("error"), dict):
        error = {**envelope["error"], "retryable": False}
        error.setdefault("code", status)
        return _dump({**envelope, "error": error})
    message = body.decode("utf-8", "replace").strip()[:2000]
    if isinstance(envelope, dict):
        message = str(envelope.get("detail") or envelope.get("error") or envelope.get("message") or message)
    return error_text(status, message or f"the engine answered {status}", anthropic=anthropic)


def native_item(answer: dict[str, Any], *, chat: bool) -> Item:
    """The single item of a native job without streaming: vLLM's answer plus the older keys (§3.4)."""
    choices = []
    for choice in answer.get("choices") or []:
        message = choice.get("message") or {}
        text = message.get("content") if chat else choice.get("text")
        choices.append({**choice, "tokens": [text if isinstance(text, str) else ""]})
    return {**answer, "choices": choices, "usage": _native_usage(answer.get("usage") or {})}


def pass_through_item(body: bytes, content_type: str) -> Item:
    """The single item of an OpenAI or generic route without streaming (§3.6, §1.10 rule 6)."""
    kind = content_type.partition(";")[0].strip().lower()
    if not body:
        return {}
    if kind == "application/json" or kind.endswith("+json"):
        parsed = _load(body)
        if parsed is not None or body.strip() == b"null":
            # A success that owns a top-level error would fail the whole job, so it travels wrapped.
            if isinstance(parsed, dict) and parsed.get("error") is not None:
                return {"response": parsed, "openai_passthrough": True}
            return parsed
    if kind.startswith("text/") or kind == "application/json":
        return body.decode("utf-8", "replace")
    return {"content_type": content_type, "content_base64": base64.b64encode(body).decode("ascii")}


class StreamShaper(Protocol):
    """Turns the events of one upstream stream into items."""

    error: str | None
    """Set when the engine reported a failure inside the stream: the job's error text."""

    def feed(self, event: SseEvent) -> list[Item]:
        """Items completed by this event."""
        ...

    def close(self) -> list[Item]:
        """The last item, if anything is left."""
        ...


def make_shaper(request: UpstreamRequest) -> StreamShaper:
    """The shaper for a streamed request."""
    if request.native and request.stream_format is StreamFormat.TOKENS:
        return TokenShaper(request)
    return EventShaper(request)


class TokenShaper:
    """Native `tokens` format: items of text pieces per sequence, with cumulative usage (§3.5)."""

    def __init__(self, request: UpstreamRequest) -> None:
        self.error: str | None = None
        self._request = request
        self._schedule = BatchSchedule(request.batch)
        self._choices = self._empty_choices()
        self._head: dict[str, Any] = {}
        self._started = False
        self._usage_by_index: dict[int, dict[str, Any]] = {}
        self._totals: dict[str, Any] | None = None

    def feed(self, event: SseEvent) -> list[Item]:
        """Items completed by this event; an error event only sets `error`."""
        chunk = _event_object(event)
        if chunk is None or self.error is not None:
            return []
        if chunk.get("error") is not None:
            self.error = upstream_error_text(_error_status(chunk), event.data.encode())
            return []
        if not self._started and not self._head:
            self._head = {key: chunk[key] for key in ("id", "model", "created") if key in chunk}
        usage = chunk.get("usage")
        choices = chunk.get("choices") or []
        if not choices and isinstance(usage, dict):
            self._totals = usage
        items: list[Item] = []
        for choice in choices:
            index = choice.get("index") or 0
            if isinstance(usage, dict):
                self._usage_by_index[index] = usage
            if _is_announcement(choice):
                continue
            self._add_piece(index, choice)
            if self._schedule.add_piece():
                items.append(self._emit())
        return items

    def close(self) -> list[Item]:
        """The last, partial item; none if there was no piece since the previous one."""
        return [self._emit()] if self._schedule.pending else []

    def _add_piece(self, index: int, choice: dict[str, Any]) -> None:
        while index >= len(self._choices):
            self._choices.append({"index": len(self._choices), "tokens": []})
        target = self._choices[index]
        delta = choice.get("delta") or {}
        text = delta.get("content") if self._request.chat else choice.get("text")
        extras = {
            "reasoning": delta.get("reasoning"),
            "tool_calls": delta.get("tool_calls"),
            "logprobs": choice.get("logprobs"),
        }
        has_extra = False
        for key, value in extras.items():
            if value:
                target.setdefault(key, []).extend(value if key == "tool_calls" else [value])
                has_extra = has_extra or key != "logprobs"
        if isinstance(text, str) and (text or not has_extra):
            target["tokens"].append(text)
        elif not has_extra:
            target["tokens"].append("")
        if choice.get("finish_reason") is not None:
            target["finish_reason"] = choice["finish_reason"]
            target["stop_reason"] = choice.get("stop_reason")

    def _emit(self) -> Item:
        item: dict[str, Any] = {}
        if not self._started:
            self._started = True
            item = {**self._head, "object": "tokens.chunk"}
        item["choices"] = self._choices
        item["usage"] = _native_usage(self._totals if self._totals is not None else self._summed_usage())
        self._choices = self._empty_choices()
        return item

    def _empty_choices(self) -> list[dict[str, Any]]:
        return [{"index": index, "tokens": []} for index in range(self._request.choice_count)]

    def _summed_usage(self) -> dict[str, int]:
        """Totals so far. vLLM's running figures are per sequence, and its prompt counts per prompt."""
        prompts: dict[int, int] = {}
        completion = 0
        for index, usage in self._usage_by_index.items():
            prompts[index // self._request.sequences_per_prompt] = usage.get("prompt_tokens") or 0
            completion += usage.get("completion_tokens") or 0
        prompt = sum(prompts.values())
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class EventShaper:
    """Strings of whole events, or lists of parsed chunks, batched by the same schedule (§3.5, §3.6)."""

    def __init__(self, request: UpstreamRequest) -> None:
        self.error: str | None = None
        self._anthropic = request.target.startswith("/v1/messages")
        self._schedule = BatchSchedule(request.batch)
        self._as_chunks = request.stream_format is StreamFormat.CHUNKS
        self._pending: list[Any] = []

    def feed(self, event: SseEvent) -> list[Item]:
        """Items completed by this event; comments are dropped."""
        if event.is_comment:
            return []
        chunk = _event_object(event)
        self._note_error(event, chunk)
        if self._as_chunks:
            if event.data != DONE:
                data = chunk if chunk is not None else event.data
                self._pending.append({"event": event.name, "data": data} if event.name else data)
        else:
            self._pending.append(event.text)
        if not _is_piece(event, chunk) or not self._schedule.add_piece():
            return []
        return [self._take()]

    def close(self) -> list[Item]:
        """What is left, such as the usage event and `[DONE]`."""
        return [self._take()] if self._pending else []

    def _take(self) -> Item:
        pending, self._pending = self._pending, []
        return pending if self._as_chunks else "".join(pending)

    def _note_error(self, event: SseEvent, chunk: dict[str, Any] | None) -> None:
        if chunk is not None and chunk.get("error") is not None and (not event.name or event.name == "error"):
            self.error = upstream_error_text(
                _error_status(chunk), event.data.encode(), anthropic=self._anthropic
            )


def _is_piece(event: SseEvent, chunk: dict[str, Any] | None) -> bool:
    """Whether an event counts for the schedule (§2.2): it has news of a choice, or a name of its own."""
    if event.name:
        return True
    choices = chunk.get("choices") if chunk is not None else None
    return bool(choices) and not all(_is_announcement(choice) for choice in choices or [])


def _is_announcement(choice: dict[str, Any]) -> bool:
    """The event that opens a chat stream: a role with empty content."""
    delta = choice.get("delta")
    return (
        isinstance(delta, dict)
        and delta.get("role") is not None
        and not delta.get("content")
        and not delta.get("tool_calls")
        and choice.get("finish_reason") is None
    )


def _event_object(event: SseEvent) -> dict[str, Any] | None:
    if not event.data.startswith("{"):
        return None
    parsed = _load(event.data.encode())
    return parsed if isinstance(parsed, dict) else None


def _error_status(chunk: dict[str, Any]) -> int:
    error = chunk.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else 500


def _native_usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input": usage.get("prompt_tokens") or 0,
        "output": usage.get("completion_tokens") or 0,
        **usage,
    }


def _load(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _dump(value: object) -> str:
    return msgspec.json.encode(value).decode()
