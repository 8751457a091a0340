"""The data path: `/v2/{endpoint}/openai/…`, streamed straight between client and engine.

A bare ASGI callable. Per request: check the key, the endpoint and the route; read the body; take a slot
or wait for one, with comments for keys that ask for them; send the request over a pooled connection; pass
the answer on in whole events; count tokens; write one row of the request log. Every failure before the first
byte is an OpenAI error with its proper status; later ones become a final error event.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from pilotlight.core.admission import Admission, AdmissionReason, Verdict
from pilotlight.core.openai_routes import RouteDecision, RouteKind, check_route
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.usage import Outcome, RequestRecord
from pilotlight.domain.worker import Registration
from pilotlight.errors import InvalidInputError
from pilotlight.gateway.asgi import (
    ClientGoneError,
    Headers,
    Receive,
    Scope,
    Send,
    read_body,
    send_json,
    wait_disconnect,
)
from pilotlight.gateway.body import BodyPlan, plan_body
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.events import EventStream, TokenCount, data_event, error_event, stream_end
from pilotlight.gateway.exchange import Exchange
from pilotlight.gateway.heartbeats import AT_ONCE, STREAMED_ROUTES, Heartbeats
from pilotlight.gateway.openai_access import called_endpoint, caller_of, models_answer, route_refusal
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.protocol import EXTENSION, ClientStream
from pilotlight.gateway.refusal import RequestRefusedError, error_object
from pilotlight.gateway.slots import HoldExpiredError, SlotTable, WorkerSlots
from pilotlight.gateway.upstream import UpstreamError, UpstreamPool, UpstreamResponse
from pilotlight.ports.clock import Clock
from pilotlight.ports.fleet import Fleet
from pilotlight.settings import LimitSettings

_log = structlog.get_logger()

_PASSED_ON = frozenset({b"content-type", b"accept", b"user-agent", b"traceparent", b"tracestate"})
"""Request headers the engine sees. Never the client's key; hop-by-hop headers are ours to set."""

_KEPT_BACK = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"transfer-encoding",
        b"server",
        b"date",
        b"proxy-authenticate",
        b"upgrade",
        b"x-request-id",
    }
)
"""Answer headers that belong to the hop and not to the message."""

_TRIES_MAX = 3
"""Workers that are tried when one cannot be reached; the request has not left us then."""

_SUSPENSION_S = 1.0
"""How long such a worker is passed over; by then its end is known, or it can be reached again."""

_USAGE_BODY_MAX = 4 * 1024 * 1024
"""Usage is looked for in unstreamed answers up to this size, and none that is larger becomes an event."""

_RETRY_EXPIRED_S = 10
"""Arbitrary, for requests that were held for as long as may be while nobody knew how long it takes."""


_check_route = functools.lru_cache(maxsize=1024)(check_route)
"""The same few routes are asked for all the time."""


