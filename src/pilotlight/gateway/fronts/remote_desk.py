"""The desk of a front: the owner of the slots is asked over the link, and its answers come later."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from pilotlight.core.deadlines import HoldBound
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.usage import Outcome
from pilotlight.domain.worker import Registration
from pilotlight.gateway.data_path.desk import Seeker, Slot, Ticket, Use, Wish
from pilotlight.gateway.fronts import messages
from pilotlight.gateway.key_limits import Taken
from pilotlight.gateway.refusal import RequestRefusedError
from pilotlight.gateway.router import looks_at_prompts
from pilotlight.gateway.slots import Ask


class OwnerFailedError(Exception):
    """Raised in place of a fault of the owner's, whose log has it whole."""


class RemoteSlot:
    """A slot that the owner granted (`Slot`).

    Attributes:
        number: Of the seek.
    """

    __slots__ = ("_registration", "_worker_id", "number")

    def __init__(self, number: int, worker_id: str, registration: Registration) -> None:
        self.number = number
        self._worker_id = worker_id
        self._registration = registration

    @property
    def worker_id(self) -> str:
        """See `Slot`."""
        return self._worker_id

    @property
    def registration(self) -> Registration | None:
        """See `Slot`."""
        return self._registration


class _Sought:
    """What is sought: the ticket of its seeker."""

    __slots__ = ("_desk", "_number", "seeker", "wish")

    def __init__(self, desk: RemoteDesk, number: int, wish: Wish, seeker: Seeker) -> None:
        self._desk = desk
        self._number = number
        self.wish = wish
        self.seeker = seeker

    def cancel(self) -> None:
        """See `Ticket`."""
        self._desk.cancel(self._number)


class RemoteDesk:
    """Implements `gateway.data_path.desk.Desk`.

    The owner answers in the order in which it was asked: when a comment comes that was asked for after a
    slot, the request waits, or was told already.

    Args:
        send: Sends a message to the owner.
    """

    def __init__(self, send: Callable[[messages.FromFront], None]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        # By identity, as a wish has no name; each is kept, so that no other one gets its identity.
        self._requests: dict[int, tuple[int, Wish]] = {}
        self._seeks: dict[int, _Sought] = {}
        self._workers: dict[str, Registration] = {}
        self._lives: dict[int, asyncio.Future[bool]] = {}
        self._comments: dict[int, Callable[[bytes], None]] = {}
        self._lost = False

    def seek(self, wish: Wish, bound: HoldBound, seeker: Seeker) -> Ticket:
        """See `Desk`; the seeker is told later."""
        if self._lost:
            raise _gone()
        ask, known = wish.ask, self._requests.get(id(wish))
        prefix = _prefix(wish.endpoint, ask) if known is None else None
        number = next(self._numbers)
        seek = self._seeks[number] = _Sought(self, number, wish, seeker)
        if known is not None:
            again = messages.Again(number, known[0], ask.tried, bound.seconds, bound.by_client)
            self._send(again)
            return seek
        self._requests[id(wish)] = number, wish
        first = messages.Seek(
            number, wish.endpoint.id, wish.key.id, ask.body_bytes, ask.priority, ask.cost, ask.session,
            prefix, wish.tokens, bound.seconds, bound.by_client,
        )  # fmt: skip
        self._send(first)
        return seek

    def cancel(self, number: int) -> None:
        """Seek no longer; harmless once the seeker was told."""
        if self._seeks.pop(number, None) is not None:
            self._send(messages.Cancel(number))

    def give_back(self, wish: Wish, slot: Slot, use: Use) -> None:  # noqa: ARG002 - the protocol's
        """See `Desk`."""
        assert isinstance(slot, RemoteSlot)
        self._send(messages.GiveBack(slot.number, use.failed, use.first_byte_ms, use.service_ms, use.cost))

    def end(self, wish: Wish, tokens: int | None) -> None:
        """See `Desk`."""
        known = self._requests.pop(id(wish), None)
        if known is not None:
            self._send(messages.End(known[0], tokens))

    def suspend(self, worker_id: str, seconds: float) -> None:
        """See `Desk`."""
        self._send(messages.Suspend(worker_id, seconds))

    async def lives(self, worker_ids: frozenset[str]) -> bool:
        """See `Desk`; no worker does once the owner is gone."""
        if self._lost:
            return False
        number = next(self._numbers)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._lives[number] = answer
        self._send(messages.Lives(number, worker_ids))
        try:
            return await answer
        finally:
            self._lives.pop(number, None)

    def comment(self, endpoint: Endpoint, waited_ms: int, told: Callable[[bytes], None]) -> None:
        """See `Desk`; nothing is told of an endpoint that is gone."""
        number = next(self._numbers)
        self._comments[number] = told
        self._send(messages.Comment(number, endpoint.id, waited_ms))

    def counted(self, message: messages.Counted) -> None:
        """The owner says what the limits of a key say."""
        seek = self._seeks.get(message.request)
        if seek is not None:
            seek.wish.taken = Taken(headers=message.headers)

    def reached(self, message: messages.Reached) -> None:
        """The owner says how a worker is reached."""
        if message.others_gone:
            self._workers.clear()
        self._workers[message.worker_id] = message.registration

    def granted(self, message: messages.Granted) -> None:
        """The owner grants a slot; if it was cancelled, the owner takes it back by itself."""
        seek = self._seeks.pop(message.number, None)
        if seek is not None:
            slot = RemoteSlot(message.number, message.worker_id, self._workers[message.worker_id])
            seek.seeker.granted(slot)

    def refused(self, message: messages.Refused) -> None:
        """The owner refuses."""
        seek = self._seeks.pop(message.number, None)
        if seek is not None:
            refusal = RequestRefusedError(
                message.status, message.message, type=message.type, code=message.code,
                outcome=message.outcome, headers=message.headers,
            )  # fmt: skip
            seek.seeker.refused(refusal)

    def failed(self, message: messages.Failed) -> None:
        """Something is wrong with the owner."""
        seek = self._seeks.pop(message.number, None)
        if seek is not None:
            seek.seeker.refused(OwnerFailedError("the gateway's owner failed to find a slot"))

    def lives_answered(self, message: messages.LivesAnswer) -> None:
        """The owner says whether workers live."""
        answer = self._lives.get(message.number)
        if answer is not None and not answer.done():
            answer.set_result(message.lives)

    def commented(self, message: messages.CommentAnswer) -> None:
        """The owner has made a comment."""
        told = self._comments.pop(message.number)
        if message.comment:
            told(message.comment)

    def lose(self) -> None:
        """The owner is gone: nobody gets a slot any more."""
        self._lost = True
        self._comments.clear()
        for answer in self._lives.values():
            if not answer.done():
                answer.set_result(False)
        seeks = list(self._seeks.values())
        self._seeks.clear()
        for seek in seeks:
            seek.seeker.refused(_gone())


def _prefix(endpoint: Endpoint, ask: Ask) -> tuple[int, ...] | None:
    """The hashes of a prompt, where a choice of workers may depend on them."""
    several = endpoint.workers_max > 1 and endpoint.revision.engine_url is None
    if ask.prefix is None or not several or not looks_at_prompts(endpoint.routing, ask):
        return None
    return tuple(ask.prefix())


def _gone() -> RequestRefusedError:
    return RequestRefusedError(
        503, "the gateway is stopping, or starts anew", type="server_error", code="no_worker",
        retry_after_s=1, outcome=Outcome.FAILED,
    )  # fmt: skip
