"""Which part of the gateway answers a request: the table of contents of everything served.

| path | part |
|---|---|
| /v2/{endpoint}/openai/… | data path (bare ASGI) |
| /v2/{endpoint}/… | job API and worker protocol |
| /v2/serverless…, /pilotlight/v1/… | management API |
| /pilotlight/v1/worker-state/… | worker programs report here |
| /health, / | is it up, what is it |
"""

from __future__ import annotations

import asyncio
import re
from urllib.parse import unquote

import msgspec

from pilotlight import __version__
from pilotlight.domain.endpoint import RESERVED_ENDPOINT_IDS
from pilotlight.gateway.asgi import App, Message, Receive, Scope, Send, send_json
from pilotlight.gateway.data_path import DataPath
from pilotlight.gateway.refusal import openai_body

_SLASHES = re.compile(rb"/{2,}")
_WORKER_STATE = b"/pilotlight/v1/worker-state/"
_WORKER_OPERATIONS = frozenset(
    {b"job-take", b"job-take-batch", b"job-stop", b"job-done", b"job-stream", b"ping"}
)


class Gateway:
    """The ASGI application.

    Args:
        data_path: Serves OpenAI routes.
        jobs: Serves the job API and the worker protocol.
        management: Serves the management API.
    """

    def __init__(self, *, data_path: DataPath, jobs: App, management: App) -> None:
        self._data_path = data_path
        self._jobs = jobs
        self._management = management
        self._managing: set[asyncio.Task[object]] = set()
        self.closing = False

    def interrupt(self) -> None:
        """End what management requests still do, such as following a log; others end by themselves."""
        for task in self._managing:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] != "http":
            return
        path = _SLASHES.sub(b"/", scope["raw_path"].partition(b"?")[0])
        parts = path.split(b"/", 4)
        root = parts[1] if len(parts) > 1 else b""
        operation = parts[3] if len(parts) > 3 else b""
        if self.closing and operation not in _WORKER_OPERATIONS and not path.startswith(_WORKER_STATE):
            await self._unavailable(send)
        elif root == b"v2" and operation == b"openai":
            await self._openai(scope, receive, send, parts)
        elif path.startswith(_WORKER_STATE) or (root == b"v2" and _names_endpoint(parts)):
            await self._jobs(_with_path(scope, path), receive, send)
        elif root in {b"v2", b"pilotlight"}:
            await self._manage(_with_path(scope, path), receive, send)
        elif path == b"/health":
            await send_json(send, 200, b'{"status":"ok"}')
        elif path == b"/":
            about = {"name": "pilotlight", "version": __version__, "docs": "/pilotlight/v1/docs"}
            await send_json(send, 200, msgspec.json.encode(about))
        else:
            await send_json(send, 404, b'{"error":"not found","detail":"not found"}')

    async def _manage(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting(event: Message) -> None:
            nonlocal begun
            begun = True
            await send(event)

        task = asyncio.current_task()
        assert task is not None
        self._managing.add(task)
        try:
            await self._management(scope, receive, noting)
        except asyncio.CancelledError:
            if not self.closing:
                raise
            task.uncancel()
            if begun:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await self._unavailable(send)
        finally:
            self._managing.discard(task)

    async def _openai(self, scope: Scope, receive: Receive, send: Send, parts: list[bytes]) -> None:
        path = "/" + (parts[4].decode("latin-1") if len(parts) > 4 else "")
        query = scope["query_string"].decode("latin-1")
        await self._data_path(
            scope,
            receive,
            send,
            endpoint_id=parts[2].decode("latin-1"),
            path=f"{path}?{query}" if query else path,
        )

    async def _unavailable(self, send: Send) -> None:
        body = openai_body(503, "the gateway is stopping", type="server_error", code="stopping")
        await send_json(send, 503, body, [(b"retry-after", b"5")])


def _names_endpoint(parts: list[bytes]) -> bool:
    return len(parts) > 2 and parts[2].decode("latin-1") not in RESERVED_ENDPOINT_IDS


def _with_path(scope: Scope, path: bytes) -> Scope:
    """The scope with single slashes and no trailing one, as routers compare paths exactly."""
    raw = path.rstrip(b"/") or b"/"
    return {**scope, "path": unquote(raw.decode("latin-1")), "raw_path": raw}
