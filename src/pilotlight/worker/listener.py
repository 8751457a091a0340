"""The worker program's own HTTP listener: the engine's routes with bodies rewritten on the way.

The gateway's data path uses it for bodies that hold a field of `REWRITTEN_FIELDS`; everything else goes to
the engine directly. In direct HTTP mode it is all that callers reach. It shares guard and rewriting with the
job path and passes the answer on byte for byte, so both roads give the same status, body and events. On its
socket, where a key is asked for, the platform also learns of the worker, freezes and thaws it (`/worker/…`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web

from pilotlight.core.openai_routes import RouteKind, check_route, speaks_anthropic
from pilotlight.worker.engine import Engine
from pilotlight.worker.errors import EngineGoneError, InputError
from pilotlight.worker.freezing import THAW_SECONDS, Freezer, FreezeRefusedError
from pilotlight.worker.input_settings import InputSettings
from pilotlight.worker.notices import Notices
from pilotlight.worker.outputs import error_text, gone_text, input_error_text, read_failure
from pilotlight.worker.platform import mended
from pilotlight.worker.rewrite import translate_body
from pilotlight.worker.runner import ANSWER_BYTES_MAX, AnswerTooLargeError, close, read_answer
from pilotlight.worker.selection import Selection, event_texts, select, stream_chunks
from pilotlight.worker.sse import SseSplitter
from pilotlight.worker.stages import is_fatal_error

BODY_BYTES_MAX: Final = 64 * 1024 * 1024
"""Largest request body; equals what the gateway holds for one endpoint."""

_PASSED_ON: Final = ("Content-Type", "Content-Length", "Retry-After", "X-Request-Id")
"""Headers of an answer that go on to the caller."""

_FAILURE_STARTS: Final = (b'data: {"error"', b"event: error\n")
"""How the event begins by which the engine reports a failure inside a stream (§6.3)."""

_FAILURE_BYTES_MAX: Final = 64 * 1024

_FAREWELL_SECONDS: Final = 5.0
"""How long a caller may take to read the last event of a stream that is broken off."""

BODY_SECONDS: Final = 60.0
"""How long a body may take to arrive."""

STOP_SECONDS: Final = 1.0
"""How long connections that are still busy may take once nothing is waited for any more."""

THAW_SECONDS_MAX: Final = 600.0
"""Longest that a thaw may be told to wait for a token."""

KEEP_ALIVE_SECONDS: Final = 75
"""How long a connection may idle; longer than clients keep theirs, so that they are the ones to close it."""


async def open_runner(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.AppRunner:
    """A server, without an address yet, all of whose requests go to `handle`; for both doors of a worker."""
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    app.router.add_route("*", "/{path:.*}", handle)
    # Cancellation of the handler is what closes the upstream connection when a client goes away.
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        shutdown_timeout=STOP_SECONDS,
    )
    await runner.setup()
    return runner


class Listener:
    """An HTTP server on a Unix socket that only its owner and key holders reach.

    Args:
        engine: Where requests go.
        freezer: Freezes and thaws the engine; thawed for requests.
        socket_path: Where to listen.
        key: Bearer key every request must carry.
        settings: Which routes are open, and whether bodies are translated.
        seconds: How long one request may take (`REQUEST_TIMEOUT`).
        notices: Where fields without effect are said.
        info: What `GET /worker/info` answers.
        on_fatal: Called when an answer shows that the engine will not recover.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        freezer: Freezer,
        socket_path: Path,
        key: str,
        settings: InputSettings,
        seconds: float,
        notices: Notices,
        info: Callable[[], dict[str, Any]],
        on_fatal: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._freezer = freezer
        self._socket_path = socket_path
        self._key = f"Bearer {key}".encode()
        self._settings = settings
        self._seconds = seconds
        self._notices = notices
        self._info = info
        self._on_fatal = on_fatal
        self._runner: web.AppRunner | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Requests being answered."""
        return self._in_flight

    async def start(self) -> None:
        """Listens; the socket file is readable and writable by its owner only."""
        self._runner = await open_runner(self._handle)
        self._socket_path.unlink(missing_ok=True)
        await web.UnixSite(self._runner, str(self._socket_path)).start()
        self._socket_path.chmod(0o600)

    async def wait_idle(self) -> None:
        """Returns when no request is being answered."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Closes the socket and ends what is still being answered."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.shutdown()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, self._key):
            return _error(401, error_text(401, "the listener's key is missing or wrong"))
        if request.path == "/worker/info" and request.method == "GET":
            return web.Response(body=msgspec.json.encode(self._info()), content_type="application/json")
        if request.path == "/worker/freeze" and request.method == "POST":
            return await self._freeze()
        if request.path == "/worker/thaw" and request.method == "POST":
            return await self._thaw(request)
        return await self.answer(request)

    async def _freeze(self) -> web.Response:
        try:
            frozen = await self._freezer.freeze()
        except FreezeRefusedError as error:
            refusal = {"message": str(error), "type": "ConflictError", "code": 409, "reason": error.reason}
            return _error(409, msgspec.json.encode({"error": refusal}).decode())
        except EngineGoneError as error:
            return _error(503, error_text(503, str(error)))
        return web.Response(body=msgspec.json.encode(frozen), content_type="application/json")

    async def _thaw(self, request: web.Request) -> web.Response:
        text = request.query.get("timeout_s", f"{THAW_SECONDS:g}")
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= THAW_SECONDS_MAX:
            legal = f"a number above 0 and of at most {THAW_SECONDS_MAX:g}"
            return _error(400, error_text(400, f"timeout_s must be {legal}, not {text!r}", param="timeout_s"))
        try:
            took_ms = await self._freezer.thaw(seconds)
        except EngineGoneError as error:
            return _error(503, error_text(503, str(error)))
        return web.Response(body=msgspec.json.encode({"took_ms": took_ms}), content_type="application/json")

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """The engine's answer to a request whose sender was let in."""
        self._in_flight += 1
        self._idle.clear()
        try:
            return await self._forward(request)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        decision = check_route(
            request.method, request.raw_path, allow_admin=self._settings.allow_admin_routes
        )
        anthropic = speaks_anthropic(request.raw_path)
        if not decision.allowed:
            text = error_text(
                decision.status, decision.message, error_type=decision.error_type, anthropic=anthropic
            )
            return _error(decision.status, text, allow=", ".join(decision.methods))
        selection = None
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await request.read() if request.body_exists else None
            if body and decision.kind is RouteKind.JSON:
                body, selection = self._translate(decision.path, body)
        except InputError as error:
            return _error(error.status, input_error_text(error, anthropic=anthropic))
        except TimeoutError:
            text = error_text(408, f"the body did not arrive within {BODY_SECONDS:g} s", anthropic=anthropic)
            return _error(408, text)
        except web.HTTPRequestEntityTooLarge:
            text = error_text(413, f"the body exceeds {BODY_BYTES_MAX} bytes", anthropic=anthropic)
            return _error(413, text)
        answer = web.StreamResponse()
        too_long = error_text(504, f"the request ran longer than {self._seconds:g} s", anthropic=anthropic)
        try:
            async with asyncio.timeout(self._seconds):
                await self._freezer.awake("request")
                return await self._ask(request, answer, decision.target, body, selection)
        except TimeoutError:
            if not answer.prepared:
                return _error(504, too_long)
            await _break_off(request, answer, too_long)
            return answer
        except EngineGoneError:
            return _error(503, gone_text(anthropic=anthropic))

    async def _ask(
        self,
        request: web.Request,
        answer: web.StreamResponse,
        target: str,
        body: bytes | None,
        selection: Selection | None,
    ) -> web.StreamResponse:
        """The engine's answer: `answer` filled with it, or another one where it is not passed on as it is.

        Raises:
            EngineGoneError: There is none, or it says that there will be no more.
        """
        content_type = request.headers.get("Content-Type", "application/json")
        upstream = await self._engine.request(request.method, target, body=body, content_type=content_type)
        try:
            if upstream.status >= 500:
                return await self._failed(upstream)
            if selection is not None and upstream.status == 200:
                return await _selected(upstream, selection)
            return await self._pass_on(request, upstream, answer)
        finally:
            close(upstream)

    async def _failed(self, upstream: aiohttp.ClientResponse) -> web.Response:
        try:
            body = await read_answer(upstream, ANSWER_BYTES_MAX)
        except (AnswerTooLargeError, aiohttp.ClientError, ConnectionError) as error:
            raise EngineGoneError(f"the engine broke off its answer: {error}") from error
        if is_fatal_error(body):
            self._on_fatal()
            raise EngineGoneError("the engine reported a failure from which it does not recover")
        headers = _passed_headers(upstream)
        headers.pop("Content-Length", None)
        return web.Response(status=upstream.status, body=body, headers=headers)

    async def _pass_on(
        self, request: web.Request, upstream: aiohttp.ClientResponse, answer: web.StreamResponse
    ) -> web.StreamResponse:
        answer.set_status(upstream.status)
        answer.headers.update(_passed_headers(upstream))
        failures = FailureFinder() if upstream.content_type == "text/event-stream" else None
        await answer.prepare(request)
        try:
            async for data in upstream.content.iter_any():
                if failures is not None and failures.is_fatal(data):
                    self._on_fatal()
                await answer.write(data)
        except aiohttp.ClientPayloadError:
            # The engine died mid-answer. With the status sent, a broken connection is the honest sign left.
            _cut(request)
            return answer
        with contextlib.suppress(ConnectionResetError):
            await answer.write_eof()
        return answer

    def _translate(self, path: str, body: bytes) -> tuple[bytes, Selection | None]:
        """The body as the engine should see it; untouched where nothing changes or it is no JSON object."""
        try:
            parsed, as_is = _read(body)
            if not isinstance(parsed, dict):
                return body, None
            translation = translate_body(path, parsed, strict=self._settings.strict_passthrough)
            self._notices.say(translation.ignored)
            if translation.body is parsed and as_is:
                return body, None
            return msgspec.json.encode(translation.body), translation.selection
        except RecursionError as error:
            raise InputError("the body is nested too deeply") from error


