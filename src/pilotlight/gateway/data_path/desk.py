"""Where requests of the data path get their slots: counted, admitted, held, routed and given back.

One desk decides for all. In the process that has the slots that is `LocalDesk`; a process that only serves
the data path asks it through `gateway.processes`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pilotlight.core.admission import Verdict
from pilotlight.core.deadlines import HoldBound, hopeless
from pilotlight.domain.endpoint import Endpoint
from pilotlight.domain.key import ApiKey
from pilotlight.domain.worker import Registration
from pilotlight.gateway.data_path.patience import Patience
from pilotlight.gateway.data_path.refusals import Refusals, StartFailedError
from pilotlight.gateway.directory import Directory
from pilotlight.gateway.key_limits import KeyLimits, Taken
from pilotlight.gateway.openai_access import living_endpoint, no_endpoint
from pilotlight.gateway.outlook import Outlook
from pilotlight.gateway.slots import Ask, DisplacedError, SlotTable, WorkerSlots
from pilotlight.ports.fleet import Fleet
from pilotlight.settings import LimitSettings


class Observed(Protocol):
    """Told how a worker did, before its slot is given back (`FleetRouter.observed`)."""

    def __call__(self, worker_id: str, /, *, failed: bool, first_byte_ms: int | None) -> None:
        """A request that the worker had has ended, after so many ms until the first byte of its answer."""
        ...


def _nobody(_worker_id: str, /, *, failed: bool, first_byte_ms: int | None) -> None:
    """Where nothing is made of how workers do."""


class Slot(Protocol):
    """A slot of a worker, which is the request's until it gives it back."""

    @property
    def worker_id(self) -> str:
        """Whose."""
        ...

    @property
    def registration(self) -> Registration | None:
        """How the worker is reached; never None for a slot that was granted."""
        ...


@dataclass(slots=True)
class Wish:
    """A request that wants slots: one at a time, and another when a worker could not be reached or died.

    Attributes:
        endpoint: Whom it calls.
        key: Whose request it is.
        ask: The request, as the slots see it.
        tokens: Expected of it, for the limits of its key.
        taken: What those limits say, from the moment at which it was counted; None before, and for a key
            without limits. The desk's to set.
    """

    endpoint: Endpoint
    key: ApiKey
    ask: Ask
    tokens: int
    taken: Taken | None = None


@dataclass(slots=True)
class Use:
    """What became of a slot.

    Attributes:
        failed: Whether the worker could not be reached, broke off, or answered with a status from 500 on.
        first_byte_ms: From the sending of the request to the first byte of the answer's body; None for none.
        service_ms: How long the request had the slot; None if no answer began.
        cost: What it has cost (`core.fair_queue.cost_of`); None if nobody knows.
    """

    failed: bool
    first_byte_ms: int | None = None
    service_ms: float | None = None
    cost: int | None = None


class Seeker(Protocol):
    """Who waits for a slot; told one of the two, once. Must not raise."""

    def granted(self, slot: Slot) -> None:
        """Here it is; to be given back."""
        ...

    def refused(self, error: Exception) -> None:
        """There will be none: a `RequestRefusedError`, or a fault of ours."""
        ...


class Ticket(Protocol):
    """A seeker's place in the queue."""

    def cancel(self) -> None:
        """Seek no longer. Harmless once the seeker was told."""
        ...


class Desk(Protocol):
    """Gives slots."""

    def seek(self, wish: Wish, bound: HoldBound, seeker: Seeker) -> Ticket | None:
        """Ask for a slot; the first time, the request is counted, too, and must come to an `end`.

        Args:
            wish: The request.
            bound: How long it may be held.
            seeker: Told of the slot.

        Returns:
            Its place; None if the seeker was told already.

        Raises:
            RequestRefusedError: There is none, in place of `refused`.
        """
        ...

    def give_back(self, wish: Wish, slot: Slot, use: Use) -> None:
        """Give back a slot that was granted."""
        ...

    def end(self, wish: Wish, tokens: int | None) -> None:
        """The request is over, and has no slot and no place any more.

        Args:
            wish: The request; it was sought for.
            tokens: What it has cost, of prompt and completion together; None if nobody knows, or its key has
                no limits.
        """
        ...

    def suspend(self, worker_id: str, seconds: float) -> None:
        """Send a worker no requests for a while: it cannot be reached, or broke off."""
        ...

    async def lives(self, worker_ids: frozenset[str]) -> bool:
        """Whether one of these workers takes requests, or will when its suspension ends."""
        ...

    def comment(self, endpoint: Endpoint, waited_ms: int, told: Callable[[bytes], None]) -> None:
        """Make a comment for a stream that waits (`gateway.outlook`).

        Args:
            endpoint: Whose worker it waits for.
            waited_ms: For how long.
            told: Called with it, at once or later.
        """
        ...


