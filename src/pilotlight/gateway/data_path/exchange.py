"""One call of an OpenAI or Anthropic route, from its head to the row in the request log.

A state machine of callbacks: whoever has news calls one of its methods, and each either waits for more or
takes the next step.

```
 enter ── body_complete ──► _seek ──► _use ──────► _begin ──► _arrived ──► _answer ──► _pass_… ──► finish
 key, endpoint,             a slot,   a worker:    the        news from    status,     whole events,
 route: may it?             or wait   connection   request    the engine   headers     or the body
                              ▲                      │ not reached: another worker, three at most
                              └──────────────────────┘
```

The client may go, and time may run out, in any state: `client_gone` and `_expired` give back whatever is held
(`finish`). Closing the connection to the engine is what makes vLLM abort a generation. Every failure before
the first byte is an OpenAI error with its proper status; later ones become a final event, or where the body
is no stream, a connection that is closed early.
"""

from __future__ import annotations

import asyncio
import functools
from contextlib import AbstractContextManager

import structlog

from pilotlight.core.deadlines import HoldBound, hold_bound
from pilotlight.core.fair_queue import cost_of, expected_tokens
from pilotlight.core.openai_routes import RouteKind
from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Address
from pilotlight.errors import InvalidInputError
from pilotlight.gateway.body import BodyPlan, plan_body
from pilotlight.gateway.data_path.answer import lines, passed_head
from pilotlight.gateway.data_path.client_side import ClientSide, on_event
from pilotlight.gateway.data_path.desk import Slot, Use, Wish
from pilotlight.gateway.data_path.opened import Opened, open_request
from pilotlight.gateway.data_path.refusals import body_late, too_large
from pilotlight.gateway.data_path.streams import ONE_EVENT_MAX, EventPass, one_event
from pilotlight.gateway.data_path.survival import StreamLostError, Survival
from pilotlight.gateway.heartbeats import AT_ONCE
from pilotlight.gateway.hop import BODILESS
from pilotlight.gateway.openai_access import caller_of
from pilotlight.gateway.openai_rates import count_in
from pilotlight.gateway.prefix import PROMPT_ROUTES, prompt_blocks
from pilotlight.gateway.refusal import RequestRefusedError
from pilotlight.gateway.request_ids import client_id, for_engine
from pilotlight.gateway.slots import Ask
from pilotlight.gateway.upstream import UpstreamError, UpstreamResponse
from pilotlight.gateway.worker_slots import SUSPENSION_S

_log = structlog.get_logger()

_TRIES_MAX = 3
"""Workers that are tried when one cannot be reached; the request has not left us then."""

_USAGE_BODY_MAX = 4 * 1024 * 1024
"""Usage is looked for in unstreamed answers up to this size."""


@functools.lru_cache(maxsize=16)
def _gateways_bound(hold_s: float) -> HoldBound:
    """How long requests are held whose clients say nothing."""
    return HoldBound(hold_s, by_client=False)


