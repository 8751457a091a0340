"""Answers one job from the engine: plan, ask, shape, hand over item by item.

`jobs.JobLoop` calls it, one task per job. Cancelling that task closes the upstream connection, on which vLLM
aborts the sequence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import aiohttp
import msgspec

from pilotlight.worker.config import WorkerConfig
from pilotlight.worker.engine import Engine
from pilotlight.worker.errors import EngineGoneError, InputError
from pilotlight.worker.forms import build_form
from pilotlight.worker.inputs import is_anthropic, plan_request
from pilotlight.worker.notices import Notices
from pilotlight.worker.outputs import (
    CHUNK_BYTES_MAX,
    Item,
    StreamFailure,
    error_text,
    gone_text,
    input_error_text,
    make_shaper,
    upstream_error_text,
    whole_items,
)
from pilotlight.worker.platform import TakenJob
from pilotlight.worker.sse import EventTooLongError, SseSplitter
from pilotlight.worker.stages import is_fatal_error
from pilotlight.worker.upstream import TOKENIZE_ROUTE, UpstreamRequest

RESULT_BYTES_MAX: Final = 20 * 1024 * 1024
"""Largest result handed in; `vllm-worker.md` §3.1."""

ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
"""Largest answer read of which a part is handed in: `best_of` candidates with their logprobs. Arbitrary."""

PostChunk = Callable[[Item], Awaitable[None]]


class _Emit(Protocol):
    async def __call__(self, item: Item, *, streamed: bool) -> None: ...


class JobFailedError(Exception):
    """A job that ends with an error envelope; `text` is its JSON."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class AnswerTooLargeError(Exception):
    """More than a result may hold, or than is read of an answer."""