class FailureFinder:
    """Looks for the event by which an engine says inside a stream that it is dead (`vllm-worker.md` §7)."""

    def __init__(self) -> None:
        self._rest = b""

    def is_fatal(self, data: bytes) -> bool:
        """Whether an event that these bytes complete says so."""
        *events, rest = (self._rest + data).split(b"\n\n")
        # Such an event is short; of what does not begin like one it is enough to know that it goes on.
        if not rest.startswith(_FAILURE_STARTS) or len(rest) > _FAILURE_BYTES_MAX:
            # The last byte may be half of the mark between two events.
            rest = rest[:16] + rest[16:][-1:]
        self._rest = rest
        return any(_is_fatal(event) for event in events if event.startswith(_FAILURE_STARTS))


def _is_fatal(block: bytes) -> bool:
    failure = read_failure(SseSplitter().feed(block + b"\n\n")[0])
    return failure is not None and failure.status >= 500 and is_fatal_error(failure.body)


def _read(body: bytes) -> tuple[Any, bool]:
    """A body, and whether it can go to the engine as it came; None for what is no JSON.

    The engine's own message about that is the better one.
    """
    try:
        return msgspec.json.decode(body), True
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Python's reader, which is the engine's, takes more: half characters, NaN.
        try:
            return mended(body), False
        except ValueError:
            return None, True


