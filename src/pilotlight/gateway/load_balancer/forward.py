"""One request to a worker and its answer back, each passed on while the other side still makes it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address
from pilotlight.gateway.asgi import Send
from pilotlight.gateway.exchange import Exchange
from pilotlight.gateway.hop import BODILESS
from pilotlight.gateway.load_balancer.body import BodyTooLargeError, ClientBody
from pilotlight.gateway.load_balancer.head import response_headers
from pilotlight.gateway.load_balancer.refusal import Refusal
from pilotlight.gateway.slots import SlotTable, WorkerSlots
from pilotlight.gateway.upstream import UpstreamError, UpstreamPool, UpstreamResponse
from pilotlight.gateway.worker_slots import SUSPENSION_S
from pilotlight.ports.clock import Clock
from pilotlight.settings import LoadBalancerSettings

_log = structlog.get_logger()

_REPEATABLE = frozenset({"GET", "OPTIONS"})
"""Methods whose requests may go over a connection that could be dead, because they may be sent twice."""

_IDLE_S = 2.0
"""Idle connections are closed after this: common servers close theirs after five seconds."""


class Forwarder:
    """Exchanges requests with workers.

    Args:
        slots: Told of workers that cannot be reached.
        clock: Time.
        settings: Bounds.

    Attributes:
        pool: Connections to workers.
    """

    def __init__(self, *, slots: SlotTable, clock: Clock, settings: LoadBalancerSettings) -> None:
        self._slots = slots
        self._clock = clock
        self._settings = settings
        self.pool = UpstreamPool(idle_s=_IDLE_S)

    async def forward(
        self, exchange: Exchange, method: str, head: bytes, body: ClientBody, slots: WorkerSlots, send: Send
    ) -> None:
        """Pass a request on, and its answer back.

        Args:
            exchange: Notes what becomes of it.
            method: HTTP method.
            head: Request line and headers for the worker.
            body: What follows them; may be nothing.
            slots: The worker's; one of them is this request's.
            send: Takes the answer (ASGI).

        Raises:
            Refusal: The worker cannot be reached or broke off, or a limit was passed, perhaps in mid-answer.
        """
        assert slots.registration is not None
        address = slots.registration.engine
        if method in _REPEATABLE and not body.exists:
            asking = self._ask_twice(address, head)
        else:
            asking = self._ask_once(address, head, body, head_only=method == "HEAD")
        try:
            async with asking as response:
                await self._answer(exchange, response, body, send)
        except UpstreamError as error:
            raise self.refusal(exchange, error) from error
        except BodyTooLargeError as error:
            raise Refusal.too_large() from error

    def refusal(self, exchange: Exchange, error: UpstreamError) -> Refusal:
        """What a client is told when its worker fails; one that cannot be reached is passed over for now."""
        worker_id = exchange.worker_id
        _log.info("worker_unreachable", endpoint=exchange.endpoint_id, worker=worker_id, error=str(error))
        if not error.sent:
            self._slots.suspend_worker(worker_id, SUSPENSION_S)
        return Refusal.timed_out() if error.timed_out else Refusal.bad_gateway()

    @contextlib.asynccontextmanager
    async def _ask_twice(self, address: Address, head: bytes) -> AsyncIterator[UpstreamResponse]:
        """The answer, its head known, to a request that goes over an old connection if there is one.

        When that turns out to be dead, it is sent a second time, over a new one.
        """
        response = await self.pool.exchange(address, head, timeout_s=self._settings.request_s)
        try:
            yield response
        finally:
            response.release()

    @contextlib.asynccontextmanager
    async def _ask_once(
        self, address: Address, head: bytes, body: ClientBody, *, head_only: bool
    ) -> AsyncIterator[UpstreamResponse]:
        """The answer, its head known, to a request that goes over a new connection, and once only."""
        response = await self.pool.connect(address, head_only=head_only)
        sending: asyncio.Task[None] | None = None
        try:
            await response.write(head)
            if body.exists:
                sending = asyncio.create_task(body.send_to(response), name="send-body")
            await self._await_head(response, sending)
            yield response
        finally:
            if sending is not None and not sending.done():
                sending.cancel()
            elif sending is not None and not sending.cancelled():
                sending.exception()  # seen; an answer that came before it counts
            if body.sent or not body.exists:
                response.release()
            else:
                # Answered before it had everything: the rest cannot be told from a next request.
                response.close()

    async def _await_head(self, response: UpstreamResponse, sending: asyncio.Task[None] | None) -> None:
        """Wait for the head of the answer, or for what is wrong with the request's body."""
        if sending is None:
            await response.wait_head(self._settings.request_s)
            return
        arrival = asyncio.create_task(response.wait_head(self._settings.request_s), name="await-head")
        try:
            await asyncio.wait({arrival, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and isinstance(sending.exception(), BodyTooLargeError):
                sending.result()
            await arrival
        finally:
            arrival.cancel()

    async def _answer(
        self, exchange: Exchange, response: UpstreamResponse, body: ClientBody, send: Send
    ) -> None:
        limit = self._settings.response_bytes
        length = next((value for name, value in response.headers if name == b"content-length"), b"")
        if length.isdigit() and int(length) > limit:
            _log.warning(
                "answer_refused", endpoint=exchange.endpoint_id, worker=exchange.worker_id, bytes=int(length)
            )
            raise Refusal.bad_gateway()
        exchange.status, exchange.head_sent = response.status, True
        exchange.streamed = any(
            name == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in response.headers
        )
        headers = response_headers(response.headers, exchange.worker_id)
        if response.status in BODILESS:
            # It tells of a body that another answer would have.
            headers = [(name, value) for name, value in headers if name != b"content-length"]
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
        body.leave()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        exchange.outcome = Outcome.REJECTED if 400 <= response.status < 500 else Outcome.OK
        if response.status >= 500:
            exchange.outcome = Outcome.FAILED
