"""How an answer that is a stream of events goes to the client."""

from __future__ import annotations

from pilotlight.gateway.body import BodyPlan
from pilotlight.gateway.call import ClientCall
from pilotlight.gateway.continuation import failure_at, hide_tokens
from pilotlight.gateway.events import EventStream, TokenCount, data_event, error_event, stream_end
from pilotlight.gateway.passage import Passage
from pilotlight.gateway.refusal import error_object
from pilotlight.gateway.upstream import UpstreamError
from pilotlight.ports.clock import Clock

ONE_EVENT_MAX = 4 * 1024 * 1024
"""No answer that is larger becomes an event."""


class EventPass:
    """Passes a stream on in whole events, each in the moment in which it is there.

    Of a stream that may have to go on with another worker everything is kept as the engine sent it, up to a
    bound.

    Args:
        call: The client's side.
        plan: What is to be hidden, and whether the stream may outlive its worker.
        count: Where tokens are noted.
        kept_bytes: Bytes that are kept at most.
        clock: Time.

    Attributes:
        events: Finds them in what is fed.
        first_byte_ns: When the first was passed on; None before.
        died: Whether the engine has reported that it failed. That is not passed on; nothing may follow.
    """

    __slots__ = (
        "_call", "_clock", "_hides", "_kept", "_kept_bytes", "_passage", "died", "events", "first_byte_ns",
    )  # fmt: skip

    def __init__(
        self, call: ClientCall, plan: BodyPlan, count: TokenCount, *, kept_bytes: int, clock: Clock
    ) -> None:
        self._call = call
        self._clock = clock
        self._hides = plan.hide_tokens
        self._kept: list[bytes] | None = [] if plan.survives else None
        self._kept_bytes = kept_bytes
        self.events = EventStream(count, hide_usage=plan.hide_usage)
        self._passage: Passage | None = None
        self.first_byte_ns: int | None = None
        self.died = False

    @property
    def delivered(self) -> bytes | None:
        """All whole events so far, as the engine sent them; None where they were not kept."""
        return None if self._kept is None else b"".join(self._kept)

    def feed(self, data: bytes) -> bool:
        """Pass on what is whole of the stream with this data; False when the client reads slowly."""
        whole = self.events.whole(data)
        if self._kept is not None and whole:
            whole = self._keep(self._kept, whole)
        if not whole:
            return True
        shown = self.events.shown(whole)
        if self._hides:
            shown = hide_tokens(shown)
        if not shown:
            return True
        if self.first_byte_ns is None:
            self.first_byte_ns = self._clock.monotonic_ns()
        return self._call.write(shown)

    @property
    def count(self) -> int:
        """Events so far, by whichever way."""
        return self.events.events + (0 if self._passage is None else self._passage.events)

    def passage(self) -> Passage | None:
        """What passes on what comes next (`UpstreamResponse.pass_chunks`), if that will do.

        It is the whole of what an event costs while nothing is to be kept or hidden, and the client's answer
        is chunked, too: one look at a piece, which is usually one chunk that is one event, and one write.
        """
        if self._hides or self._kept is not None or not self.events.at_boundary:
            return None
        if self._passage is None:
            self._passage = self._call.passage()
        return self._passage

    def begin_again(self) -> None:
        """Another worker goes on: what had begun of an event is void."""
        self.events.rest()
        self.died = self.events.failed = False

    def _keep(self, kept: list[bytes], whole: bytes) -> bytes:
        """Keep whole events; what of them is not the engine's report of its own end."""
        at = failure_at(whole)
        if at >= 0:
            whole, self.died = whole[:at], True
        kept.append(whole)
        self._kept_bytes -= len(whole)
        if self._kept_bytes < 0:
            self._kept = None
        return whole


def one_event(route: str, status: int, body: bytes, count: TokenCount) -> bytes:
    """An answer that is no stream, for a client that has been given the beginning of one, with its end.

    Mostly an error. Anything else becomes one event, as vLLM has it where it cannot stream.

    Args:
        route: Path of the engine's route.
        status: Of the answer.
        body: All of it.
        count: Where tokens are noted.

    Raises:
        UpstreamError: The answer is too large.
    """
    if len(body) > ONE_EVENT_MAX:
        raise UpstreamError(f"its answer is no stream, and larger than {ONE_EVENT_MAX} bytes")
    if status >= 400:
        event = error_event(route, error_object(route, status, body))
    else:
        count.note(body)
        event = data_event(body)
    return event + stream_end(route)
