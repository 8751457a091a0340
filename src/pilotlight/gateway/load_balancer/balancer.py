"""Takes in what is for a load-balancing endpoint, and sees it through to its row in the request log.

`gateway.app` calls it for `/lb/{endpoint}/…` and for hosts named `{endpoint}.anything`. Per request: check
the key and the kind of endpoint; take a slot of a routable worker or of the one asked for, or wait for it;
pass the request on while it still arrives, and the answer while it is still made. There is no queue and no
second try. WebSockets take the same steps and then become a tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import structlog

from pilotlight.core.affinity import HEADER, parse_affinity
from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import Outcome, RequestRecord
from pilotlight.gateway.addressing import endpoint_of_host
from pilotlight.gateway.asgi import BREAK_OFF, Headers, Receive, Scope, Send
from pilotlight.gateway.directory import Directory, secret_of
from pilotlight.gateway.errors import RateLimitedError
from pilotlight.gateway.exchange import Exchange
from pilotlight.gateway.key_limits import KeyLimits
from pilotlight.gateway.load_balancer.body import ClientBody
from pilotlight.gateway.load_balancer.choice import WorkerChoice
from pilotlight.gateway.load_balancer.forward import Forwarder
from pilotlight.gateway.load_balancer.head import Call, Framing, request_head, upgrade_head
from pilotlight.gateway.load_balancer.refusal import Refusal
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.request_ids import client_id
from pilotlight.gateway.slots import Ask, SlotTable, WorkerSlots
from pilotlight.gateway.tunnel import TUNNEL, Handshake, TunnelBounds, WebSocketTunnel, attended, carry
from pilotlight.gateway.upstream import UpstreamError
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet
from pilotlight.settings import LoadBalancerSettings

_log = structlog.get_logger()


class LoadBalancer:
    """ASGI callable for load-balancing endpoints.

    Args:
        directory: Endpoints and keys.
        slots: Admission and the hold.
        fleet: Tells whether a worker that is asked for exists, and starts it again.
        outlook: Asked when those who find no worker should come again.
        clock: Time.
        settings: Bounds.
        entropy: Random bytes, for ids in the request log.
        record: Takes the row of the request log.
        key_limits: What keys may ask for.
        start_failed: The class of errors with which held requests fail when their endpoint gives up.

    Attributes:
        pool: Connections to workers.
    """

    def __init__(
        self,
        *,
        directory: Directory,
        slots: SlotTable,
        fleet: Fleet,
        outlook: Outlook,
        clock: Clock,
        settings: LoadBalancerSettings,
        entropy: Callable[[int], bytes],
        record: Callable[[RequestRecord], None],
        key_limits: KeyLimits,
        start_failed: type[Exception],
    ) -> None:
        self._directory = directory
        self._slots = slots
        self._clock = clock
        self._settings = settings
        self._entropy = entropy
        self._record = record
        self._key_limits = key_limits
        self._choice = WorkerChoice(
            directory=directory,
            slots=slots,
            fleet=fleet,
            outlook=outlook,
            settings=settings,
            start_failed=start_failed,
        )
        self._forwarder = Forwarder(slots=slots, clock=clock, settings=settings)
        self.pool = self._forwarder.pool

    def serves_host(self, host: bytes) -> str | None:
        """The endpoint that a Host header names by its first label, whatever its kind; None for any other."""
        return endpoint_of_host(host, self._directory.endpoint)

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, *, endpoint_id: str, path: str, prefix: str
    ) -> None:
        """Serve one request or WebSocket.

        Args:
            scope: The connection (ASGI).
            receive: Its incoming events.
            send: Takes its outgoing events.
            endpoint_id: From path or host.
            path: What the worker sees, percent-encoded, with the query.
            prefix: What was taken away from the path.
        """
        exchange = Exchange.begin(endpoint_id, path, clock=self._clock, entropy=self._entropy)
        tunnel: WebSocketTunnel | None = (scope.get("extensions") or {}).get(TUNNEL)
        try:
            call = Call(scope, Headers(scope["headers"]), path, prefix)
            exchange.client_id = client_id(call.headers.get(b"x-request-id"))
            key, endpoint = self._authorise(exchange, call)
            ask = Ask(0, key.id, key.share)
            with self._admitted(key):
                if tunnel is not None:
                    await self._upgrade(exchange, endpoint, call, ask, tunnel)
                else:
                    await self._request(exchange, endpoint, call, ask, receive, send)
        except Refusal as refusal:
            exchange.outcome, exchange.status = refusal.outcome, refusal.status
            await self._refuse(exchange, refusal, scope, send)
        except Exception:  # noqa: BLE001 - logged whole and answered
            _log.exception("load_balancer_failed", request=exchange.request_id, endpoint=endpoint_id)
            await self._refuse(exchange, Refusal.broken(), scope, send)
        finally:
            self._finish(exchange)

    def _authorise(self, exchange: Exchange, call: Call) -> tuple[ApiKey, Endpoint]:
        key = self._directory.key(secret_of(call.headers))
        if key is None:
            raise Refusal.unauthorized()
        exchange.key_id = key.id
        endpoint = self._directory.endpoint(exchange.endpoint_id)
        if endpoint is None:
            raise Refusal.unknown_endpoint()
        if not key.may_call(endpoint.id):
            raise Refusal.access_denied()
        if endpoint.kind is not EndpointKind.LOAD_BALANCER:
            raise Refusal.wrong_kind()
        return key, endpoint

    @contextlib.contextmanager
    def _admitted(self, key: ApiKey) -> Iterator[None]:
        try:
            with self._key_limits.admitted(key):
                yield
        except RateLimitedError as error:
            raise Refusal.rate_limited(error) from error

    async def _request(
        self, exchange: Exchange, endpoint: Endpoint, call: Call, ask: Ask, receive: Receive, send: Send
    ) -> None:
        limit, framing = self._settings.body_bytes, Framing.of(call.scope["headers"])
        if (framing.length or 0) > limit:
            raise Refusal.too_large()
        head, method = request_head(call, endpoint, framing), call.scope["method"]
        # While the request waits, or its answer is made, the client may leave at any moment.
        task = asyncio.current_task()
        assert task is not None
        body = ClientBody(receive, framing, limit=limit, on_gone=task.cancel)
        body.start()
        try:
            slots = await self._slot(exchange, endpoint, call, ask)
            try:
                async with asyncio.timeout(self._settings.request_s):
                    await self._forwarder.forward(exchange, method, head, body, slots, send)
            except TimeoutError as error:
                _log.warning(
                    "request_cut", endpoint=endpoint.id, worker=slots.worker_id, reason="time",
                    seconds=self._settings.request_s,
                )  # fmt: skip
                raise Refusal.timed_out() from error
            finally:
                self._slots.release_request(slots, ask)
        except asyncio.CancelledError:
            if not body.gone:
                raise
            task.uncancel()
            exchange.outcome = Outcome.DISCONNECTED
        finally:
            await body.stop()

    async def _upgrade(
        self, exchange: Exchange, endpoint: Endpoint, call: Call, ask: Ask, tunnel: WebSocketTunnel
    ) -> None:
        settings = self._settings
        bounds = TunnelBounds(
            life_s=settings.websocket_s, answer_s=settings.request_s, answer_bytes=settings.response_bytes
        )

        def own(_: Handshake) -> list[tuple[bytes, bytes]]:
            return [(HEADER.encode(), exchange.worker_id.encode())]

        with attended(tunnel, exchange):
            slots = await self._slot(exchange, endpoint, call, ask)
            assert slots.registration is not None
            try:
                address, head = slots.registration.engine, upgrade_head(call, endpoint)
                await carry(exchange, tunnel, address, head, own, bounds)
            except UpstreamError as error:
                raise self._forwarder.refusal(exchange, error) from error
            finally:
                self._slots.release_request(slots, ask)

    async def _slot(self, exchange: Exchange, endpoint: Endpoint, call: Call, ask: Ask) -> WorkerSlots:
        affinity = parse_affinity(call.headers.get(HEADER.encode()).decode("latin-1"))
        slots = await self._choice.take(endpoint, affinity, ask)
        exchange.worker_id = slots.worker_id
        exchange.wait_ns = self._clock.monotonic_ns() - exchange.started_ns
        return slots

    async def _refuse(self, exchange: Exchange, refusal: Refusal, scope: Scope, send: Send) -> None:
        """Answer an error, unless an answer has begun; that stays visibly incomplete."""
        headers, extensions = refusal.headers(exchange.worker_id), scope.get("extensions") or {}
        tunnel: WebSocketTunnel | None = extensions.get(TUNNEL)
        break_off: Callable[[], object] | None = extensions.get(BREAK_OFF)
        if tunnel is not None:
            tunnel.refuse(refusal.status, refusal.body, headers)
        elif not exchange.head_sent:
            exchange.head_sent = True
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": refusal.body})
        elif break_off is not None:
            break_off()

    def _finish(self, exchange: Exchange) -> None:
        self._record(exchange.row(self._clock.monotonic_ns()))
