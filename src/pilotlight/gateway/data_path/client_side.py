"""What the client of an exchange is told: heads, comments while it waits, refusals and failures."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import structlog

from pilotlight.domain.usage import Outcome
from pilotlight.gateway.body import BodyPlan
from pilotlight.gateway.call import ClientCall
from pilotlight.gateway.data_path.answer import begin_head, end_head, lines
from pilotlight.gateway.data_path.desk import Ticket, Wish
from pilotlight.gateway.data_path.opened import Opened
from pilotlight.gateway.events import TokenCount, error_event, stream_end
from pilotlight.gateway.exchange import Exchange
from pilotlight.gateway.heartbeats import STREAM_HEADERS, STREAMED_ROUTES
from pilotlight.gateway.openai_access import models_answer
from pilotlight.gateway.refusal import RequestRefusedError
from pilotlight.gateway.request_ids import new_id, shown

if TYPE_CHECKING:
    from pilotlight.gateway.data_path.road import DataPath

_log = structlog.get_logger()

_P = ParamSpec("_P")
_S = TypeVar("_S", bound="ClientSide")
_Method = Callable[Concatenate[_S, _P], None]


def on_event(method: _Method[_S, _P]) -> _Method[_S, _P]:
    """A callback: refusals raised in it are answered, faults of ours are logged and answered."""

    @functools.wraps(method)
    def guarded(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except RequestRefusedError as refusal:
            self.refuse(refusal)
        except Exception:  # noqa: BLE001 - logged whole and answered; nobody above knows OpenAI's shape
            self.fault()

    return guarded


class ClientSide(Exchange):
    """One half of an exchange; `data_path.exchange` is the other.

    Args:
        road: What it works with.
        call: The client's side.

    Attributes:
        opened: What the head says, once the request may be served.
        plan: What the body says, once it is whole.
        wish: What the desk was asked for; None before.
        ticket: Of the slot that is waited for; None while none is.
        count: Tokens.
        beating: Whether the head of a stream has been sent for the sake of comments.
        ended: Whether everything is over.
    """

    opened: Opened
    plan: BodyPlan
    wish: Wish | None = None
    ticket: Ticket | None = None
    beating = False
    ended = False
    _beat_timer: asyncio.TimerHandle | None = None

    def __init__(self, road: DataPath, call: ClientCall) -> None:
        self.road = road
        self.call = call
        self.arrival_ms = road.clock.now_ms()
        self.started_ns = road.clock.monotonic_ns()
        self.request_id = new_id(self.arrival_ms, road.entropy)
        self.count = TokenCount()

    def finish(self) -> None:
        """Give back everything that is held, and write the row; idempotent."""
        raise NotImplementedError

    def start_stream(self, head: bytes) -> None:
        """Send the head of a stream, given what of it is not ours."""
        self.call.start(self.whole_head(head), framed=False)

    def whole_head(self, head: bytes, length: int | None = None) -> bytes:
        """The head of an answer, given what of it is not ours, and the length of its body if known."""
        if self.wish is not None and self.wish.taken is not None:
            head += lines(self.wish.taken.headers)
        return head + end_head(shown(self.request_id, self.client_id), length)

    def tell_models(self) -> None:
        """Answer what models there are, and end; no worker is woken for that."""
        body = models_answer(self.opened.endpoint, self.route)
        self.status, self.outcome, self.head_sent = 200, Outcome.OK, True
        head = begin_head(200, [(b"content-type", b"application/json")])
        self.call.answer(self.whole_head(head, len(body)), body)
        self.finish()

    def feeds_comments(self) -> bool:
        """Whether the client gets comments while it waits (`gateway.heartbeats`)."""
        return self.opened.key.heartbeat_s is not None and self.plan.stream and self.route in STREAMED_ROUTES

    @on_event
    def beat(self) -> None:
        """Send a comment now, and then again and again."""
        road, opened = self.road, self.opened
        assert opened.key.heartbeat_s is not None
        self._beat_timer = self.call.loop.call_later(opened.key.heartbeat_s, self.beat)
        waited_ns = road.clock.monotonic_ns() - self.started_ns
        road.desk.comment(opened.endpoint, waited_ns // 1_000_000, self._comment)

    @on_event
    def _comment(self, comment: bytes) -> None:
        """Send it to a client that has read the one before, and begin the stream with the first."""
        if self._beat_timer is None:
            return
        if not self.beating:
            if self.ticket is None:
                # Told of a slot or a refusal meanwhile: that has a status of its own.
                self.stop_heartbeats()
                return
            self.beating = True
            self.start_stream(begin_head(200, STREAM_HEADERS))
        if self.call.writable:
            self.call.write(comment)

    def stop_heartbeats(self) -> None:
        """Send no more comments."""
        if self._beat_timer is not None:
            self._beat_timer.cancel()
            self._beat_timer = None

    def fault(self) -> None:
        """Answer that something is wrong with us. It is logged whole; the caller learns the id to ask for."""
        self.outcome = Outcome.FAILED
        _log.exception("data_path_failed", request=self.request_id, endpoint=self.endpoint_id)
        try:
            self.fail(500, f"internal server error, request {self.request_id}", "server_error")
        finally:
            self.finish()

    def refuse(self, refusal: RequestRefusedError) -> None:
        """Answer with a refusal, and end."""
        if not self.ended:
            self.stop_heartbeats()
            self.outcome = refusal.outcome
            self._tell(refusal)
            self.finish()

    def fail(self, status: int, message: str, type_: str) -> None:
        """Tell the client of a failure, and end.

        By its status while that can be set, else as a last event. A body that is not a stream has no place
        for it: it stays incomplete, and the connection is closed, so that the client cannot take the part
        for the whole.
        """
        if self.ended:
            return
        self.stop_heartbeats()
        refusal = RequestRefusedError(status, message, type=type_, retry_after_s=1)
        if not self.head_sent:
            self._tell(refusal)
        elif self.streamed:
            self.call.end(error_event(self.route, refusal.body_for(self.route)))
        else:
            self.call.break_off()
        self.finish()

    def _tell(self, refusal: RequestRefusedError) -> None:
        self.status, self.head_sent = refusal.status, True
        body = refusal.body_for(self.route)
        if self.beating:
            self.call.end(error_event(self.route, body) + stream_end(self.route))
            return
        head = begin_head(refusal.status, [(b"content-type", b"application/json"), *refusal.headers])
        self.call.answer(self.whole_head(head, len(body)), body)