class StartFailedError(Exception):
    """Held requests are answered with this when their endpoint gives up starting workers."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _OpenAIExchange(Exchange):
    """One call of an OpenAI or Anthropic route.

    Attributes:
        client_gone: Whether the client left before the end of the answer.
        heartbeats: Comments for a client that waits; None where it gets none.
        streaming: Whether the answer is a stream of events, whose last one may be an error.
        body_sent: Whether the answer is complete, so that the client may leave.
        count: Tokens.
        estimated: Whether the tokens were counted by us.
    """

    client_gone: bool = False
    heartbeats: Heartbeats | None = None
    streaming: bool = False
    body_sent: bool = False
    count: TokenCount = field(default_factory=TokenCount)
    estimated: bool = False

    async def hush(self) -> bool:
        """Send no more comments; whether their stream has begun, which the answer can only go on with."""
        if self.heartbeats is None:
            return False
        await self.heartbeats.stop()
        return self.heartbeats.begun


class DataPath:
    """ASGI callable for one endpoint's OpenAI routes.

    Args:
        directory: Endpoints and keys.
        slots: Admission and the hold.
        pool: Connections to engines.
        fleet: Asked only to say what a caller waited for.
        outlook: Asked to say for how long.
        clock: Time.
        limits: Bounds.
        entropy: Random bytes, for request ids.
        record: Takes the row of the request log.
    """

    def __init__(
        self,
        *,
        directory: Directory,
        slots: SlotTable,
        pool: UpstreamPool,
        fleet: Fleet,
        outlook: Outlook,
        clock: Clock,
        limits: LimitSettings,
        entropy: Callable[[int], bytes],
        record: Callable[[RequestRecord], None],
    ) -> None:
        self._directory = directory
        self._slots = slots
        self._pool = pool
        self._fleet = fleet
        self._outlook = outlook
        self._clock = clock
        self._limits = limits
        self._entropy = entropy
        self._record = record

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, *, endpoint_id: str, path: str
    ) -> None:
        """Serve one request.

        Args:
            scope: The connection (ASGI).
            receive: Its incoming events.
            send: Takes its outgoing events.
            endpoint_id: From the path.
            path: What follows `/openai`, percent-encoded, with the query.
        """
        exchange = _OpenAIExchange.begin(endpoint_id, path, clock=self._clock, entropy=self._entropy)
        try:
            await self._serve(exchange, scope, receive, send, path)
        except RequestRefusedError as refusal:
            exchange.outcome = refusal.outcome
            await self._refuse(exchange, send, refusal)
        except ClientGoneError:
            exchange.outcome = Outcome.DISCONNECTED
        except Exception:  # noqa: BLE001 - logged whole and answered; nobody above knows OpenAI's shape
            # A fault of ours. It is logged whole; the caller learns the id to ask for.
            exchange.outcome = Outcome.FAILED
            _log.exception("data_path_failed", request=exchange.request_id, endpoint=endpoint_id)
            await self._fail(
                exchange, send, 500, f"internal server error, request {exchange.request_id}", "server_error"
            )
        finally:
            self._finish(exchange)

    async def _serve(
        self, exchange: _OpenAIExchange, scope: Scope, receive: Receive, send: Send, path: str
    ) -> None:
        headers = Headers(scope["headers"])
        key = caller_of(self._directory, headers)
        exchange.key_id = key.id
        endpoint = called_endpoint(self._directory, key, exchange.endpoint_id)
        decision = _check_route(scope["method"], path)
        if not decision.allowed or decision.kind is RouteKind.WEBSOCKET:
            raise route_refusal(decision)
        exchange.route = decision.path
        if decision.path.startswith("/v1/models"):
            await self._models(exchange, endpoint, decision.path, send)
            return
        plan = await self._body(decision, headers, receive)
        if key.heartbeat_s is not None and plan.stream and decision.path in STREAMED_ROUTES:
            exchange.heartbeats = self._heartbeats(exchange, endpoint, send, key.heartbeat_s)
        # From here on the client may leave at any moment: while it waits for a worker, or in mid-stream.
        # The watcher then cancels this task, whatever it is waiting for, and the connection to the engine
        # is closed on the way out, which is what makes vLLM abort the generation.
        task = asyncio.current_task()
        assert task is not None
        watcher = asyncio.ensure_future(_watch(receive, exchange, task))
        try:
            async with asyncio.timeout(self._limits.data_path_s):
                await self._with_slot(exchange, endpoint, decision, scope, headers, plan, send)
        except asyncio.CancelledError:
            if not exchange.client_gone:
                raise
            task.uncancel()
            exchange.outcome = Outcome.DISCONNECTED
        except TimeoutError:
            exchange.outcome = Outcome.TIMED_OUT
            message = f"the request took longer than {self._limits.data_path_s} s"
            await self._fail(exchange, send, 504, message, "timeout_error")
        finally:
            watcher.cancel()
            await exchange.hush()

    def _heartbeats(
        self, exchange: _OpenAIExchange, endpoint: Endpoint, send: Send, period_s: float
    ) -> Heartbeats:
        def comment() -> bytes:
            waited_ns = self._clock.monotonic_ns() - exchange.started_ns
            current = self._directory.endpoint(endpoint.id) or endpoint
            return self._outlook.comment(current, waited_ns // 1_000_000)

        headers = [(b"x-request-id", exchange.request_id.encode())]
        return Heartbeats(send, comment, period_s=period_s, headers=headers)

    async def _body(self, decision: RouteDecision, headers: Headers, receive: Receive) -> BodyPlan:
        try:
            async with asyncio.timeout(self._limits.body_s):
                body = await read_body(headers, receive, limit=self._limits.body_bytes)
        except TimeoutError as error:
            message = f"the request body did not arrive within {self._limits.body_s} s"
            raise RequestRefusedError(408, message, outcome=Outcome.EXPIRED) from error
        if decision.kind is not RouteKind.JSON or not body:
            return BodyPlan(body=body)
        try:
            return plan_body(decision.path, body)
        except InvalidInputError as error:
            raise RequestRefusedError(400, str(error)) from error

    async def _with_slot(
        self,
        exchange: _OpenAIExchange,
        endpoint: Endpoint,
        decision: RouteDecision,
        scope: Scope,
        headers: Headers,
        plan: BodyPlan,
        send: Send,
    ) -> None:
        for attempt in range(1, _TRIES_MAX + 1):
            slots = await self._slot(exchange, endpoint, len(plan.body))
            exchange.wait_ns = self._clock.monotonic_ns() - exchange.started_ns
            exchange.worker_id = slots.worker_id
            try:
                await self._exchange(exchange, decision, scope, headers, plan, slots, send)
            except UpstreamError as error:
                if not error.sent:
                    self._slots.suspend_worker(slots.worker_id, _SUSPENSION_S)
                    if attempt < _TRIES_MAX:
                        continue
                await self._fail(exchange, send, 502, f"the worker failed: {error}", "server_error")
            finally:
                self._slots.release_request(slots)
            return

    async def _exchange(
        self,
        exchange: _OpenAIExchange,
        decision: RouteDecision,
        scope: Scope,
        headers: Headers,
        plan: BodyPlan,
        slots: WorkerSlots,
        send: Send,
    ) -> None:
        assert slots.registration is not None
        response = await self._ask(exchange, decision, scope, headers, plan, slots.registration)
        try:
            await self._answer(exchange, response, scope, plan, send)
        finally:
            response.release()

    async def _slot(self, exchange: _OpenAIExchange, endpoint: Endpoint, body_bytes: int) -> WorkerSlots:
        if self._directory.endpoint(endpoint.id) is None:
            raise RequestRefusedError(
                404, "endpoint not found", type="not_found_error", code="endpoint_not_found"
            )
        admission, slots = self._slots.admit(endpoint.id, body_bytes)
        if slots is not None:
            return slots
        if admission.verdict is Verdict.SHED:
            raise self._shed(endpoint, admission)
        if exchange.heartbeats is not None:
            exchange.heartbeats.start()
        try:
            return await self._slots.hold(endpoint.id, body_bytes, timeout_s=self._limits.hold_s)
        except HoldExpiredError as error:
            raise RequestRefusedError(
                503, f"{error}; {self._progress(endpoint)}", type="server_error", code="no_worker",
                retry_after_s=self._outlook.start_s(endpoint) or _RETRY_EXPIRED_S, outcome=Outcome.EXPIRED,
            ) from error  # fmt: skip
        except StartFailedError as error:
            raise RequestRefusedError(
                503, str(error), type="server_error", code="start_failed",
                retry_after_s=max(error.retry_after_s, self._outlook.start_s(endpoint) or 0),
                outcome=Outcome.FAILED,
            ) from error  # fmt: skip

    def _shed(self, endpoint: Endpoint, admission: Admission) -> RequestRefusedError:
        retry_after_s = self._outlook.retry_after_s(endpoint, admission)
        if admission.reason is AdmissionReason.UNHEALTHY:
            return RequestRefusedError(
                503, self._progress(endpoint), type="server_error", code="start_failed",
                retry_after_s=retry_after_s, outcome=Outcome.SHED,
            )  # fmt: skip
        limit = (
            f"{self._limits.hold_requests} requests"
            if admission.reason is AdmissionReason.HOLD_FULL
            else f"{self._limits.hold_bytes} bytes of bodies"
        )
        return RequestRefusedError(
            429, f"endpoint {endpoint.id} already holds {limit}; {self._progress(endpoint)}",
            type="rate_limit_error", code="queue_full", retry_after_s=retry_after_s, outcome=Outcome.SHED,
        )  # fmt: skip

    def _progress(self, endpoint: Endpoint) -> str:
        health = self._fleet.health(endpoint.id)
        if health.failure is not None and health.failures:
            return f"starting a worker failed {health.failures} times: {health.failure.sentence}"
        if health.throttled:
            return health.throttled
        workers = self._fleet.workers(endpoint.id)
        if not workers:
            return (
                "endpoint is paused (max workers 0)" if endpoint.workers_max == 0 else "no worker is starting"
            )
        return "workers: " + ", ".join(f"{worker.state} ({worker.stage})" for worker in workers)

    async def _ask(
        self,
        exchange: _OpenAIExchange,
        decision: RouteDecision,
        scope: Scope,
        headers: Headers,
        plan: BodyPlan,
        registration: Registration,
    ) -> UpstreamResponse:
        address = registration.engine
        if plan.rewrite and registration.listener is not None:
            address = registration.listener
        elif plan.altered:
            raise RequestRefusedError(
                400, "guided_* and best_of were removed from vLLM and this endpoint has no worker "
                "program to honour them; use structured_outputs, or n",
            )  # fmt: skip
        passed = [(name, value) for name, value in headers.items() if name in _PASSED_ON]
        passed.append((b"x-request-id", exchange.request_id.encode()))
        return await self._pool.request(
            address,
            scope["method"],
            decision.target,
            passed,
            plan.body,
            timeout_s=self._limits.upstream_read_s,
        )

    async def _answer(
        self, exchange: _OpenAIExchange, response: UpstreamResponse, scope: Scope, plan: BodyPlan, send: Send
    ) -> None:
        content_type = next((value for name, value in response.headers if name == b"content-type"), b"")
        events = None
        headers = [(name, value) for name, value in response.headers if name not in _KEPT_BACK]
        if content_type.startswith(b"text/event-stream"):
            events = EventStream(exchange.count, hide_usage=plan.hide_usage)
            headers = [(name, value) for name, value in headers if name != b"content-length"]
            exchange.streaming = True
            headers += AT_ONCE
        headers.append((b"x-request-id", exchange.request_id.encode()))
        begun = await exchange.hush()
        exchange.status, exchange.head_sent = response.status, not begun or events is not None
        if not begun:
            await send({"type": "http.response.start", "status": response.status, "headers": headers})
        if events is not None:
            client = scope["extensions"][EXTENSION]
            await self._pass_events(exchange, response, events, client, send)
        elif begun:
            await self._pass_in_event(exchange, response, send)
        else:
            await self._pass_whole(exchange, response, content_type, send)
        if exchange.outcome is Outcome.FAILED and response.status < 400 and not (events and events.failed):
            exchange.outcome = Outcome.OK
        elif 400 <= response.status < 500:
            exchange.outcome = Outcome.REJECTED

    async def _pass_events(
        self,
        exchange: _OpenAIExchange,
        response: UpstreamResponse,
        events: EventStream,
        client: ClientStream,
        send: Send,
    ) -> None:
        def pass_on(data: bytes) -> bool:
            whole = events.feed(data)
            if not whole:
                return True
            if exchange.first_byte_ns is None:
                exchange.first_byte_ns = self._clock.monotonic_ns()
            return client.write(whole)

        try:
            while not await response.pass_to(pass_on, self._limits.upstream_read_s):
                await client.drain()
        finally:
            if events.events and exchange.count.tokens_out is None:
                # One event a token is vLLM's habit; a stream that was cut has no better count.
                exchange.count.tokens_out, exchange.estimated = events.events, True
        exchange.body_sent = True
        await send({"type": "http.response.body", "body": events.rest(), "more_body": False})

    async def _pass_whole(
        self, exchange: _OpenAIExchange, response: UpstreamResponse, content_type: bytes, send: Send
    ) -> None:
        kept: list[bytes] = []
        size = 0
        while (data := await response.read(self._limits.upstream_read_s)) is not None:
            if exchange.first_byte_ns is None:
                exchange.first_byte_ns = self._clock.monotonic_ns()
            size += len(data)
            if size <= _USAGE_BODY_MAX:
                kept.append(data)
            await send({"type": "http.response.body", "body": data, "more_body": True})
        if size <= _USAGE_BODY_MAX and content_type.startswith(b"application/json") and response.status < 400:
            exchange.count.note(b"".join(kept))
        exchange.body_sent = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass_in_event(self, exchange: _OpenAIExchange, response: UpstreamResponse, send: Send) -> None:
        """Pass on an answer that is no stream to a client that has been given the beginning of one.

        Mostly an error. Anything else becomes one event, as vLLM has it where it cannot stream.
        """
        body = b""
        while (data := await response.read(self._limits.upstream_read_s)) is not None:
            body += data
            if len(body) > _USAGE_BODY_MAX:
                raise UpstreamError(f"its answer is no stream, and larger than {_USAGE_BODY_MAX} bytes")
        if response.status >= 400:
            event = error_event(exchange.route, error_object(exchange.route, response.status, body))
        else:
            exchange.first_byte_ns = self._clock.monotonic_ns()
            exchange.count.note(body)
            event = data_event(body)
        exchange.head_sent = exchange.body_sent = True
        event += stream_end(exchange.route)
        await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _models(self, exchange: _OpenAIExchange, endpoint: Endpoint, path: str, send: Send) -> None:
        answer = models_answer(endpoint, path)
        exchange.status, exchange.outcome, exchange.head_sent = 200, Outcome.OK, True
        await send_json(send, 200, answer, [(b"x-request-id", exchange.request_id.encode())])

    async def _refuse(self, exchange: _OpenAIExchange, send: Send, refusal: RequestRefusedError) -> None:
        begun = await exchange.hush()
        exchange.status, exchange.head_sent, exchange.body_sent = refusal.status, True, True
        body = refusal.body_for(exchange.route)
        if begun:
            event = error_event(exchange.route, body) + stream_end(exchange.route)
            await send({"type": "http.response.body", "body": event, "more_body": False})
            return
        headers = [(b"x-request-id", exchange.request_id.encode()), *refusal.headers]
        await send_json(send, refusal.status, body, headers)

    async def _fail(
        self, exchange: _OpenAIExchange, send: Send, status: int, message: str, type_: str
    ) -> None:
        """Tell the client of a failure: by its status while that can be set, else as a last event.

        A body that is not a stream has no place for it: it stays incomplete, and the server closes the
        connection, so that the client cannot take the part for the whole.
        """
        refusal = RequestRefusedError(status, message, type=type_, retry_after_s=1)
        if not exchange.head_sent:
            await self._refuse(exchange, send, refusal)
        elif exchange.streaming:
            exchange.body_sent = True
            event = error_event(exchange.route, refusal.body_for(exchange.route))
            await send({"type": "http.response.body", "body": event, "more_body": False})

    def _finish(self, exchange: _OpenAIExchange) -> None:
        row = exchange.row(
            self._clock.monotonic_ns(),
            tokens_in=exchange.count.tokens_in,
            tokens_out=exchange.count.tokens_out,
            estimated=exchange.estimated,
        )
        if row is not None:
            self._record(row)


async def _watch(receive: Receive, exchange: _OpenAIExchange, task: asyncio.Task[object]) -> None:
    await wait_disconnect(receive)
    if not exchange.body_sent:
        exchange.client_gone = True
        task.cancel()
