"""A receiver of webhooks on loopback: it remembers what it was sent and answers as it is told.

For tests of whatever sends webhooks, and of whatever wants to receive ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

_BODY_BYTES_MAX = 100 * 1024 * 1024
_WAIT_S = 30
"""Longest wait for a request; longer means that it will not come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One request.

    Attributes:
        method: HTTP method.
        path: Path and query as they came.
        headers: Headers as they came.
        body: The body.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def _fine(_request: web.Request) -> web.StreamResponse:
    return web.Response(text="ok")


@dataclass
class Receiver:
    """Where to send, and what came.

    Attributes:
        port: TCP port.
        requests: All requests, in the order they came.
        answer: Makes the answer, or an awaitable of it; 200 by default.
        released: Set when the receiver ends: handlers that hang wait for it.
    """

    port: int = 0
    requests: list[Received] = field(default_factory=list)
    answer: Callable[[web.Request], web.StreamResponse | Awaitable[web.StreamResponse]] = _fine
    released: asyncio.Event = field(default_factory=asyncio.Event)
    _arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def url(self) -> str:
        """Where to send webhooks."""
        return f"http://127.0.0.1:{self.port}/hook"

    def statuses(self, *statuses: int) -> None:
        """Answer with these, one after the other, and with the last one from then on."""
        left = [*statuses]
        self.answer = lambda _request: web.Response(status=left.pop(0) if len(left) > 1 else left[0])

    def hang(self) -> None:
        """Answer nothing from now on."""

        async def wait(_request: web.Request) -> web.StreamResponse:
            await self.released.wait()
            return web.Response()

        self.answer = wait

    async def count(self, number: int) -> None:
        """Return when that many requests have arrived.

        Raises:
            TimeoutError: They did not.
        """
        async with asyncio.timeout(_WAIT_S), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= number)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Note a request and answer it."""
        body = await request.read()
        received = Received(
            method=request.method, path=request.path_qs, headers=dict(request.headers), body=body
        )
        async with self._arrived:
            self.requests.append(received)
            self._arrived.notify_all()
        made = self.answer(request)
        return made if isinstance(made, web.StreamResponse) else await made


@contextlib.asynccontextmanager
async def receiving(*, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """A receiver on a free port of 127.0.0.1, which ends with the block."""
    receiver = Receiver()
    app = web.Application(client_max_size=_BODY_BYTES_MAX)
    app.router.add_route("*", "/{tail:.*}", receiver.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    receiver.port = listener.getsockname()[1]
    await web.SockSite(runner, listener, ssl_context=tls).start()
    try:
        yield receiver
    finally:
        receiver.released.set()
        await runner.cleanup()
