"""The worker program's own HTTP listener: the engine's routes with bodies rewritten on the way.

The gateway's data path uses it for bodies that hold a field of `REWRITTEN_FIELDS`; everything else goes to
the engine directly. It shares guard and rewriting with the job path and passes the answer on byte for byte,
so both roads give the same status, body and events.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web

from pilotlight.core.openai_routes import RouteKind, check_route
from pilotlight.worker.engine import Engine
from pilotlight.worker.errors import EngineGoneError, InputError
from pilotlight.worker.jobs import gone_text
from pilotlight.worker.outputs import error_text, input_error_text
from pilotlight.worker.rewrite import rewrite_body

BODY_BYTES_MAX: Final = 64 * 1024 * 1024
"""Largest request body; equals what the gateway holds for one endpoint."""


class Listener:
    """An HTTP server on a Unix socket that only its owner and key holders reach.

    Args:
        engine: Where requests go.
        socket_path: Where to listen.
        key: Bearer key every request must carry.
        allow_admin: Let routes through that change engine state.
        info: What `GET /worker/info` answers.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        socket_path: Path,
        key: str,
        allow_admin: bool,
        info: Callable[[], dict[str, Any]],
    ) -> None:
        self._engine = engine
        self._socket_path = socket_path
        self._key = f"Bearer {key}".encode()
        self._allow_admin = allow_admin
        self._info = info
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
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_route("*", "/{path:.*}", self._handle)
        # Cancellation of the handler is what closes the upstream connection when a client goes away.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, keepalive_timeout=75)
        await self._runner.setup()
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
        self._in_flight += 1
        self._idle.clear()
        try:
            return await self._forward(request)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        decision = check_route(request.method, request.raw_path, allow_admin=self._allow_admin)
        anthropic = decision.path.startswith("/v1/messages")
        if not decision.allowed:
            text = error_text(decision.status, decision.message, error_type=decision.error_type)
            return _error(decision.status, text, allow=", ".join(decision.methods))
        try:
            body = await request.read() if request.body_exists else None
            if body and decision.kind is RouteKind.JSON:
                body = _rewritten(body)
        except InputError as error:
            return _error(error.status, input_error_text(error, anthropic=anthropic))
        except web.HTTPRequestEntityTooLarge:
            text = error_text(413, f"the body exceeds {BODY_BYTES_MAX} bytes", anthropic=anthropic)
            return _error(413, text)
        content_type = request.headers.get("Content-Type", "application/json")
        try:
            upstream = await self._engine.request(
                request.method, decision.target, body=body, content_type=content_type
            )
        except EngineGoneError:
            return _error(503, gone_text(anthropic=anthropic))
        try:
            return await _pass_on(request, upstream)
        finally:
            if upstream.content.at_eof():
                upstream.release()
            else:
                upstream.close()


def _rewritten(body: bytes) -> bytes:
    """The body as the engine should see it; untouched where nothing changes or where it is no JSON object."""
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body  # the engine's own message about it is the better one
    if not isinstance(parsed, dict):
        return body
    rewritten = rewrite_body(parsed)
    return body if rewritten is parsed else msgspec.json.encode(rewritten)


async def _pass_on(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status)
    for name in ("Content-Type", "Content-Length", "Retry-After", "X-Request-Id"):
        if name in upstream.headers:
            response.headers[name] = upstream.headers[name]
    await response.prepare(request)
    try:
        async for data in upstream.content.iter_any():
            await response.write(data)
    except aiohttp.ClientPayloadError:
        # The engine died mid-answer. The status is sent, so the only honest sign left is a broken connection.
        if request.transport is not None:
            request.transport.abort()
        return response
    with contextlib.suppress(ConnectionResetError):
        await response.write_eof()
    return response


def _error(status: int, text: str, *, allow: str = "") -> web.Response:
    headers = {"Allow": allow} if allow and status == 405 else None
    return web.Response(status=status, text=text, content_type="application/json", headers=headers)