async def _selected(upstream: aiohttp.ClientResponse, selection: Selection) -> web.Response:
    """What is kept of an answer with too many sequences, as JSON or as the stream asked for (§1.7)."""
    try:
        answer = await read_answer(upstream, ANSWER_BYTES_MAX)
        chosen = select(msgspec.json.decode(answer, type=dict[str, Any]), selection)
    except AnswerTooLargeError as error:
        return _error(413, error_text(413, str(error)))
    except InputError as error:
        return _error(error.status, input_error_text(error))
    except (aiohttp.ClientError, ConnectionError) as error:
        raise EngineGoneError(f"the engine broke off its answer: {error}") from error
    if not selection.streamed:
        return web.Response(body=msgspec.json.encode(chosen), content_type="application/json")
    chunks = stream_chunks(chosen, chat=selection.chat, include_usage=selection.include_usage)
    return web.Response(text="".join(event_texts(chunks)), content_type="text/event-stream", charset="utf-8")


def _passed_headers(upstream: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: upstream.headers[name] for name in _PASSED_ON if name in upstream.headers}


async def _break_off(request: web.Request, answer: web.StreamResponse, text: str) -> None:
    """Ends an answer that has begun: a stream by a last event, any other by a broken connection."""
    if answer.content_type != "text/event-stream":
        _cut(request)
        return
    name = "event: error\n" if speaks_anthropic(request.raw_path) else ""
    try:
        async with asyncio.timeout(_FAREWELL_SECONDS):
            await answer.write(f"{name}data: {text}\n\n".encode())
            await answer.write_eof()
    except (TimeoutError, ConnectionResetError):
        _cut(request)


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _error(status: int, text: str, *, allow: str = "") -> web.Response:
    headers = {"Allow": allow} if allow and status == 405 else None
    return web.Response(status=status, text=text, content_type="application/json", headers=headers)
