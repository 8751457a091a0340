"""Requests that wait for a slot, and what `gateway.slots` keeps of each endpoint."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from pilotlight.core.admission import Admission
from pilotlight.core.fair_queue import FairQueue, Place
from pilotlight.gateway.worker_slots import Ask, WorkerSlots


class HoldExpiredError(Exception):
    """A held request waited as long as it may, or its endpoint gave up starting workers."""


class DisplacedError(Exception):
    """A held request made room for one of another key, which has fewer of them waiting.

    Args:
        admission: What it would be told if it came now.
    """

    def __init__(self, admission: Admission) -> None:
        super().__init__("requests of other keys need the place")
        self.admission = admission


class WorkerGoneError(Exception):
    """The one worker that a held request waited for takes no more requests."""


class Waiting:
    """A request that waits for a slot: the answer to `SlotTable.wait`.

    Attributes:
        endpoint_id: Whom it calls.
        ask: The request.
        granted: Takes the slot.
        failed: Takes the reason why there will be none.
        worker_id: The only worker that will do; None for any.
        since_ms: When it began.
        place: In the queue; None when it waits no longer.
        slots: Whose slot it has while it is not told yet, which `handle` will do.
    """

    __slots__ = (
        "_cancel",
        "ask",
        "endpoint_id",
        "failed",
        "granted",
        "handle",
        "place",
        "since_ms",
        "slots",
        "worker_id",
    )

    def __init__(
        self,
        cancel: Callable[[Waiting], None],
        endpoint_id: str,
        ask: Ask,
        granted: Callable[[WorkerSlots], None],
        failed: Callable[[Exception], None],
        worker_id: str | None,
        since_ms: int,
    ) -> None:
        self._cancel = cancel
        self.endpoint_id = endpoint_id
        self.ask = ask
        self.granted = granted
        self.failed = failed
        self.worker_id = worker_id
        self.since_ms = since_ms
        self.place: Place[Waiting] | None = None
        self.slots: WorkerSlots | None = None
        self.handle: asyncio.Handle | None = None

    @property
    def constrained(self) -> bool:
        """Whether not every worker will do."""
        return self.worker_id is not None or bool(self.ask.tried)

    def cancel(self) -> None:
        """Wait no longer. Harmless once `granted` or `failed` was called: the slot is the caller's then."""
        self._cancel(self)

    def deliver(self) -> None:
        """Hand over the slot that was free at once."""
        slots, self.handle, self.slots = self.slots, None, None
        assert slots is not None
        self.granted(slots)


class Ends:
    """Workers that are going to end, and who waits for that."""

    def __init__(self) -> None:
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}

    async def wait(self, worker_id: str) -> None:
        """Return when a worker has ended."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(worker_id, set())
        waiters.add(ended)
        try:
            await ended
        finally:
            waiters.discard(ended)
            if not waiters and self._waiters.get(worker_id) is waiters:
                del self._waiters[worker_id]

    def tell(self, worker_id: str) -> None:
        """A worker has ended."""
        for ended in self._waiters.pop(worker_id, ()):
            if not ended.done():
                ended.set_result(None)


_number_of = attrgetter("number")


@dataclass(slots=True)
class EndpointSlots:
    """One endpoint's.

    Attributes:
        workers: By id, in the order in which they were opened first.
        queue: Requests that wait, and the accounts of their keys.
        constrained: How many of them not every worker will do for.
        held_bytes: Bytes of their bodies.
        aside: Requests that wait for something else than a slot.
        retry_ms: Until when no worker is started.
        candidates: Workers with a free slot for requests, by their numbers; None when that has to be looked
            up again. Slots that are taken and given back are no reason for that (`used`): where all are in
            use, that happens twice for every request.
        ready: Workers that take requests, as of that look-up.
        opened: How many workers were ever added.
        serving: Whether slots are being handed out, so that what comes of that does not begin it anew.
        freed: Whether a slot was given back meanwhile.
    """

    workers: dict[str, WorkerSlots] = field(default_factory=dict)
    queue: FairQueue[Waiting] = field(default_factory=FairQueue)
    constrained: int = 0
    held_bytes: int = 0
    aside: int = 0
    retry_ms: int | None = None
    candidates: list[WorkerSlots] | None = None
    ready: int = 0
    opened: int = 0
    serving: bool = False
    freed: bool = False

    @property
    def unused(self) -> bool:
        """Whether nothing would be lost with it."""
        busy = self.workers or self.queue or self.queue.under_way or self.aside
        return not busy and self.retry_ms is None

    def look(self, tried: frozenset[str] = frozenset()) -> list[WorkerSlots]:
        """Workers with a free slot for requests, the oldest first. Not to be changed or kept.

        Args:
            tried: Ids of workers that will not do.
        """
        if self.candidates is None:
            ready = [slots for slots in self.workers.values() if slots.takes_requests]
            self.ready = len(ready)
            self.candidates = [slots for slots in ready if slots.requests + slots.jobs < slots.capacity]
        if tried:
            return [slots for slots in self.candidates if slots.worker_id not in tried]
        return self.candidates

    def add(self, slots: WorkerSlots) -> None:
        """Take in a worker that was not there before."""
        self.opened += 1
        slots.number = self.opened
        self.workers[slots.worker_id] = slots

    def used(self, slots: WorkerSlots, before: int) -> None:
        """Slots of a worker were taken or given back; `before` were in use."""
        was_free, free = before < slots.capacity, slots.requests + slots.jobs < slots.capacity
        if was_free is free or self.candidates is None or not slots.takes_requests:
            return
        place = bisect_left(self.candidates, slots.number, key=_number_of)
        if free:
            self.candidates.insert(place, slots)
        else:
            del self.candidates[place]