class LocalDesk:
    """The desk of the process that has the slots.

    Args:
        directory: Endpoints.
        slots: Admission and the hold.
        key_limits: Counts what keys ask for.
        fleet: Asked only to say what a caller waited for.
        outlook: Asked to say for how long.
        limits: Bounds.
        observed: Told how workers do.
    """

    def __init__(
        self,
        *,
        directory: Directory,
        slots: SlotTable,
        key_limits: KeyLimits,
        fleet: Fleet,
        outlook: Outlook,
        limits: LimitSettings,
        observed: Observed = _nobody,
    ) -> None:
        self.slots = slots
        self.limits = limits
        self.observed = observed
        self.patience = Patience(slots)
        self.refusals = Refusals(fleet=fleet, outlook=outlook)
        self.directory = directory
        self._key_limits = key_limits
        self._outlook = outlook

    def seek(self, wish: Wish, bound: HoldBound, seeker: Seeker) -> Ticket | None:
        """See `Desk`."""
        endpoint, ask, key = wish.endpoint, wish.ask, wish.key
        if key.limited and wish.taken is None:
            wish.taken = self._key_limits.take(key, wish.tokens)
            if wish.taken.refused is not None:
                raise wish.taken.refused
        living_endpoint(self.directory, endpoint.id)
        admission, slots = self.slots.admit(endpoint.id, ask)
        if slots is not None:
            seeker.granted(slots)
            return None
        if admission.verdict is Verdict.SHED:
            raise self.refusals.shed(endpoint, admission, self.limits)
        expected_ms = self.patience.expected_ms(endpoint.id, ask) if bound.by_client else None
        if hopeless(expected_ms, bound):
            raise self.refusals.hopeless(endpoint, expected_ms, bound)
        return _Held(self, wish, bound, seeker)

    def give_back(self, wish: Wish, slot: Slot, use: Use) -> None:
        """See `Desk`."""
        assert isinstance(slot, WorkerSlots)
        self.observed(slot.worker_id, failed=use.failed, first_byte_ms=use.first_byte_ms)
        if use.service_ms is not None:
            self.patience.served(wish.endpoint.id, use.service_ms)
        self.slots.release_request(slot, wish.ask, tokens=use.cost)

    def end(self, wish: Wish, tokens: int | None) -> None:
        """See `Desk`."""
        if wish.taken is not None:
            self._key_limits.give_back(wish.key, wish.taken, tokens)

    def suspend(self, worker_id: str, seconds: float) -> None:
        """See `Desk`."""
        self.slots.suspend_worker(worker_id, seconds)

    async def lives(self, worker_ids: frozenset[str]) -> bool:
        """See `Desk`."""
        workers = [self.slots.worker(worker_id) for worker_id in worker_ids]
        return any(slots is not None and slots.open for slots in workers)

    def comment(self, endpoint: Endpoint, waited_ms: int, told: Callable[[bytes], None]) -> None:
        """See `Desk`."""
        told(self._outlook.comment(self.directory.endpoint(endpoint.id) or endpoint, waited_ms))


class _Held:
    """A request that is held: the ticket of its seeker."""

    __slots__ = ("_bound", "_desk", "_seeker", "_timer", "_waiting", "_wish")

    def __init__(self, desk: LocalDesk, wish: Wish, bound: HoldBound, seeker: Seeker) -> None:
        self._desk = desk
        self._wish = wish
        self._bound = bound
        self._seeker = seeker
        self._waiting = desk.slots.wait(wish.endpoint.id, wish.ask, self._granted, self._not_granted)
        self._timer = asyncio.get_running_loop().call_later(bound.seconds, self._expired)

    def cancel(self) -> None:
        """See `Ticket`."""
        self._waiting.cancel()
        self._timer.cancel()

    def _granted(self, slots: WorkerSlots) -> None:
        self._timer.cancel()
        self._seeker.granted(slots)

    def _not_granted(self, error: Exception) -> None:
        self._timer.cancel()
        desk, endpoint = self._desk, self._wish.endpoint
        if desk.directory.endpoint(endpoint.id) is None:
            error = no_endpoint()
        elif isinstance(error, DisplacedError):
            error = desk.refusals.shed(endpoint, error.admission, desk.limits)
        elif isinstance(error, StartFailedError):
            error = desk.refusals.not_started(endpoint, error)
        self._seeker.refused(error)

    def _expired(self) -> None:
        self._waiting.cancel()
        desk, endpoint, bound = self._desk, self._wish.endpoint, self._bound
        if bound.by_client:
            expected_ms = desk.patience.expected_ms(endpoint.id, self._wish.ask)
            self._seeker.refused(desk.refusals.overdue(endpoint, expected_ms, bound))
        else:
            self._seeker.refused(desk.refusals.expired(endpoint, bound.seconds))


async def hold(desk: Desk, wish: Wish, bound: HoldBound) -> Slot:
    """Wait for a slot; it must be given back.

    Raises:
        RequestRefusedError: There is none; one that is EXPIRED if none came in time.
    """
    holder = _Holder()
    ticket = desk.seek(wish, bound, holder)
    try:
        return await holder.told
    except asyncio.CancelledError:
        if ticket is not None:
            ticket.cancel()
        if holder.slot is not None:
            desk.give_back(wish, holder.slot, Use(failed=False, cost=0))
        raise


class _Holder:
    """The seeker of `hold`."""

    def __init__(self) -> None:
        self.told: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self.slot: Slot | None = None

    def granted(self, slot: Slot) -> None:
        """See `Seeker`."""
        self.slot = slot
        if not self.told.cancelled():
            self.told.set_result(slot)

    def refused(self, error: Exception) -> None:
        """See `Seeker`."""
        if not self.told.cancelled():
            self.told.set_exception(error)
