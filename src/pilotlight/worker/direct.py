"""The worker as an HTTP server, for platforms that send it requests and no jobs (`vllm-worker.md` §7.1).

`WORKER_MODE=http` opens it on `PORT` in the first moment of a life, long before there is an engine, because
its health is how the platform follows the start: 204 while the worker starts, 200 once it serves, 503 when it
is about to end. Everything but health and a short status goes the listener's way, with the same guard and the
same rewriting; no key is asked for, as it is the platform that lets callers in.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from pilotlight.worker.config import DirectSettings
from pilotlight.worker.listener import Listener, open_runner
from pilotlight.worker.outputs import error_text
from pilotlight.worker.ports import BACKLOG


class DirectServer:
    """An HTTP server on one TCP port, or on two where health has its own.

    Args:
        settings: Which path tells the health.
        sockets: Where it listens already (`ports.bind_ports`); closed with the server.
        status: What `GET /` answers; no secrets.
    """

    def __init__(
        self,
        settings: DirectSettings,
        sockets: Sequence[socket.socket],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self._settings = settings
        self._sockets = sockets
        self._status = status
        self._listener: Listener | None = None
        self._leaving = False
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Answers what comes to the sockets."""
        self._runner = await open_runner(self._handle)
        for bound in self._sockets:
            await web.SockSite(self._runner, bound, backlog=BACKLOG).start()

    def open(self, listener: Listener) -> None:
        """From now on requests are served, by this listener."""
        self._listener = listener

    def leave(self) -> None:
        """Tells the platform by the health to send nothing more; what comes all the same is served."""
        self._leaving = True

    async def stop(self) -> None:
        """Closes the ports and ends what is still being answered."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.shutdown()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        reads = request.method in {"GET", "HEAD"}
        if reads and request.path == self._settings.health_path:
            return web.Response(status=self._health())
        if reads and request.path == "/":
            return web.Response(body=msgspec.json.encode(self._status()), content_type="application/json")
        if self._listener is None:
            text = error_text(503, "the worker is starting", retryable=True)
            return web.Response(
                status=503, text=text, content_type="application/json", headers={"Retry-After": "5"}
            )
        return await self._listener.answer(request)

    def _health(self) -> int:
        if self._leaving:
            return 503
        return 204 if self._listener is None else 200
