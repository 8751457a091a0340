"""Load-balancing endpoints: requests go straight to a worker's own HTTP server (serverless-api.md §3).

`gateway.app` calls it for `/lb/{endpoint}/…` and for hosts named `{endpoint}.anything`. Per request: check
the key and the kind of endpoint; take a slot of a routable worker or of the one asked for, or wait for it;
pass the request on while it still arrives, and the answer while it is still made. There is no queue and no
second try. WebSockets take the same steps and then become a tunnel (`gateway.load_balancer_tunnel`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import structlog

from pilotlight.core.admission import Verdict
from pilotlight.core.affinity import HEADER, Affinity, Pin, parse_affinity
from pilotlight.domain.endpoint import Endpoint, EndpointKind
from pilotlight.domain.usage import Outcome, RequestRecord, Road
from pilotlight.domain.worker import WorkerState
from pilotlight.errors import ClusterError, NotFoundError
from pilotlight.gateway.asgi import Headers, Receive, Scope, Send
from pilotlight.gateway.directory import Directory, secret_of
from pilotlight.gateway.load_balancer_body import BodyTooLargeError, ClientBody
from pilotlight.gateway.load_balancer_head import Framing, request_head, response_headers, upgrade_head
from pilotlight.gateway.load_balancer_refusal import Refusal
from pilotlight.gateway.load_balancer_tunnel import TUNNEL, WebSocketTunnel
from pilotlight.gateway.slots import HoldExpiredError, SlotTable, WorkerGoneError, WorkerSlots
from pilotlight.gateway.upstream import UpstreamError, UpstreamPool, UpstreamResponse
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet
from pilotlight.settings import LoadBalancerSettings

_log = structlog.get_logger()

FORWARD_KEY_VARIABLE = "FORWARD_AUTHORIZATION"
"""Set to `false` in an endpoint's environment, its workers do not see the keys of its callers."""

_REPEATABLE = frozenset({"GET", "OPTIONS"})
"""Methods whose requests may go over a connection that could be dead, because they may be sent twice."""

_SUSPENSION_S = 1.0
"""How long a worker that refused a connection is passed over; a health check will say more."""

_IDLE_S = 2.0
"""Idle connections are closed after this: common servers close theirs after five seconds."""


@dataclass(slots=True)
class _Exchange:
    """One request on its way through: what the request log will say of it."""

    request_id: str
    endpoint_id: str
    route: str
    arrival_ms: int
    started_ns: int
    key_id: str = ""
    worker_id: str = ""
    status: int = 0
    outcome: Outcome = Outcome.FAILED
    wait_ns: int = 0
    first_byte_ns: int | None = None
    head_sent: bool = False
    body: ClientBody | None = None


