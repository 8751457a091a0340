"""Which part of the gateway answers a request: the table of contents of everything served.

| path | part |
|---|---|
| /v2/{endpoint}/openai/… | data path (`call_road`); as jobs where workers only take jobs; WebSockets |
| /v2/{endpoint}/… | job API and worker protocol |
| /lb/{endpoint}/…, everything at the host {endpoint}.… | load balancer (bare ASGI, WebSockets too) |
| /v2/serverless…, /pilotlight/v1/… | management API |
| /pilotlight/v1/worker-state/… | worker programs report here |
| /health, / | is it up, what is it |
| /metrics | what Prometheus reads |
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol
from urllib.parse import unquote

import msgspec

from pilotlight import __version__
from pilotlight.domain.endpoint import RESERVED_ENDPOINT_IDS
from pilotlight.gateway.addressing import openai_call, single_slashes
from pilotlight.gateway.asgi import App, Headers, Message, Receive, Response, Scope, Send, send_json
from pilotlight.gateway.call import CallRoad
from pilotlight.gateway.elsewhere import FOLLOWER_RETRY_S, FOLLOWS, follower_body
from pilotlight.gateway.errors import native_error
from pilotlight.gateway.jobs.http import JobRoad
from pilotlight.gateway.load_balancer import LoadBalancer
from pilotlight.gateway.protocol import ClientStream
from pilotlight.gateway.realtime import RealtimeRoad
from pilotlight.gateway.refusal import openai_body
from pilotlight.gateway.repeated import WholeRequest
from pilotlight.gateway.tunnel import TUNNEL, WebSocketTunnel
from pilotlight.gateway.worker_protocol import WORKER_OPERATIONS

_WORKER_STATE = b"/pilotlight/v1/worker-state/"
_STOPPING = "the gateway is stopping"
_JSON = [(b"content-type", b"application/json")]


class OpenAIRoad(Protocol):
    """What serves the OpenAI routes of an endpoint as jobs."""

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, *, endpoint_id: str, path: str
    ) -> None:
        """Serve one request; `path` is what follows `/openai`, with the query."""
        ...


class Gateway:
    """The ASGI application.

    Args:
        data_path: Serves the OpenAI routes of an endpoint straight from its engines.
        openai: Serves those of all other endpoints, as jobs.
        serves_directly: Whether an endpoint's engines are reached, by its id; also asked of unknown ones.
        jobs: Serves the job API and the worker protocol.
        management: Serves the management API.
        balancer: Serves load-balancing endpoints.
        leads: Whether this gateway has the workers; another one may, where several share a store.
        metrics: Answers `/metrics`; None where there is nothing to tell.
        realtime: Serves the WebSockets of the OpenAI routes; None where there are none.
    """

    def __init__(
        self,
        *,
        data_path: CallRoad,
        openai: OpenAIRoad,
        serves_directly: Callable[[str], bool],
        jobs: JobRoad,
        management: App,
        balancer: LoadBalancer,
        leads: Callable[[], bool] = lambda: True,
        metrics: Callable[[Headers], Awaitable[Response]] | None = None,
        realtime: RealtimeRoad | None = None,
    ) -> None:
        self._realtime = realtime
        self._leads = leads
        self._metrics = metrics
        self._data_path = data_path
        self._openai_jobs = openai
        self._serves_directly = serves_directly
        self._balancer = balancer
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
        balanced = self._balanced(scope)
        if balanced is not None:
            await self._balance(balanced, scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._websocket(scope)
            return
        path: bytes = scope["raw_path"].partition(b"?")[0]
        if b"//" in path or path[-1:] == b"/":
            path = single_slashes(path)
        parts = path.split(b"/", 4)
        root = parts[1] if len(parts) > 1 else b""
        operation = parts[3] if len(parts) > 3 else b""
        if self.closing and operation not in WORKER_OPERATIONS and not path.startswith(_WORKER_STATE):
            await self._unavailable(send, openai=root == b"v2" and operation == b"openai")
        elif root == b"v2" and operation == b"openai":
            await self._openai(scope, receive, send, parts)
        elif path.startswith(_WORKER_STATE) or (root == b"v2" and _names_endpoint(parts)):
            await self._jobs(scope, receive, send)
        elif root in {b"v2", b"pilotlight"}:
            await self._manage(_with_path(scope, path), receive, send)
        elif path == b"/health":
            await send_json(send, 200, b'{"status":"ok"}')
        elif path == b"/metrics" and self._metrics is not None:
            await (await self._metrics(Headers(scope["headers"])))(scope, receive, send)
        elif path == b"/":
            about = {"name": "pilotlight", "version": __version__, "docs": "/pilotlight/v1/docs"}
            await send_json(send, 200, msgspec.json.encode(about))
        else:
            await send_json(send, 404, b'{"error":"not found","detail":"not found"}')

    def call_road(
        self, target: bytes, headers: Sequence[tuple[bytes, bytes]]
    ) -> tuple[CallRoad, bytes, bytes] | None:
        """The data path for its own requests, with their path and query; None leaves a request to ASGI."""
        called = None if self.closing else openai_call(target, headers, self._balancer.serves_host)
        if called is None or not self._serves_directly(called[0]):
            return None
        return self._data_path, called[1], called[2]

    def serve_whole(
        self, request: WholeRequest, connection: ClientStream, gone: Callable[[], asyncio.Future[None]]
    ) -> Response | Awaitable[Response] | None:
        """Answer a request of the job road, or begin to; None leaves any other to `__call__`."""
        if self.closing or self._balancer.serves_host(request.fields.headers.get(b"host", b"")) is not None:
            return None
        return self._jobs.serve_whole(request, connection, gone)

    def _balanced(self, scope: Scope) -> tuple[str, str] | None:
        """The endpoint that a request names by `/lb` or by host, and what of its path is not the worker's."""
        raw: bytes = scope["raw_path"]
        if raw.startswith(b"/lb/"):
            endpoint_id = raw.split(b"/", 3)[2].decode("latin-1")
            return endpoint_id, f"/lb/{endpoint_id}"
        for name, value in scope["headers"]:
            if name == b"host":
                named = self._balancer.serves_host(value)
                return None if named is None else (named, "")
        return None

    async def _balance(self, balanced: tuple[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        tunnel: WebSocketTunnel | None = (scope.get("extensions") or {}).get(TUNNEL)
        if tunnel is not None and (self.closing or not self._leads()):
            _refuse(tunnel, 503, _STOPPING if self.closing else FOLLOWS)
        elif self.closing:
            await self._unavailable(send)
        elif not self._leads():
            await send_json(send, 503, follower_body(), [(b"retry-after", b"%d" % FOLLOWER_RETRY_S)])
        else:
            endpoint_id, prefix = balanced
            path = scope["raw_path"].decode("latin-1").removeprefix(prefix) or "/"
            query = scope["query_string"].decode("latin-1")
            await self._balancer(
                scope,
                receive,
                send,
                endpoint_id=endpoint_id,
                path=f"{path}?{query}" if query else path,
                prefix=prefix,
            )

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
        endpoint_id, path = _openai_route(scope, parts)
        await self._openai_jobs(scope, receive, send, endpoint_id=endpoint_id, path=path)

    async def _websocket(self, scope: Scope) -> None:
        """Serve a WebSocket that is not for a load balancer."""
        tunnel: WebSocketTunnel = scope["extensions"][TUNNEL]
        parts = single_slashes(scope["raw_path"]).split(b"/", 4)
        if self._realtime is None or len(parts) < 5 or parts[1] != b"v2" or parts[3] != b"openai":
            _refuse(tunnel, 404, "not found")
        elif self.closing:
            tunnel.refuse(503, _stopping_body(), [*_JSON, (b"retry-after", b"5")])
        else:
            endpoint_id, path = _openai_route(scope, parts)
            await self._realtime(scope, tunnel, endpoint_id=endpoint_id, path=path)

    async def _unavailable(self, send: Send, *, openai: bool = False) -> None:
        body = _stopping_body() if openai else native_error(503, _STOPPING).body
        await send_json(send, 503, body, [(b"retry-after", b"5")])


def _stopping_body() -> bytes:
    return openai_body(503, _STOPPING, type="server_error", code="stopping")


def _refuse(tunnel: WebSocketTunnel, status: int, error: str) -> None:
    tunnel.refuse(status, msgspec.json.encode({"error": error, "detail": error}), _JSON)


def _openai_route(scope: Scope, parts: list[bytes]) -> tuple[str, str]:
    """The endpoint of a path below `/v2/{endpoint}/openai`, and what follows it, with the query."""
    path = "/" + (parts[4].rstrip(b"/").decode("latin-1") if len(parts) > 4 else "")
    query = scope["query_string"].decode("latin-1")
    return parts[2].decode("latin-1"), f"{path}?{query}" if query else path


def _names_endpoint(parts: list[bytes]) -> bool:
    return len(parts) > 2 and parts[2].decode("latin-1") not in RESERVED_ENDPOINT_IDS


def _with_path(scope: Scope, path: bytes) -> Scope:
    """The scope with single slashes and no trailing one, as routers compare paths exactly."""
    raw = path.rstrip(b"/") or b"/"
    return {**scope, "path": unquote(raw.decode("latin-1")), "raw_path": raw}
