"""The owner's side of its links to the fronts: it seeks slots for their requests and tells them what counts.

Whatever a front was given is given back when its link is lost, in whichever state it was.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import msgspec
import structlog

from pilotlight.core.deadlines import HoldBound
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey
from pilotlight.domain.usage import RequestRecord
from pilotlight.domain.worker import Registration
from pilotlight.gateway.data_path.desk import Desk, Slot, Ticket, Use, Wish
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.fronts import messages
from pilotlight.gateway.fronts.link import Link, LinkError, encoder
from pilotlight.gateway.jobs.rates import RateTable
from pilotlight.gateway.openai_access import called_endpoint, stranger
from pilotlight.gateway.openai_rates import count_in
from pilotlight.gateway.refusal import RequestRefusedError
from pilotlight.gateway.slots import Ask
from pilotlight.settings import Settings

_log = structlog.get_logger()

_FOLLOWED_S = 1.0
"""How long a change of keys or endpoints waits for fronts to have it. One that takes longer must not hold up
its maker; what was taken away counts at the owner, who is asked for slots."""

_WORKERS_MAX = 1024
"""Workers of which a front remembers how they are reached, before it begins anew."""

_decoder = msgspec.msgpack.Decoder(list[messages.FromFront])


class OwnerSide:
    """All fronts.

    Args:
        desk: Gives slots.
        directory: Endpoints and keys, which fronts have copies of. Its hooks are set.
        record: Takes rows of the request log.
        settings: What fronts work by.
        rates: Rate limits of the profile in use; None for none.
        leads: Whether the workers are this gateway's.
        closing: Whether new requests are refused.
    """

    def __init__(
        self,
        *,
        desk: Desk,
        directory: Directory,
        record: Callable[[RequestRecord], None],
        settings: Settings,
        rates: RateTable | None,
        leads: Callable[[], bool],
        closing: Callable[[], bool],
    ) -> None:
        self.desk = desk
        self.directory = directory
        self.record = record
        self._settings = settings
        self.rates = rates
        self._leads = leads
        self._closing = closing
        self._fronts: set[Attached] = set()
        self._number = 1
        directory.on_change = self.publish
        directory.followed = self.followed

    async def attach(self, sock: socket.socket) -> Attached:
        """Begin to serve a front.

        Args:
            sock: Our end of a pair of connected Unix sockets; it is ours to close from now on.
        """
        front = Attached(self)
        await front.open(sock, messages.Welcome(self._settings.model_dump_json().encode()))
        if not front.lost.is_set():
            self._fronts.add(front)
            front.send(self._state())
        return front

    def publish(self) -> None:
        """Tell all fronts of endpoints, keys, the lead and the end."""
        self._number += 1
        if self._fronts:
            state = self._state()
            for front in self._fronts:
                front.send(state)

    async def followed(self) -> None:
        """Wait until all fronts have what was published last; for a second at most."""
        waits = [seen for front in self._fronts if (seen := front.has_seen(self._number)) is not None]
        if waits:
            _, late = await asyncio.wait(waits, timeout=_FOLLOWED_S)
            if late:
                _log.warning("fronts_late", fronts=len(late), seconds=_FOLLOWED_S)

    def drop(self, urls: Sequence[str]) -> None:
        """Have fronts close their idle connections to these addresses."""
        for front in self._fronts:
            front.send(messages.Drop(tuple(urls)))

    def forget(self, front: Attached) -> None:
        """A front is lost."""
        self._fronts.discard(front)

    def called(self, endpoint_id: str, key_id: str) -> tuple[Endpoint, ApiKey]:
        """What a request names. RequestRefusedError where that is gone, or may not be called any more."""
        key = self.directory.key_of_id(key_id)
        if key is None:
            raise stranger()
        return called_endpoint(self.directory, key, endpoint_id), key

    def _state(self) -> msgspec.Raw:
        state = messages.State(
            self._number,
            tuple(self.directory.endpoints()),
            tuple(self.directory.keys()),
            self._leads(),
            self._closing(),
        )
        return msgspec.Raw(encoder.encode(state))


class Attached:
    """One front.

    Attributes:
        ready: Set once it answers requests.
        lost: Set once its link is lost and all that it had is given back.
        desk: Where it gets slots.
        send: Sends it a message.
    """

    def __init__(self, owner: OwnerSide) -> None:
        self.ready = asyncio.Event()
        self.lost = asyncio.Event()
        self._owner = owner
        self.desk = owner.desk
        self._link = Link(_decoder, self._on_message, self._on_lost)
        self.send = self._link.send
        self._requests: dict[int, _Request] = {}
        self._seeks: dict[int, _Sought] = {}
        self._reached: dict[str, Registration] = {}
        self._asked: set[asyncio.Task[None]] = set()
        self._seen = 0
        self._watchers: dict[asyncio.Future[None], int] = {}
        self._handlers: dict[type[messages.FromFront], Callable[..., None]] = {
            messages.Seek: self._seek,
            messages.Again: self._again,
            messages.Cancel: self._cancel,
            messages.GiveBack: self._give_back,
            messages.End: self._end,
            messages.Suspend: self._suspend,
            messages.Lives: self._lives,
            messages.Comment: self._comment,
            messages.Row: self._row,
            messages.Ready: self._ready,
            messages.Seen: self._note_seen,
        }

    async def open(self, sock: socket.socket, welcome: messages.Welcome) -> None:
        """Begin."""
        self.send(welcome)
        await self._link.open(sock)

    def stop(self) -> None:
        """Let it take no new connections, answer what is under way, and end; harmless once it is lost."""
        self.send(messages.Stop())

    def close(self) -> None:
        """End the link at once, upon which a front ends, too; see `lost`."""
        self._link.abort()

    def has_seen(self, number: int) -> asyncio.Future[None] | None:
        """Done once it has the state of this number, or is lost; None if it has it, or answers nobody yet."""
        if self._seen >= number or not self._seen or self.lost.is_set():
            return None
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers[watcher] = number
        watcher.add_done_callback(self._watchers.pop)
        return watcher

    def granted(self, seek: _Sought, slot: Slot) -> None:
        """Tell it of a slot."""
        registration, worker_id = slot.registration, slot.worker_id
        assert registration is not None
        self._tell_limits(seek)
        if self._reached.get(worker_id) is not registration:
            full = len(self._reached) >= _WORKERS_MAX
            if full:
                self._reached.clear()
            self._reached[worker_id] = registration
            self.send(messages.Reached(worker_id, registration, full))
        self.send(messages.Granted(seek.number, worker_id))

    def refused(self, seek: _Sought, error: Exception) -> None:
        """Tell it that there will be no slot."""
        self._seeks.pop(seek.number, None)
        self._tell_limits(seek)
        if isinstance(error, RequestRefusedError):
            refusal = messages.Refused(
                seek.number,
                error.status,
                str(error),
                error.type,
                error.code,
                error.outcome,
                tuple(error.headers),
            )
            self.send(refusal)
        else:
            _log.error("seek_failed", exc_info=error)
            self.send(messages.Failed(seek.number))

    def _on_message(self, message: messages.FromFront) -> None:
        self._handlers[type(message)](message)

    def _seek(self, message: messages.Seek) -> None:
        number = message.number
        if number in self._requests:
            raise LinkError(f"request {number} is known already")
        request = self._requests[number] = _Request()
        seek = self._sought(number, request)
        try:
            endpoint, key = self._owner.called(message.endpoint_id, message.key_id)
            if self._owner.rates is not None:
                request.admission = count_in(self._owner.rates, endpoint, key)
        except RequestRefusedError as error:
            self.refused(seek, error)
            return
        prefix = message.prefix
        ask = Ask(
            message.body_bytes, key.id, key.share, message.priority, message.cost, message.session,
            None if prefix is None else lambda: prefix,
        )  # fmt: skip
        request.wish = Wish(endpoint, key, ask, message.tokens)
        self._begin(seek, request.wish, HoldBound(message.bound_s, message.by_client))

    def _again(self, message: messages.Again) -> None:
        request = self._requests[message.request]
        if request.wish is None:
            raise LinkError(f"request {message.request} was refused")
        request.wish.ask.tried = message.tried
        bound = HoldBound(message.bound_s, message.by_client)
        self._begin(self._sought(message.number, request), request.wish, bound)

    def _sought(self, number: int, request: _Request) -> _Sought:
        if number in self._seeks:
            raise LinkError(f"slot {number} is known already")
        seek = self._seeks[number] = _Sought(self, number, request)
        return seek

    def _begin(self, seek: _Sought, wish: Wish, bound: HoldBound) -> None:
        try:
            seek.ticket = self.desk.seek(wish, bound, seek)
        except Exception as error:  # noqa: BLE001 - a refusal, or logged; one request's fault is not all others'
            self.refused(seek, error)
        else:
            self._tell_limits(seek)

    def _tell_limits(self, seek: _Sought) -> None:
        """Say what the limits of the key say of a request, before anything else is said of it."""
        request = seek.request
        if request.told or request.wish is None or request.wish.taken is None:
            return
        request.told = True
        if request.wish.taken.headers:
            self.send(messages.Counted(seek.number, tuple(request.wish.taken.headers)))

    def _cancel(self, message: messages.Cancel) -> None:
        seek = self._seeks.pop(message.number, None)
        if seek is None:
            # It was refused in the same moment.
            return
        seek.cancel()
        seek.give_back(Use(failed=False, cost=0))

    def _give_back(self, message: messages.GiveBack) -> None:
        seek = self._seeks[message.number]
        if seek.slot is None:
            raise LinkError(f"slot {message.number} was not granted")
        del self._seeks[message.number]
        seek.give_back(Use(message.failed, message.first_byte_ms, message.service_ms, message.cost))

    def _end(self, message: messages.End) -> None:
        self._requests.pop(message.request).end(self.desk, message.tokens)

    def _suspend(self, message: messages.Suspend) -> None:
        self.desk.suspend(message.worker_id, message.seconds)

    def _lives(self, message: messages.Lives) -> None:
        task = asyncio.get_running_loop().create_task(self._tell_lives(message), name="look for workers")
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    async def _tell_lives(self, message: messages.Lives) -> None:
        lives = await self.desk.lives(message.worker_ids)
        self.send(messages.LivesAnswer(message.number, lives))

    def _comment(self, message: messages.Comment) -> None:
        number = message.number
        endpoint = self._owner.directory.endpoint(message.endpoint_id)
        if endpoint is None:
            self.send(messages.CommentAnswer(number, b""))
        else:
            self.desk.comment(
                endpoint, message.waited_ms, lambda text: self.send(messages.CommentAnswer(number, text))
            )

    def _row(self, message: messages.Row) -> None:
        self._owner.record(message.record)

    def _ready(self, _: messages.Ready) -> None:
        self.ready.set()

    def _note_seen(self, message: messages.Seen) -> None:
        self._seen = message.number
        for watcher, number in list(self._watchers.items()):
            if number <= message.number and not watcher.done():
                watcher.set_result(None)

    def _on_lost(self) -> None:
        self._owner.forget(self)
        try:
            # Places first: a slot that is given back must not be granted to one of its own.
            seeks = list(self._seeks.values())
            for seek in seeks:
                seek.cancel()
            for seek in seeks:
                seek.give_back(Use(failed=False))
            for request in self._requests.values():
                request.end(self.desk, None)
        finally:
            self._seeks.clear()
            self._requests.clear()
            for waits in (*self._asked, *self._watchers):
                waits.cancel()
            self.lost.set()


class _Request:
    """A request of a front, from its first seek to its end.

    Attributes:
        wish: None for one that was refused before the desk saw it.
        admission: Counts it for the profile's limits.
        told: Whether the front knows what the limits of its key say.
    """

    __slots__ = ("admission", "told", "wish")

    def __init__(self) -> None:
        self.wish: Wish | None = None
        self.admission: AbstractContextManager[None] | None = None
        self.told = False

    def end(self, desk: Desk, tokens: int | None) -> None:
        """It is over."""
        if self.wish is not None:
            desk.end(self.wish, tokens)
        if self.admission is not None:
            self.admission.__exit__(None, None, None)


class _Sought:
    """A slot that a request of a front waits for, or has (`Seeker`).

    Attributes:
        number: Of the seek.
        request: Whose.
        ticket: Its place while it waits.
        slot: What it has.
    """

    __slots__ = ("_front", "number", "request", "slot", "ticket")

    def __init__(self, front: Attached, number: int, request: _Request) -> None:
        self._front = front
        self.number = number
        self.request = request
        self.ticket: Ticket | None = None
        self.slot: Slot | None = None

    def granted(self, slot: Slot) -> None:
        """See `Seeker`."""
        self.ticket, self.slot = None, slot
        self._front.granted(self, slot)

    def refused(self, error: Exception) -> None:
        """See `Seeker`."""
        self.ticket = None
        self._front.refused(self, error)

    def cancel(self) -> None:
        """Wait no longer, if it does."""
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            ticket.cancel()

    def give_back(self, use: Use) -> None:
        """Have no slot any more, if it has one."""
        slot, self.slot = self.slot, None
        if slot is not None and self.request.wish is not None:
            self._front.desk.give_back(self.request.wish, slot, use)