class LoadBalancer:
    """ASGI callable for load-balancing endpoints.

    Args:
        directory: Endpoints and keys.
        slots: Admission and the hold.
        fleet: Tells whether a worker that is asked for exists, and starts it again.
        clock: Time.
        settings: Bounds.
        entropy: Random bytes, for ids in the request log.
        record: Takes the row of the request log.
        start_failed: The class of errors with which held requests fail when their endpoint gives up.
    """

    def __init__(
        self,
        *,
        directory: Directory,
        slots: SlotTable,
        fleet: Fleet,
        clock: Clock,
        settings: LoadBalancerSettings,
        entropy: Callable[[int], bytes],
        record: Callable[[RequestRecord], None],
        start_failed: type[Exception],
    ) -> None:
        self._directory = directory
        self._slots = slots
        self._fleet = fleet
        self._clock = clock
        self._settings = settings
        self._entropy = entropy
        self._record = record
        self._start_failed = start_failed
        self.pool = UpstreamPool(idle_s=_IDLE_S)

    def serves_host(self, host: bytes) -> str | None:
        """The load-balancing endpoint that a Host header names by its first label; None for any other."""
        label, dot, _ = host.partition(b".")
        if not dot or len(label) != 14:
            return None
        endpoint = self._directory.endpoint(label.decode("latin-1").lower())
        return endpoint.id if endpoint is not None and endpoint.kind is EndpointKind.LOAD_BALANCER else None

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
        exchange = _Exchange(
            request_id=self._entropy(16).hex(),
            endpoint_id=endpoint_id,
            route=path.partition("?")[0],
            arrival_ms=self._clock.now_ms(),
            started_ns=self._clock.monotonic_ns(),
        )
        tunnel: WebSocketTunnel | None = (scope.get("extensions") or {}).get(TUNNEL)
        try:
            headers = Headers(scope["headers"])
            endpoint = self._authorise(exchange, headers)
            if tunnel is not None:
                await self._upgrade(exchange, endpoint, scope, headers, tunnel, path, prefix)
            else:
                await self._request(exchange, endpoint, scope, headers, receive, send, path, prefix)
        except Refusal as refusal:
            exchange.outcome, exchange.status = refusal.outcome, refusal.status
            await self._refuse(exchange, refusal, tunnel, send)
        except Exception:  # noqa: BLE001 - logged whole and answered
            _log.exception("load_balancer_failed", request=exchange.request_id, endpoint=endpoint_id)
            await self._refuse(exchange, Refusal.broken(), tunnel, send)
        finally:
            self._finish(exchange)

    def _authorise(self, exchange: _Exchange, headers: Headers) -> Endpoint:
        key = self._directory.key(secret_of(headers))
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
        return endpoint

    async def _request(
        self,
        exchange: _Exchange,
        endpoint: Endpoint,
        scope: Scope,
        headers: Headers,
        receive: Receive,
        send: Send,
        path: str,
        prefix: str,
    ) -> None:
        limit, framing = self._settings.body_bytes, Framing.of(scope["headers"])
        if (framing.length or 0) > limit:
            raise Refusal.too_large()
        head = request_head(
            scope,
            path,
            framing,
            prefix=prefix,
            endpoint_id=endpoint.id,
            forward_key=_forwards_key(endpoint),
        )
        # While the request waits, or its answer is made, the client may leave at any moment.
        task = asyncio.current_task()
        assert task is not None
        body = ClientBody(receive, limit=limit, chunked=framing.chunked, on_gone=task.cancel)
        exchange.body = body
        body.start()
        try:
            slots = await self._slot(exchange, endpoint, headers)
            try:
                async with asyncio.timeout(self._settings.request_s):
                    sent = body if framing.has_body else None
                    await self._pass(exchange, scope["method"], head, sent, slots, send)
            except TimeoutError as error:
                _log.warning(
                    "request_cut", endpoint=endpoint.id, worker=slots.worker_id, reason="time",
                    seconds=self._settings.request_s,
                )  # fmt: skip
                raise Refusal.timed_out() from error
            finally:
                self._slots.release_request(slots)
        except asyncio.CancelledError:
            if not body.gone:
                raise
            task.uncancel()
            exchange.outcome = Outcome.DISCONNECTED
        finally:
            await body.stop()

    async def _pass(
        self,
        exchange: _Exchange,
        method: str,
        head: bytes,
        body: ClientBody | None,
        slots: WorkerSlots,
        send: Send,
    ) -> None:
        try:
            async with self._ask(method, head, body, slots) as response:
                await self._answer(exchange, response, send)
        except UpstreamError as error:
            _log.info(
                "worker_unreachable", endpoint=exchange.endpoint_id, worker=slots.worker_id, error=str(error)
            )
            if not error.sent:
                self._slots.suspend_worker(slots.worker_id, _SUSPENSION_S)
            raise (Refusal.timed_out() if error.timed_out else Refusal.bad_gateway()) from error
        except BodyTooLargeError as error:
            raise Refusal.too_large() from error

    @contextlib.asynccontextmanager
    async def _ask(
        self, method: str, head: bytes, body: ClientBody | None, slots: WorkerSlots
    ) -> AsyncIterator[UpstreamResponse]:
        """The head of the worker's answer; its connection is given back when the block ends."""
        assert slots.registration is not None
        address, patience_s = slots.registration.engine, self._settings.request_s
        sending: asyncio.Task[None] | None = None
        if method in _REPEATABLE and body is None:
            response = await self.pool.exchange(address, head, timeout_s=patience_s)
        else:
            response = await self.pool.connect(address, head_only=method == "HEAD")
        try:
            if body is not None or method not in _REPEATABLE:
                await response.write(head)
                if body is not None:
                    sending = asyncio.create_task(body.send_to(response), name="send-body")
                await self._await_head(response, sending)
            yield response
        finally:
            if sending is not None and not sending.done():
                sending.cancel()
            elif sending is not None and not sending.cancelled():
                sending.exception()  # seen; an answer that came before it counts
            if body is None or body.sent:
                response.release()
            else:
                # Answered before it had everything: the rest cannot be told from a next request.
                response.close()

    async def _await_head(self, response: UpstreamResponse, sending: asyncio.Task[None] | None) -> None:
        """Wait for the head of the answer, or for what is wrong with the request's body."""
        if sending is None:
            await response.head(self._settings.request_s)
            return
        arrival = asyncio.create_task(response.head(self._settings.request_s), name="await-head")
        try:
            await asyncio.wait({arrival, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and isinstance(sending.exception(), BodyTooLargeError):
                sending.result()
            await arrival
        finally:
            arrival.cancel()

    async def _answer(self, exchange: _Exchange, response: UpstreamResponse, send: Send) -> None:
        limit = self._settings.response_bytes
        length = next((value for name, value in response.headers if name == b"content-length"), b"")
        if length.isdigit() and int(length) > limit:
            _log.warning(
                "answer_refused", endpoint=exchange.endpoint_id, worker=exchange.worker_id, bytes=int(length)
            )
            raise Refusal.bad_gateway()
        exchange.status, exchange.head_sent = response.status, True
        headers = response_headers(response.headers, exchange.worker_id)
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        size = 0
        while (data := await response.read(self._settings.request_s)) is not None:
            exchange.first_byte_ns = exchange.first_byte_ns or self._clock.monotonic_ns()
            size += len(data)
            if size > limit:
                _log.warning(
                    "request_cut", endpoint=exchange.endpoint_id, worker=exchange.worker_id, reason="size",
                    bytes=limit,
                )  # fmt: skip
                raise Refusal.bad_gateway()
            await send({"type": "http.response.body", "body": data, "more_body": True})
        if exchange.body is not None:
            exchange.body.leave()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        exchange.outcome = Outcome.REJECTED if 400 <= response.status < 500 else Outcome.OK
        if response.status >= 500:
            exchange.outcome = Outcome.FAILED

    async def _upgrade(
        self,
        exchange: _Exchange,
        endpoint: Endpoint,
        scope: Scope,
        headers: Headers,
        tunnel: WebSocketTunnel,
        path: str,
        prefix: str,
    ) -> None:
        head = upgrade_head(
            scope, path, prefix=prefix, endpoint_id=endpoint.id, forward_key=_forwards_key(endpoint)
        )
        task = asyncio.current_task()
        assert task is not None
        tunnel.on_gone = task.cancel
        slots: WorkerSlots | None = None
        try:
            slots = await self._slot(exchange, endpoint, headers)
            assert slots.registration is not None
            async with asyncio.timeout(self._settings.websocket_s):
                exchange.status = await tunnel.relay(
                    slots.registration.engine,
                    head,
                    worker_id=slots.worker_id,
                    answer_s=self._settings.request_s,
                    answer_bytes=self._settings.response_bytes,
                )
            exchange.outcome = Outcome.OK if exchange.status == 101 else Outcome.REJECTED
        except UpstreamError as error:
            raise (Refusal.timed_out() if error.timed_out else Refusal.bad_gateway()) from error
        except TimeoutError:
            exchange.outcome = Outcome.TIMED_OUT
        except asyncio.CancelledError:
            if not tunnel.gone:
                raise
            task.uncancel()
            exchange.outcome = Outcome.DISCONNECTED
        finally:
            tunnel.on_gone = None
            if slots is not None:
                self._slots.release_request(slots)
            if exchange.outcome is not Outcome.FAILED:
                tunnel.close()

    async def _slot(self, exchange: _Exchange, endpoint: Endpoint, headers: Headers) -> WorkerSlots:
        """A slot of the worker asked for or of any, waited for if need be."""
        affinity = parse_affinity(headers.get(HEADER.encode()).decode("latin-1"))
        try:
            if affinity is not None and affinity.pin is not Pin.PREFER:
                slots = await self._pinned_slot(endpoint, affinity)
            else:
                slots = await self._any_slot(endpoint, affinity)
        except self._start_failed as error:
            raise Refusal.no_workers(Outcome.FAILED) from error
        exchange.worker_id = slots.worker_id
        exchange.wait_ns = self._clock.monotonic_ns() - exchange.started_ns
        return slots

    async def _any_slot(self, endpoint: Endpoint, affinity: Affinity | None) -> WorkerSlots:
        if affinity is not None:
            preferred = self._slots.take_of(endpoint.id, affinity.worker_id)
            if preferred is not None:
                return preferred
        admission, slots = self._slots.admit(endpoint.id, 0)
        if slots is not None:
            return slots
        if admission.verdict is Verdict.SHED:
            raise Refusal.no_workers(Outcome.SHED, retry_after_s=admission.retry_after_s)
        try:
            return await self._slots.hold(endpoint.id, 0, timeout_s=self._settings.wait_s)
        except HoldExpiredError as error:
            raise Refusal.no_workers(Outcome.EXPIRED) from error

    async def _pinned_slot(self, endpoint: Endpoint, affinity: Affinity) -> WorkerSlots:
        worker_id = affinity.worker_id
        slots = self._slots.take_of(endpoint.id, worker_id)
        if slots is not None:
            return slots
        worker = self._fleet.worker(worker_id)
        if worker is None and affinity.pin is Pin.STRICT_RESUME:
            try:
                worker = await self._fleet.resume(endpoint, worker_id)
            except NotFoundError as error:
                raise Refusal.worker_gone() from error
            except ClusterError as error:
                raise Refusal.no_workers(Outcome.FAILED) from error
        ending = worker is not None and worker.state not in {WorkerState.STARTING, WorkerState.READY}
        if worker is None or worker.endpoint_id != endpoint.id or ending:
            raise Refusal.worker_gone()
        admission, _ = self._slots.admit(endpoint.id, 0, take=False)
        if admission.verdict is Verdict.SHED:
            raise Refusal.no_workers(Outcome.SHED, retry_after_s=admission.retry_after_s)
        try:
            return await self._slots.hold(
                endpoint.id, 0, timeout_s=self._settings.pinned_wait_s, worker_id=worker_id
            )
        except WorkerGoneError as error:
            raise Refusal.worker_gone() from error
        except HoldExpiredError as error:
            raise Refusal.worker_timeout() from error

    async def _refuse(
        self, exchange: _Exchange, refusal: Refusal, tunnel: WebSocketTunnel | None, send: Send
    ) -> None:
        """Answer an error, unless an answer has begun; that stays visibly incomplete."""
        headers = refusal.headers(exchange.worker_id)
        if tunnel is not None:
            tunnel.refuse(refusal.status, refusal.body, headers)
        elif not exchange.head_sent:
            exchange.head_sent = True
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": refusal.body})

    def _finish(self, exchange: _Exchange) -> None:
        if not exchange.key_id:
            return  # Strangers write no rows: they could push out everybody else's.
        first = exchange.first_byte_ns
        self._record(
            RequestRecord(
                id=exchange.request_id,
                road=Road.DATA,
                endpoint_id=exchange.endpoint_id[:64],
                key_id=exchange.key_id,
                worker_id=exchange.worker_id,
                route=exchange.route[:256],
                status=exchange.status,
                outcome=exchange.outcome,
                arrival_ms=exchange.arrival_ms,
                wait_ms=exchange.wait_ns // 1_000_000,
                first_token_ms=None if first is None else (first - exchange.started_ns) // 1_000_000,
                duration_ms=(self._clock.monotonic_ns() - exchange.started_ns) // 1_000_000,
                tokens_in=None,
                tokens_out=None,
                estimated=False,
            )
        )


def _forwards_key(endpoint: Endpoint) -> bool:
    return endpoint.revision.env.get(FORWARD_KEY_VARIABLE, "true").strip().lower() not in {"false", "0", "no"}