class JobRunner:
    """Answers one job from the engine.

    Args:
        config: Input defaults and the time limit.
        engine: Whom to ask.
        notices: Where parameters without effect are said, once each.
        on_fatal: Called when an answer shows that the engine will not recover.
    """

    def __init__(
        self, config: WorkerConfig, engine: Engine, notices: Notices, on_fatal: Callable[[], None]
    ) -> None:
        self._settings = config.inputs
        self._seconds = config.request_seconds
        self._engine = engine
        self._notices = notices
        self._on_fatal = on_fatal
        self._context_length: int | None = None

    async def run(self, job: TakenJob, post_chunk: PostChunk) -> list[Item]:
        """All items of the job, each already handed to `post_chunk`.

        Raises:
            JobFailedError: The job failed; items posted so far stay posted.
        """
        job_input = job.payload.get("input")
        anthropic = is_anthropic(job_input)
        items: list[Item] = []
        size = 0

        async def emit(item: Item, *, streamed: bool) -> None:
            nonlocal size
            # Encoded once: as a chunk, for its size, and as a part of the result.
            encoded = msgspec.json.encode(item)
            size += len(encoded)
            if size > RESULT_BYTES_MAX:
                raise AnswerTooLargeError(f"the result exceeds {RESULT_BYTES_MAX} bytes")
            # A whole answer that is no stream's may be longer: it is found in the result alone.
            small = len(encoded) <= CHUNK_BYTES_MAX
            if streamed and not small:
                raise AnswerTooLargeError(
                    f"an item of the stream has {len(encoded)} bytes and cannot be cut to {CHUNK_BYTES_MAX}"
                )
            raw = msgspec.Raw(encoded)
            items.append(raw)
            if small:
                await post_chunk(raw)

        try:
            request = plan_request(job_input, self._settings, job_id=job.id)
            self._notices.say(request.ignored)
            async with asyncio.timeout(self._seconds):
                await self._answer(request, emit, anthropic=anthropic)
        except InputError as error:
            raise JobFailedError(input_error_text(error, anthropic=anthropic)) from error
        except TimeoutError as error:
            text = error_text(504, f"the request ran longer than {self._seconds:g} s", anthropic=anthropic)
            raise JobFailedError(text) from error
        except (EngineGoneError, aiohttp.ClientError, ConnectionError) as error:
            raise JobFailedError(gone_text(anthropic=anthropic)) from error
        except AnswerTooLargeError as error:
            raise JobFailedError(error_text(413, str(error), anthropic=anthropic)) from error
        except EventTooLongError as error:
            raise JobFailedError(error_text(500, str(error), anthropic=anthropic)) from error
        return items

    async def _answer(self, request: UpstreamRequest, emit: _Emit, *, anthropic: bool) -> None:
        body, content_type = await self._body(request)
        response = await self._engine.request(
            request.method, request.target, body=body, content_type=content_type
        )
        try:
            if response.status >= 400:
                self._check(
                    response.status, await response.read(), anthropic=anthropic, native=request.native
                )
            content_type = response.headers.get("Content-Type", "")
            if content_type.startswith("text/event-stream"):
                failure = await _stream(response, request, emit)
                if failure is not None:
                    self._check(failure.status, failure.body, anthropic=anthropic, native=request.native)
                return
            limit = RESULT_BYTES_MAX if request.selection is None else ANSWER_BYTES_MAX
            answer = await read_answer(response, limit)
            items, streamed = whole_items(request, answer, content_type, item_bytes=CHUNK_BYTES_MAX)
            for item in items:
                await emit(item, streamed=streamed)
        finally:
            close(response)

    async def _body(self, request: UpstreamRequest) -> tuple[bytes | None, str]:
        """The bytes to send and their type; for some jobs the engine is asked for a part of them first."""
        body = request.body
        if body is None:
            return None, ""
        if request.form:
            payload = build_form(body)()
            return await payload.as_bytes(), payload.headers["Content-Type"]
        context = None
        if request.template is not None:
            answer = await self._ask("POST", TOKENIZE_ROUTE, request.template)
            context = answer.get("max_model_len")
            body = {**body, "prompt": answer["tokens"]}
        elif request.whole_context:
            context = await self._context()
        if request.whole_context and context is not None:
            body = {**body, "max_tokens": context}
        return _encode(body), "application/json"

    async def _context(self) -> int | None:
        """The length of the engine's context in tokens; None if it does not say."""
        if self._context_length is None:
            cards = (await self._ask("GET", "/v1/models", None)).get("data") or []
            lengths = [card["max_model_len"] for card in cards if card.get("max_model_len")]
            self._context_length = max(lengths, default=None)
        return self._context_length

    async def _ask(self, method: str, target: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """A small JSON answer of the engine, on the way to a native job's."""
        data = None if body is None else _encode(body)
        status, answer = await self._engine.ask(method, target, body=data)
        self._check(status, answer, anthropic=False, native=True)
        return msgspec.json.decode(answer, type=dict[str, Any])

    def _check(self, status: int, body: bytes, *, anthropic: bool, native: bool) -> None:
        """Raises JobFailedError when the engine refused, in its own words."""
        if status < 400:
            return
        if status >= 500 and is_fatal_error(body):
            self._on_fatal()
            raise JobFailedError(gone_text(anthropic=anthropic))
        text = upstream_error_text(status, body, anthropic=anthropic, native=native)
        raise JobFailedError(text)


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(body)
    except RecursionError as error:
        raise InputError("the input is nested too deeply") from error


def close(response: aiohttp.ClientResponse) -> None:
    """Gives a connection back; one whose answer was not read to its end is cut, which aborts it upstream."""
    if response.content.at_eof():
        response.release()
    else:
        response.close()


async def read_answer(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The whole body of an answer.

    Raises:
        AnswerTooLargeError: It has more than `limit` bytes.
    """
    parts: list[bytes] = []
    size = 0
    async for data in response.content.iter_any():
        parts.append(data)
        size += len(data)
        if size > limit:
            raise AnswerTooLargeError(f"the engine's answer exceeds {limit} bytes")
    return b"".join(parts)


async def _stream(
    response: aiohttp.ClientResponse, request: UpstreamRequest, emit: _Emit
) -> StreamFailure | None:
    """Shapes an event stream; returns a failure inside it after what is pending was handed over (§3.7)."""
    shaper = make_shaper(request, item_bytes=CHUNK_BYTES_MAX)
    splitter = SseSplitter()
    clock = asyncio.get_running_loop().time
    flush_seconds = request.flush_seconds
    flush_at: float | None = None
    ended = False
    while not ended:
        data = await _next(response.content, flush_at)
        if data is None:
            events, items = [], shaper.flush()
        else:
            ended = not data
            events = splitter.feed(data) if data else splitter.close()
            items = [item for event in events for item in shaper.feed(event)]
            if ended:
                items += shaper.flush()
        for item in items:
            await emit(item, streamed=True)
        if flush_seconds:
            # Comments are no news: the engine's keep-alives do not put off what waits.
            if any(not event.is_comment for event in events):
                flush_at = clock() + flush_seconds
            if not shaper.pending:
                flush_at = None
    return shaper.failure


async def _next(content: aiohttp.StreamReader, flush_at: float | None) -> bytes | None:
    """The next bytes, empty at the end; None if none came until then."""
    if flush_at is None:
        return await content.readany()
    try:
        async with asyncio.timeout_at(flush_at):
            return await content.readany()
    except TimeoutError:
        return None
