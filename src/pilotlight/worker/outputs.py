"""Shapes of what a job yields: items and errors as `vllm-worker.md` §3.4 to §3.7 say.

Pure. `runner` feeds engine answers in and posts what comes out. Of a shaper, `feed(event)` returns the items
that event completes, `flush()` what is left when the stream ends or pauses.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from pilotlight.worker.batching import BatchSchedule
from pilotlight.worker.errors import InputError
from pilotlight.worker.input_settings import StreamFormat
from pilotlight.worker.selection import event_texts, select, stream_chunks
from pilotlight.worker.sse import DONE, SseEvent
from pilotlight.worker.upstream import UpstreamRequest

Item = Any
"""One value yielded by a job: any JSON."""

CHUNK_BYTES_MAX: Final = 1024 * 1024
"""Largest item of a stream; §3.1. What would become larger is cut before its time."""

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


_HEAD: Final = ("id", "model", "created", "prompt_token_ids", "prompt_text")
"""What the first item of a native stream says of the whole; the prompt only where that was asked for."""

_FRAME_BYTES: Final = 2
"""Brackets or quotes around an item."""

_USAGE_BYTES: Final = 256
"""Room for what every item of a native stream holds beside its choices."""

_NO_TEMPLATE: Final = "default chat template is no longer allowed"
_TEMPLATE_ADVICE: Final = "Send prompt instead of messages, or set CUSTOM_CHAT_TEMPLATE on the endpoint."
"""For a model without a template (§1.4)."""


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


def gone_text(*, anthropic: bool = False, shut_down: bool = False) -> str:
    """The error of a job that another worker should run: 503, `retryable: true` (§1.11).

    Args:
        anthropic: Use the form of `/v1/messages`.
        shut_down: The worker ended, not the engine.
    """
    message = (
        "the worker was shut down before the job finished"
        if shut_down
        else "the engine ended before the job finished"
    )
    return error_text(503, message, retryable=True, anthropic=anthropic)


def upstream_error_text(status: int, body: bytes, *, anthropic: bool = False, native: bool = False) -> str:
    """The error of a job that the engine refused: its own envelope plus `retryable`, never prose around it.

    Args:
        status: HTTP status of the engine's answer.
        body: Its body, any bytes.
        anthropic: Use the form of `/v1/messages` where the engine sent no envelope.
        native: The job named no route of the engine, so it is told what to send instead where that helps.
    """
    envelope = _load(body)
    if isinstance(envelope, dict) and isinstance(envelope.get("error"), dict):
        error = {**envelope["error"], "retryable": False}
        error.setdefault("code", status)
        if native and _NO_TEMPLATE in str(error.get("message")):
            error["message"] = f"{error['message']} {_TEMPLATE_ADVICE}"
        return _dump({**({"type": "error"} if anthropic else {}), **envelope, "error": error})
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


def whole_items(
    request: UpstreamRequest, body: bytes, content_type: str, *, item_bytes: int = CHUNK_BYTES_MAX
) -> tuple[list[Item], bool]:
    """What becomes of an answer that came whole, whether or not a stream was asked for.

    Args:
        request: The request.
        body: The answer.
        content_type: Its type.
        item_bytes: How large an item of a stream may become.

    Returns:
        The items, and whether they are a stream's. A stream is one item, too, unless that would be too large.

    Raises:
        InputError: There is nothing to select by (§1.7).
    """
    answer = pass_through_item(body, content_type)
    if not isinstance(answer, dict) or "choices" not in answer:
        return [answer], False
    if request.selection is not None:
        answer = select(answer, request.selection)
    if request.as_chat:
        answer = _chat_completion(answer)
    chat = request.chat or request.as_chat
    if request.selection is None or not request.selection.streamed:
        return [native_item(answer, chat=chat) if request.native else answer], False
    if request.native and request.stream_format is StreamFormat.TOKENS:
        return [native_item(answer, chat=chat)], False
    chunks = stream_chunks(
        answer,
        chat=chat if request.native else request.selection.chat,
        include_usage=request.native or request.selection.include_usage,
    )
    as_chunks = request.stream_format is StreamFormat.CHUNKS
    bundle = _Bundle(as_chunks=as_chunks, item_bytes=item_bytes)
    items = [item for piece in (chunks if as_chunks else event_texts(chunks)) for item in bundle.add(piece)]
    return items + bundle.take(), True


def _chat_completion(answer: dict[str, Any]) -> dict[str, Any]:
    """A text completion handed out as the chat completion that the caller asked for (§1.4, §3.4)."""
    choices = []
    for choice in answer["choices"]:
        rest = {key: value for key, value in choice.items() if key != "text"}
        choices.append({**rest, "message": {"role": "assistant", "content": choice.get("text")}})
    return {**answer, "object": "chat.completion", "choices": choices}


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


@dataclass(frozen=True, slots=True)
class StreamFailure:
    """A failure that the engine reported inside a stream.

    Attributes:
        status: The HTTP status it would have been, at least 400.
        body: The engine's words, as the body of an answer with this status.
    """

    status: int
    body: bytes


def read_failure(event: SseEvent) -> StreamFailure | None:
    """The failure that an event reports; None for all other events (§6.3)."""
    return _failure(event, _event_object(event))


def _failure(event: SseEvent, chunk: dict[str, Any] | None) -> StreamFailure | None:
    if chunk is None or chunk.get("error") is None or event.name not in {"", "error"}:
        return None
    error = chunk["error"]
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    return StreamFailure(status, event.data.encode())


class StreamShaper(Protocol):
    """Turns the events of one upstream stream into items."""

    failure: StreamFailure | None
    """Set when the engine reported a failure inside the stream."""

    def feed(self, event: SseEvent) -> list[Item]:
        """Items completed by this event."""
        ...

    @property
    def pending(self) -> bool:
        """Whether an unfinished item holds anything."""
        ...

    def flush(self) -> list[Item]:
        """The unfinished item, if it holds anything; for a stream that pauses or ends."""
        ...


def make_shaper(request: UpstreamRequest, *, item_bytes: int = CHUNK_BYTES_MAX) -> StreamShaper:
    """The shaper for a streamed request.

    Args:
        request: The request.
        item_bytes: How large an item may become; it is cut before, unless one event alone is larger.
    """
    if request.native and request.stream_format is StreamFormat.TOKENS:
        return TokenShaper(request, item_bytes)
    return EventShaper(request, item_bytes)


class _Bundle:
    """Events, or parsed chunks, on their way into one item that must not become too large."""

    def __init__(self, *, as_chunks: bool, item_bytes: int) -> None:
        self._as_chunks = as_chunks
        self._limit = item_bytes
        self._pieces: list[Any] = []
        self._size = _FRAME_BYTES

    @property
    def filled(self) -> bool:
        return bool(self._pieces)

    def add(self, piece: Any) -> list[Item]:
        """Takes one in; the item so far, if both together would be too large."""
        size = _size(piece) + 1
        full = self.take() if self._pieces and self._size + size > self._limit else []
        self._pieces.append(piece)
        self._size += size
        return full

    def take(self) -> list[Item]:
        """The item so far, if there is anything in it."""
        pieces, self._pieces, self._size = self._pieces, [], _FRAME_BYTES
        if not pieces:
            return []
        return [pieces if self._as_chunks else "".join(pieces)]


class TokenShaper:
    """Native `tokens` format: items of text pieces per sequence, with cumulative usage (§3.5)."""

    def __init__(self, request: UpstreamRequest, item_bytes: int) -> None:
        self.failure: StreamFailure | None = None
        self._request = request
        self._schedule = BatchSchedule(request.batch)
        self._choices = self._empty_choices()
        self._limit = item_bytes
        self._frame_bytes = _size(self._choices) + _USAGE_BYTES
        self._size = self._frame_bytes
        self._head: dict[str, Any] = {}
        self._started = False
        self._usage_by_index: dict[int, dict[str, Any]] = {}
        self._totals: dict[str, Any] | None = None

    def feed(self, event: SseEvent) -> list[Item]:
        """Items completed by this event; an error event only sets `failure`."""
        chunk = _event_object(event)
        if chunk is None or self.failure is not None:
            return []
        self.failure = _failure(event, chunk)
        if self.failure is not None:
            return []
        if not self._started and not self._head:
            self._head = {key: chunk[key] for key in _HEAD if chunk.get(key) is not None}
            self._size += _size(self._head)
        usage = chunk.get("usage")
        choices = chunk.get("choices") or []
        if not choices and isinstance(usage, dict):
            self._totals = usage
        items: list[Item] = []
        for choice in choices:
            index = choice.get("index") or 0
            news = None if _is_announcement(choice) else self._news(choice)
            if news is not None and self._schedule.pending and self._size + _size(news) > self._limit:
                items += self.flush()
            if isinstance(usage, dict):
                self._usage_by_index[index] = usage
            if news is None:
                continue
            self._size += _size(news)
            self._add_piece(index, news)
            if self._schedule.add_piece():
                items.append(self._emit())
        return items

    @property
    def pending(self) -> bool:
        """Whether there was a piece since the last item."""
        return self._schedule.pending > 0

    def flush(self) -> list[Item]:
        """A partial item; none if there was no piece since the previous one."""
        if not self._schedule.pending:
            return []
        self._schedule.cut()
        return [self._emit()]

    def _news(self, choice: dict[str, Any]) -> dict[str, Any]:
        """What a choice of an event adds to an item: lists to be extended, and values."""
        delta = choice.get("delta") or {}
        text = delta.get("content") if self._request.chat else choice.get("text")
        news: dict[str, Any] = {}
        if delta.get("reasoning"):
            news["reasoning"] = [delta["reasoning"]]
        if delta.get("tool_calls"):
            news["tool_calls"] = delta["tool_calls"]
        # A piece without text is one all the same (§2.2), unless it says something else.
        if not isinstance(text, str) or (not text and news):
            text = None if news else ""
        if text is not None:
            news["tokens"] = [text]
        if choice.get("logprobs"):
            news["logprobs"] = [choice["logprobs"]]
        for key in ("token_ids", "prompt_token_ids"):
            if choice.get(key):
                news[key] = choice[key]
        if choice.get("finish_reason") is not None:
            news |= {"finish_reason": choice["finish_reason"], "stop_reason": choice.get("stop_reason")}
        return news

    def _add_piece(self, index: int, news: dict[str, Any]) -> None:
        while index >= len(self._choices):
            self._choices.append({"index": len(self._choices), "tokens": []})
        target = self._choices[index]
        for key, value in news.items():
            if isinstance(value, list):
                target.setdefault(key, []).extend(value)
            else:
                target[key] = value

    def _emit(self) -> Item:
        item: dict[str, Any] = {}
        if not self._started:
            self._started = True
            item = {**self._head, "object": "tokens.chunk"}
        item["choices"] = self._choices
        item["usage"] = _native_usage(self._totals if self._totals is not None else self._summed_usage())
        self._choices = self._empty_choices()
        self._size = self._frame_bytes
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

    def __init__(self, request: UpstreamRequest, item_bytes: int) -> None:
        self.failure: StreamFailure | None = None
        self._schedule = BatchSchedule(request.batch)
        self._as_chunks = request.stream_format is StreamFormat.CHUNKS
        self._as_chat = request.as_chat
        self._bundle = _Bundle(as_chunks=self._as_chunks, item_bytes=item_bytes)

    def feed(self, event: SseEvent) -> list[Item]:
        """Items completed by this event; comments are dropped."""
        if event.is_comment:
            return []
        chunk = _event_object(event)
        self.failure = self.failure or _failure(event, chunk)
        items: list[Item] = []
        if self._as_chat and chunk is not None and chunk.get("choices") is not None:
            items += self._add(f"data: {_dump(_chat_chunk(chunk))}\n\n")
        elif not self._as_chunks:
            items += self._add(event.text)
        elif event.data != DONE:
            data = chunk if chunk is not None else event.data
            items += self._add({"event": event.name, "data": data} if event.name else data)
        if _is_piece(event, chunk) and self._schedule.add_piece():
            items += self._bundle.take()
        return items

    @property
    def pending(self) -> bool:
        """Whether there was an event since the last item."""
        return self._bundle.filled

    def flush(self) -> list[Item]:
        """What is left, such as the usage event and `[DONE]`."""
        self._schedule.cut()
        return self._bundle.take()

    def _add(self, piece: Any) -> list[Item]:
        full = self._bundle.add(piece)
        if full:
            self._schedule.cut()
        return full


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
        and not delta.get("reasoning")
        and not delta.get("tool_calls")
        and choice.get("finish_reason") is None
    )


def _chat_chunk(chunk: dict[str, Any]) -> dict[str, Any]:
    choices = []
    for choice in chunk["choices"]:
        rest = {key: value for key, value in choice.items() if key != "text"}
        choices.append({**rest, "delta": {"content": choice.get("text")}})
    return {**chunk, "object": "chat.completion.chunk", "choices": choices}


def _event_object(event: SseEvent) -> dict[str, Any] | None:
    if not event.data.startswith("{"):
        return None
    parsed = _load(event.data.encode())
    return parsed if isinstance(parsed, dict) else None


def _native_usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input": usage.get("prompt_tokens") or 0,
        "output": usage.get("completion_tokens") or 0,
        **usage,
    }


def _load(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _size(value: object) -> int:
    return len(msgspec.json.encode(value))


def _dump(value: object) -> str:
    return msgspec.json.encode(value).decode()