class OpenAIExchange(ClientSide):
    """The machine.

    Args:
        road: What it works with.
        call: The client's side.
    """

    # Most exchanges never change most of these.
    _client_body = b""
    _body: bytearray | None = None
    _size = 0
    _admission: AbstractContextManager[None] | None = None
    _timer: asyncio.TimerHandle | None = None
    _slot: Slot | None = None
    _tries = 0
    _sent_ns = 0
    _connecting: asyncio.Task[None] | None = None
    _connection: UpstreamResponse | None = None
    _reused = False
    _answering = False
    _sick = False
    _stream: EventPass | None = None
    _survival: Survival | None = None
    _surviving: asyncio.Task[None] | None = None
    _kept: tuple[bytes, ...] = ()
    _estimated = False

    # The client.

    @on_event
    def enter(self) -> None:
        """The head has come: may this client ask this?"""
        road, call = self.road, self.call
        head = call.head
        memo = head.memo
        if isinstance(memo, Opened) and road.is_current(head):
            self._open(memo)
        else:
            self.client_id = client_id(head.headers.get(b"x-request-id", b""))
            _, _, endpoint_id, _, *rest = head.path.split(b"/", 4)
            self.endpoint_id = endpoint_id.decode("latin-1")
            self.route = path = f"/{rest[0].decode('latin-1') if rest else ''}"
            if head.query:
                path = f"{path}?{head.query.decode('latin-1')}"
            key = caller_of(road.directory, head.headers)
            self.key_id = key.id
            opened = open_request(
                head, key, self.endpoint_id, path, directory=road.directory, limits=road.limits
            )
            head.memo = opened
            self._open(opened)
        if road.tracer is not None:
            headers = head.headers
            self.context = road.tracer.begin(
                headers.get(b"traceparent", b""), headers.get(b"tracestate", b"")
            )
        if road.rates is not None:
            self._admission = count_in(road.rates, self.opened.endpoint, self.opened.key)
        if self.route.startswith("/v1/models"):
            self.tell_models()
            return
        if call.content_length > road.limits.body_bytes:
            raise too_large(road.limits)
        call.body_s = road.limits.body_s
        call.proceed()

    def _open(self, opened: Opened) -> None:
        self.opened = opened
        self.key_id = opened.key.id
        self.endpoint_id = opened.endpoint.id
        self.route = opened.decision.path
        self.client_id = opened.client_id

    @on_event
    def body_received(self, data: bytes) -> None:
        """See `CallHandler`."""
        self._size += len(data)
        if self._size > self.road.limits.body_bytes:
            raise too_large(self.road.limits)
        if self._body is None:
            self._body = bytearray()
        self._body += data

    @on_event
    def body_late(self) -> None:
        """See `CallHandler`."""
        raise body_late(self.road.limits)

    @on_event
    def body_complete(self) -> None:
        """See `CallHandler`."""
        body = bytes(self._body or b"")
        self._body, self._size = None, 0
        self._ask_for_slot(body, self._elapsed_s())

    @on_event
    def body_whole(self, body: bytes) -> None:
        """See `CallHandler`."""
        if len(body) > self.road.limits.body_bytes:
            raise too_large(self.road.limits)
        self._ask_for_slot(body)

    def _ask_for_slot(self, body: bytes, elapsed_s: float = 0.0) -> None:
        """Look into the body, which took so long to come, and seek a worker for it."""
        opened = self.opened
        if opened.decision.kind is RouteKind.JSON and body:
            try:
                plan = plan_body(self.route, body, survivable=opened.survivable)
            except InvalidInputError as error:
                raise RequestRefusedError(400, str(error)) from error
        else:
            plan = BodyPlan(body=body)
        self.plan = plan
        if plan.survives:
            self._client_body = body
        tokens_in, tokens_out = expected_tokens(len(body), plan.tokens_out_max)
        key = opened.key
        self._timer = self.call.loop.call_later(opened.deadline.whole_s - elapsed_s, self._expired)
        ask = Ask(
            len(body), key.id, key.share, plan.priority, cost_of(tokens_in, tokens_out),
            opened.session or plan.user,
            functools.partial(prompt_blocks, self.route, body) if self.route in PROMPT_ROUTES else None,
        )  # fmt: skip
        self.wish = wish = Wish(opened.endpoint, key, ask, tokens_in + tokens_out)
        self._seek(wish)

    def client_ready(self) -> None:
        """See `CallHandler`."""
        if self._connection is not None:
            self._connection.resume()
        elif self._survival is not None:
            self._survival.client_ready()

    def client_gone(self) -> None:
        """See `CallHandler`."""
        self.outcome = Outcome.DISCONNECTED
        self.finish()

    # A slot.

    def _seek(self, wish: Wish) -> None:
        ticket = self.road.desk.seek(wish, self._hold_bound(), self)
        if ticket is None:
            # Told already; by now it may be seeking another.
            return
        self.ticket = ticket
        if self.feeds_comments() and self._beat_timer is None:
            self.beat()

    def _hold_bound(self) -> HoldBound:
        deadline, hold_s = self.opened.deadline, self.road.limits.hold_s
        if not deadline.asked:
            # The whole request's bound ends it by itself.
            return _gateways_bound(hold_s)
        return hold_bound(deadline, elapsed_s=self._elapsed_s(), hold_s=hold_s, fed=self.feeds_comments())

    def _elapsed_s(self) -> float:
        return (self.road.clock.monotonic_ns() - self.started_ns) / 1e9

    @on_event
    def granted(self, slot: Slot) -> None:
        """Send the request to the worker whose slot this is (`Seeker`)."""
        self.ticket, self._slot = None, slot
        self._tries += 1
        self._sent_ns = self.road.clock.monotonic_ns()
        self.wait_ns = self._sent_ns - self.started_ns
        self.worker_id = slot.worker_id
        address = self._address(slot)
        connection = self.road.pool.take_idle(address)
        self._reused = connection is not None
        if connection is None:
            self._connect(address)
        else:
            self._begin(connection)

    @on_event
    def refused(self, error: Exception) -> None:
        """See `Seeker`."""
        self.ticket = None
        raise error

    # The engine.

    def _address(self, slot: Slot) -> Address:
        """Where the request goes: the worker program's listener where it has to be rewritten."""
        registration = slot.registration
        assert registration is not None
        if self.plan.rewrite and registration.listener is not None:
            return registration.listener
        if self.plan.altered:
            raise RequestRefusedError(
                400, "guided_* and best_of were removed from vLLM and this endpoint has no worker "
                "program to honour them; use structured_outputs, or n",
            )  # fmt: skip
        return registration.engine

    def _connect(self, address: Address) -> None:
        self._connecting = self.call.loop.create_task(self._dial(address), name="connect to an engine")

    async def _dial(self, address: Address) -> None:
        try:
            connection = await self.road.pool.connect(address)
        except UpstreamError as error:
            self._dialled(None, error)
        except Exception:  # noqa: BLE001 - as `on_event` has it
            self.fault()
        else:
            self._dialled(connection, None)

    @on_event
    def _dialled(self, connection: UpstreamResponse | None, error: UpstreamError | None) -> None:
        self._connecting = None
        if connection is not None:
            self._begin(connection)
        elif error is not None:
            self._failed(error)

    def _begin(self, connection: UpstreamResponse) -> None:
        self._connection = connection
        body, context = self.plan.body, self.context
        traced = b"" if context is None else b"traceparent: %b\r\n" % context.trace.encode()
        request = b"".join(
            (
                self.opened.request_head(connection.address, traced=context is not None),
                traced,
                b"x-request-id: %b\r\n" % for_engine(self.request_id, self.client_id).encode(),
                b"content-length: %d\r\n\r\n" % len(body)
                if body or self.call.head.method == "POST"
                else b"\r\n",
                body,
            )
        )
        try:
            connection.begin(request, self._arrived, silence_s=self.road.limits.upstream_read_s)
        except UpstreamError as error:
            self._failed(error)

    @on_event
    def _arrived(self) -> None:
        """Something has come from the engine, or its connection is lost."""
        connection = self._connection
        if connection is None:
            return
        if not self._answering and connection.head is not None:
            self._answer(connection)
        if self._stream is not None:
            self._pass_events(self._stream, connection)
        elif self._answering:
            self._pass_whole(connection)
        if self._connection is not None and (error := connection.error) is not None:
            self._failed(error)

    def _failed(self, error: UpstreamError) -> None:
        """The engine was not reached, or broke off."""
        self._drop_connection()
        slot, wish = self._slot, self.wish
        assert slot is not None
        assert wish is not None
        if not self._answering:
            if self._reused and not error.answered and not error.timed_out:
                # The engine closed an idle connection in the moment in which we used it. Its others may be as
                # old: the second and last time goes over a new one.
                self._reused = False
                self._connect(self._address(slot))
                return
            if not error.sent:
                self.road.desk.suspend(slot.worker_id, SUSPENSION_S)
                self._give_back_slot(failed=True)
                if self._tries < _TRIES_MAX:
                    self._seek(wish)
                    return
        self._give_back_slot(failed=True)
        if self._stream is not None and self.plan.survives:
            self._outlive(self._stream, wish, str(error))
        else:
            self.fail(502, f"the worker failed: {error}", "server_error")

    def _outlive(self, stream: EventPass, wish: Wish, died: str) -> None:
        """Go on with another worker."""
        self._survival = Survival(
            self.road,
            wish=wish,
            route=self.route,
            body=self._client_body,
            request=self.plan.body,
            request_id=for_engine(self.request_id, self.client_id),
            stream=stream,
            moved=self._moved,
        )
        self._surviving = self.call.loop.create_task(
            self._go_on(self._survival, stream, died), name="continue a stream"
        )

    async def _go_on(self, survival: Survival, stream: EventPass, died: str) -> None:
        try:
            await survival.run(self.worker_id, hold_s=self.road.limits.hold_s)
        except StreamLostError as error:
            _log.info("stream_lost", request=self.request_id, endpoint=self.endpoint_id, reason=str(error))
            self._lost(died)
        except Exception:  # noqa: BLE001 - as `on_event` has it
            self.fault()
        else:
            self._end_stream(stream)

    def _moved(self, worker_id: str) -> None:
        self.continued += 1
        self.worker_id = worker_id

    @on_event
    def _lost(self, died: str) -> None:
        self._surviving = None
        self.fail(502, f"the worker failed: {died}", "server_error")

    # The answer.

    def _answer(self, connection: UpstreamResponse) -> None:
        """Choose how the answer is passed on."""
        head = connection.head
        assert head is not None
        self._answering = True
        self.stop_heartbeats()
        self.status = head.status
        self._sick = head.status >= 500
        if head.content_type.startswith(b"text/event-stream"):
            self.streamed = True
            self._stream = EventPass(
                self.call,
                self.plan,
                self.count,
                kept_bytes=self.road.limits.continuation_bytes,
                clock=self.road.clock,
            )
            if not self.beating:
                self.start_stream(passed_head(head) + lines(AT_ONCE))
            self.head_sent = True

    def _pass_events(self, stream: EventPass, connection: UpstreamResponse) -> None:
        data = connection.take()
        if data and not stream.feed(data) and not connection.complete:
            connection.pause()
        if stream.died:
            self._failed(UpstreamError("the engine reports that it failed"))
        elif connection.complete:
            self._end_stream(stream)
        else:
            connection.pass_chunks(stream.passage())

    @on_event
    def _end_stream(self, stream: EventPass) -> None:
        self._surviving = None
        self.call.end(stream.events.rest())
        if not stream.events.failed:
            self._succeed()
        self.finish()

    def _pass_whole(self, connection: UpstreamResponse) -> None:
        data = connection.take()
        if data:
            if self.first_byte_ns is None:
                self.first_byte_ns = self.road.clock.monotonic_ns()
            self._size += len(data)
            if self._size <= _USAGE_BODY_MAX or self.beating:
                self._kept += (data,)
        if self.beating:
            self._pass_in_event(connection)
            return
        head = connection.head
        assert head is not None
        if self.head_sent:
            if data and not self.call.write(data) and not connection.complete:
                connection.pause()
            if connection.complete:
                self.call.end()
        elif connection.complete:
            self.head_sent = True
            length = None if self.status in BODILESS else len(data)
            self.call.answer(self.whole_head(passed_head(head), length), data)
        else:
            self.head_sent = True
            self.call.start(self.whole_head(passed_head(head), head.length), framed=head.length is not None)
            if data and not self.call.write(data):
                connection.pause()
        if connection.complete:
            self._end_whole(head.content_type)

    def _end_whole(self, content_type: bytes) -> None:
        """Count the tokens of an answer that has been passed on."""
        json = content_type.startswith(b"application/json")
        if json and self.status < 400 and self._size <= _USAGE_BODY_MAX:
            self.count.note(self._kept[0] if len(self._kept) == 1 else b"".join(self._kept))
        self._succeed()
        self.finish()

    def _pass_in_event(self, connection: UpstreamResponse) -> None:
        try:
            if connection.complete or self._size > ONE_EVENT_MAX:
                event = one_event(self.route, self.status, b"".join(self._kept), self.count)
                self.head_sent = True
                self.call.end(event)
                self._succeed()
                self.finish()
        except UpstreamError as error:
            self._failed(error)

    def _succeed(self) -> None:
        if self.status < 400:
            self.outcome = Outcome.OK
        elif self.status < 500:
            self.outcome = Outcome.REJECTED

    # The end.

    @on_event
    def _expired(self) -> None:
        self.outcome = Outcome.TIMED_OUT
        seconds = self.opened.deadline.whole_s
        self.fail(504, f"the request took longer than {seconds:g} s", "timeout_error")

    def finish(self) -> None:
        """Give back everything that is held, and write the row; idempotent."""
        if self.ended:
            return
        self.ended = True
        count, stream = self.count, self._stream
        if self.ticket is not None:
            self.ticket.cancel()
            self.ticket = None
        self.stop_heartbeats()
        if self._timer is not None:
            self._timer.cancel()
        for task in (self._connecting, self._surviving):
            if task is not None:
                task.cancel()
        if stream is not None:
            self.first_byte_ns = stream.first_byte_ns
            if stream.count and count.tokens_out is None:
                # One event a token is vLLM's habit; a stream that was cut has no better count.
                count.tokens_out, self._estimated = stream.count, True
        self._drop_connection()
        if self._slot is not None:
            self._give_back_slot(failed=self._sick)
        wish = self.wish
        if wish is not None:
            tokens = self._tokens(wish) if wish.key.limited else None
            self.road.desk.end(wish, tokens and sum(tokens))
        if self._admission is not None:
            self._admission.__exit__(None, None, None)
        self.road.record(
            self.row(
                self.road.clock.monotonic_ns(),
                tokens_in=count.tokens_in,
                tokens_out=count.tokens_out,
                estimated=self._estimated,
            )
        )

    def _tokens(self, wish: Wish) -> tuple[int, int] | None:
        """Tokens of prompt and answer that the request has cost; None where nobody knows."""
        tokens_in, tokens_out = self.count.tokens_in, self.count.tokens_out
        if tokens_in is None and tokens_out is None:
            # Refused, or not reached: nothing was done. What ended for its client or its time may have cost
            # anything.
            unknown = self.status < 400 or self.outcome is Outcome.TIMED_OUT
            return None if self.worker_id and unknown else (0, 0)
        if tokens_in is None:
            tokens_in, _ = expected_tokens(wish.ask.body_bytes, 0)
        return tokens_in, tokens_out or 0

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()

    def _give_back_slot(self, *, failed: bool) -> None:
        slot, self._slot = self._slot, None
        wish = self.wish
        if slot is None or wish is None:
            return
        first, service_ms = self.first_byte_ns, None
        if self._answering:
            service_ms = (self.road.clock.monotonic_ns() - self._sent_ns) / 1_000_000
        tokens = (0, 0) if failed and not self._answering else self._tokens(wish)
        use = Use(
            failed,
            None if first is None else (first - self._sent_ns) // 1_000_000,
            service_ms,
            tokens and cost_of(*tokens),
        )
        self.road.desk.give_back(wish, slot, use)
